"""A link from its first weights to its model, and the start of the next, none of whose ranks may hold a model.

Each rank is in a control group of its own, or has a limit on its data segment where none can be made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.distributed import TCPStore

from benchmarks.handoff.run import ROOT, limited, model_bytes
from compt.cost import counts
from compt.plan.jobs import make_plan
from compt.weights.artefact import read_artefact
from tests.dist.train.memory_process import LINKS, recipe
from tests.helpers.recipe import make_data

WORLD = 2
BESIDES = 500_000_000
"""Bytes of a rank beside its shares: a block that is gathered, activations, a few of the largest parameters."""
LIMIT = 2_300_000_000
"""Bytes of a rank: Python and torch, a half of the weights, gradients and moments, and a few tensors."""
NEEDED = 6_000_000_000

pytestmark = pytest.mark.slow


def available() -> int:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:")


class Run(NamedTuple):
    """How the ranks ended, what they measured, and how many the kernel killed because memory ran out."""

    codes: list[int]
    measured: list[dict[str, Any]]
    kills: int
    errors: str


def run(action: str, folder: Path, limit: int) -> Run:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(WORLD)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    # What is freed is to be given back: glibc keeps holes of up to 32 MB, which a device's allocator has no part in.
    common |= {"MALLOC_MMAP_THRESHOLD_": "2097152"}
    command = [sys.executable, "-m", "tests.dist.train.memory_process", action, str(folder)]
    with contextlib.ExitStack() as stack:
        limits = [stack.enter_context(limited(limit)) for _ in range(WORLD)]
        processes = [
            subprocess.Popen(
                ["sh", "-c", f'{each.commands} && exec "$@"', "sh", *command],
                cwd=ROOT,
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, each in enumerate(limits)
        ]
        try:
            ended = [process.communicate(timeout=900) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        kills = sum(each.kills() for each in limits)
    codes = [process.returncode for process in processes]
    return Run(codes, [json.loads(out) for out, _ in ended if out], kills, "".join(error for _, error in ended))


def test_no_rank_holds_a_model(tmp_path: Path) -> None:
    if available() < NEEDED or shutil.disk_usage(tmp_path).free < NEEDED:
        pytest.skip(f"takes {NEEDED / 1e9:g} GB of memory and of disk")
    make_data(tmp_path, images=12)
    first, second = (link.spec for link in make_plan(recipe("chain"), baselines=False, controls=()).links)
    assert counts.parameters(first) > 180_000_000
    done = run("chain", tmp_path, LIMIT)
    assert done.codes == [0] * WORLD, done.errors
    assert done.kills == 0
    # Weights, gradients and two moments in shards; the expansion has a few tensors alone.
    shares = (4 * model_bytes(first) // WORLD, 0)
    for rank in done.measured:
        for peak, share in zip(rank["peaks"], shares, strict=True):
            assert peak - rank["before"] < share + BESIDES, done.measured
    jobs = tmp_path / "chain" / "jobs"
    assert read_artefact(jobs / LINKS[0] / "model").spec == first
    assert read_artefact(jobs / LINKS[1] / "initial").spec == second
    gathered = run("look_on", tmp_path, LIMIT)
    assert any(gathered.codes), "the limit lets a rank gather the model: the test shows nothing"
    assert gathered.kills or "memory" in gathered.errors, gathered.errors
    shutil.rmtree(tmp_path)
