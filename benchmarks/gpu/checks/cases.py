"""Small training runs that the checks compare with one fp32 process on the CPU."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.checks.finding import Finding, holds, largest
from compt.data.batch import Batch
from compt.engines.base import Engine, Precision
from compt.models.clip import build, caption_lengths
from compt.models.init import DrawnState
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, ModelSpec, resolve
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.accumulate import cached_backward
from compt.train.build import Blueprint, build_training
from compt.train.loop import training_step
from compt.train.task import ClipTask

LR = 1e-3
EPS = 1e-4
"""AdamW's eps, so large that rounding noise in a gradient of zero makes no step."""
STEPS = 3
EXACT = 1e-4
"""Tolerance of relative fp32 differences between two devices. With TF32 they are about 1e-3."""
MOVED = 1e-3
"""Tolerance of weights: the difference relative to their distance from the start."""


_SMALL: Mapping[str, Any] = {"context_length": 16, "vocab_size": 512}
TEACHER = resolve("vit_pico", {**_SMALL, "embed_dim": 96})
_SWIN = {
    "width": 32,
    "depths": [1, 1],
    "head_width": 16,
    "window": 4,
    "image_size": 32,
    "text_width": 64,
    "text_depth": 1,
    "embed_dim": 64,
}


@dataclass(frozen=True)
class Case:
    """A small training run: its model, teacher if any, and the micro-batches of a step of `rows` images.

    Its text is packed, or in `buckets`.
    """

    name: str
    student: ModelSpec
    teacher: ModelSpec | None = None
    rows: int = 16
    captions: int = 2
    micro: int | None = None
    buckets: int | None = None


LINK = Case("link", resolve("vit_nano", {**_SMALL, "embed_dim": 64}), TEACHER)
CASES = (
    LINK,
    replace(LINK, name="link in pieces", micro=4, buckets=2),
    Case("swin", resolve("swin_t", {**_SMALL, **_SWIN}), buckets=1),
)


@dataclass(frozen=True)
class Trained:
    """A result: loss and norm of each step, the first step's gradients, the weights before and after."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def make_batch(case: Case, step: int, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Random images, and captions of 3 tokens up to the full context, on the CPU."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows, size, context = rows or case.rows, case.student.image_size, case.student.context_length
    images = torch.randn(rows, 3, size, size, generator=generator)
    tokens = torch.randint(1, case.student.vocab_size - 2, (rows, case.captions, context), generator=generator)
    last = torch.randint(2, context, (rows, case.captions, 1), generator=generator)
    places = torch.arange(context)
    end = torch.tensor(case.student.vocab_size - 1)
    return images, torch.where(places == last, end, torch.where(places < last, tokens, 0))


def open_case(
    case: Case, device: torch.device, config: EngineConfig, precision: Precision = "fp32"
) -> tuple[ClipTask, Engine]:
    """The task of a case, and its engine as a recipe gets it. The weights do not depend on the device."""
    plan = Blueprint(
        student=case.student,
        teacher=case.teacher,
        optimizer=Optimizer(precision=precision, eps=EPS),
        engine=config.model_copy(update={"text_buckets": case.buckets}),
    )
    teacher = None
    if case.teacher is not None:
        teacher = DrawnState(build(case.teacher, device="meta"), case.teacher, seed=1)
    return build_training(plan, device, teacher_weights=teacher)


def backward(case: Case, task: ClipTask, engine: Engine, step: int, part: slice = slice(None)) -> Tensor:
    """Compute the gradients of a step's batch, or of a part of it; returns the loss."""
    images, tokens = (tensor[part] for tensor in make_batch(case, step))
    lengths = caption_lengths(tokens)
    loss, _ = cached_backward(task, engine, images.to(engine.device), tokens.to(engine.device), case.micro, lengths)
    return loss


def train(
    case: Case,
    device: torch.device,
    config: EngineConfig | None = None,
    precision: Precision = "fp32",
    part: slice = slice(None),
    first: Callable[[ClipTask, Engine], object] = lambda task, engine: None,
) -> Trained:
    """Train a few steps from the same weights, on this rank's `part` of each batch; before that call `first`."""
    task, engine = open_case(case, device, config or EngineConfig(), precision)
    first(task, engine)
    before = dict(engine.weights())
    losses: list[float] = []
    norms: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        losses.append(backward(case, task, engine, step, part).item())
        if not step:
            gradients = dict(engine.gradients())
        norms.append(engine.step(LR, max_norm=1.0).item())
    return Trained(losses, norms, gradients, before, dict(engine.weights()))


@cache
def oracle(case: Case) -> Trained:
    """The oracle: one process, fp32, on the CPU, the whole batch at once."""
    return train(replace(case, micro=None, buckets=1), torch.device("cpu"))


def apart(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm())


def ratio(found: Iterable[float], right: Iterable[float]) -> float:
    """The largest relative difference; nan if one is not finite."""
    return largest(abs(a - b) / abs(b) for a, b in zip(found, right, strict=True))


def compare(name: str, found: Trained, right: Trained, exact: float = EXACT, moved: float = MOVED) -> list[Finding]:
    """Compare losses, norms, gradients tensor by tensor, and the final weights."""
    whole = right.norms[0]
    names = found.gradients.keys() == right.gradients.keys() and found.after.keys() == right.after.keys()
    if not names:
        return [holds(f"{name}: same names", names)]
    # The gradient of a key bias is zero but for rounding, and a part of its tensor: the floor is for whole tensors.
    gradients = largest(
        apart(found.gradients[key], gradient) / max(gradient.norm().item(), 1e-5 * whole)
        for key, gradient in right.gradients.items()
    )
    way = math.sqrt(sum(apart(after, right.before[key]) ** 2 for key, after in right.after.items()))
    off = math.sqrt(sum(apart(found.after[key], after) ** 2 for key, after in right.after.items()))
    return [
        Finding(f"{name}: losses", ratio(found.losses, right.losses), exact),
        Finding(f"{name}: norms", ratio(found.norms, right.norms), exact),
        Finding(f"{name}: worst gradient", gradients, exact),
        Finding(f"{name}: weights", off / way, moved),
    ]


def step_waits(case: Case, device: torch.device, precision: Precision = "fp32", part: slice = slice(None)) -> bool:
    """Whether a training step waits for the GPU, from pinned images and captions to the update, on a `part` of a batch.

    The second step: the first one makes moments.
    """
    task, engine = open_case(case, device, EngineConfig(), precision)
    images, tokens = (tensor[part] for tensor in make_batch(case, 0))
    batch = Batch((32 * images + 128).clamp(0, 255).byte(), tokens, [""] * len(tokens))
    if device.type == "cuda":
        batch = batch.pin_memory()

    def step() -> None:
        micro, mean, std = case.micro or len(images), OPENAI_MEAN, OPENAI_STD
        training_step(task, engine, batch, lr=LR, micro_batch=micro, clip_grad_norm=1.0, mean=mean, std=std)

    step()
    return waits(step, device)


def waits(action: Callable[[], object], device: torch.device) -> bool:
    """Whether `action` waits for a GPU. It ends where it does, so nothing may be asked of its results then."""
    if device.type != "cuda":
        action()
        return False
    torch.cuda.set_sync_debug_mode("error")
    try:
        action()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        traceback.print_exc()  # where
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
