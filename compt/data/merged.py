"""One file with the indexes of a list of shards. It is mapped into memory: processes hold only what they read of it.

First come the rows and keys of each shard, then a table of the shards, the account of all as JSON, and `_END`. Rows are
records of `scan.COLUMNS`, each column in the smallest type that holds all numbers of the shard.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compt.data.account import Account
from compt.data.scan import COLUMNS
from compt.errors import DataError

_SHARD = np.dtype(
    [(name, "<i8") for name in ("start", "samples", "end", "mtime_ns")]
    + [("checksum", "<u4"), ("types", f"S{2 * len(COLUMNS)}"), ("content", "S64")]
)
_END = struct.Struct("<8s3QI")
"""`_MAGIC`, start of the table of shards, number of shards, bytes of the JSON, and checksum of table and JSON."""
_MAGIC = b"compt\0i1"
_VIEWS = 4096
"""Shards whose rows a process remembers the place of, about 1 kB each."""


class ShardRows(NamedTuple):
    """The index of one shard. rows: int64 [samples, len(COLUMNS)]. keys: all keys, joined.

    counts: images by their number of captions. content: `sampled_hash` of the shard when it had the time `mtime_ns`.
    """

    name: str
    rows: NDArray[np.int64]
    keys: bytes
    digest: str
    account: Account
    counts: Counter[int]
    content: str
    mtime_ns: int


class Merged:
    """The indexes of a list of shards in a file. Raises ValueError where it is not that of `identity`, and OSError.

    samples: of each shard. fingerprint, content, account, counts: see `Index`.
    """

    def __init__(self, file: Path | BinaryIO, identity: str) -> None:
        self.file = file
        # Slices of a plain array cost a fifth of those of a memmap.
        self._data = np.memmap(file, np.uint8, "r").view(np.ndarray)
        magic, start, shards, size, checksum = _END.unpack(self._data[-_END.size :].tobytes())
        end = start + shards * _SHARD.itemsize
        if magic != _MAGIC or len(self._data) != end + size + _END.size:
            raise ValueError("it is cut")
        if zlib.crc32(self._data[start : end + size].data) != checksum:
            raise ValueError("it is damaged")
        meta = json.loads(self._data[end : end + size].tobytes())
        if meta["identity"] != identity:
            raise ValueError("it is of other shards")
        self._shards = self._data[start:end].view(_SHARD)
        self.samples: NDArray[np.int64] = self._shards["samples"]
        self.fingerprint, self.content = str(meta["fingerprint"]), str(meta["content"])
        self.account = Account.from_json(meta["account"])
        self.counts = Counter({int(number): images for number, images in meta["counts"].items()})
        self._views: dict[int, tuple[NDArray[np.void], NDArray[np.uint8]]] = {}

    def table(self, shard: int) -> tuple[NDArray[np.void], NDArray[np.uint8]]:
        """The rows of a shard, [samples] with a field for each column, and its joined keys; both are in the file.

        Raises DataError for a damaged file, which is removed.
        """
        found = self._views.get(shard)
        if found is None:
            start, samples, end, _, checksum, types, _ = self._shards[shard].item()
            data = self._data[start:end]
            if zlib.crc32(data.data) != checksum:
                raise self._damaged()
            rows = _row(types)
            if len(self._views) >= _VIEWS:
                self._views.clear()
            size = samples * rows.itemsize
            found = self._views[shard] = data[:size].view(rows), data[size:]
        return found

    def known(self, shard: int) -> tuple[str, int]:
        """The content of a shard, and the time of its last change, in ns, when it was indexed."""
        row = self._shards[shard]
        return row["content"].decode(), int(row["mtime_ns"])

    def _damaged(self) -> DataError:
        gone = "has to be removed"
        if isinstance(self.file, Path):
            with contextlib.suppress(OSError):
                self.file.unlink()
                gone = "has been removed"
        text = f"the index {self.file} was damaged and {gone}; start the same command again to write it again"
        return DataError(text)


@functools.cache
def _row(types: bytes) -> np.dtype[np.void]:
    names = types.decode()
    return np.dtype([(name, f"<{names[2 * at : 2 * at + 2]}") for at, name in enumerate(COLUMNS)])


def _smallest(column: NDArray[np.int64]) -> str:
    low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
    # A negative number needs a signed type, whose largest is -1 - its least.
    return np.min_scalar_type(min(low, -1 - high) if low < 0 else high).str[1:]


def common(values: list[Any]) -> Any:
    """The value of all shards if it is one, else the values of the shards."""
    return values[0] if len(set(values)) == 1 else values


def write_merged(file: BinaryIO, identity: str, shards: Iterable[ShardRows], captions: Any) -> None:
    """Write the indexes of shards, one at a time. captions: digests of tables of captions, a part of the fingerprint.

    `Merged` opens the file only for the same `identity`.
    """
    table, named, position = bytearray(), list[tuple[str, str]](), 0
    account, counts, content = Account(), Counter[int](), hashlib.sha256()
    for shard in shards:
        types = "".join(map(_smallest, shard.rows.T)).encode()
        rows = np.empty(len(shard.rows), _row(types))
        for name, column in zip(COLUMNS, shard.rows.T, strict=True):
            rows[name] = column
        data = rows.tobytes() + shard.keys
        file.write(data)
        place = position, len(rows), position + len(data), shard.mtime_ns
        table += np.array((*place, zlib.crc32(data), types, shard.content.encode()), _SHARD).tobytes()
        position += len(data)
        named.append((shard.name, shard.digest))
        account.add(shard.account, f"{shard.name}: ")
        counts.update(shard.counts)
        content.update(shard.content.encode())
    meta: dict[str, Any] = {
        "identity": identity,
        "fingerprint": hashlib.sha256(json.dumps([named, captions]).encode()).hexdigest(),
        "content": content.hexdigest(),
        "account": account.to_json(),
        "counts": counts,
    }
    tail = bytes(table) + json.dumps(meta).encode()
    file.write(tail + _END.pack(_MAGIC, position, len(named), len(tail) - len(table), zlib.crc32(tail)))
