"""`compt plan --auto`: find a chain, say what it should cost and how sure that is, and write its recipe. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer
import yaml

from compt.cli.design.tables import Design, DesignRequest, design_json, design_notes, design_tables
from compt.design.candidates import Candidates, candidates
from compt.design.confidence import MEDIAN
from compt.design.costs import Costs, distils, epoch_steps, hours_costs, macs_costs
from compt.design.curves import LinkCurve, matches
from compt.design.epochs import Bound, EpochModel, LinkEpochs, paper_matches
from compt.design.outcome import Outcome, Setting, designed_recipe, outcome
from compt.design.search import (
    MOST_MEMBERS,
    FoundChain,
    Problem,
    by_size,
    found,
    least_cost,
    most_acceleration,
    problem,
    simplest,
    within_budget,
)
from compt.errors import ConfigError, nearest
from compt.files import write_text
from compt.plan.forecast import Machine, check_shares, make_forecast
from compt.plan.jobs import make_plan
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Recipe
from compt.text import terminal

UNITS = ("macs", "hours")


def run_auto(
    recipe: Recipe,
    source: Path,
    *,
    objective: str,
    unit: str | None,
    size: int | None,
    budget_gpu_hours: float | None,
    confidence: float | None,
    machine: Machine | None,
    runs: Sequence[Path],
    on: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Find the best chain for the family of `recipe`, all of whose members are wanted, and print it.

    `objective`: cost, acceleration or budget; the first two count `unit`, macs (default) or hours. `size` is how many
    models the chain has (for `budget` at most). `confidence` is the probability with which the epochs of each link are
    enough, by default the median's. Without a `machine`, which hours need, no GPU-hours are shown. `runs` are folders
    whose links, measured on the evaluation set `on`, replace the paper's numbers. `out` takes the whole recipe. Raises
    ConfigError with one message for what cannot be designed, and for an `out` that exists.
    """
    _check_out(out, source)
    gpus = machine.gpus if machine else 1
    check_shares(recipe, gpus, str(source))
    try:
        asked = _asked(objective, unit, size, budget_gpu_hours, confidence, runs)
        _check(recipe, asked)
        design = _design(_setting(recipe, machine, asked, on), str(source), asked)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    made = parse_recipe(design.values, f"the chain designed from {source}")
    forecast = make_forecast(made, machine, source=f"the chain designed from {source}")
    if out is not None:
        head = (
            f"# Designed by `compt plan --auto` from {source}: {design.goal}.\n"
            f"# Its epochs are predicted; all links long enough with {100 * design.chosen.all_long_enough:.0f} %.\n"
        )
        text = yaml.safe_dump(design.values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
        write_text(out, head + text)
    if as_json:
        typer.echo(json.dumps({**design_json(design), "forecast": forecast.to_json()}, indent=2))
        return
    console = terminal()
    console.print(design_tables(design, forecast))
    if out is not None:
        console.print(f"Recipe: {out}", soft_wrap=True, markup=False)


def _check_out(out: Path | None, source: Path) -> None:
    if out is not None and out.exists():
        what = "is the recipe that is read" if source.exists() and out.samefile(source) else "exists already"
        raise ConfigError(f"--out {out}: {what}; name a file that does not exist")


def _asked(
    objective: str,
    unit: str | None,
    size: int | None,
    budget: float | None,
    confidence: float | None,
    runs: Sequence[Path],
) -> DesignRequest:
    """The options, checked against each other."""
    if unit is not None and unit not in UNITS:
        raise ConfigError(f"--in {unit}: should be macs or hours{nearest(unit, UNITS)}")
    if objective == "budget":
        if unit is not None:
            raise ConfigError(f"--in {unit}: is for the objectives cost and acceleration; a budget is of GPU-hours")
        if budget is None:
            raise ConfigError("--objective budget: needs --budget GPU_HOURS")
        if not (budget > 0 and math.isfinite(budget)):
            raise ConfigError(f"--budget {budget:g}: should be a number of GPU-hours above 0")
    elif budget is not None:
        raise ConfigError(f"--budget {budget:g}: is for --objective budget, not {objective}")
    if confidence is not None and not 0 < confidence < 1:
        raise ConfigError(f"--confidence {confidence:g}: should be a probability between 0 and 1, such as 0.9")
    in_hours = unit == "hours" or objective == "budget"
    return DesignRequest(objective, in_hours, size, budget, MEDIAN if confidence is None else confidence, tuple(runs))


def _check(recipe: Recipe, asked: DesignRequest) -> None:
    """Raise ConfigError for recipes that no chain can be designed for."""
    settings, images, batch = recipe.baselines, recipe.data.images, recipe.optimizer.batch
    if settings is None:
        raise ConfigError("baselines: is missing; --auto takes the epochs of an individual training from it")
    if recipe.chain.from_ is not None:
        raise ConfigError(
            f"chain.from = '{recipe.chain.from_}': --auto designs chains whose first model is trained from scratch; "
            "leave it out"
        )
    wanted = len(recipe.family.members)
    if asked.size is not None and asked.size < wanted:
        raise ConfigError(
            f"--members {asked.size}: family.members names {wanted} models, all of which are wanted; take {wanted} or "
            "more"
        )
    steps, warmup = (length.to_steps(images, batch) for length in (settings.train, settings.warmup))
    if steps < 1:
        raise ConfigError(f"baselines.train = {settings.train}: is no step at all")
    if warmup > steps:
        raise ConfigError(
            f"baselines.warmup = {settings.warmup}: {warmup} steps are longer than the training, baselines.train = "
            f"{settings.train} = {steps} steps of {batch} of the {images} images"
        )


def _setting(recipe: Recipe, machine: Machine | None, asked: DesignRequest, on: str | None) -> Setting:
    settings = recipe.baselines
    assert settings is not None
    steps = settings.train.to_steps(recipe.data.images, recipe.optimizer.batch)
    curves = matches(asked.runs, on=on, average_seeds=True, option="--runs-on") if asked.runs else []
    own = [curve.match for curve in curves if curve.match is not None]
    bounds = [bound for curve in curves if (bound := _bound(curve)) is not None]
    model = EpochModel.fit(paper_matches(), own=own, bounds=bounds)
    setting = Setting(recipe, model, steps / epoch_steps(recipe), confidence=asked.confidence)
    if machine is None:
        return setting
    return replace(setting, device=machine.device, gpus=machine.gpus, throughput=machine.throughput)


def _bound(curve: LinkCurve) -> Bound | None:
    """What a curve that does not cross its baseline says all the same."""
    if curve.match is not None or curve.baseline is None or (curve.more_than is None and curve.at_most is None):
        return None
    distilled = float(curve.settings.get("distill.alpha", 0.0)) > 0
    link = LinkEpochs(curve.student, curve.teacher, curve.position, curve.images, curve.baseline.epochs, distilled)
    runs = sorted({job.rpartition("/")[0] for point in curve.points for job in point.jobs})
    return Bound(link, f"on {curve.evaluation_set}: {', '.join(runs)}", curve.more_than, curve.at_most)


def _design(setting: Setting, source: str, asked: DesignRequest) -> Design:
    """The chosen chain among others; chains that several of them come to stand once."""
    search = _Search(setting, asked)
    best = search.best(search.task)
    chosen = search.simplest(best)
    tags: dict[FoundChain, list[str]] = {chosen: ["chosen"]}
    if best != chosen:
        tags[best] = [asked.best]
    for one in search.of_each_length(search.task, best.chain[-1]):
        tags.setdefault(one, [])
    presets, by_hand = search.presets(), search.by_hand()
    if presets is not None:
        tags.setdefault(presets, []).append("presets only")
    if by_hand is not None:
        tags.setdefault(by_hand, []).append("the recipe's")
    rows = {one: search.outcome(one, tags[one]) for one in sorted(tags, key=lambda one: len(one.chain))}
    own = search.as_given(by_hand)
    specs = [search.models.specs[at] for at in search.models.wanted]
    alone = outcome(setting, "individually", specs, [setting.baseline_epochs] * len(specs))
    values = designed_recipe(setting.recipe, rows[chosen].specs, rows[chosen].epochs, source)
    design = Design(asked, setting, rows[chosen], rows[best], (*rows.values(), *own), alone, values)
    return replace(design, notes=tuple(design_notes(design)))


class _Search:
    """The searches that one design takes."""

    def __init__(self, setting: Setting, asked: DesignRequest) -> None:
        self.setting, self.asked = setting, asked
        recipe = setting.recipe
        self.models = candidates(recipe.family.specs())
        self.kept = sorted(self.models.presets)
        specs = self.models.specs
        if asked.in_hours:
            assert setting.device is not None
            costs = hours_costs(recipe, specs, setting.device, gpus=setting.gpus, throughput=setting.throughput)
        else:
            costs = macs_costs(recipe, specs, gpus=setting.gpus)
        self.task = self._problem(self.models, costs)
        self.few = self._problem(self.models.only(self.models.presets), costs.only(self.kept))

    def _problem(self, models: Candidates, costs: Costs) -> Problem:
        return problem(
            models,
            costs,
            self.setting.epochs,
            images=self.setting.recipe.data.images,
            baseline_epochs=self.setting.baseline_epochs,
            distilled=distils(self.setting.recipe),
            most=max(MOST_MEMBERS, self.asked.size or 0, len(models.wanted)),
            confidence=self.asked.confidence,
        )

    def best(self, task: Problem) -> FoundChain:
        """The optimum. Raises ConfigError where there is no such chain."""
        if self.asked.objective == "budget":
            return within_budget(task, self.asked.limit, self.asked.size)
        return (least_cost if self.asked.objective == "cost" else most_acceleration)(task, self.asked.size)

    def of_each_length(self, task: Problem, last: int) -> list[FoundChain]:
        """The best chain of each possible number of models that ends in `last`."""
        cheapest = by_size(task.of_fitting() if self.asked.objective == "budget" else task, last)
        if self.asked.objective == "acceleration":
            return [most_acceleration(task, length) for length in cheapest]
        return list(cheapest.values())

    def simplest(self, best: FoundChain) -> FoundChain:
        """`best`, or a simpler chain that is hardly worse: as good a family within the same budget."""
        last = best.chain[-1]
        presets = [self._placed(one) for one in self.of_each_length(self.few, self.kept.index(last))]
        others = [*self.of_each_length(self.task, last), *presets]
        if self.asked.objective == "budget":
            others = [one for one in others if len(one.chain) == len(best.chain) and one.cost <= self.asked.limit]
        elif self.asked.size is not None:
            others = [one for one in others if len(one.chain) == self.asked.size]
        return simplest([best, *others], self.models.presets, self.asked.loss)

    def presets(self) -> FoundChain | None:
        """The best chain of presets; None where they give none of that size, or within the budget."""
        try:
            return self._placed(self.best(self.few))
        except ConfigError:
            return None

    def _placed(self, one: FoundChain) -> FoundChain:
        """A chain of presets by its places among all candidates."""
        return found(self.task, [self.kept[at] for at in one.chain])

    def by_hand(self) -> FoundChain | None:
        """The recipe's own chain with the model's epochs; None where one of its links is no growth."""
        try:
            make_plan(self.setting.recipe, world_size=self.setting.gpus)
        except ConfigError:
            return None
        places = {self.models.specs[at].name: at for at in self.models.wanted}
        return found(self.task, [places[link.model] for link in self.setting.recipe.chain.links])

    def outcome(self, one: FoundChain, tags: Sequence[str]) -> Outcome:
        """What a chain is expected to come to; `tags` follow its number of models."""
        label = ", ".join([f"{len(one.chain)} model{'s' * (len(one.chain) > 1)}", *tags])
        return outcome(self.setting, label, [self.models.specs[at] for at in one.chain], one.epochs)

    def as_given(self, by_hand: FoundChain | None) -> list[Outcome]:
        """The recipe's own chain with its own epochs."""
        if by_hand is None:
            return []
        jobs = make_plan(self.setting.recipe, world_size=self.setting.gpus).links
        given = replace(by_hand, epochs=tuple(job.epochs for job in jobs))
        return [replace(self.outcome(given, ["the recipe's, its own epochs"]), predicted=False)]
