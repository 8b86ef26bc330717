"""One process of the hand-off measurement: expands a model folder and prints measurements as JSON."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compt.dist import collectives as dist
from compt.expand.execute import expand
from compt.expand.plan import make_plan
from compt.models.growth import ExpandConfig
from compt.models.presets import ModelSpec
from compt.weights.artefact import read_artefact, write_artefact

SAMPLE_SECONDS = 0.005


class Memory(threading.Thread):
    """The largest anonymous memory of this process (RssAnon), sampled every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, status()["RssAnon"])


def status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: 1024 * int(value.split()[0]) for key, _, value in lines if value.rstrip().endswith("kB")}


def traffic() -> dict[str, int]:
    """Bytes that this process read and wrote so far, including the page cache (/proc/self/io)."""
    lines = (line.partition(":") for line in Path("/proc/self/io").read_text().splitlines())
    return {key: int(value) for key, _, value in lines}


def stream(values: dict[str, Any]) -> None:
    """Expand parameter by parameter, from file to file, with all ranks."""
    teacher = read_artefact(Path(values["teacher"]))
    plan = make_plan(teacher.spec, ModelSpec.from_dict(values["student"]), ExpandConfig.both(values["width"]))
    write_artefact(
        Path(values["out"]),
        expand(plan, teacher.state, values["seed"]),
        plan.student,
        {"expansion": plan.to_json(), "seed": values["seed"], "parent_hash": teacher.hash},
        max_shard_bytes=values["shard_bytes"],
        together=True,
    )


def in_memory(values: dict[str, Any]) -> None:
    """Expand as a program that loads both models: all parameters of the teacher, then all of the student."""
    teacher = read_artefact(Path(values["teacher"]))
    plan = make_plan(teacher.spec, ModelSpec.from_dict(values["student"]), ExpandConfig.both(values["width"]))
    state = dict(teacher.state)
    student = dict(expand(plan, state, values["seed"]))
    assert len(student) == len(plan.entries)


WAYS: dict[str, Callable[[dict[str, Any]], None]] = {"stream": stream, "in memory": in_memory}


def main() -> None:
    """Run the request in the first argument (a JSON object) and print the measurements as JSON."""
    values = json.loads(sys.argv[1])
    dist.init("cpu")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak VmHWM
    memory, before, moved, start = Memory(), status(), traffic(), time.perf_counter()
    memory.start()
    WAYS[values["way"]](values)
    seconds, after, total = time.perf_counter() - start, status(), traffic()
    memory.ended.set()
    memory.join()
    found = {
        "rank": dist.rank(),
        "seconds": seconds,
        "bytes_read": total["rchar"] - moved["rchar"],
        "bytes_written": total["wchar"] - moved["wchar"],
        "anonymous_before": before["RssAnon"],
        "peak_anonymous": memory.peak,
        "peak_extra": memory.peak - before["RssAnon"],
        "peak_resident": after["VmHWM"],
        "peak_resident_extra": after["VmHWM"] - before["VmRSS"],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(found))
    dist.shutdown()


if __name__ == "__main__":
    main()
