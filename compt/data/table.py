"""Tables of captions: CSV, TSV, JSON lines, JSON or Parquet, joined with samples on key, file name or URL."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compt.data.account import Account
from compt.data.captions import CAPTION_COLUMNS, Captions, by_column, read_columns, split_as_dreamlip
from compt.data.names import image_stem
from compt.data.rows import (
    JOIN_COLUMNS,
    LAST_JOINS,
    NUMBERED,
    URL,
    URL_JOINS,
    known_name,
    known_names,
    plain_name,
    read_rows,
)
from compt.errors import DataError
from compt.files import new_folder, plain_stat, read_json, write_json

_FIELDS = ("offset", "size", "captions", "rows", "web")
_LINE = np.dtype([(name, "<i8") for name in _FIELDS])
_NAME = np.dtype([("hash", "<u8"), ("line", "<i8"), ("whole", "?")])
COMPRESSED = {
    b"\x1f\x8b": "gunzip -k",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"\xfd7zXZ": "unxz -k",
    b"BZh": "bunzip2 -k",
    b"\x04\x22\x4d\x18": "lz4 -d",
    b"PK\x03\x04": "unzip",
}
"""How compressed files begin, and what unpacks them."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_WEB = re.compile("https?://", re.IGNORECASE)
_PART = 1 << 20
_LOOKED = 100
"""Rows whose columns decide what is read of a table."""
Keep = Literal["", "columns", "sentences"]
"""What a conversion keeps beside captions: nothing, the names of their columns, or these with sentences cut as
DreamLIP's authors cut them."""


class Join(NamedTuple):
    """The lines of samples in a table. lines: numbers, int64 [n]; -1 without one. by: samples joined by each way.

    named: samples that were not joined by URL, bool [n].
    """

    lines: NDArray[np.int64]
    by: dict[str, int]
    named: NDArray[np.bool_]


@dataclass(frozen=True)
class CaptionTable:
    """A table of captions, converted to one JSON line per sample. Lines and the sorted hashes of names stay on disk.

    path: the table itself. digest: hash of all lines. account: its rows; those with a caption count as used until
    samples are sought in it.
    """

    path: Path
    folder: Path
    digest: str
    account: Account
    owner: str

    @property
    def blob(self) -> Path:
        """The JSON lines: `["key", ["caption", ...]]`, or `["key", [["column", "caption"], ...]]`, see `Keep`."""
        return self.folder / "captions.jsonl"

    @cached_property
    def lines(self) -> NDArray[np.void]:
        """Offset, size, captions and rows of each line, and whether a row has an address in the web."""
        return np.memmap(self.folder / "lines.bin", dtype=_LINE, mode="r")

    @cached_property
    def _names(self) -> NDArray[np.void]:
        return np.memmap(self.folder / "names.bin", dtype=_NAME, mode="r")

    def find(self, keys: Sequence[bytes], urls: Sequence[str]) -> Join:
        """The line of each sample, by its key, else by the end of its key's path, else by its URL ("" for none).

        The end of a path matches only whole names, and only where no other sample has the same end: `dog/1` is not the
        row of `cat/1.jpg`, and `1.jpg` is neither `cat/1` nor `dog/1`. Where both have an address in the web, it
        decides alone: keys are often numbers, which another download gives to other images.
        """
        lines, named = np.full(len(keys), -1, dtype=np.int64), np.zeros(len(keys), dtype=bool)
        if not len(self._names):
            return Join(lines, {}, named)
        table, by = self._names["hash"], dict[str, int]()
        keys = [key.replace(b"\\", b"/") for key in keys]
        web = np.array([_WEB.match(url) is not None for url in urls])
        deepest = max((key.count(b"/") for key in keys), default=0)
        ends = [[b"".join(key.split(b"/", cut)[cut:]) for key in keys] for cut in range(1, deepest + 1)]
        tried = [("key", keys), *(("file name", names) for names in ends), ("URL", [*map(_bytes, urls)])]
        for way, names in tried:
            if not (lines < 0).any():
                break
            hashes = np.array([_hash(name) for name in names], dtype=np.uint64)
            at = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            hit = (table[at] == hashes) & (lines < 0) & np.array([bool(name) for name in names])
            if way == "file name":
                _, first, count = np.unique(hashes, return_inverse=True, return_counts=True)
                hit &= self._names["whole"][at] & (count[first] == 1)
            if way != "URL":
                hit[hit] = ~(web[hit] & (self.lines["web"][self._names["line"][at[hit]]] > 0))
            lines[hit] = self._names["line"][at[hit]]
            named |= hit & (way != "URL")
            if hit.any():
                by[way] = by.get(way, 0) + int(hit.sum())
        return Join(lines, by, named)

    def rows_met(self, offsets: NDArray[np.int64]) -> int:
        """Rows of the lines that begin at these offsets; each line counts once."""
        at = np.searchsorted(self.lines["offset"], np.unique(offsets))
        return int(self.lines["rows"][at].sum())

    @staticmethod
    def parse(line: bytes) -> list[str]:
        """The captions of one line. Raises ValueError for another line."""
        _, captions = json.loads(line)
        return [str(caption) for caption in captions]

    @staticmethod
    def fields(line: bytes) -> dict[str, list[str]]:
        """The captions of one line by column, where a conversion keeps columns. Raises ValueError for another line."""
        found: dict[str, list[str]] = {}
        for column, caption in json.loads(line)[1]:
            found.setdefault(column, []).append(caption)
        return found


def _bytes(name: str) -> bytes:
    # Bytes of a tar or table that are not UTF-8 come back as they were; a half of a pair from a JSON stays one.
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _sampled_hash(file: int, size: int) -> str:
    """Hex digest of a table up to 64 MiB, and of 64 evenly spaced parts of a larger one. Raises OSError."""
    sha = hashlib.sha256()
    for start in range(0, size, max(_PART, size // 64)):
        sha.update(os.pread(file, _PART, start))
    return sha.hexdigest()


def convert_table(path: Path, parent: Path, columns: Sequence[str] = (), keep: Keep = "") -> CaptionTable:
    """Convert a table of captions to a folder in `parent`, or reuse an earlier conversion of the same file.

    Rows with one key are one sample, wherever they are. `columns` names the columns with captions (default: the known
    ones). Raises DataError where the file or its columns cannot be used.
    """
    try:
        stat = plain_stat(path)
        with path.open("rb") as file:
            head = file.read(6)
            content = _sampled_hash(file.fileno(), stat.st_size)
    except OSError as error:
        raise DataError(f"table of captions {path}: {error.strerror}") from error
    for magic, command in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"table of captions {path} is compressed: unpack it with `{command} {path.name}`")
    if head.startswith(_UTF16):
        raise DataError(f"table of captions {path} is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`")
    folder = parent / f"captions-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}"
    identity = {
        "version": 4,  # raised when rows are read by other rules: stored tables are then converted again
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "columns": [*columns],
        "content": content,
        **({"keep": keep} if keep else {}),
    }
    try:
        meta = read_json(folder / "meta.json")
        if {key: meta[key] for key in identity} == identity and meta.get("keep", "") == keep:
            return CaptionTable(path, folder, meta["digest"], Account.from_json(meta["account"]), meta["owner"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    writer = _Writer(path, columns, keep)
    with new_folder(folder) as temporary:
        digest = writer.write(temporary)
        meta = {**identity, "digest": digest, "account": writer.account.to_json(), "owner": writer.owner}
        write_json(temporary / "meta.json", meta)
    return CaptionTable(path, folder, digest, writer.account, writer.owner)


def count_columns(path: Path, columns: Sequence[str] = ()) -> tuple[int, Counter[str]]:
    """The rows of a table that have captions, and the captions in each of its columns. Raises DataError."""
    rows, found = 0, Counter[str]()
    for _, texts in _Writer(path, columns, "columns").rows():
        rows += 1
        found.update(column for column, _ in texts)
    return rows, found


class _Writer:
    """Writes a line for each sample, and the names that lead to it.

    Lines are written as rows come, one for neighbours with the same first name. Names that lead to several lines then
    get one more, with the captions of all of them. Only numbers stay in memory: 60 bytes a row with one name.
    """

    def __init__(self, path: Path, columns: Sequence[str], keep: Keep = "") -> None:
        self.path, self.columns, self.keep = path, [known_name(name) for name in columns], keep
        self.account = Account()
        self.owner = ""
        self._sha = hashlib.sha256()
        self._lines = array("q")  # _FIELDS of each line
        self._hashes, self._places, self._whole = array("Q"), array("q"), array("b")

    def write(self, folder: Path) -> str:
        """Write all files, and return the hash of the lines. Raises DataError."""
        with (folder / "captions.jsonl").open("w+b") as blob:
            self._write_rows(blob)
            if not self._lines:
                why = f": {self.account.line()}" if self.account.faults else ""
                raise DataError(f"table of captions {self.path} has no rows with captions{why}")
            names = self._lead(blob)
        lines = np.array(self._lines).reshape(-1, len(_FIELDS))
        np.rec.fromarrays(lines.T, dtype=_LINE).tofile(folder / "lines.bin")
        names.tofile(folder / "names.bin")
        return self._sha.hexdigest()

    def _put(self, blob: BinaryIO, owner: str, captions: list[Any], rows: int, web: bool) -> int:
        line = json.dumps([owner, captions], ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self._sha.update(line)
        self._lines.extend((blob.tell(), len(line), len(captions), rows, web))
        blob.write(line)
        return len(self._lines) // len(_FIELDS) - 1

    def _write_rows(self, blob: BinaryIO) -> None:
        names: dict[str, bool] = {}
        captions: list[Any] = []
        rows = 0
        for own, found in self.rows():
            first, last = next(iter(own)), next(iter(names), None)
            if first != last:
                if rows:
                    self._name(names, blob, captions, rows)
                names, captions, rows = {}, [], 0
            names |= own
            captions += found
            rows += 1
        if rows:
            self._name(names, blob, captions, rows)

    def _name(self, names: dict[str, bool], blob: BinaryIO, captions: list[str], rows: int) -> None:
        """Write a line, and note its names."""
        owner = next(iter(names))
        self.owner = self.owner or owner
        place = self._put(blob, owner, captions, rows, any(map(_WEB.match, names)))
        for name, whole in names.items():
            self._hashes.append(_hash(_bytes(name)))
            self._places.append(place)
            self._whole.append(whole)

    def _lead(self, blob: BinaryIO) -> NDArray[np.void]:
        """The hash of each name once, with its line. A file name that several folders have leads nowhere."""
        blob.flush()
        hashes, places = np.array(self._hashes), np.array(self._places)
        whole = np.array(self._whole, dtype=bool)
        order = np.lexsort((places, hashes))
        hashes, places, whole = hashes[order], places[order], whole[order]
        starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
        ends = np.r_[starts[1:], len(hashes)]
        lead = places[starts]
        merged: dict[tuple[int, ...], int] = {}
        doubtful: dict[int, tuple[int, ...]] = {}
        for group in np.flatnonzero(ends - starts > 1).tolist():
            part = slice(starts[group], ends[group])
            chosen = tuple(places[part][whole[part]].tolist()) or tuple(places[part].tolist())
            if len(chosen) == 1:
                lead[group] = chosen[0]
            elif whole[part].any():
                if chosen not in merged:
                    merged[chosen] = self._merge(blob, chosen)
                lead[group] = merged[chosen]
            else:
                doubtful[group] = chosen
        for group, chosen in doubtful.items():
            lead[group] = merged.get(chosen, -1)
        kept = lead >= 0
        some_whole = np.logical_or.reduceat(whole, starts)
        return np.rec.fromarrays([hashes[starts][kept], lead[kept], some_whole[kept]], dtype=_NAME)

    def _merge(self, blob: BinaryIO, places: Sequence[int]) -> int:
        owner, captions, rows, web = "", list[Any](), 0, False
        for place in places:
            offset, size, _, own, address = self._lines[len(_FIELDS) * place : len(_FIELDS) * (place + 1)]
            name, texts = json.loads(os.pread(blob.fileno(), size, offset))
            captions += texts
            owner, rows, web = owner or name, rows + own, web or address > 0
        return self._put(blob, owner, captions, rows, web)

    def rows(self) -> Iterator[tuple[dict[str, bool], list[Any]]]:
        """The names of each usable row, with whether they are whole, and what is stored of its captions."""
        rows = read_rows(self.path, self.account)
        # Objects of JSON may leave out what is missing, so one row alone does not have all columns.
        first = [*islice(rows, _LOOKED)]
        columns = {name: None for _, row in first for name in known_names(self.path, row)}
        joins = self._joins([*columns]) if first else []
        last: tuple[str, ...] = ()
        known: list[str] = []
        for number, read in chain(first, rows):
            if (names_read := tuple(read)) != last:
                last, known = names_read, known_names(self.path, names_read)
            row = dict(zip(known, read.values(), strict=True))
            names: dict[str, bool] = {}
            for column in joins:
                names |= {**_names_of(row.get(column)), **names}
            found, texts = self._captions(row)
            where = f"{self.path.name}:{number}"
            for cause in found.lost:
                self.account.lose(cause, where)
            if not names:
                self.account.lose("row_key", where)
            elif not found.texts:
                self.account.lose("row_text", where)
            else:
                self.account.used["row"] += 1
                yield names, texts

    def _captions(self, row: dict[str, Any]) -> tuple[Captions, list[Any]]:
        """The captions of a row, and what is stored of them."""
        values = {name: value for name, value in row.items() if value is not None and value != ""}
        if self.keep == "sentences":
            values = split_as_dreamlip(values)
        found = read_columns(values, self.columns)[0]
        if not self.keep:
            return found, found.texts
        named = by_column(values, self.columns)
        return found, [(name, text) for name, texts in named.items() for text in texts]

    def _joins(self, names: list[str]) -> list[str]:
        """The columns to join on. Raises DataError where there are none, or no captions."""
        place = f"table of captions {self.path} has the columns {', '.join(names)}"
        missing = [name for name in self.columns if name not in names]
        if missing:
            raise DataError(f"{place}; it lacks {', '.join(missing)}, which data.caption_columns names")
        texts = self.columns or [name for name in names if name in CAPTION_COLUMNS]
        if not texts:
            raise DataError(f"{place}; none is known to hold captions: name those that do with data.caption_columns")
        known = [name for join in JOIN_COLUMNS for name in names if plain_name(name) == join and name not in texts]
        others = [name for name in names if name not in texts]
        if not others:
            raise DataError(f"{place}; none says which sample a row belongs to: add a column key, url or filename")
        names = [name for name in known if plain_name(name) not in LAST_JOINS]
        return names if any(plain_name(name) not in URL_JOINS for name in names) else known or others[:1]


def _names_of(value: Any) -> dict[str, bool]:
    """The names that a cell gives its row, and whether each is whole: a URL, or a key or path without image ending.

    The end of a path is no whole name.
    """
    if isinstance(value, dict):  # Hugging Face's images
        value = value.get("path")
    value = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not value or URL.match(value):
        return {value: True} if value else {}
    value = value.replace("\\", "/")  # of Windows
    name = image_stem(NUMBERED.sub("", value)) or value
    parts = name.split("/")
    return {name: True} | {end: False for at in range(1, len(parts)) if (end := "/".join(parts[at:]))}
