"""The one training loop, for every task and engine."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compt.data.batch import Batch
from compt.dist import collectives as dist
from compt.dist.watch.causes import WAITING
from compt.dist.watch.thread import EVALUATING, LONG, TRAINING, beat
from compt.engines.base import Engine
from compt.errors import DataError, Interrupted, RunError
from compt.models.clip import ClipModel, caption_lengths
from compt.models.pixels import to_input
from compt.recipe.optimizer import Schedule
from compt.train import checkpoint
from compt.train.accumulate import cached_backward
from compt.train.counts import Counts, Window, over_ranks
from compt.train.loggers import Logs
from compt.train.metrics import FILE, MetricsWriter, read_metrics, straggler_report
from compt.train.signals import StopSignal, Waited
from compt.train.task import Task, reduce_report

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """Everything the loop needs to know. Lengths are in optimizer steps; `batch` counts the images of all ranks.

    `identity` is what a resume must agree with: the hash of the result fields and the fingerprint of the data.
    """

    total_steps: int
    warmup_steps: int
    batch: int
    micro_batch: int
    steps_per_epoch: int
    lr: float
    schedule: Schedule
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
    logs: Logs = field(default_factory=Logs)
    captions: int = 1
    text_buckets: int = 1
    macs: Callable[[TrainResult], float] | None = None
    """MACs of what was trained so far; without it none are reported."""
    peak_flops: float | None = None
    """Dense peak of the device of one process, in FLOP/s; without it no MFU is reported."""
    useful_macs: Callable[[float, float], float] | None = None
    """MACs a sample, without what is computed twice to save memory: for a mean number of computed tokens a caption, and
    the share of captions that the teacher computes."""

    @property
    def saves(self) -> tuple[int, ...]:
        """Distances between steps after which a checkpoint is written."""
        return tuple(every for every in (self.checkpoint_every, self.keep_every) if every)


@dataclass(frozen=True)
class TrainResult:
    """What a run used until its end, or a log line.

    Device-hours are those of its steps, over all processes, without evaluations.
    """

    steps: int
    samples: int
    device_hours: float
    nonfinite_steps: int
    skipped_samples: dict[str, int]
    few_captions: int
    tokens_per_caption: float
    """Mean token positions computed for a caption, with those that only pad or fill up."""
    moments_anew: tuple[int, ...] = ()
    """Steps after which AdamW's moments and the moving average started from zero, as another kind of engine went on."""
    teacher_hits: int = 0
    teacher_misses: int = 0
    """Captions whose features the teacher's cache had, and had not; 0 and 0 without a cache."""
    teacher_tokens_per_caption: float = 0.0
    """As `tokens_per_caption`, of the captions that the cache had not."""


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then the schedule, which ends after the last step; `step` counts from 0.

    By default the cosine to zero of the paper's Table C.
    """
    schedule, total, start = settings.schedule, settings.total_steps, settings.warmup_steps
    if step < start:
        return settings.lr * (step + 1) / start
    if schedule.shape == "wsd":
        start = max(start, total - round(schedule.decay * total))
    done = max(0.0, (step - start) / max(1, total - start))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.shape == "cosine" else 1 - done
    if schedule.shape == "constant":
        left = 1.0
    return settings.lr * (schedule.end + (1 - schedule.end) * left)


def _restore(folder: Path, engine: Engine, settings: TrainSettings) -> Counts:
    """Load the newest whole checkpoint, if there is one. Raises RunError when it belongs to another run."""
    path = dist.from_main(lambda: checkpoint.find_latest(folder))
    if path is None:
        return Counts()
    state = dist.on_all(lambda: checkpoint.read_state(path))
    changed = [key for key, value in settings.identity.items() if state["identity"].get(key) != value]
    if changed:
        dist.agree(RunError(f"{path} belongs to another run: its {' and '.join(changed)} differs from this run's"))
    checkpoint.load(path, engine)
    counts = Counts.from_state(state["counts"])
    if counts.step < settings.total_steps and checkpoint.format_of(path) != engine.format:
        counts.moments_anew.append(counts.step)
    return counts


def _state(counts: Counts, settings: TrainSettings) -> dict[str, Any]:
    """What a checkpoint keeps beside the engine's state."""
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
    every = (settings.log_every, settings.evaluate_every, *settings.saves)
    return any(_is_due(step, each, settings.total_steps) for each in every)


def train(
    task: Task,
    engine: Engine,
    settings: TrainSettings,
    folder: Path,
    open_loader: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[], dict[str, float]] | None = None,
    title: str = "training",
    begins: Callable[[int], None] = lambda step: None,
) -> TrainResult:
    """Train `task` until `settings.total_steps`, from the newest checkpoint below `folder` or from the start.

    `open_loader(step)` yields this rank's batches from that step on. `evaluate()` returns named scores; all ranks call
    it. The state after the last step is the newest checkpoint. `begins` is called with the number of each step, from 1,
    before its batch is read.

    Raises Interrupted after it has saved, when SIGTERM, SIGUSR1 or Ctrl-C arrived; DataError, on every rank, for data
    that cannot be used; RunError for too many non-finite steps in a row and for a checkpoint that cannot be written.
    """
    beat(0, "opening the newest checkpoint", LONG)
    counts = _restore(folder / "checkpoints", engine, settings)
    if counts.step == 0 and dist.is_main():
        logged = max((row["step"] for row in read_metrics(folder / FILE, "train")), default=0)
        if logged >= min(settings.saves):
            _log.warning(
                "%s: no whole checkpoint is left in %s, though step %d was logged: starting again at step 0",
                title,
                folder / "checkpoints",
                logged,
            )
    if counts.step < settings.total_steps:
        # Batches are closed here. The loader's processes would otherwise live until the garbage collector comes, which
        # then waits for each of them for seconds.
        batches = _batches(open_loader, counts.step)
        with _Loop(task, engine, settings, folder, title, counts) as loop, contextlib.closing(batches):
            while counts.step < settings.total_steps and not loop.stopping:
                begins(counts.step + 1)
                batch = loop.next_batch(batches)
                if batch is None:
                    loop.save()
                    break
                loop.step(batch)
                loop.log()
                loop.evaluate(evaluate)
                loop.save()
            loop.end()
    return _result(counts, settings)


class _Loop(contextlib.ExitStack):
    """What a loop holds on to between its steps. All ranks call every method together."""

    def __init__(
        self, task: Task, engine: Engine, settings: TrainSettings, folder: Path, title: str, counts: Counts
    ) -> None:
        super().__init__()
        self._task, self._engine, self._settings = task, engine, settings
        self._title, self._counts = title, counts
        self._writer = MetricsWriter(
            folder,
            total_steps=settings.total_steps,
            batch=settings.batch,
            start_step=counts.step,
            title=title,
            logs=settings.logs,
        )
        self._saver = checkpoint.Saver(
            folder / "checkpoints",
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every,
            asynchronous=settings.async_checkpoints,
        )
        self._stop = StopSignal()
        self._window, self._norms = Window(), _Norms(settings.max_nonfinite, title)
        self._report: dict[str, Tensor] = {}
        self._norm = torch.zeros(())
        self._lr = self._started = 0.0
        self._patience = LONG  # the first step compiles, and opens shards
        self._saved = counts.step  # at the start this is the state on disk, or that of initial weights
        self.stopping = False
        """Whether a rank was asked to stop before the last step, whose state is saved."""

    def __enter__(self) -> _Loop:
        super().__enter__()
        self.enter_context(self._writer)
        self.enter_context(self._stop)
        self._task.module.train()
        if self._engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._engine.device)
        return self

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """This rank's next batch. None, on all ranks, where a rank was asked to stop while it waited for its batch.

        Raises a DataError of one rank on all, as none can finish the step without it.
        """
        beat(self._counts.step, WAITING, self._patience)
        batch, fault, self._started = None, None, time.perf_counter()
        try:
            with self._stop.waiting():
                batch = next(batches)
        except Waited:
            pass
        except DataError as error:
            fault = error
        self._window.own_wait += time.perf_counter() - self._started
        # The ranks tell each other in one collective what they need to agree on: broken data, and a request to stop.
        faulty, self._stop.agreed, missing = dist.any_of(fault is not None, bool(self._stop.name), batch is None)
        if faulty:
            dist.agree(fault)
        if missing:
            return None
        self._window.waited += time.perf_counter() - self._started
        return batch

    def step(self, batch: Batch) -> None:
        """Forward, backward and update for one global batch.

        A norm that is not finite means that the engine left the update out: on all ranks, as their gradients are equal.
        """
        counts, settings = self._counts, self._settings
        beat(counts.step, TRAINING, self._patience)
        self._patience = 1.0
        self._lr = learning_rate(counts.step, settings)
        self._report, self._norm = training_step(
            self._task,
            self._engine,
            batch,
            lr=self._lr,
            micro_batch=settings.micro_batch,
            clip_grad_norm=settings.clip_grad_norm,
            mean=settings.mean,
            std=settings.std,
        )
        self._norms.put(counts.step + 1, self._norm)
        self._norms.read(counts, leave=0 if _is_read(counts.step + 1, settings) else 1)
        _count(counts, self._window, settings, self._task.model, batch, time.perf_counter() - self._started)
        if self._task.kept is not None:
            self._window.teacher_hits += counts.add(self._task.kept.looked())

    def _is_due(self, every: int | None) -> bool:
        return _is_due(self._counts.step, every, self._settings.total_steps)

    def log(self) -> None:
        """Write a line of metrics when one is due, and move the progress on."""
        step = self._counts.step
        if not self._is_due(self._settings.log_every):
            self._writer.advance(step)
            return
        line = {**reduce_report(self._report), "lr": self._lr, "grad_norm": float(self._norm)}
        self._writer.log(step, line | _numbers(self._counts, self._window, self._settings, self._engine.device))
        self._window = Window()
        self._saver.poll()

    def evaluate(self, evaluate: Callable[[], dict[str, float]] | None) -> None:
        """Score the model as it is, when that is due."""
        step = self._counts.step
        if evaluate is not None and self._is_due(self._settings.evaluate_every):
            beat(step, EVALUATING, LONG)
            with self._engine.scoring():
                scores = evaluate()
            self._writer.log_evaluation(step, {"epoch": step / self._settings.steps_per_epoch, **scores})

    def save(self) -> None:
        """Write a checkpoint when one is due, or when a rank was asked to stop."""
        self.stopping = self._stop.raised()
        step = self._counts.step
        if step > self._saved and (self.stopping or any(map(self._is_due, self._settings.saves))):
            beat(step, "writing a checkpoint", LONG)
            self._norms.read(self._counts)
            self._saver.save(self._engine, step, _state(self._counts, self._settings))
            self._saved = step

    def end(self) -> None:
        """Wait for the last checkpoint. Raises Interrupted when a rank was asked to stop, even after the last step."""
        step = self._counts.step
        beat(step, "writing a checkpoint", LONG)
        self._saver.finish()
        if self._stop.raised_at_last():
            place = f"step {step} of {self._settings.total_steps}"
            text = f"{self._title}: stopped by {self._stop.name} at {place}; saved. "
            text += "Start the same command again to go on."
            # A rank that was not asked itself raises what the others do.
            dist.agree(Interrupted(text) if self._stop.name else None)


def _batches(open_loader: Callable[[int], Iterable[Batch]], step: int) -> Generator[Batch, None, None]:
    yield from open_loader(step)


class _Norms:
    """Norms of gradients that the CPU has not read yet.

    Reading a norm waits until the GPU has finished its step. Read at once, the GPU would then wait for the CPU to
    prepare the next step. So the loop reads a norm one step late, when the next step is already queued, and all norms
    before it logs, evaluates or saves. A run that has to stop takes at most one step more, and keeps nothing of it.
    """

    def __init__(self, most_in_a_row: int, title: str) -> None:
        self._most, self._title = most_in_a_row, title
        self._unread: deque[tuple[int, Tensor]] = deque()

    def put(self, step: int, norm: Tensor) -> None:
        """Keep the norm of `step`, which the GPU may still be computing."""
        self._unread.append((step, norm))

    def read(self, counts: Counts, leave: int = 0) -> None:
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
    """Forward, backward and update of one process's `batch`.

    Returns the task's report and the norm of the gradient, without waiting for the GPU to finish.
    """
    images = to_input(batch.images.to(engine.device, non_blocking=True), mean, std)
    tokens = batch.tokens.to(engine.device, non_blocking=True)
    _, report = cached_backward(task, engine, images, tokens, micro_batch, caption_lengths(batch.tokens), batch.tokens)
    return report, engine.step(lr, clip_grad_norm)


def _count(
    counts: Counts, window: Window, settings: TrainSettings, model: ClipModel, batch: Batch, seconds: float
) -> None:
    counts.step += 1
    counts.device_seconds += seconds * dist.world_size()
    counts.skipped.update(batch.skipped)
    counts.few_captions += batch.few_captions
    lengths = caption_lengths(batch.tokens)
    pieces = lengths.split(settings.micro_batch)
    computed = sum(model.computed_tokens(piece.flatten(), settings.text_buckets) for piece in pieces)
    counts.text_tokens += computed
    window.text_tokens += computed
    window.captions += lengths.numel()
    window.steps += 1
    window.seconds += seconds


def _numbers(counts: Counts, window: Window, settings: TrainSettings, device: torch.device) -> dict[str, float]:
    """What a log line has beside losses."""
    window.seconds = max(window.seconds, 1e-9)  # a virtual machine's clock may have paused
    used = _result(counts, settings)
    hits, misses = used.teacher_hits, used.teacher_misses
    return {
        "epoch": counts.step / settings.steps_per_epoch,
        "samples_per_s": window.steps * settings.batch / window.seconds,
        "data_wait": window.waited / window.seconds,
        "device_hours": used.device_hours,
        "nonfinite_steps": used.nonfinite_steps,
        **{f"skipped_{cause}": n for cause, n in used.skipped_samples.items()},
        "memory_gib": _memory_gib(device),
        **straggler_report(window.seconds - window.waited + window.own_wait, window.own_wait, window.steps),
        **({"macs": settings.macs(used)} if settings.macs else {}),
        **({"teacher_hits": hits, "teacher_misses": misses} if hits + misses else {}),
        **_mfu(window, settings),
    }


def _mfu(window: Window, settings: TrainSettings) -> dict[str, float]:
    """Model FLOPs utilisation: two FLOPs a useful MAC, over the devices' peak; waiting for data counts as time.

    Empty where the peak of the device is not known.
    """
    if settings.peak_flops is None or settings.useful_macs is None:
        return {}
    computed = 1 - window.teacher_hits / window.captions
    useful = settings.useful_macs(window.text_tokens / window.captions, computed)
    flops = 2 * useful * settings.batch * window.steps
    return {"mfu": flops / (settings.peak_flops * dist.world_size() * window.seconds)}


def _memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: what this run allocated on the GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _result(counts: Counts, settings: TrainSettings) -> TrainResult:
    hits, misses, tokens = counts.looked_over_ranks()
    return TrainResult(
        steps=counts.step,
        samples=counts.step * settings.batch,
        device_hours=counts.device_seconds / 3600,
        nonfinite_steps=counts.nonfinite,
        skipped_samples=over_ranks(counts.skipped),
        few_captions=int(dist.all_reduce_sum(counts.few_captions)),
        tokens_per_caption=dist.all_reduce_sum(counts.text_tokens) / (counts.step * settings.batch * settings.captions),
        moments_anew=tuple(counts.moments_anew),
        teacher_hits=hits,
        teacher_misses=misses,
        teacher_tokens_per_caption=tokens / misses if misses else 0.0,
    )
