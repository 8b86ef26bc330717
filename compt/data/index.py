"""The index of a WebDataset: one file per shard, reused while the shard is unchanged, and one with all of them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compt.data.account import Account
from compt.data.content import sampled_hash, spread
from compt.data.find import expand_patterns
from compt.data.merged import Merged, ShardRows, common, write_merged
from compt.data.order import Mixture
from compt.data.remote import DOWNLOADS, Cache, RemoteShard, Shard, local, places_beside
from compt.data.scan import KIND_TABLE, IndexEntry, ShardScan, scan_shard
from compt.data.table import CaptionTable, Keep, convert_table
from compt.dist.child import process_pool
from compt.errors import DataError, RunError
from compt.files import hash_json, new_file, read_json, user_cache, write_bytes, write_json
from compt.recipe.schema import MIN_MATCHED

VERSION = 5
"""Raised when keys, captions or class numbers are read by other rules: stored indexes are then made again."""
INDEX_FOLDER = ".compt-index"
Progress = Callable[[int, int], None]
"""Shards done, shards in all."""
Tables = Sequence[CaptionTable | None]
"""The table of captions of each shard."""
_COMPARED = 256
"""Pairs of samples with one row of a table whose images are compared: shards may be listed twice."""
_STATS = 256
"""Shards whose time and size a thread reads in turn."""


_DAMAGES = (OSError, ValueError, KeyError, TypeError, EOFError, struct.error, zipfile.BadZipFile, zlib.error)
"""What a damaged file raises."""


class Index:
    """All samples of a list of shards, numbered in the order of the shards and of their members.

    sizes: samples of each shard, int64 [shards]. fingerprint: hash of the names of the shards, the keys and the sizes;
    it does not depend on the folder. content: hash of some samples of each shard.
    tables: the table of captions of each shard. columns: the fields of a `.json` with captions, if the recipe names
    them. account: everything that was read. counts:
    images by their number of captions. mixture: how often an epoch has the samples of several sets. sets: their shards,
    weights, counts and accounts, as plain values. In memory are a few numbers for each shard, and none for a sample.
    """

    def __init__(self, shards: Sequence[Shard], merged: Merged, tables: Tables, columns: Sequence[str] = ()) -> None:
        self.shards = tuple(shards)
        self.tables = tables
        self.columns = tuple(columns)
        self.mixture: Mixture | None = None
        self.sets: list[dict[str, Any]] = []
        self.sizes = merged.samples.copy()
        self.ends = np.cumsum(self.sizes)
        self.starts = self.ends - self.sizes
        self.account, self.counts = merged.account, merged.counts
        self.fingerprint, self.content = merged.fingerprint, merged.content
        self._merged = merged

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return len(self) if self.mixture is None else int(self.mixture.sizes.sum())

    @property
    def places(self) -> tuple[Path, ...]:
        """Where files such as class names are: beside the first shard, or one folder above."""
        return places_beside(self.shards[0])

    @property
    def remote(self) -> bool:
        """Whether some of the shards are in object storage."""
        return any(isinstance(shard, RemoteShard) for shard in self.shards)

    def entry(self, sample: int) -> IndexEntry:
        """Where the parts of a sample are."""
        shard = int(self.ends.searchsorted(sample, side="right"))
        rows, keys = self._merged.table(shard)
        start, size, *where = rows[sample - int(self.starts[shard])].item()
        return IndexEntry(shard, keys[start : start + size].tobytes().decode("utf-8", "surrogateescape"), *where)

    def key(self, sample: int) -> str:
        """A sample's key, as webdataset forms it."""
        return self.entry(sample).key

    def column(self, name: str) -> Iterator[NDArray[Any]]:
        """One column of `scan.COLUMNS`, [samples] of one shard after another."""
        return (self._merged.table(shard)[0][name] for shard in range(len(self.shards)))

    def check_content(self, shard: int) -> None:
        """Raise DataError where a shard holds other data than when it was indexed, with the same size and time.

        Raises OSError where the shard cannot be read.
        """
        place, (rows, _), (content, mtime_ns) = self.shards[shard], self._merged.table(shard), self._merged.known(shard)
        if isinstance(place, RemoteShard):
            place.check_cached(lambda path: sampled_hash(path, rows) == content)
        elif place.stat().st_mtime_ns == mtime_ns and sampled_hash(place, rows) != content:
            raise DataError(
                f"{place} holds other data than when it was indexed, with the same sizes and the same time; put the "
                f"old shard back, or index the new one: touch '{place}'"
            )

    def describe(self, sample: int) -> str:
        """`shard: key`, for messages."""
        entry = self.entry(sample)
        return f"{self.shards[entry.shard].name}: {entry.key}"


def _short_hash(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]


def _folders(shards_folder: Path, out: Path | None) -> list[Path]:
    """The folders where the index of one folder's shards may be, the preferred one first."""
    if out is not None:
        return [out]
    places = [shards_folder / INDEX_FOLDER]
    with contextlib.suppress(RunError):  # neither a cache nor a folder for temporary files
        places.append(user_cache("index") / _short_hash(shards_folder))
    return places


def index_folder(shards_folder: Path, out: Path | None = None) -> Path:
    """The folder to write an index to: `out`, else beside the shards, else in the user's cache. It is created."""
    return _writable(_folders(shards_folder, out))


def _writable(folders: Sequence[Path]) -> Path:
    """The first folder that can be written. It is created."""
    last: OSError | None = None
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            last = error
    raise DataError(
        f"cannot write an index in {folders[-1]}: {last and last.strerror}; "
        "name a writable folder with data.index_dir or --out"
    )


def _version(shard: Shard) -> tuple[int, int | str]:
    """What changes when a shard is replaced: its size, and the time of its last change in ns, or its tag in a store."""
    if isinstance(shard, RemoteShard):
        return shard.size, shard.tag
    try:
        stat = shard.stat()
    except OSError as error:
        raise DataError(f"cannot read shard {shard}: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _versions(shards: Sequence[Shard]) -> list[tuple[int, int | str]]:
    """The version of each shard. A network disk takes a millisecond for each, so threads read them."""
    parts = [shards[first : first + _STATS] for first in range(0, len(shards), _STATS)]
    with ThreadPoolExecutor(32) as threads:
        return list(chain.from_iterable(threads.map(lambda part: [*map(_version, part)], parts)))


def _load(file: Path, identity: dict[str, Any], whole: bool = True) -> ShardRows | None:
    """The stored index of a shard; None where it is missing, damaged, or older than the shard.

    Without `whole` it lacks rows and keys.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            meta = json.loads(stored["meta"].tobytes())
            if {key: meta[key] for key in identity} != identity:
                return None
            rows, keys = (stored["rows"], stored["keys"].tobytes()) if whole else (np.zeros((0, 0), np.int64), b"")
        counts = Counter({int(number): images for number, images in meta["counts"].items()})
        account, time = Account.from_json(meta["account"]), meta.get("mtime_ns", 0)
        return ShardRows(meta["shard"], rows, keys, meta["digest"], account, counts, meta["content"], time)
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


def _index_one(
    shard: Shard, file: Path, identity: dict[str, Any], table: CaptionTable | None, columns: Sequence[str]
) -> None:
    """Scan a shard, and store its index."""
    with local(shard) as path:
        scan = scan_shard(path, table, columns)
        try:
            content = sampled_hash(path, scan.rows)
        except OSError as error:
            raise DataError(f"cannot read shard {shard}: {error.strerror}") from error
    _store(file, {**identity, "content": content}, scan)


class _IndexFiles:
    """The files of the index of some shards: one for each shard, and one in which they are merged."""

    def __init__(self, shards: Sequence[Shard], out: Path | None, tables: Tables, columns: Sequence[str] = ()) -> None:
        self._shards, self._out, self._tables, self._columns = shards, out, tables, columns
        self._versions = _versions(shards)
        self._folders = functools.cache(partial(_folders, out=out))
        self._hash = functools.cache(_short_hash)
        first = shards[0].parent
        # Seen from the first, so that shards can be moved with an index beside them.
        beside = functools.cache(lambda folder: os.path.relpath(folder, first))
        here = out is None and not isinstance(shards[0], RemoteShard)
        named = [
            (beside(shard.parent) if here and isinstance(shard, Path) else self._folder_hash(shard), shard.name)
            for shard in shards
        ]
        folders = common([table and table.folder.name for table in tables])
        self._digests = common([table and table.digest for table in tables])
        self._merged = f"merged-{hash_json([named, folders, columns])[:16]}.index"
        self._identity = hash_json([VERSION, named, self._versions, self._digests, columns])
        self._places = [*self._folders(first), *(_folders(first, None)[1:] if out else [])]

    def _folder_hash(self, shard: Shard) -> str:
        return shard.folder_hash if isinstance(shard, RemoteShard) else self._hash(shard.parent)

    def find(self) -> Merged | None:
        """The merged file, if there is one of these shards as they are now."""
        for folder in self._places:
            with contextlib.suppress(*_DAMAGES):
                return Merged(folder / self._merged, self._identity)
        return None

    def _one(self, number: int) -> tuple[str, dict[str, Any]]:
        """The name of the index of one shard, and what it has to begin with."""
        shard, (size, time), table = self._shards[number], self._versions[number], self._tables[number]
        # Shards with one name in several folders may share `out`.
        name = f"{shard.name}-{self._folder_hash(shard)}.npz" if self._out else f"{shard.name}.npz"
        return name, {
            "version": VERSION,
            "shard": shard.name,
            "size": size,
            "tag" if isinstance(shard, RemoteShard) else "mtime_ns": time,
            "captions": table and table.digest,
            "columns": [*self._columns],
        }

    def merge(self, workers: int | None, progress: Progress | None) -> Merged:
        """Scan the shards without a valid stored index, and merge the indexes of all."""
        writable = functools.cache(partial(index_folder, out=self._out))
        files, missing = list[Path](), list[int]()
        for number, shard in enumerate(self._shards):
            name, identity = self._one(number)
            found = (folder / name for folder in self._folders(shard.parent))
            stored = next((file for file in found if _load(file, identity, whole=False)), None)
            if stored is None:
                missing.append(number)
            files.append(stored or writable(shard.parent) / name)
        # To start processes takes longer than to scan a few small shards.
        if workers is None:
            large = sum(self._versions[number][0] for number in missing) > 1 << 28
            workers = min(os.cpu_count() or 1, 8, len(missing)) if large else 1
        parts = self._parts(files, missing, workers, progress)
        try:
            path = _writable(self._places) / self._merged
        except DataError:  # nothing had to be scanned, so none of the folders needs to be written
            with tempfile.TemporaryFile() as own:
                write_merged(own, self._identity, parts, self._digests)
                own.flush()
                return Merged(own, self._identity)
        with new_file(path) as file:
            write_merged(file, self._identity, parts, self._digests)
        try:
            return Merged(path, self._identity)
        except _DAMAGES as error:  # another process has written it for other shards, or the disk maps no files
            text = "start the same command again, or name a folder on another disk with data.index_dir or --out"
            raise DataError(f"cannot open the index {path}: {error}; {text}") from None

    def _parts(
        self, files: list[Path], missing: list[int], workers: int, progress: Progress | None
    ) -> Iterator[ShardRows]:
        """The index of each shard, while the `missing` ones are scanned in their order."""
        scans, left = self._scan(files, missing, workers), set(missing)
        for number, (shard, file) in enumerate(zip(self._shards, files, strict=True)):
            identity = self._one(number)[1]
            if number in left:
                next(scans)
            part = _load(file, identity)
            if part is None:  # its rows were damaged
                file = index_folder(shard.parent, self._out) / file.name
                _index_one(shard, file, identity, self._tables[number], self._columns)
                part = _load(file, identity)
            if part is None:
                raise DataError(f"the index {file} cannot be read; remove it, and start the same command again")
            yield part
            if progress:
                progress(number + 1, len(files))

    def _scan(self, files: list[Path], missing: list[int], workers: int) -> Iterator[None]:
        chosen = (
            [self._shards[number] for number in missing],
            [files[number] for number in missing],
            [self._one(number)[1] for number in missing],
            [self._tables[number] for number in missing],
            repeat(self._columns),
        )
        if any(isinstance(shard, RemoteShard) for shard in chosen[0]):
            with ThreadPoolExecutor(DOWNLOADS) as threads:  # some download while one scans
                yield from threads.map(_index_one, *chosen)
        elif workers < 2:
            yield from map(_index_one, *chosen)
        else:
            with process_pool(workers) as pool:
                yield from pool.map(_index_one, *chosen)


def build_index(
    shards: Sequence[Shard],
    out: Path | None = None,
    progress: Progress | None = None,
    captions_csv: Path | None = None,
    workers: int | None = None,
    columns: Sequence[str] = (),
    min_matched: float = MIN_MATCHED,
    keep: Keep = "",
    scan: bool = True,
    tables: Tables | None = None,
) -> Index:
    """Index the shards: open the file of all, or merge it, scanning only shards without a valid stored index.

    `columns` names the fields with captions, of a `.json` and of the table (default: the known ones). `workers`
    processes scan (default: one per CPU, 8 at most; a single one for less than 256 MB). Raises DataError where a shard
    is missing, compressed or unreadable, the index cannot be written, there is no sample at all, or the table of
    captions has a row for a smaller share of the samples than `min_matched`, or for none. Without `scan` it is raised
    where the file of all is missing. tables: for each shard, the table that it has been joined with before.
    """
    table = None
    if captions_csv:
        table = convert_table(captions_csv, index_folder(shards[0].parent, out), columns, keep)
    tables = tables or [table] * len(shards)
    files = _IndexFiles(shards, out, tables, columns)
    merged = files.find()
    if merged is None and not scan:
        raise DataError(f"the shards beginning with {shards[0]} are not indexed")
    index = Index(shards, merged or files.merge(workers, progress), tables, columns)
    if not len(index):
        lost = index.account.line(cause for cause, count in index.account.unused.items() if count)
        raise DataError(f"no samples in {len(shards)} shards beginning with {shards[0]}: {lost or 'all empty'}")
    if table is not None:
        _join(index, table, min_matched)
    return index


def _join(index: Index, table: CaptionTable, min_matched: float) -> None:
    """Add the account of a table to that of the shards. Raises DataError where too few samples have a row."""
    met, rows = index.account.used["join"], table.account.used["row"]
    if met < max(min_matched * len(index), 1):
        raise DataError(
            f"{met:,} of {len(index):,} samples have a row in {table.path}, whose {rows:,} rows are joined by URL "
            "where both have one, else by key or file name; its first row is of "
            f"'{table.owner}', and the first sample is '{index.key(0)}'. Mend the table, or accept fewer with "
            f"data.min_matched (it is {min_matched:g})"
        )
    index.account.add(table.account)
    used = min(_rows_met(index, table), rows)
    index.account.used["row"] = used
    if rows > used:
        index.account.lose("row_alone", "", rows - used)


def _rows_met(index: Index, table: CaptionTable) -> int:
    """Rows of a table that samples of the index have, kept in the table's folder: it takes all parts of the index.

    Raises DataError where two samples share a row by their names, and have different images.
    """
    store = table.folder / "met.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = read_json(store)
        if known["fingerprint"] == index.fingerprint:
            return int(known["rows"])
    kinds, offsets = (np.concatenate([*index.column(name)]) for name in ("text_kind", "text_offset"))
    named = np.flatnonzero(kinds == KIND_TABLE)
    named = named[np.argsort(offsets[named], kind="stable")]
    again = np.flatnonzero(offsets[named[1:]] == offsets[named[:-1]])
    for at in again[spread(len(again), _COMPARED)].tolist():
        pair = named[at : at + 2].tolist()
        if len({_image_hash(index, sample) for sample in pair}) > 1:
            first, second = map(index.describe, pair)
            raise DataError(
                f"a row of {table.path} is that of two samples by its key or file name, {first} and {second}: give "
                "samples names that no other shard has, or remove these columns from the table to join it by URL"
            )
    rows = table.rows_met(offsets[kinds >= KIND_TABLE])
    with contextlib.suppress(RunError):
        write_json(store, {"fingerprint": index.fingerprint, "rows": rows})
    return rows


def _image_hash(index: Index, sample: int) -> bytes:
    """Hash of an image's bytes. Raises DataError."""
    entry = index.entry(sample)
    shard = index.shards[entry.shard]
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
    keep: Keep = "",
    scan: bool = True,
) -> Index:
    """The index of the shards that match; missing parts are built. Raises DataError as `build_index` does.

    cache: for shards in object storage. keep: what the table of captions keeps; training reads only captions. scan: as
    in `build_index`.
    """
    beside = Account()
    shards = expand_patterns(patterns, base, beside, cache)
    index = build_index(shards, index_dir, progress, captions_csv, None, columns, min_matched, keep, scan)
    index.account.add(beside)
    return index
