"""Checks that need several processes: a disk that all nodes share, its renames and locks, and collectives."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as torch_dist
from filelock import FileLock, Timeout

from compt.dist import collectives as dist
from compt.dist.doctor.findings import Finding, facts_here, judge
from compt.dist.environment import Place, find_place
from compt.dist.rendezvous import within
from compt.errors import RunError
from compt.files import disk_errors

WAIT_SECONDS = 10.0
RENAMES = 100
SLOW_DISK = 1.0
"""Seconds after which it is a note that other nodes see a file late."""
COLLECTIVE_SECONDS = 60.0
NUMBERS = 2**20
"""Length of the vector to sum: 4 MiB of float32."""


def examine(folder: Path) -> list[Finding]:
    """Check this machine, or under srun or torchrun every node; the findings are the same on all ranks.

    `folder` will hold the runs: it is created, written to, and left as it was. Raises ConfigError or RunError when the
    processes do not find each other or `folder` cannot be written to.
    """
    # Joining changes the environment.
    place = find_place(os.environ)
    # On CPUs, over gloo: a GPU that is missing on one node must be a finding, not a hang.
    dist.init("cpu")
    # The disk first, which creates the folder. NCCL last: it may take the process with it.
    disk = check_disk(folder)
    findings = judge(dist.gather_objects(facts_here(folder, place)))
    return [*findings, *disk, *(check_collectives(place) if place and dist.world_size() > 1 else [])]


def check_disk(folder: Path) -> list[Finding]:
    """Check whether all ranks see a file of rank 0, its renames and its lock. Raises RunError where it cannot write."""

    def make() -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def fill() -> None:
        with disk_errors(place):
            place.mkdir()
            (place / "first").write_bytes(b"1")
            (place / "replaced").write_bytes(_content(0))

    dist.on_all(make)
    # The token tells this call's folder from one on another machine's disk.
    place = folder / f".doctor-{dist.broadcast_object(secrets.token_hex(8))}"
    dist.on_main(fill)
    try:
        if dist.world_size() == 1:
            return [Finding("shared disk", "not checked", "one process: start it under srun or torchrun on all nodes")]
        seconds = dist.gather_objects(_seconds_until(place / "first"))
        if blind := _listed(value is None for value in seconds):
            remedy = "put the run folder on a disk that all nodes have (NFS, Lustre, GPFS)"
            return [Finding("shared disk", "wrong", f"ranks {blind} do not see what rank 0 wrote", remedy)]
        torn = _listed(dist.gather_objects(dist.on_all(lambda: _reads_torn(place / "replaced"))))
        unlocked = _listed(dist.gather_objects(_gets_lock(place / "lock")))
    finally:
        if dist.is_main():
            shutil.rmtree(place, ignore_errors=True)
    found = f"a file of rank 0 is seen after {max(seconds):.2f} s"
    remedy = "mount it with a shorter attribute cache (NFS: actimeo=1)"
    findings = [Finding("shared disk", "ok" if max(seconds) < SLOW_DISK else "note", found, remedy)]
    found = f"ranks {torn} read half a file, or none" if torn else "atomic"
    remedy = "use a POSIX file system: resuming relies on it"
    findings.append(Finding("renaming", "wrong" if torn else "ok", found, remedy))
    found = f"ranks {unlocked} took a lock that rank 0 held" if unlocked else "work"
    remedy = "mount with locks (Lustre: -o flock, NFS: no nolock): two jobs could write one run folder"
    return [*findings, Finding("locks", "wrong" if unlocked else "ok", found, remedy)]


def _content(number: int) -> bytes:
    return f"{number:06d}\n".encode() * 1000


def _listed(flags: Iterable[bool]) -> str:
    return ", ".join(str(rank) for rank, flag in enumerate(flags) if flag)


def _seconds_until(path: Path) -> float | None:
    """Return how long it takes to see a file; None after WAIT_SECONDS."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > WAIT_SECONDS:
            return None
        # Some network file systems only look again when the folder is listed.
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.02)
    return time.monotonic() - start


def _reads_torn(path: Path) -> bool:
    """Rank 0 replaces a file many times; whether this rank, reading it meanwhile, found no file or half of one."""
    if dist.is_main():
        for number in range(1, RENAMES + 1):
            with disk_errors(path):
                fresh = path.with_suffix(".new")
                fresh.write_bytes(_content(number))
                os.replace(fresh, path)
        return False
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        try:
            content = path.read_bytes()
        except OSError as error:
            # NFS: the file was replaced between opening and reading, which is no defect.
            if error.errno == errno.ESTALE:
                continue
            return True
        if content != content[:7] * 1000:
            return True
        if content == _content(RENAMES):
            return False
        time.sleep(0.001)
    return True


def _gets_lock(path: Path) -> bool:
    """Whether this rank can take a lock that rank 0 holds."""
    lock = FileLock(path)

    def take() -> bool:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise RunError(f"{path} cannot be locked: {error.strerror or error}") from None
        return True

    dist.on_main(take)
    taken = dist.on_all(lambda: not dist.is_main() and take())
    lock.release(force=True)
    return taken


def check_collectives(place: Place) -> list[Finding]:
    """Run an all-reduce over gloo, and over NCCL if every rank has its own GPU."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = place.gpu(visible)
    lacks, some = dist.any_of(own >= visible, visible > 0)
    findings = [_try_collective("gloo", torch.device("cpu"))]
    if not lacks:
        findings.append(_try_collective("nccl", torch.device("cuda", own)))
    elif some:
        findings.append(Finding("nccl", "not checked", "not every process has its own GPU: start one for each GPU"))
    return findings


def _try_collective(backend: str, device: torch.device) -> Finding:
    """Run an all-reduce over `backend`; the finding is the same on all ranks, also where some of them hang."""
    own: float | str
    try:
        own = within(COLLECTIVE_SECONDS, lambda: _all_reduce(backend, device))
    except TimeoutError:
        own = f"no answer within {COLLECTIVE_SECONDS:g} s"
    except Exception as error:
        own = next(iter(str(error).splitlines()), type(error).__name__)
    found = dist.gather_objects(own)
    problems = {value: _listed(other == value for other in found) for value in found if isinstance(value, str)}
    if not problems:
        return Finding(backend, "ok", f"all-reduce of 4 MiB in {1000 * max(found):.1f} ms")
    text = "; ".join(f"{value} (rank {ranks})" for value, ranks in problems.items())
    remedy = "read what NCCL_DEBUG=INFO prints; check cables, driver, and the interface (docs/cluster.md)"
    return Finding(backend, "wrong", f"all-reduce of 4 MiB failed: {text}", remedy)


def _all_reduce(backend: str, device: torch.device) -> float:
    """Return the seconds of a second call: the first one sets up the connections. Raises RuntimeError."""
    # Longer than the wait for it: at its own limit NCCL ends the process.
    group = torch_dist.new_group(backend=backend, timeout=datetime.timedelta(seconds=4 * COLLECTIVE_SECONDS))
    elapsed, size = 0.0, dist.world_size()
    for _ in range(2):
        numbers = torch.full((NUMBERS,), float(dist.rank() + 1), device=device)
        begun = time.perf_counter()
        torch_dist.all_reduce(numbers, group=group)
        total = float(numbers.double().mean())
        elapsed = time.perf_counter() - begun
        if abs(total - size * (size + 1) / 2) > 1e-6:
            raise RuntimeError("the sum was wrong")
    return elapsed
