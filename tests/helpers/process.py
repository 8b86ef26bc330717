"""Chains in processes of their own, which can be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from compt.chain.job import JobRun
from compt.errors import ComptError
from compt.train import loop as trainer
from tests.dist.spawn import CONTEXT
from tests.helpers.recipe import chain

KILLED = -signal.SIGKILL


def die() -> None:
    """Exit like a process that was killed by kill -9, by lack of memory or by a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Run a module's top-level function in another process; a ComptError becomes its exit code."""
    process = CONTEXT.Process(target=_work, args=(function, arguments))
    process.start()
    return process


def _work(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except ComptError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def finish(process: BaseProcess, seconds: float = 240.0) -> int:
    """The exit code of a process. Kills it after `seconds`."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the process was still running after {seconds:g} s")
    assert process.exitcode is not None
    return process.exitcode


def ended(pids: Iterable[int], seconds: float = 10.0) -> bool:
    """Whether all of these processes have exited within `seconds`."""
    left, until = list(pids), time.monotonic() + seconds
    while (left := [pid for pid in left if _lives(pid)]) and time.monotonic() < until:
        time.sleep(0.02)
    return not left


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def chain_dying_at(place: str, base: Path, run: Path, *changes: str) -> None:
    """A chain that is killed at one place, in words: `before|after STATE of JOB`, `step N of JOB`, `scoring JOB`."""
    what, wanted, job = _parse(place)
    enter, score, rate = JobRun._enter, JobRun._scored, trainer.learning_rate

    def entering(self: JobRun, state: str, **values: Any) -> None:
        here = (state, self.job.name) == (wanted, job)
        if here and what == "before":
            die()
        enter(self, state, **values)
        if here and what == "after":
            die()

    def scoring(self: JobRun, artefact: Any) -> dict[str, Any]:
        if what == "scoring" and self.job.name == job:
            die()
        return score(self, artefact)

    def stepping(step: int, settings: trainer.TrainSettings) -> float:
        if what == "step" and str(step + 1) == wanted and current[0] == job:
            die()
        return rate(step, settings)

    current = [""]
    run_job = JobRun.run

    def running(self: JobRun) -> None:
        current[0] = self.job.name
        run_job(self)

    JobRun._enter, JobRun._scored, JobRun.run = entering, scoring, running  # type: ignore[method-assign]
    trainer.learning_rate = stepping
    chain(base, run, *changes)


def _parse(place: str) -> tuple[str, str, str]:
    words = place.split()
    return (words[0], "", words[1]) if len(words) == 2 else (words[0], words[1], words[3])


def chain_dying_at_write(number: int, base: Path, run: Path, *changes: str) -> None:
    """A chain that is killed just before its `number`-th file or folder gets its final name."""
    left = [number]

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                die()
            function(*arguments, **keywords)

        return call

    os.rename, os.replace = counted(os.rename), counted(os.replace)
    chain(base, run, *changes)


def writes_of(function: Callable[[Path, Path], Any], base: Path, run: Path) -> list[str]:
    """The final names that `function(base, run)` gives to files and folders, below `run`, in their order."""
    names: list[str] = []

    def noted(rename: Callable[..., None]) -> Callable[..., None]:
        def call(old: Any, new: Any, **keywords: Any) -> None:
            names.append(os.path.relpath(new, run))
            rename(old, new, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", noted(os.rename))
        patch.setattr(os, "replace", noted(os.replace))
        function(base, run)
    return names


def chain_with_workers(base: Path, run: Path, *changes: str) -> None:
    chain(base, run, "engine.workers=2", *changes)


def hold(run: Path, ready: Any, release: Any) -> None:
    """Hold the lock of a run folder until told otherwise."""
    from compt.chain.locks import locked

    with locked(run):
        ready.set()
        release.wait(60)
