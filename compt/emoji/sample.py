"""The emoji set: styles, concepts and drawings, and the sample of it that comes with compt.

The sample is one lossless sheet of drawings per style and one table of concepts and captions, with the licences.
"""

from __future__ import annotations

import functools
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

SAMPLE = Path(__file__).parent / "data"

Pixels = NDArray[np.uint8]


@functools.cache
def table() -> dict[str, Any]:
    """Styles, subgroups, sentences and aliases: `data/table.yaml`."""
    # All values are text: with YAML's own types the icons "on" and "no" would become booleans.
    found: dict[str, Any] = yaml.load((SAMPLE / "table.yaml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    return found


def subgroup_text(subgroup: str) -> str:
    """A Unicode group or subgroup in words: 'animal-mammal' is 'animal mammal'."""
    words: str = table()["subgroups"].get(subgroup) or re.sub(r"[-_\s]+", " ", subgroup.replace("&", " and ")).lower()
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
        # Drop ♀, ♂ and → with the joiner before them; man and woman become person, boy and girl become child.
        neutral = re.sub(r"(-200d)?-(2640|2642|27a1)\b", "", self.id)
        return re.sub(r"\b1f46[67]\b", "1f9d2", re.sub(r"\b1f46[89]\b", "1f9d1", neutral))

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


def read_sample(folder: Path = SAMPLE) -> EmojiSet:
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
    return EmojiSet(
        CELL, {concept.id: concept for concept in concepts}, drawings, found["sources"], Counter(found["dropped"])
    )


def _from_sheet(sheet: Pixels, count: int) -> Pixels:
    """The cells of a sheet: uint8 [count, CELL, CELL, 3]."""
    rows = -(-count // COLUMNS)
    if sheet.shape != (rows * CELL, COLUMNS * CELL, 3):
        raise ValueError(f"a sheet of {sheet.shape[1]} x {sheet.shape[0]} pixels cannot have {count} drawings")
    cells = sheet.reshape(rows, CELL, COLUMNS, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3)
    return np.ascontiguousarray(cells[:count])
