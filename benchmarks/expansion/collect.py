"""Collects the results of the expansion study from its run folders into one file: scores, curves, comparisons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import rounded
from benchmarks.expansion.run import STEP_0, read_study
from benchmarks.expansion.settings import SETTINGS, Pair, Setting, Training, Variant, trainings
from compt.chain.record import read_manifest
from compt.errors import RunError
from compt.evaluate.encoder import load_arrays
from compt.evaluate.stats import paired_bootstrap
from compt.files import read_json
from compt.train.metrics import read_metrics

Record = dict[str, Any]


def collect(run: Path) -> Record:
    """The study in `run`, finished or not. Losses are in nats, accuracies in percent, differences in points.

    `variants` has one record per finished student, with its curve from step 0; `compared` has the difference of each
    variant from its pair's reference, over the seeds that both have; `missing` lists what is not finished.
    Raises RunError if `run` holds no study or a damaged file.
    """
    study = read_study(run)
    setting = SETTINGS[study["setting"]]
    planned = list(trainings(setting, sorted({*setting.seeds, *_seeds(run)})))
    manifests = {training.folder: read_manifest(_place(run, training)) for training in planned}
    done = [training for training in planned if manifests[training.folder]["state"] == "done"]
    finished = [manifests[training.folder] for training in done]
    students = [training for training in done if training.variant is not None]
    starts = [start for manifest in finished for start in manifest.get("starts", [])]
    values = {
        "setting": setting.name,
        "command": _command(setting, study["changes"]),
        "started": study["started"],
        "finished": max((manifest["finished"] for manifest in finished), default=None),
        "machines": _unique({**start["machine"], "processes": start["processes"]} for start in starts),
        "device_hours": sum(manifest["trained"]["device_hours"] for manifest in finished),
        "seeds": sorted({training.seed for training in students}),
        "select": setting.select,
        "report": setting.report,
        "pairs": [_pair(pair) for pair in setting.pairs],
        "teachers": [_teacher(t, manifests[t.folder], setting) for t in done if t.variant is None],
        "variants": [_student(t, t.variant, manifests[t.folder], setting, run) for t in students if t.variant],
        "compared": [item for pair in setting.pairs for item in _compared(pair, students, setting, run)],
        "missing": [training.folder for training in planned if training not in done],
    }
    return dict(rounded(values))


def _seeds(run: Path) -> set[int]:
    """The seeds with a run folder."""
    names = (path.name.rpartition("-s")[2] for path in run.glob("*/*-s*"))
    return {int(name) for name in names if name.isdigit()}


def _place(run: Path, training: Training) -> Path:
    return run / training.folder / "jobs" / training.job


def _command(setting: Setting, changes: Sequence[str]) -> str:
    sets = "".join(f" --set '{change}'" for change in changes)
    return f"python -m benchmarks.expansion --setting {setting.name}{sets}"


def _unique(items: Any) -> list[Record]:
    found: list[Record] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _pair(pair: Pair) -> Record:
    return {
        "name": pair.name,
        "teacher": pair.teacher,
        "student": pair.student,
        "train": pair.train,
        "warmup": pair.warmup,
        "reference": pair.reference,
        "variants": [variant.name for variant in pair.variants],
    }


def _teacher(training: Training, manifest: Record, setting: Setting) -> Record:
    return {
        "model": training.pair.teacher["preset"],
        "seed": training.seed,
        "epochs": manifest["epochs"],
        "lr": manifest["lr"],
        "minutes": 60 * manifest["trained"]["device_hours"],
        **_scores(manifest, setting),
    }


def _scores(record: Record, setting: Setting) -> Record:
    """The scores in a manifest, or in the record of step 0."""
    sets = dict.fromkeys((setting.select, setting.report))
    return {
        "validation_loss": record.get("validation_loss"),
        **{name: record["scores"][name]["top1"] for name in sets},
    }


def _student(training: Training, variant: Variant, manifest: Record, setting: Setting, run: Path) -> Record:
    place = _place(run, training)
    try:
        first = _scores(read_json(place / STEP_0), setting)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{place / STEP_0} cannot be read: {error}; remove {place} to train it again") from None
    select = f"{setting.select}/top1"
    curve = [{"step": 0, "epoch": 0.0, "validation_loss": first["validation_loss"], select: first[setting.select]}]
    curve += read_metrics(place / "metrics.jsonl", "eval")
    return {
        "pair": training.pair.name,
        "variant": variant.name,
        "seed": training.seed,
        "width": variant.width if variant.expanded else None,
        "depth": variant.depth if variant.expanded else None,
        "zero_new_outputs": variant.zero_new_outputs if variant.expanded else None,
        "distilled": variant.distilled,
        "parameters": manifest["parameters"],
        "epochs": manifest["epochs"],
        "steps": manifest["steps"],
        "lr": manifest["lr"],
        "minutes": 60 * manifest["trained"]["device_hours"],
        "step_0": first,
        "end": _scores(manifest, setting),
        "curve": {
            "epoch": [row["epoch"] for row in curve],
            "validation_loss": [_finite(row.get("validation_loss")) for row in curve],
            setting.select: [_finite(row.get(select)) for row in curve],
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _compared(pair: Pair, students: Sequence[Training], setting: Setting, run: Path) -> list[Record]:
    """Final accuracy of each variant minus its reference, paired over images and over the seeds that have both.

    Every seed is scored on the same images, so the bootstrap resamples an image for all seeds at once.
    """
    found = []
    sets = dict.fromkeys((setting.select, setting.report))
    for variant, name in itertools.product(pair.variants[1:], sets):
        seeds = [
            training.seed
            for training in students
            if training.pair == pair
            and training.variant == variant
            and Training(pair, training.seed, pair.variants[0]) in students
        ]
        if not seeds:
            continue
        own, others = [], []
        for seed in seeds:
            ids, correct = _answers(_place(run, Training(pair, seed, variant)), name)
            other_ids, other = _answers(_place(run, Training(pair, seed, pair.variants[0])), name)
            if not np.array_equal(ids, other_ids):
                raise RunError(f"{run}: {variant.name} and {pair.reference} were scored on different '{name}' images")
            own.append(correct)
            others.append(other)
        mean, low, high = paired_bootstrap(np.mean(own, axis=0), np.mean(others, axis=0), samples=2000)
        by_seed = [100 * float(np.mean(a) - np.mean(b)) for a, b in zip(own, others, strict=True)]
        found.append(
            {
                "pair": pair.name,
                "variant": variant.name,
                "set": name,
                "seeds": seeds,
                "by_seed": by_seed,
                "difference": mean,
                "low": low,
                "high": high,
            }
        )
    return found


def _answers(place: Path, name: str) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    arrays = load_arrays(place / "scores" / f"{name}.npz")
    return arrays["ids"], arrays["correct"].astype(np.float64)
