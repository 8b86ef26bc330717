"""A large batch in small pieces with the loss of the whole, all negatives included (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

import torch
from torch import Tensor

from compt.engines.base import Engine
from compt.engines.graphs import GraphEngine
from compt.train.task import SHARED_OUTPUTS, Scalars, Task, surrogate


def cached_backward(
    task: Task,
    engine: Engine,
    images: Tensor,
    tokens: Tensor,
    micro_batch: int | None = None,
    lengths: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Scalars]:
    """Add the gradients of this rank's batch; returns the detached loss and the task's report.

    images float [b, 3, H, W], tokens int64 [b, M, T], lengths and known as in `Task`. The batch is computed in
    micro-batches of at most `micro_batch` samples. Averaging the losses of micro-batches, as usual, would leave out the
    negatives of the other micro-batches. Instead:

    1. A forward pass of each micro-batch, without a graph, gives all features.
    2. The loss of the whole batch gives the gradient of each feature.
    3. A second forward pass of each micro-batch carries these gradients to the parameters.

    If there is only one micro-batch, one forward and one backward pass are enough. The module's forward must be
    deterministic, and every rank must have the same number of micro-batches.
    """
    size = micro_batch or len(images)
    pieces = [
        (part, ids, None if lengths is None else lengths[at * size : at * size + len(part)])
        for at, (part, ids) in enumerate(zip(images.split(size), tokens.split(size), strict=True))
    ]
    if len(pieces) == 1 and isinstance(engine, GraphEngine):
        return engine.whole_step(task, images, tokens, lengths)
    if len(pieces) == 1:
        targets = task.targets(images, tokens, lengths, known)
        loss, report = task.loss(engine.forward(images, tokens, lengths), targets)
        engine.backward(loss)
        return loss.detach(), report

    own = [None] * len(pieces) if known is None else known.split(size)
    targets = _join([task.targets(*piece, on_cpu) for piece, on_cpu in zip(pieces, own, strict=True)])
    with torch.no_grad():
        features = _join([_widened(engine.forward(*piece)) for piece in pieces])
    leaves = {name: feature.requires_grad_() for name, feature in features.items()}
    loss, report = task.loss(leaves, targets)
    # Not by the engine's backward, which scales fp16 losses: no parameter takes part here, and the scale is for these.
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    del leaves, features, targets
    rows = {name: [g] * len(pieces) if name in SHARED_OUTPUTS else g.split(size) for name, g in gradients.items()}
    for at, piece in enumerate(pieces):
        last = at == len(pieces) - 1
        outputs = engine.forward(*piece, last=last)
        engine.backward(surrogate(outputs, {name: g[at] for name, g in rows.items()}, len(pieces)), last=last)
    return loss.detach(), report


def _widened(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # In fp16 the small gradients of single features would underflow, as they are scaled only in the second backward.
    return {name: value if value.dtype == torch.float64 else value.float() for name, value in outputs.items()}


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of all pieces: rows one after another, shared outputs once."""
    return {
        name: parts[0][name] if name in SHARED_OUTPUTS else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }
