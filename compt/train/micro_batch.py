"""Trial steps in processes of their own, and the largest micro-batch that fits into memory, found by them.

A step that runs out of memory on one rank leaves the others waiting in a collective, and may have changed weights
already. So each rank starts a child process for each trial. The children form a process group of their own, and end
together when one of them fails; model, optimizer, random numbers and data of the ranks stay as they were.
(`accelerate.utils.find_executable_batch_size` repeats a function within one process, and does not know other ranks.)
"""

from __future__ import annotations

import datetime
import gc
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import _get_default_store

from compt.dist import collectives as dist
from compt.dist.child import answer_of, start_child
from compt.dist.rendezvous import HERE, is_host, of_attempt
from compt.dist.watch.causes import is_consequence
from compt.dist.watch.thread import LONG, beat
from compt.errors import RunError, is_out_of_memory
from compt.files import memory_sizes
from compt.plan.jobs import Job
from compt.plan.remedies import Room, advice
from compt.recipe.engine import fully_sharded
from compt.recipe.read import split_batch
from compt.recipe.schema import Recipe
from compt.train.accumulate import cached_backward
from compt.train.build import Blueprint, build_training

STEPS = 2
"""Steps of a trial. The first one creates the optimizer's moments, so the second needs most memory."""

_OTHER, _MEMORY, _TIME = "another rank's trial failed", "memory", "time"
_numbers = itertools.count()


@dataclass(frozen=True)
class Trial:
    """What the memory of a step depends on; `share` are the images of one process, with `captions` each."""

    blueprint: Blueprint
    captions: int
    device: str
    share: int

    @classmethod
    def of(cls, job: Job, recipe: Recipe, base: Path, device: torch.device) -> Trial:
        """The trial of a planned job, on as many processes as there are."""
        blueprint = Blueprint.of(job, recipe, base)
        share, _ = split_batch(recipe.optimizer.batch, dist.world_size(), blueprint.engine.micro_batch)
        return cls(blueprint, recipe.data.captions, str(device), share)


def find_micro_batch(trial: Trial, fits: Callable[[Trial, int], bool] | None = None) -> int:
    """The largest divisor of the share, up to `engine.micro_batch` if given, with which a step fits into memory.

    All ranks call it and get the same. `fits` says whether a size fits, the same on all ranks (default: by trial).
    Raises RunError when not even one image at a time fits, or when a trial fails for another reason.
    """
    # The trials are other processes, which cannot use memory that torch keeps for this one.
    release(torch.device(trial.device))
    most = min(trial.blueprint.engine.micro_batch or trial.share, trial.share)
    sizes = [size for size in range(1, most + 1) if trial.share % size == 0]
    found = largest(sizes, lambda size: (fits or fits_apart)(trial, size))
    if found is None:
        raise RunError(
            f"{trial.blueprint.student.name}: not even a micro-batch of one image fits into memory; "
            f"take engine.recompute, engine.name: {' or '.join(fully_sharded())}, or more GPUs "
            "(`compt plan --gpus …` counts)"
        )
    return found


def release(device: torch.device) -> None:
    """Give GPU memory that torch caches back to the device; a CPU has no such cache.

    Engines are part of cycles of references, so the garbage collector runs first.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending `sizes` that `fits`; None if none does. If a size fits, all smaller sizes fit.

    Tries the last size first, as it often fits, and then halves the range.
    """
    if fits(sizes[-1]):
        return sizes[-1]
    good, bad = -1, len(sizes) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(sizes[middle]):
            good = middle
        else:
            bad = middle
    return sizes[good] if good >= 0 else None


def fits_apart(trial: Trial, micro_batch: int, action: Callable[[Trial, int], None] | None = None) -> bool:
    """Whether steps with `micro_batch` fit on every rank, by a trial in a child process of each.

    The children run `action(trial, micro_batch)` (default: `steps`). Raises RunError for other faults.
    """
    return not isinstance(apart(trial, micro_batch, action or steps, "looking for a micro-batch"), str)


def apart(
    trial: Trial, micro_batch: int, action: Callable[[Trial, int], Any], doing: str, seconds: float = math.inf
) -> list[Any] | str:
    """What `action(trial, micro_batch)` returns on each rank, in a child process of each; or why it returns nothing.

    That is too little memory on a rank, or more than `seconds` there. `doing` says, for messages, what the trial is
    for. All ranks call it and get the same. Raises RunError, on all, for other faults.
    """
    beat(0, doing, LONG)
    number = next(_numbers)
    place = (dist.rank(), dist.world_size(), number)
    process, receiver = start_child(_try, place, trial, micro_batch, action)
    outcomes: list[tuple[str, Any]] = dist.gather_objects(_outcome(process, receiver, number, seconds))
    texts = [text for text, _ in outcomes]
    for known, why in ((_MEMORY, "does not fit into memory"), (_TIME, f"takes more than {seconds:.0f} s")):
        if known in texts:
            return why
    faults = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
    if faults:
        faults.sort(key=lambda text: _OTHER in text)
        dist.fail(RunError(f"{trial.blueprint.student.name}: {doing} failed: {faults[0]}"))
    return [value for _, value in outcomes]


def _outcome(process: Any, receiver: Any, number: int, seconds: float) -> tuple[str, Any]:
    """The outcome of this rank's trial: an empty text if it ran, `_MEMORY`, `_TIME` or another fault; and its value.

    A failed trial is noted in the store, and the other ranks then kill theirs, which would wait for it for ever.
    """
    store = _get_default_store() if dist.world_size() > 1 else None
    key, why, end = f"compt/fit/{number}/failed", "", time.monotonic() + seconds

    def give_up() -> bool:
        nonlocal why
        if store is not None and store.check([key]):
            why = _OTHER
        elif time.monotonic() > end:
            why = _TIME
        return bool(why)

    found: tuple[str, Any] | None = answer_of(process, receiver, give_up)
    if found is None:
        # SIGKILL is what the system sends when memory runs out.
        killed = process.exitcode == -signal.SIGKILL
        found = why or (_MEMORY if killed else f"its process ended with code {process.exitcode}"), None
    if found[0] and store is not None:
        store.set(key, "")
    return found


def _try(
    sender: Any, place: tuple[int, int, int], trial: Trial, micro_batch: int, action: Callable[[Trial, int], Any]
) -> None:
    value = None
    try:
        _join(place, torch.device(trial.device))
        value = action(trial, micro_batch)
        outcome = ""
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            outcome = _MEMORY
        elif is_consequence(error):
            outcome = f"{_OTHER} ({outcome})"
    sender.send((outcome, value))
    sender.close()
    # Leaving the process group in order would wait for the trials of other ranks.
    os._exit(0)


def _join(place: tuple[int, int, int], device: torch.device) -> None:
    """Form the process group of the trials, in the store of the ranks that started them."""
    rank, world, number = place
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        store: Any = torch_dist.HashStore()  # type: ignore[attr-defined]
    else:
        address = HERE if is_host(rank) else os.environ["MASTER_ADDR"]
        port, limit = int(os.environ["MASTER_PORT"]), datetime.timedelta(seconds=300)
        store = torch_dist.TCPStore(address, port, None, False, limit)  # type: ignore[attr-defined]
        store = of_attempt(f"fit/{number}", store)
    torch_dist.init_process_group(dist.backend_of(device), store=store, rank=rank, world_size=world)


def steps(trial: Trial, micro_batch: int) -> None:
    """Train as the recipe says, with drawn weights, random images and captions as long as the context."""
    task, engine = build_training(trial.blueprint, torch.device(trial.device))
    task.module.train()
    spec = trial.blueprint.student
    images = torch.zeros((trial.share, 3, spec.image_size, spec.image_size), device=engine.device).normal_()
    tokens = torch.full((trial.share, trial.captions, spec.context_length), 1, dtype=torch.int64)
    tokens[..., -1] = spec.vocab_size - 1
    lengths = torch.full(tokens.shape[:2], spec.context_length)
    for _ in range(STEPS):
        cached_backward(task, engine, images, tokens.to(engine.device), micro_batch, lengths)
        float(engine.step(1e-5, trial.blueprint.optimizer.clip_grad_norm))


def advise(job: Job, recipe: Recipe, device: torch.device, micro_batch: int) -> str:
    """What to change in the recipe after `job` has run out of this device's memory."""
    config = recipe.engine_of(job.spec.name)
    return advice(recipe, job, config, dist.world_size(), room_of(device), micro_batch)


def room_of(device: torch.device) -> Room:
    """Free and total bytes of a GPU, or of the machine's memory if the system reports them."""
    if device.type == "cuda":
        return Room(*torch.cuda.mem_get_info(device))
    return Room(*map(memory_sizes().get, ("MemAvailable", "MemTotal")))
