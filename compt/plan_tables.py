"""Tables of plans. No torch in here."""

from __future__ import annotations

from rich.console import RenderableType

from compt.formats import TextTable, count, macs, ratio
from compt.macs import Mode
from compt.planner import Plan


def plan_table(plan: Plan, mode: Mode = "exact") -> RenderableType:
    """What a recipe would train and its cost in MACs."""
    rows = []
    for row in plan.rows(mode):
        speedup = row.get("speedup")
        rows.append(
            [
                row["job"],
                count(row["parameters"]),
                f"{row['epochs']:.3g}",
                f"{row['steps']:,}",
                macs(row["student_training_macs"])
                + (f" + {macs(row['teacher_forward_macs'])}" if row["teacher_forward_macs"] else ""),
                (f"as {row['same_as']}" if row["same_as"] else macs(row["total_macs"])) + ratio(speedup),
                macs(row["accumulated_macs"]) + ratio(row["accumulated_speedup"]) if "accumulated_macs" in row else "",
            ]
        )
    recipe = plan.recipe
    note = (
        f"{plan.images:,} images, batch {recipe.optimizer.batch}, {recipe.data.captions} captions an image. "
        f"MACs are multiply-accumulates, counted in mode '{mode}'; a sample's: the student's training + the teacher's "
        "forward pass. (x): acceleration over the individual training."
    )
    header = ["Model", "Params", "Epochs", "Steps", "MACs/sample", "MACs", "Chain so far"]
    return TextTable(f"Plan of {recipe.name}", header, rows, [note]).rich()
