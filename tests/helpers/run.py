"""A run folder as a chain leaves it, with invented numbers and without training anything."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from compt.evaluate.encoder import save_result
from compt.evaluate.retrieval import RetrievalResult
from compt.evaluate.task import LONG
from compt.evaluate.zeroshot import ZeroShotResult
from compt.files import write_json
from compt.plan.jobs import Job, Plan, make_plan
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Recipe

CLASSES = 200
PICTURES = 400
COLOURS = ("red", "green", "blue", "orange", "purple", "teal", "brown", "pink", "grey", "black")
SHAPES = ("circle", "square", "triangle", "ring")
SIZES = ("tiny", "small", "large", "huge", "<wide> & low")
NAMES = [f"{size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES]
MACHINE = {
    "python": "3.11.7",
    "compt": "0.1.0",
    "torch": "2.11.0",
    "open_clip": "3.3.0",
    "timm": "1.0.31",
    "device": "Example CPU @ 2.10GHz",
    "threads": "2",
}

RECIPE: dict[str, Any] = {
    "name": "shapes",
    "seed": 0,
    "data": {"train": "shards/*.tar", "images": 7515, "captions": 2},
    "family": {"members": ["vit_nano", "vit_micro", "vit_mini"]},
    "chain": {
        "links": [
            {"model": "vit_nano", "train": {"epochs": 60}, "warmup": {"steps": 100}},
            {"model": "vit_micro", "train": {"epochs": 10}, "warmup": {"steps": 20}},
            {"model": "vit_mini", "train": {"epochs": 12}, "warmup": {"steps": 20}},
        ],
    },
    "baselines": {
        "train": {"epochs": 60},
        "warmup": {"steps": 100},
        "controls": ["equal_epochs", "equal_macs"],
    },
    "optimizer": {"batch": 128, "precision": "fp32"},
    "evaluation": {
        "every": {"epochs": 5},
        "primary": "test_style",
        "contact_sheet": "test_style",
        "sets": [
            {"name": "val_style", "data": "val/*.tar", "role": "select"},
            {"name": "test_style", "data": "test/*.tar"},
            {"name": "captions", "data": "test/*.tar", "task": "retrieval"},
        ],
    },
}

SHARES = {
    "1-vit_nano": 0.17,
    "2-vit_micro": 0.22,
    "3-vit_mini": 0.26,
    "baseline-vit_micro-s0": 0.20,
    "baseline-vit_mini-s0": 0.24,
    "control-equal_epochs": 0.11,
    "control-equal_macs": 0.13,
}
"""Top-1 on test_style, as a share."""


def recipe(**changes: Any) -> Recipe:
    """`RECIPE` with whole sections replaced; None takes one out."""
    values = {**copy.deepcopy(RECIPE), **changes}
    return parse_recipe({key: value for key, value in values.items() if value is not None})


def answers(share: float, seed: int, n: int = PICTURES, name: str = "test_style") -> ZeroShotResult:
    """A scored set with exactly the rounded share right. Hard images are hard for every model."""
    rng = np.random.default_rng(7)
    labels = rng.permutation(n) % CLASSES
    hardness = rng.random(n) + 0.15 * np.random.default_rng(seed).random(n)
    correct = np.zeros(n, bool)
    correct[np.argsort(hardness)[: round(share * n)]] = True
    wrong = (labels + 1 + np.random.default_rng(seed).integers(CLASSES - 1, size=n)) % CLASSES
    return ZeroShotResult(
        name=name,
        classes=CLASSES,
        ids=np.arange(n),
        labels=labels,
        predictions=np.where(correct, labels, wrong),
        ranks=np.where(correct, 0, 1 + np.random.default_rng(seed + 1).integers(60, size=n)),
        pins={"data": "ab12"},
        names=NAMES,
    )


def retrieved(share: float, seed: int, n: int = 100) -> RetrievalResult:
    rng = np.random.default_rng(seed)
    ranks = [rng.geometric(share, size=size) - 1 for size in (n, 2 * n)]
    owners, ids = np.repeat(np.arange(n), 2), np.arange(n)
    found = np.where(ranks[0] < 1, 2 * ids, (2 * ids + 7) % len(owners))
    return RetrievalResult("captions", ids, ranks[0], owners, ranks[1], found)


# Runs have the same scores again and again, and a score draws a thousand samples for its intervals once.
_answers, _retrieved = functools.cache(answers), functools.cache(retrieved)


def picture(label: int, size: int = 32) -> np.ndarray:
    """uint8 [3, size, size] of the shape that NAMES[label] describes."""
    words = NAMES[label].split()
    shape, colour = words[-1], words[-2]
    half = round(size * (0.16 + 0.06 * (label // (len(COLOURS) * len(SHAPES)))))
    box = [size // 2 - half, size // 2 - half, size // 2 + half, size // 2 + half]
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=3)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(size // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    return np.asarray(image).transpose(2, 0, 1)


def metrics_lines(job: Job, batch: int, until: int, share: float, every: int = 40) -> list[dict[str, Any]]:
    """The metrics that training logs up to step `until`."""
    rng = np.random.default_rng(job.steps)
    per_step = job.cost.total_macs / job.steps
    lines: list[dict[str, Any]] = []
    for step in sorted({*range(every, until + 1, every), *([until] if until == job.steps else [])}):
        done = step / job.steps
        start = 1.6 if job.teacher else 4.8
        task = 0.6 + (start - 0.6) * np.exp(-3 * done) + 0.05 * rng.standard_normal()
        row: dict[str, Any] = {"kind": "train", "step": step, "samples": step * batch, "epoch": 60 * done, "task": task}
        row |= {
            "loss": task,
            "lr": 1e-3 * (1 - done),
            "logit_scale": 14 + 20 * done,
            "grad_norm": 20 * float(np.exp(-6 * done)),
        }
        if job.teacher:
            r = 0.4 + 2.2 * np.exp(-2 * done)
            row |= {"r": r, "ifd": r * task, "loss": task * (1 + r)}
        row |= {"samples_per_s": 2200.0, "data_wait": 0.05, "device_hours": step * batch / 2200 / 3600}
        row |= {"nonfinite_steps": 0, "skipped_image": 0, "skipped_caption": 0, "skipped_tar": 0}
        row |= {"macs": step * per_step}
        lines.append(row)
        if step % (every * 7) == 0 or step + every > until:
            top1 = 100 * share * (1 - np.exp(-4 * done)) * (0.5 if not job.teacher else 0.9 + 0.1 * done)
            lines.append({"kind": "eval", "step": step, "samples": step * batch, "val_style/top1": top1})
    return lines


def write_job(
    folder: Path,
    job: Job,
    made: Plan,
    *,
    state: str = "done",
    share: float = 0.2,
    n: int = PICTURES,
    npz: bool = True,
    at: float = 1.0,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """The files of one job in `state`. A job in training has done the share `at` of its steps."""
    own = folder / "jobs" / job.name
    values: dict[str, Any] = {
        **job.to_json(),
        "state": state,
        "result": job.result,
        "parent_hash": "c0ffee" if job.teacher else None,
        "started": "2025-11-21T09:00:00Z",
        "machine": MACHINE,
        "processes": 1,
    }
    until = job.steps if state in ("evaluated", "done") else round(at * job.steps)
    if state in ("training", "evaluated", "done"):
        own.mkdir(parents=True, exist_ok=True)
        lines = metrics_lines(job, made.recipe.optimizer.batch, until, share)
        (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if state in ("evaluated", "done"):
        values |= {
            "trained": {
                "steps": job.steps,
                "samples": job.samples,
                "device_hours": job.samples / 2200 / 3600 * job.cost.sample_macs / made.jobs[0].cost.sample_macs,
                "nonfinite_steps": 0,
                "skipped_samples": {"image": 2, "caption": 0, "tar": 0},
                "few_captions": 31,
            },
            "model_hash": "f00d",
            "scores": _scores(own / "scores", made.recipe, share, len(job.name), n, npz),
        }
    if state == "done":
        values["finished"] = "2025-11-21T10:00:00Z"
    write_json(own / "manifest.json", {**values, **(manifest or {})})


def _scores(folder: Path, made: Recipe, share: float, seed: int, n: int, npz: bool) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for item in made.evaluation.sets:
        result: ZeroShotResult | RetrievalResult
        if item.task == "retrieval":
            result = _retrieved(share, seed)
        else:
            result = _answers(share * (1.0 if item.name == "test_style" else 0.9), seed, n, item.name)
        if npz:
            result.save(folder)
        if isinstance(result, RetrievalResult) and npz and made.evaluation.contact_sheet:
            arrays = {
                "images": np.stack([picture(label) for label in range(0, 192, 16)]),
                "ids": np.arange(12),
                "captions": np.array([f"a {NAMES[label]} on white" for label in range(0, 192, 16)]),
                "answers": np.array([f"a {NAMES[label + (label > 80)]} on white" for label in range(0, 192, 16)]),
                "right": np.arange(0, 192, 16) <= 80,
            }
            save_result(folder, "contact_captions", {"set": item.name, "pictures": 12}, arrays)
        scores[item.name] = {key: value for key, value in result.to_dict().items() if key not in LONG}
        if item.name == made.evaluation.contact_sheet and isinstance(result, ZeroShotResult) and npz:
            chosen = np.unique(np.linspace(0, n - 1, min(40, n)).round().astype(int))
            arrays = {
                "images": np.stack([picture(int(result.labels[at])) for at in chosen]),
                "ids": result.ids[chosen],
                "labels": result.labels[chosen],
                "classnames": np.array(NAMES),
            }
            save_result(folder, "contact", {"set": item.name, "pictures": len(chosen)}, arrays)
    return scores


def write_state(folder: Path, made: Plan) -> None:
    """run.json and recipe.yaml."""
    state = {
        "name": made.recipe.name,
        "started": "2025-11-21T09:00:00Z",
        "command": "compt chain recipes/shapes.yaml --baselines",
        "primary": made.recipe.evaluation.primary,
        "contact_sheet": made.recipe.evaluation.contact_sheet,
        "images": made.images,
        "batch": made.recipe.optimizer.batch,
        "captions": made.recipe.data.captions,
        "data_fingerprint": "9f8e7d6c5b4a",
        "jobs": [{**job.to_json(), "result": job.result} for job in made.jobs],
    }
    write_json(folder / "run.json", state)
    values = made.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def make_run(
    folder: Path,
    *,
    use: Recipe | None = None,
    baselines: bool = True,
    controls: Sequence[str] | None = None,
    states: Mapping[str, str] | None = None,
    shares: Mapping[str, float] = SHARES,
    **options: Any,
) -> Plan:
    """Write a run to `folder` and return its plan. Jobs are done unless `states` names another state ("planned": no
    folder at all); `options` go to `write_job`.
    """
    made = make_plan(use or recipe(), baselines=baselines, controls=controls if baselines else ())
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder, made)
    for job in made.jobs:
        state = (states or {}).get(job.name, "done")
        if job.same_as is None and state != "planned":
            write_job(folder, job, made, state=state, share=shares.get(job.name, 0.2), **options)
    return made
