"""Complete trainings, read from the manifests and score files of run folders alone. No torch in here.

A training that was stopped, or is still under way, is no end of a schedule and is left out with its reason.
"""

from __future__ import annotations

import json
import math
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from compt.errors import ComptError, RunError
from compt.files import hash_json, read_json
from compt.models.presets import PRESETS, ModelSpec

_FINISHED = ("evaluated", "done")
_UNFINISHED = ("planned", "expanded", "training")
_LENGTH = ("steps", "warmup_steps")
_SEEDS = ("seed", "order_seed")


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy of a finished model and its 95 % interval, in percent, over `n` pictures.

    `pins` are hashes of what the numbers depend on beside the model.
    """

    top1: float
    low: float
    high: float
    n: int
    pins: Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """One complete training. `kinds` are what the run calls it: a link, a try, a baseline, a control, or several.

    `hash` is that of its recipe, `result`; `model_hash` and `parent_hash` are those of weights. `data` is the
    fingerprint of the training shards. `macs` are those of the whole training, the teacher's share included.
    """

    run: Path
    job: str
    kinds: frozenset[str]
    spec: ModelSpec
    epochs: float
    steps: int
    seed: int
    macs: float
    hash: str
    model_hash: str
    parent_hash: str | None
    data: str
    result: Mapping[str, Any] = field(repr=False)
    scores: Mapping[str, Score] = field(repr=False)

    @property
    def label(self) -> str:
        """The run's folder, as it was given, and the job's name."""
        return f"{self.run}/{self.job}"

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the weights, but lengths, seeds and the teacher."""
        return {key: value for key, value in self.result.items() if key not in (*_LENGTH, *_SEEDS, "teacher")}

    def answers(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
        """Ids [n] of the pictures of a set and whether each was right [n]; None where they are missing or torn."""
        path = self.run / "jobs" / self.job / "scores" / f"{quote(name, safe=' ()')}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                return stored["ids"], stored["correct"].astype(bool)
        except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error):
            return None


@dataclass(frozen=True)
class Skipped:
    """A job that gives no point, and why."""

    job: str
    reason: str


@dataclass(frozen=True)
class Run:
    """What one run folder holds. `primary` is the evaluation set that its report is about."""

    primary: str | None
    trainings: list[Training]
    skipped: list[Skipped]


def read_run(folder: Path) -> Run:
    """Read FOLDER/run.json and every manifest below FOLDER/jobs.

    Raises RunError where there is no run, or run.json is damaged. What is wrong with a manifest stands in `skipped`.
    """
    state = _state(folder)
    names: dict[str, set[str]] = {}
    for job in sorted(state["jobs"], key=lambda job: job.get("same_as") is not None):
        names.setdefault(job.get("same_as") or job["name"], set()).add(job["kind"])
    begun = sorted(path.parent.name for path in folder.glob("jobs/*/manifest.json"))
    trainings, skipped = [], []
    for name in [*names, *(name for name in begun if name not in names)]:
        found = _training(folder, name, names.get(name, set()), state["data_fingerprint"])
        if isinstance(found, Training):
            trainings.append(found)
        else:
            skipped.append(Skipped(f"{folder}/{name}", found))
    return Run(state["primary"], trainings, skipped)


def _read(path: Path) -> Any:
    """JSON without lone surrogates, which no terminal and no file takes."""
    value = read_json(path)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _state(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        state = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{folder} is no run folder: there is no {path.name} in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    _check_state(path, state)
    return dict(state)


def _check_state(path: Path, state: Any) -> None:
    if not isinstance(state, dict) or not {"jobs", "data_fingerprint", "primary"} <= state.keys():
        raise RunError(f"{path} is damaged: it lacks jobs or data_fingerprint or primary")
    _check_text(path, "data_fingerprint", state["data_fingerprint"])
    _check_text(path, "primary", state["primary"], none=True)
    jobs = state["jobs"]
    if not isinstance(jobs, list) or not all(isinstance(job, dict) and {"name", "kind"} <= job.keys() for job in jobs):
        raise RunError(f"{path} is damaged: each of its jobs should have a name and a kind")
    for at, job in enumerate(jobs):
        for key in ("name", "kind", "same_as"):
            _check_text(path, f"jobs.{at}.{key}", job.get(key), none=key == "same_as")


def _check_text(path: Path, key: str, value: Any, *, none: bool = False) -> None:
    if not (isinstance(value, str) or (none and value is None)):
        wanted = "a text or null" if none else "a text"
        raise RunError(f"{path} is damaged: {key} = {textwrap.shorten(ascii(value), 60)}: should be {wanted}")


def _training(folder: Path, name: str, kinds: Iterable[str], data: str) -> Training | str:
    """A complete training, or why there is none."""
    path = folder / "jobs" / name / "manifest.json"
    try:
        manifest = _read(path)
        state = manifest["state"]
        if state in _UNFINISHED:
            return f"is not finished ({state})"
        if state not in _FINISHED:
            return f"its manifest is damaged: '{state}' is no state"
        done, steps = int(manifest["trained"]["steps"]), int(manifest["steps"])
        if done != steps:
            return f"was trained for {done} of {steps} steps: that is not the end of its schedule"
        parent = manifest["parent_hash"]
        training = Training(
            run=folder,
            job=name,
            kinds=frozenset({str(manifest["kind"]), *kinds}),
            spec=_spec(manifest["spec"]),
            epochs=_positive(manifest, "epochs"),
            steps=steps,
            seed=int(manifest["seed"]),
            macs=_positive(manifest["cost"], "total_macs"),
            hash=str(manifest["hash"]),
            model_hash=str(manifest["model_hash"]),
            parent_hash=None if parent is None else str(parent),
            data=str(data),
            result=dict(manifest["result"]),
            scores={key: _score(score) for key, score in manifest["scores"].items() if "top1" in score},
        )
        # What the fit looks up later: missing here, it is this manifest that is damaged.
        int(training.result["data"]["images"]), float(training.result["optimizer"]["lr"])
        if training.parent_hash is not None:
            float(training.result["distill"]["alpha"])
        json.dumps([training.result, manifest["scores"]], allow_nan=False)
        return training
    except FileNotFoundError:
        return "was not begun"
    except (OSError, ValueError, OverflowError, RecursionError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    except (KeyError, TypeError, ComptError) as error:
        return f"its manifest is damaged: {type(error).__name__}: {error}"


def _spec(values: Mapping[str, Any]) -> ModelSpec:
    spec = ModelSpec.from_dict(values)
    for key, like in vars(PRESETS["swin_t"]).items():
        if not _is_like(getattr(spec, key), like):
            raise TypeError(f"spec.{key} = {getattr(spec, key)!r}")
    return spec


def _is_like(value: Any, like: Any) -> bool:
    """Whether `value` is of the kind of `like`, and a number no larger than any model has."""
    if isinstance(like, tuple):
        return isinstance(value, tuple) and all(_is_like(item, 1) for item in value)
    if isinstance(like, int | float) and not isinstance(like, bool):
        kinds = (int,) if isinstance(like, int) else (int, float)
        return type(value) in kinds and abs(value) < 1e9
    return type(value) is type(like)


def _positive(values: Mapping[str, Any], key: str) -> float:
    value = float(values[key])
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} = {value}")
    return value


def _score(score: Mapping[str, Any]) -> Score:
    low, high = map(float, score["top1_interval"])
    top1 = float(score["top1"])
    if not (0 <= top1 <= 100 and -math.inf < low <= high < math.inf):
        raise ValueError(f"top1 = {top1}, top1_interval = {[low, high]}")
    return Score(top1, low, high, int(score["n"]), dict(score.get("pins", {})))


class Lineage:
    """Who grew from whom, over all trainings that were read.

    A teacher is named by the recipe and the data that made it where any run shows them, so that a link of a chain and a
    link that starts from the same folder (`chain.from`) have the same teacher; else by the hash of its weights.
    """

    def __init__(self, trainings: Sequence[Training]) -> None:
        self._by_hash = {training.model_hash: training for training in reversed(trainings)}
        self._names = {training.model_hash: [training.hash, training.data] for training in trainings}

    def ancestors(self, training: Training) -> list[Training]:
        """Teacher, the teacher's teacher and so on, as far as the runs show them."""
        found: list[Training] = []
        seen = {training.model_hash}
        parent = training.parent_hash
        while parent is not None and parent not in seen and parent in self._by_hash:
            seen.add(parent)
            found.append(self._by_hash[parent])
            parent = found[-1].parent_hash
        return found

    def position(self, training: Training) -> int:
        """Links that stand before this one: 1 for a model that grew from one trained from scratch, or from outside."""
        line = [training, *self.ancestors(training)]
        return len(line) - 1 + (line[-1].parent_hash is not None)

    def teacher(self, training: Training, *, seeds: bool) -> str:
        """What the teacher is, as a digest; without `seeds` the same for teachers that differ only in them."""
        assert training.parent_hash is not None
        line = self.ancestors(training)
        if seeds or not line:
            return hash_json(self._names.get(training.parent_hash, training.parent_hash))
        lengths = [[one.settings, one.steps, one.result.get("warmup_steps"), one.data] for one in line]
        oldest = line[-1].parent_hash
        return hash_json([*lengths, None if oldest is None else self._names.get(oldest, oldest)])

    def teacher_spec(self, training: Training) -> ModelSpec | None:
        """The teacher's sizes, from its own training or from the record of the expansion; None where neither is."""
        line = self.ancestors(training)
        if line:
            return line[0].spec
        try:
            record = _read(training.run / "jobs" / training.job / "initial" / "manifest.json")
            return _spec(record["expansion"]["teacher"])
        except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError, ComptError):
            return None
