"""Where the processes of a group meet: a store of keys that rank 0, or torchrun, serves."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

import torch.distributed as torch_dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from compt.dist.environment import Place
from compt.dist.speaker import is_speaker, speaks_already
from compt.errors import RunError

T = TypeVar("T")

SIOCGIFADDR = 0x8915
"""Linux's request for an interface's address of IPv4."""

HERE = "127.0.0.1"
"""Where whoever serves the store finds it: it needs no way through the network to itself."""

PAUSE = 0.25
"""Seconds between two attempts to reach the master."""

REACHING, GRACE, SPEAKING = 0.8, 0.05, 0.15
"""Shares of the time to meet: for waiting, for torch to end it, and for finding out who tells of it."""

LISTENING = 0.5
"""Seconds between two questions whether rank 0 has given up."""

_SILENT = "something listens there that never answers; MASTER_PORT names another port"


class _Told(OSError):
    """Rank 0 tells of the failure."""


def meet(place: Place, seconds: float) -> TCPStore:
    """The group's store, when every rank has been there; it gives up within `seconds`.

    Raises RunError, `told` on all ranks but one: the lowest of those that can see each other.
    """
    until = time.monotonic() + REACHING * seconds
    late = until + GRACE * seconds
    try:
        with _quiet():
            store = _serve(place, until, late) if is_host(place.rank) else _reach(place, until, late)
    except OSError as error:
        failure = _failure(place, seconds, str(error))
        if isinstance(error, _Told):
            failure.told = True
            time.sleep(SPEAKING * seconds)  # a launcher stops all when the first ends
        else:
            if not is_host(place.rank):
                # All ranks begin at about the same time, and end so.
                time.sleep(max(0.0, until - time.monotonic()))
            failure.told = not is_speaker(place, SPEAKING * seconds)
        raise failure from error
    try:
        with _quiet():
            missing, lowest = _within(late, lambda: _wait_for_all(place, until, store))
    except TimeoutError as error:
        failure = _failure(place, seconds, "rank 0 was there, and does not answer any more")
        failure.told = not is_speaker(place, SPEAKING * seconds)
        raise failure from error
    except RuntimeError as error:
        # The store went away while others were missing: rank 0 gave up a moment before, and says so.
        failure = _failure(place, seconds, "rank 0 left")
        failure.told = True
        raise failure from error
    if missing:
        failure = _failure(place, seconds, f"{_ranks(missing)} did not come: ended before, or cut off from it")
        # Whoever found rank 0 alone may be one of many who tell their side.
        alone = len(missing) == place.world_size - 1
        failure.told = not is_speaker(place, SPEAKING * seconds) if alone else place.rank != lowest
        if place.rank == 0 and not alone:
            # The others look who is there, in this rank's store.
            time.sleep(0.05 * seconds)
        elif failure.told and not alone:
            time.sleep(0.1 * seconds)
        raise failure
    return store


def tell_first(store: TCPStore, rank: int, seconds: float) -> None:
    """Rank 0 leaves word in the store; others return when it has, when the store is gone, or after `seconds`."""
    keys = _of_this_attempt(store)

    def call() -> None:
        if rank == 0:
            keys.set("told", "")
        else:
            keys.wait(["told"], datetime.timedelta(seconds=seconds))

    with contextlib.suppress(TimeoutError, RuntimeError), _quiet():
        _within(time.monotonic() + seconds, call)


def is_host(rank: int) -> bool:
    """Whether this rank serves the store. torchrun serves one itself and says so."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def _within(late: float, call: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T:
    """What `call` returns or raises; `meanwhile` is called every now and then, and may raise too.

    Raises TimeoutError when it is late. torch's client waits without any limit for the answer of whoever has taken its
    connection: it stays behind in a thread, which ends with the process.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    while not wait([answer], max(0.0, min(LISTENING, late - time.monotonic()))).done:
        if time.monotonic() >= late:
            raise TimeoutError
        meanwhile()
    return answer.result()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from telling of each attempt, with a stack of C++; the one message at the end says it."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def choose_interface(place: Place) -> str | None:
    """The network interface on the way to the master; None where that is within this machine, or cannot be told.

    gloo would take the one that the machine's own name stands for, which on Debian is the loopback.
    """
    with contextlib.suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(place.master, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            # This sends nothing: it asks for the route.
            way.connect(target)
            own = way.getsockname()[0]
        return None if _parsed(own).is_loopback else interface_of(own)
    return None


def interface_of(address: str) -> str | None:
    """The network interface that has an address of IPv4 or IPv6; None where none has it, or it is no address."""
    with contextlib.suppress(OSError, ValueError):
        own = _parsed(address)
        with socket.socket(socket.AF_INET if own.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as way:
            return next((name for _, name in socket.if_nameindex() if own in _addresses(way, name)), None)
    return None


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Without the interface that follows an address of one link alone."""
    return ipaddress.ip_address(address.partition("%")[0])


def _addresses(way: socket.socket, name: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """An interface's address of IPv4 or addresses of IPv6, after the family of `way`."""
    if way.family == socket.AF_INET6:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()]
        return [ipaddress.IPv6Address(bytes.fromhex(row[0])) for row in rows if row[-1] == name]
    try:
        answer = fcntl.ioctl(way, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return []
    return [ipaddress.IPv4Address(answer[20:24])]


def _failure(place: Place, seconds: float, cause: str) -> RunError:
    return RunError(
        f"rank {place.rank} of {place.world_size} found no process group at {place.address} "
        f"within {seconds:g} s: {cause}"
    )


def _of_this_attempt(store: TCPStore) -> PrefixStore:
    """The store without the keys of others: a restart by torchrun may find that of the attempt before."""
    return PrefixStore(f"compt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_all(place: Place, until: float, store: TCPStore) -> tuple[list[int], int]:
    """The ranks that have not come until then, and the lowest that has."""
    keys = _of_this_attempt(store)
    names = [f"here/{rank}" for rank in range(place.world_size)]
    keys.set(names[place.rank], "")
    with contextlib.suppress(torch_dist.DistStoreError):
        # A wait of nothing is refused.
        keys.wait(names, datetime.timedelta(seconds=max(0.1, until - time.monotonic())))
        return [], 0
    here = [rank for rank, name in enumerate(names) if keys.check([name])]
    return sorted(set(range(place.world_size)) - set(here)), here[0]


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


def _serve(place: Place, until: float, late: float) -> TCPStore:
    """Raises OSError with the cause."""
    # To tell a port that is taken from other failures.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OSError(
                f"port {place.port} of rank 0's machine cannot be had ({reason}); MASTER_PORT names another"
            ) from None
    try:
        return _within(late, lambda: _store(HERE, place, until - time.monotonic(), host=True))
    except TimeoutError:
        raise OSError(_SILENT) from None
    except (RuntimeError, ValueError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def _reach(place: Place, until: float, late: float) -> TCPStore:
    """Wait until a store answers at the master's address. Raises OSError with the last cause."""
    opened = threading.Event()

    def listen() -> None:
        if opened.is_set() and speaks_already(place):
            raise _Told("rank 0 gave up")

    try:
        return _within(late, lambda: _knock(place, until, opened), listen)
    except TimeoutError:
        raise OSError(_SILENT) from None


def _knock(place: Place, until: float, opened: threading.Event) -> TCPStore:
    """`opened`: somebody takes connections there."""
    while True:
        left = until - time.monotonic()
        try:
            socket.create_connection((place.master, place.port), timeout=max(0.1, min(5.0, left))).close()
            opened.set()
            return _store(place.master, place, min(5.0, left))
        except OSError as error:
            cause = _cause(place, error)
        except (RuntimeError, ValueError):
            cause = "something else than a group of torch's answers there; MASTER_PORT names another port"
        if time.monotonic() + PAUSE >= until:
            # Not one of its kinds, which mean more.
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
        return f"no address is known for the name '{place.master}' ({error.strerror}); MASTER_ADDR names another"
    if isinstance(error, ConnectionRefusedError):
        return "the machine answers, but nothing listens there: rank 0 has not come, or runs elsewhere"
    if isinstance(error, TimeoutError):
        return "no answer: the machine is down, or a firewall stands between"
    return str(error.strerror or error).lower()
