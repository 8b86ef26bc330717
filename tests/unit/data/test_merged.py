"""The file with the indexes of all shards of a set: what it holds, when it is written again, and what it costs."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.data import index as index_module
from compt.data import merged as merged_module
from compt.data.account import Account
from compt.data.index import INDEX_FOLDER, Index, open_index
from compt.data.loaders import Steps
from compt.data.merged import Merged, ShardRows, write_merged
from compt.data.scan import COLUMNS, IndexEntry
from compt.errors import DataError
from tests.helpers.shards import make_shards, sample, write_tar


def everything(index: Index) -> list[IndexEntry]:
    return [index.entry(number) for number in range(len(index))]


def merged_files(folder: Path) -> list[Path]:
    return list((folder / INDEX_FOLDER).glob("merged-*"))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is scanned or read again")


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were scanned."""
    names: list[str] = []
    real = index_module.scan_shard
    monkeypatch.setattr(index_module, "scan_shard", lambda path, *rest: names.append(path.name) or real(path, *rest))
    return names


def test_it_gives_what_the_indexes_of_the_shards_hold(tmp_path: Path) -> None:
    make_shards(tmp_path, n=11, shards=3, classes=300)
    write_tar(tmp_path / "0-other.tar", [*sample("a/ключ", 1, captions=0), *sample("b", 2), ("c.png", b"x")])
    write_tar(tmp_path / "1-empty.tar", [("a.txt", b"x")])
    index, want, number = open_index("*.tar", tmp_path), list[IndexEntry](), 0
    identity, contents, counts = [], "", Counter[int]()
    for shard, path in enumerate(sorted(tmp_path.glob("*.tar"))):
        with np.load(tmp_path / INDEX_FOLDER / f"{path.name}.npz") as stored:
            meta, rows, keys = json.loads(stored["meta"].tobytes()), stored["rows"], stored["keys"].tobytes()
        for row in rows.tolist():
            want.append(IndexEntry(shard, keys[row[0] : row[0] + row[1]].decode(), *row[2:]))
        assert index.shards[shard] == path
        assert index.sizes[shard] == len(rows)
        assert index.starts[shard] == number
        number += len(rows)
        identity.append([meta["shard"], meta["digest"]])
        contents += meta["content"]
        counts.update({int(captions): images for captions, images in meta["counts"].items()})
    assert everything(index) == want
    assert [index.describe(at) for at in (0, 2)] == ["0-other.tar: a/ключ", "0-other.tar: c"]
    assert index.fingerprint == hashlib.sha256(json.dumps([identity, None]).encode()).hexdigest()
    assert index.content == hashlib.sha256(contents.encode()).hexdigest()
    assert index.counts == counts == {0: 2, 3: 12}
    assert index.account.unused == {"no_image": 1}
    assert index.account.first == {"no_image": "1-empty.tar: a.txt"}
    for name in ("captions", "label"):
        assert np.concatenate([*index.column(name)]).tolist() == [getattr(entry, name) for entry in want]


NUMBERS = st.one_of(*(st.integers(-2, 2**bits - 1) for bits in (1, 7, 8, 15, 16, 31, 32, 62)))


def part(name: str, rows: Any, keys: bytes = b"") -> ShardRows:
    return ShardRows(name, np.array(rows, np.int64).reshape(-1, len(COLUMNS)), keys, "", Account(), Counter(), "", 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(*[NUMBERS] * len(COLUMNS)), max_size=4), min_size=1, max_size=3))
def test_small_columns_hold_the_same_numbers(shards: list[list[tuple[int, ...]]]) -> None:
    with tempfile.TemporaryFile() as file:
        write_merged(file, "x", [part(str(at), rows, b"keys") for at, rows in enumerate(shards)], None)
        file.flush()
        merged = Merged(file, "x")
        for at, rows in enumerate(shards):
            assert merged.table(at)[0].tolist() == rows
            assert merged.table(at)[1].tobytes() == b"keys"
        with pytest.raises(ValueError, match="it is of other shards"):
            Merged(file, "y")


def test_a_second_start_reads_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "a", n=11, shards=3)
    first = open_index("a/*.tar", tmp_path)
    monkeypatch.setattr(index_module, "_IndexFiles", type("Opened", (index_module._IndexFiles,), {"merge": refuse}))
    monkeypatch.setattr(np, "load", refuse)
    assert everything(open_index("a/*.tar", tmp_path)) == everything(first)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = open_index("b/*.tar", tmp_path)
    assert (moved.fingerprint, moved.account, moved.counts) == (first.fingerprint, first.account, first.counts)


def test_indexes_of_single_shards_are_merged_without_a_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, n=11, shards=3)
    want = everything(open_index("*.tar", tmp_path))
    merged_files(tmp_path)[0].unlink()
    monkeypatch.setattr(index_module, "scan_shard", refuse)
    seen: list[tuple[int, int]] = []
    assert everything(open_index("*.tar", tmp_path, progress=lambda *done: seen.append(done))) == want
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert everything(open_index(["000001.tar", "000000.tar"], tmp_path)) == [
        entry._replace(shard=1 - entry.shard) for entry in (*want[4:8], *want[:4])
    ]
    assert len(merged_files(tmp_path)) == 2


def test_after_a_shard_has_changed_it_alone_is_scanned(tmp_path: Path, scanned: list[str]) -> None:
    shards = make_shards(tmp_path, n=12, shards=3)
    first = open_index("*.tar", tmp_path)
    scanned.clear()
    stat = shards[1].stat()
    write_tar(shards[1], [member for at in range(4, 8) for member in sample(f"000X{at:05d}", at)])
    assert shards[1].stat().st_size == stat.st_size
    os.utime(shards[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    index = open_index("*.tar", tmp_path)
    assert scanned == ["000001.tar"]
    assert everything(index)[:4] + everything(index)[8:] == everything(first)[:4] + everything(first)[8:]
    assert {entry.key[:4] for entry in everything(index)[4:8]} == {"000X"}
    assert len(merged_files(tmp_path)) == 1
    assert everything(first)[4].key == "000100004", "the replaced file stays open"


def test_sets_of_one_folder_are_kept_apart(tmp_path: Path, scanned: list[str]) -> None:
    """Shards of the same names, sizes and times in several folders, whose indexes lie in one."""
    for name, key in (("a", "1"), ("b", "2"), ("c", "3")):
        os.utime(write_tar(tmp_path / name / "x.tar", sample(key, 1)), ns=(1, 1))
    for out in (None, tmp_path / "out"):
        for _ in range(2):
            keys = [
                [entry.key for entry in everything(open_index(list(pair), tmp_path, out))]
                for pair in (("a/x.tar", "b/x.tar"), ("a/x.tar", "c/x.tar"), ("b/x.tar",), ("c/x.tar",))
            ]
            assert keys == [["1", "2"], ["1", "3"], ["2"], ["3"]]
    assert len(scanned) == 6


def test_another_table_of_captions_is_merged_again(tmp_path: Path) -> None:
    make_shards(tmp_path, n=2, shards=1)
    table = tmp_path / "captions.csv"
    plain = everything(open_index("*.tar", tmp_path))
    for text in ("one", "one,two"):
        table.write_text(f'key,caption\n000000000,"{text}"\n')
        assert everything(open_index("*.tar", tmp_path, captions_csv=table))[0].text_size == 20 + len(text)
    assert len(merged_files(tmp_path)) == 2, "one with the table, as it was last"
    assert everything(open_index("*.tar", tmp_path)) == plain
    assert everything(open_index("*.tar", tmp_path, columns=["nothing"]))[0].captions == 0
    assert len(merged_files(tmp_path)) == 3


def test_a_cut_or_changed_file_is_written_again_or_named(tmp_path: Path, scanned: list[str]) -> None:
    make_shards(tmp_path, n=9, shards=3)
    want = everything(open_index("*.tar", tmp_path))
    file = merged_files(tmp_path)[0]
    blob = file.read_bytes()
    cuts = [blob[:size] for size in (0, 1, 40, len(blob) // 2, len(blob) - 1)] + [blob + b"x", bytes(len(blob))]
    flips = [blob[:at] + bytes([blob[at] ^ 0x55]) + blob[at + 1 :] for at in range(0, len(blob), 23)]
    scanned.clear()
    named = 0
    for damaged in cuts + flips:
        file.write_bytes(damaged)
        index = open_index("*.tar", tmp_path)
        if file.read_bytes() == damaged:
            named += 1
            with pytest.raises(DataError, match=f"the index {file} was damaged and has been removed; start the same"):
                everything(index)
            assert not file.exists()
        assert everything(open_index("*.tar", tmp_path)) == want
    assert 0 < named < len(flips), "damaged rows are found when they are read"
    assert not scanned


def test_a_shard_whose_own_index_is_damaged_is_scanned_again(tmp_path: Path, scanned: list[str]) -> None:
    make_shards(tmp_path, n=6, shards=2)
    want = everything(open_index("*.tar", tmp_path))
    merged_files(tmp_path)[0].unlink()
    file = tmp_path / INDEX_FOLDER / "000001.tar.npz"
    with zipfile.ZipFile(file) as stored:
        rows = stored.getinfo("rows.npy")
    blob = bytearray(file.read_bytes())
    blob[rows.header_offset + 60 + rows.compress_size // 2] ^= 0xFF
    file.write_bytes(blob)
    scanned.clear()
    assert everything(open_index("*.tar", tmp_path)) == want
    assert scanned == ["000001.tar"]


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "a", n=6, shards=2)
    want = everything(open_index("*.tar", tmp_path / "a"))
    merged_files(tmp_path / "a")[0].unlink()
    monkeypatch.setattr(index_module, "scan_shard", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = tempfile.TemporaryFile

    def read_only(dir: Path | None = None) -> Any:
        if dir is not None and dir.is_relative_to(closed):
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    closed = tmp_path / "a"
    written = set()
    for _ in range(2):
        assert everything(open_index("*.tar", tmp_path / "a")) == want
        written |= {path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("merged-*")}
    assert len(written) == 1
    shutil.rmtree(tmp_path / "cache")
    closed = tmp_path
    assert everything(open_index("*.tar", tmp_path / "a")) == want
    assert not list(tmp_path.rglob("merged-*"))


def test_a_disk_that_maps_no_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise OSError(19, "No such device")

    make_shards(tmp_path, n=2, shards=1)
    monkeypatch.setattr(np, "memmap", refused)
    with pytest.raises(DataError, match=r"cannot open the index .*merged-.*: .*No such device; .*data\.index_dir"):
        open_index("*.tar", tmp_path)


def build(folder: Path, start: Any, found: Any) -> None:
    start.wait()
    found.put(everything(open_index("*.tar", folder)))


def test_processes_that_build_at_once_agree(tmp_path: Path) -> None:
    make_shards(tmp_path, n=40, shards=20)
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.Queue()
    builders = [context.Process(target=build, args=(tmp_path, start, found)) for _ in range(4)]
    for builder in builders:
        builder.start()
    results = [found.get(timeout=60) for _ in builders]
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert results == [everything(open_index("*.tar", tmp_path))] * 4
    assert sorted(path.suffix for path in (tmp_path / INDEX_FOLDER).iterdir()) == [".index", *[".npz"] * 20]


WRITER = """
import sys
from pathlib import Path
from compt.data import index
def wait(file, *_):
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    sys.stdin.read()
index.write_merged = wait
index.open_index("*.tar", Path(sys.argv[1]))
"""


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    make_shards(tmp_path, n=6, shards=2)
    want = everything(open_index("*.tar", tmp_path))
    merged_files(tmp_path)[0].unlink()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        assert len(list((tmp_path / INDEX_FOLDER).glob(".merged-*"))) == 2
        assert everything(open_index("*.tar", tmp_path)) == want
        assert len(list((tmp_path / INDEX_FOLDER).glob(".merged-*"))) == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


SHARDS, SAMPLES = 200, 5000


def many(*_: Any) -> Iterator[ShardRows]:
    """Shards of one content."""
    rows = np.arange(SAMPLES * len(COLUMNS)).reshape(SAMPLES, len(COLUMNS))
    rows[:, 0], rows[:, 1] = 5 * np.arange(SAMPLES), 5
    keys = b"".join(b"%05d" % number for number in range(SAMPLES))
    for number in range(SHARDS):
        yield ShardRows(f"{number:06d}.tar", rows, keys, "", Account(), Counter({1: SAMPLES}), "", 0)


def test_memory_does_not_grow_with_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(SHARDS):
        (tmp_path / f"{number:06d}.tar").touch()
    monkeypatch.setattr(index_module._IndexFiles, "_parts", many)
    monkeypatch.setattr(merged_module, "_VIEWS", 16)
    assert len(open_index("*.tar", tmp_path)) == SHARDS * SAMPLES
    monkeypatch.setattr(index_module._IndexFiles, "merge", refuse)
    tracemalloc.start()
    try:
        index = open_index("*.tar", tmp_path)
        steps = Steps(index, 0, 2, 1000, 0, 4 * len(index) // 1000, 0, 1)
        seen = [index.entry(number).key == f"{number % SAMPLES:05d}" for number in _some(steps, 100)]
        for _ in index.column("label"):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(seen)
    assert len(seen) >= 100
    assert peak < len(index), f"{peak:,} bytes for {len(index):,} samples"
    assert len(index._merged._views) <= 16


def _some(steps: Steps, count: int) -> Iterator[int]:
    """One sample of each of at least `count` steps, evenly spread."""
    for number, reference in enumerate(steps):
        if number % (len(steps) // count) == 0:
            yield reference.ids[0]
