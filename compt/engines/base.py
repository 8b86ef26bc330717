"""The interface of an engine: how one module is wrapped, run, stepped, saved and loaded."""

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
"""The dtype of activations and of a frozen teacher, by precision. Parameters stay in fp32."""

Finish = Callable[[], list[Path]]
"""Waits until this process's part of a save is on disk, and returns the files that it wrote."""


@dataclass(frozen=True)
class AdamWSettings:
    """Table C of the paper. The learning rate comes from the schedule, step by step."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1


class Engine(Protocol):
    """Trains one module. Every engine gives the results of one process in fp32: loss, gradient norm, parameters.

    All ranks call every method together.
    """

    rank: int
    world_size: int
    device: torch.device
    unwrapped: nn.Module
    """The module, with its own parameter names. What its parameters hold depends on the engine."""
    format: Literal["dcp", "deepspeed"]
    """What `save` writes. Engines of one format load each other's files."""

    def forward(self, *inputs: Any, last: bool = True) -> dict[str, Tensor]:
        """The module's outputs, in mixed precision. `last` is that of the `backward` that follows."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add to the gradients. The backward that is the `last` before a step averages them over ranks."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of each trained parameter: whole, averaged over ranks, unscaled, fp32, on the CPU.

        Valid between the `last` backward and `step`. They come one at a time, so that no rank holds all of them.
        """

    def step(self, lr: float, max_norm: float | None = None) -> Tensor:
        """Step the optimizer with gradients scaled down to `max_norm`, if given, and clear them.

        Returns the norm of the whole gradient before clipping: a scalar tensor, the same on all ranks. The CPU does not
        wait for it, except under ZeRO. If it is not finite, parameters, moments and average stay as they are on all
        ranks.
        """

    def weights(self, average: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 value of each parameter and buffer of the module's state, or of its moving average.

        They come whole, on the CPU, and one at a time, so that no rank holds all of them.
        """

    def scoring(self) -> AbstractContextManager[None]:
        """Put the module into evaluation mode, and let each rank run it alone, any number of times.

        Inside, any method of the module or of a part of it may be called, without gradient.
        """

    def save(self, folder: Path, *, asynchronous: bool = False) -> Finish:
        """Begin to write parameters, moments, average and scaler into `folder`, which is empty and seen by all ranks.

        The state of this moment is written. With `asynchronous`, an engine that can writes while training goes on.
        This method or the returned function raises RunError when the state cannot be written.
        """

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, on any number of ranks. Settings, such as the learning rate, are not part of it.

        Raises ArtefactError, on all ranks and before anything is changed, when a name or a shape does not fit.
        """

    def set_weights(self, weights: Weights) -> None:
        """Take other values for the module's state, each read once. Moments and average stay as they are.

        Raises ArtefactError, on all ranks and before anything is changed, when a name or a shape does not fit.
        """


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies. As in open_clip, not to vectors (biases, norms, learned scalars) or bias tables."""
    return parameter.ndim >= 2 and "bias" not in name


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
    """AdamW's live state of a parameter. Before the first step these are zeros, which AdamW would start from too."""
    state: dict[str, Tensor] = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
