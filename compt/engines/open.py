"""Engines: ways to train one module on one or several devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compt.engines.base import AdamWSettings, Engine
from compt.engines.ddp import DataParallelEngine
from compt.recipe.deepspeed import deepspeed_config
from compt.recipe.engine import EngineConfig
from compt.recipe.schema import Optimizer


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
    """The engine that a recipe names, around `module`, which may be on the "meta" device and get its values `initial`.

    `caps`: largest values of parameters. `base`: where relative paths of the recipe start. Raises ConfigError for
    settings that contradict each other.
    """
    settings = AdamWSettings(optimizer.betas, optimizer.eps, optimizer.weight_decay)
    common: dict[str, Any] = {
        "precision": optimizer.precision,
        "device": device,
        "initial": initial,
        "caps": caps,
        "ema_decay": optimizer.ema.decay if optimizer.ema else None,
        "compile": config.compile,
        "recompute": config.recompute,
    }
    if config.name == "ddp":
        return DataParallelEngine(module, settings, **common)
    if config.name == "fsdp2":
        from compt.engines.fsdp2 import ShardedEngine

        own = config.fsdp2
        return ShardedEngine(
            module,
            settings,
            **common,
            reshard_after_forward=own.reshard_after_forward,
            replicas=own.replicas,
            cpu_offload=own.cpu_offload,
            reduce_precision=own.reduce_precision,
        )
    # Importing DeepSpeed takes seconds, and it need not be installed for the others.
    from compt.engines.zero.engine import ZeroEngine

    # Without the number of processes, as a timing on one device runs one rank's share of the recipe's batch. A run has
    # compared the numbers before, and DeepSpeed is given neither of them.
    made = deepspeed_config(config, optimizer, None, base)
    return ZeroEngine(module, settings, **common, stage=int(config.name.removeprefix("zero")), config=made)
