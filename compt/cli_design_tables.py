"""What `compt plan --auto` prints: the chain, its alternatives, what its numbers rest on; as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from compt.curves import Match
from compt.design.epochs import FEATURES, LEVEL, Range
from compt.design.outcome import Outcome, Setting, outcome
from compt.forecast import Forecast
from compt.formats import TextTable, count, macs
from compt.plan_tables import warning


@dataclass(frozen=True)
class Design:
    """What a search found: the chosen chain, others to compare it with, and the recipe that trains it."""

    objective: str
    setting: Setting
    chosen: Outcome
    others: tuple[Outcome, ...]
    individually: Outcome
    values: dict[str, Any]
    notes: tuple[str, ...]


_WORDS = dict(
    zip(
        FEATURES[1:5],
        ("size step", "place in the chain", "number of images", "size of the predecessor"),
        strict=True,
    )
)


def design_notes(setting: Setting, chosen: Outcome, budget: float | None, runs: Sequence[Path]) -> list[str]:
    """What a reader has to know to judge the numbers."""
    model, recipe = setting.epochs, setting.recipe
    published = len(model.points) - len(model.own)
    share = f"{100 * LEVEL:.0f} %"
    basis = (
        f"fitted to {len(model.own)} measured links of {', '.join(map(str, runs))}; the paper's {published} published "
        "numbers are no more than their wide prior"
        if model.own
        else f"fitted to the paper's {published} published numbers"
        + (f"; no link of {', '.join(map(str, runs))} crosses its baseline" if runs else "")
    )
    notes = [
        f"Epochs are those of a regression {basis} (docs/design.md). Ranges hold with {share} if its form is right."
    ]
    links = setting.links(chosen.specs)
    for link in links:
        match = model.measured(link)
        if match is not None:
            notes.append(f"{link.teacher.name} to {link.student.name} is not predicted but {match.source}.")
        bound = model.bound(link)
        if match is None and bound is not None:
            known = f"more than {bound.more_than:g}" if bound.more_than is not None else f"at most {bound.at_most:g}"
            notes.append(f"{link.teacher.name} to {link.student.name}: {known} epochs, measured {bound.source}.")
    if model.start is not None:
        least = model.start.smallest(recipe.data.images)
        notes.append(
            f"Start: for {recipe.data.images:,} images the smallest model that fits has {count(least)} parameters (as "
            f"the paper's table G counts); each halving below multiplies the next link's epochs by "
            f"{model.start.factor:g}. That is a prior, not a fit."
        )
    beyond: dict[str, list[str]] = {}
    for link in links:
        for name in model.outside(link):
            beyond.setdefault(_WORDS[name], []).append(link.student.name)
    for what, models in beyond.items():
        which = "every link" if len(models) == len(links) else ", ".join(models)
        notes.append(f"Extrapolated, beyond the points of the fit: the {what} of {which}.")
    if chosen.acceleration.middle <= 1:
        notes.append("By this model a chain saves nothing here: individual training is no dearer.")
    device = setting.device.title
    notes.append(f"GPU-hours on {device}, {chosen.gpu_hours.kind}; their range also spans the bounds of its speed.")
    if budget is not None:
        notes.append(f"Budget {budget:g} GPU-hours, kept by the middle of the range.")
    left = [spec.name for spec in recipe.family.specs().values() if spec.name not in [one.name for one in chosen.specs]]
    if left:
        notes.append(f"Wanted but not within the budget: {', '.join(left)}.")
    return notes


def design_tables(design: Design, forecast: Forecast) -> RenderableType:
    """The chain, what else there is, and a warning where a model does not fit into the memory of a GPU."""
    parts = [_chain_table(design, forecast).rich(), Text(), _others_table(design).rich()]
    warned = warning(forecast)
    return Group(*parts, *([Text(), Text(warned, style="yellow")] if warned else []))


def _chain_table(design: Design, forecast: Forecast) -> TextTable:
    """A row for each model, as the recipe that is written would train it."""
    chosen, setting = design.chosen, design.setting
    rows, links = [], forecast.plan.rows()[: len(chosen.specs)]
    for at, (spec, row, item) in enumerate(zip(chosen.specs, links, forecast.links, strict=True)):
        assert item.hours is not None
        so_far = outcome(setting, "", chosen.specs[: at + 1], chosen.epochs[: at + 1])
        rows.append(
            [
                spec.name,
                f"{spec.width}x{spec.depth} {spec.text_width}x{spec.text_depth}",
                count(row["parameters"]),
                f"{chosen.epochs[at]:.4g}" + (f" ({_ends(chosen.needed[at])})" if at else ""),
                macs(row["total_macs"]),
                f"{100 * row['teacher_share']:.0f} %" if row["teacher_share"] else "",
                macs(row["accumulated_macs"]),
                _hours(item.hours.gpu_hours, item.hours.kind),
                _times(so_far.acceleration) if at else "",
            ]
        )
    header = [
        "Model",
        "Image and text",
        "Params",
        "Epochs",
        "MACs",
        "Teacher",
        "MACs so far",
        "GPU-hours",
        "Acceleration",
    ]
    title = f"Chain for {setting.recipe.name}, objective {design.objective}"
    return TextTable(title, header, rows, design.notes)


def _others_table(design: Design) -> TextTable:
    """The chosen chain among others, and the wanted models without a chain."""
    rows = [
        [
            one.label,
            ", ".join(spec.name for spec in one.specs),
            macs(one.macs.middle) + (f" ({macs(one.macs.low)}-{macs(one.macs.high)})" if one.predicted else ""),
            _hours(one.gpu_hours.hours.middle, one.gpu_hours.kind)
            + (f" ({_ends(one.gpu_hours.hours)})" if one.predicted else ""),
            _times(one.acceleration) if one.predicted else f"{one.acceleration.middle:.2f}",
        ]
        for one in design.others
    ]
    alone = design.individually
    alone = design.individually
    hours = alone.baseline_gpu_hours
    rows.append(
        [
            alone.label,
            ", ".join(spec.name for spec in alone.specs),
            macs(alone.baseline_macs),
            f"{_hours(hours.hours.middle, hours.kind)} ({_ends(hours.hours)})",
            "1",
        ]
    )
    note = (
        "~ is projected, not measured. Acceleration: MACs of the same models trained individually for "
        f"{design.setting.baseline_epochs:g} epochs over those of the chain. In brackets the range of "
        f"{100 * LEVEL:.0f} %; chains share most of what is uncertain, so that they differ by less than it."
    )
    return TextTable("Alternatives", ["Chain", "Models", "MACs", "GPU-hours", "Acceleration"], rows, [note])


def _ends(found: Range) -> str:
    return f"{_number(found.low)}-{_number(found.high)}"


def _number(value: float) -> str:
    """Three digits, whole above a thousand."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def _hours(value: float, kind: str) -> str:
    return ("" if kind == "measured" else "~") + _number(value)


def _times(found: Range) -> str:
    return f"{found.middle:.2f} ({found.low:.2f}-{found.high:.2f})"


def design_json(design: Design) -> dict[str, Any]:
    """Everything: the chain and its alternatives with ranges, the model of epochs and its points, the recipe."""
    setting, model = design.setting, design.setting.epochs
    return {
        "objective": design.objective,
        "images": setting.recipe.data.images,
        "baseline_epochs": setting.baseline_epochs,
        "range_level": LEVEL,
        "chosen": design.chosen.to_json(),
        "alternatives": [one.to_json() for one in design.others],
        "individually": {
            "models": [spec.name for spec in design.individually.specs],
            "macs": design.individually.baseline_macs,
            "gpu_hours": asdict(design.individually.baseline_gpu_hours),
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
