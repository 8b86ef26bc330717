"""Check that the engine matrix notices faults: `python -m benchmarks.engines.mutations`.

For each claim of exactness, it breaks one thing in the running program and compares one cell with the oracle again.
Writes docs/results/engines/mutations.json and a table of docs/engines.md. Exit code 1 if a mutation is not caught.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.common import one_line
from benchmarks.engines.broken import MUTATIONS, Mutation
from benchmarks.engines.cells import ENGINES, Cell, train
from benchmarks.engines.matrix import TIMEOUT
from benchmarks.engines.oracle import TOLERANCES, differences, reference
from benchmarks.engines.page import OUT, PAGE, about, scientific, write_results
from compt.text import TextTable, terminal

FILE = "mutations.json"

Pair = tuple[dict[str, float], dict[str, float]]


def compare(numbers: Sequence[int]) -> list[Pair]:
    """For each index into MUTATIONS: the differences without and with the mutation. All ranks must call it."""
    sound: dict[Cell, dict[str, float]] = {}
    found = []
    for mutation in (MUTATIONS[number] for number in numbers):
        expected = reference(mutation.cell)
        if mutation.cell not in sound:
            sound[mutation.cell] = differences(train(mutation.cell), expected)
        with mutation.apply():
            broken = train(mutation.cell)
        found.append((sound[mutation.cell], differences(broken, expected)))
    return found


def run(mutations: Sequence[Mutation]) -> list[dict[str, Any]]:
    """Run mutations of one engine and one number of processes with one group of processes."""
    from tests.dist.spawn import run_ranks

    (world,) = {mutation.cell.world_size for mutation in mutations}
    ranks = run_ranks(compare, world, [MUTATIONS.index(mutation) for mutation in mutations], timeout=TIMEOUT)
    return [_record(mutation, pairs) for mutation, pairs in zip(mutations, zip(*ranks, strict=True), strict=True)]


def _record(mutation: Mutation, pairs: Iterable[Pair]) -> dict[str, Any]:
    """The quantity that exceeds its tolerance most, by the largest difference on any rank."""
    sound, broken = (
        {quantity: max(found[quantity] for found in side) for quantity in TOLERANCES}
        for side in zip(*pairs, strict=True)
    )
    quantity = max(TOLERANCES, key=lambda name: broken[name] / TOLERANCES[name])
    return {
        "claim": mutation.claim,
        "mutation": mutation.change,
        "cell": str(mutation.cell),
        "quantity": quantity,
        "unmutated": sound[quantity],
        "mutated": broken[quantity] if math.isfinite(broken[quantity]) else None,
        "tolerance": TOLERANCES[quantity],
        "sound": all(sound[name] <= TOLERANCES[name] for name in TOLERANCES),
        "caught": any(not broken[name] <= TOLERANCES[name] for name in TOLERANCES),
    }


def groups(mutations: Iterable[Mutation] = MUTATIONS) -> list[list[Mutation]]:
    """The mutations by engine and number of processes: each group runs in one group of processes."""

    def key(mutation: Mutation) -> tuple[int, int]:
        return ENGINES.index(mutation.cell.engine), mutation.cell.world_size

    return [list(group) for _, group in groupby(sorted(mutations, key=key), key)]


def misses(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each mutation that was not caught, and for each cell that fails without a mutation."""
    found = []
    for record in records:
        if not record["caught"]:
            found.append(f"not caught: {record['claim']}: {record['mutation']} ({record['cell']})")
        if not record["sound"]:
            found.append(f"fails without a mutation: {record['cell']}")
    return found


def tables(results: Mapping[str, Any]) -> list[TextTable]:
    """One row per mutation."""
    rows = [
        (
            record["claim"],
            record["mutation"],
            record["cell"],
            record["quantity"],
            scientific(record["unmutated"]),
            "not finite" if record["mutated"] is None else scientific(record["mutated"]),
            f"{record['tolerance']:g}",
            "yes" if record["caught"] else "NO",
        )
        for record in results["mutations"]
    ]
    header = ("Claim", "Mutation", "Cell", "Quantity", "Unmutated", "Mutated", "Tolerance", "Caught")
    note = (
        "Quantity: the one most above its tolerance. Its largest difference from the oracle without and with the fault."
    )
    return [TextTable("Mutations", header, rows, (note,), left=4)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run all mutations and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (default: the committed one)")
    options = parser.parse_args(argv)
    records = []
    with one_line():
        for group in groups(mutation for mutation in MUTATIONS if mutation.cell.engine in options.engines):
            print(f"{group[0].cell.engine}, {group[0].cell.world_size} processes …", flush=True)
            records += run(group)
        results = {**about(), "mutations": records}
        made = tables(results)
        terminal().print(made[0])
        if set(options.engines) == set(ENGINES) or options.out != OUT:
            page = PAGE if options.out == OUT else None
            print(f"written: {write_results(FILE, results, made, options.out, page)}")
        else:
            print("not written: this was not every engine; add --out to write a part")
    found = misses(records)
    print("\n".join(found) or f"all {len(records)} mutations are caught")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
