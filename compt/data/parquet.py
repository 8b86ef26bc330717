"""Parquet files with images in them, as Hugging Face's `datasets` writes them.

An image is a `struct<bytes: binary, path: string>`. The path is that of the original file, or null. Captions are
columns of strings or of lists of strings.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from compt.data.rows import may_be_text
from compt.errors import DataError

_IMAGE = re.compile("struct<.*bytes: .*path: ")


class ParquetImages:
    """Rows of several files, numbered from 0. Holds one row group in memory: read rows in their order.

    image: the name of the column with images, the first one. columns: names of all other columns that may be text.
    fingerprint: hash of the names, the sizes and the ends of the files, which describe all that is in them. Raises
    DataError.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise DataError(f"reading {paths[0]} needs pyarrow: pip install 'compt[parquet]'") from None
        self._error: type[Exception] = ArrowException
        sha, self._groups, counts = hashlib.sha256(), list[tuple[Any, Path, int]](), list[int]()
        for path in paths:
            try:
                file = parquet.ParquetFile(path)
                tail = _tail(path)
            except (OSError, ArrowException) as error:
                raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
            sha.update(f"{path.name}\0{path.stat().st_size}\0".encode() + tail)
            names = image_columns(file.schema_arrow)
            if not names:
                raise DataError(f"{path}: has no column of images (struct of bytes and path)")
            self.image = names[0]
            schema = file.schema_arrow
            self.columns = [
                one.name for one in schema if one.name not in names and may_be_text(one.name, str(one.type))
            ]
            self._groups += [(file, path, group) for group in range(file.num_row_groups)]
            counts += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._ends = [0, *accumulate(counts)]
        self.fingerprint = sha.hexdigest()
        self._open: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, row: int) -> dict[str, Any]:
        """The values of a row: `image` has `bytes` and `path`. Raises DataError for a damaged file."""
        group = bisect.bisect_right(self._ends, row) - 1
        file, path, inside = self._groups[group]
        try:
            if self._open[0] != group:
                self._open = group, file.read_row_group(inside, columns=[self.image, *self.columns])
            (values,) = self._open[1].slice(row - self._ends[group], 1).to_pylist()
        except (OSError, ValueError, self._error) as error:
            raise DataError(f"{path}: row {row - self._ends[group]} of group {inside}: {error}") from error
        return dict(values)

    def name(self, row: int) -> str:
        """The path of the image without its ending; without one, the first file's name and the number of the row."""
        path = (self.read(row)[self.image] or {}).get("path")
        return path.rpartition(".")[0] or path if path else f"{self._groups[0][1].stem}_{row:08d}"


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - (1 << 16), 0))
        return file.read()


def image_columns(schema: Any) -> list[str]:
    """The columns of a pyarrow schema that hold images."""
    return [column.name for column in schema if _IMAGE.match(str(column.type))]


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files with images that a file, a folder or a pattern names; none for anything else."""
    if source.is_dir():
        paths = [] if any(source.glob("*.tar")) else sorted(source.glob("*.parquet"))
    else:
        paths = sorted(source.parent.glob(source.name)) if source.suffix == ".parquet" else []
    if not paths:
        return []
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        return []  # a table, whose reader says what to install
    try:
        return paths if image_columns(parquet.read_schema(paths[0])) else []
    except (OSError, ArrowException):
        return []
