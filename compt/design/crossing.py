"""Where a curve of accuracy over epochs crosses a target, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]

SAMPLES = 2000
"""Bootstrap draws of an interval."""

_CELLS = 10_000_000  # numbers of a bootstrap that are in memory at a time
_ROUNDING = 1e-9  # points of accuracy


def isotonic(values: ArrayLike, weights: ArrayLike) -> Numbers:
    """The nearest non-decreasing curves [..., k] to `values` [..., k] by least squares with `weights` [k] > 0.

    Neighbours that fall are pooled to their mean. Rising values stay as they are. By the max-min formula (Robertson,
    Wright and Dykstra 1988): the value at i is the largest over a <= i of the smallest over b >= i of the mean of a..b.
    """
    values, weights = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    k = values.shape[-1]
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values * weights, axis=-1)], axis=-1)
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    best = np.full(values.shape, -np.inf)
    for a in range(k):
        means = (sums[..., a + 1 :] - sums[..., a : a + 1]) / (mass[a + 1 :] - mass[a])
        # Running minimum from the right: entry j is the smallest mean of a..b over b >= a + j.
        least = np.minimum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]
        best[..., a:] = np.maximum(best[..., a:], least)
    return best


def crossing(epochs: ArrayLike, accuracy: ArrayLike, target: ArrayLike, weights: ArrayLike) -> Numbers:
    """Epochs [...] at which curves through (`epochs` [k] rising, `accuracy` [..., k]) first reach `target` [...].

    The curve is made non-decreasing and drawn straight from point to point. -inf: the first point lies above the
    target; inf: no point reaches it. Nothing is extrapolated.
    """
    x = np.asarray(epochs, dtype=np.float64)
    y = isotonic(accuracy, weights)
    goal = np.asarray(target, dtype=np.float64)[..., None]
    reached = y >= goal - _ROUNDING
    at = reached.argmax(axis=-1)
    before = np.maximum(at - 1, 0)
    high = np.take_along_axis(y, at[..., None], axis=-1)[..., 0]
    low = np.take_along_axis(y, before[..., None], axis=-1)[..., 0]
    rise = np.where(high > low, high - low, 1.0)
    share = np.clip((goal[..., 0] - low) / rise, 0.0, 1.0)
    found = x[before] + share * (x[at] - x[before])
    found = np.where((at == 0) & (y[..., 0] > goal[..., 0] + _ROUNDING), -np.inf, found)
    return np.where(reached.any(axis=-1), found, np.inf)


def paired_draws(shares: Sequence[Numbers]) -> Numbers:
    """Accuracies [SAMPLES, m] in percent of m models for bootstrap samples of the images, the same for all.

    `shares` are m arrays [n]: whether each image was right, 0 or 1, or the mean over jobs.
    """
    patterns, counts = np.unique(np.stack(shares, axis=1), axis=0, return_counts=True)
    n = int(counts.sum())
    generator = np.random.default_rng(0)
    step = max(1, _CELLS // len(counts))
    drawn = [
        generator.multinomial(n, counts / n, size=min(step, SAMPLES - done)) @ patterns
        for done in range(0, SAMPLES, step)
    ]
    return 100 * np.concatenate(drawn) / n


def interval(epochs: ArrayLike, draws: Numbers, margin: float, weights: ArrayLike) -> tuple[float | None, float | None]:
    """95 % percentile interval of the epochs to match; `draws` [samples, k + 1] hold the baseline in the last column.

    A side is None where it lies outside the points, and so is not known.
    """
    x = np.asarray(epochs, dtype=np.float64)
    found = np.sort(crossing(x, draws[:, :-1], draws[:, -1] - margin, weights))
    low, high = (float(found[round(share * (len(found) - 1))]) for share in (0.025, 0.975))
    # All draws beyond the last point still say that more epochs than its are needed; the same for the first.
    return (
        None if low == -np.inf else float(min(low, x[-1])),
        None if high == np.inf else float(max(high, x[0])),
    )
