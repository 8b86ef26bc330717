"""Who tells of a meeting that failed, when the ranks have no store to agree in: one process of those that can see each
other. Each listens for a few seconds at the port after the group's, and asks the others whether they do.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from compt.dist.environment import Place

ASK_SECONDS = 1.0

TELLING = 0.75
"""The share of the time after which who tells does so."""


def is_speaker(place: Place, seconds: float) -> bool:
    """Whether this rank is the lowest of those that fail at about the same time.

    It takes `seconds`, but for the one who tells: a launcher stops all processes when the first of them ends. Ranks on
    one machine find each other always, those on several machines where the launcher told their names.
    """
    late = time.monotonic() + seconds
    decided = _is_lowest(place, TELLING * seconds)
    if not decided:
        time.sleep(max(0.0, late - time.monotonic()))
    return decided


def _is_lowest(place: Place, seconds: float) -> bool:
    port, until = _port(place), time.monotonic() + seconds
    # The lowest of a machine's ranks is the first to take the port.
    time.sleep(min(0.1 * place.local_rank, 0.3 * seconds))
    try:
        # Without names of other machines nobody asks from there.
        server = socket.create_server(("" if place.nodes else "127.0.0.1", port), backlog=64)
    except OSError:
        return _ask("127.0.0.1", port, place) is None
    with contextlib.closing(server):
        answer = _Answer(server, place)
        others = [name for at, name in enumerate(place.nodes) if at != place.node]
        with ThreadPoolExecutor(max_workers=max(1, min(32, len(others)))) as pool:
            found = [other for other in pool.map(lambda name: _ask(name, port, place), others) if other is not None]
        answer.decided = not any(rank < place.rank or decided for rank, decided in found)
        # Others may come a little later, and those of this machine ask nobody else.
        time.sleep(max(0.0, until - time.monotonic()))
        return answer.decided


def speaks_already(place: Place) -> bool:
    """Whether rank 0 has failed and finds out who tells of it: it does, being the lowest."""
    answer = _ask(place.master, _port(place), place)
    return answer is not None and answer[0] == 0


class _Answer:
    """A thread that tells whoever asks which rank listens here, and whether it has decided to speak."""

    def __init__(self, server: socket.socket, place: Place) -> None:
        self.decided = False
        self._server = server
        self._place = place
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._server.accept()
                with caller, contextlib.suppress(OSError):
                    caller.sendall(f"{_greeting(self._place)} {self._place.rank} {int(self.decided)}\n".encode())


def _port(place: Place) -> int:
    return place.port % (2**16 - 1) + 1


def _greeting(place: Place) -> str:
    return f"compt {place.address} {place.world_size}"


def _ask(host: str, port: int, place: Place) -> tuple[int, bool] | None:
    """The rank that listens on a machine and whether it speaks; None where no rank of this group does."""
    try:
        with socket.create_connection((host, port), timeout=ASK_SECONDS) as caller:
            text = caller.makefile().readline()
    except (OSError, UnicodeDecodeError):
        return None
    greeting, _, answer = text.rstrip("\n").partition(f"{_greeting(place)} ")
    words = answer.split()
    return None if greeting or len(words) != 2 else (int(words[0]), words[1] == "1")
