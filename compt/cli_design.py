"""`compt plan --auto`: find a chain, say what it should cost and how sure that is, and write its recipe. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import typer
import yaml

from compt.cli_design_tables import Design, design_json, design_notes, design_tables
from compt.config import Recipe, parse_recipe
from compt.curves import LinkCurve, matches
from compt.design.candidates import Candidates, candidates
from compt.design.costs import Costs, distils, epoch_steps, hours_costs, macs_costs
from compt.design.epochs import Bound, EpochModel, Link, paper_matches
from compt.design.outcome import Outcome, Setting, designed_recipe, outcome
from compt.design.search import (
    MOST_MEMBERS,
    Found,
    Problem,
    by_size,
    least_cost,
    most_acceleration,
    problem,
    whole_epochs,
    within_budget,
)
from compt.errors import ConfigError
from compt.files import write_text
from compt.forecast import Machine, check_shares, make_forecast
from compt.formats import terminal
from compt.hardware import Throughput
from compt.hardware_devices import Device
from compt.planner import make_plan


def run_auto(
    recipe: Recipe,
    source: Path,
    *,
    objective: str,
    size: int | None,
    budget_gpu_hours: float | None,
    device: Device,
    gpus: int,
    throughput: Throughput | None,
    runs: Sequence[Path],
    out: Path | None,
    as_json: bool,
) -> None:
    """Find the best chain for the family of `recipe`, all of whose members are wanted, and print it.

    `objective`: cost, acceleration or budget. `size` is how many models the chain has (for `budget` at most). `runs`
    are folders whose measured links replace the paper's numbers. `out` takes the whole recipe. Raises ConfigError with
    one message for what cannot be designed.
    """
    check_shares(recipe, gpus, str(source))
    try:
        _check(recipe, objective, size, budget_gpu_hours)
        setting = _setting(recipe, device, gpus, throughput, runs)
        design = _design(setting, str(source), objective, size, budget_gpu_hours, runs)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    made = parse_recipe(design.values, f"the chain designed from {source}")
    forecast = make_forecast(made, Machine(device, gpus, throughput), source=f"the chain designed from {source}")
    if out is not None:
        head = f"# Designed by `compt plan --auto` from {source}, objective {objective}. Its epochs are predicted.\n"
        text = yaml.safe_dump(design.values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
        write_text(out, head + text)
    if as_json:
        typer.echo(json.dumps({**design_json(design), "forecast": forecast.to_json()}, indent=2))
        return
    console = terminal()
    console.print(design_tables(design, forecast))
    if out is not None:
        console.print(f"Recipe: {out}", soft_wrap=True, markup=False)


def _check(recipe: Recipe, objective: str, size: int | None, budget: float | None) -> None:
    """Raise ConfigError for options and recipes that no chain can be designed for."""
    wanted = len(recipe.family.members)
    if recipe.baselines is None:
        raise ConfigError("baselines: is missing; --auto takes the epochs of an individual training from it")
    if recipe.chain.from_ is not None:
        raise ConfigError(
            f"chain.from = '{recipe.chain.from_}': --auto designs chains whose first model is trained from scratch; "
            "leave it out"
        )
    if size is not None and size < wanted:
        raise ConfigError(
            f"--members {size}: family.members names {wanted} models, all of which are wanted; take {wanted} or more"
        )
    if objective == "budget":
        if budget is None:
            raise ConfigError("--objective budget: needs --budget GPU_HOURS")
        if not (budget > 0 and math.isfinite(budget)):
            raise ConfigError(f"--budget {budget:g}: should be a number of GPU-hours above 0")
    elif budget is not None:
        raise ConfigError(f"--budget {budget:g}: is for --objective budget, not {objective}")


def _design(
    setting: Setting, source: str, objective: str, size: int | None, budget: float | None, runs: Sequence[Path]
) -> Design:
    recipe = setting.recipe
    models = candidates(recipe.family.specs())
    if objective == "budget":
        costs = hours_costs(recipe, models.specs, setting.device, gpus=setting.gpus, throughput=setting.throughput)
    else:
        costs = macs_costs(recipe, models.specs, gpus=setting.gpus)
    most = max(MOST_MEMBERS, size or 0, len(models.wanted))
    task = _problem(setting, models, costs, most)
    search = _search(objective, budget)
    best = search(task, size)
    chosen = _outcome(setting, models, best, f"{len(best.chain)} models, chosen")
    few = models.only(models.presets)
    try:
        task_few = _problem(setting, few, costs.only(sorted(models.presets)), most)
        presets = [_outcome(setting, few, search(task_few, size), "presets only")]
    except ConfigError:
        presets = []  # the presets do not give a chain of that size, or within the budget
    others = [*_sizes(setting, models, task, objective, best, chosen), *presets, *_by_hand(setting)]
    wanted = [models.specs[at] for at in models.wanted]
    alone = outcome(setting, "individually", wanted, [setting.baseline_epochs] * len(wanted))
    values = designed_recipe(recipe, chosen.specs, chosen.epochs, source)
    notes = tuple(design_notes(setting, chosen, budget, runs))
    return Design(objective, setting, chosen, tuple(others), alone, values, notes)


def _setting(recipe: Recipe, device: Device, gpus: int, throughput: Throughput | None, runs: Sequence[Path]) -> Setting:
    settings = recipe.baselines
    assert settings is not None
    steps = settings.train.to_steps(recipe.data.images, recipe.optimizer.batch)
    if steps < 1:
        raise ConfigError(f"baselines.train = {settings.train}: is no step at all")
    curves = matches(runs) if runs else []
    own = [curve.match for curve in curves if curve.match is not None]
    bounds = [bound for curve in curves if (bound := _bound(curve)) is not None]
    model = EpochModel.fit(paper_matches(), own=own, bounds=bounds)
    return Setting(recipe, model, steps / epoch_steps(recipe), device, gpus, throughput)


def _bound(curve: LinkCurve) -> Bound | None:
    """What a curve that does not cross its baseline says all the same."""
    if curve.match is not None or curve.baseline is None or (curve.more_than is None and curve.at_most is None):
        return None
    distilled = float(curve.settings.get("distill.alpha", 0.0)) > 0
    link = Link(curve.student, curve.teacher, curve.position, curve.images, curve.baseline.epochs, distilled)
    runs = sorted({job.rpartition("/")[0] for point in curve.points for job in point.jobs})
    return Bound(link, f"on {curve.evaluation_set}: {', '.join(runs)}", curve.more_than, curve.at_most)


Search = Callable[[Problem, int | None], Found]


def _search(objective: str, budget: float | None) -> Search:
    if objective == "budget":
        limit = budget or 0.0
        return lambda task, size: within_budget(task, limit, size)
    return least_cost if objective == "cost" else most_acceleration


def _problem(setting: Setting, models: Candidates, costs: Costs, most: int) -> Problem:
    return problem(
        models,
        costs,
        setting.epochs,
        images=setting.recipe.data.images,
        baseline_epochs=setting.baseline_epochs,
        distilled=distils(setting.recipe),
        most=most,
    )


def _outcome(setting: Setting, models: Candidates, found: Found, label: str) -> Outcome:
    return outcome(setting, label, [models.specs[at] for at in found.chain], found.epochs)


def _sizes(
    setting: Setting, models: Candidates, task: Problem, objective: str, best: Found, chosen: Outcome
) -> list[Outcome]:
    """The best chain of each number of members that ends where the chosen one does, which is among them."""
    last = best.chain[-1]
    cheapest = by_size(task.of_fitting() if objective == "budget" else task, last)
    rows = []
    for length, found in sorted(cheapest.items()):
        if length == len(best.chain):
            rows.append(chosen)
        else:
            other = most_acceleration(task, length) if objective == "acceleration" else found
            rows.append(_outcome(setting, models, other, f"{length} model{'s' * (length > 1)}"))
    return rows


def _by_hand(setting: Setting) -> list[Outcome]:
    """The recipe's own chain, with the model's epochs and with its own; nothing where a link is no growth."""
    recipe = setting.recipe
    specs = recipe.family.specs()
    try:
        jobs = make_plan(recipe, world_size=setting.gpus).links
    except ConfigError:
        return []
    chain = [specs[link.model] for link in recipe.chain.links]
    predicted = [setting.baseline_epochs, *(setting.epochs.epochs(link) for link in setting.links(chain))]
    whole = list(whole_epochs(predicted, setting.baseline_epochs))
    own = outcome(setting, "the recipe's chain, its own epochs", chain, [job.epochs for job in jobs])
    return [outcome(setting, "the recipe's chain", chain, whole), replace(own, predicted=False)]
