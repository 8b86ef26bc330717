"""Faults in a real chain of two processes: all exit with the cause, and the same command reaches the same weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.campaign import PAGE, RESULT, page
from compt.errors import RunError
from tests.faults.at_random import ENGINES, kill_at_random
from tests.faults.injected import FAULTS, Bench, disturb
from tests.helpers.cases import matrix
from tests.helpers.recipe import make_data

ROOT = Path(__file__).resolve().parents[2]
ENDS = {0, -signal.SIGKILL, RunError.exit_code}
"""Exit codes of processes of which one was killed."""
NEEDS_DISK = ("disk full", "run folder read-only", "shared memory full")
WANTED = {
    "kill -9 of rank 0": "rank 0 (host",
    "kill -9 of rank 1": "rank 1 (host",
    "SIGSTOP of rank 1": "has been stopped",
    "a rank sleeps in the data": "is stuck, and all others wait for it",
    "SIGTERM to all": "stopped by SIGTERM",
    "disk full": "No space left on device",
    "run folder read-only": "Read-only file system",
    "a rank is missing at the start": "did not connect",
    "port taken": "port",
    "one rank out of memory": "out of memory (",
    "a loader process is killed": "was killed by SIGKILL",
    "a loader process is stopped": "has stopped its loader process",
    "shared memory full": "Batches pass through /dev/shm",
    "other shards of the same size at the resume": "the training shards changed since",
    "another table of captions at the resume": "the captions of table captions.csv changed since",
    "a pickle that runs a command in a checkpoint": "refused: it asks for posix.system",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(make_data(tmp_path_factory.mktemp("faults")))


# One of each kind: a process gone, one that hangs, a signal, a torn write, a full disk, bad numbers, no rendezvous.
OFTEN = (
    "kill -9 of rank 1",
    "SIGSTOP of rank 1",
    "SIGTERM to all, under zero2",
    "kill -9 in an asynchronous checkpoint",
    "disk full",
    "gradient of one rank not a number, under fsdp2",
    "port taken",
    "newest checkpoint torn",
)


@pytest.mark.parametrize("fault", matrix(FAULTS, OFTEN))
def test_a_fault(fault: str, bench: Bench, tmp_path: Path) -> None:
    if fault in NEEDS_DISK and (os.geteuid() or not shutil.which("mount")):
        pytest.skip("mounting a small disk needs root")
    found = disturb(bench, fault, tmp_path / "run")
    assert found.went_on, found
    assert found.same is not False, found
    assert found.wrong_samples == 0 or found.note, found
    assert WANTED.get(fault, "") in found.message, found
    assert None not in found.exit_codes, "all processes ended"
    assert found.seconds < 90
    if fault == "port taken":
        assert found.exit_codes == [5, 5], "each rank waits, and prints its own line"


@pytest.mark.full
def test_killed_at_random_moments(bench: Bench, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    kill_at_random(bench, random.Random(1), 15, tmp_path, rows.append)
    assert len(rows) == 15
    assert {code for row in rows for code in row["exit_codes"]} <= ENDS
    ends = [row for row in rows if "same" in row]
    assert {row["engine"] for row in ends} == set(ENGINES)
    for row in ends:
        assert (row["finished"], row["same"], row["wrong_samples"]) == (True, True, 0), row


def test_the_page_is_made_from_the_committed_result() -> None:
    result = json.loads((ROOT / RESULT).read_text(encoding="utf-8"))
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(result)
    assert [row["fault"] for row in result["faults"]] == list(FAULTS)
    assert all(None not in row["exit_codes"] for row in result["faults"]), "every process ended"
    assert len(result["random"]) >= 50
    assert {code for row in result["random"] for code in row["exit_codes"]} <= ENDS
    assert {row["engine"] for row in result["random"]} == set(ENGINES)
    assert all(row["went_on"] and row["same"] is not False for row in result["faults"])
    assert all(not row["wrong_samples"] or row["note"] for row in result["faults"])
    ends = [row for row in result["random"] if "same" in row]
    assert all(row["same"] and not row["wrong_samples"] for row in ends)
