"""What a trainer asks of an engine: the way in which one module is wrapped, run, stepped, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp16"]

COMPUTE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of activations, and of a frozen teacher, by precision. Parameters stay in fp32."""


@dataclass(frozen=True)
class AdamWSettings:
    """Table C of the paper. The learning rate comes from the schedule, step by step."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1


class Engine(Protocol):
    """Every engine gives one process's results in fp32: loss, gradient norm, parameters after k steps."""

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    """The wrapped module; run it through `forward`."""
    unwrapped: nn.Module
    """The module itself, with its own parameter names."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as the engine was told."""

    def forward(self, *inputs: Any, last: bool = True) -> dict[str, Tensor]:
        """The module's outputs, in mixed precision. `last` as in the `backward` that will follow."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add to the gradients; they are averaged over ranks in the backward that is the `last` before a step."""

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Scale gradients down to `max_norm`, if given. Returns the norm before that, the same on all ranks."""

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps to come."""

    def step(self) -> None:
        """One step of the optimizer, left out on all ranks when the norm just computed is not finite."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of parameters, buffers and optimizer state under flat names: `model.*`, `optim.*`, `scaler.*`."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse. Raises ArtefactError when a name or a shape does not fit. Settings are not part of it."""


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: as in open_clip not to vectors (biases, norms), bias tables and logit_scale."""
    return parameter.ndim >= 2 and "bias" not in name and "logit_scale" not in name
