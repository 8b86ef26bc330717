"""Reading other programs' pickles without running their code: only listed names are looked up.

torch's restricted unpickler (`weights_only=True`) reads files of `torch.save`. Everything else is read by the unpickler
that is written in Python, with a list of names and of instructions. `Inert` replaces classes that a checkpoint mentions
and no weight needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from compt.errors import ArtefactError, ComptError, first_line

_DEEPEST, _MOST = 20, 10_000_000
"""Levels of dicts in dicts that are searched for tensors, and entries: those of a dict that two hold count twice."""
_INERT_PACKAGES = ("deepspeed.",)
_INERT_NAMES = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
)
_METADATA_NAMES = {
    (thing.__module__, thing.__name__): thing
    for thing in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        filesystem._StoragePrefix,
        torch.Size,
        torch.serialization._get_layout,
        OrderedDict,
    )
}


_COSTLY = ("builtins.bytearray",)


class Inert:
    """Replaces an object whose class is not looked up. It takes any arguments and any state, and does nothing."""

    def __new__(cls, *arguments: Any) -> Inert:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_torch_file(path: Path) -> Any:
    """The contents of a file of `torch.save`: dicts, lists, numbers, strings, and tensors that stay on disk until used.

    Files of torch before 1.6 are read into memory. Raises ArtefactError for a file that refers to classes or functions
    that no weights need (none of them is called), for a torn file, and for a TorchScript archive.
    """
    zipped = check_archive(path)
    try:
        inert = _inert_names(path) if zipped else list(_INERT_NAMES)
        stand_ins: list[Any] = [(_stand_in(name), name) for name in inert]
        with without_costly(), torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except OSError as error:
        raise ArtefactError(f"{path}: {error.strerror or error}") from error
    except ComptError:  # a signal
        raise
    except Exception as error:  # a torn or forged file raises whatever its bytes lead to
        raise ArtefactError(f"{path}: {refusal(error)}") from error


class _Refused(Exception):
    """What no file needs, and could run code or take memory or time without end."""


class _Memo(dict[int, Any]):
    """What a pickle refers to again, by number.

    Refuses tuples that hold one another so often that to hash one, as the key of a dict, would not end: 40 tuples, each
    of which holds the one before twice, are 100 bytes and 2**40 steps.
    """

    def __init__(self) -> None:
        super().__init__()
        # Each tuple is kept, so that no other one gets its id.
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._most = 1_000_000

    def __setitem__(self, place: int, value: Any) -> None:
        if type(value) in _HASHED:
            self._size(value)
        super().__setitem__(place, value)

    def _size(self, value: Any) -> int:
        """Values in `value`; a nested tuple counts once per reference."""
        if id(value) not in self._sizes:
            parts = value if type(value) is tuple else vars(value).values()
            size = sum(self._size(part) if type(part) in _HASHED else 1 for part in parts)
            self._most += len(parts)  # what is held once is no more than the file
            if size > self._most:
                raise _Refused("it holds tuples that hold one another too often")
            self._sizes[id(value)] = value, size
        return self._sizes[id(value)][1]


_HASHED = (tuple, metadata.MetadataIndex)
"""Types whose hash is that of what they hold."""
_TORCHS = torch._weights_only_unpickler.Unpickler


class _TorchUnpickler(_TORCHS):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.memo = _Memo()


@contextlib.contextmanager
def without_costly() -> Iterator[None]:
    """Take from torch's unpickler what fills memory or time of any size at the word of a few bytes.

    No weights need it.
    """
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    taken = {name: allowed.pop(name) for name in _COSTLY if name in allowed}
    torch._weights_only_unpickler.Unpickler = _TorchUnpickler  # type: ignore[misc]
    try:
        yield
    finally:
        torch._weights_only_unpickler.Unpickler = _TORCHS  # type: ignore[misc]
        allowed.update(taken)


def tensors_in(
    values: Any, prefix: str = "", depth: int = 0, seen: Iterator[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, under its keys joined by dots.

    Lists and keys that are no strings are skipped: optimizers keep their tensors there. `seen` counts entries. Raises
    ArtefactError for a tensor that is not plain (sparse, quantized, a subclass, larger than its file), and for dicts
    nested too deep or holding one another too often.
    """
    seen = seen or itertools.count()
    if depth > _DEEPEST:
        raise ArtefactError(f"{prefix}: dicts in dicts, {_DEEPEST} deep")
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if next(seen) > _MOST:
            raise ArtefactError(f"{prefix}: dicts that hold one another too often")
        if not isinstance(key, str):
            continue
        if isinstance(value, Mapping):
            yield from tensors_in(value, f"{prefix}{key}.", depth + 1, seen)
        elif isinstance(value, Tensor):
            plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
            if not plain or value.is_quantized or value.is_meta:
                raise ArtefactError(f"{prefix}{key}: a {type(value).__name__} of {value.layout}, not a plain tensor")
            held = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > held:  # with a stride of 0, a few bytes become terabytes
                raise ArtefactError(f"{prefix}{key}: {value.numel():,} numbers made of {held:,} bytes")
            yield prefix + key, value.detach()


def load_dcp_metadata(path: Path) -> metadata.Metadata:
    """The `.metadata` of a torch.distributed.checkpoint folder. Raises ArtefactError for anything else in it."""
    try:
        # From memory: a read of a file reserves as many bytes as a pickle claims to have.
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except _Refused as error:
        raise ArtefactError(f"{path}: refused: {error}") from error
    except OSError as error:
        raise ArtefactError(f"{path}: {error.strerror or error}") from error
    except ComptError:
        raise
    except Exception as error:  # as above
        raise ArtefactError(f"{path}: not the metadata of a distributed checkpoint ({first_line(error)})") from error
    if type(found) is not metadata.Metadata or not isinstance(found.state_dict_metadata, dict):
        raise ArtefactError(f"{path}: not the metadata of a distributed checkpoint")
    return found


_MAY_BUILD = {Inert, *(thing for thing in _METADATA_NAMES.values() if dataclasses.is_dataclass(thing))}
"""Types whose objects may get a state. On a class or a member of an enum, BUILD would change torch itself."""
_NEVER = {
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.INST, pickle.OBJ, pickle.PERSID, pickle.BINPERSID, pickle.FROZENSET),
}


class _MetadataUnpickler(pickle._Unpickler):
    # The unpickler written in C would reserve memory for the number in LONG_BINPUT: 10 bytes take 2.7 GiB.
    dispatch: ClassVar[dict[int, Any]] = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if bytes((code,)) not in _NEVER
    }

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.memo = _Memo()

    def load_build(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        built = stack[-2]
        if type(built) not in _MAY_BUILD:
            raise _Refused("it changes a class or another object that it does not make")
        super().load_build()  # type: ignore[misc]
        # Indexes that are filled after they were put into one another could hold one another as tuples do.
        if type(built) in _HASHED and any(type(part) in _HASHED for part in vars(built).values()):
            raise _Refused("it holds indexes in indexes")

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_NAMES:
            return _METADATA_NAMES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.{name}" in _INERT_NAMES:
            return Inert
        raise _Refused(f"it asks for {module}.{name}, which no description of tensors needs")


def check_archive(path: Path, part: IO[bytes] | None = None) -> bool:
    """Whether `path`, or a part of it, is a zip archive of torch.save; False for torch's older format.

    Raises ArtefactError for an archive that torch.save cannot have written.
    """
    file = path if part is None else part
    try:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            packed = next((item.filename for item in archive.infolist() if item.compress_type), None)
            size, start = sum(item.file_size for item in archive.infolist()), archive.start_dir
            plain = archive.fp is not None and size <= start == _named_start(archive.fp)
    # zipfile raises NotImplementedError for versions of the zip format that it cannot read.
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ArtefactError(f"{path}: not a readable archive ({first_line(error)})") from error
    for name in names:
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise ArtefactError(f"{path}: refused: it holds a file named {name!r}, which leads out of the archive")
    if any(name.endswith("/constants.pkl") for name in names):
        raise ArtefactError(
            f"{path}: a TorchScript archive, as OpenAI publishes them: a program, which is not run here; where you "
            "trust it, make weights of it: python -c \"import torch; m = torch.jit.load('FILE', 'cpu'); "
            "torch.save(m.state_dict(), 'weights.pt')\""
        )
    if packed is not None:
        # Such a file can fill the memory, and tensors would be read from its compressed bytes.
        raise ArtefactError(
            f"{path}: refused: {packed!r} in it is compressed, and torch.save compresses nothing; unpack it and pack "
            "it again with `zip -0`"
        )
    if not plain:  # one that torch reads otherwise than zipfile, or whose files are the same bytes again and again
        raise ArtefactError(f"{path}: not a file that torch.save wrote, or torn (its list of files is another one)")
    return True


def _named_start(file: IO[bytes]) -> int:
    """The place of an archive's list of files by its last record.

    torch reads the list there. zipfile reads the one just before the record, which could be another.
    """
    file.seek(0, os.SEEK_END)
    first = max(file.tell() - (1 << 17), 0)  # the records, and a comment of any length
    file.seek(first)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 76:  # no archive with a file in it is as short
        return -1
    wide, locator = tail[at - 76 : at - 20], tail[at - 20 : at]
    if not locator.startswith(b"PK\6\7"):
        return int.from_bytes(tail[at + 16 : at + 20], "little")
    right = wide.startswith(b"PK\6\6") and int.from_bytes(locator[8:16], "little") == first + at - 76
    return int.from_bytes(wide[48:56], "little") if right else -1


def _inert_names(path: Path) -> list[str]:
    asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    return [name for name in asked if name in _INERT_NAMES or name.startswith(_INERT_PACKAGES)]


def _stand_in(name: str) -> type[Inert]:
    # torch keeps its list by class, so each name needs a class of its own.
    return type(name.rpartition(".")[2], (Inert,), {})


def refusal(error: BaseException) -> str:
    """What is wrong with a file for which torch's unpickler raised `error`."""
    if isinstance(error, _Refused):
        return f"refused: {error}"
    found = re.search(r"(?:Unsupported global|unsupported|Trying to load unsupported)[: ]+GLOBAL (\S+)", str(error))
    if found:
        return f"refused: it asks for {found[1]}, which no weights need and could run code"
    return f"not a file that torch.save wrote, or torn ({_reason(error)})"


def _reason(error: BaseException) -> str:
    """The cause in torch's message. The rest of the message advises to load the file without restrictions."""
    if "weights_only" not in str(error):
        return first_line(error)
    found = re.search(r"WeightsUnpickler error: *([^\n]*)", str(error))
    said = found[1] if found else ""
    return said if said and not re.search("weights_only|safe_globals|allowlist|trust", said) else "not plain weights"
