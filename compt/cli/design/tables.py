"""What `compt plan --auto` prints: the chain, its alternatives, what its numbers rest on; as tables and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from compt.cli.plan.tables import warning
from compt.cost.counts import parameters
from compt.cost.speed import OF_THE_AUTHORS
from compt.design.costs import distils
from compt.design.epochs import START_FACTOR, Range
from compt.design.outcome import Outcome, Setting, outcome
from compt.design.search import SIMPLER, FoundChain
from compt.design.sizes import log2_smallest
from compt.errors import ConfigError
from compt.plan.forecast import Forecast
from compt.text import TextTable, count


@dataclass(frozen=True)
class DesignRequest:
    """What a chain is searched for: the options of the command.

    `objective`: cost, acceleration or budget; the first two count `unit`, macs (default) or hours. `size` is how many
    models the chain has (for `budget` at most). `runs` are folders whose links, measured on the evaluation set `on`,
    replace the paper's numbers. `data`: a sentence on the numbers of images and tokens.
    """

    objective: str
    unit: str | None = None
    size: int | None = None
    budget_gpu_hours: float | None = None
    runs: tuple[Path, ...] = ()
    on: str | None = None
    data: str = ""

    def check(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        unit, budget = self.unit, self.budget_gpu_hours
        if self.objective == "budget":
            if unit is not None:
                raise ConfigError(f"--in {unit}: is for the objectives cost and acceleration; a budget is of GPU-hours")
            if budget is None:
                raise ConfigError("--objective budget: needs --budget GPU_HOURS")
            if not (budget > 0 and math.isfinite(budget)):
                raise ConfigError(f"--budget {budget:g}: should be a number of GPU-hours above 0")
        elif budget is not None:
            raise ConfigError(f"--budget {budget:g}: is for --objective budget, not {self.objective}")

    @property
    def in_hours(self) -> bool:
        """Whether costs are GPU-hours, not MACs."""
        return self.unit == "hours" or self.objective == "budget"

    @property
    def limit(self) -> float:
        """GPU-hours of the budget."""
        return self.budget_gpu_hours or 0.0

    @property
    def best(self) -> str:
        """What the best chain has."""
        unit = "GPU-hours" if self.in_hours else "MACs"
        return f"greatest acceleration in {unit}" if self.objective == "acceleration" else f"least {unit}"

    def loss(self, one: FoundChain) -> float:
        """The quantity that the search minimizes."""
        return 1 / one.acceleration if self.objective == "acceleration" else one.cost


@dataclass(frozen=True)
class Design:
    """What a search found: the chosen chain, the best one, others to compare with, and the recipe that trains it."""

    asked: DesignRequest
    setting: Setting
    chosen: Outcome
    best: Outcome
    others: tuple[Outcome, ...]
    baselines: Outcome
    values: dict[str, Any]

    @property
    def goal(self) -> str:
        """The objective in words, and what it does not reach."""
        if self.asked.objective != "budget":
            return self.asked.best
        reached = {spec.name for spec in self.chosen.specs}
        missing = ", ".join(name for name in self.setting.recipe.family.specs() if name not in reached)
        without = f", without {missing}, which it does not reach" if missing else ""
        return f"best family for {self.asked.limit:g} GPU-hours{without}"

    @property
    def extrapolated(self) -> dict[str, list[str]]:
        """For each link what of it lies outside the published links."""
        links = self.setting.links(self.chosen.specs)
        return {link.student.name: self.setting.epochs.outside(link) for link in links}

    def notes(self) -> list[str]:
        """What a reader has to know to judge the numbers."""
        setting, chosen, asked = self.setting, self.chosen, self.asked
        model, images, found = setting.epochs, setting.recipe.data.images, []
        if chosen is not self.best:
            found.append(
                f"Simpler chains are preferred within {100 * SIMPLER:g} %: fewer models, then presets. The best one, "
                f"{self.best.label}, is in the second table."
            )
        distilled = distils(setting.recipe)
        factor = model.factor(distilled)
        found.append(
            f"Epochs: a line through {len(model.points)} published links (docs/design.md). Range: a factor of "
            f"{factor:.2f} both ways, as far as the line was off at the worst known link. > and <: the bound if all "
            "links need the upper end."
        )
        found.append(
            "With another recipe or data set links may need several times as many epochs: test the first pair with "
            "`compt chain --calibrate`, or give measured links with --runs."
        )
        # Only curves that cross their baseline shift the line. The others are bounds, named link by link below.
        if asked.runs:
            many, named = len(model.matches(distilled)), ", ".join(map(str, asked.runs))
            kind = "with" if distilled else "without"
            found.append(
                f"The line is shifted by {many} measured link{'s' * (many > 1)} of {named}."
                if many
                else f"No link {kind} distillation of {named} crosses its baseline."
            )
        for link in setting.links(chosen.specs):
            pair, match = f"{link.teacher.name} to {link.student.name}", model.match(link)
            if match is not None:
                found.append(f"{pair} is not predicted but {match.source}.")
                continue
            for curve in model.measured(link):
                bound = f"more than {curve.more_than:g}" if curve.more_than else f"at most {curve.at_most:g}"
                found.append(f"{pair}: {bound} epochs, {curve.source}.")
        smallest = model.smallest(images, distilled)
        found.append(
            f"Start: for {images:,} images the smallest model that fits has {count(2**smallest)} "
            "parameters (as the paper's table G counts); each halving below multiplies the next link's epochs by "
            f"{START_FACTOR:g}. "
            + ("That is a stated rule, not a fit." if smallest == log2_smallest(images) else "It was measured.")
        )
        beyond = [f"{', '.join(names)} of {model}" for model, names in self.extrapolated.items() if names]
        if beyond:
            found.append(f"Extrapolated, beyond the published links: {'; '.join(beyond)}.")
        if caution := model.caution(images):
            found.append(caution)
        if chosen.acceleration.middle <= 1 and len(chosen.specs) > 1:
            found.append("By these numbers a chain saves nothing here: the baselines cost no more.")
        hours = chosen.gpu_hours
        if hours is not None and setting.device is not None:
            found.append(
                f"GPU-hours on {setting.device.title}: {'; '.join(hours.sources)}. "
                "Their range also spans the bounds of its speed."
            )
            if hours.kind != "measured":
                found.append(OF_THE_AUTHORS)
        if asked.objective == "budget":
            found.append(f"Budget {asked.limit:g} GPU-hours: kept by the planned epochs, not by the whole range.")
        return [*found, *([asked.data] if asked.data else [])]


def design_tables(design: Design, forecast: Forecast) -> RenderableType:
    """The chain, what else there is, and a warning where a model does not fit into the memory of a GPU."""
    parts: list[RenderableType] = [_chain_table(design, forecast), Text(), _others_table(design)]
    warned = warning(forecast)
    return Group(*parts, *([Text(), Text(warned, style="yellow")] if warned else []))


def _chain_table(design: Design, forecast: Forecast) -> TextTable:
    """A row for each model, as the recipe that is written would train it; accelerations are up to that model."""
    chosen, setting = design.chosen, design.setting
    rows, links = [], forecast.plan.rows()[: len(chosen.specs)]
    for at, (spec, row, item) in enumerate(zip(chosen.specs, links, forecast.links, strict=True)):
        so_far = outcome(setting, "", chosen.specs[: at + 1], chosen.epochs[: at + 1])
        needed, total, hours = chosen.needed[at], row["total_macs"], item.hours
        longer = max(1.0, needed.high / chosen.epochs[at])
        cells = [
            spec.name,
            count(parameters(item.job.spec)),
            f"{chosen.epochs[at]:.4g}" + (f" ({_number(needed.low)}-{_number(needed.high)})" if at else ""),
            count(total),
        ]
        if hours is not None:
            cells.append(_hours(Range(hours.gpu_hours, hours.low, hours.high * longer), hours.kind))
        rows.append([*cells, _times(design.asked, so_far) if at else ""])
    header = ["Model", "Params", "Epochs", "MACs", *(["GPU-hours"] if setting.device else []), "Acceleration"]
    sizes = (f"{s.name} {s.width}x{s.depth}, {s.text_width}x{s.text_depth}" for s in chosen.specs)
    notes = [f"Sizes, width x depth of image and text tower: {'; '.join(sizes)}.", *design.notes()]
    return TextTable(f"Chain for {setting.recipe.name}: {design.goal}", header, rows, notes)


def _others_table(design: Design) -> TextTable:
    """The chosen chain among others, and the baselines of the wanted models."""
    baselines, rows = design.baselines, []
    for one in (*design.others, baselines):
        hours = one.baseline_gpu_hours if one is baselines else one.gpu_hours
        rows.append(
            [
                one.label,
                count(one.baseline_macs) if one is baselines else _macs(one.macs),
                *([_hours(hours.hours, hours.kind)] if hours else []),
                "1" if one is baselines else _times(design.asked, one),
            ]
        )
    in_hours = design.setting.device is not None
    note = (
        f"{'~ is projected, not measured. ' if in_hours else ''}Acceleration: "
        f"{'GPU-hours' if design.asked.in_hours else 'MACs'} of the baselines of the same models, of "
        f"{design.setting.baseline_epochs:g} epochs each, over those of the chain. Chains share most of what is "
        "uncertain: they differ by less than their ranges."
    )
    header = ["Chain", "MACs", *(["GPU-hours"] if in_hours else []), "Acceleration"]
    members = [f"{one.label}: {', '.join(spec.name for spec in one.specs)}." for one in (*design.others, baselines)]
    return TextTable("Alternatives", header, rows, [note, *members])


def _number(value: float) -> str:
    """Three digits, and at most three decimals; whole above a thousand."""
    return f"{value:,.0f}" if value >= 999.5 else f"{round(value, 3):.3g}"


def _macs(found: Range) -> str:
    middle, high = count(found.middle), count(found.high)
    return middle if middle == high else f"{middle} (<{high})"


def _hours(found: Range, kind: str) -> str:
    ends = f"{_number(found.low)}-{_number(found.high)}"
    return f"{'' if kind == 'measured' else '~'}{_number(found.middle)} ({ends})"


def _times(asked: DesignRequest, one: Outcome) -> str:
    found = one.gpu_hours_acceleration if asked.in_hours else one.acceleration
    assert found is not None
    middle, low = f"{found.middle:.2f}", f"{found.low:.2f}"
    return middle if middle == low else f"{middle} (>{low})"


def design_json(design: Design) -> dict[str, Any]:
    """Everything: the chain and its alternatives with ranges, the epoch model and its points, the recipe."""
    setting, baselines = design.setting, design.baselines
    return {
        "objective": design.asked.objective,
        "unit": "gpu_hours" if design.asked.in_hours else "macs",
        "preferred_within": SIMPLER,
        "images": setting.recipe.data.images,
        "baseline_epochs": setting.baseline_epochs,
        "chosen": design.chosen.to_json(),
        "best": design.best.to_json(),
        "alternatives": [one.to_json() for one in design.others],
        "individually": {
            "models": [spec.name for spec in baselines.specs],
            "macs": baselines.baseline_macs,
            "gpu_hours": baselines.baseline_gpu_hours and asdict(baselines.baseline_gpu_hours),
        },
        "epochs_model": setting.epochs.to_json(),
        "extrapolated": design.extrapolated,
        "notes": design.notes(),
        "recipe": design.values,
    }
