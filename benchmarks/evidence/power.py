"""What the study's verdicts can show at its size: simulated studies whose true difference is known.

Concepts are easy or hard for both sides, a seed shifts a whole model, and it shifts a model on some concepts. The
spreads are about those of the measured pieces: of b after 20 epochs, a seed shifts links by 0.4 points and baselines by
1.7.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.run import RAW
from benchmarks.evidence.statistics import MARGIN, difference
from compt.files import write_text
from compt.text import TextTable

CONCEPTS, IMAGES = 1018, 11
"""Of the test sets: concepts, and images of each."""
STUDIES = 200
OF_SEEDS = 0.08
"""The standard deviation of what a seed changes for a concept."""


class Setting(NamedTuple):
    """`accuracy`: the mean; `of_concepts`: its standard deviation over concepts; `truths`: differences in points.

    `spreads`: standard deviations of what a seed changes for the whole model, in points.
    """

    name: str
    accuracy: float
    of_concepts: float
    truths: tuple[float, ...]
    seeds: tuple[int, ...]
    spreads: tuple[float, ...]


SETTINGS = (
    Setting("all images", 0.35, 0.25, (0.0, -2.0, -4.0), (2, 3, 5), (0.2, 0.5, 1.5)),
    Setting("few images", 0.2, 0.15, (0.0, -1.0, -2.0), (3, 6), (0.2, 0.6)),
)
OUT = RAW.parent / "power.md"


def simulated(
    truth: float, seeds: int, spread: float, setting: Setting = SETTINGS[0], studies: int = STUDIES
) -> list[str]:
    """A row of the table: the share of intervals that hold the truth, their half-width, and how often verdicts come."""
    random = np.random.default_rng(0)
    concepts = np.repeat(np.arange(CONCEPTS), IMAGES)
    found = []
    for _ in range(studies):
        easy = random.normal(setting.accuracy, setting.of_concepts, CONCEPTS)

        def answers(shift: float, easy: NDArray[np.float64] = easy) -> NDArray[np.bool_]:
            of_model = random.normal(shift / 100, spread / 100, (seeds, 1))
            # Away from 0 and 1 first, so that clipping hardly changes the true difference.
            chance = np.clip(easy, 0.1, 0.9) + random.normal(0, OF_SEEDS, (seeds, CONCEPTS)) + of_model
            return random.random((seeds, len(concepts))) < np.clip(chance, 0, 1)[:, concepts]

        found.append(difference(answers(truth), answers(0.0), concepts))
    covered = np.mean([one.low <= truth <= one.high for one in found])
    width = np.mean([one.half_width for one in found])
    shares = [np.mean([one.verdict == name for one in found]) for name in ("lossless", "not lossless")]
    return [f"{truth:+g}", str(seeds), f"{spread:g}", *(f"{one:.2f}" for one in (covered, width, *shares))]


def power_table(setting: Setting) -> TextTable:
    """Coverage, width and verdicts by true difference, seeds and spread."""
    header = ["true difference", "seeds", "points a seed shifts", "coverage", "half-width", "lossless", "not lossless"]
    given = itertools.product(setting.truths, setting.seeds, setting.spreads)
    rows = [simulated(*one, setting) for one in given]
    notes = [
        f"{STUDIES} simulated studies a row, of {CONCEPTS} concepts with {IMAGES} images. Margin: {MARGIN:g} points."
    ]
    title = f"How often a verdict comes out: {setting.name}, mean accuracy {setting.accuracy:g}"
    return TextTable(title, header, rows, notes)


def write_power(out: Path = OUT) -> None:
    """Write the table to `out`."""
    tables = "\n\n".join(power_table(setting).markdown().strip() for setting in SETTINGS)
    write_text(out, f"# Power\n\nWritten by `python -m benchmarks.evidence power`.\n\n{tables}\n")
