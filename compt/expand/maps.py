"""Maps along axes: which teacher elements, with which weights, make each student element.

`insert` to `insert_exact` are the functions of the width operators; the table in `compt.models.operators` names them.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from compt.expand.axes import Kind, Use
from compt.expand.linalg import one_thread
from compt.models.operators import WIDTH_OPERATORS

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

OWN = -1
"""In `AxisMap.index`: keep the student's own initialization."""
ZERO = -2
"""In `AxisMap.index`: zero, even if another dimension says `OWN`."""
MEAN = -3
"""In `AxisMap.index`: the mean of the teacher's elements along the axis."""


@dataclass(frozen=True, eq=False)
class AxisMap:
    """A linear map along one dimension: student element k is the sum over j of `weight[k, j]` teacher[`index[k, j]`].

    `index` is int64 [student size, taps]; its first column may hold `OWN`, `ZERO` or `MEAN` instead. `weight` is
    float64 of the same shape, or None for 1. `centre`: subtract the teacher's mean along the dimension first.
    `noise`: relative noise between the copies of a teacher element, such that their sum stays. Every element of a
    tensor has its own; with `shared` there is one number per position, and the mean of its squares over copies is 1.
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
        """Whether the map changes nothing."""
        same = self.index.shape == (self.source_size, 1) and self.plain
        return same and bool((self.index[:, 0] == np.arange(self.source_size)).all())

    @property
    def plain(self) -> bool:
        """Whether known elements are bitwise copies."""
        simple = self.weight is None and not self.centre and not self.noise and self.index.shape[1] == 1
        return simple and not bool((self.index == MEAN).any())

    def copies(self) -> Indices:
        """The number of copies of each teacher element: int64 [source size]."""
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
    """Element k from k mod old, nothing divided (figure A a of the paper)."""
    axis = _repeated(old, new)
    if kind == "emb":
        return replace(axis, noise=noise, shared=True)
    return replace(axis, noise=noise) if use == "read" else axis


def interpolate(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """Linear resize with half-pixel centres, as `torch.nn.functional.interpolate(mode="linear")`."""
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    low = np.minimum(at.astype(np.int64), old - 1)
    upper = at - low
    index = np.stack([low, np.minimum(low + 1, old - 1)], axis=1)
    return AxisMap(index, old, np.stack([1 - upper, upper], axis=1))


def net2net(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """Element k from k mod old; readers divide by the number of copies, the joint embedding by its root."""
    axis = duplicate(kind, use, old, new, noise)
    count = axis.copies()[axis.index].astype(np.float64)
    if kind == "emb":
        return replace(axis, weight=1 / np.sqrt(count))
    return replace(axis, weight=1 / count) if use == "read" else axis


def lemon(kind: Kind, use: Use, old: int, new: int, noise: float) -> AxisMap:
    """In the residual stream, whole copies and then the mean of the stream (LEMON, section 4); elsewhere `net2net`."""
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
    """Insertion: the stream gets mean zero and its new channels are zero; nothing reads new hidden units yet."""
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


_A = -0.5


def _cubic(x: Floats) -> Floats:
    """Keys' cubic convolution kernel with a = -1/2, as torch's antialiased resizing has it."""
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def bicubic(old: int, new: int) -> Floats:
    """[new, old], float64: one side of `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`."""
    scale = old / new
    stretch = max(scale, 1.0)
    weight = np.zeros((new, old))
    for k in range(new):
        centre = scale * (k + 0.5)
        low = max(int(centre - 2 * stretch + 0.5), 0)
        high = min(int(centre + 2 * stretch + 0.5), old)
        taps = _cubic((np.arange(low, high, dtype=np.float64) - centre + 0.5) / stretch)
        weight[k, low:high] = taps / taps.sum()
    return weight


def _patch_weights(old: int, new: int) -> Floats:
    """[new, old] for one side of a patch: the transposed pseudo-inverse of resizing (FlexiViT, section 3.4).

    The new filter gives for a resized patch the token that the old filter gives for the patch.
    """
    with one_thread():
        found = torch.linalg.pinv(torch.from_numpy(bicubic(old, new).T.copy()))
    return np.asarray(found.contiguous().numpy())


def _dense(weight: Floats) -> AxisMap:
    """The map of a matrix [student size, teacher size], with as few taps as hold its nonzero elements."""
    taps = max(1, int((weight != 0).sum(axis=1).max()))
    index = np.sort(np.argsort(weight == 0, axis=1, kind="stable")[:, :taps], axis=1)
    return AxisMap(index.astype(np.int64), weight.shape[1], np.take_along_axis(weight, index, axis=1))


def _grid(old: int, new: int) -> AxisMap:
    """Positions of a ViT: the class token, then a square of patches, row by row, as open_clip's `resize_pos_embed`."""
    sides = math.isqrt(old - 1), math.isqrt(new - 1)
    side = _dense(bicubic(*sides))
    square = pack([side, side])
    index = np.zeros((new, square.index.shape[1]), dtype=np.int64)
    weight = np.zeros(index.shape, dtype=np.float64)
    weight[0, 0] = 1.0
    index[1:] = square.index + 1
    weight[1:] = square.weight
    return AxisMap(index, old, weight)


def _offsets(old: int, new: int) -> AxisMap:
    """Relative positions in a Swin's window: a square with 2 window - 1 positions a side."""
    side = _dense(bicubic(math.isqrt(old), math.isqrt(new)))
    return pack([side, side])


def axis_map(operator: str, kind: Kind, use: Use, old: int, new: int, noise: float = 0.0) -> AxisMap:
    """The map of one axis. For positions and pixels it does not depend on the operator; for equal sizes it changes
    nothing.
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
        return _dense(_patch_weights(old, new))
    maps: Maps = pkgutil.resolve_name(WIDTH_OPERATORS[operator].maps)
    return maps(kind, use, old, new, noise)


def pack(maps: Iterable[AxisMap]) -> AxisMap:
    """The map of a packed dimension from the maps of its axes, outermost first.

    Zero along any axis gives zero; otherwise own along any axis gives own. Raises ValueError for a map with a mean or
    with centring, which act on whole dimensions only.
    """
    packed, *inner = maps
    for axis in inner:
        packed = _pair(packed, axis)
    return packed


def _pair(outer: AxisMap, inner: AxisMap) -> AxisMap:
    a, b = outer.index, inner.index
    if outer.centre or inner.centre or (a == MEAN).any() or (b == MEAN).any():
        raise ValueError("one axis of a packed dimension cannot take a mean")
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
