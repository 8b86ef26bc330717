"""Intervals over training seeds and over images, what they say about "lossless", and lengths of equal accuracy.

The images of one concept are no independent samples: an easy concept is easy in all styles. So the concepts are what
is drawn. Seeds are drawn too: another seed trains another model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.evaluate.stats import Direction, Verdict, direction, verdict

MARGIN = 1.0
"""Points. A model is as good as its baseline if the whole interval of their difference lies above -MARGIN."""

DRAWS = 1000
"""Draws of concepts for the interval of a length."""

STEPS = 20_001


@dataclass(frozen=True)
class Difference:
    """Accuracy minus accuracy, in points, with its 95 % interval: with one seed, over concepts alone."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def verdict(self) -> Verdict:
        """As by the rules: it needs several seeds, and "lossless" an interval that is narrower than the margin."""
        found = verdict(self.low, self.high, MARGIN)
        decided = self.seeds > 1 and (found == "not lossless" or self.half_width <= MARGIN)
        return found if decided else "undecided"

    @property
    def direction(self) -> Direction:
        """Whether the first is better or worse; as the verdict, it needs several seeds."""
        return direction(self.low, self.high) if self.seeds > 1 else "undecided"


def difference(own: ArrayLike, other: ArrayLike, concepts: ArrayLike) -> Difference:
    """The mean of own - other, over seeds and images.

    own, other: [seeds, images], 0 or 1, the same images in the same order; seed i of one and seed i of the other are a
    pair. concepts: [images], equal numbers for images of one concept.

    Seeds and concepts are crossed, and both are drawn. The variance is that of concepts as clusters (linearized ratio
    estimator; Cochran 1977, section 9.3), plus that of the seeds' differences over their number, less what differs by
    seed and concept, which both contain (two-way clustering; Cameron, Gelbach and Miller 2011), and never below the
    larger of the two. Degrees of freedom: Satterthwaite (1946) for the two. Raises ValueError for other shapes.
    """
    gains = np.asarray(own, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if gains.ndim != 2 or gains.shape[1] != len(np.asarray(concepts)):
        raise ValueError(f"gains of shape {gains.shape} for {len(np.asarray(concepts))} images")
    seeds, images = gains.shape
    mean = float(gains.mean())
    _, cluster = np.unique(np.asarray(concepts), return_inverse=True)
    cells = np.array([np.bincount(cluster, weights=one - mean) for one in gains]) / images
    clusters = cells.shape[1]
    correction = clusters / (clusters - 1)
    by_concept = float((cells.mean(axis=0) ** 2).sum()) * correction
    parts = [(by_concept, clusters - 1)]
    shared = 0.0
    if seeds > 1:
        parts.append((float(cells.sum(axis=1).var(ddof=1)) / seeds, seeds - 1))
        # Of each seed's own deviations from the mean of seeds.
        shared = float(((cells - cells.mean(axis=0)) ** 2).sum()) * correction / (seeds * (seeds - 1))
    variance = max(sum(part for part, _ in parts) - shared, *(part for part, _ in parts), 0.0)
    if variance == 0:
        return Difference(100 * mean, 100 * mean, 100 * mean, seeds)
    freedom = sum(part for part, _ in parts) ** 2 / sum(part**2 / degrees for part, degrees in parts)
    half = quantile(freedom) * math.sqrt(variance)
    return Difference(100 * mean, 100 * (mean - half), 100 * (mean + half), seeds)


@dataclass(frozen=True)
class Length:
    """Epochs of a baseline that is as accurate as a link, with a 95 % interval over concepts; `seeds` were averaged.

    `low` or `high` is None where it lies outside of the lengths that were measured.
    """

    epochs: float
    low: float | None
    high: float | None
    seeds: int = 1


def equal_lengths(
    own: ArrayLike, lengths: Sequence[float], baselines: ArrayLike, concepts: ArrayLike
) -> NDArray[np.float64]:
    """The length at which baselines reach the accuracy of `own`, and that of each draw of concepts: [1 + DRAWS].

    0 where the shortest reaches it, infinity where none does. own: [images], baselines: [lengths, images], the shares
    of seeds that are right; lengths ascend. Between lengths, accuracy is linear in their logarithm. Equal concepts are
    drawn for equal arguments, so that the draws of several models belong together.
    """
    values = np.vstack([np.asarray(baselines, dtype=np.float64), np.asarray(own, dtype=np.float64)])
    _, cluster = np.unique(np.asarray(concepts), return_inverse=True)
    sums = np.array([np.bincount(cluster, weights=row) for row in values])
    counts = np.bincount(cluster)
    drawn = np.vstack([np.ones(len(counts)), _draws(len(counts))])
    return np.array([_length_at(row, lengths) for row in (drawn @ sums.T) / (drawn @ counts)[:, None]])


def equal_length(
    own: ArrayLike, lengths: Sequence[float], baselines: ArrayLike, concepts: ArrayLike, seeds: int = 1
) -> Length | None:
    """`equal_lengths` with their interval; None where none or the shortest is as accurate."""
    found = equal_lengths(own, lengths, baselines, concepts)
    if not 0 < found[0] < math.inf:
        return None
    low, high = interval_of(found[1:])
    return Length(float(found[0]), low if low > 0 else None, high if high < math.inf else None, seeds)


def interval_of(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of draws, some of which may be infinite."""
    low, high = np.percentile(draws, [2.5, 97.5], method="nearest")
    return float(low), float(high)


@functools.lru_cache(maxsize=2)
def _draws(clusters: int) -> NDArray[np.float64]:
    """[draws, clusters]: how often each cluster is drawn. Floats, as NumPy multiplies matrices of integers slowly."""
    chances = np.full(clusters, 1 / clusters)
    return np.random.default_rng(0).multinomial(clusters, chances, size=DRAWS).astype(np.float64)


def _length_at(accuracies: NDArray[np.float64], lengths: Sequence[float]) -> float:
    """Where the first accuracies reach the last; 0 if the shortest does already, infinity if none does."""
    own, reached = accuracies[-1], np.flatnonzero(accuracies[:-1] >= accuracies[-1])
    if not len(reached):
        return math.inf
    if (at := int(reached[0])) == 0:
        return 0.0
    below, above = accuracies[at - 1], accuracies[at]
    share = (own - below) / (above - below)
    return float(lengths[at - 1] * (lengths[at] / lengths[at - 1]) ** share)


def quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, by integration; freedom >= 1.

    With t = sqrt(freedom) tan(angle), the density in angle is proportional to cos(angle)**(freedom - 1).
    """
    # For many degrees of freedom all mass lies at small angles; the grid ends where nothing is left.
    angles = np.linspace(0, min(math.pi / 2, 12 / math.sqrt(freedom)), STEPS)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(freedom) * math.tan(float(np.interp(0.95 * area[-1], area, angles)))
