"""What a job trains with, and its MACs: those of its training, whatever settings a later start has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compt.chain import job as jobs
from compt.chain.job import JobRun
from compt.chain.run import prepare
from compt.errors import RunError
from compt.evaluate.scorer import Scorer
from tests.helpers.recipe import FIRST, SECOND, chain, lines, make_data, manifest, recipe_of, stopped_at

SHORT = ["chain.links.0.train={steps: 2}", "chain.links.0.warmup={steps: 1}", "evaluation.every="]
THREE = [*SHORT, "engine.micro_batch=3"]
SEARCHED = [*SHORT, "engine.find_micro_batch=true"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(base: Path) -> dict[str, Any]:
    """The costs of all images at once."""
    return costs(base, base / "whole", *SHORT)


@pytest.fixture(scope="module")
def thirds(base: Path) -> dict[str, Any]:
    """The costs of three images at once, whose features are computed twice."""
    return costs(base, base / "thirds", *THREE)


def costs(base: Path, run: Path, *changes: str) -> dict[str, Any]:
    chain(base, run, *changes)
    return costs_of(run)


def costs_of(run: Path) -> dict[str, Any]:
    return {job: manifest(run, job)["cost"] for job in (FIRST, SECOND)}


def failing(*_: Any, **__: Any) -> Any:
    raise RunError("disk full")


def test_a_micro_batch_that_was_found_is_charged_like_a_given_one(
    base: Path, whole: dict[str, Any], thirds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "find_micro_batch", lambda trial: 3)
    assert thirds[SECOND]["recompute_macs"] > whole[SECOND]["recompute_macs"]
    assert costs(base, tmp_path, *SEARCHED) == thirds


def test_what_was_found_is_known_where_no_step_is_left(
    base: Path, thirds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends after its last checkpoint, before its model is there, does not search again."""
    monkeypatch.setattr(jobs, "find_micro_batch", lambda trial: 3)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="disk full"):
        patch.setattr(JobRun, "_last_checkpoint", failing)
        chain(base, tmp_path, *SEARCHED)
    monkeypatch.setattr(jobs, "find_micro_batch", lambda trial: 12)
    chain(base, tmp_path, *SEARCHED)
    assert manifest(tmp_path, FIRST)["cost"] == thirds[FIRST]


def test_scoring_again_changes_neither_cost_nor_machines(base: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    chain(base, run, *SHORT)
    before = manifest(run, SECOND)
    chain(base, run, *THREE, "evaluation.sets.1.name=other")
    after = manifest(run, SECOND)
    assert set(after["scores"]) == {"held_out", "other"}
    kept = ("cost", "trained", "starts", "machine", "processes")
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert costs_of(run) == whole


def test_a_model_that_was_not_scored_keeps_the_cost_of_its_training(
    base: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="disk full"):
        patch.setattr(Scorer, "at_the_end", failing)
        chain(base, tmp_path, *SHORT)
    chain(base, tmp_path, *THREE)
    assert manifest(tmp_path, FIRST)["cost"] == whole[FIRST]


def test_lines_count_the_macs_of_captions_as_long_as_they_were(
    base: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    chain(base, tmp_path / "whole", *SHORT)
    stopped_at(base, tmp_path / "parts", 2, *SHORT)
    chain(base, tmp_path / "parts", *SHORT)
    for run in (tmp_path / "whole", tmp_path / "parts"):
        for job in (FIRST, SECOND):
            rows = [line["macs"] for line in lines(run, job) if line["kind"] == "train"]
            assert rows[-1] == pytest.approx(whole[job]["total_macs"])
            assert rows == sorted(rows)


def test_every_field_of_the_recipe_reaches_the_loop_and_the_loader(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(
        *("data.crop_scale=[0.5, 0.6]", "data.crop_ratio=[0.9, 1.1]", "data.augment={flip: 0.5}"),
        *("data.mean=[0.1, 0.2, 0.3]", "data.std=[0.4, 0.5, 0.6]", "data.max_bad_share=0.3"),
        *("optimizer.schedule={shape: linear, end: 0.1}", "optimizer.clip_grad_norm=0.7", "optimizer.max_nonfinite=4"),
        *("chain.links.1.lr=0.0003", "evaluation="),
    )
    context, plan = prepare(recipe, tmp_path / "run", base=base)
    given: dict[str, Any] = {}
    monkeypatch.setattr(jobs, "train_loader", lambda index, **options: given.update(options))
    job = JobRun(plan.links[1], context, print)
    job._loader(2)
    for key in ("crop_scale", "crop_ratio", "augment", "captions", "max_bad_share"):
        assert given[key] == getattr(recipe.data, key), key
    assert (given["seed"], given["window"], given["start_step"]) == (3001, recipe.data.shuffle_shards, 2)
    settings = job._settings(4)
    for key in ("schedule", "clip_grad_norm", "max_nonfinite", "batch"):
        assert getattr(settings, key) == getattr(recipe.optimizer, key), key
    assert (settings.mean, settings.std, settings.lr) == (recipe.data.mean, recipe.data.std, 0.0003)
