"""Scoring on several ranks gives the scores of one process, sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from compt.dist import collectives as dist
from compt.recipe.schema import EvalSet
from compt.data.batch import EvalBatch
from compt.errors import DataError
from compt.evaluate.sets import evaluate_set
from compt.evaluate.task import EvalSettings
from compt.evaluate.retrieval import retrieval
from compt.evaluate.validation import validation_loss
from compt.evaluate.zeroshot import classifier, zero_shot
from compt.models.preprocess import Preprocess
from compt.models.clip import build
from tests.helpers import evaluation as cases
from tests.dist.spawn import run_ranks
from tests.unit.evaluate.test_sets import SPEC

N, CLASSES = 31, 7


def _all_scores(n: int = N) -> dict[str, list]:
    rank, world = dist.rank(), dist.world_size()
    encoder = cases.encoder()
    weights = classifier(encoder, [f"{c}" for c in range(CLASSES)], ["a {c}", "{} 9"], cases.tokenize, batch=3)
    shot = zero_shot(encoder, cases.Loader(n, CLASSES, rank, world), weights)
    found = retrieval(encoder, cases.Loader(n, 0, rank, world, with_captions=True), cases.tokenize, chunk=4)
    loss = validation_loss(encoder, cases.validation_batches(3, rank, world))
    arrays = {**shot.arrays(), **{f"retrieval_{key}": value for key, value in found.arrays().items()}}
    return {**{key: value.tolist() for key, value in arrays.items()}, "weights": weights.tolist(), "loss": [loss]}


@pytest.mark.parametrize(
    "world, n", [(2, N), (3, N), (3, 2)]
)  # 31 is no multiple; the third rank of (3, 2) has nothing
def test_ranks_agree_with_one_process(world: int, n: int) -> None:
    single = _all_scores(n)
    for other in run_ranks(_all_scores, world, n):
        assert other.keys() == single.keys()
        for key, value in single.items():
            if key in ("weights", "loss"):
                assert np.allclose(other[key], value, atol=1e-6), key
            else:
                assert other[key] == value, key
    assert single["ids"] == list(range(n))


def _set_scores(folder: str) -> tuple[dict[str, float], list[int], dict[str, int]]:
    settings = EvalSettings(Preprocess((0.5,) * 3, (0.25,) * 3), base=Path(folder), batch=3)
    result = evaluate_set(build(SPEC, seed=0), EvalSet(name="set", data=["data"]), settings)
    return result.headline(), result.predictions.tolist(), result.skipped


def test_shards_and_folders_over_ranks(tmp_path: Path) -> None:
    from tests.helpers.shards import make_shards, picture

    for kind in ("shards", "folders"):
        base = tmp_path / kind
        if kind == "shards":
            make_shards(base / "data", n=11, classes=3)
            (base / "data" / "classnames.txt").write_text("a\nb\nc\n")
        else:
            for i in range(11):
                place = base / "data" / "abc"[i % 3]
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{i}.png").write_bytes(b"broken" if i == 4 else picture(i, 40, 36))
        outcomes = run_ranks(_set_scores, 2, str(base))
        assert outcomes[0] == outcomes[1] == _set_scores(str(base))
        assert outcomes[0][2] == ({"image": 1} if kind == "folders" else {})


def _one_rank_fails() -> str:
    rank = dist.rank()
    batch = EvalBatch(cases.images_of([rank]), [f"key{rank}"], [rank], None if rank == 1 else torch.tensor([0]))
    try:
        zero_shot(cases.encoder(), [batch], F.normalize(torch.ones(cases.WIDTH, 3), dim=0))
    except DataError as error:
        return str(error)
    return "no error"


def test_an_error_of_one_rank_reaches_all_of_them() -> None:
    first, second = run_ranks(_one_rank_fails, 2, timeout=60)
    assert first == second
    assert "key1 has no label" in first
