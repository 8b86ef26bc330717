"""A recipe of the smallest models, its shards and its evaluation set, for tests of whole training runs and chains."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from compt.chain.run import prepare, run_chain
from compt.errors import Interrupted
from compt.files import sha256_file
from compt.plan.jobs import Plan
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Recipe
from compt.train import loop as trainer
from compt.train.metrics import read_metrics
from tests.helpers.shards import make_shards

IMAGES = 48
BATCH = 12
STEPS_PER_EPOCH = IMAGES // BATCH
FIRST, SECOND = "1-small", "2-large"

STRAGGLERS = {"step_seconds_max", "step_seconds_mean", "data_wait_max", "slowest_rank"}
TIMES = {"samples_per_s", "data_wait", "device_hours", "memory_gib", "mfu", *STRAGGLERS}
"""What a metrics line says of the machine, not of the model."""

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "data": {"train": "train/*.tar", "images": IMAGES, "captions": 2, "shuffle_shards": 2, "max_bad_share": 0.2},
    "family": {
        "common": {"context_length": 16, "patch_size": 16},
        "members": [
            {"name": "small", "preset": "vit_pico", "depth": 1, "embed_dim": 32},
            {"name": "large", "preset": "vit_pico", "depth": 2, "embed_dim": 48},
        ],
    },
    "chain": {
        "links": [
            {"model": "small", "train": {"steps": 6}, "warmup": {"steps": 2}},
            {"model": "large", "train": {"steps": 5}, "warmup": {"steps": 1}},
        ]
    },
    "baselines": {"train": {"steps": 4}, "warmup": {"steps": 1}},
    "optimizer": {"batch": BATCH, "precision": "fp32", "eps": 1e-4},
    "engine": {
        "device": "cpu",
        "workers": 0,
        "log_every": {"steps": 1},
        "checkpoint_every": {"steps": 3},
    },
    "evaluation": {
        "every": {"steps": 3},
        "validation": ["val/*.tar"],
        "primary": "held_out",
        "sets": [
            {"name": "held_out", "data": "eval/*.tar"},
            {"name": "choose", "data": "eval/*.tar", "role": "select"},
        ],
    },
}


def make_data(folder: Path, images: int = IMAGES) -> Path:
    """Shards to train on, to validate on, and an evaluation set of four classes as clip_benchmark lays them out."""
    make_shards(folder / "train", images, 4)
    make_shards(folder / "val", BATCH, 1)
    make_shards(folder / "eval", 20, 2, classes=4)
    (folder / "eval" / "classnames.txt").write_text("cat\ndog\nhouse\ntree\n")
    (folder / "eval" / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    return folder


def recipe_values(*changes: str) -> dict[str, Any]:
    """`RECIPE` with changes like those of `--set`; a value is YAML, and an empty one removes the key."""
    values = copy.deepcopy(RECIPE)
    for change in changes:
        path, _, text = change.partition("=")
        place: Any = values
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            if isinstance(place, dict):
                place = place.setdefault(part, {})
            else:
                place = place[part]
        if text:
            place[last] = yaml.safe_load(text)
        else:
            del place[last]
    return values


def recipe_of(*changes: str) -> Recipe:
    return parse_recipe(recipe_values(*changes))


def write_recipe(path: Path, *changes: str) -> Path:
    path.write_text(yaml.safe_dump(recipe_values(*changes)))
    return path


def chain(base: Path, run: Path, *changes: str, baselines: bool = False, controls: Any = ()) -> list[str]:
    """Run a whole chain in this process. Returns the messages."""
    said: list[str] = []
    context, plan = prepare(recipe_of(*changes), run, base=base, baselines=baselines, controls=controls)
    run_chain(context, plan, said.append)
    return said


def plan_of(base: Path, run: Path, *changes: str) -> Plan:
    return prepare(recipe_of(*changes), run, base=base)[1]


def manifest(run: Path, job: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "jobs" / job / "manifest.json").read_text())
    return values


def weights(run: Path, job: str, kind: str = "model") -> dict[str, Tensor]:
    (file,) = (run / "jobs" / job / kind).glob("*.safetensors")
    return load_file(file)


def weights_hash(run: Path, job: str, kind: str = "model") -> str:
    (file,) = (run / "jobs" / job / kind).glob("*.safetensors")
    return sha256_file(file)


def lines(run: Path, job: str) -> list[dict[str, Any]]:
    """The metrics of a job without values that depend on the machine or the time."""
    rows = read_metrics(run / "jobs" / job / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Run `action` in every training run at the start of step `step`, counted from 1."""
    original = trainer.learning_rate

    def learning_rate(done: int, settings: trainer.TrainSettings) -> float:
        if done + 1 == step:
            action()
        return original(done, settings)

    monkeypatch.setattr(trainer, "learning_rate", learning_rate)


def stopped_at(base: Path, run: Path, step: int, *changes: str, **options: Any) -> Interrupted:
    """Run a chain that gets SIGTERM in step `step` of its current job."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as caught:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        chain(base, run, *changes, **options)
    return caught.value
