"""Runs the hand-off measurement: writes teachers with random weights and starts processes under a memory limit."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compt.chain.job import INITIAL_SHARD_BYTES
from compt.errors import RunError
from compt.expand.axes import parameters
from compt.models.presets import ModelSpec
from compt.weights.artefact import read_artefact, write_artefact

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
HOURS = 3600


@dataclass(frozen=True)
class Pair:
    """A teacher, a student and the width operator between them.

    `limit_share`: the memory limit as a share of both models in fp32; None: no limit. `load`: also measure a program
    that loads both, without a limit.
    """

    teacher: ModelSpec
    student: ModelSpec
    width: str = "insert"
    limit_share: float | None = 0.5
    load: bool = False

    @property
    def name(self) -> str:
        return f"{self.teacher.name} to {self.student.name}, {self.width}"

    @property
    def both_bytes(self) -> int:
        return model_bytes(self.teacher) + model_bytes(self.student)

    @property
    def limit(self) -> int | None:
        return None if self.limit_share is None else int(self.limit_share * self.both_bytes)


@functools.lru_cache
def sizes(spec: ModelSpec) -> dict[str, int]:
    """Bytes of each parameter in fp32."""
    return {name: 4 * math.prod(parameter.shape) for name, parameter in parameters(spec).items()}


def model_bytes(spec: ModelSpec) -> int:
    """Bytes of all parameters in fp32."""
    return sum(sizes(spec).values())


class Random(Mapping[str, Tensor]):
    """Random weights, drawn when read. They do not depend on the number of processes."""

    def __init__(self, spec: ModelSpec) -> None:
        self.names = {name: (at, parameter.shape) for at, (name, parameter) in enumerate(parameters(spec).items())}

    def __getitem__(self, name: str) -> Tensor:
        at, shape = self.names[name]
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * SEED + at)).mul_(0.02)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Limit:
    """A memory limit for one process: its description, and the shell commands that set it."""

    how: str
    commands: str
    group: Path | None = None

    def kills(self) -> int:
        """How many processes of the group the kernel killed for lack of memory."""
        for name in ("memory.oom_control", "memory.events"):
            if self.group is not None and (self.group / name).exists():
                counts = dict(line.split() for line in (self.group / name).read_text().splitlines())
                return int(counts.get("oom_kill", 0))
        return 0

    def peak(self) -> int | None:
        """The peak memory of the group, including the page cache; None without a group."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.group is not None and (self.group / name).exists():
                return int((self.group / name).read_text())
        return None


@contextlib.contextmanager
def limited(size: int | None) -> Iterator[Limit]:
    """A control group of `size` bytes if this process may make one, else a limit on the data segment."""
    if size is None:
        yield Limit("none", "true")
        return
    for how, root, file in (
        ("control group, version 1 (memory.limit_in_bytes)", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        ("control group, version 2 (memory.max)", Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"compt-handoff-{secrets.token_hex(4)}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            try:
                (group / file).write_text(str(size))
            except OSError:
                continue
            swap = group / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
            yield Limit(how, f"echo $$ > {group}/cgroup.procs", group)
            return
        finally:
            group.rmdir()
    yield Limit("limit on the data segment (RLIMIT_DATA)", f"ulimit -d {size // 1024}")


def measure(way: str, pair: Pair, teacher: Path, out: Path, writers: int, limit: int | None) -> dict[str, Any]:
    """Run `writers` processes, each under its own limit; returns their reports and how they ended."""
    values = {
        "way": way,
        "teacher": str(teacher),
        "student": pair.student.to_dict(),
        "out": str(out),
        "width": pair.width,
        "seed": SEED,
        "shard_bytes": INITIAL_SHARD_BYTES,
    }
    command = [sys.executable, "-m", "benchmarks.handoff.process", json.dumps(values)]
    with contextlib.ExitStack() as stack:
        limits = [stack.enter_context(limited(limit)) for _ in range(writers)]
        processes = [
            subprocess.Popen(
                ["sh", "-c", f'{each.commands} && exec "$@"', "sh", *command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for each, environment in zip(limits, _environments(writers), strict=True)
        ]
        ended = _wait(processes)
        peaks, kills = [each.peak() for each in limits], sum(each.kills() for each in limits)
    ranks = [json.loads(output) if process.returncode == 0 else {} for process, (output, _) in ended]
    failed = [f"{process.returncode}: {(error.splitlines() or [''])[-1]}" for process, (_, error) in ended]
    codes = [process.returncode for process, _ in ended]
    return {
        "pair": pair.name,
        "way": way,
        "writers": writers,
        "limit": limit,
        "limited_by": limits[0].how,
        "exit_codes": codes,
        "killed": -signal.SIGKILL in codes,
        "out_of_memory_kills": kills,
        "errors": [error for code, error in zip(codes, failed, strict=True) if code],
        "group_peaks": peaks,
        "ranks": ranks,
    }


def _environments(writers: int) -> list[dict[str, str]]:
    threads = max(1, len(os.sched_getaffinity(0)) // writers)
    common = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if writers == 1:
        return [common]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(writers)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(writers)]


def _wait(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[subprocess.Popen[str], tuple[str, str]]]:
    try:
        return [(process, process.communicate(timeout=HOURS)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def check_space(folder: Path, pairs: Sequence[Pair]) -> None:
    """Raise RunError unless the largest pair plus 10 % fits on the disk."""
    needed = int(1.1 * max(pair.both_bytes for pair in pairs))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(f"{folder}: {free / 1e9:.1f} GB are free, the measurement needs {needed / 1e9:.1f}")


def write_teacher(folder: Path, spec: ModelSpec) -> None:
    """A model folder of random weights."""
    write_artefact(folder, Random(spec), spec, {"seed": SEED}, max_shard_bytes=INITIAL_SHARD_BYTES)


def student_hash(folder: Path) -> str:
    """The hash of the weights in `folder`. Checks the sizes of its files."""
    return read_artefact(folder, verify=False).hash
