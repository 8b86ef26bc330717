"""The words and tables of a report, from a run's files."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from compt.data.account import Account
from compt.data.mixture import sets_table
from compt.design.runs import score_file
from compt.evaluate.sets import task_class
from compt.evaluate.task import ScoreRow
from compt.recipe.schema import EVALUATION_TASKS
from compt.report.summary import CONTROLS, Comparison, Row, Summary, read_record, read_state, stored_arrays
from compt.report.tables import labels as short_names
from compt.text import TextTable, count, hours
from compt.train.metrics import FILE as METRICS
from compt.train.metrics import read_metrics


@dataclass(frozen=True)
class JobView:
    """A planned job and what lies on disk of it; `manifest` is {} where nothing was begun."""

    plan: dict[str, Any]
    manifest: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    last_line: str | None

    @property
    def name(self) -> str:
        """The job's."""
        return str(self.plan["name"])

    @property
    def model(self) -> str:
        """The name of what it trains."""
        return str(self.plan["spec"]["name"])

    @property
    def state(self) -> str:
        """As jobs write it."""
        return str(self.manifest.get("state", "planned"))

    @property
    def trained(self) -> bool:
        """Whether it has its model and scores."""
        return self.state in ("evaluated", "done")

    @property
    def step(self) -> int:
        """Steps taken, as far as the log knows."""
        if self.trained:
            return int(self.plan["steps"])
        return int(self.train[-1]["step"]) if self.train else 0

    def progress(self) -> str:
        """The state in words."""
        if self.plan.get("same_as"):
            return f"same as {self.plan['same_as']}"
        if self.state == "training":
            total = int(self.plan["steps"])
            return f"training, step {self.step:,} of {total:,}" if self.step < total else "trained, not scored yet"
        return {"planned": "not begun", "expanded": "weights made", "evaluated": "done"}.get(self.state, self.state)


def read_job(run: Path, plan: dict[str, Any]) -> JobView:
    """`plan` is the job's entry in run.json. Raises RunError for a manifest that cannot be read."""
    folder = run / "jobs" / str(plan["name"])
    manifest = folder / "manifest.json"
    log = folder / METRICS
    if plan.get("same_as") or not manifest.exists():
        return JobView(plan, {}, [], [], None)
    rows = read_metrics(log)
    last = None
    if log.exists():
        written = datetime.datetime.fromtimestamp(log.stat().st_mtime, datetime.UTC)
        last = written.strftime("%Y-%m-%d %H:%M:%S UTC")
    train = [row for row in rows if row.get("kind") == "train"]
    return JobView(plan, read_state(manifest), train, [row for row in rows if row.get("kind") == "eval"], last)


def with_measured_costs(state: dict[str, Any], jobs: list[JobView]) -> dict[str, Any]:
    """`state` (run.json) with the costs in manifests, as tables have them: trained jobs have measured theirs."""
    measured = {job.name: job.manifest["cost"] for job in jobs if "cost" in job.manifest}
    plans = [{**job, "cost": measured.get(job.get("same_as") or job["name"], job["cost"])} for job in state["jobs"]]
    return {**state, "jobs": plans}


def planned_costs(jobs: list[JobView]) -> str:
    """Words for costs of which some are measured and some are planned; else nothing."""
    known = {job.trained for job in jobs if job.plan["kind"] != "control" and not job.plan.get("same_as")}
    return " (planned ones where a job is not trained)" if len(known) > 1 else ""


def percent(value: float) -> str:
    """12.34 -> "12.3", 0.0567 -> "0.057"."""
    return f"{value:.2g}" if value < 1 else f"{value:.1f}"


def macs_alone(state: dict[str, Any]) -> dict[str, float]:
    """MACs of each model that has a baseline; of several baselines the first."""
    jobs = [job for job in reversed(state["jobs"]) if job["kind"] == "baseline"]
    return {job["spec"]["name"]: job["cost"]["total_macs"] for job in jobs}


def acceleration(state: dict[str, Any]) -> float | None:
    """MACs of the baselines over those of the chain; None where not all are planned.

    Failed tries of a first-pair test are a cost of the chain.
    """
    links, alone = [job for job in state["jobs"] if job["kind"] == "link"], macs_alone(state)
    if not links or any(job["spec"]["name"] not in alone for job in links):
        return None
    own = sum(job["cost"]["total_macs"] for job in state["jobs"] if job["kind"] in ("link", "try"))
    return float(sum(alone[job["spec"]["name"]] for job in links) / own) if own else None


def _scratch(job: str) -> str:
    return CONTROLS[job].replace(", ", " for ")


def _against(item: Comparison) -> str:
    control = item.others[0] in CONTROLS
    what = f"the same model {_scratch(item.others[0])}" if control else "its baseline"
    verdict = "" if control else f": {item.verdict}"
    return f"{item.difference:+.1f} points against {what}{verdict} [95 %: {item.low:+.1f} to {item.high:+.1f}]"


def _last(summary: Summary) -> Row | None:
    scored = [row for row in summary.links if row.top1 is not None] or [r for r in summary.rows if r.top1 is not None]
    return scored[-1] if scored else None


def _comparisons(summary: Summary, row: Row) -> Iterator[Comparison]:
    """Those of `row` that belong together: with its baseline, with as many epochs, and with as many MACs in all."""
    yield from (item for item in summary.comparisons if item.link == row.job)
    controls = {item.others[0]: item for item in summary.control_comparisons if item.link == row.job}
    for names in (("control-equal_epochs",), ("control-equal_chain_macs", "control-equal_macs")):
        yield from [controls[name] for name in names if name in controls][:1]


_MISSING = {
    "baseline": "no baseline of it",
    "control-equal_epochs": "no control with the link's epochs",
    "control-equal_chain_macs": "no control with the whole chain's MACs",
}


def sentence(summary: Summary, state: dict[str, Any], jobs: list[JobView]) -> str:
    """The result in words, of what is there."""
    own = [job for job in jobs if not job.plan.get("same_as")]
    parts = [f"{sum(job.trained for job in own)} of {len(own)} models trained"]
    row = _last(summary)
    if row is not None and row.top1 is not None:
        result = f"{row.model} reaches {percent(row.top1)} % top-1 on {summary.primary}"
        result += f" (chance {percent(100 / row.classes)} %)" if row.classes else ""
        parts.append(", ".join([result, *map(_against, _comparisons(summary, row))]))
        if summary.missing:
            parts.append(f"this run has {' and '.join(_MISSING[name] for name in summary.missing)} to compare with")
    faster = acceleration(state)
    if faster:
        done = all(job.trained for job in own if job.plan["kind"] == "link")
        verb = "costs" if done else "will cost"
        ratio = f"{faster:.1f}x fewer" if faster >= 1 else f"{1 / faster:.1f}x more"
        parts.append(f"the chain {verb} {ratio} MACs than the baselines{planned_costs(jobs)}{_tried(summary)}")
    return "; ".join(parts) + "."


def _tried(summary: Summary) -> str:
    return ", failed tries included" if summary.tries else ""


def tiles(summary: Summary, state: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers that matter most: (value, unit, what it is)."""
    shown = []
    row = _last(summary)
    if row is not None and row.top1 is not None:
        shown.append((percent(row.top1), "%", f"top-1 of {row.model} on {summary.primary}"))
        for item in _comparisons(summary, row):
            what = "against its baseline"
            if item.others[0] in CONTROLS:
                what = f"against the model {_scratch(item.others[0])}"
            shown.append((f"{item.difference:+.1f}", "points", f"{what}, 95 %: {item.low:+.1f} to {item.high:+.1f}"))
        for name, why in summary.missing.items():
            what = "its baseline" if name == "baseline" else f"the model {_scratch(name)}"
            shown.append((why, "", f"against {what}"))
    faster = acceleration(state)
    if faster:
        what = "cheaper in MACs than all baselines" if faster >= 1 else "the MACs of all baselines"
        shown.append((f"{max(faster, 1 / faster):.2f}", "x", what + _tried(summary)))
    used = [row.device_hours for row in summary.paid if row.device_hours is not None]
    if used:
        value, _, unit = hours(sum(used)).partition(" ")
        shown.append((value, unit, "of device time for the chain"))
    return shown


def score_tables(summary: Summary, roles: dict[str, str]) -> list[TextTable]:
    """A table for each task, with its sets and every model; the longer of the two goes down the page."""
    rows = [row for row in summary.rows if row.scores]
    sets: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, score in row.scores.items():
            sets.setdefault(score["task"], {})[name] = None
    known = list(EVALUATION_TASKS.table)
    order = sorted(sets, key=lambda task: known.index(task) if task in known else len(known))
    return [_score_table(task, list(sets[task]), rows, roles) for task in order]


def _score_table(task: str, sets: list[str], rows: list[Row], roles: dict[str, str]) -> TextTable:
    kind = task_class(task)
    lines, about = [], dict[str, float]()
    selected = [name for name in sets if roles.get(name) == "select"]
    caution = "Settings may have been chosen on sets marked (select)." if selected else ""
    notes = [" ".join(filter(None, (kind.note, caution)))]
    for name in sets:
        scores = [row.scores.get(name) for row in rows]
        one = next(score for score in scores if score is not None)
        shown = [kind.rows(score) if score is not None else None for score in scores]
        for at, line in enumerate(kind.rows(one)):
            about = line.about
            label = f"{name} (select)" if name in selected else name
            label += f", {line.label}" if line.label else ""
            sizes = [f"{value:,}" if isinstance(value, int) else percent(value) for value in about.values()]
            lines.append([label, f"{one['n']:,}", *sizes, *(_joined(own[at]) if own else "-" for own in shown)])
        if lost := Account(unused=Counter(one.get("skipped", {}))).line():
            notes.append(f"{name}: left out: {lost}.")
        beside = Account.from_json(one["account"]).line() if one.get("account") else ""
        if beside:
            notes.append(f"{name} holds more than is used: {beside}.")
    return _turned(kind.title, ["Set", "images", *about, *(row.job for row in rows)], lines, [*filter(None, notes)])


CLASSES_SHOWN = 40
"""Rows of a table of classes: half are the best, half the worst ones."""
IMAGES_PER_CLASS = 5
"""A class with fewer images has no accuracy worth a row."""


def class_tables(summary: Summary) -> list[TextTable]:
    """The accuracy of each class with enough images for the last scored model and those of its sizes, a table for each
    set that has such classes. Sets whose files are missing have none.
    """
    last = _last(summary)
    rows = [row for row in summary.rows if last and row.model == last.model and row.scores]
    rows.sort(key=lambda row: row is not last)
    found = [_class_table(summary, rows, name) for name in last.scores] if last else []
    return [table for table in found if table]


def _class_table(summary: Summary, rows: list[Row], name: str) -> TextTable | None:
    files = [score_file(summary.folder, row.job, name) for row in rows]
    labels = stored_arrays(files[0]).get("labels")
    records = {row.job: read_record(path) for row, path in zip(rows, files, strict=True)}
    shares: dict[str, list[float | None]] = {
        job: found["per_class"] for job, found in records.items() if "per_class" in found
    }
    first, *others = rows
    if first.job not in shares or labels is None or labels.ndim != 1 or not len(labels):
        return None
    own = shares[first.job]
    counts = np.bincount(labels, minlength=len(own))
    # Only models that were scored on the same classes stand beside each other.
    others = [row for row in others if records[row.job].get("pins") == records[first.job].get("pins")]
    others = [row for row in others if len(shares.get(row.job, ())) == len(own)]
    names = records[first.job].get("classnames") or [str(number) for number in range(len(own))]
    scored = [at for at in range(len(own)) if own[at] is not None]
    order = sorted((at for at in scored if counts[at] >= IMAGES_PER_CLASS), key=lambda at: (-(own[at] or 0.0), at))
    if not order:
        return None
    lines = [
        [str(names[at]), f"{counts[at]:,}", *(_share(shares[row.job][at]) for row in (first, *others))] for at in order
    ]
    notes = ["Top-1 of each class in percent, by the first model. Few images give a class a wide interval."]
    if few := len(scored) - len(order):
        notes.append(f"Left out, with fewer than {IMAGES_PER_CLASS} images: {few:,} of {len(scored):,} classes.")
    if len(lines) > CLASSES_SHOWN:
        half = CLASSES_SHOWN // 2
        notes.append(f"{len(lines) - CLASSES_SHOWN:,} classes between the best and the worst {half} are left out.")
        lines = [*lines[:half], *lines[-half:]]
    shown = short_names(summary)
    header = ["Class", "Images", *(shown[row.job] for row in (first, *others))]
    return TextTable(f"Classes of {name}", header, lines, notes)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _turned(title: str, header: list[str], rows: list[list[str]], notes: list[str]) -> TextTable:
    if len(rows) < len(header) - 1:
        header, *rows = map(list, zip(header, *rows, strict=True))
    return TextTable(title, header, rows, notes)


def _joined(line: ScoreRow) -> str:
    return " / ".join(f"{value:.{line.digits}f}" for value in line.scores.values() if value is not None) or "-"


def _cached(jobs: list[JobView]) -> list[str]:
    """How many captions the teacher's cache had, of each job that had one."""
    notes = []
    for job in jobs:
        known = job.manifest.get("trained") or (job.train[-1] if job.train else {})
        hits, misses = (known.get(f"teacher_{name}", 0) for name in ("hits", "misses"))
        if whole := hits + misses:
            notes.append(f"{job.name}: the teacher's cache had {100 * hits / whole:.1f} % of {count(whole)} captions.")
    return notes


def jobs_table(jobs: list[JobView]) -> TextTable:
    """Where every job stands, and what was lost on the way."""
    rows = []
    for job in jobs:
        line = job.train[-1] if job.train else {}
        trained = job.manifest.get("trained") or {}
        skips = trained.get("skipped_samples") or {k[8:]: v for k, v in line.items() if k.startswith("skipped_")}
        begun = bool(trained or line)
        lost = ", ".join(f"{int(n):,} {cause}" for cause, n in skips.items() if n) or ("0" if begun else "")
        steps = trained.get("nonfinite_steps", line.get("nonfinite_steps"))
        few = trained.get("few_captions")
        rows.append(
            [
                f"{job.name} ({CONTROLS[job.name]})" if job.name in CONTROLS else job.name,
                job.progress(),
                count(job.plan["parameters"]),
                f"{job.plan['steps']:,}",
                str(job.plan["seed"]),
                hours(trained.get("device_hours", line.get("device_hours"))) if begun else "",
                "" if steps is None else f"{int(steps):,}",
                lost,
                "" if few is None else f"{few:,}",
            ]
        )
    header = ["Job", "state", "parameters", "steps", "seed", "device time"]
    header += ["non-finite steps", "skipped samples", "few captions"]
    note = (
        "Non-finite steps had a loss or gradient that is not finite and changed no weight. Skipped samples were "
        "replaced by others. Few captions: samples with fewer than asked for, drawn with replacement."
    )
    restarted = [
        f"{job.name} went on under another kind of engine after step {' and '.join(f'{step:,}' for step in steps)}: "
        "the optimizer's moments and the moving average restarted there."
        for job in jobs
        if (steps := (job.manifest.get("trained") or {}).get("moments_anew"))
    ]
    return TextTable("Jobs", header, rows, [note, *restarted, *_cached(jobs)])


def data_tables(state: dict[str, Any]) -> list[TextTable]:
    """What the training shards hold; nothing for the run of an older version."""
    account, sets = state.get("account"), state.get("sets")
    apart = [sets_table(sets)] if sets else []
    return [*apart, *(Account.from_json(account).tables("Training data") if account else [])]


def unfinished(jobs: list[JobView]) -> list[str]:
    """A line for each job that was begun and is not done, and what is still to do."""
    own = [job for job in jobs if not job.plan.get("same_as")]
    left = [job for job in own if not job.trained]
    begun = [(job, f"; last log line {job.last_line}" if job.last_line else "") for job in left if job.manifest]
    lines = [f"{job.name}: {job.progress()}{last}." for job, last in begun]
    waiting = [job.name for job in left if not job.manifest]
    if waiting:
        lines.append(f"Not begun: {', '.join(waiting)}.")
    return lines


def environment(state: dict[str, Any], jobs: list[JobView]) -> list[tuple[str, str]]:
    """What, where and when, as (name, value)."""
    found: dict[str, dict[str, None]] = {}
    for job in jobs:
        machine = job.manifest.get("machine", {}) | {k: v for k, v in job.manifest.items() if k == "processes"}
        for key, value in machine.items():
            found.setdefault(key, {})[str(value)] = None
    begun = [job.manifest["started"] for job in jobs if "started" in job.manifest]
    ended = [job.manifest["finished"] for job in jobs if "finished" in job.manifest]
    seeds = dict.fromkeys(str(job.plan["seed"]) for job in jobs)
    rows = [
        ("command", state.get("command", "")),
        ("started", state.get("started", min(begun, default=""))),
        ("last model finished", max(ended, default="")),
        *((key, ", ".join(values)) for key, values in found.items()),
        ("seeds", ", ".join(seeds)),
        ("training images", f"{state.get('images', 0):,}"),
        ("batch", f"{state.get('batch', 0):,}"),
        ("captions per image", str(state.get("captions", ""))),
        ("data fingerprint", state.get("data_fingerprint", "")),
    ]
    return [(key, str(value)) for key, value in rows if value]


def roles_of(recipe: str) -> dict[str, str]:
    """The role of each evaluation set in the text of recipe.yaml."""
    try:
        sets = (yaml.safe_load(recipe) or {}).get("evaluation", {}).get("sets", [])
        return {item["name"]: item.get("role", "report") for item in sets}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return {}
