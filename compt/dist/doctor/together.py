"""What only several processes can find out: whether they see one disk, one time, and each other's numbers."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from compt.dist import collectives as dist
from compt.dist.environment import Place
from compt.dist.doctor.trial import Collective, try_collective
from compt.errors import RunError
from compt.files import disk_errors

WAIT_SECONDS = 10.0
RENAMES = 100
ROUNDS = 8


@dataclass(frozen=True)
class Together:
    """What the processes found with each other; lists go by rank.

    `alone`: there is one process only, and nothing else was looked at. `seconds`: until a file of rank 0 was seen.
    `unseen`: ranks that did not see it, after which the disk was not looked at further; `torn`: those that read half a
    file while rank 0 replaced it; `unlocked`: those that could take a lock that rank 0 held. `clocks`: each one's
    clock minus rank 0's, in seconds. `collectives`: by backend.
    """

    alone: bool = False
    seconds: list[float] = field(default_factory=list)
    unseen: list[int] = field(default_factory=list)
    torn: list[int] = field(default_factory=list)
    unlocked: list[int] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)
    collectives: dict[str, Collective] = field(default_factory=dict)


def check_together(folder: Path, here: Place | None) -> Together:
    """Try all of it; the same answer on all ranks, which all call it. Raises RunError where nothing can be written.

    `here` is what the environment said of the process before it joined the group.
    """

    def make() -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    dist.on_all(make)
    if dist.world_size() == 1:
        dist.on_main(lambda: _write(folder))
        return Together(alone=True)
    # The token tells this call's folder from one on another machine's disk.
    place = folder / f".doctor-{dist.broadcast_object(secrets.token_hex(8))}"
    dist.on_main(lambda: _fill(place))
    try:
        seconds = dist.gather_objects(_seconds_until(place / "first"))
        unseen = [rank for rank, value in enumerate(seconds) if value is None]
        torn = [] if unseen else _ranks(dist.on_all(lambda: _reads_torn(place / "replaced")))
        unlocked = [] if unseen else _ranks(_gets_lock(place / "lock"))
    finally:
        if dist.is_main():
            shutil.rmtree(place, ignore_errors=True)
    return Together(
        seconds=[value or 0.0 for value in seconds],
        unseen=unseen,
        torn=torn,
        unlocked=unlocked,
        clocks=clock_differences(),
        collectives=_collectives(here),
    )


def _write(folder: Path) -> None:
    with disk_errors(folder):
        path = folder / f".doctor-{secrets.token_hex(8)}"
        path.write_bytes(b"1")
        path.unlink()


def _fill(place: Path) -> None:
    with disk_errors(place):
        place.mkdir()
        (place / "first").write_bytes(b"1")
        (place / "replaced").write_bytes(_content(0))


def _content(number: int) -> bytes:
    return f"{number:06d}\n".encode() * 1000


def _ranks(flag: bool) -> list[int]:
    return [rank for rank, found in enumerate(dist.gather_objects(flag)) if found]


def _seconds_until(path: Path) -> float | None:
    """How long it takes to see a file; None after `WAIT_SECONDS`."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > WAIT_SECONDS:
            return None
        # Some network file systems look again only when the folder is read.
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.02)
    return time.monotonic() - start


def _reads_torn(path: Path) -> bool:
    """Rank 0 replaces a file many times over; whether this rank, reading it meanwhile, found none or half of one."""
    if dist.is_main():
        for number in range(1, RENAMES + 1):
            with disk_errors(path):
                fresh = path.with_suffix(".new")
                fresh.write_bytes(_content(number))
                os.replace(fresh, path)
        return False
    last = _content(RENAMES)
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        try:
            content = path.read_bytes()
        except OSError as error:
            # A stale handle of NFS: the file was replaced between opening and reading.
            if error.errno == 116:
                continue
            return True
        if content != content[:7] * 1000:
            return True
        if content == last:
            return False
        time.sleep(0.001)
    return True


def _gets_lock(path: Path) -> bool:
    """Whether this rank could take a lock that rank 0 holds."""
    lock = FileLock(path)

    def hold() -> None:
        with disk_errors(path):
            lock.acquire(timeout=WAIT_SECONDS)

    def take() -> bool:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise RunError(f"{path} cannot be locked: {error.strerror or error}") from None
        return True

    dist.on_main(hold)
    taken = dist.on_all(lambda: not dist.is_main() and take())
    lock.release(force=True)
    return taken


def clock_differences() -> list[float]:
    """Each rank's clock minus rank 0's, in seconds, as well as a barrier can tell: the smallest of several tries."""
    best = [float("inf")] * dist.world_size()
    for _ in range(ROUNDS):
        dist.barrier()
        times = dist.gather_objects(time.time())
        best = [min(old, now - times[0], key=abs) for old, now in zip(best, times, strict=True)]
    return best


def _collectives(here: Place | None) -> dict[str, Collective]:
    """An all-reduce over gloo, and over NCCL where every rank has a GPU of its own."""
    import torch

    token = dist.broadcast_object(secrets.token_hex(8))
    found = {"gloo": try_collective("gloo", "cpu", f"{token}-gloo")}
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = here.gpu(visible) if here else 0
    if not dist.any_true(own >= visible):
        found["nccl"] = try_collective("nccl", f"cuda:{own}", f"{token}-nccl")
    return found
