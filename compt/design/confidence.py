"""Epochs that are enough with a given probability, for all pairs of candidates at once. No torch in here.

The predictive of log f is a Student t around its median, and the steepness of the start prior adds to it (`epochs`).
Its quantile lies above the median by s * q(r): s is the scale of the t, r = halvings / s, and q(r) is the quantile of
the standardised sum, taken from draws with a fixed seed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from compt.design.epochs import EpochModel, Floats, Link, features

MEDIAN = 0.5
"""The confidence that is planned with unless another is asked for."""
_DRAWS = 40_000
_STEPS = 24


def log_fraction(
    model: EpochModel,
    log2_student: ArrayLike,
    log2_teacher: ArrayLike,
    position: ArrayLike,
    images: float,
    distilled: bool,
    confidence: float = MEDIAN,
) -> Floats:
    """log f that is enough with probability `confidence`, as `EpochModel.log_fraction`, which is its median."""
    middle = model.log_fraction(log2_student, log2_teacher, position, images, distilled)
    if confidence == MEDIAN:
        return middle
    rows = model.edges.held(features(log2_student, log2_teacher, position, images, not distilled))
    scale = np.sqrt(1 + np.einsum("...i,ij,...j->...", rows, model.posterior.scale, rows))
    generator = np.random.default_rng(0)
    deviation = np.sqrt(model.posterior.rate / generator.gamma(model.posterior.shape, size=_DRAWS))
    noise = deviation * generator.standard_normal(_DRAWS)
    if model.start is None:
        return np.asarray(middle + scale * np.quantile(noise, confidence))
    usual = math.log(model.start.factor)
    steep = usual + math.log(model.start.spread) * generator.standard_normal(_DRAWS)
    extra = np.maximum(0.0, steep) - usual
    ratios = np.broadcast_to(model.start.halvings(log2_teacher, images), middle.shape) / scale
    grid = np.linspace(0.0, max(float(ratios.max()), 1e-9), _STEPS)
    quantiles = [float(np.quantile(noise + ratio * extra, confidence)) for ratio in grid]
    return np.asarray(middle + scale * np.interp(ratios, grid, quantiles))


def known_epochs(model: EpochModel, link: Link, confidence: float = MEDIAN) -> float:
    """Epochs of a link that was measured, or that bounds are known of, which are enough with `confidence`."""
    if confidence == MEDIAN:
        return model.epochs(link)
    return float(np.quantile(model.draws([link])[:, 0], confidence))
