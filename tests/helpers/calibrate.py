"""First-pair tests of the smallest models, with scores that are set by hand instead of measured."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compt.chain.calibrate import FirstPair, run_calibrated
from compt.chain.job import JobRun
from compt.chain.run import prepare
from compt.dist import collectives as dist
from compt.evaluate.scorer import Scorer
from compt.evaluate.task import LONG
from compt.evaluate.zeroshot import ZeroShotResult
from compt.files import read_json
from tests.helpers.process import chain_dying_at, chain_dying_at_write, die
from tests.helpers.recipe import recipe_of

PICTURES = 400
BASELINE, LAST = "baseline-large-s3", "3-third"
MEMBERS = (("small", 1, 32), ("large", 2, 48), ("third", 3, 48))
LENGTHS = (("small", 6, 2), ("large", 5, 1), ("third", 4, 1))
CHANGES = (
    f"family.members={[{'name': name, 'preset': 'vit_pico', 'depth': n, 'embed_dim': d} for name, n, d in MEMBERS]}",
    f"chain.links={[{'model': name, 'train': {'steps': n}, 'warmup': {'steps': warm}} for name, n, warm in LENGTHS]}",
    "baselines.train={steps: 12}",
    "evaluation.every=",
    "evaluation.validation=[]",
    "engine.checkpoint_every={steps: 100}",
)
"""Three links. The one that is tried is 5 steps long by its recipe and its baseline 12: 5, 6, 8, 10 are shorter."""
AT_THIRD = {5: 0.38, 6: 0.395, 8: 0.3975}
"""The baseline is right on 40 %: 2 points below it, then 0.5 points, which is just not lossless, then 0.25."""


def answers(name: str, share: float, pin: str = "ab12") -> ZeroShotResult:
    """The first images are right, up to the rounded share: images are equally hard for every model."""
    labels = np.arange(PICTURES) % 4
    right = np.arange(PICTURES) < round(share * PICTURES)
    return ZeroShotResult(
        name=name,
        classes=4,
        ids=np.arange(PICTURES),
        labels=labels,
        predictions=np.where(right, labels, (labels + 1) % 4),
        ranks=np.where(right, 0, 1),
        pins={"data": pin},
    )


@contextlib.contextmanager
def scored(
    shares: Mapping[int, float], *, baseline: float = 0.40, on: str = "choose", pins: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Every model is right on `baseline` of each set, but links of these steps on these shares of the set `on`.

    `pins` are by job what it was scored with.
    """

    def at_the_end(self: Scorer, _: Any, folder: Path) -> dict[str, Any]:
        job = read_json(folder.parent / "manifest.json")
        scores = {}
        for item in self.recipe.evaluation.sets:
            tried = item.name == on and job["teacher"] is not None
            share = shares.get(job["steps"], baseline) if tried else baseline
            result = answers(item.name, share, (pins or {}).get(job["name"], "ab12"))
            dist.on_main(functools.partial(result.save, folder))
            scores[item.name] = {key: value for key, value in result.to_dict().items() if key not in LONG}
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "at_the_end", at_the_end)
        yield


@contextlib.contextmanager
def trained() -> Iterator[list[str]]:
    """The jobs that are really trained in this block, with their steps."""
    names: list[str] = []
    fit = JobRun._fit

    def note(self: JobRun) -> None:
        names.append(f"{self.job.name} {self.job.steps}")
        fit(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobRun, "_fit", note)
        yield names


def calibrate(
    base: Path, run: Path, *changes: str, target: float | None = None, on: str | None = None, **options: Any
) -> list[str]:
    """Run a first-pair test and its chain in this process. Returns the messages."""
    said: list[str] = []
    test = FirstPair.of(recipe_of(*CHANGES, *changes), target, on, "tiny.yaml")
    context, _ = prepare(
        recipe_of(*CHANGES, *changes), run, base=base, scales=functools.partial(test.scales, run), **options
    )
    run_calibrated(context, test, said.append, **options)
    return said


def calibrate_scored(base: Path, run: Path, every: int = 100) -> list[str]:
    """`calibrate`, lossless at the third try, with a checkpoint `every` so many steps; for processes of their own."""
    with scored(AT_THIRD):
        return calibrate(base, run, f"engine.checkpoint_every={{steps: {every}}}")


def _instead_of_chain(function: Callable[..., None], first: Any, base: Path, run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.process.chain", functools.partial(calibrate_scored, every=2))
        function(first, base, run)


def calibrate_dying_at(place: str, base: Path, run: Path) -> None:
    """Like `chain_dying_at`; `between deciding`: a try's manifest is written, its folder is not yet set aside."""
    if place in ("between deciding", "after setting aside"):
        os.rename = _dying_when_set_aside(os.rename, place.startswith("after"))
        calibrate_scored(base, run, every=2)
    _instead_of_chain(chain_dying_at, place, base, run)


def _dying_when_set_aside(rename: Callable[..., None], after: bool) -> Callable[..., None]:
    def call(old: Any, new: Any, **options: Any) -> None:
        aside = Path(new).name.startswith("try-")
        if aside and not after:
            die()
        rename(old, new, **options)
        if aside:
            die()

    return call


def calibrate_dying_at_write(number: int, base: Path, run: Path) -> None:
    """Like `chain_dying_at_write`."""
    _instead_of_chain(chain_dying_at_write, number, base, run)
