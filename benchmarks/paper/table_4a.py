"""Table 4(a): the cost of weight initialization alone, in epochs and MACs, against links of the chain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common import COLOUR, Cell, Result, explain, main, number
from benchmarks.paper.accounting import MACS_UNIT, SOURCES, Source, published
from compt.cost.paper import IMAGES, TABLE_4A, AblationRow
from compt.text import TextTable

DATA, BASELINE_EPOCHS = "cc3m", 128
PRINTED_RATIOS = {"vit_s16": 1.3, "vit_b16": 5.1}
"""Epochs with weight initialization alone over those of the chain's link (section 5.4.1)."""
EPOCHS, LINK_ONLY = "IWI over CoM-PT, epochs", "IWI over CoM-PT, MACs"


def cost(row: AblationRow, source: Source = published) -> float:
    """MACs (1e19) of one row. Weight initialization alone runs no teacher."""
    teacher = row.start if row.method == "CoM-PT" else None
    return source(row.model, teacher) * row.epochs * IMAGES[DATA] / MACS_UNIT


def pairs() -> dict[str, tuple[AblationRow, AblationRow]]:
    """By model: the row with weight initialization alone, and the link of the chain."""
    rows = {(row.model, row.method): row for row in TABLE_4A}
    return {model: (rows[model, "IWI"], rows[model, "CoM-PT"]) for model in PRINTED_RATIOS}


def cells() -> Iterator[Cell]:
    """The ratio of epochs, which the text prints, and the ratio of costs, which it does not."""
    for model, (alone, link) in pairs().items():
        ratio = alone.epochs / link.epochs
        yield Cell(model, EPOCHS, PRINTED_RATIOS[model], ratio, digits=1)
    for model, (alone, link) in pairs().items():
        ratios = {way: cost(alone, source) / cost(link, source) for way, source in SOURCES.items()}
        yield Cell(
            model,
            LINK_ONLY,
            None,
            from_inputs=ratios["from_inputs"],
            from_counters=ratios["from_counters"],
            exact=ratios["exact"],
        )


def costs() -> list[dict[str, Any]]:
    """Every row with its cost and its saving over the baseline. ViT-B's link also counts the ViT-S that it needs."""
    rows = []
    for row in TABLE_4A:
        baseline = published(row.model, None) * BASELINE_EPOCHS * IMAGES[DATA] / MACS_UNIT
        before = sum(cost(link) for _, link in pairs().values() if link.model == row.start) * (row.method == "CoM-PT")
        rows.append(
            {
                "model": row.model,
                "method": row.method,
                "start": row.start,
                "epochs": row.epochs,
                "macs_1e19": cost(row),
                "with_links_before_1e19": cost(row) + before,
                "speedup": baseline / cost(row),
                "speedup_with_links_before": baseline / (cost(row) + before),
            }
        )
    return rows


def draw(axis: Axes) -> None:
    rows = costs()
    colours = {"IWI": COLOUR["alone"], "CoM-PT": COLOUR["chain"]}
    for at, row in enumerate(rows):
        axis.bar(at, row["macs_1e19"], 0.6, color=colours[row["method"]])
        before = row["with_links_before_1e19"] - row["macs_1e19"]
        axis.bar(
            at,
            before,
            0.6,
            bottom=row["macs_1e19"],
            color=COLOUR["other"],
            label="its predecessor's link" if before else None,
        )
        text = f"{row['macs_1e19']:.2f}" + (f" + {before:.2f}" if before else "")
        axis.text(at, row["with_links_before_1e19"] + 0.05, text, ha="center")
    names = [f"{row['model']}\n{row['method']} from {row['start']}\n{row['epochs']} epochs" for row in rows]
    axis.set_xticks(range(len(rows)), names)
    axis.set(
        ylabel="training MACs (1e19), from the paper's inputs", ylim=(0, 3), title="Weights alone against the chain"
    )
    axis.legend(loc="upper left")


def make() -> Result:
    """Table 4(a)'s cost."""
    rows = costs()
    table = TextTable(
        title="Costs on CC3M, from the paper's inputs",
        header=("", "Epochs", "MACs, 1e19", "Speed-up", "With the links before it, 1e19", "Speed-up"),
        rows=[
            (
                f"{row['model']}, {row['method']} from {row['start']}",
                str(row["epochs"]),
                number(row["macs_1e19"], 3),
                f"{row['speedup']:.2f}x",
                number(row["with_links_before_1e19"], 3),
                f"{row['speedup_with_links_before']:.2f}x",
            )
            for row in rows
        ],
        notes=(
            "IWI: the teacher's weights without distillation, so no teacher runs. No row includes the cost of ViT-T.",
        ),
    )
    small, small_link, base, base_link = rows
    return Result(
        name="table_4a",
        title="Table 4(a): weights alone against links of the chain",
        cells=explain(cells(), {}),
        tables=(table,),
        records={"costs": rows},
        findings=(
            (
                "The text compares epochs (1.3 and 5.1 times as many). In MACs, where a link also pays for its "
                f"teacher's forward passes, it is {small['macs_1e19'] / small_link['macs_1e19']:.2f} and "
                f"{base['macs_1e19'] / base_link['macs_1e19']:.2f} times; with the ViT-S that ViT-B's link needs, "
                f"{base['macs_1e19'] / base_link['with_links_before_1e19']:.2f} times."
            ),
        ),
        plots={"cost": draw},
    )


if __name__ == "__main__":
    main(make)
