"""Whether the engines that a recipe names can run on a number of processes. No torch in here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from compt.errors import ConfigError
from compt.recipe.deepspeed import deepspeed_config
from compt.recipe.read import Recipe, split_batch


def check_engines(recipe: Recipe, models: Iterable[str], world_size: int | None, base: Path, where: str) -> None:
    """Raise ConfigError, beginning with `where`, for the engine of a model that cannot run on `world_size` processes.

    Files are read and held against the recipe; relative paths start at `base`. None: the number is not known yet, and
    what depends on it is left out.
    """
    for model in dict.fromkeys(models):
        engine = recipe.engine_of(model)
        try:
            if world_size is not None:
                split_batch(recipe.optimizer.batch, world_size, engine.micro_batch)
                if world_size % engine.fsdp2.replicas:
                    raise ConfigError(
                        f"engine.fsdp2.replicas = {engine.fsdp2.replicas} does not divide the {world_size} processes"
                    )
            if engine.name.startswith("zero"):
                deepspeed_config(engine, recipe.optimizer, world_size, base)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
