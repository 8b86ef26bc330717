"""A process that does one thing after another and may crash or hang without taking the caller with it."""

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
    """What was asked for failed, or its process died: the last line says how."""


class WorkerTimeout(WorkerError):
    """What was asked for took too long; its process was ended."""


class Worker:
    """Runs functions of modules in a process of its own, started when first needed; what it prints goes to `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: Any = None
        self._pipe: Any = None

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        """What `function` returns; after a failure the next call has a new process.

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
                self.stop()  # it had not read the request, which is not what it died of
                good, found = self._ask(request, seconds)
        except (EOFError, ConnectionError):
            code = self.stop()
            raise WorkerError(f"its process died (exit code {code}); {self._log} has what it printed") from None
        if not good:
            self.stop()  # CUDA gives no right answers after some errors
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
        """End the process, if there is one, with what it started; returns its exit code."""
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
            # The caller has gone, or wants no more. Whatever still runs here must not keep the process.
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
    """End this process, and what it started, with the one that started it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        end_family(os.getpid())


def end_family(pid: int) -> None:
    """Kill a process and all that came of it, in process groups of their own too, as `compt launch` and torchrun have.

    Where it is this one, it goes last. What outlived its own parent is not found.
    """
    for each in reversed(hold_family(pid)):
        send(each, signal.SIGKILL)


def hold_family(pid: int) -> list[int]:
    """Make a process and all that came of it stand still, but for this one; their numbers, parents first."""
    found = [pid]
    for each in found:
        if each != os.getpid():
            send(each, signal.SIGSTOP)  # lest it start another, which would be missed
        found += _children(each)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            found += map(int, path.read_text(encoding="utf-8").split())
    return found


def send(pid: int, number: int) -> None:
    """A signal for a process, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
