"""Scores of several models on the sets of a suite."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import braceexpand
import numpy as np
import torch
from numpy.typing import NDArray

from compt.dist import collectives as dist
from compt.errors import ArtefactError, ComptError, ConfigError, DataError
from compt.evaluate.encoder import Arrays, load_arrays
from compt.evaluate.sets import evaluate_set, open_set, task_class
from compt.evaluate.task import EvalSettings
from compt.files import hash_json, read_json
from compt.recipe.suite import Suite, SuiteSet
from compt.weights.artefact import Artefact

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetScore:
    """What one model reached on one set.

    record: what the result's .json holds; empty where the set could not be scored. answers: of the task's `answers`.
    ids: of the images that these are about. fault: why the set has no score.
    """

    record: Mapping[str, Any]
    answers: Sequence[NDArray[np.float64]] = ()
    ids: NDArray[np.int64] | None = None
    fault: ArtefactError | DataError | None = None


Scores = dict[str, dict[str, SetScore]]
"""By model, then by set. A set that is not there is missing."""


def is_missing(item: SuiteSet, base: Path) -> bool:
    """Whether nothing of the set, or of its training split, is on this machine: neither a folder nor a first shard."""
    return not all(any(_is_there(name, base) for name in data) for data in (item.data, item.train) if data)


def _is_there(pattern: str, base: Path) -> bool:
    if "://" in pattern:
        return True
    for name in braceexpand.braceexpand(pattern):
        path = base / Path(name).expanduser()
        while glob.has_magic(path.name) or glob.has_magic(str(path.parent)):
            path = path.parent
        if path.exists():
            return True
    return False


def model_labels(models: Sequence[str]) -> list[str]:
    """A short name for each model that the command line names: 3-vit_mini for RUN/jobs/3-vit_mini/model.

    Raises ConfigError for a model that is named twice.
    """
    parts = [[part for part in _parts(model) if part not in ("model", "jobs", "/")] or [model] for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    twice = next(at for at, part in enumerate(parts) if parts.index(part) < at)
    raise ConfigError(f"{models[twice]}: is named twice")


def _parts(model: str) -> tuple[str, ...]:
    path = Path(model)
    return (path.resolve() if path.name in ("", "..") or ".." in path.parts else path).parts


def score_suite(
    models: Mapping[str, Callable[[], Artefact]],
    suite: Suite,
    settings: EvalSettings,
    device: torch.device,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Scores:
    """Score every model on every set that is there and has what its task needs.

    All ranks call this and get the same scores. `models` opens each by its label, one at a time. A set that cannot be
    used gets a `fault`, and the others are still scored; so does every set of a model that is missing or damaged, as
    the models before it may have taken hours. With `out`, results are written to OUT/MODEL, and a set that was already
    scored there for the same weights, data, class names and precision is not scored again.
    `progress` gets one line for each score, on rank 0.

    Raises RunError where `out` cannot be written, and what `models` raises except ArtefactError and DataError.
    """
    missing = dist.from_main(lambda: {item.name for item in suite.sets if is_missing(item, settings.base)})
    found: Scores = {}
    for label, opened in models.items():
        items = [item for item in suite.sets if item.name not in missing and item.train != []]
        try:
            # Without on_all, ranks that can read the model would wait for one that cannot.
            artefact = dist.on_all(opened)
            weights = dist.on_all(partial(getattr, artefact, "hash")) if out else ""
        except (ArtefactError, DataError) as error:
            found[label] = {item.name: SetScore({}, fault=error) for item in items}
            if dist.is_main():
                progress(f"{label}: no score: {error}")
            continue
        settings = replace(settings, preprocess=artefact.preprocess)
        scored_by = {"weights": weights, "precision": str(settings.dtype)}
        # One file may hold several models, and settings of a model need not be in its weights.
        about = [artefact.spec.to_dict(), artefact.preprocess.to_dict(artefact.spec.image_size), sorted(artefact.state)]
        scored_by["model"] = hash_json([*about, settings.max_bad_share])
        folder = None if out is None else out / quote(label, safe=" ()")
        model = None
        found[label] = {}
        for item in items:
            result = None
            try:
                score = _stored(folder, item, settings, scored_by) if folder else None
                if score is None:
                    model = model if model is not None else dist.on_all(partial(artefact.load_model, device))
                    result = evaluate_set(model, item, settings)
                    if folder is not None:
                        result.scored_by = scored_by
                    score = SetScore(result.to_dict(), task_class(item.task).answers(result.arrays()), result.ids)
            except (ArtefactError, DataError) as error:
                # One broken set must not lose the hours that the others take.
                score = SetScore({}, fault=error)
            found[label][item.name] = score
            if dist.is_main():
                progress(f"{label}: {item.label_in_tables}: {_said(item, score)}")
            # After the score is shown, as it may turn out that it cannot be written.
            if result is not None and folder is not None:
                dist.on_main(partial(result.save, folder))
    return found


def _stored(folder: Path, item: SuiteSet, settings: EvalSettings, scored_by: Mapping[str, str]) -> SetScore | None:
    """The score of an earlier call, if it is of the same model on the same set."""

    def read() -> tuple[dict[str, Any], Arrays] | None:
        name = quote(item.name, safe=" ()")
        try:
            record, arrays = read_json(folder / f"{name}.json"), load_arrays(folder / f"{name}.npz")
        except (OSError, ValueError, ComptError):
            return None
        same = isinstance(record, dict) and record.get("scored_by") == scored_by and record.get("task") == item.task
        return (record, arrays) if same else None

    kept = dist.from_main(read)
    if kept is None:
        return None
    record, arrays = kept
    if record.get("pins") != open_set(item, settings, together=True).pins():
        return None
    return SetScore(record, task_class(item.task).answers(arrays), arrays["ids"])


def _said(item: SuiteSet, score: SetScore) -> str:
    if score.fault:
        return f"no score: {score.fault}"
    lines = [(line.label, next(iter(line.scores.items()))) for line in task_class(item.task).rows(score.record)]
    return ", ".join(f"{label or key} {value:.2f}" for label, (key, value) in lines if value is not None)
