"""Shards in object storage: each machine downloads them whole into a bounded cache on a local disk.

A process that needs a cached file holds a shared lock on it, and one that writes it an exclusive lock. The system
releases both when the process dies. A file whose lock is free may be removed to make room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import struct
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from compt.data.labels import CLASSNAMES, TEMPLATES
from compt.data.stores import NEVER, Found, MissingError, again, failed_attempt, objects
from compt.errors import ComptError, DataError
from compt.files import user_cache, write_bytes
from compt.recipe.schema import SHARD_CACHE, Data

DOWNLOADS = 4
"""Shards that a process downloads at a time."""
ROOM_SECONDS = 600.0
"""Seconds to wait for room in the cache that other processes hold."""
_ANSWER = struct.Struct("<?Q")
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_READ_AHEAD = 1 << 20


@dataclass(frozen=True)
class RemoteShard:
    """A shard in a store. root: the address without the key. Size and tag identify what it holds."""

    root: str
    key: str
    size: int
    tag: str
    cache: Cache

    def __str__(self) -> str:
        return f"{self.root}/{self.key}"

    @property
    def name(self) -> str:
        """The name of the file."""
        return PurePosixPath(self.key).name

    @property
    def folder_hash(self) -> str:
        """A name for the folder that the shard is in, the same on every machine."""
        return hashlib.sha256(str(self).rpartition("/")[0].encode()).hexdigest()[:12]

    @property
    def parent(self) -> Path:
        """The local folder for what belongs to the folder that the shard is in: the index, and files beside it."""
        return self.cache.folder / f"beside-{self.folder_hash}"

    @property
    def cached(self) -> Path:
        """The place in the cache. Another size or tag has another one."""
        digest = hashlib.sha256(f"{self}\0{self.tag}".encode()).hexdigest()[:24]
        return self.cache.folder / f"{digest}-{self.size}.tar"

    def read(self, first: int, size: int) -> bytes:
        """`size` bytes, from the cache if the shard is there, else from the store. Raises DataError."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self.cached, os.O_RDONLY)
            try:
                data = os.pread(descriptor, size, first)
            finally:
                os.close(descriptor)
            if len(data) == size:
                return data
        return b"".join(self.stream(first, first + size)) if _own_obstore() else _ask(self, (first, first + size))

    def check_cached(self, intact: Callable[[Path], bool]) -> None:
        """Remove the cached file if it is not `intact`. Samples are then read from the store."""
        with contextlib.suppress(FileNotFoundError):
            if not intact(self.cached):
                _log.warning("%s, the copy of %s, is damaged, and is removed", self.cached, self)
                self.cached.unlink()

    def stream(self, first: int, last: int, stop: threading.Event = NEVER) -> Iterator[Any]:
        """Bytes `first` to `last`, which is excluded. After a fault it goes on where it stopped. Raises DataError."""
        failed = 0
        while first < last:
            try:
                for piece in objects(self.root).stream(Found(self.key, self.size, self.tag), first, last):
                    if stop.is_set():
                        raise CancelledError
                    first, failed = first + len(piece), 0
                    yield piece
                if first < last:
                    raise EOFError("the body ended too early")
            except Exception as error:
                failed += 1
                failed_attempt(error, failed, str(self), stop)


def _own_obstore() -> bool:
    # obstore's threads do not survive a fork: in a forked process its calls never return.
    return multiprocessing.parent_process() is None


@dataclass(frozen=True)
class Cache:
    """A folder with at most `size` bytes of shards, for all processes of a machine. The free disk is another bound.

    answers: what stores have said, for as long as this object lives; None to ask them each time.
    """

    folder: Path
    size: int = SHARD_CACHE
    answers: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def at(cls, folder: Path | None = None, size: int = SHARD_CACHE) -> Cache:
        """The cache in `folder`, else in $COMPT_CACHE, else in the user's cache, else among temporary files."""
        named = os.environ.get("COMPT_CACHE")
        return cls(folder or (Path(named) if named else user_cache("shards")), size)

    @classmethod
    def of(cls, data: Data, base: Path) -> Cache:
        """The cache that a recipe names. It asks stores once: what is opened again is what was opened first."""
        found = cls.at(base / Path(data.cache_dir).expanduser() if data.cache_dir else None, data.cache_size)
        return cls(found.folder, found.size, {})

    def known(self, question: str, ask: Callable[[], _T]) -> _T:
        """What a store says, or has said before."""
        if self.answers is None:
            return ask()
        if question not in self.answers:
            self.answers[question] = ask()
        answer: _T = self.answers[question]
        return answer

    def hold(self, shard: RemoteShard, stop: threading.Event = NEVER) -> int:
        """A descriptor of the whole shard, which stays in the cache until `drop`. Downloads it where it is missing.

        Raises DataError, and CancelledError once `stop` is set.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while (descriptor := self._shared(shard)) is None:
                if _own_obstore():
                    self._download(shard, stop)
                else:
                    _ask(shard, None)
            return descriptor
        except OSError as error:
            hint = "lower data.cache_size, or " if error.errno == errno.ENOSPC else ""
            raise DataError(
                f"the cache {self.folder}: {error.strerror or error}; {hint}name another folder with data.cache_dir or "
                "$COMPT_CACHE"
            ) from None

    @staticmethod
    def drop(descriptor: int) -> None:
        """Let go of a shard. Processes forked meanwhile have the same lock, which closing alone would leave to them."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def _shared(self, shard: RemoteShard) -> int | None:
        """A descriptor with a shared lock on the cached file. One of another size is damaged, and is removed."""
        try:
            descriptor = os.open(shard.cached, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        found = os.fstat(descriptor)
        if found.st_nlink and found.st_size == shard.size:
            os.utime(descriptor)  # the time of the last use
            return descriptor
        if found.st_nlink:
            _log.warning("%s is damaged: it is removed, and %s is downloaded again", shard.cached, shard)
            shard.cached.unlink(missing_ok=True)
        self.drop(descriptor)
        return None

    def _download(self, shard: RemoteShard, stop: threading.Event) -> None:
        """Download a shard, or wait until another process has. A partial file is continued."""
        part = shard.cached.with_suffix(".part")
        descriptor = self._reserve(shard, part, stop)
        if descriptor is None:
            return
        try:
            if os.fstat(descriptor).st_size > shard.size:
                os.ftruncate(descriptor, 0)
            for piece in shard.stream(os.fstat(descriptor).st_size, shard.size, stop):
                view = memoryview(piece)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            with self._turn():  # who makes room lists the folder first, and would count the shard under neither name
                os.rename(part, shard.cached)
        finally:
            self.drop(descriptor)

    def _reserve(self, shard: RemoteShard, part: Path, stop: threading.Event) -> int | None:
        """The partial file under an exclusive lock, with room for the whole; None once the shard is in the cache."""
        waited = 0.0
        while not shard.cached.exists():
            other = _in_use(part)
            if not other:  # to make room takes a look at every file
                with self._turn():
                    if self._make_room(shard, part):
                        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                        if not _locked(descriptor):
                            other = True
                            os.close(descriptor)
                        elif shard.cached.exists():  # finished between the first line of the loop and here
                            part.unlink()
                            self.drop(descriptor)
                            return None
                        else:
                            return descriptor
            waited = 0.0 if other else waited + 0.1
            if waited > ROOM_SECONDS:
                raise DataError(
                    f"the cache {self.folder} has no room for {shard} ({shard.size:,} bytes): this and other processes "
                    f"use the rest of {self.size:,} bytes, or the disk is full; enlarge data.cache_size or empty the "
                    "disk"
                )
            if stop.wait(0.1):
                raise CancelledError
        return None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """All that makes room or takes it does so in turn."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            self.drop(descriptor)

    def _make_room(self, shard: RemoteShard, part: Path) -> bool:
        """Remove what was not used for longest until the shard fits into the cache and on the disk."""
        files: list[tuple[float, Path, int, int]] = []
        for path in self.folder.glob("*-*.*"):
            if path.suffix in (".tar", ".part") and (whole := path.stem.rpartition("-")[2]).isdigit():
                with contextlib.suppress(FileNotFoundError):
                    files.append(((stat := path.stat()).st_mtime, path, int(whole), stat.st_size))
        new = 0 if any(path == part for _, path, *_ in files) else shard.size
        over = sum(whole for *_, whole, _ in files) + new - self.size
        disk = os.statvfs(self.folder)
        short = sum(max(whole - now, 0) for *_, whole, now in files) + new - disk.f_bavail * disk.f_frsize
        for _, path, size, _ in sorted(files):
            if over <= 0 and short <= 0:
                break
            if path != part and not _in_use(path, remove=True):
                over, short = over - size, short - size
        return over <= 0 and short <= 0


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _in_use(path: Path, remove: bool = False) -> bool:
    """Whether a process holds a file of the cache. `remove`: where none does, the file is removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if (free := _locked(descriptor)) and remove:
            path.unlink(missing_ok=True)
        return not free
    finally:
        Cache.drop(descriptor)


Shard = Path | RemoteShard


@contextlib.contextmanager
def _held(shard: RemoteShard) -> Iterator[Path]:
    descriptor = shard.cache.hold(shard)
    try:
        yield shard.cached
    finally:
        shard.cache.drop(descriptor)


def bytes_of(shards: Iterable[Shard], number: int | None = None) -> int:
    """What the `number` largest shards (default: all) take in the cache."""
    sizes = sorted((shard.size for shard in shards if isinstance(shard, RemoteShard)), reverse=True)
    return sum(sizes[:number])


def local(shard: Shard) -> AbstractContextManager[Path]:
    """A file with the shard, for as long as the context lasts. Raises DataError."""
    return _held(shard) if isinstance(shard, RemoteShard) else nullcontext(shard)


def places_beside(shard: Shard) -> tuple[Path, ...]:
    """The folders where the other files of an evaluation set may be; those of a store are downloaded first."""
    if not isinstance(shard, RemoteShard):
        return shard.parent, shard.parent.parent
    above = PurePosixPath(shard.key).parent
    for name in (CLASSNAMES, TEMPLATES):
        data = next(filter(None, (_whole(shard, str(folder / name)) for folder in (above, above.parent))), b"")
        if data:
            write_bytes(shard.parent / name, data)
        else:
            (shard.parent / name).unlink(missing_ok=True)
    return (shard.parent,)


def _whole(beside: RemoteShard, key: str) -> bytes:
    """Another object of the same store; nothing if there is none."""
    place = f"{beside.root}/{key}"

    def ask() -> bytes:
        try:
            found = again(functools.partial(objects(beside.root).head, key), place)
        except MissingError:
            return b""
        return b"".join(RemoteShard(beside.root, found.key, found.size, found.tag, beside.cache).stream(0, found.size))

    return beside.cache.known(f"what is in {place}", ask)


class _Helper:
    """A process of its own for what a forked process needs of a store."""

    def __init__(self) -> None:
        # In a group of its own, so that Ctrl-C does not reach it. It ends when its input does.
        command = [sys.executable, "-m", "compt.data.remote"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        self._turn = threading.Lock()

    def ask(self, shard: RemoteShard, part: tuple[int, int] | None) -> bytes:
        """Bytes of the shard, or nothing once it is in the cache. Raises DataError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        cache = [str(shard.cache.folder), shard.cache.size]
        line = json.dumps([shard.root, shard.key, shard.size, shard.tag, cache, part])
        with self._turn, contextlib.suppress(OSError, struct.error):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            good, size = _ANSWER.unpack(self._process.stdout.read(_ANSWER.size))
            data = self._process.stdout.read(size)
            if good and len(data) == size:
                return data
            raise DataError(data.decode("utf-8", "replace"))
        raise DataError(f"{shard}: the process that reads from the store has ended")


@functools.cache
def _helper(pid: int) -> _Helper:
    return _Helper()


def _ask(shard: RemoteShard, part: tuple[int, int] | None) -> bytes:
    return _helper(os.getpid()).ask(shard, part)


def serve() -> None:
    """Answer the questions of one `_Helper`."""
    for line in sys.stdin.buffer:
        root, key, size, tag, (folder, limit), part = json.loads(line)
        shard = RemoteShard(root, key, size, tag, Cache(Path(folder), limit))
        try:
            data = b"".join(shard.stream(*part)) if part else b""
            if not part:
                shard.cache.drop(shard.cache.hold(shard))
            answer = _ANSWER.pack(True, len(data)) + data
        except ComptError as error:
            text = str(error).encode()
            answer = _ANSWER.pack(False, len(text)) + text
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


def staged(
    items: Iterable[_T],
    samples_of: Callable[[_T], NDArray[np.int64]],
    ends: NDArray[np.int64],
    shards: Sequence[Shard],
    ahead: int,
    behind: int,
) -> Iterator[_T]:
    """Yield each item once its shards are in the cache, and download those of later items meanwhile.

    ends: for each shard, samples up to its end. ahead: shards to hold at a time, as far as there is room. behind: items
    that are still in work after they were yielded; their shards stay. Raises DataError.
    """
    cache = next(shard.cache for shard in shards if isinstance(shard, RemoteShard))
    sizes = [shard.size if isinstance(shard, RemoteShard) else 0 for shard in shards]
    most = bytes_of(shards, ahead)
    if most > cache.size:
        raise DataError(
            f"data.cache_size is {cache.size:,} bytes, but {min(ahead, len(sizes)):,} shards are needed at a time, "
            f"which take up to {most:,}: enlarge it (training needs fewer shards with a lower data.shuffle_shards)"
        )
    held: dict[int, Future[int]] = {}
    uses: Counter[int] = Counter()
    waiting: deque[tuple[_T, list[int]]] = deque()
    working: deque[list[int]] = deque()
    stop, source, samples, item = threading.Event(), iter(items), 0, None
    pool = ThreadPoolExecutor(DOWNLOADS, "download")

    def let_go(numbers: list[int]) -> None:
        for at in numbers:
            uses[at] -= 1
            if not uses[at]:
                held.pop(at).add_done_callback(_drop_held)

    try:
        while True:
            # Read ahead until there is a shard for which there is no room yet. Without new shards that would go on to
            # the last step of a run, so the number of samples is bounded too.
            while item is not None or samples < _READ_AHEAD:
                if item is None and (item := next(source, None)) is None:
                    break
                ids = samples_of(item)
                needed = [at for at in np.unique(ends.searchsorted(ids, side="right")).tolist() if sizes[at]]
                new = [at for at in needed if at not in held]
                room = sum(sizes[at] for at in (*held, *new)) <= cache.size and len(held) + len(new) <= ahead
                while not (room or waiting) and new and working:
                    let_go(working.popleft())
                    room = sum(sizes[at] for at in (*held, *new)) <= cache.size
                if waiting and new and not room:
                    break
                uses.update(needed)
                held.update({at: pool.submit(cache.hold, shards[at], stop) for at in needed if at not in held})
                waiting.append((item, needed))
                samples += len(ids)
                item = None
            if not waiting:
                return
            ready, needed = waiting.popleft()
            samples -= len(samples_of(ready))
            for at in needed:
                held[at].result()
            yield ready
            working.append(needed)
            if len(working) > behind:
                let_go(working.popleft())
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)  # a store that stays silent would hold up the end
        for future in held.values():
            future.add_done_callback(_drop_held)


def _drop_held(future: Future[int]) -> None:
    if not future.cancelled() and future.exception() is None:
        Cache.drop(future.result())


if __name__ == "__main__":
    serve()
