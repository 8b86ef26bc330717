"""The processes that read batches beside training: how they start, what signals they ignore, and how they end."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from compt.errors import RunError
from compt.files import shared_memory
from compt.text import visible

IN_WORK = 4
"""Batches that each process has in work."""


def _same(value: Any) -> Any:
    return value


def _shield(parent: int, _worker: int) -> None:
    """In a worker: ignore signals that go to all processes of a run, and exit when `parent`, which trains, exits.

    Batch systems and terminals signal every process. A worker that dies from it would take down the current step and
    the save that follows. torch's own watch over the parent starts too late if the parent is killed while workers
    start.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    signal.set_wakeup_fd(-1)  # the training process reads that pipe
    # A batch that cannot be passed on is only printed by default, and the training process waits for it for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]

    def wait() -> None:
        while os.getppid() == parent:
            received = signal.sigtimedwait({signal.SIGTERM}, 5.0)
            if received is not None and received.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _end_worker(error: BaseException, _: Any) -> None:
    sys.stderr.write(f"compt, loader process {os.getpid()}: cannot pass on a batch: {visible(str(error))}\n")
    sys.stderr.flush()
    os._exit(1)


class _End(threading.Event):
    """Kills the workers, in place of the event by which torch asks them to end.

    They look at torch's before each batch, under a lock that they share. One that is killed there keeps the lock, and
    the training process would wait for it for ever. And torch waits 5 seconds for each that hangs.
    """

    def __init__(self, workers: list[Any]) -> None:
        super().__init__()
        self._workers = workers

    def set(self) -> None:
        for worker in self._workers:
            worker.kill()
        super().set()


def read_batches(dataset: Dataset[Any], sampler: Iterable[Any], workers: int) -> Iterator[Any]:
    """What `workers` processes read, one per core at most. Raises RunError where one cannot start or dies.

    The death of a worker is found where a batch is awaited, 5 seconds later at most.
    """
    workers = min(workers, len(os.sched_getaffinity(0)))  # more would only take turns, and torch warns of it
    before = multiprocessing.active_children()
    if workers:
        # A worker passes its tensors on through a socket in this folder. One that is killed would leave a folder of its
        # own; that of this process is made first, is used by all of them, and is removed when this process ends.
        multiprocessing.util.get_temp_dir()
    own: list[Any] = []
    batches: Any = None
    early: list[BaseException] = []

    def asked() -> Iterator[Any]:
        # torch asks for the first items while it starts. An error would leave its loader half made: with its own event,
        # and with its handler of the workers' death.
        try:
            yield from sampler
        except BaseException as error:
            if batches is not None:
                raise
            early.append(error)

    try:
        try:
            # A loader that runs out of semaphores would print a traceback of its destructor too, so try them first.
            _ = [multiprocessing.Queue() for _ in range(workers + 2 if workers else 0)]
            batches = iter(_loader(dataset, asked(), workers))
        except OSError as error:
            raise RunError(
                f"cannot start engine.workers={workers} loader processes: {error}. {shared_memory()}"
            ) from error
        finally:
            own += [child for child in multiprocessing.active_children() if child not in before]
        if getattr(batches, "_worker_pids_set", False):
            # torch's handler of SIGCHLD would raise the death of a worker anywhere in the program, inside a collective
            # or a destructor too. Not to install it would not do: a loader of other code may have.
            torch._C._remove_worker_pids(id(batches))
            batches._worker_pids_set = False
            batches._workers_done_event = _End(own)
        if early:
            raise early[0]
        yield from batches
    except RuntimeError as error:
        dead = [child for child in own if child.exitcode]
        if not dead:
            raise
        raise RunError(_cause_of_death(dead[0].pid, dead[0].exitcode)) from error
    finally:
        if own and batches is not None:
            batches._shutdown_workers()
        for child in own:  # of a loader of which one could not start: Python would wait for the others at its end
            child.kill()
        if isinstance(sampler, Generator):
            sampler.close()  # ends its downloads


def _cause_of_death(pid: int, code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    why = ""
    if code == -signal.SIGKILL:
        why = (
            "; the system does this when memory runs out (see dmesg): lower engine.workers, or give the job more memory"
        )
    if code in (-signal.SIGBUS, 1):
        why = f". {shared_memory()}"
    return f"loader process {pid} {how}{why}"


def _loader(dataset: Dataset[Any], sampler: Iterable[Any], workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        collate_fn=_same,
        num_workers=workers,
        # Forked workers share the cached samples and the tables of the index.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(_shield, os.getpid()),
        prefetch_factor=IN_WORK if workers else None,
        # By now a process that trains on a GPU has used it. On a GPU machine a process that trains on the CPU never
        # does.
        pin_memory=torch.cuda.is_initialized(),
    )
