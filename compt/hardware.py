"""How fast GPUs train: measured where a throughput file says so, else projected by a stated model. No torch in here.

The projection charges each sample (a picture with its captions) for three things, one after the other:

    seconds = FLOPs / (efficiency * peak) + channels * bytes_per_channel / bandwidth + fixed_seconds

FLOPs are twice the MACs of `compt.macs`; `channels` are the positions times the width that go through the blocks,
counted three times for the student (forward, and twice as much in the backward) and once for the teacher. The three
constants are fitted to the A100 hours of Table 2 of the paper (`fitted`), in the accounting that its MACs imply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compt.errors import ConfigError, nearest
from compt.macs import PAPER_TEXT_PASSES, PAPER_TOKENS, JobCost, Tokens, paper_cost, token_moments
from compt.paper import IMAGES, TABLE_2
from compt.presets import PRESETS, ModelSpec


@dataclass(frozen=True)
class Device:
    """A GPU by its datasheet: dense peak in FLOP/s by precision, memory in bytes, its bandwidth in bytes per second.

    `fp32` runs without tensor cores, as this program's engines do; `tf32` is there for comparison.
    """

    name: str
    title: str
    peak_flops: Mapping[str, float]
    bandwidth_bytes: float
    memory_bytes: float
    source: str


_AMPERE = {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}
_HOPPER = {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("a100-40", "A100 40 GB", _AMPERE, 1.555e12, 40e9, "NVIDIA A100 datasheet, SXM"),
        Device("a100-80", "A100 80 GB", _AMPERE, 2.039e12, 80e9, "NVIDIA A100 datasheet, SXM"),
        Device("h100", "H100 80 GB SXM", _HOPPER, 3.35e12, 80e9, "NVIDIA H100 datasheet, SXM5"),
        Device("h200", "H200 141 GB SXM", _HOPPER, 4.8e12, 141e9, "NVIDIA H200 datasheet, SXM5"),
    )
}
ALIASES = {"a100": "a100-80"}
PAPER_DEVICE = DEVICES["a100-80"]
"""What the paper's hours were measured on (its section 4 and Table C)."""


def find_device(name: str) -> Device:
    """The device called `name`. Raises ConfigError for an unknown one."""
    known = name.lower()
    known = ALIASES.get(known, known)
    if known not in DEVICES:
        names = [*DEVICES, *ALIASES]
        raise ConfigError(f"unknown GPU '{name}'{nearest(known, names)}; known: {', '.join(names)}")
    return DEVICES[known]


def match_device(cuda_name: str, memory_bytes: float) -> Device | None:
    """The datasheet of what CUDA calls `cuda_name`; None for other GPUs, other forms (PCIe Hopper) and parts of one."""
    words = set(re.split(r"[\s_-]+", cuda_name.upper()))
    if "MIG" in words:
        return None
    if "A100" in words:
        return DEVICES["a100-40" if memory_bytes < 60e9 else "a100-80"]
    if not words & {"PCIE", "NVL"}:
        for name in ("h100", "h200"):
            if name.upper() in words:
                return DEVICES[name]
    return None


def utilisation(macs: float, seconds: float, device: Device, precision: str = "bf16") -> float:
    """The share of the device's dense peak that `macs` multiply-accumulates (two FLOPs each) in `seconds` make."""
    return 2 * macs / seconds / _peak(device, precision)


def _peak(device: Device, precision: str) -> float:
    if precision not in device.peak_flops:
        known = device.peak_flops
        hint = nearest(precision, known)
        raise ConfigError(f"unknown precision '{precision}'{hint} for {device.title}; known: {', '.join(known)}")
    return device.peak_flops[precision]


class Measurement(BaseModel):
    """What a device did with one training job: a model alone, or with the forward pass of its teacher.

    `tokens` is the mean length of the captions that was asked for, `computed_tokens` what came of it with padding. The
    times of a sample are the median, least and greatest of `repeats` steps of `batch` samples. `failure` says why there
    are no numbers, where the model does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    student: ModelSpec
    teacher: ModelSpec | None = None
    captions: int = Field(ge=1)
    tokens: float = Field(gt=0)
    text_buckets: int = Field(1, ge=1)
    computed_tokens: float | None = Field(None, gt=0)
    batch: int | None = Field(None, ge=1)
    repeats: int = Field(0, ge=0)
    seconds_per_sample: float | None = Field(None, gt=0)
    low: float | None = Field(None, gt=0)
    high: float | None = Field(None, gt=0)
    peak_memory_bytes: int | None = Field(None, ge=0)
    mfu: float | None = Field(None, gt=0)
    failure: str | None = None

    def same_job(self, other: Measurement) -> bool:
        """Whether both are of one job: the same sizes whatever their names, and captions as long within 2 %."""
        return (
            _nameless(self.student) == _nameless(other.student)
            and (self.teacher and _nameless(self.teacher)) == (other.teacher and _nameless(other.teacher))
            and self.captions == other.captions
            and abs(self.tokens - other.tokens) <= 0.02 * other.tokens
        )


class Throughput(BaseModel):
    """The file of `compt bench throughput`: one device, one precision, and every job that was measured on it.

    `device` is the name that the system gives, `kind` its key in `DEVICES`, or None where its peak is not known;
    `threads` are those that torch uses on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    device: str
    kind: str | None = None
    threads: int | None = None
    precision: str
    compiled: bool = False
    seed: int
    date: str
    command: str
    versions: dict[str, str]
    entries: tuple[Measurement, ...] = ()

    @classmethod
    def read(cls, path: Path, device: Device | None = None) -> Throughput:
        """Raises ConfigError for a file that is missing or damaged, or of another device than asked for."""
        try:
            found = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValidationError, ConfigError) as error:
            raise ConfigError(f"{path} is no throughput file of this program: {_first(error)}") from None
        if device is not None and found.kind != device.name:
            raise ConfigError(
                f"{path} was measured on {found.device}, not on {device.title} ({device.name}); "
                f"measure there, or ask for the device of the file"
            )
        return found

    def find(
        self, student: ModelSpec, teacher: ModelSpec | None, captions: int, tokens: Tokens = None
    ) -> Measurement | None:
        """The measurement of that very job, if it was made; one that failed is none."""
        asked = Measurement(student=student, teacher=teacher, captions=captions, tokens=mean_tokens(student, tokens))
        done = (entry for entry in self.entries if entry.seconds_per_sample is not None)
        return next((entry for entry in done if entry.same_job(asked)), None)


def _first(error: ValidationError | ConfigError) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    given = json.dumps(fault["input"], default=str)
    shown = "" if fault["type"] in ("missing", "json_invalid") else f", not {given[:60]}"
    return f"{place + ': ' if place else ''}{fault['msg']}{shown}"


def _nameless(spec: ModelSpec) -> ModelSpec:
    return replace(spec, name="", timm_name="")


def mean_tokens(spec: ModelSpec, tokens: Tokens) -> float:
    """The mean computed length of a caption, none longer than the context (which is the default)."""
    return token_moments(tokens, spec.context_length)[0]


def channels(spec: ModelSpec, captions: int, tokens: Tokens = None) -> float:
    """Positions times width, summed over all blocks of both towers, of one picture with its captions."""
    text = captions * mean_tokens(spec, tokens) * spec.text_width * spec.text_depth
    side = spec.image_size // spec.patch_size
    if spec.arch == "vit":
        return text + (side**2 + 1) * spec.width * spec.depth
    image, width = 0, spec.width
    for stage, depth in enumerate(spec.depths):
        if stage:
            side, width = -(-side // 2), width * 2
        image += side**2 * width * depth
    return text + image


@dataclass(frozen=True)
class Work:
    """What one sample asks of a device: floating-point operations, and channels that pass through its memory."""

    flops: float
    channels: float


def work(student: ModelSpec, teacher: ModelSpec | None, cost: JobCost, captions: int, tokens: Tokens = None) -> Work:
    """The work of a sample; in `paper` mode with the captions of the published accounting, whatever is given.

    A forward pass that is run again, as with cached features, moves its channels again.
    """
    if cost.mode == "paper":
        captions, tokens = PAPER_TEXT_PASSES, PAPER_TOKENS
    passes = 3 + cost.recompute_macs / cost.student_forward_macs
    moved = passes * channels(student, captions, tokens)
    if teacher is not None and cost.teacher_forward_macs:
        moved += channels(teacher, captions, tokens)
    return Work(2 * cost.sample_macs, moved)


@dataclass(frozen=True)
class PublishedTime:
    """A row of Table 2 as a time: A100 hours over images times epochs. `teacher` is None for a baseline."""

    family: str
    model: str
    teacher: str | None
    epochs: int
    hours: float
    seconds_per_sample: float
    cost: JobCost
    work: Work

    @property
    def utilisation(self) -> float:
        """The share of an A100's dense peak in bf16 that the published MACs in the published hours make."""
        return utilisation(self.cost.sample_macs, self.seconds_per_sample, PAPER_DEVICE)


@lru_cache
def published_times() -> tuple[PublishedTime, ...]:
    """Every different training of Table 2: its baselines, and the links after the first (which is a baseline)."""
    times = []
    for family, table in TABLE_2.items():
        for at, model in enumerate(table.models):
            jobs: list[tuple[str | None, int, float]] = [(None, table.baseline_epochs, table.baseline[at].hours)]
            if at:
                jobs.append((table.models[at - 1], table.chain_epochs[at], table.chain[at].hours))
            for teacher, epochs, hundreds in jobs:
                samples = IMAGES[table.dataset] * epochs
                spec, before = PRESETS[model], PRESETS[teacher] if teacher else None
                cost = paper_cost(spec, before, samples=samples, steps=0)
                hours = 100 * hundreds
                asked = work(spec, before, cost, PAPER_TEXT_PASSES)
                seconds = hours * 3600 / samples
                times.append(PublishedTime(family, model, teacher, epochs, hours, seconds, cost, asked))
    return tuple(times)


@dataclass(frozen=True)
class Projection:
    """The constants of the model, of a device in bf16; `error` is the largest relative error of a held-out row."""

    fixed_seconds: float
    efficiency: float
    bytes_per_channel: float
    error: float

    def parts(self, asked: Work, device: Device, precision: str = "bf16") -> tuple[float, float, float]:
        """Seconds of computing, of memory traffic, and fixed ones, of one sample on `device`."""
        wide = 2.0 if precision in ("fp32", "tf32") else 1.0
        return (
            asked.flops / (self.efficiency * _peak(device, precision)),
            asked.channels * wide * self.bytes_per_channel / device.bandwidth_bytes,
            self.fixed_seconds,
        )

    def seconds(self, asked: Work, device: Device, precision: str = "bf16") -> float:
        """Seconds of one sample on `device`."""
        return sum(self.parts(asked, device, precision))

    def bounds(self, asked: Work, device: Device, precision: str = "bf16") -> tuple[float, float]:
        """The least and the most seconds of one sample that the fit's error and the readings of its parts allow.

        Most: the fixed part is the host's and does not shrink, and computing gains no more than the bandwidth did.
        Least: the fixed part is the device's own and shrinks with its bandwidth; below the least published work, where
        nothing holds the fit, it shrinks with the work too.
        """
        computing, traffic, fixed = self.parts(asked, device, precision)
        faster = device.bandwidth_bytes / PAPER_DEVICE.bandwidth_bytes
        gained = _peak(device, precision) / _peak(PAPER_DEVICE, precision)
        slow = computing * max(1.0, gained / max(1.0, faster)) + traffic + fixed
        smallest = min(row.work.flops for row in published_times())
        own = fixed / max(1.0, faster) * min(1.0, asked.flops / smallest)
        return (computing + traffic + own) * (1 - self.error), slow * (1 + self.error)


def fit(rows: tuple[PublishedTime, ...]) -> Projection:
    """Least squares of the relative error over `rows`; `error` is left at 0."""
    design = np.array([[1.0, row.work.flops, row.work.channels] for row in rows])
    seconds = np.array([row.seconds_per_sample for row in rows])
    fixed, per_flop, per_channel = np.linalg.lstsq(design / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
    return Projection(
        fixed_seconds=float(fixed),
        efficiency=float(1 / per_flop / _peak(PAPER_DEVICE, "bf16")),
        bytes_per_channel=float(per_channel * PAPER_DEVICE.bandwidth_bytes),
        error=0.0,
    )


def relative_error(model: Projection, row: PublishedTime) -> float:
    """How far the model is above (positive) or below the published time, as a share of it."""
    return model.seconds(row.work, PAPER_DEVICE) / row.seconds_per_sample - 1


@lru_cache
def fitted() -> Projection:
    """The model fitted to all of Table 2, with the largest error on a row that a fit to all others makes."""
    rows = published_times()
    held_out = (relative_error(fit(rows[:at] + rows[at + 1 :]), row) for at, row in enumerate(rows))
    return replace(fit(rows), error=max(map(abs, held_out)))


@dataclass(frozen=True)
class Speed:
    """Seconds that one GPU takes for a sample, with bounds; measured, or projected by the model of this module."""

    seconds_per_sample: float
    low: float
    high: float
    kind: Literal["measured", "projected"]
    source: str


def speed(
    student: ModelSpec,
    teacher: ModelSpec | None,
    cost: JobCost,
    device: Device,
    *,
    captions: int,
    tokens: Tokens = None,
    precision: str = "bf16",
    throughput: Throughput | None = None,
) -> Speed:
    """How fast one `device` trains `student`, with the forward pass of `teacher` if there is one.

    Measured where `throughput` has this very job in this precision. `paper` costs stand for the captions of the
    published accounting, not for those given. Raises ConfigError for a precision without a peak.
    """
    if throughput is not None:
        found = measured(student, teacher, cost, captions=captions, tokens=tokens, precision=precision, file=throughput)
        if found is not None:
            return found
    model, asked = fitted(), work(student, teacher, cost, captions, tokens)
    seconds, (low, high) = model.seconds(asked, device, precision), model.bounds(asked, device, precision)
    return Speed(seconds, low, high, "projected", f"for {device.title} from the A100 hours of Table 2")


def measured(
    student: ModelSpec,
    teacher: ModelSpec | None,
    cost: JobCost,
    *,
    captions: int,
    tokens: Tokens,
    precision: str,
    file: Throughput,
) -> Speed | None:
    """What `file` says of this very job; None where it says nothing. A teacher that costs nothing is none."""
    if cost.mode == "paper":
        captions, tokens = PAPER_TEXT_PASSES, PAPER_TOKENS
    teacher = teacher if cost.teacher_forward_macs else None
    found = file.find(student, teacher, captions, tokens) if precision == file.precision else None
    if found is None or found.seconds_per_sample is None:
        return None
    middle = found.seconds_per_sample
    return Speed(middle, found.low or middle, found.high or middle, "measured", f"{file.device}, {file.date[:10]}")
