"""The paper's findings about chain design, predicted by `compt.design` with their own points held out of the fit.

A finding is a HIT where the prediction agrees with it, or its range of 80 % holds the published number; else a MISS.
A range that spans more than a factor of 3 says nothing when it holds it.
MACs are counted as the paper counts them, epochs are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from benchmarks.common import Result, main
from benchmarks.paper.findings_tables import (
    Finding,
    Prediction,
    coefficient_table,
    family_table,
    finding_table,
    plot,
    tally,
)
from compt.cost.paper import (
    CAPTIONS_PER_IMAGE,
    FIGURE_6_REDUCTION,
    FIGURE_7,
    FIGURE_7_SAVING_OF_4_OVER_8,
    FIGURE_9A_EPOCHS,
    FIGURE_9A_LEAST_SPEEDUP,
    FIGURE_9B_EXTRAPOLATED,
    FIGURE_9B_SPEEDUP,
    FULL_CHAIN_SAVES_OVER_LAST_PAIR,
    IMAGES,
)
from compt.cost.published import paper_cost
from compt.design.candidates import candidates
from compt.design.curves import Match
from compt.design.epochs import (
    FEATURES,
    LEVEL,
    OVERSHOOT,
    PRIOR,
    EpochModel,
    Floats,
    LinkEpochs,
    Range,
    StartPrior,
    allotted,
    log2_size,
    paper_matches,
)
from compt.models.presets import PRESETS, ModelSpec

CC3M, MERGED = IMAGES["cc3m"], IMAGES["merged15m"]
LADDER = ("vit_t16", "vit_s16", "vit_b16", "vit_l16")
MERGED_LADDER = ("vit_s16", "vit_m16", "vit_b16", "vit_l16")
START, NO_START = StartPrior(), None


Points = Callable[[Match], bool]


def cc3m_vit(match: Match) -> bool:
    """Every ViT that was trained on CC3M, with weights only too."""
    return match.images == CC3M and match.student.arch == "vit"


def distilled_cc3m_vit(match: Match) -> bool:
    """Those of figure 8 alone: table 4(a) is another experiment."""
    return cc3m_vit(match) and match.distilled


def merged(match: Match) -> bool:
    """Every model that was trained on Merged-15M."""
    return match.images == MERGED


def nothing(_: Match) -> bool:
    """No point: the fit that plans are made with."""
    return False


HELD_OUT: dict[str, Points] = {
    "ViTs on CC3M": cc3m_vit,
    "figure 8": distilled_cc3m_vit,
    "Merged-15M": merged,
    "none": nothing,
}


def model_without(held_out: str, start: StartPrior | None = START) -> EpochModel:
    """The model fitted to all points but those."""
    return EpochModel.fit([match for match in paper_matches() if not HELD_OUT[held_out](match)], start=start)


@dataclass(frozen=True)
class Predicted:
    """A chain: MACs a picture of the training set, as a median and in draws, and of its models individually."""

    macs: float
    draws: Floats
    alone: float
    last_alone: float

    @property
    def speedup(self) -> Range:
        return Range.of(self.alone / self.macs, self.alone / self.draws)


def predict(model: EpochModel, specs: Sequence[ModelSpec], images: int, baseline: float) -> Predicted:
    """What a chain costs by `model`, the first of `specs` trained for the `baseline` epochs."""
    links = model.links(specs, images=images, baseline_epochs=baseline)
    own = [paper_cost(spec, None, samples=1, steps=1).sample_macs for spec in specs]
    costs = np.array([paper_cost(link.student, link.teacher, samples=1, steps=1).sample_macs for link in links])
    epochs = np.array([model.epochs(link) for link in links])
    first = own[0] * baseline
    return Predicted(
        float(first + epochs @ costs), first + model.draws(links) @ costs, sum(own) * baseline, own[-1] * baseline
    )


def presets(names: Iterable[str]) -> list[ModelSpec]:
    return [PRESETS[name] for name in names]


def smaller_than_t() -> ModelSpec:
    """A ViT that stands below ViT-T as that stands below ViT-S, in the proportions of the presets."""
    models = candidates({"vit_t16": PRESETS["vit_t16"]}).specs
    goal = 2 * log2_size(PRESETS["vit_t16"]) - log2_size(PRESETS["vit_s16"])
    return min(models, key=lambda spec: abs(log2_size(spec) - goal))


def starts(model: EpochModel, images: int, baseline: float) -> dict[str, Predicted]:
    """Figure 6: chains that end in ViT-L, by their first model, the largest first."""
    ladder = [smaller_than_t(), *presets(LADDER)]
    chains = {ladder[at].name: ladder[at:] for at in reversed(range(len(ladder)))}
    return {name: predict(model, chain, images, baseline) for name, chain in chains.items()}


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(
    figure: str,
    statement: str,
    held_out: str,
    published: float,
    found: Range,
    shown: Callable[[float], str],
    least: bool = False,
) -> Finding:
    """A finding with a number: a hit where the range holds it, or for `least` where the median reaches it."""
    hit = found.middle >= published if least else found.low <= published <= found.high
    words = f"{shown(found.middle)} ({shown(found.low)} to {shown(found.high)})"
    text = f"at least {shown(published)}" if least else shown(published)
    return Finding(figure, statement, held_out, text, words, found.low, found.high, None, hit)


def times(value: float) -> str:
    return f"{value:.2f}x"


def figure_6(held_out: str, start: StartPrior | None) -> list[Finding]:
    """A minimum of cost inside, at ViT-T; 72 % less than ViT-L alone; 20 % less than B to L."""
    model = model_without(held_out, start)
    found = starts(model, CC3M, 128)
    names = list(found)
    drawn = np.stack([one.draws if len(one.draws) else one.macs for one in found.values()])
    best = min(found, key=lambda name: found[name].macs)
    least = drawn.argmin(axis=0)
    prior = "" if start else ", no start prior"
    name = "6, CC3M" + prior
    full, pair, smallest = found["vit_t16"], found["vit_b16"], names[-1]
    costs = ", ".join(f"{key} {percent(one.macs / full.last_alone)}" for key, one in found.items())
    inside = best not in (names[0], smallest)
    share_inside = float(((least > 0) & (least < len(names) - 1)).mean())
    share_t = float((least == names.index("vit_t16")).mean())
    saving = Range.of(1 - full.macs / pair.macs, 1 - full.draws / pair.draws)
    reduction = Range.of(1 - full.macs / full.last_alone, 1 - full.draws / full.last_alone)
    points = Range.of((pair.macs - full.macs) / full.last_alone, (pair.draws - full.draws) / full.last_alone)
    put_in: Literal["", "put in"] = "put in" if start else ""
    rows = [
        Finding(name, "cheapest start at no end", held_out, "yes", costs, None, None, share_inside, inside, put_in),
        Finding(name, "cheapest start", held_out, "vit_t16", best, None, None, share_t, best == "vit_t16", put_in),
    ]
    if start is None:
        return rows  # the others are the same: all chains in them begin with ViT-T or larger models
    last_pair = FULL_CHAIN_SAVES_OVER_LAST_PAIR
    return [
        *rows,
        _number(name, "from ViT-T, less than ViT-L alone", held_out, FIGURE_6_REDUCTION, reduction, percent),
        _number(name, "T to L, less than B to L (share of it)", held_out, last_pair, saving, percent),
        _number(name, "the same in points of ViT-L alone", held_out, last_pair, points, percent),
    ]


def figure_6_of_all(held_out: str, start: StartPrior | None) -> list[Finding]:
    """The cheapest start on CC3M among all candidates of the search, presets or not, before the presets above it."""
    model, ladder = model_without(held_out, start), presets(LADDER)
    models = candidates({spec.name: spec for spec in ladder})
    found = {}
    for at, spec in enumerate(models.specs):
        above = [place for place in models.wanted if place > at]
        if not above or models.grows[at, above[0]]:
            chain = [spec, *(models.specs[place] for place in above)]
            found[spec.name] = predict(model, chain, CC3M, 128)
    costs = {name: one.macs for name, one in found.items()}
    best = min(costs, key=lambda name: costs[name])
    alone = found["vit_l16"].last_alone
    words = f"{best} {percent(costs[best] / alone)}, vit_t16 {percent(costs['vit_t16'] / alone)}"
    share = float((found["vit_t16"].draws <= found[best].draws).mean())
    name = "6, CC3M" + ("" if start else ", no start prior")
    statement = f"cheapest start of all {len(found)} candidates"
    hit = best == "vit_t16"
    put_in: Literal["", "put in"] = "put in" if start else ""
    return [Finding(name, statement, held_out, "vit_t16", words, None, None, share, hit, put_in)]


def figure_6_merged(start: StartPrior | None) -> list[Finding]:
    """The cheapest start on Merged-15M. With the start prior this only shows what was put in."""
    found = starts(model_without("Merged-15M", start), MERGED, 64)
    best = min(found, key=lambda name: found[name].macs)
    costs = ", ".join(f"{key} {percent(one.macs / one.last_alone)}" for key, one in found.items())
    put_in: Literal["", "put in"] = "put in" if start else ""
    name, hit = "6, Merged-15M" + ("" if start else ", no start prior"), best == "vit_s16"
    words = f"{best}: {costs}"
    return [Finding(name, "cheapest start", "Merged-15M", "vit_s16", words, None, None, None, hit, put_in)]


def figure_7(held_out: str) -> list[Finding]:
    """Three accelerations; 2x has the greatest; 4x the least cost."""
    model = model_without(held_out)
    found = {chain.ratio: predict(model, presets(chain.models), CC3M, 128) for chain in FIGURE_7}
    rows = [
        _number(
            "7",
            f"{chain.ratio}x, {len(chain.models)} models",
            held_out,
            chain.speedup,
            found[chain.ratio].speedup,
            times,
        )
        for chain in FIGURE_7
    ]
    ratios = list(found)
    fastest = max(found, key=lambda ratio: found[ratio].speedup.middle)
    cheapest = min(found, key=lambda ratio: found[ratio].macs)
    speedups = np.stack([one.alone / one.draws for one in found.values()])
    costs = np.stack([one.draws for one in found.values()])
    share_fast = float((speedups.argmax(axis=0) == ratios.index(2)).mean())
    share_cheap = float((costs.argmin(axis=0) == ratios.index(4)).mean())
    paid = ", ".join(f"{ratio}x {percent(one.macs / one.last_alone)}" for ratio, one in found.items())
    least = f"{cheapest}x: {paid}"
    saving = Range.of(1 - found[4].macs / found[8].macs, 1 - found[4].draws / found[8].draws)
    return [
        *rows,
        Finding("7", "greatest acceleration", held_out, "2x", f"{fastest}x", None, None, share_fast, fastest == 2),
        Finding("7", "least total cost", held_out, "4x", least, None, None, share_cheap, cheapest == 4),
        _number("7", "4x costs less than 8x by", held_out, FIGURE_7_SAVING_OF_4_OVER_8, saving, percent),
    ]


def figure_9a(held_out: str) -> list[Finding]:
    """Acceleration of the four ViTs on CC3M with other numbers of baseline epochs: one test, f knows none of them."""
    model = model_without(held_out)
    found = [predict(model, presets(LADDER), CC3M, epochs).speedup for epochs in FIGURE_9A_EPOCHS]
    least = min(found, key=lambda one: one.middle)
    statement = f"{', '.join(map(str, FIGURE_9A_EPOCHS))} baseline epochs"
    row = _number("9a", statement, held_out, FIGURE_9A_LEAST_SPEEDUP, least, times, least=True)
    return [replace(row, given="by construction")]


def figure_9b(held_out: str, start: StartPrior | None) -> list[Finding]:
    """Acceleration of four ViTs (S, M, B, L) over the number of pairs, at 64 baseline epochs."""
    model, rows = model_without(held_out, start), []
    for pairs, speedup in {**FIGURE_9B_SPEEDUP, **FIGURE_9B_EXTRAPOLATED}.items():
        far = pairs in FIGURE_9B_EXTRAPOLATED
        if start is None and not far:
            continue  # the same as with it: ViT-S fits the data
        found = predict(model, presets(MERGED_LADDER), round(pairs / CAPTIONS_PER_IMAGE), 64).speedup
        statement = f"{pairs / 1e6:,.0f} M pairs" + (", the paper's extrapolation" if far else "")
        name = "9b" + ("" if start else ", no start prior")
        rows.append(_number(name, statement, held_out, speedup, found, times))
    return rows


FAMILIES: dict[str, Points] = {
    "ViTs on CC3M": distilled_cc3m_vit,
    "ViTs on CC3M, weights only": lambda match: not match.distilled,
    "Swins on CC3M": lambda match: match.student.arch == "swin",
    "ViTs on Merged-15M": merged,
}


def families() -> list[Prediction]:
    """Each family's epochs from the others. A range of an allotted number spans how much more than needed it may be."""
    rows = []
    for family, held_out in FAMILIES.items():
        model = EpochModel.fit([match for match in paper_matches() if not held_out(match)])
        for match in filter(held_out, paper_matches()):
            link = LinkEpochs(
                match.student, match.teacher, match.position, match.images, match.baseline_epochs, match.distilled
            )
            drawn, middle = model.draws([link])[:, 0], model.epochs(link)
            if allotted(match):
                drawn = drawn * np.exp(np.random.default_rng(1).uniform(0, 2 * OVERSHOOT[0], size=len(drawn)))
                middle *= float(np.exp(OVERSHOOT[0]))
            found = Range.of(middle, drawn)
            inside = found.low <= match.epochs <= found.high
            name = f"{match.teacher.name} to {match.student.name}"
            rows.append(
                Prediction(family, name, match.source, match.epochs, found.middle, found.low, found.high, inside)
            )
    return rows


def coefficients() -> list[dict[str, float | str]]:
    """Prior and fit to all points, in logarithms of f."""
    found = model_without("none").posterior
    rows: list[dict[str, float | str]] = [
        {"feature": name, "prior": before, "prior_spread": wide, "fit": after, "spread": narrow}
        for name, before, wide, after, narrow in zip(
            FEATURES,
            PRIOR.mean.tolist(),
            PRIOR.spreads().tolist(),
            found.mean.tolist(),
            found.spreads().tolist(),
            strict=True,
        )
    ]
    return [*rows, {"feature": "noise", "prior": 0.0, "prior_spread": PRIOR.noise, "fit": 0.0, "spread": found.noise}]


def make() -> Result:
    """Every finding with its own points held out, and each family's epochs predicted from the others."""
    held_out = {
        "The paper's findings, every ViT on CC3M held out": [
            *figure_6("ViTs on CC3M", START),
            *figure_6("ViTs on CC3M", NO_START),
            *figure_7("ViTs on CC3M"),
            *figure_9a("ViTs on CC3M"),
        ],
        "The same, table 4(a) kept in the fit": [
            *figure_6("figure 8", START),
            *figure_7("figure 8"),
            *figure_9a("figure 8"),
        ],
        "Findings over the number of images, Merged-15M held out": [
            *figure_6_merged(START),
            *figure_6_merged(NO_START),
            *figure_9b("Merged-15M", START),
            *figure_9b("Merged-15M", NO_START),
        ],
        "With the fit that plans use, nothing held out (no test)": [
            *figure_6("none", START),
            *figure_6_of_all("none", START),
            *figure_7("none"),
            *figure_9a("none"),
            *figure_9b("none", START),
            *figure_9b("none", NO_START),
        ],
    }
    epochs, weights = families(), coefficients()
    inside, of_epochs = tally([one.verdict for one in epochs])
    tests = [one for title, rows in held_out.items() if "no test" not in title for one in rows]
    hits, counted = tally([one.verdict for one in tests])
    agree = (
        f"{hits} of {counted} tests of findings that can fail agree with their points held out; {inside} of "
        f"{of_epochs} published epochs lie in the range of {100 * LEVEL:.0f} % that the other families give, where "
        "that says anything. Misses are not tuned away."
    )
    return Result(
        name="findings",
        title="The paper's findings about chain design, predicted without their own points",
        tables=(
            *(finding_table(title, rows) for title, rows in held_out.items()),
            family_table(epochs),
            coefficient_table(weights),
        ),
        records={
            "tests": [asdict(one) for rows in held_out.values() for one in rows],
            "epochs": [asdict(one) for one in epochs],
            "coefficients": weights,
        },
        findings=(agree,),
        plots={"epochs": plot(epochs)},
    )


if __name__ == "__main__":
    main(make)
