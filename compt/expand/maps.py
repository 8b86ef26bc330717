"""Maps along axes: which teacher elements, with which weights, make each student element.

The functions of type `Maps` belong to the width operators; `compt.models.operators.WIDTH_OPERATORS` names them.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compt.expand.axes import Kind, Use
from compt.expand.resize import grid_weights, offset_weights, pixel_weights
from compt.models.operators import WIDTH_OPERATORS

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

OWN = -1
"""In `AxisMap.index`: the student's own initialization."""
ZERO = -2
"""In `AxisMap.index`: zero, also where another dimension says `OWN`."""
MEAN = -3
"""In `AxisMap.index`: the mean of all the teacher's elements along the axis."""


@dataclass(frozen=True, eq=False)
class AxisMap:
    """A linear map along one dimension: student element k is the sum over j of `weight[k, j]` teacher[`index[k, j]`].

    `index` is int64 [student size, taps]; its first column may hold `OWN`, `ZERO` or `MEAN` instead. `weight` is
    float64 of the same shape, or None for 1. `centre`: the teacher's mean along the dimension is subtracted first.
    `noise`: by which share copies of one teacher element differ, so that the sum over them stays: every element of a
    tensor by itself, or, where `shared`, one number a position, whose squares' mean over the copies stays 1.
    """

    index: Indices
    source_size: int
    weight: Floats | None = None
    centre: bool = False
    noise: float = 0.0
    shared: bool = False

    @cached_property
    def known(self) -> Indices:
        """The student positions that come from the teacher."""
        return np.flatnonzero((self.index[:, 0] >= 0) | (self.index[:, 0] == MEAN))

    @cached_property
    def zero(self) -> Indices:
        """The student positions that are zero."""
        return np.flatnonzero(self.index[:, 0] == ZERO)

    @property
    def identity(self) -> bool:
        """Whether the dimension passes through unchanged."""
        same = self.index.shape == (self.source_size, 1) and self.plain
        return same and bool((self.index[:, 0] == np.arange(self.source_size)).all())

    @property
    def plain(self) -> bool:
        """Whether known elements are copies, bit for bit."""
        simple = self.weight is None and not self.centre and not self.noise and self.index.shape[1] == 1
        return simple and not bool((self.index == MEAN).any())

    def copies(self) -> Indices:
        """How many student positions each teacher element goes to: int64 [source size]."""
        taken = self.index[self.index[:, 0] >= 0, 0]
        return np.bincount(taken, minlength=self.source_size).astype(np.int64)


Maps = Callable[[Kind, Use, int, int, float], AxisMap]
"""The maps of a width operator: (kind of axis, use, teacher size, student size, noise) -> the map of the axis."""


def prefix(old: int, new: int, rest: int = OWN) -> AxisMap:
    """The teacher's elements first, `rest` behind them."""
    index = np.full((new, 1), rest, dtype=np.int64)
    index[:old, 0] = np.arange(old)
    return AxisMap(index, old)


def _repeated(old: int, new: int) -> AxisMap:
    return AxisMap(np.arange(new, dtype=np.int64)[:, None] % old, old)


def insert(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """The teacher's elements first, the student's own initialization behind them."""
    return prefix(old, new)


def duplicate(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """Element k from k mod old, nothing divided (figure A a)."""
    axis = _repeated(old, new)
    if kind == "emb":
        return replace(axis, noise=noise, shared=True)
    return replace(axis, noise=noise) if use == "read" else axis


def interpolate(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """Linear resize with half-pixel centres, as torch's `F.interpolate(mode="linear", align_corners=False)`."""
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    low = np.minimum(at.astype(np.int64), old - 1)
    upper = at - low
    index = np.stack([low, np.minimum(low + 1, old - 1)], axis=1)
    return AxisMap(index, old, np.stack([1 - upper, upper], axis=1))


def net2net(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """Element k from k mod old; what reads copies divided by their number, the joint embedding by its root."""
    axis = duplicate(kind, use, old, new, noise)
    count = axis.copies()[axis.index].astype(np.float64)
    if kind == "emb":
        return replace(axis, weight=1 / np.sqrt(count))
    return replace(axis, weight=1 / count) if use == "read" else axis


def lemon(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """Along the residual stream whole copies and, behind them, the stream's mean; elsewhere `net2net` (LEMON, 4)."""
    if kind != "res":
        return net2net(kind, use, old, new, noise)
    times = new // old
    rest = {"write": MEAN, "shift": ZERO}.get(use, OWN)
    index = np.full((new, 1), rest, dtype=np.int64)
    index[: times * old, 0] = np.arange(times * old) % old
    if use == "read":
        return AxisMap(index, old, np.full((new, 1), 1 / times), noise=noise) if times > 1 else AxisMap(index, old)
    return AxisMap(index, old, _gain("lemon", old, new) if use == "gain" else None)


def insert_exact(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """Insertion into a stream of mean zero whose new channels are zero; new hidden units are not read yet."""
    if kind == "emb":
        return net2net(kind, use, old, new, noise)
    if kind == "hidden":
        return prefix(old, new, ZERO if use == "read" else OWN)
    axis = prefix(old, new, ZERO if use in {"write", "shift"} else OWN)
    if use == "write":
        return replace(axis, centre=True)
    return replace(axis, weight=_gain("insert_exact", old, new)) if use == "gain" else axis


def _gain(operator: str, old: int, new: int) -> Floats | None:
    factor = WIDTH_OPERATORS[operator].norm_factor(old, new)
    return None if factor == 1 else np.full((new, 1), math.sqrt(factor))


def _dense(weight: Floats) -> AxisMap:
    """The map of a matrix [student size, teacher size], as few taps as hold all that is not zero."""
    taps = max(1, int((weight != 0).sum(axis=1).max()))
    index = np.sort(np.argsort(weight == 0, axis=1, kind="stable")[:, :taps], axis=1)
    return AxisMap(index.astype(np.int64), weight.shape[1], np.take_along_axis(weight, index, axis=1))


def _grid(old: int, new: int) -> AxisMap:
    """Positions of a ViT: the class token, then a square of patches, row by row."""
    sides = math.isqrt(old - 1), math.isqrt(new - 1)
    side = _dense(grid_weights(*sides))
    square = pack([side, side])
    index = np.zeros((new, square.index.shape[1]), dtype=np.int64)
    weight = np.zeros(index.shape, dtype=np.float64)
    weight[0, 0] = 1.0
    index[1:] = square.index + 1
    weight[1:] = square.weight
    return AxisMap(index, old, weight)


def _offsets(old: int, new: int) -> AxisMap:
    """Relative positions of a Swin's window: a square of 2 window - 1 a side."""
    side = _dense(offset_weights(math.isqrt(old), math.isqrt(new)))
    return pack([side, side])


def axis_map(operator: str, kind: Kind, use: Use, old: int, new: int, noise: float = 0.0) -> AxisMap:
    """The map of one axis; positions and pixels do not ask for the operator. Equal sizes: the identity.

    Raises ConfigError where no map is known.
    """
    if old == new or kind == "fixed":
        return _repeated(old, new)
    if kind == "prefix":
        return prefix(old, new)
    if kind == "grid":
        return _grid(old, new)
    if kind == "offsets":
        return _offsets(old, new)
    if kind == "pixels":
        return _dense(pixel_weights(old, new))
    maps: Maps = pkgutil.resolve_name(WIDTH_OPERATORS[operator].maps)
    return maps(kind, use, old, new, noise)


def pack(maps: Iterable[AxisMap]) -> AxisMap:
    """The map of a packed dimension from the maps of its axes, outermost first.

    Zero along any axis is zero; else own along any axis is own. Means and centring act on whole dimensions alone.
    """
    packed, *inner = maps
    for axis in inner:
        packed = _pair(packed, axis)
    return packed


def _pair(outer: AxisMap, inner: AxisMap) -> AxisMap:
    a, b = outer.index, inner.index
    if outer.centre or inner.centre or (a == MEAN).any() or (b == MEAN).any():
        raise ValueError("a mean cannot be taken along one axis of a packed dimension")
    index = a[:, None, :, None] * inner.source_size + b[None, :, None, :]
    first, second = a[:, None, 0], b[None, :, 0]
    index[(first < 0) | (second < 0)] = OWN
    index[(first == ZERO) | (second == ZERO)] = ZERO
    shape = (len(a) * len(b), a.shape[1] * b.shape[1])
    weight = None
    if outer.weight is not None or inner.weight is not None:
        sides = (np.ones(each.index.shape) if each.weight is None else each.weight for each in (outer, inner))
        left, right = sides
        weight = (left[:, None, :, None] * right[None, :, None, :]).reshape(shape)
    size = outer.source_size * inner.source_size
    return AxisMap(index.reshape(shape), size, weight, noise=max(outer.noise, inner.noise))
