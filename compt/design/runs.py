"""Finished jobs, read from the manifests and stored answers of run folders.

A job that was stopped, or still trains, is not at the end of its schedule: it is left out with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasPath, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from compt.design.sizes import position
from compt.errors import ComptError, ConfigError, RunError, nearest
from compt.files import hash_json, read_json
from compt.models.presets import ModelSpec
from compt.recipe.types import first_mistake

_LENGTH = ("steps", "warmup_steps")
_SEEDS = ("seed", "order_seed")
_LARGEST = 10**9
"""Larger sizes of a model are refused as damaged; so are a thousand times as many images or steps."""


Answers = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Ids [n] of a set's images in ascending order, and whether a model was right on each [n]."""


def score_file(run: Path, job: str, name: str) -> Path:
    """Where a job keeps its answers on the evaluation set `name`."""
    return run / "jobs" / job / "scores" / f"{quote(name, safe=' ()')}.npz"


def stored_answers(run: Path, job: str, name: str) -> Answers | None:
    """The answers of a job on a set with classes; None where they are missing or torn."""
    try:
        with np.load(score_file(run, job, name), allow_pickle=False) as stored:
            return stored["ids"], stored["correct"].astype(bool)
    except ComptError:  # a signal
        raise
    except Exception:  # numpy raises whatever the bytes of a damaged file lead to
        return None


class _RunFile(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, frozen=True)


class _ListedJob(_RunFile):
    name: str
    kind: str
    same_as: str | None = None


class _RunState(_RunFile):
    data_fingerprint: str
    primary: str | None
    jobs: list[_ListedJob]


class Score(_RunFile):
    """Top-1 accuracy of a finished model and its 95 % interval, in percent.

    `pins` are hashes of what the number depends on beside the model.
    """

    top1: float = Field(ge=0, le=100)
    top1_interval: tuple[float, float]
    pins: dict[str, Any] = {}


class Manifest(_RunFile):
    """What a finished job's manifest.json says.

    `hash` is that of its recipe, `result`; `model_hash` and `parent_hash` are those of weights. `macs` are those of the
    whole job, the teacher's share included.
    """

    kind: str
    spec: ModelSpec
    epochs: float = Field(gt=0)
    steps: int = Field(lt=_LARGEST * 1000)
    trained: int = Field(validation_alias=AliasPath("trained", "steps"))
    seed: int
    macs: float = Field(gt=0, validation_alias=AliasPath("cost", "total_macs"))
    hash: str
    model_hash: str
    parent_hash: str | None
    images: int = Field(gt=0, lt=_LARGEST * 1000, validation_alias=AliasPath("result", "data", "images"))
    lr: float = Field(validation_alias=AliasPath("result", "optimizer", "lr"))
    alpha: float | None = Field(None, validation_alias=AliasPath("result", "distill", "alpha"))
    result: dict[str, Any] = Field(repr=False)
    scores: dict[str, Score] = Field(repr=False)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for key, size in vars(self.spec).items():
            for one in size if isinstance(size, tuple) else (size,):
                if isinstance(one, int | float) and abs(one) >= _LARGEST:
                    raise ValueError(f"spec.{key}: no model is that large")
        if self.parent_hash is not None and self.alpha is None:
            raise ValueError("result.distill.alpha: is missing")
        json.dumps([self.result, [score.pins for score in self.scores.values()]], allow_nan=False)
        return self


@dataclass(frozen=True)
class FinishedJob:
    """A job that trained to its end. `kinds` are what its run calls it: link, try, baseline, control, or several.

    `data` is the fingerprint of the training shards.
    """

    run: Path
    name: str
    kinds: frozenset[str]
    data: str
    manifest: Manifest

    @property
    def label(self) -> str:
        """The run's folder, as it was given, and the job's name."""
        return f"{self.run}/{self.name}"

    @property
    def is_control(self) -> bool:
        """Whether it is a control and nothing else: its length is that of a link, or what links cost."""
        return self.kinds == {"control"}

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the weights, except lengths, seeds and the teacher."""
        return {key: value for key, value in self.manifest.result.items() if key not in (*_LENGTH, *_SEEDS, "teacher")}

    @property
    def warmup_steps(self) -> int | None:
        """Steps of warm-up, where the recipe has them."""
        return self.manifest.result.get("warmup_steps")

    def answers(self, name: str) -> Answers | None:
        """Ids [n] of a set's images and whether each was right [n]; None where they are missing or torn."""
        return stored_answers(self.run, self.name, name)


@dataclass(frozen=True)
class Skipped:
    """A job that gives no point, and why."""

    job: str
    reason: str


@dataclass(frozen=True)
class Run:
    """What one run folder holds. `primary` is the evaluation set that its report is about."""

    primary: str | None
    jobs: list[FinishedJob]
    skipped: list[Skipped]


def read_run(folder: Path) -> Run:
    """Read FOLDER/run.json and every manifest below FOLDER/jobs, those that run.json no longer lists too.

    Raises RunError where there is no run, or run.json is damaged. Problems of manifests are listed in `skipped`.
    """
    path = folder / "run.json"
    try:
        state = _RunState.model_validate(_read(path))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder} is not a run folder: it has no {path.name}") from None
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {first_mistake(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    kinds: dict[str, set[str]] = {}
    # Jobs that trained come before those that are the same model under another name.
    for job in sorted(state.jobs, key=lambda job: job.same_as is not None):
        kinds.setdefault(job.same_as or job.name, set()).add(job.kind)
    for manifest in sorted(folder.glob("jobs/*/manifest.json")):
        kinds.setdefault(manifest.parent.name, set())
    found = Run(state.primary, [], [])
    for name, known in kinds.items():
        result = _job(folder, name, known, state.data_fingerprint)
        if isinstance(result, FinishedJob):
            found.jobs.append(result)
        else:
            found.skipped.append(Skipped(f"{folder}/{name}", result))
    return found


def _read(path: Path) -> Any:
    """JSON without lone surrogates, which no terminal and no file takes."""
    value = read_json(path)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _job(folder: Path, name: str, kinds: Iterable[str], data: str) -> FinishedJob | str:
    """A finished job, or why there is none."""
    try:
        values = _read(folder / "jobs" / name / "manifest.json")
        if values["state"] not in ("evaluated", "done"):
            return f"is not finished ({values['state']})"
        # Retrieval sets have no top-1.
        scores = {key: score for key, score in dict(values["scores"]).items() if "top1" in score}
        manifest = Manifest.model_validate({**values, "scores": scores})
    except FileNotFoundError:
        return "was not begun"
    except ValidationError as error:
        return f"its manifest is damaged: {first_mistake(error)}"
    except (KeyError, TypeError, ComptError) as error:
        return f"its manifest is damaged: {type(error).__name__}: {error}"
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        return f"its manifest cannot be read: {error}"
    if manifest.trained != manifest.steps:
        return f"was trained for {manifest.trained} of {manifest.steps} steps: that is not the end of its schedule"
    return FinishedJob(folder, name, frozenset({manifest.kind, *kinds}), data, manifest)


@dataclass(frozen=True)
class ScoredJobs:
    """The finished jobs of some runs that were scored on one set, each once. `lineage` is over all finished jobs."""

    evaluation_set: str
    jobs: list[FinishedJob]
    lineage: Lineage
    skipped: list[Skipped]


def read_scored(runs: Sequence[Path], on: str | None, option: str) -> ScoredJobs:
    """Jobs of `runs` that were scored on the set `on`, or without it on the one set that all runs report on.

    `option` is how the caller's command takes `on`, for messages. Raises RunError for a folder that is no run,
    ConfigError for a set that no job was scored on.
    """
    found = [read_run(folder) for folder in runs]
    jobs = [job for run in found for job in run.jobs]
    skipped = [item for run in found for item in run.skipped]
    name = _evaluation_set(on, jobs, [run.primary for run in found], option)
    skipped += [Skipped(job.label, f"was not scored on {name}") for job in jobs if name not in job.manifest.scores]
    scored: dict[str, FinishedJob] = {}
    for job in jobs:
        if name in job.manifest.scores:
            # A run folder that was copied holds the same model again.
            same = [job.manifest.hash, job.manifest.model_hash, job.manifest.scores[name].pins]
            scored.setdefault(hash_json(same), job)
    return ScoredJobs(name, list(scored.values()), Lineage(jobs), skipped)


def _evaluation_set(on: str | None, jobs: Sequence[FinishedJob], primaries: Iterable[str | None], option: str) -> str:
    known = sorted({name for job in jobs for name in job.manifest.scores})
    shown = f"scored were: {', '.join(known) or 'none'}"
    if on is None:
        named = sorted({name for name in primaries if name is not None})
        if len(named) != 1:
            reported = f"report on {' and '.join(named)}" if named else "name no set that they report on"
            raise ConfigError(f"the runs {reported}: give runs that report on one, or name it ({option} NAME); {shown}")
        on = named[0]
    if jobs and on not in known:
        raise ConfigError(f"{option} {on}: no job was scored on it by top-1{nearest(on, known)}; {shown}")
    return on


def grouped(jobs: Iterable[FinishedJob], key: Callable[[FinishedJob], Any]) -> list[list[FinishedJob]]:
    """Jobs with equal keys together, in the order of their first."""
    groups: dict[str, list[FinishedJob]] = {}
    for job in jobs:
        groups.setdefault(hash_json(key(job)), []).append(job)
    return list(groups.values())


class Lineage:
    """Which job's model another one grew from, over all jobs that were read.

    A teacher is named by the recipe and the data that made it where any run shows them, so that a link of a chain and a
    link that starts from the same folder (`chain.from`) have the same teacher; else by the hash of its weights.
    """

    def __init__(self, jobs: Sequence[FinishedJob]) -> None:
        self._by_hash = {job.manifest.model_hash: job for job in reversed(jobs)}
        self._names = {job.manifest.model_hash: [job.manifest.hash, job.data] for job in jobs}

    def ancestors(self, job: FinishedJob) -> list[FinishedJob]:
        """Teacher, the teacher's teacher and so on, as far as the runs show them."""
        found: list[FinishedJob] = []
        seen = {job.manifest.model_hash}
        parent = job.manifest.parent_hash
        while parent is not None and parent not in seen and parent in self._by_hash:
            seen.add(parent)
            found.append(self._by_hash[parent])
            parent = found[-1].manifest.parent_hash
        return found

    def position(self, job: FinishedJob) -> int:
        """The position that a plan would give the link, as far as the runs show the models before it."""
        before = [self.teacher_spec(one) for one in (job, *self.ancestors(job))]
        return position([spec for spec in before if spec is not None], job.manifest.images)

    def teacher(self, job: FinishedJob, *, seeds: bool) -> str:
        """What the teacher is, as a digest; without `seeds` the same for teachers that differ only in them."""
        line, oldest = self.ancestors(job), job.manifest.parent_hash
        lengths = []
        if line and not seeds:
            oldest = line[-1].manifest.parent_hash
            lengths = [[one.settings, one.manifest.steps, one.warmup_steps, one.data] for one in line]
        return hash_json([*lengths, oldest and self._names.get(oldest, oldest)])

    def teacher_spec(self, job: FinishedJob) -> ModelSpec | None:
        """The teacher's sizes, from its own job or from the record of the expansion; None where neither is."""
        line = self.ancestors(job)
        if line:
            return line[0].manifest.spec
        place = job.run / "jobs" / job.name
        try:
            # Older manifests do not have it, but what was expanded does.
            found = _read(place / "manifest.json").get("teacher_spec")
            found = found or _read(place / "initial" / "manifest.json")["expansion"]["teacher"]
            return TypeAdapter(ModelSpec).validate_python(found)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, ComptError):
            return None
