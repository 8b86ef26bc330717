"""How fast this machine trains: the trainer's own step on random pixels and captions, timed job by job."""

from __future__ import annotations

import gc
import multiprocessing
import platform
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from compt.artefact import versions
from compt.data.records import Batch
from compt.engines.base import COMPUTE_DTYPES, AdamWSettings, Precision
from compt.engines.ddp import DataParallelEngine
from compt.errors import ComptError, ConfigError, RunError
from compt.files import write_json
from compt.hardware import Device, Measurement, Throughput, match_device, mean_tokens
from compt.losses import ImageToText
from compt.macs import Tokens, exact_cost
from compt.models import build, caption_lengths, padded_tokens
from compt.presets import OPENAI_MEAN, OPENAI_STD, ModelSpec
from compt.task import ClipTask, DistillTask
from compt.trainer import training_step

LEARNING_RATE = 1e-5
"""Of the timed steps: small enough that random pixels lead nowhere."""

CPU_STEP_SECONDS = 5.0
"""The longest step that a search for a batch goes up to on a CPU, whose memory is seldom what ends it."""


@dataclass(frozen=True)
class Setup:
    """A training job as far as its speed depends on it; `tokens` as in `compt.macs`, the other fields as in a recipe.

    `teacher` is the model whose forward pass is computed too, None for a baseline.
    """

    student: ModelSpec
    teacher: ModelSpec | None = None
    captions: int = 4
    tokens: Tokens = None
    precision: Precision = "bf16"
    text_buckets: int = 1
    loss_chunk: int | None = None
    image_to_text: ImageToText = "slot"
    clip_grad_norm: float | None = None
    compile: bool = False
    seed: int = 0


def random_captions(setup: Setup, batch: int, generator: torch.Generator) -> Tensor:
    """Tokens int64 [batch, captions, T], each with its end of text and zeros behind it.

    A mean length is that of every caption, rounded; of a distribution each length has its share.
    """
    spec = setup.student
    shape = (batch, setup.captions)
    if isinstance(setup.tokens, Mapping):
        count = batch * setup.captions
        choices = torch.tensor([min(length, spec.context_length) for length in setup.tokens])
        ends = torch.tensor(list(setup.tokens.values()), dtype=torch.float64).cumsum(0)
        at = torch.searchsorted(ends / ends[-1], (torch.arange(count, dtype=torch.float64) + 0.5) / count)
        lengths = choices[at][torch.randperm(count, generator=generator)].view(shape)
    else:
        lengths = torch.full(shape, max(1, round(mean_tokens(spec, setup.tokens))))
    longest = int(lengths.max())
    tokens = torch.randint(1, spec.vocab_size - 2, (*shape, longest), generator=generator)
    places = torch.arange(longest)
    end = lengths[..., None] - 1
    return torch.where(places == end, spec.vocab_size - 1, torch.where(places < end, tokens, 0))


class TrainingStep:
    """A model, its engine and, in a chain, its teacher, all with random weights; each call is one step of training."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device
        student = build(setup.student, device=device)
        if setup.teacher is None:
            self.task = ClipTask(
                student, image_to_text=setup.image_to_text, text_buckets=setup.text_buckets, chunk=setup.loss_chunk
            )
        else:
            self.task = DistillTask(
                student,
                build(setup.teacher, device=device),
                image_to_text=setup.image_to_text,
                text_buckets=setup.text_buckets,
                chunk=setup.loss_chunk,
                teacher_dtype=COMPUTE_DTYPES[setup.precision],
            )
        self.task.module.train()
        self.engine = DataParallelEngine(
            self.task.module, AdamWSettings(), precision=setup.precision, device=device, compile=setup.compile
        )

    def data(self, batch: int) -> Batch:
        """Random uint8 pixels and captions of `batch` samples, as a loader hands them over."""
        generator = torch.Generator().manual_seed(self.setup.seed)
        size = self.setup.student.image_size
        images = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
        made = Batch(images, random_captions(self.setup, batch, generator), [""] * batch)
        return made.pin_memory() if self.device.type == "cuda" else made

    def __call__(self, batch: Batch, micro_batch: int | None = None) -> None:
        """Forward, backward and update, waited for."""
        training_step(
            self.task,
            self.engine,
            batch,
            lr=LEARNING_RATE,
            micro_batch=micro_batch or len(batch),
            clip_grad_norm=self.setup.clip_grad_norm,
            mean=OPENAI_MEAN,
            std=OPENAI_STD,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(
        self,
        batch: Batch,
        micro_batch: int | None = None,
        *,
        warm_up: int = 1,
        repeats: int = 3,
        seconds: float = 0.0,
    ) -> list[float]:
        """Seconds of each of at least `repeats` steps after `warm_up` others, until they are `seconds` together."""
        for _ in range(warm_up):
            self(batch, micro_batch)
        times: list[float] = []
        while len(times) < repeats or sum(times) < seconds:
            started = time.perf_counter()
            self(batch, micro_batch)
            times.append(time.perf_counter() - started)
        return times


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that `fits`: by doubling, then by halving the gap to within a sixteenth.

    0 where not even a batch of one does. What is given back was seen to fit. (`accelerate`'s search only ever halves
    from its start, and so stops up to a factor of two below the largest.)
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


class _Search:
    """Asks by trial whether a batch fits; after a failure the next trial starts from an empty device.

    On a CPU a trial is not begun for which the memory that is left would not do, or whose step would take longer than
    `CPU_STEP_SECONDS`, as the trials before it tell.
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
                self.step(self.step.data(1))  # AdamW's moments exist from the first step on
                self.first_peak = _peak_bytes(self.device) or 0
            data = self.step.data(batch)
            started = time.perf_counter()
            self.step(data)
            self.last_seconds = time.perf_counter() - started
            self.last_peak, self.last_batch = _peak_bytes(self.device) or 0, batch
            return True
        except torch.OutOfMemoryError:
            pass  # until here the error's frames hold tensors
        self._clear()
        return False

    def time(self, batch: int, seconds: float) -> tuple[Batch, list[float]] | None:
        """The data and the seconds of each timed step, with the peak of memory counted anew; None without memory."""
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
        available, held = _available_bytes(), _resident_bytes("VmRSS")
        if available is None or held is None or self.last_batch == 1:
            return False
        each = (self.last_peak - self.first_peak) / (self.last_batch - 1)
        return self.last_peak + each * (batch - self.last_batch) - held > 0.9 * available


def measure(setup: Setup, device: torch.device, batch: int | None, most: int, seconds: float) -> Measurement:
    """Time `setup` in this process with `batch` samples a step, or with as many as fit, up to `most`.

    The peak of memory is torch's own on CUDA, and on a CPU what the process's resident set grew by (None where the
    system does not tell).
    """
    torch.manual_seed(setup.seed)
    before = 0 if device.type == "cuda" else _resident_bytes("VmRSS")
    search = _Search(setup, device)
    size = batch or largest_batch(search.fits, most)
    timed = None
    while size and timed is None:
        timed = search.time(size, seconds)
        if timed is None and batch is not None:
            return _failed(setup, batch, f"a batch of {batch} does not fit into memory")
        if timed is None:  # seen to fit once, but not again and again
            size -= max(1, size // 16)
    if timed is None:
        return _failed(setup, None, "a batch of 1 does not fit into memory")
    data, times = timed
    peak = _peak_bytes(device)
    computed = padded_tokens(caption_lengths(data.tokens).flatten(), setup.text_buckets) / data.tokens[..., 0].numel()
    middle = median(times) / size
    return _asked(setup).model_copy(
        update={
            "computed_tokens": computed,
            "batch": size,
            "repeats": len(times),
            "seconds_per_sample": middle,
            "low": min(times) / size,
            "high": max(times) / size,
            "peak_memory_bytes": None if peak is None or before is None else peak - before,
            "mfu": _mfu(setup, device, size, computed, middle),
        }
    )


def _asked(setup: Setup) -> Measurement:
    return Measurement(
        student=setup.student,
        teacher=setup.teacher,
        captions=setup.captions,
        tokens=mean_tokens(setup.student, setup.tokens),
        text_buckets=setup.text_buckets,
    )


def _failed(setup: Setup, batch: int | None, why: str) -> Measurement:
    return _asked(setup).model_copy(update={"batch": batch, "failure": why})


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The dense peak of one GPU in FLOP/s by its datasheet; None for a CPU and for a GPU that is not known."""
    known = known_device(device)
    return known.peak_flops[precision] if known else None


def known_device(device: torch.device) -> Device | None:
    """The datasheet of the device at hand, if there is one."""
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
    peak = peak_flops(device, setup.precision)
    cost = exact_cost(setup.student, setup.teacher, steps=1, batch=batch, captions=setup.captions, tokens=tokens)
    return 2 * cost.sample_macs / seconds / peak if peak else None


def _resident_bytes(key: str) -> int | None:
    """`VmRSS` (now) or `VmHWM` (peak) of this process; unlike getrusage's peak, never that of its parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes("VmHWM")


def _available_bytes() -> int | None:
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def measure_apart(setup: Setup, device: torch.device, batch: int | None, most: int, seconds: float) -> Measurement:
    """`measure` in a process of its own, so that memory is counted from nothing and a kill ends this job only.

    Raises what `measure` raises of ComptError, and RunError for any other fault of the process, which it has printed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_measurement, args=(sender, setup, device, batch, most, seconds), daemon=True)
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    process.join()
    if isinstance(found, ComptError):
        raise found
    if found is None and process.exitcode == -signal.SIGKILL:
        return _failed(setup, batch, "its process was killed, as the system does where memory runs out")
    if found is None:
        raise RunError(f"measuring {setup.student.name} failed (exit code {process.exitcode}); its error stands above")
    return cast(Measurement, found)


def _send_measurement(sender: Any, *arguments: Any) -> None:
    try:
        sender.send(measure(*arguments))
    except ComptError as error:
        sender.send(error)


def new_file(device: torch.device, setup: Setup, command: str) -> Throughput:
    """A throughput file of this machine, without entries, for jobs that are set up as `setup` is."""
    known = known_device(device)
    return Throughput(
        device=device_name(device),
        kind=known.name if known else None,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        precision=setup.precision,
        compiled=setup.compile,
        seed=setup.seed,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command,
        versions=versions(),
    )


_SAME_MACHINE = ("device", "threads", "precision", "compiled", "seed", "versions")


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

    What `out` has already is not measured again, unless it was with another `batch` than is now asked for, or `fresh`.
    `show` is called with each entry and whether it was there before. Raises ConfigError where `out` is damaged or of
    another machine, other versions or another precision.
    """
    made = new_file(device, setups[0], command)
    if out is not None and out.exists() and not fresh:
        before = Throughput.read(out)
        for key in _SAME_MACHINE:
            old, new = getattr(before, key), getattr(made, key)
            if old != new:
                raise ConfigError(
                    f"{out} holds measurements with {key} {_shown(old)}, this one has {_shown(new)}; "
                    "write to another file, or start it anew with --fresh"
                )
        made = made.model_copy(update={"entries": before.entries})
    for setup in setups:
        asked = _asked(setup)
        found = next((entry for entry in made.entries if entry.same_job(asked)), None)
        kept = found is not None and (batch is None or found.batch == batch)
        if found is None or not kept:
            entry = measure(setup, device, batch, most, seconds)
            others = tuple(entry for entry in made.entries if entry is not found)
            made = made.model_copy(update={"entries": (*others, entry)})
            if out is not None:
                write_json(out, made.model_dump(mode="json"))
            found = entry
        show(found, kept)
    return made


def _shown(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
