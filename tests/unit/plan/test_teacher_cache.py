"""The projection of the teacher's cache against the draws of a run, sample by sample."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from compt.cost.counts import text_tower
from compt.data.order import EpochOrder, caption_choice
from compt.plan.forecast import make_forecast
from compt.plan.jobs import make_plan
from compt.plan.teacher_cache import CachedCaptions, cached_captions
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Recipe

IMAGES, BATCH = 210, 20
VALUES: dict[str, Any] = {
    "name": "two",
    "data": {"train": "shards/*.tar", "images": IMAGES, "captions": 2, "caption_tokens": 20},
    "family": {"members": ["vit_t16", "vit_s16"]},
    "chain": {
        "links": [
            {"model": "vit_t16", "train": {"epochs": 2}, "warmup": {"steps": 1}},
            {"model": "vit_s16", "train": {"epochs": 4}, "warmup": {"steps": 1}},
        ]
    },
    "optimizer": {"batch": BATCH},
    "engine": {"teacher_cache": "1G"},
}
EACH = 512 * 2 + 128 + 4 * 20
"""Bytes of a caption: features of the teacher in bf16, the entry, and the numbers of its tokens."""


def recipe(**data: Any) -> Recipe:
    values = copy.deepcopy(VALUES)
    values["engine"]["teacher_cache"] = data.pop("cache", "1G")
    values["chain"]["links"][1]["train"] = {"epochs": data.pop("epochs", 4)}
    values["data"] |= data
    return parse_recipe(values)


def projected(asked: Recipe, processes: int = 1) -> CachedCaptions:
    job = make_plan(asked, world_size=processes).links[1]
    found = cached_captions(asked, job, processes)
    assert found is not None
    assert found.hits + found.first_misses + found.later_misses == pytest.approx(job.samples * 2)
    assert job.active_teacher is not None
    each = sum(one.macs for one in text_tower(job.active_teacher, 20).values())
    assert found.saved_macs == pytest.approx(found.hits * each)
    return found


def drawn(epochs: float, pool: int, processes: int, room: int) -> tuple[int, int, float]:
    """Hits, misses of the first epoch, and the mean number of captions that a process keeps, drawn as a run does."""
    kept: list[set[tuple[int, int]]] = [set() for _ in range(processes)]
    steps = round(epochs * (IMAGES // BATCH))
    share, hits, first = BATCH // processes, 0, 0
    for step in range(steps):
        epoch, at = divmod(step, IMAGES // BATCH)
        ids = EpochOrder(0, epoch, [IMAGES // 3] * 3, 2)[at * BATCH : (at + 1) * BATCH]
        for place, sample in enumerate(np.asarray(ids).tolist()):
            own = kept[place // share]
            for choice in caption_choice(0, epoch, str(sample), pool, 2):
                if (sample, choice) in own:
                    hits += 1
                else:
                    first += epoch == 0
                    if len(own) < room:
                        own.add((sample, choice))
    return hits, first, sum(map(len, kept)) / processes


@pytest.mark.parametrize(
    ("epochs", "pool", "processes", "room"),
    [
        (4, 2, 1, 10**6),
        (4, 7, 1, 10**6),
        (4, 2, 4, 10**6),
        (6, 5, 2, 10**6),
        (4, 2, 1, 150),
        (6, 5, 2, 200),
        (2.5, 2, 1, 10**6),
    ],
)
def test_hits_are_those_of_a_run(epochs: float, pool: int, processes: int, room: int) -> None:
    found = projected(recipe(epochs=epochs, caption_pool=pool, cache=min(10**9, room * EACH)), processes)
    hits, first, kept = drawn(epochs, pool, processes, room)
    assert found.hits == pytest.approx(hits, rel=0.08)
    assert found.first_misses == first
    assert found.whole_bytes == pytest.approx(IMAGES * pool * EACH)
    assert found.kept_bytes == pytest.approx(kept * EACH, rel=0.05)


def test_half_an_epoch_has_no_hits() -> None:
    found = projected(recipe(epochs=0.5, images=200))
    assert (found.hits, found.later_misses, found.first_misses) == (0, 0, 200)
    assert found.kept_bytes == pytest.approx(200 * EACH)


def test_sets_of_different_weights_have_at_most_so_many_captions() -> None:
    sets = [{"shards": "a/*.tar", "weight": 2}, {"shards": "b/*.tar", "weight": 0.5}]
    many, plain = projected(recipe(train=sets)), projected(recipe(train=["a/*.tar", "b/*.tar"]))
    assert many.whole_bytes == pytest.approx(2 * plain.whole_bytes)
    assert many.hits < plain.hits
    assert projected(recipe(train=[{"shards": "a/*.tar"}])) == plain


def test_a_forecast_has_it_for_links_with_a_teacher() -> None:
    found = make_forecast(recipe(), None)
    first, second = found.to_json()["jobs"]
    assert first["teacher_cache"] is None
    assert second["teacher_cache"]["limit_bytes"] == 10**9
    assert second["teacher_cache"]["hits"] > 0
    off = recipe().model_copy(update={"engine": recipe().engine.model_copy(update={"teacher_cache": None})})
    assert make_forecast(off, None).to_json()["jobs"][1] == {**second, "teacher_cache": None}
