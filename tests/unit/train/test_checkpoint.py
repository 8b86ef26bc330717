"""Checkpoints of one process; several are in tests/dist/train/test_checkpoint.py."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compt.errors import ArtefactError, RunError
from compt.files import hash_json, sha256_file
from compt.train import checkpoint
from compt.train.checkpoint import Saver, remove_checkpoints
from tests.dist.spawn import CONTEXT
from tests.helpers.checkpoint import SHAPES, engine, same
from tests.helpers.process import finish, start

KEPT = {"identity": {"recipe": "abc"}, "counts": {"step": 7, "seconds": 1.25}, "samples": 448}
BIG = {"model.big": (2**18,)}


def saved(folder: Path, step: int, seed: int = 0, **options: Any) -> Path:
    Saver(folder, **options).save(engine(seed), step, KEPT)
    return folder / f"step-{step:08d}"


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("compt")]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = saved(tmp_path, 7, seed=3)
    assert listed(path) == ["state", "state.json"]
    assert (tmp_path / "latest").read_text() == "step-00000007\n"
    assert checkpoint.find_latest(tmp_path) == path
    other = engine(4)
    assert not same(other.whole(), engine(3).whole())
    assert checkpoint.load(path, other) == KEPT == checkpoint.read_state(path)
    assert same(other.whole(), engine(3).whole())
    record = json.loads((path / "state.json").read_text())
    assert (record["step"], record["engine"], record["format"], record["world_size"]) == (7, "Toy", "dcp", 1)
    assert sorted(record["files"]) == ["state/.metadata", "state/__0_0.distcp"]


def test_an_asynchronous_one_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    saver, own = Saver(tmp_path, asynchronous=True), engine(3)
    saver.save(own, 7, KEPT)
    own.step()
    saver.save(own, 8, KEPT)
    own.step()
    assert (tmp_path / "latest").read_text() == "step-00000007\n", "a save ends the one before"
    saver.finish()
    saver.finish()
    for step, path in enumerate(sorted(tmp_path.glob("step-*"))):
        other, expected = engine(4), engine(3)
        checkpoint.load(path, other)
        for _ in range(step):
            expected.step()
        assert same(other.whole(), expected.whole())


def test_an_asynchronous_one_takes_its_place_when_it_is_asked_for(tmp_path: Path) -> None:
    saver = Saver(tmp_path, asynchronous=True)
    saver.poll()
    saver.save(engine(), 7, KEPT)
    assert checkpoint.find_latest(tmp_path) is None
    for _ in range(1000):
        saver.poll()
        if checkpoint.find_latest(tmp_path):
            break
        time.sleep(0.01)
    assert listed(tmp_path) == ["latest", "step-00000007"]


def test_the_newest_are_kept_and_some_others(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        saved(tmp_path, step, keep=2)
    assert listed(tmp_path) == ["latest", "step-00000020", "step-00000025"]
    for step in (30, 35, 40, 45, 50, 55):
        saved(tmp_path, step, keep=1, keep_every=20)
    assert listed(tmp_path) == ["latest", "step-00000020", "step-00000040", "step-00000055"]


def test_later_ones_of_another_way_go(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        saved(tmp_path, step, keep=9, keep_every=10)
    saved(tmp_path, 15, keep=9, keep_every=10)
    assert listed(tmp_path) == ["latest", "step-00000010", "step-00000015"]


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    path, other = saved(tmp_path, 5, seed=9), engine()
    checkpoint.load(path, other)
    assert same(other.whole(), engine(9).whole())
    assert listed(tmp_path) == ["latest", "step-00000005"]


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) is None
    assert checkpoint.find_latest(tmp_path / "absent") is None


DATA = "state/__0_0.distcp"


def _truncate(path: Path) -> None:
    os.truncate(path / DATA, (path / DATA).stat().st_size - 3)


def _flip(path: Path) -> None:
    content = bytearray((path / DATA).read_bytes())
    content[len(content) // 2] ^= 1
    (path / DATA).write_bytes(content)


def _changed_state(path: Path) -> None:
    record = json.loads((path / "state.json").read_text())
    record["state"]["counts"]["step"] = 8
    (path / "state.json").write_text(json.dumps(record))


def _naming(name: str) -> Callable[[Path], None]:
    """A valid record that names one more file; for "/", this very file."""

    def names(path: Path) -> None:
        whole = path / DATA
        entry = {"bytes": whole.stat().st_size, "sha256": sha256_file(whole)}
        record = json.loads((path / "state.json").read_text())
        del record["sha256"]
        record["files"][str(whole) if name == "/" else name] = entry
        (path / "state.json").write_text(json.dumps({**record, "sha256": hash_json(record)}))

    return names


FAULTS: dict[Callable[[Path], Any], str] = {
    _truncate: r"state/__0_0.distcp has \d+ bytes instead of \d+",
    _flip: "state/__0_0.distcp does not have its recorded hash",
    lambda path: os.truncate(path / "state.json", 20): "state.json is torn",
    _changed_state: "state.json was changed",
    lambda path: (path / DATA).unlink(): "state/__0_0.distcp is missing",
    lambda path: (path / "state/.metadata").unlink(): "state/.metadata is missing",
    lambda path: (path / "state.json").unlink(): "state.json is missing",
    lambda path: (path / "state.json").write_text("[]"): "state.json is torn",
    _naming("/no/such/file"): "state.json names /no/such/file, which is not inside the folder",
    _naming("/"): "state.json names /.*/state/__0_0.distcp, which is not inside the folder",
    _naming(f"../step-00000010/{DATA}"): "state.json names .*, which is not inside the folder",
}


@pytest.mark.parametrize("harm, message", FAULTS.items(), ids=lambda value: getattr(value, "__name__", "message"))
def test_a_torn_one_is_passed_over_and_said_so(tmp_path, harm, message, caplog) -> None:
    good, bad = saved(tmp_path, 5), saved(tmp_path, 10)
    harm(bad)
    assert checkpoint.find_latest(tmp_path) == good
    (said,) = warned(caplog)
    assert str(bad) in said
    if harm is not _flip:  # load checks sizes, find_latest the bytes
        with pytest.raises(ArtefactError, match=message) as error:
            checkpoint.load(bad, engine())
        assert str(bad) in str(error.value)


def test_one_of_the_former_layout_is_passed_over_and_said_so(tmp_path, caplog) -> None:
    former = tmp_path / "step-00000005"
    former.mkdir()
    save_file({"model.x": torch.zeros(1)}, former / "tensors.safetensors")
    entry = {"tensors.safetensors": {"bytes": 1, "sha256": "0"}}
    (former / "state.json").write_text(json.dumps({"step": 5, "files": entry, "state_sha256": "0", "state": {}}))
    assert checkpoint.find_latest(tmp_path) is None
    assert f"{former}: of a former compt, in one tensors.safetensors, which is not read any more" in caplog.text


def test_a_torn_newer_one_never_pushes_a_whole_one_out(tmp_path: Path) -> None:
    saved(tmp_path, 10, keep=1)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000020")
    _truncate(tmp_path / "step-00000020")
    path = saved(tmp_path, 15, keep=1)
    assert checkpoint.find_latest(tmp_path) == path
    assert listed(tmp_path) == ["latest", "step-00000015"]


def test_leftovers_of_a_killed_process_go_at_the_next_save(tmp_path: Path) -> None:
    leftover, other = tmp_path / ".step-00000005.tmp-x1y2", tmp_path / ".not-ours"
    (leftover / "state").mkdir(parents=True)
    other.mkdir()
    saved(tmp_path, 10)
    assert not leftover.exists()
    assert other.exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/compt-was-here",)


def test_forged_metadata_is_refused(tmp_path: Path) -> None:
    """An attacker who also writes the hashes."""
    path, other = saved(tmp_path, 5), engine(4)
    before = other.whole()
    (path / "state/.metadata").write_bytes(pickle.dumps(Evil()))
    record = json.loads((path / "state.json").read_text())
    record.pop("sha256")
    record["files"] |= checkpoint._describe(path, [path / "state/.metadata"])
    (path / "state.json").write_text(json.dumps(record | {"sha256": checkpoint.hash_json(record)}))
    for action in (lambda: checkpoint.load(path, other), lambda: checkpoint.open_weights(path)):
        with pytest.raises(ArtefactError, match=r"refused: it asks for posix.system"):
            action()
    assert same(other.whole(), before)
    assert not Path("/tmp/compt-was-here").exists()


def test_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path = saved(tmp_path, 5)
    other = engine(4, shapes=SHAPES | {"model.visual.proj": (7, 6)}, ema=False)
    before = other.whole()
    with pytest.raises(ArtefactError, match="this state is of another model or engine: ") as error:
        checkpoint.load(path, other)
    assert "ema.updates is unexpected" in str(error.value)
    assert "model.model.visual.proj has shape [7, 5] instead of [7, 6]" in str(error.value)
    assert "and 1 more" in str(error.value)
    assert same(other.whole(), before)


def test_the_model_in_a_checkpoint(tmp_path: Path) -> None:
    path, live = saved(tmp_path, 5, seed=3), engine(3).tensors
    for average, prefix in ((False, "model."), (True, "ema.")):
        found = checkpoint.open_weights(path, average)
        assert set(found) == {name.removeprefix("model.") for name in SHAPES if name.startswith("model.")}
        assert found.shape("logit_scale") == found["logit_scale"].shape == ()
        assert all(torch.equal(found[name].reshape(-1), live[f"{prefix}model.{name}"].reshape(-1)) for name in found)


def test_a_model_without_an_average(tmp_path: Path) -> None:
    Saver(tmp_path).save(engine(3, ema=False), 5, {})
    with pytest.raises(ArtefactError, match="no moving average of the weights in it"):
        checkpoint.open_weights(tmp_path / "step-00000005", average=True)


def test_another_kind_of_engine_takes_over_the_weights_alone(tmp_path, caplog, monkeypatch) -> None:
    path, other = saved(tmp_path, 5, seed=3), engine(4)
    before = other.whole()
    record = json.loads((path / "state.json").read_text())
    record.pop("sha256")
    record |= {"format": "deepspeed", "engine": "ZeroEngine"}
    (path / "state.json").write_text(json.dumps(record | {"sha256": checkpoint.hash_json(record)}))
    weights = checkpoint.module_weights(path / "state", "dcp")
    monkeypatch.setattr(checkpoint, "module_weights", lambda *_: weights)
    assert checkpoint.load(path, other) == KEPT
    expected = {n: v if n.startswith("model.") else before[n] for n, v in engine(3).whole().items()}
    assert same(other.whole(), expected)
    (said,) = warned(caplog)
    assert said.startswith(f"{path} was written by another kind of engine (ZeroEngine): its weights are taken over")
    misfit = engine(4, shapes=BIG)
    with pytest.raises(ArtefactError, match=r"model\.big is missing"):
        checkpoint.load(path, misfit)
    assert same(misfit.whole(), engine(4, shapes=BIG).whole())


def assert_a_full_disk_keeps_the_previous(folder: Path, asynchronous: bool = False) -> None:
    good = saved(folder, 5)
    saver = Saver(folder, asynchronous=asynchronous)
    with pytest.raises(RunError, match="step-00000010") as error:
        saver.save(engine(shapes=BIG), 10, KEPT)
        saver.finish()
    assert str(folder) in str(error.value)
    assert "No space left" in str(error.value) or "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert checkpoint.find_latest(folder) == good
    assert checkpoint.load(good, engine()) == KEPT
    assert (folder / "latest").read_text() == "step-00000005\n"
    assert listed(folder) == ["latest", "step-00000005"]
    saver.finish()
    saver.save(engine(), 11, KEPT)
    saver.finish()
    assert checkpoint.find_latest(folder) == folder / "step-00000011"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_keeps_the_previous_one(tmp_path: Path, asynchronous: bool) -> None:
    """On a real file system of 1 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here; the two tests below do without")
    try:
        assert_a_full_disk_keeps_the_previous(tmp_path / "checkpoints", asynchronous)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_file_size_limit_keeps_the_previous_one(tmp_path: Path) -> None:
    """In a process of its own because the limit cannot be raised again."""
    assert finish(start(limit_file_sizes, tmp_path), 120.0) == 0


def limit_file_sizes(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    assert_a_full_disk_keeps_the_previous(folder)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_a_late_step_keeps_the_previous_one(tmp_path, monkeypatch, call) -> None:
    good = saved(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(RunError, match=r"step-00000010.*No space left"):
            saved(tmp_path, 10)
    assert checkpoint.find_latest(tmp_path) == good


LAYERS = {f"layer{number}": (40_000,) for number in range(4)}


def save_without_end(folder: Path, asynchronous: bool, told: Connection) -> None:
    torch.set_num_threads(1)
    own = engine(shapes=LAYERS, ema=False)
    path = checkpoint.find_latest(folder)
    step = 0 if path is None else checkpoint.load(path, own)["step"]
    saver = Saver(folder, asynchronous=asynchronous)
    while True:
        step += 1
        for tensor in own.tensors.values():
            tensor.fill_(step)
        saver.save(own, step, {"step": step})
        told.send(step - asynchronous)  # what is in its place by now


def reports(receiver: Connection) -> Iterator[int]:
    with contextlib.suppress(EOFError):
        while True:
            yield receiver.recv()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_any_moment_a_whole_one_is_there(tmp_path: Path, asynchronous: bool) -> None:
    folder, draws, rubbish = tmp_path / "checkpoints", random.Random(0), 0
    for _ in range(12):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=save_without_end, args=(folder, asynchronous, sender), daemon=True)
        process.start()
        sender.close()
        told = reports(receiver)
        first = [next(told), next(told)]
        time.sleep(draws.uniform(0, 0.05))
        process.kill()
        done = max([*first, *told])
        process.join()
        path = checkpoint.find_latest(folder)
        assert path is not None
        own = engine(shapes=LAYERS, ema=False)
        state = checkpoint.load(path, own)
        # Everything that was reported as saved is there; one more may be, whose report was cut off.
        assert state["step"] in (done, done + 1)
        assert all(bool((tensor == state["step"]).all()) for tensor in own.tensors.values())
        rubbish += any(path.name.startswith(".step-") for path in folder.iterdir())
    assert rubbish, "no kill came in the middle of a save: the test shows nothing"


def test_a_folder_of_checkpoints_behind_a_link_is_cleaned(tmp_path: Path) -> None:
    for name, other in (("own", False), ("shared", True)):
        target, link = tmp_path / name, tmp_path / f"{name}-link"
        (target / "step-00000003" / "state").mkdir(parents=True)
        (target / ".step-00000004.tmp-0123abcd").mkdir()
        (target / "latest").write_text("step-00000003")
        if other:
            (target / "notes.txt").touch()
        link.symlink_to(target)
        remove_checkpoints(link)
        assert not link.is_symlink()
        assert [path.name for path in target.glob("*")] == (["notes.txt"] if other else [])
        assert target.exists() == other
