"""Locks of a run folder: one process trains all of its jobs, or several processes train one job each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from compt.dist import collectives as dist
from compt.errors import RunError
from compt.files import disk_errors

WHOLE, SHARED = "lock", "run.lock"
"""The first is held by the process that works in a folder; the second while a process writes files that all share."""
LOCKS = (WHOLE, SHARED)
SECONDS = 60.0
"""Seconds to wait for another process that writes."""


@contextlib.contextmanager
def locked(
    folder: Path, meanwhile: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
) -> Iterator[None]:
    """Hold the folder of a run or a job, on rank 0. Raises RunError when another process holds it.

    The folder is made and locked inside `meanwhile`, which only rank 0 enters.
    """
    lock = FileLock(folder / WHOLE)

    def acquire() -> None:
        with meanwhile(), disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunError(f"{folder} is in use by another process; wait for it, or take another folder") from None

    dist.on_main(acquire)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Be the only process that writes the files that jobs of a run share; for rank 0.

    Raises RunError when another process writes for more than `SECONDS`.
    """
    lock = FileLock(folder / SHARED)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=SECONDS)
        except Timeout:
            text = f"{folder}: another process has held {SHARED} for {SECONDS:g} s; see whether it hangs"
            raise RunError(text) from None
    try:
        yield
    finally:
        lock.release()
