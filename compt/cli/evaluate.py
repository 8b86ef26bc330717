"""`compt eval`, and how a model is named on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from compt.errors import ConfigError, DataError
from compt.recipe.schema import EVALUATION_TASKS, MAX_BAD_SHARE, ONE_CLASS, EvalSet, unread_by
from compt.recipe.suite import load_suite, name_of, one_set, shipped_suites
from compt.text import TextTable, say, show

if TYPE_CHECKING:
    import torch

    from compt.evaluate.task import EvalSettings, ScoreRow
    from compt.models.presets import ModelSpec
    from compt.weights.artefact import Artefact

_MODEL = typer.Argument(metavar="MODEL", help="folder, file, checkpoint, or ARCH:TAG of open_clip", show_default=False)
Source = Annotated[str, _MODEL]
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


def complete_suite(incomplete: str) -> list[str]:
    """Names of shipped suites that begin with `incomplete`."""
    return [name for name in shipped_suites() if name.startswith(incomplete)]


def evaluation_set(
    data: list[str],
    task: str,
    label: str,
    classnames: Path | None,
    templates: Path | None,
    class_order: Literal["name", "number"] | None = None,
    train: list[str] | None = None,
) -> EvalSet:
    """The evaluation set that the options describe."""
    return EvalSet(
        name=name_of(data[0]),
        task=task,
        data=data,
        label=label,
        classnames=str(classnames) if classnames else None,
        templates=str(templates) if templates else None,
        class_order=class_order,
        train=train,
    )


def evaluate(
    models: Annotated[list[str], _MODEL],
    data: Annotated[
        list[str] | None, option("shards (repeatable), or a folder of class folders", metavar="DATA")
    ] = None,
    suite: Annotated[
        str | None,
        option("sets to score: a YAML file or the name of a suite", metavar="SUITE", autocompletion=complete_suite),
    ] = None,
    root: Annotated[Path | None, option("folder of the suite's sets", metavar="FOLDER", default="the suite's")] = None,
    published: Annotated[list[str] | None, option("published model to show beside; repeatable", metavar="NAME")] = None,
    task: Annotated[str | None, one_of(EVALUATION_TASKS, "what to compute", default="zeroshot, or the suite's")] = None,
    train: Annotated[list[str] | None, option("labelled data for linear_probe and knn", metavar="DATA")] = None,
    label: Label = "cls",
    classnames: ClassNames = None,
    templates: Templates = None,
    class_order: ClassOrder = None,
    max_bad_share: MaxBadShare = MAX_BAD_SHARE,
    batch: BatchSize = 256,
    workers: Workers = 0,
    device: DeviceName = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], option("number format of the model")] = "fp32",
    out: Annotated[Path | None, option("also write tables and every answer to this folder", metavar="FOLDER")] = None,
    per_class: Annotated[bool, option("also show the accuracy of each class", "--per-class")] = False,
    as_json: AsJson = False,
    name: SourceModel = None,
    prefix: SourcePrefix = None,
) -> None:
    """Score models on evaluation sets.

    With --data one set, by zero-shot accuracy or retrieval. With --suite many, in one table; `compt eval fetch`
    downloads them. Several models are compared with the first. Runs in one process, or in every process that torchrun
    starts.
    """
    from compt.dist import collectives as dist
    from compt.engines.base import COMPUTE_DTYPES
    from compt.evaluate.suite import model_labels, score_suite
    from compt.evaluate.task import EvalSettings
    from compt.models.preprocess import Preprocess
    from compt.report.scores import SuiteReport

    if (data is None) == (suite is None):
        raise ConfigError("compt eval: name one of --data and --suite")
    of_one_set = {"--classnames": classnames, "--templates": templates, "--class-order": class_order, "--train": train}
    for flag, given in {**of_one_set, "--label": label != "cls", "--per-class": per_class}.items():
        if suite is not None and given:
            raise ConfigError(f"compt eval: {flag} goes with --data; the sets of a suite have their own")
    if data is not None:
        task = task or "zeroshot"
        _check_flags(task, {**of_one_set, "--label": label != "cls"}, per_class, len(models))
        sets = one_set(evaluation_set(data, task, label, classnames, templates, class_order, train))
    else:
        sets = load_suite(str(suite))
        sets = sets.with_task(task) if task else sets
    opened = {
        short: partial(open_source, model, name, prefix)
        for short, model in zip(model_labels(models), models, strict=True)
    }
    base, dtype = Path(root or sets.root).expanduser(), COMPUTE_DTYPES[precision]
    settings = EvalSettings(Preprocess(), base, batch, workers, dtype=dtype, max_bad_share=max_bad_share)
    title = "-".join(filter(None, (Path(suite).stem, task))) if suite else sets.sets[0].name
    report = SuiteReport(title, sets, base, {short: {} for short in opened}, published or [], suite or "")
    try:
        place = dist.init(device)
        if suite is None and len(models) == 1:
            only = next(iter(opened.values()))
            _one(only, sets.sets[0], settings, place, out, per_class, as_json)
            return
        if out is not None:
            dist.on_main(partial(report.check_folder, out))
        # A wrong path ends at once, not after the hours that the models before it take.
        for model in models:
            dist.on_all(partial(open_source, model, name, prefix, verify=False))
        progress = say if suite and dist.is_main() and not as_json else lambda _: None
        report.scores.update(score_suite(opened, sets, settings, place, out, progress))
        # One process writes and prints for all.
        if dist.is_main():
            if out is not None:
                report.write(out)
            if as_json:
                print_json(report.to_dict())
            else:
                show(*report.tables())
    finally:
        dist.shutdown()
    if report.faults:
        raise DataError(f"{len(report.faults)} scores are missing: {report.faults[0]}")


def _check_flags(task: str, given: dict[str, Any], per_class: bool, models: int) -> None:
    """Raise ConfigError for an option that would do nothing."""
    fields = {flag.removeprefix("--").replace("-", "_"): flag for flag, value in given.items() if value}
    for name, flag in fields.items():
        if text := unread_by(task, [name]):
            raise ConfigError(f"compt eval: {text.replace(name, flag, 1)}: see --task")
    if per_class and (models > 1 or task not in ONE_CLASS):
        raise ConfigError(f"compt eval: --per-class is for one model and the tasks {', '.join(ONE_CLASS)}")


def _one(
    opened: Callable[[], Artefact],
    item: EvalSet,
    settings: EvalSettings,
    place: torch.device,
    out: Path | None,
    per_class: bool,
    as_json: bool,
) -> None:
    """Score one model on one set, and show everything about it."""
    from compt.dist import collectives as dist
    from compt.evaluate.sets import evaluate_set, task_class
    from compt.evaluate.zeroshot import ZeroShotResult

    # Without on_all, ranks that can read the model would wait for one that cannot.
    found = dist.on_all(opened)
    result = evaluate_set(found.load_model(place), item, replace(settings, preprocess=found.preprocess))
    if not dist.is_main():
        return
    if out is not None:
        result.save(out)
    if as_json:
        print_json(result.to_dict())
        return
    kind, record = task_class(item.task), result.to_dict()
    rows = [*_scores(kind.rows(record), record), ("samples", f"{result.n:,}")]
    rows += [("left out", result.left_out or "0")]
    show(TextTable(f"{found.spec.name} on {item.name}: {kind.title.lower()}", ("", "value"), rows, [kind.note]))
    if per_class and isinstance(result, ZeroShotResult):
        shares = zip(result.names, result.per_class, strict=True)
        rows = [(label, "-" if share is None else f"{share:.1f}") for label, share in shares]
        show(TextTable("Top-1 of each class, percent", ("class", "top1"), rows))


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


def fetch(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE", help="YAML file, or a suite's name", show_default=False, autocompletion=complete_suite
        ),
    ],
    root: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="folder for the sets", show_default="the suite's")
    ] = None,
    train: Annotated[bool, option("also download training splits, for linear_probe and knn", "--train")] = False,
    revision: Annotated[str, option("branch, tag or commit of new downloads", metavar="NAME")] = "main",
) -> None:
    """Download a suite's sets from Hugging Face's hub.

    Downloads test shards, class names and templates, and compares each file with the hub's hash. The same command goes
    on with what is missing, at the commit of the first download.
    """
    from compt.data.hub import fetch_set

    sets = load_suite(suite)
    base = Path(root or sets.root).expanduser()
    failed: list[str] = []
    for item in sets.sets:
        if item.hub is None or item.folder is None:
            say(f"{item.name}: not from the hub")
            continue
        try:
            found = fetch_set(item.hub, base / item.folder, revision, train=train)
        except DataError as error:
            failed.append(f"{item.name}: {error}")
            say(f"{item.name}: {error}")
            continue
        say(f"{item.name}: {found.files} files, {found.bytes / 1e6:,.1f} MB, commit {found.commit[:12]}: {found.state}")
    if failed:
        named = "\n".join(f"  {line}" for line in failed)
        raise DataError(f"{len(failed)} sets were not downloaded; the same command goes on with them:\n{named}")
