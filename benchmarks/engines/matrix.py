"""Compare every engine with one process, cell by cell: `python -m benchmarks.engines.matrix`.

Writes docs/results/engines/matrix.json and the tables of docs/engines.md. Needs DeepSpeed but no GPU, and takes about
ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import one_line
from benchmarks.engines.cells import ACCUMULATIONS, ENGINES, OPTIONS, TASKS, WORLDS, Cell, cells, option_cells, train
from benchmarks.engines.oracle import TOLERANCES, differences, reference
from benchmarks.engines.page import OUT, PAGE, about, scientific, write_results
from compt.text import TextTable, terminal

FILE = "matrix.json"
QUANTITIES = tuple(TOLERANCES)
STEP = ("loss", "norm", "gradients")
_NOTE = """Each number is the larger of ViT and Swin. Gradients: per tensor, relative to its norm, at the first and
third step. Weights after three steps and their moving average: per tensor, relative to the distance from the start."""
TIMEOUT = 1500.0
"""Time limit for one group of processes, in seconds."""


def compare(wanted: Sequence[Cell]) -> list[dict[str, float]]:
    """The differences of each cell from its oracle on this rank. All ranks must call it."""
    return [differences(train(cell), reference(cell)) for cell in wanted]


def run(wanted: Sequence[Cell]) -> list[dict[str, Any]]:
    """Run cells with one group of processes; returns the largest difference of each quantity on any rank."""
    from tests.dist.spawn import run_ranks

    (world,) = {cell.world_size for cell in wanted}
    ranks = run_ranks(compare, world, wanted, timeout=TIMEOUT)
    return [
        {**vars(cell), **{quantity: max(seen[quantity] for seen in found) for quantity in QUANTITIES}}
        for cell, found in zip(wanted, zip(*ranks, strict=True), strict=True)
    ]


def misses(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each difference above its tolerance."""
    return [
        f"{Cell(*(record[key] for key in Cell.__dataclass_fields__))}: {quantity} differs by "
        f"{scientific(record[quantity])}, more than {tolerance:g}"
        for record in records
        for quantity, tolerance in TOLERANCES.items()
        if not record[quantity] <= tolerance
    ]


def tables(results: Mapping[str, Any]) -> list[TextTable]:
    """Three tables: by engine, processes, micro-batches and task; by option; and by engine and quantity."""
    records = results["cells"]

    def largest(quantities: Iterable[str], **wanted: Any) -> str:
        found = [
            record[quantity]
            for record in records
            if all(record[key] == value for key, value in wanted.items())
            for quantity in quantities
        ]
        return scientific(max(found)) if found else "-"

    by_task = [
        (
            engine,
            str(world),
            str(pieces),
            *(
                largest(STEP, engine=engine, world_size=world, accumulation=pieces, task=task, option="")
                for task in TASKS
            ),
            largest(("parameters", "average"), engine=engine, world_size=world, accumulation=pieces, option=""),
        )
        for engine, world in dict.fromkeys((record["engine"], record["world_size"]) for record in records)
        for pieces in ACCUMULATIONS
    ]
    engines = dict.fromkeys(record["engine"] for record in records)
    by_option = [(option, *(largest(STEP, engine=engine, option=option) for engine in engines)) for option in OPTIONS]
    by_quantity = [(engine, *(largest((quantity,), engine=engine) for quantity in QUANTITIES)) for engine in engines]
    limits = ("tolerance", *(f"{TOLERANCES[quantity]:g}" for quantity in QUANTITIES))
    return [
        TextTable(
            "Largest relative difference of loss, gradient norm and gradients from one process",
            ("Engine", "Processes", "Micro-batches", *(task.capitalize() for task in TASKS), "Weights, all tasks"),
            by_task,
            (" ".join(_NOTE.split()),),
        ),
        TextTable(
            "The same for each option, on two processes",
            ("Option of engine", *engines),
            by_option,
            ("Contrastive and with projectors, ViT. The engines without a number refuse the option.",),
        ),
        TextTable(
            "Largest difference over all cells",
            ("Engine", *(quantity.capitalize() for quantity in QUANTITIES)),
            [*by_quantity, limits],
            ("Key biases: the absolute norm of a gradient that is exactly zero in theory.",),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells and write the result. Exit code 1 if a difference is above its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--worlds", nargs="+", type=int, choices=WORLDS, default=WORLDS)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (default: the committed one)")
    options = parser.parse_args(argv)
    whole = set(options.engines) == set(ENGINES) and set(options.worlds) == set(WORLDS)
    records = []
    with one_line():
        for engine in options.engines:
            for world in options.worlds:
                print(f"{engine}, {world} processes …", flush=True)
                records += run(cells(engine, world))
                if world == 2:
                    records += run(option_cells(engine))
        results = {**about(), "tolerances": TOLERANCES, "cells": records}
        made = tables(results)
        for table in made:
            terminal().print(table)
        if whole or options.out != OUT:
            page = PAGE if options.out == OUT else None
            print(f"written: {write_results(FILE, results, made, options.out, page)}")
        else:
            print("not written: this was not every engine and number of processes; add --out to write a part")
    found = misses(records)
    print("\n".join(found) or "every difference is within its tolerance")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
