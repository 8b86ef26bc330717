"""`compt bench …`: the training speed of this machine, and the GPU-hours of a recipe."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from compt.cli.options import (
    RECIPE,
    AsJson,
    CaptionLengths,
    DeviceName,
    Gpus,
    Kind,
    MachineOptions,
    ModeName,
    Overrides,
    RecipePath,
    ThroughputFile,
    one_of,
    option,
    print_json,
    read_tokens,
)
from compt.cli.plan.tables import unmeasured
from compt.cost.counts import Tokens
from compt.cost.published import PAPER_TEXT_PASSES
from compt.cost.speed import OF_THE_AUTHORS, Measurement, Throughput, fitted
from compt.cost.training import Mode
from compt.errors import ConfigError, nearest
from compt.models.presets import PRESETS, ModelSpec, resolve
from compt.plan.forecast import check_shares, default_gpus
from compt.plan.hours import Hours, HoursRow, family_hours, published_rows
from compt.plan.jobs import Job, make_plan
from compt.recipe.engine import ENGINE_NAMES, EngineConfig, changed_engine
from compt.recipe.read import load_recipe
from compt.recipe.schema import Recipe
from compt.recipe.types import first_mistake
from compt.text import TextTable, hours, say, show

if TYPE_CHECKING:
    from compt.bench.step import Setup

Precision = Literal["fp32", "bf16", "fp16"]

CHAINS = (
    ("vit_pico", "vit_nano", "vit_micro", "vit_mini", "vit_midi", "vit_maxi"),
    ("vit_t16", "vit_c16", "vit_s16", "vit_m16", "vit_b16", "vit_xb16", "vit_l16"),
    ("swin_t", "swin_s", "swin_b", "swin_l"),
    ("swin_b384", "swin_l384"),
)
"""Chains of presets: each model is measured with the one before it as its teacher."""
TEXT_BUCKETS = 4
"""As in the recipes of the paper's chains."""
MOST = {"cuda": 8192, "cpu": 256}
"""Largest batch that is tried, by type of device."""


@dataclass(frozen=True)
class _Jobs:
    """Pairs of a model and its teacher (None for the first of a chain); with a recipe, its links in the same order."""

    pairs: list[tuple[ModelSpec, ModelSpec | None]]
    recipe: Recipe | None = None
    links: tuple[Job, ...] = ()


def _jobs(models: list[str], family: Path | None) -> _Jobs:
    """The jobs to measure, in the order of their chains. Raises ConfigError for an unknown model."""
    if family is not None:
        from compt.data.lengths import with_data

        recipe = with_data(load_recipe(family), Path())[0]
        plan = make_plan(recipe, source=str(family))
        names = [job.spec.name for job in plan.links]
        for name in models:
            if name not in names:
                raise ConfigError(f"{family}: no link '{name}'{nearest(name, names)}; its chain has {', '.join(names)}")
        links = tuple(job for job in plan.links if not models or job.spec.name in models)
        return _Jobs([(job.spec, job.active_teacher) for job in links], recipe, links)
    for name in models:
        resolve(name)
    chains = [zip(chain, (None, *chain[:-1]), strict=True) for chain in CHAINS]
    return _Jobs(
        [
            (PRESETS[name], PRESETS[teacher] if teacher else None)
            for chain in chains
            for name, teacher in chain
            if not models or name in models
        ]
    )


def _captions(text: str | None, recipe: Recipe | None) -> list[int]:
    """Captions an image. By default the recipe's number, or the paper's, and the number that its MACs imply."""
    if text is None:
        return sorted({recipe.data.captions if recipe else 4, PAPER_TEXT_PASSES})
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != len(text.split(",")) or min(numbers) < 1:
        raise ConfigError(f"--captions {text}: should be numbers from 1, as in 4,6")
    return numbers


def _batch(text: str | None, gpus: int | None, jobs: _Jobs, source: str, device: str) -> int | None:
    """Images of a step, None for the most that fit; by default a GPU's share of the recipe's batch.

    `device` is the type of this device. The default is one CPU.
    """
    if gpus is not None and (jobs.recipe is None or text is not None):
        raise ConfigError(f"--gpus {gpus}: needs --family, and does not go with --batch")
    if text is None and jobs.recipe is not None:
        batch = jobs.recipe.optimizer.batch
        number = MachineOptions(None, gpus, None).number(
            jobs.recipe, source, default_gpus(batch) if device == "cuda" else 1
        )
        check_shares(jobs.recipe, number, source)
        return batch // number
    if text is None or text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batch {text}: should be auto or a number from 1")
    return int(text)


def _setups(
    jobs: _Jobs, captions: list[int], tokens: Tokens, precision: str | None, engine: dict[str, Any], seed: int
) -> list[Setup]:
    """Each model alone and, in a chain, with its teacher; for each number of captions.

    `engine` has what the command line says, as far as it is set.
    """
    from compt.bench.step import Setup

    if jobs.recipe is None:
        common = EngineConfig(text_buckets=TEXT_BUCKETS)
        plain = [Setup(student=spec, teacher=teacher, engine=common) for spec, teacher in jobs.pairs]
    else:
        plain = [Setup.of_job(job, jobs.recipe, Path.cwd()) for job in jobs.links]
    changes = {key: value for key, value in engine.items() if value} | {"async_checkpoints": False}  # nothing is saved
    setups = []
    for setup in plain:
        config = _changed(setup, changes)
        if config.fsdp2.replicas > 1:  # this device alone is one group
            config = changed_engine(config, {"fsdp2": {"replicas": 1}})
        optimizer = setup.optimizer.model_copy(update={"precision": precision} if precision else {})
        given = replace(setup, optimizer=optimizer, engine=config, tokens=tokens, seed=seed)
        for teacher in (None, setup.teacher) if setup.teacher else (None,):
            setups += [replace(given, teacher=teacher, captions=number) for number in captions]
    return setups


def _changed(setup: Setup, changes: dict[str, Any]) -> EngineConfig:
    """The engine of `setup` with what the command line says. Raises ConfigError where that does not fit together."""
    try:
        return changed_engine(setup.engine, changes)
    except ValidationError as error:
        options = {"name": f"--engine {changes.get('name')}", "compile": "--compile", "recompute": "--recompute"}
        given = " ".join(words for key, words in options.items() if key in changes)
        mistake = first_mistake(error)
        raise ConfigError(f"{given}: does not go with the recipe's engine of {setup.student.name}: {mistake}") from None


def throughput(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODELS", help="presets, or links of --family", show_default="all"),
    ] = None,
    family: Annotated[Path | None, option("recipe whose jobs are measured, as it trains them", **RECIPE)] = None,
    captions: Annotated[
        str | None, option("captions per image", metavar="N,...", default="4 or the recipe's, and 6")
    ] = None,
    tokens: CaptionLengths = None,
    batch: Annotated[
        str | None,
        option("images per step; auto: the most that fit", metavar="N|auto", default="auto; with --family a share"),
    ] = None,
    gpus: Annotated[
        int | None, option("GPUs that share the batch of --family", metavar="N", default="as in plan")
    ] = None,
    max_batch: Annotated[
        int | None, option("largest batch to try", metavar="N", default="8192, on a CPU 256", min=1)
    ] = None,
    precision: Annotated[Precision | None, option("number format", default="bf16 or the recipe's")] = None,
    device: DeviceName = "auto",
    seconds: Annotated[float, option("time for each job, at least three steps", metavar="S", min=0)] = 2.0,
    engine: Annotated[str | None, one_of(ENGINE_NAMES, "engine", default="ddp or the recipe's")] = None,
    compile_: Annotated[bool, option("compile the blocks with torch.compile", "--compile")] = False,
    recompute: Annotated[bool, option("recompute blocks in the backward pass", "--recompute")] = False,
    seed: Annotated[int, option("seed of weights, images and captions", metavar="N")] = 0,
    out: Annotated[Path, option("file of results, which a rerun continues", metavar="FILE")] = Path("throughput.json"),
    fresh: Annotated[bool, option("delete earlier results", "--fresh")] = False,
) -> None:
    """Time the training steps of models on this device.

    Times each model alone and as a link of a chain, with the forward pass of its teacher, on random images and
    captions. Writes each result at once. A model that does not fit into memory is recorded as such. MFU is the share
    of the dense peak of the device, if known, at two FLOPs per MAC.
    """
    # Wrong arguments end the command here, before torch loads, which takes seconds.
    jobs = _jobs(models or [], family)
    numbers = _captions(captions, jobs.recipe)
    own = jobs.recipe.data.caption_tokens if jobs.recipe else None
    lengths = own if tokens is None else read_tokens(tokens)

    from compt.bench.throughput import run
    from compt.dist import collectives as dist

    chosen = dist.init(device)
    if dist.world_size() > 1:
        raise ConfigError("compt bench throughput measures one device: start it without torchrun")
    size = _batch(batch, gpus, jobs, str(family), chosen.type)
    how = {"name": engine, "compile": compile_, "recompute": recompute}
    setups = _setups(jobs, numbers, lengths, precision or (None if jobs.recipe else "bf16"), how, seed)
    shown: list[Measurement] = []

    def tell(entry: Measurement, kept: bool) -> None:
        line = ", ".join(filter(None, [*_words(entry), "from an earlier run" if kept else ""]))
        say(f"{len(shown) + 1}/{len(setups)} {line}")
        shown.append(entry)

    command = shlex.join(["compt", *sys.argv[1:]])
    most = max_batch or MOST[chosen.type]
    made = run(setups, chosen, out, command=command, batch=size, most=most, seconds=seconds, fresh=fresh, show=tell)
    show(_throughput_table(made, shown, size is None, most))
    say(f"\nWrote {out}")


def profile(
    recipe: RecipePath,
    link: Annotated[int, option("link of the chain, from 1", metavar="N", min=1)] = 1,
    batch: Annotated[
        int | None, option("images per step", metavar="N", default="16, on a GPU its share", min=1)
    ] = None,
    device: DeviceName = "auto",
    out: Annotated[Path, option("Chrome trace to write", metavar="FILE")] = Path("trace.json"),
    set_: Overrides = None,
) -> None:
    """Show what a training step spends its time on, and write a trace.

    Runs the steps of a link with its teacher in one process, on random images and captions. Counts the kernels of each
    part of a step. With --device cuda and no GPU, only counts them, as a GPU would launch them. Open the trace in
    https://ui.perfetto.dev or chrome://tracing.
    """
    loaded = load_recipe(recipe, set_)
    links = make_plan(loaded, source=str(recipe)).links
    if link > len(links):
        raise ConfigError(f"--link {link}: the chain of {recipe} has {len(links)} links")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name the file to write")
    # torch's tracer would print an error where there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")

    import torch

    from compt.bench import launches
    from compt.bench import profile as profiling
    from compt.bench.step import Setup
    from compt.dist import collectives as dist

    setup = Setup.of_job(links[link - 1], loaded, Path.cwd())
    counted = device == "cuda" and not torch.cuda.is_available()
    chosen = torch.device("cuda", 0) if counted else dist.init(device)
    share = loaded.optimizer.batch // default_gpus(loaded.optimizer.batch) if chosen.type == "cuda" else 16
    images = batch or share
    seen = launches.count(setup, min(images, 16), chosen)
    found = None if counted else profiling.profile(setup, images, chosen, out)
    teacher = f" with {setup.teacher.name}" if setup.teacher else ""
    title = f"A step of {setup.student.name}{teacher}, {images} images, {setup.optimizer.precision}, on {chosen.type}"
    notes = [
        "Launches: of the engine ddp without compilation, in one piece. Attention is one where a kernel computes it."
    ]
    show(*profiling.tables_of(title, seen, found, notes))
    if found is not None:
        say(f"\nWrote {out}")


def _words(entry: Measurement) -> list[str]:
    with_teacher = f" with {entry.teacher.name}" if entry.teacher else ""
    cells = [f"{entry.student.name}{with_teacher}", f"{entry.captions} captions of {entry.tokens:.3g}", _how(entry)]
    if entry.seconds_per_sample is None:
        return [*cells, str(entry.failure)]
    return [*cells, f"batch {entry.batch}", f"{1 / entry.seconds_per_sample:,.4g} samples/s"]


def _how(entry: Measurement) -> str:
    """Settings of a job that differ from the defaults, in words."""
    ways: list[str] = [entry.engine if entry.engine != "ddp" else ""]
    ways += [f"compiled {entry.compile}" if entry.compile != "off" else "", "recomputed" if entry.recompute else ""]
    ways += [f"{key} {value}" for key, value in entry.settings.items()]
    return " ".join(filter(None, ways))


def _throughput_table(made: Throughput, entries: list[Measurement], searched: bool, most: int) -> TextTable:
    from compt.bench.throughput import CPU_STEP_SECONDS

    rows = []
    for entry in entries:
        teacher = entry.teacher.name if entry.teacher else "-"
        cells = [f"{entry.student.name} {_how(entry)}".strip(), teacher, str(entry.captions), f"{entry.tokens:.3g}"]
        if entry.seconds_per_sample is None or entry.low is None or entry.high is None:
            rows.append([*cells, "-", str(entry.failure), "-", "-", "-"])
            continue
        memory, mfu = entry.peak_memory_bytes, entry.mfu
        span = f"{1 / entry.high:,.3g}-{1 / entry.low:,.3g}"
        cells += [str(entry.batch), f"{1 / entry.seconds_per_sample:,.4g}", span]
        rows.append(
            [*cells, "-" if memory is None else f"{memory / 2**30:.2f}", "-" if mfu is None else f"{100 * mfu:.1f} %"]
        )
    notes = ["Measured. Samples/s: median, and slowest to fastest step, with the forward pass of the teacher."]
    if searched:
        limit = "fit" if made.threads is None else f"fit and take no more than {CPU_STEP_SECONDS:g} s per step"
        notes.append(f"Batches are the largest that {limit}, {most} at most.")
    if made.kind is None:
        notes.append("No MFU: the peak of this device is not known.")
    if made.threads is not None:  # a CPU; on a GPU it is torch's peak
        notes.append("GiB is what the process grew by.")
    title = f"Throughput of {made.device}, {made.precision}"
    header = ["Model", "Teacher", "Captions", "Tokens", "Batch", "Samples/s", "Range", "GiB", "MFU"]
    return TextTable(title, header, rows, notes, left=2)


def gpu_hours(
    recipe: RecipePath,
    throughput: ThroughputFile = None,
    kind: Kind = None,
    gpus: Gpus = None,
    mode: ModeName = "exact",
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show the GPU-hours of a chain, and of its baselines.

    Has the form of Table 2 of the paper. GPU-hours are measured if FILE has them, else projected (docs/hardware.md).
    For a device whose peak is not known nothing is projected, and --gpus is 1 by default.
    """
    from compt.data.lengths import with_data

    loaded, asked = with_data(load_recipe(recipe, set_), Path())[0], MachineOptions(kind, gpus, throughput)
    device, file = asked.device()
    number = asked.number(loaded, str(recipe), default_gpus(loaded.optimizer.batch) if device else 1)
    check_shares(loaded, number, str(recipe))
    plan = make_plan(loaded, source=str(recipe), world_size=number)
    rows, paper = family_hours(plan, mode, device, file, number), published_rows(plan)
    title = device.title if device else str(file and file.device)
    if as_json:
        made = {
            "recipe": plan.recipe.name,
            "mode": mode,
            "device": title,
            "kind": device.name if device else None,
            "throughput": str(throughput) if throughput else None,
            "gpus": number,
            "rows": [row.to_json() for row in rows],
            "paper": paper,
        }
        print_json(made)
        return
    own = _hours_table(rows, f"GPU-hours of {plan.recipe.name} on {title}, mode '{mode}'")
    so_far = _so_far_table(rows, number, _hours_notes(rows, loaded, mode, number, file))
    show(own, so_far, *([_published_table(paper)] if paper else []))


def _pair(row: HoursRow, baseline: list[str], chain: list[str]) -> list[list[str]]:
    """The rows of one model: its baseline, if the recipe has one, and as a link of the chain."""
    if row.individual_epochs is None:
        return [[row.model, "chain", *chain]]
    return [[row.model, "baseline", *baseline], ["", "chain", *chain]]


def _cells(value: Hours | None, speedup: float | None = None) -> list[str]:
    """GPU-hours, their range, the acceleration, and what they rest on."""
    if value is None:
        return ["not measured", "-", "-", "-"]
    low, high = hours(value.low).split(" "), hours(value.high).split(" ")
    span = f"{low[0]}-{high[0]}" if low[1] == high[1] else f"{' '.join(low)} - {' '.join(high)}"
    kind = "part projected" if value.kind == "measured and projected" else value.kind
    return [hours(value.gpu_hours), span, "" if speedup is None else f"{speedup:.2f}x", kind]


_HOURS = ("GPU-hours", "Range", "Speed-up", "Basis")


def _hours_table(rows: list[HoursRow], title: str) -> TextTable:
    body = []
    for row in rows:
        baseline = [f"{row.individual_epochs or 0:.3g}", *_cells(row.individual)]
        body += _pair(row, baseline, [f"{row.epochs:.3g}", *_cells(row.chain, row.speedup)])
    notes = ["Projected: by the model of docs/hardware.md. Baseline: trained from scratch, without a chain."]
    return TextTable(title, ["Model", "Trained", "Epochs", *_HOURS], body, notes, left=2)


def _so_far_table(rows: list[HoursRow], gpus: int, notes: list[str]) -> TextTable:
    """Sums over all models up to each."""
    body, several = [], gpus > 1
    for row in rows:
        total = row.chain_accumulated
        chain = [*_cells(total, row.accumulated_speedup), *[hours(total.wall_hours if total else None)] * several]
        body += _pair(row, [*_cells(row.individual_accumulated), *[""] * several], chain)
    header = ["Model", "Trained", *_HOURS, *[f"On {gpus} GPUs"] * several]
    wall = f"On {gpus} GPUs: wall time of the chain so far, without any waiting for ranks or data."
    return TextTable("Up to each model", header, body, [*[wall] * several, *notes], left=2)


def _hours_notes(rows: list[HoursRow], recipe: Recipe, mode: Mode, gpus: int, file: Throughput | None) -> list[str]:
    """Where the hours come from, and what was not measured."""
    jobs: list[tuple[str, Hours | None]] = [(row.model, row.chain) for row in rows]
    if rows[0].individual_epochs is not None:
        jobs += [(f"{row.model} alone", row.individual) for row in rows]
    known = [hours for _, hours in jobs if hours is not None]
    sources = dict.fromkeys(source for hours in known for source in hours.sources)
    notes = [f"Hours are {'; '.join(sources)}."] if sources else []
    if any(hours.kind == "projected" for hours in known):
        notes.append(OF_THE_AUTHORS)
    missing = {name: name.removesuffix(" alone") for name, hours in jobs if hours is None or hours.kind == "projected"}
    if file is not None and missing:
        notes.append(unmeasured(file, recipe, gpus, missing, mode))
    if len(known) < len(jobs):
        notes.append("Nothing is projected, as the peak of this device is not known: measure with --family RECIPE.")
    return notes


def _published_table(rows: list[dict[str, Any]]) -> TextTable:
    body = []
    for row in rows:
        for way, trained in (("individual", "baseline"), ("chain", "chain")):
            own = [row["model"] if trained == "baseline" else "", trained, f"{row[f'{way}_hours']:,.0f} h"]
            own += [f"{100 * row[f'{way}_utilisation']:.1f} %", f"{100 * row[f'{way}_error']:+.1f} %"]
            total = f"{row[f'{way}_accumulated_hours']:,.0f} h"
            speedups = (
                ["", ""] if trained == "baseline" else [f"{row['speedup']:.2f}x", f"{row['accumulated_speedup']:.2f}x"]
            )
            body.append([*own, speedups[0], total, speedups[1]])
    header = ["Model", "Trained", "GPU-hours", "Use", "Error", "Speed-up", "So far", "Speed-up"]
    model = fitted()
    notes = [
        "Use: the published MACs in the published hours, as a share of an A100's dense bf16 peak.",
        (
            "Error: projected over published hours, less 1. Projection: seconds per sample = FLOPs / "
            f"({100 * model.efficiency:.1f} % of the peak) + channels x {model.bytes_per_channel:.0f} bytes / "
            f"bandwidth + {1e3 * model.fixed_seconds:.3f} ms; a row left out of its fit is off by at most "
            f"{100 * model.error:.1f} %."
        ),
    ]
    return TextTable("The paper's A100 hours (Table 2)", header, body, notes, left=2)
