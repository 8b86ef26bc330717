"""What the emoji data set consists of: concepts, drawings, styles and where they come from."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

CAPTIONS = 16
"""Captions of every image."""

HELD_OUT_SHARE = 0.105
"""Share of concept families that no training shard shows."""

VALIDATION_STYLE = "fxemoji"
"""The smallest set, and drawn by other hands than the rest: it costs the training data least."""

TEST_STYLE = "twemoji"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Style:
    """One drawing style: an Iconify package, pinned by version and by the sha256 of its tarball."""

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


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style(
            "noto",
            "1.2.9",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
            "Apache-2.0",
            "Noto Emoji",
            "Google Inc",
            "https://github.com/googlefonts/noto-emoji",
        ),
        Style(
            "noto-v1",
            "1.2.5",
            "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
            "Apache-2.0",
            "Noto Emoji (v1)",
            "Google Inc",
            "https://github.com/googlefonts/noto-emoji",
        ),
        Style(
            "fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
            "MIT",
            "Fluent Emoji Flat",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
        ),
        Style(
            "openmoji",
            "1.2.29",
            "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
            "CC-BY-SA-4.0",
            "OpenMoji",
            "OpenMoji",
            "https://github.com/hfg-gmuend/openmoji",
        ),
        Style(
            "emojione",
            "1.2.3",
            "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
            "CC-BY-4.0",
            "Emoji One (Colored) 2.3.0",
            "Emoji One",
            "https://github.com/EmojiTwo/emojitwo",
        ),
        Style(
            "fxemoji",
            "1.2.2",
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
            "Apache-2.0",
            "Firefox OS Emoji",
            "Mozilla",
            "https://github.com/mozilla/fxemoji",
        ),
        Style(
            "twemoji",
            "1.2.5",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
            "CC-BY-4.0",
            "Twitter Emoji",
            "Twitter",
            "https://github.com/jdecked/twemoji",
        ),
    )
}


@dataclass(frozen=True)
class Concept:
    """One emoji in all its styles. `id` is its code points in hexadecimal, without U+FE0F, joined by '-'."""

    id: str
    name: str
    group: str
    subgroup: str
    captions: tuple[str, ...]

    @property
    def family(self) -> str:
        """The id with gender and direction taken out: 'man running', 'woman running facing right' are one family."""
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
        """Whether no training shard may show this concept. Decided by the family's hash alone."""
        digest = hashlib.sha256(f"held out: {self.family}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


@dataclass
class EmojiSet:
    """Drawings uint8 [size, size, 3] on white by style and concept id, and the concepts that they show."""

    size: int
    concepts: dict[str, Concept]
    drawings: dict[str, dict[str, Pixels]]
    sources: dict[str, Any] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
