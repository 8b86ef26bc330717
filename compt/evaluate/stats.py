"""Confidence intervals, and what they say about "lossless"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.cost.paper import LOSSLESS_POINTS

Verdict = Literal["lossless", "not lossless", "undecided"]

_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
_CELLS = 10_000_000  # numbers of a bootstrap in memory at a time


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson 1927). It also holds for few samples and near 0 and 100."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
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
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(accuracy of a - accuracy of b, low, high) in points, with the 95 % percentile interval.

    Both arrays [n] have the same samples in the same order. `clusters` [n] (numbers or names, such as the concept that
    several images show) groups samples that are not independent: whole clusters are then drawn.
    Raises ValueError for unequal lengths, and for fewer than two samples or clusters.
    """
    a, b = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"paired results have shapes {list(a.shape)} and {list(b.shape)}")
    gains = a - b
    generator = np.random.default_rng(seed)
    if clusters is None:
        drawn = _draw_samples(gains, samples, generator)
    else:
        names = np.asarray(clusters)
        if names.shape != gains.shape:
            raise ValueError(f"{len(names)} clusters for {len(gains)} samples")
        drawn = _draw_clusters(gains, names, samples, generator)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return 100 * float(gains.mean()), 100 * float(low), 100 * float(high)


def _draw_samples(gains: NDArray[np.float64], samples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    if len(gains) < 2:
        raise ValueError(f"a bootstrap over {len(gains)} samples says nothing")
    # Gains have few distinct values. To draw how often each occurs is the same as to draw samples, and takes no memory.
    values, counts = np.unique(gains, return_counts=True)
    drawn = generator.multinomial(len(gains), counts / len(gains), size=samples)
    means: NDArray[np.float64] = drawn @ values / len(gains)
    return means


def _draw_clusters(
    gains: NDArray[np.float64], names: NDArray[np.generic], samples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    _, member = np.unique(names, return_inverse=True)
    sizes = np.bincount(member).astype(np.float64)
    sums = np.bincount(member, weights=gains)
    if len(sizes) < 2:
        raise ValueError(f"a bootstrap over {len(sizes)} clusters says nothing")
    means = []
    chunk = max(1, _CELLS // len(sizes))
    for start in range(0, samples, chunk):
        chosen = generator.integers(len(sizes), size=(min(chunk, samples - start), len(sizes)))
        means.append(sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))
    return np.concatenate(means)


def verdict(difference: float, low: float, high: float, margin: float = LOSSLESS_POINTS) -> Verdict:
    """What the interval of (chain - baseline) in points says.

    "lossless": the whole interval is above -margin. "not lossless": it is below. "undecided": it spans -margin, or a
    number is not finite.
    """
    if not all(map(math.isfinite, (difference, low, high))):
        return "undecided"
    if low > -margin:
        return "lossless"
    return "not lossless" if high < -margin else "undecided"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1) over seeds; None for a single seed. Raises ValueError for no value."""
    if not values:
        raise ValueError("no values")
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None
