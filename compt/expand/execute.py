"""Carrying out an expansion plan, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from compt.errors import ArtefactError
from compt.expand.operators import AxisMap
from compt.expand.plan import Entry, Plan
from compt.models.init import init_tensor, rule_for

Read = Callable[[str], Tensor]
"""Teacher parameter name -> its tensor."""

Own = Callable[[str, tuple[int, ...]], Tensor]
"""Student parameter name and shape -> the initialization the student would have from scratch."""


def expand_parameter(entry: Entry, read: Read, own: Own) -> Tensor:
    """One student parameter, a new tensor of `entry.shape` in the teacher's dtype (float32 without a source).

    `own` is called only where the plan keeps some of the student's own initialization. Raises ArtefactError when the
    teacher's tensor has not the planned shape.
    """
    if entry.action == "zero":
        return torch.zeros(entry.shape)
    if entry.action == "own":
        return own(entry.name, entry.shape).reshape(entry.shape).to(torch.float32, copy=True)
    source = _planned(read(entry.sources[0]), entry)
    block = source
    for dim, axis in enumerate(entry.maps):
        block = _gather(block, dim, axis)
    if not entry.new:
        return block.clone() if block is source else block
    result = own(entry.name, entry.shape).to(source.dtype, copy=True)
    known = tuple(torch.from_numpy(axis.known) for axis in entry.maps)
    result[torch.meshgrid(*known, indexing="ij")] = block
    return result


class ExpandedState(Mapping[str, Tensor]):
    """The student's parameters in the plan's order, each computed when it is asked for and kept by nobody.

    Raises ArtefactError, at the parameter, when the teacher does not fit the plan.
    """

    def __init__(self, plan: Plan, teacher_state: Mapping[str, Tensor], own: Own) -> None:
        self._entries = {entry.name: entry for entry in plan.entries}
        self._teacher, self._teacher_state = plan.teacher.name, teacher_state
        self._own = own

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        with torch.no_grad():
            return expand_parameter(entry, self._read, self._own)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self, name: str) -> Tensor:
        if name not in self._teacher_state:
            raise ArtefactError(f"the weights of {self._teacher} have no parameter {name}")
        return self._teacher_state[name]


def expand_state(plan: Plan, teacher_state: Mapping[str, Tensor], own: Own) -> dict[str, Tensor]:
    """All student parameters in memory. Raises ArtefactError when the teacher does not fit the plan."""
    return dict(ExpandedState(plan, teacher_state, own))


def expand(plan: Plan, teacher_state: Mapping[str, Tensor], seed: int) -> ExpandedState:
    """The student whose new elements are those that it would have, initialized from scratch with `seed`."""

    def own(name: str, shape: tuple[int, ...]) -> Tensor:
        return init_tensor(rule_for(plan.student, name, shape), seed, name, shape)

    return ExpandedState(plan, teacher_state, own)


def _planned(tensor: Tensor, entry: Entry) -> Tensor:
    # Inside a model logit_scale has shape [1], in exported weights it is a scalar.
    if entry.source_shape == () and tensor.numel() == 1:
        tensor = tensor.reshape(())
    if tuple(tensor.shape) != entry.source_shape:
        raise ArtefactError(
            f"teacher parameter {entry.sources[0]} has shape {list(tensor.shape)}, planned {list(entry.source_shape)}"
        )
    return tensor.detach()


def _gather(tensor: Tensor, dim: int, axis: AxisMap) -> Tensor:
    """Take the known elements of one dimension, scaled; [.., source size, ..] -> [.., known, ..]."""
    if axis.identity:
        return tensor
    known = axis.known
    tensor = tensor.index_select(dim, torch.from_numpy(axis.index[known]))
    if axis.scale is None:
        return tensor
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return tensor * torch.from_numpy(axis.scale[known]).to(tensor.dtype).reshape(shape)
