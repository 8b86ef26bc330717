"""How fast this machine trains: the trainer's own step on random pixels and captions, timed for each job."""

from __future__ import annotations

import gc
import platform
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from compt.bench.step import Setup, TrainingStep
from compt.cost.gpus import Device, match_device
from compt.cost.speed import Measurement, Throughput, mean_tokens, way_of
from compt.cost.training import exact_breakdown
from compt.data.batch import Batch
from compt.dist import collectives as dist
from compt.dist.child import answer_of, start_child
from compt.errors import ComptError, ConfigError, RunError
from compt.files import memory_sizes, write_json
from compt.models.clip import caption_lengths
from compt.weights.artefact import versions

CPU_STEP_SECONDS = 5.0
"""Longest step of a search for a batch on a CPU, where memory is seldom the limit."""


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that `fits`: by doubling, then by halving the gap to within a sixteenth.

    0 if not even a batch of one does. The returned batch was tried. (`accelerate`'s search only halves from its start,
    and so stops up to a factor of two below the largest.)
    """
    good, bad, size = 0, most + 1, 1
    while good < most:
        if fits(size):
            good = size
        else:
            bad = size
            break
        size = min(2 * size, most)
    while bad - good > max(1, good // 16):
        size = (good + bad) // 2
        size -= size % 8 if size > 64 else 0  # multiples of 8 suit tensor cores
        if size <= good:
            break
        if fits(size):
            good = size
        else:
            bad = size
    return good


class _LargestBatch:
    """Finds by trial whether a batch fits; after a failure the next trial starts from an empty device.

    On a CPU a trial is skipped if, by the trials before it, it needs more memory than is left or its step takes longer
    than `CPU_STEP_SECONDS`.
    """

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device
        self.step: TrainingStep | None = None
        self.first_peak = self.last_peak = self.last_batch = 0
        self.last_seconds = 0.0

    def fits(self, batch: int) -> bool:
        """Whether a step with `batch` samples runs."""
        if self.device.type == "cpu" and self._is_too_much(batch):
            return False
        try:
            if self.step is None:
                self.step = TrainingStep(self.setup, self.device)
                self.step(self.step.data(1))  # creates AdamW's moments
                self.first_peak = _peak_bytes(self.device) or 0
            data = self.step.data(batch)
            started = time.perf_counter()
            self.step(data)
            self.last_seconds = time.perf_counter() - started
            self.last_peak, self.last_batch = _peak_bytes(self.device) or 0, batch
            return True
        except torch.OutOfMemoryError:
            pass  # clear after this block: inside it, the error's frames hold tensors
        self._clear()
        return False

    def time(self, batch: int, seconds: float) -> tuple[Batch, list[float]] | None:
        """The data and the seconds of each timed step, with a fresh peak of memory; None without enough memory."""
        try:
            self.step = self.step or TrainingStep(self.setup, self.device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            data = self.step.data(batch)
            return data, self.step.seconds(data, warm_up=2 if self.device.type == "cuda" else 1, seconds=seconds)
        except torch.OutOfMemoryError:
            pass
        self._clear()
        return None

    def _clear(self) -> None:
        self.step = None
        gc.collect()
        torch.cuda.empty_cache()

    def _is_too_much(self, batch: int) -> bool:
        if not self.last_batch:
            return False
        if self.last_seconds * batch / self.last_batch > CPU_STEP_SECONDS:
            return True
        available, held = map(memory_sizes().get, ("MemAvailable", "VmRSS"))
        if available is None or held is None or self.last_batch == 1:
            return False
        each = (self.last_peak - self.first_peak) / (self.last_batch - 1)
        return self.last_peak + each * (batch - self.last_batch) - held > 0.9 * available


def measure(setup: Setup, device: torch.device, batch: int | None, most: int, seconds: float) -> Measurement:
    """Time `setup` in this process with `batch` samples a step, or with as many as fit, up to `most`.

    The peak of memory is torch's own on CUDA, and on a CPU the growth of the process's resident set (None if the system
    does not report it).
    """
    torch.manual_seed(setup.seed)
    setup = replace(setup, engine=setup.engine.on(device.type))
    before = 0 if device.type == "cuda" else memory_sizes().get("VmRSS")
    search = _LargestBatch(setup, device)
    size = batch or largest_batch(search.fits, most)
    timed = None
    while size and timed is None:
        timed = search.time(size, seconds)
        if timed is None and batch is not None:
            return _failed(setup, batch, f"a batch of {batch} does not fit into memory")
        if timed is None:  # it fitted once, but not several times
            size -= max(1, size // 16)
    if timed is None:
        return _failed(setup, None, "a batch of 1 does not fit into memory")
    assert search.step is not None
    data, times = timed
    peak, model = _peak_bytes(device), search.step.task.model
    pieces = caption_lengths(data.tokens).split(setup.engine.micro_batch or size)
    positions = sum(model.computed_tokens(piece.flatten(), setup.engine.buckets) for piece in pieces)
    computed = positions / (size * setup.captions)
    middle = median(times) / size
    return _asked(setup, size).model_copy(
        update={
            "computed_tokens": computed,
            "repeats": len(times),
            "seconds_per_sample": middle,
            "low": min(times) / size,
            "high": max(times) / size,
            "peak_memory_bytes": None if peak is None or before is None else peak - before,
            "mfu": _mfu(setup, device, size, computed, middle),
        }
    )


def _asked(setup: Setup, batch: int | None) -> Measurement:
    return Measurement(
        student=setup.student,
        teacher=setup.teacher,
        captions=setup.captions,
        tokens=mean_tokens(setup.student, setup.tokens),
        batch=batch,
        **way_of(setup.optimizer, setup.engine, batch),
    )


_ASKED = (
    *("captions", "tokens", "text_buckets", "micro_batch", "loss_chunk", "compile", "engine", "recompute"),
    "settings",
)


def _answers(entry: Measurement, setup: Setup, batch: int | None) -> bool:
    """Whether `entry` is a measurement of exactly this job, with `batch` samples a step, or with as many as fit."""
    asked = _asked(setup, entry.batch)
    same = all(getattr(entry, key) == getattr(asked, key) for key in _ASKED)
    return same and entry.same_models(asked) and (entry.searched if batch is None else entry.batch == batch)


def _failed(setup: Setup, batch: int | None, why: str) -> Measurement:
    return _asked(setup, batch).model_copy(update={"failure": why})


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The dense peak of one GPU in FLOP/s by its datasheet; None for a CPU and for an unknown GPU."""
    known = known_device(device)
    return known.peak_flops[precision] if known else None


def known_device(device: torch.device) -> Device | None:
    """The datasheet of `device`, if compt has one."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return match_device(found.name, found.total_memory)


def device_name(device: torch.device) -> str:
    """What the system calls the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if (cpu := Path("/proc/cpuinfo")).exists():
        for line in cpu.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _mfu(setup: Setup, device: torch.device, batch: int, tokens: float, seconds: float) -> float | None:
    peak = peak_flops(device, setup.optimizer.precision)
    counted = exact_breakdown(setup.student, setup.teacher, batch=batch, captions=setup.captions, tokens=tokens)
    return 2 * counted.of_steps(1).sample_macs / seconds / peak if peak else None


def _peak_bytes(device: torch.device) -> int | None:
    # VmHWM is the peak; that of getrusage would include the parent's.
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_sizes().get("VmHWM")


def measure_apart(setup: Setup, device: torch.device, batch: int | None, most: int, seconds: float) -> Measurement:
    """`measure` in a child process, so that memory is counted from zero and a kill only ends this job.

    Raises the ComptErrors of `measure`, and RunError for any other fault of the process, which has printed it.
    """
    process, receiver = start_child(_send_measurement, setup, device, batch, most, seconds)
    found = answer_of(process, receiver)
    if isinstance(found, ComptError):
        raise found
    if found is None and process.exitcode == -signal.SIGKILL:
        return _failed(setup, batch, "its process was killed, which the system does when memory runs out")
    if found is None:
        raise RunError(f"measuring {setup.student.name} failed (exit code {process.exitcode}); its error is above")
    return cast(Measurement, found)


def _send_measurement(sender: Any, setup: Setup, device: torch.device, *arguments: Any) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        sender.send(measure(setup, device, *arguments))
    except ComptError as error:
        sender.send(error)
    finally:
        dist.shutdown()


def new_file(device: torch.device, setup: Setup, command: str) -> Throughput:
    """A throughput file of this machine, without entries, for jobs with the precision and seed of `setup`."""
    known = known_device(device)
    return Throughput(
        device=device_name(device),
        kind=known.name if known else None,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        precision=setup.optimizer.precision,
        seed=setup.seed,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command,
        versions=versions(),
    )


_SAME_MACHINE = ("device", "threads", "precision", "seed", "versions")


def run(
    setups: Sequence[Setup],
    device: torch.device,
    out: Path | None,
    *,
    command: str,
    batch: int | None = None,
    most: int = 1024,
    seconds: float = 2.0,
    fresh: bool = False,
    show: Callable[[Measurement, bool], None] = lambda entry, kept: None,
    measure: Callable[[Setup, torch.device, int | None, int, float], Measurement] = measure_apart,
) -> Throughput:
    """Measure each of `setups`, all of one precision, and write `out` after every one, so that a rerun goes on there.

    What `out` has is not measured again, unless `fresh`; its entries of another `batch` or setting stay. `show` is
    called with each entry and whether it was there before. Raises ConfigError when `out` is damaged or of another
    machine, other versions or another precision.
    """
    made = held = new_file(device, setups[0], command)
    if out is not None and out.exists() and not fresh:
        held = Throughput.read(out)
        for key in _SAME_MACHINE:
            old, new = getattr(held, key), getattr(made, key)
            if old != new:
                raise ConfigError(
                    f"{out} holds measurements with {key} {_shown(old)}, this one has {_shown(new)}; "
                    "write to another file, or replace this one with --fresh"
                )
    for setup in setups:
        found = next((entry for entry in held.entries if _answers(entry, setup, batch)), None)
        kept = found is not None
        if found is None:
            found = measure(setup, device, batch, most, seconds).model_copy(update={"searched": batch is None})
            held = made.model_copy(update={"entries": (*held.entries, found)})
            if out is not None:
                write_json(out, held.model_dump(mode="json"))
        show(found, kept)
    return held


def _shown(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
