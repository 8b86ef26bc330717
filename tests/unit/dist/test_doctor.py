"""The doctor's findings: invented nodes with one defect each, ranks with one defect each, and this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compt.cli.main import app
from compt.dist import collectives as dist
from compt.dist.doctor import together
from compt.dist.doctor.findings import GIB, MIB, UNLIMITED, Finding, judge
from compt.dist.environment import Place
from compt.dist.rendezvous import interface_of
from compt.errors import ConfigError
from tests.dist.spawn import run_ranks

GPU = "NVIDIA A100-SXM4-80GB"
LIMITS = {"free disk": 500 * GIB, "shared memory": 64 * GIB, "open files": 65536, "locked memory": UNLIMITED}
ENVIRONMENT = {"torch": "2.11.0", "timm": "1.0.31", "nvidia_driver_version": "570.86", "os": "Debian 12"}


def facts(node: str, rank: int, **changes: Any) -> dict[str, Any]:
    values = {
        "node": node,
        "rank": rank,
        "gpu": 0,
        "gpus": [GPU, GPU],
        "cuda_error": "",
        "gpu_memory": (79 * GIB, 80 * GIB),
        "environment": ENVIRONMENT | {"nvidia_gpu_models": GPU},
        "limits": LIMITS,
    }
    assert changes.keys() <= values.keys()
    return {**values, **changes}


def found(**changes: Any) -> dict[str, Finding]:
    """Return the findings by name where the second of two nodes has other facts."""
    return {item.check: item for item in judge([facts("a", 0), facts("b", 1, **changes)])}


def test_nodes_that_are_well() -> None:
    findings = found()
    assert {item.state for item in findings.values()} == {"ok"}
    assert findings["GPUs"].found == f"2 x {GPU}"
    assert findings["GPU memory"].found == "79 of 80 GiB free"
    assert findings["environment"].found == "torch 2.11.0, nvidia_driver 570.86"


@pytest.mark.parametrize(
    ("changes", "check", "state", "shown"),
    [
        ({"gpus": [], "cuda_error": "the driver is too old", "gpu_memory": None}, "CUDA", "wrong", "too old"),
        ({"gpus": ["other", "other"]}, "GPUs", "note", "2 x other on b"),
        ({"gpus": [GPU], "gpu": 1}, "a GPU for each", "wrong", "none for rank 1 on b"),
        ({"gpu_memory": (9 * GIB, 80 * GIB)}, "GPU memory", "note", "9 of 80 GiB free on rank 1"),
        ({"environment": ENVIRONMENT | {"torch": "2.10.0"}}, "torch", "wrong", "2.11.0 on a; 2.10.0 on b"),
        ({"environment": {"torch": "2.11.0"}}, "timm", "wrong", "none on b"),
        (
            {"environment": ENVIRONMENT | {"nvidia_driver_version": "550.1"}},
            *("nvidia_driver_version", "wrong", "570.86 on a; 550.1 on b"),
        ),
        ({"environment": ENVIRONMENT | {"os": "Ubuntu"}}, "os", "note", "Ubuntu on b"),
        ({"limits": LIMITS | {"free disk": 15 * GIB}}, "free disk", "note", "15 GiB on b"),
        ({"limits": LIMITS | {"free disk": GIB // 2}}, "free disk", "wrong", "0 GiB on b"),
        ({"limits": LIMITS | {"shared memory": GIB}}, "shared memory", "note", "1,024 MiB in /dev/shm on b"),
        ({"limits": LIMITS | {"shared memory": 64 * MIB}}, "shared memory", "wrong", "64 MiB in /dev/shm on b"),
        ({"limits": LIMITS | {"open files": 1024}}, "open files", "note", "65,536 on a; 1,024 on b"),
        ({"limits": LIMITS | {"locked memory": 8 * MIB}}, "locked memory", "note", "unlimited on a; 8 MiB on b"),
    ],
)
def test_one_node_is_otherwise(changes: dict[str, Any], check: str, state: str, shown: str) -> None:
    findings = found(**changes)
    assert (findings[check].state, shown in findings[check].found) == (state, True), findings[check]
    assert findings[check].remedy
    assert ("wrong" in {item.state for item in findings.values()}) == (state == "wrong")


def test_a_gpu_bound_to_each_task_is_one_for_each() -> None:
    findings = judge([facts(node, at, gpus=[GPU]) for at, node in enumerate("aabb")])
    assert {item.state for item in findings} == {"ok"}


def test_a_machine_without_gpus_says_what_was_not_checked() -> None:
    limits = {name: value for name, value in LIMITS.items() if name != "locked memory"}
    alone = facts("a", 0, gpus=[], gpu_memory=None, environment=ENVIRONMENT, limits=limits)
    findings = {item.check: item for item in judge([alone])}
    assert findings["GPUs"].state == "not checked"
    assert "locked memory" not in findings


@pytest.mark.parametrize(
    ("by_slurm", "local", "visible", "expected"),
    [(True, 3, 1, 0), (True, 3, 4, 3), (False, 0, 1, 0), (False, 1, 1, None), (True, 4, 4, None)],
)
def test_nccl_is_tried_on_the_gpu_that_a_run_uses(
    by_slurm: bool, local: int, visible: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(local, 8, local, "head", 29500, by_slurm=by_slurm)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    tried: list[tuple[str, str]] = []

    def attempt(backend: str, device: torch.device) -> Finding:
        tried.append((backend, str(device)))
        return Finding(backend, "ok", "")

    monkeypatch.setattr(together, "_try_collective", attempt)
    findings = together.check_collectives(place)
    assert tried == [("gloo", "cpu"), *([("nccl", f"cuda:{expected}")] if expected is not None else [])]
    assert findings[1].state == ("ok" if expected is not None else "not checked")
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if expected is None:
        with pytest.raises(ConfigError, match="does not exist"):
            dist._choose_device("cuda", place)
    else:
        monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
        assert dist._choose_device("cuda", place).index == expected
        assert not torch.backends.cudnn.allow_tf32, "scores are true fp32"


@pytest.mark.parametrize(
    ("there", "ranks", "hidden", "said"),
    [
        (False, 8, None, ""),
        (True, 8, "", ""),
        (True, None, None, "warned"),
        (True, 1, None, "warned"),
        (True, 8, None, "refused"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_not_passed_over(
    there: bool,
    ranks: int | None,
    hidden: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Wheels for CUDA 13 on an older driver: a job would train on the CPUs of a node with eight GPUs."""

    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update")

    (tmp_path / ("nvidia3" if there else "nvidiactl")).touch()
    monkeypatch.setattr("compt.dist.collectives._DEVICES", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", fail)
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    place = None if ranks is None else Place(0, ranks, 0, "head", 29500, by_slurm=True)
    assert dist._choose_device("cpu", place).type == "cpu"
    if said == "refused":
        with pytest.raises(ConfigError, match=r"driver on your system is too old\. .*constraints-cu12") as error:
            dist._choose_device("auto", place)
        assert str(error.value).endswith("engine.device: cpu trains without GPUs")
        return
    assert dist._choose_device("auto", place).type == "cpu"
    lines = [record.getMessage() for record in caplog.records]
    assert [line.endswith("This runs on the CPU") for line in lines] == [True] * (said == "warned")


def defects(folder: Path) -> list[Any]:
    """Run the checks of the disk, and collectives, with one defect of rank 1 each; then the whole command."""
    second = dist.rank() == 1
    disk = []
    for name in ("", "_seconds_until", "_reads_torn", "_gets_lock"):
        with pytest.MonkeyPatch.context() as patch:
            real = getattr(together, name, None)
            if second and real:
                # The real function has collectives, which all ranks call.
                bad = {"_seconds_until": None}.get(name, True)
                patch.setattr(together, name, lambda path, real=real, bad=bad: (real(path), bad)[1])
            disk.append(together.check_disk(folder / "disk"))
    cpu = torch.device("cpu")
    tried = [together._try_collective("gloo", cpu)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "COLLECTIVE_SECONDS", 3.0)
        if second:
            patch.setattr(together, "_all_reduce", lambda *_: {}["a bug"])
        tried.append(together._try_collective("gloo", cpu))
        if second:
            patch.setattr(together, "_all_reduce", lambda *_: time.sleep(600))
        tried.append(together._try_collective("gloo", cpu))
        problem = Finding("gloo", "wrong", "no answer within 60 s (rank 0, 1)")
        patch.setattr(together, "_try_collective", lambda *_: problem)
        shown = CliRunner().invoke(app, ["doctor", str(folder / "whole"), "--json"])
    return [*disk, tried, f"{shown.exit_code} {shown.stdout}", list((folder / "whole").iterdir())]


@pytest.mark.dist
def test_a_defect_of_one_rank_is_a_finding_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(defects, 2, tmp_path)
    assert first[:5] == second[:5]
    well, unseen, torn, unlocked, tried = first[:5]
    assert [(each.check, each.state) for each in well] == [(n, "ok") for n in ("shared disk", "renaming", "locks")]
    assert [(each.check, each.state, each.found) for each in unseen] == [
        ("shared disk", "wrong", "ranks 1 do not see what rank 0 wrote")
    ]
    assert (torn[1].state, torn[1].found) == ("wrong", "ranks 1 read half a file, or none")
    assert (unlocked[2].state, unlocked[2].found) == ("wrong", "ranks 1 took a lock that rank 0 held")
    assert tried[0].found.startswith("all-reduce of 4 MiB in ")
    assert tried[1].found == "all-reduce of 4 MiB failed: no answer within 3 s (rank 0); 'a bug' (rank 1)"
    assert tried[2].found == "all-reduce of 4 MiB failed: no answer within 3 s (rank 0, 1)"
    assert second[5] == "1 "
    assert first[5].startswith("1 {")
    assert "no answer within 60 s (rank 0, 1)" in json.loads(first[5][2:])["findings"][-1]["found"]
    assert first[6] == []


def test_a_file_that_is_replaced_in_pieces_is_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_main", lambda: False)
    path = tmp_path / "replaced"
    path.write_bytes(together._content(together.RENAMES))
    assert not together._reads_torn(path)
    path.write_bytes(together._content(3) + together._content(4)[:500])
    assert together._reads_torn(path)
    path.unlink()
    assert together._reads_torn(path)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_interface_is_found_by_either_kind_of_address(address: str) -> None:
    if address == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    assert interface_of(address) == "lo"
    assert interface_of("2001:db8::7%eth0") is None
    assert interface_of("unknown") is None


def test_this_machine(tmp_path: Path) -> None:
    place = tmp_path / "new" / "runs"
    shown = CliRunner().invoke(app, ["doctor", str(place), "--json"])
    result = json.loads(shown.stdout)
    assert result["ok"] == (shown.exit_code == 0)
    assert {"processes", "environment", "free disk", "open files"} <= {item["check"] for item in result["findings"]}
    assert list(place.iterdir()) == []
    table = CliRunner().invoke(app, ["doctor", str(place)])
    assert "not checked" in table.stdout
