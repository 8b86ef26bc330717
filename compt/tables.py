"""Tables of what a run has shown, for terminals, Markdown and HTML."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from compt.formats import TextTable, hours, macs, ratio
from compt.summary import CONTROLS, Comparison, NotCompared, Row, Summary, accumulated


def _score(row: Row) -> str:
    if row.top1 is None:
        return "-" if row.state in ("done", "evaluated") else row.state
    return f"{row.top1:.2f} [{row.low:.1f}, {row.high:.1f}]"


def cost_table(summary: Summary) -> TextTable:
    """In the shape of the paper's Table 2: baseline, then chain; individual and accumulated cost; speed-ups."""
    by_link = {item.link: item for item in summary.comparisons}
    rows = []
    one = len(summary.individual) == 1
    chains = [("Baseline" if one else f"Baseline, seed {seed},", own) for seed, own in summary.individual.items()]
    # A first link alone is its own baseline: nothing was trained individually yet.
    chains = [(label, own) for label, own in chains if any(row.kind == "baseline" for row in own)]
    chains.append(("CoM-PT", summary.links))
    order = [row.model for row in summary.links]
    for label, members in chains:
        # Sums with a member missing are those of another family.
        whole = [row.model for row in members] == order[: len(members)]
        total_macs = accumulated([row.macs if whole else None for row in members])
        total_hours = accumulated([row.device_hours if whole else None for row in members])
        for at, row in enumerate(members):
            found = by_link.get(row.job) if label == "CoM-PT" else None
            running = total_macs[at]
            rows.append(
                [
                    f"{label} {row.model}",
                    f"{row.epochs:.3g}",
                    _score(row),
                    macs(row.macs) + ratio(found.macs_speedup if found else None),
                    (macs(running) if running is not None else "-")
                    + ratio(found.macs_speedup_accumulated if found else None),
                    hours(row.device_hours) + ratio(found.hours_speedup if found else None),
                    hours(total_hours[at]) + ratio(found.hours_speedup_accumulated if found else None),
                ]
            )
    rows += [
        [_control(row), f"{row.epochs:.3g}", _score(row), macs(row.macs), "", hours(row.device_hours), ""]
        for row in summary.controls
    ]
    top = next((row for row in summary.rows if row.classes), None)
    about = (
        f"Top-1 in percent on {summary.primary}: {top.images:,} pictures, {top.classes:,} names, chance "
        f"{100 / top.classes:.2f}; in brackets the 95 % interval (Wilson). "
        if top
        else ""
    )
    notes = [f"{about}MACs and device time of training, the teacher's forward passes included; (x) over the baseline."]
    header = ["Model", "Epochs", "Top-1", "MACs", "MACs accumulated", "Device time", "Time accumulated"]
    return TextTable(f"Results of {summary.run}", header, rows, notes)


def comparison_table(summary: Summary) -> TextTable | None:
    """Each link against its baseline and the last one against its controls, with interval and verdict."""
    items: list[Comparison | NotCompared] = [*summary.comparisons, *summary.control_comparisons, *summary.not_compared]
    if not items:
        return None
    seeds = any(isinstance(item, Comparison) and item.seed_spread is not None for item in items)
    rows = [_difference(item, seeds) for item in items]
    about = (
        "Points of top-1, chain minus the other, on the same pictures; 95 % interval by paired bootstrap over them. "
        "Lossless: less than 0.5 points below the baseline; undecided: the interval spans -0.5 (a control: 0)."
    )
    scope = "Interval and verdict cover the choice of pictures, not of training seeds: another seed moves results too."
    notes = [about, scope] if summary.comparisons or summary.control_comparisons else []
    notes += [f"Not compared: {item.link}, as {item.reason}." for item in summary.not_compared]
    header = ["Chain's model", "against", "points", "95 % interval", "verdict"]
    if seeds:
        header.append("SD over seeds")
        notes.append(
            "SD over seeds: standard deviation of the top-1 of the trainings that are compared with, in points."
        )
    return TextTable("Differences", header, rows, notes)


def _control(row: Row) -> str:
    return f"{row.model} {CONTROLS[row.job]}" if row.job in CONTROLS else row.job


def _difference(item: Comparison | NotCompared, seeds: bool) -> list[str]:
    other = CONTROLS.get(item.others[0], item.others[0])
    other += f" and {len(item.others) - 1} more" if len(item.others) > 1 else ""
    if isinstance(item, NotCompared):
        return [item.link, other, "-", "-", "not compared", *(["-"] if seeds else [])]
    verdict: str = item.verdict
    if item.others[0] in CONTROLS:
        verdict = "better" if item.low > 0 else "worse" if item.high < 0 else "undecided"
    cells = [item.link, other, f"{item.difference:+.2f}", f"{item.low:+.2f} to {item.high:+.2f}", verdict]
    if seeds:
        cells.append("-" if item.seed_spread is None else f"{item.seed_spread:.2f}")
    return cells


def summary_table(summary: Summary) -> RenderableType:
    """All that a terminal shows at the end of a run."""
    differences = comparison_table(summary)
    parts = [cost_table(summary).rich()] + ([Text(), differences.rich()] if differences is not None else [])
    return Group(*parts)
