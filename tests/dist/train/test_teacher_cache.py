"""The teacher's cache on two processes, under each kind of engine: as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.engines.cells import CAPTIONS, LR, MAX_NORM, SAMPLES, Cell, batches, open_cell
from compt.dist import collectives as dist
from compt.models.clip import caption_lengths
from compt.train.accumulate import cached_backward
from compt.train.task import DistillTask
from tests.dist.spawn import run_ranks

pytestmark = pytest.mark.dist


def trained(engine: str, limit: int | None) -> dict[str, Any]:
    """Losses, last gradients, weights, and what this rank looked for, beside what it should have found.

    Rank 0 sees the same samples in every step, so that it computes no caption in the end. Rank 1 sees others.
    """
    task, made = open_cell(Cell(engine, 2, 2, "projector", "vit"))
    assert isinstance(task, DistillTask)
    if limit is not None:
        task.keep_captions(limit)
    share, losses, seen, hits = SAMPLES // 2, [], set[int](), 0
    for step, lr in enumerate(LR):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))
        own = order[:share] if dist.rank() else torch.arange(share)
        images, tokens = (part[own] for part in next(batches()))
        loss, _ = cached_backward(task, made, images, tokens, share // 2, caption_lengths(tokens), tokens)
        losses.append(dist.all_reduce_sum(loss.item()) / 2)
        gradients = dict(made.gradients())
        made.step(lr, MAX_NORM)
        hits += CAPTIONS * len(seen.intersection(own.tolist()))
        seen.update(own.tolist())
    looked = task.kept.looked()[:2] if task.kept else None
    state = {"gradients": gradients, "weights": dict(made.weights())}
    return {"losses": losses, "looked": looked, "right": (hits, CAPTIONS * share * len(LR) - hits), **state}


def both(engine: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return trained(engine, None), trained(engine, 10**6)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_train_as_without_it(engine: str) -> None:
    found = run_ranks(both, 2, engine)
    for plain, kept in found:
        assert kept["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        for part in ("gradients", "weights"):
            torch.testing.assert_close(kept[part], plain[part], rtol=1e-4, atol=1e-5)
        assert kept["looked"] == kept["right"]
    assert found[0][1]["looked"] == (2 * SAMPLES, SAMPLES)
    assert found[1][1]["looked"] != found[0][1]["looked"]
