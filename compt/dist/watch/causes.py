"""Why a job ends: from what is seen of its processes to a cause with a message."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch.distributed as torch_dist

from compt.dist.watch.store import Life, is_here, process_state
from compt.errors import ComptError, Gone, RunError
from compt.files import shared_memory

_AGAIN = "Start the same command again to go on from the newest checkpoint."
_DIED = "look for the reason in its own output and in that machine's log (dmesg: out of memory?)."
_SILENT = "A debugger or a signal stops processes; a machine that swaps or loses its network looks the same."

_PACKAGE = Path(__file__).resolve().parents[2]
WAITING = "waiting for data"
"""What a rank does while its loader processes prepare the next batch."""
COLLECTIVES = "dist/collectives.py:"
"""What `where` starts with for a thread that waits for other processes."""


@dataclass(frozen=True)
class Cause:
    """Why a job ends. `rank` is the one to blame, -1 for none; every process ends with `exit_code`.

    `finder` is the rank that posted the cause and prints it; -1 for one that each rank finds for itself.
    """

    kind: str
    rank: int
    text: str
    exit_code: int = RunError.exit_code
    finder: int = -1

    def error(self) -> ComptError:
        """Return it as an error for the main thread to raise."""
        kinds = {kind.exit_code: kind for kind in ComptError.__subclasses__()}
        return kinds.get(self.exit_code, RunError)(self.text)


@dataclass
class Seen:
    """A rank's last heartbeat, and when this process first read it.

    `gone`: its process had ended before that heartbeat was read, so no newer one will come.
    """

    life: Life | None = None
    at: float = field(default_factory=time.monotonic)
    gone: bool = False

    def look(self) -> None:
        """See whether the process exists. Call it before reading the heartbeat: else an orderly end seems a death."""
        self.gone = self.state == "gone"

    def update(self, life: Life) -> None:
        """Keep a heartbeat if it is new."""
        if self.life is None or life.tick != self.life.tick:
            self.life, self.at = life, time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since the last new heartbeat."""
        return time.monotonic() - self.at

    @property
    def state(self) -> str:
        """`gone`, `stopped` or `running` for a process of this machine; "" for another machine."""
        return process_state(self.life.pid, self.life.born) if self.life is not None and is_here(self.life) else ""

    @property
    def name(self) -> str:
        """The rank, its host and pid, and what it was doing for how long."""
        assert self.life is not None
        return self.life.named(self.quiet)


def dead(seen: Mapping[int, Seen], silence: float) -> Cause | None:
    """Return the first rank that ended without leaving, or sent no heartbeat for `silence` seconds."""
    for rank, other in sorted(seen.items()):
        if other.life is None or other.life.left:
            continue
        if other.gone:
            return Cause("died", rank, f"{other.name} has died: {_DIED} {_AGAIN}")
        if other.quiet > silence:
            how = "has been stopped" if other.state == "stopped" else "has sent no heartbeat"
            text = f"{other.name} {how} for {other.quiet:.0f} s, and counts as dead. {_SILENT} {_AGAIN}"
            return Cause("silent", rank, text)
    return None


def hanging(lives: Sequence[Life], seconds: float, timeout: float, folder: Path) -> Cause:
    """Name the rank that is stuck for `seconds`. All ranks make the same calls, so the one with the fewest is to blame.

    Among equals it is the one that does not wait for others in a collective; if all are equal, none is to blame.
    """
    least = min(life.count for life in lives)
    behind = sorted((life for life in lives if life.count == least), key=lambda life: life.rank)
    behind = [life for life in behind if not life.where.startswith(COLLECTIVES)] or behind
    advice = (
        f"{behind[0].hint}{folder} has the stacks of every process. {_AGAIN} If the step was only slow, raise "
        f"engine.timeout (now {timeout:g} s)."
    )
    if len(behind) == len(lives):
        who = behind[0].named() + (" like the others" if len(lives) > 1 else " is stuck")
        text = f"no process made progress for {seconds:.0f} s; {who}. {advice}"
        return Cause("hung", -1, text)
    return Cause("hung", behind[0].rank, f"{behind[0].named()} is stuck, and all others wait for it. {advice}")


def obstacle(doing: str) -> str:
    """Return a sentence on what keeps this process from its data, with a space at its end; "" where nothing is seen."""
    stopped = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            stopped += [str(child.pid)] * (child.status() == psutil.STATUS_STOPPED)
    if stopped:
        return f"A signal or a debugger has stopped its loader process {', '.join(stopped)}. "
    if doing != WAITING:
        return ""
    why = "the disk with the shards may hang, or memory is short"
    return f"Its loader processes deliver nothing: {why}. {shared_memory()} "


def lost(first: Seen | None, with_rank_0: bool) -> Cause | None:
    """The store does not answer: blame rank 0 or the launcher, whichever serves it, unless rank 0 left in order."""
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    if not with_rank_0:
        return Cause("lost", -1, f"the launcher at {address} has exited or cannot be reached. {_AGAIN}")
    if first is None or first.life is None:
        return Cause("lost", 0, f"rank 0 at {address} cannot be reached. {_AGAIN}")
    if first.life.left:
        return None
    state = first.state
    if state == "stopped":
        return Cause("silent", 0, f"{first.name} has been stopped. {_SILENT} {_AGAIN}")
    how = "has died" if state == "gone" else f"at {address} has died or cannot be reached"
    return Cause("lost", 0, f"{first.name} {how}: {_DIED} {_AGAIN}")


def is_consequence(error: BaseException) -> bool:
    """Whether a collective raises such an error when another process is gone."""
    if isinstance(error, (torch_dist.DistError, Gone)):
        return True
    words = ("gloo", "nccl", "connection", "socket", "broken pipe", "timed out", "store")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def where(thread: threading.Thread) -> str:
    """Return the innermost line of compt that a thread is in, for example `train/loop.py:310 _next`."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
