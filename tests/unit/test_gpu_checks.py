"""The checks for GPUs, run on the CPU: so that none of them is wrong by a slip when there is a GPU at last."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_checks
from benchmarks.gpu_checks import CASES, CHECKS, LINK, Finding, compare, oracle, run_check, train
from benchmarks.gpu_worker import Worker
from compt.engines import DataParallelEngine

CPU = torch.device("cpu")


def failed(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if not finding.passed]


@pytest.mark.parametrize("name", ["arithmetic", "adamw", "ddp", "scaler", "nonfinite"])
def test_a_check_of_one_process_passes_on_a_cpu(name: str) -> None:
    found = run_check(name, "cpu")
    assert found
    assert failed(found) == []


def test_only_the_peak_of_memory_needs_a_gpu() -> None:
    assert run_check("memory", "cpu") == []


def compiled_eagerly(names: list[str]) -> dict[str, list[str]]:
    """What fails of `names`, in this process, with the graphs of torch.compile run as they are."""
    torch.compile = functools.partial(torch.compile, backend="eager")
    return {name: failed(run_check(name, "cpu")) for name in names}


@pytest.mark.slow
def test_checks_of_other_engines_pass_on_a_cpu(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "log")
    names = [name for name, check in CHECKS.items() if check.process != "plain"]
    engines = {"fsdp2", "zero0", "zero1", "zero2", "zero3", "processes"}
    compiled = {"compile", "compile_fsdp2", "compile_zero3"}
    assert engines | compiled | {"skips", "zero_skips", "checkpoint", "zero_checkpoint"} == set(names)
    try:
        assert worker.run(compiled_eagerly, names, seconds=500) == {name: [] for name in names}
    finally:
        worker.stop()


def test_a_number_that_is_none_fails() -> None:
    assert Finding("x", 1.0, 1.0).passed
    assert not Finding("x", 1.1, 1.0).passed
    assert not Finding("x", math.nan, 1.0).passed
    assert not Finding("x", 0.1, 1.0, 0.5).passed


def test_differences_are_seen() -> None:
    right = oracle(LINK)
    assert failed(compare("same", right, right)) == []
    rounded = {name: g.bfloat16().float() for name, g in right.gradients.items()}
    assert failed(compare("x", replace(right, gradients=rounded), right)) == ["x: worst gradient"]
    name = "model.visual.proj"
    one = right.gradients | {name: right.gradients[name] * (1 + 2e-4)}
    assert failed(compare("x", replace(right, gradients=one), right)) == ["x: worst gradient"]
    assert failed(compare("x", replace(right, losses=[2.0] * 3), right)) == ["x: losses"]
    assert failed(compare("x", replace(right, after=right.before), right)) == ["x: weights"]
    fewer = {key: value for key, value in right.gradients.items() if key != name}
    assert failed(compare("x", replace(right, gradients=fewer), right)) == ["x: same names"]
    assert failed(compare("x", train(replace(LINK, rows=15), CPU), right)) != []


def test_the_cases_cover_what_may_go_wrong() -> None:
    assert {case.student.arch for case in CASES} == {"vit", "swin"}
    assert any(case.micro and case.buckets > 1 for case in CASES)
    assert "projector.image.weight" in oracle(LINK).gradients


def test_a_step_that_is_not_skipped_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_another_optimizer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
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
