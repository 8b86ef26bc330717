"""Sharded modules, by torch's `fully_shard`: the mesh of processes, the units that are gathered, values in and out.

Every process holds a slice of each parameter, cut along the first dimension. The parameters of a unit are gathered
before it runs and given up afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from compt.dist import collectives as dist
from compt.models.clip import ClipModel, models_in, set_buffers, shardable_blocks
from compt.models.init import load_state
from compt.models.states import State


def make_mesh(device: torch.device, replicas: int = 1) -> DeviceMesh:
    """All processes as [replicas, shards]: `replicas` groups, each of which holds the whole in shards.

    A single process becomes a group of one.
    """
    dist.join_alone(device)
    world = dist.world_size()
    shape, names = ((world,), ("shard",)) if replicas == 1 else ((replicas, world // replicas), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dist.share_timeout()
    return mesh


def units(module: nn.Module) -> list[nn.Module]:
    """The units that are gathered one by one: blocks and, as the largest of the rest, token embeddings."""
    found: list[nn.Module] = []
    for model in models_in(module):
        found += [*shardable_blocks(model), model.token_embedding]
    return found


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """The modules that `fully_shard` was applied to."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Give up gathered weights, so that the parameters of the module are the slices."""
    for part in sharded_parts(module):
        part.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(sharded: Tensor, slices: Tensor) -> Tensor:
    """The `slices` of all processes as one tensor in the same memory, sharded as `sharded` is, if it is."""
    return DTensor(slices, sharded._spec, requires_grad=False) if isinstance(sharded, DTensor) else slices


def whole(tensor: Tensor, device: torch.device) -> Tensor:
    """The whole of a tensor, on the `device` of each process. All of them call it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to(device)
    # Slices may be on the CPU, but NCCL only gathers what is on a GPU.
    return like(tensor, local(tensor.detach()).to(device)).full_tensor()  # type: ignore[attr-defined, no-any-return]


def fill_shards(
    root: nn.Module,
    module: nn.Module,
    initial: Mapping[str, Tensor],
    device: torch.device,
    slices_on: torch.device | None = None,
) -> None:
    """Give a module from the "meta" device memory and the values `initial`, of which each process keeps its slices.

    Values are read one at a time, and only that one is ever whole. `root` is the outermost sharded module; `initial`
    names the parameters of `module`. Slices may be on another device than the rest. Raises ArtefactError for values of
    another module.
    """
    # Through the root: `fully_shard` pads slices that are shorter than the others when its root is moved.
    root.to_empty(device=slices_on or device)
    if slices_on not in (None, device):
        _move_whole(module, device)
    set_buffers(module)
    load_state(module, _Slices(initial, module.state_dict()))


def _move_whole(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
        for parameter in part.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)


class _Slices(State):
    """Whole tensors, cut into shards like those of `own` when they are read."""

    def __init__(self, values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self._parts, self._own = values, own

    def __getitem__(self, name: str) -> Tensor:
        own = self._own[name]
        value = self._parts[name].reshape(own.shape)
        return like(own, _slice_of(value, own).to(local(own))) if isinstance(own, DTensor) else value


def _slice_of(value: Tensor, own: DTensor) -> Tensor:
    """This process's rows of `value`. The last slices may have fewer rows than the others, or none."""
    mesh = own.device_mesh
    *others, last = own.placements
    assert last == Shard(0)
    assert all(isinstance(other, Replicate) for other in others)
    rows = -(-len(value) // mesh.size(mesh.ndim - 1))
    start = min(rows * mesh.get_local_rank(mesh.ndim - 1), len(value))
    return value[start : start + rows]


def shard_frozen(
    model: ClipModel, weights: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device | str
) -> ClipModel:
    """A frozen model from the "meta" device with the values `weights` in `dtype`, of which each rank holds a share.

    Its encode_… methods gather it block by block, without gradient. All ranks have to call them equally often. No rank
    ever holds the whole model; `weights` are read one at a time. The student may train with any engine. Raises
    ArtefactError for weights of another model.
    """
    device = torch.device(device)
    model.requires_grad_(False).eval().to(dtype)
    mesh = make_mesh(device)
    for part in units(model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    fill_shards(model, model, weights, device)
    parts = sharded_parts(model)
    # Not `encode_packed`: FSDP moves all arguments to the GPU, and the lengths of captions belong on the CPU.
    for name in ("encode_image", "encode_text", "_packed_tower"):
        register_fsdp_forward_method(model, name)
        setattr(model, name, _forgetting(getattr(model, name), parts))
    return model


def _forgetting(method: Callable[..., Tensor], parts: list[FSDPModule]) -> Callable[..., Tensor]:
    """`method` without gradient. `fully_shard` keeps a list of forwards for a backward that never comes: clear it."""

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            features = method(*args, **options)
        for part in parts:
            group = part._get_fsdp_state()._fsdp_param_group
            if group is not None:
                group.comm_ctx.post_forward_order.clear()
                group._post_forward_indices.clear()
        return features

    return call
