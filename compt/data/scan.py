"""Scan the headers of a tar shard for the position of each sample's members. No member name is used as a path."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from compt.data.captions import CaptionTable, from_json, from_text, usable
from compt.errors import DataError

COLUMNS = (
    "key_start",
    "key_size",
    "image_offset",
    "image_size",
    "text_offset",
    "text_size",
    "text_kind",
    "json_offset",
    "json_size",
    "captions",
    "label",
)
"""Columns of a shard's int64 table. `captions` counts the non-empty ones; `label` is the `.cls` number or -1."""
KIND_NONE, KIND_JSON, KIND_TEXT, KIND_TABLE = range(4)
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gunzip -k", b"\x28\xb5\x2f\xfd": "zstd -d", b"\xfd7zXZ": "unxz -k", b"BZh": "bunzip2 -k"}


@dataclass
class ShardScan:
    """The samples of one shard. dropped: members that make no sample, by cause; first: the key of the first of each cause."""

    rows: NDArray[np.int64]
    keys: bytes
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def drop(self, cause: str, key: str) -> None:
        """Count a member that makes no sample."""
        self.dropped[cause] = self.dropped.get(cause, 0) + 1
        self.first.setdefault(cause, key)

    def digest(self) -> str:
        """Hash of keys, sizes, captions and labels. Folder and positions in the tar do not enter it."""
        sha = hashlib.sha256(self.keys)
        columns = [COLUMNS.index(name) for name in ("key_size", "image_size", "text_size", "captions", "label")]
        sha.update(np.ascontiguousarray(self.rows[:, columns]).tobytes())
        return sha.hexdigest()


def refuse_compressed(path: Path) -> None:
    """Raise DataError for a compressed tar. The message says how to unpack it."""
    with path.open("rb") as file:
        head = file.read(6)
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"{path} is compressed; shards must be plain tars, so any sample can be opened by its position: "
                f"unpack it with `{command} {path.name}`"
            )


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension, as webdataset splits them; None for a name without either and for metadata."""
    match = _NAME.match(name)
    if match is None or _META.match(name):
        return None
    return match.group(1), match.group(2).lower()


@dataclass
class _Group:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeated: bool = False
    cut: bool = False


def scan_shard(path: Path, table: CaptionTable | None = None) -> ShardScan:
    """Scan a plain tar once. A truncated or damaged tar gives its whole samples; the cut one is counted.

    Raises DataError for a compressed or unreadable file.
    """
    try:
        refuse_compressed(path)
        with path.open("rb") as file:
            return _Scanner(file, path.stat().st_size, table).run()
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror or error}") from error


class _Scanner:
    def __init__(self, file: BinaryIO, size: int, table: CaptionTable | None) -> None:
        self.file, self.size, self.table = file, size, table
        self.result = ShardScan(np.zeros((0, len(COLUMNS)), np.int64), b"")
        self.rows: list[tuple[int, ...]] = []
        self.keys: list[bytes] = []
        self.position = 0
        self.seen: set[str] = set()

    def run(self) -> ShardScan:
        group: _Group | None = None
        cut = False
        try:
            # `r:` is tarfile's reader of uncompressed archives; it knows GNU and PAX long names.
            with tarfile.open(fileobj=self.file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps all headers
                    name = split_name(member.name) if member.isreg() else None
                    if name is None:
                        continue
                    key, extension = name
                    if group is None or key != group.key:
                        self.close(group)
                        group = _Group(key)
                    if member.offset_data + member.size > self.size:
                        group.cut = cut = True
                    elif extension in group.members:
                        group.repeated = True
                    else:
                        group.members[extension] = (member.offset_data, member.size)
                cut = cut or not self._ends_well(archive.offset)
        except (tarfile.TarError, ValueError):
            cut = True
        if group is not None and cut:
            group.cut = True
        self.close(group)
        if cut and "tar" not in self.result.dropped:
            self.result.drop("tar", group.key if group else "(start of the file)")
        return self._finish()

    def _ends_well(self, offset: int) -> bool:
        """Whether the archive ends with its block of zeros. Without it the file was cut or damaged."""
        block = os.pread(self.file.fileno(), tarfile.BLOCKSIZE, offset)
        return len(block) == tarfile.BLOCKSIZE and not any(block)

    def close(self, group: _Group | None) -> None:
        """Turn a finished group of members into a row, or count why it makes no sample."""
        if group is None:
            return
        if group.key in self.seen or group.repeated:
            self.result.drop("duplicate", group.key)
            if group.key in self.seen:
                return
        self.seen.add(group.key)
        image = next((where for name, where in group.members.items() if name in IMAGE_EXTENSIONS), None)
        complete = image is not None and not group.members.keys().isdisjoint(("json", "txt", "cls"))
        if group.cut and not complete:
            self.result.drop("tar", group.key)
            return
        if image is None:
            self.result.drop("image", group.key)
            return
        text, kind, captions = self._captions(group)
        key = group.key.encode("utf-8", "surrogateescape")
        json_at = group.members.get("json", (0, 0))
        self.rows.append((self.position, len(key), *image, *text, kind, *json_at, captions, self._label(group)))
        self.keys.append(key)
        self.position += len(key)

    def _read(self, where: tuple[int, int]) -> bytes:
        return os.pread(self.file.fileno(), where[1], where[0])

    def _captions(self, group: _Group) -> tuple[tuple[int, int], int, int]:
        in_json, meant = from_json(self._read(group.members["json"])) if "json" in group.members else ([], False)
        if meant:
            return group.members["json"], KIND_JSON, len(usable(in_json))
        if "txt" in group.members:
            return group.members["txt"], KIND_TEXT, len(usable(from_text(self._read(group.members["txt"]))))
        if in_json:
            return group.members["json"], KIND_JSON, len(usable(in_json))
        return (0, 0), KIND_NONE, 0

    def _label(self, group: _Group) -> int:
        if "cls" not in group.members:
            return -1
        try:
            return max(int(self._read(group.members["cls"])), -1)
        except ValueError:
            return -1

    def _finish(self) -> ShardScan:
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, len(COLUMNS))
        if self.table is not None and len(rows):
            found = self.table.find(self.keys)
            hit = found[:, 0] >= 0
            for column, name in enumerate(("text_offset", "text_size", "captions")):
                rows[hit, COLUMNS.index(name)] = found[hit, column]
            rows[hit, COLUMNS.index("text_kind")] = KIND_TABLE
        self.result.rows, self.result.keys = rows, b"".join(self.keys)
        return self.result


def json_label(data: bytes, name: str) -> int | None:
    """The whole number under `name` in a sample's JSON, or None."""
    try:
        value = json.loads(data).get(name)
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
