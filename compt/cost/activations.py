"""Bytes that a training step keeps for its backward pass, tensor by tensor, from shapes alone.

The formulas follow the forward passes of `compt.models` and `compt.train` on a GPU with fused attention (flash
attention in half precision, the memory-efficient kernel in fp32); timm's windows keep their scores. Parameters are in
fp32. Under autocast, `compute` is the bytes of a number in matrix products; norms, softmax and the residual stream
where it begins (text, and Swin's first stage) stay in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from compt.cost.counts import Tokens, token_moments
from compt.models.presets import ModelSpec

FP32 = 4
_INDEX = 8
_STATISTICS = 2 * FP32
"""Mean and inverse deviation that a norm keeps of each position."""


@dataclass(frozen=True)
class BlockShape:
    """One transformer block on an image or a caption of `positions` tokens.

    `keys`: tokens of a window whose attention scores are kept; 0 with fused attention. `padding`: positions that fill
    up its windows. `masked`: its windows are shifted. `readout`: only one position is computed, from the keys and
    values of all; `causal`: with a mask. `wide_stream`: the block's input is in fp32, else of the compute type.
    `quick_gelu`: its activation is no single kernel, and keeps the sigmoid too.
    """

    width: int
    hidden: int
    heads: int
    positions: float
    keys: int = 0
    padding: int = 0
    masked: bool = False
    readout: bool = False
    causal: bool = False
    wide_stream: bool = True
    quick_gelu: bool = False

    @cached_property
    def matrices(self) -> int:
        """Parameters of the matrix products, without biases."""
        return 4 * self.width**2 + 2 * self.width * self.hidden

    @cached_property
    def table(self) -> int:
        """Parameters of a window's table of position biases."""
        return (2 * math.isqrt(self.keys) - 1) ** 2 * self.heads if self.keys else 0

    @cached_property
    def parameters(self) -> int:
        """All parameters."""
        return self.matrices + 9 * self.width + self.hidden + self.table

    def kept(self, compute: int) -> float:
        """Bytes that the block keeps for its backward pass."""
        width = self.width
        norm = FP32 * width + _STATISTICS
        inner = (3 if self.quick_gelu else 2) * self.hidden  # before and after the activation
        mlp = norm + compute * (width + inner)  # the second norm's output among them
        scores = FP32 if compute == FP32 else FP32 + compute  # all that is kept of a softmax's output
        attention = scores * self.heads * self.keys if self.keys else FP32 * self.heads
        if not self.readout:
            attended = self.positions + self.padding
            return self.positions * (norm + mlp) + attended * (
                compute * 5 * width + attention
            )  # normed, q, k, v, mixed
        read = compute * 3 * width + attention + mlp + 3 * _INDEX  # normed, q, mixed
        return self.positions * (norm + compute * 3 * width + compute * self.causal) + read

    def entered(self, compute: int) -> float:
        """Bytes of the block's input: all that is kept where the block is computed again in backward."""
        return self.positions * self.width * (FP32 if self.wide_stream else compute)

    def working(self, compute: int) -> float:
        """Most that the backward pass adds: a gradient as wide as the hidden layer, and that of the block's output.

        (The gradient before the activation function comes when what was kept behind it is gone.)
        """
        hidden = compute * self.hidden * (1 if self.readout else self.positions)
        return hidden + self.entered(compute) * (1 / self.positions if self.readout else 1)

    def mask_bytes(self, number: int) -> int:
        """Buffers of the block: the mask of shifted windows in numbers of `number` bytes, and the table's index."""
        masks = number * (int(self.positions) + self.padding) * self.keys if self.masked else 0
        return masks + _INDEX * self.keys**2


@dataclass(frozen=True)
class Tower:
    """A tower on one image or caption: its blocks, and what is around them.

    Outside the blocks: `products`, numbers kept in the compute type as inputs of matrix products; `norms`, pairs of
    positions and width; `matrices`, weights that autocast copies. `tensors`: how many parameters it has.
    """

    blocks: tuple[BlockShape, ...]
    products: float
    norms: tuple[tuple[float, int], ...]
    matrices: int
    tensors: int

    def kept(self, compute: int, recompute: bool) -> float:
        """Bytes kept for one image or caption; with `recompute` only the inputs of blocks."""
        outside = compute * self.products
        outside += sum(positions * (FP32 * width + _STATISTICS) for positions, width in self.norms)
        return outside + sum(block.entered(compute) if recompute else block.kept(compute) for block in self.blocks)

    def copied(self) -> int:
        """Weights of which autocast keeps a copy."""
        return self.matrices + sum(block.matrices for block in self.blocks)


def _vit(spec: ModelSpec) -> Tower:
    patches = (spec.image_size // spec.patch_size) ** 2
    positions, hidden = patches + 1, int(spec.width * spec.mlp_ratio)
    block = BlockShape(spec.width, hidden, spec.heads, positions, wide_stream=False, quick_gelu=spec.quick_gelu)
    read = replace(block, readout=True)
    first = () if spec.no_ln_pre else ((positions, spec.width),)
    return Tower(
        blocks=(*[block] * (spec.depth - 1), read),
        products=patches * 3 * spec.patch_size**2 + spec.width,
        norms=(*first, (1, spec.width)),
        matrices=spec.width * spec.embed_dim,
        tensors=12 * spec.depth + 6 + 2 * len(first),
    )


def _swin(spec: ModelSpec, images_kept: bool) -> Tower:
    blocks: list[BlockShape] = []
    norms: list[tuple[float, int]] = [(spec.stages[0].side ** 2, spec.width)]
    products: float = 3 * spec.image_size**2 if images_kept else 0
    matrices = 3 * spec.patch_size**2 * spec.width
    for side, width, depth, heads, window in spec.stages:
        if width > spec.width:
            norms.append((side**2, 2 * width))
            products += side**2 * 2 * width
            matrices += 2 * width**2
        hidden, padding = int(width * spec.mlp_ratio), (math.ceil(side / window) * window) ** 2 - side**2
        block = BlockShape(width, hidden, heads, side**2, window**2, padding, wide_stream=width == spec.width)
        # A window of one place shifts by none.
        shifted = replace(block, masked=side > window > 1)
        blocks += [shifted if at % 2 else block for at in range(depth)]
    last = spec.stages[-1]
    return Tower(
        blocks=tuple(blocks),
        products=products + last.width,
        norms=(*norms, (last.side**2, last.width)),
        matrices=matrices + last.width * spec.embed_dim,
        tensors=13 * spec.depth + 4 + 3 * (len(spec.depths) - 1) + 3,
    )


def image_tower(spec: ModelSpec, compute: int = FP32) -> Tower:
    """The image tower on one image."""
    # An image in fp32 is the input itself; in half precision the first convolution keeps a copy.
    return _swin(spec, compute != FP32) if spec.arch == "swin" else _vit(spec)


def text_tower(spec: ModelSpec, tokens: Tokens = None) -> Tower:
    """The text tower on one caption of `tokens` computed tokens on average (default: the context)."""
    positions, _ = token_moments(tokens, spec.context_length)
    width, hidden = spec.text_width, int(spec.text_width * spec.mlp_ratio)
    block = BlockShape(width, hidden, spec.text_heads, positions, quick_gelu=spec.quick_gelu)
    read = replace(block, readout=True, causal=True)
    return Tower(
        blocks=(*[block] * (spec.text_depth - 1), read),
        products=width,
        norms=((1, width),),
        matrices=width * spec.embed_dim,
        tensors=12 * spec.text_depth + 5,
    )


def towers(spec: ModelSpec, compute: int, captions: int, tokens: Tokens = None) -> Iterator[tuple[int, Tower]]:
    """How often each tower runs for one image with its captions, and the tower."""
    yield 1, image_tower(spec, compute)
    yield captions, text_tower(spec, tokens)


def kept_by_towers(
    spec: ModelSpec, compute: int, *, captions: int, tokens: Tokens = None, recompute: bool = False
) -> float:
    """Bytes for one image with its captions, and with `recompute` those of the one block that is computed again."""
    parts = list(towers(spec, compute, captions, tokens))
    kept = sum(times * tower.kept(compute, recompute) for times, tower in parts)
    again = max(times * block.kept(compute) for times, tower in parts for block in tower.blocks)
    return kept + (again if recompute else 0.0)


def backward_bytes(
    spec: ModelSpec,
    compute: int,
    *,
    rows: int,
    captions: int,
    tokens: Tokens = None,
    recompute: bool = False,
    loss: float = 0.0,
    gradient: float = 0.0,
    copied: int = 0,
) -> float:
    """The most bytes that are alive at once from the end of a forward pass to the end of its backward pass.

    Blocks give back what they kept one after another, the image tower's last one first, and a block's gradients come
    in its place: `gradient` bytes for each of its parameters, 0 where the memory of all gradients is there from the
    start. `loss`: what the loss holds while all is still kept. `copied`: bytes of a number in autocast's copies.
    """
    order = [(rows * times, tower) for times, tower in towers(spec, compute, captions, tokens)]
    alive = sum(times * tower.kept(compute, recompute) + copied * tower.copied() for times, tower in order)
    most = alive + loss
    for times, tower in order:
        for block in reversed(tower.blocks):
            again = times * block.kept(compute) if recompute else 0.0
            most = max(most, alive + again + times * block.working(compute))
            alive -= times * (block.entered(compute) if recompute else block.kept(compute))
            alive += gradient * block.parameters - copied * block.matrices
    return most


def working_of_towers(spec: ModelSpec, compute: int, *, captions: int, tokens: Tokens = None) -> float:
    """Bytes for one image with its captions of the largest gradients between two layers."""
    parts = towers(spec, compute, captions, tokens)
    return max(times * block.working(compute) for times, tower in parts for block in tower.blocks)


@dataclass(frozen=True)
class Shape:
    """What a loss compares: `rows` images of this GPU with `captions` each, on `world_size` GPUs.

    `width` of the joint embedding; `chunk` images at a time, None for all. `pairwise` as in `LossTraits`.
    """

    rows: int
    world_size: int
    captions: int
    width: int
    chunk: int | None = None
    pairwise: bool = False

    @property
    def treated(self) -> int:
        """Images whose similarities are held at once."""
        return min(self.chunk or self.rows, self.rows)

    @property
    def gathered(self) -> int:
        """Bytes of the features of all GPUs in fp32."""
        return FP32 * self.world_size * self.rows * (1 + self.captions) * self.width

    @property
    def matrix(self) -> int:
        """Bytes of the similarities of one direction."""
        return FP32 * self.treated * self.captions * self.rows * self.world_size

    @property
    def similarities(self) -> int:
        """Bytes of both directions: the scaled features, the labels, a matrix each."""
        scaled = FP32 * self.treated * (1 + self.captions) * self.width
        return scaled + 2 * _INDEX * self.treated * self.captions + 2 * self.matrix


def task_loss_kept(shape: Shape, compute: int) -> float:
    """Bytes that a loss keeps for backward: features of length one, and both similarities.

    `compute` bytes of a number in the features. In chunks the similarities are computed again, and are not in here. A
    pairwise loss keeps neither: of each feature it keeps the gradient, which takes the place of the one of length one.
    """
    whole = _unit_bytes(shape.rows * (1 + shape.captions), shape.width, compute)
    if shape.pairwise:
        return whole
    whole += shape.gathered if shape.world_size > 1 else 0
    return whole + (shape.similarities if shape.treated == shape.rows else 0)


def task_loss_working(shape: Shape) -> float:
    """Bytes that its backward pass adds at most: the gradients of one direction before and after its softmax.

    In chunks also a chunk's similarities, and the gradient of the features of all GPUs, to which every chunk adds. A
    pairwise loss holds the captions of one rank with their gradient, twice while they travel, and three numbers for
    each of their pairs with the images treated at once.
    """
    if shape.pairwise:
        block = FP32 * shape.rows * shape.captions
        travelling = 2 * block * shape.width * (2 if shape.world_size > 1 else 1)
        return travelling + 3 * block * shape.treated
    gradients = 2 * shape.matrix
    return gradients if shape.treated == shape.rows else gradients + shape.gathered + shape.similarities


def distillation_bytes(*, vectors: int, width: int, compute: int) -> float:
    """Bytes that `compt.train.losses.ifd_loss` keeps of `vectors` features of the teacher's `width`."""
    return _unit_bytes(vectors, width, compute) + FP32 * vectors * width  # and the teacher's own, of length one


def _unit_bytes(vectors: int, width: int, compute: int) -> float:
    """The features scaled to length one, with their norms; the features themselves where they had to be widened."""
    widened = FP32 * vectors * width if compute != FP32 else 0
    return widened + FP32 * vectors * width + 2 * FP32 * vectors
