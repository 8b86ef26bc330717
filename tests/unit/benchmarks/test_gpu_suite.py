"""The suite for GPUs: its order, that it loses no results, and that it ends in time."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import suite as gpu_suite
from benchmarks.gpu.checks.chain import limit
from benchmarks.gpu.checks.table import CHECKS
from benchmarks.gpu.suite import Item, all_items, batch_for, chosen_items, setup_of
from benchmarks.gpu.worker import WorkerError, WorkerTimeout
from compt.cost.speed import Measurement, Throughput
from compt.errors import ConfigError
from compt.models.presets import PRESETS

ONLY = ["--only", "check/a*", "--only", "speed/vit_pico", "--only", "speed/vit_nano*"]
NAMES = ["check/arithmetic", "check/adamw", "speed/vit_pico", "speed/vit_nano", "speed/vit_nano<vit_pico"]


class Fake:
    """Replaces the process: answers at once, or does what `on` says. The clock advances by 100 s a call."""

    on: Callable[[int], Any] = staticmethod(lambda call: None)
    asked: list[str]
    now: float

    def __init__(self, log: Path) -> None:
        pass

    def run(self, function: Callable[..., Any], first: Any, *more: Any, seconds: float) -> Any:
        names = "<".join(first) if isinstance(first, tuple) else first
        Fake.asked.append(names if isinstance(names, str) else names.student.name)
        Fake.now += 100
        found = Fake.on(len(Fake.asked))
        if found is not None:
            return found
        if function is gpu_suite.check:
            return [{"what": "x", "value": 0.5, "most": 1.0, "least": -float("inf"), "passed": True}]
        times = {"batch": 4, "repeats": 3, "seconds_per_sample": 0.5, "low": 0.25, "high": 1.0}
        made = Measurement(student=first.student, teacher=first.teacher, captions=4, tokens=77, **times)
        return made.model_dump(mode="json")

    def stop(self) -> None:
        pass


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "Worker", Fake)
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: Fake.now)
    Fake.asked, Fake.now, Fake.on = [], 0.0, staticmethod(lambda call: None)  # type: ignore[assignment]


def suite(out: Path, *words: str) -> int:
    Fake.asked = []
    return gpu_suite.main(["--device", "cpu", "--out", str(out), *(words or ONLY)])


def names(out: Path) -> list[str]:
    return [record["name"] for record in json.loads(out.read_text())["gpu_suite"]]


def test_correctness_comes_first_and_every_preset_is_in_it() -> None:
    items = all_items()
    kinds = [item.kind for item in items]
    assert kinds == sorted(kinds)  # check, then peers, then speed
    assert [item.models for item in items if item.models] == list(gpu_suite.PEERS)
    assert len({item.name for item in items}) == len(items)
    assert [item.name for item in items][: len(CHECKS)] == [f"check/{name}" for name in CHECKS]
    alone = {item.setup.student.name for item in items if item.setup and item.setup.teacher is None}
    links = {item.setup.student.name for item in items if item.setup and item.setup.teacher}
    assert alone == set(PRESETS)
    assert alone - links == {"vit_t16", "swin_t", "swin_b384", "vit_pico"}  # the first of each chain
    assert {"speed/vit_b16+fsdp2", "speed/vit_b16+zero3", "speed/vit_b16+compiled", "speed/vit_b16+graphs"} <= {
        item.name for item in items
    }
    assert sum(item.search for item in items) == 1


def test_a_second_call_resumes_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"

    def kill(call: int) -> None:
        if call == 4:
            raise KeyboardInterrupt

    Fake.on = staticmethod(kill)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        suite(out)
    assert names(out) == NAMES[:3]
    Fake.on = staticmethod(lambda call: None)  # type: ignore[assignment]
    assert suite(out) == 0
    assert Fake.asked == ["vit_nano", "vit_nano"]
    assert names(out) == NAMES
    assert capsys.readouterr().out.count("(from an earlier call)") == 3
    assert suite(out) == 0
    assert Fake.asked == []
    made = Throughput.read(out.with_suffix(".throughput.json"))
    assert [(entry.student.name, entry.teacher and entry.teacher.name) for entry in made.entries] == [
        ("vit_pico", None),
        ("vit_nano", None),
        ("vit_nano", "vit_pico"),
    ]
    assert suite(out, *ONLY, "--fresh") == 0
    assert len(Fake.asked) == 5
    assert suite(out, "--only", "speed/vit_pico", "--fresh") == 0
    assert Fake.asked == ["vit_pico"]
    assert sorted(names(out)) == sorted(NAMES), "the others stay"


def test_the_suite_ends_in_time_and_names_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"
    assert suite(out, *ONLY, "--budget", "305") == 0
    assert names(out) == NAMES[:3]
    assert "Left, as the time was up: speed/vit_nano, speed/vit_nano<vit_pico." in capsys.readouterr().out
    assert suite(out, *ONLY, "--budget", "305") == 0
    assert names(out) == NAMES
    assert "Left" not in capsys.readouterr().out


def test_items_without_time_are_left_and_hanging_items_are_recorded(tmp_path: Path) -> None:
    out = tmp_path / "s.json"

    def hang(call: int) -> None:
        if call == 2:
            raise WorkerTimeout("no answer")

    Fake.on = staticmethod(hang)  # type: ignore[assignment]
    assert suite(out, *ONLY, "--budget", "150") == 0
    assert names(out) == NAMES[:1]
    out.unlink()
    assert suite(out) == 1
    record = json.loads(out.read_text())["gpu_suite"][1]
    assert (record["passed"], record["error"]) == (False, "no answer")
    assert names(out) == NAMES  # what hung for as long as it may is not tried again


def test_a_failed_check_sets_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [{"what": "worst gradient", "value": 0.5, "most": 1e-4, "least": -float("inf"), "passed": False}]
    Fake.on = staticmethod(lambda call: bad if call == 2 else None)  # type: ignore[assignment]
    assert suite(tmp_path / "s.json") == 1
    assert "check/adamw: FAILED: worst gradient 0.5 (at most 0.0001)" in capsys.readouterr().out

    def crash(call: int) -> None:
        raise WorkerError("its process died (exit code -11)")

    Fake.on = staticmethod(crash)  # type: ignore[assignment]
    assert suite(tmp_path / "t.json", "--only", "speed/vit_pico") == 0
    assert suite(tmp_path / "t.json", "--only", "check/ddp") == 1
    assert "its process died (exit code -11)" in capsys.readouterr().out


def test_checks_depend_on_the_source_and_all_results_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.json"
    suite(out)
    records = json.loads(out.read_text())
    del records["gpu_suite"][-1]["measurement"]
    records["gpu_suite"][-1]["error"] = "no answer"
    out.write_text(json.dumps(records))
    suite(out)
    assert Fake.asked == [], "an error stays with its source"
    monkeypatch.setattr(gpu_suite, "source_hash", lambda: "another")
    suite(out)
    assert Fake.asked == ["arithmetic", "adamw", "vit_nano"]
    monkeypatch.setattr(gpu_suite, "device_name", lambda device: "NVIDIA X")
    suite(out)
    assert len(Fake.asked) == 5
    assert len(names(out)) == 13
    monkeypatch.setattr(gpu_suite, "versions", lambda: {"torch": "9"})
    suite(out)
    assert len(Fake.asked) == 5


def test_the_source_includes_all_training_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "compt/a.py",
        "compt/b/c.py",
        "benchmarks/gpu/checks/table.py",
        "benchmarks/paper/counting.py",
        "launchers/train.py",
    ]
    names += ["compt/ds_configs/zero2.json", "tests/helpers/shards.py"]
    for name in (*names, "benchmarks/other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    hashes = [gpu_suite.source_hash()]
    (tmp_path / "benchmarks/other.py").write_text("2")
    assert gpu_suite.source_hash() == hashes[0]
    for name in names:
        (tmp_path / name).write_text("2")
        hashes.append(gpu_suite.source_hash())
    assert len(set(hashes)) == 1 + len(names)


def imports(path: Path, root: Path) -> list[Path]:
    """The modules of benchmarks and tests that one of them takes from, within functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    files = [root / f"{name.replace('.', '/')}.py" for name in modules if name.split(".")[0] in ("benchmarks", "tests")]
    assert all(file.is_file() for file in files)  # else a name of a package was taken, whose module is not seen here
    return files


def test_the_source_includes_all_imports_of_the_checks(root: Path) -> None:
    covered = {path for pattern in gpu_suite.SOURCES for path in root.glob(pattern)}
    found = [root / "benchmarks" / "gpu" / "suite.py"]
    for path in found:
        found += [other for other in imports(path, root) if other not in found]
    assert {path.name for path in found} >= {"chain.py", "counting.py", "shards.py"}
    assert [path for path in found if path not in covered] == []
    assert all(any(root.glob(pattern)) for pattern in gpu_suite.SOURCES)


def test_the_first_call_makes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a real process, which opens its log before there is a result
    out = tmp_path / "runs" / "new" / "s.json"
    assert suite(out, "--only", "check/scaler") == 0
    assert names(out) == ["check/scaler"]
    assert out.with_suffix(".log").exists()


def test_an_impossible_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert suite(tmp_path / "file" / "s.json", "--only", "check/scaler") == 2
    said = capsys.readouterr().err
    assert said == f"--out {tmp_path}/file/s.json: its folder cannot be made (File exists)\n"


def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"
    assert suite(out, "--only", "speed/vit_t17") == 2
    said = capsys.readouterr().err
    assert said.startswith("--only speed/vit_t17 (did you mean 'speed/vit_t16'?): fits nothing")
    assert len(said.splitlines()) == 1
    out.write_text('{"gpu_suite": [')
    assert suite(out) == 2
    assert f"{out}: not a results file of the suite" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        chosen_items(["nothing"])


def test_batches_fit_the_step_time_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(gpu_suite, "peak_flops", lambda device, precision: 989e12)
    sizes: dict[int, list[int]] = {}
    for gib in (140, 10):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gib=gib: (0, gib * 2**30))
        jobs = [setup_of("vit_t16"), setup_of("vit_b16"), setup_of("vit_l16"), setup_of("swin_l384", "swin_b384")]
        sizes[gib] = [batch_for(job, cuda) for job in jobs]
        assert sizes[gib] == sorted(sizes[gib], reverse=True)
    assert sizes[140][0] == 512
    assert sizes[10][2] < sizes[140][2]
    assert min(sizes[10]) >= 1
    assert batch_for(setup_of("vit_l16"), torch.device("cpu")) == 4


def test_the_chains_leave_time_for_other_checks() -> None:
    chains = sum(item.seconds for item in all_items() if item.process == "chain")
    assert chains <= 0.75 * gpu_suite.BUDGET
    for name, check in CHECKS.items():
        if check.process == "chain":
            assert limit(name, torch.device("cuda")) < check.seconds


def test_item_kinds() -> None:
    assert Item("check/x", "plain", 1.0).kind == "check"
    assert Item("peers/x", "peers", 1.0, models=("vit_t16",)).kind == "peers"
    assert Item("speed/x", "plain", 1.0, setup_of("vit_t16")).kind == "speed"


def test_a_comparison_with_peers_is_written_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    row = {"model": "vit_s16", "teacher": "vit_t16", "captions": "four", "batch": 2, "seconds": [1.0, 2.0]}
    row |= {"flops_per_second": 1e12, "memory_bytes": None}
    rows = [{**row, "side": "compt, text=packed", "ratios": [1.0, 1.0]}, {**row, "side": "peer", "ratios": [3.0, 4.0]}]
    Fake.on = staticmethod(lambda call: rows)  # type: ignore[assignment]
    out, words = tmp_path / "s.json", ("--only", "peers/vit_s16*", "--batch", "2")
    for known in ("", " (from an earlier call)"):
        assert suite(out, *words) == 0
        said = capsys.readouterr().out
        assert f"peers/vit_s16<vit_t16@2: over compt, text=packed: peer 3.50{known}" in said
        assert "3.50 (3.00 to 4.00)" in said
    assert names(out) == ["peers/vit_s16<vit_t16@2"]


def test_a_real_comparison_with_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import study

    small = study.Captions("two", 2, 8, None)
    monkeypatch.setitem(study.CAPTIONS, "dreamlip", small)
    rows = gpu_suite.compare_peers(("vit_pico", "vit_nano"), "cpu", 2)
    assert [row["side"] for row in rows][:2] == ["compt, text=packed", "compt, text=buckets"]
    assert {(row["model"], row["teacher"]) for row in rows} == {("vit_nano", "vit_pico")}
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.full
def test_a_real_suite_resumes_after_a_kill(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    out = tmp_path / "s.json"
    words = [sys.executable, "-m", "benchmarks.gpu.suite", "--device", "cpu", "--out", str(out), "--seconds", "0"]
    words += ["--batch", "2", *ONLY]
    process = subprocess.Popen(words, cwd=root, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = names(out)
    assert 1 <= len(before) < 5
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(from an earlier call)") == len(before)
    assert names(out)[: len(before)] == before
    assert [name.removesuffix("@2") for name in names(out)] == NAMES
    assert children
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
