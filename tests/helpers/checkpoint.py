"""An engine that has a state and nothing else, for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from compt.dist import collectives as dist
from compt.engines.base import Finish
from compt.engines.state_dcp import copy_weights, load_state, save_state
from compt.weights.lazy import Weights

SHAPES: dict[str, tuple[int, ...]] = {
    "model.logit_scale": (1,),
    "model.visual.proj": (7, 5),
    "model.visual.ln.weight": (3,),
    "model.token_embedding.weight": (64, 24),
    "projector.image.weight": (6, 5),
}


class Toy:
    """Weights, moments, an average and a counter, drawn from `seed`: whole on each rank, or as DTensors in shards."""

    format: Literal["dcp", "deepspeed"] = "dcp"

    def __init__(
        self, seed: int = 0, *, sharded: bool = False, shapes: Mapping[str, tuple[int, ...]] = SHAPES, ema: bool = True
    ) -> None:
        self.rank, self.world_size, self.device = dist.rank(), dist.world_size(), torch.device("cpu")
        draws = torch.Generator().manual_seed(seed)
        mesh = init_device_mesh("cpu", (self.world_size,)) if sharded else None

        def drawn(shape: tuple[int, ...]) -> Tensor:
            value = torch.randn(shape, generator=draws)
            return distribute_tensor(value, mesh, [Shard(0)]) if mesh is not None else value

        self.unwrapped = nn.Module()
        self.unwrapped.state_dict = lambda: dict(self.values)  # type: ignore[method-assign, assignment]
        self.values = {name: drawn(shape) for name, shape in shapes.items()}
        self.tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.values.items()}
        for name, shape in shapes.items():
            self.tensors |= {f"optim.{name}.{key}": drawn(shape) for key in ("exp_avg", "exp_avg_sq")}
            self.tensors[f"optim.{name}.step"] = torch.tensor(float(seed))
            if ema:
                self.tensors[f"ema.{name}"] = drawn(shape)
        if ema:
            self.tensors["ema.updates"] = torch.tensor(seed)

    def save(self, folder: Path, *, asynchronous: bool = False) -> Finish:
        return save_state(self.tensors, folder, asynchronous=asynchronous)

    def load(self, folder: Path) -> None:
        load_state(self.tensors, folder)

    def set_weights(self, weights: Weights) -> None:
        dist.on_all(lambda: copy_weights(self.unwrapped, weights))

    def step(self) -> None:
        """Change everything in place."""
        for tensor in self.tensors.values():
            tensor.add_(1)

    def whole(self) -> dict[str, Tensor]:
        """Every tensor gathered."""
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
            for name, tensor in self.tensors.items()
        }


def engine(*arguments: Any, **options: Any) -> Any:
    """A Toy, typed as an Engine."""
    return Toy(*arguments, **options)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether names, types and bits are equal."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
