"""fp16's factor of the loss, by the rules of torch's GradScaler, whose own class does not know shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """`scale` is a scalar tensor on the device, so that the CPU never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), 65536.0, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Halve the scale when `found_inf` (a float scalar) is not zero; double it after 2000 steps with zero."""
        torch._amp_update_scale_(self.scale, self.growth_tracker, found_inf, _GROWTH, _BACKOFF, _INTERVAL)

    def state(self) -> dict[str, Tensor]:
        """Copies for a checkpoint."""
        return {
            "scaler.scale": self.scale.to("cpu", torch.float64, copy=True),
            "scaler.growth_tracker": self.growth_tracker.to("cpu", torch.int64, copy=True),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        self.scale.copy_(state["scaler.scale"])
        self.growth_tracker.copy_(state["scaler.growth_tracker"])
