"""A large batch in small pieces with the loss of the whole, all negatives included (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

import torch
from torch import Tensor

from compt.engines.base import Engine
from compt.train.task import SHARED_OUTPUTS, Scalars, Task, surrogate


def cached_backward(
    task: Task,
    engine: Engine,
    images: Tensor,
    tokens: Tensor,
    micro_batch: int | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Scalars]:
    """Add the gradients of this rank's batch; returns the detached loss and the task's report.

    images float [b, 3, H, W], tokens int64 [b, M, T], lengths as in `Task`. At most `micro_batch` samples pass through
    the models at a time. First all features are computed without a graph, the loss gives the gradient of each feature,
    and a second forward of each piece carries it to the parameters; one piece alone takes the direct way. The module's
    forward must be deterministic, and every rank must have as many pieces.
    """
    size = micro_batch or len(images)
    pieces = [
        (part, ids, None if lengths is None else lengths[at * size : at * size + len(part)])
        for at, (part, ids) in enumerate(zip(images.split(size), tokens.split(size), strict=True))
    ]
    if len(pieces) == 1:
        targets = task.targets(images, tokens, lengths)
        loss, report = task.loss(engine.forward(images, tokens, lengths), targets)
        engine.backward(loss)
        return loss.detach(), report

    targets = _join([task.targets(*piece) for piece in pieces])
    with torch.no_grad():
        features = _join([_widened(engine.forward(*piece)) for piece in pieces])
    leaves = {name: feature.requires_grad_() for name, feature in features.items()}
    loss, report = task.loss(leaves, targets)
    # Outside the engine: here no parameter takes part, and fp16's scaling belongs to the parameters' backward alone.
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    del leaves, features, targets
    rows = {name: [g] * len(pieces) if name in SHARED_OUTPUTS else g.split(size) for name, g in gradients.items()}
    for at, piece in enumerate(pieces):
        last = at == len(pieces) - 1
        outputs = engine.forward(*piece, last=last)
        engine.backward(surrogate(outputs, {name: g[at] for name, g in rows.items()}, len(pieces)), last=last)
    return loss.detach(), report


def _widened(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # In fp32 the small gradients of single features do not underflow before they are scaled.
    return {name: value if value.dtype == torch.float64 else value.float() for name, value in outputs.items()}


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of all pieces: rows one after another, a shared output once."""
    return {
        name: parts[0][name] if name in SHARED_OUTPUTS else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }
