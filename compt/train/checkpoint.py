"""Checkpoints to resume from: folders that all ranks fill together. At any moment one of them is whole.

FOLDER/step-00001234/state.json   what the trainer keeps, the engine that wrote, and each file's size and hash
FOLDER/step-00001234/state/       what the engine wrote
FOLDER/latest                     names the newest folder, for people and other tools

A resume does not trust `latest`: `find_latest` looks at the folders themselves and checks them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from compt.dist import collectives as dist
from compt.engines.base import Engine
from compt.engines.zero.state import open_average
from compt.errors import ArtefactError
from compt.files import hash_json, new_folder, read_json, sha256_file, write_json, write_text
from compt.models.scalars import exported_shape
from compt.weights.artefact import Writers
from compt.weights.dcp import read_dcp
from compt.weights.deepspeed import read_zero
from compt.weights.lazy import TensorSource, View, Weights

RECORD = "state.json"
STATE = "state"
LATEST = "latest"

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.tmp-.*")
_FORMER = "tensors.safetensors"
_log = logging.getLogger(__name__)

_Files = dict[str, dict[str, Any]]
"""Name below the checkpoint's folder -> bytes and SHA-256."""
_MODEL, _AVERAGE = "model.", "ema."
"""Prefixes in a state: the model within the module that is trained (the rest is projectors), and the average."""


@dataclass
class _Pending:
    """A checkpoint whose files are still being written."""

    step: int
    temporary: Path
    record: dict[str, Any]
    undo: contextlib.ExitStack
    files: Future[_Files]


class Saver:
    """Writes checkpoints below `folder`, which all ranks see. All ranks make one, and call every method together.

    The newest `keep` stay, and those of steps that `keep_every` divides. `asynchronous`: a checkpoint is written while
    training goes on, one at a time. It takes its place when `poll`, `finish` or the next `save` finds it written; a
    process that is killed earlier leaves the previous one. If a checkpoint cannot be written, one of these methods
    raises RunError on all ranks, and the older checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int | None = None, asynchronous: bool = False) -> None:
        self.folder = Path(folder)
        self._keep, self._keep_every = keep, keep_every
        self._asynchronous = asynchronous
        self._pending: _Pending | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, engine: Engine, step: int, state: Mapping[str, Any]) -> None:
        """Write the engine's state and `state` (JSON) as they are now, then delete old checkpoints.

        Checkpoints of later steps are deleted too: this run went another way. Raises RunError.
        """
        self.finish()
        final = self.folder / name_of(step)
        writers = Writers(final, together=True)
        record = {
            "step": step,
            "engine": type(engine).__name__,
            "format": engine.format,
            "world_size": engine.world_size,
            "state": json.loads(json.dumps(dict(state))),
        }
        with contextlib.ExitStack() as undo:
            temporary = writers.main(lambda: self._begin(final, undo))
            writers.all(lambda: writers.check_seen(temporary / STATE))
            finish = writers.all(lambda: engine.save(temporary / STATE, asynchronous=self._asynchronous))
            files = self._threads.submit(lambda: _describe(temporary, finish()))
            self._pending = _Pending(step, temporary, record, undo.pop_all(), files)
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Put a checkpoint into its place if it is written by now. Raises RunError when it could not be written."""
        if self._pending is not None and not dist.any_true(not self._pending.files.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any. Raises RunError when it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        writers = Writers(pending.temporary, together=True)
        with pending.undo as undo:
            shares = writers.gather(writers.all(pending.files.result))
            files = {name: entry for share in shares for name, entry in sorted(share.items())}
            writers.main(lambda: self._publish(pending, files, undo))

    def _begin(self, final: Path, undo: contextlib.ExitStack) -> Path:
        _remove_leftovers(self.folder)
        temporary = undo.enter_context(new_folder(final))
        (temporary / STATE).mkdir()
        return temporary

    def _publish(self, pending: _Pending, files: _Files, undo: contextlib.ExitStack) -> None:
        record = {**pending.record, "files": files}
        write_json(pending.temporary / RECORD, {**record, "sha256": hash_json(record)})
        undo.close()
        write_text(self.folder / LATEST, name_of(pending.step) + "\n")
        _prune(self.folder, pending.step, self._keep, self._keep_every)


def name_of(step: int) -> str:
    """The name of the folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def find_latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`, hashes checked; None if there is none. Logs the ones it skips."""
    for _, path in sorted(_steps(folder), reverse=True):
        fault = _fault(path, hashes=True)
        if not fault:
            return path
        _log.warning("skipping checkpoint %s: %s", path, fault)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The `state` that the trainer gave to `save`. This checks the sizes of files, `find_latest` their contents.

    Raises ArtefactError naming the path and the fault when the checkpoint is torn.
    """
    state: dict[str, Any] = _read_record(path)["state"]
    return state


def format_of(path: Path) -> str:
    """The format (`Engine.format`) of a checkpoint that was read already."""
    return str(_read_record(path)["format"])


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Load a checkpoint into an engine that has made no step, and return what the trainer gave to `save`.

    All ranks call it; any number of ranks and any engine may have saved. An engine of another format takes only the
    weights, and logs that. Raises ArtefactError, on all ranks, when it is torn or of another model.
    """
    record = dist.on_all(lambda: _read_record(path))
    if record["format"] == engine.format:
        engine.load(path / STATE)
    else:
        if dist.is_main():
            _log.warning(
                "%s was written by another kind of engine (%s): its weights are taken over; the optimizer's moments "
                "and the moving average start from zero",
                path,
                record["engine"],
            )
        weights = dist.on_all(lambda: module_weights(path / STATE, record["format"]))
        engine.set_weights(weights)
    return dict(record["state"])


def open_weights(path: Path, average: bool = False) -> Weights:
    """The weights of the model in a checkpoint, or their moving average, under open_clip's names; projectors left out.

    Any process may call it alone, whatever engine wrote. A tensor is read when it is needed, and none is kept. Raises
    ArtefactError when the checkpoint is torn, or has no average.
    """
    folder, kind = path / STATE, _read_record(path)["format"]
    weights = (_average if average else module_weights)(folder, kind)
    names = _below(_MODEL, weights)
    if not names:
        raise ArtefactError(f"{folder}: no model in it")
    return _view(weights, names)


def _read_record(path: Path) -> dict[str, Any]:
    fault = _fault(path, hashes=False)
    if fault:
        raise ArtefactError(f"checkpoint {path}: {fault}")
    return dict(read_json(path / RECORD))


def _describe(folder: Path, files: list[Path]) -> _Files:
    """Size and hash of the files that this rank wrote below `folder`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [(int(match[1]), path) for match, path in found if match]


def _fault(path: Path, *, hashes: bool) -> str:
    """What is wrong with a checkpoint folder; an empty text if it is whole."""
    try:
        record = read_json(path / RECORD)
        if _FORMER in record["files"]:
            return f"of a former compt, in one {_FORMER}, which is not read any more"
        told = record.pop("sha256")
        if hash_json(record) != told:
            return f"{RECORD} was changed"
        for name, wanted in record["files"].items():
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                return f"{RECORD} names {name}, which is not inside the folder"
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes instead of {wanted['bytes']}"
            if hashes and sha256_file(path / name) != wanted["sha256"]:
                return f"{name} does not have its recorded hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{RECORD} is torn"
    return ""


def _prune(folder: Path, step: int, keep: int, keep_every: int | None) -> None:
    steps = sorted(((number, path) for number, path in _steps(folder)), reverse=True)
    gone_by = [(number, path) for number, path in steps if number <= step]
    kept = {path for _, path in gone_by[:keep]}
    kept |= {path for number, path in gone_by if keep_every and number % keep_every == 0}
    for _, path in steps:
        if path not in kept:
            # Renamed first, so that a process killed while it deletes leaves no torn checkpoint.
            rubbish = path.with_name(f".{path.name}.tmp-deleted")
            try:
                os.rename(path, rubbish)
            except OSError as error:
                _log.warning("cannot delete the old checkpoint %s: %s", path, error)
                continue
            shutil.rmtree(rubbish, ignore_errors=True)


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints and their folder. Behind a symbolic link only the checkpoints go, with the link."""
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
        return
    _remove_leftovers(folder)
    for path in [path for _, path in _steps(folder)]:
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / LATEST).unlink(missing_ok=True)
        target = folder.resolve()
        folder.unlink()
        target.rmdir()  # fails where other files are left


def _remove_leftovers(folder: Path) -> None:
    """Delete the temporary folders of a process that was killed."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def module_weights(folder: Path, format: str) -> Weights:
    """The values of a module's state under the module's own names. Raises ArtefactError for a torn or forged folder."""
    if format == "dcp":
        weights = read_dcp(folder).weights
        return _view(weights, _below(_MODEL, weights))
    if format == "deepspeed":
        weights = read_zero(folder).weights
        return _view(weights, {name: name for name in weights})
    raise ArtefactError(f"{folder}: of format '{format}', which this compt does not know")


def _average(folder: Path, format: str) -> Weights:
    """Like `module_weights`, with the moving average in place of each parameter that has one."""
    if format == "deepspeed":
        found = open_average(folder)
        return _view(found, {name: name for name in found})
    weights = read_dcp(folder).weights
    if f"{_AVERAGE}updates" not in weights:
        raise ArtefactError(f"{folder}: no moving average of the weights in it")
    own = _below(_MODEL, weights)
    return _view(weights, own | {name: at for name, at in _below(_AVERAGE, weights).items() if name in own})


def _below(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """The names that begin with `prefix`, by what follows it."""
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}


def _view(weights: Any, names: Mapping[str, str]) -> View:
    """Weights under other names; learned scalars, which training keeps as [1], in shape ()."""
    shapes = {name: exported_shape(name, weights.shape(source)) for name, source in names.items()}
    return View(weights, {name: TensorSource((source,), shapes[name], "reshape") for name, source in names.items()})
