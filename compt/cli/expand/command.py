"""`compt expand`: a larger model from a smaller one, what is copied from where, and what it computes at step 0."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from compt.cli.expand.request import ExpandRequest, Prepared, prepare
from compt.cli.expand.tables import plan_tables, summary_table, verification_tables
from compt.cli.tools import evaluation_set, show
from compt.errors import ArtefactError
from compt.files import write_json
from compt.models.growth import DEPTH, WIDTH_OPERATORS
from compt.recipe.schema import EvalSet
from compt.text import TextTable, terminal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compt.evaluate.expansion import Verification

Operator = str | None

_HOW = "How it is expanded"
_MODELS = "Models"
_SCORE = "Verification"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


Width = Annotated[
    Operator, _option(_HOW, f"for widths: {', '.join(WIDTH_OPERATORS)}", metavar="OP", show_default="insert")
]
Depth = Annotated[Operator, _option(_HOW, f"for layers: {', '.join(DEPTH)}", metavar="OP", show_default="duplicate")]
Zero = Annotated[bool, _option(_HOW, "added layers start as the identity", "--zero-new-outputs")]
ImageWidth = Annotated[Operator, _option(_HOW, "--width, of the image tower alone", metavar="OP")]
ImageDepth = Annotated[Operator, _option(_HOW, "--depth, of the image tower alone", metavar="OP")]
ImageZero = Annotated[bool, _option(_HOW, "of the image tower alone", "--image-zero-new-outputs")]
TextWidth = Annotated[Operator, _option(_HOW, "--width, of the text tower alone", metavar="OP")]
TextDepth = Annotated[Operator, _option(_HOW, "--depth, of the text tower alone", metavar="OP")]
TextZero = Annotated[bool, _option(_HOW, "of the text tower alone", "--text-zero-new-outputs")]
Noise = Annotated[
    float | None, _option(_HOW, "share by which what reads copies differs", metavar="X", show_default="0.1")
]
Reference = Annotated[bool, _option(_HOW, "fill the layers the authors' code fills", "--reference-compatible")]
Seed = Annotated[int | None, _option(_HOW, "draws what is new", show_default="0")]
FromManifest = Annotated[Path | None, _option(_HOW, "again as a manifest.json says it was done", metavar="FILE")]
Sizes = Annotated[
    list[str] | None,
    _option(
        _MODELS,
        "change the student: width=512, no_ln_pre=true, depths=2-2-8-2; may be repeated",
        "--set",
        metavar="FIELD=VALUE",
    ),
]
TeacherModel = Annotated[str | None, _option(_MODELS, "what TEACHER is, where it does not say so", metavar="NAME")]
TeacherPrefix = Annotated[str | None, _option(_MODELS, "of its parameters' names, as module.student.", metavar="P")]
Verify = Annotated[
    list[str] | None,
    _option(
        _SCORE,
        "score teacher, student and a random student on shards, or a folder of class folders; may be repeated",
        metavar="DATA",
    ),
]
Label = Annotated[str, _option(_SCORE, "as in compt eval")]
ClassNames = Annotated[Path | None, _option(_SCORE, "as in compt eval")]
Templates = Annotated[Path | None, _option(_SCORE, "as in compt eval")]
Batch = Annotated[int, _option(_SCORE, "images a step, and of a loss", min=1)]
Workers = Annotated[int, _option(_SCORE, "processes that decode", min=0)]
Device = Annotated[str, _option(_SCORE, "auto, cpu or cuda")]


def expand(
    teacher: Annotated[
        str, typer.Argument(help="a model: folder, file, checkpoint, or ARCH:TAG of open_clip's", show_default=False)
    ],
    student: Annotated[
        str | None, typer.Argument(help="the larger model: a preset, or a name of open_clip's", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="the folder to write", show_default=False)] = None,
    width: Width = None,
    depth: Depth = None,
    zero: Zero = False,
    image_width: ImageWidth = None,
    image_depth: ImageDepth = None,
    image_zero: ImageZero = False,
    text_width: TextWidth = None,
    text_depth: TextDepth = None,
    text_zero: TextZero = False,
    noise: Noise = None,
    reference_compatible: Reference = False,
    seed: Seed = None,
    from_manifest: FromManifest = None,
    set_: Sizes = None,
    teacher_model: TeacherModel = None,
    teacher_prefix: TeacherPrefix = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="largest file to write: 500MB, 2GiB", show_default="5GB")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write nothing; show every parameter")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    out_json: Annotated[Path | None, typer.Option(metavar="FILE", help="also write that JSON to a file")] = None,
    verify: Verify = None,
    label: Label = "cls",
    classnames: ClassNames = None,
    templates: Templates = None,
    batch: Batch = 256,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """Inverse weight initialization: make a larger model from a smaller one.

    Runs alone, or on every process that torchrun starts: each writes its share of the files.

    With --dry-run, or with --verify and no OUT, nothing is written.

    The exit code is 4 where a tower does not compute what the plan promises.
    """
    options = {
        "width": width,
        "depth": depth,
        "zero-new-outputs": zero or None,
        "image-width": image_width,
        "image-depth": image_depth,
        "image-zero-new-outputs": image_zero or None,
        "text-width": text_width,
        "text-depth": text_depth,
        "text-zero-new-outputs": text_zero or None,
        "noise": noise,
        "reference-compatible": reference_compatible or None,
        "seed": seed,
        "shard-size": shard_size,
    }
    models = (teacher_model, teacher_prefix)
    asked = ExpandRequest(teacher, student, out, options, set_ or [], *models, from_manifest, dry_run, bool(verify))
    score = None
    if verify:
        score = _Verify(evaluation_set(verify, "zeroshot", label, classnames, templates), batch, workers, device)
    _run(asked, score, _Output(dry_run, as_json, out_json))


@dataclass(frozen=True)
class _Verify:
    """The options of --verify."""

    item: EvalSet
    batch: int
    workers: int
    device: str


@dataclass(frozen=True)
class _Output:
    """How the result is shown."""

    every_parameter: bool
    as_json: bool
    file: Path | None


def _run(asked: ExpandRequest, score: _Verify | None, output: _Output) -> None:
    from compt.dist import collectives as dist

    try:
        place = dist.init(score.device if score else "cpu")
        prepared = dist.on_all(lambda: prepare(asked))
        if score:
            _check_data(prepared, score)
        if dist.is_main() and not output.as_json:
            tables = plan_tables(prepared.plan) if output.every_parameter else ()
            _show(*tables, summary_table(prepared.plan, prepared.rounded_to, prepared.notes))
        if prepared.writes:
            _write(prepared)
            if dist.is_main() and not output.as_json:
                terminal().print(f"Wrote {prepared.out}\n", markup=False, soft_wrap=True)
        found = _verified(prepared, score, place) if score else None
        if dist.is_main():
            _show_result(prepared, found, output)
        if found:
            from compt.evaluate.expansion import check_kept

            dist.on_all(lambda: check_kept(found, prepared.plan.student.name))
    finally:
        dist.shutdown()


def _record(prepared: Prepared, found: Verification | None) -> dict[str, Any]:
    return {
        **prepared.plan.table_json(),
        "seed": prepared.seed,
        "parent_hash": prepared.teacher.hash,
        "taken_over": prepared.taken,
        "left_out": prepared.teacher.manifest.get("left_out", []),
        "out": str(prepared.out) if prepared.writes else None,
        "verification": found.to_dict() if found else None,
    }


def _show_result(prepared: Prepared, found: Verification | None, output: _Output) -> None:
    if output.file is not None:
        write_json(output.file, _record(prepared, found))
    if output.as_json:
        typer.echo(json.dumps(_record(prepared, found), indent=2))
    elif found:
        names = {
            "teacher": f"teacher {prepared.plan.teacher.name}",
            "student": f"expanded {prepared.plan.student.name}",
            "random": f"random {prepared.plan.student.name}",
        }
        _show(*verification_tables(found, names))


def _show(*tables: TextTable) -> None:
    for table in tables:
        show(table)
        terminal().print()


def _write(prepared: Prepared) -> None:
    from compt.dist import collectives as dist
    from compt.expand.execute import expand as run_expand
    from compt.weights.artefact import versions, write_artefact

    assert prepared.out is not None
    state: Mapping[str, Tensor] = run_expand(prepared.plan, prepared.teacher.state, prepared.seed, prepared.average)

    def same(made: str) -> None:
        if prepared.repeats not in (None, made):
            raise ArtefactError(
                f"{prepared.out}: is not written: it would not hold the bytes that the manifest describes; that was "
                f"made with {prepared.versions}, this is {versions()}"
            )

    with _progress(prepared) as count:
        write_artefact(
            prepared.out,
            _Counted(state, count),
            prepared.plan.student,
            prepared.fields,
            max_shard_bytes=prepared.shard_bytes,
            together=dist.world_size() > 1,
            check=same,
            **prepared.preprocess,
        )


def _check_data(prepared: Prepared, score: _Verify) -> None:
    from compt.evaluate.sets import check_sets

    check_sets([score.item], _settings(prepared, score))


def _settings(prepared: Prepared, score: _Verify) -> Any:
    from compt.evaluate.task import EvalSettings

    pixels = prepared.teacher.preprocess
    return EvalSettings(pixels["mean"], pixels["std"], Path.cwd(), score.batch, score.workers)


def _verified(prepared: Prepared, score: _Verify, device: torch.device) -> Verification:
    from compt.dist import collectives as dist
    from compt.evaluate.expansion import verify
    from compt.weights.artefact import read_artefact

    out = prepared.out if prepared.writes else None
    written = dist.on_all(lambda: read_artefact(out)) if out is not None else None
    status = terminal(stderr=True)

    def say(text: str) -> None:
        if dist.is_main() and status.is_terminal:
            status.print(f"{prepared.plan.student.name}: {text} …", style="dim", markup=False)

    return verify(
        prepared.teacher,
        prepared.plan,
        prepared.seed,
        score.item,
        _settings(prepared, score),
        student=written,
        average=prepared.average,
        device=device,
        say=say,
    )


@dataclass(frozen=True)
class _Counted(Mapping[str, "Tensor"]):
    """A state that says how many bytes were read from it."""

    state: Mapping[str, Tensor]
    count: Callable[[int], None]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.state[name]
        self.count(tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@contextlib.contextmanager
def _progress(prepared: Prepared) -> Iterator[Callable[[int], None]]:
    """A bar of this rank's bytes, on the first rank's terminal alone."""
    from compt.dist import collectives as dist

    if not (dist.is_main() and sys.stderr.isatty()):
        yield lambda size: None
        return
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    element = prepared.teacher.state["ln_final.weight"].element_size()
    total = prepared.plan.parameters * element // dist.world_size()
    with Progress(*columns, console=terminal(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda size: progress.advance(task, size)
