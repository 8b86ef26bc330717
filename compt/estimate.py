"""How long a run will take on the device at hand, from a few real steps of each job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from compt.accumulate import cached_backward
from compt.config import Recipe, split_batch
from compt.engines.base import COMPUTE_DTYPES, AdamWSettings
from compt.engines.ddp import DataParallelEngine
from compt.macs import token_moments
from compt.models import build
from compt.planner import Job
from compt.task import ClipTask, DistillTask

WARM_UP, TIMED = 1, 3


def seconds_per_step(job: Job, recipe: Recipe, device: torch.device, world_size: int = 1) -> float:
    """Median seconds of a training step on random pixels and tokens of the mean caption length, on one process."""
    per_rank, micro = split_batch(recipe.optimizer.batch, world_size, recipe.engine.micro_batch)
    student = build(job.spec, device=device)
    if job.teacher_spec is not None and job.alpha:
        task: ClipTask = DistillTask(
            student,
            build(job.teacher_spec, device=device),
            alpha=job.alpha,
            text_buckets=recipe.engine.text_buckets,
            teacher_dtype=COMPUTE_DTYPES[recipe.optimizer.precision],
        )
    else:
        task = ClipTask(student, text_buckets=recipe.engine.text_buckets)
    engine = DataParallelEngine(task.module, AdamWSettings(), precision=recipe.optimizer.precision, device=device)
    generator = torch.Generator().manual_seed(0)
    spec, captions = job.spec, recipe.data.captions
    length = max(1, round(token_moments(recipe.data.caption_tokens, spec.context_length)[0]))
    images = torch.randn(per_rank, 3, spec.image_size, spec.image_size, generator=generator).to(device)
    tokens = torch.randint(1, spec.vocab_size - 2, (per_rank, captions, length), generator=generator)
    tokens[..., -1] = spec.vocab_size - 1
    times = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        cached_backward(task, engine, images, tokens.to(device), micro)
        engine.clip_grad_norm(None)
        engine.step()
        engine.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[WARM_UP:])


def seconds_of(jobs: Sequence[tuple[Job, int]], recipe: Recipe, device: torch.device, world_size: int = 1) -> float:
    """Seconds of training for (job, steps still to do); equal pairs of student and teacher are timed once."""
    known: dict[tuple[object, object], float] = {}
    total = 0.0
    for job, steps in jobs:
        key = (job.spec, job.teacher_spec if job.alpha else None)
        if key not in known:
            known[key] = seconds_per_step(job, recipe, device, world_size)
        total += steps * known[key]
    return total
