"""Parameters by name, read or made one at a time: what passes between files, models and engines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compt.errors import ArtefactError

_LISTED = 8


class State(Mapping[str, Tensor]):
    """Parameter name -> tensor. Each access reads or makes the tensor; names and shapes are known without it.

    `_parts` has for each name what a subclass makes its tensor from.
    """

    _parts: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        # Mapping's own __contains__ would make the tensor.
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without reading or making it (here: that of its part)."""
        return shape_of(self._parts, name)


def shape_of(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of one parameter of any mapping. Reads the tensor only if the mapping does not know its shape."""
    known: Any = getattr(state, "shape", None)
    return tuple(known(name) if known else state[name].shape)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters of any mapping, as `shape_of` finds them."""
    return {name: shape_of(state, name) for name in state}


def check_shapes(
    own: Mapping[str, Sequence[int]],
    found: Mapping[str, Tensor],
    head: str,
    *,
    any_scalar: bool = False,
    more: Iterable[str] = (),
) -> None:
    """Raise ArtefactError unless `found` has the names and the shapes of `own`, and `more` problems are none.

    The error begins with `head` and lists the first few problems. `any_scalar`: a single number may have any shape of
    one element, such as () or [1].
    """
    names = set(found)  # to look a name up in a mapping of another kind than State may read the tensor
    problems = [f"{name} is missing" for name in own if name not in names]
    problems += [f"{name} is unexpected" for name in found if name not in own]
    for name, shape in own.items():
        other = shape_of(found, name) if name in names else tuple(shape)
        if other != tuple(shape) and not (any_scalar and math.prod(other) == math.prod(shape) == 1):
            problems.append(f"{name} has shape {list(other)} instead of {list(shape)}")
    problems += more
    if problems:
        rest = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ArtefactError(f"{head}: {'; '.join(problems[:_LISTED])}{rest}")


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise ArtefactError, which begins with `what`, for NaN and infinities. A finite tensor takes no more memory."""
    if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
        broken = tensor.numel() - int(tensor.isfinite().sum())
        raise ArtefactError(f"{what}: {broken:,} of {tensor.numel():,} numbers are NaN or infinite")
