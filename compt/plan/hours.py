"""GPU-hours of a plan's chain and of its members trained individually, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compt.cost.gpus import Device
from compt.cost.paper import IMAGES, TABLE_2, Efficiency
from compt.cost.speed import (
    Conditions,
    PublishedTime,
    Throughput,
    fitted,
    published_times,
    relative_error,
    speed,
)
from compt.cost.step import StepTime, step_time
from compt.cost.training import JobCost, Mode
from compt.plan.jobs import Job, Plan
from compt.recipe.schema import Recipe


@dataclass(frozen=True)
class Hours:
    """GPU-hours of training, with a range: those of one GPU, or the sum over all.

    `wall_hours` are GPU-hours over GPUs, as if none waited for another. `sources` say what they come from.
    """

    gpu_hours: float
    low: float
    high: float
    wall_hours: float
    kind: Literal["measured", "projected", "measured and projected"]
    sources: tuple[str, ...]


def job_hours(
    recipe: Recipe, job: Job, cost: JobCost, device: Device | None, gpus: int, throughput: Throughput | None
) -> Hours | None:
    """GPU-hours of `job` on `gpus` GPUs: measured, else projected for `device`, else None."""
    conditions = Conditions.of(recipe, gpus, job.spec.name)
    found = speed(job.spec, job.active_teacher, cost, device, conditions, throughput)
    if found is None:
        return None
    hours, low, high = (cost.samples * s / 3600 for s in (found.seconds_per_sample, found.low, found.high))
    return Hours(hours, low, high, hours / gpus, found.kind, (f"{found.kind} {found.source}",))


@dataclass(frozen=True)
class OwnHours:
    """GPU-hours of compt's own steps, projected from what a step launches, moves and computes (`compt.cost.step`)."""

    step: StepTime
    gpu_hours: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; seconds are of a step of one GPU."""
        return {
            "launches": self.step.launches,
            "host_seconds": self.step.host,
            "product_seconds": self.step.products,
            "traffic_seconds": self.step.traffic,
            "decides": self.step.decides,
            "gpu_hours": self.gpu_hours,
            "low": self.low,
            "high": self.high,
        }


def own_hours(recipe: Recipe, job: Job, device: Device, gpus: int) -> OwnHours | None:
    """The projection for `job` on `gpus` GPUs; None in fp32, in which nothing was counted."""
    conditions = Conditions.of(recipe, gpus, job.spec.name)
    if conditions.precision == "fp32":
        return None
    step = step_time(job.spec, job.active_teacher, job.cost, device, conditions)
    each = job.steps * gpus / 3600
    return OwnHours(step, each * step.seconds, each * step.low, each * step.high)


def sum_hours(items: Sequence[Hours]) -> Hours:
    """The sum of at least one job, one after another."""
    kinds = {item.kind for item in items}
    return Hours(
        gpu_hours=sum(item.gpu_hours for item in items),
        low=sum(item.low for item in items),
        high=sum(item.high for item in items),
        wall_hours=sum(item.wall_hours for item in items),
        kind=kinds.pop() if len(kinds) == 1 else "measured and projected",
        sources=tuple(dict.fromkeys(source for item in items for source in item.sources)),
    )


def speedups_of(pairs: Sequence[tuple[Hours | OwnHours | None, Hours | OwnHours | None]]) -> list[tuple[float, float]]:
    """For each pair of a link and its baseline: the baseline's GPU-hours over the link's, alone and summed up to it.

    [] if hours of one are not known.
    """
    found: list[tuple[float, float]] = []
    chain = alone = 0.0
    for own, other in pairs:
        if own is None or other is None:
            return []
        chain, alone = chain + own.gpu_hours, alone + other.gpu_hours
        found.append((other.gpu_hours / own.gpu_hours, alone / chain))
    return found


@dataclass(frozen=True)
class HoursRow:
    """A link of the chain. None: the job, or one of a sum, is neither measured nor can be projected."""

    model: str
    epochs: float
    individual_epochs: float | None
    individual: Hours | None
    individual_accumulated: Hours | None
    chain: Hours | None
    chain_accumulated: Hours | None

    @property
    def speedup(self) -> float | None:
        """How many times fewer GPU-hours the link takes than the same model individually."""
        return _ratio(self.individual, self.chain)

    @property
    def accumulated_speedup(self) -> float | None:
        """The same for all models up to this one."""
        return _ratio(self.individual_accumulated, self.chain_accumulated)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "speedup": self.speedup, "accumulated_speedup": self.accumulated_speedup}


def _ratio(individual: Hours | None, chain: Hours | None) -> float | None:
    return individual.gpu_hours / chain.gpu_hours if individual and chain else None


def _so_far(items: Sequence[Hours | None]) -> Hours | None:
    known = [item for item in items if item is not None]
    return sum_hours(known) if len(known) == len(items) else None


def family_hours(
    plan: Plan, mode: Mode, device: Device | None, throughput: Throughput | None = None, gpus: int = 1
) -> list[HoursRow]:
    """A row for each link, smallest model first; without `baselines` in the recipe, individual hours are None.

    `plan` is for `gpus` processes. Jobs that were not measured are projected for `device`; None leaves them open.
    """

    def hours(job: Job) -> Hours | None:
        return job_hours(plan.recipe, job, plan.cost(job, mode), device, gpus, throughput)

    rows: list[HoursRow] = []
    alone: list[Hours | None] = []
    chain: list[Hours | None] = []
    for at, link in enumerate(plan.links):
        baseline = plan.individual[at] if plan.individual else None
        alone.append(hours(baseline) if baseline else None)
        chain.append(hours(link))
        epochs = baseline.epochs if baseline else None
        rows.append(HoursRow(link.spec.name, link.epochs, epochs, alone[-1], _so_far(alone), chain[-1], _so_far(chain)))
    return rows


def published_rows(plan: Plan) -> list[dict[str, Any]]:
    """The paper's own rows, where the plan's chain is one of its Table 2; else [].

    Each has A100 hours of a model alone (`individual_...`) and as a link (`chain_...`, of the first link those alone),
    what they imply, and the error of the fitted model: the projection over the published hours, less 1.
    """
    models = tuple(job.spec.name for job in plan.links)
    key = next((k for k, v in TABLE_2.items() if v.models == models and IMAGES[v.dataset] == plan.images), None)
    if key is None:
        return []
    family, rows = TABLE_2[key], []
    times = [time for time in published_times() if time.family == key]
    for at, name in enumerate(models):
        alone = next(time for time in times if time.model == name and time.teacher is None)
        link = next((time for time in times if time.model == name and time.teacher), alone)
        row = {"model": name, **_published("individual", alone, family.baseline[at])}
        row |= _published("chain", link, family.chain[at])
        speedup = family.speedup[at]
        rows.append(row | {"speedup": speedup.hours, "accumulated_speedup": speedup.accumulated_hours})
    return rows


def _published(way: str, time: PublishedTime, cells: Efficiency) -> dict[str, float]:
    return {
        f"{way}_hours": time.hours,
        f"{way}_accumulated_hours": 100 * cells.accumulated_hours,
        f"{way}_utilisation": time.utilisation,
        f"{way}_error": relative_error(fitted(), time),
    }
