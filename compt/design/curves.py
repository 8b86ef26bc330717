"""Epochs that a link needs to match its baseline: what was published, and what runs on disk have shown.

The procedure of figure 8 (CoM-PT, section 5.3.2): train a link for several lengths, each to the end of its own
schedule, and interpolate the accuracies at those ends. A value from the middle of a schedule is no point: its learning
rate had not come down. No torch in here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compt.cost.paper import LOSSLESS_POINTS
from compt.design.crossing import crossing, independent_draws, interval, paired_draws
from compt.design.runs import Lineage, Skipped, Training, read_run
from compt.errors import ConfigError, nearest
from compt.files import hash_json
from compt.models.presets import ModelSpec

Target = Literal["baseline", "lossless"]
MARGINS: dict[Target, float] = {"baseline": 0.0, "lossless": LOSSLESS_POINTS}
"""Points of accuracy that a target lies below the baseline."""


@dataclass(frozen=True)
class Match:
    """A link that reaches the accuracy of its individually trained baseline after `epochs` epochs.

    `position` is 1 for the first model that grows from another one. `images` are those of the training set, and
    `baseline_epochs` what the baseline took. `low` and `high` bound `epochs` where that is known. Without `distilled`
    only the weights were passed on, not the features.
    """

    student: ModelSpec
    teacher: ModelSpec
    position: int
    images: int
    baseline_epochs: float
    epochs: float
    source: str
    low: float | None = None
    high: float | None = None
    distilled: bool = True


@dataclass(frozen=True)
class Point:
    """All trainings of one length: `top1` is their mean in percent, `low` and `high` the mean ends of their intervals.

    The intervals are over pictures. `spread` is the standard deviation of top-1 over the trainings, None for a single
    one. `macs` are the mean of whole trainings, the teacher's share included.
    """

    epochs: float
    top1: float
    low: float
    high: float
    macs: float
    jobs: tuple[str, ...]
    seeds: tuple[int, ...]
    spread: float | None


@dataclass(frozen=True)
class LinkCurve:
    """Accuracy of one kind of link over its epochs, and the epochs at which it reaches `target`, in percent.

    `baseline` is the same model trained individually; `scratch` are other lengths of that. `low` and `high` are the
    95 % interval of the epochs, `interval` how it was drawn; a side outside the points is None. Without a match,
    `reason` says why, and `at_most` or `more_than` what is known of the epochs all the same. `settings` tell curves of
    the same models apart.
    """

    student: ModelSpec
    teacher: ModelSpec
    position: int
    images: int
    evaluation_set: str
    points: tuple[Point, ...]
    baseline: Point | None = None
    scratch: tuple[Point, ...] = ()
    target: float | None = None
    match: Match | None = None
    low: float | None = None
    high: float | None = None
    interval: Literal["paired", "independent"] | None = None
    at_most: float | None = None
    more_than: float | None = None
    reason: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def acceleration(self, epochs: float) -> float | None:
        """MACs of the baseline over those of the link trained for `epochs`, the teacher's forward passes included."""
        if self.baseline is None:
            return None
        an_epoch = float(np.mean([point.macs / point.epochs for point in self.points]))
        return self.baseline.macs / (an_epoch * epochs)

    def to_json(self) -> dict[str, Any]:
        """Plain values for files; with the accelerations at the match and at the ends of its interval."""
        ends = {"match": self.match.epochs if self.match else None, "low": self.high, "high": self.low}
        speeds = {key: None if epochs is None else self.acceleration(epochs) for key, epochs in ends.items()}
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
        return {
            "evaluation_set": self.evaluation_set,
            "target": self.target,
            "links": [
                {"name": name, **link.to_json()} for name, link in zip(names(self.links), self.links, strict=True)
            ],
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
    """Every kind of link that `runs` hold, against every length of its baseline, in the order of their chain.

    `on` names the evaluation set; by default the one that all runs report on. Links that differ in more than their
    length and warm-up are different kinds; with `average_seeds`, seeds are taken together. Baselines always are.
    `option` is how the caller's command takes `on`, for messages.
    Raises RunError for a folder that is no run, ConfigError for a set that no training was scored on.
    """
    found = [read_run(folder) for folder in runs]
    trainings = [training for run in found for training in run.trainings]
    skipped = [item for run in found for item in run.skipped]
    name = _evaluation_set(on, trainings, [run.primary for run in found], option)
    lineage = Lineage(trainings)
    scored: dict[str, Training] = {}
    for training in trainings:
        if name not in training.scores:
            skipped.append(Skipped(training.label, f"was not scored on {name}"))
        else:
            # A run folder that was copied holds the same model again.
            same = hash_json([training.hash, training.model_hash, training.scores[name].pins])
            scored.setdefault(same, training)
    return _CurveReader(name, target, average_seeds, lineage, list(scored.values()), skipped).curves()


def matches(
    runs: Sequence[Path],
    *,
    on: str | None = None,
    target: Target = "baseline",
    average_seeds: bool = False,
    option: str = "--set",
) -> list[LinkCurve]:
    """The links of `read_curves`, for the planner."""
    return read_curves(runs, on=on, target=target, average_seeds=average_seeds, option=option).links


def _evaluation_set(on: str | None, trainings: Sequence[Training], primaries: Iterable[str | None], option: str) -> str:
    known = sorted({name for training in trainings for name in training.scores})
    if on is None:
        named = sorted({name for name in primaries if name is not None})
        if len(named) != 1:
            reported = f"report on {' and '.join(named)}" if named else "name no set that they report on"
            raise ConfigError(
                f"the runs {reported}: give runs that report on one, or name it ({option} NAME); "
                f"scored were: {', '.join(known) or 'none'}"
            )
        on = named[0]
    if trainings and on not in known:
        raise ConfigError(
            f"{option} {on}: no training was scored on it by top-1{nearest(on, known)}; scored were: "
            f"{', '.join(known) or 'none'}"
        )
    return on


class _CurveReader:
    """Puts the trainings of some runs together to curves."""

    def __init__(
        self,
        name: str,
        target: Target,
        average_seeds: bool,
        lineage: Lineage,
        trainings: list[Training],
        skipped: list[Skipped],
    ) -> None:
        self.name = name
        self.target = target
        self.seeds = not average_seeds
        self.lineage = lineage
        self.skipped = skipped
        self.scratch = [training for training in trainings if training.parent_hash is None]
        self.grown = [training for training in trainings if training.parent_hash is not None]

    def curves(self) -> Curves:
        links = []
        for members in _grouped(self.grown, self._kind_of):
            specs = map(self.lineage.teacher_spec, members)
            spec = next((spec for spec in specs if spec is not None), None)
            if spec is None:
                reason = "its teacher's sizes are not known: give the run that trained the teacher too"
                self.skipped += [Skipped(member.label, reason) for member in members]
                continue
            links += self._against_baselines(self._one_warmup(members), spec)
        links.sort(key=lambda link: link.position)
        return Curves(self.name, self.target, links, self.skipped)

    def _kind_of(self, training: Training) -> dict[str, Any]:
        return {
            **training.settings,
            "teacher": self.lineage.teacher(training, seeds=self.seeds),
            "shards": training.data,
            "evaluation": training.scores[self.name].pins,
            **({"seed": training.seed} if self.seeds else {}),
        }

    def _family_of(self, training: Training) -> dict[str, Any]:
        """What a link and its baseline have in common."""
        settings = training.settings
        optimizer = {key: value for key, value in settings["optimizer"].items() if key != "lr"}
        pins = training.scores[self.name].pins
        return {
            "model": settings["model"],
            "data": [settings["data"], training.data],
            "optimizer": optimizer,
            **{f"pins {key}": value for key, value in pins.items()},
        }

    def _one_warmup(self, members: list[Training]) -> list[Training]:
        """Without those that share length and seed with one before, but not its warm-up: two points at one place."""
        first: dict[tuple[int, int], Training] = {}
        kept = []
        for member in members:
            other = first.setdefault((member.steps, member.seed), member)
            if member.result.get("warmup_steps") == other.result.get("warmup_steps"):
                kept.append(member)
            else:
                reason = f"has the length and the seed of {other.label}, but another warm-up"
                self.skipped.append(Skipped(member.label, reason))
        return kept

    def _against_baselines(self, members: list[Training], teacher: ModelSpec) -> list[LinkCurve]:
        one = members[0]
        family = self._family_of(one)
        same = [other for other in self.scratch if self._family_of(other) == family]
        lone = LinkCurve(
            student=one.spec,
            teacher=teacher,
            position=max(map(self.lineage.position, members)),
            images=int(one.result["data"]["images"]),
            evaluation_set=self.name,
            points=self._points(members),
            settings=_flat(self._kind_of(one)),
        )
        baselines = [other for other in same if "baseline" in other.kinds]
        groups = _grouped(baselines, lambda other: [other.settings, other.steps, other.result.get("warmup_steps")])
        if not groups:
            return [_with(lone, reason=self._no_baseline(family, one.spec))]
        links = []
        for group in groups:
            others = [other for other in same if other not in group and other.settings == group[0].settings]
            links.append(self._fitted(lone, members, group, self._points(others)))
        return links

    def _no_baseline(self, family: Mapping[str, Any], spec: ModelSpec) -> str:
        for other in self.scratch:
            own = self._family_of(other)
            if "baseline" in other.kinds and own["model"] == family["model"]:
                differ = [key for key in sorted(own.keys() | family.keys()) if own.get(key) != family.get(key)]
                return f"{other.label} is no baseline to it: {' and '.join(_WORDS.get(key, key) for key in differ)}"
        return f"there is no finished baseline of {spec.name}"

    def _points(self, trainings: Sequence[Training]) -> tuple[Point, ...]:
        """One for each length, in rising order."""
        groups = _grouped(sorted(trainings, key=lambda training: training.steps), lambda training: training.steps)
        return tuple(self._point(group) for group in groups)

    def _point(self, group: Sequence[Training]) -> Point:
        scores = [training.scores[self.name] for training in group]
        return Point(
            epochs=group[0].epochs,
            top1=float(np.mean([score.top1 for score in scores])),
            low=float(np.mean([score.low for score in scores])),
            high=float(np.mean([score.high for score in scores])),
            macs=float(np.mean([training.macs for training in group])),
            jobs=tuple(training.label for training in group),
            seeds=tuple(training.seed for training in group),
            spread=float(np.std([score.top1 for score in scores], ddof=1)) if len(group) > 1 else None,
        )

    def _fitted(
        self, lone: LinkCurve, members: list[Training], group: list[Training], scratch: tuple[Point, ...]
    ) -> LinkCurve:
        baseline, margin = self._point(group), MARGINS[self.target]
        epochs = [point.epochs for point in lone.points]
        weights = [len(point.jobs) for point in lone.points]
        goal = baseline.top1 - margin
        found = float(crossing(epochs, [point.top1 for point in lone.points], goal, weights))
        draws, how = self._draws(lone, members, baseline, group)
        low, high = interval(epochs, draws, margin, weights)
        link = _with(lone, baseline=baseline, scratch=scratch, target=goal, low=low, high=high, interval=how)
        if found == -np.inf:
            return _with(link, at_most=epochs[0], reason=f"its shortest schedule, {epochs[0]:.4g} epochs, is enough")
        if found == np.inf:
            reason = f"its longest schedule, {epochs[-1]:.4g} epochs, is not enough"
            return _with(link, more_than=epochs[-1], reason=reason)
        runs = sorted({job.rpartition("/")[0] for point in lone.points for job in point.jobs})
        match = Match(
            student=lone.student,
            teacher=lone.teacher,
            position=lone.position,
            images=lone.images,
            baseline_epochs=baseline.epochs,
            epochs=found,
            source=f"measured on {self.name}: {', '.join(runs)}",
            low=low,
            high=high,
            distilled=float(members[0].result["distill"]["alpha"]) > 0,
        )
        return _with(link, match=match)

    def _draws(
        self, lone: LinkCurve, members: list[Training], baseline: Point, group: list[Training]
    ) -> tuple[Any, Literal["paired", "independent"]]:
        """Accuracies [samples, points + 1] of a bootstrap, the baseline last."""
        columns = [*_grouped(sorted(members, key=lambda one: one.steps), lambda one: one.steps), group]
        answers = [[training.answers(self.name) for training in column] for column in columns]
        stored = [item for column in answers for item in column if item is not None]
        complete = len(stored) == sum(map(len, columns))
        if complete and len(stored[0][0]) > 1 and all(np.array_equal(ids, stored[0][0]) for ids, _ in stored):
            shares = [np.mean([item[1] for item in column if item is not None], axis=0) for column in answers]
            return paired_draws(shares), "paired"
        points = [*lone.points, baseline]
        ends = ([point.top1 for point in points], [point.low for point in points], [point.high for point in points])
        return independent_draws(*ends), "independent"


_WORDS = {
    "data": "it was trained on other data",
    "optimizer": "it was trained with another optimizer",
    "pins data": "it was scored on other pictures",
    "pins classnames": "it was scored with other class names",
    "pins templates": "it was scored with other templates",
    "pins label": "it was scored with other labels",
}


def _with(link: LinkCurve, **values: Any) -> LinkCurve:
    return LinkCurve(**{**vars(link), **values})


def _grouped(trainings: Iterable[Training], key: Callable[[Training], Any]) -> list[list[Training]]:
    groups: dict[str, list[Training]] = {}
    for training in trainings:
        groups.setdefault(hash_json(key(training)), []).append(training)
    return list(groups.values())


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def names(links: Sequence[LinkCurve]) -> list[str]:
    """`teacher → student` of each; where that stands for several, with the settings in which they differ."""
    plain = [f"{link.teacher.name} → {link.student.name}" for link in links]
    counts = Counter(plain)
    full = []
    for name, link in zip(plain, links, strict=True):
        if counts[name] > 1:
            told = [_told(other) for other, same in zip(links, plain, strict=True) if same == name]
            own = _told(link)
            differ = [key for key in own if any(other.get(key) != own[key] for other in told)]
            name = ", ".join([name, *(f"{key} {_short(own[key])}" for key in differ)])
        full.append(name)
    return full


def _told(link: LinkCurve) -> dict[str, Any]:
    values = dict(link.settings)
    if link.baseline is not None:
        values["baseline epochs"] = link.baseline.epochs
    return values


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text[:8] if len(text) == len(hash_json("")) else text
