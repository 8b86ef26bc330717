"""Signals that ask a training to save and end."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from compt import dist
from compt.errors import Interrupted


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into Interrupted: `at_once`, or when the loop asks at the end of its step.

    A second Ctrl-C ends the process. What comes within a second of the first is the same request: torchrun passes on
    what the terminal has already sent to everyone.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.name = ""
        self.agreed = False
        """Whether all ranks know that one of them was asked to stop."""
        self._at_once = at_once
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = bool(self.name)
        if again and time.monotonic() - self._since < 1.0:
            return
        self.name, self._since = signal.Signals(number).name, time.monotonic()
        if self._at_once:
            raise Interrupted(f"stopped by {self.name}. Start the same command again to go on.")
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raised(self, last: bool) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks, who tell each other as each step begins.

        After the `last` step they ask once more.
        """
        if dist.world_size() == 1:
            return bool(self.name)
        return self.agreed or (last and dist.any_true(bool(self.name)))
