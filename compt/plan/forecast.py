"""What a plan asks of machines: GPU-hours, memory of a GPU, disk, and what a chain saves.

Joins the jobs of `compt.plan.jobs` with the speeds of `compt.cost.speed` and the memory of `compt.cost.memory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import ValidationError

from compt.cost.counts import parameters
from compt.cost.gpus import Device
from compt.cost.memory import Memory, artefact_bytes, checkpoint_bytes, memory_per_gpu
from compt.cost.speed import Throughput
from compt.cost.training import Mode
from compt.errors import ConfigError
from compt.plan.hours import Hours, OwnHours, job_hours, own_hours, speedups_of, sum_hours
from compt.plan.jobs import Job, Plan, make_plan
from compt.plan.links import Start, broken_promises
from compt.plan.teacher_cache import CachedCaptions, cached_captions
from compt.recipe.engine import ENGINES, EngineConfig, changed_engine
from compt.recipe.read import largest_divisor, split_batch
from compt.recipe.schema import Recipe

MOST_GPUS = 8
"""GPUs to plan for by default: those of a node."""
RESERVED_BYTES = 1e9
"""Memory of a GPU for CUDA's context, its libraries and the collectives; no estimate of a job includes it."""
FRAGMENTED = 0.05
"""Share of a GPU's memory that the allocator may lose to fragments."""
MODES: tuple[Mode, ...] = ("exact", "paper")
_SPEEDUPS = ("hours_speedup", "hours_accumulated_speedup")


def usable_bytes(total: float) -> float:
    """What a job can use of a GPU with `total` bytes."""
    return total * (1 - FRAGMENTED) - RESERVED_BYTES


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind that train one job together; `throughput` holds what was measured on them."""

    device: Device
    gpus: int
    throughput: Throughput | None = None

    @property
    def room_bytes(self) -> float:
        """Memory of a GPU that is left for a job."""
        return usable_bytes(self.device.memory_bytes)


@dataclass(frozen=True)
class Fit:
    """Memory of a GPU with one engine: `stored` keeps every activation, `recomputed` computes those of blocks again.

    A GPU has `room` bytes for it.
    """

    stored: Memory
    recomputed: Memory
    room: float

    def memory(self, recompute: bool) -> Memory:
        """What is needed with or without `engine.recompute`."""
        return self.recomputed if recompute else self.stored

    def fits(self, recompute: bool) -> bool:
        """Whether the GPU has room for it."""
        return self.memory(recompute).total_bytes <= self.room

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        ways = {"stored": False, "recomputed": True}
        return {
            name: {**asdict(self.memory(on)), "total_bytes": self.memory(on).total_bytes, "fits": self.fits(on)}
            for name, on in ways.items()
        }


@dataclass(frozen=True)
class Remedy:
    """Jobs too large for the machine, and changes that each let all of them fit and that their recipe accepts.

    `micro_batch`: the largest `engine.micro_batch` that fits. `recompute`: whether `engine.recompute` is enough, if
    some jobs keep activations. `engine`: the first `engine.name` that fits; `engine_recomputed`: the first that fits
    with recomputed activations. None: no change of that kind is enough.
    """

    jobs: tuple[str, ...]
    micro_batch: int | None
    recompute: bool
    engine: str | None
    engine_recomputed: str | None


@dataclass(frozen=True)
class Disk:
    """Bytes of a job's folder, logs and scores left out.

    `peak_bytes` is reached while a checkpoint is written before the oldest one goes, or while the model is written with
    the checkpoints still there; `end_bytes` stay.
    """

    initial_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    model_bytes: int
    peak_bytes: int
    end_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What one job needs. Without a machine there are neither hours nor memory.

    `engine` and `recompute` are how the recipe trains it. `own` are the hours projected for compt itself. `cached` is
    what the teacher's cache would have; neither MACs nor hours include it.
    """

    job: Job
    engine: str
    recompute: bool
    hours: Hours | None
    memory: Mapping[str, Fit]
    disk: Disk
    own: OwnHours | None = None
    cached: CachedCaptions | None = None

    @property
    def needed_bytes(self) -> float:
        """Memory of a GPU as the recipe trains the job. Needs a machine."""
        return self.memory[self.engine].memory(self.recompute).total_bytes

    @property
    def fits(self) -> bool:
        """Whether the GPU has `needed_bytes`. Needs a machine."""
        return self.memory[self.engine].fits(self.recompute)


@dataclass(frozen=True)
class Totals:
    """Sums over several jobs; `parameters` of all their models together."""

    models: int
    parameters: int
    epochs: float
    samples: int
    steps: int
    macs: Mapping[Mode, float]
    hours: Hours | None


@dataclass(frozen=True)
class Forecast:
    """A plan with what it asks for.

    `individual` are the members of the chain trained individually, planned or not; their memory is left out.
    """

    plan: Plan
    machine: Machine | None
    estimates: tuple[Estimate, ...]
    individual: tuple[Estimate, ...]
    remedy: Remedy | None = None

    @property
    def links(self) -> list[Estimate]:
        """The chain alone."""
        return [item for item in self.estimates if item.job.kind == "link"]

    @property
    def trained(self) -> list[Estimate]:
        """All that is really trained: without jobs whose model an earlier one has."""
        return [item for item in self.estimates if item.job.same_as is None]

    def totals(self, items: Sequence[Estimate]) -> Totals:
        """The sums over `items`."""
        return Totals(
            models=len(items),
            parameters=sum(parameters(item.job.spec) for item in items),
            epochs=sum(item.job.epochs for item in items),
            samples=sum(item.job.samples for item in items),
            steps=sum(item.job.steps for item in items),
            macs={mode: sum(self.plan.cost(item.job, mode).total_macs for item in items) for mode in MODES},
            hours=sum_hours(known) if (known := [item.hours for item in items if item.hours]) else None,
        )

    def speedups(self) -> list[tuple[float, float]]:
        """For each link: baseline GPU-hours / its GPU-hours, for it alone and summed up to it.

        [] without a machine, and where the recipe does not say how members are trained individually.
        """
        return speedups_of([(link.hours, alone.hours) for link, alone in self._pairs()])

    def own_speedups(self) -> list[tuple[float, float]]:
        """The same of the hours projected for compt itself; [] where some job has none."""
        return speedups_of([(link.own, alone.own) for link, alone in self._pairs()])

    def _pairs(self) -> Iterable[tuple[Estimate, Estimate]]:
        return zip(self.links, self.individual, strict=False)

    def disk_peak_bytes(self) -> int:
        """The most bytes that the run folder holds at any time, logs and scores left out."""
        peak = kept = 0
        for item in self.trained:
            peak = max(peak, kept + item.disk.peak_bytes)
            kept += item.disk.end_bytes
        return peak

    def disk_end_bytes(self) -> int:
        """What stays in the run folder."""
        return sum(item.disk.end_bytes for item in self.trained)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; docs/planning.md lists the keys."""
        recipe, machine, speedups = self.plan.recipe, self.machine, self.speedups()
        # Tables show one mode. Programs compare both, so the JSON always has both.
        rows = {mode: self.plan.rows(mode) for mode in MODES}
        groups = {"chain": self.links, "individual": list(self.individual), "run": self.trained}
        return {
            "recipe": recipe.name,
            "images": self.plan.images,
            "batch": recipe.optimizer.batch,
            "captions": recipe.data.captions,
            "caption_tokens": recipe.data.caption_tokens,
            "precision": recipe.optimizer.precision,
            "machine": machine
            and {
                "kind": machine.device.name,
                "title": machine.device.title,
                "gpus": machine.gpus,
                "memory_bytes": machine.device.memory_bytes,
                "room_bytes": machine.room_bytes,
            },
            "jobs": [
                {
                    **item.job.to_json(),
                    "inexact": _inexact(item.job),
                    "engine": item.engine,
                    "recompute": item.recompute,
                    "macs": {mode: rows[mode][at] for mode in MODES},
                    "hours": item.hours and asdict(item.hours),
                    "own_hours": item.own and item.own.to_json(),
                    **dict(zip(_SPEEDUPS, speedups[at] if at < len(speedups) else (None, None), strict=True)),
                    "memory": {engine: fit.to_json() for engine, fit in item.memory.items()} or None,
                    "disk": asdict(item.disk),
                    "teacher_cache": item.cached and asdict(item.cached),
                }
                for at, item in enumerate(self.estimates)
            ],
            "totals": {name: asdict(self.totals(items)) if items else None for name, items in groups.items()},
            "acceleration": {
                **{f"{mode}_macs": self.plan.acceleration(mode) for mode in MODES},
                "gpu_hours": speedups[-1][1] if speedups else None,
                "own_gpu_hours": own[-1][1] if (own := self.own_speedups()) else None,
            },
            "too_large": self.remedy and asdict(self.remedy),
            "disk": {"peak_bytes": self.disk_peak_bytes(), "end_bytes": self.disk_end_bytes()},
        }


def default_gpus(batch: int) -> int:
    """The GPUs of a node, or the most below them that share `batch` evenly."""
    return largest_divisor(batch, MOST_GPUS)


def make_forecast(
    recipe: Recipe,
    machine: Machine | None,
    *,
    baselines: bool = False,
    controls: Sequence[str] | None = None,
    start: Start | None = None,
    source: str = "recipe",
) -> Forecast:
    """Plan `recipe` and say what it asks of `machine`; None: of one process, with neither hours nor memory.

    `baselines`, `controls`, `start` and `source` are those of `make_plan`.
    Raises ConfigError for what `make_plan` refuses, and for GPUs or micro-batches that do not divide the batch.
    """
    gpus = machine.gpus if machine else 1
    check_shares(recipe, gpus, source)
    plan = make_plan(recipe, baselines=baselines, controls=controls, world_size=gpus, start=start, source=source)
    estimates = tuple(_estimate(recipe, job, machine) for job in plan.jobs)
    individual = tuple(
        replace(_estimate(recipe, job, None), hours=_hours(recipe, job, machine), own=_own(recipe, job, machine))
        for job in plan.individual
    )
    remedy = _remedy(recipe, estimates, machine) if machine else None
    return Forecast(plan, machine, estimates, individual, remedy)


def check_shares(recipe: Recipe, gpus: int, source: str) -> None:
    """Raise ConfigError unless `gpus` share the batch evenly, and micro-batches of each link divide a share."""
    for link in recipe.chain.links:
        micro = recipe.engine_of(link.model).micro_batch
        try:
            split_batch(recipe.optimizer.batch, gpus, micro)
        except ConfigError as error:
            where = source if micro == recipe.engine.micro_batch else f"{source}: link {link.model}"
            raise ConfigError(f"{where}: {error}") from None


def _estimate(recipe: Recipe, job: Job, machine: Machine | None) -> Estimate:
    disk, config = _disk(recipe, job), recipe.engine_of(job.spec.name)
    cached = cached_captions(recipe, job, machine.gpus if machine else 1)
    if machine is None:
        return Estimate(job, config.name, config.recompute, None, {}, disk, cached=cached)
    memory = {}
    for engine in ENGINES:
        stored, again = (memory_of(recipe, job, engine, machine.gpus, recompute=on) for on in (False, True))
        memory[engine] = Fit(stored, again, machine.room_bytes)
    hours, own = _hours(recipe, job, machine), _own(recipe, job, machine)
    return Estimate(job, config.name, config.recompute, hours, memory, disk, own, cached)


def _hours(recipe: Recipe, job: Job, machine: Machine | None) -> Hours | None:
    if machine is None:
        return None
    return job_hours(recipe, job, job.cost, machine.device, machine.gpus, machine.throughput)


def _own(recipe: Recipe, job: Job, machine: Machine | None) -> OwnHours | None:
    return None if machine is None else own_hours(recipe, job, machine.device, machine.gpus)


def _remedy(recipe: Recipe, estimates: Sequence[Estimate], machine: Machine) -> Remedy | None:
    def config(item: Estimate) -> EngineConfig:
        return recipe.engine_of(item.job.spec.name)

    def helps(item: Estimate, engine: str, recompute: bool) -> bool:
        return item.memory[engine].fits(recompute) and accepts(config(item), name=engine, recompute=recompute)

    large = [item for item in estimates if item.job.same_as is None and not item.fits and not needs_less(config(item))]
    if not large:
        return None
    others = [engine for engine in ENGINES if any(engine != item.engine for item in large)]
    micro = [_micro_batch(recipe, item, machine) for item in large]
    kept = not all(item.recompute for item in large)
    alike = (name for name in others if all(helps(item, name, item.recompute) for item in large))
    again = (name for name in others if all(helps(item, name, True) for item in large))
    return Remedy(
        jobs=tuple(item.job.name for item in large),
        micro_batch=min(filter(None, micro)) if all(micro) else None,
        recompute=kept and all(helps(item, item.engine, True) for item in large),
        engine=next(alike, None),
        engine_recomputed=next(again, None),
    )


def _micro_batch(recipe: Recipe, item: Estimate, machine: Machine) -> int | None:
    """The largest micro-batch below the recipe's with which a job fits."""
    share, config = recipe.optimizer.batch // machine.gpus, recipe.engine_of(item.job.spec.name)
    if not accepts(config, micro_batch=1):
        return None
    now = min(config.micro_batch or share, share)

    def needed(size: int) -> float:
        job, on = item.job, item.recompute
        return memory_of(recipe, job, item.engine, machine.gpus, micro_batch=size, recompute=on).total_bytes

    sizes = (size for size in range(now - 1, 0, -1) if share % size == 0)
    return next((size for size in sizes if needed(size) <= machine.room_bytes), None)


def accepts(config: EngineConfig, **change: Any) -> bool:
    """Whether a recipe with `config` may have `change` in it."""
    try:
        changed_engine(config, change)
    except ValidationError:
        return False
    return True


def needs_less(config: EngineConfig) -> bool:
    """Whether a job may need less than `memory_of` says: it searches for what fits, or keeps less on the GPU."""
    return bool(config.find_micro_batch or config.tune or config.fsdp2.cpu_offload or config.deepspeed_config)


def _disk(recipe: Recipe, job: Job) -> Disk:
    precision, averaged = recipe.optimizer.precision, recipe.optimizer.ema is not None
    engine = recipe.engine_of(job.spec.name).name
    one = checkpoint_bytes(job.spec, job.active_teacher, engine=engine, ema=averaged, precision=precision)
    before, left = _checkpoints(recipe, job)
    initial = artefact_bytes(job.spec) if job.expand is not None else 0
    model = artefact_bytes(job.spec, ema=averaged)
    return Disk(
        initial_bytes=initial,
        checkpoint_bytes=one,
        checkpoints=left,
        model_bytes=model,
        peak_bytes=initial + max((before + 1) * one, left * one + model),
        end_bytes=initial + model,
    )


def _checkpoints(recipe: Recipe, job: Job) -> tuple[int, int]:
    """Checkpoints on disk while the last one is written, without it, and afterwards; no earlier moment has more."""
    config, images, batch = recipe.engine_of(job.spec.name), recipe.data.images, recipe.optimizer.batch
    every = max(1, config.checkpoint_every.to_steps(images, batch))
    besides = max(1, config.keep_every.to_steps(images, batch)) if config.keep_every else None
    gaps, most = [gap for gap in (every, besides) if gap], config.keep_checkpoints

    def kept(*end: int) -> int:
        late = (step for gap in gaps for step in range((job.steps - 1) // gap * gap, 0, -gap)[:most])
        newest = sorted({*late, *end})[-most:]
        return len(newest) + (max(newest[0] - 1, 0) // besides if besides and newest else 0)

    return kept(), kept(job.steps)


def _inexact(job: Job) -> dict[str, list[str]] | None:
    if job.expand is None or job.teacher_spec is None:
        return None
    found = broken_promises(job.teacher_spec, job.spec, job.expand)
    return {tower: list(reasons) for tower, reasons in found.items()}


def memory_of(
    recipe: Recipe,
    job: Job,
    engine: str,
    gpus: int,
    *,
    micro_batch: int | None = None,
    recompute: bool = False,
    config: EngineConfig | None = None,
) -> Memory:
    """Bytes of each of `gpus` GPUs that train `job`; `micro_batch` and `config` replace the recipe's."""
    config = config or recipe.engine_of(job.spec.name)
    return memory_per_gpu(
        job.spec,
        job.active_teacher,
        engine=engine,
        world_size=gpus,
        batch=recipe.optimizer.batch,
        captions=recipe.data.captions,
        tokens=recipe.data.caption_tokens,
        precision=recipe.optimizer.precision,
        micro_batch=micro_batch or config.micro_batch,
        recompute=recompute,
        loss_chunk=config.loss_rows,
        shard_teacher=config.shard_teacher,
        ema=recipe.optimizer.ema is not None,
        replicas=config.fsdp2.replicas if engine == config.name else 1,
        reshard=config.fsdp2.reshard_after_forward or engine != config.name,
    )


def not_modelled(config: EngineConfig) -> tuple[str, ...]:
    """What settings of an engine change of memory, MACs and hours, and the plan does not know."""
    searched = config.find_micro_batch or config.tune
    given = {
        "engine.fsdp2.cpu_offload, which takes weights, gradients and moments off the GPU": config.fsdp2.cpu_offload,
        "whole gradients between micro-batches, with engine.fsdp2.reshard_after_forward: false": (
            not config.fsdp2.reshard_after_forward and config.micro_batch is not None
        ),
        "the buckets and offloading of engine.deepspeed_config": config.deepspeed_config is not None,
        "what engine.compile keeps otherwise": config.compile != "off",
        "what engine.graphs keeps during the whole step: gradients, and the batch once more": config.graphs == "on",
        "the micro-batch, which is searched before training: MACs and hours are without a second forward pass": (
            searched and config.micro_batch is None
        ),
    }
    return tuple(text for text, there in given.items() if there)
