"""An engine from outside of compt: one entry says what it shards, one says how it is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from compt.cli.main import app
from compt.cost.memory import memory_per_gpu
from compt.engines.ddp import DataParallelEngine
from compt.engines.open import OPENERS
from compt.errors import ConfigError
from compt.models.presets import PRESETS
from compt.recipe.engine import ENGINES, EngineKind
from tests.helpers.recipe import chain, make_data, recipe_of, write_recipe

NAME = "counting"
STEPS = 3
CHANGES = (
    *(f"engine.name={NAME}", f"chain.links.0.train={{steps: {STEPS}}}", f"chain.links.1.train={{steps: {STEPS}}}"),
    "evaluation=",
)


class CountingEngine(DataParallelEngine):
    """The engine of one process, which counts the steps of all of its kind."""

    steps = 0

    def step(self, lr: float, max_norm: float | None = None) -> Tensor:
        CountingEngine.steps += 1
        return super().step(lr, max_norm)


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two entries, for the time of a test."""
    monkeypatch.setitem(ENGINES, NAME, EngineKind(NAME, frozenset({"optimizer"})))
    monkeypatch.setitem(OPENERS, NAME, lambda config, optimizer, base: (CountingEngine, {}))
    monkeypatch.setattr(CountingEngine, "steps", 0)


def test_it_trains_a_chain(tmp_path: Path) -> None:
    chain(make_data(tmp_path), tmp_path / "run", *CHANGES)
    assert CountingEngine.steps == 2 * STEPS


def test_its_memory_follows_from_its_entry(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", f"engine.name={NAME}")
    words = ["plan", str(recipe), "--kind", "h100", "--gpus", "4", "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    for job in json.loads(done.stdout)["jobs"]:
        own, ddp = (job["memory"][name]["stored"] for name in (NAME, "ddp"))
        assert job["engine"] == NAME
        # AdamW's two moments are shared by the four processes; the number of steps of each tensor is not.
        tensors = 4 * own["optimizer"] - ddp["optimizer"]
        assert own["weights"] == ddp["weights"]
        assert own["gradients"] == ddp["gradients"]
        assert 0 < tensors < 0.01 * own["optimizer"]


def test_a_name_that_is_not_known_is_one_clear_error() -> None:
    message = r"^recipe: engine\.name = 'countign': should be 'ddp', .* or 'counting' \(did you mean 'counting'\?\)$"
    with pytest.raises(ConfigError, match=message):
        recipe_of("engine.name=countign")
    message = r"chain\.links\.1\.engine\.name: should be 'ddp', .* \(did you mean 'zero2'\?\)$"
    with pytest.raises(ConfigError, match=message):
        recipe_of("chain.links.1.engine={name: zro2}")


def test_settings_of_other_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match="fsdp2 is for name fsdp2, not for 'counting'"):
        recipe_of(*CHANGES, "engine.fsdp2={cpu_offload: true}")


def test_an_engine_without_an_opener_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPENERS, NAME)
    with pytest.raises(ConfigError, match=r"engine\.name: counting has no entry in compt\.engines\.open\.OPENERS"):
        chain(make_data(tmp_path), tmp_path / "run", *CHANGES)


@pytest.mark.parametrize("own", [{"sums_whole_gradients": True}, {"buckets": 2}, {"steps_copies": True}])
def test_each_trait_of_an_entry_counts(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(kind: EngineKind) -> float:
        monkeypatch.setitem(ENGINES, NAME, kind)
        sizes = {"world_size": 1, "batch": 64, "captions": 2, "micro_batch": 32}
        return memory_per_gpu(PRESETS["vit_s16"], None, engine=NAME, **sizes).total_bytes

    plain = EngineKind(NAME, frozenset({"gradients", "optimizer"}))
    assert needed(EngineKind(NAME, plain.shards, **own)) > needed(plain)
