"""The family's chain against its baselines, and how the first link's length decides whether it is lossless."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.common import COLOUR, SERIES, number
from benchmarks.evidence.pieces import (
    AGAIN,
    ALL,
    CHAINS,
    FIRST,
    IMAGES,
    KINDS,
    LENGTH,
    LENGTHS,
    LINK_RATES,
    LINKS,
    MEMBERS,
    PARTS,
    SHORT,
    SMALL,
    Arm,
    Design,
    Piece,
    all_small_trials,
    baseline_trials,
    family_arms,
    quarter_arm,
)
from benchmarks.evidence.statistics import MARGIN, Difference, Length, difference
from benchmarks.evidence.study import COSTS, REPORT, UNSEEN, Cost, Record, Study, interval, span, times
from compt.cost.paper import LOSSLESS_POINTS
from compt.text import TextTable

EQUAL = (
    "Equal accuracy: the length of a baseline that is as accurate on the test sets, between measured lengths by their "
    "logarithm; ? where it lies outside of them. Intervals are over concepts alone."
)
MISSING = "missing"
TICKS = (0.3, 1, 3, 10, 30, 100)


def family_tables(study: Study, design: Design = FIRST) -> list[TextTable]:
    """Each member of a chain against its own baseline of as many epochs as the first: accuracy, and savings so far."""
    chain = family_arms(study.rates, design=design)
    name = f"a of {design.epochs:g} epochs, links of {', '.join(f'1/{share:g}' for share in design.shares)}"
    name += _images(design.shards) + _seeds(design)
    header = ["chain", "epochs", "seeds", "top-1, %", "baseline's epochs", "points against it [95 %]"]
    header += [f"margin {MARGIN:g}", f"mean above -{LOSSLESS_POINTS:g}", "unseen concepts [95 %]"]
    note = f"The paper calls a model lossless if it is at most {LOSSLESS_POINTS:g} points below, without an interval."
    title = f"The chain ({name}) against its baselines, on the test sets"
    quality = TextTable(title, header, [_quality(study, arm) for arm in chain], [note])
    sums = _Sums()
    header = ["chain", "baseline's epochs", "MACs x", "family", "device time x", "family"]
    header += ["epochs of equal accuracy [95 %]", "MACs x", "device time x"]
    notes = [
        "Family: the baselines of all members so far over the chain so far, also for the chain that ends there.",
        "At equal accuracy, what the family saves is in the first table.",
        "Device time: steps x measured seconds of a step on an idle core (speeds.json).",
        EQUAL,
    ]
    costs = TextTable(f"What the chain saves ({name})", header, [_costs(study, arm, sums) for arm in chain], notes)
    return [quality, costs]


def _images(shards: int) -> str:
    return "" if shards == ALL else f", {IMAGES[shards]:,} images"


def _seeds(design: Design) -> str:
    return f", seeds {design.seeds[0]} to {design.seeds[-1]}" if design.seeds[0] else ""


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
    first = arm.pieces[0].chain[0]
    baseline = study.baselines(arm.pieces[0].model, first.epochs, first.shards)
    items, baseline = common(study.find(arm.pieces), baseline)
    found = study.compare(items, baseline)
    shown = [interval(found), MISSING if found is None else found.verdict]
    if found and found.seeds < len(arm.pieces):
        shown[1] = f"{found.seeds} of {len(arm.pieces)} seeds"
    shown += ["-" if found is None else "yes" if found.mean > -LOSSLESS_POINTS else "no"]
    shown += [interval(study.compare(items, baseline, UNSEEN))]
    if items and arm.pieces[0] == first:
        shown = ["-", "is the baseline", "-", "-"]
    return [
        arm.name,
        f"{arm.pieces[0].epochs:g}",
        str(len(items)),
        number(study.accuracy(items, REPORT), 2),
        "-" if not baseline else f"{baseline[0]['epochs']:g}",
        *shown,
    ]


def _costs(study: Study, arm: Arm, sums: _Sums) -> list[str]:
    items, model, shards = study.find(arm.pieces), arm.pieces[0].model, arm.pieces[0].shards
    reference, equal = study.baselines(model, arm.pieces[0].chain[0].epochs, shards), study.equal(items)
    if items and arm.pieces[0].teacher is None and equal is None:
        # The first member of a chain is a baseline: it is as accurate as itself.
        equal = Length(items[0]["epochs"], None, None, len(items))
    cells = [arm.name]
    own = {kind: study.cost(items[0], kind) if items else None for kind in COSTS}
    cells.append(f"{reference[0]['epochs']:g}" if reference else "-")
    for kind in COSTS:
        cells += sums.add(kind, study.cost(reference[0], kind) if reference else None, own[kind])
    cells.append(span(equal))
    for kind in COSTS:
        cells.append(times(study.cost_of_epochs(model, equal.epochs, kind, shards) if equal else None, own[kind]))
    return cells


def common(items: list[Record], others: list[Record]) -> tuple[list[Record], list[Record]]:
    """Those of both whose seeds both have, so that means are of the same seeds; all if one is empty."""
    if not items or not others:
        return items, others
    seeds = {item["seed"] for item in items} & {item["seed"] for item in others}
    return [item for item in items if item["seed"] in seeds], [item for item in others if item["seed"] in seeds]


def calibrated_table(study: Study) -> TextTable:
    """The chain whose lengths the first-pair test found, against its members alone."""
    rows = []
    for link in study.calibrated:
        name, own = link["spec"]["name"], study.calibrated_answers[link["name"]]
        alone = study.find([study.rates.baseline(name, SHORT, link["seed"])])
        found = difference([own], [alone[0]["correct"][REPORT]], study.labels[REPORT]) if alone else None
        cells = [link["name"], f"{link['epochs']:.3g}", number(100 * float(own.mean()), 2)]
        cells += [number(study.accuracy(alone, REPORT), 2), interval(found if link["teacher"] else None)]
        rows.append([*cells, times(alone[0]["macs"] if alone else None, link["cost"]["total_macs"])])
    header = ["link", "epochs", "test sets, %", f"alone, {SHORT} epochs, %", "points [95 %]", "MACs x"]
    return TextTable("The chain of the first-pair test (seed 0; intervals over concepts)", header, rows)


def search_table(study: Study) -> TextTable:
    """What the search for rates cost."""
    rates = study.rates
    searched = {
        "models alone": [piece for model in MEMBERS for piece in baseline_trials(model)],
        "long models alone on few images": all_small_trials(),
        **{f"links ({kind})": [one for model in MEMBERS[1:] for one in rates.trials(model, kind)] for kind in KINDS},
    }
    rows = []
    for name, tried in searched.items():
        items = study.find(tried)
        rows.append([name, str(len(items)), f"{sum(item['macs'] for item in items) / 1e12:.1f}"])
    notes = ["No ratio counts it. Some of these trainings are also members of chains, or baselines."]
    return TextTable("The search for rates", ["rates of", "training runs", "MACs, T"], rows, notes)


def savings_of_chains(study: Study) -> TextTable:
    """What each chain of the whole family saves at equal accuracy: the first result of the study."""
    rows = []
    for design in (*CHAINS, *SMALL, AGAIN):
        chain = family_arms(study.rates, design=design)
        name = chain[-1].name + _images(design.shards) + _seeds(design)
        rows.append(_saved(study, name, [study.find(arm.pieces) for arm in chain]))
    for epochs, shards in dict.fromkeys((design.epochs, design.shards) for design in (*CHAINS, *SMALL)):
        first = study.baselines("a", epochs, shards)
        # An exact expansion has the function of a, so it answers as a does.
        grown = {"teacher": "a", "alpha": 0.0, "macs": 0.0, "steps": 0}
        members = [first, *([{**item, **grown, "model": model} for item in first] for model in MEMBERS[1:])]
        rows.append(_saved(study, f"a({epochs:g}){_images(shards)}, expanded exactly and not trained", members))
    header = ["chain", "seeds", "mean, %", "d, %", "MACs x [95 %]", "by seed", "device time x [95 %]"]
    header += ["d alone, MACs x [95 %]", "d alone, device time x [95 %]"]
    notes = [
        "All four models alone, each until it is as accurate on the test sets as in the chain, over the chain.",
        "d alone: what only d costs alone, over the whole chain.",
        "A member below its shortest baseline counts nothing alone, one above its longest as that.",
        "Between lengths, accuracy is taken as linear in their logarithm. It is concave: ratios are slightly too high.",
        "The last rows are a control: models that are no better than a cost only a. Read a ratio with its accuracies.",
        "Intervals are over concepts alone; each seed's own ratio stands beside them.",
    ]
    return TextTable("What the family saves at equal accuracy", header, rows, notes)


def _saved(study: Study, name: str, members: list[list[Record]]) -> list[str]:
    seeds = study.comparable(members)
    members = [[item for item in items if item["seed"] in seeds] for items in members]
    family = [study.saving(members, kind) for kind in COSTS]
    last = [study.saving(members, kind, last=True) for kind in COSTS]
    macs, *others = (f"{one.ratio:.2f} [{one.low:.2f}, {one.high:.2f}]" if one else "-" for one in (*family, *last))
    by_seed = ", ".join(f"{one:.2f}" for one in family[0].by_seed) if family[0] else "-"
    means = [study.accuracy(items, REPORT) for items in members]
    mean = float(np.mean([one for one in means if one is not None])) if seeds else None
    return [name, str(len(seeds)), number(mean, 2), number(means[-1], 2), macs, by_seed, *others]


def lengths_of_links(study: Study, lr: float) -> list[tuple[float, Difference]]:
    """Length and difference of the links from a to b to b's baseline, of those that are measured."""
    firsts = family_arms(study.rates, MEMBERS[:1], FIRST._replace(epochs=LENGTH))[0].pieces
    found = (
        (
            epochs,
            study.compare(
                study.find(replace(study.rates.link("b", epochs, first), lr=lr) for first in firsts),
                study.baselines("b", LENGTH),
            ),
        )
        for epochs in LINKS
    )
    return [(epochs, one) for epochs, one in found if one is not None]


def draw_lengths_of_links(study: Study, axis: Axes) -> None:
    """The difference of b as a link of a to its baseline, against the link's length."""
    for colour, lr, shift in zip(
        SERIES, LINK_RATES["quarter"]["b"], (0.95, 0.97, 0.99, 1.01, 1.03, 1.05), strict=False
    ):
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
    label = f"points against its baseline of {LENGTH:g} epochs"
    axis.set(xlabel="epochs of the link a → b (below an interval: its seeds)", ylabel=label)
    axis.legend()


def savings_by_length(study: Study) -> TextTable:
    """What a link of a quarter saves at each length of the pair's first model, against baselines of equal accuracy."""
    rows = []
    for first, arm in (found for shards in (ALL, *PARTS) for found in _quarters(study, shards)):
        shards = first.shards
        items, baseline = common(study.find(arm.pieces), study.baselines("b", first.epochs, shards))
        equal, (teachers, _) = study.equal(items), common(study.baselines("a", first.epochs, shards), items)
        cells = [f"{IMAGES[shards]:,}", f"{first.epochs:g}", f"{arm.pieces[0].epochs:g}", str(len(items))]
        cells += [number(study.accuracy(found, REPORT), 2) for found in (teachers, items, baseline)]
        cells += [interval(study.compare(items, baseline)), span(equal)]
        for kind in COSTS:
            saved = [
                _savings(study, first, items, equal.epochs, kind, whole) if equal else None for whole in (False, True)
            ]
            cells += [number(one, 2) for one in saved]
        rows.append(cells)
    header = ["images", "epochs of a and of b alone", "epochs of a → b", "seeds", "a, %", "a → b, %", "b alone, %"]
    header += ["points against b alone [95 %]", "epochs of equal accuracy [95 %]"]
    header += ["MACs x", "MACs x, a and b", "device time x", "device time x, a and b"]
    return TextTable("(e) Savings of a link of a quarter by the length of training", header, rows, [EQUAL])


def _quarters(study: Study, shards: int) -> Iterable[tuple[Piece, Arm]]:
    """The first model and the link of each length that is measured."""
    for epochs in LENGTHS:
        arm = quarter_arm(study.rates, epochs, shards)
        if study.find(arm.pieces):
            yield arm.pieces[0].chain[0], arm


def _savings(study: Study, first: Piece, items: list[Record], epochs: float, kind: Cost, whole: bool) -> float | None:
    """How many times a baseline of `epochs` costs as much as the link; `whole`: with a on both sides."""
    a = study.cost_of_epochs("a", first.epochs, kind, first.shards)
    b, link = study.cost_of_epochs("b", epochs, kind, first.shards), study.cost(items[0], kind)
    if a is None or b is None or link is None:
        return None
    return (a + b) / (a + link) if whole else b / link


def draw_savings(study: Study, axis: Axes) -> None:
    """The savings in MACs at equal accuracy against the length of training, for the link and by number of images."""
    lines = [(ALL, False, "the link alone"), (ALL, True, "a and b")]
    lines += [(shards, True, f"a and b, {IMAGES[shards]:,} images") for shards in PARTS]
    for colour, (shards, whole, label) in zip(SERIES, lines, strict=False):
        points = []
        for first, arm in _quarters(study, shards):
            items = study.find(arm.pieces)
            equal = study.equal(items)
            if equal and equal.low and equal.high:
                values = [
                    _savings(study, first, items, one, "macs", whole) for one in (equal.low, equal.epochs, equal.high)
                ]
                points.append((first.epochs, values))
        if points:
            low, middle, high = np.array([values for _, values in points], dtype=float).T
            style: dict[str, Any] = {"color": colour, "capsize": 3, "label": label}
            axis.errorbar([at for at, _ in points], middle, [middle - low, high - middle], fmt="o-", **style)
    axis.axhline(1, color=COLOUR["muted"], linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(LENGTHS, [f"{epochs:g}" for epochs in LENGTHS])
    axis.minorticks_off()
    axis.set(xlabel="epochs of a; the link has a quarter", ylabel="MACs of b alone over the link's, at equal accuracy")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def draw_family(study: Study, axis: Axes) -> None:
    """The accuracy of each model alone against the MACs of its training, and of chains against theirs so far."""
    for colour, model in zip(SERIES, MEMBERS, strict=False):
        found = [items for epochs in LENGTHS if (items := study.baselines(model, epochs))]
        if found:
            means = [study.accuracy(items, REPORT) or 0.0 for items in found]
            macs = [items[0]["macs"] / 1e12 for items in found]
            axis.plot(macs, means, "o-", color=colour, markersize=4, label=f"{model} alone")
    for style, design in zip(("D-", "^--", "s:", "v-.", "*--"), CHAINS, strict=True):
        chain = family_arms(study.rates, design=design)
        members = [study.find(arm.pieces) for arm in chain]
        if all(members):
            macs = list(itertools.accumulate(items[0]["macs"] / 1e12 for items in members))
            means = [study.accuracy(items, REPORT) or 0.0 for items in members]
            axis.plot(macs, means, style, color=COLOUR["ink"], markersize=6, linewidth=1, label=chain[-1].name)
    if links := study.calibrated:
        macs = list(itertools.accumulate(item["cost"]["total_macs"] / 1e12 for item in links))
        name = " → ".join(f"{item['spec']['name']}({item['epochs']:.3g})" for item in links)
        means = [item["scores"][REPORT]["top1"] for item in links]
        axis.plot(macs, means, "P-", color=COLOUR["ink"], markersize=7, linewidth=2, label=name)
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.minorticks_off()
    axis.set(xlabel="MACs of training so far, T", ylabel="top-1 on the test sets, %")
    handles, labels = axis.get_legend_handles_labels()
    alone = sum(label.endswith("alone") for label in labels)
    if alone:
        axis.add_artist(axis.legend(handles[:alone], labels[:alone], loc="upper left", fontsize="small"))
    if labels[alone:]:
        axis.legend(handles[alone:], labels[alone:], loc="lower right", fontsize="small")
