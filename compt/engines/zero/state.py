"""The state of a ZeRO engine on disk: DeepSpeed's own files, and the moving average beside them.

DeepSpeed resumes on another number of ranks only after a script has rewritten its files (universal checkpoints), and
reads them with a plain unpickler. `compt.weights.deepspeed` reads them instead, one whole tensor at a time. So any
number of ranks can resume, with any stage.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compt.dist import collectives as dist
from compt.engines.average import Average
from compt.engines.state_dcp import OTHER
from compt.engines.zero.parts import Parts
from compt.errors import ArtefactError, ComptError, RunError
from compt.files import disk_errors, write_bytes
from compt.models.states import check_shapes
from compt.weights.deepspeed import LATEST, MOMENTS, ZeroState, read_zero, read_zero_state
from compt.weights.lazy import Weights
from compt.weights.pickles import load_torch_file
from compt.weights.safetensors import TensorFile, write_tensors

NOTE = "compt"
"""The key of what is saved beside DeepSpeed's own state."""

_TAG = "state"
_AVERAGE = re.compile(r"average-(\d{5})-of-(\d{5})\.safetensors")
_UPDATES = "updates"


class ZeroWriter:
    """Writes and reads files for DeepSpeed: flushes each, and keeps an error until all ranks can learn of it."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.error: ComptError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        try:
            with disk_errors(Path(path)):
                Path(path).mkdir(parents=True, exist_ok=True)
        except RunError as error:
            self.error = error

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        """Write a file, unless an earlier one could not be written."""
        if self.error is not None:
            return
        try:
            with disk_errors(Path(path)), Path(path).open("wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
            self.files.append(Path(path))
        except RunError as error:
            self.error = error
        except RuntimeError as error:  # torch raises it when the disk is full
            self.error = RunError(f"cannot write {path}: {str(error).splitlines()[0]}")

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file of DeepSpeed's without running anything in it."""
        return load_torch_file(Path(path))


def save_zero(engine: Any, parts: Parts, average: Average | None, note: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write DeepSpeed's files, `note` in them and the average beside them; returns this rank's files.

    All ranks call it. Raises RunError on all of them where one could not write.
    """
    writer = ZeroWriter()
    module = importlib.import_module("deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine")
    engine.checkpoint_engine = module.TorchCheckpointEngine()
    vars(engine.checkpoint_engine).update(makedirs=writer.makedirs, save=writer.save, load=writer.load)
    # DeepSpeed would copy a script that merges the files. A checkpoint needs no program.
    engine._copy_recovery_script = lambda path: None
    engine.save_checkpoint(str(folder), tag=_TAG, client_state={NOTE: dict(note)}, save_latest=False)
    dist.agree(writer.error)

    def rest() -> None:
        if average is not None and (parts.stage or dist.is_main()):
            writer.files.append(_write_average(parts, average, folder))
        if dist.is_main():
            write_bytes(folder / LATEST, _TAG.encode())
            writer.files.append(folder / LATEST)

    dist.on_all(rest)
    return writer.files


def _write_average(parts: Parts, average: Average, folder: Path) -> Path:
    writers = dist.world_size() if parts.stage else 1
    path = folder / f"average-{dist.rank():05d}-of-{writers:05d}.safetensors"
    held = {name: part for name, part in parts.where.items() if part.count}
    vectors = {name: part.of(average.tensors[str(part.vector)]) for name, part in held.items()}
    shapes = {name: (part.count,) for name, part in held.items()}
    starts = json.dumps({name: part.start for name, part in held.items()})
    write_tensors(path, {**vectors, _UPDATES: average.updates}, {**shapes, _UPDATES: ()}, {"starts": starts})
    return path


class AverageState(Weights):
    """The moving average of a saved state, whole tensors read one at a time; the rest of the module's state with it."""

    def __init__(self, folder: Path) -> None:
        """Raises ArtefactError where there is none, or not all of it."""
        rest = read_zero(folder).weights
        self._rest = self._parts = rest
        files = _average_files(folder)
        self._pieces: dict[str, list[tuple[int, TensorFile]]] = {}
        for file in files:
            for name, start in _starts(file).items():
                self._pieces.setdefault(name, []).append((start, file))
        if not files:
            raise ArtefactError(f"{folder}: no moving average was saved here")
        self.updates = int(files[0].read(_UPDATES).item())
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            if name not in rest:
                raise ArtefactError(f"{folder}: an average of {name}, which is not among its weights")
            self._check(folder, name, pieces)

    def _check(self, folder: Path, name: str, pieces: Sequence[tuple[int, TensorFile]]) -> None:
        at = 0
        for start, file in pieces:
            if start != at:
                raise ArtefactError(f"{file.path}: {name} begins at element {start}; {at} were found before it")
            at += math.prod(file.shape(name))
        if at != math.prod(self._rest.shape(name)):
            raise ArtefactError(f"{folder}: the average of {name}, {at} elements, is not that of its weights")

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces.get(name)
        if pieces is None:
            return self._rest[name]
        return torch.cat([file.read(name) for _, file in pieces]).reshape(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._rest.shape(name)

    def dtype(self, name: str) -> torch.dtype | str:
        """The type of a tensor's elements, without reading it."""
        return torch.float32 if name in self._pieces else self._rest.dtype(name)


def open_average(folder: Path) -> AverageState:
    """The moving average in what a ZeRO engine saved, by any one process alone. Raises ArtefactError without one."""
    return AverageState(Path(folder))


def _average_files(folder: Path) -> list[TensorFile]:
    found = {path: match for path in folder.iterdir() if (match := _AVERAGE.fullmatch(path.name))}
    numbers = sorted((int(match[2]), int(match[1])) for match in found.values())
    if numbers != [(len(numbers), number) for number in range(len(numbers))]:
        raise ArtefactError(f"{folder}: the files of the moving average are not all there: {sorted(map(str, found))}")
    return [TensorFile(path) for path in sorted(found)]


def _starts(file: TensorFile) -> dict[str, int]:
    try:
        starts = json.loads(file.metadata["starts"])
        if set(starts) | {_UPDATES} != set(file) or not all(type(start) is int for start in starts.values()):
            raise ValueError("names or numbers differ")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{file.path}: not a part of a moving average ({error})") from error
    return dict(starts)


def open_zero(folder: Path, parts: Parts, own: Mapping[str, Sequence[int]], average: bool) -> tuple[ZeroState, Any]:
    """The state in `folder` and the average in it, if wanted, checked against the names and shapes in `own`.

    Raises ArtefactError where they do not fit.
    """
    state = read_zero_state(folder, NOTE)
    problems = []
    for moment, values in state.moments.items():
        problems += [f"{moment} of {name} is missing" for name in sorted(set(parts.where) - set(values))]
        problems += [f"{moment} of {name} is unexpected" for name in values if name not in parts.where]
    if average is not bool(_average_files(folder)):
        problems.append(f"the moving average is {'missing' if average else 'unexpected'}")
    check_shapes(own, state.weights, f"{folder}: {OTHER}", more=problems)
    return state, open_average(folder) if average else None


def take_moments(parts: Parts, optimizer: torch.optim.Optimizer, state: ZeroState) -> None:
    """Set what the optimizer holds of AdamW's moments. Without any, they start from zero."""
    for vector, master in enumerate(parts.masters):
        optimizer.state.pop(master, None)
        if not state.moments:
            continue
        step = torch.tensor(state.steps, dtype=torch.float32, device=master.device)
        zeros = {moment: torch.zeros_like(parts.weight(vector)) for moment in MOMENTS}
        optimizer.state[master] = {"step": step, **zeros}
    for moment, values in state.moments.items():
        held = [optimizer.state[master][moment] for master in parts.masters]
        for name in parts.where:
            parts.take(name, values[name], held.__getitem__)
