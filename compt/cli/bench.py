"""`compt bench …`: how fast this machine trains, and what a recipe takes in GPU-hours."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from compt.cli.options import Gpus, Kind, MachineOptions, Overrides, RecipePath, ThroughputFile, read_tokens
from compt.cli.plan.tables import unmeasured
from compt.cli.tools import show
from compt.cost.counts import Tokens
from compt.cost.published import PAPER_TEXT_PASSES
from compt.cost.speed import OF_THE_AUTHORS, Measurement, Throughput, fitted
from compt.cost.training import Mode
from compt.errors import ConfigError, nearest
from compt.models.presets import PRESETS, ModelSpec, resolve
from compt.plan.forecast import check_shares, default_gpus
from compt.plan.hours import Hours, HoursRow, PublishedRow, family_hours, published_rows
from compt.plan.jobs import Job, make_plan
from compt.recipe.engine import ENGINES, EngineConfig, changed_engine
from compt.recipe.read import load_recipe
from compt.recipe.schema import Recipe
from compt.text import TextTable, hours, ratio, terminal

if TYPE_CHECKING:
    from compt.bench.step import Setup

bench_app = typer.Typer(
    help="Measure how fast this machine trains, and turn speeds into GPU-hours.", no_args_is_help=True
)

CHAINS = (
    ("vit_pico", "vit_nano", "vit_micro", "vit_mini", "vit_midi", "vit_maxi"),
    ("vit_t16", "vit_c16", "vit_s16", "vit_m16", "vit_b16", "vit_xb16", "vit_l16"),
    ("swin_t", "swin_s", "swin_b", "swin_l"),
    ("swin_b384", "swin_l384"),
)
"""Chains that presets are measured in without a recipe: each model's teacher is the one before it."""
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
    """The jobs asked for, in the order of their chains. Raises ConfigError for an unknown model."""
    if family is not None:
        recipe = load_recipe(family, [])
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
    """Without a wish: the recipe's number (or the paper's text's), and what the published MACs imply."""
    if text is None:
        return sorted({recipe.data.captions if recipe else 4, PAPER_TEXT_PASSES})
    numbers = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if len(numbers) != len(text.split(",")) or min(numbers) < 1:
        raise ConfigError(f"--captions {text}: should be numbers from 1, as in 4,6")
    return numbers


def _tokens(text: str | None, recipe: Recipe | None) -> Tokens:
    if text is None:
        return recipe.data.caption_tokens if recipe else None
    return read_tokens(text)


def _batch(text: str | None, gpus: int | None, jobs: _Jobs, source: str, device: str) -> int | None:
    """Samples a step, None for the most that fit; without a wish a GPU's share of the recipe's batch.

    `device` is the type of that at hand: of CPUs only one is meant, unless `gpus` are given.
    """
    if gpus is not None and (jobs.recipe is None or text is not None):
        raise ConfigError(f"--gpus {gpus}: says what the batch of --family is shared by, without --batch")
    if text is None and jobs.recipe is not None:
        batch = jobs.recipe.optimizer.batch
        number = MachineOptions(None, gpus, None).number(
            jobs.recipe, source, default_gpus(batch) if device == "cuda" else 1
        )
        check_shares(jobs.recipe, number, source)
        return batch // number
    if text is None or text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--batch {text}: should be auto or a number from 1")
    return int(text)


def _precision(text: str | None, recipe: Recipe | None) -> Any:
    from compt.engines.base import COMPUTE_DTYPES

    name = text or (recipe.optimizer.precision if recipe else "bf16")
    if name not in COMPUTE_DTYPES:
        raise ConfigError(f"--precision {name}{nearest(name, COMPUTE_DTYPES)}: should be {', '.join(COMPUTE_DTYPES)}")
    return name


def _engine(text: str | None) -> str | None:
    if text is not None and text not in ENGINES:
        raise ConfigError(f"--engine {text}{nearest(text, ENGINES)}: should be {', '.join(ENGINES)}")
    return text


def _setups(
    jobs: _Jobs,
    captions: list[int],
    *,
    tokens: Tokens,
    precision: Any = None,
    engine: str | None = None,
    compile: bool = False,
    recompute: bool = False,
    seed: int = 0,
) -> list[Setup]:
    """Each model alone and, in a chain, with its teacher; for each number of captions."""
    from compt.bench.step import Setup

    if jobs.recipe is None:
        common = EngineConfig(text_buckets=TEXT_BUCKETS)
        plain = [Setup(student=spec, teacher=teacher, engine=common) for spec, teacher in jobs.pairs]
    else:
        plain = [Setup.of_job(job, jobs.recipe, Path.cwd()) for job in jobs.links]
    asked = {"name": engine, "compile": compile, "recompute": recompute}
    changes = {key: value for key, value in asked.items() if value} | {"async_checkpoints": False}  # nothing is saved
    setups = []
    for setup in plain:
        config = changed_engine(setup.engine, changes)
        if config.fsdp2.replicas > 1:  # this device alone is one group
            config = changed_engine(config, {"fsdp2": {"replicas": 1}})
        optimizer = setup.optimizer.model_copy(update={"precision": precision} if precision else {})
        given = replace(setup, optimizer=optimizer, engine=config, tokens=tokens, seed=seed)
        for teacher in (None, setup.teacher) if setup.teacher else (None,):
            setups += [replace(given, teacher=teacher, captions=number) for number in captions]
    return setups


@bench_app.command()
def throughput(
    models: Annotated[list[str] | None, typer.Argument(help="presets, or links of --family; default all")] = None,
    family: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="measure the jobs of this recipe, as it trains them")
    ] = None,
    captions: Annotated[str | None, typer.Option(help="captions a picture; default the recipe's (4) and 6")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="their computed length: 30, or 20:0.7,40:0.3, or context; default the recipe's or context"),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="samples a step, or auto (default without --family) for the most that fit; else a GPU's share"
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs that are to share the recipe's batch; default as of plan, on a CPU 1")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="the most that auto tries; default 8192, on a CPU 256", min=1)
    ] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default the recipe's or bf16")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    seconds: Annotated[
        float, typer.Option(help="time each job for so long at least, three steps or more", min=0)
    ] = 2.0,
    engine: Annotated[
        str | None, typer.Option(help="ddp, fsdp2 or zero0 to zero3, on this device alone; default the recipe's or ddp")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="let torch compile the blocks")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="compute blocks again in the backward")] = False,
    seed: Annotated[int, typer.Option(help="of weights, pixels and captions")] = 0,
    out: Annotated[Path, typer.Option(help="the file of results; a rerun goes on there")] = Path("throughput.json"),
    fresh: Annotated[bool, typer.Option("--fresh", help="forget what the file has")] = False,
) -> None:
    """Time the real training step of each model, alone and as a link of a chain with its teacher's forward pass.

    Pixels and captions are random. Every finished measurement is written at once; a model that does not fit into
    memory is noted as such. MFU is the share of the device's dense peak, where that is known, at two FLOPs a MAC.
    """
    jobs = _jobs(models or [], family)
    numbers, lengths = _captions(captions, jobs.recipe), _tokens(tokens, jobs.recipe)
    name = _engine(engine)

    from compt.bench.throughput import run
    from compt.dist import collectives as dist

    chosen = dist.init(device)
    if dist.world_size() > 1:
        raise ConfigError("compt bench throughput measures one device: start it without torchrun")
    size = _batch(batch, gpus, jobs, str(family), chosen.type)
    setups = _setups(
        jobs,
        numbers,
        tokens=lengths,
        precision=_precision(precision, jobs.recipe),
        engine=name,
        compile=compile_,
        recompute=recompute,
        seed=seed,
    )
    console = terminal()

    def say(entry: Measurement, kept: bool) -> None:
        line = ", ".join(filter(None, [*_cells(entry), "from an earlier run" if kept else ""]))
        console.print(f"{len(shown) + 1}/{len(setups)} {line}", markup=False, soft_wrap=True)
        shown.append(entry)

    shown: list[Measurement] = []
    command = shlex.join(["compt", *sys.argv[1:]])
    most = max_batch or MOST[chosen.type]
    made = run(setups, chosen, out, command=command, batch=size, most=most, seconds=seconds, fresh=fresh, show=say)
    show(_throughput_table(made, shown, size is None, most))
    console.print(f"Written: {out}", markup=False, soft_wrap=True)


def _cells(entry: Measurement) -> list[str]:
    with_teacher = f" with {entry.teacher.name}" if entry.teacher else ""
    cells = [f"{entry.student.name}{with_teacher}", f"{entry.captions} captions of {entry.tokens:.3g}"]
    if how := _how(entry):
        cells.append(how)
    if entry.seconds_per_sample is None:
        return [*cells, str(entry.failure)]
    return [*cells, f"batch {entry.batch}", f"{1 / entry.seconds_per_sample:,.4g} samples/s"]


def _how(entry: Measurement) -> str:
    """What is unusual about how a job ran, in words; mostly nothing."""
    ways: list[str] = [entry.engine if entry.engine != "ddp" else ""]
    ways += ["compiled" if entry.compile else "", "recomputed" if entry.recompute else ""]
    ways += [f"{key} {value}" for key, value in entry.settings.items()]
    return " ".join(filter(None, ways))


def _throughput_table(made: Throughput, entries: list[Measurement], searched: bool, most: int) -> TextTable:
    from compt.bench.throughput import CPU_STEP_SECONDS

    rows = []
    for entry in entries:
        names = [
            " ".join(filter(None, [entry.student.name, _how(entry)])),
            entry.teacher.name if entry.teacher else "-",
        ]
        lengths = [str(entry.captions), f"{entry.tokens:.3g}"]
        if entry.seconds_per_sample is None or entry.low is None or entry.high is None:
            rows.append([*names, *lengths, "-", str(entry.failure), "-", "-"])
            continue
        rates = [1 / value for value in (entry.seconds_per_sample, entry.high, entry.low)]
        rows.append(
            [
                *names,
                *lengths,
                str(entry.batch),
                f"{rates[0]:,.4g} [{rates[1]:,.3g}-{rates[2]:,.3g}]",
                "-" if entry.peak_memory_bytes is None else f"{entry.peak_memory_bytes / 2**30:.2f} GiB",
                "-" if entry.mfu is None else f"{entry.mfu:.1%}",
            ]
        )
    notes = ["Measured. Samples a second: median [slowest-fastest step]; a teacher's forward pass is included."]
    if searched:
        limit = "fit" if made.threads is None else f"fit and take no more than {CPU_STEP_SECONDS:g} s a step"
        notes.append(f"Batches are the largest that {limit}, {most} at most.")
    if made.kind is None:
        notes.append("No MFU: the peak of this device is not known. Memory is what the process grew by.")
    title = f"Throughput of {made.device}, {made.precision}"
    header = ["Model", "Teacher", "Captions", "Tokens", "Batch", "Samples/s", "Peak memory", "MFU"]
    return TextTable(title, header, rows, notes)


@bench_app.command("gpu-hours")
def gpu_hours(
    recipe: RecipePath,
    throughput: ThroughputFile = None,
    kind: Kind = None,
    gpus: Gpus = None,
    mode: Annotated[str, typer.Option(help="how MACs are counted: exact (this program) or paper")] = "exact",
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the GPU-hours of a recipe's chain and of its models trained individually, as Table 2 of the paper does.

    What FILE has is measured; everything else is projected (docs/hardware.md) and says so. For a device whose peak is
    not known nothing is projected, and --gpus is 1 unless given.
    """
    modes: tuple[Mode, ...] = get_args(Mode)
    counted = next((known for known in modes if known == mode), None)
    if counted is None:
        raise ConfigError(f"--mode {mode}{nearest(mode, modes)}: should be {' or '.join(modes)}")
    loaded, asked = load_recipe(recipe, set_ or []), MachineOptions(kind, gpus, throughput)
    device, file = asked.device()
    number = asked.number(loaded, str(recipe), default_gpus(loaded.optimizer.batch) if device else 1)
    check_shares(loaded, number, str(recipe))
    plan = make_plan(loaded, source=str(recipe), world_size=number)
    rows, paper = family_hours(plan, counted, device, file, number), published_rows(plan)
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
            "paper": [row.to_json() for row in paper],
        }
        typer.echo(json.dumps(made, indent=2))
        return
    table = _hours_table(rows, f"GPU-hours of {plan.recipe.name} on {title}, mode '{mode}'", number)
    notes = [*table.notes, *_hours_notes(rows, loaded, counted, number, file)]
    show(replace(table, notes=notes))
    if paper:
        typer.echo()
        show(_published_table(paper))


def _cell(value: Hours | None, speedup: float | None = None) -> str:
    if value is None:
        return "not measured"
    low, high = hours(value.low).split(" "), hours(value.high).split(" ")
    span = f"{low[0]}-{high[0]}" if low[1] == high[1] else f"{' '.join(low)} - {' '.join(high)}"
    kind = "part projected" if value.kind == "measured and projected" else value.kind
    return f"{hours(value.gpu_hours)}{ratio(speedup)} [{kind} {span}]"


def _hours_table(rows: list[HoursRow], title: str, gpus: int) -> TextTable:
    compared = rows[0].individual_epochs is not None
    body = []
    for row in rows:
        cells = [row.model, f"{row.epochs:.3g}"]
        if row.individual_epochs is not None:
            cells[1] += f"/{row.individual_epochs:.3g}"
            cells += [_cell(row.individual), _cell(row.individual_accumulated)]
        cells += [_cell(row.chain, row.speedup), _cell(row.chain_accumulated, row.accumulated_speedup)]
        if gpus > 1:
            cells.append(hours(row.chain_accumulated.wall_hours if row.chain_accumulated else None))
        body.append(cells)
    header = ["Model", "Epochs", *(["Individual", "Accumulated"] if compared else []), "Chain", "Accumulated"]
    notes = ["[projected least-most]: by the model of docs/hardware.md, not measured."]
    if compared:
        notes.insert(0, "Epochs: in the chain/individually. (x): acceleration over the individual training.")
    if gpus > 1:
        header.append(f"Wall time, {gpus} GPUs")
        notes.append("Wall time is that of the chain so far, as if the GPUs lost nothing to one another.")
    return TextTable(title, header, body, notes)


def _hours_notes(rows: list[HoursRow], recipe: Recipe, mode: Mode, gpus: int, file: Throughput | None) -> list[str]:
    """What the hours come from, and what was not measured."""
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
        notes.append("Nothing is projected for this device, whose peak is not known: measure with --family RECIPE.")
    return notes


def _published_table(rows: list[PublishedRow]) -> TextTable:
    body = [
        [
            row.model,
            f"{row.individual_hours:,.0f} h",
            f"{row.individual_utilisation:.1%}",
            f"{row.individual_error:+.1%}",
            f"{row.individual_accumulated_hours:,.0f} h",
            f"{row.chain_hours:,.0f} h{ratio(row.speedup)}",
            f"{row.chain_utilisation:.1%}",
            f"{row.chain_error:+.1%}",
            f"{row.chain_accumulated_hours:,.0f} h{ratio(row.accumulated_speedup)}",
        ]
        for row in rows
    ]
    part = ["Use", "Model error"]
    header = ["Model", "Individual", *part, "Accumulated", "Chain", *part, "Accumulated"]
    model = fitted()
    notes = [
        "Use: share of an A100's dense bf16 peak that the published MACs make in the published hours.",
        (
            "Model error: projected over published hours, less 1. Model: seconds a sample = FLOPs / "
            f"({model.efficiency:.1%} of the peak) + channels x {model.bytes_per_channel:.0f} bytes / bandwidth + "
            f"{1e3 * model.fixed_seconds:.3f} ms; a row held out of its fit is off by {model.error:.1%} at most."
        ),
    ]
    return TextTable("The paper's A100 hours (Table 2)", header, body, notes)
