"""Bayesian linear regression with its textbook update, and quantiles of a truncated Student t. No torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_GRID = 4097


@dataclass(frozen=True)
class Posterior:
    """Normal-inverse-gamma: variance ~ IG(shape, rate), coefficients ~ N(mean [k], variance * scale [k, k])."""

    mean: Floats
    scale: Floats
    shape: float
    rate: float

    def updated(self, rows: Floats, values: Floats, weights: Floats) -> Posterior:
        """After `values` [n] at `rows` [n, k], with noise of variance / `weights` [n]. The textbook update."""
        before = np.linalg.inv(self.scale)
        precision = before + rows.T @ (weights[:, None] * rows)
        scale: Floats = np.asarray(np.linalg.inv(precision), dtype=np.float64)
        mean = scale @ (before @ self.mean + rows.T @ (weights * values))
        rest = weights @ values**2 + self.mean @ before @ self.mean - mean @ precision @ mean
        return Posterior(mean, scale, self.shape + len(values) / 2, float(self.rate + rest / 2))

    @property
    def noise(self) -> float:
        """Standard deviation of the noise: root of the mean variance."""
        return math.sqrt(self.rate / (self.shape - 1))

    def spreads(self) -> Floats:
        """Standard deviations of the coefficients [k]."""
        return np.asarray(np.sqrt(np.diag(self.scale)) * self.noise)

    def width(self, row: Floats) -> float:
        """Scale of the predictive Student t, of 2 * shape degrees of freedom, at `row` [k]."""
        return math.sqrt(self.rate / self.shape * (1 + float(row @ self.scale @ row)))


def truncated_t(shares: ArrayLike, degrees: float, low: float = -math.inf, high: float = math.inf) -> Floats:
    """Quantiles, at `shares` from 0 to 1, of a standard Student t variable of which `low` < it < `high` is known.

    Both may lie far in a tail. `high` has to be above `low`.
    """
    # With t = root(degrees) tan(angle), the density over the angle is cos(angle) ** (degrees - 1): a finite interval.
    root = math.sqrt(degrees)
    angles = np.linspace(math.atan(low / root), math.atan(high / root), _GRID)
    logs = (degrees - 1) * np.log(np.cos(angles))
    density = np.exp(logs - logs.max())
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return np.asarray(root * np.tan(np.interp(np.asarray(shares, dtype=np.float64) * area[-1], area, angles)))
