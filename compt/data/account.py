"""One account of what tars, folders and tables hold: used, or not used, with the cause and the fix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from compt.text import TextTable


class Unused(NamedTuple):
    """Why something is not used.

    unit: what is counted. harmless: nothing that a set needs is lost, so `remedy` is not shown.
    """

    unit: str
    text: str
    remedy: str = ""
    harmless: bool = False


JOINED = "by "
"""What precedes the name of a way to join, in the units of `Account.used`."""
UNIT_NAMES = {
    "file": "files in folders",
    "shard": "shards",
    "member": "files in the shards",
    "row": "rows of the table",
    "join": "samples sought in the table",
    "sample": "samples",
    "label": "class numbers",
    "caption": "captions",
}
"""What is counted, in the order of reading. A join is a sample for which a row of the table of captions is sought."""

CAUSES: dict[str, Unused] = {
    # In a folder of shards.
    "sub_folder": Unused("file", "tar in a sub-folder", "name it, too: FOLDER/**/*.tar in quotation marks"),
    "packed": Unused("file", "compressed shard", "unpack it: gunzip -k, zstd -d, unxz -k or bunzip2 -k"),
    "no_shard": Unused("file", "file that is not a .tar", harmless=True),
    # In class folders.
    "hidden_file": Unused("file", "hidden file, or file in a hidden or system folder", harmless=True),
    "beside": Unused("file", "file beside the class folders", harmless=True),
    "not_image": Unused("file", "file that is not an image by its name", "name images .jpg, .png, .webp …"),
    "foreign_file": Unused("file", "image file of a format that is not read", "convert it to .jpg, .png or .webp"),
    "not_file": Unused("file", "broken link, or not a plain file", "fix the link, or remove it"),
    "circle": Unused("file", "link to a folder above it", "remove the link"),
    "outside": Unused("file", "image outside the class folders", "move it to the folder of its class"),
    # In a folder to pack.
    "second_file": Unused("file", "second image of a name", "rename it; jpg, png, jpeg, webp come first"),
    "no_owner": Unused(
        "file", "text that belongs to no image by its name", "name it like its image, with the ending .txt or .json"
    ),
    "no_row": Unused("file", "file of an image that the table does not name", harmless=True),
    "other_file": Unused("file", "file of another kind", harmless=True),
    # Of a shard as a whole.
    "cut": Unused("shard", "cut or damaged tar, not read past the damage", "copy the shard again"),
    "joined": Unused("shard", "data after the end of the tar", "join tars with tar --concatenate, not with cat"),
    # Of a member of a tar.
    "folder": Unused("member", "folder", harmless=True),
    "hidden": Unused("member", "hidden or macOS file (._x, .DS_Store, __MACOSX)", harmless=True),
    "metadata": Unused("member", "metadata of WebDataset (__x__), or the label of a tar", harmless=True),
    "other": Unused("member", "file of another kind", harmless=True),
    "second_text": Unused("member", "text file beside captions that come first", harmless=True),
    "link": Unused("member", "link, not a plain file", "pack with tar --dereference --hard-dereference"),
    "special": Unused("member", "sparse file or device", "pack plain files, without tar --sparse"),
    "bare": Unused("member", "name without an extension", "name files KEY.jpg, KEY.json, KEY.txt, KEY.cls"),
    "dots": Unused(
        "member", "key with dots (the key ends at the first dot)", r"rename files: rename 's/\.(?=[^\/]*\.)/_/g' *"
    ),
    "second_image": Unused("member", "second image of a key", "keep one; jpg, png, jpeg, webp come first"),
    "no_image": Unused("member", "file of a key without an image", "add the image, or remove the file"),
    "foreign": Unused("member", "image of a format that is not read", "convert it to .jpg, .png or .webp"),
    "text_ending": Unused("member", "text with another ending, of a sample without captions", "name it KEY.txt"),
    "apart": Unused("member", "members of a sample are not together", "pack with tar --sort=name"),
    "duplicate": Unused("member", "file of a key that was read before", "give each sample a key of its own"),
    "large": Unused("member", "text of more than 16 MiB", "name it otherwise, or cut it"),
    "json": Unused("member", ".json that is damaged, not UTF-8, or no object", "write it again: json.dumps of a dict"),
    "cls": Unused("member", ".cls without a whole number from 0", "write the class number as digits"),
    "lost": Unused("member", "file of the sample at which the tar is cut", "copy the shard again"),
    # Of a row of a table of captions.
    "row_cells": Unused("row", "row that does not fit the header, or is no JSON object", "write the table again"),
    "row_key": Unused("row", "row without key, URL and file name", "fill the column, or remove the row"),
    "row_text": Unused("row", "row without a caption", "fill the columns, or name others: data.caption_columns"),
    "row_alone": Unused("row", "row that matches no sample", "compare its keys, URLs and file names with the shards'"),
    # Of a sample that is sought in a table.
    "unmatched": Unused("join", "sample that matches no row; it keeps its own captions", "complete the table"),
    # Of a sample.
    "image": Unused("sample", "image that cannot be decoded", "remove the sample, or get the image again"),
    "caption": Unused(
        "sample", "sample without a usable caption", "add captions, or name columns: data.caption_columns"
    ),
    "tar": Unused("sample", "sample in a shard that has changed since it was indexed", "index the shards again"),
    "label": Unused("label", "sample without a class number", "write it into KEY.cls"),
    "label_text": Unused("label", "class number that is not a whole number from 0", "write it as digits"),
    "label_range": Unused("label", "class number beyond classnames.txt", "complete classnames.txt, or fix KEY.cls"),
    "label_shift": Unused("label", "class number of a set that counts them from 1", "count class numbers from 0"),
    # Of a caption.
    "empty": Unused("caption", "caption that is empty or invisible", "remove it"),
    "missing": Unused("caption", "caption, not in a list, that only says nan, None or NULL", "leave it empty"),
    "not_text": Unused("caption", "caption that is not text", "write captions as strings"),
    "encoding": Unused("caption", "caption that is not UTF-8", "convert it: iconv -f LATIN1 (or other) -t UTF-8"),
}


@dataclass
class Account:
    """What was read and what became of it.

    used: by unit. unused: by cause. images: images among the unused members, by cause. first: the place of the first of
    each cause.
    """

    used: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def lose(self, cause: str, where: str, count: int = 1, *, images: int = 0) -> None:
        """Count what is not used for `cause`, a name in `CAUSES`."""
        self.unused[cause] += count
        if images:
            self.images[cause] += images
        if cause not in self.first:
            self.first[cause] = where.encode("utf-8", "backslashreplace").decode()

    def add(self, other: Account, place: str = "") -> None:
        """Add what was read later. `place` comes before the places of `other`."""
        self.used.update(other.used)
        self.unused.update(other.unused)
        self.images.update(other.images)
        for cause, where in other.first.items():
            self.first.setdefault(cause, f"{place}{where}")

    def lost(self, unit: str) -> int:
        """What was not used of a unit."""
        return sum(count for cause, count in self.unused.items() if CAUSES[cause].unit == unit)

    def read(self, unit: str) -> int:
        """What was read of a unit: used and unused."""
        return self.used[unit] + self.lost(unit)

    def lost_share(self, unit: str) -> float:
        """The share of a unit that was not used, 0 where nothing was read."""
        return self.lost(unit) / max(self.read(unit), 1)

    @property
    def faults(self) -> list[str]:
        """The causes that lose something, in the order of `CAUSES`."""
        return [cause for cause, known in CAUSES.items() if self.unused[cause] and not known.harmless]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: dict(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Account:
        """What `to_json` gave. A cause that this version does not know is left out."""
        used = Counter({name: int(n) for name, n in values["used"].items()})
        unused, images = (
            Counter({cause: int(n) for cause, n in values[part].items() if cause in CAUSES})
            for part in ("unused", "images")
        )
        return cls(used, unused, images, {cause: str(at) for cause, at in values["first"].items() if cause in CAUSES})

    def tables(self, title: str = "What was read", units: Iterable[str] = tuple(UNIT_NAMES)) -> list[TextTable]:
        """What was read, and what was not used, with the cause and the fix."""
        shown = [unit for unit in units if self.read(unit)]
        rows = [
            [UNIT_NAMES[unit], *(f"{n:,}" for n in (self.read(unit), self.used[unit], self.lost(unit)))]
            for unit in shown
        ]
        joins = [f"{count:,} {name}" for name, count in self.used.items() if name.startswith(JOINED)]
        notes = [f"Samples joined with the table: {', '.join(joins)}."] if joins else []
        tables = [TextTable(title, ["", "read", "used", "not used"], rows, notes)]
        causes = [cause for cause, known in CAUSES.items() if self.unused[cause] and known.unit in shown]
        causes.sort(key=lambda cause: CAUSES[cause].harmless)  # what costs something comes first
        if causes:
            rows = [
                [
                    CAUSES[cause].text,
                    self._count(cause),
                    self.first.get(cause, ""),
                    CAUSES[cause].remedy or "(harmless)",
                ]
                for cause in causes
            ]
            tables.append(TextTable("Not used", ["cause", "count", "the first", "what to do"], rows))
        return tables

    def line(self, causes: Iterable[str] | None = None) -> str:
        """The counts of some causes, or of all that lose something, on one line."""
        chosen = self.faults if causes is None else causes
        return "; ".join(f"{CAUSES[cause].text}: {self._count(cause)}" for cause in chosen)

    def _count(self, cause: str) -> str:
        images = self.images[cause]
        inside = "" if not images else f" ({images:,} {'image' if images == 1 else 'images'})"
        return f"{self.unused[cause]:,}{inside}"
