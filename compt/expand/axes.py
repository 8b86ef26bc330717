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

from compt.errors import ConfigError
from compt.models.clip import exported_shapes
from compt.models.growth import Stack, stacks
from compt.models.presets import ModelSpec

Kind = Literal["res", "hidden", "emb", "fixed", "prefix", "grid", "offsets", "pixels"]
"""What an axis is. Width operators act on `res` (a residual stream), `hidden` (MLP units or heads) and `emb` (the joint
embedding). `fixed` never changes. For every operator, `prefix` (text positions, vocabulary) keeps its beginning, and
`grid` (positions of a ViT, class token first), `offsets` (relative positions in a window) and `pixels` (a side of a
patch) are resized."""

Use = Literal["write", "read", "gain", "shift"]
"""What a parameter does along a dimension: writes it, reads it, or is a LayerNorm's weight (gain) or bias (shift)."""


@dataclass(frozen=True)
class Axis:
    """One named axis of a dimension."""

    name: str
    size: int
    kind: Kind = "fixed"


Dim = tuple[Axis, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter: its dimensions, what it does along each, and its layer if it is in a stack.

    `closes_branch`: it is the last parameter of a residual branch.
    """

    name: str
    dims: tuple[Dim, ...]
    uses: tuple[Use, ...] = ()
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

    @property
    def matrices(self) -> int:
        """The number of matrices that are stacked in it: three in packed attention, none in embeddings and tables."""
        if len(self.dims) < 2 or any(axis.kind in {"prefix", "grid", "offsets"} for dim in self.dims for axis in dim):
            return 0
        return math.prod(axis.size for axis in self.dims[0] if axis.name == "qkv")

    def name_in_layer(self, layer: int) -> str:
        """The name of the same parameter in another layer of its stack."""
        leaf = self.name.removeprefix(f"{self.stack}.{self.layer}.")
        return f"{self.stack}.{layer}.{leaf}"


def parameters(spec: ModelSpec) -> dict[str, Parameter]:
    """Every parameter of a model by name, in open_clip's shapes. Learned scalars have the shape `()`, as exported."""
    image = _vit_tower(spec) if spec.arch == "vit" else _swin_tower(spec)
    found = [*image, *_text_tower(spec), *(Parameter(scalar.name, ()) for scalar in spec.scalars)]
    return {parameter.name: parameter for parameter in found}


@functools.lru_cache(maxsize=64)
def check_parameters(spec: ModelSpec) -> None:
    """Compare `parameters` with the real model, built on the meta device.

    Raises ConfigError if a parameter has no axes here, is not in the model, or has another shape there.
    """
    real = exported_shapes(spec).items()
    described = {name: parameter.shape for name, parameter in parameters(spec).items()}.items()
    if odd := sorted({name for name, _ in real ^ described}):
        raise ConfigError(
            f"model {spec.name}: compt.expand.axes has other shapes of {', '.join(odd[:3])}, or lacks them"
        )


def _norm(name: str, dim: Dim, **layer: Any) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (dim,), ("gain",), **layer)
    yield Parameter(f"{name}.bias", (dim,), ("shift",), **layer)


def _linear(name: str, out: Dim, into: Dim, **layer: Any) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (out, into), ("write", "read"), **layer)
    yield Parameter(f"{name}.bias", (out,), ("write",), **layer)


def _attention_axes(prefix: str, heads: int, head_width: int, suffix: str = "") -> tuple[Dim, Dim]:
    """The dimensions of the rows of the packed input projection and of the columns of the output projection."""
    per_head = (Axis(f"{prefix}head{suffix}", heads, "hidden"), Axis(f"{prefix}hd", head_width))
    return (Axis("qkv", 3), *per_head), per_head


def _resblocks(stack: Stack, res: Dim, ff: Dim, attention: tuple[Dim, Dim]) -> Iterator[Parameter]:
    qkv, heads = attention
    for layer in range(stack.depth):
        block = f"{stack.prefix}.{layer}"
        where: dict[str, Any] = {"stack": stack.prefix, "layer": layer}
        yield from _norm(f"{block}.ln_1", res, **where)
        yield Parameter(f"{block}.attn.in_proj_weight", (qkv, res), ("write", "read"), **where)
        yield Parameter(f"{block}.attn.in_proj_bias", (qkv,), ("write",), **where)
        yield from _linear(f"{block}.attn.out_proj", res, heads, closes_branch=True, **where)
        yield from _norm(f"{block}.ln_2", res, **where)
        yield from _linear(f"{block}.mlp.c_fc", ff, res, **where)
        yield from _linear(f"{block}.mlp.c_proj", res, ff, closes_branch=True, **where)


def _vit_tower(spec: ModelSpec) -> Iterator[Parameter]:
    res, emb = (Axis("res", spec.width, "res"),), (Axis("emb", spec.embed_dim, "emb"),)
    ff = (Axis("ff", int(spec.width * spec.mlp_ratio), "hidden"),)
    # The class token has the first position.
    pos = (Axis("pos", (spec.image_size // spec.patch_size) ** 2 + 1, "grid"),)
    yield Parameter("visual.class_embedding", (res,), ("write",))
    yield Parameter("visual.positional_embedding", (pos, res), ("read", "write"))
    yield Parameter("visual.proj", (res, emb), ("read", "write"))
    yield _patches("visual.conv1.weight", spec, res)
    if not spec.no_ln_pre:
        yield from _norm("visual.ln_pre", res)
    yield from _resblocks(stacks(spec)[0], res, ff, _attention_axes("", spec.heads, spec.head_width))
    yield from _norm("visual.ln_post", res)


def _text_tower(spec: ModelSpec) -> Iterator[Parameter]:
    res = (Axis("text_res", spec.text_width, "res"),)
    ff = (Axis("text_ff", int(spec.text_width * spec.mlp_ratio), "hidden"),)
    vocab, context = (Axis("vocab", spec.vocab_size, "prefix"),), (Axis("context", spec.context_length, "prefix"),)
    yield Parameter("token_embedding.weight", (vocab, res), ("read", "write"))
    yield Parameter("positional_embedding", (context, res), ("read", "write"))
    yield from _resblocks(stacks(spec)[-1], res, ff, _attention_axes("text_", spec.text_heads, spec.text_head_width))
    yield from _norm("ln_final", res)
    yield Parameter("text_projection", (res, (Axis("emb", spec.embed_dim, "emb"),)), ("read", "write"))


def _patches(name: str, spec: ModelSpec, res: Dim) -> Parameter:
    patch = spec.patch_size
    pixels = (Axis("patch_y", patch, "pixels"),), (Axis("patch_x", patch, "pixels"),)
    return Parameter(name, (res, (Axis("rgb", 3),), *pixels), ("write", "read", "read", "read"))


def _swin_tower(spec: ModelSpec) -> Iterator[Parameter]:
    """The Swin of timm >= 0.9 behind open_clip's adapter: every stage but the first begins with patch merging."""
    trunk = "visual.trunk"
    res: Dim = (Axis("res.0", spec.width, "res"),)
    yield _patches(f"{trunk}.patch_embed.proj.weight", spec, res)
    yield Parameter(f"{trunk}.patch_embed.proj.bias", (res,), ("write",))
    yield from _norm(f"{trunk}.patch_embed.norm", res)
    for stage, stack in enumerate(stacks(spec)[:-1]):
        width = spec.width * 2**stage
        if stage:
            # Four neighbours are concatenated, each with all its channels.
            merged: Dim = (Axis("nbr", 4), *res)
            res = (Axis(f"res.{stage}", width, "res"),)
            yield from _norm(f"{trunk}.layers.{stage}.downsample.norm", merged)
            reduction = f"{trunk}.layers.{stage}.downsample.reduction.weight"
            yield Parameter(reduction, (res, merged), ("write", "read"))
        table = (Axis(f"offset.{stage}", (2 * spec.stage_windows[stage] - 1) ** 2, "offsets"),)
        ff = (Axis(f"ff.{stage}", int(width * spec.mlp_ratio), "hidden"),)
        qkv, heads = _attention_axes("", spec.stage_heads[stage], spec.head_width, f".{stage}")
        for layer in range(stack.depth):
            block = f"{stack.prefix}.{layer}"
            where: dict[str, Any] = {"stack": stack.prefix, "layer": layer}
            yield from _norm(f"{block}.norm1", res, **where)
            bias = f"{block}.attn.relative_position_bias_table"
            yield Parameter(bias, (table, heads[:1]), ("read", "write"), **where)
            yield from _linear(f"{block}.attn.qkv", qkv, res, **where)
            yield from _linear(f"{block}.attn.proj", res, heads, closes_branch=True, **where)
            yield from _norm(f"{block}.norm2", res, **where)
            yield from _linear(f"{block}.mlp.fc1", ff, res, **where)
            yield from _linear(f"{block}.mlp.fc2", res, ff, closes_branch=True, **where)
    yield from _norm(f"{trunk}.norm", res)
    yield Parameter("visual.head.proj.weight", ((Axis("emb", spec.embed_dim, "emb"),), res), ("write", "read"))
