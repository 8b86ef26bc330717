"""One process, or DistributedDataParallel over several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compt.dist import collectives as dist
from compt.engines.average import Average
from compt.engines.base import (
    COMPUTE_DTYPES,
    AdamWSettings,
    Finish,
    Precision,
    check_precision,
    moments_of,
    parameter_groups,
)
from compt.engines.blocks import compile_blocks, compute_exactly, fill, recompute_blocks
from compt.engines.scale import LossScale
from compt.engines.state_dcp import copy_weights, load_state, save_state
from compt.weights.lazy import Weights


class DataParallelEngine:
    """Replicates the module on every rank (`Engine` says what each method does).

    The module is moved to `device`, or takes its values from `initial` if it is on the "meta" device; its parameters
    stay in their dtype. `caps` are largest values of parameters, held after each step.
    """

    format: Literal["dcp", "deepspeed"] = "dcp"

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
        check_precision(precision)
        settings = settings or AdamWSettings()
        self.rank = dist.rank()
        self.world_size = dist.world_size()
        self.device = torch.device(device)
        self.precision = precision
        if initial is not None:
            fill(module, initial, self.device)
        self.unwrapped = module.to(self.device)
        compute_exactly(self.device)
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
        self._names = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, settings.weight_decay), lr=0.0, betas=settings.betas, eps=settings.eps, fused=True
        )
        self._scale = LossScale(self.device) if precision == "fp16" else None
        self._caps = [(self._names[name], most) for name, most in (caps or {}).items()]
        self._average = None if ema_decay is None else Average(self._names, ema_decay)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, COMPUTE_DTYPES[self.precision], enabled=self.precision != "fp32")

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def forward(self, *inputs: Any, last: bool = True) -> dict[str, Tensor]:
        """Outputs of the module. DDP decides here, not in backward, whether gradients will be averaged."""
        with self._sync(last), self._autocast():
            outputs: dict[str, Tensor] = self.module(*inputs)
        return outputs

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Backward of `loss`, scaled in fp16; averaged over ranks when `last`, here and in the forward before."""
        with self._sync(last):
            (loss if self._scale is None else loss * self._scale.scale).backward()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of each trained parameter; zeros where there is none."""
        scale = 1.0 if self._scale is None else float(self._scale.scale)
        for name, parameter in self._names.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield name, gradient.detach().to("cpu", torch.float32, copy=True) / scale

    def step(self, lr: float, max_norm: float | None = None) -> Tensor:
        """Clip, AdamW, caps, average; the gradients are still scaled in fp16, and AdamW divides them."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        gradients = [parameter.grad for parameter in self._names.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=self.device.type == "cuda" or None)
        # The fused kernel's own switches, made for GradScaler: what divides gradients, and a value that turns the step
        # into nothing without anybody waiting for the device.
        if self._scale is not None:
            norm = norm / self._scale.scale
            self.optimizer.grad_scale = self._scale.scale  # type: ignore[attr-defined]
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._names.values(), max_norm, norm)
        found_inf = (~norm.isfinite()).float()
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        if self._scale is not None:
            self._scale.update(found_inf)
        with torch.no_grad():
            for parameter, most in self._caps:
                parameter.clamp_(max=most)
        if self._average:
            self._average.update(norm.isfinite())
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self, average: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter and buffer."""
        averages = self._average.tensors if average and self._average else {}
        for name, tensor in self.unwrapped.state_dict().items():
            yield name, averages.get(name, tensor).detach().to("cpu", copy=True)

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode: the whole module is on every rank."""
        training = self.unwrapped.training
        self.unwrapped.eval()
        try:
            yield
        finally:
            self.unwrapped.train(training)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name; the tensors are the live ones, but for the scaler's."""
        state = {f"model.{name}": tensor.detach() for name, tensor in self.unwrapped.state_dict().items()}
        for name, parameter in self._names.items():
            for key, tensor in moments_of(self.optimizer, parameter).items():
                state[f"optim.{name}.{key}"] = tensor
        if self._average:
            state |= self._average.state()
        if self._scale is not None:
            state |= self._scale.state()
        return state

    def save(self, folder: Path, *, asynchronous: bool = False) -> Finish:
        """Each rank writes a part of what all of them have."""
        return save_state(self.state(), folder, asynchronous=asynchronous)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Copy in place, from any number of ranks and from shards."""
        state = self.state()
        load_state(state, folder)
        if self._scale is not None:
            self._scale.load(state)

    def set_weights(self, weights: Weights) -> None:
        """Copy in place."""
        dist.on_all(lambda: copy_weights(self.unwrapped, weights))
