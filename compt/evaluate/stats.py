"""Confidence intervals, and what they say about "lossless"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.cost.paper import LOSSLESS_POINTS

Verdict = Literal["lossless", "not lossless", "undecided"]
Direction = Literal["better", "worse", "undecided"]

_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson 1927). It also holds for few samples and near 0 and 100."""
    if n == 0:
        return 0.0, 100.0
    share, square = successes / n, _Z**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At the ends the formula gives 0 and 1 exactly; rounding would not.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return 100 * low, 100 * high


def paired_bootstrap(
    correct_a: ArrayLike, correct_b: ArrayLike, *, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(accuracy of a - accuracy of b, low, high) in points, with the 95 % percentile interval.

    Both arrays [n] or [seeds, n], n > 1, have the same samples in the same order: 0 or 1, or the mean over seeds. Where
    both have two seeds or more, the interval covers the choice of seeds too: the mean over seeds of each moves by
    Student's t (Behrens and Fisher's difference of two means; 2 seeds give a very wide interval). Otherwise it covers
    the choice of samples alone.
    """
    a, b = (np.atleast_2d(np.asarray(each, dtype=np.float64)) for each in (correct_a, correct_b))
    # Gains have few distinct values. To draw how often each occurs is the same as to draw samples, and takes no memory.
    gains = a.mean(axis=0) - b.mean(axis=0)
    values, counts = np.unique(gains, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(gains), counts / len(gains), size=samples) @ values / len(gains)
    if min(len(a), len(b)) > 1:
        # Drawing seeds with replacement instead would give intervals far too narrow for 2 to 5 seeds.
        for each in (a, b):
            error = each.mean(axis=1).std(ddof=1) / math.sqrt(len(each))
            drawn = drawn + error * rng.standard_t(len(each) - 1, size=samples)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return 100 * float(gains.mean()), 100 * float(low), 100 * float(high)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], counts: ArrayLike, *, samples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of `statistic` over sets of images that are drawn, with replacement, from the set.

    counts: int [K], the number of images of each kind: all ones where every image is of its own. `statistic` takes such
    counts of a drawn set. Where it is NaN for a drawn set, that set is left out.
    """
    counts = np.asarray(counts)
    n, generator = int(counts.sum()), np.random.default_rng(0)
    drawn = [statistic(generator.multinomial(n, counts / n)) for _ in range(samples)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def verdict(low: float, high: float, margin: float = LOSSLESS_POINTS) -> Verdict:
    """What the interval of (chain - baseline), from `low` to `high` points, says.

    "lossless": the whole interval is above -margin. "not lossless": it is below. "undecided": it spans -margin, or a
    bound is not a number.
    """
    if low > -margin:
        return "lossless"
    return "not lossless" if high < -margin else "undecided"


def direction(low: float, high: float) -> Direction:
    """What the interval of a difference says of the first: "undecided" where it spans 0."""
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
