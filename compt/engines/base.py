"""What a trainer asks of an engine: the way in which one module is wrapped, run, stepped, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from compt.dist import collectives as dist
from compt.engines.blocks import compute_exactly
from compt.errors import ConfigError, nearest
from compt.weights.lazy import Weights

Precision = Literal["fp32", "bf16", "fp16"]

COMPUTE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of activations, and of a frozen teacher, by precision. Parameters stay in fp32."""

Finish = Callable[[], list[Path]]
"""Waits until this process's part of a save is on the disk; returns the files that it wrote."""


@dataclass(frozen=True)
class AdamWSettings:
    """Table C of the paper. The learning rate comes from the schedule, step by step."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1


class Engine(Protocol):
    """Every engine gives one process's results in fp32: loss, gradient norm, parameters after k steps.

    Every method is called on all ranks together.
    """

    rank: int
    world_size: int
    device: torch.device
    unwrapped: nn.Module
    """The module itself, with its own parameter names; what is in its parameters is the engine's affair."""
    format: Literal["dcp", "deepspeed"]
    """What `save` writes: engines of one format load each other's."""

    def forward(self, *inputs: Any, last: bool = True) -> dict[str, Tensor]:
        """The module's outputs, in mixed precision. `last` as in the `backward` that will follow."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add to the gradients; they are averaged over ranks in the backward that is the `last` before a step."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of each trained parameter, whole, averaged over ranks and unscaled: fp32, on the CPU.

        After the `last` backward and before `step`; one at a time, so that no rank holds all of them.
        """

    def step(self, lr: float, max_norm: float | None = None) -> Tensor:
        """One step of the optimizer with gradients scaled down to `max_norm`, if given; then they are forgotten.

        Returns the norm of the whole gradient before that: a scalar tensor, the same on all ranks, not waited for where
        that can be helped. When it is not finite, parameters, moments and average stay as they are on all ranks.
        """

    def weights(self, average: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 value of each parameter and buffer of the module's state, or of its moving average.

        Whole, on the CPU, one at a time, so that no rank holds all of them.
        """

    def scoring(self) -> AbstractContextManager[None]:
        """Within it the module is in evaluation mode, and each rank may run it alone, any number of times.

        Any method of the module or of a part of it may be called, without gradient.
        """

    def save(self, folder: Path, *, asynchronous: bool = False) -> Finish:
        """Begin to write parameters, moments, average and scaler into `folder`, which all ranks see and is empty.

        What is written is the state at this moment; with `asynchronous`, the disk is written to while training goes
        on, where the engine can. Raises RunError when it cannot be written, or the returned function does.
        """

    def load(self, folder: Path) -> None:
        """The inverse; another number of ranks may have saved. Settings are not part of it.

        Raises ArtefactError, on all ranks and before anything is changed, when a name or a shape does not fit.
        """

    def set_weights(self, weights: Weights) -> None:
        """Take over other values of the module's state, each read once; moments and average stay as they are.

        Raises ArtefactError, on all ranks and before anything is changed, when a name or a shape does not fit.
        """


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: as in open_clip not to vectors (biases, norms), bias tables and logit_scale."""
    return parameter.ndim >= 2 and "bias" not in name and "logit_scale" not in name


def parameter_groups(tensors: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups of parameters or their slices, by name: what decays and what does not; no empty group."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, tensor in tensors.items():
        groups[decays(name, tensor)].append(tensor)
    return [
        {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
        for decay, parameters in groups.items()
        if parameters
    ]


class EngineHead:
    """What every engine begins with. Raises ConfigError for an unknown precision."""

    def __init__(self, module: nn.Module, precision: Precision, device: torch.device | str) -> None:
        if precision not in COMPUTE_DTYPES:
            raise ConfigError(f"unknown precision '{precision}'{nearest(precision, COMPUTE_DTYPES)}")
        self.rank = dist.rank()
        self.world_size = dist.world_size()
        self.device = torch.device(device)
        self.precision = precision
        self.unwrapped = module
        compute_exactly(self.device)


def moments_of(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's live state of a parameter; zeros before its first step, which is what AdamW itself would start from."""
    state: dict[str, Tensor] = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
