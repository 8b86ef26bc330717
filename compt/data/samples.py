"""Samples from their shards: encoded images, labels and captions by position, and what a step draws of them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from compt.data.account import CAUSES
from compt.data.captions import Captions, read_json_captions, read_text, sort_out
from compt.data.decode import MAX_BYTES, Decoder, Encoded, Unusable, open_image
from compt.data.index import Index
from compt.data.labels import read_label_array
from compt.data.order import Box, Change, caption_choice, crop_box, image_change
from compt.data.remote import RemoteShard, Shard, local
from compt.data.scan import KIND_JSON, KIND_TABLE, KIND_TEXT, IndexEntry, json_label
from compt.data.table import CaptionTable
from compt.data.tokens import CaptionTokens, Ids
from compt.recipe.schema import Augment

_OPEN_FILES = 128


class Files:
    """Reads files by position. Open descriptors survive a fork: `pread` ignores the position that processes share."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Shard, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises Unusable("tar"), and DataError where a store does not give them."""
        if isinstance(path, RemoteShard):  # an open file would take up room after the cache has removed it
            return path.read(offset, size)
        try:
            descriptor = self._open.get(path)
            if descriptor is None:
                descriptor = self._open[path] = os.open(path, os.O_RDONLY)
                if len(self._open) > _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
            data = os.pread(descriptor, size, offset)
            while 0 < len(data) < size:  # one call reads 2 GiB at most, and less if a signal interrupts it
                more = os.pread(descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise Unusable("tar", f"cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise Unusable("tar", f"{path.name} ends inside a sample: the file changed after it was indexed")
        return data

    def close(self) -> None:
        """Close all files. The next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


class SampleReader:
    """Encoded images and captions of the samples of an index."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files = Files()
        self._checked: set[int] = set()

    def image(self, entry: IndexEntry) -> bytes:
        """The image's file. Raises Unusable, and DataError for a shard replaced since it was indexed."""
        if entry.image_size > MAX_BYTES:
            raise Unusable("image", f"more than {MAX_BYTES:,} bytes")
        return self._files.read(self._shard(entry), entry.image_offset, entry.image_size)

    def json(self, entry: IndexEntry) -> bytes:
        """The sample's `.json`, or else its `.npy`; empty when it has none. Raises Unusable("tar")."""
        return self._files.read(self._shard(entry), entry.json_offset, entry.json_size)

    def text(self, entry: IndexEntry) -> bytes:
        """The `.txt`, the `.json` or the line of the table that the captions come from. Raises Unusable("tar")."""
        if entry.text_kind >= KIND_TABLE:
            return self._files.read(self._table(entry).blob, entry.text_offset, entry.text_size)
        return self._files.read(self._shard(entry), entry.text_offset, entry.text_size)

    def _table(self, entry: IndexEntry) -> CaptionTable:
        table = self.index.tables[entry.shard]
        assert table is not None, "only a shard with a table has rows of it"
        return table

    def _shard(self, entry: IndexEntry) -> Shard:
        """The shard of a sample, whose content is checked before its first sample is read."""
        if entry.shard not in self._checked:
            self._checked.add(entry.shard)
            try:
                self.index.check_content(entry.shard)
            except OSError as error:
                raise Unusable("tar", f"cannot be read: {error.strerror}") from None
        return self.index.shards[entry.shard]

    def captions(self, entry: IndexEntry) -> Captions:
        """All usable captions, and why others are not. Raises Unusable("tar"), and Unusable("caption") without any."""
        found = self._captions(entry)
        if not found.texts:
            causes = sorted({CAUSES[cause].text for cause in found.lost})
            raise Unusable("caption", f"no usable caption: {', '.join(causes)}" if causes else "it has no caption")
        return found

    def _captions(self, entry: IndexEntry) -> Captions:
        data = self.text(entry)
        if entry.text_kind >= KIND_TABLE:
            try:
                return sort_out(CaptionTable.parse(data))
            except (ValueError, TypeError):
                raise Unusable("caption", f"{self._table(entry).blob} is damaged; remove its folder") from None
        if entry.text_kind == KIND_JSON:
            return read_json_captions(data, self.index.columns)
        return read_text(data) if entry.text_kind == KIND_TEXT else Captions([], [])


class EvalSample(NamedTuple):
    """One sample of an evaluation set: its image as it is stored, and what the task asked for.

    label: a class number, or bool [C] where a sample may have several classes.
    """

    key: str
    image: bytes
    label: int | NDArray[np.bool_] | None = None
    captions: list[str] | None = None


class EvalSamples(Protocol):
    """The samples of an evaluation set, numbered from 0."""

    @property
    def fingerprint(self) -> str:
        """Identity of the data, whatever folder they are in."""
        ...

    def __len__(self) -> int: ...

    def describe(self, sample: int) -> str:
        """The place of a sample, for messages."""
        ...

    def image(self, sample: int) -> bytes:
        """The image as it is stored. Raises Unusable."""
        ...

    def read(self, sample: int) -> EvalSample:
        """Raises Unusable for a sample to leave out, DataError where the whole set cannot be used."""
        ...


class ShardSamples:
    """Samples of shards.

    label: None, "cls" for the `.cls` member, "npy" for several classes in a `.npy`, or the name of a whole number in
    the `.json`.
    """

    def __init__(self, index: Index, label: str | None = None, captions: bool = False) -> None:
        self.index, self._label, self._captions = index, label, captions
        self._reader = SampleReader(index)
        self.fingerprint = index.fingerprint

    def __len__(self) -> int:
        return len(self._reader.index)

    def describe(self, sample: int) -> str:
        """`shard: key`."""
        return self._reader.index.describe(sample)

    def image(self, sample: int) -> bytes:
        """The image's file. Raises Unusable("tar")."""
        return self._reader.image(self._reader.index.entry(sample))

    def read(self, sample: int) -> EvalSample:
        """Image, label and captions. An unusable label is negative, see `labels.label_fault`."""
        entry = self._reader.index.entry(sample)
        label = self._label_of(entry)
        captions = self._reader.captions(entry).texts if self._captions else None
        return EvalSample(entry.key, self._reader.image(entry), label, captions)

    def _label_of(self, entry: IndexEntry) -> int | NDArray[np.bool_] | None:
        if self._label == "cls":
            return entry.label
        if self._label == "npy":
            return read_label_array(self._reader.json(entry))
        return json_label(self._reader.json(entry), self._label) if self._label is not None else None


class Drawn(NamedTuple):
    """An image that is still to be decoded, the box to cut from it, and its captions as a step sees them.

    few: captions were drawn with replacement. lost: the causes of captions that cannot be used. change: for the pixels
    of the box, with `data.augment`.
    """

    key: str
    image: Encoded
    box: Box
    tokens: list[Ids]
    few: bool
    lost: list[str]
    change: Change | None = None


class _Stored(NamedTuple):
    """A sample before anything is drawn: its image and its usable captions, as tokens if it stays in memory."""

    key: str
    image: Encoded
    captions: Sequence[str | Ids]
    lost: list[str]


@dataclass
class Kind:
    """What is drawn of a sample. fixed: the whole image and evenly spread captions, the same in every epoch."""

    image_size: int
    captions: int
    crop_scale: tuple[float, float]
    seed: int
    fixed: bool = False
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augment: Augment = field(default_factory=Augment)


class Drawer:
    """Draws samples. Up to `memory` bytes of them stay in memory; what is drawn is the same without."""

    def __init__(self, index: Index, kind: Kind, tokens: CaptionTokens, decoder: Decoder, memory: int = 0) -> None:
        self.reader = SampleReader(index)
        self._kind, self._tokens, self._decoder = kind, tokens, decoder
        self._free = memory
        self._kept: dict[int, _Stored | Unusable] = {}

    def fill(self) -> None:
        """Read into memory now, so that the worker processes share it."""
        index = self.reader.index
        for shard, first, end in zip(index.shards, index.starts.tolist(), index.ends.tolist(), strict=True):
            if self._free <= 0:
                break
            with local(shard):
                for sample in range(first, end):
                    if self._free > 0:
                        self._remember(sample)

    def draw(self, sample: int, epoch: int) -> Drawn:
        """One sample at one epoch; sample + c n is its copy c, see `Mixture.find`. Raises Unusable."""
        copy, sample = divmod(sample, len(self.reader.index))
        found = self._kept.get(sample)
        if found is None:
            found = self._remember(sample) if self._free > 0 else self._read(sample)
        if isinstance(found, Unusable):
            raise Unusable(found.cause, str(found))
        key, image, captions, lost = found
        drawn_by = f"{key}\0{copy}" if copy else key
        places = self._choose(drawn_by, epoch, len(captions))
        chosen = [self._tokens.ids(text) if isinstance(text := captions[at], str) else text for at in places]
        box = self._box(drawn_by, epoch, image)
        prepared = self._decoder.prepare(image, box, self._kind.image_size)
        change = self._change(drawn_by, epoch) if self._kind.augment.active else None
        return Drawn(key, prepared, box, chosen, len(captions) < self._kind.captions, lost, change)

    def _read(self, sample: int) -> _Stored:
        entry = self.reader.index.entry(sample)
        texts, lost = self.reader.captions(entry)
        data = self.reader.image(entry)
        opened = open_image(data)
        return _Stored(entry.key, Encoded(data, opened.width, opened.height, opened), texts, lost)

    def _remember(self, sample: int) -> _Stored | Unusable:
        found: _Stored | Unusable
        try:
            read = self._read(sample)
            image = self._decoder.keep(read.image, self._kind.image_size)
            ids = [self._tokens.ids(str(text)) for text in read.captions]
            found = _Stored(read.key, image, ids, read.lost)
            self._free -= image.nbytes + sum(each.nbytes for each in ids)
        except Unusable as error:
            found = error
        self._free -= 1024  # the Python objects around the data
        self._kept[sample] = found
        return found

    def _choose(self, key: str, epoch: int, n: int) -> list[int]:
        wanted = self._kind.captions
        if self._kind.fixed:
            return [place * n // wanted for place in range(wanted)]
        return caption_choice(self._kind.seed, epoch, key, n, wanted)

    def _box(self, key: str, epoch: int, image: Encoded) -> Box:
        if self._kind.fixed:
            return 0, 0, image.width, image.height
        kind = self._kind
        return crop_box(kind.seed, epoch, key, image.width, image.height, kind.crop_scale, kind.crop_ratio)

    def _change(self, key: str, epoch: int) -> Change:
        how = self._kind.augment
        return image_change(self._kind.seed, epoch, key, how.flip, how.strengths, how.jitter, how.grey)
