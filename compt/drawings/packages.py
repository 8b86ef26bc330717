"""Drawings from packages of npm: download, read and render Iconify's icons."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import tarfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compt.drawings.build import Pixels
from compt.errors import DataError
from compt.files import sha256_file

SECONDS = 300
"""Of a download, at most."""

INSTALL = {"npm": "; install Node.js"}
FILE_LIMIT = 64 * 2**20
"""Largest JSON file that is read from a package, in bytes: four times the largest there is."""


@dataclass(frozen=True)
class Package:
    """A package of npm or Debian, pinned by version and by the sha256 of its file."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Icon:
    """One drawing: SVG body, view box (left, top, width, height), and how the rendered image is turned."""

    body: str
    box: tuple[float, float, float, float]
    flip_horizontal: bool = False
    flip_vertical: bool = False
    quarter_turns: int = 0


def require(module: str) -> Any:
    """Import a module of the extra `data`. Raises DataError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"rendering needs the Python package {module.split('.', maxsplit=1)[0].replace('_', '-')}: "
            "pip install 'compt[data]'"
        ) from error


def fetch(packages: Iterable[Package], folder: Path) -> dict[str, Path]:
    """Download packages with `npm pack` into `folder`; returns the tarballs by package name.

    Raises DataError without npm or network, and for a tarball with another sha256.
    """
    paths = {}
    for package in packages:
        wanted = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), wanted]
        path = folder / download(command, folder, "npm error").strip().splitlines()[-1]
        check_hash(path, package)
        paths[package.name] = path
    return paths


def download(command: list[str], folder: Path, mark: str) -> str:
    """Run a command that downloads into `folder`; returns what it prints. Raises DataError.

    `mark` begins the lines that say what went wrong.
    """
    shown = f"{' '.join(command[:2])} {command[-1]}"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise DataError(f"{command[0]} is not installed{INSTALL.get(command[0], '')}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{shown} took more than {SECONDS} s; is the network up?") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(mark)]
        raise DataError(f"{shown} failed ({lines[0] if lines else 'no message'})")
    return done.stdout


def check_hash(path: Path, package: Package) -> None:
    """Raises DataError unless the file is the pinned one."""
    found = sha256_file(path)
    if found != package.sha256:
        raise DataError(f"{package.name} {package.version}: sha256 is {found}, expected {package.sha256}")


def read_files(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The JSON files `names` of the package in `path`; those that it lacks are left out. Raises DataError.

    Files are read in memory: no name in a package becomes a path on disk. The tarball is read once from front to back.
    """
    found = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix("package/")
                if name not in names or name == member.name:
                    continue
                file = archive.extractfile(member)
                if file is None or member.size > FILE_LIMIT:
                    raise DataError(f"{path}: {name} is not a plain file of sensible size")
                found[name] = json.load(file)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a readable npm package ({error})") from error
    return found


def resolve_icon(icons: Mapping[str, Any], name: str) -> Icon | None:
    """The drawing with an icon name, or with the name that it is an alias of; None where there is none."""
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


def render(icon: Icon, size: int) -> Pixels:
    """uint8 [size, size, 3] on white, with the view box in the centre. Raises ValueError for a broken SVG."""
    left, top, width, height = icon.box
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}">{icon.body}</svg>'
    )
    pixels = np.asarray(render_svg(svg, size))
    if icon.flip_horizontal:
        pixels = pixels[:, ::-1]
    if icon.flip_vertical:
        pixels = pixels[::-1]
    return np.ascontiguousarray(np.rot90(pixels, -icon.quarter_turns))


def render_svg(svg: str, size: int, background: str | None = "#ffffff") -> Image.Image:
    """The image; its longer side has `size` pixels. Text is not drawn. Raises ValueError for a broken SVG."""
    png = require("resvg_py").svg_to_bytes(
        svg_string=svg, width=size, height=size, background=background, skip_system_fonts=True, dpi=96
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        return image.convert("RGB" if background else "RGBA")
