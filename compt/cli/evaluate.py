"""Commands on single models: `compt eval`, `compt export`; and how a model is named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compt.cli.options import (
    AsJson,
    BatchSize,
    ClassNames,
    ClassOrder,
    DeviceName,
    Label,
    MaxBadShare,
    Templates,
    Workers,
    one_of,
    option,
    print_json,
)
from compt.models.presets import is_own_swin
from compt.recipe.schema import EVALUATION_TASKS, MAX_BAD_SHARE, EvalSet
from compt.text import TextTable, say, show

if TYPE_CHECKING:
    from compt.evaluate.task import ScoreRow
    from compt.models.presets import ModelSpec
    from compt.weights.artefact import Artefact

Source = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="folder, file, checkpoint, or ARCH:TAG of open_clip", show_default=False),
]
SourceModel = Annotated[
    str | None, option("architecture of MODEL, if its files have none", "--model", "--teacher-model", metavar="NAME")
]
SourcePrefix = Annotated[
    str | None, option("prefix of its parameters, as in module.student.", "--prefix", "--teacher-prefix", metavar="P")
]


def open_source(path: str, model: str | ModelSpec | None, prefix: str | None, verify: bool = True) -> Artefact:
    """Open the model that a command names; `verify` compares its digests. Raises ConfigError or ArtefactError."""
    from compt.weights.infer import model_spec
    from compt.weights.open import open_model

    return open_model(path, model_spec(model) if isinstance(model, str) else model, prefix, verify)


def evaluation_set(
    data: list[str],
    task: str,
    label: str,
    classnames: Path | None,
    templates: Path | None,
    class_order: Literal["name", "number"] | None = None,
) -> EvalSet:
    """The evaluation set that the options describe."""
    return EvalSet(
        name=Path(data[0]).parent.name if data[0].endswith(".tar") else Path(data[0]).name,
        task=task,
        data=data,
        label=label,
        classnames=str(classnames) if classnames else None,
        templates=str(templates) if templates else None,
        class_order=class_order,
    )


def evaluate(
    model: Source,
    data: Annotated[list[str], option("shards (repeatable), or a folder of class folders", metavar="DATA")],
    task: Annotated[str, one_of(EVALUATION_TASKS, "what to compute")] = "zeroshot",
    label: Label = "cls",
    classnames: ClassNames = None,
    templates: Templates = None,
    class_order: ClassOrder = None,
    max_bad_share: MaxBadShare = MAX_BAD_SHARE,
    batch: BatchSize = 256,
    workers: Workers = 0,
    device: DeviceName = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], option("number format of the model")] = "fp32",
    out: Annotated[Path | None, option("also write NAME.json and NAME.npz to this folder", metavar="FOLDER")] = None,
    per_class: Annotated[bool, option("also show the accuracy of each class", "--per-class")] = False,
    as_json: AsJson = False,
    name: SourceModel = None,
    prefix: SourcePrefix = None,
) -> None:
    """Score a model by zero-shot accuracy or retrieval.

    Computes top-1 and top-5, or recall at 1, 5 and 10 in both directions. Runs in one process, or in every process
    that torchrun starts.
    """
    from compt.dist import collectives as dist
    from compt.engines.base import COMPUTE_DTYPES
    from compt.evaluate.sets import evaluate_set, task_class
    from compt.evaluate.task import EvalSettings
    from compt.evaluate.zeroshot import ZeroShotResult

    item = evaluation_set(data, task, label, classnames, templates, class_order)
    try:
        place = dist.init(device)
        # Without on_all, ranks that can read the model would wait for one that cannot.
        found = dist.on_all(lambda: open_source(model, name, prefix))
        dtype = COMPUTE_DTYPES[precision]
        settings = EvalSettings(found.preprocess, Path.cwd(), batch, workers, dtype=dtype, max_bad_share=max_bad_share)
        result = evaluate_set(found.load_model(place), item, settings)
        # One process writes and prints for all.
        if not dist.is_main():
            return
        if out is not None:
            result.save(out)
        if as_json:
            print_json(result.to_dict())
            return
        kind, record = task_class(task), result.to_dict()
        rows = [*_scores(kind.rows(record), record), ("samples", f"{result.n:,}")]
        rows += [("left out", result.left_out or "0")]
        show(TextTable(f"{found.spec.name} on {item.name}", ("", "value"), rows, [kind.note]))
        if per_class and isinstance(result, ZeroShotResult):
            shares = zip(result.names, result.per_class, strict=True)
            rows = [(label, "-" if share is None else f"{share:.1f}") for label, share in shares]
            show(TextTable("Top-1 of each class, percent", ("class", "top1"), rows))
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
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write", show_default=False)],
    name: SourceModel = None,
    prefix: SourcePrefix = None,
) -> None:
    """Write a model as one file for open_clip.

    create_model("local-dir:OUT") of open_clip loads it.
    """
    from compt.weights.artefact import export_open_clip

    source = open_source(model, name, prefix)
    export_open_clip(source, out)
    say(f"Wrote {out}")
    if is_own_swin(source.spec.timm_name):
        typer.echo(
            "timm has no Swin of these sizes: before open_clip loads it, call\n"
            f'    from compt.models import register_swin; register_swin("{source.spec.timm_name}")'
        )
