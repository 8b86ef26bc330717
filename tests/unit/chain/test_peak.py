"""`chain.grow_from: peak`: a link grows from its teacher's weights before the rate fell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compt.chain import job as job_module
from compt.errors import RunError
from tests.helpers.recipe import FIRST, SECOND, chain, equal, lines, make_data, manifest, stopped_at, weights

PEAK = ("optimizer.schedule={shape: wsd, decay: 0.34}", "chain.grow_from=peak", "chain.links.0.train={steps: 6}")
"""The first link's rate falls in the last two of its six steps."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    chain(base, base / "whole", *PEAK)
    return base / "whole"


def test_the_peak_is_what_a_constant_rate_gives_in_as_many_steps(base: Path, whole: Path, tmp_path: Path) -> None:
    steady = ("optimizer.schedule=constant", "chain.links.0.train={steps: 4}")
    chain(base, tmp_path / "steady", *steady)
    assert equal(weights(whole, FIRST, "peak"), weights(tmp_path / "steady", FIRST))
    assert not equal(weights(whole, FIRST), weights(whole, FIRST, "peak"))
    assert not (whole / "jobs" / SECOND / "peak").exists(), "nothing grows from the last link"
    # The same expansion, whose teacher comes from outside.
    links = "chain.links=[{model: large, train: {steps: 5}, warmup: {steps: 1}}]"
    chain(base, tmp_path / "from", links, f"chain.from={whole}/jobs/{FIRST}/peak")
    assert equal(weights(whole, SECOND, "initial"), weights(tmp_path / "from", "1-large", "initial"))
    assert manifest(whole, SECOND)["parent_hash"] == manifest(whole, FIRST)["model_hash"], "it learns from the end"


@pytest.mark.parametrize("step", [2, 5])
def test_a_stop_before_or_after_the_peak_changes_nothing(base: Path, whole: Path, tmp_path: Path, step: int) -> None:
    run = tmp_path / "run"
    stopped_at(base, run, step, *PEAK, "engine.keep_checkpoints=1")
    chain(base, run, *PEAK, "engine.keep_checkpoints=1")
    for job, kinds in ((FIRST, ("peak", "model")), (SECOND, ("initial", "model"))):
        assert lines(run, job) == lines(whole, job)
        assert all(equal(weights(run, job, kind), weights(whole, job, kind)) for kind in kinds)


def test_a_teacher_without_a_peak_is_named(base: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "jobs" / FIRST / "peak")
    shutil.rmtree(run / "jobs" / SECOND)
    with pytest.raises(RunError, match=rf"{FIRST}: has no peak/, as it was trained without chain\.grow_from: peak"):
        chain(base, run, *PEAK)


def test_a_checkpoint_of_the_peak_that_is_gone_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = job_module.find_step
    monkeypatch.setattr(job_module, "find_step", lambda folder, step: find(folder, step + 1))
    with pytest.raises(RunError, match=rf"{FIRST}: has no checkpoint of step 4, which the next link grows from"):
        chain(base, tmp_path / "run", *PEAK)
