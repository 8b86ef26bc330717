"""How fast GPUs train: measured where a throughput file says so, else projected by a stated model.

The projection charges each sample (an image with its captions) for three things, one after the other:

    seconds = FLOPs / (efficiency * peak) + channels * bytes_per_channel / bandwidth + fixed_seconds

FLOPs are twice the MACs of `compt.cost`; `channels` are the positions times the width that go through the blocks,
counted three times for the student (forward, and twice as much in the backward) and once for the teacher. The three
constants are fitted to the A100 hours of Table 2 of the paper (`fitted`), in the accounting that its MACs imply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compt.cost.counts import Tokens, token_moments
from compt.cost.gpus import DEVICES, PAPER_DEVICE, Device, utilisation
from compt.cost.paper import IMAGES, TABLE_2
from compt.cost.published import PAPER_TEXT_PASSES, PAPER_TOKENS, paper_cost
from compt.cost.training import JobCost
from compt.errors import ConfigError, nearest
from compt.files import plain_stat
from compt.models.presets import NORM_EPS, PACKED, PRESETS, ModelSpec
from compt.recipe.engine import Compile, EngineConfig, EngineName, LossChunk
from compt.recipe.optimizer import Optimizer
from compt.recipe.schema import Recipe
from compt.recipe.types import first_mistake


@dataclass(frozen=True)
class Conditions:
    """How one process trains, as far as its speed depends on it; `batch` is its own share of a step's images.

    `tokens` as in `compt.cost`. `micro_batch` and `loss_chunk` are None where one takes the whole share.
    """

    captions: int = 4
    tokens: Tokens = None
    precision: str = "bf16"
    batch: int = 128
    micro_batch: int | None = None
    loss_chunk: LossChunk = None
    compile: Compile = "off"
    text_buckets: int = 1
    engine: EngineName = "ddp"
    recompute: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As of `other_settings`."""

    @classmethod
    def of(cls, recipe: Recipe, gpus: int, model: str) -> Conditions:
        """The conditions of one of `gpus` processes that train `model` by `recipe`; `gpus` divides the batch."""
        data, optimizer, batch = recipe.data, recipe.optimizer, recipe.optimizer.batch // gpus
        way = way_of(optimizer, recipe.engine_of(model), batch)
        return cls(data.captions, data.caption_tokens, optimizer.precision, batch, **way)

    def differences(self, found: Measurement) -> str:
        """How `found` was measured otherwise, in brackets after a space, or empty."""
        pairs = [
            (f"batch {found.batch:,}", f"{self.batch:,} per GPU", found.batch == self.batch),
            (_words(found.text_buckets), _words(self.text_buckets), found.text_buckets == self.text_buckets),
        ]
        return "".join(f" (measured at {had}; this plan has {has})" for had, has, same in pairs if not same)


def _words(buckets: int) -> str:
    return "packed text" if buckets == PACKED else f"{buckets} text buckets"


def way_of(optimizer: Optimizer, engine: EngineConfig, batch: int | None) -> dict[str, Any]:
    """The fields that `Conditions` and `Measurement` share, for `batch` images of a process; None: not known yet."""

    def piece(size: int | None) -> int | None:
        return None if size is None or (batch is not None and size >= batch) else size

    return {
        "micro_batch": piece(engine.micro_batch),
        "loss_chunk": engine.loss_chunk if engine.loss_chunk == "tiled" else piece(engine.loss_chunk),
        "engine": engine.name,
        "text_buckets": engine.buckets,
        **{key: getattr(engine, key) for key in ("compile", "recompute")},
        "settings": other_settings(optimizer, engine),
    }


def other_settings(optimizer: Optimizer, engine: EngineConfig) -> dict[str, Any]:
    """What else of a recipe decides on the time of a step, by key, where it is not the default.

    Without `engine.fsdp2.replicas`: measured is one process alone.
    """
    found = engine.model_dump(
        include={"shard_teacher", "deepspeed_config", "fsdp2", "compile_mode", "graphs"}, exclude_defaults=True
    )
    own = found.pop("fsdp2", {})
    own.pop("replicas", None)
    found |= {f"fsdp2.{key}": value for key, value in own.items()}
    ema = {"optimizer.ema": True} if optimizer.ema else {}
    return {**{f"engine.{key}": value for key, value in found.items()}, **ema}


_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measurement(BaseModel):
    """What a device did with one training job: a model alone, or with the forward pass of its teacher.

    `tokens` is the mean of a caption's computed tokens that was asked for, `computed_tokens` what was computed.
    `settings` are those of `other_settings`. `searched`: `batch` is the largest that was found to fit. The times of a
    sample are the median, least and greatest of `repeats` steps of `batch` samples. `failure` says why there are no
    numbers, where the model does not fit.
    """

    model_config = _STRICT
    student: ModelSpec
    teacher: ModelSpec | None = None
    captions: int = Field(ge=1)
    tokens: float = Field(gt=0)
    computed_tokens: float | None = Field(None, gt=0)
    text_buckets: int = Field(1, ge=PACKED)
    batch: int | None = Field(None, ge=1)
    searched: bool = False
    micro_batch: int | None = Field(None, ge=1)
    loss_chunk: LossChunk = None
    compile: Compile = "off"
    engine: EngineName = "ddp"
    recompute: bool = False
    settings: dict[str, Any] = {}
    repeats: int = Field(0, ge=0)
    seconds_per_sample: float | None = Field(None, gt=0)
    low: float | None = Field(None, gt=0)
    high: float | None = Field(None, gt=0)
    peak_memory_bytes: int | None = Field(None, ge=0)
    mfu: float | None = Field(None, gt=0)
    failure: str | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Measurement:
        if self.seconds_per_sample is not None and self.batch is None:
            raise ValueError("batch is missing beside seconds_per_sample")
        times = [time for time in (self.low, self.seconds_per_sample, self.high) if time is not None]
        if sorted(times) != times:
            raise ValueError("low, seconds_per_sample and high have to be in this order")
        return self

    def same_models(self, other: Measurement) -> bool:
        """Whether both are of the same sizes, whatever their names."""
        return nameless(self.student) == nameless(other.student) and (
            (self.teacher and nameless(self.teacher)) == (other.teacher and nameless(other.teacher))
        )


class Throughput(BaseModel):
    """The file of `compt bench throughput`: one device, one precision, and every job that was measured on it.

    `device` is the name that the system gives, `kind` its key in `DEVICES`, or None where its peak is not known;
    `threads` are those that torch uses on a CPU.
    """

    model_config = _STRICT
    format: Literal[1] = 1
    device: str
    kind: str | None = None
    threads: int | None = None
    precision: str
    seed: int
    date: str
    command: str
    versions: dict[str, str]
    entries: tuple[Measurement, ...] = ()

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str | None) -> str | None:
        if value is not None and value not in DEVICES:
            raise ValueError(f"should be null or one of {', '.join(DEVICES)}{nearest(value, DEVICES)}")
        return value

    @classmethod
    def read(cls, path: Path, device: Device | None = None) -> Throughput:
        """Raises ConfigError for a file that is missing or damaged, or of another device than asked for."""
        try:
            plain_stat(path)
            found = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValidationError, ConfigError) as error:
            mistake = first_mistake(error) if isinstance(error, ValidationError) else error
            raise ConfigError(f"{path} is not a throughput file of compt: {mistake}") from None
        if device is not None and found.kind != device.name:
            raise ConfigError(
                f"{path} was measured on {found.device}, not on {device.title} ({device.name}); "
                f"measure there, or ask for the device of the file"
            )
        return found

    def find(self, student: ModelSpec, teacher: ModelSpec | None, conditions: Conditions) -> Measurement | None:
        """The measurement of that very job, at the batch nearest to its own; one that failed is none.

        Models, captions, precision, micro-batch, chunks of the loss, compilation, engine, recomputation and the other
        settings are the same; the computed tokens of a caption are, within 2 % or the half that a whole number of them
        may be off.
        """
        if self.precision != conditions.precision:
            return None
        mean = mean_tokens(student, conditions.tokens)
        asked = Measurement(student=student, teacher=teacher, captions=conditions.captions, tokens=mean)
        same = ("captions", "micro_batch", "loss_chunk", "compile", "engine", "recompute", "settings")

        def distance(entry: Measurement) -> tuple[float, bool]:
            return abs(math.log((entry.batch or 1) / conditions.batch)), entry.text_buckets != conditions.text_buckets

        fitting = [
            entry
            for entry in self.entries
            if entry.seconds_per_sample is not None
            and entry.same_models(asked)
            and all(getattr(entry, key) == getattr(conditions, key) for key in same)
            and abs((entry.computed_tokens or entry.tokens) - mean) <= max(0.02 * mean, 0.5)
        ]
        return min(fitting, key=distance, default=None)


def nameless(spec: ModelSpec) -> ModelSpec:
    """The model without its names and the eps of its norms, so that models of the same sizes are equal.

    Some operators change the eps of what they grow (`compt.models.growth.grown_spec`).
    """
    return replace(spec, name="", timm_name="", norm_eps=NORM_EPS, text_norm_eps=NORM_EPS)


def mean_tokens(spec: ModelSpec, tokens: Tokens) -> float:
    """The mean computed length of a caption, none longer than the context (which is the default)."""
    return token_moments(tokens, spec.context_length)[0]


def channels(spec: ModelSpec, captions: int, tokens: Tokens = None) -> float:
    """Positions times width, summed over all blocks of both towers, of one image with its captions."""
    text = captions * mean_tokens(spec, tokens) * spec.text_width * spec.text_depth
    if spec.arch == "vit":
        return text + ((spec.image_size // spec.patch_size) ** 2 + 1) * spec.width * spec.depth
    return text + sum(stage.side**2 * stage.width * stage.depth for stage in spec.stages)


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
            asked.flops / (self.efficiency * device.peak_flops[precision]),
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
        gained = device.peak_flops[precision] / PAPER_DEVICE.peak_flops[precision]
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
        efficiency=float(1 / per_flop / PAPER_DEVICE.peak_flops["bf16"]),
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


OF_THE_AUTHORS = (
    "Projections and their ranges are of the authors' program, host and loaders included; this one may be faster or "
    "slower: measure with `compt bench throughput`."
)
"""The note beside every projection."""


def speed(
    student: ModelSpec,
    teacher: ModelSpec | None,
    cost: JobCost,
    device: Device | None,
    conditions: Conditions,
    throughput: Throughput | None = None,
) -> Speed | None:
    """How fast one `device` trains `student`, with the forward pass of `teacher` if there is one.

    Measured if `throughput` has exactly this job, else projected; None where that takes a `device` and there is none.
    `paper` costs are for the captions of the published accounting, not for the given ones.
    """
    found = None if throughput is None else measured(student, teacher, cost, conditions, throughput)
    if found is not None or device is None:
        return found
    model, asked = fitted(), work(student, teacher, cost, conditions.captions, conditions.tokens)
    seconds = model.seconds(asked, device, conditions.precision)
    low, high = model.bounds(asked, device, conditions.precision)
    return Speed(seconds, low, high, "projected", f"for {device.title} from the A100 hours of the paper's Table 2")


def measured(
    student: ModelSpec, teacher: ModelSpec | None, cost: JobCost, conditions: Conditions, file: Throughput
) -> Speed | None:
    """What `file` says of this very job; None where it says nothing. A teacher that costs nothing is none.

    `source` says where batch or text buckets were others.
    """
    if cost.mode == "paper":
        conditions = replace(conditions, captions=PAPER_TEXT_PASSES, tokens=PAPER_TOKENS)
    found = file.find(student, teacher if cost.teacher_forward_macs else None, conditions)
    if found is None or found.seconds_per_sample is None:
        return None
    middle, source = found.seconds_per_sample, f"{file.device}, {file.date[:10]}{conditions.differences(found)}"
    return Speed(middle, found.low or middle, found.high or middle, "measured", source)
