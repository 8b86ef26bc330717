"""What `benchmarks.paper.findings` shows: findings with their verdicts, epochs of each family, coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from benchmarks.common import COLOUR
from compt.design.epochs import LEVEL
from compt.text import TextTable

WIDEST = 3.0
"""A range whose ends are further apart than this factor says nothing where it holds the published number."""


def agreement(hit: bool, low: float | None, high: float | None) -> str:
    """MISS, HIT, or `says nothing` for a hit of a range too wide to miss."""
    if hit and low is not None and high is not None and (low <= 0 or high > WIDEST * low):
        return "says nothing"
    return "HIT" if hit else "MISS"


def tally(verdicts: Sequence[str]) -> tuple[int, int]:
    """(hits, hits and misses): all other verdicts count neither way."""
    hits = verdicts.count("HIT")
    return hits, hits + verdicts.count("MISS")


@dataclass(frozen=True)
class Finding:
    """One statement of the paper and what the model says of it. `share` is that of the draws that agree.

    `given` names why agreement is no evidence: the start prior says so itself, or no fit of this form can miss.
    """

    figure: str
    statement: str
    held_out: str
    published: str
    predicted: str
    low: float | None
    high: float | None
    share: float | None
    hit: bool
    given: Literal["", "put in", "by construction"] = ""

    @property
    def verdict(self) -> str:
        return self.given if self.given and self.hit else agreement(self.hit, self.low, self.high)


@dataclass(frozen=True)
class Prediction:
    """A published number of epochs and what the other families predict. `inside`: whether the range holds it."""

    family: str
    link: str
    source: str
    published: float
    predicted: float
    low: float
    high: float
    inside: bool

    @property
    def verdict(self) -> str:
        return agreement(self.inside, self.low, self.high)


def finding_table(title: str, found: Sequence[Finding]) -> TextTable:
    rows = [
        [
            f"{one.figure}: {one.statement}",
            one.published,
            one.predicted,
            "" if one.share is None else f"{100 * one.share:.0f} %",
            one.verdict,
        ]
        for one in found
    ]
    hits, counted = tally([one.verdict for one in found])
    note = (
        f"{hits} of {counted}. Brackets: range of {100 * LEVEL:.0f} %. Draws: share of them that agree. Not counted: "
        "what the start prior puts in, what no fit of this form can miss, and ranges that span more than a factor of "
        f"{WIDEST:g}, which say nothing."
    )
    return TextTable(title, ["Figure", "Published", "Predicted", "Draws", ""], rows, [note])


def family_table(found: Sequence[Prediction]) -> TextTable:
    rows = [
        [
            f"{one.family}: {one.link}",
            f"{one.published:g}",
            f"{one.predicted:.1f} ({one.low:.1f} to {one.high:.1f})",
            f"{100 * (one.predicted / one.published - 1):+.0f} %",
            one.verdict,
        ]
        for one in found
    ]
    hits, counted = tally([one.verdict for one in found])
    note = (
        f"{hits} of {counted} inside their range of {100 * LEVEL:.0f} %; ranges that span more than a factor of "
        f"{WIDEST:g} say nothing and are not counted. Each family is predicted from the others; of an allotted number "
        "the range also spans how much more than needed it may be."
    )
    return TextTable(
        "Epochs of each family, from the others", ["Link", "Published", "Predicted", "Off", ""], rows, [note]
    )


def coefficient_table(rows: Sequence[dict[str, float | str]]) -> TextTable:
    shown = []
    for row in rows:
        before, after = (f"{row[key]:.2f}" for key in ("prior_spread", "spread"))
        if row["feature"] != "noise":
            before, after = f"{row['prior']:+.2f} ± {before}", f"{row['fit']:+.2f} ± {after}"
        shown.append([str(row["feature"]), before, after])
    note = "In natural logarithms of epochs / baseline epochs; ± one standard deviation. Noise: its standard deviation."
    return TextTable("Coefficients", ["Feature", "Prior", "Fit to all points"], shown, [note])


def plot(found: Sequence[Prediction]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        places = np.arange(len(found))
        middle = np.array([one.predicted for one in found])
        low, high = (np.array([getattr(one, key) for one in found]) for key in ("low", "high"))
        axes.errorbar(
            middle,
            places,
            xerr=[middle - low, high - middle],
            fmt="o",
            color=COLOUR["chain"],
            capsize=3,
            label="predicted",
        )
        axes.plot([one.published for one in found], places, "x", color=COLOUR["ink"], label="published")
        axes.set_yticks(places, [f"{one.family}: {one.link}" for one in found], fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("epochs, each family predicted from the others")
        axes.legend()

    return draw
