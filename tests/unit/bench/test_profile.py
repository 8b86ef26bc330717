"""The trace of some steps of a run."""

from __future__ import annotations

import gzip
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._autograd import DeviceType

from compt.bench.profile import _operations, _write
from compt.chain.run import prepare, run_chain
from compt.cli.chain import _steps
from compt.data.batch import Batch
from compt.engines.graphs import RECORDERS
from compt.errors import ConfigError, Interrupted, RunError
from compt.train.loop import _Loop
from tests.helpers.recipe import FIRST, SECOND, chain, make_data, recipe_of, weights_hash
from tests.helpers.recorded import RecordedGraphs

LINKS = (
    "chain.links=[{model: small, train: {steps: 3}, warmup: {steps: 1}}, "
    "{model: large, train: {steps: 4}, warmup: {steps: 1}}]"
)


def test_a_gpu_s_time_is_that_of_its_kernels() -> None:
    """torch has it twice: for the operator that launched a kernel, and for the kernel."""
    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    times = ("self_cpu_time_total", "self_device_time_total")
    rows = [
        SimpleNamespace(
            key=key, count=2, device_type=kind, is_user_annotation=own, **dict(zip(times, spent, strict=True))
        )
        for key, kind, own, spent in (
            ("aten::mm", cpu, False, (5e6, 7e6)),
            ("gemm", gpu, False, (0, 7e6)),
            ("compt forward", gpu, False, (0, 9e6)),
            ("Optimizer.step#AdamW.step", gpu, True, (0, 9e6)),
        )
    ]
    seen: Any = SimpleNamespace(key_averages=lambda: rows)
    assert _operations(seen, True) == [("gemm", 2, 7.0)]
    assert _operations(seen, False) == [("aten::mm", 2, 5.0)]


def test_a_captured_step_is_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is recorded within a capture could not be read."""
    monkeypatch.setitem(RECORDERS, "cpu", RecordedGraphs)
    base, asked = make_data(tmp_path), (LINKS, "engine.graphs=on", "engine.text=packed")
    context, plan = prepare(recipe_of(*asked), tmp_path / "run", base=base, baselines=False, controls=())
    run_chain(replace(context, profile_steps=(2, 3)), plan, lambda _: None)
    for job in (FIRST, SECOND):
        table = (tmp_path / "run" / "jobs" / job / "trace-2-3.md").read_text()
        assert set(re.findall(r"^\| (\w+) \| - \|", table, re.MULTILINE)) == {"input", "graph", "optimizer", "step"}


def test_exactly_these_steps_are_traced_and_nothing_else_changes(tmp_path: Path) -> None:
    base, said = make_data(tmp_path), []
    chain(base, tmp_path / "plain", LINKS)
    context, plan = prepare(recipe_of(LINKS), tmp_path / "run", base=base, baselines=False, controls=())
    run_chain(replace(context, profile_steps=(2, 3)), plan, said.append)
    for job, parts in ((FIRST, 4), (SECOND, 5)):  # the second one has a teacher
        folder = tmp_path / "run" / "jobs" / job
        events = json.loads(gzip.decompress((folder / "trace-2-3.json.gz").read_bytes()))["traceEvents"]
        names = [event["name"] for event in events if event.get("ph") == "X"]
        assert [names.count(f"compt {part}") for part in ("forward", "loss", "backward", "optimizer")] == [2] * 4
        assert names.count("compt teacher") == 2
        table = (folder / "trace-2-3.md").read_text()
        rows = dict(re.findall(r"^\| (\w+) \| - \| ([\d.,]+) \|", table, re.MULTILINE))
        assert len(rows) - 2 >= parts - 1
        assert sum(float(rows[part].replace(",", "")) for part in rows if part != "step") == pytest.approx(
            float(rows["step"].replace(",", "")), abs=0.5
        )
        assert "Slowest operations" in table
        assert any(line.startswith(f"{job}: traced 2 steps; wrote ") for line in said)
        assert weights_hash(tmp_path / "run", job) == weights_hash(tmp_path / "plain", job)


def test_a_job_that_ends_early_has_a_trace_of_what_it_did(tmp_path: Path) -> None:
    context, plan = prepare(recipe_of(LINKS), tmp_path / "run", base=make_data(tmp_path), baselines=False, controls=())
    said: list[str] = []
    run_chain(replace(context, profile_steps=(4, 99)), plan, said.append)
    (trace,) = (tmp_path / "run" / "jobs").glob("*/trace*.gz")
    assert (trace.parent.name, trace.name) == ("2-large", "trace-4-4.json.gz")
    assert "1-small: no trace: this start did not train step 4" in said


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """torch's own writer prints a line at most, such as on a full disk."""
    nothing: Any = SimpleNamespace(export_chrome_trace=lambda _: None)
    with pytest.raises(RunError, match=r"cannot write .*/trace\.json: No such file"):
        _write(nothing, tmp_path / "trace.json")


@pytest.mark.parametrize(("first", "written"), [(1, ["trace-1-2.json.gz"]), (3, [])])
def test_a_run_that_stops_while_it_waits_has_a_trace_of_whole_steps(
    first: int, written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = _Loop.next_batch

    def stopped(loop: _Loop, batches: Iterator[Batch]) -> Batch | None:
        if loop._counts.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return load(loop, batches)

    monkeypatch.setattr(_Loop, "next_batch", stopped)
    context, plan = prepare(recipe_of(LINKS), tmp_path / "run", base=make_data(tmp_path), baselines=False, controls=())
    said: list[str] = []
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 2"):
        run_chain(replace(context, profile_steps=(first, 9)), plan, said.append)
    assert [path.name for path in (tmp_path / "run" / "jobs" / FIRST).glob("trace*.gz")] == written
    assert ("1-small: no trace: it ended before step 3 did" in said) == (not written)


@pytest.mark.parametrize("text", ["5", "0-3", "4-3", "a-b", "1-2-3"])
def test_steps_are_two_numbers_in_order(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "5")
    with pytest.raises(ConfigError, match=f"--profile-steps {text}: should be the first and the last step"):
        _steps(text)
    assert _steps("3-3") == (3, 3)
