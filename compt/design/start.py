"""How the best first model of a chain depends on the number of images: a stated prior. No torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.cost.paper import IMAGES
from compt.cost.published import paper_parameters
from compt.models.presets import PRESETS

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StartPrior:
    """How the best first model depends on the number of images: stated, not fitted.

    The smallest model that fits the data has `smallest` parameters: a power law through ViT-T at CC3M and ViT-S at
    Merged-15M, the best starts that the paper names (figure 6). Each halving of a predecessor below that multiplies its
    student's epochs by `factor`, uncertain by a factor of `spread` in either direction (one standard deviation; never
    below 1). Below and above those two data sets the exponent may be another one: `growth` times that between them.
    """

    factor: float = 2.0
    spread: float = math.sqrt(2.0)

    def log2_smallest(self, images: ArrayLike, growth: ArrayLike = 1.0) -> Floats:
        """Base-2 logarithm of the parameters of the smallest model that fits, broadcast over the arguments."""
        ends = [IMAGES["cc3m"], IMAGES["merged15m"]]
        sizes = [math.log2(paper_parameters(PRESETS[name])) for name in ("vit_t16", "vit_s16")]
        power = (sizes[1] - sizes[0]) / math.log2(ends[1] / ends[0])
        wanted = np.asarray(images, dtype=np.float64)
        inside = np.clip(wanted, ends[0], ends[1])
        beyond = np.log2(wanted / inside)
        return np.asarray(sizes[0] + power * (np.log2(inside / ends[0]) + np.asarray(growth) * beyond))

    def smallest(self, images: float) -> float:
        """Parameters (as Table G counts them) of the smallest model that fits `images` pictures."""
        return float(2.0 ** self.log2_smallest(images))

    def fits(self, log2_sizes: ArrayLike, images: float) -> NDArray[np.bool_]:
        """Whether models of 2 ** `log2_sizes` parameters are large enough for `images` pictures."""
        return self.halvings(log2_sizes, images) < 1e-6

    def halvings(self, log2_teacher: ArrayLike, images: ArrayLike, growth: ArrayLike = 1.0) -> Floats:
        """How far predecessors of 2 ** `log2_teacher` parameters are below the smallest that fits, in halvings."""
        below = self.log2_smallest(images, growth) - np.asarray(log2_teacher, dtype=np.float64)
        return np.asarray(np.maximum(0.0, below))
