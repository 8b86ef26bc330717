"""`compt macs`: what a model costs, part by part. No torch in here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, get_args

import typer
import yaml

from compt.cli.options import read_tokens
from compt.cost.counts import Tokens
from compt.cost.published import PAPER_PARAMETER_MACS, PAPER_TEXT_PASSES, PAPER_TOKENS, paper_breakdown
from compt.cost.training import Breakdown, Mode, Part, Record, exact_breakdown
from compt.errors import ConfigError, nearest
from compt.models.presets import ModelSpec, resolve
from compt.plan.links import check_growth
from compt.recipe.schema import checked_sizes
from compt.text import TextTable, count, macs, terminal

BATCH, CAPTIONS = 1024, 4
SUMMED = ("parameters", "forward_macs", "backward_macs", "recompute_macs", "update_macs", "step_update_macs")


def macs_command(
    model: Annotated[str, typer.Argument(help="a preset, as vit_s16", show_default=False)],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="SIZE=VALUE", help="as --set width=448")] = None,
    teacher: Annotated[str | None, typer.Option(help="the preset whose features are distilled")] = None,
    teacher_set: Annotated[
        list[str] | None, typer.Option("--teacher-set", metavar="SIZE=VALUE", help="a size of the teacher's")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures a step, over all processes")] = BATCH,
    captions: Annotated[
        int | None, typer.Option(min=1, show_default=str(CAPTIONS), help="captions of a picture")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(show_default="the context", help="computed tokens of a caption: 30, or 20:0.7,40:0.3, or context"),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="exact: what this program computes; paper: the published accounting")
    ] = "exact",
    recompute: Annotated[bool, typer.Option("--recompute", help="with micro-batches, run forward twice")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="with activation checkpointing")] = False,
    chunked_loss: Annotated[bool, typer.Option("--chunked-loss", help="with engine.loss_chunk")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers as JSON")] = False,
) -> None:
    """Show the parameters and MACs of a model and of a step of its training, by part, tower and kind of module."""
    student = _model("--set", model, set_)
    source = None if teacher is None else _model("--teacher-set", teacher, teacher_set)
    if source is None and teacher_set:
        raise ConfigError("--teacher-set: there is no --teacher")
    if source is not None:
        try:
            check_growth(source, student, strictly=False)
        except ConfigError as error:
            raise ConfigError(f"{model} with --teacher {teacher}: {error}") from None
    if mode not in get_args(Mode):
        raise ConfigError(f"--mode {mode}: should be exact or paper{nearest(mode, get_args(Mode))}")
    length = None if tokens is None else read_tokens(tokens)
    options = {"recompute": recompute, "checkpointing": checkpointing, "chunked_loss": chunked_loss}
    if mode == "paper":
        given = [name for name, value in {"captions": captions, "tokens": tokens, **options}.items() if value]
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')}: mode paper has its own {PAPER_TEXT_PASSES} captions of "
                f"{PAPER_TOKENS} tokens and computes nothing again; leave it out"
            )
        breakdown = paper_breakdown(student, source, batch=batch)
        sample = f"{PAPER_TEXT_PASSES} captions of {PAPER_TOKENS} tokens"
    else:
        number = captions or CAPTIONS
        breakdown = exact_breakdown(student, source, batch=batch, captions=number, tokens=length, **options)
        sample = f"{number} captions of {_shown(length, student)} tokens"
    if as_json:
        asked = {"model": student.to_dict(), "teacher": source.to_dict() if source else None, "sample": sample}
        typer.echo(json.dumps({**asked, **to_json(breakdown)}, indent=2))
    else:
        title = student.name + (f" from {source.name}" if source else "")
        terminal().print(macs_table(breakdown, title, sample).rich())


def _model(option: str, name: str, sizes: list[str] | None) -> ModelSpec:
    values: dict[str, Any] = {}
    for text in sizes or []:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"{option} {text}: should be SIZE=VALUE, as in {option} width=448")
        values[key] = _yaml(f"{option} {text}", value)
    try:
        sizes_of_model = checked_sizes(name, values)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    return resolve(name, sizes_of_model)


def _yaml(source: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{source}: cannot be read as a value") from None


def _shown(tokens: Tokens, spec: ModelSpec) -> str:
    lengths = tokens if isinstance(tokens, Mapping) else [spec.context_length if tokens is None else tokens]
    computed = [f"{min(length, spec.context_length):g}" for length in (min(lengths), max(lengths))]
    return " to ".join(dict.fromkeys(computed))


def sums(breakdown: Breakdown) -> Iterator[Record]:
    """What each part of a training costs: a record a part, whose tower and module are those of all."""
    for part in dict.fromkeys(record.part for record in breakdown.records):
        yield _sum(breakdown, part)


def _sum(breakdown: Breakdown, *parts: Part) -> Record:
    total = {field: breakdown.sum(field, parts=parts) for field in SUMMED}
    parameters = round(total.pop("parameters"))
    return Record(parts[0], "both", "all", parameters, **total)


def macs_table(breakdown: Breakdown, title: str, sample: str) -> TextTable:
    """A row for each kind of module that has parameters or MACs, then the sums."""
    exact = breakdown.mode == "exact"
    columns: dict[str, Callable[[Record], float]] = {
        "Fwd": lambda record: record.forward_macs,
        "Bwd": lambda record: record.backward_macs,
        "Again": lambda record: record.recompute_macs,
        "Update": lambda record: record.step_update_macs if exact else record.update_macs,
        "Step": lambda record: record.step_macs(breakdown.batch),
    }
    if not breakdown.sum("recompute_macs"):
        del columns["Again"]

    def row(name: str, record: Record) -> list[str]:
        cells = [macs(value) if (value := column(record)) else "" for column in columns.values()]
        return [name, count(record.parameters) if record.parameters else "", *cells]

    rows = [
        row(f"{record.part} {record.tower} {record.module}".replace("both ", "").replace("_", " "), record)
        for record in breakdown.records
        if record.parameters or record.step_macs(breakdown.batch)
    ]
    parts = list(sums(breakdown))
    rows += [row(f"{record.part}, all", record) for record in parts]
    if len(parts) > 1:
        rows.append(row("all", _sum(breakdown, *(record.part for record in parts))))
    again = ", again (to save memory)" if "Again" in columns else ""
    per = "a step" if exact else "a sample too"
    note = (
        f"MACs are multiply-accumulates of matrix products and convolutions. Of a sample, a picture with {sample}: "
        f"fwd, bwd{again}. Of {per}: update. Step: all of {breakdown.batch:,} samples. {_ASSUMPTIONS[breakdown.mode]}"
    )
    return TextTable(f"MACs of {title}, mode {breakdown.mode}", ["Module", "Params", *columns], rows, [note])


_ASSUMPTIONS: dict[Mode, str] = {
    "exact": "That is what this program computes. Norms, biases, activations, softmax and embedding lookups are not "
    "counted.",
    "paper": f"That is the published accounting: 3 forward - patch embedding + {PAPER_PARAMETER_MACS} parameters, no "
    "loss, no projectors; Swin without its attention's two products; of the text tower the blocks' parameters alone.",
}


def to_json(breakdown: Breakdown) -> dict[str, Any]:
    """The records, their sums by part, and the whole, as plain values."""
    cost = breakdown.cost(breakdown.batch, 1)
    return {
        "mode": breakdown.mode,
        "batch": breakdown.batch,
        "records": [record.to_json() for record in breakdown.records],
        "parts": {
            record.part: {field: getattr(record, field) for field in SUMMED}
            | {"sample_macs": record.sample_macs, "step_macs": record.step_macs(breakdown.batch)}
            for record in sums(breakdown)
        },
        "sample_macs": cost.sample_macs,
        "step_macs": cost.total_macs,
    }
