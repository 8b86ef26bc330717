"""Arguments that several commands share, and how they are read. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compt.cost.counts import Tokens
from compt.cost.gpus import Device, find_device
from compt.cost.speed import Throughput
from compt.errors import ConfigError
from compt.plan.forecast import Machine, default_gpus
from compt.recipe.schema import Recipe
from compt.recipe.types import checked_caption_tokens

KIND = "a100-80"
"""The GPU that is planned with unless one is named: the paper's."""

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="replace a field: --set optimizer.lr=5e-4")
]
Kind = Annotated[str | None, typer.Option(help=f"kind of GPU: a100-40, a100-80, h100 or h200; default {KIND}")]
Gpus = Annotated[int | None, typer.Option(help="GPUs that share a training; default 8, or fewer that share the batch")]
ThroughputFile = Annotated[
    Path | None,
    typer.Option("--throughput", metavar="FILE", help="speeds that `compt bench throughput` measured"),
]


def read_tokens(text: str) -> Tokens:
    """`--tokens`: a mean, lengths with shares as in 20:0.7,40:0.3, or `context` (None)."""
    if text == "context":
        return None
    pairs = [part.split(":") for part in text.split(",")]
    try:
        mean_or_shares = float(text) if ":" not in text else {int(length): float(share) for length, share in pairs}
        tokens: Tokens = checked_caption_tokens(mean_or_shares)
    except ValueError as error:
        raise ConfigError(
            f"--tokens {text}: should be a length, lengths with shares as in 20:0.7,40:0.3, or context ({error})"
        ) from None
    if isinstance(tokens, dict) and len(tokens) < len(pairs):
        raise ConfigError(f"--tokens {text}: names a length twice")
    return tokens


@dataclass(frozen=True)
class MachineOptions:
    """The options that say what GPUs to plan for."""

    kind: str | None
    gpus: int | None
    throughput: Path | None

    @property
    def given(self) -> bool:
        """Whether any of them is."""
        return (self.kind, self.gpus, self.throughput) != (None, None, None)

    def machine(self, recipe: Recipe, source: str) -> Machine:
        """The GPUs with what was measured on them. Raises ConfigError, which names the option."""
        device, speeds = self.device()
        if device is None:
            raise ConfigError(
                f"--throughput {self.throughput}: was measured on {speeds and speeds.device}, which is no kind of GPU "
                "known here"
            )
        return Machine(device, self.number(recipe, source, default_gpus(recipe.optimizer.batch)), speeds)

    def number(self, recipe: Recipe, source: str, default: int) -> int:
        """How many GPUs. Raises ConfigError where each would not have a picture of the batch."""
        batch = recipe.optimizer.batch
        if self.gpus is not None and not 1 <= self.gpus <= batch:
            raise ConfigError(f"--gpus {self.gpus}: should be from 1 to the {batch} of optimizer.batch in {source}")
        return self.gpus or default

    def device(self) -> tuple[Device | None, Throughput | None]:
        """The GPU, None where speeds are of one whose peak is not known, and what was measured on it."""
        try:
            device = find_device(self.kind) if self.kind is not None else None
        except ConfigError as error:
            raise ConfigError(f"--kind {self.kind}: {error}") from None
        if self.throughput is None:
            return device or find_device(KIND), None
        try:
            speeds = Throughput.read(self.throughput, device)
        except ConfigError as error:
            raise ConfigError(f"--throughput: {error}") from None
        return device or (find_device(speeds.kind) if speeds.kind else None), speeds
