"""A job's manifest on disk: its state, and the machines that it ran on."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from compt.bench.throughput import device_name
from compt.errors import RunError
from compt.files import read_json
from compt.plan.jobs import Job
from compt.recipe.schema import Recipe
from compt.train.checkpoint import find_latest
from compt.weights.artefact import versions

STATES = ("planned", "expanded", "training", "evaluated", "done")
"""expanded: `initial/` is there. training: a checkpoint may be there. evaluated: `model/` and its scores are there."""

MANIFEST = "manifest.json"


def read_record(path: Path, keys: Iterable[str], remedy: str) -> dict[str, Any]:
    """A JSON object that has `keys`. Raises RunError, which ends in `remedy`, for a damaged file."""
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}; {remedy}") from None
    if not isinstance(record, dict) or not set(keys) <= record.keys():
        raise RunError(f"{path} is damaged: it lacks {' or '.join(keys)}; {remedy}")
    return record


def read_manifest(folder: Path) -> dict[str, Any]:
    """A job's manifest; {"state": "planned"} before it begins. Raises RunError for a damaged one."""
    path = folder / MANIFEST
    if not path.exists():
        return {"state": "planned"}
    remedy = f"restore it, or remove {folder} to train it again"
    manifest = read_record(path, ("state", "hash", "result"), remedy)
    if manifest["state"] not in STATES:
        raise RunError(f"{path} is damaged: '{manifest['state']}' is not a state; {remedy}")
    return manifest


def is_finished(manifest: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a job is trained and scored as the recipe says."""
    return bool(manifest["state"] == "done" and manifest["sets"] == recipe.evaluation.identity())


def steps_left(job: Job, folder: Path) -> int:
    """Steps that `job` still has to train, by what is in its folder."""
    if (folder / "model").exists():
        return 0
    latest = find_latest(folder / "checkpoints")
    return job.steps - (int(latest.name.rpartition("-")[2]) if latest else 0)


def machine(device: torch.device) -> dict[str, str]:
    """Versions of the software, and the name of the processor or GPU."""
    return {**versions(), "device": device_name(device), "threads": str(torch.get_num_threads())}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
