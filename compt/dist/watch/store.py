"""What the watch reads and writes: the store, heartbeats in it, and the state of processes of this machine."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Request: TypeAlias = tuple[Callable[[Any], Any], queue.SimpleQueue[Any]]
"""What to do with the store, and where the answer goes."""

PIECE = 0.5
"""Seconds that `Post.ask` waits at a time."""


class Lost(Exception):
    """The store does not answer."""


class Post:
    """A store with a time limit for each request.

    torch's client waits forever for a store whose process is stopped, so the requests run in a thread of their own.
    The thread ends when nothing needs the Post any more.
    """

    def __init__(self, store: Any) -> None:
        self._work: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._lost = False
        threading.Thread(target=_serve, args=(store, self._work), name="watch-store", daemon=True).start()
        weakref.finalize(self, self._work.put, None)

    def ask(self, action: Callable[[Any], T], seconds: float) -> T:
        """Return `action(store)`. Raises Lost if that fails or takes longer than `seconds`, and at every later call."""
        if self._lost:
            raise Lost
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._work.put((action, answer))
        good: bool = False
        value: Any = None
        # In pieces: while this process is stopped the clock goes on, but it costs one piece only.
        while seconds > 0:
            with contextlib.suppress(queue.Empty):
                good, value = answer.get(timeout=min(seconds, PIECE))
                break
            seconds -= PIECE
        if not good:
            self._lost = True
            raise Lost from value
        result: T = value
        return result


def _serve(store: Any, work: queue.SimpleQueue[Request | None]) -> None:
    while (request := work.get()) is not None:
        action, answer = request
        try:
            answer.put((True, action(store)))
        except Exception as error:  # torch's store raises many kinds
            answer.put((False, error))
        del request, action, answer  # an action may hold the Post, which would never end


@dataclass(frozen=True)
class Life:
    """A process's heartbeat: who it is, and what its main thread has been doing for `age` seconds.

    `tick` increases with every heartbeat, `count` with every `beat` of the main thread. `where` is its line. `left`:
    the process ended its work in order. `hint`: a sentence on what keeps it, where this machine shows it.
    """

    tick: int
    rank: int
    host: str
    place: str
    pid: int
    born: int
    name: str
    count: int
    step: int
    doing: str
    age: float
    where: str
    left: bool
    hint: str = ""

    @classmethod
    def here(cls, **doing: Any) -> Life:
        """Return the heartbeat of this process; `doing` are the fields that do not say which process it is."""
        pid, (host, place) = os.getpid(), _place()
        return cls(host=host, place=place, pid=pid, born=_born(pid), **doing)

    def to_json(self) -> str:
        """Return JSON for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Life:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def named(self, older: float = 0.0) -> str:
        """Return `rank 1 (host n2, pid 4242), at step 7, computing for 3 s`; `older`: seconds since the heartbeat."""
        where = f" in {self.where}" if self.where else ""
        name = f" of {self.name}" if self.name else ""
        return (
            f"rank {self.rank} (host {self.host}, pid {self.pid}), at step {self.step}{name}, "
            f"{self.doing} for {self.age + older:.0f} s{where},"
        )


@functools.cache
def _place() -> tuple[str, str]:
    """Return the name of this machine, and a key of its boot and pid namespace, in which a pid names one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return socket.gethostname(), f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname(), ""


def is_here(life: Life) -> bool:
    """Whether a process runs on this machine, in this container, so that /proc shows it."""
    return life.place != "" and life.place == _place()[1]


def _stat(pid: int) -> tuple[str, int]:
    """Return the state and start time of a process. Raises OSError."""
    words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return words[0], int(words[19])


@functools.cache
def _born(pid: int) -> int:
    """Return when a process was started; 0 if unknown."""
    try:
        return _stat(pid)[1]
    except OSError:
        return 0


def process_state(pid: int, born: int) -> str:
    """Return `gone`, `stopped` or `running` for a process of this machine that was started at `born`."""
    try:
        state, began = _stat(pid)
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return "gone"
    except OSError:
        return "running"  # this process has too many open files
    if state in ("Z", "X", "x") or (born and began != born):
        return "gone"
    return "stopped" if state in ("T", "t") else "running"
