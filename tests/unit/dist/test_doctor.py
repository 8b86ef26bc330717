"""The doctor's judgement of invented nodes, one thing wrong at a time, and its look at this machine."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compt.dist import collectives as dist
from compt.dist.doctor import together as doctor_together, trial as doctor_trial
from compt.cli.main import app
from compt.dist.environment import Place
from compt.dist.rendezvous import interface_of
from compt.dist.doctor.findings import GIB, MIB, Finding, is_fit, judge
from compt.dist.doctor.together import Together
from compt.dist.doctor.trial import Collective, try_collective
from compt.errors import ConfigError
from tests.dist.spawn import run_ranks

WELL = Together(seconds=[0.0, 0.1], clocks=[0.0, 0.01], collectives={"gloo": Collective(3.0), "nccl": Collective(1.0)})
BROKEN = Collective(problem="the sum was wrong (rank 1)")
GPU = "NVIDIA A100-SXM4-80GB 80 GiB"


def facts(node: str, rank: int, **changes: Any) -> dict[str, Any]:
    values = {
        "node": node,
        "rank": rank,
        "local_rank": 0,
        "gpu": 0,
        "versions": {"torch": "2.11.0", "timm": "1.0.31"},
        "driver": "570.86",
        "cuda": "13.0",
        "gpus": [GPU, GPU],
        "nccl": "2.28.9",
        "cuda_error": "",
        "folder": "runs",
        "free_disk": 500 * GIB,
        "shared_memory": 64 * GIB,
        "open_files": 65536,
        "locked_memory": None,
        "infiniband": True,
        "address": f"10.0.0.{rank + 1}",
        "interface": "eth0",
    }
    assert changes.keys() <= values.keys()
    return {**values, **changes}


def found(together: Together = WELL, **changes: Any) -> dict[str, Finding]:
    """The findings by name where the second of two nodes is otherwise."""
    return {item.check: item for item in judge([facts("a", 0), facts("b", 1, **changes)], together)}


def test_nodes_that_are_well() -> None:
    findings = found()
    assert {item.state for item in findings.values()} == {"ok"}
    assert findings["GPUs"].found == f"2 x {GPU}"
    assert is_fit(list(findings.values()))


@pytest.mark.parametrize(
    ("changes", "check", "state", "told"),
    [
        ({"driver": "550.1"}, "driver", "wrong", "570.86 on a; 550.1 on b"),
        ({"driver": None}, "driver", "wrong", "none on b"),
        ({"gpus": [], "cuda_error": "the driver is too old"}, "CUDA", "wrong", "too old"),
        ({"gpus": ["other", "other"]}, "GPUs", "note", "other on b"),
        ({"gpus": [GPU], "local_rank": 1, "gpu": 1}, "a GPU for each", "wrong", "process 1 of b sees 1"),
        ({"nccl": "2.20.0"}, "NCCL", "wrong", "2.20.0 on b"),
        ({"versions": {"torch": "2.10.0", "timm": "1.0.31"}}, "torch", "wrong", "2.10.0 on rank 1"),
        ({"versions": {"torch": "2.11.0"}}, "timm", "wrong", "none on rank 1"),
        ({"free_disk": 15 * GIB}, "free disk", "note", "15.0 GiB"),
        ({"free_disk": GIB // 2}, "free disk", "wrong", "0.5 GiB"),
        ({"shared_memory": GIB}, "shared memory", "note", "1,024 MiB in /dev/shm on b"),
        ({"shared_memory": 64 * MIB}, "shared memory", "wrong", "64 MiB in /dev/shm on b"),
        ({"open_files": 1024}, "open files", "note", "1024 on b"),
        ({"locked_memory": 8 * MIB}, "locked memory", "note", "8 MiB on b"),
        ({"address": "127.0.1.1", "interface": "lo"}, "network", "note", "b: lo (127.0.1.1)"),
    ],
)
def test_one_node_is_otherwise(changes: dict[str, Any], check: str, state: str, told: str) -> None:
    findings = found(**changes)
    assert (findings[check].state, told in findings[check].found) == (state, True), findings[check]
    assert findings[check].remedy
    assert is_fit(list(findings.values())) == (state != "wrong")


@pytest.mark.parametrize(
    ("changes", "check", "state", "told"),
    [
        ({"unseen": [1]}, "shared disk", "wrong", "ranks 1 do not see"),
        ({"seconds": [0.0, 4.0]}, "shared disk", "note", "4.00 s"),
        ({"torn": [1]}, "renaming", "wrong", "ranks 1 read half"),
        ({"unlocked": [1]}, "locks", "wrong", "ranks 1 out"),
        ({"clocks": [0.0, -2.0]}, "clocks", "note", "2.000 s"),
        ({"clocks": [0.0, 60.0]}, "clocks", "wrong", "60.000 s"),
        (
            {"collectives": {"nccl": Collective(problem="the sum was wrong (rank 1)")}},
            "nccl",
            "wrong",
            "sum was wrong (rank 1)",
        ),
    ],
)
def test_something_between_nodes(changes: dict[str, Any], check: str, state: str, told: str) -> None:
    finding = found(dataclasses.replace(WELL, **changes))[check]
    assert (finding.state, told in finding.found) == (state, True), finding
    assert finding.remedy


def test_a_gpu_bound_to_each_task_is_one_for_each() -> None:
    bound = [facts(node, at, gpus=[GPU], local_rank=at % 2) for at, node in enumerate("aabb")]
    findings = {item.check: item for item in judge(bound, WELL)}
    assert "a GPU for each" not in findings
    assert {item.state for item in findings.values()} == {"ok"}


@pytest.mark.parametrize(
    ("by_slurm", "local", "visible", "expected"),
    [(True, 3, 1, 0), (True, 3, 4, 3), (False, 0, 1, 0), (False, 1, 1, None), (True, 4, 4, None)],
)
def test_nccl_is_tried_on_the_gpu_that_a_training_takes(
    by_slurm: bool, local: int, visible: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(local, 8, local, "head", 29500, by_slurm=by_slurm)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    tried: list[tuple[str, str]] = []
    monkeypatch.setattr(doctor_together, "try_collective", lambda *words: tried.append(words[:2]) or Collective(1.0))
    found = doctor_together._collectives(place)
    assert tried == [("gloo", "cpu"), *([("nccl", f"cuda:{expected}")] if expected is not None else [])]
    assert ("nccl" in found) == (expected is not None)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if expected is None:
        with pytest.raises(ConfigError, match="does not exist"):
            dist._choose_device("cuda", place)
    else:
        assert dist._choose_device("cuda", place).index == expected


def test_nccl_that_was_not_tried_is_said() -> None:
    finding = found(dataclasses.replace(WELL, collectives={"gloo": Collective(3.0)}))["nccl"]
    assert (finding.state, "a GPU of its own" in finding.found) == ("not checked", True)


def collectives(folder: Path) -> list[Collective | str]:
    """gloo as it should be, where the host needs no name for itself, and without rank 1's process, or its temporary
    folder; then the whole of the doctor, for which something failed.
    """
    with pytest.MonkeyPatch.context() as patch:
        if dist.rank() == 0:
            patch.delenv("TORCHELASTIC_USE_AGENT_STORE")
            patch.setenv("MASTER_ADDR", "nowhere.invalid")
        found = [try_collective("gloo", "cpu", "well")]
    own = sys.executable
    if dist.rank() == 1:
        sys.executable = "/bin/false"
    found.append(try_collective("gloo", "cpu", "gone", 3.0))
    sys.executable = own
    with pytest.MonkeyPatch.context() as patch:
        if dist.rank() == 1:
            patch.setattr(tempfile, "tempdir", str(folder / "missing"))
        found.append(try_collective("gloo", "cpu", "homeless", 3.0))
    with pytest.MonkeyPatch.context() as patch:
        problem = Collective(problem="no answer within 60 s (rank 0, 1)")
        patch.setattr(doctor_together, "try_collective", lambda *_: problem)
        shown = CliRunner().invoke(app, ["doctor", str(folder), "--json"])
    return [*found, f"{shown.exit_code} {shown.stdout}"]


@pytest.mark.dist
def test_a_collective_that_fails_is_a_finding_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(collectives, 2, tmp_path)
    assert first[:3] == second[:3]
    well, gone, homeless = first[:3]
    assert well.problem == ""
    assert 0 < well.milliseconds < 60_000
    assert gone.problem == "nothing was heard of rank 1 for 3 s (rank 0); its process ended with 1 (rank 1)"
    assert homeless.problem == (
        "nothing was heard of rank 1 for 3 s (rank 0); "
        "its process could not be started: No such file or directory (rank 1)"
    )
    assert second[3] == "1 "
    assert first[3].startswith("1 ")
    finding = next(item for item in json.loads(first[3][2:])["findings"] if item["check"] == "gloo")
    assert (finding["state"], "failed: no answer within 60 s (rank 0, 1)" in finding["found"]) == ("wrong", True)


@pytest.mark.parametrize(
    ("rank", "agent", "address"), [(0, None, "127.0.0.1"), (1, None, "node7"), (0, "True", "node7")]
)
def test_a_trial_seeks_the_store_where_its_rank_does(
    rank: int, agent: str | None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 needs no way through the network to itself, unless torchrun serves the store."""
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "node7", "MASTER_PORT": "4321"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if agent is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)

    def seek(host: str, port: int, **_: Any) -> None:
        raise RuntimeError(f"{host}:{port}")

    monkeypatch.setattr("torch.distributed.TCPStore", seek)
    with pytest.raises(RuntimeError, match=f"^{address}:4321$"):
        doctor_trial._all_reduce("gloo", "cpu", "token", 1.0)


def test_a_trial_that_hangs_ends_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's client waits without limit for a store that takes its connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": silent.getsockname()[1]}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        words = (tmp_path / "told", "gloo", "cpu", "token", 60.0)
        parent = multiprocessing.get_context("fork").Process(target=doctor_trial._start, args=words, daemon=True)
        parent.start()
        silent.settimeout(60.0)
        trial, _ = silent.accept()
        with trial:
            parent.kill()
            parent.join()
            trial.settimeout(10.0)
            while trial.recv(4096):
                pass


def test_a_trial_that_cannot_be_killed_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(begin(["sleep", "20"], **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(begin, "kill", lambda process: None)
    monkeypatch.setattr(doctor_trial, "STARTING", 0.2)
    monkeypatch.setattr(doctor_trial, "DYING", 0.2)
    begun = time.monotonic()
    told = doctor_trial._start(tmp_path / "told", "gloo", "cpu", "token", 0.0)
    assert told == "no answer within 0.2 s, and its process cannot be killed"
    assert time.monotonic() - begun < 10
    started[0].terminate()
    started[0].wait()


def test_a_trial_that_cannot_be_started_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", start)
    told = try_collective("gloo", "cpu", "token").problem
    assert told == "its process could not be started: Resource temporarily unavailable (rank 0)"


def test_a_trial_that_could_not_write_what_it_found_is_not_started() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        told = try_collective("gloo", "cpu", "token", 1.0).problem
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told == "its process could not be started: File too large (rank 0)"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_interface_is_found_by_either_kind_of_address(address: str) -> None:
    if address == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    assert interface_of(address) == "lo"
    assert interface_of("2001:db8::7%eth0") is None
    assert interface_of("unknown") is None


def test_a_machine_without_gpus_says_what_was_not_checked() -> None:
    alone = facts("a", 0, driver=None, gpus=[], infiniband=False, locked_memory=8 * MIB)
    findings = {item.check: item for item in judge([alone], Together(alone=True))}
    for check in ("GPUs", "shared disk", "clocks"):
        assert findings[check].state == "not checked"
    assert findings["locked memory"].state == "ok"
    assert is_fit(list(findings.values()))


def test_this_machine(tmp_path: Path) -> None:
    place = tmp_path / "new" / "runs"
    shown = CliRunner().invoke(app, ["doctor", str(place), "--json"])
    told = json.loads(shown.stdout)
    assert told["ok"] == (shown.exit_code == 0)
    assert {"processes", "versions", "free disk", "open files"} <= {item["check"] for item in told["findings"]}
    assert list(place.iterdir()) == []
    table = CliRunner().invoke(app, ["doctor", str(place)])
    assert "not checked" in table.stdout
