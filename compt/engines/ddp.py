"""One process, or DistributedDataParallel over several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compt.engines.adamw import AdamWEngine
from compt.engines.base import AdamWSettings, Precision
from compt.engines.blocks import compile_blocks, fill, recompute_blocks


class DataParallelEngine(AdamWEngine):
    """Replicates the module on every rank (`Engine` says what each method does).

    The module is moved to `device`, or takes its values from `initial` if it is on the "meta" device. Its parameters
    keep their dtype. `caps` are the largest values of parameters, enforced after each step.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: AdamWSettings | None = None,
        *,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        initial: Mapping[str, Tensor] | None = None,
        caps: Mapping[str, float] | None = None,
        ema_decay: float | None = None,
        compile: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(module, precision, device)
        if initial is not None:
            fill(module, initial, self.device)
        module.to(self.device)
        if recompute:
            recompute_blocks(module)
        if compile:
            compile_blocks(module)
        self.module: nn.Module = module
        if self.world_size > 1:
            self.module = DistributedDataParallel(
                module,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self._prepare(settings or AdamWSettings(), caps, ema_decay)

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

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode: the whole module is on every rank."""
        training = self.unwrapped.training
        self.unwrapped.eval()
        try:
            yield
        finally:
            self.unwrapped.train(training)
