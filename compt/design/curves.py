"""Epochs that a link needs to match its baseline, measured on runs on disk.

The procedure of figure 8 (CoM-PT, section 5.3.2): train a link for several lengths, each to the end of its own
schedule, and interpolate the accuracies at those ends. A value from the middle of a schedule is no point: its learning
rate had not come down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compt.cost.paper import LOSSLESS_POINTS
from compt.cost.speed import nameless
from compt.design.crossing import Numbers, crossing, interval, paired_draws
from compt.design.runs import FinishedJob, Lineage, Skipped, grouped, read_scored
from compt.design.sizes import log2_size
from compt.files import flatten, hash_json
from compt.models.presets import ModelSpec

Target = Literal["baseline", "lossless"]
MARGINS: dict[Target, float] = {"baseline": 0.0, "lossless": LOSSLESS_POINTS}
"""Points of accuracy that a target lies below the baseline."""


@dataclass(frozen=True)
class LinkEpochs:
    """A link of a chain: what the epochs that it needs depend on.

    `position` is that of `compt.design.sizes.position`. `images` are those of the training set, and
    `baseline_epochs` what the baseline took. Without `distilled` only weights are passed on, not features.
    """

    student: ModelSpec
    teacher: ModelSpec
    position: int
    images: int
    baseline_epochs: float
    distilled: bool = True

    @property
    def key(self) -> tuple[object, ...]:
        """The same for the same link; names of models and the position do not count."""
        specs = (nameless(self.student), nameless(self.teacher))
        return (*specs, self.images, round(self.baseline_epochs, 3), self.distilled)


@dataclass(frozen=True, kw_only=True)
class Match(LinkEpochs):
    """A link that reaches the accuracy of its individually trained baseline after `epochs` epochs.

    `low` and `high` bound `epochs` where that is known.
    """

    epochs: float
    source: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """All jobs of one length: `top1` is their mean in percent, `low` and `high` the mean ends of their intervals.

    The intervals are over images. `spread` is the standard deviation of top-1 over the jobs, None for a single one.
    `macs` are the mean of whole jobs, the teacher's share included.
    """

    epochs: float
    top1: float
    low: float
    high: float
    macs: float
    jobs: tuple[str, ...]
    seeds: tuple[int, ...]
    spread: float | None

    @classmethod
    def of(cls, group: Sequence[FinishedJob], name: str) -> Point:
        """The mean over `group`, of which each job was scored on the set `name`."""
        scores = [job.manifest.scores[name] for job in group]
        top1 = [score.top1 for score in scores]
        low, high = np.mean([score.top1_interval for score in scores], axis=0)
        return cls(
            epochs=group[0].manifest.epochs,
            top1=float(np.mean(top1)),
            low=float(low),
            high=float(high),
            macs=float(np.mean([job.manifest.macs for job in group])),
            jobs=tuple(job.label for job in group),
            seeds=tuple(job.manifest.seed for job in group),
            spread=float(np.std(top1, ddof=1)) if len(group) > 1 else None,
        )


@dataclass(frozen=True)
class LinkCurve:
    """Accuracy of one kind of link over its epochs, and the epochs at which it reaches `target`, in percent.

    `baseline` is the same model trained individually; `scratch` are other lengths of that. `low` and `high` are the
    95 % interval of the epochs; a side that is not known is None. Without a match, `reason` says why, and `at_most` or
    `more_than` what is known of the epochs all the same. `settings` distinguish curves of the same models.
    """

    student: ModelSpec
    teacher: ModelSpec
    position: int
    images: int
    distilled: bool
    evaluation_set: str
    points: tuple[Point, ...]
    baseline: Point | None = None
    scratch: tuple[Point, ...] = ()
    target: float | None = None
    match: Match | None = None
    low: float | None = None
    high: float | None = None
    paired: bool = False
    """Whether there is an interval: whether all jobs stored their answers, on the same images."""
    at_most: float | None = None
    more_than: float | None = None
    reason: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def link(self) -> LinkEpochs | None:
        """The link, where it has a baseline."""
        if self.baseline is None:
            return None
        sizes = (self.student, self.teacher, self.position, self.images)
        return LinkEpochs(*sizes, self.baseline.epochs, self.distilled)

    @property
    def source(self) -> str:
        """Where it was measured."""
        runs = sorted({job.rpartition("/")[0] for point in self.points for job in point.jobs})
        return f"measured on {self.evaluation_set}: {', '.join(runs)}"

    def acceleration(self, epochs: float | None) -> float | None:
        """MACs of the baseline over those of the link trained for `epochs`, the teacher's forward passes included."""
        if self.baseline is None or epochs is None:
            return None
        an_epoch = float(np.mean([point.macs / point.epochs for point in self.points]))
        return self.baseline.macs / (an_epoch * epochs)

    def to_json(self) -> dict[str, Any]:
        """Plain values for files; with the accelerations at the match and at the ends of its interval."""
        ends = {"match": self.match.epochs if self.match else None, "low": self.high, "high": self.low}
        speeds = {key: self.acceleration(epochs) for key, epochs in ends.items()}
        return {**asdict(self), "settings": dict(self.settings), "acceleration": speeds}


@dataclass(frozen=True)
class Curves:
    """What some runs show on one evaluation set."""

    evaluation_set: str
    target: Target
    links: list[LinkCurve]
    skipped: list[Skipped]

    def to_json(self) -> dict[str, Any]:
        """Plain values for files."""
        links = [{"name": name, **link.to_json()} for name, link in zip(names(self.links), self.links, strict=True)]
        return {
            "evaluation_set": self.evaluation_set,
            "target": self.target,
            "links": links,
            "skipped": [asdict(item) for item in self.skipped],
        }


def read_curves(
    runs: Sequence[Path],
    *,
    on: str | None = None,
    target: Target = "baseline",
    average_seeds: bool = False,
    option: str = "--set",
) -> Curves:
    """Every kind of link that `runs` hold, against every length of its baseline, by the sizes of the models.

    `on` names the evaluation set; by default the one that all runs report on. Links that differ in more than their
    length and warm-up are different kinds; `average_seeds` averages over seeds. Seeds of baselines are always averaged.
    `option` is how the caller's command takes `on`, for messages.
    Raises RunError for a folder that is no run, ConfigError for a set that no job was scored on.
    """
    found = read_scored(runs, on, option)
    reader = _CurveReader(found.evaluation_set, target, not average_seeds, found.lineage, found.jobs, found.skipped)
    return reader.curves()


@dataclass(frozen=True)
class _CurveReader:
    """Sorts the jobs of some runs into curves."""

    name: str
    target: Target
    seeds: bool
    lineage: Lineage
    jobs: list[FinishedJob]
    skipped: list[Skipped]

    def curves(self) -> Curves:
        links = []
        for members in grouped([job for job in self.jobs if job.manifest.parent_hash is not None], self._kind_of):
            specs = map(self.lineage.teacher_spec, members)
            spec = next((spec for spec in specs if spec is not None), None)
            if spec is None:
                reason = "its teacher's sizes are not known: give the run that trained the teacher too"
                self.skipped.extend(Skipped(member.label, reason) for member in members)
            else:
                links += self._against_baselines(self._one_warmup(members), spec)
        links.sort(key=lambda link: log2_size(link.student))
        return Curves(self.name, self.target, links, self.skipped)

    def _kind_of(self, job: FinishedJob) -> dict[str, Any]:
        return {
            **job.settings,
            "teacher": self.lineage.teacher(job, seeds=self.seeds),
            "shards": job.data,
            "evaluation": job.manifest.scores[self.name].pins,
            **({"seed": job.manifest.seed} if self.seeds else {}),
        }

    def _shared(self, job: FinishedJob) -> dict[str, Any]:
        """What a link and its baseline have in common."""
        settings = job.settings
        return {
            "model": settings["model"],
            "data": [settings["data"], job.data],
            "optimizer": {key: value for key, value in settings["optimizer"].items() if key != "lr"},
            **{f"evaluation {key}": value for key, value in job.manifest.scores[self.name].pins.items()},
        }

    def _one_warmup(self, members: list[FinishedJob]) -> list[FinishedJob]:
        """Without those that share length and seed with one before, but not its warm-up: two points at one place."""
        first: dict[tuple[int, int], FinishedJob] = {}
        kept = []
        for member in members:
            other = first.setdefault((member.manifest.steps, member.manifest.seed), member)
            if member.warmup_steps == other.warmup_steps:
                kept.append(member)
            else:
                reason = f"has the length and the seed of {other.label}, but another warm-up"
                self.skipped.append(Skipped(member.label, reason))
        return kept

    def _against_baselines(self, members: list[FinishedJob], teacher: ModelSpec) -> list[LinkCurve]:
        one, shared = members[0].manifest, self._shared(members[0])
        curve = LinkCurve(
            student=one.spec,
            teacher=teacher,
            position=max(map(self.lineage.position, members)),
            images=one.images,
            distilled=bool(one.alpha),
            evaluation_set=self.name,
            points=self._points(members),
            settings=flatten(self._kind_of(members[0])),
        )
        scratch = [job for job in self.jobs if job.manifest.parent_hash is None]
        same = [job for job in scratch if self._shared(job) == shared]
        groups = grouped(
            [job for job in same if not job.is_control],
            lambda job: [job.settings, job.manifest.steps, job.warmup_steps],
        )
        if not groups:
            return [replace(curve, reason=self._no_baseline(scratch, shared, one.spec))]
        links = []
        for group in groups:
            others = [job for job in same if job not in group and job.settings == group[0].settings]
            links.append(self._crossed(replace(curve, scratch=self._points(others)), members, group))
        return links

    def _no_baseline(self, scratch: Iterable[FinishedJob], shared: Mapping[str, Any], spec: ModelSpec) -> str:
        for job in scratch:
            own = self._shared(job)
            if not job.is_control and own["model"] == shared["model"]:
                differ = [key for key in sorted(own.keys() | shared.keys()) if own.get(key) != shared.get(key)]
                return f"{job.label} is not its baseline: they differ in {' and '.join(differ)}"
        return f"there is no finished baseline of {spec.name}"

    def _points(self, jobs: Iterable[FinishedJob]) -> tuple[Point, ...]:
        """One for each length, in rising order."""
        return tuple(Point.of(group, self.name) for group in _by_length(jobs))

    def _crossed(self, curve: LinkCurve, members: list[FinishedJob], group: list[FinishedJob]) -> LinkCurve:
        """`curve` with its baseline, the jobs of `group`, and where it reaches the target."""
        baseline, margin = Point.of(group, self.name), MARGINS[self.target]
        epochs, weights = ([point.epochs for point in curve.points], [len(point.jobs) for point in curve.points])
        found = float(crossing(epochs, [point.top1 for point in curve.points], baseline.top1 - margin, weights))
        draws = self._draws([*_by_length(members), group])
        low, high = (None, None) if draws is None else interval(epochs, draws, margin, weights)
        curve = replace(curve, baseline=baseline, target=baseline.top1 - margin, low=low, high=high)
        curve = replace(curve, paired=draws is not None)
        if found == -np.inf:
            reason = f"its shortest schedule, {epochs[0]:.4g} epochs, is enough"
            return replace(curve, at_most=epochs[0], reason=reason)
        if found == np.inf:
            reason = f"its longest schedule, {epochs[-1]:.4g} epochs, is not enough"
            return replace(curve, more_than=epochs[-1], reason=reason)
        assert curve.link is not None
        return replace(curve, match=Match(**vars(curve.link), epochs=found, source=curve.source, low=low, high=high))

    def _draws(self, columns: Sequence[Sequence[FinishedJob]]) -> Numbers | None:
        """Accuracies [samples, columns] of a bootstrap over images; None unless all jobs answered for the same ones."""
        answers = [[job.answers(self.name) for job in column] for column in columns]
        first = answers[0][0]
        if first is None or len(first[0]) < 2:
            return None
        if any(one is None or not np.array_equal(one[0], first[0]) for column in answers for one in column):
            return None
        return paired_draws([np.mean([one[1] for one in column if one], axis=0) for column in answers])


def _by_length(jobs: Iterable[FinishedJob]) -> list[list[FinishedJob]]:
    return grouped(sorted(jobs, key=lambda job: job.manifest.steps), lambda job: job.manifest.steps)


def names(links: Sequence[LinkCurve]) -> list[str]:
    """`teacher → student` of each; where several share that, with the settings in which they differ."""
    plain = [f"{link.teacher.name} → {link.student.name}" for link in links]
    settings = [
        {**link.settings, **({"baseline epochs": link.baseline.epochs} if link.baseline else {})} for link in links
    ]
    counts, full = Counter(plain), []
    for name, own in zip(plain, settings, strict=True):
        if counts[name] > 1:
            others = [other for other, same in zip(settings, plain, strict=True) if same == name]
            differ = [key for key in own if any(other.get(key) != own[key] for other in others)]
            name = ", ".join([name, *(f"{key} {_short(own[key])}" for key in differ)])
        full.append(name)
    return full


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text[:8] if len(text) == len(hash_json("")) else text
