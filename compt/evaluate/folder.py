"""A folder with one sub-folder a class as an evaluation set, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from compt.data.batch import EvalBatch
from compt.data.decode import Pixels, Unusable, evaluation_pixels
from compt.data.scan import IMAGE_EXTENSIONS
from compt.errors import DataError


@dataclass(frozen=True)
class ClassFolders:
    """Images with the number of their class. fingerprint: hash of the images' names and sizes in bytes."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    fingerprint: str


def class_folders_of(data: Sequence[str], base: Path) -> Path | None:
    """The folder of class folders that the `data` of an evaluation set names; None where it names shards."""
    path = base / Path(data[0]).expanduser()
    return path if len(data) == 1 and is_class_folders(path) else None


def is_class_folders(path: Path) -> bool:
    """Whether `path` is a folder of folders and no folder of shards."""
    return path.is_dir() and not any(path.glob("*.tar")) and any(item.is_dir() for item in _visible(path))


def _visible(path: Path) -> list[Path]:
    return sorted((item for item in path.iterdir() if not item.name.startswith(".")), key=lambda item: item.name)


def read_class_folders(folder: Path) -> ClassFolders:
    """All images below the sub-folders; classes are numbered in the order of the sub-folders' names.

    Raises DataError for a class folder without an image.
    """
    classes, files, labels = [], [], []
    digest = hashlib.sha256()
    for label, place in enumerate(item for item in _visible(folder) if item.is_dir()):
        paths = (path for path in place.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
        found = sorted(path for path in paths if path.is_file())
        if not found:
            raise DataError(f"class folder {place} holds no image ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        classes.append(place.name)
        files += found
        labels += [label] * len(found)
        for path in found:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
    return ClassFolders(folder, tuple(classes), tuple(files), tuple(labels), digest.hexdigest())


class _Reads(Dataset["Pixels | str"]):
    def __init__(self, data: ClassFolders, image_size: int) -> None:
        self._data, self._size = data, image_size

    def __getitem__(self, sample: int) -> Pixels | str:
        """uint8 [3, H, W], or why there is none."""
        path = self._data.files[sample]
        try:
            return evaluation_pixels(path.read_bytes(), self._size)
        except (Unusable, OSError) as error:
            return f"{path}: image: {error}"


@dataclass(frozen=True)
class FolderLoader:
    """This rank's share of the images, each exactly once over all ranks; it can be iterated again."""

    data: ClassFolders
    image_size: int
    batch: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0

    def __iter__(self) -> Iterator[EvalBatch]:
        own = range(self.rank, len(self.data.files), self.world_size)
        parts = [list(own[start : start + self.batch]) for start in range(0, len(own), self.batch)]
        loader: DataLoader[Pixels | str] = DataLoader(
            _Reads(self.data, self.image_size),
            batch_sampler=parts,
            collate_fn=list,
            num_workers=self.workers,
            multiprocessing_context="fork" if self.workers else None,
        )
        for ids, reads in zip(parts, loader, strict=True):
            good = [(sample, pixels) for sample, pixels in zip(ids, reads, strict=True) if not isinstance(pixels, str)]
            bad = [reason for reason in reads if isinstance(reason, str)]
            size = self.image_size
            images = np.stack([pixels for _, pixels in good]) if good else np.zeros((0, 3, size, size), np.uint8)
            yield EvalBatch(
                torch.from_numpy(images),
                [self.data.files[sample].relative_to(self.data.folder).as_posix() for sample, _ in good],
                [sample for sample, _ in good],
                torch.tensor([self.data.labels[sample] for sample, _ in good], dtype=torch.int64),
                bad=bad,
                skipped={"image": len(bad)} if bad else {},
            )
