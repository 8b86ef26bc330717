"""GPU-hours of a plan's chain and of its members trained individually, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compt.cost.gpus import Device
from compt.cost.paper import IMAGES, TABLE_2
from compt.cost.speed import Conditions, Throughput, fitted, measured, published_times, relative_error, speed
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
    teacher = job.active_teacher
    conditions = Conditions.of(recipe, gpus, job.spec.name)
    if device is not None:
        found = speed(job.spec, teacher, cost, device, conditions, throughput)
    else:
        known = throughput and measured(job.spec, teacher, cost, conditions, throughput)
        if not known:
            return None
        found = known
    hours, low, high = (cost.samples * s / 3600 for s in (found.seconds_per_sample, found.low, found.high))
    return Hours(hours, low, high, hours / gpus, found.kind, (f"{found.kind} {found.source}",))


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


@dataclass(frozen=True)
class PublishedRow:
    """A model of Table 2: the paper's A100 hours, what they imply, and how far the fitted model is from them.

    `error` is the projection over the published hours, less 1; links after the first have `chain` and its numbers.
    """

    model: str
    individual_hours: float
    individual_accumulated_hours: float
    individual_utilisation: float
    individual_error: float
    chain_hours: float
    chain_accumulated_hours: float
    chain_utilisation: float
    chain_error: float
    speedup: float
    accumulated_speedup: float


def published_rows(plan: Plan) -> list[PublishedRow]:
    """The paper's own rows, where the plan's chain is one of its Table 2; else []."""
    models = tuple(job.spec.name for job in plan.links)
    key = next((k for k, v in TABLE_2.items() if v.models == models and IMAGES[v.dataset] == plan.images), None)
    if key is None:
        return []
    family, model, rows = TABLE_2[key], fitted(), []
    times = [time for time in published_times() if time.family == key]
    for at, name in enumerate(models):
        alone = next(time for time in times if time.model == name and time.teacher is None)
        link = next((time for time in times if time.model == name and time.teacher), alone)
        rows.append(
            PublishedRow(
                model=name,
                individual_hours=alone.hours,
                individual_accumulated_hours=100 * family.baseline[at].accumulated_hours,
                individual_utilisation=alone.utilisation,
                individual_error=relative_error(model, alone),
                chain_hours=link.hours,
                chain_accumulated_hours=100 * family.chain[at].accumulated_hours,
                chain_utilisation=link.utilisation,
                chain_error=relative_error(model, link),
                speedup=family.speedup[at].hours,
                accumulated_speedup=family.speedup[at].accumulated_hours,
            )
        )
    return rows
