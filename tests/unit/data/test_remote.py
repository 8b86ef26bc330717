"""Shards in object storage: the same batches as from a disk, whatever happens on the way."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compt.chain.run import open_data, prepare
from compt.data import remote, stores
from compt.data.batch import Batch
from compt.data.check import check
from compt.data.index import Index, open_index
from compt.data.labels import CLASSNAMES, beside
from compt.data.loaders import eval_loader, fixed_caption_batches, train_loader
from compt.data.remote import Cache, RemoteShard
from compt.data.samples import ShardSamples
from compt.dist import collectives as dist
from compt.errors import ConfigError, DataError, RunError
from compt.evaluate.scorer import Scorer
from compt.models.clip import build
from compt.recipe.types import checked_address
from tests.helpers.optional import optional
from tests.helpers.process import finish, start
from tests.helpers.recipe import FIRST, chain, make_data, manifest, recipe_of, stopped_at, weights_hash
from tests.helpers.shards import make_shards
from tests.helpers.store import KEY, Store

NAMES = [f"{number:06d}.tar" for number in range(6)]
SHARDS = "s3://bucket/set/{000000..000005}.tar"
REMOTE_DATA = (
    "data.train=s3://bucket/train/{000000..000003}.tar",
    "evaluation.validation=s3://bucket/val/*.tar",
    "evaluation.sets.0.data=s3://bucket/eval/{000000..000001}.tar",
    "evaluation.sets.1.data=s3://bucket/eval/{000000..000001}.tar",
)
Run = tuple[list[list[str]], list[torch.Tensor], list[torch.Tensor]]


class Stopped(threading.Event):
    """Waits for nothing."""

    def wait(self, timeout: float | None = None) -> bool:
        return False


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Six shards of 8 samples behind an S3 server that answers at once, or as a test says."""
    optional("obstore", "remote")
    make_shards(tmp_path / "store" / "bucket" / "set", n=48, shards=6)
    monkeypatch.setattr(stores, "READ_SECONDS", 0.4)
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(stores, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(stores, "_PIECE", 1 << 12)
    stores.objects.cache_clear()
    with Store(tmp_path / "store") as server:
        server.stall = 0.8
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server
    stores.objects.cache_clear()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def run(index: Index, workers: int = 0, steps: int = 12, **more: Any) -> Run:
    """Two epochs: keys, pixels and tokens of each step."""
    settings = {"seed": 3, "batch": 8, "image_size": 16, "captions": 2, "context_length": 16, "window": 2}
    loader = train_loader(index, **settings | more, start_step=0, total_steps=steps, workers=workers)
    return parts(list(loader))


def parts(batches: list[Batch]) -> Run:
    return [b.keys for b in batches], [b.images for b in batches], [b.tokens for b in batches]


def same(one: Run, other: Run) -> bool:
    return one[0] == other[0] and all(map(torch.equal, one[1] + one[2], other[1] + other[2]))


def on_disk(tmp_path: Path) -> Index:
    return open_index("*.tar", tmp_path / "store" / "bucket" / "set", tmp_path / "index")


def taken(cache: Cache, *coming: Path) -> int:
    """Bytes of the files in the cache and of the `coming`, partial ones as they will be."""
    stems = {path.stem for path in (*cache.folder.iterdir(), *coming) if path.suffix in (".tar", ".part")}
    return sum(int(stem.rpartition("-")[2]) for stem in stems)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("address", [SHARDS, "s3://bucket/set/*.tar", "s3://bucket/set/"])
def test_batches_are_those_of_local_shards(
    tmp_path: Path, store: Store, cache: Cache, workers: int, address: str
) -> None:
    index, local = open_index(address, tmp_path, cache=cache), on_disk(tmp_path)
    assert (index.fingerprint, index.content) == (local.fingerprint, local.content)
    assert same(run(index, workers), run(local))
    assert {name: store.gets[name] for name in NAMES} == dict.fromkeys(NAMES, 1)


def test_a_second_start_downloads_nothing(tmp_path: Path, store: Store, cache: Cache) -> None:
    first = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shutil.rmtree(cache.folder)
    store.gets.clear()
    again = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    assert not store.gets
    assert again.fingerprint == first.fingerprint
    run(again)
    assert {name: store.gets[name] for name in NAMES} == dict.fromkeys(NAMES, 1)


def test_the_next_shards_come_while_the_present_ones_are_read(tmp_path: Path, store: Store, cache: Cache) -> None:
    index = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shutil.rmtree(cache.folder)
    store.gets.clear()
    loader = train_loader(
        *(index,),
        seed=3,
        batch=8,
        image_size=16,
        captions=2,
        context_length=16,
        window=2,
        start_step=0,
        total_steps=12,
    )
    batches = iter(loader)
    next(batches)
    until = time.monotonic() + 5
    while len(store.gets) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(store.gets) == 4  # the shards of the first window and of the second, not of the third
    batches.close()  # type: ignore[attr-defined]


def test_the_cache_never_grows_beyond_its_size(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for the present window and the next: the third takes the place of the first."""
    local = on_disk(tmp_path)
    sizes = sorted(shard.stat().st_size for shard in local.shards)  # type: ignore[union-attr]
    tight, seen = Cache(cache.folder, sum(sizes[-4:])), []
    real = remote.Cache._make_room

    def make_room(self: Cache, shard: RemoteShard, part: Path) -> bool:
        if made := real(self, shard, part):  # else all of the cache is in use, and it waits
            seen.append(taken(self, part))  # two threads may make room for one shard: it counts once
        return made

    monkeypatch.setattr(remote.Cache, "_make_room", make_room)
    assert same(run(open_index(SHARDS, tmp_path, cache=tight)), run(local))
    assert max(seen) == tight.size
    assert taken(tight) <= tight.size
    # On a loaded machine an attempt may time out, and is made again.
    again = {name: sum("attempt" in line and name in line for line in caplog.messages) for name in NAMES}
    assert max(store.gets[name] - again[name] for name in NAMES) <= 3


def test_a_shard_gets_its_name_while_nobody_counts_the_cache(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a count that listed the partial file misses the shard, and the cache grows beyond its size."""
    real, named = os.rename, list[Path]()

    def rename(old: Path, new: Path) -> None:
        if old.suffix == ".part":
            with (cache.folder / "lock").open("rb") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            named.append(new)
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    index = open_index(SHARDS, tmp_path, cache=cache)
    shutil.rmtree(cache.folder)
    run(index)
    assert {path.suffix for path in named} == {".tar"}


# What happens to GETs of one shard while it is downloaded, and the line that names it.
REPAIRED = {
    "503, three times": (["503"] * 3, "503 Service Unavailable: SlowDown; attempt 4 of 8"),
    "reset before the answer": (["reset"], "attempt 2 of 8"),
    "reset in the middle of the body": (["cut"], "attempt 2 of 8"),
    "truncated body": (["short"], "attempt 2 of 8"),
    "no byte for longer than the limit": (["stall"], "TimedOut; attempt 2 of 8"),
    "several kinds in a row": (["cut", "503", "reset", "short"], "attempt 2 of 8"),
    "slow, but within the limit": (["slow"], ""),
}


@pytest.mark.parametrize("kind", REPAIRED)
def test_a_fault_that_passes_changes_no_batch(
    tmp_path: Path, store: Store, cache: Cache, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    faults, said = REPAIRED[kind]
    index, want = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache), run(on_disk(tmp_path))
    shutil.rmtree(cache.folder)
    store.gets.clear()
    store.sent.clear()
    store.faults[NAMES[2]].extend(faults)
    with caplog.at_level(logging.WARNING):
        assert same(run(index), want)
    assert store.gets[NAMES[2]] == 1 + len([fault for fault in faults if fault != "slow"])
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"s3://bucket/set/{NAMES[2]}: ") and said in line for line in lines) or not said
    # What had arrived is not sent again, up to a piece.
    assert store.sent[NAMES[2]] <= index.shards[2].size + stores._PIECE * len(faults)  # type: ignore[union-attr]


def replaced(tmp_path: Path, name: str, change: str) -> None:
    path = tmp_path / "store" / "bucket" / "set" / name
    data = bytearray(path.read_bytes())
    if change == "longer":
        data += bytes(10240)
    else:
        data[700] ^= 255
    path.write_bytes(data)


# What is done before the second start of the downloads, and the one line that ends the run.
REFUSED = {
    "another tag, of the same size": (
        lambda at, store: replaced(at, NAMES[2], "other"),
        rf"s3://bucket/set/{NAMES[2]} has changed in the store since it was opened; put the old shard back",
    ),
    "another size": (
        lambda at, store: replaced(at, NAMES[2], "longer"),
        rf"s3://bucket/set/{NAMES[2]} has changed in the store since it was opened",
    ),
    "a shard that is gone": (
        lambda at, store: (at / "store" / "bucket" / "set" / NAMES[2]).unlink(),
        rf"there is no s3://bucket/set/{NAMES[2]} in the store",
    ),
    "access that ends": (
        lambda at, store: store.faults[NAMES[2]].append("403"),
        rf"s3://bucket/set/{NAMES[2]}: the store refuses access \(403 Forbidden: AccessDenied\); check the credentials",
    ),
    "a store that stays away": (
        lambda at, store: store.faults[NAMES[2]].extend(["503"] * 8),
        rf"s3://bucket/set/{NAMES[2]} cannot be read after 8 attempts: 503 Service Unavailable",
    ),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_fault_that_stays_ends_the_run_in_one_line(
    tmp_path: Path, store: Store, cache: Cache, kind: str, workers: int
) -> None:
    do, said = REFUSED[kind]
    index = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shutil.rmtree(cache.folder)
    do(tmp_path, store)
    with pytest.raises(DataError, match=said) as error:
        run(index, workers)
    assert "\n" not in str(error.value)
    assert "topsecret" not in str(error.value)
    assert KEY not in str(error.value)


# What a store answers to every request, and the end of the one line about it.
HOPELESS = {
    "301": "Received redirect without LOCATION, this normally indicates an incorrectly configured region",
    "400": "400 Bad Request: ExpiredToken",
    "501": "501 Not Implemented",
    "whole": "Received non-partial response when range requested",
}


@pytest.mark.parametrize("fault", HOPELESS)
def test_a_request_that_no_store_will_fulfil_is_made_once(
    tmp_path: Path, store: Store, cache: Cache, fault: str
) -> None:
    shard = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache).shards[2]
    assert isinstance(shard, RemoteShard)
    store.gets.clear()
    store.faults[NAMES[2]].extend([fault] * 8)
    with pytest.raises(DataError) as error:
        list(shard.stream(0, shard.size))
    assert str(error.value).startswith(f"{shard} cannot be read: ")
    assert str(error.value).endswith(HOPELESS[fault])
    assert str(error.value).isprintable()
    assert store.gets[NAMES[2]] == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("301", "cannot be read: .* incorrectly configured region"),
        ("400", "cannot be read: 400 Bad Request: ExpiredToken"),
        ("403", r"refuses access \(403 Forbidden: AccessDenied\)"),
        ("404", "cannot be read: 404 Not Found: NoSuchBucket"),
    ],
)
def test_a_list_that_no_store_will_give_is_asked_for_once(
    tmp_path: Path, store: Store, cache: Cache, fault: str, said: str
) -> None:
    store.faults["bucket"].extend([fault] * 8)
    with pytest.raises(DataError, match=said):
        open_index("s3://bucket/set/*.tar", tmp_path, cache=cache)
    assert store.gets["bucket"] == 1


def test_a_400_that_passes_is_tried_again() -> None:
    error = OSError("status code: 400 Bad Request: <Error><Code>RequestTimeout</Code></Error>")
    stores.failed_attempt(error, 1, "s3://bucket/a.tar", Stopped())
    with pytest.raises(DataError, match="after 8 attempts: 400 Bad Request: RequestTimeout"):
        stores.failed_attempt(error, 8, "s3://bucket/a.tar", Stopped())


def test_no_control_character_of_a_server_gets_into_a_message() -> None:
    error = OSError('invalid list response: invalid type: string "\x1b[2J\u202e' + 1000 * "x" + '"')
    with pytest.raises(DataError, match=r"\\x1b\[2J\\u202e") as refused:
        stores.failed_attempt(error, stores.ATTEMPTS, "s3://bucket/a.tar", Stopped())
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


def test_a_shard_that_changed_between_epochs_is_noticed(tmp_path: Path, store: Store, cache: Cache) -> None:
    """As a local one that is replaced: while it is in the cache, the run reads what it began with."""
    index, want = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache), run(on_disk(tmp_path))
    replaced(tmp_path, NAMES[1], "other")
    assert same(run(index), want)
    changed = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)  # the next start indexes it again
    assert store.gets[NAMES[1]] == 2
    assert [store.gets[name] for name in NAMES if name != NAMES[1]] == [1] * 5
    assert len(changed) == len(index)


def test_wrong_credentials_end_in_one_line(tmp_path: Path, store: Store, cache: Cache, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASOMEONEELSE")
    with pytest.raises(DataError, match=r"the store refuses access \(403 Forbidden\)") as error:
        open_index(SHARDS, tmp_path, cache=cache)
    assert "AKIA" not in str(error.value)


@pytest.mark.parametrize("address", ["s3://bucket/set/{000004..000007}.tar", "s3://bucket/none/*.tar"])
def test_a_missing_shard_is_named_at_the_start(tmp_path: Path, store: Store, cache: Cache, address: str) -> None:
    with pytest.raises(
        DataError, match=r"there is no s3://bucket/set/00000[67].tar|no shard matches 's3://bucket/none"
    ):
        open_index(address, tmp_path, cache=cache)


def test_a_cache_smaller_than_two_windows_is_refused_before_anything_is_downloaded(
    tmp_path: Path, store: Store, cache: Cache
) -> None:
    open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shutil.rmtree(cache.folder)
    store.gets.clear()
    small = open_index(SHARDS, tmp_path, tmp_path / "index", cache=Cache(cache.folder, 60_000))
    with pytest.raises(DataError, match=r"data.cache_size is 60,000 bytes, but 4 shards are needed at a time"):
        run(small)
    assert not store.gets


def test_a_full_disk_ends_in_one_line(tmp_path: Path, store: Store, cache: Cache, monkeypatch: Any) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    index = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shutil.rmtree(cache.folder)
    monkeypatch.setattr(remote.os, "write", full)
    with pytest.raises(DataError, match=r"cache .*: No space left on device; lower data.cache_size, or name"):
        run(index)


def test_a_disk_without_room_makes_room_and_then_says_so(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shard = index.shards[0]
    assert isinstance(shard, RemoteShard)
    shard.cached.unlink()
    free = [0]

    class Disk:
        f_frsize = 1

        @property
        def f_bavail(self) -> int:
            return free[0]

    monkeypatch.setattr(remote.os, "statvfs", lambda _: Disk())
    monkeypatch.setattr(remote, "ROOM_SECONDS", 0.2)
    cache.drop(cache.hold(shard))
    assert len(list(cache.folder.glob("*.tar"))) == 5  # one of the others has made room
    shard.cached.unlink()
    held = [cache.hold(other) for other in index.shards[1:] if other.cached.exists()]  # type: ignore
    with pytest.raises(DataError, match=rf"has no room for {shard}"):
        cache.hold(shard)
    for descriptor in held:
        cache.drop(descriptor)


def hold_all(index: Index, done: Any) -> None:
    held = []
    for at in range(6):
        shard = index.shards[at]
        assert isinstance(shard, RemoteShard)
        held.append(shard.cache.hold(shard))
    done.put([os.fstat(each).st_size for each in held])


def test_processes_of_one_machine_download_each_shard_once(tmp_path: Path, store: Store, cache: Cache) -> None:
    index = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shutil.rmtree(cache.folder)
    store.gets.clear()
    for name in NAMES:
        store.faults[name].append("slow")
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    # Forked: so they also show that what obstore has begun here does not hang there.
    ranks = [context.Process(target=hold_all, args=(index, done), daemon=True) for _ in range(3)]
    for rank in ranks:
        rank.start()
    sizes = [done.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(10)
    assert sizes == [[shard.size for shard in index.shards]] * 3  # type: ignore[union-attr]
    assert {name: store.gets[name] for name in NAMES} == dict.fromkeys(NAMES, 1)


@pytest.mark.parametrize("during", ["while it makes room", "while it downloads"])
def test_a_process_that_is_forked_meanwhile_keeps_no_lock(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """As loaders of evaluations are: they inherit what is open, and with it the locks."""
    index = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shutil.rmtree(cache.folder)
    place, name = (Cache, "_make_room") if during == "while it makes room" else (remote.os, "fsync")
    real, children = getattr(place, name), []

    def forked(*arguments: Any) -> Any:
        if not children:
            children.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True))
            children[0].start()
        return real(*arguments)

    monkeypatch.setattr(place, name, forked)

    def hold() -> None:
        for shard in index.shards[:2]:
            cache.drop(cache.hold(shard))  # type: ignore[arg-type]

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    thread.join(5)
    hangs = thread.is_alive()
    children[0].kill()
    thread.join(5)
    assert not hangs


def test_to_wait_for_another_download_takes_no_look_at_the_other_files(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache).shards[0]
    assert isinstance(shard, RemoteShard)
    shard.cached.unlink()
    part, looks, stop = shard.cached.with_suffix(".part"), [], threading.Event()
    monkeypatch.setattr(Cache, "_make_room", lambda *_: looks.append(1))
    with part.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(CancelledError):
            cache.hold(shard, stop)
    assert not looks


def read_as_rank(rank: int, folder: Path, environment: dict[str, str]) -> None:
    """Write what rank `rank` of two reads."""
    os.environ.update(environment)
    index = open_index(SHARDS, folder, folder / "index", cache=Cache(folder / "cache"))
    settings = {"seed": 3, "batch": 8, "image_size": 16, "captions": 2, "context_length": 16, "window": 2}
    loader = train_loader(index, **settings, start_step=0, total_steps=12, workers=1, rank=rank, world_size=2)
    (folder / f"read-{rank}").write_text("\n".join(f"{batch.keys} {batch.images.sum()}" for batch in loader))


def test_two_ranks_download_each_shard_once_and_read_the_batches_of_one(
    tmp_path: Path, store: Store, cache: Cache
) -> None:
    """The index too: both find none and scan at the same time."""
    ranks = [start(read_as_rank, rank, tmp_path, store.environment()) for rank in range(2)]
    assert [finish(rank, 100.0) for rank in ranks] == [0, 0]
    read = [(tmp_path / f"read-{rank}").read_text().splitlines() for rank in range(2)]
    keys, images, _ = run(on_disk(tmp_path))
    for rank in range(2):
        part = slice(4 * rank, 4 * rank + 4)
        assert read[rank] == [f"{k[part]} {i[part].sum()}" for k, i in zip(keys, images, strict=True)]
    assert {name: store.gets[name] for name in NAMES} == dict.fromkeys(NAMES, 1)


def test_a_download_that_another_process_ends_in_the_last_moment(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shard = index.shards[0]
    assert isinstance(shard, RemoteShard)
    shard.cached.rename(tmp_path / "kept")
    real = Cache._make_room

    def ended(self: Cache, *more: Any) -> bool:
        shutil.copy(tmp_path / "kept", shard.cached)
        return real(self, *more)

    monkeypatch.setattr(Cache, "_make_room", ended)
    store.gets.clear()
    cache.drop(cache.hold(shard))
    assert not store.gets
    assert not list(cache.folder.glob("*.part"))


def test_a_killed_download_is_continued(tmp_path: Path, store: Store, cache: Cache) -> None:
    """Its lock ends with it, and what it had stays."""
    index = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache)
    shutil.rmtree(cache.folder)
    store.stall = 60.0
    store.faults[NAMES[0]].append("stall")
    shard = index.shards[0]
    assert isinstance(shard, RemoteShard)
    store.gets.clear()
    store.sent.clear()
    code = (
        "from pathlib import Path; from compt.data import remote, stores; stores._PIECE = 4096; "
        f"cache = remote.Cache(Path({str(cache.folder)!r})); "
        f"cache.hold(remote.RemoteShard({shard.root!r}, {shard.key!r}, {shard.size}, {shard.tag!r}, cache))"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    part = shard.cached.with_suffix(".part")
    until = time.monotonic() + 20
    while time.monotonic() < until and not (part.exists() and part.stat().st_size > 8000):
        time.sleep(0.02)
    had = part.stat().st_size
    assert 8000 < had < shard.size
    with part.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.kill()
    child.wait()
    cache.drop(cache.hold(shard))
    assert store.gets[NAMES[0]] == 2
    assert store.sent[NAMES[0]] - shard.size < stores._PIECE
    assert shard.cached.read_bytes() == (tmp_path / "store" / "bucket" / "set" / NAMES[0]).read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["other bytes", "shorter"])
def test_a_damaged_file_of_the_cache_changes_no_batch(
    tmp_path: Path, store: Store, cache: Cache, workers: int, damage: str
) -> None:
    index, want = open_index(SHARDS, tmp_path, cache=cache), run(on_disk(tmp_path))
    for shard in index.shards[:2]:
        assert isinstance(shard, RemoteShard)
        path, size = shard.cached, shard.size
        path.write_bytes(b"?" * (size if damage == "other bytes" else size // 2))
    store.gets.clear()
    assert same(run(index, workers), want)
    if damage == "shorter":  # noticed before a sample is read: the whole shard is there again
        assert store.gets == {NAMES[0]: 1, NAMES[1]: 1}


def test_unusable_samples_are_replaced_as_from_a_disk(tmp_path: Path, store: Store, cache: Cache) -> None:
    """A substitute may be in any shard. It is read alone, and not with its whole shard."""
    local = on_disk(tmp_path)
    for number in (0, 3):
        path = local.shards[number]
        assert isinstance(path, Path)
        data = bytearray(path.read_bytes())
        for sample in range(8):
            entry = local.entry(8 * number + sample)
            data[entry.image_offset : entry.image_offset + 8] = bytes(8)
        path.write_bytes(data)
    local = on_disk(tmp_path)
    sizes = [shard.stat().st_size for shard in local.shards]  # type: ignore[union-attr]
    tight = Cache(cache.folder, sum(sorted(sizes)[-4:]))
    index = open_index(SHARDS, tmp_path, cache=tight)
    want = run(local, max_bad_share=1.0)
    for workers in (0, 1):
        assert same(run(index, workers, max_bad_share=1.0), want)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_and_validation_read_the_same(tmp_path: Path, store: Store, cache: Cache, workers: int) -> None:
    index, local = open_index(SHARDS, tmp_path, tmp_path / "index", cache=cache), on_disk(tmp_path)
    shutil.rmtree(cache.folder)
    store.gets.clear()

    def evaluated(one: Index) -> list[Any]:
        loader = eval_loader(ShardSamples(one), image_size=16, batch=5, workers=workers)
        return [(batch.keys, batch.images.numpy().tobytes()) for batch in loader]

    def validated(one: Index) -> Run:
        more = {"batch": 8, "image_size": 16, "captions": 2, "context_length": 16}
        return parts(list(fixed_caption_batches(one, **more, workers=workers)))

    assert evaluated(index) == evaluated(local)
    assert same(validated(index), validated(local))
    assert {name: store.gets[name] for name in NAMES} == dict.fromkeys(NAMES, 1)


def test_class_names_beside_shards_are_found(tmp_path: Path, store: Store, cache: Cache) -> None:
    folder = tmp_path / "store" / "bucket"
    (folder / CLASSNAMES).write_text("cat\ndog\n")
    index = open_index(SHARDS, tmp_path, cache=cache)
    found = beside(index.places, CLASSNAMES)
    assert found is not None
    assert found.read_text() == "cat\ndog\n"
    (folder / CLASSNAMES).unlink()
    assert beside(index.places, CLASSNAMES) is None


@pytest.mark.parametrize("workers", [1, 2])
def test_check_reads_what_it_reads_from_a_disk(tmp_path: Path, store: Store, cache: Cache, workers: int) -> None:
    found = check(SHARDS, tmp_path, cache=cache, workers=workers)
    local = check("*.tar", tmp_path / "store" / "bucket" / "set", index_dir=tmp_path / "index", workers=1)
    assert found.to_json(0.01) == local.to_json(0.01)


def test_https_needs_byte_ranges_alone_and_reads_netrc(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    address = f"{store.url}/bucket/set/{{000000..000005}}.tar"
    index = open_index(address, tmp_path, cache=cache)
    assert store.authorized == {"Basic bWU6aGlkZGVu"}
    assert same(run(index), run(on_disk(tmp_path)))
    held = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert held
    assert not [path for path in held if b"hidden" in path.read_bytes()]
    (tmp_path / "store" / "bucket" / "set" / NAMES[0]).unlink()
    with pytest.raises(DataError, match=r"there is no http://127.0.0.1:\d+/bucket/set/000000.tar in the store"):
        open_index(address, tmp_path, cache=cache)


def test_a_server_without_etags_is_watched_by_the_time_of_change(tmp_path: Path, store: Store, cache: Cache) -> None:
    store.tags = False
    address = f"{store.url}/bucket/set/{{000000..000005}}.tar"
    index = open_index(address, tmp_path, tmp_path / "index", cache=cache)
    assert same(run(index), run(on_disk(tmp_path)))
    shutil.rmtree(cache.folder)
    store.faults[NAMES[1]].append("cut")
    assert same(run(index), run(on_disk(tmp_path)))
    shutil.rmtree(cache.folder)
    os.utime(tmp_path / "store" / "bucket" / "set" / NAMES[1], (1, 1))
    with pytest.raises(DataError, match=rf"{NAMES[1]} has changed in the store since it was opened"):
        run(index)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://me:hidden@host/a.tar", r"https://… holds a user or password"),
        ("s3://AKIA:hidden@bucket/a.tar", r"s3://… holds a user or password"),
        ("https://host/a.tar?X-Amz-Signature=hidden", r"https://host/a.tar goes on with a query"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(tmp_path: Path, address: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        checked_address(address)
    with pytest.raises(DataError, match=said) as error:
        open_index(address, tmp_path)
    place = "data.train=" if address.startswith("s3") else "evaluation.sets.0.data="
    with pytest.raises(ConfigError, match=said) as unread:
        recipe_of(place + address)
    assert "hidden" not in str(error.value) + str(refused.value) + str(unread.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [("https://host/set/*.tar", "cannot list files"), ("s3://bucket", "name the shards behind s3://bucket")],
)
def test_addresses_that_name_no_shard(tmp_path: Path, address: str, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        open_index(address, tmp_path)


def test_without_obstore_one_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    stores.objects.cache_clear()
    with pytest.raises(DataError, match=r"pip install 'compt\[remote\]'"):
        open_index("gs://bucket/a.tar", tmp_path)


def test_the_cache_of_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Cache.at().folder.name == f"compt-shards-{os.getuid()}"
    Cache.at().folder.rename(tmp_path / "elsewhere")
    (tmp_path / f"compt-shards-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="belongs to another user, or is a link"):
        Cache.at()
    monkeypatch.setenv("COMPT_CACHE", str(tmp_path))
    assert Cache.at() == Cache(tmp_path)
    assert Cache.at(tmp_path / "named", 5) == Cache(tmp_path / "named", 5)


def test_hugging_face_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Cache) -> None:
    """Through a stand-in for HfFileSystem: nothing here reaches the hub."""
    paths = make_shards(tmp_path / "hub", n=12, shards=2)

    class Files:
        def __init__(self, **_: Any) -> None:
            pass

        def info(self, key: str) -> dict[str, Any]:
            path = tmp_path / "hub" / Path(key).name
            if not path.exists():
                raise FileNotFoundError(key)
            return {"name": key, "size": path.stat().st_size, "blob_id": str(hash(path.read_bytes())), "type": "file"}

        def ls(self, folder: str, detail: bool) -> list[dict[str, Any]]:
            assert detail
            return [self.info(f"{folder}/{path.name}") for path in paths]

        def cat_file(self, key: str, start: int, end: int) -> bytes:
            return (tmp_path / "hub" / Path(key).name).read_bytes()[start:end]

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Files)
    stores.objects.cache_clear()
    local = open_index("*.tar", tmp_path / "hub", tmp_path / "index")
    for address in ("hf://datasets/me/set/{000000..000001}.tar", "hf://datasets/me/set/*.tar"):
        index = open_index(address, tmp_path, cache=cache)
        assert index.fingerprint == local.fingerprint
        assert [str(shard) for shard in index.shards] == [f"hf://datasets/me/set/{path.name}" for path in paths]
    assert np.array_equal(index.sizes, local.sizes)
    assert same(run(index, steps=3, batch=4), run(local, steps=3, batch=4))
    stores.objects.cache_clear()


def test_a_cache_without_room_for_a_look_beside_training_is_refused_at_the_start(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training holds its shards while the validation shards, or two of a set, are downloaded."""
    bucket = make_data(tmp_path / "store" / "bucket")
    monkeypatch.setenv("COMPT_CACHE", str(cache.folder))
    train, val, scored = (
        [p.stat().st_size for p in (bucket / name).glob("*.tar")] for name in ("train", "val", "eval")
    )
    assert sum(val) < sum(scored)
    room = sum(train) + sum(scored)  # 4 shards of training are twice `shuffle_shards`
    prepare(recipe_of(*REMOTE_DATA, f"data.cache_size={room}"), tmp_path / "run", base=tmp_path)
    said = rf"data.cache_size: is {room - 1:,} bytes, but {room:,} are needed .* {sum(train):,} .* {sum(scored):,} "
    with pytest.raises(DataError, match=said):
        prepare(recipe_of(*REMOTE_DATA, f"data.cache_size={room - 1}"), tmp_path / "run", base=tmp_path)
    without = recipe_of(*REMOTE_DATA, f"data.cache_size={sum(train) + sum(val)}", "evaluation.sets.1.role=report")
    prepare(without, tmp_path / "run", base=tmp_path)
    at_the_end = recipe_of(*REMOTE_DATA, f"data.cache_size={sum(train)}", "evaluation.every=null")
    prepare(at_the_end, tmp_path / "run", base=tmp_path)


def test_a_run_asks_a_store_once_for_each_shard(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once for each Scorer, which every model has one of."""
    make_data(tmp_path / "store" / "bucket")
    monkeypatch.setenv("COMPT_CACHE", str(cache.folder))
    recipe = recipe_of(*REMOTE_DATA)
    prepare(recipe, tmp_path / "run", base=tmp_path)
    assert (store.heads.total(), store.gets["bucket"]) == (4 + 2 + 2, 1)  # training, a set, files beside it; a list
    scorer, model = Scorer(recipe, tmp_path), build(recipe.specs()["small"], seed=0)
    first = scorer.during_training(model)
    assert (store.heads.total(), store.gets["bucket"]) == (8 + 2 + 2, 2)
    gets = store.gets.total()
    assert scorer.during_training(model) == first
    scorer.at_the_end(model, tmp_path / "scores")
    assert (store.heads.total(), store.gets.total()) == (12, gets)


def test_ranks_get_the_answers_of_the_first(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path / "store" / "bucket")
    monkeypatch.setenv("COMPT_CACHE", str(cache.folder))
    recipe, model = recipe_of(*REMOTE_DATA), build(recipe_of().specs()["small"], seed=0)
    first = Scorer(recipe, tmp_path)
    scores = first.during_training(model)
    answers = {**open_data(recipe, tmp_path).shards[0].cache.answers, **first.cache.answers}  # type: ignore
    store.heads.clear()
    store.gets.clear()
    with monkeypatch.context() as patch:
        patch.setattr(dist, "on_main", lambda _: None)
        patch.setattr(dist, "broadcast_object", lambda _: answers)
        assert len(open_data(recipe, tmp_path)) == 48
        patch.setattr(dist, "world_size", lambda: 2)
        second = Scorer(recipe, tmp_path)
        second.ask(recipe.evaluation.sets[1])
        second._ask(recipe.evaluation.validation, second.held_out)
    assert second.during_training(model) == scores
    assert not store.heads
    assert not store.gets


def test_a_chain_from_a_store_gives_the_weights_of_one_from_a_disk_and_writes_no_secret(
    tmp_path: Path, store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, validation and evaluation sets; stopped in the middle and resumed with a cache that was emptied."""
    make_data(tmp_path / "store" / "bucket")
    at_once = ("chain.links=[{model: small, train: {steps: 6}, warmup: {steps: 2}}]",)
    chain(tmp_path / "store" / "bucket", tmp_path / "local", *at_once)
    monkeypatch.setenv("COMPT_CACHE", str(cache.folder))
    remote_data = (*at_once, *REMOTE_DATA, "engine.workers=1")
    stopped_at(tmp_path, tmp_path / "run", 3, *remote_data)
    shutil.rmtree(cache.folder)
    chain(tmp_path, tmp_path / "run", *remote_data)
    assert weights_hash(tmp_path / "run", FIRST) == weights_hash(tmp_path / "local", FIRST)
    scores = [manifest(tmp_path / run, FIRST)["scores"]["held_out"]["top1"] for run in ("run", "local")]
    assert scores[0] == scores[1]
    for path in (path for folder in ("run", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert b"topsecret" not in data
        assert KEY.encode() not in data
