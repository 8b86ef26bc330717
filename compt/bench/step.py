"""The training step whose speed is measured: the trainer's own, on random pixels and captions."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compt.cost.counts import Tokens
from compt.cost.speed import mean_tokens
from compt.data.batch import Batch
from compt.models.clip import build
from compt.models.init import DrawnState, rule_for
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, ModelSpec
from compt.plan.jobs import Job
from compt.recipe.schema import Recipe
from compt.train.build import Blueprint, build_training
from compt.train.loop import training_step

LEARNING_RATE = 1e-5
"""Learning rate of the timed steps: so small that random pixels do no harm."""


@dataclass(frozen=True, kw_only=True)
class Setup(Blueprint):
    """A training job and the batches that it is timed with: `captions` an image, `tokens` as in `compt.cost`."""

    captions: int = 4
    tokens: Tokens = None

    @classmethod
    def of_job(cls, job: Job, recipe: Recipe, base: Path) -> Setup:
        """The setup of a planned job."""
        data = recipe.data
        return cls(**vars(Blueprint.of(job, recipe, base)), captions=data.captions, tokens=data.caption_tokens)


def caption_lengths_of(setup: Setup, batch: int) -> list[list[int]]:
    """Lengths of the captions of each piece of a batch, ascending, so that `setup.tokens` tokens are computed.

    `tokens` counts padding to the longest caption of a bucket. So all captions of a bucket have one length: the mean
    of the bucket's part of the distribution. Packed, each caption is a bucket of its own. What is left by rounding goes
    to the next bucket.
    """
    context = setup.student.context_length
    tokens = setup.tokens if isinstance(setup.tokens, Mapping) else {mean_tokens(setup.student, setup.tokens): 1.0}
    whole = sum(tokens.values())
    shares = [(min(length, context), share / whole) for length, share in sorted(tokens.items())]
    pieces, owed = [], 0.0
    for piece in torch.arange(batch).split(setup.engine.micro_batch or batch):
        count, start = len(piece) * setup.captions, 0
        lengths: list[int] = []
        for group in torch.arange(count).chunk(setup.engine.buckets or count):
            size = len(group)
            owed += count * _sum_between(shares, start / count, (start + size) / count)
            length = min(context, max(1, round(owed / size)))
            owed -= size * length
            lengths += [length] * size
            start += size
        pieces.append(sorted(lengths))
    return pieces


def _sum_between(shares: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """The sum of lengths times shares of a distribution, between the quantiles `low` and `high`."""
    total = end = 0.0
    for length, share in shares:
        start, end = end, end + share
        total += length * max(0.0, min(high, end) - max(low, start))
    return total


def random_captions(setup: Setup, batch: int, generator: torch.Generator) -> Tensor:
    """Tokens int64 [batch, captions, T]; each caption ends with the end of text and zeros."""
    spec = setup.student
    shape = (batch, setup.captions)
    pieces = [torch.tensor(piece) for piece in caption_lengths_of(setup, batch)]
    lengths = torch.cat([piece[torch.randperm(len(piece), generator=generator)] for piece in pieces]).view(shape)
    longest = int(lengths.max())
    tokens = torch.randint(1, spec.vocab_size - 2, (*shape, longest), generator=generator)
    places = torch.arange(longest)
    end = lengths[..., None] - 1
    return torch.where(places == end, spec.vocab_size - 1, torch.where(places < end, tokens, 0))


def random_batch(setup: Setup, batch: int) -> Batch:
    """Random uint8 pixels and captions of `batch` samples, on the CPU."""
    generator = torch.Generator().manual_seed(setup.seed)
    size = setup.student.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
    return Batch(images, random_captions(setup, batch, generator), [""] * batch)


class QuicklyDrawn(DrawnState):
    """Weights with the distributions of `DrawnState`, drawn by torch: 12 times as fast, for steps that are only timed.

    They depend on seed and name alone, so ranks agree; other versions of torch draw others.
    """

    def __getitem__(self, name: str) -> Tensor:
        rule = rule_for(self._spec, name, shape := self.shape(name))
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if rule.kind == "uniform":
            return torch.empty(shape).uniform_(-rule.scale, rule.scale, generator=generator)
        if rule.kind in ("normal", "trunc_normal"):
            return torch.empty(shape).normal_(0, rule.scale, generator=generator)
        return super().__getitem__(name)


class TrainingStep:
    """A model, its engine and its teacher, if any, all with quickly drawn weights. Each call is one training step."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = replace(setup, engine=setup.engine.on(device.type)), device
        self.task, self.engine = build_training(self.setup, device, *map(self._drawn, (setup.student, setup.teacher)))
        self.task.module.train()

    def _drawn(self, spec: ModelSpec | None) -> QuicklyDrawn | None:
        return None if spec is None else QuicklyDrawn(build(spec, device="meta"), spec, self.setup.seed)

    def data(self, batch: int) -> Batch:
        """Random uint8 pixels and captions of `batch` samples, as a loader gives them."""
        made = random_batch(self.setup, batch)
        return made.pin_memory() if self.device.type == "cuda" else made

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Forward, backward and update; waits until the GPU is done. Returns the report and the gradient's norm."""
        found = training_step(
            self.task,
            self.engine,
            batch,
            lr=LEARNING_RATE,
            micro_batch=self.setup.engine.micro_batch or len(batch),
            clip_grad_norm=self.setup.optimizer.clip_grad_norm,
            mean=OPENAI_MEAN,
            std=OPENAI_STD,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return found

    def seconds(self, batch: Batch, *, warm_up: int = 1, repeats: int = 3, seconds: float = 0.0) -> list[float]:
        """Seconds of each step after `warm_up` others: at least `repeats` steps, and at least `seconds` in sum."""
        for _ in range(warm_up):
            self(batch)
        times: list[float] = []
        while len(times) < repeats or sum(times) < seconds:
            started = time.perf_counter()
            self(batch)
            times.append(time.perf_counter() - started)
        return times
