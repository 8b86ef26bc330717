"""Tars of photographs to measure loaders with: `python -m benchmarks.data.photos DEST`.

Cuts crops from the photographs of a folder, or of two packages of Debian, and writes them as CC3M has its images: JPEGs
of quality 90 with a short side of 256 to 500 pixels, and one caption each. The same photographs and seed give the same
crops and captions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.common import one_line
from compt.data.tokens import clip_tokenizer
from compt.errors import DataError, RunError

PACKAGES = ("lomiri-wallpapers-16.04", "mate-backgrounds")
"""Packages of Debian with photographs."""
SHORT_SIDES = (256, 300, 400, 500)
ASPECTS = (1.0, 4 / 3, 3 / 2, 3 / 4)
QUALITY = 90
_SMALLEST_FILE = 100_000  # bytes; smaller ones are icons and drawings


def fetch(folder: Path) -> None:
    """Download `PACKAGES` with apt-get and unpack them into `folder`. Raises RunError."""
    try:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RunError(
            f"cannot fetch {' and '.join(PACKAGES)} ({error}). On Debian, `apt-get update` may help; elsewhere give a "
            "folder of photographs with --from"
        ) from None


def photographs(folder: Path) -> list[Path]:
    """The JPEGs below `folder`, in the order of their names. Raises DataError where there is none."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg") and not path.is_symlink() and path.stat().st_size > _SMALLEST_FILE
    )
    if not found:
        raise DataError(f"{folder} has no photographs: JPEGs of more than {_SMALLEST_FILE // 1000} kB")
    return found


def _crop(photograph: Image.Image, draw: random.Random) -> bytes:
    """A JPEG of a part of the photograph, scaled down by up to 3."""
    short, aspect = draw.choice(SHORT_SIDES), draw.choice(ASPECTS)
    width, height = (round(short * aspect), short) if aspect >= 1 else (short, round(short / aspect))
    scale = draw.uniform(1, 3)
    scale = min(scale, photograph.width / width, photograph.height / height)
    across, down = int(width * scale), int(height * scale)
    left, top = draw.randint(0, photograph.width - across), draw.randint(0, photograph.height - down)
    part = photograph.crop((left, top, left + across, top + down)).resize((width, height), Image.Resampling.BICUBIC)
    blob = io.BytesIO()
    part.save(blob, "JPEG", quality=QUALITY)
    return blob.getvalue()


def make(source: Path, destination: Path, images: int, shards: int, seed: int = 0) -> None:
    """Write `images` crops of the photographs in `source` into the tars 00000.tar, 00001.tar, ... of `destination`.

    Raises DataError where `source` has no photographs.
    """
    draw, files = random.Random(seed), photographs(source)
    # Real words, frequent ones more often, as the tokenizer's table has them in the order of their frequency.
    words = [word[:-4] for word in clip_tokenizer().encoder if word.endswith("</w>") and word[:-4].isalpha()]
    words = [word for word in words if word.isascii() and len(word) > 2]
    destination.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(destination / f"{at:05d}.tar", "w")) for at in range(shards)]
        for at, path in enumerate(files):
            with Image.open(path) as opened:
                photograph = opened.convert("RGB")
            for number in range(at, images, len(files)):
                caption = " ".join(words[int(len(words) * draw.random() ** 3)] for _ in range(draw.randint(5, 16)))
                for name, data in (("jpg", _crop(photograph, draw)), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{name}")
                    member.size = len(data)
                    tars[number % shards].addfile(member, io.BytesIO(data))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="folder for the tars")
    parser.add_argument("--from", type=Path, dest="source", help="folder of photographs (default: Debian's packages)")
    parser.add_argument("--images", type=int, default=4096, help="number of crops (default: 4096, 0.2 GB)")
    parser.add_argument("--shards", type=int, default=16, help="number of tars (default: 16)")
    options = parser.parse_args(argv)
    with one_line(), tempfile.TemporaryDirectory(prefix="compt-photos-") as folder:
        if options.source is None:
            fetch(Path(folder))
        make(options.source or Path(folder), options.dest, options.images, options.shards)
    print(f"written: {options.dest}")


if __name__ == "__main__":
    main()
