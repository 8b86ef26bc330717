"""The named axes of every parameter of a CLIP model, under open_clip's parameter names.

A tensor dimension is a tuple of axes, outermost first: most dimensions have one, packed ones several. The rows of a
packed attention matrix, for example, are `(qkv, head, hd)`: three roles, the heads of each, the channels of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import open_clip.model
import torch

from compt.errors import ConfigError
from compt.presets import ModelSpec

Kind = Literal["width", "extent", "fixed"]


@dataclass(frozen=True)
class Axis:
    """One axis: `width` follows the width operator, `extent` (positions) keeps its prefix, `fixed` does not change."""

    name: str
    size: int
    kind: Kind = "width"


Dim = tuple[Axis, ...]


@dataclass(frozen=True)
class Stack:
    """A column of equal layers, named `prefix.<layer>`; layers `k` and `k + period` do the same job."""

    prefix: str
    depth: int
    period: int = 1


@dataclass(frozen=True)
class Parameter:
    """One parameter: its dimensions and, inside a stack, its layer. `closes_branch`: a residual branch ends in it."""

    name: str
    dims: tuple[Dim, ...]
    stack: str = ""
    layer: int = 0
    closes_branch: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(math.prod(axis.size for axis in dim) for dim in self.dims)

    @property
    def in_image_tower(self) -> bool:
        """Whether it belongs to the image tower."""
        return self.name.startswith("visual.")

    def name_in_layer(self, layer: int) -> str:
        """The name of the same parameter in another layer of its stack."""
        leaf = self.name.removeprefix(f"{self.stack}.{self.layer}.")
        return f"{self.stack}.{layer}.{leaf}"


def stacks(spec: ModelSpec) -> tuple[Stack, ...]:
    """The layer columns of a model, text last. A Swin has one a stage, where every second layer shifts its windows."""
    text = Stack("transformer.resblocks", spec.text_depth)
    if spec.arch == "vit":
        return (Stack("visual.transformer.resblocks", spec.depth), text)
    stages = (Stack(f"visual.trunk.layers.{stage}.blocks", depth, 2) for stage, depth in enumerate(spec.depths))
    return (*stages, text)


def parameters(spec: ModelSpec) -> dict[str, Parameter]:
    """Every parameter of a model by name, in open_clip's shapes; logit_scale as exported, a scalar (shape `()`)."""
    image = _vit_tower(spec) if spec.arch == "vit" else _swin_tower(spec)
    found = [*image, *_text_tower(spec), Parameter("logit_scale", ())]
    return {parameter.name: parameter for parameter in found}


@functools.lru_cache(maxsize=64)
def check_parameters(spec: ModelSpec) -> None:
    """Compare `parameters` with the real model (built without memory).

    Raises ConfigError when a parameter has no axes here, is not in the model, or has another shape there.
    """
    with torch.device("meta"):
        config: dict[str, Any] = spec.open_clip_config()
        model = open_clip.model.CLIP(**config, nonscalar_logit_scale=False)
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    described = {name: parameter.shape for name, parameter in parameters(spec).items()}
    for name, shape in real.items():
        if name not in described:
            raise ConfigError(f"model {spec.name}: no axes are known for parameter {name} of shape {list(shape)}")
        if described[name] != shape:
            raise ConfigError(
                f"model {spec.name}: parameter {name} has shape {list(shape)}, its axes say {list(described[name])}"
            )
    for name in described:
        if name not in real:
            raise ConfigError(f"model {spec.name}: parameter {name} is described but the model has none")


def _norm(name: str, dim: Dim, **layer: Any) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (dim,), **layer)
    yield Parameter(f"{name}.bias", (dim,), **layer)


def _linear(name: str, out: Dim, into: Dim, **layer: Any) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (out, into), **layer)
    yield Parameter(f"{name}.bias", (out,), **layer)


def _attention_axes(prefix: str, heads: int, head_width: int, suffix: str = "") -> tuple[Dim, Dim]:
    """The dimensions of the packed input projection's rows and of the output projection's columns."""
    per_head = (Axis(f"{prefix}head{suffix}", heads), Axis(f"{prefix}hd", head_width, "fixed"))
    return (Axis("qkv", 3, "fixed"), *per_head), per_head


def _resblocks(stack: Stack, res: Dim, ff: Dim, attention: tuple[Dim, Dim]) -> Iterator[Parameter]:
    qkv, heads = attention
    for layer in range(stack.depth):
        block = f"{stack.prefix}.{layer}"
        where: dict[str, Any] = {"stack": stack.prefix, "layer": layer}
        yield from _norm(f"{block}.ln_1", res, **where)
        yield Parameter(f"{block}.attn.in_proj_weight", (qkv, res), **where)
        yield Parameter(f"{block}.attn.in_proj_bias", (qkv,), **where)
        yield from _linear(f"{block}.attn.out_proj", res, heads, closes_branch=True, **where)
        yield from _norm(f"{block}.ln_2", res, **where)
        yield from _linear(f"{block}.mlp.c_fc", ff, res, **where)
        yield from _linear(f"{block}.mlp.c_proj", res, ff, closes_branch=True, **where)


def _vit_tower(spec: ModelSpec) -> Iterator[Parameter]:
    res, emb = (Axis("res", spec.width),), (Axis("emb", spec.embed_dim),)
    ff = (Axis("ff", int(spec.width * spec.mlp_ratio)),)
    # The class token has the first position.
    pos = (Axis("pos", (spec.image_size // spec.patch_size) ** 2 + 1, "fixed"),)
    yield Parameter("visual.class_embedding", (res,))
    yield Parameter("visual.positional_embedding", (pos, res))
    yield Parameter("visual.proj", (res, emb))
    yield Parameter("visual.conv1.weight", (res, *_pixels(spec)))
    if not spec.no_ln_pre:
        yield from _norm("visual.ln_pre", res)
    yield from _resblocks(stacks(spec)[0], res, ff, _attention_axes("", spec.heads, spec.head_width))
    yield from _norm("visual.ln_post", res)


def _text_tower(spec: ModelSpec) -> Iterator[Parameter]:
    res = (Axis("text_res", spec.text_width),)
    ff = (Axis("text_ff", int(spec.text_width * spec.mlp_ratio)),)
    yield Parameter("token_embedding.weight", ((Axis("vocab", spec.vocab_size, "fixed"),), res))
    yield Parameter("positional_embedding", ((Axis("context", spec.context_length, "extent"),), res))
    yield from _resblocks(stacks(spec)[-1], res, ff, _attention_axes("text_", spec.text_heads, spec.text_head_width))
    yield from _norm("ln_final", res)
    yield Parameter("text_projection", (res, (Axis("emb", spec.embed_dim),)))


def _pixels(spec: ModelSpec) -> tuple[Dim, Dim, Dim]:
    patch = spec.patch_size
    return (Axis("rgb", 3, "fixed"),), (Axis("patch_y", patch, "fixed"),), (Axis("patch_x", patch, "fixed"),)


def _swin_tower(spec: ModelSpec) -> Iterator[Parameter]:
    """The Swin of timm >= 0.9 behind open_clip's adapter: stages 1, 2, 3 begin with the patch merging."""
    trunk = "visual.trunk"
    table = (Axis("offset", (2 * spec.window - 1) ** 2, "fixed"),)
    res: Dim = (Axis("res.0", spec.width),)
    yield Parameter(f"{trunk}.patch_embed.proj.weight", (res, *_pixels(spec)))
    yield Parameter(f"{trunk}.patch_embed.proj.bias", (res,))
    yield from _norm(f"{trunk}.patch_embed.norm", res)
    for stage, stack in enumerate(stacks(spec)[:-1]):
        width = spec.width * 2**stage
        if stage:
            # Four neighbours are concatenated, each with all its channels.
            merged: Dim = (Axis("nbr", 4, "fixed"), *res)
            res = (Axis(f"res.{stage}", width),)
            yield from _norm(f"{trunk}.layers.{stage}.downsample.norm", merged)
            yield Parameter(f"{trunk}.layers.{stage}.downsample.reduction.weight", (res, merged))
        ff = (Axis(f"ff.{stage}", int(width * spec.mlp_ratio)),)
        qkv, heads = _attention_axes("", spec.stage_heads[stage], spec.head_width, f".{stage}")
        for layer in range(stack.depth):
            block = f"{stack.prefix}.{layer}"
            where: dict[str, Any] = {"stack": stack.prefix, "layer": layer}
            yield from _norm(f"{block}.norm1", res, **where)
            yield Parameter(f"{block}.attn.relative_position_bias_table", (table, heads[:1]), **where)
            yield from _linear(f"{block}.attn.qkv", qkv, res, **where)
            yield from _linear(f"{block}.attn.proj", res, heads, closes_branch=True, **where)
            yield from _norm(f"{block}.norm2", res, **where)
            yield from _linear(f"{block}.mlp.fc1", ff, res, **where)
            yield from _linear(f"{block}.mlp.fc2", res, ff, closes_branch=True, **where)
    yield from _norm(f"{trunk}.norm", res)
    yield Parameter("visual.head.proj.weight", ((Axis("emb", spec.embed_dim),), res))
