"""GPU-hours of a plan's chain and of its members trained individually, beside the paper's. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compt.hardware import Device, PublishedTime, Throughput, fitted, measured, published_times, relative_error, speed
from compt.macs import Mode
from compt.paper import IMAGES, TABLE_2
from compt.planner import Job, Plan


@dataclass(frozen=True)
class Hours:
    """GPU-hours with their bounds. A sum is `projected` as soon as one of its terms is."""

    hours: float
    low: float
    high: float
    kind: Literal["measured", "projected"]


@dataclass(frozen=True)
class HoursRow:
    """A link of the chain; None stands for a job that was neither measured nor can be projected, and sums with it."""

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
        """Plain values, hours on one GPU."""
        return {**asdict(self), "speedup": self.speedup, "accumulated_speedup": self.accumulated_speedup}


def _ratio(individual: Hours | None, chain: Hours | None) -> float | None:
    return individual.hours / chain.hours if individual and chain else None


def _sum(before: Hours | None, more: Hours | None) -> Hours | None:
    if before is None or more is None:
        return None
    kind: Literal["measured", "projected"] = "measured" if before.kind == more.kind == "measured" else "projected"
    return Hours(before.hours + more.hours, before.low + more.low, before.high + more.high, kind)


def gpu_hours(plan: Plan, job: Job, mode: Mode, device: Device | None, throughput: Throughput | None) -> Hours | None:
    """What `job` takes on one GPU: measured, else projected for `device`; None where there is no device either."""
    cost = plan.cost(job, mode)
    data, precision = plan.recipe.data, plan.recipe.optimizer.precision
    asked: dict[str, Any] = {"captions": data.captions, "tokens": data.caption_tokens, "precision": precision}
    if device is not None:
        found = speed(job.spec, job.teacher_spec, cost, device, throughput=throughput, **asked)
    else:
        known = throughput and measured(job.spec, job.teacher_spec, cost, file=throughput, **asked)
        if not known:
            return None
        found = known
    hours = cost.samples / 3600
    return Hours(found.seconds_per_sample * hours, found.low * hours, found.high * hours, found.kind)


def family_hours(plan: Plan, mode: Mode, device: Device | None, throughput: Throughput | None = None) -> list[HoursRow]:
    """One row a link, smallest model first; without `baselines` in the recipe nothing is known of the individual ones.

    `device` is what unmeasured jobs are projected for; None leaves them open.
    """
    rows = []
    alone: Hours | None = Hours(0.0, 0.0, 0.0, "measured")
    together: Hours | None = Hours(0.0, 0.0, 0.0, "measured")
    for at, link in enumerate(plan.links):
        baseline = plan.individual[at] if plan.individual else None
        individual = gpu_hours(plan, baseline, mode, device, throughput) if baseline else None
        chain = gpu_hours(plan, link, mode, device, throughput)
        alone, together = _sum(alone, individual), _sum(together, chain)
        epochs = baseline.epochs if baseline else None
        rows.append(HoursRow(link.spec.name, link.epochs, epochs, individual, alone, chain, together))
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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def published_rows(plan: Plan) -> list[PublishedRow]:
    """The paper's own rows, where the plan's chain is one of its Table 2; else []."""
    models = tuple(job.spec.name for job in plan.links)
    for key, family in TABLE_2.items():
        if family.models == models and IMAGES[family.dataset] == plan.images:
            return _published(key, [time for time in published_times() if time.family == key])
    return []


def _published(key: str, times: Sequence[PublishedTime]) -> list[PublishedRow]:
    family, model = TABLE_2[key], fitted()
    rows = []
    for at, name in enumerate(family.models):
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
