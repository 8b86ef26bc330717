"""Opening the existing model that a chain starts from."""

from __future__ import annotations

from pathlib import Path

from compt.dist import collectives as dist
from compt.errors import ArtefactError, ConfigError
from compt.recipe.chain import ChainConfig
from compt.weights.artefact import Artefact
from compt.weights.infer import model_spec
from compt.weights.open import MODEL_OPTION, PREFIX_OPTION, open_model


def hash_of(model: Artefact) -> str:
    """The hash of a model that all ranks opened, computed by rank 0. All ranks call it. Raises ArtefactError."""
    return dist.from_main(lambda: model.hash)


def open_start(chain: ChainConfig, base: Path) -> Artefact:
    """The model at `chain.from`, relative to `base`.

    Raises ConfigError for a `chain.from_model` that is unknown, ArtefactError for a model that cannot be read.
    """
    assert chain.from_ is not None
    try:
        spec = None if chain.from_model is None else model_spec(chain.from_model)
    except ConfigError as error:
        raise ConfigError(f"chain.from_model: {error}") from None
    try:
        return open_model(base / chain.from_, spec, chain.from_prefix)
    except ArtefactError as error:
        # The message names options of the command line; in a recipe these are keys.
        text = str(error).replace(MODEL_OPTION, "chain.from_model").replace(PREFIX_OPTION, "chain.from_prefix")
        raise ArtefactError(text) from error
