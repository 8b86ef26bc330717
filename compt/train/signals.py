"""Signals that ask a run to save and end."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, ClassVar

from compt.dist import collectives as dist
from compt.dist.watch.thread import STOPS
from compt.errors import Interrupted

_SAME = {False: 1.0, True: 5.0}
"""Seconds after a request in which another signal counts as the same request, by `at_once`."""


class Waited(BaseException):
    """A signal to stop ended a wait. Code that reads images catches every Exception, so this is not an Exception."""


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into Interrupted: `at_once`, or when the loop asks at the end of its step.

    A second Ctrl-C ends the process. A signal within a second of the first is the same request: torchrun passes on what
    the terminal has already sent to every process. When objects are nested, the innermost hears a request. An object
    that raises `at_once` ignores signals for five seconds after it, as the process is ending then.

    Only the main thread can handle signals. In another one this object hears none, and they do what they did before.
    """

    _open: ClassVar[list[StopSignal]] = []
    """Objects that were entered, the outermost first. That one keeps the time of the last request."""

    def __init__(self, at_once: bool = False) -> None:
        self.name = ""
        self.agreed = False
        """Whether all ranks know that one of them was asked to stop. The loop sets it."""
        self._at_once = at_once
        self._waiting = False
        self._asked_at = -math.inf
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        first, now = next(iter(self._open), self), time.monotonic()
        if now - first._asked_at < _SAME[self._at_once]:
            return
        first._asked_at = now
        again, self.name = bool(self.name), self.name or signal.Signals(number).name
        if self._at_once:
            raise Interrupted(f"stopped by {self.name}. Start the same command again to go on.")
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._waiting:
            self._waiting = False
            raise Waited

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for something that may never come: a request inside, or one that came just before, raises Waited."""
        try:
            self._waiting = True
            if self.name:
                raise Waited
            yield
        finally:
            self._waiting = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                self._previous[number] = signal.signal(number, self._handle)
        self._open.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.name and kind is None:
            # The signal came after the loop's last question, so nobody outside has heard it. Send it to them again.
            for outer in self._open:
                outer._asked_at = -math.inf
            signal.raise_signal(signal.Signals[self.name])

    def raised(self) -> bool:
        """Whether any rank was asked to stop. All ranks get the same answer, as they exchange it when a step begins."""
        return self.agreed or (dist.world_size() == 1 and bool(self.name))

    def raised_at_last(self) -> bool:
        """Whether any rank was asked to stop until now. Ranks ask each other once more, as no step follows."""
        return dist.any_true(bool(self.name))
