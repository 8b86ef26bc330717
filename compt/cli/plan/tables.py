"""The tables of a plan: models and MACs, GPU-hours, acceleration, memory per GPU, disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from compt.cost.memory import Memory
from compt.cost.published import PAPER_TEXT_PASSES, PAPER_TOKENS
from compt.cost.speed import OF_THE_AUTHORS, Conditions, Throughput
from compt.cost.training import Mode
from compt.models.growth import ExpandConfig
from compt.plan.forecast import Estimate, Forecast, Machine, Totals, not_modelled
from compt.plan.hours import Hours
from compt.plan.links import broken_promises
from compt.recipe.engine import ENGINES
from compt.recipe.expansion import expand_words
from compt.recipe.schema import Recipe
from compt.text import TextTable, count, digits, hours

PARTS = tuple(field.name for field in fields(Memory))


def plan_tables(
    forecast: Forecast, mode: Mode = "exact", parts_of: str | None = None, about: str = ""
) -> list[TextTable]:
    """The tables of a plan; `parts_of` names the engine whose memory is shown part by part. about: a further note."""
    machine, first = forecast.machine, plan_table(forecast, mode)
    first = replace(first, notes=[*first.notes, *([about] if about else [])])
    tables = [first, hours_table(forecast, mode), speedup_table(forecast, mode), own_table(forecast)]
    tables += [memory_table(forecast), parts_table(forecast, parts_of) if machine and parts_of else None]
    return [table for table in (*tables, cache_table(forecast), disk_table(forecast)) if table is not None]


def _sums(forecast: Forecast) -> list[tuple[str, list[Estimate]]]:
    """The sums below the jobs: the chain, its baselines, and everything that a run trains."""
    sums = [("Chain", forecast.links), ("Baselines", list(forecast.individual))]
    if len(forecast.trained) > len(forecast.links):
        sums.append(("Whole run", forecast.trained))
    return [(name, items) for name, items in sums if items]


def plan_table(forecast: Forecast, mode: Mode = "exact") -> TextTable:
    """A row for each job, then the sums."""
    plan = forecast.plan

    def row(name: str, total: Totals, macs: str, share: str = "") -> list[str]:
        size = [count(total.parameters), f"{total.epochs:.3g}", count(total.samples), f"{total.steps:,}"]
        return [name, *size, macs, share]

    rows = []
    for item, cost in zip(forecast.estimates, plan.rows(mode), strict=True):
        macs = f"as {item.job.same_as}" if item.job.same_as else count(cost["total_macs"])
        share = f"{100 * cost['teacher_share']:.0f} %" if cost["teacher_share"] else ""
        rows.append(row(item.job.name, forecast.totals([item]), macs, share))
    for name, items in _sums(forecast):
        total = forecast.totals(items)
        rows.append(row(name, total, count(total.macs[mode])))
    header = ["Model", "Params", "Epochs", "Samples", "Steps", "MACs", "Teacher"]
    return TextTable(f"Plan of {plan.recipe.name}", header, rows, _notes(forecast, mode))


def hours_table(forecast: Forecast, mode: Mode = "exact") -> TextTable | None:
    """GPU-hours and wall time of each job, then the sums; None without a machine."""
    machine = forecast.machine
    if machine is None:
        return None
    found = [(item.job.name, item.hours) for item in forecast.trained]
    found += [(name, forecast.totals(items).hours) for name, items in _sums(forecast)]
    rows = [
        [name, f"{'' if item.kind == 'measured' else '~'}{digits(item.gpu_hours)}", span(item), hours(item.wall_hours)]
        for name, item in found
        if item is not None
    ]
    gpus = f"{machine.gpus} GPU{'s' * (machine.gpus > 1)}"
    title = f"GPU-hours on {machine.device.title}"
    header = ["Model", "GPU-hours", "Range", f"Wall time, {gpus}"]
    return TextTable(title, header, rows, _hours_notes(forecast, machine, mode, gpus))


def span(found: Hours) -> str:
    """The range of GPU-hours."""
    return f"{digits(found.low)}-{digits(found.high)}"


def _notes(forecast: Forecast, mode: Mode) -> list[str]:
    plan = forecast.plan
    data = plan.recipe.data
    counted = "as compt computes (mode 'exact')"
    if mode == "paper":
        counted = f"as the paper counts: {PAPER_TEXT_PASSES} captions of {PAPER_TOKENS} tokens (mode 'paper')"
    about = (
        f"{plan.images:,} images, batch {plan.recipe.optimizer.batch}, {data.captions} captions per image, each"
        f"{_length(data.caption_tokens)}. MACs are multiply-accumulates, {counted}. Teacher: share of "
        "the MACs in its forward passes."
    )
    notes = [about, *_expansions(forecast)]
    if forecast.machine is None:
        notes.append(
            "engine.device is cpu: add --kind, as in --kind a100-80, for GPU-hours and memory. "
            "`compt chain --estimate` times this machine."
        )
    return notes


def _hours_notes(forecast: Forecast, machine: Machine, mode: Mode, gpus: str) -> list[str]:
    recipe = forecast.plan.recipe
    items = [*forecast.trained, *forecast.individual]
    found = forecast.totals(items).hours
    assert found is not None
    measured = found.kind == "measured"
    about = (
        f"In {recipe.optimizer.precision}, {'; '.join(found.sources)}"
        f"{'' if measured else '; ~ marks a projection, or a sum with one'}. "
        f"{'' if mode == 'exact' else 'GPU-hours are those of compt in either mode. '}"
        f"Wall time: GPU-hours over {gpus}, without any waiting for ranks or data."
    )
    notes = [about]
    if not measured:
        notes.append(OF_THE_AUTHORS)
    if machine.throughput is not None and not measured:
        missing = {item.job.name: item.job.spec.name for item in items if item.hours and item.hours.kind != "measured"}
        notes.append(unmeasured(machine.throughput, recipe, machine.gpus, missing))
    return notes


def _expansions(forecast: Forecast) -> list[str]:
    """What is not as by default about how links grow, and what an operator cannot keep of its promise."""
    usual = expand_words(ExpandConfig())
    links, broken = [], []
    for job in forecast.plan.links:
        if job.teacher_spec is None or (job.expand and expand_words(job.expand) == usual):
            continue
        if job.expand is None:
            links.append(("none, its first weights are random and its teacher only distils", job.name))
            continue
        words = expand_words(job.expand)
        links.append((words, job.name))
        for tower, reasons in broken_promises(job.teacher_spec, job.spec, job.expand).items():
            operator = job.expand.tower(tower).width
            broken.append(
                f"Inexact: in {job.name}, {operator} changes what the {tower} tower computes. {_all(reasons)}."
            )
    return [f"Expansion of {names}: {words}." for words, names in _grouped(links).items()] + broken


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The names that share a text, from pairs of text and name: a, b and c."""
    found: dict[str, list[str]] = {}
    for text, name in pairs:
        found.setdefault(text, []).append(name)
    return {text: ", ".join(names) for text, names in found.items()}


def _all(reasons: Iterable[str]) -> str:
    """Reasons in one line; of equal ones, which begin with other parameters, the first."""
    first: dict[str, str] = {}
    for reason in reasons:
        first.setdefault(reason.partition(": ")[2], reason)
    return "; ".join(first.values())


def unmeasured(file: Throughput, recipe: Recipe, gpus: int, models: Mapping[str, str], mode: Mode = "exact") -> str:
    """Says that `file` has no measurement of jobs as `gpus` processes train them; `models` by the jobs' names."""
    settings = _grouped((_setting(Conditions.of(recipe, gpus, model), mode), name) for name, model in models.items())
    has = "" if file.precision == recipe.optimizer.precision else f", which is of {file.precision},"
    lacking = "; nor ".join(f"in {setting} of {names}" for setting, names in settings.items())
    return f"The throughput file{has} has no measurement {lacking}."


def _setting(asked: Conditions, mode: Mode) -> str:
    captions = f"{asked.captions} captions{_length(asked.tokens)}"
    if mode == "paper":
        captions = f"{PAPER_TEXT_PASSES} captions of {PAPER_TOKENS} tokens"
    ways = [f"micro-batches of {asked.micro_batch}" if asked.micro_batch else ""]
    chunk = asked.loss_chunk
    ways += ["a tiled loss" if chunk == "tiled" else f"chunks of the loss of {chunk}" if chunk else ""]
    ways += [
        f"compiled {asked.compile}" if asked.compile != "off" else "",
        "recomputed blocks" if asked.recompute else "",
    ]
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
    """How many times less each link costs than its baseline; None if the recipe has no baselines."""
    if not forecast.individual:
        return None
    rows = []
    speedups = forecast.speedups()
    for at, (item, row) in enumerate(zip(forecast.links, forecast.plan.rows(mode), strict=False)):
        ratios = [row["speedup"], row["accumulated_speedup"], *(speedups[at] if speedups else ())]
        rows.append([item.job.name, *("" if value is None else f"{value:.2f}x" for value in ratios)])
    header = ["Model", "MACs", "MACs so far"] + ([] if forecast.machine is None else ["GPU-hours", "GPU-hours so far"])
    epochs = forecast.individual[0].job.epochs
    notes = [f"Over baselines of {epochs:.3g} epochs; so far: over all models up to this one."]
    start = forecast.plan.recipe.chain.from_
    if start is not None:
        notes.append(f"No figure includes the cost of training {start}.")
    return TextTable("Acceleration", header, rows, notes)


def own_table(forecast: Forecast) -> TextTable | None:
    """Projected steps of compt itself: launches, time of host and GPU, GPU-hours, acceleration; None without any."""
    machine, speedups = forecast.machine, forecast.own_speedups()
    if machine is None or any(item.own is None for item in forecast.trained):
        return None
    rows = []
    for item in forecast.trained:
        assert item.own is not None
        step, at = item.own.step, forecast.links.index(item) if item.job.kind == "link" else len(speedups)
        ratio = f"{speedups[at][1]:.2f}x" if at < len(speedups) else ""
        milliseconds = [f"{1e3 * value:.1f}" for value in (step.host, step.products, step.traffic)]
        rows.append(
            [item.job.name, f"{step.launches:,}", *milliseconds, step.decides, f"~{digits(item.own.gpu_hours)}", ratio]
        )
    note = (
        "A projection, not measured (docs/hardware.md). A step takes as long as its launches by the host, or as its "
        "matrix products and other memory traffic on the GPU, whichever is longer. In ms, on one GPU, without loading "
        "data and communication. So far: GPU-hours of the baselines up to this model, over the chain's."
    )
    header = ["Model", "Launches", "Host", "Products", "Traffic", "Decides", "GPU-hours", "So far"]
    return TextTable(f"compt's own steps on {machine.device.title}, projected", header, rows, [note])


def memory_table(forecast: Forecast) -> TextTable | None:
    """GB of each GPU for every engine; None without a machine."""
    machine = forecast.machine
    if machine is None:
        return None
    rows = [
        [name, *(_gb(fit.memory(on).total_bytes) + "!" * (not fit.fits(on)) for fit in item.memory.values())]
        for item in forecast.trained
        for name, on in ((item.job.name, False), ("  recomputed", True))
    ]
    recipe = forecast.plan.recipe
    share = recipe.optimizer.batch // machine.gpus
    micro = sorted({min(recipe.engine_of(item.job.spec.name).micro_batch or share, share) for item in forecast.trained})
    pieces = f" in pieces of {' or '.join(f'{size:,}' for size in micro)}" if micro and micro[0] < share else ""
    room = f"{_gb(machine.room_bytes)} of {_gb(machine.device.memory_bytes)} GB"
    note = (
        f"{share:,} images per GPU{pieces}, which has {room} for them. Recomputed: with engine.recompute; ! does not "
        f"fit. The recipe trains {_engines(forecast)}. --memory ENGINE shows the parts."
    )
    unknown = _grouped(
        (text, item.job.name)
        for item in forecast.trained
        for text in not_modelled(recipe.engine_of(item.job.spec.name))
    )
    notes = [note, *(f"Not counted, in {names}: {text}." for text, names in unknown.items())]
    warned = warning(forecast)
    return TextTable("Memory per GPU, in GB", ["Model", *ENGINES], rows, [*notes, *([warned] if warned else [])])


def _engines(forecast: Forecast) -> str:
    """With which engine which models are trained, and whether recomputed."""
    ways = _grouped(
        (f"with {item.engine}{', recomputed' if item.recompute else ''}", item.job.name) for item in forecast.trained
    )
    return next(iter(ways)) if len(ways) == 1 else "; ".join(f"{names} {way}" for way, names in ways.items())


def parts_table(forecast: Forecast, engine: str) -> TextTable:
    """GB of each GPU with one engine, one row per part. The forecast has to have a machine."""
    rows = []
    for item in forecast.trained:
        fit = item.memory[engine]
        for at, part in enumerate((*PARTS, "total_bytes")):
            cells = [_gb(getattr(fit.memory(on), part)) for on in (False, True)]
            rows.append(["" if at else item.job.name, part.removesuffix("_bytes"), *cells])
    note = "Recomputed: with engine.recompute. Overlap: what two parts need, but not at the same time."
    return TextTable(f"Memory with {engine}, in GB", ["Model", "Part", "GB", "Recomputed"], rows, [note], left=2)


def _gb(size: float) -> str:
    return digits(size / 1e9)


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


def cache_table(forecast: Forecast) -> TextTable | None:
    """What the teacher's cache would keep and save; None if no job has one."""
    found = [(item, item.cached) for item in forecast.trained if item.cached is not None]
    if not found:
        return None
    rows = []
    for item, cached in found:
        cost, later = item.job.cost, cached.hits + cached.later_misses
        sizes = [_bytes(size) for size in (cached.whole_bytes, cached.kept_bytes)]
        saved = f"{100 * cached.saved_macs / (cost.samples * cost.teacher_forward_macs):.0f} %"
        hits = f"{100 * cached.hits / later:.0f} %" if later else ""
        rows.append([item.job.name, *sizes, count(cached.first_misses), count(later), hits, saved])
    data, gpus = forecast.plan.recipe.data, forecast.machine.gpus if forecast.machine else 1
    note = (
        f"A projection. All captions: {data.caption_pool or data.captions:g} of each image, of which a step draws "
        f"{data.captions} (data.caption_pool). Kept: by each of {gpus} processes, which knows the captions that it has "
        "seen itself. First: captions of the first epoch, which are all computed. Later: those of later epochs; hits: "
        "the share of them that is kept. Saved: share of the teacher's MACs. The other tables do not include it."
    )
    header = ["Model", "All captions", "Kept", "First", "Later", "Hits", "Saved"]
    return TextTable("Captions kept by engine.teacher_cache", header, rows, [note])


def disk_table(forecast: Forecast) -> TextTable:
    """Disk space of each job, and of the run folder as a whole."""
    rows = [_disk(item) for item in forecast.trained]
    rows.append(["Run folder", "", "", "", _bytes(forecast.disk_peak_bytes()), _bytes(forecast.disk_end_bytes())])
    jobs, recipe = [item.job for item in forecast.trained], forecast.plan.recipe
    distances = _grouped((str(recipe.engine_of(job.spec.name).checkpoint_every), job.name) for job in jobs)
    every = " or ".join(f"{text} ({names})" if len(distances) > 1 else text for text, names in distances.items())
    note = (
        f"A checkpoint every {every}; one extra while the next is written; all are deleted at the end. "
        "Metrics, scores and the training set are not in it."
    )
    return TextTable("Disk", ["Model", "Expanded", "Checkpoints", "Final model", "Peak", "End"], rows, [note])


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
