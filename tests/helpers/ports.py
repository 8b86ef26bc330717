"""Ports at which test processes connect."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A free port whose next port is free, too: ranks use that one to decide which of them reports a failure.

    It is below the ports that the system assigns, which another process may get a moment later.
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
