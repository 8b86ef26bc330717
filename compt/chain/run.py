"""A run: the links of a chain one after another, then baselines and controls. Its whole state is on disk."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compt.chain.job import JobRun, RunContext
from compt.chain.locks import LOCKS, locked, writing
from compt.chain.record import is_finished, read_manifest
from compt.chain.start import hash_of, open_start
from compt.chain.state import RECIPE, STATE, TABLE, accepted_scales, check_unchanged, read_state, write_state
from compt.data.index import Index
from compt.data.lengths import computed_tokens, stored_lengths
from compt.data.mixture import open_training
from compt.data.remote import Cache, bytes_of
from compt.dist import collectives as dist
from compt.dist.watch.thread import FOLDER, Watch, collective_timeout
from compt.errors import ArtefactError, ConfigError, DataError, RunError, nearest
from compt.evaluate.scorer import Scorer, ask_once, index_folder_of
from compt.evaluate.sets import check_sets
from compt.files import disk_errors, hash_json
from compt.plan.forecast import memory_of, needs_less, usable_bytes
from compt.plan.jobs import Job, Plan, make_plan
from compt.plan.links import AVERAGE, Start
from compt.recipe.deepspeed import check_engines
from compt.recipe.read import read_yaml, recipe_text
from compt.recipe.schema import DECODERS, Data, Recipe
from compt.text import count
from compt.train.loggers import check_loggers
from compt.train.signals import StopSignal

_log = logging.getLogger(__name__)

Say = Callable[[str], None]


def open_data(recipe: Recipe, base: Path) -> Index:
    """The index of the training shards. Raises DataError, and ConfigError where the decoder is not installed.

    Rank 0 builds what is missing. Then one process of each machine does: each may have its own cache folder.
    """
    data, folder, cache = recipe.data, index_folder_of(recipe, base), Cache.of(recipe.data, base)
    dist.on_all(DECODERS.load(data.decoder))

    def open_it() -> Index:
        return open_training(data, base, folder, cache)

    ask_once(cache, open_it)
    dist.on_all(lambda: open_it() if dist.local_rank() == 0 else None)
    return dist.on_all(open_it)


def data_warnings(data: Data, index: Index) -> Iterator[str]:
    """What a person should know of the data before training."""
    if index.images != data.images:
        yield f"data.images is {data.images}, but the shards hold {index.images}: using these"
    if index.account.faults:
        yield f"data.train holds more than is used: {index.account.line()} (compt data check shows what to do)"
    few = Counter({n: images for n, images in index.counts.items() if 0 < n < data.captions})
    if few:
        mean = sum(n * images for n, images in few.items()) / few.total()
        yield (
            f"data.captions is {data.captions}, but {few.total():,} of {len(index):,} images have fewer, {mean:.3g} on "
            "average: each step uses some of their captions several times, at the full cost"
        )


def device_warnings(recipe: Recipe, jobs: Iterable[Job], device: torch.device) -> Iterator[str]:
    """What a person should know of a GPU before hours are spent: jobs too large for it, too few cores beside it."""
    if device.type != "cuda":
        return
    cores, room = len(os.sched_getaffinity(0)), usable_bytes(torch.cuda.get_device_properties(device).total_memory)
    if cores < recipe.engine.workers:
        yield (
            f"engine.workers is {recipe.engine.workers}, but each process can use {cores} of the cores, and starts as "
            "many workers (srun gives one core without --cpus-per-task)"
        )
    for job in jobs:
        config = recipe.engine_of(job.spec.name)
        if needs_less(config):
            continue
        ranks, on = dist.world_size(), config.recompute
        needed = memory_of(recipe, job, config.name, ranks, recompute=on, config=config).total_bytes
        if needed > room:
            yield (
                f"{job.name}: by the plan's count it needs {count(needed)}B of a GPU's memory, and {count(room)}B can "
                "be used: a smaller engine.micro_batch, or engine.recompute, needs less and does not change the result"
            )


def _warn(source: str, warnings: Iterable[str]) -> None:
    for warning in warnings:
        _log.warning("%s: %s", source, warning)


def _unbegun(jobs: Iterable[Job], folder: Path) -> list[Job]:
    states = ((job, read_manifest(folder / "jobs" / job.name)["state"]) for job in jobs if job.same_as is None)
    return [job for job, state in states if state == "planned"]


@contextlib.contextmanager
def _as_it_was(folder: Path, started: str) -> Iterator[None]:
    """Keep others from restarting the run. Raises RunError when one of them did, after this one was `started`."""
    with writing(folder):
        if read_state(folder).get("started") != started:
            raise RunError(f"{folder}: another process has restarted this run; start the same command again")
        yield


@contextlib.contextmanager
def named(source: str, key: str) -> Iterator[None]:
    """Put the recipe's file and the key in front of the message of an error about data or a model."""
    try:
        yield
    except (DataError, ArtefactError) as error:
        error.args = (f"{source}: {key}: {error}",)
        raise


def read_start(recipe: Recipe, base: Path, source: str) -> Start | None:
    """The model that the first link grows from, if the recipe names one. Raises ArtefactError or ConfigError."""
    if recipe.chain.from_ is None:
        return None
    try:
        with named(source, "chain.from"):
            found = dist.on_all(lambda: open_start(recipe.chain, base))
            digest = hash_of(found)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    averaged = AVERAGE in found.manifest.get("extra", {})
    return Start(found.spec, digest, found.preprocess, averaged)


def plan_run(
    context: RunContext,
    *,
    baselines: bool = False,
    controls: Sequence[str] | None = (),
    source: str = "recipe",
    scales: Sequence[float] = (),
) -> Plan:
    """`make_plan` with the data and the start model that were found. Raises ConfigError."""
    return make_plan(
        context.recipe,
        baselines=baselines,
        controls=controls,
        images=context.index.images,
        world_size=dist.world_size(),
        start=context.start,
        scales=scales,
        source=source,
    )


def prepare(
    recipe: Recipe,
    folder: Path,
    *,
    base: Path,
    baselines: bool = False,
    controls: Sequence[str] | None = (),
    source: str = "recipe",
    scales: Callable[[Plan], Sequence[float]] | None = None,
    names: Sequence[str] = (),
) -> tuple[RunContext, Plan]:
    """Join the process group, open the data, and check everything that can be checked before anything is trained.

    `names`: the jobs that this process will train (default: all). `scales` gives those of `make_plan` from the plan
    without them (default: what the folder's first-pair test found).
    Raises ConfigError, DataError, ArtefactError or RunError.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself sees it
        raise ConfigError(
            "a child process runs your script again: put what it starts below `if __name__ == '__main__':`"
        )
    device = dist.init(recipe.engine.device, timeout_seconds=collective_timeout(recipe.engine.timeout))
    start = read_start(recipe, base, source)
    with named(source, "data.train"):
        index = open_data(recipe, base)
    if dist.is_main():
        _warn(source, data_warnings(recipe.data, index))
    recipe = recipe.with_tokens(dist.from_main(lambda: _caption_tokens(recipe, index, base, folder)))
    context = RunContext(folder, recipe, index, device, base, start)
    planned = functools.partial(plan_run, context, baselines=baselines, controls=controls, source=source)
    plan = planned()
    found = dist.from_main(lambda: accepted_scales(folder)) if scales is None else scales(plan)
    if found:
        plan = planned(scales=found)
    context = replace(context, contents=_contents(context, source))
    dist.on_main(lambda: check_unchanged(context, plan))
    chosen = dist.on_all(lambda: only(plan, names, folder)) if names else plan.jobs
    dist.on_main(lambda: _warn(source, device_warnings(recipe, _unbegun(chosen, folder), device)))
    models = [job.spec.name for job in chosen]
    check_engines(recipe, models, dist.world_size(), base, source)
    dist.on_main(lambda: check_loggers({name for model in models for name in recipe.engine_of(model).loggers}))
    return context, plan


def _caption_tokens(recipe: Recipe, index: Index, base: Path, folder: Path) -> Any:
    """`data.caption_tokens`; without it, what follows from the lengths that `compt data check` stored, as in plans.

    A run that was begun keeps what it has: the steps of its controls follow from that.
    """
    if recipe.data.caption_tokens is not None:
        return recipe.data.caption_tokens
    if (folder / RECIPE).exists():
        begun = read_yaml(recipe_text(folder / RECIPE), str(folder / RECIPE))
        return begun.get("data", {}).get("caption_tokens") if isinstance(begun, dict) else None
    lengths = stored_lengths(index, index_folder_of(recipe, base))
    return None if lengths is None else computed_tokens(lengths, recipe)


def _contents(context: RunContext, source: str) -> dict[str, str]:
    """Open the data that models are scored on. Returns hashes for `RunContext.contents`. Raises DataError."""
    recipe, base = context.recipe, context.base
    columns = hash_json(recipe.data.caption_columns or [])
    contents = {"the training shards": context.index.content, "what data.caption_columns names": columns}
    digests = {table.path: table.digest for table in context.index.tables if table}
    contents |= {f"{TABLE} {name}": digests[base / name] for name in recipe.data.tables}
    with named(source, "evaluation.sets"):
        scorer = Scorer(recipe, base)
        for item in recipe.evaluation.sets:
            scorer.ask(item)
        found = check_sets(recipe.evaluation.sets, scorer.settings, contact_sheet=recipe.evaluation.contact_sheet)
    # A set that the recipe defines in another way is another set: models are scored again on it.
    defined = {item.name: hash_json(item.result_fields())[:8] for item in recipe.evaluation.sets}
    contents |= {f"the files of evaluation set '{name}' ({defined[name]})": found[name] for name in found}
    if recipe.evaluation.validation:
        with named(source, "evaluation.validation"):
            held_out = dist.from_main(lambda: _held_out(scorer, source))
        contents[f"the shards {' '.join(recipe.evaluation.validation)}"] = held_out
    with named(source, "data.cache_size"):
        dist.on_main(lambda: _check_room(context, scorer))
    return contents


def _check_room(context: RunContext, scorer: Scorer) -> None:
    """Raise DataError for a cache that cannot hold what training and a look at the model meanwhile need."""
    data, size = context.recipe.data, scorer.cache.size
    training, beside = bytes_of(context.index.shards, 2 * data.shuffle_shards), scorer.bytes_beside_training
    together = training + beside if context.recipe.evaluation.every else max(training, beside)
    if together > size:
        raise DataError(
            f"is {size:,} bytes, but {together:,} are needed at a time: up to {training:,} for the shards of "
            f"training (fewer with a lower data.shuffle_shards), and up to {beside:,} for those that a model is scored "
            "on meanwhile; enlarge it"
        )


def _held_out(scorer: Scorer, source: str) -> str:
    index = scorer.held_out()
    if index.account.faults:
        text = "%s: evaluation.validation holds more than is used: %s (compt data check shows what to do)"
        _log.warning(text, source, index.account.line())
    return index.content


def waiting(plan: Plan, folder: Path) -> list[Job]:
    """The jobs that still have to be trained or scored, in their order; the same on every rank."""
    left = [
        job
        for job in plan.jobs
        if job.same_as is None and not is_finished(read_manifest(folder / "jobs" / job.name), plan.recipe)
    ]
    return [plan.job(name) for name in dist.broadcast_object([job.name for job in left])]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Hold the run folder, and end in Interrupted on SIGTERM, SIGUSR1 and Ctrl-C. Raises RunError."""
    with locked(folder), StopSignal(at_once=True):
        yield


def run_jobs(
    context: RunContext, plan: Plan, jobs: Iterable[Job], say: Say, calibration: dict[str, Any] | None = None
) -> None:
    """Finish some jobs of the plan; call this inside `running`. Raises what training raises.

    `calibration` replaces the record of the first-pair test in run.json.
    """
    with Watch(context.folder, context.recipe.engine.timeout) as watch:
        dist.on_main(lambda: check_unchanged(context, plan))
        started = dist.from_main(lambda: write_state(context, plan, calibration))
        for job in jobs:
            if job.same_as is None:
                watch.about(job.name)
                # Another process may work at other jobs of this run.
                with locked(context.job_folder(job.name), lambda: _as_it_was(context.folder, started)):
                    JobRun(job, context, say).run()


def run_chain(context: RunContext, plan: Plan, say: Say) -> None:
    """Finish every job of the plan, from whatever state the folder has.

    Raises what training raises, and Interrupted on SIGTERM, SIGUSR1 and Ctrl-C. Finished work stays.
    """
    with running(context.folder):
        run_jobs(context, plan, plan.jobs, say)


def only(plan: Plan, names: Sequence[str], folder: Path) -> list[Job]:
    """The jobs called `names`, in the plan's order.

    Raises ConfigError for an unknown name, and RunError when a job grows from a model that is neither done nor named.
    """
    known = {job.name: job for job in plan.jobs}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--only {name}: is none of the models to train{nearest(name, known)}: {', '.join(known)}"
            )
    for job in (known[name] for name in names):
        if job.teacher is None or job.teacher in names:
            continue
        state = read_manifest(folder / "jobs" / job.teacher)["state"]
        if state != "done":
            raise RunError(f"{folder}: {job.name} grows from {job.teacher}, which is {state}; train that first")
    return [job for job in plan.jobs if job.name in names]


def run_only(context: RunContext, plan: Plan, jobs: Sequence[Job], say: Say) -> None:
    """Finish some jobs. Other processes may train others of the same run at the same time.

    Raises as `run_chain` does.
    """
    with StopSignal(at_once=True):
        run_jobs(context, plan, jobs, say)


def start_fresh(folder: Path) -> None:
    """Remove what a run wrote. Raises RunError if a process is using the folder, or if it is no run folder."""
    if not folder.exists():
        return
    state = folder / STATE
    if not state.exists() and any(path.name not in LOCKS for path in folder.iterdir()):
        raise RunError(f"{folder} holds other files than a run's; it is not removed")
    with contextlib.ExitStack() as locks, disk_errors(folder):
        locks.enter_context(locked(folder))
        # First, so that no process begins another job from here on.
        locks.enter_context(writing(folder))
        # Processes that train single jobs only hold the locks of these.
        for job in sorted((folder / "jobs").glob("*/")):
            locks.enter_context(locked(job))
        for path in (folder / name for name in ("jobs", FOLDER, "report", "report.html", "report.md", RECIPE)):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        # Last: without run.json a half-removed folder would be refused as no run folder, the next time.
        state.unlink(missing_ok=True)
