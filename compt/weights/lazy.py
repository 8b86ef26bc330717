"""Weights of a source: names and shapes are known, tensors are read one at a time."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compt.errors import ArtefactError
from compt.files import leads_out, sha256_file
from compt.models.preprocess import AS_OPENAI, Preprocess
from compt.models.presets import ModelSpec
from compt.models.states import State

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types that weights may have."""


class Weights(State):
    """The parameters of a source, on the CPU. Names, shapes and types are known without reading."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype | str:
        """The type of a parameter's elements, without reading it; the source's name of a type that torch lacks."""


@dataclass(frozen=True)
class FoundWeights:
    """What a path holds: its weights under the source's own names, its files, and what a config beside them says."""

    weights: Weights
    files: Sequence[Path]
    spec: ModelSpec | None = None
    preprocess: Preprocess = AS_OPENAI


class Tensors(Weights):
    """Tensors of an open file. They are views of the file; each access returns a copy."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._parts: dict[str, Tensor] = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name].clone(memory_format=torch.contiguous_format)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a parameter's elements."""
        return self._parts[name].dtype


@dataclass(frozen=True)
class TensorSource:
    """One parameter, made of one or several of the source's.

    As they are, transposed, stacked along dimension 0, in another shape, the rows from `first` on, or zeros of the
    same type.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    change: Literal["same", "transpose", "stack", "reshape", "rows", "zeros"] = "same"
    first: int = 0


class View(Weights):
    """Weights under other names. Each access makes the tensor from the source's."""

    def __init__(self, weights: Weights, parts: Mapping[str, TensorSource]) -> None:
        self._weights = weights
        self._parts: dict[str, TensorSource] = dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        if part.change == "stack":
            return torch.cat([self._weights[source] for source in part.names])
        tensor = self._weights[part.names[0]]
        if part.change == "transpose":
            return tensor.T.contiguous()
        if part.change == "rows":
            return tensor[part.first : part.first + part.shape[0]].clone()
        if part.change == "zeros":
            return tensor.new_zeros(part.shape)
        return tensor.reshape(part.shape)

    def dtype(self, name: str) -> torch.dtype | str:
        """The type of a parameter's elements, without reading it; of several types the first that is no float."""
        found = [self._weights.dtype(source) for source in self._parts[name].names]
        return next((dtype for dtype in found if dtype not in FLOATS), found[0])


def plain_name(folder: Path, name: Any) -> str:
    """`name`, if it is a file name that cannot lead out of its folder. Raises ArtefactError otherwise."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise ArtefactError(f"{folder}: {name!r} is not a plain file name")
    return name


def check_link(path: Path) -> None:
    """Raise ArtefactError for a link to a file in another folder (`compt.files.leads_out`)."""
    if leads_out(path):
        raise ArtefactError(f"{path}: a link out of its folder, to {path.resolve()}; it is not followed")


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises ArtefactError where it is missing, or is a link out of the folder."""
    path = folder / plain_name(folder, name)
    check_link(path)
    if not path.is_file():
        raise ArtefactError(f"{path}: missing")
    return path


def digest_of(files: Sequence[Path]) -> str:
    """One SHA-256 for the contents of `files`, in the order of their names. Raises ArtefactError.

    A process reads each file once, and again only after it has changed.
    """
    lines = []
    for path in sorted(files, key=lambda path: path.name):
        try:
            found = path.stat()
            lines.append(_sha256(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns))
        except OSError as error:
            raise ArtefactError(f"{path}: cannot be read ({error.strerror or error})") from error
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def _sha256(path: Path, *identity: int) -> str:
    return sha256_file(path)
