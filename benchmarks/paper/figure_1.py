"""Figure 1's cost axis: what each ViT of Merged-15M costs trained individually and as a link of the chain."""

from __future__ import annotations

from matplotlib.axes import Axes

from benchmarks.common import COLOUR, Cell, Result, explain, main
from benchmarks.paper.table_2 import BASELINE, CHAIN, REASONS, SPEEDUP, macs_cells
from compt.cost.paper import TABLE_2

FAMILY = "merged15m_vit"


def cells() -> list[Cell]:
    """The cells of Table 2 that the figure draws: each model, not accumulated."""
    drawn = (BASELINE, CHAIN, SPEEDUP)
    found = [cell for cell in macs_cells(FAMILY, TABLE_2[FAMILY]) if cell.quantity in drawn]
    return sorted(found, key=lambda cell: drawn.index(cell.quantity))


def draw(axis: Axes) -> None:
    family = TABLE_2[FAMILY]
    compared = cells()
    for quantity, accuracies, colour, label in (
        (BASELINE, family.baseline_top1, COLOUR["alone"], "trained individually"),
        (CHAIN, family.chain_top1, COLOUR["chain"], "link of the chain"),
    ):
        costs = [cell.from_inputs or 0.0 for cell in compared if cell.quantity == quantity]
        axis.plot(costs, accuracies, "o-", color=colour, label=label)
        for cost, accuracy, name in zip(costs, accuracies, family.models, strict=True):
            right = quantity == BASELINE
            axis.annotate(
                name,
                (cost, accuracy),
                (8 if right else -8, -3),
                textcoords="offset points",
                ha="left" if right else "right",
                color=colour,
            )
    axis.set_xscale("log")
    axis.set_xticks([2, 3, 5, 10, 20, 30], ["2", "3", "5", "10", "20", "30"])
    axis.minorticks_off()
    axis.set(
        xlim=(1.5, 45),
        ylim=(43.4, 49.8),
        xlabel="training MACs of this model alone (1e19, logarithmic), from the paper's inputs",
        ylabel="ImageNet top-1 as published (%)",
        title="Merged-15M: accuracy over cost",
    )
    axis.legend(loc="upper left")


def make() -> Result:
    """Figure 1's cost axis recomputed."""
    compared = cells()
    keys = {cell.key for cell in compared}
    reasons = {key: reason for key, reason in REASONS.items() if key in keys}
    return Result(
        name="figure_1",
        title="Figure 1: what each model costs, alone and as a link",
        cells=explain(compared, reasons),
        findings=(
            (
                "The figure's axis cannot be read from the paper's text. Its caption names the data (CC3M and "
                "CC12M) and the models (ViTs), which are those of Table 2's Merged-15M block; the numbers here are "
                "that block's."
            ),
            "The text's claim that the speed-ups increase along the chain holds: 1.00, 2.50, 3.12, 3.83 recomputed.",
        ),
        plots={"accuracy_over_cost": draw},
    )


if __name__ == "__main__":
    main(make)
