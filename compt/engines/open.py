"""Opening the engine that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compt.engines.base import AdamWSettings, Engine, EngineArguments
from compt.engines.ddp import DataParallelEngine
from compt.engines.graphs import GraphEngine
from compt.errors import ConfigError
from compt.recipe.deepspeed import deepspeed_config
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer


def open_engine(
    module: nn.Module,
    config: EngineConfig,
    optimizer: Optimizer,
    *,
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
    caps: Mapping[str, float] | None = None,
    base: Path = Path(),
) -> Engine:
    """The engine that a recipe names, around `module`, which may be on the "meta" device and take its values `initial`.

    `caps`: largest values of parameters. `base`: the folder that relative paths of the recipe start from. Raises
    ConfigError for settings that contradict each other.
    """
    settings = AdamWSettings(optimizer.betas, optimizer.eps, optimizer.weight_decay)
    common: EngineArguments = {
        "precision": optimizer.precision,
        "device": device,
        "initial": initial,
        "caps": caps,
        "ema_decay": optimizer.ema.decay if optimizer.ema else None,
        "compile": config.compile,
        "compile_mode": config.compile_mode,
        "recompute": config.recompute,
    }
    if config.name not in OPENERS:
        raise ConfigError(f"engine.name: {config.name} has no entry in compt.engines.open.OPENERS")
    kind, own = OPENERS[config.name](config, optimizer, base)
    return kind(module, settings, **common, **own)


Opener = Callable[[EngineConfig, Optimizer, Path], tuple[Callable[..., Engine], dict[str, Any]]]
"""Gives the class of an engine and the arguments that it takes besides those of every engine."""


def _ddp(config: EngineConfig, optimizer: Optimizer, base: Path) -> tuple[Callable[..., Engine], dict[str, Any]]:
    return (GraphEngine if config.graphs == "on" else DataParallelEngine), {}


def _fsdp2(config: EngineConfig, optimizer: Optimizer, base: Path) -> tuple[Callable[..., Engine], dict[str, Any]]:
    from compt.engines.fsdp2 import ShardedEngine

    return ShardedEngine, dict(config.fsdp2)


def _zero(config: EngineConfig, optimizer: Optimizer, base: Path) -> tuple[Callable[..., Engine], dict[str, Any]]:
    # Importing DeepSpeed takes seconds, and it need not be installed for the others.
    from compt.engines.zero.engine import ZeroEngine

    # Without the number of processes, as a timing on one device runs one rank's share of the recipe's batch. A run has
    # compared the numbers before, and DeepSpeed is given neither of them.
    return ZeroEngine, {"stage": config.kind.stage, "config": deepspeed_config(config, optimizer, None, base)}


OPENERS: dict[str, Opener] = {"ddp": _ddp, "fsdp2": _fsdp2, **{f"zero{stage}": _zero for stage in range(4)}}
"""How each engine of `compt.recipe.engine.ENGINES` is opened. One from outside of compt adds itself here."""
