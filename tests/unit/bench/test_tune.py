"""The search for the fastest settings of a job: its order, what it keeps, and what a resumed run takes over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compt.bench import estimate, tune
from compt.bench.tune import Timing, Tuned, trial_of, tuned
from compt.errors import RunError
from compt.plan.jobs import make_plan
from compt.train.micro_batch import Trial
from tests.helpers.recipe import FIRST, SECOND, chain, make_data, manifest, recipe_of, stopped_at

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compt" / "tuned"


def trial(*changes: str) -> Trial:
    recipe = recipe_of("engine.tune=true", "data.caption_tokens=7.4", *changes)
    return trial_of(make_plan(recipe, baselines=False, controls=()).jobs[-1], recipe, Path(), CPU)


def meter(seen: list[tuple[Any, ...]], found: Callable[[Any, int], Any]) -> Callable[[Trial, int], Any]:
    def measure(one: Trial, micro: int) -> Any:
        engine = one.blueprint.engine
        seen.append((engine.text, engine.compile, engine.recompute, micro))
        value = found(engine, micro)
        if isinstance(value, Exception):
            raise value
        return [Timing(value, 2.0, 1.0)] if isinstance(value, float) else value

    return measure


def fits(monkeypatch: pytest.MonkeyPatch, size: Callable[[Any], int]) -> None:
    monkeypatch.setattr(tune, "find_micro_batch", lambda one: size(one.blueprint.engine))


TUNED = ("engine.tune=true", "engine.compile=off", "data.caption_tokens=7.4")
SPEED = {"off": 1.0, "blocks": 0.8, "towers": 0.79}


def test_one_key_changes_at_a_time_and_the_faster_value_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, lambda engine: 12 if engine.recompute else 4)
    seen: list[tuple[Any, ...]] = []
    measure = meter(seen, lambda engine, micro: SPEED[engine.compile] * (2.0 if engine.text == "buckets" else 1.0))
    found = tuned(trial(), None, measure)
    assert seen == [
        ("packed", "off", False, 4),
        ("buckets", "off", False, 4),
        ("packed", "blocks", False, 4),
        ("packed", "towers", False, 4),  # saves less than is worth it
        ("packed", "blocks", True, 12),
    ]
    assert found.chosen == {"text": "packed", "compile": "blocks", "recompute": False, "micro_batch": 4}
    assert [one["seconds"] for one in found.tried] == [1.0, 2.0, 0.8, 0.79, 0.8]
    assert next(found.lines()) == "text packed, compile off, recompute False, micro_batch 4: 1,000.0 ms a step"
    assert [path.stem for path in cache.iterdir()] == [found.key]
    assert cache.stat().st_mode & 0o777 == 0o700

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    assert tuned(trial(), None, never) == replace(found, tried=tuple(map(dict, found.tried)))
    assert tuned(trial(), {"key": "of another machine"}, never).chosen == found.chosen
    cache.joinpath(f"{found.key}.json").write_text("{}")
    assert tuned(trial(), vars(found), never).chosen == found.chosen
    for other in (trial("optimizer.batch=6"), trial("engine.text=packed"), trial("data.captions=1")):
        with pytest.raises(AssertionError, match="measured again"):
            tuned(other, vars(found), never)


def test_what_the_recipe_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, lambda engine: 12)
    seen: list[tuple[Any, ...]] = []
    given = ("engine.text_buckets=2", "engine.compile=false", "engine.micro_batch=6", "engine.name=zero3")
    found = tuned(trial(*given), None, meter(seen, lambda engine, micro: 0.5 if engine.recompute else 1.0))
    assert seen == [("auto", "off", False, 6)]
    assert found.chosen == {"recompute": False, "micro_batch": 6}
    seen.clear()
    tuned(trial("engine.text=padded", "engine.name=zero3"), None, meter(seen, lambda engine, micro: 1.0))
    assert [compiled for _, compiled, _, _ in seen] == ["off", "blocks"], "zero3 compiles no towers"


@pytest.mark.parametrize(
    ("found", "failure"),
    [
        ("does not fit into memory", "does not fit into memory"),
        (RunError("large: timing failed: rank 0: CompileError: no g++\nmore"), "CompileError: no g++"),
        ([Timing(0.1, 2.1, 1.0)], "another loss or gradient"),
        ([Timing(0.1, 2.0, 1.1)], "another loss or gradient"),
        ([Timing(0.1, float("nan"), 1.0)], "another loss or gradient"),
        ([Timing(0.1, 2.0, 1.0), Timing(3.0, 2.0, 1.0)], None),  # the slowest rank counts
    ],
)
def test_what_fails_is_noted_and_not_chosen(found: Any, failure: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, lambda engine: 12)
    made = tuned(trial(), None, meter([], lambda engine, micro: 1.0 if engine.compile == "off" else found))
    assert made.chosen["compile"] == "off"
    for one in made.tried[2:]:
        assert (failure in one["failure"]) if failure else one["failure"] is None


def test_no_trial_begins_after_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, lambda engine: 12)
    monkeypatch.setattr(tune, "SECONDS", -1.0)
    made = tuned(trial(), None, meter([], lambda engine, micro: 1.0))
    assert {one["failure"] for one in made.tried} == {"no time left"}
    assert made.chosen == {"text": "packed", "compile": "off", "recompute": False, "micro_batch": None}


@pytest.mark.parametrize("tokens", ["7.4", "{5: 0.5, 9: 0.5}", "null"])
def test_a_timing_has_the_loss_and_gradient_of_any_setting(tokens: str) -> None:
    found = []
    for changes in ([], ["engine.text=buckets"], ["engine.micro_batch=4"]):
        one = trial("engine.text=packed", "optimizer.precision=fp32", f"data.caption_tokens={tokens}", *changes)
        found.append(tune.timed(one, 4))
    assert found[0].seconds > 0
    assert tune._close(found[0], found[1], 1e-5)
    assert tune._close(found[0], found[2], 1e-5)
    assert not tune._close(found[0], replace(found[1], norm=2 * found[1].norm), 1e-5)


def test_a_resumed_run_takes_over_what_was_chosen(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run, seen = make_data(tmp_path), tmp_path / "run", []
    fits(monkeypatch, lambda engine: 6)
    monkeypatch.setattr(tune, "_measure", meter(seen, lambda engine, micro: 0.5 if engine.recompute else 1.0))
    stopped_at(base, run, 3, *TUNED)
    chosen = {"text": "packed", "recompute": True, "micro_batch": 6}
    assert manifest(run, FIRST)["tuned"]["chosen"] == chosen
    assert len(manifest(run, FIRST)["tuned"]["tried"]) == len(seen) == 3
    shutil.rmtree(cache)
    seen.clear()
    said = chain(base, run, *TUNED)
    assert len(seen) == 3, "only the second link was measured"
    done = manifest(run, FIRST)
    assert done["tuned"]["chosen"] == chosen
    assert any(line.startswith(f"{FIRST}: chosen: text packed") for line in said)
    assert manifest(run, SECOND)["state"] == "done"
    # What is computed twice is charged.
    assert done["cost"]["recompute_macs"] > 0
    engine = recipe_of("engine.tune=true").engine
    assert tune.with_chosen(engine, {"key": "x"}) == engine
    assert Tuned.read({"key": "x", "chosen": {"lr": 1}, "tried": []}, "x", recipe_of().engine) is None


def test_an_estimate_times_what_would_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("engine.tune=true")
    job = make_plan(recipe, baselines=False, controls=()).jobs[-1]
    fits(monkeypatch, lambda engine: 4)
    monkeypatch.setattr(tune, "_measure", meter([], lambda engine, micro: 0.5 if engine.recompute else 1.0))
    setups: list[Any] = []

    class Step:
        def __init__(self, setup: Any, device: Any) -> None:
            setups.append(setup.engine)

        def data(self, share: int) -> int:
            return share

        def seconds(self, share: int) -> list[float]:
            return [1.0]

    monkeypatch.setattr(estimate, "TrainingStep", Step)
    assert estimate.seconds_per_step(job, recipe, CPU) == 1.0
    assert (setups[0].recompute, setups[0].micro_batch) == (True, 4)
