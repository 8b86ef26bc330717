"""A model in shards that nothing is trained in: a teacher that would not fit beside its student otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from compt.engines.shards import fill_shards, make_mesh, sharded_parts, units
from compt.models.clip import ClipModel


def shard_frozen(
    model: ClipModel, weights: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device | str
) -> ClipModel:
    """A model from the "meta" device with the values `weights` in `dtype`, of which each rank holds a share.

    Its encode_image, encode_text and encode_captions gather it block by block, without gradient: all ranks call them
    equally often. No rank ever holds the whole, neither now nor later; `weights` are read one at a time. What trains
    beside it may be any engine. Raises ArtefactError when the weights are not those of the model.
    """
    device = torch.device(device)
    model.requires_grad_(False).eval().to(dtype)
    mesh = make_mesh(device)
    for part in units(model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    fill_shards(model, model, weights, device)
    parts = sharded_parts(model)
    for name in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, name)
        setattr(model, name, _forgetting(getattr(model, name), parts))
    return model


def _forgetting(method: Callable[..., Tensor], parts: list[FSDPModule]) -> Callable[..., Tensor]:
    """`method` without gradient. `fully_shard` notes every forward for the backward to come; none does."""

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
