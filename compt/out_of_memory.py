"""What to change in a recipe when a training runs out of memory, in numbers of the planner."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compt.config import EngineConfig, Recipe
from compt.errors import RunError
from compt.forecast import FRAGMENTED, RESERVED_BYTES
from compt.formats import count
from compt.memory import memory_per_gpu
from compt.planner import Job

SMALLER = 0.9
"""A remedy has to need at most this share of what has just failed, by the same count."""


@dataclass(frozen=True)
class Room:
    """Bytes of a device, or of the machine's memory: free now, and all; None where nobody tells."""

    free: int | None = None
    total: int | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's, Python's or the allocator's way to say that memory ran out."""
    words = ("out of memory", "can't allocate memory", "alloc_failed")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


@contextlib.contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Raise RunError with `advice()` for a lack of memory within the block."""
    text = ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = next(iter(str(error).splitlines()), "")
        text = f"{advice()}\n({first or type(error).__name__})"
    if text:  # outside of the except clause: its frames hold tensors
        raise RunError(text)


def advice(recipe: Recipe, job: Job, engine: EngineConfig, world_size: int, room: Room, micro_batch: int) -> str:
    """What happened while `job` was trained with `micro_batch` pictures at once, and changes of which each may do.

    Their numbers are the planner's (`compt.memory`), for each of `world_size` processes. Named is what needs less than
    nine tenths of what has just failed and fits into the device, as far as its size is known.
    """

    def needed(
        name: str = engine.name,
        micro: int = micro_batch,
        again: bool = engine.recompute,
        chunk: int | None = engine.loss_chunk,
    ) -> float:
        return memory_per_gpu(
            job.spec,
            job.teacher_spec if job.alpha else None,
            engine=name,  # type: ignore[arg-type]  # the names of a recipe are the planner's
            world_size=world_size,
            batch=recipe.optimizer.batch,
            captions=recipe.data.captions,
            tokens=recipe.data.caption_tokens,
            precision=recipe.optimizer.precision,
            micro_batch=micro,
            recompute=again,
            loss_chunk=chunk,
            ema=recipe.optimizer.ema is not None,
        ).total_bytes

    now, share = needed(), recipe.optimizer.batch // world_size
    most = SMALLER * now
    if room.total is not None:
        most = min(most, room.total * (1 - FRAGMENTED) - RESERVED_BYTES)
    smaller = (size for size in range(micro_batch - 1, 0, -1) if share % size == 0)
    fitting = next((size for size in smaller if needed(micro=size) <= most), None)
    changes: list[tuple[str, float]] = []
    if fitting is not None:
        changes.append((f"engine.micro_batch: {fitting} (now {micro_batch})", needed(micro=fitting)))
    if not engine.recompute:
        changes.append(("engine.recompute: true", needed(again=True)))
    if world_size > 1:
        others = [name for name in ("fsdp2", "zero3") if name != engine.name]
        changes += [(f"engine.name: {name} (now {engine.name})", needed(name)) for name in others]
    if engine.loss_chunk is None and share > 1:
        chunk = next(size for size in range(max(1, share // 4), 0, -1) if share % size == 0)
        changes.append((f"engine.loss_chunk: {chunk}", needed(chunk=chunk)))
    named = [f"  {change}: {count(size)}B" for change, size in changes if size <= most]
    if not named:
        least = needed("fsdp2" if world_size > 1 else engine.name, 1, True)
        text = f"  None of these alone does by the planner's count, and all together take {count(least)}B:"
        named = [f"{text} take more GPUs, or larger ones"]
    held = " and ".join(
        f"{count(size)}B {word}" for size, word in ((room.free, "free"), (room.total, "in all")) if size is not None
    )
    return (
        f"{job.name}: out of memory{f' ({held})' if held else ''}; the planner counts {count(now)}B for each of "
        f"{world_size} processes. Any of these changes of the recipe may do, and none changes the result:\n"
        + "\n".join(named)
    )
