"""Pack images and captions into WebDataset shards: folders of images, class folders, tables, or other shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compt.data.account import JOINED, Account
from compt.data.captions import CAPTION_COLUMNS, by_column, parse_json, read_columns, read_text, split_as_dreamlip
from compt.data.decode import Unusable, open_image, shrunk
from compt.data.folder import ClassOrder, files_below, folder_names, read_class_folders, read_image, read_names
from compt.data.index import open_index
from compt.data.labels import CLASSNAMES, NONE, TEMPLATES, beside
from compt.data.names import FOREIGN, IMAGE_EXTENSIONS, TEXT_ENDINGS, is_metadata
from compt.data.parquet import ParquetImages, parquet_files
from compt.data.remote import Cache
from compt.data.samples import SampleReader
from compt.data.scan import KIND_TABLE, KIND_TEXT
from compt.data.table import CaptionTable, Keep, convert_table
from compt.errors import ConfigError, DataError
from compt.files import disk_errors, new_file, read_json, write_json, write_text
from compt.recipe.schema import MIN_MATCHED

STATE, WORK = "pack.json", ".pack"
"""The record of a packed folder, and a folder in it for indexes and converted tables while packing goes on."""
SHARD_SIZE = 10_000
"""Samples of a shard, as in img2dataset."""
_TEXTS = ("json", "txt", "cls")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}
Progress = Callable[[int, int], None]
"""Samples done, samples in all."""


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


class _Members(NamedTuple):
    """The files of one sample as they are, and the captions of its row in the table, by column."""

    image: bytes
    json: bytes = b""
    txt: bytes = b""
    cls: bytes = b""
    row: dict[str, list[str]] | None = None


class _Source(ABC):
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
    def read(self, sample: int) -> _Members:
        """The files of a sample. Raises Unusable."""


class _ImageFolder(_Source):
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

    def read(self, sample: int) -> _Members:
        image, *others = (self._root / name for name in self._names[sample])
        row = None
        if self._table is not None and (line := self._lines[sample]) >= 0:
            with self._table.blob.open("rb") as blob:
                at = self._table.lines[line]
                row = CaptionTable.fields(os.pread(blob.fileno(), int(at["size"]), int(at["offset"])))
        texts = {path.suffix[1:].lower(): read_image(path) for path in others}
        return _Members(read_image(image), row=row, **texts)


class _ByClass(_Source):
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

    def read(self, sample: int) -> _Members:
        return _Members(self._folders.image(sample), cls=str(self._folders.labels[sample]).encode())


class _Shards(_Source):
    """Samples of other shards, with captions in a table, if there is one."""

    counted = True

    def __init__(self, patterns: str, base: Path, out: Path, options: PackOptions, cache: Cache | None) -> None:
        self._index = index = open_index(
            *(patterns, base, out / WORK, options.captions_csv, None, options.columns, options.min_matched, cache),
            keep=options.keep,
        )
        self._reader = SampleReader(index)
        labelled = any((labels != NONE).any() for labels in index.column("label"))
        self.account, self.captioned = index.account, not labelled or index.account.used["caption"] > 0
        self.beside = {**_copied(index.places, CLASSNAMES), **_copied(index.places, TEMPLATES)} if labelled else {}
        self.fingerprint = f"{index.fingerprint} {index.content}"

    def __len__(self) -> int:
        return len(self._index)

    def name(self, sample: int) -> str:
        return self._index.key(sample)

    def read(self, sample: int) -> _Members:
        entry = self._index.entry(sample)
        text = self._reader.text(entry) if entry.text_kind == KIND_TEXT or entry.text_kind >= KIND_TABLE else b""
        values = self._reader.json(entry) if entry.json_size else b""
        return _Members(
            self._reader.image(entry),
            values if parse_json(values) is not None else b"",  # the index has counted a damaged one
            text if entry.text_kind == KIND_TEXT else b"",
            str(entry.label).encode() if entry.label >= 0 else b"",
            CaptionTable.fields(text) if entry.text_kind >= KIND_TABLE else None,
        )


class _Rows(_Source):
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

    def read(self, sample: int) -> _Members:
        values = self._images.read(sample)
        image = (values.pop(self._images.image) or {}).get("bytes")
        if not image:
            raise Unusable("image", "its row has no image")
        values = split_as_dreamlip(values) if self._options.keep == "sentences" else values
        return _Members(image, row=by_column(values, self._options.columns))


def _copied(places: Sequence[Path], name: str) -> dict[str, str]:
    """The name and text of a file beside the source, if it is there."""
    found = beside(places, name)
    return {} if found is None else {name: found.read_text(encoding="utf-8-sig")}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _open(source: str, out: Path, base: Path, options: PackOptions, cache: Cache | None) -> _Source:
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
        found: _Source = _ImageFolder(root, out, replace(options, captions_csv=path), own=False)
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


def _members(sample: _Members, captioned: bool, options: PackOptions) -> tuple[list[tuple[str, bytes]], list[str], int]:
    """Endings and files to write, the causes of what is left out, and the number of captions.

    Images and captions that no option changes are copied byte by byte. Raises Unusable.
    """
    image, data = open_image(sample.image), sample.image
    ending = _EXTENSIONS.get(image.format or "", (image.format or "jpg").lower())
    if options.resize is not None and (data := shrunk(image, data, options.resize)) is not sample.image:
        ending = "jpg"
    values, stored, txt, lost = parse_json(sample.json), sample.json, sample.txt, []
    if sample.json and values is None:
        lost, stored = ["json"], b""
    changed = dict(values or {})
    if sample.row is not None or (options.columns and read_columns(changed, options.columns)[0].texts):
        row = {"captions": read_columns(changed, options.columns)[0].texts} if sample.row is None else sample.row
        if options.columns and sample.row is not None:  # names that are not known would have to be named again
            row = {"captions": [text for texts in row.values() for text in texts]}
        known = {*CAPTION_COLUMNS, *options.columns}
        changed = {name: value for name, value in changed.items() if name not in known} | row
        lost, txt = [*lost, *(["second_text"] if txt else [])], b""
    elif options.keep == "sentences":
        changed = split_as_dreamlip(changed)
    if changed != (values or {}):
        stored = json.dumps(changed).encode()
    found, first = read_columns(changed)
    if txt and not first and (own := read_text(txt)).texts:
        found = own
    if captioned and not found.texts:
        raise Unusable("caption", "it has no usable caption")
    label = sample.cls.strip()
    if label and not label.isdigit():
        lost, label = [*lost, "cls"], b""
    files = [(ending, data), ("json", stored), ("txt", txt), ("cls", label)]
    return [(name, data) for name, data in files if data], [*lost, *found.lost], len(found.texts)


def _key(name: str, taken: set[str]) -> str:
    """A key of a tar for the name: without dots, since a key ends at the first, and in no sample before.

    It leads out of no folder into which the tar is unpacked, as names in shards of others may.
    """
    name = "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
    key = plain = (name.lstrip("_") if is_metadata(name) else name).replace(".", "_")
    number = 1
    while key in taken:
        number += 1
        key = f"{plain}_{number}"
    taken.add(key)
    return key


@dataclass
class PackReport:
    """What was packed. account: everything that was read of the source."""

    shards: int
    samples: int
    account: Account = field(default_factory=Account)


def pack(
    source: str,
    out: Path,
    base: Path,
    options: PackOptions,
    *,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> PackReport:
    """Write the samples of `source` to shards in `out`, or finish an interrupted packing of the same.

    Each shard has the samples of its part of the order, so a resumed packing writes the same bytes. Raises ConfigError
    where `out` was packed with other options, DataError where the source cannot be used or has changed, and RunError
    where `out` cannot be written.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    settings = {
        "shard_size": options.shard_size,
        "seed": options.seed,
        "columns": [*options.columns],
        "captions": options.keep,
        "resize": options.resize,
    }
    state = _begun(out, settings)
    samples = _open(source, out, base, options, cache)
    if state.setdefault("source", samples.fingerprint) != samples.fingerprint:
        raise DataError(f"{out}: the source, {source}, is not what it was when packing began; name another folder")
    count = len(samples)
    order = np.arange(count)
    if options.seed is not None:
        order = np.argsort(np.random.Philox(key=options.seed).random_raw(count), kind="stable")
    account = Account.from_json(state["account"])
    for name, text in samples.beside.items():
        write_text(out / name, text)
    # The account is stored with each shard: a resumed packing does not read the finished ones again.
    for first in range(state["read"], count, options.shard_size):
        part = order[first : first + options.shard_size].tolist()
        state["samples"] += _write_shard(
            out / f"{first // options.shard_size:06d}.tar", samples, part, options, account
        )
        state |= {"read": first + len(part), "account": account.to_json()}
        write_json(out / STATE, state)
        if progress:
            progress(first + len(part), count)
    shutil.rmtree(out / WORK, ignore_errors=True)
    total = Account()
    total.add(samples.account)
    total.add(account)
    return PackReport(-(-count // options.shard_size), state["samples"], total)


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state of a packing: that of `out`, or a new one. Raises ConfigError for other settings or other files."""
    new = {"settings": settings, "read": 0, "samples": 0, "account": Account().to_json()}
    try:
        state = read_json(out / STATE)
        old = state["settings"]
        state = {name: state[name] for name in (*new, "source")}
    except FileNotFoundError:
        others = sorted(path.name for path in out.iterdir() if path.name != WORK)
        if others:
            raise ConfigError(f"{out} holds other files, such as {others[0]}; name a new folder") from None
        return new
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out / STATE} is damaged ({error}); remove {out}, or name another folder") from None
    for name, value in settings.items():
        if old.get(name) != value:
            raise ConfigError(f"{out} was packed with {name} {old.get(name)}, not {value}; name another folder")
    return state


def _write_shard(path: Path, samples: _Source, part: list[int], options: PackOptions, account: Account) -> int:
    """Write one shard and return its number of samples. The same samples give the same bytes."""
    written, taken = 0, set[str]()
    with new_file(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for at in part:
            name = samples.name(at)
            try:
                files, lost, captions = _members(samples.read(at), samples.captioned, options)
            except Unusable as error:
                account.lose(error.cause, f"{name}: {error}")
                continue
            for cause in [] if samples.counted else lost:
                account.lose(cause, name)
            key = _key(name, taken)
            for ending, data in files:
                header = tarfile.TarInfo(f"{key}.{ending}")  # without times and owners
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
            written += 1
            labels = int(files[-1][0] == "cls")
            counts = {"sample": 1, "label": labels, "caption": 0 if samples.counted else captions}
            account.used += Counter(counts)  # without zeros
    return written
