"""The paper's claims: what the measured pieces say about each, by rules that do not depend on the numbers.

A claim has several comparisons. It *holds* if all of them show it, *does not hold* if one shows the opposite, is *not
measured* if none could be made, and is *undecided* otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from benchmarks.common import number
from benchmarks.evidence.family import common, savings_by_length
from benchmarks.evidence.pieces import (
    FIRST,
    IMAGES,
    LENGTH,
    MEMBERS,
    SEEDS,
    SHORT,
    SMALL,
    Arm,
    Piece,
    Rates,
    arms,
    families,
    family_arms,
    macs_of,
    shares_of,
)
from benchmarks.evidence.statistics import Difference
from benchmarks.evidence.study import REPORT, RETRIEVAL, UNSEEN, Study, interval, mean_r, times
from compt.text import TextTable

Answer = Literal["yes", "no", "open", "missing"]
"""Whether a comparison shows its part of a claim, the opposite, neither, or is not there."""

Outcome = Literal["holds", "does not hold", "undecided", "not measured"]


R_BEST, R_BAND = 0.1, (0.07, 0.15)
"""The ratio r = IFD / task that is best in the paper's figure D, and what counts as about that."""


@dataclass(frozen=True)
class Part:
    """One comparison of a claim. `what` says what would have to be true, in a few words."""

    what: str
    answer: Answer
    found: Difference | None = None
    planned: int = len(SEEDS)

    @property
    def words(self) -> str:
        said = {"yes": "", "no": "no", "open": "undecided", "missing": "not measured"}[self.answer]
        if self.found and self.found.seeds < self.planned:
            said = f"open, {self.found.seeds} of {self.planned} seeds"
        shown = interval(self.found) if self.found else ""
        return f"{self.what}: {', '.join(filter(None, (shown, said))) or 'yes'}"


@dataclass(frozen=True)
class Claim:
    """A claim with the comparisons that decide it, and its table."""

    letter: str
    text: str
    parts: Sequence[Part]
    table: TextTable
    remark: str = ""

    @property
    def outcome(self) -> Outcome:
        return outcome([part.answer for part in self.parts])

    @property
    def sentence(self) -> str:
        """The claim, what became of it, and the differences in points that say so."""
        details = "; ".join(part.words for part in self.parts)
        return f"({self.letter}) {self.text}: **{self.outcome}**. {details}.{' ' * bool(self.remark)}{self.remark}"


def outcome(answers: Sequence[Answer]) -> Outcome:
    """What a claim's comparisons say together."""
    if all(answer == "missing" for answer in answers):
        return "not measured"
    if "no" in answers:
        return "does not hold"
    return "holds" if all(answer == "yes" for answer in answers) else "undecided"


def as_good(what: str, found: Difference | None, planned: int = len(SEEDS)) -> Part:
    """The first is as good as the second: the whole interval lies above the margin.

    Open until all planned seeds are there: a look after each seed finds an answer too often.
    """
    if found is None:
        return Part(what, "missing")
    answers: dict[str, Answer] = {"lossless": "yes", "not lossless": "no", "undecided": "open"}
    return Part(what, answers[found.verdict] if found.seeds >= planned else "open", found, planned)


def better(what: str, found: Difference | None) -> Part:
    """The first is better than the second: the whole interval lies above 0. Open as above."""
    if found is None:
        return Part(what, "missing")
    answers: dict[str, Answer] = {"better": "yes", "worse": "no", "undecided": "open"}
    return Part(what, answers[found.direction] if found.seeds >= len(SEEDS) else "open", found)


def claims(study: Study) -> list[Claim]:
    """All claims, in the order of their letters."""
    made: dict[str, Callable[[Study, list[Arm]], Claim]] = {
        "a": _lossless,
        "b": _prepending,
        "c": _members,
        "d": _ratios,
        "e": _by_length,
        "f": _initialization_and_distillation,
        "g": _weight_of_distillation,
        "h": _operators,
        "i": _other_tasks,
        "j": _instead,
        "k": functools.partial(_lossless_on_few_images, "k", ""),
        "l": _starts,
        "m": functools.partial(_lossless_on_few_images, "m", " (c for a quarter too, links with rates of their own)"),
        "n": functools.partial(_lossless_on_few_images, "n", " (links of a third, a third and a quarter)"),
        "o": functools.partial(_lossless_on_few_images, "o", " (as (n), on seeds 6 to 13 with baselines of their own)"),
    }
    found = arms(study.rates)
    return [make(study, found[letter]) for letter, make in made.items()]


def _lossless(study: Study, compared: list[Arm]) -> Claim:
    title = "(a) The chain, two chains of short links, and their members alone"
    text = "Every member of the chain is as good as its baseline, which trains for as many epochs as the first member"
    return Claim("a", text, _against_baselines(study, compared), _table(study, title, compared))


def _lossless_on_few_images(letter: str, how: str, study: Study, compared: list[Arm]) -> Claim:
    images = f"{IMAGES[SMALL[0].shards]:,} images"
    title = f"({letter}) Chains on {images}, and their members alone"
    text = f"On {images}, every member of a chain is as good as its baseline of as many epochs as the first member{how}"
    remark = f"{'; '.join(_against_smaller(study, compared))}."
    if compared[0].pieces[0].seed == 0:  # it chose the length and the images
        later = _against_baselines(study, [replace(arm, pieces=arm.pieces[1:]) for arm in compared])
        remark = f"Without seed 0: {'; '.join(part.words for part in later)}. {remark}"
    return Claim(letter, text, _against_baselines(study, compared), _table(study, title, compared), remark)


def _against_smaller(study: Study, compared: list[Arm]) -> list[str]:
    """The end of each chain against the next smaller model alone: what a user may train instead."""
    found = []
    for arm in compared:
        one = arm.pieces[0]
        if one.teacher is not None and one.model == MEMBERS[-1]:
            smaller = study.baselines(MEMBERS[-2], one.chain[0].epochs, one.shards)
            less, whole = study.compare(study.find(arm.pieces), smaller), _whole_cost(study, arm)
            saved = times(smaller[0]["macs"], whole) if smaller and whole else "-"
            name = f"{MEMBERS[-2]} alone"
            found.append(f"{arm.name} minus {name}: {interval(less)}, and {name} costs {saved} times this chain")
    return found


def _against_baselines(study: Study, compared: list[Arm]) -> list[Part]:
    parts = []
    for arm in compared:
        one = arm.pieces[0]
        # The first members are their own baselines.
        if one.teacher is not None:
            baseline = study.baselines(one.model, one.chain[0].epochs, one.shards)
            found = study.compare(study.find(arm.pieces), baseline)
            parts.append(as_good(arm.name, found, len(arm.pieces)))
    return parts


def _by_length(study: Study, compared: list[Arm]) -> Claim:
    parts = []
    for link, alone in zip(compared[::2], compared[1::2], strict=True):
        found = study.compare(study.find(link.pieces), study.find(alone.pieces))
        parts.append(as_good(f"{alone.pieces[0].epochs:g} epochs", found))
    text = "A link of a quarter is as good as its baseline, however long that trains"
    return Claim("e", text, parts, savings_by_length(study))


def _prepending(study: Study, compared: list[Arm]) -> Claim:
    *chains, last = compared
    alone = study.find(last.pieces)
    parts = [
        as_good(f"{arm.name} is as good as d alone", study.compare(study.find(arm.pieces), alone)) for arm in chains
    ]
    costs = [macs_of(Piece("d", SHORT)) / sum(map(macs_of, arm.pieces[0].chain)) for arm in chains]
    remark = (
        f"By plan, d alone costs {', '.join(f'{cost:.2f}' for cost in costs)} times the MACs of these chains; that "
        "follows from their lengths, which were chosen so."
    )
    table = _table(study, "(b) Model d at the end of chains that begin at c, b and a", compared, SHORT)
    return Claim("b", "Prepending smaller models lowers the cost of the largest", parts, table, remark)


def _members(study: Study, chains: list[Arm]) -> Claim:
    counts = sorted(families())
    fewest = study.find(chains[0].pieces)
    parts = [
        as_good(
            f"d after {count} members is as good as after {counts[0]}", study.compare(study.find(arm.pieces), fewest)
        )
        for count, arm in zip(counts[1:], chains[1:], strict=True)
    ]
    savings = ", ".join(f"{_planned_saving(count):.1f}" for count in counts)
    remark = (
        f"By these lengths, which were chosen so, families of 3, 4 and 7 save {savings} times the MACs of baselines "
        f"of {SHORT} epochs by plan. ab, bc and cd have no baselines: whether these members are lossless is not known."
    )
    table = _table(study, "(c) Model d at the end of chains of 3, 4 and 7 members", chains, SHORT)
    text = "With more members in the same range, shorter links are enough"
    return Claim("c", text, parts, table, remark)


def _planned_saving(count: int) -> float:
    members = families()[count]
    chain = family_arms(Rates(), members, FIRST._replace(shares=shares_of(count)))[-1].pieces[0].chain
    return sum(macs_of(Piece(model, SHORT)) for model in members) / sum(map(macs_of, chain))


def _ratios(study: Study, links: list[Arm]) -> Claim:
    parts = []
    for student in ("c", "d"):
        near, *far = (arm for arm in links if arm.pieces[0].model == student)
        for arm in far:
            found = study.compare(study.find(near.pieces), study.find(arm.pieces))
            parts.append(better(f"{near.name} is better than {arm.name}", found))
    table = _table(study, "(d) The same student, after the same steps, from teachers of different sizes", links)
    return Claim("d", "A smaller expansion ratio gives a better student at equal length", parts, table)


def _initialization_and_distillation(study: Study, ways: list[Arm]) -> Claim:
    both, weights, features, neither, longer = (study.find(arm.pieces) for arm in ways)
    parts = [
        better("IWI alone is better than neither", study.compare(weights, neither)),
        better("IFD alone is better than neither", study.compare(features, neither)),
        better("both are better than IWI alone", study.compare(both, weights)),
        better("both are better than IFD alone", study.compare(both, features)),
        better("both are better than b alone for the MACs of a and both", study.compare(both, longer)),
    ]
    table = _table(study, "(f) Model b after 20 epochs: with IWI and IFD, with one, with neither", ways, LENGTH)
    return Claim("f", "IWI and IFD each help, and help together", parts, table)


def _weight_of_distillation(study: Study, weights: list[Arm]) -> Claim:
    text = f"An alpha that gives r between {R_BAND[0]:g} and {R_BAND[1]:g} is better than others"
    table = _table(study, "(g) Model b after 20 epochs by weight of distillation", weights, LENGTH)
    found = {arm.name: items for arm in weights if (items := study.find(arm.pieces))}
    inside = {name: r for name, items in found.items() if R_BAND[0] <= (r := mean_r(items) or 0.0) <= R_BAND[1]}
    if not inside or len(found) < len(weights):
        return Claim("g", text, [Part("alphas", "missing")], table)
    best = min(inside, key=lambda name: abs(np.log(inside[name] / R_BEST)))
    parts = [
        better(f"{best} (r {inside[best]:.2g}) is better than {name}", study.compare(found[best], items))
        for name, items in found.items()
        if name != best
    ]
    return Claim("g", text, parts, table)


def _operators(study: Study, operators: list[Arm]) -> Claim:
    own, *others = (study.find(arm.pieces) for arm in operators)
    parts = [
        as_good(f"{operators[0].name} is as good as {arm.name}", study.compare(own, found))
        for arm, found in zip(operators[1:], others, strict=True)
    ]
    table = _table(study, "(h) Model b after 20 epochs by the operator that widens it", operators, LENGTH)
    return Claim("h", "Simple insertion is as good as other ways to widen a model", parts, table)


def _other_tasks(study: Study, compared: list[Arm]) -> Claim:
    links, alone = compared[1 : len(MEMBERS)], compared[len(MEMBERS) :]
    parts, rows = [], []
    for link, baseline in zip(links, alone, strict=True):
        own, other = common(study.find(link.pieces), study.find(baseline.pieces))
        row = [link.name if own else f"{link.name} (missing)", str(len(own))]
        for name, words in ((RETRIEVAL, "retrieval"), (UNSEEN, "unseen concepts")):
            found = study.compare(own, other, name)
            parts.append(as_good(f"{link.name}, {words}", found))
            row += [number(study.accuracy(items, name), 2) for items in (own, other)] + [interval(found)]
        rows.append(row)
    header = [
        "chain",
        "seeds",
        "retrieval R@1, %",
        "alone",
        "points [95 %]",
        "unseen concepts, %",
        "alone",
        "points [95 %]",
    ]
    title = f"(i) Retrieval (image to text) and unseen concepts, against members alone after {SHORT} epochs"
    text = "Members of the chain are as good at retrieval and at unseen concepts"
    return Claim("i", text, parts, TextTable(title, header, rows))


def _instead(study: Study, ways: list[Arm]) -> Claim:
    last, macs, time = (study.find(arm.pieces) for arm in ways[len(MEMBERS) - 1 :][:3])
    parts = [
        better("d of the chain is better than d alone for as many MACs", study.compare(last, macs)),
        better("and for as much device time", study.compare(last, time)),
    ]
    remark = (
        "Classical distillation (in the table) has no verdict: its members train equally long, and other lengths and "
        "rates could suit it better."
    )
    table = _table(study, "(j) What else the compute of the whole chain buys", ways)
    return Claim("j", "A chain is the best use of its compute for the largest model", parts, table, remark)


def _starts(study: Study, ways: list[Arm]) -> Claim:
    longer, peak, end, usual, *_ = (study.find(arm.pieces) for arm in ways)
    names = [arm.name for arm in ways]
    parts = [
        better(f"{names[1]} is better than {names[2]}, the same training to its end", study.compare(peak, end)),
        better(f"{names[1]} is better than {names[3]}", study.compare(peak, usual)),
        better(f"{names[0]} is better than {names[3]}", study.compare(longer, usual)),
    ]
    table = _table(study, "(l) Links that start before their teacher's rate falls, and schedules of models alone", ways)
    return Claim("l", "A link is better if it starts before its teacher's rate falls (not of the paper)", parts, table)


def _whole_cost(study: Study, arm: Arm) -> float | None:
    """MACs of the arm's model with all that it grows from; None if one of them is missing."""
    for piece in arm.pieces:
        found = study.find(piece.chain)
        if len(found) == len(piece.chain):
            return float(sum(item["macs"] for item in found))
    return None


def _table(study: Study, title: str, compared: Sequence[Arm], epochs: float | None = None) -> TextTable:
    """A row for each arm; with `epochs`, also the difference to the model's baseline of as many."""
    baseline = study.baselines(compared[0].pieces[0].model, epochs) if epochs else []
    rows = []
    for arm in compared:
        items = study.find(arm.pieces)
        cost = _whole_cost(study, arm)
        cells = [
            f"{arm.pieces[0].epochs:g}",
            str(len(items)),
            number(mean_r(items), 3),
            number(study.accuracy(items, REPORT), 2),
            number(study.accuracy(items, UNSEEN), 2),
            "-" if not items else f"{items[0]['macs'] / 1e12:.2f}",
            "-" if cost is None else f"{cost / 1e12:.2f}",
        ]
        if epochs:
            found = study.compare(items, baseline)
            cells.append(f"{interval(found)}, {found.seeds} seed{'s' * (found.seeds > 1)}" if found else "-")
        rows.append([arm.name if items else f"{arm.name} (missing)", *cells])
    header = ["", "epochs", "seeds", "r = IFD / task", "test sets, %", "unseen concepts, %", "MACs, T"]
    header += ["MACs with its teachers, T"]
    if epochs:
        length = f" of {baseline[0]['epochs']:g} epochs" if baseline else ""
        header.append(f"points against the baseline{length} [95 %]")
    return TextTable(title=title, header=header, rows=rows)
