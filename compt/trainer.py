"""The one training loop, for every task and engine."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compt import checkpoint, dist
from compt.accumulate import cached_backward
from compt.data.records import Batch
from compt.engines.base import Engine
from compt.errors import Interrupted, RunError
from compt.metrics import MetricsWriter
from compt.models import caption_lengths
from compt.pixels import to_input
from compt.task import Task, reduce_report

SIGNAL_EVERY = 10
"""Steps between two looks, over several ranks, at whether one of them was asked to stop."""


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
    ema_decay: float | None
    max_nonfinite: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int | None
    keep_checkpoints: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    identity: Mapping[str, str]
    macs_per_step: float = 0.0


@dataclass(frozen=True)
class TrainResult:
    """What a finished training used: device-hours are processes times hours in the loop, without evaluation."""

    steps: int
    samples: int
    device_hours: float
    nonfinite_steps: int
    skipped_samples: dict[str, int]
    few_captions: int


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine to zero at the last step (Table C of the paper); `step` counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can save at the end of its step.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raised(self, step: int) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks."""
        if dist.world_size() == 1:
            return bool(self.name)
        return step % SIGNAL_EVERY == 0 and dist.any_true(bool(self.name))


@dataclass
class _Counts:
    """What accumulates over a run and lives through a resume."""

    step: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    few_captions: int = 0

    def __post_init__(self) -> None:
        self.skipped: Counter[str] = Counter()

    def to_state(self) -> dict[str, Any]:
        return {**self.__dict__, "skipped": dict(self.skipped)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Counts:
        counts = cls(**{key: state[key] for key in cls.__dataclass_fields__})
        counts.skipped.update(state["skipped"])
        return counts


def _restore(
    folder: Path, engine: Engine, ema: AveragedModel | None, settings: TrainSettings
) -> tuple[_Counts, dict[str, Any]]:
    """Load the newest whole checkpoint, if there is one. Raises RunError when it belongs to another run."""
    path = checkpoint.find_latest(folder)
    if path is None:
        return _Counts(), {}
    tensors, state = checkpoint.load(path)
    if state["identity"] != dict(settings.identity):
        changed = [key for key, value in settings.identity.items() if state["identity"].get(key) != value]
        raise RunError(f"{path} belongs to another training: its {' and '.join(changed)} differs from this run's")
    if ema is not None:
        ema.load_state_dict({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})
    engine.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("ema.")})
    return _Counts.from_state(state["counts"]), state


def _save(folder: Path, engine: Engine, ema: AveragedModel | None, counts: _Counts, settings: TrainSettings) -> None:
    """Write a checkpoint; every rank returns when it is on the disk, or raises when it could not be written."""
    tensors = engine.state_dict()
    if ema is not None:
        tensors |= {f"ema.{key}": value for key, value in ema.state_dict().items()}
    state = {
        "identity": dict(settings.identity),
        "counts": counts.to_state(),
        "samples": counts.step * settings.batch,
        "world_size": dist.world_size(),
    }
    dist.on_main(lambda: checkpoint.save(folder, counts.step, tensors, state, settings.keep_checkpoints))


def _is_due(step: int, every: int | None, total: int) -> bool:
    return every is not None and (step % every == 0 or step == total)


def train(
    task: Task,
    engine: Engine,
    settings: TrainSettings,
    folder: Path,
    open_loader: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[], dict[str, float]] | None = None,
    title: str = "training",
) -> tuple[TrainResult, nn.Module | None]:
    """Train `task` until `settings.total_steps`, from the newest checkpoint below `folder` or from the start.

    `open_loader(step)` yields this rank's batches from that step on. `evaluate()` returns named scores and is called
    on all ranks. Returns the result and the averaged student (None without an EMA).

    Raises Interrupted after a save when SIGTERM or SIGUSR1 arrived, RunError on too many non-finite steps in a row or
    a checkpoint that cannot be written.
    """
    ema = None
    if settings.ema_decay is not None:
        ema = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    counts, _ = _restore(folder / "checkpoints", engine, ema, settings)
    writer = MetricsWriter(
        folder,
        total_steps=settings.total_steps,
        batch=settings.batch,
        start_step=counts.step,
        title=title,
    )
    if counts.step >= settings.total_steps:
        return _result(counts, settings), ema.module if ema else None
    task.module.train()
    with writer, StopSignal() as stop:
        loader = iter(open_loader(counts.step))
        waited = 0.0
        window_start, window_step = time.perf_counter(), counts.step
        while counts.step < settings.total_steps:
            started = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - started
            lr = learning_rate(counts.step, settings)
            report, norm = _step(task, engine, ema, batch, lr, settings, counts)
            counts.step += 1
            counts.skipped.update(batch.skipped)
            counts.few_captions += batch.few_captions
            if counts.nonfinite_in_a_row >= settings.max_nonfinite:
                raise RunError(
                    f"{title}: {counts.nonfinite_in_a_row} steps in a row had a non-finite loss or gradient, the last "
                    f"at step {counts.step}; lower optimizer.lr, or look at the data of that step"
                )
            if _is_due(counts.step, settings.log_every, settings.total_steps):
                now = time.perf_counter()
                counts.seconds += now - window_start
                steps = counts.step - window_step
                writer.log(
                    counts.step,
                    {
                        "epoch": counts.step / settings.steps_per_epoch,
                        **reduce_report(report),
                        "lr": lr,
                        "grad_norm": float(norm),
                        "samples_per_s": steps * settings.batch / (now - window_start),
                        "data_wait": waited / (now - window_start),
                        "device_hours": counts.seconds * dist.world_size() / 3600,
                        "nonfinite_steps": counts.nonfinite,
                        **{f"skipped_{cause}": n for cause, n in _over_ranks(counts.skipped).items()},
                        "memory_gib": _memory_gib(engine.device),
                        "macs": counts.step * settings.macs_per_step,
                    },
                )
                waited, window_start, window_step = 0.0, now, counts.step
            else:
                writer.advance(counts.step)
            if evaluate is not None and _is_due(counts.step, settings.evaluate_every, settings.total_steps):
                paused = time.perf_counter()
                task.module.eval()
                writer.log_evaluation(counts.step, {"epoch": counts.step / settings.steps_per_epoch, **evaluate()})
                task.module.train()
                window_start += time.perf_counter() - paused
            stopping = stop.raised(counts.step)
            if stopping or _is_due(counts.step, settings.checkpoint_every, settings.total_steps):
                now = time.perf_counter()
                state = _Counts.from_state(counts.to_state())
                state.seconds += now - window_start
                _save(folder / "checkpoints", engine, ema, state, settings)
            if stopping and counts.step < settings.total_steps:
                raise Interrupted(
                    f"{title}: stopped by {stop.name or 'another rank'} at step {counts.step} of "
                    f"{settings.total_steps}; saved. Start the same command again to go on."
                )
    return _result(counts, settings), ema.module if ema else None


def _step(
    task: Task,
    engine: Engine,
    ema: AveragedModel | None,
    batch: Batch,
    lr: float,
    settings: TrainSettings,
    counts: _Counts,
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward, backward and update for one global batch; the engine leaves out an update that is not finite."""
    engine.set_lr(lr)
    images = to_input(batch.images.to(engine.device, non_blocking=True), settings.mean, settings.std)
    tokens = batch.tokens.to(engine.device, non_blocking=True)
    _, report = cached_backward(task, engine, images, tokens, settings.micro_batch, caption_lengths(batch.tokens))
    norm = engine.clip_grad_norm(settings.clip_grad_norm)
    engine.step()
    engine.zero_grad()
    # Gradients are the same on all ranks, so is their norm: the engine left the step out everywhere, or nowhere.
    if math.isfinite(float(norm)):
        counts.nonfinite_in_a_row = 0
        task.after_step()
        if ema is not None:
            ema.update_parameters(task.model)
    else:
        counts.nonfinite += 1
        counts.nonfinite_in_a_row += 1
    return report, norm


def _over_ranks(counts: Counter[str]) -> dict[str, int]:
    return {cause: int(dist.all_reduce_sum(counts[cause])) for cause in ("image", "caption", "tar")}


def _memory_gib(device: torch.device) -> float:
    """Peak memory: allocated on the device, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _result(counts: _Counts, settings: TrainSettings) -> TrainResult:
    return TrainResult(
        steps=counts.step,
        samples=counts.step * settings.batch,
        device_hours=counts.seconds * dist.world_size() / 3600,
        nonfinite_steps=counts.nonfinite,
        skipped_samples=_over_ranks(counts.skipped),
        few_captions=int(dist.all_reduce_sum(counts.few_captions)),
    )
