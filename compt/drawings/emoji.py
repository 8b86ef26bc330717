"""The emoji set: colour emoji of seven open styles, 16 English captions each, from the sample that comes with compt.

The sample is one lossless sheet of drawings per style and one table of concepts and captions, with the licences.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compt.drawings.build import Concept, DrawingSet, Pixels, lay_out
from compt.drawings.captions import wording_table
from compt.errors import DataError

VALIDATION_STYLE = "fxemoji"
"""The smallest style, and drawn by other people than the rest: it costs the training data least."""

TEST_STYLE = "twemoji"

CELL = 32
COLUMNS = 48
"""Drawings in a row of a sheet."""
CONCEPTS = "concepts.json.gz"

SAMPLE = Path(__file__).parent / "data"


table = functools.partial(wording_table, "emoji")
"""Styles, subgroups, sentences and aliases: `data/emoji.yaml`."""


def build(out: Path) -> dict[str, Any]:
    """Write the set to `out` from the sample, and return its manifest, as in `lay_out`. Raises DataError."""
    return lay_out(read_sample(), out, "sample")


def read_sample(folder: Path = SAMPLE) -> DrawingSet:
    """Read the sample that `sample/emoji/render.py` wrote. Raises DataError if it is missing or damaged."""
    try:
        found = json.loads(gzip.decompress((folder / CONCEPTS).read_bytes()))
        concepts = [Concept(i, name, group, sub, tuple(texts)) for i, name, group, sub, texts in found["concepts"]]
        drawings: dict[str, dict[str, Pixels]] = {}
        for name, positions in found["styles"].items():
            with Image.open(folder / f"{name}.webp") as image:
                sheet = np.asarray(image.convert("RGB"))
            cells = _from_sheet(sheet, len(positions))
            drawings[name] = {concepts[p].id: cell for p, cell in zip(positions, cells, strict=True)}
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: this file of the emoji sample is missing; install compt again") from error
    except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{folder}: the emoji sample is damaged ({error})") from error
    return emoji_set(CELL, {concept.id: concept for concept in concepts}, drawings, found["sources"], found["dropped"])


def emoji_set(
    size: int,
    concepts: dict[str, Concept],
    drawings: dict[str, dict[str, Pixels]],
    sources: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
) -> DrawingSet:
    """The set of these drawings, with the split and the words that every emoji set has."""
    return DrawingSet(
        "emoji",
        size,
        concepts,
        drawings,
        (VALIDATION_STYLE,),
        (TEST_STYLE,),
        table()["subgroups"],
        dict(sources or {}),
        Counter(dropped or {}),
    )


def _from_sheet(sheet: Pixels, count: int) -> Pixels:
    """The cells of a sheet: uint8 [count, CELL, CELL, 3]."""
    rows = -(-count // COLUMNS)
    if sheet.shape != (rows * CELL, COLUMNS * CELL, 3):
        raise ValueError(f"a sheet of {sheet.shape[1]} x {sheet.shape[0]} pixels cannot have {count} drawings")
    cells = sheet.reshape(rows, CELL, COLUMNS, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3)
    return np.ascontiguousarray(cells[:count])
