"""Scores during training and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compt.data import loaders
from compt.evaluate.scorer import Scorer
from compt.models.clip import build
from tests.helpers.recipe import make_data, recipe_of


def test_the_validation_loss_is_read_by_the_engines_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path)
    real, used, losses = loaders.read_batches, [], []

    def read_batches(dataset: Any, sampler: Any, workers: int) -> Any:
        used.append(workers)
        return real(dataset, sampler, workers)

    monkeypatch.setattr(loaders, "read_batches", read_batches)
    for workers in (0, 2):
        recipe = recipe_of(f"engine.workers={workers}")
        losses.append(Scorer(recipe, tmp_path).held_out_loss(build(recipe.specs()["small"], seed=0)))
    assert used == [0, 2]
    assert losses[0] == losses[1]


def test_the_scores_of_a_run_say_their_precision(tmp_path: Path) -> None:
    make_data(tmp_path)
    recipe = recipe_of("optimizer.precision=bf16")
    scores = Scorer(recipe, tmp_path).at_the_end(build(recipe.specs()["small"], seed=0), tmp_path / "scores")
    assert scores
    assert all(record["scored_by"] == {"precision": "torch.bfloat16"} for record in scores.values())
