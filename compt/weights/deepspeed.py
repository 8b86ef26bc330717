"""DeepSpeed's checkpoint folders, ZeRO stages 0 to 3, read without DeepSpeed: the fp32 weights of its optimizer.

`*_model_states.pt` names the parameters and their shapes, group by group. Stages 1 and 2 lay the parameters of a group
end to end in one vector, which is cut into equal parts, one for each rank. Stage 3 cuts each parameter into equal parts
and lays a rank's parts end to end. The parts are in `*_optim_states.pt`. Frozen parameters have no place in an
optimizer: the file with the names holds them, whole or cut in the same way.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compt.errors import ArtefactError
from compt.weights.lazy import FLOATS, FoundWeights, Weights, inside
from compt.weights.pickles import load_torch_file, tensors_in

LATEST = "latest"

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_OTHERS = re.compile(r"layer_.*_states\.pt|.*expert_.*_states\.pt|expp_rank_.*_states\.pt")


class Pieces(NamedTuple):
    """The shape of a parameter, and the vectors that hold its elements, in order."""

    shape: tuple[int, ...]
    vectors: Sequence[Tensor]

    @classmethod
    def whole(cls, tensor: Tensor) -> Pieces:
        """A parameter that is in one piece."""
        return cls(tuple(tensor.shape), [tensor])


class ZeroWeights(Weights):
    """Parameters as pieces of vectors."""

    def __init__(self, pieces: Mapping[str, Pieces]) -> None:
        self._parts: dict[str, Pieces] = dict(pieces)

    def __getitem__(self, name: str) -> Tensor:
        shape, pieces = self._parts[name]
        whole = torch.cat([piece.reshape(-1) for piece in pieces])[: math.prod(shape)].reshape(shape)
        # Frozen parameters are stored in the dtype of training.
        return whole.float() if whole.dtype in (torch.bfloat16, torch.float16) else whole

    def dtype(self, name: str) -> torch.dtype:
        """The type of a parameter's elements in the file; of several pieces the first type that is no float."""
        found = [piece.dtype for piece in self._parts[name].vectors]
        return next((dtype for dtype in found if dtype not in FLOATS), found[0] if found else torch.float32)


class ZeroState(NamedTuple):
    """All that training needs to resume. There are no moments before the first step."""

    weights: ZeroWeights
    moments: dict[str, ZeroWeights]
    steps: float
    noted: dict[str, Any]
    """What the engine saved beside DeepSpeed's own state, under the key that the reader names."""


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by torch's names."""


def is_zero_folder(folder: Path) -> bool:
    """Whether DeepSpeed wrote `folder`, or a folder that the file `latest` in it names."""
    return any(_MODEL.fullmatch(path.name) for path in folder.iterdir()) or (
        (folder / LATEST).is_file() and (tag := _tag_folder(folder)).is_dir() and is_zero_folder(tag)
    )


def read_zero(folder: Path) -> FoundWeights:
    """The weights of a checkpoint folder or of one tag in it: fp32 where the file has them. Raises ArtefactError."""
    opened = _open(folder)
    with _laid_out(opened.folder):
        return FoundWeights(_weights(opened), opened.files)


def read_zero_state(folder: Path, note: str) -> ZeroState:
    """As `read_zero`, with AdamW's state of each trained parameter. Raises ArtefactError.

    In a checkpoint without ZeRO, `names` in the note has the order of the optimizer's parameters.
    """
    opened = _open(folder)
    with _laid_out(opened.folder):
        weights = _weights(opened)
        noted = dict(opened.states[0].get(note) or {})
        if opened.optimizers:
            three = "fp32_flat_groups" in opened.optimizers[0]
            base = "optimizer_state_dict" if three else "base_optimizer_state"
            held = [optimizer[base]["state"] for optimizer in opened.optimizers]
        else:
            held = [opened.states[0]["optimizer"]["state"]]
        steps = {float(entry["step"]) for rank in held for entry in rank.values()}
        if len(steps) > 1:
            raise ArtefactError(f"{opened.folder}: its vectors are of different steps: {sorted(steps)}")
        moments = {}
        for moment in MOMENTS if steps else ():
            if opened.optimizers:
                found = _cut(opened, [[rank[number][moment] for number in sorted(rank)] for rank in held])
            else:
                found = {name: Pieces.whole(held[0][at][moment]) for at, name in enumerate(noted["names"])}
            moments[moment] = ZeroWeights(found)
        return ZeroState(weights, moments, steps.pop() if steps else 0.0, noted)


class _OpenedFile(NamedTuple):
    """The files of a folder in the order of ranks, and their contents; without ZeRO there are no optimizers."""

    folder: Path
    files: list[Path]
    states: list[Any]
    optimizers: list[Any]


def _open(folder: Path) -> _OpenedFile:
    if not any(_MODEL.fullmatch(path.name) for path in folder.iterdir()):
        folder = _tag_folder(folder)
    _refuse_parallel(folder)
    models, optims = _by_rank(folder, _MODEL), _by_rank(folder, _OPTIM)
    states = [load_torch_file(path) for path in models]
    with _laid_out(folder):
        stage = int(states[0].get("ds_config", {}).get("zero_optimization", {}).get("stage", 0))
        if not optims and stage:
            raise ArtefactError(f"{folder}: the *_optim_states.pt files, which hold the weights in fp32, are missing")
        optimizers = [load_torch_file(path)["optimizer_state_dict"] for path in optims]
        return _OpenedFile(folder, [*models, *optims], states, optimizers)


@contextlib.contextmanager
def _laid_out(folder: Path) -> Iterator[None]:
    """Turn errors of files that DeepSpeed did not write into an ArtefactError that names the folder."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ArtefactError(
            f"{folder}: not laid out as a checkpoint of DeepSpeed ({type(error).__name__}: {error})"
        ) from error


def _weights(opened: _OpenedFile) -> ZeroWeights:
    if opened.optimizers:
        return ZeroWeights(_assemble(opened))
    return ZeroWeights({name: Pieces.whole(tensor) for name, tensor in tensors_in(opened.states[0]["module"])})


def _tag_folder(folder: Path) -> Path:
    try:
        tag = inside(folder, LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{folder / LATEST}: cannot be read ({error})") from error
    if Path(tag).name != tag or tag in ("", ".", "..") or "\0" in tag:
        raise ArtefactError(f"{folder / LATEST}: {tag!r} is not the name of a folder")
    found = folder / tag
    if found.resolve().parent != folder.resolve():
        raise ArtefactError(f"{found}: a link out of its folder; it is not followed")
    if not found.is_dir():
        raise ArtefactError(f"{found}: missing, though {LATEST} names it")
    return found


def _refuse_parallel(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        match = _MODEL.fullmatch(path.name) or _OPTIM.fullmatch(path.name)
        if _OTHERS.fullmatch(path.name) or (match and int(match["mp"])):
            raise ArtefactError(f"{path}: of a model cut by tensor, pipeline or expert parallelism, which is not read")


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            rank = int(match["rank"] or 0)
            if rank in found:
                raise ArtefactError(f"{folder}: {found[rank].name} and {path.name} are of the same rank")
            found[rank] = inside(folder, path.name)
    if sorted(found) != list(range(len(found))):
        missing = min(set(range(len(found))) - set(found))
        raise ArtefactError(f"{folder}: files of {len(found)} ranks, and rank {missing} is not among them")
    return [found[rank] for rank in sorted(found)]


def _assemble(opened: _OpenedFile) -> dict[str, Pieces]:
    folder, states, optimizers = opened.folder, opened.states, opened.optimizers
    first, state = optimizers[0], states[0]
    # Where bfloat16 has an optimizer of its own (stage 1), the field that names the stage is missing.
    three, counts = "fp32_flat_groups" in first, first["partition_count"]
    world = max(counts) if isinstance(counts, list) else counts
    if world != len(optimizers) or (three and world != len(states)):
        raise ArtefactError(f"{folder}: files of {len(optimizers)} ranks of {world}; a checkpoint is read whole only")
    frozen = {name: tuple(shape) for name, shape in (state.get("frozen_param_shapes") or {}).items()}
    found: dict[str, Pieces] = {}
    for name, tensor in tensors_in(state["module"]):
        if name in state["buffer_names"]:
            found[name] = Pieces.whole(tensor)
    for name, shape in frozen.items():
        found[name] = Pieces(shape, [other["frozen_param_fragments"][name] for other in (states if three else [state])])
    found |= _cut(opened, [_masters(optimizer) for optimizer in optimizers])
    if not three:
        # Stage 1 does not list frozen parameters; the module's state has them, whole.
        found = {name: Pieces.whole(tensor) for name, tensor in tensors_in(state["module"])} | found
    for name, (shape, pieces) in found.items():
        if sum(piece.numel() for piece in pieces) < math.prod(shape):
            raise ArtefactError(f"{folder}: {name} has fewer elements than its shape {list(shape)}")
    for name, source in state["shared_params"].items():
        if source in found:
            found[name] = found[source]
    return found


def _masters(optimizer: Mapping[str, Any]) -> list[Tensor]:
    """The fp32 vectors that a rank's optimizer steps."""
    key = "fp32_flat_groups" if "fp32_flat_groups" in optimizer else "single_partition_of_fp32_groups"
    return [_vector(part) for part in optimizer[key]]


def _cut(opened: _OpenedFile, vectors: Sequence[Sequence[Any]]) -> dict[str, Pieces]:
    """The parameters in `vectors[rank]`, which are laid out like the masters and at least as long."""
    groups = [{name: tuple(shape) for name, shape in group.items()} for group in opened.states[0]["param_shapes"]]
    cut = []
    for optimizer, parts in zip(opened.optimizers, vectors, strict=True):
        masters = _masters(optimizer)
        # The moments of the last rank have padding at the end; its masters have none.
        cut.append([_vector(part)[: len(own)] for own, part in zip(masters, parts, strict=True)])
    first = opened.optimizers[0]
    if "fp32_flat_groups" in first:
        return _cut_each(opened.folder, groups, cut)
    return _cut_groups(opened.folder, groups, cut, first.get("param_alignment_paddings"))


def _vector(value: Any) -> Tensor:
    if type(value) is not Tensor or value.ndim != 1:
        raise TypeError("a part of the weights is not a vector")
    return value.detach()


def _span(vectors: Sequence[Tensor], start: int, count: int) -> list[Tensor]:
    """Elements `start` to `start + count` of the vectors laid end to end, as pieces of them."""
    pieces, at = [], 0
    for vector in vectors:
        low, high = max(start - at, 0), min(start + count - at, len(vector))
        if low < high:
            pieces.append(vector[low:high])
        at += len(vector)
    return pieces


def _cut_groups(
    folder: Path,
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    vectors: Sequence[Sequence[Tensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> dict[str, Pieces]:
    """Stages 1 and 2. `vectors[rank][group]`."""
    found = {}
    # DeepSpeed pads the vector of a group to a multiple of this, so that its parts are equal and aligned.
    unit = 2 * len(vectors)
    for number, group in enumerate(groups):
        parts = [rank[number] for rank in vectors]
        after = [0] * len(group) if paddings is None else paddings[number]
        at = 0
        for (name, shape), padding in zip(group.items(), after, strict=True):
            count = math.prod(shape)
            found[name] = Pieces(shape, _span(parts, at, count))
            at += count + padding
        held = sum(map(len, parts))
        if math.ceil(at / unit) != math.ceil(held / unit):
            raise ArtefactError(f"{folder}: group {number} of the parameters has {at} elements, its parts {held}")
    return found


def _cut_each(
    folder: Path, groups: Sequence[Mapping[str, tuple[int, ...]]], vectors: Sequence[Sequence[Tensor]]
) -> dict[str, Pieces]:
    """Stage 3. `vectors[rank]` has several pieces where the optimizer steps it in sub-groups."""
    found = {}
    at = 0
    for group in groups:
        for name, shape in group.items():
            share = math.ceil(math.prod(shape) / len(vectors))
            found[name] = Pieces(shape, [piece for rank in vectors for piece in _span(rank, at, share)])
            at += share
    for rank, parts in enumerate(vectors):
        held = sum(map(len, parts))
        if held != at:
            raise ArtefactError(f"{folder}: the parameters have {at} elements for rank {rank}, its file {held}")
    return found
