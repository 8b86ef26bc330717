"""Resizing along one axis as matrices [new size, old size] in float64: positions and patches."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from compt.expand.linalg import one_thread

Floats = NDArray[np.float64]

_A = -0.5


def _cubic(x: Floats) -> Floats:
    """Keys' cubic convolution kernel with a = -1/2, which torch uses where it filters against aliasing."""
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def bicubic(old: int, new: int) -> Floats:
    """One side of torch's `F.interpolate(mode="bicubic", antialias=True, align_corners=False)`."""
    scale = old / new
    stretch = max(scale, 1.0)
    weight = np.zeros((new, old))
    for k in range(new):
        centre = scale * (k + 0.5)
        low = max(int(centre - 2 * stretch + 0.5), 0)
        high = min(int(centre + 2 * stretch + 0.5), old)
        taps = _cubic((np.arange(low, high, dtype=np.float64) - centre + 0.5) / stretch)
        weight[k, low:high] = taps / taps.sum()
    return weight


def grid_weights(old: int, new: int) -> Floats:
    """One side of a ViT's grid of positions, as open_clip's `resize_pos_embed`."""
    return bicubic(old, new)


def offset_weights(old: int, new: int) -> Floats:
    """One side of a Swin's map of relative positions."""
    return bicubic(old, new)


def pixel_weights(old: int, new: int) -> Floats:
    """One side of a patch: the pseudo-inverse of resizing pictures, transposed (FlexiViT, section 3.4).

    A patch that grows gives for a resized patch of a picture the token that the old one gives for the patch.
    """
    with one_thread():
        found = torch.linalg.pinv(torch.from_numpy(bicubic(old, new).T.copy()))
    return np.asarray(found.contiguous().numpy())
