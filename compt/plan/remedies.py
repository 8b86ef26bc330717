"""What to change in a recipe when a job runs out of memory, with the plan's numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from compt.errors import RunError, first_line, is_out_of_memory
from compt.plan.forecast import memory_of, not_modelled, usable_bytes
from compt.plan.jobs import Job
from compt.recipe.engine import EngineConfig, changed_engine, fully_sharded
from compt.recipe.read import largest_divisor
from compt.recipe.schema import Recipe
from compt.text import count

SMALLER = 0.9
"""A remedy must need at most this share of what failed, by the same count."""


@dataclass(frozen=True)
class Room:
    """Bytes of a device, or of the machine's memory: free now, and in all; None if unknown."""

    free: int | None = None
    total: int | None = None


@contextlib.contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error within the block into a RunError with `advice()`."""
    text = ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = f"{advice()}\n({first_line(error)})"
    # Raised outside of the except clause: a chained traceback would keep its tensors alive.
    if text:
        raise RunError(text)


def advice(recipe: Recipe, job: Job, engine: EngineConfig, world_size: int, room: Room, micro_batch: int) -> str:
    """What failed while `job` trained with `micro_batch` images at once, and changes that may each suffice.

    The numbers are those of `compt plan`, for each of `world_size` processes. A change is named if the recipe may have
    it, it needs less than nine tenths of what failed and fits into the device, as far as its size is known.
    """
    share = recipe.optimizer.batch // world_size
    # Settings that go with no micro-batch do not go with one of the whole share either.
    tried = {} if micro_batch == (engine.micro_batch or share) else {"micro_batch": micro_batch}

    def needed(change: Mapping[str, Any]) -> float:
        try:
            other = changed_engine(engine, {**tried, **change})
        except ValidationError:
            return math.inf
        return memory_of(recipe, job, other.name, world_size, recompute=other.recompute, config=other).total_bytes

    now, distils = needed({}), job.active_teacher is not None
    most = SMALLER * now
    if room.total is not None:
        most = min(most, usable_bytes(room.total))
    smaller = ({"micro_batch": size} for size in range(micro_batch - 1, 0, -1) if share % size == 0)
    fitting = next((change for change in smaller if needed(change) <= most), None)
    others = [change for change in _changes(engine, world_size, share, distils) if needed(change) <= most]
    changes = [fitting, *others] if fitting else others
    named = [f"  {_written(change, engine, micro_batch)}: {count(needed(change))}B" for change in changes]
    if not named:
        least = _least(needed, fully_sharded(background=True)[0] if world_size > 1 else engine.name)
        text = f"  No single change is enough by the plan's count, and all together take {count(least)}B:"
        named = [f"{text} take more GPUs, or larger ones"]
    held = " and ".join(
        f"{count(size)}B {word}" for size, word in ((room.free, "free"), (room.total, "in all")) if size is not None
    )
    return (
        f"{job.name}: out of memory{f' ({held})' if held else ''}; the plan counts {count(now)}B for each of "
        f"{world_size} processes. Any of these changes of the recipe may do, and none changes the result:\n"
        + "\n".join(named)
        + _not_counted(engine)
    )


def _changes(engine: EngineConfig, world_size: int, share: int, distils: bool) -> Iterator[dict[str, Any]]:
    """Values of `engine` that may suffice, without smaller micro-batches. `share`: images of a process."""
    if not engine.recompute:
        yield {"recompute": True}
    if world_size > 1:
        names = fully_sharded(background=engine.async_checkpoints)
        yield from ({"name": name} for name in names if name != engine.name)
        if distils and not engine.shard_teacher:
            yield {"shard_teacher": True}
    if engine.loss_chunk is None and share > 1:
        yield {"loss_chunk": largest_divisor(share, max(1, share // 4))}


def _least(needed: Callable[[Mapping[str, Any]], float], name: str) -> float:
    """What is needed with all changes together, and the engine `name`, less those that the recipe may not have."""
    together: dict[str, Any] = {}
    changes = {"name": name, "micro_batch": 1, "recompute": True, "loss_chunk": 1, "shard_teacher": True}
    for key, value in changes.items():
        if needed({**together, key: value}) < math.inf:
            together[key] = value
    return needed(together)


def _not_counted(engine: EngineConfig) -> str:
    """What the numbers leave out, a line each. A micro-batch that was searched is found by now."""
    found = engine.model_copy(update={"find_micro_batch": False, "tune": False})
    return "".join(f"\n  Not counted: {text}" for text in not_modelled(found))


def _written(change: Mapping[str, Any], engine: EngineConfig, micro_batch: int) -> str:
    """A change as a recipe writes it, with the value that it replaces."""
    ((key, value),) = change.items()
    now = {"micro_batch": micro_batch, "name": engine.name}
    text = f"engine.{key}: {str(value).lower()}"
    return f"{text} (now {now[key]})" if key in now else text
