"""Measure what a chain saves on real data: `python -m benchmarks.evidence run`.

Runs the next pieces in order of worth and continues after a stop. Each piece is one training run on one core; two
processes share the list. `plan` shows what is left, `speeds` times steps on an idle machine, `collect` writes the
results of run folders again, `power` simulates what verdicts can show, and `report` writes tables and figures from the
committed raw results.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from benchmarks.common import one_line
from benchmarks.evidence.pieces import Piece, arms, of_the_family, once, pieces, pieces_of, trials
from benchmarks.evidence.power import write_power
from benchmarks.evidence.report import OUT, changed, write_report
from benchmarks.evidence.run import collect_again, is_done, own_rates, run
from benchmarks.evidence.speeds import idle_minutes, pairs, read_speeds, write_speeds
from benchmarks.evidence.study import Study
from compt.text import TextTable, terminal

CLAIMS = "abcdefghijklmno"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument(
        "part", nargs="?", choices=("run", "plan", "speeds", "collect", "power", "report"), help="what to do"
    )
    parser.add_argument("--max-minutes", type=float, help="run: start no piece that would end later")
    parser.add_argument("--claim", choices=tuple(CLAIMS), help="run, plan: only what this claim compares")
    parser.add_argument("--check", action="store_true", help="compare tables and figures with the raw results")
    given = parser.parse_args(argv)
    if (given.part is None) != given.check:
        parser.error("name run, plan, speeds, collect, power or report; or give --check alone")
    with one_line():
        if given.check:
            if names := changed():
                sys.exit(
                    f"{OUT}: {', '.join(names)} differ from the raw results; run `python -m benchmarks.evidence report`"
                )
        elif given.part == "run":
            say = functools.partial(print, flush=True)
            run(lambda: settled(given.claim), given.max_minutes, say)
        elif given.part == "plan":
            for table in plan_tables(given.claim):
                terminal().print(table)
        elif given.part == "collect":
            collect_again(planned(), print)
            write_report()
        elif given.part == "speeds":
            write_speeds(pairs(planned()))
        elif given.part == "power":
            write_power()
        else:
            write_report()


def planned(claim: str | None = None) -> list[Piece]:
    """The pieces, as the results so far determine rates and plateaus; only those of one claim if it is given."""
    study = Study()
    if claim:
        return list(pieces_of([arms(study.rates)[claim]]))
    return list(pieces(study.rates))


def settled(claim: str | None = None) -> list[Piece]:
    """Those that depend on no rate that is still open; before a claim's pieces, the trials that settle all rates."""
    rates = own_rates()
    wanted = once((*trials(rates), *pieces_of([arms(rates)[claim]]))) if claim else pieces(rates)
    return [piece for piece in wanted if rates.settled(piece)]


def plan_tables(claim: str | None = None) -> list[TextTable]:
    """Every piece that is left, and what each claim needs beyond the pieces before it, in minutes of an idle core."""
    speeds = read_speeds()
    rows, total = [], 0.0
    for piece in planned(claim):
        if not is_done(piece):
            minutes = idle_minutes(piece, speeds)
            total += minutes
            rows.append([piece.name, f"{minutes:.1f}", f"{total / 60:.1f}"])
    title = f"{len(rows)} pieces are left: {total / 60:.1f} hours of one idle core"
    tables = [TextTable(title, ("piece", "minutes", "hours so far"), rows)]
    if not claim:
        tables.append(_claims_table())
    return tables


def _claims_table() -> TextTable:
    study = Study()
    before = set(of_the_family(study.rates))
    rows = []
    for letter, found in arms(study.rates).items():
        own = [piece for piece in pieces_of([found]) if piece not in before and not is_done(piece)]
        before.update(own)
        rows.append([letter, str(len(own)), f"{sum(idle_minutes(piece, study.speeds) for piece in own):.0f}"])
    title = "What is left of each claim, beyond the family and the claims above it"
    return TextTable(title, ("claim", "pieces", "minutes"), rows)


if __name__ == "__main__":
    main()
