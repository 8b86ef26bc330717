"""Scan the headers of a tar shard for the position of each sample's members. No member name is used as a path."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from compt.data.account import JOINED, Account
from compt.data.captions import Captions, parse_json, read_columns, read_text
from compt.data.labels import NO_NUMBER, NONE
from compt.data.names import (
    FOREIGN,
    IMAGE_EXTENSIONS,
    TEXT_ENDINGS,
    image_stem,
    is_hidden,
    is_metadata,
    split_name,
)
from compt.data.table import COMPRESSED, CaptionTable
from compt.errors import DataError


class IndexEntry(NamedTuple):
    """Where the parts of one sample are: offsets and sizes in bytes in its shard.

    `captions` counts the non-empty ones; `label` may be `labels.NONE`. `json` is the `.json`, or the `.npy` with the
    classes of a sample that has no other text.
    """

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


COLUMNS = ("key_start", "key_size", *IndexEntry._fields[2:])
"""Columns of a shard's int64 table: in it, where the key is stands for the shard and the key."""
KIND_NONE, KIND_JSON, KIND_TEXT, KIND_TABLE, KIND_URL = range(5)
"""Where captions are. The last two: in a row of a table that was found by key or file name, or by URL."""
MAX_TEXT = 1 << 24
"""Larger texts, JSONs and class numbers are not read, in bytes."""
MAX_PADDING = (1 << 20) + 2 * tarfile.BLOCKSIZE
"""Zeros that may end a tar, in bytes: `tar` fills it up to 10,240 bytes, or to 1 MiB with large blocks."""
_LABEL = re.compile(rb"\s*\+?[0-9]{1,18}\s*")


_KINDS = {
    **dict.fromkeys((tarfile.DIRTYPE, b"D"), "folder"),
    **dict.fromkeys((tarfile.LNKTYPE, tarfile.SYMTYPE), "link"),
    b"V": "metadata",
}
"""Causes by the type of a member. GNU tar writes D for folders of incremental archives, and V for a label."""


@dataclass
class ShardScan:
    """The samples of one shard, and the account of its members. counts: images by their usable captions."""

    rows: NDArray[np.int64]
    keys: bytes
    account: Account = field(default_factory=Account)
    counts: Counter[int] = field(default_factory=Counter)

    def digest(self) -> str:
        """Hash of keys, sizes, captions and labels. Folder and positions in the tar do not enter it."""
        sha = hashlib.sha256(self.keys)
        columns = [COLUMNS.index(name) for name in ("key_size", "image_size", "text_size", "captions", "label")]
        # Earlier versions stored -1 for each class number that cannot be used.
        sha.update(np.maximum(self.rows[:, columns], NONE).tobytes())
        return sha.hexdigest()


def refuse_compressed(path: Path) -> None:
    """Raise DataError for a compressed tar. The message says how to unpack it."""
    with path.open("rb") as file:
        head = file.read(6)
    for magic, command in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"{path} is compressed; shards must be plain tars, so any sample can be opened by its position: "
                f"unpack it with `{command} {path.name}`"
            )


def _sort_member(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member that may belong to a sample; else "" and the cause for which it does not."""
    if not member.isreg() or member.sparse is not None:  # the bytes of a sparse file do not lie together
        return "", _KINDS.get(member.type, "special")
    if is_hidden(member.name):
        return "", "hidden"
    return split_name(member.name) or ("", "metadata" if is_metadata(member.name) else "bare")


class _Header(tarfile.TarInfo):
    """Reads what a scan needs of the header of a plain file, in a third of the time. `tarfile` reads all others."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Self:
        """The header in 512 bytes."""
        digits = buf[124:135]
        if len(buf) == tarfile.BLOCKSIZE and buf[156] in b"0\0" and digits.isdigit() and buf[135] in b" \0":
            # The low half of Adler's sum is 1 plus the sum of all bytes; in a header's, its own 8 bytes are spaces.
            total = (
                int(buf[148:154], 8) - 256 + sum(buf[148:156])
                if buf[148:154].isdigit() and buf[154:156] == b"\0 "
                else -1
            )
            name = bytes(buf[: buf.find(0, 0, 100) if 0 in buf[:100] else 100])
            if (zlib.adler32(buf) & 0xFFFF) == (total + 1) % 65521 and not name.endswith(b"/"):
                found = cls()
                # GNU tar keeps times there in incremental archives; tarfile takes them for a part of the name.
                prefix = b"" if buf[257:265] == tarfile.GNU_MAGIC else bytes(buf[345:500].partition(b"\0")[0])
                found.name = (prefix + b"/" + name if prefix else name).decode(encoding or "utf-8", errors)
                found.size = int(digits, 8)
                return found
        return super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]


@dataclass
class _Group:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    cut: bool = False


def scan_shard(path: Path, table: CaptionTable | None = None, columns: Sequence[str] = ()) -> ShardScan:
    """Scan a plain tar once. A truncated or damaged tar gives its whole samples; the cut one is counted.

    `columns` names the fields of a `.json` with captions. Raises DataError for a compressed or unreadable file.
    """
    try:
        refuse_compressed(path)
        with path.open("rb") as file:
            return _Scanner(file, path.stat().st_size, table, columns).run()
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror or error}") from error


class _Scanner:
    def __init__(self, file: BinaryIO, size: int, table: CaptionTable | None, columns: Sequence[str]) -> None:
        self.file, self.size, self.table, self.columns = file, size, table, columns
        self.account = Account()
        self.rows: list[tuple[int, ...]] = []
        self.keys: list[bytes] = []
        self.urls: list[str] = []
        self.lost: list[list[str]] = []
        self.position = 0
        # The extensions of each key. One tuple serves all keys that have the same.
        self.seen: dict[str, tuple[str, ...]] = {}
        self.kinds: dict[tuple[str, ...], tuple[str, ...]] = {}

    def run(self) -> ShardScan:
        group: _Group | None = None
        fault = ""
        try:
            # `r:` is tarfile's reader of uncompressed archives; it knows GNU and PAX long names.
            with tarfile.open(fileobj=self.file, mode="r:", tarinfo=_Header) as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps all headers
                    if member.size < 0:  # tarfile would go back, and read the same members for ever
                        raise ValueError("a file of a negative size")
                    key, extension = _sort_member(member)
                    if not key:
                        self.account.lose(extension, member.name)
                        continue
                    if group is None or key != group.key:
                        self.close(group)
                        group = _Group(key)
                    if member.offset_data + member.size > self.size:
                        group.cut, fault = True, "cut"
                        self.account.lose("lost", member.name)
                    elif extension in group.members:
                        self._lose("duplicate", key, [extension])
                    elif member.size > MAX_TEXT and extension in ("txt", "json", "cls"):
                        self._lose("large", key, [extension])
                    else:
                        group.members[extension] = (member.offset_data, member.size)
                fault = fault or self._end(archive.offset)
        # tarfile nests headers that follow each other, and goes to any place and takes any memory that they name.
        except (tarfile.TarError, ValueError, IndexError, OverflowError, MemoryError, RecursionError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise  # of the disk
            fault = "cut"
        if group is not None and fault == "cut":
            group.cut = True
        self.close(group)
        if fault:
            self.account.lose(fault, group.key if group else "(start of the file)")
        else:
            self.account.used["shard"] += 1
        return self._finish()

    def _end(self, offset: int) -> str:
        """The fault at the end of the archive, which is a block of zeros. What follows it may be some zeros alone."""
        block = os.pread(self.file.fileno(), tarfile.BLOCKSIZE, offset)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            return "cut"
        self.file.seek(offset)
        parts = iter(partial(self.file.read, 1 << 16), b"")
        if any(part.strip(b"\0") for part in parts):
            return "joined"
        # More zeros than `tar` adds: a download that took room for the whole file first, and then stopped.
        return "cut" if self.size - offset > MAX_PADDING else ""

    def _lose(self, cause: str, key: str, extensions: Sequence[str]) -> None:
        for extension in extensions:
            self.account.lose(cause, f"{key}.{extension}", images=image_stem(f".{extension}") is not None)

    def close(self, group: _Group | None) -> None:
        """Turn a finished group of members into a row, or count why it makes no sample."""
        if group is None:
            return
        key, members = group.key, group.members
        kind = tuple(members)
        kind = self.kinds.setdefault(kind, kind)
        before = self.seen.get(key)
        if before is not None:
            self._lose("apart" if set(before).isdisjoint(kind) else "duplicate", key, kind)
            return
        self.seen[key] = kind
        images = [extension for extension in kind if extension in IMAGE_EXTENSIONS]
        if group.cut and (not images or members.keys().isdisjoint(("json", "txt", "cls"))):
            self._lose("lost", key, kind)
            return
        if not images:
            for extension in kind:
                cause = "dots" if "." in extension else "foreign" if extension in FOREIGN else "no_image"
                self._lose(cause, key, [extension])
            return
        self._sample(key, members, min(images, key=IMAGE_EXTENSIONS.index))

    def _sample(self, key: str, members: dict[str, tuple[int, int]], image: str) -> None:
        values = parse_json(self._read(members["json"])) if "json" in members else None
        found, source, kind = self._captions(members, values)
        label = self._label(members["cls"]) if "cls" in members else NONE
        values_in = "npy" if "npy" in members and members.keys().isdisjoint(("json", "txt", "cls")) else "json"
        used = 1
        for extension in members:
            if extension == image:
                continue
            if extension == "json":
                cause = "" if values is not None else "json"
            elif extension == "txt":
                cause = "" if kind == KIND_TEXT else "second_text"
            elif extension == "cls":
                cause = "" if label >= 0 else "cls"
            elif extension == values_in:
                cause = ""
            else:
                cause = "second_image" if extension in IMAGE_EXTENSIONS else "dots" if "." in extension else "other"
                cause = "text_ending" if extension in TEXT_ENDINGS and kind == KIND_NONE else cause
            if cause:
                self._lose(cause, key, [extension])
            else:
                used += 1
        self.account.used["member"] += used
        stored = key.encode("utf-8", "surrogateescape")
        where = (*members[image], *source, kind, *members.get(values_in, (0, 0)))
        self.rows.append((self.position, len(stored), *where, len(found.texts), label))
        self.keys.append(stored)
        self.lost.append(found.lost)
        if self.table is not None:
            self.urls.append(_url(values))
        self.position += len(stored)

    def _read(self, where: tuple[int, int]) -> bytes:
        return os.pread(self.file.fileno(), where[1], where[0])

    def _captions(
        self, members: dict[str, tuple[int, int]], values: dict[str, Any] | None
    ) -> tuple[Captions, tuple[int, int], int]:
        """The captions of the first source that has usable ones, where it is, and its kind."""
        in_json, first = read_columns(values, self.columns) if values else (Captions([], []), False)
        lost = in_json.lost
        if "txt" in members and not (in_json.texts and first):
            data = self._read(members["txt"])
            in_text = read_text(data)
            lost = lost + in_text.lost
            # img2dataset writes one caption into both; here alone a line's end in it does not end it.
            whole = len(in_text.texts) > 1 and in_json.texts == [data.decode("utf-8", "replace").strip()]
            if (in_text.texts and not whole) or not (in_json.texts or in_json.lost):
                return Captions(in_text.texts, lost), members["txt"], KIND_TEXT
        if in_json.texts or in_json.lost:
            return Captions(in_json.texts, lost), members["json"], KIND_JSON
        return in_json, (0, 0), KIND_NONE

    def _label(self, where: tuple[int, int]) -> int:
        text = self._read(where)
        return int(text) if _LABEL.fullmatch(text) else NO_NUMBER

    def _finish(self) -> ShardScan:
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, len(COLUMNS))
        account, kept = self.account, np.ones(len(rows), dtype=bool)
        if self.table is not None and len(rows):
            found = self.table.find(self.keys, self.urls)
            hit = found.lines >= 0
            kind = COLUMNS.index("text_kind")
            beside = np.flatnonzero(hit & (rows[:, kind] == KIND_TEXT))
            account.used["member"] -= len(beside)
            for at in beside.tolist():
                self._lose("second_text", self.keys[at].decode("utf-8", "surrogateescape"), ["txt"])
            lines = self.table.lines[found.lines[hit]]
            for column, name in (("text_offset", "offset"), ("text_size", "size"), ("captions", "captions")):
                rows[hit, COLUMNS.index(column)] = lines[name]
            rows[hit, kind] = np.where(found.named[hit], KIND_TABLE, KIND_URL)
            account.used["join"] += int(hit.sum())
            for at in np.flatnonzero(~hit).tolist():
                account.lose("unmatched", self.keys[at].decode("utf-8", "surrogateescape"))
            account.used.update({JOINED + way: count for way, count in found.by.items()})
            kept = ~hit
        for at in np.flatnonzero(kept).tolist():
            for cause in self.lost[at]:
                account.lose(cause, self.keys[at].decode("utf-8", "surrogateescape"))
        captions = rows[:, COLUMNS.index("captions")]
        account.used["caption"] += int(captions.sum())
        return ShardScan(rows, b"".join(self.keys), account, Counter(captions.tolist()))


def _url(values: dict[str, Any] | None) -> str:
    """The URL of a sample, as img2dataset and others store it."""
    values = values or {}
    found = next((values[name] for name in ("url", "URL", "image_url", "Image Path") if name in values), "")
    return found.strip() if isinstance(found, str) else ""


def json_label(data: bytes, name: str) -> int:
    """The class number under `name` in a sample's JSON."""
    values = parse_json(data) or {}
    if name not in values:
        return NONE
    value = values[name]
    return value if type(value) is int and 0 <= value < 10**18 else NO_NUMBER
