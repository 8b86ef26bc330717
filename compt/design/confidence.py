"""Epochs that are enough with a given probability, for all pairs of candidates at once. No torch in here.

The predictive of log f is a Student t around a median, and for one number of images what the start prior and the growth
beyond the points add to it depends on the teacher's size alone (`EpochModel.draws`). So the quantile of a link is a
function of two numbers, that size and the scale of its t. It is taken from draws with a fixed seed, for every size and
on a grid of scales.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from compt.design.epochs import GROWTH_SPREAD, IMAGES_AT, EpochModel, Floats, LinkEpochs, features

MEDIAN = 0.5
"""The confidence that is planned with unless another is asked for."""
_DRAWS = 10_000
_SCALES = 6


def log_fraction(
    model: EpochModel,
    log2_student: ArrayLike,
    log2_teacher: ArrayLike,
    position: ArrayLike,
    images: float,
    distilled: bool,
    confidence: float = MEDIAN,
) -> Floats:
    """log f that is enough with probability `confidence`, not capped at 0; `EpochModel.log_fraction` for the median."""
    if confidence == MEDIAN:
        return model.log_fraction(log2_student, log2_teacher, position, images, distilled)
    rows = model.edges.held(features(log2_student, log2_teacher, position, images, not distilled))
    scales = np.sqrt(1 + np.einsum("...i,ij,...j->...", rows, model.posterior.scale, rows))
    sizes, place = np.unique(np.broadcast_to(log2_teacher, scales.shape), return_inverse=True)
    grid = np.linspace(scales.min(), scales.max() + 1e-6, _SCALES)
    table = _quantiles(model, sizes, grid, images, float(model.edges.further(rows).max()), confidence)
    step = (scales - grid[0]) / (grid[1] - grid[0])
    at, part, row = np.floor(step).astype(int), step % 1, place.reshape(scales.shape)
    added = (1 - part) * table[row, at] + part * table[row, at + 1]
    return np.asarray(rows @ model.posterior.mean + added)


def _quantiles(
    model: EpochModel, sizes: Floats, scales: Floats, images: float, further: float, confidence: float
) -> Floats:
    """[sizes, scales]: quantiles of what `EpochModel.draws` adds to the mean of the regression."""
    generator, post = np.random.default_rng(0), model.posterior
    noise = np.sqrt(post.rate / generator.gamma(post.shape, size=_DRAWS)) * generator.standard_normal(_DRAWS)
    growth = np.maximum(0.0, 1.0 + GROWTH_SPREAD * generator.standard_normal(_DRAWS))
    steep = generator.standard_normal(_DRAWS)
    table = np.empty((len(sizes), len(scales)))
    for at, size in enumerate(sizes):
        extra = (growth - 1) * post.mean[IMAGES_AT] * further
        if model.start is not None:
            each = np.maximum(0.0, math.log(model.start.factor) + math.log(model.start.spread) * steep)
            extra = extra + each * model.start.halvings(size, images, growth)
        table[at] = np.quantile(scales[:, None] * noise + extra, confidence, axis=1)
    return table


def known_epochs(model: EpochModel, link: LinkEpochs, confidence: float = MEDIAN) -> float:
    """Epochs of a link that was measured, or that bounds are known of, which are enough with `confidence`."""
    if confidence == MEDIAN:
        return model.epochs(link)
    return float(np.quantile(model.draws([link])[:, 0], confidence))
