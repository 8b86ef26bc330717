"""Measure what a chain saves on real data: `python -m benchmarks.evidence run`.

Runs the next pieces in order of worth and continues after a stop. Each piece is one training run on one core; two
processes share the list. `plan` shows what is left. `report` writes tables and figures from the committed raw results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common import one_line
from benchmarks.evidence.pieces import pieces
from benchmarks.evidence.report import OUT, changed, write_report
from benchmarks.evidence.run import is_done, measured_speeds, own_rates, planned_minutes, run
from compt.text import TextTable, terminal


def main(argv: Sequence[str] | None = None) -> None:
    """Run, plan, report or check."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("part", nargs="?", choices=("run", "plan", "report"), help="what to do")
    parser.add_argument("--max-minutes", type=float, help="run: start no piece that would end later")
    parser.add_argument("--check", action="store_true", help="compare tables and figures with the raw results")
    given = parser.parse_args(argv)
    if (given.part is None) != given.check:
        parser.error("name run, plan or report; or give --check alone")
    with one_line():
        if given.check:
            if names := changed():
                sys.exit(
                    f"{OUT}: {', '.join(names)} differ from the raw results; run `python -m benchmarks.evidence report`"
                )
        elif given.part == "run":
            run(given.max_minutes, lambda text: print(text, flush=True), write_report)
        elif given.part == "plan":
            terminal().print(plan_table())
        else:
            write_report()


def plan_table() -> TextTable:
    """Every piece that is left, with the minutes of one core that it takes."""
    speeds = measured_speeds()
    rows, total = [], 0.0
    for piece in pieces(own_rates()):
        if not is_done(piece):
            minutes = planned_minutes(piece, speeds)
            total += minutes
            rows.append([piece.name, f"{minutes:.1f}", f"{total / 60:.1f}"])
    return TextTable(
        f"{len(rows)} pieces are left: {total / 60:.1f} hours of one core", ("piece", "minutes", "hours so far"), rows
    )


if __name__ == "__main__":
    main()
