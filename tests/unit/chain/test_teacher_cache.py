"""A chain whose teacher keeps captions: its results are those without, and its costs are those of what it computed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from compt.cost.counts import image_tower, scalars, text_tower
from compt.errors import ConfigError
from compt.models.clip import ClipModel, caption_lengths
from compt.train.task import DistillTask
from tests.helpers.recipe import (
    BATCH,
    FIRST,
    SECOND,
    chain,
    largest_difference,
    lines,
    make_data,
    manifest,
    plan_of,
    recipe_of,
    stopped_at,
    weights,
)

STEPS = 14
LONG = [f"chain.links.1.train={{steps: {STEPS}}}", "chain.links.0.train={steps: 2}", "chain.links.0.warmup={steps: 1}"]
KEPT = [*LONG, "engine.teacher_cache=5M"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(base: Path) -> Path:
    chain(base, base / "plain", *LONG)
    return base / "plain"


class Teacher:
    """What a teacher was shown and what it computed, counted from outside."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.shown: Counter[tuple[int, ...]] = Counter()
        self.computed = self.tokens = 0
        targets, encode = DistillTask.targets, ClipModel.encode_captions

        def shown(task: DistillTask, images: Tensor, tokens: Tensor, *more: Any) -> Any:
            self.shown.update(tuple(row) for row in tokens.flatten(0, 1).tolist())
            self.of = task.teacher
            return targets(task, images, tokens, *more)

        def computed(model: ClipModel, tokens: Tensor, *more: Any) -> Tensor:
            if model is getattr(self, "of", None):
                self.computed += len(tokens)
                self.tokens += int(caption_lengths(tokens).sum())
            return encode(model, tokens, *more)

        patch.setattr(DistillTask, "targets", shown)
        patch.setattr(ClipModel, "encode_captions", computed)


def test_a_chain_gives_the_same_model_for_fewer_macs(
    base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher(monkeypatch)
    chain(base, tmp_path, *KEPT)
    assert largest_difference(weights(plain, SECOND), weights(tmp_path, SECOND)) < 2e-5
    for one, two in zip(lines(plain, SECOND), lines(tmp_path, SECOND), strict=True):
        same = [{key: line[key] for key in ("loss", "r", "grad_norm") if key in line} for line in (one, two)]
        assert same[0] == pytest.approx(same[1], rel=1e-4)
    trained, cost = (manifest(tmp_path, SECOND)[key] for key in ("trained", "cost"))
    whole = manifest(plain, SECOND)["cost"]
    shown = STEPS * BATCH * 2
    assert teacher.computed < 0.7 * shown
    assert trained["teacher_misses"] == teacher.computed
    assert trained["teacher_hits"] == shown - teacher.computed
    assert trained["teacher_tokens_per_caption"] == pytest.approx(teacher.tokens / teacher.computed)
    spec = teacher.of.spec
    mean = teacher.tokens / teacher.computed
    image = sum(one.macs for part in (image_tower(spec), scalars(spec)) for one in part.values())
    text = sum(one.macs for one in text_tower(spec, mean).values()) * teacher.computed / (STEPS * BATCH)
    assert cost["teacher_forward_macs"] == pytest.approx(image + text)
    assert cost["teacher_forward_macs"] < whole["teacher_forward_macs"]
    same = ("student_training_macs", "loss_macs", "samples", "steps", "optimizer_step_macs")
    assert {key: cost[key] for key in same} == pytest.approx({key: whole[key] for key in same})
    last, before = (rows[-1] for rows in (train_lines(tmp_path), train_lines(plain)))
    assert (last["macs"], before["macs"]) == pytest.approx((cost["total_macs"], whole["total_macs"]))
    assert (last["teacher_hits"], last["teacher_misses"]) == (trained["teacher_hits"], trained["teacher_misses"])
    assert "teacher_hits" not in before
    assert manifest(tmp_path, FIRST)["trained"]["teacher_misses"] == 0


def train_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run, SECOND) if line["kind"] == "train"]


def test_a_resume_begins_with_an_empty_cache_and_goes_on_counting(base: Path, plain: Path, tmp_path: Path) -> None:
    stopped_at(base, tmp_path, 9, *KEPT)
    chain(base, tmp_path, *KEPT)
    assert largest_difference(weights(plain, SECOND), weights(tmp_path, SECOND)) < 2e-5
    trained = manifest(tmp_path, SECOND)["trained"]
    assert trained["teacher_hits"] + trained["teacher_misses"] == STEPS * BATCH * 2


def test_without_distillation_there_is_nothing_to_keep(base: Path, tmp_path: Path) -> None:
    chain(base, tmp_path, *KEPT, "chain.links.1.alpha=0")
    assert manifest(tmp_path, SECOND)["trained"]["teacher_misses"] == 0
    assert manifest(tmp_path, SECOND)["cost"]["teacher_forward_macs"] == 0


def test_it_changes_no_job(base: Path, tmp_path: Path) -> None:
    one, two = (plan_of(base, tmp_path / str(at), *more) for at, more in enumerate((LONG, KEPT)))
    assert [(job.hash, job.cost) for job in one.jobs] == [(job.hash, job.cost) for job in two.jobs]


def test_a_sharded_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine: teacher_cache: a teacher with shard_teacher computes on all"):
        recipe_of(*KEPT, "engine.shard_teacher=true")
    assert recipe_of(*KEPT).engine.teacher_cache == 5_000_000
