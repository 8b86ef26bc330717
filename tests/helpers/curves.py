"""Run folders with invented accuracies: manifests, answers, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compt.design.curves import LinkCurve, LinkEpochs, Match, Point
from compt.files import hash_json, write_json
from compt.models.presets import resolve

PICTURES = 1000
STEPS_PER_EPOCH = 10
SET = "test_style"
PINS = {"data": "pictures-1", "classnames": "names-1", "templates": "templates-1", "label": "cls"}
MACS_PER_EPOCH = {"link": 3e9, "try": 3e9, "baseline": 2e9, "control": 2e9}


def job(
    name: str,
    epochs: int,
    top1: float,
    *,
    kind: str = "link",
    model: str = "vit_micro",
    teacher: Mapping[str, Any] | None = None,
    outside: bool = False,
    seed: int = 0,
    lr: float = 1e-3,
    warmup: int = 2,
    alpha: float = 500.0,
    initial: str = "expanded",
    pins: Mapping[str, str] = PINS,
    repeat: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """The manifest of a finished training. `outside`: its teacher came through `chain.from`. `repeat`: other weights
    of the same recipe. `changes` replace fields."""
    steps = epochs * STEPS_PER_EPOCH
    spec = resolve(model).to_dict()
    result: dict[str, Any] = {
        "model": {key: value for key, value in spec.items() if key != "name"},
        "data": {"images": 5000, "captions": 4},
        "optimizer": {"batch": 500, "lr": lr},
        "steps": steps,
        "warmup_steps": warmup,
        "seed": seed,
        "order_seed": 1000 * seed + (teacher is not None),
    }
    if teacher is not None:
        result["teacher"] = teacher["model_hash" if outside else "hash"]
        result |= {"expand": {"width": "insert"}} if initial == "expanded" else {"initial": initial}
        result["distill"] = {"alpha": alpha}
    low, high = top1 - 2.7, top1 + 2.7
    return {
        "state": "done",
        "name": name,
        "kind": kind,
        "teacher": None if teacher is None or outside else teacher["name"],
        "start": "elsewhere/model" if teacher is not None and outside else None,
        "steps": steps,
        "epochs": float(epochs),
        "seed": seed,
        "spec": spec,
        "parameters": 1,
        "cost": {"total_macs": MACS_PER_EPOCH[kind] * epochs, "teacher_forward_macs": 0.0, "samples": 500 * steps},
        "hash": hash_json(result),
        "result": result,
        "parent_hash": None if teacher is None else teacher["model_hash"],
        "trained": {"steps": steps},
        "model_hash": hash_json(["weights", result, repeat]),
        "scores": {SET: {"top1": top1, "top1_interval": [low, high], "n": PICTURES, "pins": dict(pins)}},
        **changes,
    }


def right(top1: float, shift: int = 0) -> np.ndarray:
    """bool [PICTURES]: the rounded share of the pictures, the easy ones first; `shift` moves where they begin."""
    return np.roll(np.arange(PICTURES) < round(top1 / 100 * PICTURES), shift)


def write_answers(run: Path, name: str, correct: np.ndarray, first: int = 0) -> None:
    folder = run / "jobs" / name / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{SET}.npz", ids=np.arange(len(correct)) + first, correct=correct)


def write_run(
    folder: Path,
    jobs: Sequence[Mapping[str, Any]],
    *,
    primary: str | None = SET,
    shards: str = "shards-1",
    answers: bool = True,
    listed: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A run folder with `jobs`; `listed` are jobs that only run.json has."""
    for item in jobs:
        write_json(folder / "jobs" / item["name"] / "manifest.json", item)
        if answers:
            write_answers(folder, item["name"], right(item["scores"][SET]["top1"]))
    entries = [{"name": item["name"], "kind": item["kind"], "same_as": None} for item in jobs]
    state = {"primary": primary, "data_fingerprint": shards, "jobs": [*entries, *listed]}
    (folder / "run.json").write_text(json.dumps(state))
    return folder


NANO = job("1-vit_nano", 60, 15.0, model="vit_nano")
BASELINE = job("baseline-vit_micro-s0", 60, 25.0, kind="baseline")


def link(epochs: int, top1: float, name: str = "2-vit_micro", **options: Any) -> dict[str, Any]:
    """A vit_micro grown from NANO."""
    return job(name, epochs, top1, **{"teacher": NANO, **options})


def lengths(folder: Path, points: Mapping[int, float], baseline: Mapping[str, Any] | None = BASELINE) -> list[Path]:
    """One run for each length of the link: the same first link, and the baseline in the first run."""
    runs = []
    for epochs, top1 in points.items():
        extra = [baseline] if baseline is not None and not runs else []
        runs.append(write_run(folder / f"e{epochs}", [NANO, link(epochs, top1), *extra]))
    return runs


def own(asked: LinkEpochs, epochs: float | None = None, **known: Any) -> LinkCurve:
    """The curve of a link that was measured here: a match at `epochs`, or a bound."""
    baseline = Point(asked.baseline_epochs, 30.0, 29.0, 31.0, 1e15, ("run/baseline",), (0,), None)
    curve = LinkCurve(
        asked.student, asked.teacher, asked.position, asked.images, asked.distilled, "val", (), baseline, **known
    )
    if epochs is None:
        return curve
    ends = {key: known.get(key) for key in ("low", "high")}
    return replace(curve, match=Match(**vars(asked), epochs=epochs, source="here", **ends))
