"""The samples that `compt data pack` packs: folders of images, class folders, tables, Parquet, or other shards."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compt.data.account import JOINED, Account
from compt.data.captions import CAPTION_COLUMNS, by_column, parse_json, split_as_dreamlip
from compt.data.decode import Unusable
from compt.data.folder import ClassOrder, files_below, folder_names, read_class_folders, read_image, read_names
from compt.data.index import open_index
from compt.data.labels import CLASSNAMES, NONE, TEMPLATES, beside, read_plain
from compt.data.names import FOREIGN, IMAGE_EXTENSIONS, TEXT_ENDINGS
from compt.data.parquet import ParquetImages, parquet_files
from compt.data.remote import Cache, RemoteShard
from compt.data.samples import SampleReader
from compt.data.scan import KIND_TABLE, KIND_TEXT
from compt.data.table import CaptionTable, Keep, convert_table
from compt.errors import ConfigError, DataError
from compt.recipe.schema import MIN_MATCHED

WORK = ".pack"
"""A folder in the packed one for indexes and converted tables while packing goes on."""
SHARD_SIZE = 10_000
"""Samples of a shard, as in img2dataset."""
_TEXTS = ("json", "txt", "cls")


@dataclass(frozen=True)
class PackOptions:
    """How a source is packed.

    captions_csv, columns, min_matched: as in `index.open_index`. images: folder with the images of a table (default:
    that of the table). seed: shuffles the samples (default: the order of the source). class_order: see
    `folder.read_class_folders`. keep: whether the captions of DreamLIP are cut into sentences. resize: the most pixels
    that the shorter side of an image may have (default: images stay as they are).
    """

    captions_csv: Path | None = None
    columns: Sequence[str] = ()
    min_matched: float = MIN_MATCHED
    images: Path | None = None
    shard_size: int = SHARD_SIZE
    seed: int | None = None
    class_order: ClassOrder | None = None
    keep: Keep = "columns"
    resize: int | None = None


class Members(NamedTuple):
    """The files of one sample as they are, and the captions of its row in the table, by column."""

    image: bytes
    json: bytes = b""
    txt: bytes = b""
    cls: bytes = b""
    row: dict[str, list[str]] | None = None


class Source(ABC):
    """The samples to pack, numbered from 0.

    account: what was read to find them. captioned: whether a sample needs a caption. beside: names and texts of other
    files for the packed folder. fingerprint: identity of the data. counted: whether it has the captions.
    """

    counted = False
    account: Account
    captioned: bool
    beside: dict[str, str]
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, sample: int) -> str:
        """The key of a sample, or its path without the ending."""

    @abstractmethod
    def read(self, sample: int) -> Members:
        """The files of a sample. Raises Unusable."""

    def shard(self, sample: int) -> RemoteShard | None:
        """What should stay in the cache while samples of it are read, one after the other."""
        return None


class _ImageFolder(Source):
    """Images below a folder, with captions in files of the same name or in a table.

    No path in a table is opened: its rows are joined with the images that are in the folder. own: whether images
    without a row are samples, too. Raises DataError.
    """

    def __init__(self, root: Path, out: Path, options: PackOptions, own: bool) -> None:
        self.account, self.beside, self._root = Account(), {}, root
        self._names = self._walk(out, options.captions_csv)
        self._table: CaptionTable | None = None
        self._lines: list[int] = []
        if options.captions_csv is not None and self._names:
            self._table = convert_table(options.captions_csv, out / WORK, options.columns, options.keep)
            self._join(self._table, options, own)
        endings = {name.rpartition(".")[2].lower() for names in self._names for name in names[1:]}
        self.captioned = self._table is not None or not endings.isdisjoint(("txt", "json"))
        self.plain = self._table is None and not endings
        sha = hashlib.sha256(self._table.digest.encode() if self._table else b"")
        for name in (name for names in self._names for name in names):
            sha.update(os.fsencode(f"{name}\0{_size(root / name)}\0"))
        self.fingerprint = sha.hexdigest()

    def _walk(self, out: Path, table: Path | None) -> list[list[str]]:
        """The files of each sample, the image first, in the order of their names."""
        groups: dict[str, dict[str, str]] = {}
        for path in files_below(self._root, self.account, out.resolve()):
            if table is not None and path.resolve() == table.resolve():
                continue
            name = path.relative_to(self._root).as_posix()
            stem, ending = os.path.splitext(name)
            ending = ending[1:].lower()
            if ending in (*IMAGE_EXTENSIONS, *_TEXTS) and ending not in groups.setdefault(stem, {}):
                groups[stem][ending] = name
            elif ending in IMAGE_EXTENSIONS:
                self.account.lose("second_file", str(path))
            elif ending in FOREIGN:
                self.account.lose("foreign_file", str(path))
            else:
                self.account.lose("no_owner" if ending in (*_TEXTS, *TEXT_ENDINGS) else "other_file", str(path))
        found = []
        for stem in sorted(groups):
            images = [groups[stem].pop(ending) for ending in IMAGE_EXTENSIONS if ending in groups[stem]]
            texts = [*groups[stem].values()]
            lost = [("second_file", name) for name in images[1:]] + [("no_owner", name) for name in texts if not images]
            for cause, name in lost:
                self.account.lose(cause, str(self._root / name))
            if images:
                found.append([images[0], *texts])
                self.account.used["file"] += len(found[-1])
        return found

    def _join(self, table: CaptionTable, options: PackOptions, own: bool) -> None:
        """Find the rows of the images, and add the account of the table."""
        stems = [self.name(at) for at in range(len(self))]
        found = table.find([os.fsencode(stem) for stem in stems], [""] * len(stems))
        hit = found.lines >= 0
        met = int(hit.sum())
        if met < max(options.min_matched * len(stems) * own, 1):
            raise DataError(
                f"{met:,} of the {len(stems):,} images in {self._root} have a row in {options.captions_csv}, whose "
                f"first row is of '{table.owner}'; name the folder in which its paths begin with --images, or accept "
                f"fewer rows with --min-matched (it is {options.min_matched:g})"
            )
        self.account.add(table.account)
        self.account.used.update({"join": met, **{JOINED + way: count for way, count in found.by.items()}})
        alone = table.account.used["row"] - table.rows_met(table.lines["offset"][found.lines[hit]])
        if alone > 0:
            self.account.used["row"] -= alone
            self.account.lose("row_alone", "", alone)
        for at in np.flatnonzero(~hit).tolist():
            self.account.lose("unmatched" if own else "no_row", str(self._root / self._names[at][0]))
            self.account.used["file"] -= 0 if own else len(self._names[at])
        self._lines = found.lines.tolist()
        if not own:
            self._names = [names for names, line in zip(self._names, self._lines, strict=True) if line >= 0]
            self._lines = [line for line in self._lines if line >= 0]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, sample: int) -> str:
        return os.path.splitext(self._names[sample][0])[0]

    def read(self, sample: int) -> Members:
        image, *others = (self._root / name for name in self._names[sample])
        row = None
        if self._table is not None and (line := self._lines[sample]) >= 0:
            with self._table.blob.open("rb") as blob:
                at = self._table.lines[line]
                row = CaptionTable.fields(os.pread(blob.fileno(), int(at["size"]), int(at["offset"])))
        texts = {path.suffix[1:].lower(): read_image(path) for path in others}
        return Members(read_image(image), row=row, **texts)


class _ByClass(Source):
    """Images in class folders."""

    captioned = False

    def __init__(self, root: Path, order: ClassOrder | None) -> None:
        self._folders = read_class_folders(root, order)
        self.account, self.fingerprint = self._folders.account, self._folders.fingerprint
        classes, known = self._folders.classes, beside([root], CLASSNAMES)
        names = read_names(known, classes, root, order) if known else folder_names(classes)
        self.beside = {CLASSNAMES: "".join(f"{name}\n" for name in names), **_copied([root], TEMPLATES)}

    def __len__(self) -> int:
        return len(self._folders)

    def name(self, sample: int) -> str:
        return os.path.splitext(self._folders.key(sample))[0]

    def read(self, sample: int) -> Members:
        return Members(self._folders.image(sample), cls=str(self._folders.labels[sample]).encode())


class _Shards(Source):
    """Samples of other shards, with captions in a table, if there is one."""

    counted = True

    def __init__(self, patterns: str, base: Path, out: Path, options: PackOptions, cache: Cache | None) -> None:
        self._index = index = open_index(
            *(patterns, base, out / WORK, options.captions_csv, None, options.columns, options.min_matched, cache),
            keep=options.keep,
        )
        self._reader, self._in_order = SampleReader(index), options.seed is None
        labelled = any((labels != NONE).any() for labels in index.column("label"))
        self.account, self.captioned = index.account, not labelled or index.account.used["caption"] > 0
        self.beside = {**_copied(index.places, CLASSNAMES), **_copied(index.places, TEMPLATES)} if labelled else {}
        self.fingerprint = f"{index.fingerprint} {index.content}"

    def __len__(self) -> int:
        return len(self._index)

    def name(self, sample: int) -> str:
        return self._index.key(sample)

    def read(self, sample: int) -> Members:
        entry = self._index.entry(sample)
        text = self._reader.text(entry) if entry.text_kind == KIND_TEXT or entry.text_kind >= KIND_TABLE else b""
        values = self._reader.json(entry) if entry.json_size else b""
        return Members(
            self._reader.image(entry),
            values if parse_json(values) is not None else b"",  # the index has counted a damaged one
            text if entry.text_kind == KIND_TEXT else b"",
            str(entry.label).encode() if entry.label >= 0 else b"",
            CaptionTable.fields(text) if entry.text_kind >= KIND_TABLE else None,
        )

    def shard(self, sample: int) -> RemoteShard | None:
        """The shard of a sample. With a seed nearly each is of another one, and only its own bytes are fetched."""
        place = self._index.shards[int(self._index.ends.searchsorted(sample, side="right"))]
        return place if self._in_order and isinstance(place, RemoteShard) else None


class _Rows(Source):
    """Images and captions in Parquet files. Raises ConfigError and DataError."""

    beside: dict[str, str] = {}  # noqa: RUF012
    captioned = True

    def __init__(self, paths: Sequence[Path], options: PackOptions) -> None:
        for flag, given in (("--captions-csv", options.captions_csv), ("--images", options.images)):
            if given is not None:
                raise ConfigError(f"{flag} {given}: {paths[0]} has its own images and captions")
        if options.seed is not None:
            raise ConfigError(f"--seed: rows of {paths[0].suffix} are read in their order; pack the shards once more")
        self._images, self.account, self._options = ParquetImages(paths), Account(), options
        self.fingerprint, known = self._images.fingerprint, {*CAPTION_COLUMNS, *options.columns}
        if known.isdisjoint(self._images.columns):
            raise DataError(
                f"{paths[0]}: no column has a name known for captions; name one with --columns, of "
                f"{', '.join(self._images.columns) or 'none'}"
            )

    def __len__(self) -> int:
        return len(self._images)

    def name(self, sample: int) -> str:
        return self._images.name(sample)

    def read(self, sample: int) -> Members:
        values = self._images.read(sample)
        image = (values.pop(self._images.image) or {}).get("bytes")
        if not image:
            raise Unusable("image", "its row has no image")
        values = split_as_dreamlip(values) if self._options.keep == "sentences" else values
        return Members(image, row=by_column(values, self._options.columns))


def _copied(places: Sequence[Path], name: str) -> dict[str, str]:
    """The name and text of a file beside the source, if it is there."""
    found = beside(places, name)
    return {} if found is None else {name: read_plain(found, "text")}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def open_source(source: str, out: Path, base: Path, options: PackOptions, cache: Cache | None) -> Source:
    """The samples that `source` names. Raises ConfigError and DataError."""
    path = base / Path(source).expanduser()
    if "://" not in source and (paths := parquet_files(path)):
        return _Rows(paths, options)
    table = path.is_file() and path.suffix.lower() != ".tar"
    if options.images is not None and not table:
        raise ConfigError(f"--images {options.images}: is for a table as SOURCE")
    if table:
        if options.captions_csv is not None:
            raise ConfigError(f"--captions-csv {options.captions_csv}: SOURCE is a table already: {path}")
        root = options.images or path.parent
        found: Source = _ImageFolder(root, out, replace(options, captions_csv=path), own=False)
    elif path.is_dir() and not any(path.glob("*.tar")):
        root, found = path, _ImageFolder(path, out, options, own=True)
        if found.plain and len(found):
            found = _ByClass(path, options.class_order)
            if not len(found):
                raise DataError(
                    f"the images in {path} have no captions: put a .txt beside each (1.txt for 1.jpg), name a table "
                    "with --captions-csv, or, for an evaluation set, sort them into one folder for each class"
                )
    else:
        return _Shards(source, base, out, options, cache)
    if not len(found):
        raise DataError(f"there is no image in {root}" + (f" ({found.account.line()})" if found.account.faults else ""))
    return found
