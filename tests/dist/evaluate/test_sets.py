"""Scoring on several ranks gives the scores of one process, sample by sample."""

from __future__ import annotations

import datetime
import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from compt.data.batch import EvalBatch
from compt.dist import collectives as dist
from compt.errors import DataError
from compt.evaluate.retrieval import retrieval
from compt.evaluate.sets import evaluate_set
from compt.evaluate.suite import score_suite
from compt.evaluate.task import EvalSettings
from compt.evaluate.validation import validation_loss
from compt.evaluate.zeroshot import classifier, zero_shot
from compt.models.clip import build
from compt.models.preprocess import Preprocess
from compt.recipe.schema import EvalSet
from compt.recipe.suite import load_suite
from compt.report.scores import SuiteReport
from compt.weights.artefact import Artefact
from tests.dist.spawn import run_ranks
from tests.helpers import evaluation as cases
from tests.helpers.shards import make_shards, picture, write_tar
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


def _suite_scores(folder: str) -> list[str]:
    base = Path(folder)
    suite = load_suite(base / "suite.yaml")
    settings = EvalSettings(Preprocess((0.5,) * 3, (0.25,) * 3), base, batch=3)

    def opened() -> Artefact:
        return Artefact(base, SPEC, {}, settings.preprocess, build(SPEC, seed=0).state_dict(), "hash")

    scores = score_suite({"tiny": opened}, suite, settings, torch.device("cpu"), base / "out")
    return [table.markdown() for table in SuiteReport("suite", suite, base, scores).tables()]


def test_a_suite_over_ranks(tmp_path: Path) -> None:
    """Also what is missing, what is broken, tasks that fit on rank 0 alone, and scores that are on disk already."""
    for split, n in (("test", 11), ("train", 17)):
        make_shards(tmp_path / "one" / split, n=n, shards=2, classes=3)
    (tmp_path / "one" / "classnames.txt").write_text("a\nb\nc\n")
    members = [(f"{at}.{kind}", data) for at in range(5) for kind, data in _several(at)]
    write_tar(tmp_path / "many" / "test" / "0.tar", members)
    (tmp_path / "many" / "classnames.txt").write_text("a\nb\n")
    data, train = "data: one/test/*.tar", "train: one/train/*.tar"
    (tmp_path / "suite.yaml").write_text(
        f"sets: [{{name: shot, {data}}}, {{name: probe, task: linear_probe, {data}, {train}}}, "
        f"{{name: near, task: knn, {data}, {train}}}, {{name: many, task: multilabel, data: many/test/*.tar}}, "
        "{name: gone, data: gone/*.tar}, {name: broken, task: multilabel, data: one/test/*.tar}]"
    )
    single = _suite_scores(str(tmp_path))
    assert "fault" in single[0]
    assert "missing" in single[0]
    assert run_ranks(_suite_scores, 2, str(tmp_path)) == [single, single]
    shutil.rmtree(tmp_path / "out")
    assert run_ranks(_suite_scores, 2, str(tmp_path)) == [single, single]


def _several(at: int) -> list[tuple[str, bytes]]:
    blob = io.BytesIO()
    np.save(blob, np.array([at % 2, at > 1]))
    return [("png", picture(at, 40, 36)), ("npy", blob.getvalue())]


def _slow(fails: bool) -> object:
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), torch.distributed.group.WORLD)

    def work() -> int:
        time.sleep(3)
        if fails:
            raise DataError("cannot be fitted")
        return 7

    try:
        return dist.from_main_slowly(work)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_wait_for_the_first_longer_than_a_collective_may(fails: bool) -> None:
    assert run_ranks(_slow, 2, fails) == [("cannot be fitted" if fails else 7)] * 2
