"""Rows of tables of captions: CSV, TSV, JSON lines, JSON and Parquet, as columns with known names."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from compt.data.account import Account
from compt.data.captions import CAPTION_COLUMNS, parse_json
from compt.errors import DataError

JOIN_COLUMNS = (
    *("key", "__key__", "uid", "sample_id", "image_id", "id", "filename", "file_name", "filepath", "image_name"),
    *("image", "image_path", "path", "file", "url", "image_url", "img_url", "imagepath"),
)
"""Names of columns that say which sample a row belongs to, in lower case. `Image Path` is `image_path`."""
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
CELL = 1 << 24
"""The longest cell of a CSV, in characters."""


def read_rows(path: Path, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and columns of each row, by the file's ending. Raises DataError."""
    ending = path.suffix.lower()
    readers: dict[str, Callable[[Path, Account], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    try:
        yield from readers.get(ending, _csv_rows)(path, account)
    except OSError as error:
        raise DataError(f"table of captions {path}: {error.strerror}") from error


def _csv_rows(path: Path, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(CELL)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = next((line for line in iter(partial(file.readline, CELL), "") if line.strip()), "")
        # A tab is no part of text. Of the others, the separator is the one that gives most columns, a comma first.
        separator = "\t" if "\t" in first else max(",;|", key=first.count)
        # Conceptual Captions' TSV files have tabs between cells, and quotation marks that mean nothing.
        quoted = separator == "," or _misfits(path, separator, True) <= _misfits(path, separator, False)
        file.seek(0)
        reader = csv.reader(file, delimiter=separator, **_format(quoted))
        names: list[str] | None = None
        line = 1
        try:
            for row in reader:
                if names is None and any(map(str.strip, row)):
                    names = _header(path, row)
                    if names is not None:
                        line = reader.line_num + 1
                        continue
                    names = _headless(path, row)
                if names is not None and len(row) == len(names):
                    yield line, dict(zip(names, row, strict=True))
                elif row and names is not None:
                    account.lose("row_cells", f"{path.name}:{line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"table of captions {path}, line {line}: {error}; is a quotation mark missing there, or not doubled?"
            ) from error


def _format(quoted: bool) -> dict[str, Any]:
    return {"strict": True, "skipinitialspace": True, "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}


def _misfits(path: Path, separator: str, quoted: bool) -> tuple[int, int]:
    """Rows that do not fit the first one, and the number of rows below zero: smaller is better."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=separator, **_format(quoted))
        try:
            widths = [len(row) for row in reader if row]
        except csv.Error:
            return sys.maxsize, 0
        return sum(width != widths[0] for width in widths), -len(widths)


def _header(path: Path, row: list[str]) -> list[str] | None:
    """The names in a header; None where it has a URL, and so is none. Raises DataError for two of one name."""
    if any(URL.match(cell.strip()) for cell in row):
        return None
    known_names(path, row)
    return row


def known_names(path: Path, row: Iterable[str]) -> list[str]:
    """Names as they are known. Raises DataError for two columns of one name: a row would keep the last alone."""
    names = [known_name(name) for name in row]
    for name, count in Counter(filter(None, names)).items():
        if count > 1:
            raise DataError(
                f"table of captions {path} has {count} columns '{name}', whatever their case; rename them, and name "
                "those with captions in data.caption_columns"
            )
    return names


def known_name(name: str) -> str:
    """A column's name as it is known, in whatever case it is written."""
    name = name.strip()
    return name if name in CAPTION_COLUMNS else next((k for k in CAPTION_COLUMNS if k == plain_name(name)), name)


def _headless(path: Path, row: list[str]) -> list[str]:
    """The columns of Conceptual Captions' files, which have no header. Raises DataError for others."""
    if len(row) != 2:
        raise DataError(f"table of captions {path} has no header: its first line holds a URL; add a line of names")
    return ["url", "caption"] if URL.match(row[0].strip()) else ["caption", "url"]


def _json_lines(path: Path, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                account.lose("row_cells", f"{path.name}:{number}")


def _json_rows(path: Path, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a list (BLIP), of `images` (Karpathy), or COCO's `annotations` with their images' names."""
    data = path.read_bytes()
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        if parse_json(data.partition(b"\n")[0]) is not None:  # Hugging Face's to_json writes one object a line
            yield from _json_lines(path, account)
            return
        raise DataError(f"table of captions {path} is no JSON: {error}") from None
    names: dict[Any, Any] = {}
    if isinstance(values, dict):
        images = values.get("images")
        if isinstance(values.get("annotations"), list):
            images = [image for image in images or [] if isinstance(image, dict)]
            names = {str(image.get("id")): image.get("file_name") for image in images}
            values = values["annotations"]
        else:
            values = images
    if not isinstance(values, list):
        raise DataError(f"table of captions {path} is no list of objects, and has no list `images` or `annotations`")
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            account.lose("row_cells", f"{path.name}:{number}")
        elif names:
            yield number, {"file_name": names.get(str(row.get("image_id"))), "caption": row.get("caption")}
        else:
            yield number, row


def _parquet_rows(path: Path, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install 'compt[parquet]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            known = [name for name in schema.names if _is_text(name, str(schema.field(name).type))]
            for batch in file.iter_batches(batch_size=1024, columns=known):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: _decoded(value) for name, value in row.items()}
    except ArrowException as error:
        raise DataError(f"table of captions {path}: {error}") from None


def _is_text(name: str, kind: str) -> bool:
    """Whether a column of Parquet may have text. Some programs write text as bytes, but bytes may be images, too."""
    texts = (*CAPTION_COLUMNS, *(set(JOIN_COLUMNS) - {"image", "file"}))
    return not re.match("(large_|fixed_size_)?binary", kind) or known_name(name) in texts or plain_name(name) in texts


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def plain_name(name: str) -> str:
    """A name as it is compared: in lower case, with underscores."""
    return name.strip().lower().replace(" ", "_")
