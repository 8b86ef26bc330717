"""The weights in a checkpoint, whatever engine wrote it, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compt.engines.zero.state import open_average
from compt.errors import ArtefactError
from compt.weights.dcp import read_dcp
from compt.weights.deepspeed import read_zero
from compt.weights.lazy import Part, View, Weights

_MODEL, _AVERAGE = "model.", "ema."
_STUDENT = "model."
"""Where the module that is trained keeps the model: the rest of it, projectors, is for training only."""


def module_weights(folder: Path, format: str) -> Weights:
    """The values of a module's state by the module's own names. Raises ArtefactError for a torn or forged folder."""
    if format == "dcp":
        weights = read_dcp(folder).weights
        return _view(weights, {name.removeprefix(_MODEL): name for name in weights if name.startswith(_MODEL)})
    if format == "deepspeed":
        weights = read_zero(folder).weights
        return _view(weights, {name: name for name in weights})
    raise ArtefactError(f"{folder}: of format '{format}', which this compt does not know")


def _average(folder: Path, format: str) -> Weights:
    """As `module_weights`, the moving average where a parameter has one."""
    if format == "deepspeed":
        found = open_average(folder)
        return _view(found, {name: name for name in found})
    weights = read_dcp(folder).weights
    if f"{_AVERAGE}updates" not in weights:
        raise ArtefactError(f"{folder}: no moving average of the weights in it")
    own = {name.removeprefix(_MODEL): name for name in weights if name.startswith(_MODEL)}
    averages = {name: f"{_AVERAGE}{name}" for name in own}
    return _view(weights, own | {name: place for name, place in averages.items() if place in weights})


def open_weights(folder: Path, format: str, average: bool) -> Weights:
    """The model's weights, or their moving average, under open_clip's names. Raises ArtefactError."""
    weights = (_average if average else module_weights)(folder, format)
    names = {name.removeprefix(_STUDENT): name for name in weights if name.startswith(_STUDENT)}
    if not names:
        raise ArtefactError(f"{folder}: no model in it")
    return _view(weights, names)


def _view(weights: Any, names: Mapping[str, str]) -> View:
    """Weights under other names; logit_scale, which training keeps as [1], a scalar."""
    shapes = {name: () if name == "logit_scale" else tuple(weights.shape(source)) for name, source in names.items()}
    return View(weights, {name: Part((source,), shapes[name], "reshape") for name, source in names.items()})
