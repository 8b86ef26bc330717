"""Locks of a run folder: one process trains all of its jobs, or several processes train one job each."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from compt.dist import collectives as dist
from compt.errors import RunError
from compt.files import disk_errors

WHOLE, SHARED = "lock", "run.lock"
"""The first is held by the process that works in a folder; the second while a process writes files that all share."""
LOCKS = (WHOLE, SHARED)
SECONDS = 60.0
"""Seconds to wait for another process that writes."""
TOUCHING, STALE = 30.0, 300.0
"""Seconds between two signs of life in a lock file, and without one until the lock counts as given up."""
EMPTY = 2.0
"""Seconds after which a lock file without a holder is one of a machine that can lock files there."""


_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})
"""What `flock` fails with where files cannot be locked: Lustre without -o flock, NFS without its lock service, FUSE."""


class _Lock:
    """A lock that ends with its process.

    Where files can be locked, the kernel releases it. Elsewhere the holder writes its pid and host into the file, which
    would outlive a machine. So the holder touches the file every `TOUCHING` seconds, and a file that was not touched
    for `STALE` seconds is removed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: BaseFileLock = FileLock(path)
        self._released = threading.Event()

    def acquire(self, seconds: float) -> None:
        """Take the lock. Raises Timeout after `seconds`, and OSError."""
        there = self._path.exists()
        try:
            self._acquire(seconds)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not there:
                self._path.unlink(missing_ok=True)
            self._lock = SoftFileLock(self._path)
            self._acquire(seconds)
        if isinstance(self._lock, SoftFileLock):
            threading.Thread(target=self._touch, daemon=True).start()

    def _acquire(self, seconds: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # filelock warns of what is handled here
            try:
                self._lock.acquire(timeout=seconds)
            except Timeout:
                if not isinstance(self._lock, SoftFileLock) or not self._stale():
                    raise
                # One process at a time, which looks again: another one may have taken the stale lock since.
                with SoftFileLock(self._path.with_name(f".{self._path.name}.stale"), timeout=0):
                    if self._stale():
                        self._path.unlink(missing_ok=True)
                self._lock.acquire(timeout=0)

    def _stale(self) -> bool:
        with contextlib.suppress(FileNotFoundError):  # the holder has just removed it
            return self._age() >= (STALE if self._holder() else EMPTY)
        return False

    def _age(self) -> float:
        """Seconds since the file was touched, by the clock of its file system: machines' clocks differ."""
        with tempfile.TemporaryFile(dir=self._path.parent) as now:
            return os.fstat(now.fileno()).st_mtime - self._path.stat().st_mtime

    def release(self) -> None:
        """Give the lock back."""
        self._released.set()
        self._lock.release()

    def _touch(self) -> None:
        while not self._released.wait(TOUCHING):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _holder(self) -> str:
        """`pid 42 on node7`, as the file of a holder says where files cannot be locked; else ""."""
        with contextlib.suppress(OSError, ValueError):
            pid, host, *_ = self._path.read_text(encoding="utf-8").splitlines()
            return f"pid {pid} on {host}"
        return ""

    def held(self) -> str:
        """Who holds the lock, and how to see whether it is stale, for messages."""
        if not (holder := self._holder()):
            return f"another process holds {self._path}, which the system releases when that process ends"
        return (
            f"{holder} holds {self._path}. This file system cannot lock files, so the lock is stale if that process no "
            f"longer runs: then remove the file, or start again {STALE:.0f} s after it ended"
        )


@contextlib.contextmanager
def locked(
    folder: Path, meanwhile: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
) -> Iterator[None]:
    """Hold the folder of a run or a job, on rank 0. Raises RunError when another process holds it.

    The folder is made and locked inside `meanwhile`, which only rank 0 enters.
    """
    lock = _Lock(folder / WHOLE)

    def acquire() -> None:
        with meanwhile():
            _take(lock, folder, 0, "%s is in use by another process; wait for it, or take another folder (%s)")

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
    lock = _Lock(folder / SHARED)
    _take(lock, folder, SECONDS, f"%s: another process has held {SHARED} for {SECONDS:g} s; see whether it hangs (%s)")
    try:
        yield
    finally:
        lock.release()


def _take(lock: _Lock, folder: Path, seconds: float, fault: str) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(seconds)
        except Timeout:
            raise RunError(fault % (folder, lock.held())) from None
