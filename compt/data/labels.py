"""Class numbers and class names beside shards, as `compt data check` and evaluation both read them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compt.errors import ComptError, DataError
from compt.files import read_text

if TYPE_CHECKING:  # it loads torch, which indexing does without
    from compt.data.decode import Cause

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
"""Files beside the shards of an evaluation set, as clip_benchmark lays them out."""
NONE, NO_NUMBER = -1, -2
"""What stands for a class number that is missing, and for one that is no whole number from 0."""


_CODE = re.compile(r"""lambda\b.*|(\w+\s*=)?[\[\]{}(),\s]+|[\[{(]*(\d+\s*:\s*)?[fru]*(["']).*\3[\])}]*,?""")
_NUMBERED = re.compile(r"([0-9]+)(?:\s*[:;,.)|=-]\s*|\s+)(\S.*)")
WNID = re.compile(r"n[0-9]{8}(?![0-9])")
"""An identifier of WordNet's nouns, such as ImageNet's folders have: n01440764."""


def label_fault(label: int | NDArray[np.bool_], classes: int = 0, from_one: bool = False) -> Cause | None:
    """The cause for which a class number, or bool [C] of several classes, cannot be used.

    classes: class names, 0 if there are none. from_one: all numbers are too large by one.
    """
    if isinstance(label, np.ndarray):
        return "label_range" if 0 < classes != len(label) else None
    if from_one and label > 0:
        return "label_shift"
    if label < 0:
        return "label" if label == NONE else "label_text"
    return "label_range" if 0 < classes <= label else None


def read_label_array(data: bytes) -> NDArray[np.bool_] | int:
    """The classes of a sample with several: bool [C] from a `.npy` as clip_benchmark writes it.

    `NONE` without data, `NO_NUMBER` for data that are not one row of numbers.
    """
    if not data:
        return NONE
    try:
        values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ComptError:  # a signal
        raise
    except Exception:  # numpy reads the header as code of Python, and raises whatever its bytes lead to
        return NO_NUMBER
    if values.ndim != 1 or values.dtype.kind not in "buif":
        return NO_NUMBER
    return np.asarray(values > 0)


def beside(places: Iterable[Path], name: str) -> Path | None:
    """The file of this name in the first of the folders that has one."""
    return next((place / name for place in places if (place / name).is_file()), None)


def read_plain(path: Path, what: str) -> str:
    """The text of a file. Raises DataError that names it."""
    try:
        return read_text(path).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file without surrounding white space. Raises DataError naming file and line."""
    lines = read_plain(path, what).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{what} {path}: is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{what} {path}: line {number} is empty")
    lines = [line.strip() for line in lines]
    if all(map(_CODE.fullmatch, lines)):
        raise DataError(f"{what} {path}: line 1 '{lines[0]}' is code; write plain text, without quotes and commas")
    return lines


def read_classnames(path: Path) -> list[str]:
    """One name a line, in the order of the labels. Raises DataError naming file and line."""
    names = read_lines(path, "class names")
    more = (
        "begins with its number"
        if are_numbered(names) or are_numbered(names[1:])
        else "begins with an identifier of WordNet"
        if all(map(WNID.match, names))
        else "has a tab"
        if all("\t" in name for name in names)
        else ""
    )
    if more:
        raise DataError(
            f"class names {path}: each line {more}, such as '{names[-1]}'; write the name alone, as it is to be read "
            "in a prompt"
        )
    return names


def are_numbered(names: Sequence[str]) -> bool:
    """Whether each name has its number in front, from 0 or 1: `1 cat`, `2 dog`, but not `1 star`, `2 stars`."""
    found = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    numbers = [int(match[1]) for match in found]
    distinct = len({match[2].removesuffix("s") for match in found}) == len(names)
    return len(names) > 1 and distinct and numbers in ([*range(len(names))], [*range(1, len(names) + 1)])
