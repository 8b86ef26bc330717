"""The moving average of weights, kept where the weights are: whole tensors, or the shards of a rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SMALL = 1 << 20
"""Numbers of a tensor for which a GPU takes less time than Python takes to launch a kernel."""


def _is_small(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.numel() <= _SMALL


class Average:
    """Averages of `tensors` (fp32, by name). The first update copies them; later ones keep `decay` of the average.

    On a GPU, small tensors are updated together, in a few launches. That takes a copy of them for a moment.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self._sources = dict(tensors)
        self._decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._sources.items()}
        device = next((tensor.device for tensor in self._sources.values()), torch.device("cpu"))
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Take in the tensors as they are now, unless the scalar `finite` is false.

        `finite` is a tensor, and enters as a weight: an `if` would make the CPU wait for the GPU.
        """
        finite = finite.to(self.updates.device)
        weight = torch.where(self.updates == 0, 1.0, 1.0 - self._decay) * finite
        small: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, tensor in self._sources.items():
            average = self.tensors[name]
            if _is_small(tensor):
                small[0].append(average)
                small[1].append(tensor.detach())
            else:
                average.lerp_(tensor.detach(), weight.to(average.device, average.dtype))
        if small[0]:
            torch._foreach_mul_(small[0], 1.0 - weight)
            torch._foreach_add_(small[0], torch._foreach_mul(small[1], weight))
        self.updates += finite

    def state(self) -> dict[str, Tensor]:
        """The live tensors for a checkpoint: `ema.NAME`, and the number of updates as `ema.updates`."""
        return {f"ema.{name}": tensor for name, tensor in self.tensors.items()} | {"ema.updates": self.updates}
