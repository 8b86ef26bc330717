"""Parameters and forward MACs of the parts of a model, from their shapes.

One MAC is one multiplication with its addition: two floating-point operations. Matrix products and convolutions count,
as in `torch.utils.flop_counter`. Norms, biases, activations, softmax, embedding lookups and logit scaling do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from compt.models.presets import ModelSpec

Tokens = float | Mapping[int, float] | None
"""Tokens computed per caption, padding included: a mean, a mapping of lengths to shares of captions (non-negative, with
any sum), or None for the whole context. Attention grows with the square of the length, so a mean costs slightly less
than the lengths behind it; a distribution is counted exactly."""


@dataclass(frozen=True)
class Count:
    """Parameters, and MACs of one forward pass of one sample."""

    parameters: int = 0
    macs: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.parameters + other.parameters, self.macs + other.macs)

    def __mul__(self, times: int) -> Count:
        return Count(self.parameters * times, self.macs * times)


def total(counts: Iterable[Count]) -> Count:
    """The sum of several counts."""
    return sum(counts, Count())


def linear(inputs: int, outputs: int, positions: float, *, bias: bool = True) -> Count:
    """A dense layer, applied at each of `positions` positions."""
    return Count(inputs * outputs + bias * outputs, positions * inputs * outputs)


def attention_matmuls(width: int, pairs: float) -> Count:
    """The two products of attention for `pairs` of query and key: scores, and weighted values."""
    return Count(0, 2 * pairs * width)


def token_moments(tokens: Tokens, context: int) -> tuple[float, float]:
    """The means of the length of a caption and of its square, in tokens, with each length cut to `context`.

    A mean counts as captions of that one length.
    """
    if tokens is None:
        return context, context**2
    if not isinstance(tokens, Mapping):
        mean = min(tokens, context)
        return mean, mean**2
    whole = math.fsum(tokens.values())
    first, second = (
        math.fsum(share * min(length, context) ** power for length, share in tokens.items()) / whole for power in (1, 2)
    )
    return first, second


def _norm(width: int) -> Count:
    return Count(2 * width)


def _sum_by_name(parts: Iterable[tuple[str, Count]]) -> dict[str, Count]:
    table: dict[str, Count] = {}
    for name, count in parts:
        table[name] = table.get(name, Count()) + count
    return table


def _blocks(
    width: int, depth: int, mlp_ratio: float, positions: float, squared: float, readout: bool
) -> list[tuple[str, Count]]:
    """Pre-norm transformer blocks with full attention, the same in both towers.

    `positions` is the (mean) length of a sequence, `squared` its (mean) square. With `readout` the last block has all
    positions as keys and values, but only one query: the position whose output is read.
    """
    hidden = int(width * mlp_ratio)
    parts = [("norms", _norm(width) * 2 * depth)]
    last = (1, positions) if readout else (positions, squared)
    for layers, (queries, pairs) in ((depth - 1, (positions, squared)), (1, last)):
        keys_values = linear(width, 2 * width, positions)
        query_and_output = linear(width, width, queries) * 2
        mlp = linear(width, hidden, queries) + linear(hidden, width, queries)
        parts += [
            ("attention_projections", (keys_values + query_and_output) * layers),
            ("attention_matmuls", attention_matmuls(width, pairs) * layers),
            ("mlp", mlp * layers),
        ]
    return parts


def _vit(spec: ModelSpec, readout: bool) -> list[tuple[str, Count]]:
    patches = (spec.image_size // spec.patch_size) ** 2
    positions = patches + 1  # the class token
    return [
        ("patch_embedding", linear(3 * spec.patch_size**2, spec.width, patches, bias=False)),
        ("embeddings", Count((1 + positions) * spec.width)),
        *_blocks(spec.width, spec.depth, spec.mlp_ratio, positions, positions**2, readout),
        ("norms", _norm(spec.width) * (1 if spec.no_ln_pre else 2)),
        ("projection", linear(spec.final_width, spec.embed_dim, 1, bias=False)),
    ]


def _swin(spec: ModelSpec) -> list[tuple[str, Count]]:
    first = spec.stages[0]
    parts = [
        ("patch_embedding", linear(3 * spec.patch_size**2, spec.width, first.side**2)),
        ("norms", _norm(spec.width)),
    ]
    for side, width, depth, heads, window in spec.stages:
        if width > spec.width:
            parts += [("merging", _norm(2 * width) + linear(2 * width, width, side**2, bias=False))]
        windows = math.ceil(side / window) ** 2  # attention pads a side to a multiple of the window
        tokens = windows * window**2
        hidden = int(width * spec.mlp_ratio)
        parts += [
            ("attention_projections", (linear(width, 3 * width, tokens) + linear(width, width, tokens)) * depth),
            ("attention_matmuls", attention_matmuls(width, tokens * window**2) * depth),
            ("position_biases", Count((2 * window - 1) ** 2 * heads) * depth),
            ("mlp", (linear(width, hidden, side**2) + linear(hidden, width, side**2)) * depth),
            ("norms", _norm(width) * 2 * depth),
        ]
    last = ("projection", linear(spec.final_width, spec.embed_dim, 1, bias=False))
    return [*parts, ("norms", _norm(spec.final_width)), last]


def image_tower(spec: ModelSpec, *, readout: bool = True) -> dict[str, Count]:
    """Parameters of the image tower and MACs per image, by kind of module.

    With `readout` the last block of a ViT computes only the class token, as in `compt.models`; without it every
    position, as in stock open_clip.
    """
    return _sum_by_name(_swin(spec) if spec.arch == "swin" else _vit(spec, readout))


def text_tower(spec: ModelSpec, tokens: Tokens = None, *, readout: bool = True) -> dict[str, Count]:
    """Parameters of the text tower and MACs per caption, by kind of module; `readout` as in `image_tower`.

    `tokens` are the computed ones, after trimming; lengths are cut to the context.
    """
    return text_tower_of(spec, *token_moments(tokens, spec.context_length), readout=readout)


def text_tower_of(spec: ModelSpec, positions: float, squared: float, *, readout: bool) -> dict[str, Count]:
    """`text_tower` from the mean length of captions and the mean of its square, without cutting to the context."""
    return _sum_by_name(
        [
            ("embeddings", Count((spec.vocab_size + spec.context_length) * spec.text_width)),
            *_blocks(spec.text_width, spec.text_depth, spec.mlp_ratio, positions, squared, readout),
            ("final_norm", _norm(spec.text_width)),
            ("projection", linear(spec.text_width, spec.embed_dim, 1, bias=False)),
        ]
    )


def parameters(spec: ModelSpec) -> int:
    """All parameters of a model, including the learned scalars."""
    counts = (*image_tower(spec).values(), *text_tower(spec).values(), *scalars(spec).values())
    return total(counts).parameters


def scalars(spec: ModelSpec) -> dict[str, Count]:
    """The learned scalars, which cost no matrix product."""
    return {scalar.name: Count(1) for scalar in spec.scalars}


def projectors(student: ModelSpec, teacher: ModelSpec) -> dict[Literal["image", "text"], Count]:
    """The projector of each tower for feature distillation, applied once; none if both embeddings have one width."""
    if student.embed_dim == teacher.embed_dim:
        return {}
    one = linear(student.embed_dim, teacher.embed_dim, 1)
    return {"image": one, "text": one}


def similarity_macs(batch: int, captions: int, embed_dim: int, *, pairwise: bool = False) -> int:
    """Forward MACs per step of the similarity products: captions against images, and images against captions.

    `pairwise`: the loss takes one product for both (`LossTraits`).
    """
    return (1 if pairwise else 2) * batch * batch * captions * embed_dim
