"""The family's chain against its baselines, and how the first link's length decides whether it is lossless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.common import COLOUR, SERIES, number
from benchmarks.evidence.pieces import LENGTH, LINK_LRS, LINKS, MEMBERS, Arm, baselines_at, family_arms, link
from benchmarks.evidence.statistics import MARGIN, Difference, Length
from benchmarks.evidence.study import REPORT, UNSEEN, Kind, Study, interval, span, times
from compt.cost.paper import LOSSLESS_POINTS
from compt.text import TextTable

EQUAL = (
    "Equal accuracy: the length of a baseline that is as accurate on the validation sets, between measured lengths by "
    "their logarithm; ? where it lies outside of them."
)
KINDS: tuple[Kind, ...] = ("macs", "seconds")
MISSING = "missing"
NO_PLATEAU = "no plateau yet"


def judged(study: Study, model: str, found: Difference | None) -> str:
    """The verdict on a difference to the model's baseline; none before the baseline's plateau is known."""
    if found is None:
        return MISSING
    return found.verdict if study.plateau(model) else NO_PLATEAU


def family_tables(study: Study, members: Sequence[str] = MEMBERS) -> list[TextTable]:
    """Each member of the chain against its own baseline: accuracy, and what the chain saves up to it."""
    chain = family_arms(baselines_at(study.rates), members)
    header = ["chain", "epochs", "seeds", "top-1, %", "baseline's epochs", "points against it [95 %]"]
    header += [f"margin {MARGIN:g}", f"mean above -{LOSSLESS_POINTS:g}", "unseen concepts [95 %]"]
    note = f"The paper calls a model lossless if it is at most {LOSSLESS_POINTS:g} points below, without an interval."
    quality = TextTable(
        "The chain against its baselines, on the test sets", header, [_quality(study, arm) for arm in chain], [note]
    )
    sums = _Sums()
    header = ["chain", "baseline's epochs", "MACs x", "family", "device time x", "family"]
    header += ["epochs of equal accuracy [95 %]", "MACs x", "family", "device time x", "family"]
    notes = [
        "Family: the baselines of all members so far over the chain so far, also for the chain that ends there.",
        "Device time: steps x measured seconds of a step on an idle core (speeds.json).",
        EQUAL,
    ]
    costs = TextTable("What the chain saves", header, [_costs(study, arm, sums) for arm in chain], notes)
    return [quality, costs]


class _Sums:
    """Costs of the chain and of its baselines so far, by kind; None after a member that is missing."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float] | None] = {}

    def add(self, kind: str, baseline: float | None, own: float | None) -> list[str]:
        """Two cells: how many times the baseline costs as much, alone and with the members before."""
        before = self.sums.get(kind, (0.0, 0.0))
        if before is None or baseline is None or own is None:
            self.sums[kind] = None
            return [times(baseline, own), "-"]
        total = before[0] + baseline, before[1] + own
        self.sums[kind] = total
        return [times(baseline, own), times(*total)]


def _quality(study: Study, arm: Arm) -> list[str]:
    items, model = study.find(arm.pieces), arm.pieces[0].model
    baseline = study.reference(model)
    found = study.compare(items, baseline)
    shown = [interval(found), judged(study, model, found)]
    shown += ["-" if found is None else "yes" if found.mean > -LOSSLESS_POINTS else "no"]
    shown += [interval(study.compare(items, baseline, UNSEEN))]
    # The first member is trained from scratch: on the plateau, it is its own baseline.
    if items and arm.pieces[0].teacher is None and baseline[0]["epochs"] == LENGTH:
        shown = ["-", "is the baseline", "-", "-"]
    return [
        arm.name,
        f"{arm.pieces[0].epochs:g}",
        str(found.seeds if found else len(items)),
        number(study.accuracy(items, REPORT), 2),
        "-" if not baseline else f"{baseline[0]['epochs']:g}",
        *shown,
    ]


def _costs(study: Study, arm: Arm, sums: _Sums) -> list[str]:
    items, model = study.find(arm.pieces), arm.pieces[0].model
    reference, equal = study.reference(model), study.equal(items)
    if items and arm.pieces[0].teacher is None and equal is None:
        # The first member of a chain is a baseline: it is as accurate as itself.
        equal = Length(items[0]["epochs"], None, None)
    cells = [arm.name]
    for name, epochs, shown in (
        ("plateau", reference[0]["epochs"] if reference else None, f"{reference[0]['epochs']:g}" if reference else "-"),
        ("equal", equal.epochs if equal else None, span(equal)),
    ):
        cells.append(shown)
        for kind in KINDS:
            baseline = None if epochs is None else study.cost_of_epochs(model, epochs, kind)
            cells += sums.add(f"{kind}, {name}", baseline, study.cost(items[0], kind) if items else None)
    return cells


def lengths_of_links(study: Study, lr: float, lengths: Iterable[float] = LINKS) -> list[tuple[float, Difference]]:
    """Length and difference of the links from a to b to b's baseline, of those that are measured."""
    firsts = family_arms(baselines_at(study.rates), MEMBERS[:1])[0].pieces
    found = (
        (epochs, study.compare(study.find(link("b", epochs, first, lr=lr) for first in firsts), study.reference("b")))
        for epochs in lengths
    )
    return [(epochs, one) for epochs, one in found if one is not None]


def draw_lengths_of_links(study: Study, axis: Axes) -> None:
    """The difference of b as a link of a to its baseline, against the link's length."""
    for colour, lr, shift in zip(SERIES, LINK_LRS, (0.985, 1.015), strict=False):
        points = lengths_of_links(study, lr)
        if points:
            middles = np.array([one.mean for _, one in points])
            errors = np.array([[one.mean - one.low, one.high - one.mean] for _, one in points]).T
            style: dict[str, Any] = {"color": colour, "capsize": 3}
            places = [epochs * shift for epochs, _ in points]
            axis.errorbar(places, middles, errors, fmt="o-", label=f"peak rate {lr:g}", **style)
            for place, (_, one) in zip(places, points, strict=True):
                axis.annotate(f"{one.seeds}", (place, one.low), (0, -12), textcoords="offset points", ha="center")
    axis.axhline(0, color=COLOUR["muted"], linewidth=0.8)
    axis.axhline(-MARGIN, color=COLOUR["ink"], linewidth=0.8, linestyle="--", label=f"margin: -{MARGIN:g}")
    axis.set_xscale("log")
    axis.set_xticks(LINKS, [f"{epochs:g}" for epochs in LINKS])
    axis.minorticks_off()
    baseline = study.reference("b")
    length = "its baseline" if not baseline else f"its baseline of {baseline[0]['epochs']:g} epochs"
    axis.set(xlabel="epochs of the link a → b (below an interval: its seeds)", ylabel=f"points against {length}")
    axis.legend()
