"""The checks for GPUs, run on the CPU, so that they work once there is a GPU."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.gpu.checks import cases as gpu_cases
from benchmarks.gpu.checks import chain as gpu_checks_chain
from benchmarks.gpu.checks import decoding as gpu_checks_decoding
from benchmarks.gpu.checks import processes as gpu_checks_processes
from benchmarks.gpu.checks import table as gpu_checks
from benchmarks.gpu.checks.cases import CASES, LINK, compare, oracle, train
from benchmarks.gpu.checks.chain import JOBS, STEPS, STOP
from benchmarks.gpu.checks.finding import Finding
from benchmarks.gpu.checks.table import CHECKS, run_check
from benchmarks.gpu.worker import Worker
from compt.engines.ddp import DataParallelEngine
from compt.engines.graphs import _CapturedStep
from tests.helpers.optional import optional
from tests.helpers.process import ended
from tests.helpers.recorded import Recorded, RecordedGraphs

CPU = torch.device("cpu")


def failed(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if not finding.passed]


@pytest.mark.parametrize("name", ["arithmetic", "adamw", "ddp", "scaler", "nonfinite", "waits"])
def test_a_check_of_one_process_passes_on_a_cpu(name: str) -> None:
    found = run_check(name, "cpu")
    assert found
    assert failed(found) == []


def test_replays_are_checked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA graphs; the check fails where nothing is captured, and where a replay is wrong."""
    assert len(run_check("graphs", "cpu")) == 8, "eager"
    monkeypatch.setitem(gpu_checks.RECORDERS, "cpu", RecordedGraphs)
    found = run_check("graphs", "cpu")
    assert failed(found) == []
    assert [finding.what for finding in found].count("steps replayed") == 3
    with monkeypatch.context() as patch:
        patch.setattr(_CapturedStep, "_capture", lambda step, recorder: None)
        assert failed(run_check("graphs", "cpu")) == ["steps replayed"] * 3
    monkeypatch.setattr(Recorded, "replay", lambda recorded: None)
    assert {"replayed: losses", "replayed: worst gradient", "bf16: loss"} <= set(failed(run_check("graphs", "cpu")))


def test_dali_passes_on_a_cpu_and_fails_for_another_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("nvidia.dali", "dali-cuda13")
    assert len(run_check("dali", "cpu")) == 4
    assert failed(run_check("dali", "cpu")) == []
    pixels = gpu_checks_decoding.TorchDecoder.pixels
    beside = lambda made, image, box, size: pixels(made, image, (box[0] + 40, *box[1:]), size)
    monkeypatch.setattr(gpu_checks_decoding.TorchDecoder, "pixels", beside)
    assert failed(run_check("dali", "cpu")) == ["pixels: mean difference", "pixels: largest difference"]


def test_only_peak_memory_needs_a_gpu() -> None:
    assert run_check("memory", "cpu") == []


def compiled_eagerly(names: list[str]) -> dict[str, list[str]]:
    """What fails of `names`, in this process, with the graphs of torch.compile run as they are."""
    original, calls = torch.compile, [0]

    def compile_eagerly(*arguments: Any, **options: Any) -> Any:
        calls[0] += isinstance(getattr(arguments[0], "__self__", None), nn.Module)
        return original(*arguments, **options, backend="eager")

    torch.compile = compile_eagerly
    found = {}
    for name in names:
        calls[0] = 0
        found[name] = failed(run_check(name, "cpu"))
        # Modules are compiled by a method of theirs, which has to find this function too.
        if name.startswith("compile") != bool(calls[0]):
            found[name].append(f"{calls[0]} blocks compiled")
    return found


@pytest.mark.slow
def test_checks_of_other_engines_pass_on_a_cpu(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "log")
    names = [name for name, check in CHECKS.items() if check.process not in ("plain", "chain")]
    engines = {"fsdp2", "zero0", "zero1", "zero2", "zero3", "processes", "graphs"}
    compiled = {"compile", "compile_towers", "compile_graphs", "compile_fsdp2", "compile_zero2", "compile_zero3"}
    assert engines | compiled | {"skips", "zero_skips", "checkpoint", "zero_checkpoint"} == set(names)
    try:
        assert worker.run(compiled_eagerly, names, seconds=500) == {name: [] for name in names}
    finally:
        worker.stop()


@pytest.mark.full
def test_a_chain_by_the_real_command_passes_on_a_cpu() -> None:
    found = run_check("chain", "cpu")
    assert failed(found) == []
    assert len(found) == 5 + 7 * len(JOBS)


def test_a_wait_within_a_step_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that CUDA would raise when a number of each step's images is read."""
    modes: list[str] = []

    def step(*arguments: Any, **options: Any) -> None:
        if modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(gpu_cases, "training_step", step)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = gpu_cases.waits
    monkeypatch.setattr(gpu_cases, "waits", lambda action, device: waits(action, torch.device("cuda")))
    found = run_check("waits", "cpu")
    assert failed(found) == [finding.what for finding in found]
    assert {words for finding in found for words in finding.what.split(", ")} >= {
        "fp16",
        "packed text",
        "2 text buckets",
    }
    assert modes == ["error", "default"] * len(found)


TRAINS = """
import json, pathlib, signal, subprocess, sys, time
place = pathlib.Path(sys.argv[2]) / "jobs" / "1-small"
place.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75) if sys.argv[1] == "saves" else None)
with (place / "metrics.jsonl").open("a") as file:
    for step in range(int(1e6)):
        file.write(json.dumps({"kind": "train", "step": step}) + "\\n")
        file.flush()
        if sys.argv[1] == "ends":
            sys.exit(3)
        if sys.argv[1] == "hangs":
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            (place / "child").write_text(str(child.pid))
            child.wait()
        time.sleep(0.01)
"""


@pytest.mark.parametrize(("how", "code"), [("saves", 75), ("ends", 3), ("hangs", -9)])
def test_a_training_command_is_stopped_and_its_children_end(how: str, code: int, tmp_path: Path) -> None:
    until = time.monotonic() + (10.0 if how == "hangs" else 60.0)
    words = [sys.executable, "-c", TRAINS, how]
    assert gpu_checks_chain.start(words, tmp_path / "run", until, "1-small") == code
    if how == "saves":
        # What it had counts for nothing: it would be asked before it could listen.
        assert gpu_checks_chain.start(words, tmp_path / "run", until, "1-small") == code
    if how == "hangs":
        child = int((tmp_path / "run" / "jobs" / "1-small" / "child").read_text())
        assert ended([child])


LAUNCHER = """
import signal, subprocess, sys, time
wanted = []
signal.signal(signal.SIGTERM, lambda *_: wanted.append(1))
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "saves", sys.argv[2]], start_new_session=True)
while child.poll() is None:
    if wanted:
        time.sleep(3.0)
        child.terminate()
    time.sleep(0.01)
code = child.returncode
sys.exit(75 if code == 75 else 1)
"""
"""Passes a request on only after a time in which a fast link makes all of its steps."""


def test_a_fast_link_is_stopped_before_its_last_step(tmp_path: Path) -> None:
    fast = TRAINS.replace("0.01", "0.03").replace("int(1e6)", str(STEPS))
    words = [sys.executable, "-c", LAUNCHER, fast]
    assert gpu_checks_chain.start(words, tmp_path / "run", time.monotonic() + 60.0, "1-small") == 75
    assert STOP <= gpu_checks_chain._steps(tmp_path / "run", "1-small") < STEPS


@pytest.mark.parametrize("count", [1, 2])
def test_sums_use_the_process_group(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does nothing is seen with two processes; of one process nothing else could come."""
    asked: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", asked.append)
    assert [gpu_checks_processes.sums(rank, count, CPU) for rank in range(count)] == [count == 1] * count
    assert [tensor.item() for tensor in asked] == [rank + 1 for rank in range(count)]


def write_job(
    run: Path,
    job: str = "1-small",
    *,
    losses: float = 1.0,
    none_at: int = 0,
    steps: int = STEPS,
    weight: float = 1.0,
    average: float = 1.0,
    **manifest: Any,
) -> Path:
    """A job as a chain leaves it, with one weight; the loss of step `none_at` is no number."""
    place = run / "jobs" / job
    for folder, value in ((place / "model", weight), (place / "model" / "ema", average)):
        folder.mkdir(parents=True)
        save_file({"w": torch.tensor([value])}, folder / "model.safetensors")
    values = {step: math.nan if step == none_at else losses / step for step in range(1, steps + 1)}
    rows = [{"kind": "train", "step": step, "loss": loss, "at": run.name} for step, loss in values.items()]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"held_out": {"top1": 50.0}, "choose": {"top1": 50.0}}
    record = {"state": "done", "hash": "", "result": "", "scores": scores, **manifest}
    (place / "manifest.json").write_text(json.dumps(record))
    return run


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, []),
        ({"losses": 1.1}, ["losses"]),
        ({"losses": math.nan}, ["losses"]),
        ({"none_at": STEPS}, ["losses"]),
        ({"weight": 1.1}, ["model"]),
        ({"average": 1.1}, ["model/ema"]),
        ({"scores": {}}, ["scores"]),
        ({"scores": {"held_out": {"top1": math.nan}, "choose": {"top1": 1.0}}}, ["scores"]),
    ],
)
def test_a_difference_after_a_stop_is_detected(changes: dict[str, Any], what: list[str], tmp_path: Path) -> None:
    whole, halves = write_job(tmp_path / "whole"), write_job(tmp_path / "halves", **changes)
    kept = gpu_checks_chain._lines(halves, "1-small")[: gpu_checks_chain.STOP]
    for most in (0.0, gpu_checks_chain.AGAIN):
        found = gpu_checks_chain._compare(whole, halves, "1-small", kept, most)
        assert failed(found) == [f"1-small: {each}" for each in what]
    again = gpu_checks_chain._lines(whole, "1-small")[: gpu_checks_chain.STOP]
    found = gpu_checks_chain._compare(whole, halves, "1-small", again, 1.0)
    assert failed(found)[:1] == ["1-small: went on after the steps that it had"]


@pytest.mark.parametrize(
    ("left", "passes"),
    [
        ({"steps": STOP, "state": "training"}, True),
        ({"steps": STEPS - 1, "state": "training"}, True),
        ({"steps": STEPS, "state": "training"}, False),
        ({"steps": STOP - 1, "state": "training"}, False),
        ({"steps": STEPS, "state": "done"}, False),
        ({"steps": STOP, "state": "evaluated"}, False),
    ],
)
def test_a_link_that_was_not_stopped_is_detected(
    left: dict[str, Any], passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the link ended before the request came, which then stopped the next one."""
    limits = []

    def start(words: Any, run: Path, until: float, stopped: str | None = None) -> int:
        limits.append(until)
        for job in JOBS if stopped is None else [stopped]:
            shutil.rmtree(run / "jobs" / job, ignore_errors=True)
            stays = {"steps": STOP, "state": "training"} | (left if job == "2-large" else {})
            write_job(run, job, **stays if stopped else {})
        return 75 if stopped else 0

    monkeypatch.setattr(gpu_checks_chain, "start", start)
    monkeypatch.setattr(gpu_checks_chain, "_write", lambda place, name, device: place)
    found = run_check("chain", "cpu")
    assert failed(found) == ([] if passes else ["2-large: stopped as it trained"])
    assert len(set(limits)) == 1


def test_nan_fails() -> None:
    assert Finding("x", 1.0, 1.0).passed
    assert not Finding("x", 1.1, 1.0).passed
    assert not Finding("x", math.nan, 1.0).passed
    assert not Finding("x", 0.1, 1.0, 0.5).passed


def test_differences_are_detected() -> None:
    right = oracle(LINK)
    assert failed(compare("same", right, right)) == []
    rounded = {name: g.bfloat16().float() for name, g in right.gradients.items()}
    assert failed(compare("x", replace(right, gradients=rounded), right)) == ["x: worst gradient"]
    name = "model.visual.proj"
    one = right.gradients | {name: right.gradients[name] * (1 + 2e-4)}
    assert failed(compare("x", replace(right, gradients=one), right)) == ["x: worst gradient"]
    assert failed(compare("x", replace(right, losses=[2.0] * 3), right)) == ["x: losses"]
    assert failed(compare("x", replace(right, after=right.before), right)) == ["x: weights"]
    none = [*right.losses[:-1], math.nan]
    assert failed(compare("x", replace(right, losses=none), right)) == ["x: losses"]
    last = {list(right.gradients)[-1]: torch.full((), math.nan)}
    assert failed(compare("x", replace(right, gradients=right.gradients | last), right)) == ["x: worst gradient"]
    fewer = {key: value for key, value in right.gradients.items() if key != name}
    assert failed(compare("x", replace(right, gradients=fewer), right)) == ["x: same names"]
    assert failed(compare("x", train(replace(LINK, rows=15), CPU), right)) != []


def test_the_cases_cover_what_may_go_wrong() -> None:
    assert {case.student.arch for case in CASES} == {"vit", "swin"}
    assert any(case.micro and case.buckets for case in CASES)
    assert "projector.image.weight" in oracle(LINK).gradients


def test_a_step_that_should_be_skipped_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    original = DataParallelEngine.step

    def step(self: Any, *arguments: Any, **options: Any) -> Tensor:
        for parameter in self.unwrapped.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_()
        return original(self, *arguments, **options)

    monkeypatch.setattr(DataParallelEngine, "step", step)
    assert {f"{precision}: nothing changed" for precision in ("fp32", "bf16", "fp16")} == set(
        failed(run_check("nonfinite", "cpu"))
    )


def test_a_wrong_optimizer_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unfused(torch.optim.AdamW):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "fused": False})

    monkeypatch.setattr(torch.optim, "AdamW", Unfused)
    with pytest.raises(AssertionError, match="found_inf"):  # only the fused kernel can be told to skip
        run_check("adamw", "cpu")
    monkeypatch.undo()
    monkeypatch.setattr(gpu_checks, "LR", 2 * gpu_checks.LR)
    original = DataParallelEngine.step
    monkeypatch.setattr(DataParallelEngine, "step", lambda self, lr: original(self, lr / 2))
    assert failed(run_check("adamw", "cpu")) == ["weights"]
