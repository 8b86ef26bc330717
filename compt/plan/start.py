"""A model from outside that a chain starts from, as its folder's manifest describes it. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compt.errors import ConfigError, nearest
from compt.files import read_json
from compt.models.presets import PRESETS, ModelSpec
from compt.recipe.read import Chain

MODEL_FORMAT = ("compt-model", 1)
"""What the manifest of a model folder calls itself, and its version."""
MANIFEST = "manifest.json"
AVERAGE = "ema"
"""The folder in it with the moving average of the weights, and what the manifest calls it."""
UNREAD = "unread"
"""Stands for the hash of weights that were not read."""


@dataclass(frozen=True)
class Start:
    """A model that the first link grows from: its sizes and the hash of its weights.

    `mean` and `std` are what its pictures were normalised with, red, green and blue, where that is known. `averaged`:
    whether there is a moving average of its weights; None where that is not known.
    """

    spec: ModelSpec
    hash: str
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    averaged: bool | None = False


def is_described(chain: Chain, base: Path) -> bool:
    """Whether the sizes of the model at `chain.from` are known without torch: compt wrote it, or the recipe says."""
    assert chain.from_ is not None
    return (base / chain.from_ / MANIFEST).exists() or chain.from_model in PRESETS


def planned_start(chain: Chain, base: Path) -> Start:
    """The model at `chain.from` as far as it is known without torch; one that compt did not write stays unread.

    Raises ConfigError for one whose sizes are not known.
    """
    assert chain.from_ is not None
    if chain.from_model is None or (base / chain.from_ / MANIFEST).exists():
        return read_start(base / chain.from_)
    if chain.from_model not in PRESETS:
        raise ConfigError(
            f"chain.from_model = '{chain.from_model}': is no preset{nearest(chain.from_model, PRESETS)}, "
            "and reading open_clip's models takes torch"
        )
    return Start(PRESETS[chain.from_model], UNREAD, averaged=None)


def read_start(folder: Path) -> Start:
    """What the manifest of a model folder says that compt wrote. Raises ConfigError where it is none."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if (manifest["format"], manifest["format_version"]) != MODEL_FORMAT:
            raise ValueError("it is of another format or version than this compt reads")
        spec, preprocess = ModelSpec.from_dict(manifest["spec"]), manifest["preprocess"]
        averaged = AVERAGE in manifest.get("extra", {})
        return Start(spec, str(manifest["hash"]), preprocess["mean"], preprocess["std"], averaged)
    except KeyError as error:
        cause = f"{error.args[0]} is missing in it; a run's model folders are RUN/jobs/NAME/model"
    except (OSError, ValueError, TypeError, ConfigError) as error:
        cause = getattr(error, "strerror", None) or str(error)
    other = "" if path.exists() else "; for a model that compt did not write, name which it is in chain.from_model"
    raise ConfigError(f"chain.from = '{folder}': cannot read {path} ({cause}){other}")
