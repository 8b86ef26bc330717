"""Why a job ends: what is to be seen of its processes becomes a cause with a message."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as torch_dist

from compt.dist.watch.store import Life, is_here, process_state
from compt.errors import ComptError, Gone, RunError

_AGAIN = "Start the same command again to go on from the newest checkpoint."
_DIED = "look for the reason in its own output and in that machine's log (dmesg: out of memory?)."
_SILENT = "A debugger or a signal stops processes; machines that swap or lose their network look so too."

_PACKAGE = Path(__file__).resolve().parents[2]
COLLECTIVES = "dist/collectives.py:"
"""What `where` begins with for a thread that waits for other processes."""


@dataclass(frozen=True)
class Cause:
    """Why a job ends. `rank` is the one to blame, -1 for none; `exit_code` is what every process ends with."""

    kind: str
    rank: int
    text: str
    exit_code: int = RunError.exit_code
    finder: int = 0

    def error(self) -> ComptError:
        """To be raised where the main thread can."""
        kinds = {kind.exit_code: kind for kind in ComptError.__subclasses__()}
        return kinds.get(self.exit_code, RunError)(self.text)


@dataclass
class Seen:
    """When the sign of life of a rank last changed, by this process's clock.

    `gone`: its process had ended before that sign was read, which so is its last.
    """

    life: Life | None = None
    at: float = field(default_factory=time.monotonic)
    gone: bool = False

    def look(self) -> None:
        """See whether the process is there; the sign of life is read after this."""
        self.gone = self.state == "gone"

    def update(self, life: Life) -> None:
        """Take in what was read."""
        if self.life is None or life.tick != self.life.tick:
            self.life, self.at = life, time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.at

    @property
    def state(self) -> str:
        """`gone`, `stopped` or `running` for a process of this machine; "" where that cannot be told."""
        return process_state(self.life.pid, self.life.born) if self.life is not None and is_here(self.life) else ""

    @property
    def name(self) -> str:
        """What the rank was doing, and since when."""
        assert self.life is not None
        return self.life.named(self.quiet)


def dead(seen: Mapping[int, Seen], silence: float) -> Cause | None:
    """The first rank that ended without leaving, or showed no sign of life for `silence` seconds."""
    for rank, other in sorted(seen.items()):
        if other.life is None or other.life.left:
            continue
        if other.gone:
            return Cause("died", rank, f"{other.name} has died: {_DIED} {_AGAIN}")
        if other.quiet > silence:
            how = "is stopped" if other.state == "stopped" else "shows no sign of life"
            text = f"{other.name} {how} since {other.quiet:.0f} s, and counts as dead. {_SILENT} {_AGAIN}"
            return Cause("silent", rank, text)
    return None


def hanging(lives: Sequence[Life], timeout: float, patience: float, folder: Path) -> Cause:
    """A rank does not get on. All make the same calls, so whoever got least far is to blame, and of several who does
    not wait for others in a collective; or none, where all are equally far.
    """
    least = min(life.count for life in lives)
    behind = sorted((life for life in lives if life.count == least), key=lambda life: life.rank)
    behind = [life for life in behind if not life.where.startswith(COLLECTIVES)] or behind
    advice = (
        f"What every process was at stands in {folder}. {_AGAIN} If that was slow and no fault, raise engine.timeout "
        f"(now {timeout:g} s)."
    )
    if len(behind) == len(lives):
        text = f"no process has got on for {timeout * patience:.0f} s; {behind[0].named()} like the others. {advice}"
        return Cause("hung", -1, text)
    return Cause("hung", behind[0].rank, f"{behind[0].named()} does not get on, and all wait for it. {advice}")


def lost(first: Seen | None, with_rank_0: bool) -> Cause | None:
    """The store does not answer: whoever holds it is to blame, rank 0 or the launcher, unless its work was done."""
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    if not with_rank_0:
        return Cause("lost", -1, f"the launcher at {address} has ended or cannot be reached. {_AGAIN}")
    if first is None or first.life is None:
        return Cause("lost", 0, f"rank 0 at {address} cannot be reached. {_AGAIN}")
    if first.life.left:
        return None
    state = first.state
    if state == "stopped":
        return Cause("silent", 0, f"{first.name} is stopped. {_SILENT} {_AGAIN}", finder=-1)
    how = "has died" if state == "gone" else f"at {address} has died or cannot be reached"
    return Cause("lost", 0, f"{first.name} {how}: {_DIED} {_AGAIN}")


def is_consequence(error: BaseException) -> bool:
    """Whether an error is what a collective raises when another process went away."""
    if isinstance(error, (torch_dist.DistError, Gone)):
        return True
    words = ("gloo", "nccl", "connection", "socket", "broken pipe", "timed out", "store")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def where(thread: threading.Thread) -> str:
    """The innermost line of this program that a thread is in, as `train/loop.py:310 _next`."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
