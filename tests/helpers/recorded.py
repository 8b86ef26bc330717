"""A CUDA graph's stand-in on a CPU: operations of a captured step are recorded, and run again on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2")
"""Operations by which the host reads a number, or gives one: during a capture they are errors, as in CUDA."""


class Recorded(TorchDispatchMode):
    """Records operations. `replay` runs them again with the tensors that they took, into the tensors that they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        sized = name != "repeat_interleave" or kwargs.get("output_size") is not None
        mask = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in HOST or mask or not sized:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        found = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        """Run all operations again but those that only give views."""
        for func, args, kwargs, found in self.operations:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for old, new in zip(made(func, found), made(func, again), strict=True):
                old.copy_(new)

    @torch.no_grad()
    def forget(self) -> None:
        """Overwrite all that was computed: a GPU computes nothing while it captures."""
        for func, args, kwargs, found in self.operations:
            for one in (*made(func, found), *changed(func, args, kwargs)):
                one.data.fill_(float("nan") if one.is_floating_point() else 0)  # `data`: autograd must not see it


def made(func: Any, found: Any) -> Iterator[Tensor]:
    """The tensors among the results of an operation that it made memory for."""
    returns = func._schema.returns
    for each, value in zip(returns, (found,) if len(returns) == 1 else found or (), strict=True):
        if each.alias_info is None:
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    for at, each in enumerate(func._schema.arguments):
        if each.alias_info is not None and each.alias_info.is_write:
            yield from tree_leaves(args[at] if at < len(args) else kwargs[each.name])


@dataclass
class RecordedGraphs:
    """A `compt.engines.graphs.Recorder` for `RECORDERS`."""

    device: torch.device
    warm: int = 0
    captured: list[Recorded] = field(default_factory=list)

    def warm_up(self, part: Callable[[], None]) -> None:
        """Run `part`."""
        self.warm += 1
        part()

    def capture(self, part: Callable[[], None]) -> Callable[[], None]:
        """Record `part`."""
        recorded = Recorded()
        with recorded:
            part()
        recorded.forget()
        self.captured.append(recorded)
        return recorded.replay
