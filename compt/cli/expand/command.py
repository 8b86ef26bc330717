"""`compt expand`: make a larger model from a smaller one, show where its weights come from, and verify it at step 0."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compt.cli.evaluate import Source, evaluation_set
from compt.cli.expand.request import ExpandRequest, Prepared, prepare
from compt.cli.expand.tables import plan_tables, summary_table, verification_tables
from compt.cli.options import (
    BatchSize,
    ClassNames,
    DeviceName,
    Label,
    Templates,
    Workers,
    option,
    print_json,
    progress_bar,
)
from compt.errors import ArtefactError, ConfigError
from compt.files import write_json
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.recipe.schema import EvalSet
from compt.text import TextTable, show, terminal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compt.evaluate.expansion import Verification
    from compt.evaluate.task import EvalSettings


def _choices(names: Iterable[str]) -> str:
    first, *others = names
    return ", ".join([f"{first} (default)", *others])


HELP = f"""Make a larger model from a smaller one.

This is the inverse weight initialization of the paper.

The pairs of --both, --image and --text are KEY=VALUE with commas between, as in width=lemon,depth=stack. \
Keys and values are those of the recipe's section `expand`; a tower's own pairs override those of --both:

- width: {_choices(WIDTH_OPERATORS)}

- depth: {_choices(DEPTH_OPERATORS)}

- zero_new_outputs: true if added layers start as the identity; default false

- noise (--both only): relative noise that makes copies different; default 0.1

- reference_compatible (--both only): fill the layers that the authors' code fills; default false

With --dry-run, or with --verify and no OUT, nothing is written. \
Under torchrun each process writes its share of the files. \
The exit code is 4 if the plan says that a tower keeps its features, and --verify finds that it does not."""

_HOW, _MODELS, _OUTPUT = "Expansion", "Models", "Output"


Pairs = Annotated[str, option("both towers", metavar="PAIRS", default="width=insert,depth=duplicate", panel=_HOW)]
Sizes = Annotated[
    list[str] | None,
    option("change the student: width=512, depths=2-2-8-2", "--set", metavar="FIELD=VALUE", panel=_MODELS),
]


def expand(
    teacher: Source,
    student: Annotated[
        str | None,
        typer.Argument(metavar="STUDENT", help="larger model: a preset, or a name of open_clip", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="folder to write", show_default=False)] = None,
    both: Pairs = "",
    image: Annotated[str, option("the image tower", metavar="PAIRS", default="as --both", panel=_HOW)] = "",
    text: Annotated[str, option("the text tower", metavar="PAIRS", default="as --both", panel=_HOW)] = "",
    seed: Annotated[int | None, option("seed of new weights", metavar="N", default="0", panel=_HOW)] = None,
    from_manifest: Annotated[
        Path | None,
        option("repeat the expansion recorded in this folder or manifest.json", metavar="FOLDER", panel=_HOW),
    ] = None,
    set_: Sizes = None,
    teacher_model: Annotated[
        str | None, option("architecture of MODEL, if its files have none", metavar="NAME", panel=_MODELS)
    ] = None,
    teacher_prefix: Annotated[
        str | None, option("prefix of the teacher's names, as in module.student.", metavar="P", panel=_MODELS)
    ] = None,
    shard_size: Annotated[
        str | None, option("largest file to write: 500MB, 2GiB", metavar="SIZE", default="5GB", panel=_OUTPUT)
    ] = None,
    dry_run: Annotated[bool, option("write nothing; show every parameter", "--dry-run", panel=_OUTPUT)] = False,
    as_json: Annotated[bool, option("print everything as JSON", "--json", panel=_OUTPUT)] = False,
    out_json: Annotated[Path | None, option("also write that JSON to a file", metavar="FILE", panel=_OUTPUT)] = None,
    verify: Annotated[
        list[str] | None,
        option("compare with the teacher on shards or class folders; repeatable", metavar="DATA", panel="Scoring"),
    ] = None,
    label: Label = "cls",
    classnames: ClassNames = None,
    templates: Templates = None,
    batch: BatchSize = 256,
    workers: Workers = 0,
    device: DeviceName = "auto",
) -> None:
    """Run `compt expand`; its help is `HELP`."""
    from compt.dist import collectives as dist
    from compt.evaluate.expansion import check_kept
    from compt.evaluate.sets import check_sets
    from compt.evaluate.task import EvalSettings

    options = {"both": both, "image": image, "text": text, "seed": seed, "shard-size": shard_size, "set": set_}
    source = (teacher_model, teacher_prefix)
    asked = ExpandRequest(teacher, student, out, options, *source, from_manifest, dry_run, bool(verify))
    scoring = {"--label": label != "cls", "--classnames": classnames, "--templates": templates}
    scoring |= {"--batch": batch != 256, "--workers": workers > 0, "--device": device != "auto"}
    for flag, given in scoring.items():
        if given and not verify:
            raise ConfigError(f"{flag}: needs --verify")
    if out_json is not None and out_json.is_dir():
        raise ConfigError(f"--out-json {out_json}: is a folder; name the file to write")
    item = evaluation_set(verify, "zeroshot", label, classnames, templates) if verify else None
    try:
        place = dist.init(device if verify else "cpu")
        prepared = dist.on_all(lambda: prepare(asked))
        settings = EvalSettings(prepared.teacher.preprocess, Path.cwd(), batch, workers)
        # Before the weights are written: a wrong data set must not end a command that took minutes.
        check_sets([item] if item else [], settings)
        if dist.is_main() and not as_json:
            tables = plan_tables(prepared.plan) if dry_run else ()
            _show(*tables, summary_table(prepared.plan, prepared.rounded_to, prepared.notes))
        if prepared.writes:
            _write(prepared)
            if dist.is_main() and not as_json:
                terminal().print(f"Wrote {prepared.out}\n", markup=False, soft_wrap=True)
        found = _verify(prepared, item, settings, place) if item else None
        if dist.is_main():
            if as_json:
                print_json(_record(prepared, found))
            elif found:
                _show(*verification_tables(found, prepared.plan))
            if out_json is not None:  # after all is shown, as this may fail
                write_json(out_json, _record(prepared, found))
        # Last, so that the tables which show a broken promise are printed.
        if found:
            dist.on_all(lambda: check_kept(found, prepared.plan.student.name))
    finally:
        dist.shutdown()


def _show(*tables: TextTable) -> None:
    for table in tables:
        show(table)
        terminal().print()


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


def _write(prepared: Prepared) -> None:
    from compt.dist import collectives as dist
    from compt.expand.execute import Mapped
    from compt.expand.execute import expand as run_expand
    from compt.weights.artefact import versions, write_artefact

    assert prepared.out is not None
    state: Mapping[str, Tensor] = run_expand(prepared.plan, prepared.teacher.state, prepared.seed, prepared.average)

    def same(made: str) -> None:
        if prepared.repeats not in (None, made):
            raise ArtefactError(
                f"{prepared.out}: not written, because its bytes would differ from those in the manifest, which was "
                f"made with {prepared.versions}; this is {versions()}"
            )

    # The bar counts the tensors of this rank; each rank writes about the same number.
    total, done = -(-len(state) // dist.world_size()), itertools.count(1)
    with progress_bar("writing") if dist.is_main() else contextlib.nullcontext() as progress:

        def counted(tensor: Tensor) -> Tensor:
            if progress:
                progress(next(done), total)
            return tensor

        write_artefact(
            prepared.out,
            Mapped(state, counted),
            prepared.plan.student,
            prepared.fields,
            max_shard_bytes=prepared.shard_bytes,
            together=dist.world_size() > 1,
            check=same,
            preprocess=prepared.preprocess,
        )


def _verify(prepared: Prepared, item: EvalSet, settings: EvalSettings, place: torch.device) -> Verification:
    from compt.dist import collectives as dist
    from compt.evaluate.expansion import verify
    from compt.weights.artefact import read_artefact

    out, status = prepared.out if prepared.writes else None, terminal(stderr=True)

    def say(text: str) -> None:
        if dist.is_main() and status.is_terminal:
            status.print(f"{prepared.plan.student.name}: {text} …", style="dim", markup=False)

    return verify(
        prepared.teacher,
        prepared.plan,
        prepared.seed,
        item,
        settings,
        student=dist.on_all(lambda: read_artefact(out)) if out is not None else None,
        average=prepared.average,
        device=place,
        say=say,
    )
