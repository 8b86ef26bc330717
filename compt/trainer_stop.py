"""Signals that ask a training to save and end."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, ClassVar

from compt import dist
from compt.errors import Interrupted

_PASSED_ON = 5.0
"""Seconds in which a Ctrl-C that ends a process already may be one that a launcher passes on."""


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into Interrupted: `at_once`, or when the loop asks at the end of its step.

    A second Ctrl-C ends the process. What comes within a second of the first is the same request: torchrun passes on
    what the terminal has already sent to everyone. Of those within one another one alone raises, and once.
    """

    _open: ClassVar[list[StopSignal]] = []
    """Those that were entered, the outermost first: it knows when anything was asked."""

    def __init__(self, at_once: bool = False) -> None:
        self.name = ""
        self.agreed = False
        """Whether all ranks know that one of them was asked to stop."""
        self._at_once = at_once
        self._asked_at: float | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        first, now = self._open[0], time.monotonic()
        asked_at = first._asked_at
        if asked_at is None:
            first._asked_at = now
            self.name = signal.Signals(number).name
            if self._at_once:
                raise Interrupted(f"stopped by {self.name}. Start the same command again to go on.")
        elif number == signal.SIGINT and now - asked_at >= (_PASSED_ON if self._at_once else 1.0):
            raise KeyboardInterrupt

    def __enter__(self) -> StopSignal:
        self._open.append(self)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._open.remove(self)
        if self.name and kind is None:
            # It came too late for the loop: whoever listens outside has not heard it yet.
            for outer in self._open:
                outer._asked_at = None
            signal.raise_signal(signal.Signals[self.name])

    def raised(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks, who tell each other as each step begins."""
        return self.agreed or (dist.world_size() == 1 and bool(self.name))

    def raised_at_last(self) -> bool:
        """Whether any rank was asked to stop since: a question to all of them, for when no step follows."""
        return dist.any_true(bool(self.name))
