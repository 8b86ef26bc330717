"""The one training loop, for every task and engine."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compt.data.batch import Batch
from compt.dist import collectives as dist
from compt.dist.watch.thread import LONG, beat
from compt.engines.base import Engine
from compt.errors import DataError, Interrupted, RunError
from compt.models.clip import caption_lengths, padded_tokens
from compt.models.pixels import to_input
from compt.train import checkpoint
from compt.train.accumulate import cached_backward
from compt.train.metrics import MetricsWriter, straggler_report
from compt.train.signals import StopSignal
from compt.train.task import Task, reduce_report


@dataclass(frozen=True)
class TrainSettings:
    """Everything the loop needs to know; lengths are in optimizer steps, `batch` is global.

    `identity` is what a resume must agree with: the hash of the result fields and the fingerprint of the data.
    """

    total_steps: int
    warmup_steps: int
    batch: int
    micro_batch: int
    steps_per_epoch: int
    lr: float
    clip_grad_norm: float | None
    max_nonfinite: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int | None
    keep_checkpoints: int
    keep_every: int | None
    async_checkpoints: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    identity: Mapping[str, str]
    captions: int = 1
    text_buckets: int = 1
    macs_per_step: float = 0.0
    peak_flops: float | None = None
    """Dense peak of the device of one process, in FLOP/s; without it no MFU is reported."""
    useful_macs: Callable[[float], float] | None = None
    """MACs a sample for a mean number of computed tokens a caption, without what is computed twice to save memory."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training used: device-hours are those of its steps, over all processes, without evaluations."""

    steps: int
    samples: int
    device_hours: float
    nonfinite_steps: int
    skipped_samples: dict[str, int]
    few_captions: int
    tokens_per_caption: float
    """Mean token positions that were computed for a caption, padding to the longest of its group included."""
    moments_anew: tuple[int, ...] = ()
    """Steps after which AdamW's moments and the moving average began anew, as another kind of engine went on."""


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine that is zero after the last step (Table C of the paper); `step` counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class _Counts:
    """What accumulates over a run and lives through a resume.

    `few_captions`, `text_tokens` and `skipped` are this rank's own. `moments_anew`: steps after which an engine of
    another kind took over weights alone.
    """

    step: int = 0
    device_seconds: float = 0.0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    few_captions: int = 0
    text_tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    moments_anew: list[int] = field(default_factory=list)

    def to_state(self) -> dict[str, Any]:
        """Plain values over all ranks."""
        few, tokens = (int(dist.all_reduce_sum(value)) for value in (self.few_captions, self.text_tokens))
        sums = {"few_captions": few, "text_tokens": tokens, "skipped": _over_ranks(self.skipped)}
        return {**self.__dict__, **sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Counts:
        """The inverse; rank 0 takes over what is summed over ranks."""
        counts = cls(**{**state, "skipped": Counter(state["skipped"])})
        if not dist.is_main():
            counts.few_captions = counts.text_tokens = 0
            counts.skipped.clear()
        return counts


@dataclass
class _Window:
    """Steps since the last log line, their seconds, how many of these went by in waiting for data (this rank's own, and
    with that of others), and the token positions that this rank computed for its captions.
    """

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    own_wait: float = 0.0
    captions: int = 0
    text_tokens: int = 0


def _restore(folder: Path, engine: Engine, settings: TrainSettings) -> _Counts:
    """Load the newest whole checkpoint, if there is one. Raises RunError when it belongs to another run."""
    path: Path | None = dist.broadcast_object(checkpoint.find_latest(folder) if dist.is_main() else None)
    if path is None:
        return _Counts()
    state = dist.on_all(lambda: checkpoint.read_state(path))
    changed = [key for key, value in settings.identity.items() if state["identity"].get(key) != value]
    if changed:
        dist.agree(RunError(f"{path} belongs to another training: its {' and '.join(changed)} differs from this run's"))
    checkpoint.load(path, engine)
    counts = _Counts.from_state(state["counts"])
    if checkpoint.format_of(path) != engine.format:
        counts.moments_anew.append(counts.step)
    return counts


def _state(counts: _Counts, settings: TrainSettings) -> dict[str, Any]:
    """What a checkpoint says beside the engine's state."""
    return {
        "identity": dict(settings.identity),
        "counts": counts.to_state(),
        "samples": counts.step * settings.batch,
        "world_size": dist.world_size(),
    }


def _is_due(step: int, every: int | None, total: int) -> bool:
    return every is not None and (step % every == 0 or step == total)


def _is_read(step: int, settings: TrainSettings) -> bool:
    """Whether something looks at the state after `step`."""
    every = (settings.log_every, settings.evaluate_every, settings.checkpoint_every)
    return any(_is_due(step, each, settings.total_steps) for each in every)


def train(
    task: Task,
    engine: Engine,
    settings: TrainSettings,
    folder: Path,
    open_loader: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[], dict[str, float]] | None = None,
    title: str = "training",
) -> TrainResult:
    """Train `task` until `settings.total_steps`, from the newest checkpoint below `folder` or from the start.

    `open_loader(step)` yields this rank's batches from that step on. `evaluate()` returns named scores and is called
    on all ranks. The state after the last step is the newest checkpoint.

    Raises Interrupted after a save when SIGTERM, SIGUSR1 or Ctrl-C arrived; DataError, on every rank, for data that
    cannot be used; RunError on too many non-finite steps in a row or a checkpoint that cannot be written.
    """
    beat(0, "opening the newest checkpoint", LONG)
    counts = _restore(folder / "checkpoints", engine, settings)
    total = settings.total_steps
    if counts.step < total:
        writer = MetricsWriter(folder, total_steps=total, batch=settings.batch, start_step=counts.step, title=title)
        saver = checkpoint.Saver(
            folder / "checkpoints",
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every,
            asynchronous=settings.async_checkpoints,
        )
        task.module.train()
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)
        # Closed at once: the loader's processes would else wait for the garbage collector, seconds each.
        with writer, StopSignal() as stop, contextlib.closing(_batches(open_loader, counts.step)) as batches:
            window = _Window()
            norms = _Norms(settings.max_nonfinite, title)
            patience = LONG  # the first step compiles, and opens shards
            while counts.step < total:
                beat(counts.step, "waiting for data", patience)
                started = time.perf_counter()
                batch, own = _next(batches, stop)
                window.own_wait += own
                window.waited += time.perf_counter() - started
                beat(counts.step, "training", patience)
                patience = 1.0
                lr = learning_rate(counts.step, settings)
                report, norm = _step(task, engine, batch, lr, settings)
                norms.put(counts.step + 1, norm)
                norms.read(counts, leave=0 if _is_read(counts.step + 1, settings) else 1)
                _count(counts, window, settings, batch, time.perf_counter() - started)
                if _is_due(counts.step, settings.log_every, total):
                    line = {**reduce_report(report), "lr": lr, "grad_norm": float(norm)}
                    writer.log(counts.step, line | _numbers(counts, window, settings, engine.device))
                    window = _Window()
                    saver.poll()
                else:
                    writer.advance(counts.step)
                if evaluate is not None and _is_due(counts.step, settings.evaluate_every, total):
                    beat(counts.step, "evaluating", LONG)
                    with engine.scoring():
                        scores = evaluate()
                    writer.log_evaluation(counts.step, {"epoch": counts.step / settings.steps_per_epoch, **scores})
                stopping = stop.raised()
                if stopping or _is_due(counts.step, settings.checkpoint_every, total):
                    beat(counts.step, "writing a checkpoint", LONG)
                    norms.read(counts)
                    saver.save(engine, counts.step, _state(counts, settings))
                if stopping:
                    break
            beat(counts.step, "writing a checkpoint", LONG)
            saver.finish()
            if stop.raised_at_last():
                text = f"{title}: stopped by {stop.name} at step {counts.step} of {total}; saved. "
                dist.agree(Interrupted(text + "Start the same command again to go on.") if stop.name else None)
    return _result(counts, settings)


def _batches(open_loader: Callable[[int], Iterable[Batch]], step: int) -> Generator[Batch, None, None]:
    yield from open_loader(step)


def _next(batches: Iterator[Batch], stop: StopSignal) -> tuple[Batch, float]:
    """The next batch, and the seconds that this rank waited for it; `stop` learns what other ranks were told.

    A DataError of one rank is raised on all, as none could finish the step without the others.
    """
    batch, fault, started = None, None, time.perf_counter()
    try:
        batch = next(batches)
    except DataError as error:
        fault = error
    seconds = time.perf_counter() - started
    faulty, stop.agreed = dist.any_of(fault is not None, bool(stop.name))
    if faulty:
        dist.agree(fault)
    assert batch is not None
    return batch, seconds


def _step(
    task: Task, engine: Engine, batch: Batch, lr: float, settings: TrainSettings
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward, backward and update for one global batch; returns the report and the norm of the gradient, unread.

    A norm that is not finite means that the engine left the update out: on all ranks, as they have the same gradients.
    """
    return training_step(
        task,
        engine,
        batch,
        lr=lr,
        micro_batch=settings.micro_batch,
        clip_grad_norm=settings.clip_grad_norm,
        mean=settings.mean,
        std=settings.std,
    )


class _Norms:
    """Norms of gradients that were not read yet, as reading one waits for its step.

    The loop reads them one step late, so that the next step is already on its way, and all of them before anything is
    logged, evaluated or saved. A run that has to stop takes at most one step more, of which nothing is kept.
    """

    def __init__(self, most_in_a_row: int, title: str) -> None:
        self._most, self._title = most_in_a_row, title
        self._unread: deque[tuple[int, Tensor]] = deque()

    def put(self, step: int, norm: Tensor) -> None:
        """The norm of `step`, which has only been begun."""
        self._unread.append((step, norm))

    def read(self, counts: _Counts, leave: int = 0) -> None:
        """Count the steps that were not finite, all but the newest `leave`. Raises RunError for too many in a row."""
        while len(self._unread) > leave:
            step, norm = self._unread.popleft()
            finite = math.isfinite(float(norm))
            counts.nonfinite += not finite
            counts.nonfinite_in_a_row = 0 if finite else counts.nonfinite_in_a_row + 1
            if counts.nonfinite_in_a_row >= self._most:
                text = (
                    f"{self._title}: {counts.nonfinite_in_a_row} steps in a row had a non-finite loss or gradient, "
                    f"the last at step {step}; lower optimizer.lr, or look at the data of that step"
                )
                dist.agree(RunError(text))


def training_step(
    task: Task,
    engine: Engine,
    batch: Batch,
    *,
    lr: float,
    micro_batch: int,
    clip_grad_norm: float | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward, backward and update of one process's `batch`; the report and the gradient's norm are not waited for."""
    images = to_input(batch.images.to(engine.device, non_blocking=True), mean, std)
    tokens = batch.tokens.to(engine.device, non_blocking=True)
    _, report = cached_backward(task, engine, images, tokens, micro_batch, caption_lengths(batch.tokens))
    return report, engine.step(lr, clip_grad_norm)


def _count(counts: _Counts, window: _Window, settings: TrainSettings, batch: Batch, seconds: float) -> None:
    counts.step += 1
    counts.device_seconds += seconds * dist.world_size()
    counts.skipped.update(batch.skipped)
    counts.few_captions += batch.few_captions
    lengths = caption_lengths(batch.tokens)
    pieces = lengths.split(settings.micro_batch)
    computed = sum(padded_tokens(piece.flatten(), settings.text_buckets) for piece in pieces)
    counts.text_tokens += computed
    window.text_tokens += computed
    window.captions += lengths.numel()
    window.steps += 1
    window.seconds += seconds


def _numbers(counts: _Counts, window: _Window, settings: TrainSettings, device: torch.device) -> dict[str, float]:
    """What a log line says beside losses."""
    return {
        "epoch": counts.step / settings.steps_per_epoch,
        "samples_per_s": window.steps * settings.batch / window.seconds,
        "data_wait": window.waited / window.seconds,
        "device_hours": counts.device_seconds / 3600,
        "nonfinite_steps": counts.nonfinite,
        **{f"skipped_{cause}": n for cause, n in _over_ranks(counts.skipped).items()},
        "memory_gib": _memory_gib(device),
        **straggler_report(window.seconds - window.waited + window.own_wait, window.own_wait, window.steps),
        "macs": counts.step * settings.macs_per_step,
        **_mfu(window, settings),
    }


def _mfu(window: _Window, settings: TrainSettings) -> dict[str, float]:
    """Model FLOPs utilisation: two FLOPs a useful MAC, over what the devices could have done, waits for data included.

    Nothing where the peak of the device is not known.
    """
    if settings.peak_flops is None or settings.useful_macs is None:
        return {}
    flops = 2 * settings.useful_macs(window.text_tokens / window.captions) * settings.batch * window.steps
    return {"mfu": flops / (settings.peak_flops * dist.world_size() * window.seconds)}


def _over_ranks(counts: Counter[str]) -> dict[str, int]:
    return {cause: int(dist.all_reduce_sum(counts[cause])) for cause in ("image", "caption", "tar")}


def _memory_gib(device: torch.device) -> float:
    """Peak memory: what this training allocated on the device, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _result(counts: _Counts, settings: TrainSettings) -> TrainResult:
    return TrainResult(
        steps=counts.step,
        samples=counts.step * settings.batch,
        device_hours=counts.device_seconds / 3600,
        nonfinite_steps=counts.nonfinite,
        skipped_samples=_over_ranks(counts.skipped),
        few_captions=int(dist.all_reduce_sum(counts.few_captions)),
        tokens_per_caption=dist.all_reduce_sum(counts.text_tokens) / (counts.step * settings.batch * settings.captions),
        moments_anew=tuple(counts.moments_anew),
    )
