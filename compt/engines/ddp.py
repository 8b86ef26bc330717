"""One process, or DistributedDataParallel over several."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compt.engines.adamw import AdamWEngine
from compt.engines.base import AdamWSettings, EngineArguments
from compt.models.clip import fill


class DataParallelEngine(AdamWEngine):
    """Replicates the module on every rank (`Engine` says what each method does).

    The module is moved to `device`, or takes its values from `initial` if it is on the "meta" device. Its parameters
    keep their dtype.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: AdamWSettings | None = None,
        **given: Unpack[EngineArguments],
    ) -> None:
        super().__init__(module, given)
        if (initial := given.get("initial")) is not None:
            fill(module, initial, self.device)
        module.to(self.device)
        self._change_blocks(given)
        self.module = self._wrapped(module) if self.world_size > 1 else module
        self._prepare(settings, given)

    def _wrapped(self, module: nn.Module) -> nn.Module:
        # With `device_ids`, DDP would move every input to the GPU, also the captions' lengths, which stay on the CPU so
        # that no step waits for the GPU.
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def forward(self, *inputs: Any, last: bool = True) -> dict[str, Tensor]:
        """Outputs of the module. DDP decides here, not in backward, whether it will average gradients."""
        with self._sync(last), self._autocast():
            outputs: dict[str, Tensor] = self.module(*inputs)
        return outputs

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Backward of `loss`, scaled in fp16. Averages gradients if `last`, here and in the forward before."""
        with self._sync(last):
            self._scaled(loss).backward()

    def _norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._names.values() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=self.device.type == "cuda" or None)
