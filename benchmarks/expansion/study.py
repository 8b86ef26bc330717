"""Train students that differ only by their expansion, and compare how they start and end.

`python -m benchmarks.expansion` trains, collects and reports; after a stop the same command continues. `collect` and
`report` run one of these parts, also while training runs. Under torchrun, several processes share each training run;
two processes with `--seeds 0` and `--seeds 1` share one study.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import one_line
from benchmarks.expansion.collect import collect
from benchmarks.expansion.report import read_results, write_report
from benchmarks.expansion.run import run_study
from benchmarks.expansion.settings import EMOJI, SETTINGS
from compt.dist import collectives as dist
from compt.files import write_text

RESULTS = Path("docs/results/expansion")
"""Folder of the committed results, of the default setting."""


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the folders that follow from the setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expansion", description=__doc__)
    parser.add_argument("part", nargs="?", default="all", choices=("all", "train", "collect", "report"))
    parser.add_argument("--setting", default=EMOJI.name, choices=SETTINGS)
    parser.add_argument("--run", type=Path, help="the study's folder; default runs/expansion-SETTING")
    parser.add_argument("--out", type=Path, help=f"for results; default {RESULTS}, or RUN/results of other settings")
    parser.add_argument("--seeds", type=int, nargs="+", help="train only these seeds")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field"
    )
    found = parser.parse_args(argv)
    found.run = found.run or Path("runs") / f"expansion-{found.setting}"
    found.out = found.out or (RESULTS if found.setting == EMOJI.name else found.run / "results")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Train, collect and report, or one of these."""
    given = options(argv)
    refused: list[str] = []
    with one_line():
        try:
            if given.part in ("all", "train"):
                setting = SETTINGS[given.setting]
                refused = run_study(setting, given.run, _say, changes=given.changes, seeds=given.seeds)
            dist.on_main(lambda: _write(given))
        finally:
            dist.shutdown()
    for line in refused:
        _say(f"left out: {line}")
    if refused:
        sys.exit(1)


def _write(given: argparse.Namespace) -> None:
    if given.part in ("all", "collect"):
        write_text(given.out / "results.json", json.dumps(collect(given.run), indent=1) + "\n")
    if given.part in ("all", "collect", "report"):
        _say(f"written: {write_report(read_results(given.out), given.out)}")


def _say(text: str) -> None:
    if dist.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    main()
