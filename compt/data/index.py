"""The index of a WebDataset: one small file per shard, read when needed and reused while the shard is unchanged."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compt.data.account import Account
from compt.data.content import sampled_hash, spread
from compt.data.find import expand_patterns
from compt.data.remote import DOWNLOADS, Cache, RemoteShard, Shard, local, places_beside
from compt.data.scan import COLUMNS, KIND_TABLE, ShardScan, scan_shard
from compt.data.table import CaptionTable, convert_table
from compt.dist.child import process_pool
from compt.errors import DataError, RunError
from compt.files import read_json, write_bytes, write_json
from compt.recipe.schema import MIN_MATCHED

VERSION = 4
"""Raised when keys, captions or class numbers are read by other rules: stored indexes are then made again."""
INDEX_FOLDER = ".compt-index"
Progress = Callable[[int, int], None]
"""Shards done, shards in all."""
_COMPARED = 256
"""Pairs of samples with one row of a table whose images are compared: shards may be listed twice."""
_HELD_ROWS = 1 << 20
"""Rows of the shards' tables that one process keeps in memory (about 100 MB)."""


class IndexEntry(NamedTuple):
    """Where the parts of one sample are: offsets and sizes in bytes in its shard. See `scan.COLUMNS`."""

    shard: int
    key: str
    image_offset: int
    image_size: int
    text_offset: int
    text_size: int
    text_kind: int
    json_offset: int
    json_size: int
    captions: int
    label: int


class CaptionSource(NamedTuple):
    """Where captions come from, beside the known fields of the shards."""

    table: CaptionTable | None
    columns: Sequence[str]


_DAMAGES = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a damaged file."""


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard, without its table. counts: images by their number of captions.

    content: `sampled_hash` of the shard when it had the time `mtime_ns`.
    """

    shard: Shard
    file: Path
    samples: int
    digest: str
    account: Account
    counts: Counter[int]
    content: str
    mtime_ns: int

    def table(self) -> tuple[NDArray[np.int64], bytes]:
        """The rows, int64 [samples, len(COLUMNS)], and all keys, joined. Raises DataError for a damaged file."""
        try:
            with np.load(self.file, allow_pickle=False) as stored:
                return stored["rows"], stored["keys"].tobytes()
        except _DAMAGES as error:
            with contextlib.suppress(OSError):
                self.file.unlink()
            gone = "has been removed" if not self.file.exists() else "has to be removed"
            text = f"the index {self.file} was damaged and {gone}; start the same command again to write it again"
            raise DataError(f"{text} ({error})") from None

    def check_content(self, rows: NDArray[np.int64]) -> None:
        """Raise DataError where the shard holds other data than when it was indexed, with the same size and time.

        `rows` are those of its table. Raises OSError where the shard cannot be read.
        """
        if isinstance(self.shard, RemoteShard):
            self.shard.check_cached(lambda path: sampled_hash(path, rows) == self.content)
            return
        same_time = self.shard.stat().st_mtime_ns == self.mtime_ns
        if same_time and sampled_hash(self.shard, rows) != self.content:
            raise DataError(
                f"{self.shard} holds other data than when it was indexed, with the same sizes and the same time; "
                f"put the old shard back, or remove {self.file} to index the new one"
            )


class Index:
    """All samples of a list of shards, numbered in the order of the shards and of their members.

    sizes: samples of each shard, int64 [shards]. fingerprint: hash of the names of the shards, the keys and the sizes;
    it does not depend on the folder. content: hash of some samples of each shard.
    columns: the fields of a `.json` with captions, if the recipe names them. account: everything that was read. counts:
    images by their number of captions.
    """

    def __init__(
        self, shards: Sequence[ShardIndex], captions: CaptionTable | None = None, columns: Sequence[str] = ()
    ) -> None:
        self.shards = tuple(shards)
        self.captions = captions
        self.columns = tuple(columns)
        self.sizes = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        self.ends = np.cumsum(self.sizes)
        self.starts = self.ends - self.sizes
        self.account, self.counts = Account(), Counter[int]()
        for shard in self.shards:
            self.account.add(shard.account, f"{shard.shard.name}: ")
            self.counts.update(shard.counts)
        identity = [[shard.shard.name, shard.digest] for shard in self.shards]
        text = json.dumps([identity, captions.digest if captions else None])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.content = hashlib.sha256("".join(shard.content for shard in self.shards).encode()).hexdigest()
        self._tables: OrderedDict[int, tuple[NDArray[np.int64], bytes]] = OrderedDict()
        self._held = 0

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def places(self) -> tuple[Path, ...]:
        """Where files such as class names are: beside the first shard, or one folder above."""
        return places_beside(self.shards[0].shard)

    def table(self, shard: int) -> tuple[NDArray[np.int64], bytes]:
        """A shard's rows and keys. The most recent tables stay in memory, up to `_HELD_ROWS`."""
        found = self._tables.get(shard)
        if found is not None:
            self._tables.move_to_end(shard)
            return found
        found = self._tables[shard] = self.shards[shard].table()
        self._held += len(found[0])
        while self._held > _HELD_ROWS and len(self._tables) > 1:
            self._held -= len(self._tables.popitem(last=False)[1][0])
        return found

    @property
    def remote(self) -> bool:
        """Whether some of the shards are in object storage."""
        return any(isinstance(shard.shard, RemoteShard) for shard in self.shards)

    def shard_of(self, sample: int) -> int:
        """The number of the shard that a sample is in."""
        return int(self.ends.searchsorted(sample, side="right"))

    def entry(self, sample: int) -> IndexEntry:
        """Where the parts of a sample are."""
        shard = self.shard_of(sample)
        rows, keys = self.table(shard)
        start, size, *where = rows[sample - int(self.starts[shard])].tolist()
        return IndexEntry(shard, keys[start : start + size].decode("utf-8", "surrogateescape"), *where)

    def key(self, sample: int) -> str:
        """A sample's key, as webdataset forms it."""
        return self.entry(sample).key

    def column(self, name: str) -> NDArray[np.int64]:
        """One column of `scan.COLUMNS` for all samples, [len(self)]. Shards are read one at a time."""
        at = COLUMNS.index(name)
        parts = [shard.table()[0][:, at] for shard in self.shards]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def describe(self, sample: int) -> str:
        """`shard: key`, for messages."""
        entry = self.entry(sample)
        return f"{self.shards[entry.shard].shard.name}: {entry.key}"


def _cache_root() -> Path | None:
    """The user's cache; None for a user without a home folder (a uid of a container, say)."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compt" / "index"
    return None


def _short_hash(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]


def _folders(shards_folder: Path, out: Path | None) -> list[Path]:
    """The folders where the index of one folder's shards may be, the preferred one first."""
    if out is not None:
        return [out]
    cache = _cache_root()
    return [shards_folder / INDEX_FOLDER, *([cache / _short_hash(shards_folder)] if cache else [])]


def index_folder(shards_folder: Path, out: Path | None = None) -> Path:
    """The folder to write an index to: `out`, else beside the shards, else in the user's cache. It is created."""
    last: OSError | None = None
    folders = _folders(shards_folder, out)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            last = error
    raise DataError(
        f"cannot write an index in {folders[-1]}: {last and last.strerror}; "
        "name a writable folder with data.index_dir or --out" + (", or set HOME" if _cache_root() is None else "")
    )


def _file_name(shard: Shard, out: Path | None) -> str:
    # Shards with one name in several folders may share `out`.
    folder = shard.folder_hash if isinstance(shard, RemoteShard) else _short_hash(shard.parent)
    return f"{shard.name}-{folder}.npz" if out is not None else f"{shard.name}.npz"


def _version(shard: Shard) -> dict[str, Any]:
    """What changes when a shard is replaced."""
    if isinstance(shard, RemoteShard):
        return {"size": shard.size, "tag": shard.tag}
    stat = shard.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _identity(shard: Shard, source: CaptionSource) -> dict[str, Any]:
    return {
        "version": VERSION,
        "shard": shard.name,
        **_version(shard),
        "captions": source.table.digest if source.table else None,
        "columns": [*source.columns],
    }


def _load(shard: Shard, file: Path, identity: dict[str, Any]) -> ShardIndex | None:
    """The stored index of a shard; None where it is missing, damaged, or older than the shard."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            meta = json.loads(stored["meta"].tobytes())
        if {key: meta[key] for key in identity} != identity:
            return None
        counts = Counter({int(number): images for number, images in meta["counts"].items()})
        account = Account.from_json(meta["account"])
        return ShardIndex(
            shard, file, meta["samples"], meta["digest"], account, counts, meta["content"], meta.get("mtime_ns", 0)
        )
    except _DAMAGES:
        return None


def _store(file: Path, identity: dict[str, Any], scan: ShardScan) -> None:
    meta = {
        **identity,
        "samples": len(scan.rows),
        "digest": scan.digest(),
        "account": scan.account.to_json(),
        "counts": scan.counts,
    }
    blob = io.BytesIO()
    np.savez_compressed(
        blob,
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
        rows=scan.rows,
        keys=np.frombuffer(scan.keys, np.uint8),
    )
    try:
        write_bytes(file, blob.getbuffer())
    except RunError as error:
        raise DataError(f"the index: {error}") from error


def _index_one(shard: Shard, file: Path, source: CaptionSource) -> ShardIndex:
    identity = _identity(shard, source)
    with local(shard) as path:
        scan = scan_shard(path, source.table, source.columns)
        try:
            content = sampled_hash(path, scan.rows)
        except OSError as error:
            raise DataError(f"cannot read shard {shard}: {error.strerror}") from error
    _store(file, {**identity, "content": content}, scan)
    stored = _load(shard, file, identity)
    if stored is None:
        raise DataError(f"shard {shard} changed while it was indexed; index it again once it is complete")
    return stored


def _scan_all(shards: list[Shard], files: list[Path], source: CaptionSource, workers: int) -> Iterator[ShardIndex]:
    if any(isinstance(shard, RemoteShard) for shard in shards):
        with ThreadPoolExecutor(DOWNLOADS) as threads:  # some download while one scans
            yield from threads.map(_index_one, shards, files, repeat(source))
        return
    if workers < 2:
        yield from map(_index_one, shards, files, repeat(source))
        return
    with process_pool(workers) as pool:
        yield from pool.map(_index_one, shards, files, repeat(source))


def build_index(
    shards: Sequence[Shard],
    out: Path | None = None,
    progress: Progress | None = None,
    captions_csv: Path | None = None,
    workers: int | None = None,
    columns: Sequence[str] = (),
    min_matched: float = MIN_MATCHED,
) -> Index:
    """Index the shards, scanning only those without a valid stored index.

    `columns` names the fields with captions, of a `.json` and of the table (default: the known ones). `workers`
    processes scan (default: one per CPU, 8 at most; a single one for less than 256 MB). Raises DataError where a shard
    is missing, compressed or unreadable, the index cannot be written, there is no sample at all, or the table of
    captions has a row for a smaller share of the samples than `min_matched`, or for none.
    """
    table = (
        convert_table(captions_csv, index_folder(shards[0].parent, out), columns) if captions_csv and shards else None
    )
    source = CaptionSource(table, columns)
    done: dict[int, ShardIndex] = {}
    missing: dict[int, Path] = {}
    sizes: dict[int, int] = {}
    for number, shard in enumerate(shards):
        try:
            identity = _identity(shard, source)
        except OSError as error:
            raise DataError(f"cannot read shard {shard}: {error.strerror}") from error
        name = _file_name(shard, out)
        stored = None
        for folder in _folders(shard.parent, out):
            stored = stored or _load(shard, folder / name, identity)
        if stored is None:
            sizes[number] = identity["size"]
            missing[number] = index_folder(shard.parent, out) / name
        else:
            done[number] = stored
    # To start processes takes longer than to scan a few small shards.
    if workers is None:
        large = sum(sizes.values()) > 1 << 28
        workers = min(os.cpu_count() or 1, 8, len(missing)) if large else 1
    scanned = _scan_all([shards[number] for number in missing], list(missing.values()), source, workers)
    for number, result in zip(missing, scanned, strict=True):
        done[number] = result
        if progress:
            progress(len(done), len(shards))
    index = Index([done[number] for number in range(len(shards))], table, columns)
    if not len(index):
        lost = index.account.line(cause for cause, count in index.account.unused.items() if count)
        raise DataError(f"no samples in {len(shards)} shards beginning with {shards[0]}: {lost or 'all empty'}")
    if table is not None:
        _join(index, table, captions_csv, min_matched)
    return index


def _join(index: Index, table: CaptionTable, path: Path | None, min_matched: float) -> None:
    """Add the account of a table to that of the shards. Raises DataError where too few samples have a row."""
    met, rows = index.account.used["join"], table.account.used["row"]
    if met < max(min_matched * len(index), 1):
        raise DataError(
            f"{met:,} of {len(index):,} samples have a row in {path}, whose {rows:,} rows are joined by URL where both "
            f"have one, else by key or file name; its first row is of '{table.owner}', and the first sample is "
            f"'{index.key(0)}'. Mend the table, or accept fewer with data.min_matched (it is {min_matched:g})"
        )
    index.account.add(table.account)
    used = min(_rows_met(index, table, path), rows)
    index.account.used["row"] = used
    if rows > used:
        index.account.lose("row_alone", "", rows - used)


def _rows_met(index: Index, table: CaptionTable, path: Path | None) -> int:
    """Rows of a table that samples of the index have, kept in the table's folder: it takes all parts of the index.

    Raises DataError where two samples share a row by their names, and have different images.
    """
    store = table.folder / "met.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = read_json(store)
        if known["fingerprint"] == index.fingerprint:
            return int(known["rows"])
    kinds, offsets = index.column("text_kind"), index.column("text_offset")
    named = np.flatnonzero(kinds == KIND_TABLE)
    named = named[np.argsort(offsets[named], kind="stable")]
    again = np.flatnonzero(offsets[named[1:]] == offsets[named[:-1]])
    for at in again[spread(len(again), _COMPARED)].tolist():
        pair = named[at : at + 2].tolist()
        if len({_image_hash(index, sample) for sample in pair}) > 1:
            first, second = map(index.describe, pair)
            raise DataError(
                f"a row of {path} is that of two samples by its key or file name, {first} and {second}: give samples "
                "names that no other shard has, or remove these columns from the table to join it by URL"
            )
    rows = table.rows_met(offsets[kinds >= KIND_TABLE])
    with contextlib.suppress(RunError):
        write_json(store, {"fingerprint": index.fingerprint, "rows": rows})
    return rows


def _image_hash(index: Index, sample: int) -> bytes:
    """Hash of an image's bytes. Raises DataError."""
    entry = index.entry(sample)
    shard = index.shards[entry.shard].shard
    try:
        if isinstance(shard, RemoteShard):
            return hashlib.sha256(shard.read(entry.image_offset, entry.image_size)).digest()
        with shard.open("rb") as file:
            return hashlib.sha256(os.pread(file.fileno(), entry.image_size, entry.image_offset)).digest()
    except OSError as error:
        raise DataError(f"cannot read shard {shard}: {error.strerror}") from error


def open_index(
    patterns: str | Sequence[str],
    base: Path,
    index_dir: Path | None = None,
    captions_csv: Path | None = None,
    progress: Progress | None = None,
    columns: Sequence[str] = (),
    min_matched: float = MIN_MATCHED,
    cache: Cache | None = None,
) -> Index:
    """The index of the shards that match; missing parts are built. Raises DataError as `build_index` does.

    cache: for shards in object storage.
    """
    beside = Account()
    shards = expand_patterns(patterns, base, beside, cache)
    index = build_index(shards, index_dir, progress, captions_csv, columns=columns, min_matched=min_matched)
    index.account.add(beside)
    return index
