"""Checkpoints between real engines: the whole state within a format, only the weights across formats."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compt.dist import collectives as dist
from compt.engines.base import Engine
from compt.engines.open import open_engine
from compt.models.clip import build
from compt.models.init import DrawnState
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train import checkpoint
from compt.train.checkpoint import Saver
from compt.train.task import StudentModule
from tests.dist.engines.zero_cases import VIT
from tests.dist.spawn import run_ranks
from tests.helpers.checkpoint import same

ENGINES = ("ddp", "fsdp2", "zero1", "zero3")

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no deepspeed: pip install 'compt[deepspeed]'")


def opened(name: str, seed: int) -> Engine:
    """A student with projectors and an average, its values drawn from `seed`."""
    model = build(VIT, device="meta")
    module = StudentModule(model, projected=VIT.embed_dim + 3, seed=seed)
    optimizer = Optimizer.model_validate({"batch": 4, "ema": {"decay": 0.5}, "precision": "fp32"})
    initial = module.initial(DrawnState(model, VIT, seed))
    config = EngineConfig.model_validate({"name": name})
    return open_engine(module, config, optimizer, device=torch.device("cpu"), initial=initial)


def stepped(engine: Engine, steps: int) -> Engine:
    for step in range(steps):
        draws = torch.Generator().manual_seed(100 * step + dist.rank())
        images = torch.randn((2, 3, VIT.image_size, VIT.image_size), generator=draws)
        tokens = torch.randint(1, VIT.vocab_size, (2, 1, VIT.context_length), generator=draws)
        outputs = engine.forward(images, tokens, torch.full((2, 1), VIT.context_length))
        engine.backward(torch.stack([value.square().sum() for value in outputs.values()]).sum())
        engine.step(1e-3, 1.0)
    return engine


def state(engine: Engine, average: bool = False) -> dict[str, Tensor]:
    return {name: value.reshape(-1) for name, value in engine.weights(average)}


def exchange(folder: Path) -> list[str]:
    """Every engine saves, and every engine loads. Returns errors and warnings."""
    wrong, told = [], []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("compt.train.checkpoint").addHandler(handler)
    saved = {}
    for name in ENGINES:
        engine = stepped(opened(name, 1), 2)
        asynchronous = name == "fsdp2"
        saver = Saver(folder / name, asynchronous=asynchronous)
        saver.save(engine, 2, {"engine": name})
        saved[name] = (engine.format, state(engine), state(engine, average=True))
        if asynchronous:
            stepped(engine, 1)
        saver.finish()
        path = folder / name / "step-00000002"
        for average in (False, True):
            found = checkpoint.open_weights(path, average)
            live = saved[name][1 + average]
            if not same({f"model.{key}": found[key].reshape(-1) for key in found}, _model(live)):
                wrong.append(f"{name}: open_weights, average {average}")
    for writer, (kind, weights, averages) in saved.items():
        for reader in ENGINES:
            engine = opened(reader, 7)
            told.clear()
            assert checkpoint.load(folder / writer / "step-00000002", engine) == {"engine": writer}
            across = engine.format != kind
            if not same(state(engine), weights):
                wrong.append(f"{writer} to {reader}: weights")
            if not across and not same(state(engine, average=True), averages):
                wrong.append(f"{writer} to {reader}: average")
            if len(told) != (across and dist.is_main()):
                wrong.append(f"{writer} to {reader}: {told}")
            stepped(engine, 1)  # it still trains
    return wrong


def _model(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if name.startswith("model.")}


@pytest.mark.slow
def test_engines_take_over_what_others_saved(tmp_path: Path) -> None:
    assert run_ranks(exchange, 2, tmp_path, timeout=400) == [[], []]
