"""Intervals over training seeds and over images, and what they say about "lossless".

The images of one concept are no independent samples: an easy concept is easy in all styles. So the concepts are what
is drawn. Seeds are drawn too: another seed trains another model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from compt.evaluate.stats import Direction, Verdict, direction, verdict

MARGIN = 1.0
"""Points. A model is as good as its baseline if the whole interval of their difference lies above -MARGIN."""

STEPS = 20_001


@dataclass(frozen=True)
class Difference:
    """Accuracy minus accuracy, in points, with its 95 % interval. With one seed, the interval is over images alone."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def verdict(self) -> Verdict:
        """As by the rules: "lossless" needs several seeds, and an interval that is narrower than the margin."""
        found = verdict(self.low, self.high, MARGIN)
        return found if found == "not lossless" or (self.seeds > 1 and self.half_width <= MARGIN) else "undecided"

    @property
    def direction(self) -> Direction:
        """Whether the first is better or worse; as the verdict, it needs several seeds."""
        return direction(self.low, self.high) if self.seeds > 1 else "undecided"


def difference(own: ArrayLike, other: ArrayLike, concepts: ArrayLike) -> Difference:
    """The mean of own - other, over seeds and images.

    own, other: [seeds, images], 0 or 1, the same images in the same order; seed i of one and seed i of the other are a
    pair. concepts: [images], equal numbers for images of one concept.

    The variance is the sum of two: that of the seeds' differences over their number, and that of concepts as clusters
    (linearized ratio estimator; Cochran 1977, section 9.3). The noise that both have in common counts twice, so the
    interval is rather too wide. Degrees of freedom: Satterthwaite (1946). Raises ValueError for other shapes.
    """
    gains = np.asarray(own, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if gains.ndim != 2 or gains.shape[1] != len(np.asarray(concepts)):
        raise ValueError(f"gains of shape {gains.shape} for {len(np.asarray(concepts))} images")
    seeds, images = gains.shape
    mean = float(gains.mean())
    _, cluster = np.unique(np.asarray(concepts), return_inverse=True)
    residuals = np.bincount(cluster, weights=gains.mean(axis=0) - mean)
    clusters = len(residuals)
    parts = [(float(residuals @ residuals) / images**2 * clusters / (clusters - 1), clusters - 1)]
    if seeds > 1:
        parts.append((float(gains.mean(axis=1).var(ddof=1)) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Difference(100 * mean, 100 * mean, 100 * mean, seeds)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = quantile(freedom) * math.sqrt(variance)
    return Difference(100 * mean, 100 * (mean - half), 100 * (mean + half), seeds)


def quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, by integration; freedom >= 1.

    With t = sqrt(freedom) tan(angle), the density in angle is proportional to cos(angle)**(freedom - 1).
    """
    # For many degrees of freedom all mass lies at small angles; the grid ends where nothing is left.
    angles = np.linspace(0, min(math.pi / 2, 12 / math.sqrt(freedom)), STEPS)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(freedom) * math.tan(float(np.interp(0.95 * area[-1], area, angles)))
