"""The interface of an engine: how one module is wrapped, run, stepped, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor, nn

from compt.dist import collectives as dist
from compt.engines.compiler import compile_model
from compt.models.clip import models_in
from compt.recipe.engine import Compile, CompileMode
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


def in_groups(tensors: Mapping[str, Tensor]) -> dict[bool, list[str]]:
    """The names of parameters or their slices in AdamW's groups: what decays and what does not; no empty group."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for name, tensor in tensors.items():
        groups[decays(name, tensor)].append(name)
    return {decay: names for decay, names in groups.items() if names}


def adamw(
    tensors: Mapping[str, Tensor], settings: AdamWSettings, groups: Mapping[bool, list[str]] | None = None
) -> torch.optim.AdamW:
    """AdamW for parameters or their slices, by name; `groups` as `in_groups` gives them."""
    # torch's AdamW on a CPU too. DeepSpeed's own AdamW for CPUs would be compiled at first use.
    found = [
        {"params": [tensors[name] for name in names], "weight_decay": settings.weight_decay if decay else 0.0}
        for decay, names in (in_groups(tensors) if groups is None else groups).items()
    ]
    return torch.optim.AdamW(found, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


class EngineArguments(TypedDict, total=False):
    """What every engine takes beside the module and AdamW's settings.

    `initial`: the values of a module from the "meta" device. `caps`: the largest values of parameters, enforced after
    each step. `ema_decay`: that of a moving average of the weights, if one is kept. `compile`, `compile_mode`: as in a
    recipe. `recompute`: blocks.
    """

    precision: Precision
    device: torch.device | str
    initial: Mapping[str, Tensor] | None
    caps: Mapping[str, float] | None
    ema_decay: float | None
    compile: Compile
    compile_mode: CompileMode
    recompute: bool


class EngineHead:
    """What every engine begins with."""

    def __init__(self, module: nn.Module, given: EngineArguments) -> None:
        self.world_size = dist.world_size()
        self.device = torch.device(given.get("device", "cpu"))
        self.precision = given.get("precision", "fp32")
        self.unwrapped = module
        if self.device.type == "cuda":
            dist.true_fp32()

    def _change_blocks(self, given: EngineArguments, hooked: bool = True) -> None:
        """Recompute blocks, then compile blocks (with their hooks if `hooked`) or towers; both before sharding."""
        for model in models_in(self.unwrapped):
            if given.get("recompute"):
                model.set_grad_checkpointing(True)
            if (how := given.get("compile", "off")) != "off":
                compile_model(model, how, given.get("compile_mode", "default"), self.device, hooked)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode, where the module is whole on every rank."""
        with evaluation_mode(self.unwrapped):
            yield


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout and gradients. Afterwards the module has its own mode again."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def moments_of(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's live state of a parameter. Before the first step these are zeros, which AdamW would start from too."""
    state: dict[str, Tensor] = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
