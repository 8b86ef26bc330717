"""safetensors files written and read one tensor at a time, so that no more than one tensor is in memory.

A file is an 8-byte little-endian header length, the header (JSON: for each tensor its type, shape and place), and the
tensors' bytes without gaps (https://github.com/huggingface/safetensors#format).

The library checks the header here, but neither writes nor reads tensors. Its writer needs every tensor of a file at
once. Its reader maps the file: the pages count as memory of the process, and a file that becomes shorter while it is
mapped kills the process with SIGBUS, where a read raises an error.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compt.errors import ArtefactError
from compt.files import disk_errors
from compt.weights.lazy import Weights

Shape = tuple[int, ...]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of element types."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST = max(DTYPES, key=len)
_WIDEST = 8  # bytes an element


def split_files(shapes: Mapping[str, Shape], max_bytes: int) -> list[list[str]]:
    """Which parameters go to which file: in order, up to `max_bytes` of float32 in each; a larger one has its own file.

    The result depends only on names and shapes, so every process finds the same files whatever the types are.
    """
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        grown = 4 * math.prod(shape)
        if files[-1] and size + grown > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += grown
    return files


def share_out(sizes: Sequence[int], writers: int) -> list[int]:
    """The writer of each file: the largest file first, each to the writer with the least so far."""
    loads = [0] * writers
    owner = [0] * len(sizes)
    for file in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        owner[file] = min(range(writers), key=lambda writer: (loads[writer], writer))
        loads[owner[file]] += sizes[file]
    return owner


def write_tensors(
    path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, Shape], metadata: Mapping[str, str]
) -> int:
    """Write the parameters named in `shapes` as one safetensors file and flush it; returns the bytes of the tensors.

    Takes one tensor at a time from `state` and keeps none; it may take a tensor twice whose size is no multiple of 8
    elements. The file's bytes depend on names, shapes, types, values and `metadata` only. The header is written last,
    so an unfinished file cannot be read. Raises ArtefactError for a tensor of another shape or of a type that the
    format does not have, RunError when the disk is full.
    """
    room = _header_room(shapes, metadata)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    with disk_errors(path):
        file = path.open("wb")
    try:
        with disk_errors(path):
            file.seek(8 + room)
        for name in _aligned(state, shapes):
            start, (kind, size) = end, _append(file, path, name, state, tuple(shapes[name]))
            end = start + size
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [start, end]}
        with disk_errors(path):
            file.seek(0)
            file.write(room.to_bytes(8, "little") + _json(header).ljust(room))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with disk_errors(path):
            file.close()
    return end


def _append(file: BinaryIO, path: Path, name: str, state: Mapping[str, Tensor], shape: Shape) -> tuple[str, int]:
    # In a loop of the caller, the variable would hold one tensor while the next one is made.
    tensor = state[name].detach()
    if tuple(tensor.shape) != shape and not (shape == () and tensor.numel() == 1):
        raise ArtefactError(f"the weights to write: {name} is {list(tensor.shape)} where the model has {list(shape)}")
    if tensor.dtype not in _NAMES:
        raise ArtefactError(f"the weights to write: {name} is {tensor.dtype}; a safetensors file has no such type")
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    with disk_errors(path):
        file.write(data.data)
    return _NAMES[tensor.dtype], data.nbytes


def _aligned(state: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> list[str]:
    """An order in which each tensor starts at a multiple of its element's size.

    Readers need that, and the format allows no gaps. A tensor of a multiple of 8 elements keeps any alignment for the
    next one; the few other tensors come last, wide types first.
    """
    ragged = [name for name, shape in shapes.items() if math.prod(shape) % 8]
    if len(ragged) > 1:
        ragged.sort(key=lambda name: -state[name].element_size())
    last = set(ragged)
    return [*(name for name in shapes if name not in last), *ragged]


def _header_room(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> int:
    """The most bytes that a header can take, whatever the types; a multiple of 8, because the tensors follow it."""
    most = _WIDEST * sum(math.prod(shape) for shape in shapes.values())
    entries = {
        name: {"dtype": _LONGEST, "shape": list(shape), "data_offsets": [most, most]} for name, shape in shapes.items()
    }
    return -(-len(_json({"__metadata__": dict(metadata), **entries})) // 8) * 8


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class TensorFile:
    """A safetensors file, opened and checked; `read` reads one tensor into memory of its own."""

    def __init__(self, path: Path) -> None:
        """Raises ArtefactError for a file that cannot be read or is no safetensors file."""
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np") as checked:  # the header is sound, and the tensors fill the file
                self.metadata: dict[str, str] = checked.metadata() or {}
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{path}: not a readable safetensors file ({error})") from error
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(self._bytes(8, 0), "little")
        header: dict[str, Any] = json.loads(self._bytes(length, 8))
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._entries = header

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, without reading it."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype | str:
        """The type of a tensor's elements, without reading it; the format's name of a type that is not read here."""
        kind = str(self._entries[name]["dtype"])
        return DTYPES.get(kind, kind)

    def read(self, name: str) -> Tensor:
        """A tensor, in memory that nothing else uses. Raises ArtefactError when the file changed or cannot be read."""
        entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise ArtefactError(f"{self.path}: {name} is of type {entry['dtype']}, which is not supported")
        start, end = entry["data_offsets"]
        data = torch.empty(end - start, dtype=torch.uint8)
        self._read_into(data.numpy().data, self._start + start)
        return data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def _bytes(self, size: int, start: int) -> bytes:
        data = bytearray(size)
        self._read_into(memoryview(data), start)
        return bytes(data)

    def _read_into(self, data: memoryview, start: int) -> None:
        done = 0
        try:
            while done < len(data):  # Linux reads at most 2 GiB at once
                more = os.preadv(self._descriptor, [data[done:]], start + done)
                if not more:
                    raise ArtefactError(f"{self.path}: ends early; it changed while it was read")
                done += more
        except OSError as error:
            raise ArtefactError(f"{self.path}: cannot be read ({error.strerror or error})") from error


class LazyState(Weights):
    """Parameter name -> tensor. Each access reads the tensor from its safetensors file; none is kept."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Raises ArtefactError for a file that is no safetensors file, and for a parameter that is in two files."""
        self._parts: dict[str, TensorFile] = {}
        for name in names:
            file = TensorFile(Path(folder) / name)
            for key in file:
                if key in self._parts:
                    raise ArtefactError(f"{folder}: {key} is in {self._parts[key].path.name} and in {name}")
                self._parts[key] = file

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name].read(name)

    def shape(self, name: str) -> Shape:
        """The shape of a parameter, without reading it."""
        return self._parts[name].shape(name)

    def dtype(self, name: str) -> torch.dtype | str:
        """The type of a parameter's elements, without reading it; the format's name of a type that is not read here."""
        return self._parts[name].dtype(name)

    def file_of(self, name: str) -> str:
        """The file that holds a parameter."""
        return self._parts[name].path.name
