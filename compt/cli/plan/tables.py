"""Tables of plans: what is trained and its cost, what it saves, memory of a GPU, disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields

from rich.console import Group, RenderableType
from rich.text import Text

from compt.cost.memory import Memory
from compt.cost.published import PAPER_TEXT_PASSES, PAPER_TOKENS
from compt.cost.speed import OF_THE_AUTHORS, Conditions, Throughput
from compt.cost.training import Mode
from compt.models.growth import ExpandConfig
from compt.plan.forecast import Estimate, Fit, Forecast, Totals, not_modelled
from compt.plan.hours import Hours
from compt.plan.links import broken_promises
from compt.recipe.engine import ENGINES
from compt.recipe.expansion import expand_words
from compt.recipe.schema import Recipe
from compt.text import TextTable, count, hours, macs, ratio

PARTS = tuple(field.name for field in fields(Memory))


def plan_tables(forecast: Forecast, mode: Mode = "exact", parts_of: str | None = None) -> RenderableType:
    """All that a terminal shows of a plan; `parts_of` is the engine whose memory is shown part by part."""
    tables = [plan_table(forecast, mode), speedup_table(forecast, mode), memory_table(forecast)]
    shown: list[RenderableType] = []
    for table in tables:
        if table is not None:
            shown += [table.rich(), Text()]
    if forecast.machine is not None:
        if parts_of is not None:
            shown += [parts_table(forecast, parts_of).rich(), Text()]
        warned = warning(forecast)
        shown += [Text(warned, style="yellow"), Text()] if warned else []
    return Group(*shown, disk_table(forecast).rich())


def plan_table(forecast: Forecast, mode: Mode = "exact") -> TextTable:
    """A row for each job, then sums: the chain, its members trained individually, and all that a run trains."""
    plan, machine = forecast.plan, forecast.machine
    rows = []
    for row, item in zip(plan.rows(mode), forecast.estimates, strict=True):
        again = row["same_as"]
        cells = [
            row["job"],
            count(row["parameters"]),
            f"{row['epochs']:.3g}",
            count(row["samples"]),
            f"{row['steps']:,}",
            f"as {again}" if again else macs(row["total_macs"]),
            f"{100 * row['teacher_share']:.0f} %" if row["teacher_share"] else "",
        ]
        rows.append(cells + ([] if machine is None else ["", ""] if again else _hours(item.hours)))
    sums = [("Chain", forecast.links), ("Individually", list(forecast.individual))]
    if len(forecast.trained) > len(forecast.links):
        sums.append(("Whole run", forecast.trained))
    rows += [_sum(name, forecast.totals(items), mode, forecast) for name, items in sums if items]
    header = ["Model", "Params", "Epochs", "Samples", "Steps", "MACs", "Teacher"]
    header += [] if machine is None else ["GPU-hours", "Wall time"]
    return TextTable(f"Plan of {plan.recipe.name}", header, rows, _notes(forecast, mode))


def _sum(name: str, total: Totals, mode: Mode, forecast: Forecast) -> list[str]:
    cells = [name, count(total.parameters), f"{total.epochs:.3g}", count(total.samples), f"{total.steps:,}"]
    cells += [macs(total.macs[mode]), ""]
    return cells + ([] if forecast.machine is None else _hours(total.hours))


def _hours(found: Hours | None) -> list[str]:
    if found is None:
        return ["", ""]
    about = "" if found.kind == "measured" else "~"
    return [f"{about}{_number(found.gpu_hours)} ({_number(found.low)}-{_number(found.high)})", hours(found.wall_hours)]


def _number(value: float) -> str:
    """Three digits, whole above a thousand."""
    return f"{value:,.0f}" if value >= 999.5 or not value else f"{value:#.3g}".removesuffix(".")


def _notes(forecast: Forecast, mode: Mode) -> list[str]:
    plan, machine = forecast.plan, forecast.machine
    data, precision = plan.recipe.data, plan.recipe.optimizer.precision
    counted = "as this program computes (mode 'exact')"
    if mode == "paper":
        counted = f"as the paper counts: {PAPER_TEXT_PASSES} captions of {PAPER_TOKENS} tokens (mode 'paper')"
    about = (
        f"{plan.images:,} images, batch {plan.recipe.optimizer.batch}, {data.captions} captions an image, each"
        f"{_length(data.caption_tokens)}. MACs are multiply-accumulates, {counted}. Teacher: share of "
        "the MACs in its forward passes."
    )
    notes = [about, *_expansions(forecast)]
    if machine is None:
        notes.append(
            "engine.device is cpu: GPU-hours and memory are shown with --kind, as in --kind a100-80; "
            "`compt chain --estimate` times this machine."
        )
        return notes
    found = forecast.totals([*forecast.trained, *forecast.individual]).hours
    assert found is not None
    notes.append(
        f"GPU-hours on {machine.device.title}, {precision}, with their range: {'; '.join(found.sources)}"
        f"{'' if found.kind == 'measured' else '; ~ marks what is projected, or a sum with such a part'}. "
        f"{'' if mode == 'exact' else 'They are of what this program computes, in either mode. '}"
        f"Wall time: GPU-hours over {machine.gpus} GPU{'s' * (machine.gpus > 1)}, as if none waited for another "
        "or for data."
    )
    if found.kind != "measured":
        notes.append(OF_THE_AUTHORS)
    if machine.throughput is not None and found.kind != "measured":
        both = [*forecast.trained, *forecast.individual]
        missing = {item.job.name: item.job.spec.name for item in both if item.hours and item.hours.kind != "measured"}
        notes.append(unmeasured(machine.throughput, plan.recipe, machine.gpus, missing))
    return notes


def _expansions(forecast: Forecast) -> list[str]:
    """What is not as by default about how links grow, and what an operator cannot keep of its promise."""
    usual = expand_words(ExpandConfig())
    links: dict[str, list[str]] = {}
    broken = []
    for job in forecast.plan.links:
        if job.expand is None or job.teacher_spec is None or (words := expand_words(job.expand)) == usual:
            continue
        links.setdefault(words, []).append(job.name)
        for tower, reasons in broken_promises(job.teacher_spec, job.spec, job.expand).items():
            operator = job.expand.tower(tower).width
            broken.append(
                f"Inexact: in {job.name}, {operator} changes what the {tower} tower computes. {_all(reasons)}."
            )
    return [f"Expansion of {', '.join(names)}: {words}." for words, names in links.items()] + broken


def _all(reasons: Iterable[str]) -> str:
    """Reasons in one line; of equal ones, which begin with other parameters, the first."""
    first: dict[str, str] = {}
    for reason in reasons:
        first.setdefault(reason.partition(": ")[2], reason)
    return "; ".join(first.values())


def unmeasured(file: Throughput, recipe: Recipe, gpus: int, models: Mapping[str, str], mode: Mode = "exact") -> str:
    """Says that `file` has no measurement of jobs as `gpus` processes train them; `models` by the jobs' names."""
    settings: dict[str, list[str]] = {}
    for name, model in models.items():
        settings.setdefault(_setting(Conditions.of(recipe, gpus, model), mode), []).append(name)
    has = "" if file.precision == recipe.optimizer.precision else f", which is of {file.precision},"
    lacking = "; nor ".join(f"in {setting} of {', '.join(names)}" for setting, names in settings.items())
    return f"The throughput file{has} has no measurement {lacking}."


def _setting(asked: Conditions, mode: Mode) -> str:
    captions = f"{asked.captions} captions{_length(asked.tokens)}"
    if mode == "paper":
        captions = f"{PAPER_TEXT_PASSES} captions of {PAPER_TOKENS} tokens"
    ways = [f"micro-batches of {asked.micro_batch}" if asked.micro_batch else ""]
    ways += [f"chunks of the loss of {asked.loss_chunk}" if asked.loss_chunk else ""]
    ways += ["compiled blocks" if asked.compile else "", "recomputed blocks" if asked.recompute else ""]
    ways += [f"the engine {asked.engine}" if asked.engine != "ddp" else ""]
    ways += [f"{key} {value}" for key, value in asked.settings.items()]
    return ", ".join([f"{asked.precision} with {captions}", *filter(None, ways)])


def _length(tokens: float | Mapping[int, float] | None) -> str:
    if tokens is None:
        return " of the whole context"
    if isinstance(tokens, Mapping):
        return f" of {min(tokens)} to {max(tokens)} tokens"
    return f" of {tokens:g} tokens"


def speedup_table(forecast: Forecast, mode: Mode = "exact") -> TextTable | None:
    """How many times less each link costs than its individual training; None where the recipe has no baselines."""
    if not forecast.individual:
        return None
    rows = []
    for row, found in zip(forecast.plan.rows(mode), forecast.speedups(), strict=False):
        ratios = [row["speedup"], row["accumulated_speedup"], *(found or ())]
        rows.append([row["job"], *(ratio(value).strip(" ()") for value in ratios)])
    header = ["Model", "MACs", "MACs so far"] + ([] if forecast.machine is None else ["GPU-hours", "GPU-hours so far"])
    epochs = forecast.individual[0].job.epochs
    notes = [f"Over individual runs of {epochs:.3g} epochs; so far: over all models up to this one."]
    start = forecast.plan.recipe.chain.from_
    if start is not None:
        notes.append(f"What the training of {start} cost is in no figure.")
    return TextTable("Acceleration", header, rows, notes)


def memory_table(forecast: Forecast) -> TextTable | None:
    """GB of each GPU for every engine; None without a machine."""
    machine = forecast.machine
    if machine is None:
        return None
    rows = [[item.job.name, *(_fit(item.memory[engine], None) for engine in ENGINES)] for item in forecast.trained]
    recipe = forecast.plan.recipe
    share = recipe.optimizer.batch // machine.gpus
    micro = sorted({min(recipe.engine_of(item.job.spec.name).micro_batch or share, share) for item in forecast.trained})
    pieces = f" in pieces of {' or '.join(f'{size:,}' for size in micro)}" if micro and micro[0] < share else ""
    room = f"{_gb(machine.room_bytes)} of {_gb(machine.device.memory_bytes)} GB"
    note = (
        f"{share:,} images a GPU{pieces}, which has {room} for them. In brackets with the activations of the blocks "
        f"recomputed; ! does not fit. The recipe trains {_engines(forecast)}. Parts: --memory ENGINE."
    )
    unknown: dict[str, list[str]] = {}
    for item in forecast.trained:
        for text in not_modelled(recipe.engine_of(item.job.spec.name)):
            unknown.setdefault(text, []).append(item.job.name)
    notes = [note, *(f"Not counted, in {', '.join(names)}: {text}." for text, names in unknown.items())]
    return TextTable("Memory of a GPU, in GB", ["Model", *ENGINES], rows, notes)


def _engines(forecast: Forecast) -> str:
    """With which engine which models are trained, and whether recomputed."""
    ways: dict[str, list[str]] = {}
    for item in forecast.trained:
        ways.setdefault(f"with {item.engine}{', recomputed' if item.recompute else ''}", []).append(item.job.name)
    if len(ways) == 1:
        return next(iter(ways))
    return "; ".join(f"{', '.join(names)} {way}" for way, names in ways.items())


def parts_table(forecast: Forecast, engine: str) -> TextTable:
    """GB of each GPU with one engine, part by part. The forecast has to have a machine."""
    rows = [
        [item.job.name, *(_fit(item.memory[engine], part) for part in PARTS), _fit(item.memory[engine], None)]
        for item in forecast.trained
    ]
    header = ["Model", *(part.capitalize() for part in PARTS), "Total"]
    note = "In brackets with recomputed activations. Overlap: what two parts need, but not at the same time."
    return TextTable(f"Memory with {engine}, in GB", header, rows, [note])


def _fit(fit: Fit, part: str | None) -> str:
    """Bytes with and without recomputed activations: of a part, or of all, where ! marks too many."""
    if part is not None:
        stored, again = (getattr(memory, part) for memory in (fit.stored, fit.recomputed))
        return _gb(stored) + (f" ({_gb(again)})" if again != stored else "")
    marks = ["" if fits else "!" for fits in (fit.stored_fits, fit.recomputed_fits)]
    return f"{_gb(fit.stored.total_bytes)}{marks[0]} ({_gb(fit.recomputed.total_bytes)}{marks[1]})"


def _gb(size: float) -> str:
    return _number(size / 1e9)


def warning(forecast: Forecast) -> str | None:
    """Which jobs do not fit, and what would let all of them fit; None where all fit."""
    found, machine = forecast.remedy, forecast.machine
    if found is None or machine is None:
        return None
    large = {item.job.name: item for item in forecast.trained if item.job.name in found.jobs}
    ways = [f"engine.micro_batch: {found.micro_batch}"] if found.micro_batch else []
    ways += ["engine.recompute: true"] if found.recompute else []
    if found.engine:
        ways.append(f"engine.name: {found.engine}")
    elif found.engine_recomputed and not found.recompute:
        ways.append(f"engine.name: {found.engine_recomputed} with engine.recompute: true")
    remedies = "; or, ".join(ways) or "only more GPUs, or larger ones"
    jobs = ", ".join(f"{name} ({_gb(item.needed_bytes)} GB with {item.engine})" for name, item in large.items())
    return (
        f"Warning: does not fit the {_gb(machine.room_bytes)} GB that {machine.device.title} has for it: {jobs}. "
        f"What would let {'them all' if len(found.jobs) > 1 else 'it'} fit: {remedies}."
    )


def disk_table(forecast: Forecast) -> TextTable:
    """What each job keeps in its folder, and the run folder as a whole."""
    rows = [_disk(item) for item in forecast.trained]
    rows.append(["Run folder", "", "", "", _bytes(forecast.disk_peak_bytes()), _bytes(forecast.disk_end_bytes())])
    distances: dict[str, list[str]] = {}
    for item in forecast.trained:
        distances.setdefault(str(forecast.plan.recipe.engine_of(item.job.spec.name).checkpoint_every), []).append(
            item.job.name
        )
    every = " or ".join(
        f"{text} ({', '.join(names)})" if len(distances) > 1 else text for text, names in distances.items()
    )
    note = (
        f"A checkpoint every {every}; one more than are kept while the next is written, none after the end. "
        "Metrics, scores and the training set are not in it."
    )
    return TextTable("Disk", ["Model", "Expanded", "Checkpoints", "Model, final", "At most", "Stays"], rows, [note])


def _disk(item: Estimate) -> list[str]:
    disk = item.disk
    return [
        item.job.name,
        _bytes(disk.initial_bytes) if disk.initial_bytes else "",
        f"{disk.checkpoints} x {_bytes(disk.checkpoint_bytes)}",
        _bytes(disk.model_bytes),
        _bytes(disk.peak_bytes),
        _bytes(disk.end_bytes),
    ]


def _bytes(size: float) -> str:
    return f"{count(size)}B"
