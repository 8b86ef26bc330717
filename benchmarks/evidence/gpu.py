"""The study at the paper's sizes, for a GPU that is there for minutes at a time: `python -m benchmarks.evidence.gpu`.

Each call goes on with the chain and its baselines, one seed after the other, for at most 8 minutes. It exits with 0
when all is trained, and with 75 if the same command should be given again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.pieces import SEEDS
from compt.errors import Interrupted

RECIPE = Path("benchmarks/evidence/icons_gpu.yaml")
RUNS = Path("runs/evidence_gpu")
COMMAND = (sys.executable, "-m", "compt", "chain")
BUDGET = 480.0
SAVING = 60.0
"""Seconds that a stopped run may take for its last checkpoint: 5 GB for ViT-L."""


def train(seed: int, seconds: float, options: Sequence[str]) -> int:
    """Go on with one seed; after `seconds` it is asked to save and stop. Returns the exit code of `compt chain`."""
    folder = ["--run-folder", str(RUNS / f"s{seed}")]
    chain = [*COMMAND, str(RECIPE), "--baselines", *folder, "--set", f"seed={seed}", *options]
    with subprocess.Popen(chain) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            return process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of this call, with saving (default 480)")
    given, options = parser.parse_known_args(argv)
    for seed in SEEDS:
        left = given.budget - SAVING - (time.monotonic() - started)
        code = train(seed, left, options) if left > 0 else Interrupted.exit_code
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
