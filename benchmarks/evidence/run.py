"""Runs pieces, resumes them after a stop, and keeps of each a small file of results."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout

from benchmarks.common import rounded
from benchmarks.evidence.pieces import (
    ALL,
    COSINE,
    KINDS,
    MEMBERS,
    OPERATORS,
    SELECT,
    SMALL_RATES,
    Kind,
    Piece,
    Rates,
    baseline_trials,
    pieces,
    small_trials,
)
from benchmarks.evidence.speeds import idle_minutes, read_speeds
from compt.chain.record import read_manifest
from compt.cli.main import app
from compt.errors import RunError
from compt.evaluate.encoder import load_arrays
from compt.files import read_json, write_bytes, write_json, write_text
from compt.train.metrics import FILE, read_metrics

RUNS = Path("runs/evidence")
RAW = Path("docs/results/evidence/raw")

SETS = "sets.npz"
"""The concept of each image of each evaluation set, the same for all pieces."""

Say = Callable[[str], None]


def is_done(piece: Piece, raw: Path = RAW) -> bool:
    """Whether its results are there."""
    return (raw / f"{piece.name}.json").exists()


def run(planned: Callable[[], Iterable[Piece]], max_minutes: float | None, say: Say) -> None:
    """Run the next of the `planned` pieces, as long as it ends within `max_minutes` by its plan.

    Several processes may run at once: each takes the next piece that no other has, and waits if there is none: the
    results of the others may settle a rate on which more pieces depend.
    """
    started = time.monotonic()

    def since() -> float:
        return time.monotonic() - started

    RUNS.mkdir(parents=True, exist_ok=True)
    speeds = read_speeds()
    # The lock that another process holds, by piece: that of the piece, or of a teacher that it trains again.
    others: dict[str, str] = {}
    # Again after each piece: its results may settle a rate, and with it what the next pieces are.
    while left := [piece for piece in planned() if not is_done(piece)]:
        piece = next((one for one in left if one.name not in others), None)
        if piece is None:
            lock = Path(others[left[0].name])
            say(f"{lock.stem}: waits for the process that has it")
            try:
                with FileLock(lock, timeout=-1 if max_minutes is None else max(60 * max_minutes - since(), 0)):
                    others.clear()
            except Timeout:
                return
            continue
        minutes = idle_minutes(piece, speeds)
        if max_minutes is not None and minutes > (rest := max_minutes - since() / 60):
            say(f"{piece.name}: would take {minutes:.0f} minutes, {rest:.0f} are left")
            return
        try:
            with FileLock(RUNS / f"{piece.name}.lock", timeout=0):
                if not is_done(piece):
                    train(piece)
                    collect(piece)
            others.clear()
        except Timeout as error:
            others[piece.name] = error.lock_file


def train(piece: Piece) -> None:
    """Train the piece, or continue; first its teacher, if only its results are there and not its model.

    Raises Timeout if another process has the teacher.
    """
    if piece.teacher is not None and not piece.teacher.model_folder(RUNS).exists():
        with FileLock(RUNS / f"{piece.teacher.name}.lock", timeout=0):
            train(piece.teacher)
    recipe = piece.recipe(Path.cwd() / RUNS)
    path = RUNS / f"{piece.name}.yaml"
    values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    for key in ("train", "validation"):
        place = values["data"] if key == "train" else values["evaluation"]
        place[key] = _absolute(place[key])
    for item in values["evaluation"]["sets"]:
        item["data"] = _absolute(item["data"])
    write_text(path, yaml.safe_dump(values, sort_keys=False))
    app(["chain", str(path), "--run-folder", str(RUNS / piece.name)], standalone_mode=False)


def _absolute(pattern: Any) -> Any:
    return str(Path.cwd() / pattern) if isinstance(pattern, str) else [str(Path.cwd() / one) for one in pattern]


def collect(piece: Piece, runs: Path = RUNS, raw: Path = RAW) -> None:
    """Write the results of a finished piece: NAME.json, and NAME.npz with one bit an image.

    Raises RunError if it was scored on other images than the pieces before.
    """
    place = runs / piece.name / "jobs" / f"1-{piece.model}"
    manifest = read_manifest(place)
    answers = {path.stem: load_arrays(path) for path in sorted((place / "scores").glob("*.npz"))}
    # In the retrieval set every image is a concept of its own, and correct if its own caption ranks first.
    labels: dict[str, Any] = {
        name: arrays.get("labels", np.arange(len(arrays["ids"]))).astype(np.uint16) for name, arrays in answers.items()
    }
    raw.mkdir(parents=True, exist_ok=True)
    if (raw / SETS).exists():
        known = load_arrays(raw / SETS)
        for name, found in labels.items():
            if not np.array_equal(found, known[name]):
                raise RunError(f"{place}: '{name}' has other images than the pieces before; build data/icons again")
    else:
        _write_arrays(raw / SETS, labels)
    bits: dict[str, Any] = {
        name: np.packbits(arrays["correct"] if "correct" in arrays else arrays["image_ranks"] == 0)
        for name, arrays in answers.items()
    }
    _write_arrays(raw / f"{piece.name}.npz", bits)
    recalls = (f"{way}_r{most}" for way in ("image_to_text", "text_to_image") for most in (1, 5, 10))
    r = [row["r"] for row in read_metrics(place / FILE, "train") if "r" in row]
    kept = ("top1", "top5", "mean_per_class", "n", *recalls)
    values = {
        "piece": piece.name,
        "model": piece.model,
        "epochs": piece.epochs,
        "seed": piece.seed,
        "teacher": piece.teacher.name if piece.teacher else None,
        "lr": piece.lr,
        "warmup": piece.warmup,
        "alpha": manifest["alpha"],
        "expanded": piece.expanded,
        "width": piece.width,
        "shards": piece.shards,
        "schedule": piece.schedule,
        "hash": manifest["hash"],
        "r": float(np.mean(r)) if r else None,
        "parameters": manifest["parameters"],
        "steps": manifest["steps"],
        "macs": manifest["cost"]["total_macs"],
        "device_hours": manifest["trained"]["device_hours"],
        "validation_loss": manifest["validation_loss"],
        "scores": {name: {key: item[key] for key in kept if key in item} for name, item in manifest["scores"].items()},
        "machine": manifest["starts"][-1]["machine"],
        "started": manifest["started"],
        "finished": manifest["finished"],
        "data_fingerprint": read_json(runs / piece.name / "run.json")["data_fingerprint"],
    }
    write_json(raw / f"{piece.name}.json", rounded(values))


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """At once, as another process may read them."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_bytes(path, data.getvalue())


def collect_again(planned: Iterable[Piece], say: Say) -> None:
    """Write the results of all finished pieces whose run folder is still there: for those that an older code wrote."""
    for piece in planned:
        if read_manifest(RUNS / piece.name / "jobs" / f"1-{piece.model}")["state"] == "done":
            collect(piece)
            say(piece.name)


def read_raw(raw: Path = RAW) -> tuple[list[dict[str, Any]], Rates]:
    """The results of all finished pieces, in order of worth, and the rates that they choose.

    `correct` of a piece has an array of 0 and 1 for each set.
    """
    results = _all_results(raw)
    rates = _best_rates(results)
    sets = load_arrays(raw / SETS) if results else {}
    order = {piece.name: at for at, piece in enumerate(pieces(rates))}
    found = []
    for name in sorted(results, key=lambda name: (order.get(name, len(order)), name)):
        bits = load_arrays(raw / f"{name}.npz")
        correct = {key: np.unpackbits(bits[key])[: len(sets[key])] for key in bits}
        found.append({**results[name], "correct": correct})
    return found, rates


def _all_results(raw: Path) -> dict[str, dict[str, Any]]:
    # The first pieces were collected without these.
    defaults = {"expanded": True, "r": None, "shards": ALL, "width": OPERATORS[0], "schedule": COSINE}
    return {path.stem: {**defaults, **read_json(path)} for path in raw.glob("*.json")}


def own_rates(raw: Path = RAW) -> Rates:
    """The best rates on SELECT of each model's baselines, and of its links, if all of their trials are done."""
    return _best_rates(_all_results(raw))


def _best_rates(found: Mapping[str, Any]) -> Rates:
    def best(tried: list[Piece]) -> float | None:
        if any(piece.name not in found for piece in tried):
            return None
        return max(tried, key=lambda piece: found[piece.name]["scores"][SELECT]["top1"]).lr

    alone = {model: best(baseline_trials(model)) for model in MEMBERS}
    chosen: dict[Kind, dict[str, float]] = {kind: {} for kind in KINDS}
    small = {(model, epochs): best(small_trials(model, epochs)) for epochs, one in SMALL_RATES.items() for model in one}
    rates = Rates(
        {model: lr for model, lr in alone.items() if lr},
        **chosen,
        small={long: lr for long, lr in small.items() if lr},
    )
    for kind, found_so_far in chosen.items():
        for model in MEMBERS[1:]:
            if (lr := best(rates.trials(model, kind))) is None:
                break
            found_so_far[model] = lr
    return rates
