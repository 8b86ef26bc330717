"""First-pair tests of the smallest models, with scores that are set by hand instead of measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compt import dist
from compt.calibrate import FirstPair, run_calibrated
from compt.chain import prepare
from compt.evaluate import ZeroShotResult
from compt.files import read_json
from compt.jobs import JobRun
from compt.planner import Plan
from compt.scoring import Scorer
from tests.helpers_recipe import recipe_of

PICTURES = 400
BASELINE = "baseline-large-s3"
LONG = ("baselines.train={steps: 12}", "evaluation.every=")
"""The baseline is 12 steps long, the link that is tried 5 by its recipe: 5, 6, 8, 10 are shorter."""

Shares = Mapping[str, Mapping[int, float]]
"""By model and steps: the share of each set's pictures that is right, of `choose`; `held_out` has `SECRET`."""
SECRET = 0.5


def answers(name: str, share: float, pins: str = "ab12") -> ZeroShotResult:
    """The rounded share of the pictures is right, the first ones: pictures are as hard for every model."""
    labels = np.arange(PICTURES) % 4
    right = np.arange(PICTURES) < round(share * PICTURES)
    return ZeroShotResult(
        name=name,
        classes=4,
        ids=np.arange(PICTURES),
        labels=labels,
        predictions=np.where(right, labels, (labels + 1) % 4),
        ranks=np.where(right, 0, 1),
        pins={"data": pins},
    )


@contextlib.contextmanager
def scored(
    shares: Mapping[int, float], baseline: float = 0.40, on: str = "choose", other: float = 0.40
) -> Iterator[None]:
    """Scores on the set `on` by the steps that the large model was a link for; its baseline's is `baseline`.

    Every model is right on the share `other` of all other sets.
    """

    def at_the_end(self: Scorer, model: Any, folder: Path) -> dict[str, Any]:
        job = read_json(folder.parent / "manifest.json")
        link = job["teacher"] is not None
        share = shares.get(job["steps"], baseline) if link else baseline
        scores = {}
        for item in self.recipe.evaluation.sets:
            result = answers(item.name, share if item.name == on else other)
            dist.on_main(lambda result=result: result.save(folder))  # type: ignore[misc]
            scores[item.name] = {key: value for key, value in result.to_dict().items() if key != "per_class"}
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "at_the_end", at_the_end)
        yield


def calibrate(
    base: Path,
    run: Path,
    *changes: str,
    target: float | None = None,
    on: str | None = None,
    **options: Any,
) -> tuple[Plan, list[str]]:
    """Carry a first-pair test and its chain to the end; the plan that it began with, and what it said."""
    said: list[str] = []
    recipe = recipe_of(*LONG, *changes)
    test = FirstPair.of(recipe, target, on, "tiny.yaml")
    context, plan = prepare(recipe, run, base=base, scales=test.next_scales(run), **options)
    run_calibrated(context, test, said.append, **options)
    return plan, said


@contextlib.contextmanager
def trained() -> Iterator[list[str]]:
    """The jobs that are really trained in here, each as often as it is."""
    names: list[str] = []
    fit = JobRun._fit

    def note(self: JobRun) -> None:
        names.append(f"{self.job.name} {self.job.steps}")
        fit(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobRun, "_fit", note)
        yield names
