"""Tables of text for terminals (rich) and Markdown, and numbers with their units."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from unicodedata import category

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of what is not seen: control, format (bidi overrides, zero width), surrogates, separators."""


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Text from data, keys and file names, with every character that is not seen written as in Python: \x1b, \u202e.

    Joiners between letters that are not ASCII remain: scripts and emoji need them.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character in keep or category(character) not in _HIDDEN or _joins(text, at) else _code(character)
        for at, character in enumerate(text)
    )


def _joins(text: str, at: int) -> bool:
    around = text[max(at - 1, 0) : at] + text[at + 1 : at + 2]
    return text[at] in "\u200c\u200d" and len(around) == 2 and not any(each.isascii() for each in around)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


class VisibleConsole(Console):
    """A console that shows hidden characters of what it prints as text. Its own colours and cursor movements pass."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The parts to print."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(visible(part.text), part.style)


class VisibleFormatter(logging.Formatter):
    """Formats log records, with hidden characters shown as text."""

    def format(self, record: logging.LogRecord) -> str:
        """The whole line, with a traceback if there is one."""
        return visible(super().format(record))


@dataclass(frozen=True)
class TextTable:
    """A table as plain text. The first `left` columns are aligned to the left, the others to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    left: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Title, table and notes; on a terminal too narrow for the table, a block of lines for each row."""
        title, header, rows, notes = self._visible()
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        columns = list(zip(header, *rows, strict=True))
        widths = [max(map(cell_len, column)) for column in columns]
        room = options.max_width - 2 * (len(widths) - 1)
        widest = widths.index(max(widths))
        words = max(cell_len(word) for cell in columns[widest] for word in cell.split() or [""])
        if sum(widths) - widths[widest] + words > room:
            # Too wide even with that column broken at words: break the others before a bracket, as in 1.41 P (7.65x).
            widths = [
                max(cell_len(part) for cell in column for part in re.split(r" (?=\()", cell)) for column in columns
            ]
        widths[widest] = min(widths[widest], room - sum(widths) + widths[widest])
        for at, name in enumerate(header):
            side: Literal["left", "right"] = "left" if at < self.left else "right"
            table.add_column(Text(name), justify=side, width=widths[at])
        for row in rows:
            table.add_row(*map(Text, row))
        fits = widths[widest] >= words
        yield from (Text(title, "bold"), Text(), table if fits else Group(*_blocks(header, rows)))
        if notes:
            yield Text()
            for line in (line for note in notes for line in Text(note, "dim").wrap(console, options.max_width)):
                line.rstrip()
                yield line

    def _visible(self) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Title, header, rows and notes. A line break in a cell is shown too: it could pose as another row."""
        rows = [[visible(cell, "") for cell in row] for row in self.rows]
        return visible(self.title), [visible(name, "") for name in self.header], rows, list(map(visible, self.notes))

    def markdown(self) -> str:
        """The table as GitHub renders it."""
        lines = [f"### {escape_markdown(self.title)}", "", _markdown_row(self.header)]
        lines.append("|" + "|".join(":--" if at < self.left else "--:" for at in range(len(self.header))) + "|")
        lines += [_markdown_row(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"{escape_markdown(note)}\n" for note in self.notes)])


def _blocks(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[RenderableType]:
    for row in rows:
        yield Text(row[0], "cyan")
        block = Table.grid(padding=(0, 2), pad_edge=True)
        for name, cell in zip(header[1:], row[1:], strict=True):
            if cell:
                block.add_row(Text(name), Text(cell))
        yield block


def terminal(*, stderr: bool = False) -> Console:
    """Standard output, or standard error, for text that a person reads. `:x:` does not become an emoji."""
    console = VisibleConsole(stderr=stderr, highlight=False, emoji=False)
    if console.width < _NARROWEST:  # COLUMNS=0, as some containers set it, would print nothing at all
        console.width = 80
    return console


_NARROWEST = 20


@contextmanager
def no_stderr() -> Iterator[None]:
    """Hide what any code of this process prints to standard error, C++ code too."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def show(*tables: TextTable) -> None:
    """Print tables, with an empty line between them."""
    console = terminal()
    for at, table in enumerate(tables):
        if at:
            console.print()
        console.print(table)


def say(text: str) -> None:
    """Print a line as it is, however long."""
    terminal().print(visible(text), markup=False, soft_wrap=True)


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, on one line."""
    return re.sub(r"^(\d*)([-+.)])(?=\s|--)", r"\1\\\2", _escape_cell(text))  # it would begin a list


def _escape_cell(text: str) -> str:
    line = " ".join(re.split(r"[ \t\r\n]+", text.strip(" \t\r\n")))
    # An underscore within a word is no emphasis.
    special = r"([\\`*|~$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|^[#>])"
    escaped = re.sub(special, r"\\\1", visible(line)).replace("&", "&amp;")
    escaped = re.sub(r"\bwww\.", "www&#46;", escaped, flags=re.IGNORECASE)
    return escaped.replace("<", "&lt;").replace("://", "&#58;//")


def code_block(text: str, language: str) -> list[str]:
    """The lines of a block of code in Markdown, which no line of the text can end."""
    ticks = "`" * max(4, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{ticks}{language}", visible(text.rstrip()), ticks]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape_cell, cells)) + " |"


def digits(value: float) -> str:
    """Three digits, and whole numbers from a thousand on: 0.0506, 39.6, 129, 1,383."""
    return f"{value:,.0f}" if value >= 999.5 or not value else f"{value:#.3g}".removesuffix(".")


def count(value: float) -> str:
    """Three digits with a decimal prefix: 1.234e15 -> "1.23 P"."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(f"{value / size:.3g}") >= 1:
            return f"{digits(value / size)} {prefix}"
    return f"{value:.3g}"


def hours(value: float | None) -> str:
    """Device-hours; minutes or seconds below one hour."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 60:.1f} min" if value * 60 >= 1 else f"{value * 3600:.1f} s"
    return f"{value:.2f} h" if value < 100 else f"{value:,.0f} h"
