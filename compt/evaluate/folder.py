"""An evaluation set in a folder with one sub-folder per class, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compt.data.decode import Unusable
from compt.data.samples import EvalSample
from compt.data.scan import IMAGE_EXTENSIONS
from compt.errors import DataError


@dataclass(frozen=True)
class ClassFolders:
    """Images with their class numbers. fingerprint: hash of the images' names and sizes in bytes."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, sample: int) -> str:
        """The path."""
        return str(self.files[sample])

    def image(self, sample: int) -> bytes:
        """The file. Raises Unusable."""
        try:
            return self.files[sample].read_bytes()
        except OSError as error:
            raise Unusable("image", str(error)) from None

    def read(self, sample: int) -> EvalSample:
        """The file and its class. The key is the path below the folder."""
        key = self.files[sample].relative_to(self.folder).as_posix()
        return EvalSample(key, self.image(sample), self.labels[sample])


def class_folders_of(data: Sequence[str], base: Path) -> Path | None:
    """The folder of class folders that the `data` of an evaluation set names; None where `data` names shards."""
    path = base / Path(data[0]).expanduser()
    return path if len(data) == 1 and is_class_folders(path) else None


def is_class_folders(path: Path) -> bool:
    """Whether `path` is a folder that has folders and no shards."""
    return path.is_dir() and not any(path.glob("*.tar")) and any(item.is_dir() for item in _visible(path))


def _visible(path: Path) -> list[Path]:
    return sorted((item for item in path.iterdir() if not item.name.startswith(".")), key=lambda item: item.name)


def read_class_folders(folder: Path) -> ClassFolders:
    """All images below the sub-folders. Classes are numbered in the order of the sub-folders' names.

    Raises DataError for a class folder without an image.
    """
    classes, files, labels = [], [], []
    digest = hashlib.sha256()
    for label, place in enumerate(item for item in _visible(folder) if item.is_dir()):
        paths = (path for path in place.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
        found = sorted(path for path in paths if path.is_file())
        if not found:
            raise DataError(f"class folder {place} has no image ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        classes.append(place.name)
        files += found
        labels += [label] * len(found)
        for path in found:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
    return ClassFolders(folder, tuple(classes), tuple(files), tuple(labels), digest.hexdigest())
