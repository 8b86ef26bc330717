"""How well the epoch line of `compt.design` predicts the paper's links, left out one by one, its chains, and our links.

MACs are counted as the paper counts them; epochs are not rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.axes import Axes

from benchmarks.common import COLOUR, RESULTS, Result, main
from benchmarks.paper.printed import (
    FIGURE_6_REDUCTION,
    FIGURE_7,
    FIGURE_7_SAVING_OF_4_OVER_8,
    FIGURE_9A_LEAST_SPEEDUP,
    FIGURE_9B_SPEEDUP,
    FULL_CHAIN_SAVES_OVER_LAST_PAIR,
)
from compt.cost.paper import CAPTIONS_PER_IMAGE, FIGURE_9B_EXTRAPOLATED, IMAGES
from compt.cost.published import paper_cost
from compt.design.curves import LinkEpochs, Match
from compt.design.epochs import FEATURES, EpochModel, Range, paper_matches
from compt.files import read_json
from compt.models.presets import PRESETS, ModelSpec
from compt.text import TextTable

LADDER = ("vit_t16", "vit_s16", "vit_b16", "vit_l16")
MERGED_LADDER = ("vit_s16", "vit_m16", "vit_b16", "vit_l16")
LINKS = tuple(match for match in paper_matches() if match.distilled)
LINE = EpochModel.fit(paper_matches())
CURVES = RESULTS.parents[1] / "docs" / "results" / "curves" / "curves.json"


@dataclass(frozen=True)
class Prediction:
    """A published or measured number of epochs, predicted without it and without its whole family."""

    family: str
    link: str
    source: str
    published: float
    without_it: float
    without_family: float


def family(match: Match) -> str:
    kind = "Swins" if match.student.arch == "swin" else "ViTs"
    return f"{kind} on {'CC3M' if match.images == IMAGES['cc3m'] else 'Merged-15M'}"


def predictions() -> list[Prediction]:
    """Every published link with distillation, by lines fitted to the others."""

    def by(match: Match, others: Iterable[Match]) -> float:
        asked = LinkEpochs(match.student, match.teacher, match.position, match.images, match.baseline_epochs)
        return EpochModel.fit(list(others)).predict(asked).middle

    return [
        Prediction(
            family(match),
            f"{match.teacher.name} to {match.student.name}",
            match.source,
            match.epochs,
            by(match, [other for other in LINKS if other is not match]),
            by(match, [other for other in LINKS if family(other) != family(match)]),
        )
        for match in LINKS
    ]


def measured() -> list[Prediction]:
    """The links of the emoji family (docs/results.md): another recipe, data set and size, which no fit has seen."""
    rows = []
    for link in read_json(CURVES)["links"]:
        match = {key: value for key, value in link["match"].items() if key not in ("student", "teacher")}
        student, teacher = (ModelSpec.from_dict(link["match"][key]) for key in ("student", "teacher"))
        needed = LINE.predict(Match(student, teacher, **match)).middle
        name = f"{teacher.name} to {student.name}"
        rows.append(Prediction("Our emoji family", name, "docs/results/curves", match["epochs"], needed, needed))
    return rows


@dataclass(frozen=True)
class Predicted:
    """A chain by the line, in MACs for each image of the training set: middle, and all links at either end.

    `alone` are the MACs of its models trained individually, `last_alone` those of the last one.
    """

    macs: Range
    alone: float
    last_alone: float

    @property
    def speedup(self) -> Range:
        return Range(self.alone / self.macs.middle, self.alone / self.macs.high, self.alone / self.macs.low)


def predict(specs: Sequence[ModelSpec], images: int, baseline: float) -> Predicted:
    """What a chain costs by the line, the first of `specs` trained for the `baseline` epochs."""
    own = [paper_cost(spec, None, samples=1, steps=1).sample_macs for spec in specs]
    total = np.full(3, own[0] * baseline)
    for at in range(1, len(specs)):
        needed = LINE.predict(LinkEpochs(specs[at], specs[at - 1], at, images, baseline))
        cost = paper_cost(specs[at], specs[at - 1], samples=1, steps=1).sample_macs
        total += cost * np.array([needed.middle, needed.low, needed.high])
    return Predicted(Range(*total.tolist()), sum(own) * baseline, own[-1] * baseline)


def presets(names: Iterable[str]) -> list[ModelSpec]:
    return [PRESETS[name] for name in names]


@dataclass(frozen=True)
class Finding:
    """A statement of the paper about a chain and what the line says of it.

    `fitted`: it is no test, as its links are in the fit, or the line cannot but agree.
    """

    figure: str
    statement: str
    published: str
    predicted: str
    fitted: bool
    agrees: bool


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    return f"{value:.2f}x"


def _number(
    figure: str, statement: str, published: float, found: Range, shown: Callable[[float], str], fitted: bool = False
) -> Finding:
    """A finding with a number: it agrees where the range holds it, rounded as it is shown."""
    low, high = sorted((found.low, found.high))
    words = f"{shown(found.middle)} ({shown(low)} to {shown(high)})"
    agrees = low <= published <= high or shown(published) in (shown(low), shown(high))
    return Finding(figure, statement, shown(published), words, fitted, agrees)


def _saving(one: Range, other: Range | float) -> Range:
    """By what share the chain `one` costs less than `other`, with all links at the same end of their ranges."""
    ends = [
        1 - getattr(one, end) / (getattr(other, end) if isinstance(other, Range) else other)
        for end in ("middle", "low", "high")
    ]
    return Range(*ends)


def figure_6() -> list[Finding]:
    full, pair = (predict(presets(names), IMAGES["cc3m"], 128) for names in (LADDER, LADDER[2:]))
    last, share = full.last_alone, FULL_CHAIN_SAVES_OVER_LAST_PAIR
    points = Range(*((getattr(pair.macs, end) - getattr(full.macs, end)) / last for end in ("middle", "low", "high")))
    return [
        _number("6", "T to L, less than ViT-L alone", FIGURE_6_REDUCTION, _saving(full.macs, last), percent, True),
        _number("6", "T to L, less than B to L (share of it)", share, _saving(full.macs, pair.macs), percent),
        _number("6", "the same in points of ViT-L alone", share, points, percent),
    ]


def figure_7() -> list[Finding]:
    """Three accelerations; 2x has the greatest; 4x the least cost. The links of 4x are in the fit."""
    found = {chain.ratio: predict(presets(chain.models), IMAGES["cc3m"], 128) for chain in FIGURE_7}
    rows = [
        _number(
            "7",
            f"steps of {chain.ratio}x, {len(chain.models)} models",
            chain.speedup,
            found[chain.ratio].speedup,
            times,
            chain.ratio == 4,
        )
        for chain in FIGURE_7
    ]
    fastest = max(found, key=lambda ratio: found[ratio].speedup.middle)
    cheapest = min(found, key=lambda ratio: found[ratio].macs.middle)
    saving = _saving(found[4].macs, found[8].macs)
    return [
        *rows,
        Finding("7", "greatest acceleration", "2x", f"{fastest}x", False, fastest == 2),
        Finding("7", "least total cost", "4x", f"{cheapest}x", False, cheapest == 4),
        _number("7", "4x costs less than 8x by", FIGURE_7_SAVING_OF_4_OVER_8, saving, percent),
    ]


def figure_9() -> list[Finding]:
    """Over baseline epochs the line cannot change; over images it is fitted at CC3M and Merged-15M alone."""
    same = predict(presets(LADDER), IMAGES["cc3m"], 32).speedup
    words = f"{times(same.middle)} ({times(same.low)} to {times(same.high)})"
    least = FIGURE_9A_LEAST_SPEEDUP
    rows = [Finding("9a", "any baseline epochs", f"at least {times(least)}", words, True, same.middle >= least)]
    for pairs, speedup in {**FIGURE_9B_SPEEDUP, **FIGURE_9B_EXTRAPOLATED}.items():
        images = round(pairs / CAPTIONS_PER_IMAGE)
        far = ", the paper's extrapolation" if pairs in FIGURE_9B_EXTRAPOLATED else ""
        found = predict(presets(MERGED_LADDER), images, 64).speedup
        fitted = math.isclose(images, IMAGES["merged15m"], rel_tol=0.01)
        rows.append(_number("9b", f"{pairs / 1e6:,.0f} M pairs{far}", speedup, found, times, fitted))
    return rows


def link_table(found: Sequence[Prediction]) -> TextTable:
    def off(one: Prediction, value: float) -> str:
        return f"{value:.1f} ({100 * (value / one.published - 1):+.0f} %)"

    rows = [
        [f"{one.family}: {one.link}", f"{one.published:.4g}", off(one, one.without_it), off(one, one.without_family)]
        for one in found
    ]
    note = (
        f"The range of a prediction is the largest error of a published link in the third column: a factor of "
        f"{LINE.factor():.2f}. Without Merged-15M nothing is known of the number of images. Our emoji family was "
        "measured with another recipe on 6,883 images; no line is fitted to it."
    )
    header = ["Link", "Epochs", "Without it", "Without its family"]
    return TextTable("Epochs of each link, from the others", header, rows, [note])


def chain_table(found: Sequence[Finding]) -> TextTable:
    rows = [
        [
            f"{one.figure}: {one.statement}",
            one.published,
            one.predicted,
            ("fitted" if one.fitted else "yes") if one.agrees else "no",
        ]
        for one in found
    ]
    note = (
        "Brackets: all links at one end of their ranges. Agrees: the bracket holds the published number; "
        "fitted: it does, and the chain's links are in the fit; the line knows no baseline epochs (9a)."
    )
    return TextTable("Chains of the paper", ["Figure", "Published", "By the line", "Agrees"], rows, [note])


def coefficient_table() -> TextTable:
    rows = [[name, f"{value:+.2f}"] for name, value in zip(FEATURES, LINE.coefficients.tolist(), strict=True)]
    rows.append(["weights only", f"{LINE.moves[False][0]:+.2f}"])
    notes = [
        "In natural logarithms of epochs / baseline epochs; size step and number of images per doubling.",
        f"Weights only: the middle of two published links, {LINE.factor(False):.2f} times off to either side.",
    ]
    return TextTable("The line", ["Feature", "Coefficient"], rows, notes)


def plot(found: Sequence[Prediction]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        places, factor = np.arange(len(found)), LINE.factor()
        middle = np.array([one.without_it for one in found])
        ends = [middle - middle / factor, middle * factor - middle]
        axes.errorbar(middle, places, xerr=ends, fmt="o", color=COLOUR["chain"], capsize=3, label="predicted")
        axes.plot([one.published for one in found], places, "x", color=COLOUR["ink"], label="published")
        axes.set_yticks(places, [f"{one.family}: {one.link}" for one in found], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("epochs, each link predicted from the others")
        axes.legend()

    return draw


def make() -> Result:
    """Every published link without itself and without its family, and the paper's chains."""
    links, own, chains = predictions(), measured(), [*figure_6(), *figure_7(), *figure_9()]
    factors = [math.exp(abs(math.log(one.without_it / one.published))) for one in links]
    unseen = [one for one in chains if not one.fitted]
    summary = (
        f"The line predicts each of {len(links)} published links from the others within a factor of "
        f"{float(np.median(factors)):.2f} (median) and at most {max(factors):.2f}; it agrees with "
        f"{sum(one.agrees for one in unseen)} of {len(unseen)} findings about chains whose links are not in the fit. "
        f"Our own emoji family needed {' and '.join(f'{one.published / one.without_it:.1f}' for one in own)} times as "
        "many epochs as the line says: with another recipe or data set, measure."
    )
    return Result(
        name="findings",
        title="How well the epoch line of chain design predicts the paper",
        tables=(link_table([*links, *own]), chain_table(chains), coefficient_table()),
        records={
            "links": [asdict(one) for one in (*links, *own)],
            "chains": [asdict(one) for one in chains],
            "coefficients": [{"feature": row[0], "coefficient": row[1]} for row in coefficient_table().rows],
        },
        findings=(summary,),
        plots={"epochs": plot(links)},
    )


if __name__ == "__main__":
    main(make)
