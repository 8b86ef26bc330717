"""Which part of each trained parameter the ZeRO optimizer of a rank holds, and where, for every stage.

DeepSpeed's optimizer updates a few fp32 vectors, the masters. Each holds parts of many parameters. The vectors of
moments and gradients have the same layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Partition:
    """The `count` elements of a parameter from `start` on, and their place: in vector `vector` from `at` on."""

    vector: int
    at: int
    start: int
    count: int

    def of(self, vector: Tensor) -> Tensor:
        """These elements of a vector that is laid out like the master."""
        return vector.reshape(-1).narrow(0, self.at, self.count)


class Parts:
    """The masters of a rank, and where in them the trained parameters are."""

    def __init__(self, stage: int, optimizer: Any, names: Mapping[str, nn.Parameter]) -> None:
        """`optimizer`: DeepSpeed's, without ZeRO torch's. `names`: the trained parameters in the module's order."""
        self.stage = stage
        self._optimizer = optimizer
        self.parameters = dict(names)
        self.masters: list[Tensor]
        found: dict[int, Partition]
        if stage == 0:
            self.masters = list(names.values())
            found = {id(p): Partition(i, 0, 0, p.numel()) for i, p in enumerate(names.values())}
        elif stage == 3:
            self.masters = optimizer.fp32_partitioned_groups_flat
            found = self._of_each()
        else:
            self.masters = optimizer.single_partition_of_fp32_groups
            found = self._of_groups()
        self.where = {name: found[id(parameter)] for name, parameter in names.items()}

    def _of_groups(self) -> dict[int, Partition]:
        """Stages 1 and 2: the parameters of a group lie end to end in one vector, of which a rank has one part."""
        # DeepSpeed's own list of fragments is wrong where gradients are dealt out in turns.
        found = {}
        rank = torch_dist.get_rank()
        groups = zip(self._optimizer.round_robin_bit16_groups, self._optimizer.round_robin_bit16_offsets, strict=True)
        for vector, (group, offsets) in enumerate(groups):
            size = self.masters[vector].numel()
            low, high = rank * size, (rank + 1) * size
            for parameter, offset in zip(group, offsets, strict=True):
                first, last = max(low, offset), min(high, offset + parameter.numel())
                if first < last:
                    found[id(parameter)] = Partition(vector, first - low, first - offset, last - first)
                else:
                    found[id(parameter)] = Partition(vector, 0, 0, 0)
        return found

    def _of_each(self) -> dict[int, Partition]:
        """Stage 3: a rank has an equal part of each parameter; the last ones are padded."""
        found = {}
        rank = torch_dist.get_rank()
        for vector, group in enumerate(self._optimizer.fp16_groups):
            at = 0
            for parameter in group:
                share = parameter.partition_numel()
                start = min(rank * share, parameter.ds_numel)
                found[id(parameter)] = Partition(vector, at, start, min(share, parameter.ds_numel - start))
                at += share
        return found

    def shape(self, name: str) -> torch.Size:
        """The shape of a whole parameter."""
        parameter = self.parameters[name]
        return getattr(parameter, "ds_shape", parameter.shape)

    def held(self, name: str, vectors: Callable[[int], Tensor]) -> Tensor:
        """This rank's elements of a parameter in one of `vectors`, a view."""
        part = self.where[name]
        return part.of(vectors(part.vector))

    def weight(self, vector: int) -> Tensor:
        """The master itself."""
        return self.masters[vector].detach()

    def gradient(self, vector: int) -> Tensor:
        """The averaged gradients of a master's elements, after the last backward and before the step."""
        master = self.masters[vector]
        if self.stage == 0 or (master.grad is not None and self._offloads()):
            assert master.grad is not None
            return master.grad
        return torch.cat([piece.reshape(-1) for piece in self._optimizer.averaged_gradients[vector]])

    def _offloads(self) -> bool:
        return bool(self._optimizer.offload_optimizer if self.stage == 3 else self._optimizer.cpu_offload)

    def whole(self, name: str, held: Tensor, device: torch.device) -> Tensor:
        """A parameter from what each rank holds of it: its shape, on the CPU. All ranks call it."""
        shape = self.shape(name)
        if self.stage == 0:
            return held.to("cpu", torch.float32, copy=True).reshape(shape)
        # Sums of integers, of which all but one are zero, keep every bit: a sum of floats would lose the sign of zeros.
        whole = torch.zeros(shape.numel(), dtype=torch.int32, device=device)
        part = self.where[name]
        whole.narrow(0, part.start, part.count).copy_(held.float().contiguous().view(torch.int32))
        torch_dist.all_reduce(whole)
        return whole.cpu().view(torch.float32).reshape(shape)

    @torch.no_grad()
    def take(self, name: str, whole: Tensor, vectors: Callable[[int], Tensor]) -> None:
        """Copy this rank's elements of a whole parameter into one of `vectors`."""
        part = self.where[name]
        part.of(vectors(part.vector)).copy_(whole.reshape(-1).narrow(0, part.start, part.count))

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the parameters of the module. All ranks call it."""
        if self.stage == 0:
            return
        if self.stage != 3:
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for vector, shard in enumerate(self._optimizer.fp16_partitioned_groups_flat):
            shard.data.copy_(self.masters[vector].data)
            self._optimizer._unflatten_partitioned_parameters(vector)
        self._optimizer.checkpoint_event_epilogue()
