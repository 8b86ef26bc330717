"""Where the processes of a group meet: a store of keys that rank 0, or torchrun, serves."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time

import torch.distributed as torch_dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from compt.dist_environment import Place
from compt.dist_speaker import is_speaker
from compt.errors import RunError

PAUSE = 0.25
"""Seconds between two attempts to reach the master."""

REACHING = 0.8
"""Share of the time to meet that is spent on waiting; the rest is for finding out who tells of the failure."""


def meet(place: Place, seconds: float) -> TCPStore:
    """The group's store, when every rank has been there; it gives up within `seconds`.

    Raises RunError: on every rank that was there, and `told` on all of them but the lowest.
    """
    until = time.monotonic() + REACHING * seconds
    try:
        store = _open_store(place, until)
    except OSError as error:
        failure = _failure(place, seconds, str(error))
        failure.told = not is_speaker(place, 0.15 * seconds)
        raise failure from error
    # A restart by torchrun may find the store of the attempt before.
    keys = PrefixStore(f"compt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        return _wait_for_all(place, seconds, until, store, keys)
    except RuntimeError as error:
        # The store went away while others were missing: rank 0 gave up a moment before, and says so.
        failure = _failure(place, seconds, "rank 0 left")
        failure.told = place.rank > 0
        raise failure from error


def _failure(place: Place, seconds: float, cause: str) -> RunError:
    return RunError(
        f"rank {place.rank} of {place.world_size} found no process group at {place.address} "
        f"within {seconds:g} s: {cause}"
    )


def _wait_for_all(place: Place, seconds: float, until: float, store: TCPStore, keys: PrefixStore) -> TCPStore:
    names = [f"here/{rank}" for rank in range(place.world_size)]
    keys.set(names[place.rank], socket.gethostname())
    try:
        # A wait of nothing is refused.
        keys.wait(names, datetime.timedelta(seconds=max(0.1, until - time.monotonic())))
    except torch_dist.DistStoreError:
        here = [rank for rank, name in enumerate(names) if keys.check([name])]
        missing = sorted(set(range(place.world_size)) - set(here))
        if not missing:
            return store
        failure = _failure(place, seconds, f"{_ranks(missing)} did not come")
        failure.told = place.rank != here[0]
        if place.rank == 0:
            # The others look who is there, in this rank's store.
            time.sleep(0.05 * seconds)
        raise failure from None
    return store


def _ranks(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "ranks 1-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def _open_store(place: Place, until: float) -> TCPStore:
    """Serve the store or reach it. Raises OSError with the cause."""
    # torchrun serves a store itself and says so.
    hosting = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    if hosting:
        with contextlib.closing(_probe(place.port)):
            pass
    else:
        _reach(place, until)
    try:
        return TCPStore(
            # Whoever serves it needs no way through the network to itself.
            host_name="127.0.0.1" if hosting else place.master,
            port=place.port,
            world_size=place.world_size,
            is_master=hosting,
            timeout=datetime.timedelta(seconds=max(1.0, until - time.monotonic())),
            wait_for_workers=False,
            multi_tenant=hosting,
        )
    except (RuntimeError, ValueError) as error:
        raise OSError(f"what answers there is no store of torch's: {str(error).splitlines()[0]}") from error


def _probe(port: int) -> socket.socket:
    """Take the port for a moment, to tell one that is taken from other failures."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("", port))
    except OSError as error:
        probe.close()
        raise OSError(
            f"port {port} of rank 0's machine is taken ({error.strerror}); MASTER_PORT names another"
        ) from None
    return probe


def _reach(place: Place, until: float) -> None:
    """Wait until something listens at the master's address. Raises OSError with the last cause."""
    while True:
        left = until - time.monotonic()
        try:
            socket.create_connection((place.master, place.port), timeout=max(0.1, min(5.0, left))).close()
        except OSError as error:
            if time.monotonic() + PAUSE >= until:
                raise OSError(_cause(place, error)) from error
            time.sleep(PAUSE)
        else:
            return


def _cause(place: Place, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"no address is known for the name '{place.master}' ({error.strerror}); MASTER_ADDR names another"
    if isinstance(error, ConnectionRefusedError):
        return "the machine answers, but nothing listens there: rank 0 has not come, or runs elsewhere"
    if isinstance(error, TimeoutError):
        return "no answer: the machine is down, or a firewall stands between"
    return str(error.strerror or error).lower()
