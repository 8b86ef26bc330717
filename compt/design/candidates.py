"""Models that a designed chain may contain: the wanted ones, presets, and sizes between.

ViTs: every width that is a multiple of the head width and every depth, in the proportions of the presets. The text
tower follows from the image tower: its width and depth are interpolated over the presets, in the logarithm of
width^2 * depth, which gives every preset its own. If the next larger wanted model has another text tower than that, its
candidates' text towers change in proportion. Swins: presets only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compt.cost.counts import parameters
from compt.cost.speed import nameless
from compt.design.sizes import log2_size
from compt.errors import ConfigError
from compt.models.presets import PRESETS, ModelSpec
from compt.plan.links import check_growth

SMALLEST = 16
"""A candidate has at least the smallest preset's parameters (as Table G counts them) divided by this."""

_OWN = ("name", "width", "depth", "heads", "head_width", "depths", "stage_heads")
"""What a candidate has of its own. It takes everything else from the next larger wanted model."""


@dataclass(frozen=True)
class Candidates:
    """Models in rising order of parameters. `wanted` are the places of those that have to be in the chain.

    `grows` [n, n]: whether the model of the column can be expanded from the model of the row. `presets` are the places
    of the wanted ones and of image towers that are presets.
    """

    specs: tuple[ModelSpec, ...]
    wanted: tuple[int, ...]
    presets: frozenset[int]
    grows: NDArray[np.bool_]


def ladder(like: ModelSpec) -> tuple[ModelSpec, ...]:
    """The presets of the family that `like` belongs to, by rising parameters: same kind of image tower and heads.

    A ViT with heads of another width than any preset's is taken for one of the paper's. Presets that differ only in
    their images count once.
    """
    same = [spec for spec in PRESETS.values() if spec.arch == like.arch]
    family = [spec for spec in same if spec.head_width == like.head_width] or [
        spec for spec in same if spec.head_width == PRESETS["vit_t16"].head_width
    ]
    rising = sorted(family, key=parameters)
    first = {(spec.width, spec.depth): spec for spec in reversed(rising)}
    return tuple(spec for spec in rising if first[spec.width, spec.depth] is spec)


def text_shape(spec: ModelSpec, presets: Sequence[ModelSpec]) -> tuple[float, float]:
    """Width and depth of the text tower that goes with the image tower of `spec`, not rounded.

    Logarithms are interpolated over `presets`; below the smallest and above the largest the last slope goes on.
    """
    size = [math.log2(preset.width**2 * preset.depth) for preset in presets]
    at = math.log2(spec.width**2 * spec.depth)
    place = int(np.clip(np.searchsorted(size, at) - 1, 0, len(size) - 2))
    share = (at - size[place]) / (size[place + 1] - size[place])
    found = []
    for key in ("text_width", "text_depth"):
        low, high = (math.log2(getattr(presets[place + step], key)) for step in (0, 1))
        found.append(2.0 ** (low + share * (high - low)))
    return found[0], found[1]


def _below(spec: ModelSpec, above: ModelSpec, presets: Sequence[ModelSpec]) -> ModelSpec:
    """`above`, the next larger wanted model, with the image tower of `spec` and the text tower that goes with it.

    The text tower's width is the nearest multiple of its head width, the depth the nearest whole number.
    """
    own, usual = text_shape(spec, presets), text_shape(above, presets)
    heads = max(1, round(own[0] / usual[0] * above.text_width / above.text_head_width))
    return replace(
        above,
        text_width=heads * above.text_head_width,
        text_heads=heads,
        text_depth=max(1, round(own[1] / usual[1] * above.text_depth)),
        timm_name="",
        **{key: getattr(spec, key) for key in _OWN},
    )


def check_wanted(wanted: Sequence[ModelSpec]) -> tuple[ModelSpec, ...]:
    """The wanted models by rising parameters. Raises ConfigError where they cannot stand in one designed chain."""
    rising = tuple(sorted(wanted, key=parameters))
    if len({spec.arch for spec in rising}) > 1:
        raise ConfigError("family.members: ViTs and Swins are not designed into one chain; name one kind of them")
    for before, after in pairwise(rising):
        try:
            check_growth(before, after)
        except ConfigError as error:
            raise ConfigError(
                f"family.members: '{before.name}' and '{after.name}' cannot be in one chain: '{after.name}': {error}"
            ) from None
    return rising


def candidates(wanted: Mapping[str, ModelSpec]) -> Candidates:
    """The wanted models and all that may stand before or between them; none has more parameters than the largest.

    A candidate takes joint embedding, context, image size and the like from the next larger wanted model. Raises
    ConfigError for wanted models that cannot stand in one chain.
    """
    rising = check_wanted(list(wanted.values()))
    family = ladder(rising[-1])
    found = {nameless(spec): spec for spec in rising}
    named = set(found)
    for shape in (*family, *_vit_shapes(rising[-1], family)):
        # Uses the usual text tower; the final one depends on the wanted model above.
        above = next((spec for spec in rising if log2_size(shape) < log2_size(spec)), None)
        if above is not None:
            spec = _below(shape, above, family)
            found.setdefault(nameless(spec), replace(spec, name=_free(shape.name, wanted)))
            if shape in family:
                named.add(nameless(spec))
    counted = sorted(((parameters(spec), at, spec) for at, spec in enumerate(found.values())), key=lambda one: one[:2])
    specs = [spec for _, _, spec in counted]
    places = tuple(specs.index(spec) for spec in rising)
    presets = frozenset(at for at, spec in enumerate(specs) if nameless(spec) in named)
    return Candidates(tuple(specs), places, presets, _grows(specs, [size for size, _, _ in counted]))


def _free(name: str, taken: Mapping[str, ModelSpec]) -> str:
    while name in taken:
        name += "_auto"
    return name


def _vit_shapes(largest: ModelSpec, family: Sequence[ModelSpec]) -> list[ModelSpec]:
    """Every width and depth up to the largest model's, in the proportions of the presets; none for a Swin."""
    if largest.arch == "swin":
        return []
    shares = [spec.width / spec.depth for spec in family]
    least = log2_size(family[0]) - math.log2(SMALLEST)
    shapes = []
    for heads in range(1, largest.heads + 1):
        width = heads * largest.head_width
        for depth in range(1, largest.depth + 1):
            if min(shares) <= width / depth <= max(shares):
                shape = replace(largest, name=f"vit_{width}x{depth}", width=width, depth=depth, heads=heads)
                shape = _below(shape, largest, family)
                if log2_size(shape) >= least:
                    shapes.append(shape)
    return shapes


def _can_grow(teacher: ModelSpec, student: ModelSpec) -> bool:
    try:
        check_growth(teacher, student)
    except ConfigError:
        return False
    return True


_AXES = ("width", "depth", "text_width", "text_depth", "embed_dim", "context_length")


def _grows(specs: Sequence[ModelSpec], counts: Sequence[int]) -> NDArray[np.bool_]:
    """[n, n]: whether parameters, `counts`, rise and no axis shrinks from row to column.

    Axes are compared all at once; Swins are few and have stages, so `check_growth` decides.
    """
    sizes = np.array(
        [
            [size, spec.width * spec.mlp_ratio, spec.text_width * spec.mlp_ratio]
            + [getattr(spec, axis) for axis in _AXES]
            for size, spec in zip(counts, specs, strict=True)
        ]
    )
    rises = (sizes[:, None] <= sizes[None]).all(axis=-1) & (sizes[:, None, 0] < sizes[None, :, 0])
    if specs[-1].arch == "swin":
        for row, column in np.argwhere(rises):
            rises[row, column] = _can_grow(specs[row], specs[column])
    return np.asarray(rises)
