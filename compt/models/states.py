"""Parameters by name, read or made one at a time: what passes between files, models and engines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


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

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without reading or making it."""


def shape_of(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of one parameter of any mapping. Reads the tensor only if the mapping does not know its shape."""
    known: Any = getattr(state, "shape", None)
    return tuple(known(name) if known else state[name].shape)
