"""Ports for processes of tests to meet at."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port that nobody has, nor the next one, where ranks find out who of them tells of a failure.

    Below those that the system hands out by itself: of these another process may have taken one a moment later.
    """
    drawn = random.SystemRandom()  # tests of two processes have the same seed
    while True:
        port = drawn.randrange(10_000, 32_000)
        if _is_free(port) and _is_free(port + 1):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
