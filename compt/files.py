"""Write files so that a crash at any moment leaves the old file or the new one, never half a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from compt.errors import RunError

# What `new_folder` calls a folder while it is filled, and the one that it takes the place of.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-[a-z0-9_]{8}(?P<old>\.old)?")


_WRITERS = 8
"""Processes that may write the same file at the same time and leave nothing behind when they are killed."""
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
"""This machine, in the names of temporary files."""


def _fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_dir():
            _fsync(path)
    _fsync(folder)


def leads_out(path: Path) -> bool:
    """Whether a file is a link to one in another folder.

    A snapshot in Hugging Face's cache is a folder of links into `blobs` beside it: those do not count.
    """
    home, real = path.parent.resolve(), path.resolve()
    blobs = [folder.parent.parent / "blobs" for folder in (home, *home.parents) if folder.parent.name == "snapshots"]
    return real.parent not in (home, *blobs)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a RunError that names the path and the cause.

    A folder that is being filled is named as it will be called.
    """
    try:
        yield
    except OSError as error:
        parts = [found["name"] if (found := _TEMPORARY.fullmatch(part)) else part for part in path.parts]
        raise RunError(f"cannot write {Path(*parts)}: {error.strerror or error}") from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place when the block ends well, and vanishes otherwise.

    Raises RunError when the folder cannot be written or the disk is full.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name, descriptor = _open_temporary(path)
        with os.fdopen(descriptor, "wb") as file:
            # All while the file is open: once it is closed, another process may take it for that of a killed one.
            try:
                yield file
                file.flush()
                os.fsync(descriptor)
                os.replace(name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        _fsync(path.parent)


def temporary_of(path: Path, number: int = 0) -> Path:
    """The temporary file of the `number`-th process of this machine that writes `path` at the same time."""
    return path.with_name(f".{path.name}.{_HOST}.tmp{number}")


def _open_temporary(path: Path) -> tuple[Path, int]:
    """A temporary file beside `path`, locked until its descriptor is closed.

    Names are numbered, so that what a killed process left is used again and no folder has to be listed. They have the
    machine in them, as locks may hold on one machine only. Where files cannot be locked, the name is a new one.
    """
    for name in (temporary_of(path, number) for number in range(_WRITERS)):
        try:
            # Less what the umask takes. Without NONBLOCK a pipe of this name would wait for a reader.
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError:  # a link, a pipe, or another user's
            break
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(descriptor)
            plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1  # not a file that has another name, too
            if plain and os.path.samestat(found, os.stat(name)):
                os.ftruncate(descriptor, 0)
                return name, descriptor
        except (BlockingIOError, FileNotFoundError):  # its owner writes it, or has just renamed it
            pass
        except OSError:  # no locks here: nobody writes numbered files
            os.close(descriptor)
            name.unlink(missing_ok=True)
            break
        os.close(descriptor)
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    return name, os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` atomically. Raises RunError when the folder cannot be written or the disk is full."""
    with new_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON from a plain file. Raises OSError and ValueError (json.JSONDecodeError, UnicodeDecodeError)."""
    text = read_text(path, sys.maxsize)
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def plain_stat(path: Path) -> os.stat_result:
    """`path.stat()`. Raises OSError for what is not a plain file: to open a pipe, or to read a device, never ends."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return found


def read_text(path: Path, most: int = 1 << 24) -> str:
    """The text, in UTF-8, of a plain file of at most `most` bytes. Raises OSError for others."""
    found = plain_stat(path)
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than {most:,}", str(path))
    return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that becomes `final` when the block ends well, and vanishes otherwise.

    An existing `final` is replaced. What processes that were killed have left of the same is removed first. Raises
    RunError on a full disk or an unwritable place.
    """
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_folders(final)
        temporary = final.with_name(f".{final.name}.tmp-{secrets.token_hex(4)}")
        temporary.mkdir()
    lock = _lock(temporary)
    try:
        with disk_errors(final):
            yield temporary
            _fsync_tree(temporary)
            old = temporary.with_name(temporary.name + ".old")
            if final.exists():
                os.rename(final, old)
            os.rename(temporary, final)
            _fsync(final.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock a path until the descriptor is closed or its process ends; None where another has it, or none can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None


def _remove_dead_folders(final: Path) -> None:
    """Remove the temporary folders of `final` whose process is gone: a process that lives holds a lock on its own.

    On a file system without locks for folders none can be told to be dead, and all stay.
    """
    for path in final.parent.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or found["name"] != final.name or path.is_symlink() or not path.is_dir():
            continue
        if found["old"] and not final.exists():  # killed between two renames: the only one there is
            continue
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache(name: str) -> Path:
    """The folder `name` of compt in the user's cache, on the disk of this machine; it need not exist.

    That is $XDG_CACHE_HOME or ~/.cache, and a private folder among temporary files where neither can be written, which
    is made. Raises RunError where that one is another user's.
    """
    with contextlib.suppress(RuntimeError):  # a uid of a container has no home
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        there = next(place for place in (user, *user.parents) if place.exists())
        if there.is_dir() and os.access(there, os.W_OK):
            return user / "compt" / name
    return private_folder(Path(tempfile.gettempdir()) / f"compt-{name}-{os.getuid()}")


def private_folder(folder: Path) -> Path:
    """Make `folder`, which its owner alone can read, and return it. Raises RunError where it is another user's."""
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
            raise RunError(f"{folder} belongs to another user, or is a link; set $XDG_CACHE_HOME to a folder of yours")
        if stat.S_IMODE(found.st_mode) & 0o077:
            folder.chmod(0o700)
    return folder


def memory_sizes() -> dict[str, int]:
    """Linux's sizes of this process (VmRSS, ...) and of the machine's memory (MemTotal, ...), in bytes; else {}."""
    paths = [path for path in (Path("/proc/meminfo"), Path("/proc/self/status")) if path.exists()]
    found = (re.findall(r"^(\w+):\s+(\d+) kB$", path.read_text(encoding="utf-8"), re.MULTILINE) for path in paths)
    return {name: int(size) * 1024 for pairs in found for name, size in pairs}


def shared_memory() -> str:
    """A sentence, for messages, on the memory through which loader processes pass batches, and how to get more."""
    try:
        free = f" has {shutil.disk_usage('/dev/shm').free / 2**20:,.1f} MiB free"
    except OSError:
        free = ""
    return (
        f"Batches pass through /dev/shm, which{free or ' cannot be read'}: enlarge it (docker run --shm-size=8g; "
        "Kubernetes: an emptyDir of medium Memory there), or lower engine.workers (0 needs none)."
    )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, so that two recipes can be compared field by field."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def hash_json(value: Any) -> str:
    """Hex digest of the canonical JSON of `value`: the same for equal values whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
