"""`compt plan --auto`: find a chain, show what it should cost and how sure that is, and write its recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from compt.cli.design.tables import Design, DesignRequest, design_json, design_tables
from compt.cli.options import print_json
from compt.design.candidates import candidates
from compt.design.costs import distils, epoch_steps, hours_costs, macs_costs
from compt.design.curves import read_curves
from compt.design.epochs import EpochModel, paper_matches
from compt.design.outcome import Outcome, Setting, designed_recipe, outcome
from compt.design.search import (
    MOST_MEMBERS,
    FoundChain,
    Problem,
    by_size,
    least_cost,
    most_acceleration,
    problem,
    simplest,
    within_budget,
)
from compt.errors import ConfigError
from compt.files import write_text
from compt.plan.forecast import Machine, make_forecast
from compt.plan.jobs import make_plan
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Recipe
from compt.text import terminal


def run_auto(
    recipe: Recipe, source: Path, asked: DesignRequest, machine: Machine | None, *, out: Path | None, as_json: bool
) -> None:
    """Find the best chain with all members of the family of `recipe`, and print it.

    Without a `machine`, which objectives in hours need, no GPU-hours are shown. `out` takes the whole recipe. Raises
    ConfigError with one message for what cannot be designed, and for an `out` that exists.
    """
    if out is not None and out.exists():
        what = "is the recipe that is read" if source.exists() and out.samefile(source) else "exists already"
        raise ConfigError(f"--out {out}: {what}; name a file that does not exist")
    made_from = f"the chain designed from {source}"
    try:
        asked.check()
        _check(recipe, asked)
        design = _design(_setting(recipe, machine, asked), made_from, asked)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    forecast = make_forecast(parse_recipe(design.values, made_from), machine, source=made_from)
    if out is not None:
        head = f"# Designed by `compt plan --auto` from {source}: {design.goal}.\n# Its epochs are predicted.\n"
        text = yaml.safe_dump(design.values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
        write_text(out, head + text)
    if as_json:
        print_json({**design_json(design), "forecast": forecast.to_json()})
        return
    console = terminal()
    console.print(design_tables(design, forecast))
    if out is not None:
        console.print(f"Recipe: {out}", soft_wrap=True, markup=False)


def _check(recipe: Recipe, asked: DesignRequest) -> None:
    """Raise ConfigError for recipes that no chain can be designed for."""
    settings, images, batch = recipe.baselines, recipe.data.images, recipe.optimizer.batch
    if settings is None:
        raise ConfigError("baselines: is missing; --auto takes the epochs of the baselines from it")
    if recipe.chain.from_ is not None:
        raise ConfigError(
            f"chain.from = '{recipe.chain.from_}': --auto designs chains whose first model is trained from scratch; "
            "leave it out"
        )
    wanted = len(recipe.family.members)
    if asked.size is not None and asked.size < wanted:
        raise ConfigError(f"--members {asked.size}: family.members names {wanted} models; take {wanted} or more")
    steps, warmup = (length.to_steps(images, batch) for length in (settings.train, settings.warmup))
    if steps < 1:
        raise ConfigError(f"baselines.train = {settings.train}: is less than one step")
    if warmup > steps:
        raise ConfigError(
            f"baselines.warmup = {settings.warmup}: {warmup} steps are longer than baselines.train = "
            f"{settings.train} = {steps} steps of {batch} of the {images} images"
        )


def _setting(recipe: Recipe, machine: Machine | None, asked: DesignRequest) -> Setting:
    assert recipe.baselines is not None
    steps = recipe.baselines.train.to_steps(recipe.data.images, recipe.optimizer.batch)
    own = read_curves(asked.runs, on=asked.on, average_seeds=True, option="--runs-on").links if asked.runs else []
    # Designed links are expanded, and so are those of the line.
    own = [curve for curve in own if "initial" not in curve.settings]
    setting = Setting(recipe, EpochModel.fit(paper_matches(), own), steps / epoch_steps(recipe))
    if machine is None:
        return setting
    return replace(setting, device=machine.device, gpus=machine.gpus, throughput=machine.throughput)


def _design(setting: Setting, source: str, asked: DesignRequest) -> Design:
    """The chosen chain among others."""
    recipe, baseline_epochs = setting.recipe, setting.baseline_epochs
    models = candidates(recipe.specs())
    if asked.in_hours:
        assert setting.device is not None
        costs = hours_costs(recipe, models.specs, setting.device, gpus=setting.gpus, throughput=setting.throughput)
    else:
        costs = macs_costs(recipe, models.specs, gpus=setting.gpus)
    task = problem(
        models,
        costs,
        setting.epochs,
        images=recipe.data.images,
        baseline_epochs=baseline_epochs,
        distilled=distils(recipe),
        most=max(MOST_MEMBERS, asked.size or 0, len(models.wanted)),
    )
    best = _best(task, asked)
    each = _of_each_length(task, asked, best.chain[-1])
    presets = task.without(~np.isin(np.arange(len(models.specs)), list(models.presets)))
    # Simpler chains that count: as good a family within the budget, or as many models as were asked for.
    near = [best, *each, *_of_each_length(presets, asked, best.chain[-1])]
    if asked.objective == "budget":
        near = [one for one in near if len(one.chain) == len(best.chain) and one.cost <= asked.limit]
    elif asked.size is not None:
        near = [one for one in near if len(one.chain) == asked.size]
    chosen = simplest(near, models.presets, asked.loss)

    def shown(one: FoundChain) -> Outcome:
        tags = {best: asked.best} | {chosen: "chosen"}
        label = f"{len(one.chain)} model{'s' * (len(one.chain) > 1)}" + (f", {tags[one]}" if one in tags else "")
        return outcome(setting, label, [models.specs[at] for at in one.chain], one.epochs)

    rows = {one: shown(one) for one in sorted({*each, best, chosen}, key=lambda one: (len(one.chain), one.cost))}
    specs = [models.specs[at] for at in models.wanted]
    return Design(
        asked,
        setting,
        rows[chosen],
        rows[best],
        (*rows.values(), *_as_given(setting)),
        outcome(setting, "baselines", specs, [baseline_epochs] * len(specs)),
        designed_recipe(recipe, rows[chosen].specs, rows[chosen].epochs, source),
    )


def _best(task: Problem, asked: DesignRequest) -> FoundChain:
    """The optimum. Raises ConfigError where there is no such chain."""
    if asked.objective == "budget":
        return within_budget(task, asked.limit, asked.size)
    return (least_cost if asked.objective == "cost" else most_acceleration)(task, asked.size)


def _of_each_length(task: Problem, asked: DesignRequest, last: int) -> list[FoundChain]:
    """The best chain of each possible number of models that ends in `last`."""
    cheapest = by_size(task.large_enough() if asked.objective == "budget" else task, last)
    if asked.objective == "acceleration":
        return [most_acceleration(task, length) for length in cheapest]
    return list(cheapest.values())


def _as_given(setting: Setting) -> list[Outcome]:
    """The recipe's own chain with its own epochs; none where one of its links is no growth."""
    try:
        jobs = make_plan(setting.recipe, world_size=setting.gpus).links
    except ConfigError:
        return []
    label = f"{len(jobs)} model{'s' * (len(jobs) > 1)}, the recipe's"
    given = outcome(setting, label, [job.spec for job in jobs], [job.epochs for job in jobs])
    return [replace(given, predicted=False)]
