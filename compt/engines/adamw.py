"""What the engines share that step plain tensors with torch's AdamW and save with torch.distributed.checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compt.dist import collectives as dist
from compt.engines.average import Average
from compt.engines.base import (
    COMPUTE_DTYPES,
    AdamWSettings,
    EngineArguments,
    EngineHead,
    Finish,
    adamw,
    moments_of,
)
from compt.engines.scale import LossScale
from compt.engines.shards import like, whole
from compt.engines.state_dcp import copy_weights, load_state, save_state
from compt.weights.lazy import Weights


class AdamWEngine(EngineHead, ABC):
    """Everything but how the module is wrapped, run and clipped (`Engine` says what each method does).

    A subclass calls `_prepare` when its parameters are in place, and gives `forward`, `backward`, `scoring`, `_norm`.
    """

    format: Literal["dcp", "deepspeed"] = "dcp"

    def _prepare(
        self,
        settings: AdamWSettings | None,
        given: EngineArguments,
        stepped: Mapping[str, Tensor] | None = None,
        control: torch.device | None = None,
    ) -> None:
        """Make the optimizer, the loss scale and the average.

        `stepped` are the tensors that the optimizer steps, by the name of their parameter (default: the parameters);
        `control` is where the optimizer looks for its switches (default: the engine's device).
        """
        trained = self.unwrapped.named_parameters()
        self._names = {name: parameter for name, parameter in trained if parameter.requires_grad}
        self._stepped: dict[str, Any] = dict(self._names if stepped is None else stepped)
        self.optimizer = adamw(self._stepped, settings or AdamWSettings())
        self._control = control or self.device
        self._scale = LossScale(self.device) if self.precision == "fp16" else None
        self._caps = [(self._stepped[name], most) for name, most in (given.get("caps") or {}).items()]
        decay = given.get("ema_decay")
        self._average = None if decay is None else Average(self._stepped, decay)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, COMPUTE_DTYPES[self.precision], enabled=self.precision != "fp32")

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._scale is None else loss * self._scale.scale

    def _settle(self) -> None:
        """Leave in the module what this rank keeps of its parameters; an engine that gathers them gives them up."""

    @abstractmethod
    def _norm(self) -> Tensor:
        """Norm of the whole gradient, still scaled: a scalar on the device, the same on all ranks."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of each trained parameter; zeros where there is none."""
        scale = 1.0 if self._scale is None else float(self._scale.scale)
        for name, parameter in self._names.items():
            if parameter.grad is None:
                yield name, torch.zeros(parameter.shape)
            else:
                yield name, whole(parameter.grad, self.device).to("cpu", torch.float32, copy=True) / scale

    @torch.no_grad()
    def step(self, lr: float, max_norm: float | None = None) -> Tensor:
        """Clip, AdamW, caps, average; the gradients are still scaled in fp16, and AdamW divides them."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._norm()
        # The fused kernel's own switches, made for GradScaler: what divides gradients, and a value that turns the step
        # into nothing. GradScaler itself would ask the device whether to step, and wait for the answer.
        if self._scale is not None:
            norm = norm / self._scale.scale
            self.optimizer.grad_scale = self._scale.scale.to(self._control)  # type: ignore[attr-defined]
        if max_norm is not None:
            together = self.device.type == "cuda" or None
            torch.nn.utils.clip_grads_with_norm_(self._stepped.values(), max_norm, norm, foreach=together)
        found_inf = (~norm.isfinite()).float()
        self.optimizer.found_inf = found_inf.to(self._control)  # type: ignore[attr-defined]
        self.optimizer.step()
        if self._scale is not None:
            self._scale.update(found_inf)
        for tensor, most in self._caps:
            tensor.clamp_(max=most)
        if self._average:
            self._average.update(norm.isfinite())
        for tensors in (self._stepped, self._names):
            for tensor in tensors.values():
                tensor.grad = None
        return norm

    def weights(self, average: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter and buffer."""
        averages = self._average.tensors if average and self._average else {}
        self._settle()
        for name, tensor in self.unwrapped.state_dict().items():
            held = like(tensor, averages[name]) if name in averages else tensor
            yield name, whole(held, self.device).to("cpu", copy=True)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name; the tensors are the live ones, but for the scaler's."""
        self._settle()
        state = {f"model.{name}": tensor.detach() for name, tensor in self.unwrapped.state_dict().items()}
        for name, parameter in self._names.items():
            for key, tensor in moments_of(self.optimizer, self._stepped[name]).items():
                state[f"optim.{name}.{key}"] = tensor if key == "step" else like(parameter, tensor)
        if self._average:
            for name, tensor in self._average.state().items():
                owner = name.removeprefix("ema.")
                state[name] = like(self._names[owner], tensor) if owner in self._names else tensor
        if self._scale is not None:
            state |= self._scale.state()
        return state

    def save(self, folder: Path, *, asynchronous: bool = False) -> Finish:
        """Each rank writes its shards, and a part of what all of them have."""
        return save_state(self.state(), folder, asynchronous=asynchronous)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Copy in place, from any number of ranks, sharded or not."""
        state = self.state()
        load_state(state, folder)
        if self._scale is not None:
            self._scale.load(state)

    def set_weights(self, weights: Weights) -> None:
        """Copy in place; of a sharded tensor each rank keeps its shard."""
        self._settle()
        dist.on_all(lambda: copy_weights(self.unwrapped, weights))
