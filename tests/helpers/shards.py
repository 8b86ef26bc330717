"""Tiny WebDatasets for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("red", "green", "blue", "cat", "dog", "house", "tree", "river", "small", "large", "round", "happy", "quiet")


def picture(seed: int, width: int, height: int, file_format: str = "PNG", mode: str = "RGB") -> bytes:
    """A smooth random image."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    blob = io.BytesIO()
    small.convert(mode).save(blob, file_format)
    return blob.getvalue()


def texts(seed: int, captions: int) -> list[str]:
    rng = np.random.default_rng([seed, 1])
    return [f"{number} " + " ".join(rng.choice(WORDS, rng.integers(1, 6))) for number in range(captions)]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A plain tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(
    key: str,
    seed: int,
    captions: int = 3,
    size: tuple[int, int] = (40, 36),
    label: int | None = None,
    extension: str = "png",
) -> list[tuple[str, bytes]]:
    """Members of one sample."""
    file_format = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[extension]
    members = [
        (f"{key}.{extension}", picture(seed, *size, file_format)),
        (f"{key}.json", json.dumps({"captions": texts(seed, captions), "class": seed % 7}).encode()),
    ]
    return members if label is None else [*members, (f"{key}.cls", str(label).encode())]


def make_shards(
    folder: Path,
    n: int = 24,
    shards: int = 3,
    captions: int = 3,
    size: tuple[int, int] = (40, 36),
    classes: int | None = None,
    extension: str = "png",
) -> list[Path]:
    """`n` samples over `shards` tars `000000.tar` ...; labels i mod `classes` when given."""
    paths = []
    for shard, ids in enumerate(np.array_split(np.arange(n), shards)):
        members = [
            member
            for i in ids.tolist()
            for member in sample(
                f"{shard:04d}{i:05d}", i, captions, size, None if classes is None else i % classes, extension
            )
        ]
        paths.append(write_tar(folder / f"{shard:06d}.tar", members))
    return paths
