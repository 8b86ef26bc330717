"""Commands on data sets and on single models: `compt data …`, `compt eval`, `compt export`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compt.errors import ConfigError
from compt.models.presets import is_own_swin
from compt.recipe.schema import EVALUATION_TASKS, EvalSet
from compt.text import TextTable, terminal

if TYPE_CHECKING:
    from compt.evaluate.task import ScoreRow
    from compt.models.presets import ModelSpec
    from compt.weights.artefact import Artefact

data_app = typer.Typer(help="Build, check and index data sets.", no_args_is_help=True)

Shards = Annotated[
    list[str], typer.Argument(help="tars, globs, or ranges as in data-{000000..000331}.tar", show_default=False)
]
CaptionsCsv = Annotated[Path | None, typer.Option(help="captions by sample key, as DreamLIP publishes them")]
IndexDir = Annotated[Path | None, typer.Option(help="where the index lies; default .compt-index beside the shards")]

Source = Annotated[
    str, typer.Argument(help="a model: folder, file, checkpoint, or ARCH:TAG of open_clip's", show_default=False)
]
SourceModel = Annotated[
    str | None,
    typer.Option("--model", "--teacher-model", metavar="NAME", help="what MODEL is, where it does not say so"),
]
SourcePrefix = Annotated[
    str | None,
    typer.Option("--prefix", "--teacher-prefix", metavar="P", help="of its parameters' names, as module.student."),
]

_SCORING = "Scoring"
Label = Annotated[str, typer.Option(help="cls, or the key of a class number in each .json", rich_help_panel=_SCORING)]
ClassNames = Annotated[
    Path | None,
    typer.Option(help="one name a line; default classnames.txt beside the data", rich_help_panel=_SCORING),
]
Templates = Annotated[
    Path | None,
    typer.Option(help="one a line with {c}; default: the file beside the data", rich_help_panel=_SCORING),
]
BatchSize = Annotated[int, typer.Option(help="images per step", min=1, rich_help_panel=_SCORING)]
Workers = Annotated[int, typer.Option(help="processes that decode", min=0, rich_help_panel=_SCORING)]
DeviceName = Annotated[str, typer.Option(help="auto, cpu or cuda", rich_help_panel=_SCORING)]


def open_source(path: str, model: str | ModelSpec | None, prefix: str | None, verify: bool = True) -> Artefact:
    """The model of a command's arguments, its digests compared with `verify`. Raises ConfigError or ArtefactError."""
    from compt.weights.infer import model_spec
    from compt.weights.open import open_model

    return open_model(path, model_spec(model) if isinstance(model, str) else model, prefix, verify)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; yields a function of (done, total)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show(table: TextTable) -> None:
    """Print a table to the terminal."""
    terminal().print(table.rich())


@data_app.command()
def emoji(
    out: Annotated[Path, typer.Argument(help="the folder to fill")] = Path("data/emoji"),
    size: Annotated[int, typer.Option(help="pixels a side; other than 32 needs --from-npm")] = 32,
    from_npm: Annotated[bool, typer.Option("--from-npm", help="render the pinned npm packages anew")] = False,
) -> None:
    """Lay out the emoji set as WebDataset shards: from the sample that comes along, or from npm in any size."""
    from compt.emoji import build as builder

    made = builder.build(out, size, from_npm, progress=sys.stderr.isatty())
    note = (
        f"{made.held_out} concepts are held out of training in every style. Drawings left out: "
        f"{sum(made.dropped.values())}. Licences and hashes: {out / 'manifest.json'}."
    )
    show(TextTable(f"Emoji, {made.size} px, from {made.source}: {out}", builder.HEADER, made.rows(), [note]))


@data_app.command()
def check(
    shards: Shards,
    captions_csv: CaptionsCsv = None,
    index_dir: IndexDir = None,
    context_length: Annotated[int, typer.Option(help="tokens that a text tower takes")] = 77,
    workers: Annotated[int | None, typer.Option(help="processes; default one a core")] = None,
) -> None:
    """Read every sample of a WebDataset: images decode, captions are there, how long they are. Exit code 3 if not."""
    from compt.data.check import check as run_check

    with progress_bar("checking samples") as progress:
        found = run_check(
            shards,
            Path.cwd(),
            index_dir=index_dir,
            captions_csv=captions_csv,
            context_length=context_length,
            workers=workers,
            progress=progress,
        )
    show(TextTable("Every sample can be used" if found.ok else "Problems found", ("", "found"), found.rows()))
    if not found.ok:
        raise typer.Exit(3)


@data_app.command()
def index(
    shards: Shards,
    out: Annotated[Path | None, typer.Option(help="where; default .compt-index beside the shards")] = None,
    captions_csv: CaptionsCsv = None,
) -> None:
    """Scan tars once, as img2dataset writes them, so that training can start at any position of any epoch."""
    from compt.data.index import open_index

    with progress_bar("indexing shards") as progress:
        made = open_index(shards, Path.cwd(), out, captions_csv, progress)
    rows = [("shards", f"{len(made.shards):,}"), ("samples", f"{len(made):,}"), ("fingerprint", made.fingerprint[:16])]
    rows += [(f"left out: {cause}", f"{count:,}") for cause, count in sorted(made.dropped.items())]
    show(TextTable("Indexed", ("", "found"), rows))


def evaluation_set(data: list[str], task: str, label: str, classnames: Path | None, templates: Path | None) -> EvalSet:
    """The options that say what to score on. Raises ConfigError for an unknown task."""
    try:
        EVALUATION_TASKS(task)
    except ValueError as error:
        raise ConfigError(f"--task {task}: {error}") from None
    return EvalSet(
        name=Path(data[0]).parent.name if data[0].endswith(".tar") else Path(data[0]).name,
        task=task,
        data=data,
        label=label,
        classnames=str(classnames) if classnames else None,
        templates=str(templates) if templates else None,
    )


def evaluate(
    model: Source,
    data: Annotated[list[str], typer.Option(help="shards (may be repeated), or a folder of class folders")],
    task: Annotated[str, typer.Option(help=" or ".join(EVALUATION_TASKS.table))] = "zeroshot",
    label: Label = "cls",
    classnames: ClassNames = None,
    templates: Templates = None,
    batch: BatchSize = 256,
    workers: Workers = 0,
    device: DeviceName = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="also write NAME.json and NAME.npz to this folder")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="also the accuracy of each class")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    name: SourceModel = None,
    prefix: SourcePrefix = None,
) -> None:
    """Score a model: zero-shot top-1 and top-5, or retrieval R@1, 5, 10 both ways. Runs under torchrun too."""
    from compt.dist import collectives as dist
    from compt.engines.base import COMPUTE_DTYPES
    from compt.evaluate.sets import evaluate_set, task_class
    from compt.evaluate.task import EvalSettings
    from compt.evaluate.zeroshot import ZeroShotResult

    if precision not in COMPUTE_DTYPES:
        raise ConfigError(f"--precision {precision}: should be one of {', '.join(COMPUTE_DTYPES)}")
    item = evaluation_set(data, task, label, classnames, templates)
    try:
        place = dist.init(device)
        found = dist.on_all(lambda: open_source(model, name, prefix))
        pixels = found.preprocess
        settings = EvalSettings(
            pixels["mean"], pixels["std"], Path.cwd(), batch, workers, dtype=COMPUTE_DTYPES[precision]
        )
        result = evaluate_set(found.load_model(place), item, settings)
        if dist.is_main():
            if out is not None:
                result.save(out)
            record = result.to_dict()
            if as_json:
                typer.echo(json.dumps(record, indent=2))
                return
            task_of_set = task_class(task)
            rows = [*_scores(task_of_set.rows(record), record), ("samples", f"{result.n:,}")]
            rows += [("not readable", f"{sum(result.skipped.values()):,}")]
            show(TextTable(f"{found.spec.name} on {item.name}", ("", "value"), rows, [task_of_set.note]))
            if per_class and isinstance(result, ZeroShotResult):
                shares = [
                    (name, "-" if share is None else f"{share:.1f}")
                    for name, share in zip(result.names, result.per_class, strict=True)
                ]
                show(TextTable("Top-1 of each class, percent", ("class", "top1"), shares))
    finally:
        dist.shutdown()


def _scores(lines: list[ScoreRow], record: dict[str, Any]) -> list[tuple[str, str]]:
    """Every score of a set with its interval, then what is known of the set itself."""
    rows: list[tuple[str, str]] = []
    about: dict[str, float] = {}
    for line in lines:
        for key, value in line.scores.items():
            if value is not None:
                rows.append((key, f"{value:.{line.digits + 1}f}"))
            if (interval := record.get(f"{key}_interval")) is not None:
                rows.append((f"95 % interval of {key}", "{:.2f} to {:.2f}".format(*interval)))
        about |= line.about
    return rows + [(key, f"{value:,}" if isinstance(value, int) else f"{value:.2f}") for key, value in about.items()]


def export(
    model: Source,
    out: Annotated[Path, typer.Argument(help="the folder to write", show_default=False)],
    name: SourceModel = None,
    prefix: SourcePrefix = None,
) -> None:
    """Write a model as one file for stock open_clip: create_model("local-dir:OUT") loads it."""
    from compt.weights.artefact import export_open_clip

    source = open_source(model, name, prefix)
    export_open_clip(source, out)
    typer.echo(f"Wrote {out}")
    if is_own_swin(source.spec.timm_name):
        typer.echo(
            "timm has no Swin of these sizes: before open_clip loads it, call\n"
            f'    from compt.models import register_swin; register_swin("{source.spec.timm_name}")'
        )
