"""How long a run will take on the device at hand, from a few real steps of each job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from compt.bench.step import Setup, TrainingStep
from compt.bench.tune import trial_of, tuned
from compt.plan.jobs import Job
from compt.recipe.engine import changed_engine
from compt.recipe.read import split_batch
from compt.recipe.schema import Recipe
from compt.train.micro_batch import Trial, find_micro_batch


def seconds_per_step(job: Job, recipe: Recipe, device: torch.device, world_size: int = 1, base: Path = Path()) -> float:
    """Median seconds of a training step of `job`, on random images and captions as long as planned.

    All ranks call it. `base` is the folder that relative paths of the recipe start from.
    """
    setup = Setup.of_job(job, recipe, base)
    share, micro = split_batch(recipe.optimizer.batch, world_size, setup.engine.micro_batch)
    if setup.engine.tune:
        chosen = tuned(trial_of(job, recipe, base, device)).chosen
        setup = replace(setup, engine=changed_engine(setup.engine, dict(chosen)))
        micro = chosen["micro_batch"] or share
    elif setup.engine.find_micro_batch:
        micro = find_micro_batch(Trial.of(job, recipe, base, device))
    setup = replace(setup, engine=setup.engine.model_copy(update={"micro_batch": micro}))
    step = TrainingStep(setup, device)
    return median(step.seconds(step.data(share)))


def seconds_of(
    jobs: Sequence[tuple[Job, int]], recipe: Recipe, device: torch.device, world_size: int = 1, base: Path = Path()
) -> float:
    """Seconds of training for (job, steps still to do); equal pairs of student and teacher are timed once."""
    known: dict[tuple[object, object], float] = {}
    total = 0.0
    for job, steps in jobs:
        key = (job.spec, job.active_teacher)  # the engine follows from the student's name, which is in its spec
        if key not in known:
            known[key] = seconds_per_step(job, recipe, device, world_size, base)
        total += steps * known[key]
    return total
