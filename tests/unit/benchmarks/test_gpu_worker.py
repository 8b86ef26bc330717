"""If the process of the GPU suite crashes or hangs, the caller and the next request survive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.worker import Worker, WorkerError, WorkerTimeout
from tests.helpers.process import ended


def test_a_worker_survives_a_failing_function(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "log")
    try:
        first = worker.run(os.getpid, seconds=60)
        assert worker.run(os.getpid, seconds=60) == first != os.getpid()
        with pytest.raises(WorkerError, match=r"^ValueError: invalid literal"):
            worker.run(int, "x", seconds=60)
        assert "Traceback" in (tmp_path / "log").read_text()
        second = worker.run(os.getpid, seconds=60)
        assert second != first
        with pytest.raises(WorkerError, match=r"its process died \(exit code 3\)"):
            worker.run(os._exit, 3, seconds=60)
        worker.run(os.getpid, seconds=60)
        with pytest.raises(WorkerTimeout, match="no answer within 0 s"):
            worker.run(time.sleep, 600, seconds=0.1)
        assert worker.run(os.getpid, seconds=60) not in (first, second)
    finally:
        worker.stop()
    assert not Path(f"/proc/{first}").exists()


LAUNCHES = ["setsid", "sh", "-c", 'setsid sleep 600 & echo $$ $! >"$0"; wait']
"""A process group of its own, and below it another one: as `compt launch` and torchrun make them."""

FOLLOWS = """
import pathlib, subprocess, sys
from benchmarks.gpu.worker import Worker
Worker(pathlib.Path(sys.argv[1])).run(subprocess.run, sys.argv[2:], seconds=600)
"""


@pytest.mark.parametrize("how", ["stopped", "left"])
def test_children_of_a_worker_end_with_it(how: str, root: Path, tmp_path: Path) -> None:
    pids, words = tmp_path / "pids", [*LAUNCHES, str(tmp_path / "pids")]
    if how == "stopped":
        worker = Worker(tmp_path / "log")
        worker.run(os.getpid, seconds=60)
        with pytest.raises(WorkerTimeout):
            worker.run(subprocess.run, words, seconds=10)
    else:
        process = subprocess.Popen([sys.executable, "-c", FOLLOWS, str(tmp_path / "log"), *words], cwd=root)
        deadline = time.monotonic() + 60
        while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.wait()
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    assert ended(started)


class Dying:
    """The pipe to a process that is killed once something was sent to it."""

    def __init__(self, pipe: Any, pid: int) -> None:
        self.pipe, self.pid = pipe, pid

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def send(self, request: Any) -> None:
        self.pipe.send(request)
        os.kill(self.pid, signal.SIGKILL)


@pytest.mark.parametrize("when", ["before", "unseen", "unread"])
def test_a_request_is_repeated_if_its_worker_was_already_dead(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(tmp_path / "log")
    try:
        first = worker.run(os.getpid, seconds=60)
        process = worker._process
        if when == "unread":  # killed with the request in its pipe
            os.kill(first, signal.SIGSTOP)
            monkeypatch.setattr(worker, "_pipe", Dying(worker._pipe, first))
        else:
            os.kill(first, signal.SIGKILL)
            process.join()
        if when == "unseen":  # as where it dies between the look at it and the request
            monkeypatch.setattr(process, "is_alive", lambda: True)
        assert worker.run(os.getpid, seconds=60) != first
    finally:
        worker.stop()


def test_a_worker_that_dies_before_reading_is_an_error(tmp_path: Path) -> None:
    """As where its log cannot be opened: each request is answered, and none more than once."""
    worker = Worker(tmp_path / "missing" / "log")
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"its process died \(exit code 1\)"):
            worker.run(os.getpid, seconds=60)
    (tmp_path / "missing").mkdir()
    try:
        assert worker.run(os.getpid, seconds=60)
    finally:
        worker.stop()
