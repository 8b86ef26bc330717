"""What `compt plan --auto` prints: the chain, its alternatives, what its numbers rest on; as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from compt.cli.plan.tables import warning
from compt.cost.speed import OF_THE_AUTHORS
from compt.design.confidence import MEDIAN
from compt.design.curves import Match
from compt.design.epochs import FEATURES, LEVEL, Range
from compt.design.outcome import Outcome, Setting, outcome
from compt.design.search import SIMPLER, FoundChain
from compt.plan.forecast import Forecast
from compt.text import TextTable, count, macs


@dataclass(frozen=True)
class DesignRequest:
    """What a chain is searched for: the options of the command, already checked.

    `objective`: cost, acceleration or budget. Costs are GPU-hours where `in_hours`, MACs else.
    """

    objective: str
    in_hours: bool
    size: int | None
    budget_gpu_hours: float | None
    confidence: float
    runs: tuple[Path, ...]

    @property
    def limit(self) -> float:
        """GPU-hours of the budget."""
        return self.budget_gpu_hours or 0.0

    @property
    def unit(self) -> str:
        """What is counted, as it is shown."""
        return "GPU-hours" if self.in_hours else "MACs"

    @property
    def best(self) -> str:
        """What the best chain has."""
        return f"greatest acceleration in {self.unit}" if self.objective == "acceleration" else f"least {self.unit}"

    def loss(self, one: FoundChain) -> float:
        """What the best of several chains has the least of."""
        return 1 / one.acceleration if self.objective == "acceleration" else one.cost

    def value(self, one: Outcome, other: bool = False) -> Range:
        """What the objective counts of a chain, with its range; in the `other` unit if asked."""
        hours = self.in_hours != other
        if self.objective == "acceleration":
            found = one.gpu_hours_acceleration if hours else one.acceleration
        elif hours:
            found = one.gpu_hours.hours if one.gpu_hours else None
        else:
            found = one.macs
        assert found is not None
        return found

    def loses(self, one: Range, other: Range) -> float:
        """The share by which the value `one` is worse than `other`; below zero where it is better."""
        gained = other.middle / one.middle if self.objective == "acceleration" else one.middle / other.middle
        return gained - 1


@dataclass(frozen=True)
class Design:
    """What a search found: the chosen chain, the best one, others to compare with, and the recipe that trains it."""

    asked: DesignRequest
    setting: Setting
    chosen: Outcome
    best: Outcome
    others: tuple[Outcome, ...]
    individually: Outcome
    values: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Wanted models that are not in the chosen chain."""
        names = {spec.name for spec in self.chosen.specs}
        return [name for name in self.setting.recipe.family.specs() if name not in names]

    @property
    def goal(self) -> str:
        """The objective in words, and what it does not reach."""
        if self.asked.objective != "budget":
            return self.asked.best
        without = f", without {', '.join(self.missing)}, which it does not reach" if self.missing else ""
        return f"best family for {self.asked.limit:g} GPU-hours{without}"


_EVEN = 0.005
"""Chains that differ by no more than this share are as good as each other."""
_WORDS = dict(
    zip(
        FEATURES[1:5],
        ("size step", "place in the chain", "number of images", "size of the predecessor"),
        strict=True,
    )
)


def design_notes(design: Design) -> list[str]:
    """What a reader has to know to judge the numbers."""
    notes = [*_on_choice(design), *_on_epochs(design), *_on_start(design)]
    setting, hours = design.setting, design.chosen.gpu_hours
    if design.chosen.acceleration.middle <= 1 and len(design.chosen.specs) > 1:
        notes.append("By this model a chain saves nothing here: individual training is no dearer.")
    if hours is not None and setting.device is not None:
        notes.append(
            f"GPU-hours on {setting.device.title}: {'; '.join(hours.sources)}. "
            "Their range also spans the bounds of its speed."
        )
        if hours.kind != "measured":
            notes.append(OF_THE_AUTHORS)
    if design.asked.objective == "budget":
        notes.append(f"Budget {design.asked.limit:g} GPU-hours: kept by the planned epochs, not by the whole range.")
    return notes


def _on_choice(design: Design) -> list[str]:
    """Where another chain of the table is as good as the chosen one, in any sense."""
    asked, chosen, best = design.asked, design.chosen, design.best
    ours = asked.value(chosen)
    notes = []
    if chosen is not best:
        notes.append(
            f"Simpler chains are preferred within {100 * SIMPLER:g} %: fewer models, then presets. "
            f"{asked.best[0].upper() + asked.best[1:]}: {_called(best)}, "
            f"{_shown(asked, asked.value(best))}, {100 * asked.loses(ours, asked.value(best)):.1f} % better than the "
            "chosen chain."
        )
    rivals = [one for one in design.others if one.predicted and one is not chosen and one is not best]
    rivals = [one for one in rivals if one.specs[-1] == chosen.specs[-1]]
    simpler = [one for one in rivals if len(one.specs) < len(chosen.specs) and _inside(asked, asked.value(one), ours)]
    if simpler and asked.objective != "budget":
        near = min(simpler, key=lambda one: asked.loses(asked.value(one), ours))
        notes.append(
            f"Inside the range: {_called(near)}, {100 * asked.loses(asked.value(near), ours):.1f} % worse. The numbers "
            "do not decide between them."
        )
    if chosen.gpu_hours is not None and asked.objective != "budget" and not asked.in_hours:
        hours = asked.value(chosen, other=True)
        most = max((*rivals, best), key=lambda one: asked.loses(hours, asked.value(one, other=True)))
        if asked.loses(hours, asked.value(most, other=True)) > _EVEN:
            notes.append(
                f"Better in GPU-hours: {_called(most)}, {_shown_hours(asked, most)} against "
                f"{_shown_hours(asked, chosen)}; --in hours searches by those."
            )
    return notes


def _on_epochs(design: Design) -> list[str]:
    """How likely the epochs are enough, what they rest on, and which were measured."""
    setting, chosen, asked = design.setting, design.chosen, design.asked
    model, links = setting.epochs, setting.links(chosen.specs)
    notes = []
    if links:
        planned = (
            "the medians of the fit"
            if asked.confidence == MEDIAN
            else f"enough for each link with {_percent(asked.confidence)}"
        )
        notes.append(
            f"All links long enough: {_percent(chosen.all_long_enough)}. Epochs are {planned}; --confidence P plans "
            "those that are enough for each link with probability P, and `compt chain --calibrate` tests the first "
            "pair and lengthens all links until it is lossless."
        )
    named = ", ".join(map(str, asked.runs))
    many = len(model.own)
    basis = (
        f"fitted to {many} measured link{'s' * (many > 1)} of {named}; the paper's {len(model.points) - many} "
        "published numbers are no more than their wide prior"
        if model.own
        else f"fitted to the paper's {len(model.points)} published numbers"
        + (f"; no link of {named} crosses its baseline" if asked.runs else "")
    )
    notes.append(
        f"Epochs are those of a regression {basis} (docs/design.md). Behind them what may be needed, with "
        f"{_percent(LEVEL)} if its form is right. Behind costs and accelerations the bound that holds with "
        f"{_percent((1 + LEVEL) / 2)} where links that are too short go on until they are long enough."
    )
    for link in links:
        match, bound = model.measured(link), model.bound(link)
        if match is not None:
            notes.append(f"{link.teacher.name} to {link.student.name} is not predicted but {match.source}.")
        elif bound is not None:
            known = f"more than {bound.more_than:g}" if bound.more_than is not None else f"at most {bound.at_most:g}"
            notes.append(f"{link.teacher.name} to {link.student.name}: {known} epochs, measured {bound.source}.")
    return notes


def _on_start(design: Design) -> list[str]:
    """The start prior, and what lies beyond the points of the fit."""
    model, images, notes = design.setting.epochs, design.setting.recipe.data.images, []
    links = design.setting.links(design.chosen.specs)
    if model.start is not None:
        notes.append(
            f"Start: for {images:,} images the smallest model that fits has {count(model.start.smallest(images))} "
            f"parameters (as the paper's table G counts); each halving below multiplies the next link's epochs by "
            f"{model.start.factor:g}. That is a prior, not a fit."
        )
    beyond: dict[str, list[str]] = {}
    for link in links:
        for name in model.outside(link):
            beyond.setdefault(_WORDS[name], []).append(link.student.name)
    if beyond:
        told = [
            f"the {what} of {'every link' if len(models) == len(links) else ', '.join(models)}"
            for what, models in beyond.items()
        ]
        notes.append(f"Extrapolated, beyond the points of the fit: {'; '.join(told)}.")
    caution = model.caution(images)
    return [*notes, caution] if caution else notes


def _inside(asked: DesignRequest, value: Range, ours: Range) -> bool:
    return value.middle >= ours.low if asked.objective == "acceleration" else value.middle <= ours.high


def _names(one: Outcome) -> str:
    return ", ".join(spec.name for spec in one.specs)


def _called(one: Outcome) -> str:
    return f"{len(one.specs)} model{'s' * (len(one.specs) > 1)} ({_names(one)})"


def _shown(asked: DesignRequest, value: Range) -> str:
    if asked.objective == "acceleration":
        return f"{value.middle:.2f}x"
    return f"~{_number(value.middle)}" if asked.in_hours else macs(value.middle)


def _shown_hours(asked: DesignRequest, one: Outcome) -> str:
    value = asked.value(one, other=True).middle
    return f"{value:.2f}x" if asked.objective == "acceleration" else f"~{_number(value)}"


def design_tables(design: Design, forecast: Forecast) -> RenderableType:
    """The chain, what else there is, and a warning where a model does not fit into the memory of a GPU."""
    parts = [_chain_table(design, forecast).rich(), Text(), _others_table(design).rich()]
    warned = warning(forecast)
    return Group(*parts, *([Text(), Text(warned, style="yellow")] if warned else []))


def _chain_table(design: Design, forecast: Forecast) -> TextTable:
    """A row for each model, as the recipe that is written would train it; accelerations are up to that model."""
    chosen, setting = design.chosen, design.setting
    rows, links = [], forecast.plan.rows()[: len(chosen.specs)]
    for at, (spec, row, item) in enumerate(zip(chosen.specs, links, forecast.links, strict=True)):
        so_far = outcome(setting, "", chosen.specs[: at + 1], chosen.epochs[: at + 1])
        longer = max(1.0, chosen.needed[at].high / chosen.epochs[at])
        total, found = row["total_macs"], item.hours
        cells = [
            f"{spec.name} {spec.width}x{spec.depth} {spec.text_width}x{spec.text_depth}",
            count(row["parameters"]),
            f"{chosen.epochs[at]:.4g}" + (f" ({_ends(chosen.needed[at])})" if at else ""),
            _percent(chosen.long_enough[at - 1]) if at else "",
            _most(Range(total, total, total * longer)) if at else macs(total),
        ]
        if found is not None:
            cells.append(_hours(Range(found.gpu_hours, found.low, found.high * longer), found.kind))
        rows.append([*cells, _times(design.asked, so_far) if at else ""])
    header = ["Model", "Params", "Epochs", "Long enough", "MACs"]
    header += [*(["GPU-hours"] if setting.device else []), "Acceleration"]
    return TextTable(f"Chain for {setting.recipe.name}: {design.goal}", header, rows, design.notes)


def _others_table(design: Design) -> TextTable:
    """The chosen chain among others, and the wanted models without a chain."""
    alone, rows = design.individually, []
    for one in (*design.others, alone):
        chain, hours = one is not alone, one.gpu_hours if one is not alone else one.baseline_gpu_hours
        cells = [
            f"{one.label}: {_names(one)}",
            _percent(one.all_long_enough) if chain and one.long_enough else "",
            _most(one.macs) if chain else macs(one.baseline_macs),
            *([_hours(hours.hours, hours.kind)] if hours else []),
            _times(design.asked, one) if chain else "1",
        ]
        rows.append(cells)
    note = (
        f"{'~ is projected, not measured. ' if design.setting.device else ''}Long enough: all links at once. "
        f"Acceleration: {design.asked.unit} of the same models trained individually for "
        f"{design.setting.baseline_epochs:g} epochs over those of the chain. Chains share most of what is uncertain, "
        "so that they differ by less than their ranges."
    )
    header = ["Chain", "Long enough", "MACs", *(["GPU-hours"] if design.setting.device else []), "Acceleration"]
    return TextTable("Alternatives", header, rows, [note])


def _ends(found: Range) -> str:
    return f"{_number(found.low)}-{_number(found.high)}"


def _number(value: float) -> str:
    """Three digits, whole above a thousand."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def _percent(share: float) -> str:
    """Whole percents; what draws have shown to be near 0 or 100 is not said to be that."""
    if share < 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def _most(found: Range) -> str:
    middle, high = macs(found.middle), macs(found.high)
    return middle if middle == high else f"{middle} (<{high})"


def _hours(found: Range, kind: str) -> str:
    return f"{'' if kind == 'measured' else '~'}{_number(found.middle)} ({_ends(found)})"


def _times(asked: DesignRequest, one: Outcome) -> str:
    found = one.gpu_hours_acceleration if asked.in_hours else one.acceleration
    assert found is not None
    middle, low = f"{found.middle:.2f}", f"{found.low:.2f}"
    return middle if middle == low else f"{middle} (>{low})"


def design_json(design: Design) -> dict[str, Any]:
    """Everything: the chain and its alternatives with ranges, the model of epochs and its points, the recipe."""
    setting, model, alone = design.setting, design.setting.epochs, design.individually.baseline_gpu_hours
    return {
        "objective": design.asked.objective,
        "unit": "gpu_hours" if design.asked.in_hours else "macs",
        "confidence": design.asked.confidence,
        "preferred_within": SIMPLER,
        "images": setting.recipe.data.images,
        "baseline_epochs": setting.baseline_epochs,
        "range_level": LEVEL,
        "chosen": design.chosen.to_json(),
        "best": design.best.to_json(),
        "alternatives": [one.to_json() for one in design.others],
        "individually": {
            "models": [spec.name for spec in design.individually.specs],
            "macs": design.individually.baseline_macs,
            "gpu_hours": alone and asdict(alone),
        },
        "epochs_model": {
            "features": list(FEATURES),
            "coefficients": model.posterior.mean.tolist(),
            "standard_deviations": model.posterior.spreads().tolist(),
            "noise": model.posterior.noise,
            "start_prior": model.start and asdict(model.start),
            "points": [_point(match) for match in model.points],
        },
        "extrapolated": {link.student.name: model.outside(link) for link in setting.links(design.chosen.specs)},
        "notes": list(design.notes),
        "recipe": design.values,
    }


def _point(match: Match) -> dict[str, Any]:
    return {**asdict(match), "student": match.student.name, "teacher": match.teacher.name}
