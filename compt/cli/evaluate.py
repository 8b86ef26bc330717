"""`compt eval`, and how a model is named on the command line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
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
from compt.errors import ConfigError, DataError, RunError
from compt.recipe.read import shipped
from compt.recipe.schema import EVALUATION_TASKS, MAX_BAD_SHARE, ONE_CLASS, EvalSet, unread_by
from compt.recipe.suite import load_suite, name_of, one_set
from compt.text import TextTable, say, show

if TYPE_CHECKING:
    from compt.evaluate.task import ScoreRow
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
    return [name for name in shipped("suites") if name.startswith(incomplete)]


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

    With --data one set, in the way that --task names. With --suite many, in one table; `compt eval fetch`
    downloads them. Several models are compared with the first. Runs in one process, or in every process that torchrun
    starts.
    """
    from compt.dist import collectives as dist
    from compt.engines.base import COMPUTE_DTYPES
    from compt.evaluate.sets import open_set
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
    quiet: list[str] = []
    try:
        place = dist.init(device)
        # A wrong path ends at once, not after the hours that the models before it take.
        specs = [dist.on_all(partial(open_source, model, name, prefix, verify=False)).spec for model in models]
        if data is not None:
            open_set(sets.sets[0], settings, together=True)
        if out is not None:
            dist.on_main(partial(report.check_folder, out))
        progress = say if suite and dist.is_main() and not as_json else quiet.append
        report.scores.update(score_suite(opened, sets, settings, place, out, progress))
        alone = data is not None and len(models) == 1
        one = report.scores[report.models[0]][sets.sets[0].name] if alone else None
        if one is not None and one.fault:
            raise one.fault
        # One process writes and prints for all. It prints first, as it may turn out that it cannot write.
        if dist.is_main():
            if as_json:
                print_json(one.record if one else report.to_dict())
            else:
                show(*(_tables(specs[0].name, sets.sets[0], one.record, per_class) if one else report.tables()))
            if out is not None:
                report.write(out)
    except RunError:
        # Scores that cannot be written are not lost.
        for line in quiet if dist.is_main() else ():
            say(line)
        raise
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


def _tables(model: str, item: EvalSet, record: Mapping[str, Any], per_class: bool) -> Iterator[TextTable]:
    """Everything about the scores of one model on one set."""
    from compt.data.account import Account
    from compt.evaluate.sets import task_class

    kind = task_class(item.task)
    rows = [*_scores(kind.rows(record), record), ("samples", f"{record['n']:,}")]
    rows += [("left out", Account(unused=Counter(record["skipped"])).line() or "0")]
    yield TextTable(f"{model} on {item.name}: {kind.title.lower()}", ("", "value"), rows, [kind.note])
    if per_class:
        names = record.get("classnames") or map(str, range(record["classes"]))
        shares = zip(names, record["per_class"], strict=True)
        rows = [(label, "-" if share is None else f"{share:.1f}") for label, share in shares]
        yield TextTable("Top-1 of each class, percent", ("class", "top1"), rows)


def _scores(lines: list[ScoreRow], record: Mapping[str, Any]) -> list[tuple[str, str]]:
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
