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
from compt.data.names import image_stem
from compt.errors import DataError, first_line

JOIN_COLUMNS = (
    *("key", "__key__", "uid", "sample_id", "image_id", "example_id", "filename", "file_name", "image_name"),
    *("image_file", "image", "image_path", "path", "file", "url", "image_url", "img_url", "imagepath"),
    *("filepath", "id"),
)
"""Names of columns that say which sample a row belongs to, in lower case. `Image Path` is `image_path`."""
LAST_JOINS = ("filepath", "id")
"""They join rows only without another name: `id` may number captions, and Karpathy's `filepath` is a folder."""
URL_JOINS = ("url", "image_url", "img_url")
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
NUMBERED = re.compile(r"#[0-9]+$")
"""The number of a caption behind the name of its image, in the files of Flickr8k and Flickr30k: `1.jpg#0`."""
CELL = 1 << 24
"""The longest cell of a CSV, in characters."""


def read_rows(path: Path, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and columns of each row, by the file's ending, else by how it begins. Raises DataError."""
    readers: dict[str, Callable[[Path, Account], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".jsonl": _json_lines,
        ".jsonlines": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    try:
        with path.open("rb") as file:
            head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        # Tables are also called .txt and the like, whatever they hold.
        begins = _parquet_rows if head.startswith(b"PAR1") else _json_rows if head[:1] in (b"{", b"[") else _csv_rows
        yield from readers.get(path.suffix.lower(), begins)(path, account)
    except OSError as error:
        raise DataError(f"table of captions {path}: {error.strerror or first_line(error)}") from error


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
                    at = _name_at(row)
                    if at is None:
                        known_names(path, row)
                        names = row
                        line = reader.line_num + 1
                        continue
                    names = _headless(path, row, at)
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


def _name_at(row: list[str]) -> int | None:
    """Where a row has a URL or, without one, the file name of an image. A header has neither."""
    cells = [cell.strip() for cell in row]
    named = [at for at, cell in enumerate(cells) if URL.match(cell)]
    return next(iter(named or [at for at, cell in enumerate(cells) if image_stem(NUMBERED.sub("", cell))]), None)


def known_names(path: Path, row: Iterable[str]) -> list[str]:
    """Names as they are known. Raises DataError for two columns of one name: a row would keep only the last."""
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
    return name if name in CAPTION_COLUMNS else _KNOWN.get(plain_name(name), name)


def _headless(path: Path, row: list[str], at: int) -> list[str]:
    """The columns of a file without a header: Conceptual Captions' or Flickr's. Raises DataError for others."""
    if len(row) != 2:
        raise DataError(
            f"table of captions {path} has no header: its first line holds '{row[at].strip()}'; add a line of names"
        )
    return ["image", "caption"] if at == 0 else ["caption", "image"]


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
    with path.open("rb") as file:
        first = file.readline().removeprefix(b"\xef\xbb\xbf")
    line = parse_json(first)
    if line is not None and line.keys().isdisjoint(("images", "annotations")):
        yield from _json_lines(path, account)  # Hugging Face's to_json writes one object a line
        return
    names: dict[Any, Any] = {}
    number = 0
    try:
        values = _listed(path) if first.lstrip().startswith(b"[") else json.loads(path.read_bytes())
        if isinstance(values, dict):
            images = values.get("images")
            if isinstance(values.get("annotations"), list):
                images = images if isinstance(images, list) else []
                names = {str(image.get("id")): image.get("file_name") for image in images if isinstance(image, dict)}
                values = values["annotations"]
            else:
                values = images
        if not isinstance(values, list | Iterator):
            raise DataError(
                f"table of captions {path} is not a list of objects, and has no list `images` or `annotations`"
            )
        for row in values:
            number += 1
            if not isinstance(row, dict):
                account.lose("row_cells", f"{path.name}:{number}")
            elif names:
                yield number, {"file_name": names.get(str(row.get("image_id"))), "caption": row.get("caption")}
            else:
                yield number, row
    except (ValueError, RecursionError) as error:
        raise DataError(f"table of captions {path} is no JSON, behind row {number}: {error}") from None


def _listed(path: Path) -> Iterator[Any]:
    """The items of a list, of which only one is in memory: the list of BLIP's captions has 14 million.

    Raises ValueError.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text, at = file.read(CELL).lstrip(), 1
        while True:
            while at < len(text) and text[at] in ", \t\r\n":
                at += 1
            if text[at : at + 1] == "]":
                if (text[at + 1 :] + file.read(CELL)).strip():
                    raise ValueError("text follows the list")
                return
            try:
                value, at = decoder.raw_decode(text, at)
            except ValueError:
                more = file.read(max(CELL, len(text)))
                if not more:
                    raise
                text, at = text[at:] + more, 0
            else:
                yield value


def _parquet_rows(path: Path, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install 'compt[parquet]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            known_names(path, schema.names)
            # Of Hugging Face's images only the path: the images themselves take a gigabyte for 1,024 rows.
            read = [
                f"{column.name}.path" if re.match("struct<.*bytes: .*path: ", str(column.type)) else column.name
                for column in schema
                if may_be_text(column.name, str(column.type))
            ]
            for batch in file.iter_batches(batch_size=1024, columns=read):
                columns = [part.cast(_bytes_type(part.type)).to_pylist() for part in batch]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, dict(zip(batch.schema.names, map(_decoded, values), strict=True))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"table of captions {path} is damaged behind row {number}: {first_line(error)}") from None


def _bytes_type(kind: Any) -> Any:
    """A type of pyarrow with bytes for strings: some programs write strings that are not UTF-8, and pyarrow raises."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        return _bytes_type(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return pyarrow.large_list(_bytes_type(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([(field.name, _bytes_type(field.type)) for field in kind])
    return pyarrow.large_binary() if types.is_string(kind) or types.is_large_string(kind) else kind


def may_be_text(name: str, kind: str) -> bool:
    """Whether a column of Parquet may have text, or numbers as keys. Others take long, such as lists of features.

    Some programs write text as bytes, but bytes may be images, too.
    """
    texts = (*CAPTION_COLUMNS, *(set(JOIN_COLUMNS) - {"image", "file"}))
    return (
        "string" in kind
        or re.match("u?int", kind) is not None
        or known_name(name) in texts
        or plain_name(name) in texts
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [*map(_decoded, value)]
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def plain_name(name: str) -> str:
    """A name as it is compared: in lower case, with underscores."""
    return name.strip().lower().replace(" ", "_")


_KNOWN = {plain_name(name): name for name in reversed(CAPTION_COLUMNS)}
