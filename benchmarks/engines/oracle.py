"""What every engine has to give: one process, the whole batch, double precision, torch's AdamW, open_clip's loss.

Nothing of `compt.engines` or of `accumulate`, `losses` and `task` in `compt.train` takes part, but for the values that
projectors are drawn with; the models' forward is the same, and has tests of its own against open_clip.
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
"""Largest differences from the oracle, relative but for that of key biases.

`gradients`: of any tensor, to its norm, in the first step and in the last. `parameters` and their moving `average`: of
any tensor, to the distance that it went from its start (fp32 can hold no better what is 1 and moves by a thousandth).
`key biases`: norm of the part of a gradient that is zero in
exact numbers, absolutely.
"""


@dataclass(frozen=True)
class Reference:
    """An oracle's training, in double precision, and where it began."""

    start: dict[str, Tensor]
    trained: Trained


def reference(cell: Cell) -> Reference:
    """The oracle of a cell: engine, processes and micro-batches make no difference to it, nor do a teacher's shards."""
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
    """Section 3.2 of the paper: open_clip's loss of each slot of captions, and distances of normalised features."""
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
    """The largest differences, by the names of TOLERANCES; infinite where anything is not a number or is missing."""
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
    """Largest norm of a difference over that of `scale`, tensor by tensor; largest norm among key biases alone."""
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
