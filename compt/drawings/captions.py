"""Captions of a concept, from its names and keywords."""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CAPTIONS = 16
"""Captions of every image."""

HUMAN_CAPTIONS = 13
"""Human-written captions, at most; the rest are sentences with the name."""

PHRASES = 8
"""Names and short codes among those, at most; the rest are keywords."""


@functools.cache
def wording_table(name: str) -> dict[str, Any]:
    """Words, sentences and names of a set of drawings: `data/NAME.yaml`. All values are text."""
    text = (Path(__file__).parent / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    # With YAML's own types, the words "on" and "no" would become booleans.
    found: dict[str, Any] = yaml.load(text, Loader=yaml.BaseLoader)
    return found


@dataclass
class Wording:
    """The name of a concept, other names of it (`phrases`, best first), and keywords."""

    name: str
    phrases: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)


def plain(text: str) -> str:
    """Readable ASCII: no accents, no quotation marks, spaces for underscores."""
    text = text.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").replace("&", " and ")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"\s+", " ", text.replace("_", " ")).strip(" :")


TEXT_LIMIT = 500
"""Letters of a text that are read."""


def clean(text: str) -> str:
    """What people wrote, as `plain`: no markup, web or memory addresses, types of files or control characters."""
    # NFKC first: it turns other letters that look like < into that one.
    text = unicodedata.normalize("NFKC", html.unescape(html.unescape(text[:TEXT_LIMIT])))[:TEXT_LIMIT]
    text = re.sub(r"[<>]", " ", re.sub(r"<[^<>]{0,200}>", " ", text))
    text = "".join(" " if unicodedata.category(letter).startswith("C") else letter for letter in text)
    text = re.sub(
        r"(?i)\S*(?:@|://|www\.)\S*|\b(?:hash\()?0x[0-9a-f]+\)?|\.(?:svg|png|jpe?g|gif|eps|ai|wmf)\b", " ", text
    )
    return plain(text)


def matching_key(text: str) -> str:
    """What names of one emoji in two styles have in common: letters, digits, # and *."""
    return re.sub(r"[^a-z0-9#*]", "", plain(text).lower())


def distinct(texts: Iterable[str]) -> list[str]:
    """Texts with a letter and at least three characters, each once. Punctuation and spaces do not distinguish them."""
    kept: dict[str, str] = {}
    for text in texts:
        key = matching_key(text)
        if len(key) >= 3 and re.search(r"[a-z]", key):
            kept.setdefault(key, text)
    return list(kept.values())


def choose_captions(
    entry: Wording, frequency: Mapping[str, int], sentences: Sequence[str], kind: str
) -> tuple[str, ...]:
    """CAPTIONS different texts: names first, then keywords (the rarest first), then sentences with the name.

    frequency: number of concepts that have a keyword. kind: the words for {subgroup} in `sentences`. No caption says
    anything about the style.
    """
    names = {matching_key(phrase) for phrase in entry.phrases}
    keywords = [word for word in entry.keywords if matching_key(word) not in names]
    keywords.sort(key=lambda word: (frequency[word], word))
    phrases = entry.phrases[:PHRASES]
    own = matching_key(entry.name)
    others = distinct([*phrases, *keywords[: HUMAN_CAPTIONS - len(phrases)]])
    # The name is a caption even if it is shorter than other captions may be: 'ox'.
    captions = [entry.name, *(text for text in others if matching_key(text) != own)]
    taken = {caption.casefold() for caption in captions}
    values = {"name": entry.name, "subgroup": kind}
    if len(keywords) >= 2:
        values |= {"first": keywords[0], "second": keywords[1]}
    for template in sentences:
        if len(captions) == CAPTIONS:
            break
        if "{first}" in template and "first" not in values:
            continue
        caption = template.format(**values)
        if caption.casefold() not in taken:
            captions.append(caption)
            taken.add(caption.casefold())
    return tuple(captions)
