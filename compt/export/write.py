"""`compt export`: one model in one format, with its card, in a folder that appears whole or not at all."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from compt.errors import ConfigError
from compt.expand.execute import expand
from compt.expand.plan import make_plan
from compt.export.card import model_card
from compt.export.formats import FORMATS
from compt.files import new_folder, sha256_file, write_json, write_text
from compt.models.presets import resized
from compt.models.states import check_finite
from compt.weights.artefact import (
    EXPORT_FORMAT,
    EXPORT_RECORD,
    FORMAT_VERSION,
    Artefact,
    check_free,
    expected_shapes,
    versions,
)
from compt.weights.lazy import Tensors

CARD = "README.md"


def export_model(
    source: Artefact,
    folder: Path,
    to: str = "open_clip",
    licence: str | None = None,
    image_size: int | None = None,
    repository: str | None = None,
) -> list[str]:
    """Write `source` to `folder` in the format `to`; returns what a user has to know, as sentences in Markdown.

    Replaces an older export and an empty folder, but nothing else. `licence`: the Hub's name of the model's licence,
    for the card. `image_size`: as in `for_images`. `repository`: on the Hub, from which the card loads the model.
    Raises ConfigError for an unknown format, a missing package or an impossible image size; ArtefactError for a folder
    in use (`check_free`), for weights that are not finite, and for a model that the format cannot describe.
    """
    kind = FORMATS[to].in_repository(repository) if repository else FORMATS[to]
    kind.check_packages(to)
    folder = Path(folder)
    check_free(folder, source.path)
    trained = source.spec.image_size
    if image_size is not None and image_size != trained:
        source = for_images(source, image_size)
    shapes = expected_shapes(source.state, source.spec)
    writer: Callable[[Artefact, Path], list[str]] = pkgutil.resolve_name(kind.writer)
    with new_folder(folder) as temporary:
        for parameter in shapes:
            check_finite(source.state[parameter], f"{source.path}: nothing was exported: {parameter}")
        notes = writer(source, temporary)
        if source.spec.image_size != trained:
            notes.append(
                f"The model was trained and scored with images of {trained} pixels. "
                f"Its position embeddings are resized for {source.spec.image_size} pixels."
            )
        write_text(temporary / CARD, model_card(source, kind, notes, licence, trained))
        _write_record(source, temporary, to)
    return notes


def for_images(source: Artefact, size: int) -> Artefact:
    """The model for square images of `size` pixels: an expansion that changes nothing but the number of patches.

    The grid of a ViT's position embeddings is resized with bicubic interpolation, and every other weight is kept. Reads
    all weights. Raises ConfigError for a size that the patches do not divide, and for fewer patches than the model has.
    """
    try:
        plan = make_plan(source.spec, resized(source.spec, {"image_size": size}))
    except ConfigError as error:
        raise ConfigError(f"--image-size {size}: {error}") from error
    return replace(source, spec=plan.student, state=Tensors(expand(plan, source.state, seed=0)))


def _write_record(source: Artefact, folder: Path, to: str) -> None:
    """What the format itself has no place for: the model, its scalars and images, and where it comes from."""
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())
    }
    spec = source.spec
    record = {
        "format": EXPORT_FORMAT,
        "format_version": FORMAT_VERSION,
        "to": to,
        "spec": spec.to_dict(),
        "preprocess": source.preprocess.to_dict(spec.image_size),
        "scalars": {one.name: float(source.state[one.name]) for one in spec.scalars},
        "versions": versions(),
        "source_hash": source.hash,
        "extra": {},
        "files": files,
    }
    write_json(folder / EXPORT_RECORD, record)
