"""Options that several commands share, how they are read, and how help is laid out."""

from __future__ import annotations

import contextlib
import glob
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand, TyperGroup

from compt.cost.counts import Tokens
from compt.cost.gpus import Device, find_device
from compt.cost.speed import Throughput
from compt.cost.training import Mode
from compt.errors import ConfigError
from compt.plan.forecast import Machine, default_gpus
from compt.recipe.read import find_recipe, shipped
from compt.recipe.schema import Recipe
from compt.recipe.types import OneOf, checked_caption_tokens
from compt.text import terminal, visible

KIND = "a100-80"
"""The GPU that is planned with unless one is named: the paper's."""


class PlainCommand(TyperCommand):
    """A command whose help is plain text, with options under the heading of their panel."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the command, without braces around what is required."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            argument = parameter.param_type_name == "argument"
            title = getattr(parameter, "rich_help_panel", None) or ("Arguments" if argument else "Options")
            if record := parameter.get_help_record(ctx):
                name, text = record
                # typer puts a default that is described in words into brackets of its own
                text = re.sub(r"\[default: \((.*?)\)(?=[];])", r"[default: \1", text)
                sections.setdefault(title, []).append((name.partition(" <")[0] if argument else name, text))
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class PlainGroup(TyperGroup):
    """A group of commands whose errors about the command line show hidden characters as text."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options of the group."""
        with _visible_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Read the rest of the line, and run the command in it."""
        with _visible_errors():
            return super().invoke(ctx)


class DefaultGroup(PlainGroup):
    """A group whose first command needs no name: `compt eval MODEL` beside `compt eval fetch SUITE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the first command's name in front of words that name no command."""
        named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if named else [next(iter(self.commands)), *args])


@contextlib.contextmanager
def _visible_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Of all errors only those about the command line have a message. Typer does not export their class.
        if isinstance(message := getattr(error, "message", None), str):
            error.message = visible(message.replace("Value error, ", ""))  # type: ignore[attr-defined]
        raise


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, and paths, that begin with `incomplete`."""
    paths = [f"{path}/" if Path(path).is_dir() else path for path in glob.glob(f"{glob.escape(incomplete)}*")]
    return [name for name in shipped("recipes") if name.startswith(incomplete)] + sorted(paths)


def option(text: str, *names: str, default: str | None = None, panel: str | None = None, **rest: Any) -> Any:
    """An option with the help `text`. `default`: the default in words. `panel`: its section of the help."""
    return typer.Option(*names, help=text, show_default=default or True, rich_help_panel=panel, **rest)


RECIPE: dict[str, Any] = {
    "metavar": "RECIPE",
    "callback": lambda path: path and find_recipe(path),
    "autocompletion": complete_recipe,
}
RECIPE_HELP = "YAML file, or the name of a shipped recipe"
RecipePath = Annotated[Path, typer.Argument(help=RECIPE_HELP, show_default=False, **RECIPE)]
Overrides = Annotated[
    list[str] | None, option("set a field, as in optimizer.lr=5e-4; repeatable", "--set", metavar="KEY=VALUE")
]
RunFolder = Annotated[
    Path | None, option("run folder", "--run-folder", metavar="FOLDER", default="runs/NAME of the recipe")
]
Baselines = Annotated[bool, option("also train the baseline of each model, and the controls", "--baselines")]
AsJson = Annotated[bool, option("print JSON", "--json")]
Kind = Annotated[
    Literal["a100", "a100-40", "a100-80", "h100", "h200"] | None,
    option("kind of GPU to plan for", case_sensitive=False, default=KIND),
]
Gpus = Annotated[int | None, option("GPUs per job", metavar="N", default="8, or fewer that divide the batch")]
ThroughputFile = Annotated[
    Path | None, option("speeds measured by `compt bench throughput`", "--throughput", metavar="FILE")
]
CaptionLengths = Annotated[
    str | None, option("computed tokens per caption: 30, or 20:0.7,40:0.3, or context", "--tokens", metavar="LENGTHS")
]
_DEVICES = ["auto", "cpu", "cuda"]
DeviceName = Annotated[
    str, option("auto, cpu, cuda or cuda:N", "--device", metavar="DEVICE", autocompletion=lambda: _DEVICES)
]
MODE_HELP = "count what compt computes (exact), or as published (paper)"
ModeName = Annotated[Mode, option(MODE_HELP, "--mode")]
_SCORING = "Scoring"
BatchSize = Annotated[int, option("images per step", "--batch", metavar="N", min=1, panel=_SCORING)]
Workers = Annotated[int, option("processes that decode images", "--workers", metavar="N", min=0, panel=_SCORING)]
MaxBadShare = Annotated[float, option("share of unusable samples that is accepted", metavar="SHARE", min=0, max=1)]
Label = Annotated[
    str, option("cls, or the field of each .json with the class", "--label", metavar="NAME", panel=_SCORING)
]
ClassNames = Annotated[
    Path | None,
    option("class names, one per line", "--classnames", metavar="FILE", default="beside the data", panel=_SCORING),
]
CLASS_ORDER_HELP = "order of class folders, where names and numbers differ"
ClassOrder = Annotated[Literal["name", "number"] | None, option(CLASS_ORDER_HELP, "--class-order", panel=_SCORING)]
Templates = Annotated[
    Path | None,
    option(
        "templates with {c}, one per line", "--templates", metavar="FILE", default="beside the data", panel=_SCORING
    ),
]


def one_of(names: OneOf, text: str, **more: Any) -> Any:
    """An option whose value is a name of a table.

    The table is read when the option is: a `Literal` would not know a name that was added from outside the package.
    """

    def read(name: str) -> str:
        try:
            return names(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    def complete(incomplete: str) -> list[str]:
        return [name for name in names.table if name.startswith(incomplete)]

    return option(text, parser=read, metavar=f"<{'|'.join(names.table)}>", autocompletion=complete, **more)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; yields a function of (done, total)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = terminal(stderr=True)
    # In a file, a bar would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """Write a value to standard output as indented JSON."""
    typer.echo(json.dumps(value, indent=2))


def read_tokens(text: str) -> Tokens:
    """The value of `--tokens`: a mean, lengths with shares as in 20:0.7,40:0.3, or `context` (None)."""
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
        raise ConfigError(f"--tokens {text}: a length occurs twice")
    return tokens


@dataclass(frozen=True)
class MachineOptions:
    """The options that name the GPUs to plan for."""

    kind: str | None
    gpus: int | None
    throughput: Path | None

    @property
    def given(self) -> bool:
        """Whether any of them is given."""
        return (self.kind, self.gpus, self.throughput) != (None, None, None)

    def machine(self, recipe: Recipe, source: str) -> Machine:
        """The GPUs, and the speeds measured on them. Raises ConfigError that names the option.

        A plan has memory and projections too, which need a datasheet.
        """
        device, speeds = self.device()
        if device is None:
            raise ConfigError(
                f"--throughput {self.throughput}: {speeds and speeds.device} has no datasheet here: "
                "`compt bench gpu-hours` takes its speeds"
            )
        return Machine(device, self.number(recipe, source, default_gpus(recipe.optimizer.batch)), speeds)

    def number(self, recipe: Recipe, source: str, default: int) -> int:
        """How many GPUs. Raises ConfigError for more GPUs than images in a batch."""
        batch = recipe.optimizer.batch
        if self.gpus is not None and not 1 <= self.gpus <= batch:
            raise ConfigError(f"--gpus {self.gpus}: should be from 1 to the {batch} of optimizer.batch in {source}")
        return self.gpus or default

    def device(self) -> tuple[Device | None, Throughput | None]:
        """The GPU, None if its peak is not known, and the speeds measured on it."""
        device = find_device(self.kind) if self.kind is not None else None
        if self.throughput is None:
            return device or find_device(KIND), None
        try:
            speeds = Throughput.read(self.throughput, device)
        except ConfigError as error:
            raise ConfigError(f"--throughput: {error}") from None
        return device or (find_device(speeds.kind) if speeds.kind else None), speeds
