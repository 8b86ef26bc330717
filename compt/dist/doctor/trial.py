"""An all-reduce in a process of its own: one that hangs cannot be called back, and NCCL ends the process it fails in.

Each process of a group starts one, `python -m compt.dist.doctor.trial`. These meet at the group's store, and form another.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compt.dist import collectives as dist
from compt.dist.child import end_with
from compt.dist.rendezvous import HERE, is_host

SECONDS = 60.0
"""That the processes have to find each other, and then for the sum."""
STARTING = 30.0
"""Seconds besides, for importing torch."""
DYING = 5.0
"""And for a killed process to be gone: one that waits within a driver stays."""
NUMBERS = 2**20
"""That are summed: 4 MiB of float32."""

_ROOM = 4096
"""Bytes that an answer may take: on a full disk the process could not say why it failed."""


@dataclass(frozen=True)
class Collective:
    """What came of an all-reduce: milliseconds of the slowest process, or what went wrong on which ranks."""

    milliseconds: float = 0.0
    problem: str = ""


def try_collective(backend: str, device: str, token: str, seconds: float = SECONDS) -> Collective:
    """An all-reduce over `backend` on this rank's `device`; the same answer on all ranks, which all call it.

    `token` is the same on all ranks and new for each call. Takes twice `seconds`, `STARTING` and `DYING` at most.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="compt-doctor-", ignore_cleanup_errors=True) as folder:
            own = _start(Path(folder) / "told", backend, device, token, seconds)
    except OSError as error:  # a finding about this node; the others wait for its answer
        own = f"its process could not be started: {error.strerror or error}"
    return _judge(dist.gather_objects(own))


def _judge(found: Sequence[float | str]) -> Collective:
    problems: dict[str, list[str]] = {}
    for rank, value in enumerate(found):
        if isinstance(value, str):
            problems.setdefault(value, []).append(str(rank))
    if problems:
        return Collective(problem="; ".join(f"{text} (rank {', '.join(ranks)})" for text, ranks in problems.items()))
    return Collective(max(value for value in found if not isinstance(value, str)))


def _start(told: Path, *words: object) -> float | str:
    """Milliseconds, or what went wrong here. Raises OSError where no process can be started, or none could answer."""
    # Stacks of C++, for those alone who ask.
    shown = sys.__stderr__ if "NCCL_DEBUG" in os.environ else subprocess.DEVNULL
    command = [sys.executable, "-m", "compt.dist.doctor.trial", str(os.getpid()), str(told), *map(str, words)]
    limit = 2 * float(str(words[-1])) + STARTING
    _new(told).write_bytes(bytes(_ROOM))
    # Not in a `with`, which waits without limit as it is left.
    process = subprocess.Popen(command, stdout=shown, stderr=shown)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        silent = f"no answer within {limit:g} s"
        return silent if _killed(process) else f"{silent}, and its process cannot be killed"
    except BaseException:
        _killed(process)
        raise
    if told.exists():
        value: float | str = json.loads(told.read_text(encoding="utf-8"))
        return value
    return f"its process died of {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"


def _new(told: Path) -> Path:
    """What the answer is called until it is whole."""
    return told.with_suffix(".new")


def _killed(process: subprocess.Popen[bytes]) -> bool:
    process.kill()
    try:
        process.wait(DYING)
    except subprocess.TimeoutExpired:
        return False
    return True


def main(parent: int, told: Path, backend: str, device: str, token: str, seconds: float) -> None:
    """Write milliseconds, or what went wrong, to the file `told` and end; or end when the process `parent` does."""
    end_with(parent)
    try:
        value: float | str = _all_reduce(backend, device, token, seconds)
    except (RuntimeError, ValueError, TimeoutError) as error:
        value = next(iter(str(error).splitlines()), type(error).__name__)
    new = _new(told)
    new.write_text(json.dumps(value), encoding="utf-8")
    new.rename(told)
    # A group that is broken may wait for ever for others to leave it.
    os._exit(0)


def _all_reduce(backend: str, device: str, token: str, seconds: float) -> float:
    """Milliseconds of a second call. Raises RuntimeError, or TimeoutError after `seconds`."""
    import torch
    import torch.distributed as torch_dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore

    limit = datetime.timedelta(seconds=seconds)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = HERE if is_host(rank) else os.environ["MASTER_ADDR"]
    store = TCPStore(address, int(os.environ["MASTER_PORT"]), timeout=limit, wait_for_workers=False)
    keys = PrefixStore(f"compt-doctor/{token}", store)
    names = [f"here/{each}" for each in range(size)]
    keys.set(names[rank], "")
    try:
        keys.wait(names, limit)
    except torch_dist.DistStoreError:
        missing = ", ".join(str(other) for other, name in enumerate(names) if not keys.check([name]))
        raise TimeoutError(f"nothing was heard of rank {missing} for {seconds:g} s") from None
    # NCCL's own limit, at which it ends the process, is not to come first.
    torch_dist.init_process_group(backend, store=keys, rank=rank, world_size=size, timeout=2 * limit)
    if backend == "nccl":
        torch.cuda.set_device(device)
    elapsed = 0.0
    for _ in range(2):
        numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
        begun = time.perf_counter()
        work = torch_dist.all_reduce(numbers, async_op=True)
        while not work.is_completed():
            if time.perf_counter() - begun > seconds:
                raise TimeoutError(f"no answer within {seconds:g} s")
            time.sleep(1e-4)
        work.wait()
        total = float(numbers.double().mean())
        elapsed = time.perf_counter() - begun
        if abs(total - size * (size + 1) / 2) > 1e-6:
            raise RuntimeError("the sum was wrong")
    return 1000 * elapsed


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5], float(sys.argv[6]))
