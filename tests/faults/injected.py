"""Chains of two processes with a fault, and its consequences."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from compt.chain import job as jobs
from compt.chain.job import JobRun
from compt.dist import collectives as dist
from compt.files import hash_json, sha256_file, write_json
from compt.train import loop as trainer
from tests.faults.group import Ended, Group, mark
from tests.helpers.recipe import FIRST, SECOND, chain, equal, lines, manifest, weights

TIMEOUT = 10.0
CHANGES = (f"engine.timeout={TIMEOUT:g}", "engine.checkpoint_every={steps: 1}")
ONE_LOADER = ("engine.workers=1",)
AT = 3
"""The step of the second link in which things go wrong."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def chain_with(fault: str, folder: Path, base: Path, run: Path, changes: tuple[str, ...]) -> None:
    """A chain on this rank with the fault that `name` says. Records the samples of each step."""
    rank, job = dist.rank(), [""]
    run_job, open_loader = JobRun.run, jobs.train_loader

    def running(self: JobRun) -> None:
        job[0] = self.job.name
        run_job(self)

    def loader(*arguments: Any, **options: Any) -> Iterator[Any]:
        first = int(options["start_step"]) + 1
        for step, batch in enumerate(open_loader(*arguments, **options), first):
            # Two batches are prefetched. For a loader process to be missed, the step has to be two before the last.
            if (job[0], step) == (SECOND, 2 if fault == "at step, early" else AT):
                if rank == 1 and fault == "sleeping in the data":
                    mark(folder, "begun")
                    time.sleep(3600)
                if fault.startswith("at step"):
                    mark(folder, "begun" if rank == 0 else "begun1")
                    wait_for_release(folder)
            digest = hashlib.sha256(json.dumps(batch.keys).encode()).hexdigest()[:16]
            with (run.parent / f"{run.name}-keys-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([job[0], step, digest]) + "\n")
            yield batch

    JobRun.run, jobs.train_loader = running, loader  # type: ignore[method-assign, assignment]
    inject(fault, folder, rank, job)
    chain(base, run, *CHANGES, *changes)


def wait_for_release(folder: Path) -> None:
    """Hold the step for a moment, so that a signal arrives in the middle of it."""
    deadline = time.monotonic() + 60.0
    while not (folder / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def inject(fault: str, folder: Path, rank: int, job: list[str]) -> None:
    """Faults that come from within a process."""
    if fault == "small shared memory" and rank == 1:
        for done in (
            ctypes.CDLL(None).unshare(_NEW_MOUNTS),
            _mount("--make-rprivate", "/"),
            _mount_small("/dev/shm", "16k"),
        ):
            assert done == 0
        mark(folder, "begun")
    if fault in ("dying in a checkpoint", "dying in the model") and rank == 0:
        wanted = "step-0000000" if "checkpoint" in fault else "model"
        for name in ("rename", "replace"):
            setattr(os, name, _dying(getattr(os, name), wanted, folder, job))
    if fault == "dying in the evaluation" and rank == 1:

        def scoring(self: JobRun, *arguments: Any) -> Any:
            mark(folder, "begun")
            die()

        JobRun._scored = scoring  # type: ignore[method-assign]
    if fault in ("no memory on one rank", "no number on one rank") and rank == 1:
        step = trainer.training_step
        count = [0]

        def stepping(task: Any, engine: Any, batch: Any, **options: Any) -> Any:
            count[0] += 1
            if (job[0], count[0]) != (FIRST, AT):
                return step(task, engine, batch, **options)
            mark(folder, "begun")
            if "memory" in fault:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            convert = trainer.to_input
            trainer.to_input = lambda *values: convert(*values) * float("nan")  # type: ignore[assignment]
            try:
                return step(task, engine, batch, **options)
            finally:
                trainer.to_input = convert

        trainer.training_step = stepping


def _dying(action: Callable[..., None], wanted: str, folder: Path, job: list[str]) -> Callable[..., None]:
    def call(source: Any, target: Any, *rest: Any, **more: Any) -> None:
        if job[0] == SECOND and Path(os.fspath(target)).name.startswith(wanted):
            mark(folder, "begun")
            die()
        action(source, target, *rest, **more)

    return call


@dataclass
class Found:
    """The consequences of a fault. `same`: the same command reached the weights of the undisturbed run, bit for bit."""

    fault: str
    exit_codes: list[int | None]
    seconds: float
    message: str
    went_on: bool = False
    same: bool | None = None
    repeated_steps: int = 0
    wrong_samples: int = 0
    resumed: list[int | None] = field(default_factory=list)
    engine: str = "ddp"
    note: str = ""
    """Of a fault that does not end the run: what it changes."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """Data, the undisturbed run of two processes under each engine, and a folder for disturbed ones."""

    def __init__(self, base: Path) -> None:
        self.base, self.count = base, 0
        self.seconds: dict[str, float] = {}
        """What an undisturbed run took, by engine."""

    def start(self, fault: str, run: Path, *changes: str, engine: str = "ddp", **options: Any) -> Group:
        self.count += 1
        folder, changes = self.base / f"group{self.count}", (f"engine.name={engine}", *changes)
        return Group(folder, 2, chain_with, fault, folder, self.base, run, changes, **options)

    def whole(self, engine: str) -> Path:
        """The run that nothing disturbs."""
        run = self.base / f"whole-{engine}"
        if not run.exists():
            ended = self.start("none", run, engine=engine).end(600)
            assert ended.codes == [0, 0], ended.said
            self.seconds[engine] = ended.seconds
        return run

    def finish(self, found: Found, run: Path, *changes: str) -> Found:
        """Start the same command again, and compare with the undisturbed run."""
        ended = self.start("none", run, *changes, engine=found.engine).end(600)
        found.resumed = ended.codes
        found.went_on = ended.codes == [0, 0]
        if not found.went_on:
            found.message += f" / then: {ended.said}"
        found.same = found.went_on and self.same(run, found.engine)
        found.repeated_steps, found.wrong_samples = self.samples(run, found.engine)
        return found

    def same(self, run: Path, engine: str) -> bool:
        whole = self.whole(engine)
        return all(
            equal(weights(whole, job), weights(run, job))
            and lines(whole, job) == lines(run, job)
            and manifest(whole, job)["scores"] == manifest(run, job)["scores"]
            for job in (FIRST, SECOND)
        )

    def samples(self, run: Path, engine: str) -> tuple[int, int]:
        """(steps that were trained again from a checkpoint, steps with other samples than in the undisturbed run)."""
        repeated = wrong = 0
        for rank in (0, 1):
            wanted = {(job, step): digest for job, step, digest in _keys(self.whole(engine), rank)}
            seen: set[tuple[str, int]] = set()
            for job, step, digest in _keys(run, rank):
                repeated += (job, step) in seen and rank == 0
                wrong += wanted.get((job, step)) != digest
                seen.add((job, step))
            wrong += len(wanted.keys() - seen)
        return repeated, wrong


def _keys(run: Path, rank: int) -> list[Any]:
    path = run.parent / f"{run.name}-keys-{rank}.jsonl"
    # A killed process may leave half a line.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]


def message(ended: Ended) -> str:
    return " / ".join(line.removeprefix("compt: ") for line in ended.said.splitlines() if line.startswith("compt: "))


def disturb(bench: Bench, fault: str, run: Path) -> Found:
    """Put one fault of FAULTS into a run, repair what is needed, and resume."""
    return FAULTS[fault](bench, fault, run)


def _signalled(
    number: int, *ranks: int, engine: str = "ddp", agent: bool = False
) -> Callable[[Bench, str, Path], Found]:
    def act(bench: Bench, fault: str, run: Path) -> Found:
        group = bench.start("at step", run, engine=engine, agent=agent)
        group.wait_for("begun", 300)
        started = time.monotonic()
        for rank in ranks:
            os.kill(group.pid(rank), number)
        mark(group.folder, "go")
        ended = group.end(120)
        found = Found(fault, ended.codes, time.monotonic() - started, message(ended), engine=engine)
        return bench.finish(found, run)

    return act


def _inner(name: str, *changes: str, engine: str = "ddp", goes_on: bool = True) -> Callable[[Bench, str, Path], Found]:
    def act(bench: Bench, fault: str, run: Path) -> Found:
        group = bench.start(name, run, *changes, engine=engine)
        group.wait_for("begun", 300)
        started = time.monotonic()
        ended = group.end(180)
        found = Found(fault, ended.codes, time.monotonic() - started, message(ended), engine=engine)
        if goes_on:
            return bench.finish(found, run, *changes)
        found.went_on = ended.codes == [0, 0]
        found.note = f"{manifest(run, FIRST)['trained']['nonfinite_steps']} step left out by all processes"
        found.repeated_steps, found.wrong_samples = bench.samples(run, found.engine)
        return found

    return act


def _lost_store(bench: Bench, fault: str, run: Path) -> Found:
    group = bench.start("at step", run, agent=True)
    group.wait_for("begun", 300)
    started = time.monotonic()
    group.store = None
    mark(group.folder, "go")
    ended = group.end(120)
    return bench.finish(Found(fault, ended.codes, time.monotonic() - started, message(ended)), run)


def _torn(bench: Bench, fault: str, run: Path) -> Found:
    group = bench.start("at step", run)
    group.wait_for("begun", 300)
    os.kill(group.pid(1), signal.SIGKILL)
    mark(group.folder, "go")
    ended = group.end(120)
    newest = sorted((run / "jobs" / SECOND / "checkpoints").glob("step-*"))[-1]
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    return bench.finish(Found(fault, ended.codes, 0.0, message(ended)), run)


def _loader(number: int) -> Callable[[Bench, str, Path], Found]:
    def act(bench: Bench, fault: str, run: Path) -> Found:
        group = bench.start("at step, early", run, *ONE_LOADER)
        group.wait_for("begun", 300)
        (loader, *_) = psutil.Process(group.pid(0)).children()
        started = time.monotonic()
        os.kill(loader.pid, number)
        mark(group.folder, "go")
        ended = group.end(120)
        return bench.finish(Found(fault, ended.codes, time.monotonic() - started, message(ended)), run, *ONE_LOADER)

    return act


def _full_memory(bench: Bench, fault: str, run: Path) -> Found:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        raise PermissionError("mounts cannot be hidden from others here")
    group = bench.start("small shared memory", run, *ONE_LOADER)
    group.wait_for("begun", 300)
    started = time.monotonic()
    ended = group.end(120)
    return bench.finish(Found(fault, ended.codes, time.monotonic() - started, message(ended)), run, *ONE_LOADER)


def _changed(
    change: Callable[[Bench, Path], Callable[[], object]], before: Callable[[Bench], Sequence[str]] = lambda bench: ()
) -> Callable[[Bench, str, Path], Found]:
    """Stop a run, change a file, and go on: once with the change, which has to be refused, and once without.

    `change` returns how to undo it; `before` makes changes of the recipe.
    """

    def act(bench: Bench, fault: str, run: Path) -> Found:
        changes = before(bench)
        group = bench.start("at step", run, *changes)
        group.wait_for("begun", 300)
        for rank in (0, 1):
            os.kill(group.pid(rank), signal.SIGTERM)
        mark(group.folder, "go")
        assert group.end(120).codes == [75, 75]
        undo = change(bench, run)
        started = time.monotonic()
        refused = bench.start("none", run, *changes).end(120)
        found = Found(fault, refused.codes, time.monotonic() - started, message(refused))
        undo()
        return bench.finish(found, run, *changes)

    return act


def _other_captions(bench: Bench, _: Path) -> Callable[[], object]:
    """Other captions of the same length in the shards."""
    kept = {path: path.read_bytes() for path in (bench.base / "train").glob("*.tar")}
    for path, blob in kept.items():
        path.write_bytes(blob.replace(b"red", b"tan").replace(b"cat", b"cow"))
    return lambda: [path.write_bytes(blob) for path, blob in kept.items()]


def _table(bench: Bench) -> Sequence[str]:
    """A table with the captions that the shards have."""
    rows = ["key,caption"]
    for path in sorted((bench.base / "train").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                if member.name.endswith(".json"):
                    captions = json.load(archive.extractfile(member))["captions"]  # type: ignore[arg-type]
                    rows += [f"{member.name.removesuffix('.json')},{caption}" for caption in captions]
    (bench.base / "captions.csv").write_text("\n".join(rows) + "\n")
    return ("data.captions_csv=captions.csv",)


def _other_table(bench: Bench, _: Path) -> Callable[[], object]:
    """One word of the table becomes another of the same length."""
    path = bench.base / "captions.csv"
    text = path.read_text()
    path.write_text(text.replace("red", "tan", 1))
    return lambda: path.write_text(text)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def _pickle(bench: Bench, run: Path) -> Callable[[], object]:
    """A pickle that runs a command, with the right hash, in the newest checkpoint."""
    newest = sorted((run / "jobs" / SECOND / "checkpoints").glob("step-*"))[-1]
    ran = bench.base / "ran"
    path = newest / "state" / ".metadata"
    path.write_bytes(pickle.dumps(_Touch(ran)))
    record = json.loads((newest / "state.json").read_text())
    del record["sha256"]
    record["files"]["state/.metadata"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(newest / "state.json", {**record, "sha256": hash_json(record)})

    def undo() -> None:
        assert not ran.exists(), "the pickle has run"
        shutil.rmtree(newest)

    return undo


def _corrupt(bench: Bench, fault: str, run: Path) -> Found:
    group = bench.start("at step", run)
    group.wait_for("begun", 300)
    kept = {path: path.read_bytes() for path in (bench.base / "train").glob("*.tar")}
    started = time.monotonic()
    for path, blob in kept.items():
        with path.open("r+b") as file:  # in place: the loader has it open
            file.seek(len(blob) // 3)
            file.write(b"\xff" * (len(blob) // 2))
    mark(group.folder, "go")
    ended = group.end(120)
    found = Found(fault, ended.codes, time.monotonic() - started, message(ended), ended.codes == [0, 0])
    for path, blob in kept.items():
        path.write_bytes(blob)
    skipped = manifest(run, SECOND)["trained"]["skipped_samples"]
    found.note = f"{sum(skipped.values())} damaged samples counted and replaced"
    found.repeated_steps, found.wrong_samples = bench.samples(run, found.engine)
    return found


def _absent(bench: Bench, fault: str, run: Path) -> Found:
    started = time.monotonic()
    group = bench.start("none", run, connect_seconds=20)
    group.processes[1].kill()
    ended = group.end(120)
    found = Found(fault, ended.codes, time.monotonic() - started, message(ended))
    return bench.finish(found, run)


def _port(bench: Bench, fault: str, run: Path) -> Found:
    started = time.monotonic()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ended = bench.start("none", run, port=taken.getsockname()[1], connect_seconds=20).end(120)
    found = Found(fault, ended.codes, time.monotonic() - started, message(ended))
    return bench.finish(found, run)


_NEW_MOUNTS = 0x00020000
"""CLONE_NEWNS of unshare(2): what this process mounts, others do not see."""


def _mount(*words: str) -> int:
    return subprocess.run(["mount", *words], check=False).returncode


def _mount_small(folder: str, size: str) -> int:
    return _mount("-t", "tmpfs", "-o", f"size={size}", "compt-test", folder)


@contextlib.contextmanager
def small_disk(folder: Path, mib: int = 200) -> Iterator[None]:
    """A tmpfs; needs root. Raises PermissionError."""
    folder.mkdir(parents=True)
    if _mount_small(str(folder), f"{mib}m"):
        raise PermissionError("a tmpfs cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _full(bench: Bench, fault: str, run: Path) -> Found:
    disk = run.parent / f"{run.name}-disk"
    with small_disk(disk):
        run = disk / "run"
        group = bench.start("at step", run)
        group.wait_for("begun", 300)
        started = time.monotonic()
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"\0" * 4096)
                file.flush()
        mark(group.folder, "go")
        ended = group.end(120)
        found = Found(fault, ended.codes, time.monotonic() - started, message(ended))
        ballast.unlink()
        return bench.finish(found, run)


def _read_only(bench: Bench, fault: str, run: Path) -> Found:
    disk = run.parent / f"{run.name}-disk"
    with small_disk(disk):
        run = disk / "run"
        group = bench.start("at step", run)
        group.wait_for("begun", 300)
        os.kill(group.pid(0), signal.SIGKILL)
        mark(group.folder, "go")
        group.end(120)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        started = time.monotonic()
        ended = bench.start("none", run).end(120)
        found = Found(fault, ended.codes, time.monotonic() - started, message(ended))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        return bench.finish(found, run)


KILL, STOP, TERM, USR1 = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR1

FAULTS: dict[str, Callable[[Bench, str, Path], Found]] = {
    "kill -9 of rank 0": _signalled(KILL, 0),
    "kill -9 of rank 1": _signalled(KILL, 1),
    "kill -9 of rank 0, store with the launcher": _signalled(KILL, 0, agent=True),
    "SIGSTOP of rank 0": _signalled(STOP, 0),
    "SIGSTOP of rank 1": _signalled(STOP, 1),
    "a rank sleeps in the data": _inner("sleeping in the data"),
    "SIGTERM to all": _signalled(TERM, 0, 1),
    "SIGUSR1 to one rank": _signalled(USR1, 1),
    "kill -9 in a checkpoint": _inner("dying in a checkpoint"),
    "kill -9 in an asynchronous checkpoint": _inner("dying in a checkpoint", "engine.async_checkpoints=true"),
    "kill -9 while the model is written": _inner("dying in the model"),
    "kill -9 in the evaluation": _inner("dying in the evaluation"),
    "disk full": _full,
    "run folder read-only": _read_only,
    "tars damaged in the middle": _corrupt,
    "gradient of one rank not a number": _inner("no number on one rank", goes_on=False),
    "a rank is missing at the start": _absent,
    "port taken": _port,
    "newest checkpoint torn": _torn,
    "one rank out of memory": _inner("no memory on one rank"),
    "launcher's store lost": _lost_store,
    "a loader process is killed": _loader(KILL),
    "a loader process is stopped": _loader(STOP),
    "shared memory full": _full_memory,
    "other shards of the same size at the resume": _changed(_other_captions),
    "another table of captions at the resume": _changed(_other_table, _table),
    "a pickle that runs a command in a checkpoint": _changed(_pickle),
    "kill -9 of rank 1, under fsdp2": _signalled(KILL, 1, engine="fsdp2"),
    "kill -9 of rank 0, under zero2": _signalled(KILL, 0, engine="zero2"),
    "kill -9 in a checkpoint, under zero3": _inner("dying in a checkpoint", engine="zero3"),
    "SIGTERM to all, under zero2": _signalled(TERM, 0, 1, engine="zero2"),
    "gradient of one rank not a number, under fsdp2": _inner("no number on one rank", engine="fsdp2", goes_on=False),
    "gradient of one rank not a number, under zero3": _inner("no number on one rank", engine="zero3", goes_on=False),
}
