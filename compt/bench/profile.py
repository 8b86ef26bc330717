"""What a training step spends its time on: the time and the launches of each part, the slowest operations, a trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from compt.bench.launches import PARTS, Launches, methods_of_parts
from compt.bench.step import Setup, TrainingStep

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

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

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

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last call. The device has finished."""
        found = dict.fromkeys(PARTS, 0.0)
        for part, started, ended in self._marks:
            found[part] += started.elapsed_time(ended) / 1000 if self._gpu else ended - started
        self._marks.clear()
        return found


def profile(setup: Setup, batch: int, device: torch.device, trace: Path) -> Profile:
    """Time and trace training steps of `setup` on `device`; writes the file `trace`, in Chrome's format."""
    gpu = device.type == "cuda"
    step = TrainingStep(setup, device)
    clock = _Clock(device)
    for part, owner, name in methods_of_parts(step):
        clock.watch(part, owner, name)
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
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as seen:
        step(data)
    seen.export_chrome_trace(str(trace))
    rows = [row for row in seen.key_averages() if not row.key.startswith(("compt ", "ProfilerStep"))]
    spent = [
        (row.key, row.count, (row.self_device_time_total if gpu else row.self_cpu_time_total) / 1e6) for row in rows
    ]
    operations = sorted((one for one in spent if one[2] > 0), key=lambda one: one[2], reverse=True)
    return Profile(
        seconds=median(whole),
        parts={part: median(each[part] for each in parts) for part in PARTS},
        operations=operations,
        busy=sum(seconds for _, _, seconds in operations) if gpu else None,
        memory=memory,
    )


def table_of_parts(seen: Launches, found: Profile | None) -> list[tuple[str, str, str, str]]:
    """Part, launches, milliseconds and share of the step, for each part that a step has."""
    rows = []
    for part in PARTS:
        launched = seen.of(part)
        if not launched and not (found and found.parts[part] > 1e-6):
            continue
        spent = "-" if found is None else f"{1e3 * found.parts[part]:,.1f}"
        share = "-" if found is None else f"{found.parts[part] / found.seconds:.0%}"
        rows.append((part, f"{launched:,}", spent, share))
    total = "-" if found is None else f"{1e3 * found.seconds:,.1f}"
    return [*rows, ("step", f"{seen.total:,}", total, "-" if found is None else "100%")]
