"""From the bytes that the decoders yield to the numbers that a model takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_input(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, 3, H, W] -> (images / 255 - mean) / std as `dtype`, on the images' own device.

    Computed in fp32 whatever the dtype.
    """
    shift, scale = sent(torch.tensor([list(mean), list(std)]).mul_(255.0), images.device).view(2, 3, 1, 1)
    return images.float().sub_(shift).div_(scale).to(dtype)


def sent(small: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, which nobody waits for: for a copy from memory that is not pinned one would."""
    return (small.pin_memory() if device.type == "cuda" else small).to(device, non_blocking=True)
