"""Which fields are captions, and which captions are text. Shards and tables of captions are read by the same rules."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

LONG_COLUMNS = ("longIB", "longSV", "longLLA")
DREAMLIP = ("shortIB", "longIB", "shortSV", "longSV", "shortLLA", "longLLA")
"""DreamLIP's generated columns, in its order. It releases them as `shortIB_captions` and so on."""
_RAW = ("raw", "raw_caption")
_SEVERAL: tuple[tuple[str, ...], ...] = (
    ("captions",),  # compt, FLAIR (as an object of DreamLIP's columns)
    ("sentences",),  # Karpathy's COCO and Flickr30k
    ("all_captions",),  # LAION-COCO
    ("org_caption", "re_caption"),  # Recap-DataComp
    ("caption_0", "caption_1", "caption_2", "caption_3", "caption_4"),  # Flickr8k on Hugging Face
)
_SINGLE = ("caption", "text", "TEXT", "alt_text", "alt", "top_caption", "comment", "txt", *_RAW)
"""img2dataset, Conceptual Captions; DataComp, LAION, Hugging Face; LAION-COCO; Flickr30k's results.csv."""
_DREAMLIP_NAMES = {name: short for short in DREAMLIP for name in (short, f"{short}_captions", f"{short}_caption")}
_DREAMLIP_GROUP = (*_RAW, *_DREAMLIP_NAMES)
_GROUPS = (_SEVERAL[0], _DREAMLIP_GROUP, *_SEVERAL[1:], *((name,) for name in _SINGLE))
CAPTION_COLUMNS = tuple(name for group in _GROUPS for name in group)
"""Every name that is known to hold captions."""
_KNOWN = frozenset(CAPTION_COLUMNS)
_DEEPEST = 20
_IN_ITEMS = ("raw", "caption", "text")
"""Where the objects in a list of captions have their text: Karpathy's, COCO's, and others' files."""
# White space after a full stop, or a line's end. Beginning with \s lets the search jump from space to space.
_SENTENCE_END = re.compile(r"\s(?:(?<=[.!?]\s)|(?<=\n))\s*")
_DREAMLIP_END = re.compile(r"\n|</s>|[.]")
_LINE_END = re.compile(r"\r\n|\r|\n")
_LIST = re.compile(r"""\[\s*["'\]]""")
# Python warns of other escapes, which it never writes.
_TEXT = re.compile(r"""'(?:[^'\\\n]|\\[\\'"abfnrtvxuUN0])*+'|"(?:[^"\\\n]|\\[\\'"abfnrtvxuUN0])*+\"""")
# Between the texts of a numpy array is no comma: Python would join them.
_TEXTS = re.compile(rf"\[\s*+(?:(?:{_TEXT.pattern})[\s,]*+)*+\]")
_LETTER = re.compile(r"[^\W_]")
_BLANK = "".join(map(chr, (*range(33), 127)))
_MISSING = frozenset(("nan", "NaN", "None", "null", "NULL", "<NA>", "NaT"))
"""What pandas, Python, JSON and SQL write for a missing value. In a list of captions, `null` is a word like others."""
_ABSENT = object()
"""Stands for such a value."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


_Field = tuple[str, list[object]]
"""The name of a field, and what it holds."""


class Captions(NamedTuple):
    """Usable captions, and the cause (see `account.CAUSES`) of each that is not usable."""

    texts: list[str]
    lost: list[str]


def unusable(caption: object) -> str:
    """The cause for which something is no caption; "" for a caption."""
    if not isinstance(caption, str):
        return "missing" if caption is _ABSENT else "not_text"
    if _NO_TEXT.search(caption):
        return "encoding"
    if caption.isascii():
        return "" if caption.strip(_BLANK) else "empty"
    # Zero-width spaces and the like are no white space to Python.
    visible = any(unicodedata.category(letter) not in ("Cc", "Cf", "Zs", "Zl", "Zp") for letter in caption)
    return "" if visible else "empty"


def sort_out(captions: Sequence[object]) -> Captions:
    """Tell captions from what cannot be used."""
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        # Nearly all captions are plain: judging them together takes a tenth of the time.
        joined = "".join(captions)  # type: ignore[arg-type]
        joined.encode()
        good = str.strip if joined.isascii() and joined.isprintable() else _LETTER.search
        if "\0" not in joined and all(map(good, captions)):  # type: ignore[arg-type]
            return Captions([*captions], [])  # type: ignore[list-item]
    found = Captions([], [])
    for caption in captions:
        cause = unusable(caption)
        if cause:
            found.lost.append(cause)
        else:
            found.texts.append(str(caption))
    return found


def split_sentences(text: str) -> list[str]:
    """The sentences of a long description: they end at a full stop before white space, a line's end or `</s>`."""
    return [part for part in map(str.strip, _SENTENCE_END.split(text.replace("</s>", "\n"))) if part]


def _listed(text: str) -> list[object] | None:
    """The list that a text is: as JSON (Flickr30k's files), or as pandas writes lists and numpy's arrays.

    img2dataset copies such cells of a CSV into each `.json`.
    """
    if _LIST.match(text) and text.endswith("]"):
        with contextlib.suppress(ValueError, RecursionError):
            return list(json.loads(text))
        if _TEXTS.fullmatch(text):
            with contextlib.suppress(ValueError, SyntaxError):
                return [literal_eval(part) for part in _TEXT.findall(text)]
    return None


def _items(value: Any, split: bool = False, deep: int = 0) -> list[object]:
    """What one field holds. A missing value holds nothing; of objects in objects, `_DEEPEST` are opened."""
    if value is None:
        return []
    if deep > _DEEPEST:
        return [value]
    if isinstance(value, str):
        text = value.strip()
        if not deep and text in _MISSING:
            return [_ABSENT]
        value = _listed(text) if text.startswith("[") else None
        if value is None:
            return [*split_sentences(text)] if split and text else [text]
    if isinstance(value, list):
        if dict not in set(map(type, value)):
            return value
        return [part for item in value for part in (_items(item, deep=deep + 1) if isinstance(item, dict) else [item])]
    if isinstance(value, dict):
        return next((_items(value[name], deep=deep + 1) for name in _IN_ITEMS if value.get(name) is not None), [value])
    return [value]


def _fields(values: Mapping[str, Any], names: Sequence[str]) -> list[_Field]:
    return [
        (name, _items(values[name], split=_DREAMLIP_NAMES.get(name, name) in LONG_COLUMNS))
        for name in names
        if name in values
    ]


def _dreamlip(values: Mapping[str, Any]) -> list[_Field]:
    generated = _fields(values, [*_DREAMLIP_NAMES])
    # img2dataset calls the raw caption `caption` if that column was its --caption_col.
    names = (*_RAW, *(("caption",) if any(items for _, items in generated) else ()))
    raw = [(name, items) for name, items in _fields(values, names) if items]
    usable = ([one] for one in raw if not all(map(unusable, one[1])))
    return next(usable, raw[:1]) + generated


def _group(values: Mapping[str, Any], names: Sequence[str]) -> list[_Field]:
    """The fields in one group of known names, and what each holds."""
    if names == _DREAMLIP_GROUP:
        return _dreamlip(values)
    several = values.get("captions")
    if names == ("captions",) and isinstance(several, dict) and not several.keys().isdisjoint(_DREAMLIP_GROUP):
        return _dreamlip(several)
    return _fields(values, names)


def _groups(values: Mapping[str, Any], columns: Sequence[str]) -> Iterator[tuple[Sequence[str], list[_Field]]]:
    """The groups of names that are there, each with its fields: those of `columns`, or else the known ones in turn."""
    if columns:
        yield columns, [field for name in columns for field in _group(values, (name,))]
        return
    present = _KNOWN.intersection(values)
    for group in _GROUPS if present else ():
        # A single field `raw` may be anything, such as the name of a camera's file.
        if not present.isdisjoint(_DREAMLIP_NAMES if group == _DREAMLIP_GROUP else group):
            yield group, _group(values, group)


def read_columns(values: Mapping[str, Any], columns: Sequence[str] = ()) -> tuple[Captions, bool]:
    """The captions in an object of a JSON or a row of a table, and whether they come before a `.txt`.

    `columns` names the fields; without it, the first group of known names that has a usable caption gives them. A
    single caption such as img2dataset's `caption` does not come before a `.txt`.
    """
    lost: list[str] = []
    for group, fields in _groups(values, columns):
        items = [item for _, part in fields for item in part]
        found = sort_out(items)
        lost += found.lost
        if found.texts:
            first = bool(columns) or len(group) > 1 or group[0] not in _SINGLE or len(items) > 1
            return Captions(found.texts, lost), first
    return Captions([], lost), bool(columns)


def by_column(values: Mapping[str, Any], columns: Sequence[str] = ()) -> dict[str, list[str]]:
    """The captions that `read_columns` finds, by the names of their fields."""
    for _, fields in _groups(values, columns):
        found = {name: texts for name, items in fields if (texts := sort_out(items).texts)}
        if found:
            return found
    return {}


def has_generated(values: Mapping[str, Any]) -> bool:
    """Whether an object of a JSON or a row of a table has one of the columns that DreamLIP generated."""
    several = values.get("captions")
    return not _DREAMLIP_NAMES.keys().isdisjoint((*values, *(several if isinstance(several, dict) else ())))


def split_as_dreamlip(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields, with the generated captions cut into sentences as DreamLIP's authors do.

    Source: `split_caption` in training/data.py of github.com/zyf0619sjtu/DreamLIP. It cuts short and long captions at
    line ends, `</s>` and every full stop, which it drops. The raw caption stays whole.
    """
    return {
        name: [part for part in map(str.strip, _DREAMLIP_END.split(value)) if part]
        if name in _DREAMLIP_NAMES and isinstance(value, str) and _listed(value.strip()) is None
        else value
        for name, value in values.items()
    }


def parse_json(data: bytes) -> dict[str, Any] | None:
    """The object in a `.json`; None where there is none."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_json_captions(data: bytes, columns: Sequence[str] = ()) -> Captions:
    """The captions in a `.json`."""
    values = parse_json(data)
    return read_columns(values, columns)[0] if values is not None else Captions([], [])


def read_text(data: bytes) -> Captions:
    """The captions in a `.txt`: one a line, UTF-8. A final line end starts no further line."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Captions([], ["encoding"])
    lines = _LINE_END.split(text)
    if text.strip() in _MISSING:
        lines = [_ABSENT]
    return sort_out(lines if lines[-1] else lines[:-1])
