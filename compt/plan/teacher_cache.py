"""What a cache of the teacher's captions would have, and save: a projection, as the captions of a job are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compt.cost.counts import text_tower
from compt.cost.memory import CAPTION_BYTES, CAPTION_TOKEN, PRECISION_BYTES
from compt.cost.speed import mean_tokens
from compt.plan.jobs import Job
from compt.recipe.schema import Recipe, TrainSet


@dataclass(frozen=True)
class CachedCaptions:
    """What `engine.teacher_cache` of `limit_bytes` does for one job.

    `whole_bytes`: of a cache with all captions of the training set; `kept_bytes`: of the cache of each process at the
    end of the job. Over all processes: of the captions of all steps, `first_misses` are in the first epoch, `hits` and
    `later_misses` in the others. `saved_macs`: what the teacher does not compute.
    """

    limit_bytes: int
    whole_bytes: float
    kept_bytes: float
    first_misses: float
    later_misses: float
    hits: float
    saved_macs: float


def cached_captions(recipe: Recipe, job: Job, processes: int) -> CachedCaptions | None:
    """The projection for `job`; None without a cache or a teacher.

    In each epoch a process draws a share p of all captions by chance. After e epochs it knows 1 - (1 - p)^e of them, or
    as many as fit. Texts that occur twice are taken as different ones. With sets of different weights, each is taken to
    have as many captions as at the smallest weight: there are at most so many.
    """
    limit, teacher, data = recipe.engine_of(job.spec.name).teacher_cache, job.active_teacher, recipe.data
    if limit is None or teacher is None:
        return None
    tokens = mean_tokens(teacher, data.caption_tokens)
    each = teacher.embed_dim * PRECISION_BYTES[recipe.optimizer.precision] + CAPTION_BYTES + CAPTION_TOKEN * tokens
    weight = min((one.weight for one in data.train if isinstance(one, TrainSet)), default=1.0)
    captions = data.images / weight * (data.caption_pool or data.captions)
    drawn = job.samples / job.epochs * data.captions / processes
    share, room = min(1.0, drawn / captions), min(1.0, limit / each / captions)
    known = hits = 0.0
    for epoch in range(math.ceil(job.epochs)):
        part = min(1.0, job.epochs - epoch)
        hits += part * drawn * min(room, known)
        known += part * share * (1 - known)
    hits *= processes
    first = min(1.0, job.epochs) * drawn * processes
    macs = sum(one.macs for one in text_tower(teacher, data.caption_tokens).values())
    return CachedCaptions(
        limit_bytes=limit,
        whole_bytes=captions * each,
        kept_bytes=captions * each * min(room, known),
        first_misses=first,
        later_misses=job.samples * data.captions - first - hits,
        hits=hits,
        saved_macs=hits * macs,
    )
