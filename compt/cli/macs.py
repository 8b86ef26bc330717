"""`compt macs`: the parameters and MACs of a model, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from compt.cli.options import AsJson, CaptionLengths, ModeName, option, print_json, read_tokens
from compt.cost.counts import Tokens
from compt.cost.published import PAPER_PARAMETER_MACS, PAPER_TEXT_PASSES, PAPER_TOKENS, paper_breakdown
from compt.cost.training import Breakdown, Mode, Part, Record, exact_breakdown
from compt.errors import ConfigError
from compt.models.presets import ModelSpec, resolve
from compt.plan.links import check_growth
from compt.recipe.read import read_override
from compt.recipe.schema import checked_sizes
from compt.text import TextTable, count, show

BATCH, CAPTIONS = 1024, 4
SUMMED = ("parameters", "forward_macs", "backward_macs", "recompute_macs", "update_macs", "step_update_macs")


def macs_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="preset, as vit_s16", show_default=False)],
    set_: Annotated[
        list[str] | None, option("set a size of the model, as in width=448; repeatable", "--set", metavar="KEY=VALUE")
    ] = None,
    teacher: Annotated[str | None, option("preset of the teacher", metavar="NAME")] = None,
    teacher_set: Annotated[
        list[str] | None, option("set a size of the teacher; repeatable", "--teacher-set", metavar="KEY=VALUE")
    ] = None,
    batch: Annotated[int, option("images per step, over all ranks", metavar="N", min=1)] = BATCH,
    captions: Annotated[int | None, option("captions per image", metavar="N", min=1, default=str(CAPTIONS))] = None,
    tokens: CaptionLengths = None,
    mode: ModeName = "exact",
    micro_batches: Annotated[
        bool, option("count the forward pass twice, as with engine.micro_batch", "--micro-batches")
    ] = False,
    checkpointing: Annotated[
        bool, option("count the forward pass of blocks twice, as with engine.recompute", "--checkpointing")
    ] = False,
    chunked_loss: Annotated[
        bool, option("count the similarities twice, as with engine.loss_chunk", "--chunked-loss")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the parameters and MACs of a model, part by part.

    Counts a forward pass, a backward pass and a training step, by part, tower and kind of module.
    """
    student = _model("--set", model, set_)
    source = None if teacher is None else _model("--teacher-set", teacher, teacher_set)
    if source is None and teacher_set:
        raise ConfigError("--teacher-set: there is no --teacher")
    if source is not None:
        try:
            check_growth(source, student, strictly=False)
        except ConfigError as error:
            raise ConfigError(f"{model} with --teacher {teacher}: {error}") from None
    length = None if tokens is None else read_tokens(tokens)
    options = {"micro_batches": micro_batches, "checkpointing": checkpointing, "chunked_loss": chunked_loss}
    if mode == "paper":
        # The published accounting has fixed captions. To ignore the options would show the wrong numbers.
        given = [name for name, value in {"captions": captions, "tokens": tokens, **options}.items() if value]
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')}: --mode paper always counts {PAPER_TEXT_PASSES} captions of "
                f"{PAPER_TOKENS} tokens and no recomputation; leave the option out"
            )
        breakdown = paper_breakdown(student, source, batch=batch)
        sample = f"{PAPER_TEXT_PASSES} captions of {PAPER_TOKENS} tokens"
    else:
        number = captions or CAPTIONS
        options["recompute"] = options.pop("micro_batches")
        breakdown = exact_breakdown(student, source, batch=batch, captions=number, tokens=length, **options)
        sample = f"{number} captions of {_shown(length, student)} tokens"
    if as_json:
        asked = {"model": student.to_dict(), "teacher": source.to_dict() if source else None, "sample": sample}
        print_json({**asked, **to_json(breakdown)})
    else:
        title = student.name + (f" from {source.name}" if source else "")
        show(macs_table(breakdown, title, sample))


def _model(option: str, name: str, sizes: list[str] | None) -> ModelSpec:
    values = dict(read_override(option, text, "width=448") for text in sizes or [])
    try:
        sizes_of_model = checked_sizes(name, values)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    return resolve(name, sizes_of_model)


def _shown(tokens: Tokens, spec: ModelSpec) -> str:
    lengths = tokens if isinstance(tokens, Mapping) else [spec.context_length if tokens is None else tokens]
    computed = [f"{min(length, spec.context_length):g}" for length in (min(lengths), max(lengths))]
    return " to ".join(dict.fromkeys(computed))


def sums(breakdown: Breakdown) -> Iterator[Record]:
    """The cost of each part of a training run: one record a part, for both towers and all modules."""
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
        cells = [count(value) if (value := column(record)) else "" for column in columns.values()]
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
    again = ", Bwd and Again (to save memory)" if "Again" in columns else " and Bwd"
    update = "step" if exact else "sample, too"
    note = (
        f"MACs are multiply-accumulates of matrix products and convolutions. Fwd{again} are per sample "
        f"(one image with {sample}). Update is per {update}. Step is the total for {breakdown.batch:,} samples. "
        f"{_ASSUMPTIONS[breakdown.mode]}"
    )
    return TextTable(f"MACs of {title}, mode {breakdown.mode}", ["Module", "Params", *columns], rows, [note])


_ASSUMPTIONS: dict[Mode, str] = {
    "exact": "That is what compt computes. Norms, biases, activations, softmax and embedding lookups are not counted.",
    "paper": f"That is the published accounting: 3 forward - patch embedding + {PAPER_PARAMETER_MACS} parameters, no "
    "loss, no projectors; Swin without its attention's two products; of the text tower only the blocks' parameters.",
}


def to_json(breakdown: Breakdown) -> dict[str, Any]:
    """The records, their sums by part, and the whole, as plain values."""
    cost = breakdown.cost(breakdown.batch, 1)
    return {
        "mode": breakdown.mode,
        "batch": breakdown.batch,
        "records": [asdict(record) for record in breakdown.records],
        "parts": {
            record.part: {field: getattr(record, field) for field in SUMMED}
            | {"sample_macs": record.sample_macs, "step_macs": record.step_macs(breakdown.batch)}
            for record in sums(breakdown)
        },
        "sample_macs": cost.sample_macs,
        "step_macs": cost.total_macs,
    }
