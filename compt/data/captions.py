"""The captions of a sample: a list in its `.json`, the lines of its `.txt`, or the row of a CSV that has its key."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from compt.errors import DataError
from compt.files import new_folder, read_json, write_json

LONG_COLUMNS = ("longIB", "longSV", "longLLA")
DREAMLIP_COLUMNS = ("raw", "shortIB", "longIB", "shortSV", "longSV", "shortLLA", "longLLA")
"""DreamLIP's columns; the long ones are split into sentences."""
_KEY_COLUMNS = ("key", "__key__", "image_id", "id")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_RECORD = np.dtype([("hash", "<u8"), ("offset", "<i8"), ("size", "<i4"), ("captions", "<i4")])


def split_sentences(text: str) -> list[str]:
    """The sentences of a long description, without empty ones."""
    return [part for part in (part.strip() for part in _SENTENCE_END.split(text)) if part]


def usable(captions: list[str]) -> list[str]:
    """The captions that have more than white space."""
    return [caption for caption in captions if caption.strip()]


def from_columns(values: dict[str, Any]) -> list[str]:
    """The captions in DreamLIP's columns, in the order of the columns."""
    captions: list[str] = []
    for column in DREAMLIP_COLUMNS:
        value = values.get(column)
        if isinstance(value, str) and value.strip():
            captions.extend(split_sentences(value) if column in LONG_COLUMNS else [value.strip()])
    return captions


def from_json(data: bytes) -> tuple[list[str], bool]:
    """The captions, and whether they come before a `.txt`. img2dataset's single `caption` does not."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return [], False
    if not isinstance(values, dict):
        return [], False
    if isinstance(values.get("captions"), list):
        return [item if isinstance(item, str) else "" for item in values["captions"]], True
    if any(column in values for column in DREAMLIP_COLUMNS):
        return from_columns(values), True
    caption = values.get("caption")
    return ([caption], False) if isinstance(caption, str) else ([], False)


def from_text(data: bytes) -> list[str]:
    """One caption per line. A final newline starts no further line."""
    return data.decode("utf-8", "replace").removesuffix("\n").splitlines()


def key_hash(key: bytes) -> int:
    """A 64-bit hash of a key, to find its row of a CSV."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class CaptionTable:
    """A captions CSV, converted to one JSON line per sample and a sorted table of key hashes. Both stay on disk."""

    folder: Path
    digest: str
    rows: int
    repeated: int

    @property
    def blob(self) -> Path:
        """The JSON lines: `["key", ["caption", ...]]`."""
        return self.folder / "captions.jsonl"

    @cached_property
    def _records(self) -> NDArray[np.void]:
        return np.memmap(self.folder / "rows.bin", dtype=_RECORD, mode="r")

    def find(self, keys: list[bytes]) -> NDArray[np.int64]:
        """Offset, size and number of captions of each key, int64 [n, 3]; -1 where the CSV has no such key.

        A key with slashes is looked up as a whole first, then by its last part.
        """
        found = np.full((len(keys), 3), -1, dtype=np.int64)
        for candidates in (keys, [key.rsplit(b"/", 1)[-1] for key in keys]):
            hashes = np.array([key_hash(key) for key in candidates], dtype=np.uint64)
            table = self._records["hash"]
            at = np.minimum(np.searchsorted(table, hashes), max(len(table) - 1, 0))
            hit = (table[at] == hashes) & (found[:, 0] < 0) if len(table) else np.zeros(len(keys), dtype=bool)
            for column, name in enumerate(("offset", "size", "captions")):
                found[hit, column] = self._records[name][at[hit]]
        return found

    @staticmethod
    def parse(line: bytes, key: str) -> list[str]:
        """The captions of one line. Raises ValueError where the line belongs to another sample."""
        owner, captions = json.loads(line)
        if owner not in (key, key.rsplit("/", 1)[-1]):
            raise ValueError(f"the captions table has a line of '{owner}' in the place of '{key}'")
        return [str(caption) for caption in captions]


def convert_csv(path: Path, parent: Path, progress: Callable[[str], None] | None = None) -> CaptionTable:
    """Convert a captions CSV to a folder in `parent`, or reuse an earlier conversion of the same file.

    Successive rows with one key are one sample. Raises DataError where the file or its columns cannot be used.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"captions CSV {path}: {error.strerror}") from error
    folder = parent / f"captions-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}"
    identity = {"version": 1, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    try:
        meta = read_json(folder / "meta.json")
        if {key: meta[key] for key in identity} == identity:
            return CaptionTable(folder, meta["digest"], meta["rows"], meta["repeated"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if progress:
        progress(f"converting {path.name}")
    with new_folder(folder) as temporary, ExitStack() as stack:
        blob = stack.enter_context((temporary / "captions.jsonl").open("wb"))
        rows, repeated, digest = _lay_out(path, blob, temporary)
        write_json(temporary / "meta.json", {**identity, "digest": digest, "rows": rows, "repeated": repeated})
    return CaptionTable(folder, digest, rows, repeated)


def _lay_out(path: Path, blob: BinaryIO, folder: Path) -> tuple[int, int, str]:
    sha = hashlib.sha256()
    offset = rows = 0
    unsorted = folder / "unsorted.bin"
    with unsorted.open("wb") as table:
        for key, captions in _samples(path):
            line = json.dumps([key, captions], ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            blob.write(line)
            sha.update(line)
            hashed = key_hash(key.encode("utf-8", "surrogateescape"))
            table.write(np.array((hashed, offset, len(line), len(captions)), dtype=_RECORD).tobytes())
            offset += len(line)
            rows += 1
    if not rows:
        raise DataError(f"captions CSV {path} has no rows")
    records = np.memmap(unsorted, dtype=_RECORD, mode="r")
    order = np.argsort(records["hash"], kind="stable")
    hashes = records["hash"][order]
    # `find` returns the first row of a key; others with that key are only counted.
    repeated = int((hashes[1:] == hashes[:-1]).sum())
    with (folder / "rows.bin").open("wb") as table:
        for first in range(0, rows, 1 << 20):
            table.write(records[order[first : first + (1 << 20)]].tobytes())
    del records
    unsorted.unlink()
    return rows, repeated, sha.hexdigest()


def _samples(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Key and captions of each sample. Successive rows with one key are merged."""
    csv.field_size_limit(1 << 24)
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            key_column, read = _columns(path, list(reader.fieldnames or []))
            current, captions = None, list[str]()
            for row in reader:
                key = _plain_key(row.get(key_column) or "")
                if key != current:
                    if current:
                        yield current, captions
                    current, captions = key, []
                captions.extend(read(row))
            if current:
                yield current, captions
    except csv.Error as error:
        raise DataError(f"captions CSV {path}: {error}") from error


def _columns(path: Path, names: list[str]) -> tuple[str, Callable[[dict[str, Any]], list[str]]]:
    """The key column, and a function that returns the captions of a row."""
    known = [name for name in names if name in DREAMLIP_COLUMNS]
    plain = [name for name in names if name.lower().startswith(("caption", "text"))]
    keys = [name for name in names if name.lower() in _KEY_COLUMNS]
    keys += [name for name in names if name not in known + plain]
    if not keys or not known + plain:
        raise DataError(
            f"captions CSV {path} has the columns {', '.join(names) or '(none)'}; it needs a column 'key', and "
            f"DreamLIP's ({', '.join(DREAMLIP_COLUMNS)}) or ones whose names begin with 'caption'"
        )
    if known:
        return keys[0], from_columns
    return keys[0], lambda row: [text.strip() for name in plain if (text := row.get(name) or "").strip()]


def _plain_key(value: str) -> str:
    """The sample key in a cell, which may be a file name."""
    return re.sub(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", "", value.strip(), flags=re.IGNORECASE)
