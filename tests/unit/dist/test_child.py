"""A child process that answers once, and ends in one of several ways."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from compt.dist import child
from compt.dist.child import answer_of, process_pool, start_child
from compt.errors import RunError


def hangs(sender: Any) -> None:
    sender.send("done")
    time.sleep(600)


def dies(sender: Any) -> None:
    os._exit(3)


def says_nothing(sender: Any) -> None:
    time.sleep(600)


@pytest.mark.parametrize(("target", "answer", "code"), [(hangs, "done", -9), (dies, None, 3), (says_nothing, None, -9)])
def test_the_answer_is_waited_for_and_not_the_end(
    target: Callable[..., None], answer: str | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_LEAVE", 0.5)
    process, receiver = start_child(target)
    assert answer_of(process, receiver, lambda: target is says_nothing) == answer
    assert process.exitcode == code


def test_a_child_of_another_thread() -> None:
    """Where no signal can be set."""
    with ThreadPoolExecutor(1) as pool:
        process, receiver = pool.submit(start_child, dies).result()
    assert answer_of(process, receiver) is None
    assert process.exitcode == 3


POOL = """
import os, time
from compt.dist.child import process_pool

def own_pid(_):
    time.sleep(0.2)
    return os.getpid()

with process_pool(3) as pool:
    print(*pool.map(own_pid, range(3)), flush=True)
    time.sleep(600)
"""


def test_a_pool_ends_with_the_process_that_made_it() -> None:
    """One that is killed cannot end its children, which would wait for work for ever."""
    with subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        children = [psutil.Process(int(pid)) for pid in set(process.stdout.readline().split())]
        assert len(children) > 1
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    for one in alive:
        one.kill()
    assert not alive


def wait_or_die(at: int) -> None:
    if at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def test_a_killed_process_ends_its_pool_under_a_handler_of_sigterm() -> None:
    """The pool ends the others by SIGTERM, but they have the handler that stops a run cleanly."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    start = time.monotonic()
    try:
        with pytest.raises(RunError, match="one of 2 processes was killed"), process_pool(2) as pool:
            list(pool.map(wait_or_die, range(2)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - start < 20
