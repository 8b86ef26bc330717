"""Class numbers and class names beside shards, as `compt data check` and evaluation both read them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from compt.errors import DataError

if TYPE_CHECKING:  # it loads torch, which indexing does without
    from compt.data.decode import Cause

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
"""Files beside the shards of an evaluation set, as clip_benchmark lays them out."""
NONE, NO_NUMBER = -1, -2
"""What stands for a class number that is missing, and for one that is no whole number from 0."""


def label_fault(label: int, classes: int = 0) -> Cause | None:
    """The cause for which a class number cannot be used. classes: class names, 0 if there are none."""
    if label < 0:
        return "label" if label == NONE else "label_text"
    return "label_range" if 0 < classes <= label else None


def beside(places: Iterable[Path], name: str) -> Path | None:
    """The file of this name in the first of the folders that has one."""
    return next((place / name for place in places if (place / name).is_file()), None)


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file without surrounding white space. Raises DataError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{what} {path}: is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{what} {path}: line {number} is empty")
    return [line.strip() for line in lines]


def read_classnames(path: Path) -> list[str]:
    """One name a line, in the order of the labels. Raises DataError naming file and line."""
    return read_lines(path, "class names")
