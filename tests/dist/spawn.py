"""Run a function on several gloo processes and collect what it returns."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preload"])


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*arguments)` on `world` gloo ranks; the results in the order of ranks.

    The function is a module's top-level name, and arguments and results can be pickled. Inside,
    `compt.dist.collectives` is initialised on the CPU with one thread.
    Raises AssertionError with the ranks' tracebacks or after `timeout` seconds.
    """
    # The parent holds the store on a port that the system chose, so parallel tests cannot take each other's.
    limit = datetime.timedelta(seconds=timeout)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    workers = []
    for rank in range(world):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        process = CONTEXT.Process(target=_work, args=(sender, environment, timeout, function, arguments), daemon=True)
        process.start()
        sender.close()
        workers.append((process, receiver))
    deadline = time.monotonic() + timeout
    results: list[Any] = [None] * world
    failures: list[str] = []
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(workers)}
    while waiting:
        # After one failure the others hang in a collective: give them only a moment to report.
        ready = wait(list(waiting), 20.0 if failures else max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.append(f"no answer from ranks {sorted(waiting.values())}")
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                good, payload = receiver.recv()
            except EOFError:
                good, payload = False, "died"
            if good:
                results[rank] = pickle.loads(payload)
            else:
                failures.append(f"rank {rank}: {payload}")
    for process, receiver in workers:
        process.join(0 if failures else 20)
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    assert not failures, "\n".join(failures)
    return results


def _work(
    sender: Connection,
    environment: dict[str, str],
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # imported modules are no garbage, and scanning them takes 0.2 s
    from compt.dist import collectives as dist

    try:
        dist.init("cpu", timeout_seconds=timeout, connect_seconds=timeout)
        result = (True, pickle.dumps(function(*arguments)))
    except BaseException:
        result = (False, traceback.format_exc())
    sender.send(result)
    sender.close()
    if result[0]:
        dist.shutdown()
