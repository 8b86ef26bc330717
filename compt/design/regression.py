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


def truncated_t(
    shares: ArrayLike,
    degrees: float,
    middles: ArrayLike = 0.0,
    scales: ArrayLike = 1.0,
    low: float = -math.inf,
    high: float = math.inf,
) -> Floats:
    """Quantiles, at `shares` from 0 to 1, of a Student t variable of which `low` < it < `high` is known.

    With several `middles` and `scales` [k] it is any of these with the same probability. The ends may lie far in a
    tail. `high` has to be above `low`.
    """
    middle, scale = np.broadcast_arrays(np.atleast_1d(middles), np.atleast_1d(scales))
    # With x = centre + width tan(angle) a density over the angle is that over x by 1 / cos(angle)^2: a finite interval.
    centre, width = float(middle.mean()), float(scale.max()) * math.sqrt(degrees)
    angles = np.linspace(math.atan((low - centre) / width), math.atan((high - centre) / width), _GRID)
    z = (centre + width * np.tan(angles)[:, None] - middle) / scale
    logs = -(degrees + 1) / 2 * np.log1p(z**2 / degrees) - np.log(scale) - 2 * np.log(np.cos(angles))[:, None]
    density = np.exp(logs - logs.max()).sum(axis=1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    found = np.interp(np.asarray(shares, dtype=np.float64) * area[-1], area, angles)
    return np.asarray(centre + width * np.tan(found))
