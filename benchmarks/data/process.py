"""One process of the measurement, on one core. It answers each request of standard input with one line of JSON.

A loader has a process of its own for all repeats: what its libraries keep in memory is not counted as another's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.data import decoding, pipelines


def _tree() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def cpu_seconds(*, own: bool = True) -> float:
    """CPU time of this process, unless not `own`, and its children so far. A child counts until it ends."""
    times = [process.cpu_times() for process in _tree()[0 if own else 1 :]]
    return float(sum(each.user + each.system for each in times))


def memory_bytes() -> int:
    """Proportional set size of this process and its children, without pages of files, which other processes share."""
    lines = [
        line.split()
        for process in _tree()
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    ]
    return 1024 * sum(int(words[1]) for words in lines if words[0] in ("Pss_Anon:", "Pss_Shmem:"))


def run_loader(way: str, values: dict[str, Any], before: int) -> dict[str, float]:
    """Open a loader, wait for its first batch, and read batches for a while. `before`: memory before the first run."""
    given = pipelines.Given(Path(values["tars"]), Path(values["files"]), values["batch"], values["size"])
    started, first_cpu = time.perf_counter(), cpu_seconds()
    batches = pipelines.WAYS[way](given)
    first = next(batches)
    found = {"first_seconds": time.perf_counter() - started, "first_cpu_seconds": cpu_seconds() - first_cpu}
    assert (first.images if hasattr(first, "images") else first[0]).shape[-2:] == (given.size, given.size)
    next(batches)  # the first batches come from queues that are still filling
    started, cpu, read = time.perf_counter(), cpu_seconds(), 0
    while True:
        next(batches)
        read += given.batch
        used, passed = cpu_seconds() - cpu, time.perf_counter() - started
        if used >= values["seconds"] or passed >= 4 * values["seconds"]:
            break
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {
        **found,
        "images": read,
        "cpu_seconds": used,
        "seconds": passed,
        "memory_bytes": memory_bytes() - before,
    }


def main() -> None:
    """Serve the way in the first argument."""
    kind, way = sys.argv[1:]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    if way.endswith(pipelines.ON_GPU):
        torch.zeros(1, device="cuda")
    if kind == "loader":
        pipelines.lacking(way)  # what a loader imports is no part of its time and memory
    before, images = memory_bytes(), None
    for line in sys.stdin:
        values = json.loads(line)
        if kind == "decoding":
            images = images or decoding.Images(Path(values["tars"]), values["images"])
            answer = decoding.measure(values["way"], images.of(values["short"]), values["size"], tuple(values["scale"]))
        else:
            answer = run_loader(way, values, before)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
