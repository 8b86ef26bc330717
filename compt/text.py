"""Tables of text for terminals (rich), Markdown and HTML, and numbers with their units. No torch in here."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_GAP = 2
"""Columns of a terminal between those of a tight table."""


@dataclass(frozen=True)
class TextTable:
    """A table as plain text: the first `left` columns to the left, the others to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    left: int = 1

    def rich(self) -> RenderableType:
        """For a terminal; notes stand below. Where words would have to be broken, each row becomes a block."""
        return _Fitting(self)

    def markdown(self) -> str:
        """As GitHub renders it."""
        lines = [f"### {escape_markdown(self.title)}", "", _markdown_row(self.header)]
        lines.append("|" + "|".join(":--" if at < self.left else "--:" for at in range(len(self.header))) + "|")
        lines += [_markdown_row(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"{escape_markdown(note)}\n" for note in self.notes)])


def terminal(*, stderr: bool = False) -> Console:
    """Where text is shown to a person: standard output, or standard error. Text stays as it is: `:x:` is no emoji."""
    return Console(stderr=stderr, highlight=False, emoji=False)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: on one line, no markup, no cell ends."""
    return (
        re.sub(r"([\\`*|~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
        .replace("&", "&amp;")
        .replace("<", "&lt;")
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"


def _width(cells: Iterable[str]) -> int:
    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)


@dataclass(frozen=True)
class _Fitting:
    """The widest form that the terminal has room for.

    A table; one with names on several lines; with numbers too, as in 1.41 P over (7.65x); one broken at any word; a
    block of lines for each row.
    """

    table: TextTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for at, name in enumerate(self.table.header):
            least = None if at else _width([name, *(row[0] for row in self.table.rows)])
            wide.add_column(Text(name), justify=self._side(at), no_wrap=at == 0, min_width=least)
        for row in self.table.rows:
            wide.add_row(*map(Text, row))
        yield Text(self.table.title, style="bold")
        needed = Measurement.get(console, options.update(max_width=10_000), wide)
        tight = self._tight(options.max_width, fold=False) or self._tight(options.max_width, fold=True)
        if needed.maximum <= options.max_width:
            yield from (Text(""), wide, Text(""))
        elif tight is not None:
            yield from (Text(""), tight, Text(""))
        elif needed.minimum <= options.max_width:
            yield from (Text(""), wide, Text(""))
        else:
            yield from self._blocks()
        yield from (Text(note, style="dim") for note in self.table.notes)

    def _side(self, at: int) -> Literal["left", "right"]:
        return "left" if at < self.table.left else "right"

    def _tight(self, width: int, fold: bool) -> Table | None:
        """Headers on several lines, with `fold` cells too; of the first two columns the wider one takes what is left.

        None where `width` is not enough.
        """
        table = self.table
        rows = [[re.sub(r" (?=[(\[+])", "\n", cell) if fold else cell for cell in row] for row in table.rows]
        header = []
        for at, name in enumerate(table.header):
            words = name.replace("/", "/ ").split()
            widest = max(map(cell_len, (*words, *(line for row in rows for line in row[at].split("\n")))), default=1)
            header.append("\n".join(textwrap.wrap(" ".join(words), max(1, widest))).replace("/ ", "/"))
        widths = [_width(column) for column in zip(header, *rows, strict=True)]
        names = max(range(min(2, len(widths))), key=lambda at: widths[at])
        room = width - sum(widths) + widths[names] - _GAP * (len(widths) - 1)
        for row, whole in zip(rows, table.rows, strict=True):
            row[names] = "\n".join(textwrap.wrap(whole[names], max(1, room), break_long_words=False))
        if _width([header[names], *(row[names] for row in rows)]) > room:
            return None
        tight = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, _GAP - 1, 0, 0), pad_edge=False)
        for at, name in enumerate(header):
            tight.add_column(Text(name), justify=self._side(at), no_wrap=True)
        for row in rows:
            tight.add_row(*map(Text, row))
        return tight

    def _blocks(self) -> Iterator[RenderableType]:
        for row in self.table.rows:
            yield Text(f"\n{row[0]}", style="cyan")
            block = Table.grid(padding=(0, 2))
            block.add_column(no_wrap=True)
            block.add_column()
            for name, cell in zip(self.table.header[1:], row[1:], strict=True):
                if cell:
                    block.add_row(Text(f"  {name}"), Text(cell))
            yield block
        yield Text("")


def _prefixed(value: float, prefixes: Sequence[tuple[float, str]]) -> str:
    """Three digits and the largest prefix that leaves a one before the point after rounding."""
    for size, prefix in prefixes:
        if float(f"{value / size:.3g}") >= 1:
            digits = f"{value / size:#.3g}".removesuffix(".")
            return f"{float(digits):,.0f}{prefix}" if "e" in digits else f"{digits}{prefix}"
    return f"{value:.3g}"


def macs(value: float) -> str:
    """1.234e15 -> "1.23 P": multiply-accumulates with a decimal prefix."""
    return _prefixed(value, ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")))


def count(value: float) -> str:
    """12_345_678 -> "12.3 M"."""
    return _prefixed(value, ((1e9, " G"), (1e6, " M"), (1e3, " k")))


def hours(value: float | None) -> str:
    """Device-hours, or minutes or seconds where they are few."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 60:.1f} min" if value * 60 >= 1 else f"{value * 3600:.1f} s"
    return f"{value:.2f} h" if value < 100 else f"{value:,.0f} h"


def ratio(value: float | None) -> str:
    """An acceleration in brackets, to stand behind a cost: 5.68 -> " (5.68x)"; nothing for None."""
    return "" if value is None else f" ({value:.2f}x)"
