"""What keeps processes apart that share a run folder: one is at all of its jobs, or several at a job each."""

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
"""Held by the process that a folder belongs to, and by whoever writes what processes share, for the moment."""
LOCKS = (WHOLE, SHARED)
SECONDS = 60.0
"""How long to wait for another process that writes."""


@contextlib.contextmanager
def locked(
    folder: Path, meanwhile: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
) -> Iterator[None]:
    """Hold the folder of a run or a job on rank 0, against other processes. Raises RunError when one of them has it.

    It is made and taken within `meanwhile`, which rank 0 alone enters.
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
    """Be the only process that writes what jobs of a run share, for a moment; for rank 0. Raises RunError when another
    one does not come to an end with it.
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
