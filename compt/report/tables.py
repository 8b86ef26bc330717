"""Tables of results, for terminals, Markdown and HTML."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compt.cost.paper import LOSSLESS_POINTS
from compt.evaluate.stats import direction
from compt.report.summary import CONTROLS, LIKE_FOR_LIKE, Comparison, NotCompared, Row, Summary, accumulated
from compt.text import TextTable, count, hours

SAME = {
    "control-equal_epochs": "same epochs",
    "control-equal_macs": "same MACs",
    "control-equal_chain_macs": "chain's MACs",
}
"""What a control has in common with the last link, in two words."""


def labels(summary: Summary) -> dict[str, str]:
    """A short name for each job: 3-vit_mini; vit_mini baseline; vit_mini, same epochs."""
    found = {row.job: row.job for row in summary.links}
    found |= {row.job: f"{row.model}, try {_number(row)}" for row in summary.tries}
    found |= {row.job: _baseline(row, row.seed, summary) for row in summary.baselines}
    found |= {row.job: f"{row.model}, {SAME.get(row.job, row.job)}" for row in summary.controls}
    return found


def _baseline(row: Row, seed: int, summary: Summary) -> str:
    return f"{row.model} baseline" + (f", seed {seed}" if len(summary.individual) > 1 else "")


def results_table(summary: Summary) -> TextTable:
    """Accuracy and cost of each model: the chain, then baselines and controls."""
    names = labels(summary)
    rows = []
    for row in (*summary.paid, *summary.baselines, *summary.controls):
        scored = row.top1 is not None
        state = "-" if row.state in ("done", "evaluated") else row.state
        top1, interval = (f"{row.top1:.2f}", f"{row.low:.1f} to {row.high:.1f}") if scored else (state, "")
        cost = [count(row.macs), hours(row.device_hours)]
        rows.append([names[row.job], f"{row.epochs:.3g}", top1, interval, *cost])
    top = next((row for row in summary.rows if row.classes), None)
    notes = []
    if top:
        notes.append(
            f"Top-1 in percent on {summary.primary}: {top.images:,} images, {top.classes:,} classes, chance "
            f"{100 / top.classes:.2f}; 95 % interval by Wilson."
        )
    elif summary.primary is None:
        notes.append("Top-1: the recipe names no set for it (evaluation.primary).")
    notes.append("MACs and device time of training, with the forward passes of the teacher.")
    if summary.baselines:
        notes.append("Baseline: trained from scratch, without a chain.")
    if summary.controls:
        notes.append("Same epochs, same MACs, chain's MACs: trained from scratch for as long as the link or the chain.")
    header = ["Model", "Epochs", "Top-1", "95 % interval", "MACs", "Time"]
    return TextTable(f"Results of {summary.run}", header, rows, notes)


def cost_table(summary: Summary) -> TextTable:
    """What each chain has cost up to each model; the baselines too, as in the paper's Table 2."""
    names = labels(summary)
    # A first link is its own baseline until another baseline has begun.
    chains: list[tuple[int | None, list[Row]]] = [(None, summary.paid)]
    chains += [item for item in summary.individual.items() if any(row.kind == "baseline" for row in item[1])]
    order = [row.model for row in summary.links]
    rows = []
    for seed, members in chains:
        # Without one of its members, a sum is that of another family.
        models = [row.model for row in members if row.kind != "try"]
        whole = models == order[: len(models)]
        # Until a job has trained to its end, its MACs are those of the plan.
        total_macs = accumulated([row.macs if whole and row.device_hours is not None else None for row in members])
        total_hours = accumulated([row.device_hours if whole else None for row in members])
        for row, macs, time in zip(members, total_macs, total_hours, strict=True):
            name = names[row.job] if seed is None else _baseline(row, seed, summary)
            rows.append([name, "-" if macs is None else count(macs), hours(time)])
    notes = ["Tries were not lossless. Their cost counts in everything after them."] if summary.tries else []
    if len(chains) > 1:
        notes.insert(0, "So far: with the models before it; for a baseline, with the baselines of the smaller models.")
    return TextTable("Costs", ["Model", "MACs so far", "Time so far"], rows, notes)


def acceleration_table(summary: Summary) -> TextTable | None:
    """What the baseline of each link cost over what the link cost; None without a finished baseline."""
    rows = []
    for found in summary.comparisons:
        macs = (found.macs_speedup, found.macs_speedup_accumulated)
        time = (found.hours_speedup, found.hours_speedup_accumulated)
        rows.append([found.link, *("" if value is None else f"{value:.2f}x" for value in (*macs, *time))])
    note = "Cost of the baseline over that of the link; so far: of all models up to this one."
    header = ["Link", "MACs", "MACs so far", "Time", "Time so far"]
    return TextTable("Acceleration", header, rows, [note]) if rows else None


def comparison_table(summary: Summary) -> TextTable | None:
    """Each link against its baseline and the last one against its controls, with interval and verdict."""
    items: list[Comparison | NotCompared] = [*summary.comparisons, *summary.control_comparisons, *summary.not_compared]
    if not items:
        return None
    names = labels(summary)
    seeds = any(isinstance(item, Comparison) and item.seed_spread is not None for item in items)
    rows = [_difference(item, names, seeds) for item in items]
    for name, why in summary.missing.items():
        last = summary.links[-1]
        other = f"{last.model} baseline" if name == "baseline" else f"{last.model}, {SAME[name]}"
        rows.append([last.job, other, "-", "-", why, *(["-"] if seeds else [])])
    about = (
        "Points of top-1, link minus the other model, on the same images; 95 % interval by paired bootstrap. "
        f"Lossless: less than {LOSSLESS_POINTS:g} points below the baseline; undecided: the interval spans "
        f"-{LOSSLESS_POINTS:g} (control: 0)."
    )
    scope = "The interval covers the choice of images, not training seeds: another seed moves results too."
    notes = [about, scope] if summary.comparisons or summary.control_comparisons else []
    notes += [f"Not compared: {item.link}, as {item.reason}." for item in summary.not_compared]
    if "not run" in summary.missing.values():
        command = missing_command(summary.folder, [row.job for row in summary.controls])
        notes.append(f"Not run, and needed for the whole comparison: {command}")
    header = ["Link", "Against", "Points", "95 % interval", "Verdict"]
    if seeds:
        header.append("SD")
        notes.append("SD: standard deviation over seeds of the other model's top-1, in points.")
    return TextTable("Differences", header, rows, notes, left=2)


def missing_command(run: Path, controls: Iterable[str]) -> str:
    """The command that trains what `run` lacks of `LIKE_FOR_LIKE`. The run keeps its own `controls`."""
    wanted = {*LIKE_FOR_LIKE, *controls}
    names = [name.removeprefix("control-") for name in CONTROLS if name in wanted]
    words = ["compt", "chain", str(run / "recipe.yaml"), "--run-folder", str(run), "--baselines"]
    return shlex.join([*words, "--set", f"baselines.controls=[{','.join(names)}]"])


def _number(row: Row) -> str:
    """The number of a failed try."""
    return row.job.split("-")[1]


def calibration_table(summary: Summary) -> TextTable | None:
    """The first-pair test, a row for each try: its length, cost and accuracy; None without such a test."""
    record = summary.calibration
    if record is None:
        return None
    tries: list[dict[str, Any]] = record["tries"]
    header = ["Try", "Outcome", "Lengths", "Epochs", "MACs", "Acceleration", "Time", "Top-1", "Points"]
    header += ["95 % interval", "Verdict"]
    rows = [
        [
            f"try {item['number']}",
            "accepted" if item["lossless"] else "failed",
            f"{item['factor']:.3g}",
            f"{item['epochs']:.3g}",
            count(item["macs"]),
            f"{item['speedup']:.2f}x",
            hours(item["device_hours"]),
            f"{item['accuracy']:.2f}",
            f"{item['difference']:+.2f}",
            f"{item['low']:+.2f} to {item['high']:+.2f}",
            item["verdict"],
        ]
        for item in tries
    ]
    about = (
        f"{record['link']} against {record['baseline']} on {record['dataset']}: top-1, and the difference in points on "
        "the same images with its 95 % interval by paired bootstrap. The difference alone decides: lossless above "
        f"-{record['margin']:g}, else lengths grow by {record['growth']:g}. Verdict: what the interval says."
    )
    if tries:
        cost = count(tries[-1]["speedup"] * tries[-1]["macs"])
        about += f" The baseline's top-1 is {tries[-1]['baseline_accuracy']:.2f}; its {cost} MACs count in no chain."
    notes = [_decision(record), *_paid(record), about]
    return TextTable("Calibration", header, rows, notes)


def _decision(record: dict[str, Any]) -> str:
    tries, link = len(record["tries"]), record["link"]
    words = ""
    if record["target"] is not None:
        words = f"The first try was as long as a {record['target']:g}x acceleration of {link} leaves. "
    if record["outcome"] == "lossless":
        return (
            f"{words}{link} was lossless at try {tries}: it and the links after it train {record['factor']:.3g} times "
            "as long as the recipe says, each at most as long as its baseline."
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
        f"{count(sum(item['macs'] for item in failed))} MACs and {hours(sum(item['device_hours'] for item in failed))}"
    )
    words = f"{len(failed)} failed {'try' if len(failed) == 1 else 'tries'}: {cost} of device time."
    if record["outcome"] == "lossless":
        chain, baselines = record["chain_macs"], record["individual_macs"]
        words += (
            f" The whole chain's planned acceleration in MACs is {baselines / (chain + record['failed_macs']):.2f}x "
            f"with them, {baselines / chain:.2f}x without."
        )
    return [words]


def _difference(item: Comparison | NotCompared, names: dict[str, str], seeds: bool) -> list[str]:
    other = names[item.others[0]]
    if len(item.others) > 1:
        other = f"{other.partition(' baseline')[0]}, {len(item.others)} baselines"
    if isinstance(item, NotCompared):
        return [item.link, other, "-", "-", "not compared", *(["-"] if seeds else [])]
    verdict: str = item.verdict
    if item.others[0] in CONTROLS:
        verdict = direction(item.low, item.high)
    cells = [item.link, other, f"{item.difference:+.2f}", f"{item.low:+.2f} to {item.high:+.2f}", verdict]
    if seeds:
        cells.append("-" if item.seed_spread is None else f"{item.seed_spread:.2f}")
    return cells


def summary_tables(summary: Summary) -> Iterator[TextTable]:
    """All tables that are shown at the end of a run."""
    if summary.rows:
        yield results_table(summary)
        yield cost_table(summary)
    found = (acceleration_table(summary), comparison_table(summary), calibration_table(summary))
    yield from (table for table in found if table)
