"""How the ranks of a job meet: in a key-value store that rank 0, or torchrun, serves at MASTER_ADDR:MASTER_PORT."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import psutil
import torch.distributed as torch_dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from compt.dist.environment import Place
from compt.errors import RunError
from compt.text import no_stderr

T = TypeVar("T")

HERE = "127.0.0.1"
"""Where rank 0 finds its own store: it needs no route through the network to itself."""

PAUSE = 0.25
"""Seconds between two attempts to reach the master."""

REACHING, GRACE = 0.9, 0.05
"""Shares of the time limit: for waiting, and then for a call of torch to return, or for others to read the store."""

_LISTED = 10
"""The most missing ranks that a message names."""

_SILENT = "something listens there that never answers; set MASTER_PORT to another port"


def meet(place: Place, seconds: float) -> TCPStore:
    """Return the group's store when every rank has connected to it.

    Raises RunError within `seconds`. Each rank raises its own: without a group, nobody can say which rank should print.
    """
    until = time.monotonic() + REACHING * seconds
    late = until + GRACE * seconds
    try:
        with no_stderr():  # torch prints each attempt with a C++ stack; the RunError at the end says it once
            store = within(late - time.monotonic(), lambda: (_serve if is_host(place.rank) else _connect)(place, until))
    except TimeoutError as error:
        raise _failure(place, seconds, _SILENT) from error
    except OSError as error:
        raise _failure(place, seconds, str(error)) from error
    try:
        with no_stderr():
            missing = within(late - time.monotonic(), lambda: _wait_for_all(place, until, store))
    except TimeoutError as error:
        raise _failure(place, seconds, "rank 0 stopped answering") from error
    except RuntimeError as error:
        raise _failure(place, seconds, "rank 0 gave up; see its message") from error
    if missing:
        if is_host(place.rank):
            # The store ends with this process, and the others still read there who is missing.
            time.sleep(GRACE * seconds)
        named = ", ".join(map(str, missing[:_LISTED])) + (
            f" and {len(missing) - _LISTED} more" * (len(missing) > _LISTED)
        )
        cause = (
            f"rank{'s' * (len(missing) > 1)} {named} did not connect: exited earlier, or the network is blocked, or "
            "Python starts slowly there (give more seconds with COMPT_CONNECT_SECONDS)"
        )
        raise _failure(place, seconds, f"{cause}. {_origin(place)}")
    return store


def is_host(rank: int) -> bool:
    """Whether this rank serves the store. torchrun serves one itself and sets a variable to say so."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns, or raise what it raises. Raises TimeoutError after `seconds`.

    torch's client waits without limit when something accepts its connection and never answers, and a collective that
    hangs cannot be cancelled. The call then stays behind in a daemon thread, which ends with the process.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer.result(max(0.0, seconds))


def choose_interface(place: Place) -> str | None:
    """Return the network interface on the route to the master; None if the route is local or unknown.

    gloo would take the interface of the machine's own name, which on Debian is the loopback.
    """
    with contextlib.suppress(OSError):
        own = address_towards(place.master)
        return None if ipaddress.ip_address(own.partition("%")[0]).is_loopback else interface_of(own)
    return None


def address_towards(host: str) -> str:
    """Return this machine's own address on the route to `host`. Raises OSError."""
    family, kind, _, _, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        # A datagram socket sends nothing here: it only looks up the route.
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the network interface that has an IPv4 or IPv6 address; None if there is none."""
    own = address.partition("%")[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in entries):
            return str(name)
    return None


def _origin(place: Place) -> str:
    return f"It waited because {place.origin} are set; to run one process, unset both"


def _failure(place: Place, seconds: float, cause: str) -> RunError:
    return RunError(
        f"rank {place.rank} of {place.world_size} found no process group at {place.address} "
        f"within {seconds:g} s: {cause}"
    )


def of_attempt(name: str, store: Any) -> PrefixStore:
    """A part of the store for this attempt: after a restart by torchrun it still has the keys of the one before.

    torchrun counts restarts on each node alone, so a run on several nodes has to be started again as a whole.
    """
    return PrefixStore(f"compt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}", store)


def _wait_for_all(place: Place, until: float, store: TCPStore) -> list[int]:
    """Return the ranks that have not connected by then."""
    keys = of_attempt("meet", store)
    names = [f"here/{rank}" for rank in range(place.world_size)]
    keys.set(names[place.rank], "")
    with contextlib.suppress(torch_dist.DistStoreError):
        # torch refuses a wait of 0 seconds.
        keys.wait(names, datetime.timedelta(seconds=max(0.1, until - time.monotonic())))
        return []
    return [rank for rank, name in enumerate(names) if not keys.check([name])]


def _serve(place: Place, until: float) -> TCPStore:
    """Serve the store on this machine. Raises OSError with the cause."""
    # torch's error for a port in use is a C++ stack, so try the port first.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OSError(f"rank 0 cannot open port {place.port} ({reason}); set MASTER_PORT to another port") from None
    try:
        return _store(HERE, place, until - time.monotonic(), host=True)
    except (RuntimeError, ValueError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def _connect(place: Place, until: float) -> TCPStore:
    """Connect to the store at the master's address. Raises OSError with the last cause."""
    while True:
        left = until - time.monotonic()
        try:
            # torch's client does not say why it fails, so connect a plain socket first.
            socket.create_connection((place.master, place.port), timeout=max(0.1, min(5.0, left))).close()
            return _store(place.master, place, min(5.0, left))
        except OSError as error:
            cause = _cause(place, error)
        except (RuntimeError, ValueError):
            cause = "what answers there is not torch's store; set MASTER_PORT to another port"
        if time.monotonic() + PAUSE >= until:
            # A plain OSError: `meet` gives TimeoutError another meaning.
            raise OSError(cause)
        time.sleep(PAUSE)


def _store(address: str, place: Place, seconds: float, host: bool = False) -> TCPStore:
    return TCPStore(
        host_name=address,
        port=place.port,
        world_size=place.world_size,
        is_master=host,
        timeout=datetime.timedelta(seconds=max(1.0, seconds)),
        wait_for_workers=False,
        multi_tenant=host,
    )


def _cause(place: Place, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"no address is known for the name '{place.master}' ({error.strerror}); check MASTER_ADDR"
    if isinstance(error, ConnectionRefusedError):
        cause = "the machine answers, but nothing listens there: rank 0 has not started, or runs elsewhere"
        return f"{cause}. {_origin(place)}"
    if isinstance(error, TimeoutError):
        return "no answer: the machine is down, or a firewall blocks the port"
    return str(error.strerror or error).lower()
