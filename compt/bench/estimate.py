"""How long a run will take on the device at hand, from a few real steps of each job."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from compt.bench.step import Setup, TrainingStep
from compt.plan.jobs import Job
from compt.recipe.read import split_batch
from compt.recipe.schema import Recipe


def seconds_per_step(job: Job, recipe: Recipe, device: torch.device, world_size: int = 1) -> float:
    """Median seconds of a training step on random pixels and captions as long as planned, on one process."""
    config = recipe.engine_of(job.spec.name)
    per_rank, micro = split_batch(recipe.optimizer.batch, world_size, config.micro_batch)
    step = TrainingStep(
        Setup(
            job.spec,
            job.teacher_spec if job.alpha else None,
            captions=recipe.data.captions,
            tokens=recipe.data.caption_tokens,
            precision=recipe.optimizer.precision,
            text_buckets=config.text_buckets,
            micro_batch=micro,
            loss_chunk=config.loss_chunk,
            image_to_text=recipe.optimizer.image_to_text,
            clip_grad_norm=recipe.optimizer.clip_grad_norm,
            compile=config.compile,
            engine=config.name,
            recompute=config.recompute,
        ),
        device,
    )
    return median(step.seconds(step.data(per_rank)))


def seconds_of(jobs: Sequence[tuple[Job, int]], recipe: Recipe, device: torch.device, world_size: int = 1) -> float:
    """Seconds of training for (job, steps still to do); equal pairs of student and teacher are timed once."""
    known: dict[tuple[object, object], float] = {}
    total = 0.0
    for job, steps in jobs:
        key = (job.spec, job.teacher_spec if job.alpha else None)  # of one name, and so of one engine
        if key not in known:
            known[key] = seconds_per_step(job, recipe, device, world_size)
        total += steps * known[key]
    return total
