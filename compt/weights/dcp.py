"""Folders of torch.distributed.checkpoint: `.metadata` and `__R_N.distcp` files, written by any number of ranks."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.utils import _ReaderView

from compt.errors import ArtefactError, ComptError
from compt.weights.lazy import FoundWeights, Weights, inside
from compt.weights.pickles import check_archive, load_dcp_metadata, refusal, without_costly

METADATA = ".metadata"


class _Slice(_ReaderView):
    """A part of a file. torch's own view takes a place before the end for one behind it."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return super().seek(self.len + offset) if whence == os.SEEK_END else super().seek(offset, whence)


class _DcpReader(FileSystemReader):
    """torch's reader, but it checks what it reads: `.metadata` beforehand, and each slice, a file of torch.save."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata given to the constructor."""
        return self._metadata

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        part: Any = _Slice(file, sinfo.offset, sinfo.length)
        check_archive(Path(self.path) / sinfo.relative_path, part)
        part.seek(0)
        return part  # type: ignore[no-any-return]


class DcpWeights(Weights):
    """The tensors of a folder. Numbers and pickled objects in it are never read."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self._folder = folder
        self._metadata = metadata
        self._reader = _DcpReader(folder, metadata)
        self._parts: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if type(name) is str and type(entry) is TensorStorageMetadata
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self._parts[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.read_into({name: tensor})
        return tensor

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Read the tensors of these names into the given ones, of the same shapes; into a DTensor only its own shards.

        No collective: any process may call it alone. Raises ArtefactError for a torn file; some of the tensors have
        changed then.
        """
        for name, tensor in tensors.items():
            try:
                # torch warns that it reads without a process group.
                with without_costly(), warnings.catch_warnings(action="ignore"):
                    load({name: tensor.detach()}, storage_reader=self._reader, no_dist=True)
            except CheckpointException as error:  # derives from BaseException; holds each rank's error
                met = next(met for met, _ in error.failures.values())
                if isinstance(met, ComptError):  # a signal, or what `check_archive` says
                    raise met from error
                why = (met.strerror or met) if isinstance(met, OSError) else refusal(met)
                raise ArtefactError(f"{self._folder}: cannot read {name}: {why}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without reading it."""
        return tuple(self._parts[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a parameter's elements, without reading it."""
        return self._parts[name].properties.dtype


def read_dcp(folder: Path) -> FoundWeights:
    """The tensors of a folder of torch.distributed.checkpoint. Raises ArtefactError for a forged or torn one."""
    path = inside(folder, METADATA)
    metadata = load_dcp_metadata(path)
    # torch reads this field too, so it must hold nothing from the file.
    metadata.storage_meta = StorageMeta()
    storage = metadata.storage_data
    if not isinstance(storage, dict):
        raise ArtefactError(f"{path}: says nothing of where the tensors are")
    names = set()
    for index, place in storage.items():
        plain = type(index) is MetadataIndex and type(place) is _StorageInfo and type(place.relative_path) is str
        # torch would unpack the bytes by the names in `transform_descriptors`, to any size.
        if not plain or not _counts((place.offset, place.length)) or place.transform_descriptors:
            raise ArtefactError(f"{path}: an entry of another kind among the places of the tensors")
        names.add(place.relative_path)
    files = [inside(folder, name) for name in sorted(names)]
    weights = DcpWeights(folder, metadata)
    for name in weights:
        fault = _fault(name, metadata)
        if fault:
            raise ArtefactError(f"{path}: {name}: {fault}")
    return FoundWeights(weights, [path, *files])


def _fault(name: str, metadata: Metadata) -> str | None:
    """What is wrong with the description of a tensor, if anything: its chunks must cover it once and be in files."""
    entry = metadata.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    size, properties = entry.size, entry.properties
    if type(properties) is not TensorProperties or not isinstance(properties.dtype, torch.dtype):
        return "its dtype is missing"
    if not _counts(size) or not isinstance(entry.chunks, list):
        return "its size is missing"
    boxes = []
    for chunk in entry.chunks:
        if type(chunk) is not ChunkStorageMetadata or not _counts(chunk.offsets) or not _counts(chunk.sizes):
            return "a chunk of another kind"
        if not len(chunk.offsets) == len(chunk.sizes) == len(size):
            return "a chunk of another number of dimensions"
        if any(start + count > whole for start, count, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)):
            return "a chunk that reaches out of it"
        if MetadataIndex(name, chunk.offsets) not in metadata.storage_data:
            return f"its part at {list(chunk.offsets)} is in no file"
        boxes.append([(start, start + count) for start, count in zip(chunk.offsets, chunk.sizes, strict=True)])
    if _overlap(boxes) or sum(math.prod(end - start for start, end in box) for box in boxes) != math.prod(size):
        return "its parts do not make it up"
    return None


def _overlap(boxes: list[list[tuple[int, int]]]) -> bool:
    boxes = sorted(boxes)
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            if one and other[0][0] >= one[0][1]:
                break  # the boxes are sorted: all later ones begin behind this one too
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True)):
                return True
    return False


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)
