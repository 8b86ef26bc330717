"""What a run has shown so far, read only from its manifests: scores with intervals, costs, verdicts."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compt.chain.state import read_calibration
from compt.design.runs import Answers, stored_answers
from compt.errors import DataError, RunError
from compt.evaluate.encoder import load_arrays
from compt.evaluate.stats import paired_bootstrap, verdict
from compt.files import read_json

CONTROLS = {
    "control-equal_epochs": "from scratch, the link's epochs",
    "control-equal_macs": "from scratch, the link's MACs",
    "control-equal_chain_macs": "from scratch, the whole chain's MACs",
}
"""What each control is: the last link's model, trained from scratch at that cost."""

LIKE_FOR_LIKE = ("baseline", "control-equal_epochs", "control-equal_chain_macs")
"""What the last link has to be compared with, so that no comparison flatters: its baseline's full training, the same
epochs, and the MACs of the whole chain."""

_PINS = {"data": "images", "classnames": "class names", "templates": "templates", "label": "labels"}


@dataclass(frozen=True)
class Row:
    """One trained model. `top1` and its Wilson 95 % interval are in percent, MACs include the teacher's share."""

    job: str
    kind: str
    model: str
    state: str
    seed: int
    parameters: int
    epochs: float
    steps: int
    macs: float
    device_hours: float | None
    top1: float | None = None
    low: float | None = None
    high: float | None = None
    images: int = 0
    classes: int = 0
    scores: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Comparison:
    """A link against models trained from scratch, on the same images.

    `difference` (link minus other) and its 95 % interval (paired bootstrap over images) are in points. Accelerations
    are the other's cost divided by the link's; accumulated ones take all links up to this one, and the tries of a
    first-pair test that failed on the way.
    """

    link: str
    others: list[str]
    difference: float
    low: float
    high: float
    verdict: str
    macs_speedup: float
    macs_speedup_accumulated: float | None
    hours_speedup: float | None
    hours_speedup_accumulated: float | None
    seed_spread: float | None


@dataclass(frozen=True)
class NotCompared:
    """A link and others that are all scored, but whose scores do not go together, and why."""

    link: str
    others: list[str]
    reason: str


@dataclass(frozen=True)
class Summary:
    """All rows of a run, and its comparisons with baselines and controls.

    `individual` holds, for each seed, the baselines in the chain's order; where a baseline
    is the very training of a link, that link's row. Members that were not begun are missing. `tries` are links that the
    first-pair test found not to be lossless, `calibration` is its record (`compt.chain.state.read_calibration`).
    `missing` holds the part of `LIKE_FOR_LIKE` that the last link is not compared with, and why: "pending" or "not
    run". It is empty while nothing of the chain's last link is compared.
    """

    run: str
    primary: str | None
    links: list[Row]
    baselines: list[Row]
    controls: list[Row]
    individual: dict[int, list[Row]]
    comparisons: list[Comparison]
    control_comparisons: list[Comparison]
    not_compared: list[NotCompared] = field(default_factory=list)
    tries: list[Row] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def rows(self) -> list[Row]:
        """Links, then failed tries, baselines and controls."""
        return [*self.links, *self.tries, *self.baselines, *self.controls]

    @property
    def paid(self) -> list[Row]:
        """What the chain cost, in the order of training: each failed try stands before the link that it tried."""
        return paid_for(self.links, self.tries)


def accumulated(values: Sequence[float | None]) -> list[float | None]:
    """Running sums; None from the first missing value on."""
    sums: list[float | None] = []
    total: float | None = 0.0
    for value in values:
        total = None if total is None or value is None else total + value
        sums.append(total)
    return sums


def paid_for(links: Sequence[Row], tries: Sequence[Row]) -> list[Row]:
    """`links`, with the failed tries of each before it; tries of a link that is not there yet come last."""
    models = {link.model for link in links}
    rows = [row for link in links for row in (*(row for row in tries if row.model == link.model), link)]
    return rows + [row for row in tries if row.model not in models]


def _row(job: dict[str, Any], manifest: dict[str, Any], primary: str | None) -> Row:
    scores = manifest.get("scores", {})
    score, row = scores.get(primary, {}), dict[str, Any]()
    if "top1" in score:
        low, high = score["top1_interval"]
        row = {"top1": score["top1"], "low": low, "high": high, "images": score["n"], "classes": score["classes"]}
    trained = manifest.get("trained")
    return Row(
        job=job["name"],
        kind=job["kind"],
        model=manifest["spec"]["name"],
        **{key: manifest[key] for key in ("state", "seed", "parameters", "epochs", "steps")},
        macs=manifest["cost"]["total_macs"],
        device_hours=trained["device_hours"] if trained else None,
        scores=scores,
        **row,
    )


def stored_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a result; {} where the file is missing or torn."""
    try:
        return load_arrays(path)
    except DataError:
        return {}


def read_record(path: Path) -> dict[str, Any]:
    """What stands beside the arrays of a result, in a .json; {} where it is missing or torn."""
    try:
        return dict(read_json(path.with_suffix(".json")))
    except (OSError, TypeError, ValueError):
        return {}


class ImageAnswers(NamedTuple):
    """A job's answers on a set, None where they are missing. `pins` are hashes of what its scores depend on."""

    job: str
    pins: Mapping[str, Any]
    answers: Answers | None


def paired(ours: Sequence[ImageAnswers], theirs: Sequence[ImageAnswers]) -> tuple[float, float, float] | str:
    """(Mean of `ours` minus mean of `theirs`, low, high) in points by `paired_bootstrap`, each a model over seeds.

    All have to be scored on the same images, class names and templates; else the reason why they cannot be compared.
    """
    first = ours[0]
    reasons = [] if first.answers else [f"the answers of {first.job} are missing"]
    for other in (*ours[1:], *theirs):
        keys = sorted(first.pins.keys() | other.pins.keys())
        differ = [_PINS.get(key, key) for key in keys if first.pins.get(key) != other.pins.get(key)]
        if differ:
            reasons.append(f"{other.job} was scored with other {' and '.join(differ)}")
        elif other.answers is None:
            reasons.append(f"the answers of {other.job} are missing")
        elif first.answers and not np.array_equal(other.answers[0], first.answers[0]):
            reasons.append(f"{other.job} was scored on other images")
    if first.answers and len(first.answers[0]) < 2:
        reasons.append("one image is too few")
    if reasons:
        return "; ".join(reasons)
    own, others = ([each.answers[1] for each in side if each.answers] for side in (ours, theirs))
    return paired_bootstrap(own, others)


def _compare(
    run: Path, primary: str, link: Row, others: list[Row], paid_to_here: list[Row], others_to_here: list[Row] | None
) -> Comparison | NotCompared | None:
    """`link` against the mean of `others` (the same model over seeds); None while something is not scored yet."""
    if any(row.top1 is None for row in (link, *others)) or link.images < 2:
        return None
    scored = [
        ImageAnswers(row.job, row.scores[primary].get("pins", {}), stored_answers(run, row.job, primary))
        for row in (link, *others)
    ]
    found = paired(scored[:1], scored[1:])
    if isinstance(found, str):
        return NotCompared(link.job, [other.job for other in others], found)
    difference, low, high = found
    ours_macs, ours_hours = [row.macs for row in paid_to_here], [row.device_hours for row in paid_to_here]
    macs_total = hours_total = None
    if others_to_here is not None:
        macs_total = sum(row.macs for row in others_to_here) / sum(ours_macs)
        hours = accumulated([row.device_hours for row in others_to_here])[-1]
        ours = accumulated(ours_hours)[-1]
        hours_total = hours / ours if hours and ours else None
    other_hours = [row.device_hours for row in others if row.device_hours]
    spread = float(np.std([row.top1 for row in others if row.top1 is not None], ddof=1)) if len(others) > 1 else None
    return Comparison(
        link=link.job,
        others=[other.job for other in others],
        difference=difference,
        low=low,
        high=high,
        verdict=verdict(low, high),
        macs_speedup=float(np.mean([other.macs for other in others])) / link.macs,
        macs_speedup_accumulated=macs_total,
        hours_speedup=float(np.mean(other_hours)) / link.device_hours if other_hours and link.device_hours else None,
        hours_speedup_accumulated=hours_total,
        seed_spread=spread,
    )


def read_state(path: Path) -> dict[str, Any]:
    """run.json or a manifest. Raises RunError when it cannot be read."""
    try:
        return dict(read_json(path))
    except FileNotFoundError:
        raise RunError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


@contextlib.contextmanager
def whole_files(run: Path) -> Iterator[None]:
    """Turn what other keys or types in run.json, a manifest or scores lead to into a RunError.

    It names the line that failed, because a fault of compt's own would end here too.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = next(iter(f"{type(error).__name__}: {error}".splitlines()))
        raise RunError(
            f"{run}: its run.json, a manifest or scores are damaged, or of another version of compt "
            f"({what}, in {Path(at.filename).name}:{at.lineno}); restore them from a copy"
        ) from error


def summarise(run: Path) -> Summary:
    """`Summary` of a run folder; jobs that were not begun are left out. Raises RunError."""
    with whole_files(run):
        return _summarise(run)


def _summarise(run: Path) -> Summary:
    """Read RUN/run.json and the manifests of its jobs; jobs that were not begun are left out. Raises RunError."""
    state = read_state(run / "run.json")
    primary: str | None = state["primary"]
    rows: dict[str, Row] = {}
    same: dict[str, str] = {}
    for job in state["jobs"]:
        if job.get("same_as"):
            same[job["name"]] = job["same_as"]
            continue
        path = run / "jobs" / job["name"] / "manifest.json"
        if path.exists() and (manifest := read_state(path))["state"] != "planned":
            rows[job["name"]] = _row(job, manifest, primary)
    links = [row for row in rows.values() if row.kind == "link"]
    by_model: dict[str, list[Row]] = {}
    individual: dict[int, dict[str, Row]] = {}
    # A baseline that is the same training as a link has no manifest of its own: the link's row counts as both.
    for job in state["jobs"]:
        row = rows.get(same.get(job["name"], job["name"]))
        if job["kind"] == "baseline" and row is not None:
            by_model.setdefault(row.model, []).append(row)
            individual.setdefault(job["seed"], {})[row.model] = row
    order = [job["spec"]["name"] for job in state["jobs"] if job["kind"] == "link"]
    controls = [row for row in rows.values() if row.kind == "control"]
    tries = [row for row in rows.values() if row.kind == "try"]
    compared = list(_with_baselines(run, primary, links, tries, by_model)) if primary else []
    with_controls = list(_with_controls(run, primary, links, controls)) if primary else []
    return Summary(
        run=run.resolve().name,
        primary=primary,
        links=links,
        baselines=[row for row in rows.values() if row.kind == "baseline"],
        controls=controls,
        individual={seed: [own[model] for model in order if model in own] for seed, own in individual.items()},
        comparisons=[item for item in compared if isinstance(item, Comparison)],
        control_comparisons=[item for item in with_controls if isinstance(item, Comparison)],
        not_compared=[item for item in (*compared, *with_controls) if isinstance(item, NotCompared)],
        tries=tries,
        calibration=read_calibration(run),
        missing=_missing(state, links, [*compared, *with_controls]),
        folder=run,
    )


def _missing(
    state: dict[str, Any], links: Sequence[Row], compared: Sequence[Comparison | NotCompared]
) -> dict[str, str]:
    """The part of `LIKE_FOR_LIKE` that the last link has no comparison with, and why.

    Nothing while that link is not begun: the links before it have no controls.
    """
    planned_links = [job["name"] for job in state["jobs"] if job["kind"] == "link"]
    if not links or links[-1].job != planned_links[-1]:
        return {}
    own = [item for item in compared if item.link == links[-1].job]
    if not any(isinstance(item, Comparison) for item in own):
        return {}
    kinds = {job["name"]: job["kind"] for job in state["jobs"]}
    found = {other if other in CONTROLS else kinds[other] for item in own for other in item.others}
    planned = {job["name"] for job in state["jobs"]}
    planned |= {job["kind"] for job in state["jobs"] if job["spec"]["name"] == links[-1].model}
    return unmatched(found, planned)


def unmatched(found: Set[str], planned: Set[str]) -> dict[str, str]:
    """The part of `LIKE_FOR_LIKE` that is not `found`: "pending" where it is `planned`, else "not run"."""
    return {name: "pending" if name in planned else "not run" for name in LIKE_FOR_LIKE if name not in found}


def chain_to(run: Path, job: str) -> list[Row]:
    """The jobs that led to `job` of a run, each the teacher of the next, and `job` itself. Raises RunError."""
    with whole_files(run):
        state = read_state(run / "run.json")
        jobs = {item["name"]: item for item in state["jobs"]}
        rows: list[Row] = []
        name: str | None = job
        while name is not None and len(rows) < len(jobs):
            manifest = read_state(run / "jobs" / name / "manifest.json")
            rows.insert(0, _row(jobs[name], manifest, state["primary"]))
            name = jobs[name]["teacher"]
        return rows


def _with_baselines(
    run: Path, primary: str, links: list[Row], tries: list[Row], by_model: dict[str, list[Row]]
) -> Iterator[Comparison | NotCompared]:
    """Each link against its baseline, unless the link is the baseline."""
    for at, link in enumerate(links):
        others = by_model.get(link.model, [])
        if not others or any(other.job == link.job for other in others):
            continue
        before = links[: at + 1]
        whole = all(other.model in by_model for other in before)
        firsts = [by_model[other.model][0] for other in before] if whole else None
        models = {other.model for other in before}
        paid = paid_for(before, [row for row in tries if row.model in models])
        if found := _compare(run, primary, link, others, paid, firsts):
            yield found


def _with_controls(
    run: Path, primary: str, links: list[Row], controls: list[Row]
) -> Iterator[Comparison | NotCompared]:
    for control in controls:
        link = next((link for link in links if link.model == control.model), None)
        if link and (found := _compare(run, primary, link, [control], links, None)):
            yield found
