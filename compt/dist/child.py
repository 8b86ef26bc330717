"""Child processes for risky work; they exit when their parent rank exits."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from compt.errors import RunError
from compt.files import shared_memory

METHOD = "spawn"
"""How `start_child` starts a process. A forked process may not use CUDA after its parent did."""
_POLL, _LEAVE = 0.2, 10
"""Seconds between looks for an answer, and for a process to leave after it."""


def start_child(target: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    """Start `target(sender, *arguments)` in a process that ends with this one; returns what `answer_of` takes."""
    context: Any = multiprocessing.get_context(METHOD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(target, sender, *arguments), daemon=True)
    # A Ctrl-C in the terminal reaches the whole process group, and the child would print a traceback. So it ignores
    # SIGINT from its first moment on, which it only does if its parent ignores the signal while it starts the child.
    main = threading.current_thread() is threading.main_thread()  # only there can signals be set
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        process.start()
    finally:
        if main:
            signal.signal(signal.SIGINT, interrupt)
    # Or the pipe would still have an open end here when the child is dead, and `answer_of` would wait for ever.
    sender.close()
    return process, receiver


def answer_of(process: Any, receiver: Any, give_up: Callable[[], bool] = lambda: False) -> Any:
    """What a child has sent, once it has ended; None where it ended without an answer, or was killed by `give_up`."""
    answer = None
    # A Ctrl-C that comes just before a wait without a limit would only be heard after it.
    while not receiver.poll(_POLL):
        if give_up():
            process.kill()
            break
    else:
        with contextlib.suppress(EOFError):
            answer = receiver.recv()
    # A process may hang at its end, in the shutdown of a GPU or of a group of ranks.
    process.join(_LEAVE)
    if process.is_alive():
        process.kill()
        process.join()
    return answer


def _run(target: Callable[..., None], sender: Any, *arguments: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target(sender, *arguments)


def _end_with_parent() -> None:
    """End this process when the one that started it has ended: a parent that is killed cannot end its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _begin(prepare: Callable[..., None] | None, *arguments: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare:
        prepare(*arguments)


@contextlib.contextmanager
def process_pool(
    workers: int, prepare: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked processes that end with this one; each first calls `prepare(*arguments)`.

    Raises RunError where they cannot start, or one of them is killed.
    """
    begin: dict[str, Any] = {"initializer": _begin, "initargs": (prepare, *arguments)}
    try:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"), **begin)
    except OSError as error:  # their semaphores are files in /dev/shm
        raise RunError(f"cannot start {workers} processes: {error}. {shared_memory()}") from None
    others = multiprocessing.active_children()
    with pool:
        try:
            yield pool
        except BrokenProcessPool:
            # The pool ends the rest by SIGTERM, and waits. A process forked under a handler of SIGTERM has it too, and
            # stays: it may wait for a lock that the dead one held.
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()
            text = f"one of {workers} processes was killed; the system does this when memory runs out (see dmesg)"
            raise RunError(f"{text}: take fewer, where the command has --workers") from None
