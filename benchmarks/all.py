"""Recompute every table and figure and write all of `benchmarks/results`: `python -m benchmarks.all`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import RESULTS, UNEXPLAINED, Cell, Result, number, one_line, write
from benchmarks.paper import (
    figure_1,
    figure_6,
    figure_7,
    figure_8,
    figure_9,
    findings,
    memory,
    table_2,
    table_4a,
    table_g,
)
from compt.files import write_text
from compt.text import TextTable, terminal

MAKERS: tuple[Callable[[], Result], ...] = (
    table_g.make,
    table_2.make,
    figure_1.make,
    figure_6.make,
    figure_7.make,
    figure_8.make,
    figure_9.make,
    table_4a.make,
    findings.make,
    memory.make,
)


def summary(results: Sequence[Result]) -> TextTable:
    """Per result: how many published cells it compares, and how many agree. Skips results without published cells."""
    rows = []
    for result in results:
        published = sum(cell.published is not None for cell in result.cells)
        if not published:
            continue
        inputs = [cell for cell in result.cells if cell.equal is not None]
        counters = [cell for cell in result.cells if cell.close is not None]
        misses = [cell for cell in result.cells if cell.misses]
        rows.append(
            (
                result.name,
                str(published),
                f"{sum(bool(cell.equal) for cell in inputs)} of {len(inputs)}",
                f"{sum(bool(cell.close) for cell in counters)} of {len(counters)}",
                str(len(misses)),
                str(sum(UNEXPLAINED in cell.note for cell in misses)),
            )
        )
    return TextTable(
        title="Published numbers recomputed",
        header=("", "Cells", "Equal from the paper's inputs", "Counters agree", "Differ", "Of these unexplained"),
        rows=rows,
        notes=(
            "Equal: to half a unit of the last printed digit. Agree: within the tolerance of the cell, mostly 2.5 %.",
        ),
    )


def exceptions(results: Sequence[Result]) -> TextTable:
    """Every cell that differs, with its reason if one is known. A cell that two results share appears once."""
    cells: dict[str, tuple[str, Cell]] = {}
    for result in results:
        for cell in result.cells:
            if cell.misses:
                cells.setdefault(cell.key, (result.name, cell))
    rows = [
        (
            cell.key,
            name,
            number(cell.published, cell.digits),
            number(cell.from_inputs, cell.digits + 2),
            number(cell.from_counters, cell.digits + 2),
            cell.note,
        )
        for name, cell in cells.values()
    ]
    header = ("", "Result", "Published", "From the paper's inputs", "From our counters", "Reason")
    return TextTable("Cells that differ", header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Write all results and print how many cells agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: the committed one)")
    options = parser.parse_args(argv)
    with one_line():
        results = []
        for make in MAKERS:
            results.append(make())
            write(results[-1], options.out)
        tables = (summary(results).markdown().strip(), exceptions(results).markdown().strip())
        page = "\n\n".join(("# The paper's efficiency numbers recomputed", *tables))
        write_text(options.out / "summary.md", page + "\n")
    terminal().print(summary(results))
    print(f"written: {options.out}; to print one result: python -m benchmarks.paper.table_2")


if __name__ == "__main__":
    main()
