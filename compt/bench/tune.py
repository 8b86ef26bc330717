"""The settings with which a job trains fastest on the processes at hand, found by timed steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError

from compt.bench.step import Setup, TrainingStep, random_batch
from compt.bench.throughput import device_name
from compt.cost.counts import Tokens
from compt.cost.speed import way_of
from compt.dist import collectives as dist
from compt.errors import RunError
from compt.files import hash_json, private_folder, read_json, user_cache, write_json
from compt.plan.jobs import Job
from compt.recipe.engine import EngineConfig, changed_engine
from compt.recipe.schema import Recipe
from compt.train.micro_batch import Trial, apart, find_micro_batch
from compt.weights.artefact import versions

SECONDS = 900.0
"""No trial begins later than this, and none lasts longer than `TRIAL`."""
TRIAL = 300.0
GAIN = 0.03
"""Share of a step's time that another setting has to save."""
CLOSE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
"""Largest relative difference of loss and gradient norm from the first trial's; more is a fault of the setting."""

CHOICES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("text", ("packed", "buckets")),
    ("compile", ("blocks", "towers")),
    ("recompute", (True,)),
)
"""Keys in the order in which they are tried, with their values. The best of one key is kept for the next."""
TUNED = frozenset((*(key for key, _ in CHOICES), "micro_batch"))


@dataclass(frozen=True)
class Timing:
    """One process's median seconds of a step, and the loss and gradient norm of its last step."""

    seconds: float
    loss: float
    norm: float


@dataclass(frozen=True)
class Tuned:
    """The `chosen` settings of a job's engine, and all that were tried: settings, seconds a step or why there are none.

    `key` is a hash of what the choice depends on: models, batches, precision, engine, device, processes and versions.
    """

    key: str
    chosen: Mapping[str, Any]
    tried: tuple[Mapping[str, Any], ...]

    def lines(self) -> Iterator[str]:
        """What was tried, a line each, and what was chosen."""
        for one in self.tried:
            found = one["failure"] if one["seconds"] is None else f"{1e3 * one['seconds']:,.1f} ms a step"
            yield f"{_words(one['settings'])}: {found}"
        yield f"chosen: {_words(self.chosen)}"

    @classmethod
    def read(cls, value: Any, key: str, config: EngineConfig) -> Tuned | None:
        """The record `value` of a manifest or the cache; None where it has another key or is damaged."""
        try:
            found = cls(str(value["key"]), dict(value["chosen"]), tuple(map(dict, value["tried"])))
            changed_engine(config, dict(found.chosen))
        except (TypeError, KeyError, ValueError):
            return None
        return found if found.key == key and found.chosen.keys() <= TUNED else None


def with_chosen(config: EngineConfig, record: Any) -> EngineConfig:
    """`config` with the settings that the `record` in a manifest has chosen; without them where there is none."""
    if not config.tune or record is None:
        return config
    found = Tuned.read(record, str(record["key"]), config)
    return config if found is None else changed_engine(config, dict(found.chosen))


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def trial_of(job: Job, recipe: Recipe, base: Path, device: torch.device) -> Trial:
    """The trial of a planned job whose batches are as long as planned."""
    return replace(Trial.of(job, recipe, base, device), blueprint=Setup.of_job(job, recipe, base))


def tuned(trial: Trial, known: Any = None, measure: Callable[[Trial, int], list[Timing] | str] | None = None) -> Tuned:
    """The fastest settings that fit, for the keys that the recipe leaves out. All ranks call it and get the same.

    Takes `known`, the record of a run, or that of the user's cache, if it was made for the same `Tuned.key`; else
    measures and writes the cache. `trial.blueprint` is a `Setup`. Raises RunError where not even one image fits.
    """
    setup = trial.blueprint
    assert isinstance(setup, Setup)
    key = _key(setup, trial)

    def kept() -> Tuned | None:
        if (found := Tuned.read(known, key, setup.engine)) is not None:
            return found
        try:
            return Tuned.read(read_json(_cache(key)), key, setup.engine)
        except (OSError, ValueError, RunError):
            return None

    found = dist.from_main(kept)
    if found is None:
        found = _search(key, trial, setup, measure or _measure)
        record = asdict(found)

        def keep() -> None:
            private_folder(_cache(key).parent)
            write_json(_cache(key), record)

        dist.on_main(keep)
    return found


def _cache(key: str) -> Path:
    return user_cache("tuned") / f"{key}.json"


def _key(setup: Setup, trial: Trial) -> str:
    """All ranks have rank 0's."""
    how: dict[str, Any] = {
        "student": asdict(setup.student),
        "teacher": setup.teacher and asdict(setup.teacher),
        "captions": setup.captions,
        "tokens": setup.tokens,
        "loss": setup.optimizer.loss,
        "precision": setup.optimizer.precision,
        "engine": way_of(setup.optimizer, setup.engine, trial.share),
        "text": setup.engine.text,
        "given": sorted(setup.engine.model_fields_set & TUNED),
        "choices": CHOICES,
        "share": trial.share,
        "processes": dist.world_size(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return dist.from_main(lambda: hash_json({**how, "device": device_name(torch.device(trial.device))}))


def _search(key: str, trial: Trial, setup: Setup, measure: Callable[[Trial, int], list[Timing] | str]) -> Tuned:
    """Change one key at a time, and keep what is faster.

    Every rank follows the same course, as all see the times of all; rank 0's clock says when time is up.
    """
    started = time.monotonic()
    device = torch.device(trial.device).type
    given = set(setup.engine.model_fields_set)
    if setup.engine.text_buckets or setup.tokens is None:  # without lengths of captions, no text mode can save tokens
        given.add("text")
    config = setup.engine.on(device)
    tried: list[dict[str, Any]] = []
    first: Timing | None = None

    def attempt(config: EngineConfig, micro: int) -> float | None:
        """Seconds of a step on the slowest rank; None without them."""
        nonlocal first
        settings = {**{name: getattr(config, name) for name, _ in CHOICES}, "micro_batch": micro}
        found: list[Timing] | str
        if dist.from_main(lambda: time.monotonic() - started > SECONDS):
            found = "no time left"
        else:
            try:
                whole = changed_engine(config, {"micro_batch": micro if micro < trial.share else None})
                found = measure(replace(trial, blueprint=replace(setup, engine=whole)), micro)
            except (RunError, ValidationError) as error:
                found = str(error).splitlines()[0]
        if not isinstance(found, str):
            first = first or found[0]
            if not _close(first, found[0], CLOSE[setup.optimizer.precision]):
                found = "another loss or gradient than the first trial's"
        seconds = None if isinstance(found, str) else max(one.seconds for one in found)
        tried.append({"settings": settings, "seconds": seconds, "failure": found if isinstance(found, str) else None})
        return seconds

    fixed = "micro_batch" in given and not config.find_micro_batch

    def largest(config: EngineConfig) -> int:
        if fixed:
            return min(config.micro_batch or trial.share, trial.share)
        return find_micro_batch(replace(trial, blueprint=replace(setup, engine=config)))

    micro = largest(config)
    best = attempt(config, micro)
    for name, values in CHOICES:
        for value in values:
            # To compute blocks again only pays where the memory that it saves lets more images pass at once.
            useless = name == "recompute" and (fixed or micro == trial.share)
            same = getattr(config, name) == value or (value == "buckets" and config.text == "auto")
            if name in given or useless or same:
                continue
            try:
                other = changed_engine(config, {name: value})
            except ValidationError:  # does not work with this engine
                continue
            size = largest(other) if name == "recompute" else micro
            seconds = attempt(other, size)
            if seconds is not None and (best is None or seconds < (1 - GAIN) * best):
                config, micro, best = other, size, seconds
    chosen = {name: getattr(config, name) for name, _ in CHOICES if name not in given}
    return Tuned(key, {**chosen, "micro_batch": micro if micro < trial.share else None}, tuple(tried))


def _close(first: Timing, other: Timing, most: float) -> bool:
    pairs = ((first.loss, other.loss), (first.norm, other.norm))
    return all(abs(a - b) <= most * abs(a) for a, b in pairs)


def _spread(setup: Setup) -> Tokens:
    """Lengths of captions. Around a mean that a recipe gives, half of it and half more, a third of the captions each.

    Captions of one length have nothing to pad, and packed text would gain nothing.
    """
    if setup.tokens is None or isinstance(setup.tokens, Mapping):
        return setup.tokens
    return {max(1, round(setup.tokens * part)): 1.0 for part in (0.5, 1.0, 1.5)}


def _measure(trial: Trial, micro_batch: int) -> list[Timing] | str:
    return apart(trial, micro_batch, timed, "timing settings of a step", TRIAL)


def timed(trial: Trial, micro_batch: int) -> Timing:
    """Time steps of the trial's setup in this process, after steps with captions as long as the context."""
    setup = trial.blueprint
    assert isinstance(setup, Setup)
    step = TrainingStep(setup, torch.device(trial.device))
    # The same captions for every setting: those that `TrainingStep.data` makes depend on text mode and micro-batch.
    engine = setup.engine.model_copy(update={"text": "packed", "micro_batch": None})
    same = replace(step.setup, engine=engine, tokens=_spread(setup))
    longest = random_batch(replace(same, tokens=None), trial.share)
    data = random_batch(same, trial.share)
    # Both lengths several times: a compiler sees that lengths differ, and the largest memory is taken once.
    for batch in (longest, data, longest):
        step(batch)
    seconds = median(step.seconds(data, warm_up=1, repeats=5))
    report, norm = step(data)
    return Timing(seconds, float(report["loss"]), float(norm))
