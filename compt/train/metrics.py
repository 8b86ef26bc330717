"""Metrics of a run: one JSON line a log step, the same to the loggers, and a line of progress for people."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from compt.dist import collectives as dist
from compt.files import disk_errors, write_text
from compt.text import terminal
from compt.train.loggers import Logs, OpenLoggers

FILE = "metrics.jsonl"
PLAIN_EVERY = 10.0
"""Seconds between two lines of progress when the output is not a terminal."""


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in their order, all or of one kind ("train" or "eval"); [] without a file.

    A line that a kill has torn is left out. A number that was not finite comes back as nan.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _parse(line)
        if row is not None and kind in (None, row.get("kind")):
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _cut_back(path: Path, step: int) -> None:
    """Remove the lines after `step`, which will be trained again, and a torn line; atomically."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [(line, _parse(line)) for line in text.splitlines()]
    kept = "".join(line + "\n" for line, row in rows if row is not None and row["step"] <= step)
    if kept != text:
        write_text(path, kept)


class MetricsWriter:
    """Writes FOLDER/metrics.jsonl, gives its lines to the loggers, and shows progress, on rank 0; a context manager.

    A run that resumes at `start_step` first cuts off what was logged after it, so that no step is logged twice. `batch`
    counts the images of all ranks: a line's `samples` is step * batch. Lines have a `kind`: "train" or "eval".
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        batch: int,
        start_step: int = 0,
        title: str = "training",
        console: Console | None = None,
        logs: Logs | None = None,
    ) -> None:
        self._folder = folder
        self._loggers = OpenLoggers(logs or Logs(), folder, start_step)
        self._total = total_steps
        self._batch = batch
        self._start = start_step
        self._title = title
        self._console = console or terminal(stderr=True)
        self._active = dist.is_main()
        self._file: TextIO | None = None
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        self._shown: dict[str, float] = {}
        self._entered = self._last_plain = 0.0

    def __enter__(self) -> MetricsWriter:
        self._entered = self._last_plain = time.monotonic()
        if not self._active:
            return self
        path = self._folder / FILE
        with disk_errors(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            _cut_back(path, self._start)
            self._file = path.open("a", encoding="utf-8")
        self._loggers.__enter__()
        if self._console.is_terminal:
            self._bar = Progress(
                *_columns(self._console.width),
                console=self._console,
                transient=False,
                expand=True,
                refresh_per_second=4,
            )
            self._bar_task = self._bar.add_task(
                self._title, total=self._total, completed=self._start, numbers="", remaining=""
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        # On a full disk closing fails too, and would hide the error of the line that could not be written.
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._loggers.__exit__(kind, error, _)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a training line and show its `loss`, `r` and `samples_per_s`. Raises RunError on a full disk."""
        if not self._active:
            return
        self._write("train", step, values)
        self._shown = {key: float(values[key]) for key in ("loss", "r", "samples_per_s") if key in values}
        self.advance(step)

    def log_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Write a line of scores, with step, samples and epoch as in training lines. Raises RunError."""
        if not self._active:
            return
        self._write("eval", step, scores)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if key != "epoch")
        self._print(f"{self._title}: step {step}: {shown}")

    def advance(self, step: int) -> None:
        """Move the progress on without a log line."""
        if not self._active:
            return
        if self._bar is not None:
            numbers = "  ".join(_numbers(self._shown))
            self._bar.update(self._bar_task, completed=step, numbers=numbers, remaining=self._remaining(step))
        elif step == self._total or time.monotonic() - self._last_plain >= PLAIN_EVERY:
            self._last_plain = time.monotonic()
            parts = [f"step {step}/{self._total}", *_numbers(self._shown), f"{self._remaining(step)} left"]
            self._print(f"{self._title}: {', '.join(parts)}")

    def _print(self, line: str) -> None:
        # soft_wrap keeps one line in a log file, however long; markup and highlight would colour names and paths.
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _remaining(self, step: int) -> str:
        rate = self._shown.get("samples_per_s", 0.0) / self._batch
        if not rate:
            rate = (step - self._start) / max(time.monotonic() - self._entered, 1e-9)
        return str(timedelta(seconds=round((self._total - step) / rate))) if rate > 0 else "?"

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        row = {"kind": kind, "step": step, "samples": step * self._batch, **values}
        path = self._folder / FILE
        with disk_errors(path):
            assert self._file is not None, "the writer is used inside its with block"
            # JSON has no nan and no infinity: null makes a gap in the curve.
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._file.write(json.dumps(plain) + "\n")
            self._file.flush()
        shown = {**values, "samples": float(step * self._batch)}
        self._loggers.log(step, {f"{kind}/{key}": value for key, value in shown.items()})


def _numbers(shown: Mapping[str, float]) -> list[str]:
    parts = [f"{key} {shown[key]:.3f}" for key in ("loss", "r") if key in shown]
    if "samples_per_s" in shown:
        parts.append(f"{_short(shown['samples_per_s'])}/s")
    return parts


def _short(value: float) -> str:
    """950 -> "950", 2213 -> "2.2k"."""
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.1f}k"


def _columns(width: int) -> list[Any]:
    """Columns that fit a terminal of 60: the title is cut first, and a narrow terminal shows no bar."""
    title = Column(ratio=1, no_wrap=True, overflow="ellipsis", min_width=6)
    whole = Column(no_wrap=True)
    return [
        TextColumn("{task.description}", table_column=title, markup=False),
        *([BarColumn(bar_width=min(40, width - 70))] if width >= 80 else []),
        TextColumn("{task.percentage:>3.0f}%", table_column=whole),
        TextColumn("{task.fields[numbers]}", table_column=whole, markup=False),
        TextColumn("{task.fields[remaining]}", table_column=whole, markup=False),
    ]


def straggler_report(seconds: float, waited: float, steps: int) -> dict[str, float]:
    """Seconds a step on the slowest rank and on average, and the longest wait for data, since the last report.

    `seconds`: the time of this rank for the last `steps` steps, without the time that it waited for the data of other
    ranks. `waited`: the part of `seconds` in which it waited for its own data. Ranks also wait for each other within a
    step, so a slow GPU shows less than slow data. Returns step_seconds_max, step_seconds_mean, data_wait_max and
    slowest_rank; {} in a single process. One small collective: all ranks call it.
    """
    if dist.world_size() == 1:
        return {}
    rows = dist.gather(torch.tensor([[seconds, waited]], dtype=torch.float64)) / steps
    whole, data = rows[:, 0], rows[:, 1]
    return {
        "step_seconds_max": float(whole.max()),
        "step_seconds_mean": float(whole.mean()),
        "data_wait_max": float(data.max()),
        "slowest_rank": int(whole.argmax()),
    }
