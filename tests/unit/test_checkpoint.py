from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compt import checkpoint
from compt.errors import ArtefactError, RunError

TENSORS = {
    "model.weight": torch.arange(12.0).view(3, 4),
    "optim.weight.exp_avg": torch.full((3, 4), 0.5, dtype=torch.bfloat16),
    "optim.step": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}
STATE = {"identity": {"recipe": "abc"}, "counts": {"step": 7, "seconds": 1.25}, "samples": 448}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, TENSORS, STATE)
    assert path == tmp_path / "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "tensors.safetensors"]
    assert (tmp_path / "latest").read_text() == "step-00000007\n"
    assert checkpoint.find_latest(tmp_path) == path
    tensors, state = checkpoint.load(path)
    assert _same(tensors, TENSORS)
    assert state == STATE


def test_random_state_continues_after_a_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(3)
    path = checkpoint.save(tmp_path, 1, {"rng.torch": torch.get_rng_state()}, {})
    expected = torch.rand(5)
    torch.manual_seed(9)
    torch.set_rng_state(checkpoint.load(path)[0]["rng.torch"])
    assert torch.equal(torch.rand(5), expected)


def test_tied_and_transposed_tensors_are_saved_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    tensors = {"a": base, "tied": base, "row": base[1], "turned": base.T, "parameter": torch.nn.Parameter(base * 2)}
    loaded, _ = checkpoint.load(checkpoint.save(tmp_path, 1, tensors, {}))
    assert _same(loaded, {name: tensor.detach().clone() for name, tensor in tensors.items()})


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, TENSORS, STATE, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000015", "step-00000020"]


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, TENSORS, STATE)
    path = checkpoint.save(tmp_path, 5, {"x": torch.ones(1)}, {"second": True})
    assert checkpoint.load(path)[1] == {"second": True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) is None
    assert checkpoint.find_latest(tmp_path / "absent") is None


def _truncate(path: Path) -> None:
    file = path / "tensors.safetensors"
    os.truncate(file, file.stat().st_size - 3)


def _flip(path: Path) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _torn_state(path: Path) -> None:
    os.truncate(path / "state.json", 20)


def _changed_state(path: Path) -> None:
    record = json.loads((path / "state.json").read_text())
    record["state"]["counts"]["step"] = 8
    (path / "state.json").write_text(json.dumps(record))


FAULTS = {
    _truncate: r"tensors.safetensors has \d+ bytes instead of \d+",
    _flip: "tensors.safetensors does not have its recorded hash",
    _torn_state: "state.json is torn",
    _changed_state: "state.json was changed",
    lambda path: (path / "tensors.safetensors").unlink(): "tensors.safetensors is missing",
    lambda path: (path / "state.json").unlink(): "state.json is missing",
    lambda path: (path / "state.json").write_text("[]"): "state.json is torn",
}


@pytest.mark.parametrize("harm, message", FAULTS.items(), ids=lambda value: getattr(value, "__name__", "message"))
def test_a_torn_one_is_passed_over_and_said_so(tmp_path, harm, message, caplog) -> None:
    good = checkpoint.save(tmp_path, 5, TENSORS, STATE)
    bad = checkpoint.save(tmp_path, 10, TENSORS, STATE)
    harm(bad)
    assert checkpoint.find_latest(tmp_path) == good
    assert len(caplog.records) == 1
    assert str(bad) in caplog.text
    caplog.records[0].getMessage()
    if harm is not _flip:  # load checks sizes, find_latest the bytes
        with pytest.raises(ArtefactError, match=message) as error:
            checkpoint.load(bad)
        assert str(bad) in str(error.value)


def test_a_torn_newer_one_never_pushes_a_whole_one_out(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 10, TENSORS, STATE, keep=1)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000020")
    _truncate(tmp_path / "step-00000020")
    path = checkpoint.save(tmp_path, 15, TENSORS, STATE, keep=1)
    assert checkpoint.find_latest(tmp_path) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000015"]


def test_leftovers_of_a_killed_process_go_at_the_next_save(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-00000005.tmp-x1y2"
    leftover.mkdir()
    (leftover / "tensors.safetensors").write_bytes(b"half")
    other = tmp_path / ".not-ours"
    other.mkdir()
    checkpoint.save(tmp_path, 10, TENSORS, STATE)
    assert not leftover.exists()
    assert other.exists()


def _assert_full_disk_keeps_the_previous(folder: Path, size: int) -> None:
    good = checkpoint.save(folder, 5, TENSORS, STATE)
    with pytest.raises(RunError, match="step-00000010") as error:
        checkpoint.save(folder, 10, {"big": torch.zeros(size)}, STATE)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert checkpoint.find_latest(folder) == good
    assert checkpoint.load(good)[1] == STATE
    assert (folder / "latest").read_text() == "step-00000005\n"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000005"]
    assert checkpoint.save(folder, 11, TENSORS, STATE) == checkpoint.find_latest(folder)


def test_a_full_disk_keeps_the_previous_one(tmp_path: Path) -> None:
    """On a real file system of 1 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here; the two tests below do without")
    try:
        _assert_full_disk_keeps_the_previous(tmp_path / "checkpoints", 2**19)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_file_size_limit_keeps_the_previous_one(tmp_path: Path) -> None:
    """The writer in Rust meets the error (EFBIG), in a process of its own because the limit cannot be raised again."""
    code = (
        "import resource, signal, sys, pathlib\n"
        "import tests.unit.test_checkpoint as t\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "t._assert_full_disk_keeps_the_previous(pathlib.Path(sys.argv[1]), 2**19)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_a_late_step_keeps_the_previous_one(tmp_path, monkeypatch, call) -> None:
    good = checkpoint.save(tmp_path, 5, TENSORS, STATE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(RunError, match=r"step-00000010.*No space left"):
            checkpoint.save(tmp_path, 10, TENSORS, STATE)
    assert checkpoint.find_latest(tmp_path) == good


SAVER = """
import sys, pathlib, torch
from compt import checkpoint
folder = pathlib.Path(sys.argv[1])
path = checkpoint.find_latest(folder)
step = 0 if path is None else checkpoint.load(path)[1]["step"]
print("ready", flush=True)
while True:
    step += 1
    tensors = {f"layer{i}": torch.full((40_000,), float(step)) for i in range(4)}
    checkpoint.save(folder, step, tensors, {"step": step}, keep=2)
    print(step, flush=True)
"""


def test_killed_at_any_moment_a_whole_one_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    draws = random.Random(0)
    rubbish = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        first = int(process.stdout.readline())
        time.sleep(draws.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        done = max([first, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        path = checkpoint.find_latest(folder)
        assert path is not None
        tensors, state = checkpoint.load(path)
        # Everything that was reported as saved is there; one more may be, whose report was cut off.
        assert state["step"] in (done, done + 1)
        assert all(torch.equal(t, torch.full((40_000,), float(state["step"]))) for t in tensors.values())
        assert len(tensors) == 4
        rubbish += any(p.name.startswith(".step-") for p in folder.iterdir())
    assert rubbish, "no kill came in the middle of a save: the test shows nothing"
