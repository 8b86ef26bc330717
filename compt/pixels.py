"""From the bytes that the decoders yield to the numbers that a model takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_input(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, 3, H, W] -> (images / 255 - mean) / std as `dtype`, on the images' own device.

    Computed in fp32 whatever the dtype.
    """
    scale = torch.tensor(std, device=images.device).mul(255.0).view(3, 1, 1)
    shift = torch.tensor(mean, device=images.device).mul(255.0).view(3, 1, 1)
    return images.float().sub_(shift).div_(scale).to(dtype)
