"""A model from outside that a chain starts from, as its folder's manifest describes it. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compt.errors import ConfigError
from compt.files import read_json
from compt.presets import ModelSpec

MODEL_FORMAT = ("compt-model", 1)
"""What the manifest of a model folder calls itself, and its version."""


@dataclass(frozen=True)
class Start:
    """A model that the first link grows from: its sizes and the hash of its weights.

    `mean` and `std` are what its pictures were normalised with, red, green and blue, where that is known.
    """

    spec: ModelSpec
    hash: str
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def read_start(folder: Path) -> Start:
    """What the manifest of a model folder says that compt wrote. Raises ConfigError where it is none."""
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        if (manifest["format"], manifest["format_version"]) != MODEL_FORMAT:
            raise ValueError("it is of another format or version than this compt reads")
        spec, preprocess = ModelSpec.from_dict(manifest["spec"]), manifest["preprocess"]
        return Start(spec, str(manifest["hash"]), preprocess["mean"], preprocess["std"])
    except KeyError as error:
        cause = f"{error.args[0]} is missing in it; a run's model folders are RUN/jobs/NAME/model"
    except (OSError, ValueError, TypeError, ConfigError) as error:
        cause = getattr(error, "strerror", None) or str(error)
    raise ConfigError(f"chain.from = '{folder}': cannot read {path} ({cause})")
