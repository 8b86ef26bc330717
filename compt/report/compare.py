"""Models of several runs against each other: mean and spread over seeds, and differences on the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compt.cost.paper import LOSSLESS_POINTS
from compt.design.curves import Point
from compt.design.runs import FinishedJob, ScoredJobs, Skipped, grouped, read_scored
from compt.evaluate.stats import direction, verdict
from compt.files import flatten, hash_json, write_json
from compt.report.summary import ImageAnswers, paired, read_state, unmatched
from compt.report.tables import SAME, missing_command
from compt.report.write import write_tables
from compt.text import TextTable, count

_KINDS = ("link", "baseline", "control", "try")
_SHOWN = 6
"""Settings in which two models differ, in a note; more are counted."""


@dataclass(frozen=True)
class SeedGroup:
    """One model, trained in one way with one or more seeds. `point` has its mean accuracy, spread and cost.

    jobs: one for each seed; links come before baselines, controls and tries. again: the others with those seeds.
    macs_so_far: of this training and of those that led to its teacher, the mean over seeds; None where a teacher's
    training is in none of the runs.
    """

    label: str
    jobs: tuple[FinishedJob, ...]
    point: Point
    macs_so_far: float | None
    again: tuple[FinishedJob, ...] = ()

    @property
    def kind(self) -> str:
        """The first of link, baseline, control and try that one of its jobs is."""
        kinds = self.jobs[0].kinds
        return next(kind for kind in (*_KINDS, *kinds) if kind in kinds)

    @property
    def found(self) -> tuple[FinishedJob, ...]:
        """All of its jobs in the runs."""
        return (*self.jobs, *self.again)

    @property
    def model(self) -> str:
        """A digest of the model's sizes, without its name."""
        return hash_json(replace(self.jobs[0].manifest.spec, name="").to_dict())

    @property
    def runs(self) -> list[str]:
        """The run folders, each once, as they were given."""
        return list(dict.fromkeys(str(job.run) for job in self.jobs))


@dataclass(frozen=True)
class ModelDifference:
    """`model` minus `against` in points with a 95 % interval, or the `reason` why they cannot be compared.

    Without either, `against` is a model that a whole comparison needs, and `verdict` says "not run" or "pending".
    `command` trains what is not run.
    seeds: how many of each. The interval covers their choice where both have two or more, else only that of images.
    """

    model: str
    against: str
    points: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = "not compared"
    seeds: str = ""
    reason: str = ""
    command: str = ""


@dataclass(frozen=True)
class Comparisons:
    """What some runs show on one evaluation set. `notes` name how models differ that share a name."""

    evaluation_set: str
    groups: list[SeedGroup]
    differences: list[ModelDifference]
    notes: list[str]
    skipped: list[Skipped]

    def tables(self) -> list[TextTable]:
        """The models, and their differences if there are any."""
        return [self._models(), *([self._differences()] if self.differences else [])]

    def _models(self) -> TextTable:
        rows = []
        for group in self.groups:
            point = group.point
            spread = "" if point.spread is None else f"{point.spread:.2f}"
            seeds = ", ".join(map(str, sorted(point.seeds)))
            cells = [f"{point.epochs:.3g}", seeds, f"{point.top1:.2f}", spread, count(point.macs)]
            rows.append([group.label, *cells, "-" if group.macs_so_far is None else count(group.macs_so_far)])
        about = (
            "Top-1 in percent, mean over seeds; SD: standard deviation over seeds. MACs of one training run; so far: "
            "with those of the models before it in its chain, without failed tries."
        )
        notes = [about, *self.notes]
        notes += [f"Left out: {item.job} {item.reason}." for item in self.skipped]
        if not rows:
            notes.insert(0, "No model in these runs is trained to its end.")
        header = ["Model", "Epochs", "Seeds", "Top-1", "SD", "MACs", "MACs so far"]
        return TextTable(f"Models on {self.evaluation_set}", header, rows, notes)

    def _differences(self) -> TextTable:
        rows = []
        for item in self.differences:
            cells = ["-"] * 3
            if item.points is not None:
                cells = [f"{item.points:+.2f}", f"{item.low:+.2f} to {item.high:+.2f}", item.seeds]
            rows.append([item.model, item.against, *cells, item.verdict])
        about = (
            "Points of top-1, the first model minus the second, on the same images. The interval covers the choice of "
            "images, and of seeds where both models have two or more. Without seeds in it, another seed moves the "
            f"result too. Lossless: less than {LOSSLESS_POINTS} points below the baseline."
        )
        notes = [about]
        notes += [
            f"Not compared: {item.model} and {item.against}, as {item.reason}."
            for item in self.differences
            if item.reason
        ]
        commands = dict.fromkeys(item.command for item in self.differences if item.command)
        notes += [f"Not run, and needed for the whole comparison: {command}" for command in commands]
        header = ["Model", "Against", "Points", "95 % interval", "Seeds", "Verdict"]
        return TextTable("Differences", header, rows, notes, left=2)

    def to_json(self) -> dict[str, Any]:
        """Plain values for files."""
        models = [
            {"label": group.label, "kind": group.kind, **asdict(group.point), "macs_so_far": group.macs_so_far}
            for group in self.groups
        ]
        differences = [asdict(item) for item in self.differences]
        skipped = [asdict(item) for item in self.skipped]
        about = {"evaluation_set": self.evaluation_set, "notes": self.notes, "skipped": skipped}
        return {**about, "models": models, "differences": differences}

    def write(self, folder: Path) -> None:
        """Write FOLDER/compare.json, .md and .html. Raises RunError."""
        title, runs = f"Comparison on {self.evaluation_set}", {run for group in self.groups for run in group.runs}
        write_json(folder / "compare.json", self.to_json())
        sentence = f"{len(self.groups)} models of {len(runs)} runs on {self.evaluation_set}"
        write_tables(folder / "compare", title, sentence, self.tables())


def compare_runs(runs: Sequence[Path], on: str | None = None, option: str = "--on") -> Comparisons:
    """Group the finished models of `runs` over their seeds, and compare those of the same sizes.

    Each link is compared with its baselines, controls and failed tries, and with the first link of the same sizes.
    Without a link, models are compared with the first. What `LIKE_FOR_LIKE` asks of the last link of a chain and no run
    has is named as not run. Raises RunError and ConfigError, as `read_scored` does.
    """
    found = read_scored(runs, on, option)
    groups = _groups(found)
    differences = [
        _difference(first, second, found.evaluation_set)
        for model in dict.fromkeys(group.model for group in groups)
        for first, second in _pairs([group for group in groups if group.model == model])
    ]
    for run in runs:
        known = {(item.model, item.against) for item in differences}
        differences += [item for item in _not_run(run, groups, differences) if (item.model, item.against) not in known]
    skipped = [*found.skipped, *(_again(job, group) for group in groups for job in group.again)]
    return Comparisons(found.evaluation_set, groups, differences, list(_notes(found, groups)), skipped)


def _again(job: FinishedJob, group: SeedGroup) -> Skipped:
    return Skipped(job.label, f"is {group.label} again, with the same seed ({job.manifest.seed})")


def _settings(job: FinishedJob, found: ScoredJobs) -> dict[str, Any]:
    """What determines the weights but for seeds."""
    about = {"steps": job.manifest.steps, "warmup_steps": job.warmup_steps, "training shards": job.data}
    return flatten({**job.settings, **about, "teacher": found.lineage.teacher(job, seeds=False)})


def _groups(found: ScoredJobs) -> list[SeedGroup]:
    groups = [_group(members, found) for members in grouped(found.jobs, lambda job: _settings(job, found))]
    counts = Counter(group.label for group in groups)
    # Folders with the same name get their paths.
    folders = Counter(run.name for run in {job.run.resolve() for job in found.jobs})
    named = []
    for group in groups:
        if counts[group.label] > 1:
            run = group.jobs[0].run
            name = run.resolve().name if folders[run.resolve().name] == 1 else str(run)
            more = f" and {len(group.runs) - 1} more" if len(group.runs) > 1 else ""
            group = replace(group, label=f"{group.label} ({name}{more})")
        named.append(group)
    return named


def _group(members: Sequence[FinishedJob], found: ScoredJobs) -> SeedGroup:
    def rank(job: FinishedJob) -> int:
        return next((at for at, kind in enumerate(_KINDS) if kind in job.kinds), len(_KINDS))

    def seeds(job: FinishedJob) -> list[Any]:
        return [job.manifest.seed, job.manifest.result.get("order_seed"), found.lineage.teacher(job, seeds=True)]

    # Machines round differently. So a seed that was trained on two of them has two models, but it is one seed.
    same = grouped(sorted(members, key=rank), seeds)
    jobs, again = [first for first, *_ in same], tuple(job for _, *more in same for job in more)
    point = Point.of(jobs, found.evaluation_set)
    return SeedGroup(_label(jobs[0]), tuple(jobs), point, _macs_so_far(jobs, found), again)


def _macs_so_far(jobs: Sequence[FinishedJob], found: ScoredJobs) -> float | None:
    lines = [[job, *found.lineage.ancestors(job)] for job in jobs]
    if any(line[-1].manifest.parent_hash is not None for line in lines):
        return None
    return sum(job.manifest.macs for line in lines for job in line) / len(lines)


def _not_run(
    run: Path, groups: Sequence[SeedGroup], differences: Sequence[ModelDifference]
) -> Iterator[ModelDifference]:
    """What the last link of a run's chain has to be compared with and is not, as in the report of that run."""
    planned = read_state(run / "run.json")["jobs"]
    last = next((job for job in reversed(planned) if job["kind"] == "link"), None)
    own = [group for group in groups for job in group.found if last and (job.run, job.name) == (run, last["name"])]
    compared = {item.against for group in own for item in differences if item.model == group.label}
    if last is None or not compared:
        return
    same = {job["name"]: job["same_as"] for job in planned if job.get("same_as")}
    there = set[str]()
    for group in groups:
        if group.label in compared or group in own:
            names = {job.name for job in group.found}
            there |= names | {name for name, other in same.items() if other in names}
            there |= {kind for job in group.found for kind in job.kinds}
    spec = own[0].jobs[0].manifest.spec.name
    listed = {job["name"] for job in planned}
    listed |= {job["kind"] for job in planned if job.get("spec", {}).get("name") == spec}
    command = missing_command(run, [job["name"] for job in planned if job["kind"] == "control"])
    for name, why in unmatched(there, listed).items():
        against = f"{spec} baseline" if name == "baseline" else f"{spec}, {SAME[name]}"
        yield ModelDifference(own[0].label, against, verdict=why, command=command if why == "not run" else "")


def _label(job: FinishedJob) -> str:
    if "link" in job.kinds:
        return job.name
    if "baseline" in job.kinds:
        return f"{job.manifest.spec.name} baseline"
    if job.name in SAME:
        return f"{job.manifest.spec.name}, {SAME[job.name]}"
    return job.name


def _pairs(groups: Sequence[SeedGroup]) -> Iterator[tuple[SeedGroup, SeedGroup]]:
    """Groups of one model to compare: the first minus the second."""
    links = [group for group in groups if group.kind == "link"]
    others = [group for group in groups if group.kind != "link"]
    yield from ((link, other) for link in links for other in others)
    for group in links[1:] or ([] if links else others[1:]):
        yield group, (links or others)[0]


def _difference(first: SeedGroup, second: SeedGroup, name: str) -> ModelDifference:
    sides = [
        [ImageAnswers(job.label, job.manifest.scores[name].pins, job.answers(name)) for job in group.jobs]
        for group in (first, second)
    ]
    found = paired(*sides)
    if isinstance(found, str):
        return ModelDifference(first.label, second.label, reason=found)
    points, low, high = found
    said = verdict(low, high) if second.kind == "baseline" else direction(low, high)
    return ModelDifference(
        first.label, second.label, points, low, high, said, ", ".join(str(len(side)) for side in sides)
    )


def _notes(found: ScoredJobs, groups: Sequence[SeedGroup]) -> Iterator[str]:
    """How groups differ that share a name, and who trained on other shards."""
    shards = dict.fromkeys(job.data for job in found.jobs)
    for group in groups:
        own = _settings(group.jobs[0], found)
        first = next(other for other in groups if _label(other.jobs[0]) == _label(group.jobs[0]))
        if first is not group:
            theirs = _settings(first.jobs[0], found)
            keys = [key for key in dict.fromkeys([*own, *theirs]) if own.get(key) != theirs.get(key)]
            # A digest says nothing to people.
            differ = [
                key if key in ("teacher", "training shards") else f"{key} ({own.get(key)}, not {theirs.get(key)})"
                for key in keys[:_SHOWN]
            ]
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            yield f"{group.label} differs from {first.label} in {', '.join(differ)}{more}."
    if len(shards) > 1:
        sets = [[group.label for group in groups if group.jobs[0].data == each] for each in shards]
        yield f"The training data differ: {'; '.join(map(', '.join, sets))}."
