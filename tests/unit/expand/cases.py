"""Tiny models, sentinel weights and a slow oracle, shared by the expansion tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import open_clip.model
import torch
from torch import Tensor

from compt.expand.axes import parameters
from compt.models.presets import ModelSpec

HEAD = 4

TINY = ModelSpec(
    name="tiny",
    arch="vit",
    width=2 * HEAD,
    depth=2,
    heads=2,
    text_width=HEAD,
    text_depth=1,
    text_heads=1,
    image_size=8,
    patch_size=4,
    context_length=5,
    vocab_size=11,
    embed_dim=6,
    head_width=HEAD,
    text_head_width=HEAD,
)


def sized(name: str, heads: int, depth: int, text_heads: int, text_depth: int, **other: Any) -> ModelSpec:
    return replace(
        TINY,
        name=name,
        width=heads * HEAD,
        heads=heads,
        depth=depth,
        text_width=text_heads * HEAD,
        text_heads=text_heads,
        text_depth=text_depth,
        **other,
    )


SMALL = sized("small", 3, 4, 2, 2, embed_dim=7, context_length=6)
BIG = sized("big", 5, 8, 3, 4, embed_dim=10, context_length=9)


def sentinels(spec: ModelSpec) -> dict[str, Tensor]:
    """Weights whose every element is its own number, counted from 0 through the whole model."""
    state, start = {}, 0
    for name, parameter in parameters(spec).items():
        size = int(torch.tensor(parameter.shape).prod())
        state[name] = torch.arange(start, start + size, dtype=torch.float64).reshape(parameter.shape)
        start += size
    return state


def negative(name: str, shape: tuple[int, ...]) -> Tensor:
    """Own initialization that differs from every sentinel by its sign."""
    return -1.0 - torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(shape)


class Negative:
    """Draws of `negative`, and copies that do not differ."""

    own = staticmethod(negative)

    @staticmethod
    def noise(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)


def source_name(name: str, teacher: ModelSpec, student: ModelSpec) -> str:
    """Depth duplication for a ViT and a text tower, from its formula."""
    p, q = (teacher.depth, student.depth) if name.startswith("visual.") else (teacher.text_depth, student.text_depth)
    return re.sub(r"(?<=resblocks\.)\d+", lambda match: str(int(match[0]) * p // q), name)


def insertion_oracle(name: str, old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Head-aligned insertion of `old` into `negative`: role by role, head by head, row by row."""
    new = negative(name, shape)
    if "in_proj" in name:
        old_width, new_width = old.shape[0] // 3, shape[0] // 3
        for role in range(3):
            for head in range(old_width // HEAD):
                for channel in range(HEAD):
                    row = old[role * old_width + head * HEAD + channel]
                    target = (role * new_width + head * HEAD + channel, *(slice(0, size) for size in row.shape))
                    new[target] = row
        return new
    if not shape:
        return old
    new[tuple(slice(0, size) for size in old.shape)] = old
    return new


def build(spec: ModelSpec, state: Mapping[str, Tensor]) -> open_clip.model.CLIP:
    """Stock open_clip in float64 with these weights."""
    model = open_clip.model.CLIP(**spec.open_clip_config()).double()
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()})
    return model.eval()


def features(model: open_clip.model.CLIP, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Image and text features of four fixed samples; all positions and several tokens are used."""
    draw = torch.Generator().manual_seed(5)
    images = torch.randn(4, 3, spec.image_size, spec.image_size, generator=draw, dtype=torch.float64)
    tokens = torch.randint(1, spec.vocab_size - 1, (4, spec.context_length), generator=draw)
    tokens[:, -1] = spec.vocab_size - 1  # the end of text: open_clip reads the feature at the largest token
    return model.encode_image(images), model.encode_text(tokens)
