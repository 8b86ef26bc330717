"""What an epoch of each possible link costs, for all pairs of candidates at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compt.cost.gpus import Device
from compt.cost.speed import Conditions, Speed, Throughput, nameless, speed
from compt.cost.training import JobCost
from compt.errors import ConfigError
from compt.models.presets import ModelSpec
from compt.plan.jobs import recipe_cost
from compt.recipe.schema import Recipe

Floats = NDArray[np.float64]
Cost = Callable[[ModelSpec, ModelSpec | None], float]


@dataclass(frozen=True)
class Costs:
    """Cost of an epoch, in MACs or GPU-hours: `alone` [n] of a model from scratch, `links` [n, n] of a link.

    Rows are teachers, whose forward passes are in it; columns are students.
    """

    unit: Literal["macs", "gpu_hours"]
    alone: Floats
    links: Floats


def epoch_steps(recipe: Recipe) -> int:
    """Steps of one epoch; an incomplete last batch is dropped."""
    return recipe.data.images // recipe.optimizer.batch


def distils(recipe: Recipe) -> bool:
    """Whether links distil features, and do not only inherit weights.

    Raises ConfigError where some do and others do not: a design has one kind of link.
    """
    usual = recipe.chain.distill.alpha
    found = {(usual if link.alpha is None else link.alpha) > 0 for link in recipe.chain.links[1:]} or {usual > 0}
    if len(found) > 1:
        raise ConfigError(
            "chain.links: alpha is 0 for some links and above 0 for others; --auto needs one kind of link"
        )
    return found.pop()


def epoch_cost(recipe: Recipe, student: ModelSpec, teacher: ModelSpec | None, gpus: int) -> JobCost:
    """The cost of an epoch on `gpus` processes, as a plan of `recipe` counts it in mode `exact`."""
    return recipe_cost(recipe, student, teacher, epoch_steps(recipe), gpus, recipe.data.caption_tokens)


def speed_of(
    recipe: Recipe, student: ModelSpec, teacher: ModelSpec | None, device: Device, gpus: int, file: Throughput | None
) -> Speed:
    """How fast each of `gpus` `device`s trains `student`: measured if `file` has exactly this job, else projected."""
    cost, conditions = epoch_cost(recipe, student, teacher, gpus), Conditions.of(recipe, gpus, student.name)
    found = speed(student, teacher, cost, device, conditions, file)
    assert found is not None  # there is a device
    return found


def macs_costs(recipe: Recipe, specs: Sequence[ModelSpec], *, gpus: int = 1) -> Costs:
    """MACs of an epoch on `gpus` processes, as a plan of `recipe` counts them in mode `exact`."""

    def macs(student: ModelSpec, teacher: ModelSpec | None) -> float:
        return epoch_cost(recipe, student, teacher, gpus).total_macs

    return Costs("macs", *_tables(specs, macs, distils(recipe)))


def hours_costs(
    recipe: Recipe,
    specs: Sequence[ModelSpec],
    device: Device,
    *,
    gpus: int = 1,
    throughput: Throughput | None = None,
) -> Costs:
    """GPU-hours of an epoch on `gpus` `device`s, as a plan of `recipe` counts them.

    Measured if `throughput` has exactly this job, else projected.
    """
    samples = epoch_steps(recipe) * recipe.optimizer.batch

    def hours(student: ModelSpec, teacher: ModelSpec | None, file: Throughput | None = None) -> float:
        return samples * speed_of(recipe, student, teacher, device, gpus, file).seconds_per_sample / 3600

    alone, links = _tables(specs, hours, distils(recipe))
    places = {nameless(spec): at for at, spec in enumerate(specs)}
    for entry in throughput.entries if throughput else ():
        student = places.get(nameless(entry.student))
        if student is None:
            continue
        if entry.teacher is None:
            alone[student] = hours(specs[student], None, throughput)
            if not distils(recipe):
                links[:, student] = alone[student]
        elif distils(recipe):
            teacher = places.get(nameless(entry.teacher))
            if teacher is not None:
                links[teacher, student] = hours(specs[student], specs[teacher], throughput)
    return Costs("gpu_hours", alone, links)


def _tables(specs: Sequence[ModelSpec], cost: Cost, distilled: bool) -> tuple[Floats, Floats]:
    """`alone` [n] and `links` [n, n] from some 2 n calls of `cost` instead of n^2.

    A teacher costs the same whatever its student; a student's cost depends on its teacher through the width of the
    joint embedding only, which is that of the projectors' output.
    """
    alone = np.array([cost(spec, None) for spec in specs])
    if not distilled:
        return alone, np.tile(alone, (len(specs), 1))
    links = np.empty((len(specs), len(specs)))
    for width in {spec.embed_dim for spec in specs}:
        rows = [at for at, spec in enumerate(specs) if spec.embed_dim == width]
        one = specs[rows[0]]
        students = np.array([cost(spec, one) for spec in specs])
        teachers = np.array([cost(one, specs[at]) for at in rows])
        links[rows] = students[None, :] + (teachers - teachers[0])[:, None]
    return alone, links
