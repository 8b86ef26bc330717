"""What a training step spends its time on: the time and the launches of each part, the slowest operations, a trace."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from compt.bench.launches import PARTS, Launches, methods_of_parts
from compt.bench.step import Setup, TrainingStep
from compt.dist import collectives as dist
from compt.engines.base import Engine
from compt.files import disk_errors, write_text
from compt.text import TextTable
from compt.train.task import Task

_REPEATS = 5
"""Steps that are timed. Two come before them: the first makes the optimizer's moments."""


@dataclass(frozen=True)
class Profile:
    """A step's `seconds`, and those of its `parts` (medians); from one traced step all else.

    `operations`: name, calls and seconds of each, the slowest first; on a GPU these are kernels. `busy`: seconds in
    which a GPU computed. `memory`: most bytes that tensors took on a GPU. Both are None on a CPU.
    """

    seconds: float
    parts: dict[str, float]
    operations: list[tuple[str, int, float]]
    busy: float | None
    memory: int | None


class _Clock:
    """Seconds of each part of the steps. On a GPU they are taken on its own clock, so that nothing waits in between."""

    def __init__(self, device: torch.device, task: Task, engine: Engine) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._watched = methods_of_parts(task, engine)
        for part, owner, name in self._watched:
            self.watch(part, owner, name)

    def close(self) -> None:
        """Give the parts their own methods back."""
        for _, owner, name in self._watched:
            delattr(owner, name)

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Time the method `name` of `owner` as `part`."""
        method: Callable[..., Any] = getattr(owner, name)

        def run(*arguments: Any, **options: Any) -> Any:
            started = self._now()
            with torch.profiler.record_function(f"compt {part}"):
                found = method(*arguments, **options)
            self._marks.append((part, started, self._now()))
            return found

        setattr(owner, name, run)

    @property
    def steps(self) -> int:
        """Updates of the weights since the last `take`."""
        return sum(part == "optimizer" for part, _, _ in self._marks)

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call. The device has finished."""
        found = dict.fromkeys(PARTS, 0.0)
        for part, started, ended in self._marks:
            found[part] += started.elapsed_time(ended) / 1000 if self._gpu else ended - started
        self._marks.clear()
        return found


def profile(setup: Setup, batch: int, device: torch.device, trace: Path) -> Profile:
    """Time and trace training steps of `setup` on `device`, and write `trace` in Chrome's format. Raises RunError."""
    gpu = device.type == "cuda"
    step = TrainingStep(setup, device)
    clock = _Clock(device, step.task, step.engine)
    data = step.data(batch)
    step.seconds(data, warm_up=1, repeats=1)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    clock.take()
    whole, parts = [], []
    for _ in range(_REPEATS):
        whole += step.seconds(data, warm_up=0, repeats=1)
        parts.append(clock.take())
        parts[-1]["input"] = whole[-1] - sum(parts[-1].values())
    memory = torch.cuda.max_memory_allocated(device) if gpu else None
    with _profiler(device) as seen:
        step(data)
    _write(seen, trace)
    operations = _operations(seen, gpu)
    return Profile(
        seconds=median(whole),
        parts={part: median(each[part] for each in parts) for part in PARTS},
        operations=operations,
        busy=sum(seconds for _, _, seconds in operations) if gpu else None,
        memory=memory,
    )


def _profiler(device: torch.device) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return torch.profiler.profile(activities=activities, acc_events=True)


def _write(seen: torch.profiler.profile, path: Path) -> None:
    """Write what was seen, in Chrome's format. torch itself ends without an error where it cannot. Raises RunError."""
    with disk_errors(path), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        seen.export_chrome_trace(str(file))
        file.replace(path)


def _operations(seen: torch.profiler.profile, gpu: bool) -> list[tuple[str, int, float]]:
    """Name, calls and seconds of each operation: of a GPU's kernels, or of the CPU's operators.

    torch counts the time of a kernel also for the operator that launched it.
    """
    of_device = DeviceType.CUDA if gpu else DeviceType.CPU
    rows = [
        row
        for row in seen.key_averages()
        if row.device_type == of_device
        and not row.is_user_annotation
        and not row.key.startswith(("compt ", "ProfilerStep"))
    ]
    spent = [
        (row.key, row.count, (row.self_device_time_total if gpu else row.self_cpu_time_total) / 1e6) for row in rows
    ]
    return sorted((one for one in spent if one[2] > 0), key=lambda one: one[2], reverse=True)


class StepTrace:
    """Traces the steps `first` to `last` of a run, counted from 1, on rank 0: a context for the run.

    Called with the number of each step before it begins. Writes `trace-FIRST-LAST.json.gz` in Chrome's format and
    `trace-FIRST-LAST.md` with the tables of `compt bench profile` into `folder`. A run that stops in between has a
    trace of the steps that it did; one that starts after `first` has none.
    """

    def __init__(self, task: Task, engine: Engine, steps: tuple[int, int], folder: Path, say: Callable[[str], None]):
        self._task, self._engine = task, engine
        self._first, self._last = steps
        self._folder, self._say = folder, say
        self._running: tuple[_Clock, torch.profiler.profile, float] | None = None
        self._began = False

    def __call__(self, step: int) -> None:
        """Begin or end the trace, if `step` is where it does."""
        if step == self._first and dist.is_main():
            self._synchronize()
            clock, seen = _Clock(self._engine.device, self._task, self._engine), _profiler(self._engine.device)
            seen.start()
            self._running, self._began = (clock, seen, time.perf_counter()), True
        elif step == self._last + 1:
            self._end()

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end()
        if kind is None and not self._began and dist.is_main():
            self._say(f"{self._folder.name}: no trace: this start did not train step {self._first}")

    def _synchronize(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)

    def _end(self) -> None:
        if self._running is None:
            return
        (clock, seen, started), self._running = self._running, None
        self._synchronize()
        seconds = time.perf_counter() - started
        seen.stop()
        clock.close()
        count = clock.steps
        if count == 0:
            self._say(f"{self._folder.name}: no trace: it ended before step {self._first} did")
            return
        gpu = self._engine.device.type == "cuda"
        parts = {part: spent / count for part, spent in clock.take().items()}
        parts["input"] = seconds / count - sum(parts.values())
        operations = _operations(seen, gpu)
        busy = sum(spent for _, _, spent in operations) / count if gpu else None
        found = Profile(seconds / count, parts, operations, busy, None)
        path = self._folder / f"trace-{self._first}-{self._first + count - 1}.json.gz"
        _write(seen, path)
        tables = tables_of(f"A step of {self._folder.name}, mean of {count} traced steps", None, found)
        write_text(path.with_suffix("").with_suffix(".md"), "\n".join(table.markdown() for table in tables))
        self._say(f"{self._folder.name}: traced {count} steps; wrote {path} and a table beside it")


def tables_of(title: str, seen: Launches | None, found: Profile | None, notes: Sequence[str] = ()) -> list[TextTable]:
    """The parts of a step and, where it was traced, its slowest operations."""
    header = ["Part", "Launches", "ms", "Share, %"]
    lines = list(notes)
    if found is not None and found.busy is not None:
        lines.append(f"The GPU computed {100 * found.busy / found.seconds:.0f} % of the time.")
    if found is not None and found.memory is not None:
        lines.append(f"The GPU's memory: {found.memory / 2**30:.2f} GiB.")
    tables = [TextTable(title, header, table_of_parts(seen, found), lines)]
    if found is not None:
        slowest = [(name, f"{calls:,}", f"{1e3 * spent:,.1f}") for name, calls, spent in found.operations[:12]]
        tables.append(TextTable("Slowest operations that were traced", ["Operation", "Calls", "ms"], slowest))
    return tables


def table_of_parts(seen: Launches | None, found: Profile | None) -> list[tuple[str, str, str, str]]:
    """Part, launches, milliseconds and share of the step, for each part that a step has."""
    rows = []
    for part in PARTS:
        launched = 0 if seen is None else seen.of(part)
        if not launched and not (found and found.parts[part] > 1e-6):
            continue
        spent = "-" if found is None else f"{1e3 * found.parts[part]:,.1f}"
        share = "-" if found is None else f"{100 * found.parts[part] / found.seconds:.0f}"
        rows.append((part, "-" if seen is None else f"{launched:,}", spent, share))
    total = "-" if found is None else f"{1e3 * found.seconds:,.1f}"
    launches = "-" if seen is None else f"{seen.total:,}"
    return [*rows, ("step", launches, total, "-" if found is None else "100")]
