"""The search for a micro-batch: the memory that it leaves to its trials, and where they meet."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from compt.chain import job as jobs
from compt.plan.jobs import make_plan
from compt.train import micro_batch as fit
from compt.train.micro_batch import Trial, find_micro_batch, release
from tests.helpers.recipe import chain, make_data, recipe_of


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each time that torch is told to give a GPU's memory back."""
    notes: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: notes.append("emptied"))
    return notes


def trial_on(device: str) -> Trial:
    recipe = recipe_of()
    job = make_plan(recipe, baselines=False, controls=()).jobs[-1]
    return Trial.of(job, recipe, Path(), torch.device(device))


@pytest.mark.parametrize(("device", "first"), [("cuda:0", ["emptied"]), ("cpu", [])])
def test_trials_find_the_memory_that_is_no_longer_used(device: str, first: list[str], emptied: list[str]) -> None:
    def fits(trial: Trial, size: int) -> bool:
        emptied.append(f"trial of {size}")
        return True

    assert find_micro_batch(trial_on(device), fits) == 12
    assert emptied == [*first, "trial of 12"]


def test_what_is_in_a_ring_goes_before_the_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ring:
        def __init__(self) -> None:
            self.own = self

    gc.disable()
    try:
        ring = weakref.ref(Ring())
        there: list[bool] = []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: there.append(ring() is not None))
        release(torch.device("cuda"))
    finally:
        gc.enable()
    assert there == [False]


def test_a_link_leaves_nothing_of_its_engine_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    engines: list[weakref.ref[Any]] = []
    built = jobs.build_training

    def building(*arguments: Any) -> Any:
        task, engine = built(*arguments)
        engines.append(weakref.ref(engine))
        events.append("training")
        return task, engine

    def releasing(device: torch.device) -> None:
        release(device)
        events.append(f"released on {device}, {sum(engine() is not None for engine in engines)} left")

    def searching(trial: Trial) -> int:
        events.append("searching")
        return trial.share

    monkeypatch.setattr(jobs, "find_micro_batch", searching)
    monkeypatch.setattr(jobs, "build_training", building)
    monkeypatch.setattr(jobs, "release", releasing)
    chain(make_data(tmp_path), tmp_path / "run", "engine.find_micro_batch=true")
    nothing = "released on cpu, 0 left"
    assert events == 2 * ["searching", "training", nothing, nothing]


@pytest.mark.parametrize(
    ("rank", "agent", "address"), [(0, None, "127.0.0.1"), (1, None, "node7"), (0, "True", "node7")]
)
def test_trials_meet_where_the_processes_beside_them_did(
    rank: int, agent: str | None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 needs no way through the network to itself, unless torchrun serves the store."""
    reached: list[Any] = []
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "4321")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if agent is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.setattr(fit.torch_dist, "TCPStore", lambda *place: reached.append(place[:2]))
    monkeypatch.setattr(fit, "of_attempt", lambda name, store: name)
    monkeypatch.setattr(fit.torch_dist, "init_process_group", lambda *kind, **group: reached.append((kind, group)))
    fit._join((rank, 2, 5), torch.device("cpu"))
    group = {"store": "fit/5", "rank": rank, "world_size": 2}
    assert reached == [(address, 4321), (("gloo",), group)]
