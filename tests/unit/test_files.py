"""Atomic writes: the old content or the new, nothing left behind, one message for what the disk refuses."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compt.errors import DataError, RunError
from compt.evaluate.encoder import save_result
from compt.files import (
    new_file,
    new_folder,
    private_folder,
    read_json,
    read_text,
    temporary_of,
    user_cache,
    write_bytes,
    write_json,
    write_text,
)


def test_bytes_and_text(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "a", b"\x00\xff")
    assert (tmp_path / "new" / "a").read_bytes() == b"\x00\xff"
    write_text(tmp_path / "new" / "a", "ä\n")
    assert (tmp_path / "new" / "a").read_bytes() == "ä\n".encode()
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_the_disk_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_bytes(tmp_path / "a.npz", b"old")
    monkeypatch.setattr(os, call, refuse)
    for write in (
        lambda: write_bytes(tmp_path / "a.npz", b"new"),
        lambda: write_json(tmp_path / "a.npz", {}),
        lambda: save_result(tmp_path, "a", {}, {"x": np.zeros(3)}),
    ):
        with pytest.raises(RunError, match=r"cannot write .*a\.npz: No space left on device"):
            write()
    assert (tmp_path / "a.npz").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_an_index_that_cannot_be_written_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compt.data.index import build_index
    from tests.helpers.shards import make_shards

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shards = make_shards(tmp_path / "data", n=4, shards=1)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DataError, match=r"the index: cannot write .*000000\.tar.*npz: No space left"):
        build_index(shards, tmp_path / "index")
    assert [path.name for path in (tmp_path / "index").iterdir()] == []


WRITER = """
import os, sys
from pathlib import Path
from compt import files

def tell(*_):
    print("ready", flush=True)
    sys.stdin.read()

if sys.argv[2] == "between":  # the old folder is out of the way and the new one not there yet
    first, rename = [], os.rename
    files.os.rename = lambda *names: tell() if first else first.append(rename(*names))
with files.new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    if sys.argv[2] == "inside":
        tell()
"""


def writer(folder: Path, where: str) -> subprocess.Popen[str]:
    """A process that has begun to write `folder` and waits."""
    command = [sys.executable, "-c", WRITER, str(folder), where]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def fill(folder: Path) -> None:
    with new_folder(folder) as temporary:
        (temporary / "whole").write_text("x")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    out, others = tmp_path / "out", [".out.tmp-mine", ".out-2.tmp-abcdefgh", ".out.2.tmp-abcdefgh", "out.tmp-abcdefgh"]
    for name in others:
        (tmp_path / name).mkdir()
    dead, living = writer(out, "inside"), writer(out, "inside")
    try:
        end(dead)
        assert len(list(tmp_path.glob(".out.tmp-????????"))) == 2
        fill(out)
        left = {path.name for path in tmp_path.iterdir()} - {"out", *others}
        assert len(left) == 1
        assert (tmp_path / left.pop() / "half").exists()
        assert [path.name for path in out.iterdir()] == ["whole"]
    finally:
        end(living)
    fill(out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_the_only_copy_of_a_folder_is_removed_only_when_there_is_another(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out)
    end(writer(out, "between"))
    assert not out.exists()
    with pytest.raises(KeyError), new_folder(out):
        raise KeyError
    (old,) = tmp_path.iterdir()
    assert (old / "whole").exists()
    fill(out)
    fill(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_locks_nothing_is_taken_to_be_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    (tmp_path / ".out.tmp-abcdefgh").mkdir()
    monkeypatch.setattr("fcntl.flock", refuse)
    fill(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp-abcdefgh", "out"]


def test_a_full_disk_names_the_folder_as_it_will_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError) as caught, new_folder(tmp_path / "out") as folder:
        write_text(folder / "sub" / "file", "x")
    assert str(caught.value) == f"cannot write {tmp_path / 'out' / 'sub' / 'file'}: No space left on device"


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_new_files_and_folders_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "x")
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_text_is_read_from_plain_files_of_some_size_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="it is not a plain file"):
            read_text(path)
    (tmp_path / "text").write_text("four")
    assert read_text(tmp_path / "text", 4) == "four"
    with pytest.raises(OSError, match="it has 4 bytes, more than 3"):
        read_text(tmp_path / "text", 3)


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    temporary_of(tmp_path / "a.json").write_text("half of a long file")
    other = temporary_of(tmp_path / "b.json")
    other.write_text("of another file")
    write_text(tmp_path / "a.json", "{}")
    assert read_json(tmp_path / "a.json") == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "a.json"]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    temporary_of(tmp_path / "a.json").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "a.json", "{}")
    assert ((tmp_path / "precious").read_text(), (tmp_path / "a.json").read_text()) == ("precious", "{}")


@pytest.mark.parametrize("read", [False, True])
def test_a_planted_pipe_is_not_written(tmp_path: Path, read: bool) -> None:
    pipe = temporary_of(tmp_path / "a.json")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) if read else None
    write_text(tmp_path / "a.json", "{}")
    if reader is not None:
        os.close(reader)
    assert (tmp_path / "a.json").read_text() == "{}"
    assert pipe.is_fifo()


def test_a_planted_second_name_of_a_file_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    temporary_of(tmp_path / "a.json").hardlink_to(tmp_path / "precious")
    write_text(tmp_path / "a.json", "{}")
    assert ((tmp_path / "precious").read_text(), (tmp_path / "a.json").read_text()) == ("precious", "{}")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers must not share a file there."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with new_file(tmp_path / "a") as first, new_file(tmp_path / "a") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Each replaces the whole file, and none takes away what the other has not finished."""
    path = tmp_path / "scores.json"
    with new_file(path) as first:
        first.write(b"first")
        first.flush()
        save_result(tmp_path, "scores", {"by": "second"}, {})
        assert read_json(path) == {"by": "second"}
    assert path.read_text() == "first"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["scores.json", "scores.npz"]


def test_a_private_folder_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = user_cache("compiled")
    assert folder == tmp_path / "compt" / "compiled"
    folder.mkdir(parents=True, mode=0o755)
    assert private_folder(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(RunError, match="belongs to another user, or is a link"):
        private_folder(tmp_path / "link")
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    with pytest.raises(RunError, match="belongs to another user"):
        private_folder(folder)
