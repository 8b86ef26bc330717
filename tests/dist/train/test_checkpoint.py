"""Checkpoints that several ranks write and others read: bit for bit, whatever happens to one of them."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor

from compt.dist import collectives as dist
from compt.dist.watch.causes import is_consequence
from compt.engines import state_dcp
from compt.errors import ArtefactError, ComptError
from compt.expand.axes import parameters
from compt.train import checkpoint
from compt.train.checkpoint import Saver
from compt.weights.artefact import write_artefact
from compt.weights.open import open_model
from tests.dist.spawn import run_ranks
from tests.helpers.checkpoint import SHAPES, engine, same
from tests.unit.expand.cases import BIG

WAYS = [(sharded, asynchronous) for sharded in (False, True) for asynchronous in (False, True)]
MODEL = {f"model.{name}": parameter.shape for name, parameter in parameters(BIG).items()} | {
    "model.logit_scale": (1,),
    "projector.image.weight": (6, 5),
}
LARGE = {"model.large": (2**18,)}
KEPT = {"counts": {"step": 7}}


def save_in_each_way(folder: Path) -> None:
    """What a rank writes of seed 3 (and of 5 in shards), one folder a way; the state changes at once."""
    for sharded, asynchronous in WAYS:
        saver, own = Saver(folder / f"{sharded}-{asynchronous}", asynchronous=asynchronous), engine(3, sharded=sharded)
        saver.save(own, 7, KEPT)
        own.step()
        saver.finish()


def load_into_each_kind(folder: Path) -> int:
    """Load everything there into whole tensors and into shards. Returns how many were loaded."""
    expected, loaded = engine(3).whole(), 0
    for path in sorted(folder.glob("*/step-*")):
        for sharded in (False, True) if torch_dist.is_initialized() else (False,):
            other = engine(4, sharded=sharded)
            assert checkpoint.load(path, other) == KEPT
            assert same(other.whole(), expected), (path, sharded)
            assert isinstance(other.values["model.visual.proj"], DTensor) == sharded
            loaded += 1
    return loaded


def both(save_to: Path | None, *load_from: Path) -> int:
    loaded = sum(map(load_into_each_kind, load_from))
    if save_to is not None:
        save_in_each_way(save_to)
    return loaded


def test_any_number_of_ranks_reads_what_any_number_wrote_whole_or_in_shards(tmp_path: Path) -> None:
    three, two, one = tmp_path / "3", tmp_path / "2", tmp_path / "1"
    assert run_ranks(both, 3, three) == [0] * 3
    assert run_ranks(both, 2, two, three) == [8] * 2
    assert run_ranks(both, 1, one, three, two) == [16]
    assert run_ranks(both, 3, None, three, two, one) == [24] * 3
    assert both(None, three, two, one) == 12, "without a process group nothing is in shards"
    for world, folder in ((3, three), (2, two), (1, one)):
        for path in folder.glob("*/step-*"):
            record = json.loads((path / "state.json").read_text())
            data = sorted(name for name in record["files"] if name.endswith(".distcp"))
            assert data == [f"state/__{rank}_0.distcp" for rank in range(world)]
            assert record["world_size"] == world
            sizes = [record["files"][name]["bytes"] for name in data]
            assert max(sizes) < 0.8 * sum(sizes) or world == 1, "each rank writes a share"
            assert checkpoint.find_latest(path.parent) == path


def write_models(folder: Path) -> list[str]:
    """Save a model in shards, and write model folders of it from the checkpoint with all ranks."""
    Saver(folder / "checkpoints").save(engine(3, sharded=True, shapes=MODEL), 7, KEPT)
    path = checkpoint.find_latest(folder / "checkpoints")
    assert path is not None
    write(folder / "model", checkpoint.open_weights(path), checkpoint.open_weights(path, average=True), True)
    return sorted(checkpoint.open_weights(path))


def write(folder: Path, state: Any, average: Any, together: bool) -> None:
    options: dict[str, Any] = {"max_shard_bytes": 20_000, "extra_states": {"ema": average}, "together": together}
    write_artefact(folder, state, BIG, {"step": 7}, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ranks_write_the_model_of_a_checkpoint_that_one_process_writes_of_the_gathered_state(tmp_path: Path) -> None:
    assert all(names == sorted(parameters(BIG)) for names in run_ranks(write_models, 3, tmp_path))
    gathered = engine(3, shapes=MODEL).whole()
    states = [
        {
            name.removeprefix(prefix): tensor.reshape(()) if name.endswith("logit_scale") else tensor
            for name, tensor in gathered.items()
            if name.startswith(prefix)
        }
        for prefix in ("model.model.", "ema.model.")
    ]
    write(tmp_path / "alone", *states, False)
    alone = content(tmp_path / "alone")
    assert sum(name.startswith("model-") for name in alone) >= 8
    assert content(tmp_path / "model") == alone
    folder = tmp_path / "checkpoints" / "step-00000007" / "state"
    for prefix, state in zip(("model.model", "ema"), states, strict=True):
        opened = open_model(folder, BIG, prefix).state
        assert same({name: opened[name] for name in opened}, state), "as a model from outside"


# --- faults of one rank


def small_files(rank: int) -> Callable[[], None]:
    """On `rank`, files can have at most 500 kB."""
    if dist.rank() != rank:
        return lambda: None
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def remounted(folder: Path, rank: int) -> Callable[[], None] | None:
    """Mounts `folder` read-only on `rank`; None if this process may not mount."""
    ready = True
    if dist.rank() == rank:
        os.sync()
        ready = ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0  # CLONE_NEWNS, of this thread
        for command in (
            ["mount", "--make-rprivate", "/"],
            ["mount", "--bind", str(folder), str(folder)],
            ["mount", "-o", "remount,bind,ro", str(folder)],
        ):
            ready = ready and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if dist.any_true(not ready):
        return None

    def fix() -> None:
        if dist.rank() == rank:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    return fix


def attempt(folder: Path, asynchronous: bool, fault: Callable[[], Callable[[], None] | None]) -> str:
    """The error of saving under a fault, or "". Removes the fault."""
    fix = fault()
    if fix is None:
        return "not allowed"
    saver = Saver(folder, asynchronous=asynchronous)
    try:
        saver.save(engine(4, sharded=True, shapes=LARGE), 10, KEPT)
        saver.finish()
    except ComptError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        fix()
        dist.barrier()
    return ""


def misfortunes(folder: Path) -> dict[str, str]:
    Saver(folder).save(engine(3, sharded=True), 5, KEPT)
    told = {}
    for asynchronous in (False, True):
        for rank in range(dist.world_size()):
            told[f"small {rank} {asynchronous}"] = attempt(folder, asynchronous, lambda: small_files(rank))  # noqa: B023
    told["read-only"] = attempt(folder, False, lambda: remounted(folder, 1))
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["latest", "step-00000005"], left
    other = engine(4)
    checkpoint.load(folder / "step-00000005", other)
    assert same(other.whole(), engine(3).whole())
    dist.barrier()
    Saver(folder).save(engine(3), 11, KEPT)
    return told


def test_what_one_rank_cannot_write_all_ranks_raise_and_the_previous_stays(tmp_path: Path) -> None:
    told = run_ranks(misfortunes, 2, tmp_path)
    assert told[0] == told[1]
    for name, text in told[0].items():
        if text == "not allowed":
            continue
        assert text.startswith(f"RunError: cannot write {tmp_path}/step-00000010"), (name, text)
        assert ("Read-only file system" if name == "read-only" else "File too large") in text, (name, text)
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step-00000011"


def die_in_a_save(folder: Path, asynchronous: bool) -> None:
    Saver(folder).save(engine(3, sharded=True), 5, KEPT)
    write = state_dcp._DcpWriter.write_data

    def die(*arguments: Any) -> Any:
        done = write(*arguments)
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    state_dcp._DcpWriter.write_data = die  # type: ignore[method-assign]
    saver = Saver(folder, asynchronous=asynchronous)
    saver.save(engine(4, sharded=True), 10, KEPT)
    saver.finish()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_is_killed_in_a_save_leaves_the_previous(tmp_path: Path, asynchronous: bool) -> None:
    with pytest.raises(AssertionError, match="rank 1: died"):
        run_ranks(die_in_a_save, 2, tmp_path, asynchronous)
    assert {path.name.partition(".tmp-")[0] for path in tmp_path.iterdir()} - {".step-00000010"} == {
        "latest",
        "step-00000005",
    }
    path, other = checkpoint.find_latest(tmp_path), engine(4)
    assert path == tmp_path / "step-00000005"
    checkpoint.load(path, other)
    assert same(other.whole(), engine(3).whole())


def save_with_a_fault(folder: Path, fault: Exception) -> list[str]:
    """The errors of all ranks if writing fails on rank 1, but not because of the disk; at once and in a thread."""
    told = []
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: Any) -> None:
            raise fault

        if dist.rank() == 1:
            patch.setattr(FileSystemWriter, "write_data", fail)
        for asynchronous in (False, True):
            try:
                state_dcp.save_state({"large": torch.zeros(9)}, folder / str(asynchronous), asynchronous=asynchronous)()
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}")
            dist.barrier()
    return told


@pytest.mark.parametrize(
    "fault",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_of_what_one_rank_meets_only_the_disks_faults_are_the_disks(tmp_path: Path, fault: Exception) -> None:
    first, second = run_ranks(save_with_a_fault, 2, tmp_path, fault)
    if "inline_container" in str(fault):
        assert first == second == [f"RunError: cannot write {tmp_path}/{way}: {fault}" for way in (False, True)]
    else:
        assert second == [f"{type(fault).__name__}: {fault}"] * 2
        assert first == [f"DistError: rank 1 could not write its share of a checkpoint: {type(fault).__name__}"] * 2
        assert is_consequence(torch_dist.DistError())


def lose_a_rank(folder: Path, asynchronous: bool) -> None:
    """Rank 1 is killed while it writes; rank 0 records its error."""
    dist.group_beside()
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        if dist.rank() == 1:
            patch.setattr(FileSystemWriter, "write_data", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            state_dcp.save_state({"large": torch.zeros(9)}, folder / "state", asynchronous=asynchronous)()
        except ComptError as error:
            (folder / "told").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_is_lost_in_a_save_is_not_a_fault_of_the_disk(tmp_path: Path, asynchronous: bool) -> None:
    with pytest.raises(AssertionError, match="rank 1: died"):
        run_ranks(lose_a_rank, 2, tmp_path, asynchronous)
    assert (tmp_path / "told").read_text().startswith("Gone: another process of this job has exited")


# --- checkpoints that do not fit


def misfits(folder: Path) -> list[str]:
    Saver(folder).save(engine(3, sharded=True), 5, KEPT)
    path, told = folder / "step-00000005", []
    other = engine(4, sharded=True, shapes=SHAPES | {"model.visual.proj": (7, 6)})
    before = other.whole()

    def note(action: Callable[[], Any]) -> None:
        try:
            action()
        except ArtefactError as error:
            told.append(str(error))
        assert same(other.whole(), before)

    note(lambda: checkpoint.load(path, other))
    weights = checkpoint.module_weights(path / "state", "dcp")
    note(lambda: other.set_weights(weights))
    dist.barrier()
    if dist.is_main():
        os.truncate(path / "state/__1_0.distcp", 100)
        (path / "state/.metadata").write_bytes(b"cos\nsystem\n(S'touch /tmp/compt-was-here'\ntR.")
    dist.barrier()
    note(lambda: other.load(path / "state"))
    return told


def test_what_does_not_fit_is_refused_by_all_before_anything_changes(tmp_path: Path) -> None:
    told = run_ranks(misfits, 2, tmp_path)
    assert told[0] == told[1]
    state, weights, forged = told[0]
    assert "model.model.visual.proj has shape [7, 5] instead of [7, 6]" in state
    assert "; model.visual.proj has shape [7, 5]" in f"; {weights.rpartition(': ')[2]}"
    assert "refused: it asks for os.system" in forged
