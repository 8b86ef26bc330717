"""Resume checkpoints: folders of one safetensors file and one JSON file, of which a whole one is always there.

FOLDER/step-00001234/{tensors.safetensors, state.json} and FOLDER/latest, a text file that names the newest folder for
people and other tools. A resume does not trust it: `find_latest` looks at the folders themselves and checks them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compt.errors import ArtefactError, RunError
from compt.files import hash_json, new_folder, read_json, sha256_file, write_json, write_text

TENSORS = "tensors.safetensors"
STATE = "state.json"
LATEST = "latest"

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.tmp-.*")
_log = logging.getLogger(__name__)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`; returns its folder.

    `state` is plain JSON. Checkpoints of later steps are deleted too: this training went another way. Raises
    RunError when it cannot be written; the previous checkpoint is then still there.
    """
    final = folder / f"step-{step:08d}"
    _remove_leftovers(folder)
    with new_folder(final) as temporary:
        file = temporary / TENSORS
        try:
            save_file(_separate(tensors), file)
        except SafetensorError as error:
            # Rust's message ends in "... No space left on device (os error 28)".
            raise RunError(f"cannot write {final}: {str(error).splitlines()[0]}") from error
        files = {TENSORS: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}}
        plain = json.loads(json.dumps(dict(state)))
        write_json(temporary / STATE, {"step": step, "files": files, "state_sha256": hash_json(plain), "state": plain})
    write_text(folder / LATEST, final.name + "\n")
    _prune(folder, step, keep)
    return final


def find_latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`, hashes checked; None without one. Logs those it passes over."""
    for _, path in sorted(_steps(folder), reverse=True):
        fault = _fault(path, hashes=True)
        if not fault:
            return path
        _log.warning("passing over checkpoint %s: %s", path, fault)
    return None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of one checkpoint folder. Sizes are checked here, contents by `find_latest`.

    Raises ArtefactError naming the path and the fault when it is torn.
    """
    fault = _fault(path, hashes=False)
    if fault:
        raise ArtefactError(f"checkpoint {path}: {fault}")
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"checkpoint {path}: {TENSORS} cannot be read: {error}") from error
    return tensors, read_json(path / STATE)["state"]


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors demands."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensor = tensor.clone()
        seen.add(storage)
        result[name] = tensor
    return result


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [(int(match[1]), path) for match, path in found if match]


def _fault(path: Path, *, hashes: bool) -> str:
    """What is wrong with a checkpoint folder; empty when it is whole."""
    try:
        record = read_json(path / STATE)
        if hash_json(record["state"]) != record["state_sha256"]:
            return f"{STATE} was changed"
        for name, wanted in record["files"].items():
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes instead of {wanted['bytes']}"
            if hashes and sha256_file(path / name) != wanted["sha256"]:
                return f"{name} does not have its recorded hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} is torn"
    return ""


def _prune(folder: Path, step: int, keep: int) -> None:
    steps = sorted(_steps(folder), reverse=True)
    kept = [path for number, path in steps if number <= step][:keep]
    for _, path in steps:
        if path not in kept:
            # Renamed first: a process killed in the middle leaves rubbish, not a torn checkpoint.
            rubbish = path.with_name(f".{path.name}.tmp-deleted")
            try:
                os.rename(path, rubbish)
            except OSError as error:
                _log.warning("cannot delete the old checkpoint %s: %s", path, error)
                continue
            shutil.rmtree(rubbish, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Delete the temporary folders of a process that was killed."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
