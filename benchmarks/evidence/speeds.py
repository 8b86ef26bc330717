"""Seconds of a training step of each model and link on an idle core, for device times that other work does not touch.

Pieces run beside each other for hours, so their own times say little. Here every pair of student and teacher takes its
turn in each of several rounds: what slows the machine for a while slows all of them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import IDLE_LOAD, rounded
from benchmarks.evidence.pieces import IMAGES, RECIPE, Piece, base_recipe, link_recipe, macs_of
from compt.bench.step import Setup, TrainingStep
from compt.bench.throughput import device_name
from compt.data.batch import Batch
from compt.errors import RunError
from compt.files import read_json, write_json
from compt.plan.jobs import make_plan
from compt.weights.artefact import versions

SPEEDS = Path("docs/results/evidence/speeds.json")
ROUNDS = 5
LEAST_SECONDS = 0.5
"""Steps of a pair in a round take at least this long; there are at least three, after one that is not timed."""

SAMPLES_PER_SECOND = {"a": 4000, "ab": 2600, "b": 1700, "bc": 1100, "c": 700, "cd": 440, "d": 280}
"""Rough speed of each model from scratch on an idle core, for plans before SPEEDS has been measured."""


Pair = tuple[str, str | None]
"""The names of a student and of the teacher that distils into it, if any."""


def pair_of(piece: Piece) -> Pair:
    """What decides how long a step of the piece takes."""
    return piece.model, piece.teacher.model if piece.teacher and piece.alpha != 0 else None


def pairs(pieces: Iterable[Piece]) -> list[Pair]:
    """The pairs of all pieces, and each member of the family from scratch."""
    members = [member.name for member in base_recipe(RECIPE).family.members]
    return sorted(
        {*((name, None) for name in members), *map(pair_of, pieces)}, key=lambda pair: (pair[0], pair[1] or "")
    )


def measure(wanted: Iterable[Pair], rounds: int = ROUNDS, seconds: float = LEAST_SECONDS) -> list[dict[str, Any]]:
    """Median seconds of a step of each pair on one thread, and the range of its rounds' medians, without reading data.

    These are the steps of `compt bench throughput` and `--estimate`: random pixels and captions, as many tokens as
    planned.
    """
    torch.set_num_threads(1)
    timed: dict[Pair, tuple[TrainingStep, Batch]] = {}
    for pair in wanted:
        recipe = link_recipe(*pair)
        step = TrainingStep(Setup.of_job(make_plan(recipe).jobs[-1], recipe, Path()), torch.device("cpu"))
        timed[pair] = step, step.data(recipe.optimizer.batch)
    found: dict[Pair, list[float]] = {pair: [] for pair in timed}
    for _ in range(rounds):
        for pair, (step, data) in timed.items():
            found[pair].append(median(step.seconds(data, seconds=seconds)))
    return [
        {"model": model, "teacher": teacher, "seconds": median(times), "low": min(times), "high": max(times)}
        for (model, teacher), times in found.items()
    ]


def write_speeds(wanted: Iterable[Pair], out: Path = SPEEDS) -> None:
    """Measure and write `out`. Raises RunError on a machine that is not idle: its times would say nothing."""
    load = os.getloadavg()[0]
    if load > IDLE_LOAD:
        raise RunError(
            f"{out} is not written: the load average is {load:.1f}, and should be below {IDLE_LOAD}; stop what else "
            "runs and wait a few minutes"
        )
    steps = measure(wanted)
    about = {
        "command": "python -m benchmarks.evidence speeds",
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_name(torch.device("cpu")),
        "threads": 1,
        "system": platform.platform(),
        "load_average": load,
        "rounds": ROUNDS,
        "batch": base_recipe(RECIPE).optimizer.batch,
        "versions": versions(),
    }
    write_json(out, {**about, "steps": rounded(steps)})


def read_speeds(path: Path = SPEEDS) -> Mapping[Pair, float]:
    """Seconds of a step by pair; empty before they have been measured."""
    if not path.exists():
        return {}
    return {(item["model"], item["teacher"]): item["seconds"] for item in read_json(path)["steps"]}


def idle_minutes(piece: Piece, speeds: Mapping[Pair, float]) -> float:
    """Minutes of one idle core that the training of a piece takes, without its scores."""
    batch = base_recipe(RECIPE).optimizer.batch
    steps = piece.epochs * (IMAGES[piece.shards] // batch)
    if pair_of(piece) in speeds:
        return steps * speeds[pair_of(piece)] / 60
    share_of_link = macs_of(piece) / macs_of(Piece(piece.model, piece.epochs, shards=piece.shards))
    return share_of_link * steps * batch / SAMPLES_PER_SECOND[piece.model] / 60
