"""What an expansion must give, element by element: a slow oracle that shares no map with the product.

Every dimension of a parameter is written as blocks x units x channels, told from the parameter's name alone: the rows
of a packed attention matrix are 3 roles x heads x channels of a head, patch merging reads 4 neighbours x channels x 1,
most others are 1 x size x 1. Units grow; blocks and channels do not. For each student unit plain Python says what it is
made of: some of the teacher's units with a factor each, the student's own initialization, or zero.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import open_clip.model
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compt.models.growth import ExpandConfig
from compt.models.presets import ModelSpec
from compt.models.swin import register_swin

Array = NDArray[np.float64]
Sources = list[tuple[int, float]] | str  # teacher's units and their factors, or OWN, or ZERO
OWN, ZERO = "own", "zero"
HEAD = 4


@dataclass(frozen=True)
class Line:
    """One dimension: `kind` is the rule of its units; `use` says whether the parameter writes or reads them."""

    kind: str  # res, hidden, emb, prefix, fixed
    use: str  # write, read, gain, shift
    units: int
    blocks: int = 1
    channels: int = 1

    @property
    def size(self) -> int:
        return self.blocks * self.units * self.channels


def vit(name: str, heads: int, depth: int, text_heads: int, text_depth: int, **other: Any) -> ModelSpec:
    """A ViT and a text tower of heads of 4 channels."""
    sizes: dict[str, Any] = {
        "arch": "vit",
        "image_size": 8,
        "patch_size": 4,
        "context_length": 5,
        "vocab_size": 11,
        "embed_dim": 6,
        "head_width": HEAD,
        "text_head_width": HEAD,
        "width": heads * HEAD,
        "text_width": text_heads * HEAD,
        "depth": depth,
        "heads": heads,
        "text_depth": text_depth,
        "text_heads": text_heads,
    }
    return ModelSpec(name, **sizes | other)


def swin(name: str, heads: int, depths: tuple[int, ...], **other: Any) -> ModelSpec:
    """A Swin of heads of 4 channels; three stages bring 32 pixels down to a window of 2."""
    stage_heads = tuple(heads * 2**stage for stage in range(len(depths)))
    sizes: dict[str, Any] = {"depths": depths, "stage_heads": stage_heads, "window": 2, "image_size": 32}
    text = (other.pop("text_heads", 1), other.pop("text_depth", 1))
    return vit(name, heads, sum(depths), *text, **{"arch": "swin", "embed_dim": 5} | sizes | other)


def stock(spec: ModelSpec) -> open_clip.model.CLIP:
    """The model as stock open_clip builds it from the spec's config."""
    if spec.arch == "swin":
        register_swin(spec.timm_name)
    config: dict[str, Any] = spec.open_clip_config()
    return open_clip.model.CLIP(**config)


@functools.cache
def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, from stock open_clip."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in stock(spec).state_dict().items()}


def numbered(spec: ModelSpec, offset: float = 0.0) -> dict[str, Tensor]:
    """Weights whose every element is its own number, counted through the whole model from `offset`."""
    state = {}
    for name, shape in shapes(spec).items():
        size = math.prod(shape)
        state[name] = offset + torch.arange(size, dtype=torch.float64).reshape(shape)
        offset += size
    return state


class Marks:
    """Draws that differ from all numbers of a teacher: own elements are negative, and differ between parameters."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def own(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.asked.append(name)
        first = sum(name.encode()) % 997
        return -1.0 - first - torch.arange(math.prod(shape), dtype=torch.float32).reshape(tuple(shape))

    def noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        draw = torch.Generator().manual_seed(sum(name.encode()))
        return torch.rand(tuple(shape), generator=draw, dtype=torch.float64) * 2 - 1


# --- what a parameter is -------------------------------------------------------------------------------------------


def lines(spec: ModelSpec, name: str) -> list[Line]:
    """The dimensions of one parameter of a model."""
    if name == "logit_scale":
        return []
    image = name.startswith("visual.")
    if spec.arch == "swin" and image:
        return _swin_lines(spec, name)
    width = spec.width if image else spec.text_width
    heads, channels = (spec.heads, spec.head_width) if image else (spec.text_heads, spec.text_head_width)
    leaf = re.sub(r"^(visual\.)?(transformer\.resblocks\.\d+\.)?", "", name)
    write, read = Line("res", "write", width), Line("res", "read", width)
    patches = (spec.image_size // spec.patch_size) ** 2 + 1
    special = {
        "class_embedding": [write],
        "positional_embedding": [
            Line("fixed", "write", patches) if image else Line("prefix", "write", spec.context_length),
            write,
        ],
        "proj": [read, Line("emb", "write", spec.embed_dim)],
        "text_projection": [read, Line("emb", "write", spec.embed_dim)],
        "token_embedding.weight": [Line("prefix", "write", spec.vocab_size), write],
        "conv1.weight": [write, *(Line("fixed", "read", size) for size in (3, spec.patch_size, spec.patch_size))],
    }
    if leaf in special:
        return special[leaf]
    return _block_lines(leaf, width, int(width * spec.mlp_ratio), heads, channels)


def _block_lines(leaf: str, width: int, hidden: int, heads: int, channels: int) -> list[Line]:
    module, _, kind = leaf.rpartition(".")
    if re.search(r"ln_|norm", module):
        return [Line("res", "gain" if kind == "weight" else "shift", width)]
    rows = {
        "attn": Line("hidden", "write", heads, 3, channels),
        "attn.qkv": Line("hidden", "write", heads, 3, channels),
        "mlp.c_fc": Line("hidden", "write", hidden),
        "mlp.fc1": Line("hidden", "write", hidden),
    }
    columns = {
        "attn.out_proj": Line("hidden", "read", heads, 1, channels),
        "attn.proj": Line("hidden", "read", heads, 1, channels),
        "mlp.c_proj": Line("hidden", "read", hidden),
        "mlp.fc2": Line("hidden", "read", hidden),
    }
    if module not in {*rows, *columns}:
        raise KeyError(leaf)
    row = rows.get(module, Line("res", "write", width))
    return [row] if kind.endswith("bias") else [row, columns.get(module, Line("res", "read", width))]


def _swin_lines(spec: ModelSpec, name: str) -> list[Line]:
    leaf = name.removeprefix("visual.").removeprefix("trunk.")
    if leaf == "head.proj.weight":
        return [Line("emb", "write", spec.embed_dim), Line("res", "read", spec.final_width)]
    if leaf in ("norm.weight", "norm.bias"):
        return _block_lines(leaf, spec.final_width, 0, 0, 0)
    if leaf == "patch_embed.proj.weight":
        pixels = (Line("fixed", "read", size) for size in (3, spec.patch_size, spec.patch_size))
        return [Line("res", "write", spec.width), *pixels]
    if leaf == "patch_embed.proj.bias":
        return [Line("res", "write", spec.width)]
    if leaf.startswith("patch_embed.norm."):
        return _block_lines(leaf, spec.width, 0, 0, 0)
    found = re.fullmatch(r"layers\.(\d+)\.(?:(downsample)|blocks\.\d+)\.(.+)", leaf)
    assert found is not None, name
    stage, rest = int(found[1]), found[3]
    width = spec.width * 2**stage
    if found[2]:
        use = {"norm.weight": "gain", "norm.bias": "shift", "reduction.weight": "read"}[rest]
        merged = Line("res", use, width // 2, 4)
        return [Line("res", "write", width), merged] if use == "read" else [merged]
    if rest.endswith("relative_position_bias_table"):
        offsets = (2 * _window(spec, stage) - 1) ** 2
        return [Line("fixed", "write", offsets), Line("hidden", "write", spec.stage_heads[stage])]
    return _block_lines(rest, width, int(width * spec.mlp_ratio), spec.stage_heads[stage], spec.head_width)


def _window(spec: ModelSpec, stage: int) -> int:
    """timm's windows are never larger than the map they cover."""
    return min(spec.window, math.ceil(spec.image_size / spec.patch_size / 2**stage))


# --- what a unit is made of ----------------------------------------------------------------------------------------


def unit_sources(operator: str, kind: str, use: str, old: int, new: int, at: int) -> Sources:
    """What student unit `at` of `new` is made of, `old` being the teacher's number of units."""
    if old == new:
        return [(at, 1.0)]
    if kind == "prefix" or operator in ("insert", "insert_packed", "netexpand"):
        return [(at, 1.0)] if at < old else OWN
    if operator == "duplicate":
        return [(at % old, 1.0)]
    if operator == "interpolate":
        place = max((at + 0.5) * old / new - 0.5, 0.0)
        low = math.floor(place)
        return [(low, 1.0 - (place - low)), (min(low + 1, old - 1), place - low)]
    if kind == "res" and operator == "lemon":
        return _lemon_stream(use, old, new, at)
    if kind == "res" and operator == "insert_exact":
        return _centred_stream(use, old, new, at)
    if kind == "hidden" and operator == "insert_exact":
        behind = ZERO if use == "read" else OWN
        return [(at, 1.0)] if at < old else behind
    copies = sum(1 for other in range(new) if other % old == at % old)
    share = {"emb": copies**-0.5}.get(kind, 1 / copies if use == "read" else 1.0)
    return [(at % old, share)]


def _lemon_stream(use: str, old: int, new: int, at: int) -> Sources:
    copies = new // old
    if at < copies * old:
        share = {"read": 1 / copies, "gain": math.sqrt(copies * old / new)}.get(use, 1.0)
        return [(at % old, share)]
    if use == "write":
        return [(unit, 1 / old) for unit in range(old)]
    return ZERO if use == "shift" else OWN


def _centred_stream(use: str, old: int, new: int, at: int) -> Sources:
    if at >= old:
        return ZERO if use in ("write", "shift") else OWN
    if use == "write":
        return [(at, 1.0), *((unit, -1 / old) for unit in range(old))]
    return [(at, math.sqrt(old / new) if use == "gain" else 1.0)]


def _matrix(operator: str, old: Line, new: Line) -> tuple[Array, list[str]]:
    """Student positions x teacher positions of one dimension, and for each student position OWN, ZERO or ''."""
    assert (old.kind, old.use, old.blocks, old.channels) == (new.kind, new.use, new.blocks, new.channels)
    if operator == "insert_packed":
        old, new = (Line(line.kind, line.use, line.size) for line in (old, new))
    matrix = np.zeros((new.size, old.size))
    marks = [""] * new.size
    for unit in range(new.units):
        found = unit_sources(operator, new.kind, new.use, old.units, new.units, unit)
        for block in range(new.blocks):
            for channel in range(new.channels):
                row = (block * new.units + unit) * new.channels + channel
                if isinstance(found, str):
                    marks[row] = found
                    continue
                for source, factor in found:
                    matrix[row, (block * old.units + source) * old.channels + channel] += factor
    return matrix, marks


def element_oracle(operator: str, old: list[Line], new: list[Line], teacher: Array, own: Array) -> Array:
    """One parameter of the student: every dimension's rule, then own elements, then zeros, which win."""
    result = teacher
    is_own, is_zero = np.zeros(own.shape, bool), np.zeros(own.shape, bool)
    for dim, (a, b) in enumerate(zip(old, new, strict=True)):
        matrix, marks = _matrix(operator, a, b)
        result = np.moveaxis(np.tensordot(matrix, result, axes=(1, dim)), 0, dim)
        shape = [1] * len(new)
        shape[dim] = -1
        is_own |= np.array([mark == OWN for mark in marks]).reshape(shape)
        is_zero |= np.array([mark == ZERO for mark in marks]).reshape(shape)
    return np.where(is_zero, 0.0, np.where(is_own, own, result))


# --- which layer a parameter comes from, and the whole of a student -------------------------------------------------


def layer_source(operator: str, old: int, new: int, at: int, period: int = 1) -> int:
    """The teacher's layer of student layer `at`, -1 for none; layers move in groups of `period`."""
    if old == new:
        return at
    p, q, k = old // period, new // period, at // period
    group = {
        "duplicate": k * p // q,
        "netexpand": k * p // q,
        "stack": k % p,
        "constant": k if k < p else -1,
        "interval": k * p // q if k * p % q == 0 else -1,
    }[operator]
    return -1 if group < 0 else group * period + at % period


def source_of(name: str, teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> tuple[str | None, bool]:
    """The teacher's parameter (None: own initialization), and whether it is in an added layer."""
    image = name.startswith("visual.")
    if image and teacher.arch != student.arch:
        return None, False
    place = re.search(r"(?<=resblocks\.)\d+|(?<=blocks\.)\d+", name)
    if place is None:
        return name, False
    period = 1
    if not image:
        old, new = teacher.text_depth, student.text_depth
    elif teacher.arch == "vit":
        old, new = teacher.depth, student.depth
    else:
        stage = int(re.search(r"(?<=layers\.)\d+", name)[0])  # type: ignore[index]
        old, new, period = teacher.depths[stage], student.depths[stage], 2
    operator = config.tower("image" if image else "text").depth
    if config.reference_compatible:
        operator, period = "duplicate" if image and teacher.arch == "vit" and new == 2 * old else "constant", 1
    found = [layer_source(operator, old, new, layer, period) for layer in range(new)]
    at = int(place[0])
    if found[at] < 0:
        return None, True
    return f"{name[: place.start()]}{found[at]}{name[place.end() :]}", found[at] in found[:at]


def closes_branch(name: str) -> bool:
    """Whether a residual branch ends in this parameter."""
    return re.search(r"blocks\.\d+\.(attn\.(out_)?proj|mlp\.(c_proj|fc2))\.", name) is not None


def resized(name: str, tensor: Array, teacher: ModelSpec, student: ModelSpec) -> Array:
    """The teacher's position embedding or relative-position table on the student's grid."""
    if name == "visual.positional_embedding":
        sides = [spec.image_size // spec.patch_size for spec in (teacher, student)]
        grid = _bicubic(tensor[1:], sides[0], sides[1])
        return np.concatenate([tensor[:1], grid])
    if name.endswith("relative_position_bias_table"):
        stage = int(name.split(".")[3])
        return _bicubic(tensor, *(2 * _window(spec, stage) - 1 for spec in (teacher, student)))
    return tensor


def _bicubic(rows: Array, old: int, new: int) -> Array:
    """[old², channels] -> [new², channels]."""
    if old == new:
        return rows
    picture = torch.from_numpy(rows).reshape(1, old, old, -1).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    found: Array = picture.permute(0, 2, 3, 1).reshape(new * new, -1).numpy()
    return found


def student_oracle(
    teacher: ModelSpec,
    student: ModelSpec,
    config: ExpandConfig,
    state: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, Array]:
    """The parameters that a student must have, with `Marks` for its own elements. Patch sizes must agree."""
    found = {}
    marks = Marks()
    sizes = shapes(student)
    for name in sizes if names is None else names:
        tower = config.tower("image" if name.startswith("visual.") else "text")
        own = marks.own(name, sizes[name]).double().numpy()
        source, added = source_of(name, teacher, student, config)
        if added and tower.zero_new_outputs and closes_branch(name):
            found[name] = np.zeros(sizes[name])
        elif source is None:
            found[name] = own
        else:
            weights = average if added and tower.depth == "netexpand" and average is not None else state
            old = resized(name, weights[source].double().numpy(), teacher, student)
            old_lines = [
                replace(line, units=old.shape[dim]) if line.kind == "fixed" else line
                for dim, line in enumerate(lines(teacher, source))
            ]
            found[name] = element_oracle(tower.width, old_lines, lines(student, name), old, own)
    return found


# --- what weights compute ------------------------------------------------------------------------------------------


def random_weights(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """Float64 weights for which every part of the model matters: gains around 1, no bias zero, features of order 1."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(spec).items():
        values = torch.randn(shape, generator=draw, dtype=torch.float64)
        if name == "logit_scale":
            values = torch.tensor(2.6, dtype=torch.float64)
        elif len(shape) == 1 and re.search(r"(ln_\w+|norm\d?)\.weight$", name):
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif name.endswith(("proj", "text_projection")):
            values *= shape[0] ** -0.5
        elif len(shape) in (2, 4) and not name.endswith(("embedding", "embedding.weight", "bias_table")):
            values *= math.prod(shape[1:]) ** -0.5
        state[name] = values
    return state


def build(spec: ModelSpec, state: Mapping[str, Tensor]) -> open_clip.model.CLIP:
    """Stock open_clip in float64 with these weights, for evaluation."""
    model = stock(spec).double()
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()})
    return model.eval()


def samples(spec: ModelSpec, count: int = 4) -> tuple[Tensor, Tensor]:
    """Images, and captions that use all positions and end at different ones."""
    draw = torch.Generator().manual_seed(5)
    side, length = spec.image_size, spec.context_length
    images = torch.randn(count, 3, side, side, generator=draw, dtype=torch.float64)
    tokens = torch.randint(1, spec.vocab_size - 1, (count, length), generator=draw)
    for row in range(count):
        end = length - 1 - row % min(3, length - 1)
        tokens[row, end] = spec.vocab_size - 1  # the end of text: open_clip reads the feature at the largest token
        tokens[row, end + 1 :] = 0
    return images, tokens


@torch.no_grad()
def differences(
    teacher: ModelSpec, state: Mapping[str, Tensor], student: ModelSpec, expanded: Mapping[str, Tensor]
) -> dict[str, float]:
    """How far each tower's features are from the teacher's on the teacher's samples, at most.

    Where the joint embedding has grown, the scalar products among the features of a tower are compared; `pair` are the
    products of image and text features of length 1. Captions are padded to the student's length.
    """
    images, tokens = samples(teacher)
    found = []
    for spec, weights in ((teacher, state), (student, expanded)):
        model = build(spec, weights)
        padded = F.pad(tokens, (0, spec.context_length - teacher.context_length))
        found.append((model.encode_image(images), model.encode_text(padded)))
    (image, text), (new_image, new_text) = found
    unit = [F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T for a, b in found]
    if teacher.embed_dim != student.embed_dim:
        image, text, new_image, new_text = (each @ each.T for each in (image, text, new_image, new_text))
    both = {"image": (image, new_image), "text": (text, new_text), "pair": (unit[0], unit[1])}
    return {tower: float((a - b).abs().max()) for tower, (a, b) in both.items()}
