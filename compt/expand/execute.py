"""Carry out an expansion plan, one parameter at a time.

Copies keep the teacher's dtype, bit for bit. Everything else is computed in float64, some rows at a time. Results do
not depend on the number of threads: sums are numpy's or are taken tap after tap, and linear algebra runs on one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from compt.errors import ArtefactError
from compt.expand.linalg import complete
from compt.expand.maps import MEAN, AxisMap, Floats, Indices
from compt.expand.plan import ExpandedParameter, ExpansionPlan
from compt.models.init import InitRule, init_tensor, rule_for
from compt.models.presets import ModelSpec
from compt.models.scalars import SCALAR_NAMES
from compt.models.states import State, check_finite

Read = Callable[[str, bool], Tensor]
"""(name of a teacher parameter, whether to read its moving average) -> its tensor."""

_OWN = ("zero", "own")
"""Actions that need no source."""

_CHUNK = 1 << 20
"""Elements that are computed at a time."""


class Draw:
    """Random numbers that depend on (seed, parameter name, element) only. Each call makes a new tensor."""

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed

    def own(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The float32 initialization of the parameter in `shape`."""
        return init_tensor(rule_for(self.spec, name, shape), self.seed, name, shape)

    def noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [-1, 1], float64, independent of `own`."""
        return init_tensor(InitRule("uniform"), self.seed, f"{name} (noise)", shape).double()


def expand_parameter(entry: ExpandedParameter, read: Read, draw: Draw) -> Tensor:
    """One student parameter: a new tensor of `entry.shape` in the teacher's dtype (float32 without a source).

    `draw` is called only if some of the student's own initialization stays or copies get noise. Raises ArtefactError if
    the teacher's tensor does not have the planned shape, or holds NaN or infinities.
    """
    if entry.action == "zero":
        return torch.zeros(entry.shape, dtype=torch.float32)
    if entry.action == "own":
        return draw.own(entry.name, entry.shape).reshape(entry.shape).to(torch.float32)
    source = _planned(read(entry.sources[0], entry.average), entry)
    if entry.roles:
        return _completed(entry, source, draw)
    if all(axis.plain for axis in entry.maps):
        return _copied(entry, source, draw)
    result = _ground(entry, source.dtype, draw)
    for where, values in _computed(entry, source, draw):
        _place(result, values, where)
    return result


class Mapped(State):
    """A state whose tensors go through `function`, which keeps their shape, when they are read, one at a time."""

    def __init__(self, state: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> None:
        self._parts, self._function = state, function

    def __getitem__(self, name: str) -> Tensor:
        return self._function(self._parts[name])


class ExpandedState(State):
    """The student's parameters in the plan's order. Each is computed when it is read, and not kept.

    A parameter has the dtype of its source. One without a source has the dtype of the first parameter that the plan
    takes from the teacher (float32 if there is none). Learned scalars do not count: they are float32 beside weights of
    any dtype.

    Raises ArtefactError: here if the plan needs a moving average and there is none, and when a parameter is read whose
    source does not fit the plan or is not finite.
    """

    def __init__(
        self, plan: ExpansionPlan, state: Mapping[str, Tensor], draw: Draw, average: Mapping[str, Tensor] | None = None
    ) -> None:
        if plan.needs_average and average is None:
            raise ArtefactError(
                f"the depth operator takes added layers from the moving average of {plan.teacher.name}, which has "
                "none; train the teacher with optimizer.ema, or choose another depth operator"
            )
        self._parts: dict[str, ExpandedParameter] = {entry.name: entry for entry in plan.entries}
        self._teacher, self._state, self._average = plan.teacher.name, state, average
        self._draw = draw

    def __getitem__(self, name: str) -> Tensor:
        entry = self._parts[name]
        with torch.no_grad():
            made = expand_parameter(entry, self._read, self._draw)
            return made.to(self._dtype) if entry.action in _OWN and name not in SCALAR_NAMES else made

    @cached_property
    def _dtype(self) -> torch.dtype:
        taken = (entry.sources[0] for entry in self._parts.values() if entry.action not in _OWN)
        first = next((name for name in taken if name not in SCALAR_NAMES), None)
        return torch.float32 if first is None else self._read(first, False).dtype

    def _read(self, name: str, average: bool) -> Tensor:
        state = self._average if average and self._average is not None else self._state
        if name not in state:
            what = "moving average" if average else "weights"
            raise ArtefactError(f"{self._teacher} has no parameter {name} among its {what}")
        return state[name]


def expand(
    plan: ExpansionPlan, state: Mapping[str, Tensor], seed: int, average: Mapping[str, Tensor] | None = None
) -> ExpandedState:
    """The student's parameters; new elements are those of a student from scratch with `seed`.

    `average` is the moving average of the teacher's weights, for plans that need it. Raises like `ExpandedState`.
    """
    return ExpandedState(plan, state, Draw(plan.student, seed), average)


def _planned(tensor: Tensor, entry: ExpandedParameter) -> Tensor:
    # A learned scalar has shape [1] inside a model, and () in files.
    if entry.source_shape == () and tensor.numel() == 1:
        tensor = tensor.reshape(())
    if tuple(tensor.shape) != entry.source_shape:
        raise ArtefactError(
            f"teacher parameter {entry.sources[0]} has shape {list(tensor.shape)}, but the plan has "
            f"{list(entry.source_shape)}"
        )
    tensor = tensor.detach()
    check_finite(tensor, f"teacher parameter {entry.sources[0]}{', moving average' if entry.average else ''}")
    return tensor


def _ground(entry: ExpandedParameter, dtype: torch.dtype, draw: Draw) -> Tensor:
    """The parameter before anything from the teacher is placed in it: own initialization and zeros."""
    if not entry.new:
        return torch.zeros(entry.shape, dtype=dtype) if entry.zeroed else torch.empty(entry.shape, dtype=dtype)
    result = draw.own(entry.name, entry.shape).to(dtype)
    for dim, axis in enumerate(entry.maps):
        if len(axis.zero):
            result.index_fill_(dim, torch.from_numpy(axis.zero), 0.0)
    return result


def _runs(positions: Indices) -> list[slice]:
    """Ascending positions as slices without gaps."""
    if not len(positions):
        return []
    ends = np.flatnonzero(np.diff(positions) != 1)
    first, last = positions[np.r_[0, ends + 1]], positions[np.r_[ends, len(positions) - 1]]
    return [slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True)]


def _place(result: Tensor, values: Tensor, where: tuple[list[slice], ...]) -> None:
    """Copy `values` to the product of the runs `where`, one list per dimension. Slices need no index tensors."""
    for runs in itertools.product(*([*_offsets(each)] for each in where)):
        result[tuple(to for to, _ in runs)] = values[tuple(of for _, of in runs)]


def _offsets(runs: list[slice]) -> Iterator[tuple[slice, slice]]:
    """Each run with its place when all runs are put one behind the other."""
    at = 0
    for run in runs:
        size = run.stop - run.start
        yield run, slice(at, at + size)
        at += size


def _copied(entry: ExpandedParameter, source: Tensor, draw: Draw) -> Tensor:
    block = source
    for dim, axis in enumerate(entry.maps):
        index = axis.index[axis.known, 0]
        if len(index) != axis.source_size or (index != np.arange(len(index))).any():
            block = block.index_select(dim, torch.from_numpy(index))
    if not entry.new and not entry.zeroed:
        return block.clone(memory_format=torch.contiguous_format) if block is source else block
    result = _ground(entry, source.dtype, draw)
    _place(result, block, tuple(_runs(axis.known) for axis in entry.maps))
    return result


def _computed(entry: ExpandedParameter, source: Tensor, draw: Draw) -> Iterator[tuple[tuple[list[slice], ...], Tensor]]:
    """The known elements in float64, some rows at a time, with their places."""
    maps = [_scaled(axis, draw) if axis.shared and axis.noise else axis for axis in entry.maps]
    rows, *others = maps
    factors = _Factors(entry, maps, draw)
    mean = _mean_of_rows(source) if rows.centre or (rows.index == MEAN).any() else None
    places = [_runs(axis.known) for axis in others]
    width = max(source[:1].numel(), int(np.prod(entry.shape[1:])), 1)
    step = max(1, _CHUNK // width)
    for run in _runs(rows.known):
        for start in range(run.start, run.stop, step):
            part = np.arange(start, min(start + step, run.stop))
            values = _take(source, 0, rows, part, mean)
            for dim, axis in enumerate(others, start=1):
                if not axis.identity:
                    values = _take(values, dim, axis, axis.known, _mean_along(values, dim, axis))
            yield ([slice(start, int(part[-1]) + 1)], *places), factors.apply(values, part)


def _take(block: Tensor, dim: int, axis: AxisMap, positions: Indices, mean: Tensor | None) -> Tensor:
    """The student's `positions` along one dimension in float64. Tap after tap, so that no sum is reordered."""
    index = axis.index[positions]
    shape = [1] * block.ndim
    shape[dim] = -1
    means = torch.from_numpy(index[:, 0] == MEAN)
    total = None
    for tap in range(index.shape[1]):
        part = block.index_select(dim, torch.from_numpy(np.maximum(index[:, tap], 0))).double()
        if mean is not None and bool(means.any()):
            part = torch.where(means.reshape(shape), mean, part)
        if axis.weight is not None:
            part = part * torch.from_numpy(axis.weight[positions, tap]).reshape(shape)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total - mean if axis.centre and mean is not None else total


def _mean_along(block: Tensor, dim: int, axis: AxisMap) -> Tensor | None:
    """float64 [.., 1, ..] if the map needs it, else None. numpy's sums do not depend on the number of threads."""
    if not axis.centre and not (axis.index == MEAN).any():
        return None
    total = np.add.reduce(block.contiguous().numpy(), axis=dim, keepdims=True)
    return torch.from_numpy(np.asarray(total / block.shape[dim]))


def _mean_of_rows(source: Tensor) -> Tensor:
    """The mean over the rows of a tensor: float64 [1, ..]."""
    step = max(1, _CHUNK // max(1, source[:1].numel()))
    total: Floats = np.zeros((1, *source.shape[1:]))
    for start in range(0, len(source), step):
        part = source[start : start + step].double().contiguous()
        total += np.add.reduce(part.numpy(), axis=0, keepdims=True)
    return torch.from_numpy(total / len(source))


def _centred(noise: Tensor, dim: int, axis: AxisMap) -> Tensor:
    """The noise of the known positions, minus its mean over the copies of each teacher element."""
    known = axis.index[axis.known, 0]
    values = noise.index_select(dim, torch.from_numpy(axis.known))
    counts = axis.copies()
    shape = list(values.shape)
    shape[dim] = axis.source_size
    sums = torch.zeros(shape, dtype=torch.float64)
    rank = _ranks(known)
    for copy in range(int(counts.max(initial=0))):
        of = np.flatnonzero(rank == copy)
        # The first copies of all elements, then the second ones, and so on: in one round no two go to the same sum,
        # so that threads cannot change the order of additions.
        sums.index_add_(dim, torch.from_numpy(known[of]), values.index_select(dim, torch.from_numpy(of)))
    shape = [1] * values.ndim
    shape[dim] = -1
    sums /= torch.from_numpy(np.maximum(counts, 1).astype(np.float64)).reshape(shape)
    return values - sums.index_select(dim, torch.from_numpy(known))


def _ranks(sources: Indices) -> Indices:
    """For each position, the number of earlier positions with the same source."""
    order = np.argsort(sources, kind="stable")
    ordered = sources[order]
    first = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty_like(sources)
    ranks[order] = np.arange(len(sources)) - first
    return ranks


def _scaled(axis: AxisMap, draw: Draw) -> AxisMap:
    """The map with its shared noise in the weights. Both towers draw the same noise, so that products stay."""
    size = len(axis.index)
    noise = _centred(draw.noise("emb", (size,)).double(), 0, axis).numpy()
    counts = axis.copies()[axis.index[:, 0]]
    # With three or more copies, subtracting the mean can take the noise out of [-1, 1]; the root needs it inside.
    inside = np.minimum(1.0, counts / np.maximum(2.0 * (counts - 1), 1.0))
    weight = np.ones((size, 1)) if axis.weight is None else axis.weight
    return replace(axis, weight=weight * np.sqrt(1 + axis.noise * inside * noise)[:, None], noise=0.0)


class _Factors:
    """Factors of the weights that read copies: copies learn apart, and their sum stays."""

    def __init__(self, entry: ExpandedParameter, maps: list[AxisMap], draw: Draw) -> None:
        self.maps = maps
        self.dim = next((dim for dim, axis in enumerate(maps) if axis.noise), None)
        if self.dim is None:
            return
        self.noise = draw.noise(entry.name, entry.shape).double()
        if self.dim == 0:
            self.noise = _centred(self.noise, 0, maps[0])

    def apply(self, values: Tensor, rows: Indices) -> Tensor:
        """`values` of the student's `rows`, times their factors."""
        if self.dim is None:
            return values
        if self.dim == 0:
            rows = np.searchsorted(self.maps[0].known, rows)
        noise = self.noise[int(rows[0]) : int(rows[-1]) + 1]
        for dim, axis in enumerate(self.maps):
            if dim and dim == self.dim:
                noise = _centred(noise, dim, axis)
            elif dim and len(axis.known) != len(axis.index):
                noise = noise.index_select(dim, torch.from_numpy(axis.known))
        return values * (1 + self.maps[self.dim].noise * noise)


def _completed(entry: ExpandedParameter, source: Tensor, draw: Draw) -> Tensor:
    """A matrix that grows by an orthonormal complement instead of the student's own initialization."""
    block = torch.cat([values for _, values in _computed(entry, source, draw)]).flatten(1)
    own = draw.own(entry.name, entry.shape).double().flatten(1)
    rows, *others = entry.maps
    inputs = others[0].known if len(others) == 1 else np.arange(own.shape[1])
    columns = torch.from_numpy(inputs)
    height, old_height = len(own) // entry.roles, len(block) // entry.roles
    known = torch.from_numpy(rows.known[:old_height])
    for role in range(entry.roles):
        old, new = slice(role * old_height, (role + 1) * old_height), slice(role * height, (role + 1) * height)
        own[new] = complete(block[old], own[new], known, columns)
    return own.reshape(entry.shape).to(source.dtype)
