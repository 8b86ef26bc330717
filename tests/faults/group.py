"""Ranks as processes that a test can kill, stop and lose."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from compt.dist import collectives as dist
from compt.errors import ComptError
from tests.dist.spawn import CONTEXT
from tests.helpers.ports import free_port


@dataclass(frozen=True)
class Ended:
    """How a group ended: exit codes and output of each rank, and the seconds until the last one exited."""

    codes: list[int | None]
    output: list[str]
    seconds: float

    @property
    def said(self) -> str:
        return "".join(self.output)


class Group:
    """`world` gloo ranks that run `function(*arguments)`; `agent`: a process outside of them holds the store.

    They meet at `port`, or any free one, and wait for each other there for `connect_seconds`.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        function: Callable[..., Any],
        *arguments: Any,
        agent: bool = False,
        port: int | None = None,
        connect_seconds: float = 60.0,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        limit = datetime.timedelta(seconds=60)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit) if agent else None
        port = self.store.port if self.store else port or free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(world):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": str(agent),
                "COMPT_CONNECT_SECONDS": f"{connect_seconds:g}",
            }
            process = CONTEXT.Process(target=_work, args=(folder, environment, function, arguments))
            process.start()
            self.processes.append(process)

    def wait_for(self, name: str, seconds: float = 60.0) -> None:
        """Until a rank has called `mark(folder, name)`."""
        deadline = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"no {name} after {seconds:g} s"
            assert any(process.is_alive() for process in self.processes), self.output()
            time.sleep(0.02)

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def output(self) -> list[str]:
        paths = [self.folder / f"{rank}.out" for rank in range(len(self.processes))]
        return [path.read_text() if path.exists() else "" for path in paths]

    def end(self, seconds: float = 60.0) -> Ended:
        """Wait for all. Processes left after `seconds` are killed, and their code is None."""
        started = time.monotonic()
        for process in self.processes:
            process.join(max(0.0, started + seconds - time.monotonic()))
        took = time.monotonic() - started
        codes = [None if process.is_alive() else process.exitcode for process in self.processes]
        self.kill()
        return Ended(codes, self.output(), took)

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def mark(folder: Path, name: str) -> None:
    (folder / name).touch()


def _work(folder: Path, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    rank = environment["RANK"]
    file = os.open(folder / f"{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    try:
        dist.init("cpu", timeout_seconds=120.0)
        function(*arguments)
        dist.shutdown()
    except ComptError as error:
        if error.printed_by(rank):
            sys.stderr.write(f"compt: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)
