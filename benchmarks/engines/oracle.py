"""The expected result of every engine: one process, the whole batch, double precision, torch's AdamW, open_clip's loss.

The oracle shares the models' forward pass with the program (tested against open_clip elsewhere) and the initial
projectors. It uses nothing else of `compt.engines` or of `accumulate`, `losses` and `task` in `compt.train`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from benchmarks.engines.cells import (
    ALPHA,
    CAPTIONS,
    EMA_DECAY,
    LR,
    MAX_NORM,
    OPTIMIZER,
    SEED,
    STEPS,
    Cell,
    Trained,
    batches,
    specs,
    start,
)
from compt.models.clip import ClipModel, build
from compt.train.task import StudentModule

TOLERANCES = {"loss": 1e-5, "norm": 1e-5, "gradients": 1e-5, "key biases": 1e-6, "parameters": 2e-4, "average": 2e-4}
"""Largest allowed differences from the oracle.

`loss`, `norm`: relative, at each step. `gradients`: per tensor, relative to its norm, at the first and last step.
`parameters` and their moving `average`: per tensor, relative to its distance from the start (fp32 resolves a weight of
1 that moves by a thousandth no better). `key biases`: the absolute norm of a gradient that is exactly zero in theory.
"""


@dataclass(frozen=True)
class Reference:
    """The oracle's result in double precision, and the weights it started from."""

    start: dict[str, Tensor]
    trained: Trained


def reference(cell: Cell) -> Reference:
    """The oracle's result for a cell. Engine, processes, micro-batches and a sharded teacher do not change it."""
    return _reference(cell.architecture, "projector" if cell.task == "sharded teacher" else cell.task)


@functools.cache
def _reference(architecture: str, task: str) -> Reference:
    cell = Cell("ddp", 1, 1, task, architecture)
    student_spec, teacher_spec = specs(cell)
    student = build(student_spec).double()
    student.load_state_dict(start(student_spec, SEED))
    parameters: dict[str, Tensor] = {f"model.{name}": value for name, value in student.named_parameters()}
    teacher = None
    if teacher_spec is not None:
        teacher = build(teacher_spec).double()
        teacher.load_state_dict(start(teacher_spec, SEED + 1))
        drawn = StudentModule(student, teacher_spec.embed_dim, seed=SEED).initial({})
        parameters |= {name: drawn[name].double().requires_grad_() for name in drawn}
    first = {name: value.detach().clone() for name, value in parameters.items()}
    decayed = {name: value.ndim >= 2 and "bias" not in name for name, value in parameters.items()}
    groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name, decays in decayed.items() if decays == wanted], "weight_decay": decay}
        for wanted, decay in ((True, OPTIMIZER.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    found = Trained([], [], [], {}, {})
    for step, (images, tokens) in enumerate(batches()):
        loss = _loss(student, teacher, parameters, images.double(), tokens)
        optimizer.zero_grad()
        loss.backward()
        found.losses.append(loss.item())
        if step in (0, STEPS - 1):
            found.gradients.append({name: value.grad.clone() for name, value in parameters.items()})  # type: ignore[union-attr]
        found.norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM).item())
        for group in optimizer.param_groups:
            group["lr"] = LR[step]
        optimizer.step()
        with torch.no_grad():
            parameters["model.logit_scale"].clamp_(max=math.log(100))
        for name, value in parameters.items():
            now = value.detach().clone()
            before = found.average.get(name, now)
            found.average[name] = EMA_DECAY * before + (1 - EMA_DECAY) * now
    found.weights = {name: value.detach().clone() for name, value in parameters.items()}
    return Reference(first, found)


def _loss(
    student: ClipModel,
    teacher: ClipModel | None,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    tokens: Tensor,
) -> Tensor:
    """Section 3.2 of the paper: open_clip's loss for each caption slot, plus distances of normalized features."""
    captions = tokens.flatten(0, 1)
    image = student.encode_image(images)
    text = student.encode_text(captions).unflatten(0, tokens.shape[:2])
    scale, bias = student.logit_scale.exp(), student.logit_bias
    one, scalars = (ClipLoss(), (scale,)) if bias is None else (SigLipLoss(), (scale, bias))
    losses = [one(F.normalize(image, dim=-1), F.normalize(text[:, slot], dim=-1), *scalars) for slot in range(CAPTIONS)]
    loss = torch.stack(losses).mean()
    if teacher is None:
        return loss
    with torch.no_grad():
        goals = {
            "image": teacher.encode_image(images),
            "text": teacher.encode_text(captions).unflatten(0, tokens.shape[:2]),
        }
    for tower, feature in (("image", image), ("text", text)):
        if f"projector.{tower}.weight" in parameters:
            weight, bias = (parameters[f"projector.{tower}.{part}"] for part in ("weight", "bias"))
            feature = feature @ weight.T + bias
        goal = goals[tower]
        squares = (F.normalize(feature, dim=-1) - F.normalize(goal, dim=-1)).square()
        loss = loss + 0.5 * ALPHA * (goal.shape[-1] / 512) * squares.mean()
    return loss


def differences(found: Trained, expected: Reference) -> dict[str, float]:
    """The largest differences, by the names in TOLERANCES. Infinite if a value is NaN or a tensor is missing."""
    correct = expected.trained
    result = {
        "loss": _largest(abs(a - b) / abs(b) for a, b in zip(found.losses, correct.losses, strict=True)),
        "norm": _largest(abs(a - b) / abs(b) for a, b in zip(found.norms, correct.norms, strict=True)),
    }
    result["gradients"], result["key biases"] = (
        _largest(values)
        for values in zip(
            *(_compared(a, b, b) for a, b in zip(found.gradients, correct.gradients, strict=True)), strict=True
        )
    )
    for name, ours, theirs in (
        ("parameters", found.weights, correct.weights),
        ("average", found.average, correct.average),
    ):
        went = {key: value - expected.start[key] for key, value in theirs.items()}
        result[name], _ = _compared(ours, theirs, went)
    return result


def _largest(values: Iterable[float]) -> float:
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


def _compared(
    found: Mapping[str, Tensor], correct: Mapping[str, Tensor], scale: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Largest norm of a tensor's difference over that of its `scale`, and the largest norm among key biases."""
    shared = {name: value for name, value in found.items() if name in scale}
    if shared.keys() != scale.keys():
        return math.inf, math.inf
    relative, keys = [], [0.0]
    for name, value in correct.items():
        error, unit = shared[name].double() - value, scale[name]
        if error.shape != value.shape:
            return math.inf, math.inf
        if name.endswith(("attn.in_proj_bias", "attn.qkv.bias")):
            parts = error.chunk(3)
            keys.append(parts[1].norm().item())
            error, unit = (torch.cat((of.chunk(3)[0], of.chunk(3)[2])) for of in (error, unit))
        relative.append((error.norm() / unit.norm()).item())
    return _largest(relative), _largest(keys)
