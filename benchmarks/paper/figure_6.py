"""Figure 6: the cost of chains that end in ViT-L, with smaller and smaller first models, against ViT-L alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common import COLOUR, Cell, Result, explain, key_of, main, number
from benchmarks.paper.accounting import MACS_UNIT, SOURCES, chain, individual, published
from benchmarks.paper.printed import FIGURE_6_REDUCTION, FULL_CHAIN_SAVES_OVER_LAST_PAIR
from compt.cost.paper import IMAGES, TABLE_2
from compt.text import TextTable

SOLO, WHOLE, REDUCTION = "ViT-L alone", "Chain", "Reduction"
FAMILIES = {"CC3M": "cc3m_vit", "Merged-15M": "merged15m_vit"}
REASONS = {
    key_of("CC3M", REDUCTION): "72.6 % rounds to 73; the printed 72 is cut off.",
    key_of("CC3M", WHOLE): "Table 2's 2.94 is a sum of printed cells, of which two are cut off; see there.",
    key_of("Merged-15M", WHOLE): "Table 2's 15.24 is a sum of rounded cells.",
}


def cells() -> list[Cell]:
    """ViT-L alone, the chain from the best first model, and the saving, which is printed only for CC3M."""
    found = []
    for title, name in FAMILIES.items():
        family = TABLE_2[name]
        solo = {
            way: individual(source, family.models[-1:], family.baseline_epochs, family.dataset)[0]
            for way, source in SOURCES.items()
        }
        whole = {
            way: sum(chain(source, family.models, family.chain_epochs, family.dataset))
            for way, source in SOURCES.items()
        }
        saved = {way: 100 * (1 - whole[way] / solo[way]) for way in SOURCES}
        printed = family.baseline[-1].macs, family.chain[-1].accumulated_macs
        claimed = 100 * FIGURE_6_REDUCTION if name == "cc3m_vit" else None
        of_printed = 100 * (1 - printed[1] / printed[0])
        for quantity, value, values, from_printed, unit, digits in (
            (SOLO, printed[0], solo, None, "1e19 MACs", 2),
            (WHOLE, printed[1], whole, sum(link.macs for link in family.chain), "1e19 MACs", 2),
            (REDUCTION, claimed, saved, of_printed, "% of ViT-L alone", 0),
        ):
            found.append(
                Cell(
                    title,
                    quantity,
                    value,
                    from_inputs=values["from_inputs"],
                    from_counters=values["from_counters"],
                    exact=values["exact"],
                    from_printed=from_printed,
                    unit=unit,
                    digits=digits,
                    inferred=quantity != SOLO and not family.published_epochs,
                )
            )
    return sorted(found, key=lambda cell: (SOLO, WHOLE, REDUCTION).index(cell.quantity))


@dataclass(frozen=True)
class Start:
    """A chain that ends in ViT-L, and its `macs` (1e19) with the epochs behind Table 2.

    `supposed`: the epochs are those of links in another chain, so the cost was not published.
    """

    data: str
    models: tuple[str, ...]
    macs: float
    reduction: float
    supposed: bool


def starts(title: str) -> list[Start]:
    """All chains from ViT-L alone to the longest one. Each first model trains as long as a baseline."""
    family = TABLE_2[FAMILIES[title]]
    solo = individual(published, family.models[-1:], family.baseline_epochs, family.dataset)[0]
    found = []
    for first in reversed(range(len(family.models))):
        models = family.models[first:]
        epochs = (family.baseline_epochs, *family.chain_epochs[first + 1 :])
        macs = sum(chain(published, models, epochs, family.dataset))
        known = first in (0, len(family.models) - 1)
        found.append(Start(title, models, macs, 1 - macs / solo, not known))
    return found


def last_pair() -> dict[str, Any]:
    """What "an additional 20 %" between T to S to B to L and B to L means for the epochs of L after B (CC3M).

    Read as points of ViT-L alone it gives the epochs of L, with those that round to the same 20 points; read as a
    share of the cost of B to L it leaves less than ViT-B alone costs.
    """
    family = TABLE_2["cc3m_vit"]
    solo = individual(published, family.models[-1:], family.baseline_epochs, family.dataset)[0]
    first = individual(published, ("vit_b16",), family.baseline_epochs, family.dataset)[0]
    whole = sum(chain(published, family.models, family.chain_epochs, family.dataset))
    epoch = published("vit_l16", "vit_b16") * IMAGES[family.dataset] / MACS_UNIT

    def epochs(points: float) -> float:
        return (whole + points * solo - first) / epoch

    share = FULL_CHAIN_SAVES_OVER_LAST_PAIR
    return {
        "whole_chain_1e19_macs": whole,
        "vit_b16_alone_1e19_macs": first,
        "as_points_pair_1e19_macs": whole + share * solo,
        "as_points_epochs_of_vit_l16": epochs(share),
        "as_points_least_epochs": epochs(share - 0.005),
        "as_points_most_epochs": epochs(share + 0.005),
        "as_share_pair_1e19_macs": whole / (1 - share),
        "as_share_epochs_of_vit_l16": (whole / (1 - share) - first) / epoch,
    }


def break_even(title: str) -> dict[str, Any]:
    """The most epochs of the second model with which its teacher saves cost, if later links stay as they are."""
    family = TABLE_2[FAMILIES[title]]
    first, second = family.models[:2]
    alone = individual(published, (first, second), family.baseline_epochs, family.dataset)
    epoch = published(second, first) * IMAGES[family.dataset] / MACS_UNIT
    return {
        "data": title,
        "first": first,
        "second": second,
        "break_even_epochs": (alone[1] - alone[0]) / epoch,
        "epochs": family.chain_epochs[1],
    }


def tiny_start_on_merged() -> float:
    """Epochs of S after T on Merged-15M above which T to S to M to B to L costs more than from S, M to L staying."""
    family = TABLE_2["merged15m_vit"]
    tiny, small = individual(published, ("vit_t16", "vit_s16"), family.baseline_epochs, family.dataset)
    return (small - tiny) / (published("vit_s16", "vit_t16") * IMAGES[family.dataset] / MACS_UNIT)


def arrows(models: Sequence[str]) -> str:
    return " > ".join(model.removeprefix("vit_") for model in models)


def draw(axis: Axes) -> None:
    at, places, names = 0.0, list[float](), list[str]()
    for title in FAMILIES:
        for start in starts(title):
            colour = COLOUR["other"] if start.supposed else COLOUR["chain"]
            labels = ("if links keep Table 2's epochs", "from Table 2's epochs")
            seen = not start.supposed and len(start.models) > 1
            label = labels[seen] if title == "CC3M" and (len(start.models) in (2, 4)) else None
            axis.bar(at, 100 * start.reduction, 0.7, color=colour, label=label)
            axis.text(at, 100 * start.reduction + 2.5, f"{100 * start.reduction:.1f}", ha="center")
            places.append(at)
            names.append(arrows(start.models).replace(" > ", "\n> "))
            at += 1
        axis.text(at - 2.5, 86, title, ha="center", weight="bold")
        at += 0.6
    points = [index for index, name in enumerate(names[:4]) if name.startswith("t16")]
    axis.plot(places[points[0]], 100 * FIGURE_6_REDUCTION, "D", color=COLOUR["control"], label="published (72 %)")
    axis.set_xticks(places, names)
    axis.set(ylabel="saved against ViT-L alone (% of MACs)", ylim=(0, 108), title="Smaller and smaller first models")
    axis.legend(loc="upper left", ncols=3)


def make() -> Result:
    """Figure 6 recomputed, as far as the text says what is in it."""
    pair, found = last_pair(), [start for title in FAMILIES for start in starts(title)]
    table = TextTable(
        title="Chains by their first model",
        header=("", "MACs, 1e19", "Saved against ViT-L alone", "Known"),
        rows=[
            (
                f"{start.data}: {arrows(start.models)}",
                number(start.macs, 2),
                f"{100 * start.reduction:.1f} %",
                "supposed" if start.supposed else "yes",
            )
            for start in found
        ],
        notes=(
            (
                "Supposed: the first model trained as a baseline, the others with the epochs that they have in the "
                "whole chain. The epochs that they need after another predecessor were not published."
            ),
        ),
    )
    merged = {len(start.models): start for start in starts("Merged-15M")}
    findings = (
        (
            "Of the figure the text gives: at most 72 % saved on CC3M, the best first models (T on CC3M, S on "
            "Merged-15M), and, in the introduction, an additional 20 % of T > S > B > L over B > L. The figure's "
            "other bars cannot be compared. The introduction's claim holds that T, S and B together cost less than "
            "ViT-B alone: 1.54 against 3.75."
        ),
        (
            f"Inferred: read as 20 points of ViT-L alone, B > L costs {pair['as_points_pair_1e19_macs']:.2f} and L "
            f"takes {pair['as_points_epochs_of_vit_l16']:.1f} epochs after B ({pair['as_points_least_epochs']:.1f} "
            f"to {pair['as_points_most_epochs']:.1f} round to 20 points). Read as a share of B > L it cannot be: "
            f"{pair['as_share_pair_1e19_macs']:.2f} is less than the {pair['vit_b16_alone_1e19_macs']:.2f} of 128 "
            "epochs of ViT-B alone."
        ),
        (
            f"With Table 2's epochs kept, starting at M on Merged-15M would cost {merged[3].macs:.2f}, less than the "
            f"{merged[4].macs:.2f} from S. That S is the best start therefore means that B and L take more epochs "
            "after a new M than after S > M; how many was not published. Nor was a start at T on Merged-15M: it "
            f"loses where S takes more than {tiny_start_on_merged():.1f} of 64 epochs after T."
        ),
    )
    return Result(
        name="figure_6",
        title="Figure 6: chains with smaller and smaller first models",
        cells=explain(cells(), REASONS),
        tables=(table,),
        records={
            "starts": [
                {
                    "data": start.data,
                    "chain": arrows(start.models),
                    "macs_1e19": start.macs,
                    "reduction_percent": 100 * start.reduction,
                    "supposed": start.supposed,
                }
                for start in found
            ],
            "last_pair": [pair],
            "break_even": [break_even(title) for title in FAMILIES],
        },
        findings=findings,
        plots={"reduction": draw},
    )


if __name__ == "__main__":
    main(make)
