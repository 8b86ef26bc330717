"""Weights, gradients, moments and averages in shards, by torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Unpack, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from compt.engines.adamw import AdamWEngine
from compt.engines.base import COMPUTE_DTYPES, AdamWSettings, EngineArguments
from compt.engines.shards import fill_shards, local, make_mesh, reshard, sharded_parts, units, whole


@dataclass(frozen=True)
class _Inputs:
    """Inputs of `forward`, wrapped: `fully_shard` would move bare tensors, also lengths of captions, to the GPU."""

    values: tuple[Any, ...]


class _Root(nn.Module):
    """The outermost unit: all that is in no other unit. It stays gathered for a whole forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: _Inputs) -> Any:
        return self.module(*inputs.values)


class ShardedEngine(AdamWEngine):
    """Cuts the module into slices, one for each rank (`Engine` says what each method does).

    The module has its values, or takes them from `initial` if it is on the "meta" device. Blocks are gathered one by
    one. Vectors (norms, biases, learned scalars), a thousandth of a model, are whole on every rank. They stay in fp32
    where matrices are gathered in bf16 or fp16, so that the arithmetic is that of autocast over fp32 parameters.

    `reshard_after_forward`: gather each block again for backward, and reduce gradients after every piece of a batch.
    Otherwise weights stay gathered from forward to backward, and gradients stay whole until the last piece.
    `replicas`: groups of ranks that each hold everything. `cpu_offload`: slices and the optimizer are on the CPU.
    `reduce_precision`: the type that gradients of matrices are summed in.

    Raises ConfigError for an unknown precision, or replicas that do not divide the ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: AdamWSettings | None = None,
        *,
        reshard_after_forward: bool = True,
        replicas: int = 1,
        cpu_offload: bool = False,
        reduce_precision: Literal["fp32", "bf16"] = "fp32",
        **given: Unpack[EngineArguments],
    ) -> None:
        super().__init__(module, given)
        mesh = make_mesh(self.device, replicas)
        self._change_blocks(given)
        if (initial := given.get("initial")) is None:
            module.to(self.device)
        self._early = reshard_after_forward
        self._hybrid = replicas > 1
        self._shards = mesh["shard"].get_group()
        self._root = self._shard(mesh, reduce_precision, cpu_offload)
        if initial is not None:
            fill_shards(self._root, module, initial, self.device, torch.device("cpu") if cpu_offload else None)
        # The optimizer sees plain tensors that share the slices' memory, and so runs its fused kernel over them.
        slices = {
            name: nn.Parameter(local(tensor.detach()))
            for name, tensor in module.named_parameters()
            if tensor.requires_grad
        }
        # An optimizer on the CPU has to wait for its switches.
        control = torch.device("cpu") if cpu_offload else None
        self._prepare(settings, given, slices, control)

    def _shard(self, mesh: Any, reduce_precision: Literal["fp32", "bf16"], cpu_offload: bool) -> nn.Module:
        """Cut the module in place, unit by unit; returns the root, through which it has to be called.

        Blocks only use their matrices in matrix products. So these are rounded before they are gathered, where autocast
        would round them afterwards: the same numbers, and half the traffic. Everything else is gathered in fp32.
        """
        rounded = None if self.precision == "fp32" else COMPUTE_DTYPES[self.precision]
        # None where nothing is converted, so that a module in double precision stays in it.
        reduced = {"fp32": torch.float32 if rounded else None, "bf16": torch.bfloat16}[reduce_precision]
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if cpu_offload else OffloadPolicy()
        common: dict[str, Any] = {
            "mesh": mesh,
            "ignored_params": {parameter for parameter in self.unwrapped.parameters() if parameter.ndim < 2},
            "offload_policy": offload,
        }
        for part in units(self.unwrapped):
            exact = isinstance(part, nn.Embedding)
            policy = MixedPrecisionPolicy(None if exact else rounded, reduced, cast_forward_inputs=False)
            sharded = fully_shard(part, mp_policy=policy, reshard_after_forward=self._early, **common)
            if exact:
                sharded.set_unshard_in_backward(False)
        root = _Root(self.unwrapped)
        policy = MixedPrecisionPolicy(None, reduced, cast_forward_inputs=False)
        fully_shard(root, mp_policy=policy, reshard_after_forward=False, **common)
        return root

    def forward(self, *inputs: Any, last: bool = True) -> dict[str, Tensor]:
        """Outputs of the module."""
        with self._autocast():
            outputs: dict[str, Tensor] = self._root(_Inputs(inputs))
        return outputs

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Backward of `loss`, scaled in fp16.

        With `reshard_after_forward` ranks sum gradients after every piece of a batch: whole ones would need the memory
        that sharding has saved.
        """
        root = cast(FSDPModule, self._root)
        root.set_is_last_backward(last)
        root.set_requires_gradient_sync(last or self._early)
        if self._hybrid:
            root.set_requires_all_reduce(last)
        self._scaled(loss).backward()
        if last:
            self._average_vectors()

    @torch.no_grad()
    def _average_vectors(self) -> None:
        """Average the gradients of vectors, which `fully_shard` leaves alone, in one collective."""
        if self.world_size == 1:
            return
        found = [p.grad for p in self._names.values() if p is local(p) and p.grad is not None]
        if not found:
            return
        flat = torch.cat([gradient.flatten() for gradient in found])
        torch_dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, mean in zip(found, flat.split([gradient.numel() for gradient in found]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _settle(self) -> None:
        reshard(self._root)

    def _norm(self) -> Tensor:
        """Slices are summed over the ranks that share them, vectors counted once."""
        for name, tensor in self._stepped.items():
            gradient = self._names[name].grad
            tensor.grad = None if gradient is None else local(gradient)
        cut = {name for name, parameter in self._names.items() if parameter is not local(parameter)}
        squares = []
        for wanted in (cut, self._names.keys() - cut):
            found = [g for name in sorted(wanted) if (g := self._stepped[name].grad) is not None]
            norm = torch.nn.utils.get_total_norm(found, foreach=self.device.type == "cuda" or None)
            squares.append(norm.to(self.device, torch.float64).square())
        if self._shards.size() > 1:
            torch_dist.all_reduce(squares[0], group=self._shards)
        return (squares[0] + squares[1]).sqrt().float()

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Gather all parameters on every rank, in fp32, and run the module as if it had never been sharded.

        The hooks of `fully_shard` are taken off meanwhile: they would make the ranks wait for each other.
        """
        reshard(self._root)
        kept = [(part._parameters, dict(part._parameters)) for part in self.unwrapped.modules()]
        parts = [cast(nn.Module, part) for part in sharded_parts(self.unwrapped)]
        hooks = [table for part in parts for table in (part._forward_pre_hooks, part._forward_hooks)]
        silenced: list[tuple[dict[int, Any], dict[int, Any]]] = [(table, dict(table)) for table in hooks]
        try:
            for table, parameters in kept:
                for name, parameter in parameters.items():
                    if parameter is not None and parameter is not local(parameter):
                        table[name] = nn.Parameter(whole(parameter, self.device), requires_grad=False)
            for hook, _ in silenced:
                hook.clear()
            with super().scoring():
                yield
        finally:
            for table, parameters in kept:
                table.update(parameters)
            for hook, entries in silenced:
                hook.update(entries)
