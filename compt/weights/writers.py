"""The processes that write a folder: all ranks together, or one alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from compt.dist import collectives as dist
from compt.files import disk_errors

T = TypeVar("T")


@dataclass(frozen=True)
class Writers:
    """Those who write `folder`: every rank, each of which then calls every method, or this process, which is rank 0."""

    folder: Path
    together: bool

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return dist.rank() if self.together else 0

    @property
    def number(self) -> int:
        """How many they are."""
        return dist.world_size() if self.together else 1

    def all(self, action: Callable[[], T]) -> T:
        """Do it in each of them. A ComptError in one is raised in all, and so is an OSError, as a RunError."""

        def guarded() -> T:
            with disk_errors(self.folder):
                return action()

        return dist.on_all(guarded) if self.together else guarded()

    def main(self, action: Callable[[], T]) -> T:
        """Do it in the first; its result in all of them."""
        result: Any = self.all(lambda: action() if self.rank == 0 else None)
        return dist.broadcast_object(result) if self.together else result  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """The value of each, in all of them."""
        return dist.gather_objects(value) if self.together else [value]
