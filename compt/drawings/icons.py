"""The icon set: icons of 120 open sets with names and keywords, split by the author of the set and by concept.

A concept is what several authors draw and name alike: "arrow left". Drawings come from Iconify's collection of open
sets, keywords from Lucide, Pictogrammers and Tabler.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from compt.drawings.build import Concept, DrawingSet, Pixels, difference, lay_out
from compt.drawings.captions import Wording, choose_captions, distinct, plain, wording_table
from compt.drawings.packages import Package, fetch, read_files, render, require, resolve_icon
from compt.errors import DataError
from compt.text import terminal

SIZE = 32
"""Pixels a side."""

AUTHORS, AUTHORS_OF_ALL = 8, 3
"""Authors that draw a concept, at least; the second number with all drawings."""

HELD_OUT_DRAWINGS = 2
"""Drawings of one concept that a validation or test set gives, at most. A training set gives one."""

STYLE_SHARE = 0.05
"""Share of a set's names that end with a word before it counts as the name of a style."""

SAME = 8.0
"""Two drawings of a concept are the same if their pixels differ by less than this, of 255, in the mean."""

KEYWORD_FILES = {"lucide-static": "tags.json", "@mdi/svg": "meta.json", "@tabler/icons": "icons.json"}

_KEY = tuple[str, ...]


table = functools.partial(wording_table, "icons")
"""Packages, sets and sentences: `data/icons.yaml`."""


def sets(part: str) -> list[str]:
    """Iconify's prefixes of the sets in 'train', 'validation' or 'test'."""
    return [prefix for group in table()[part] for prefix in group]


def build(out: Path, size: int = SIZE, *, everything: bool = False) -> dict[str, Any]:
    """Download the packages, render the icons at `size` pixels, and write the set to `out`; returns its manifest.

    Writes one drawing of a concept and training set, and up to two of a held-out set; with `everything` all of them,
    and concepts that only three authors draw. Needs the packages of compt[data]. Raises DataError.
    """
    require("resvg_py")
    with tempfile.TemporaryDirectory(prefix="compt-icons-") as folder:
        paths = fetch((Package(name, **values) for name, values in table()["packages"].items()), Path(folder))
        return lay_out(read_packages(paths, size, everything=everything, progress=True), out, "npm")


@dataclass
class _Named:
    """What the keyword packages say about a concept."""

    phrases: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def add(self, texts: Iterable[str]) -> None:
        for text in map(plain, texts):
            (self.phrases if re.search(r"[-_ ]", text) else self.keywords).append(re.sub(r"[-_]", " ", text).lower())


def key_of(words: Iterable[str]) -> _KEY:
    """What names of one concept have in common: their words in any order."""
    return tuple(sorted(words))


class Names:
    """Splits the icon names of one set into words, without the words that name a style."""

    def __init__(self, names: Iterable[str]) -> None:
        split = [name.split("-") for name in names]
        last = Counter(word for words in split for word in set(words[-3:]))
        first = Counter(words[0] for words in split)
        least = STYLE_SHARE * len(split)
        possible = {word for word in table()["possible_styles"] if last[word] >= least}
        self.last = {*table()["styles"], *possible}
        self.first = {word for word in table()["prefixes"] if first[word] >= least}

    def words(self, name: str) -> tuple[str, ...]:
        """('home', 'heart') for 'home-heart-24-filled'. Empty for a name with another digit: 'home-2' is no name."""
        words = name.split("-")
        # At least one word stays: an icon called 'line' shows a line.
        while len(words) > 1 and (words[-1] in self.last or re.fullmatch(r"0\d", words[-1])):
            words.pop()
        if len(words) > 1 and words[0] in self.first:
            words.pop(0)
        return () if any(re.search(r"\d", word) or not word for word in words) else tuple(words)


def read_keywords(paths: Mapping[str, Path]) -> dict[_KEY, _Named]:
    """Phrases, keywords and categories by concept, from the keyword packages."""
    files: dict[str, Any] = {}
    for package, name in KEYWORD_FILES.items():
        found = read_files(paths[package], (name,))
        if name not in found:
            raise DataError(f"{paths[package]}: no {name} in it")
        files[package] = found[name]
    named: defaultdict[_KEY, _Named] = defaultdict(_Named)
    lucide, mdi, tabler = files.values()
    split = Names(lucide).words
    for name, tags in lucide.items():
        named[key_of(split(name))].add(tags)
    split = Names(name for name in tabler).words
    for name, item in tabler.items():
        if item["category"] != "Brand":
            one = named[key_of(split(name))]
            one.add(tag for tag in item["tags"] if isinstance(tag, str))
            one.groups.append(item["category"])
    split = Names(item["name"] for item in mdi).words
    for item in mdi:
        if "Brand / Logo" not in item["tags"]:
            one = named[key_of(split(item["name"]))]
            one.add(" ".join(split(alias)) for alias in item["aliases"] if split(alias))
            one.groups += item["tags"]
    named.pop((), None)
    return dict(named)


@dataclass
class _Set:
    """One set of icons: Iconify's file, and its icon names by concept, the plainest name first."""

    icons: dict[str, Any]
    author: str
    names: dict[_KEY, list[str]]
    orders: dict[_KEY, Counter[tuple[str, ...]]]


def _read_sets(path: Path) -> dict[str, _Set]:
    wanted = [prefix for part in ("train", "validation", "test") for prefix in sets(part)]
    files = read_files(path, {f"json/{prefix}.json" for prefix in wanted})
    found = {}
    for prefix in wanted:
        icons = files.pop(f"json/{prefix}.json", None)
        if icons is None:
            raise DataError(f"{path}: it lacks the set '{prefix}'")
        licence = icons["info"]["license"].get("spdx")
        if licence not in table()["licences"]:
            raise DataError(f"{path}: the licence of '{prefix}' is {licence}, which is not among the expected ones")
        shown = [name for name, item in icons["icons"].items() if not item.get("hidden")]
        split = Names(shown).words
        names: defaultdict[_KEY, list[str]] = defaultdict(list)
        orders: defaultdict[_KEY, Counter[tuple[str, ...]]] = defaultdict(Counter)
        for name in sorted(shown, key=lambda name: (name.count("-"), len(name), name)):
            if words := split(name):
                names[key_of(words)].append(name)
                orders[key_of(words)][words] += 1
        found[prefix] = _Set(icons, icons["info"]["author"]["name"], dict(names), dict(orders))
    return found


def _concepts(found: Mapping[str, _Set], named: Mapping[_KEY, _Named], authors: int) -> dict[_KEY, Concept]:
    """The concepts that have keywords and at least `authors` authors, in alphabetical order."""
    drawn_by: defaultdict[_KEY, set[str]] = defaultdict(set)
    orders: defaultdict[_KEY, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for one in found.values():
        for key in one.names:
            drawn_by[key].add(one.author)
            orders[key].update(set(one.orders[key]))
    chosen = sorted(key for key, names in drawn_by.items() if len(names) >= authors and key in named)
    wordings = {}
    for key in chosen:
        # The order of words that most sets use: 'arrow left', not 'left arrow'.
        by_use = sorted(orders[key].items(), key=lambda item: (-item[1], item[0]))
        names = [" ".join(words) for words, _ in by_use]
        item = named[key]
        wordings[key] = Wording(names[0], distinct([*names, *item.phrases]), distinct(sorted(set(item.keywords))))
    frequency = Counter(word for wording in wordings.values() for word in wording.keywords)
    concepts = {}
    for key, wording in wordings.items():
        group = (named[key].groups or ["Symbol"])[0]
        captions = choose_captions(wording, frequency, table()["sentences"], group.lower())
        concepts[key] = Concept(wording.name.replace(" ", "-"), wording.name, group, group, captions)
    return concepts


def read_packages(
    paths: Mapping[str, Path], size: int, *, everything: bool = False, progress: bool = False
) -> DrawingSet:
    """Render the tarballs `paths` (by package) at `size` pixels.

    A held-out drawing that is the same as one of its concept in the training set is dropped, and counted: authors copy
    from each other. Raises DataError for an unreadable package or an unexpected licence.
    """
    found = _read_sets(paths["@iconify/json"])
    concepts = _concepts(found, read_keywords(paths), AUTHORS_OF_ALL if everything else AUTHORS)
    drawings, dropped = _render(found, concepts, size, everything=everything, progress=progress)
    # The set of a style: 'ion' of 'ion' and 'ion-2'.
    prefixes = {style: style if style in found else style.rpartition("-")[0] for style in drawings}
    validation, test = (
        tuple(style for style, prefix in prefixes.items() if prefix in sets(part)) for part in ("validation", "test")
    )
    _drop_copies(drawings, {*validation, *test}, dropped)
    shown = {identity for one in drawings.values() for identity in one}
    return DrawingSet(
        "icon",
        size,
        {concept.id: concept for concept in concepts.values() if concept.id in shown},
        drawings,
        validation,
        test,
        sources=_sources(found),
        dropped=dropped,
    )


def _render(
    found: Mapping[str, _Set], concepts: Mapping[_KEY, Concept], size: int, *, everything: bool, progress: bool
) -> tuple[dict[str, dict[str, Pixels]], Counter[str]]:
    """Drawings by style and concept id, and the number of drawings left out by reason.

    The second drawing of a concept in the set 'ion' has the style 'ion-2'.
    """
    training = set(sets("train"))
    drawings: dict[str, dict[str, Pixels]] = {}
    dropped: Counter[str] = Counter()
    steps = track(
        found.items(), "rendering icons", total=len(found), disable=not progress, console=terminal(stderr=True)
    )
    for prefix, one in steps:
        most = 99 if everything else 1 if prefix in training else HELD_OUT_DRAWINGS
        for key, concept in concepts.items():
            number = 0
            for pixels, cause in _draw(one, key, size):
                if pixels is None:
                    dropped[f"{prefix}: {cause}"] += 1
                    continue
                number += 1
                style = prefix if number == 1 else f"{prefix}-{number}"
                drawings.setdefault(style, {})[concept.id] = pixels
                if number == most:
                    break
    return drawings, dropped


def _draw(one: _Set, key: _KEY, size: int) -> Iterator[tuple[Pixels | None, str]]:
    """The different drawings of a concept in one set: pixels, or None and why there are none."""
    bodies = set()
    for name in one.names.get(key, []):
        icon = resolve_icon(one.icons, name)
        if icon is None or icon.body in bodies:
            continue
        bodies.add(icon.body)
        try:
            pixels = render(icon, size)
        except ValueError:
            yield None, "not rendered"
            continue
        yield (None, "blank") if pixels.min() > 250 else (pixels, "")


def _drop_copies(drawings: dict[str, dict[str, Pixels]], held_out: set[str], dropped: Counter[str]) -> None:
    seen: defaultdict[str, list[Pixels]] = defaultdict(list)
    for style, cells in drawings.items():
        if style not in held_out:
            for identity, pixels in cells.items():
                seen[identity].append(pixels)
    stacks = {identity: np.stack(cells).astype(np.int16) for identity, cells in seen.items()}
    for style in held_out:
        cells = drawings[style]
        for identity in [identity for identity in cells if identity in stacks]:
            if difference(stacks[identity], cells[identity]) < SAME:
                del cells[identity]
                dropped["same drawing as in a training set"] += 1


def _sources(found: Mapping[str, _Set]) -> dict[str, Any]:
    """Where drawings and texts come from, for the manifest."""
    packages = {name: values["version"] for name, values in table()["packages"].items()}
    styles = {}
    for prefix, one in found.items():
        info = one.icons["info"]
        styles[prefix] = {
            "title": info["name"],
            "author": one.author,
            "license": info["license"]["spdx"],
            "license_url": info["license"].get("url"),
            "url": info["author"].get("url"),
        }
    return {"packages": packages, "styles": styles, "renderer": importlib.metadata.version("resvg_py")}
