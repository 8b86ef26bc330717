"""Files of a Debian package: download it with apt, and read it without unpacking it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from compt.drawings.packages import Package, check_hash, download
from compt.errors import DataError
from compt.files import sha256_file

PACKAGE_LIMIT = 512 * 2**20
"""Largest package, and largest sum of the files in it, in bytes: the clip art has 25 MB, and 175 MB of files."""


def fetch_debian(package: Package, folder: Path) -> Path:
    """Download a package with apt into `folder`. Raises DataError without apt, network or this version."""
    wanted = f"{package.name}={package.version}"
    try:
        download(["apt-get", "download", wanted], folder, "E:")
    except DataError as error:
        raise DataError(f"{error}; or download the package elsewhere, and name the file with --deb") from error
    found = sorted(folder.glob(f"{package.name}_*.deb"))
    if len(found) != 1:
        raise DataError(f"apt-get download {wanted} wrote no package")
    return found[0]


def check_package(path: Path, package: Package) -> dict[str, str]:
    """Name, version and sha256 of the package in `path`. Raises DataError for another package, or for other bytes.

    Another version than the pinned one is allowed.
    """
    control = next((data for name, data in package_files(path, "control.tar") if name == "control"), b"")
    fields = dict(
        re.findall(r"^(Package|Version): ([\w.+:~-]{1,100})$", control.decode("utf-8", "replace"), re.MULTILINE)
    )
    if fields.get("Package") != package.name or "Version" not in fields:
        raise DataError(f"{path}: this is not the package {package.name}")
    if fields["Version"] == package.version:
        check_hash(path, package)
    return {"name": package.name, "version": fields["Version"], "sha256": sha256_file(path)}


def package_files(path: Path, part: str = "data.tar", below: str = "") -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the plain files below the folder `below`, in the order of the package.

    Files are read in memory: no name in a package becomes a path on disk, and links are left out. Raises DataError.
    """
    try:
        with _unpacked(_part(path, part)) as data, tarfile.open(fileobj=data, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and name.startswith(below) and (file := archive.extractfile(member)):
                    yield name.removeprefix(below), file.read()
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a readable Debian package ({error})") from error


class _Limited(io.RawIOBase):
    """What is read from `file`, up to PACKAGE_LIMIT bytes: long names of members count, too. Raises ValueError."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.left = PACKAGE_LIMIT

    def read(self, size: int = -1, /) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"the files in it have more than {PACKAGE_LIMIT:,} bytes")
        return data

    def close(self) -> None:
        self.file.close()
        super().close()


def _unpacked(data: bytes) -> IO[bytes]:
    for magic, module in ((b"\xfd7zXZ", lzma), (b"\x1f\x8b", gzip), (b"BZh", bz2)):
        if data.startswith(magic):
            return cast(IO[bytes], _Limited(module.open(io.BytesIO(data))))
    return cast(IO[bytes], _Limited(io.BytesIO(data)))


def _part(path: Path, name: str) -> bytes:
    """The member `name`, such as data.tar.xz, of the ar archive. Raises OSError and ValueError."""
    if path.stat().st_size > PACKAGE_LIMIT:
        raise ValueError(f"it has more than {PACKAGE_LIMIT:,} bytes")
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError("no ar archive")
        # A header has 60 bytes: name (16), time, owner, group, mode, size (10) and two bytes that end it.
        while len(header := file.read(60)) == 60:
            size = int(header[48:58])
            if header.startswith(f"{name}.".encode()):
                return file.read(size)
            file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"no {name} in it")
