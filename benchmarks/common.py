"""Shared parts of the benchmarks: comparing cells with published numbers, writing results, reproducible plots.

A `Result` becomes a folder below `benchmarks/results`: `result.json`, `cells.csv`, one CSV for each other table of
records, `table.md`, and one SVG per plot. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from compt.errors import ComptError
from compt.files import write_text
from compt.report.figures import COLOURS, MODEL_COLOURS
from compt.text import TextTable, terminal

RESULTS = Path(__file__).resolve().parent / "results"
TOLERANCE = 0.025
"""Largest relative difference between our counters and a published number."""
SIGNIFICANT = 6
"""Digits kept in JSON and CSV: few enough that two machines write the same ones."""
IDLE_LOAD = 0.5
"""A higher load average at the start of a timing is reported: the machine is not idle."""
UNEXPLAINED = "Nothing that is published explains it."
"""Part of the note of each cell whose difference has no known cause."""

Record = Mapping[str, Any]


def key_of(row: str, quantity: str) -> str:
    """The name of a cell. `explain` finds a cell's reason by it."""
    return f"{row} / {quantity}"


@dataclass(frozen=True)
class Cell:
    """One published number, and the same number computed here. A field is None if it cannot be computed.

    Args:
        from_inputs: computed from the paper's published inputs
        from_counters: computed by `compt.cost` in its paper mode (or by a hardware model, if `projected`)
        from_printed: computed from other printed cells of the same table (sums and ratios)
        exact: what this program executes
        digits: digits after the decimal point in the paper
        tolerance: largest relative difference of the counters; None: not judged
        inferred: an unpublished input had to be inferred
    """

    row: str
    quantity: str
    published: float | None
    from_inputs: float | None = None
    from_counters: float | None = None
    from_printed: float | None = None
    exact: float | None = None
    unit: str = ""
    digits: int = 2
    tolerance: float | None = TOLERANCE
    projected: bool = False
    inferred: bool = False
    note: str = ""

    @property
    def key(self) -> str:
        return key_of(self.row, self.quantity)

    def difference(self, value: float | None) -> float | None:
        """`value` over the published number, minus 1. None if one is missing or the published number is 0."""
        return None if value is None or not self.published else value / self.published - 1

    @property
    def equal(self) -> bool | None:
        """Whether the paper's inputs round to the printed number. Rounding of the inputs is ignored."""
        if self.published is None or self.from_inputs is None:
            return None
        return rounds_to(self.from_inputs, self.published, self.digits)

    @property
    def close(self) -> bool | None:
        """Whether the counters agree within the tolerance or round to the printed number."""
        difference = self.difference(self.from_counters)
        if self.published is None or self.from_counters is None or difference is None or self.tolerance is None:
            return None
        return abs(difference) <= self.tolerance or rounds_to(self.from_counters, self.published, self.digits)

    @property
    def misses(self) -> bool:
        """Whether one of the two comparisons fails. Such a cell needs a reason."""
        return self.equal is False or self.close is False

    def to_json(self) -> dict[str, Any]:
        """All values, the differences in percent, and the two verdicts."""
        percent = {
            f"{name}_difference_percent": _percent(self.difference(getattr(self, name)))
            for name in ("from_inputs", "from_counters")
        }
        return {
            "row": self.row,
            "quantity": self.quantity,
            "unit": self.unit,
            "published": self.published,
            "from_inputs": self.from_inputs,
            "from_inputs_difference_percent": percent["from_inputs_difference_percent"],
            "equal_to_rounding": self.equal,
            "from_printed_cells": self.from_printed,
            "from_counters": self.from_counters,
            "from_counters_difference_percent": percent["from_counters_difference_percent"],
            "within_tolerance": self.close,
            "exact_mode": self.exact,
            "projected": self.projected,
            "inferred": self.inferred,
            "note": self.note,
        }


def rounds_to(value: float, printed: float, digits: int) -> bool:
    """Whether `value` rounds to `printed` with `digits` after the decimal point. A half may round up or down."""
    return abs(value - printed) <= 0.5 * 10.0**-digits * (1 + 1e-9)


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 4) + 0.0


def explain(cells: Iterable[Cell], reasons: Mapping[str, str]) -> tuple[Cell, ...]:
    """Return the cells with their reasons as notes. A cell that differs without a reason gets `UNEXPLAINED`.

    Raises ValueError for a reason whose key names no cell that differs.
    """
    cells = tuple(cells)
    missing = {cell.key for cell in cells if cell.misses}
    for key in reasons:
        if key not in missing:
            raise ValueError(f"reason for '{key}': no cell that differs has this key; these do: {sorted(missing)}")
    return tuple(
        replace(cell, note=" ".join(filter(None, (cell.note, reasons.get(cell.key, UNEXPLAINED)))))
        if cell.misses
        else cell
        for cell in cells
    )


@dataclass(frozen=True)
class Result:
    """The outcome of one benchmark. `records`: other tables, by the name of their CSV. `plots` draw into an axis."""

    name: str
    title: str
    cells: tuple[Cell, ...] = ()
    tables: tuple[TextTable, ...] = ()
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    plots: Mapping[str, Callable[[Axes], None]] = field(default_factory=dict)

    def all_tables(self) -> list[TextTable]:
        """One table for each compared quantity, then `tables`."""
        quantities = dict.fromkeys(cell.quantity for cell in self.cells)
        groups = [[cell for cell in self.cells if cell.quantity == quantity] for quantity in quantities]
        return [*map(cell_table, groups), *self.tables]


def cell_table(cells: Sequence[Cell]) -> TextTable:
    """The cells of one quantity, one row each, with the reasons of those that differ below the table."""
    counters = "Projected" if any(cell.projected for cell in cells) else "From our counters"
    columns: list[tuple[str, list[str]]] = [
        ("", [cell.row + (" (inferred)" if cell.inferred else "") for cell in cells]),
        ("Published", [number(cell.published, cell.digits) for cell in cells]),
        ("From the paper's inputs", [number(cell.from_inputs, cell.digits + 1) for cell in cells]),
        ("Difference", [percent(cell.difference(cell.from_inputs)) for cell in cells]),
        ("Equal", ["-" if cell.equal is None else "yes" if cell.equal else "no" for cell in cells]),
        ("From printed cells", [number(cell.from_printed, cell.digits + 2) for cell in cells]),
        (counters, [number(cell.from_counters, cell.digits + 1) for cell in cells]),
        ("Difference", [percent(cell.difference(cell.from_counters)) for cell in cells]),
        ("This program", [number(cell.exact, cell.digits + 1) for cell in cells]),
    ]
    kept = [(name, column) for name, column in columns if not name or any(cell != "-" for cell in column)]
    notes: dict[str, list[str]] = {}
    for cell in cells:
        if cell.note:
            notes.setdefault(cell.note, []).append(cell.row)
    unit = f", {cells[0].unit}" if cells[0].unit else ""
    return TextTable(
        title=f"{cells[0].quantity}{unit}",
        header=[name for name, _ in kept],
        rows=[list(row) for row in zip(*(column for _, column in kept), strict=True)],
        notes=[f"{', '.join(rows)}: {note}" for note, rows in notes.items()],
    )


def number(value: float | None, digits: int) -> str:
    """Format `value` with `digits` after the decimal point; "-" for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 2) -> str:
    """Format a share: 0.0123 -> "+1.23 %"; "-" for None."""
    return "-" if share is None else f"{round(100 * share, digits) + 0.0:+.{digits}f} %"


def rounded(value: Any) -> Any:
    """Round every float in `value` to `SIGNIFICANT` digits, so that files do not depend on the last bit."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def _csv(records: Sequence[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in rounded(records):
        flat = {key: " ".join(map(str, item)) if isinstance(item, list) else item for key, item in record.items()}
        writer.writerow(flat)
    return text.getvalue()


def markdown(result: Result) -> str:
    """The result as a Markdown page that links to its plots."""
    parts = [f"# {result.title}", *result.findings]
    parts += [f"![{name.replace('_', ' ')}]({name}.svg)" for name in result.plots]
    return "\n\n".join([*parts, *(table.markdown().strip() for table in result.all_tables())]) + "\n"


def svg(draw: Callable[[Axes], None]) -> str:
    """A plot as SVG: no date, numbered ids, and text as outlines, so that it does not depend on the machine's fonts."""
    with mpl.rc_context(_STYLE):
        canvas = Figure(figsize=(8, 4.2), layout="constrained")
        draw(canvas.add_subplot())
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _numbered("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _numbered(svg: str) -> str:
    """`svg` with numbers for Matplotlib's hashes of coordinates, whose last bits differ between processors."""
    hashed = dict.fromkeys(re.findall(r' id="(\w*[0-9a-f]{10})"', svg))
    for number, name in enumerate(hashed):
        svg = svg.replace(name, f"{name[:-10]}{number}")
    return svg


def write(result: Result, folder: Path = RESULTS) -> Path:
    """Write every file of `result` into `folder`/name and return that folder. Other files there stay."""
    place = folder / result.name
    cells = [cell.to_json() for cell in result.cells]
    value = {"title": result.title, "findings": list(result.findings), "cells": cells, **result.records}
    write_text(place / "result.json", json.dumps(rounded(value), indent=1, ensure_ascii=False) + "\n")
    for name, records in {"cells": cells, **result.records}.items():
        if records:
            write_text(place / f"{name}.csv", _csv(records))
    write_text(place / "table.md", markdown(result))
    for name, draw in result.plots.items():
        write_text(place / f"{name}.svg", svg(draw))
    return place


def show(result: Result, console: Console | None = None) -> None:
    """Print a result to a terminal."""
    console = console or terminal()
    console.print(f"\n{result.title}\n", style="bold", markup=False)
    for finding in result.findings:
        console.print(finding, markup=False)
        console.print()
    for table in result.all_tables():
        console.print(table)
        console.print()


def main(make: Callable[[], Result], argv: Sequence[str] | None = None) -> None:
    """The command line of one benchmark: print the result and write its files."""
    parser = argparse.ArgumentParser(description=(make.__doc__ or "").strip())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: the committed one)")
    options = parser.parse_args(argv)
    with one_line():
        result = make()
        place = write(result, options.out)
        show(result)
    print(f"written: {place}")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Print a ComptError as one line, without a traceback, and exit with its exit code."""
    try:
        yield
    except ComptError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


COLOUR = COLOURS
"""Colors by meaning: ink, muted, grid, paper, chain, teacher, other, alone, control."""
SERIES = MODEL_COLOURS
"""Colors of lines in one plot. They are distinguishable with color blindness."""

_STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": COLOURS["paper"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
