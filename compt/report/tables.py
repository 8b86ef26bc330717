"""Tables of what a run has shown, for terminals, Markdown and HTML."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from compt.report.summary import CONTROLS, Comparison, NotCompared, Row, Summary, accumulated
from compt.text import TextTable, hours, macs, ratio


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
    chains.append(("CoM-PT", summary.paid))
    order = [row.model for row in summary.links]
    for label, members in chains:
        # Sums with a member missing are those of another family.
        models = [row.model for row in members if row.kind != "try"]
        whole = models == order[: len(models)]
        total_macs = accumulated([row.macs if whole else None for row in members])
        total_hours = accumulated([row.device_hours if whole else None for row in members])
        for at, row in enumerate(members):
            found = by_link.get(row.job) if label == "CoM-PT" else None
            running = total_macs[at]
            rows.append(
                [
                    f"{label} {row.model}" + (f", try {_number(row)}" if row.kind == "try" else ""),
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
    if summary.tries:
        notes.append("Tries were not lossless; what they cost counts in what is accumulated.")
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


def _number(row: Row) -> str:
    """Of a failed try."""
    return row.job.split("-")[1]


def calibration_table(summary: Summary) -> TextTable | None:
    """The first-pair test: each try against the baseline, what was decided, and what it cost; None without one."""
    record = summary.calibration
    if record is None:
        return None
    tries: list[dict[str, Any]] = record["tries"]
    rows = [
        [
            f"{item['number']}, {'accepted' if item['lossless'] else 'failed'}",
            f"{item['factor']:.3g}",
            f"{item['epochs']:.3g}",
            macs(item["macs"]) + ratio(item["speedup"]),
            hours(item["device_hours"]),
            f"{item['accuracy']:.2f}",
            f"{item['difference']:+.2f} [{item['low']:+.2f}, {item['high']:+.2f}]",
            item["verdict"],
        ]
        for item in tries
    ]
    about = (
        f"{record['link']} against {record['baseline']} on {record['dataset']}: top-1 and its difference on the same "
        "pictures in points, in brackets the 95 % interval by paired bootstrap. The difference alone decides: lossless "
        f"above -{record['margin']:g}, else lengths grow by {record['growth']:g}. Verdict: what the interval says."
    )
    if tries:
        cost = macs(tries[-1]["speedup"] * tries[-1]["macs"])
        about += f" The baseline's top-1 is {tries[-1]['baseline_accuracy']:.2f}; its {cost} MACs count in no chain."
    notes = [_decision(record), *_paid(record), about]
    header = ["Try", "lengths", "epochs", "MACs", "device time", "top-1", "points", "verdict"]
    return TextTable("Calibration", header, rows, notes)


def _decision(record: dict[str, Any]) -> str:
    tries, link = len(record["tries"]), record["link"]
    words = ""
    if record["target"] is not None:
        words = f"The first try was as long as a {record['target']:g}x acceleration of {link} leaves. "
    if record["outcome"] == "lossless":
        return (
            f"{words}{link} was lossless at try {tries}: it and the links after it train {record['factor']:.3g} times "
            "as long as the recipe says."
        )
    if record["outcome"] == "not lossless":
        return (
            f"{words}{link} was not lossless in {tries} {'try' if tries == 1 else 'tries'}, and the next would have "
            "been no shorter than its baseline: the chain ends here."
        )
    return f"{words}Not decided yet: try {tries + 1}, {record['factor']:.3g} times as long as the recipe says, is next."


def _paid(record: dict[str, Any]) -> list[str]:
    """What the failed tries cost, and what that leaves of the acceleration; nothing where none failed."""
    failed = [item for item in record["tries"] if not item["lossless"]]
    if not failed:
        return []
    cost = (
        f"{macs(sum(item['macs'] for item in failed))} MACs and {hours(sum(item['device_hours'] for item in failed))}"
    )
    words = f"{len(failed)} failed {'try' if len(failed) == 1 else 'tries'}: {cost} of device time."
    if record["outcome"] == "lossless":
        chain, alone = record["chain_macs"], record["individual_macs"]
        words += (
            f" The whole chain's planned acceleration in MACs is {alone / (chain + record['failed_macs']):.2f}x with "
            f"them, {alone / chain:.2f}x without."
        )
    return [words]


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
    calibration = calibration_table(summary)
    further = [table for table in (differences, calibration) if table is not None]
    parts = [cost_table(summary).rich()]
    for table in further:
        parts += [Text(), table.rich()]
    return Group(*parts)
