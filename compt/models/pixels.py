"""From decoded bytes to a model's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_input(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, 3, H, W] -> (images / 255 - mean) / std as `dtype`, on the images' own device; computed in fp32."""
    shift, scale = sent(torch.tensor([list(mean), list(std)]).mul_(255.0), images.device).view(2, 3, 1, 1)
    return images.float().sub_(shift).div_(scale).to(dtype)


def sent(small: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. The tensor is pinned first, because the CPU waits for a copy of unpinned memory."""
    return (small.pin_memory() if device.type == "cuda" else small).to(device, non_blocking=True)
