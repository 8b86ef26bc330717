"""A training state on disk in the layout of torch.distributed.checkpoint, for the engines of format "dcp".

A state is a flat dict: name -> tensor, which is the same on every rank, or DTensor, of which each rank holds its
shards. Every rank writes its shards of DTensors, and a share of the other tensors. Any number of ranks can read it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor, distribute_tensor

from compt.dist import collectives as dist
from compt.engines.base import Finish
from compt.errors import ComptError
from compt.files import disk_errors
from compt.models.states import check_shapes, shapes_of
from compt.weights.dcp import METADATA, DcpWeights, read_dcp
from compt.weights.lazy import Weights
from compt.weights.safetensors import share_out

OTHER = "this state is of another model or engine"
_ARCHIVE = "inline_container.cc"
"""Part of torch's message when it could not write its archive."""

# Without a process group this is intended. A thread warns too, which no context manager could silence.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save_state(state: Mapping[str, Tensor], folder: Path, *, asynchronous: bool = False) -> Finish:
    """Write `state` into `folder`, which is empty and seen by all ranks; all ranks call it.

    The state of this moment is written, even if its tensors change later: with `asynchronous` each rank copies its part
    to the CPU's memory and returns, and a thread writes. Only one such save may run at a time. The returned function
    waits until all ranks have written. It, or this function, raises RunError on all ranks when a rank could not write,
    and Gone when a rank was lost. Any other fault is raised on its own rank, and DistError on the others.
    """
    writer = _DcpWriter(folder)
    own = _share(state)
    group = dist.group_beside()
    given: dict[str, Any] = {"storage_writer": writer, "process_group": group, "no_dist": group is None}
    if not asynchronous:
        _run(lambda: save(own, **given), folder)
        files = _files(folder)
        return lambda: files
    # The copies are on the CPU by then. torch would still ask CUDA for a stream; in a thread it takes the first GPU's.
    writer.per_thread_copy_ahead = 0
    options = StagingOptions(False, False, False, False)  # no CUDA, which may be missing; the copy is done on return
    with warnings.catch_warnings(action="ignore"):  # torch calls a function that it has deprecated itself
        pending = cast("Future[Metadata]", async_save(own, async_stager=DefaultStager(options), **given))

    def finish() -> list[Path]:
        _run(pending.result, folder)
        return _files(folder)

    return finish


def load_state(state: Mapping[str, Tensor], folder: Path) -> None:
    """Copy what is in `folder` into the tensors of `state`; each rank reads its shards of a DTensor.

    All ranks call it; another number of ranks may have saved. Raises ArtefactError on all of them, before anything is
    changed, when a name or a shape does not fit, or when the folder is torn or forged.
    """
    weights = dist.on_all(lambda: _open(state, folder))
    dist.on_all(lambda: weights.read_into(state))


@torch.no_grad()
def copy_weights(module: nn.Module, weights: Weights) -> None:
    """Copy the values of a module's state into it, read one tensor at a time; each rank keeps its shards of a DTensor.

    Any process may call it alone. Raises ArtefactError before anything is changed when a name or a shape does not fit.
    """
    own = module.state_dict()
    check_shapes(shapes_of(own), weights, OTHER)
    for name, each in own.items():
        if isinstance(each, DTensor):
            value = distribute_tensor(weights[name], each.device_mesh, each.placements, src_data_rank=None)
            each.to_local().copy_(value.to_local())
        else:
            each.copy_(weights[name])


class _DcpWriter(FileSystemWriter):
    """torch's writer, but it raises the disk's own OSError, which torch's archive hides behind a RuntimeError."""

    def write_data(self, *arguments: Any) -> Any:
        try:
            return super().write_data(*arguments)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # a GPU's or another process's
                raise
            for cause in _causes(error):
                if isinstance(cause, OSError):
                    raise cause from error
            if _ARCHIVE in str(error):
                raise OSError(str(error).splitlines()[0]) from error
            raise


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _open(state: Mapping[str, Tensor], folder: Path) -> DcpWeights:
    weights = read_dcp(folder).weights
    assert isinstance(weights, DcpWeights)
    check_shapes(shapes_of(state), weights, f"{folder}: {OTHER}")
    return weights


def _share(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this rank writes: its shards, and its part of the tensors that are the same on all ranks."""
    common = [name for name, tensor in state.items() if not isinstance(tensor, DTensor)]
    owners = share_out([state[name].numel() for name in common], dist.world_size())
    others = {name for name, owner in zip(common, owners, strict=True) if owner != dist.rank()}
    return {name: tensor.detach() for name, tensor in state.items() if name not in others}


def _files(folder: Path) -> list[Path]:
    """The files that this rank wrote."""
    own = sorted(folder.glob(f"__{dist.rank()}_*.distcp"))
    return [folder / METADATA, *own] if dist.is_main() else own


def _run(action: Callable[[], object], folder: Path) -> None:
    """Run `action`. A disk error of one rank becomes a RunError on all; a lost rank becomes Gone.

    Any other fault stays as it is on its own rank. The others raise DistError and not a ComptError: ranks agree about
    ComptErrors in a collective, and the rank with the fault would not take part in it.
    """
    with disk_errors(folder):
        try:
            with dist.together() if torch_dist.is_initialized() else contextlib.nullcontext():
                action()
        except CheckpointException as error:  # a BaseException with the faults of each rank, raised on all of them
            met = {rank: fault for rank, (fault, _) in error.failures.items()}
            said = next((fault for fault in met.values() if isinstance(fault, (OSError, ComptError))), None)
            fault = said or met.get(dist.rank())
            if fault is not None:
                raise fault from error
            rank, fault = next(iter(met.items()))
            # Without its message: `is_out_of_memory` reads that, and this rank has memory.
            text = f"rank {rank} could not write its share of a checkpoint: {type(fault).__name__}"
            raise torch_dist.DistError(text) from error
