"""Expansion operators: where along an axis, and in which layer, a student's weights come from.

A width operator maps axis sizes `(teacher, student)` to an `AxisMap`; a depth operator maps layer counts to the source
layer of each student layer, -1 for none. Adding one is a function and its entry in `WIDTH` or `DEPTH`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class AxisMap:
    """A gather along one axis: student element k is teacher element `index[k]` times `scale[k]`.

    `index` is int64 [student size]; -1 keeps the student's own initialization. `scale` is float64 [student size], or
    None for 1.
    """

    index: NDArray[np.int64]
    source_size: int
    scale: NDArray[np.float64] | None = None

    @property
    def known(self) -> NDArray[np.int64]:
        """The student positions that come from the teacher."""
        return np.flatnonzero(self.index >= 0)

    @property
    def identity(self) -> bool:
        """Whether the axis passes through unchanged."""
        same = len(self.index) == self.source_size and bool((self.index == np.arange(self.source_size)).all())
        return same and self.scale is None


WidthOperator = Callable[[int, int], AxisMap]
DepthOperator = Callable[[int, int], list[int]]


def insert(teacher: int, student: int) -> AxisMap:
    """The teacher's elements first, the student's own initialization behind them."""
    index = np.full(student, -1, dtype=np.int64)
    index[:teacher] = np.arange(teacher)
    return AxisMap(index, teacher)


def duplicate(teacher: int, student: int) -> AxisMap:
    """The teacher's elements again and again: element k from k mod teacher."""
    return AxisMap(np.arange(student, dtype=np.int64) % teacher, teacher)


def depth_duplicate(teacher: int, student: int) -> list[int]:
    """Layer k from layer floor(k teacher / student): each layer repeated in place."""
    return [layer * teacher // student for layer in range(student)]


def depth_stack(teacher: int, student: int) -> list[int]:
    """The teacher whole, then again from its first layer."""
    return [layer % teacher for layer in range(student)]


def depth_constant(teacher: int, student: int) -> list[int]:
    """The teacher's layers first, own initialization above them."""
    return [layer if layer < teacher else -1 for layer in range(student)]


def depth_interval(teacher: int, student: int) -> list[int]:
    """Layer k from layer k teacher / student where that is whole, own initialization elsewhere."""
    return [-1 if layer * teacher % student else layer * teacher // student for layer in range(student)]


WIDTH: dict[str, WidthOperator] = {"insert": insert, "duplicate": duplicate}

DEPTH: dict[str, DepthOperator] = {
    "duplicate": depth_duplicate,
    "stack": depth_stack,
    "constant": depth_constant,
    "interval": depth_interval,
}


def pack(maps: Iterable[AxisMap]) -> AxisMap:
    """The map of a packed dimension from the maps of its axes, outermost first. New along any axis is new."""
    packed, *inner = maps
    for axis in inner:
        index = packed.index[:, None] * axis.source_size + axis.index[None, :]
        index[(packed.index < 0)[:, None] | (axis.index < 0)[None, :]] = -1
        scale = None
        if packed.scale is not None or axis.scale is not None:
            outer_scale = np.ones(len(packed.index)) if packed.scale is None else packed.scale
            inner_scale = np.ones(len(axis.index)) if axis.scale is None else axis.scale
            scale = np.outer(outer_scale, inner_scale).ravel()
        packed = AxisMap(index.ravel(), packed.source_size * axis.source_size, scale)
    return packed


def repeat_period(operator: DepthOperator, teacher: int, student: int, period: int) -> list[int]:
    """Apply a depth operator to groups of `period` layers, so that layer k keeps its place k mod period in its group.

    Both depths must be multiples of `period`, or equal (then every layer is its own source).
    """
    if teacher == student:
        return list(range(student))
    groups = operator(teacher // period, student // period)
    return [-1 if group < 0 else group * period + place for group in groups for place in range(period)]


def added_layers(sources: list[int]) -> list[bool]:
    """For each student layer, whether it has no source or repeats the source of an earlier one."""
    return [source < 0 or source in sources[:layer] for layer, source in enumerate(sources)]
