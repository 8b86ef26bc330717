"""How large a model is, whether it fits the data, and where a link stands in its chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.cost.paper import IMAGES
from compt.cost.published import paper_parameters
from compt.models.presets import PRESETS, ModelSpec


@lru_cache(maxsize=4096)
def log2_size(spec: ModelSpec) -> float:
    """Base-2 logarithm of the parameters as Table G counts them."""
    return math.log2(paper_parameters(spec))


def log2_smallest(images: float) -> float:
    """Base-2 logarithm of the parameters of the smallest first model that fits a number of images.

    A stated rule, not a fit: a power law through the best starts that the paper names, ViT-T on CC3M and ViT-S on
    Merged-15M (figure 6).
    """
    small, large = log2_size(PRESETS["vit_t16"]), log2_size(PRESETS["vit_s16"])
    return small + (large - small) * math.log(images / IMAGES["cc3m"], IMAGES["merged15m"] / IMAGES["cc3m"])


def halvings(log2_teacher: ArrayLike, images: float, smallest: float | None = None) -> NDArray[np.float64]:
    """How many halvings teachers of 2 ** `log2_teacher` parameters lie below the smallest model that fits.

    `smallest`: its base-2 logarithm. Default: `log2_smallest`.
    """
    least = log2_smallest(images) if smallest is None else smallest
    return np.maximum(0.0, least - np.asarray(log2_teacher, dtype=np.float64))


def fits(log2_sizes: ArrayLike, images: float) -> NDArray[np.bool_]:
    """Whether models of 2 ** `log2_sizes` parameters are large enough for a number of images."""
    return halvings(log2_sizes, images) < 1e-6


def position(before: Sequence[ModelSpec], images: float) -> int:
    """The position of a link in its chain: how many of the models `before` it fit the data, at least 1.

    If smaller ones counted, a few tiny models in front would make every later link cheap.
    """
    return max(1, int(fits([log2_size(spec) for spec in before], images).sum()))
