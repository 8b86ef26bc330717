"""A worker process that runs one function after another. If it crashes or hangs, the caller survives."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """The function raised, or its process died. The message says how."""


class WorkerTimeout(WorkerError):
    """The function took too long, and its process was killed."""


class Worker:
    """Runs functions of modules in a child process, started on first use. Its output goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: Any = None
        self._pipe: Any = None

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        """Return what `function` returns. After a failure the next call starts a new process.

        Raises WorkerTimeout after `seconds`, WorkerError when the function raises or its process dies.
        """
        request = (function, arguments)
        used = self._process is not None
        try:
            try:
                good, found = self._ask(request, seconds)
            except ConnectionError:
                if not used:
                    raise
                self.stop()  # it died before it read the request, so the request is not the cause
                good, found = self._ask(request, seconds)
        except (EOFError, ConnectionError):
            code = self.stop()
            raise WorkerError(f"its process died (exit code {code}); {self._log} has what it printed") from None
        if not good:
            self.stop()  # after some errors, CUDA results are wrong
            raise WorkerError(found)
        return found

    def _ask(self, request: tuple[Callable[..., Any], tuple[Any, ...]], seconds: float) -> tuple[bool, Any]:
        if self._process is not None and not self._process.is_alive():
            self.stop()
        if self._process is None:
            self._start()
        self._pipe.send(request)
        if not self._pipe.poll(seconds):
            self.stop()
            raise WorkerTimeout(f"no answer within {seconds:.0f} s")
        found: tuple[bool, Any] = self._pipe.recv()
        return found

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, str(self._log)))
        self._process.start()
        other.close()

    def stop(self) -> int | None:
        """Kill the process, if there is one, and its children; returns its exit code."""
        if self._process is None:
            return None
        self._pipe.close()
        self._process.join(1)
        if self._process.is_alive():
            end_family(self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        code: int | None = self._process.exitcode
        self._process = self._pipe = None
        return code


def _serve(pipe: Connection, log: str) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_follow, daemon=True).start()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            # The caller exited or closed the pipe. Exit at once: other threads must not keep the process alive.
            sys.stdout.flush()
            os._exit(0)
        try:
            answer = (True, function(*arguments))
        except BaseException as error:
            traceback.print_exc()
            answer = (False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        sys.stderr.flush()
        pipe.send(answer)


def _follow() -> None:
    """Make this process and its children exit when its parent exits."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        end_family(os.getpid())


def end_family(pid: int) -> None:
    """Kill a process and its descendants, also those in other process groups, as `compt launch` and torchrun make.

    If it is this process, it goes last. Misses processes whose parent has already exited.
    """
    for each in reversed(hold_family(pid)):
        send(each, signal.SIGKILL)


def hold_family(pid: int) -> list[int]:
    """Stop (SIGSTOP) a process and its descendants, except this one; returns their ids, parents first."""
    found = [pid]
    for each in found:
        if each != os.getpid():
            send(each, signal.SIGSTOP)  # so that it cannot start another one, which we would miss
        found += _children(each)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            found += map(int, path.read_text(encoding="utf-8").split())
    return found


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have exited."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
