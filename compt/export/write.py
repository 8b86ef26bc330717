"""`compt export`: one model in one format, with its card, in a folder that appears whole or not at all."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from compt.export.card import model_card
from compt.export.formats import FORMATS
from compt.files import new_folder, sha256_file, write_json, write_text
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

CARD = "README.md"


def export_model(source: Artefact, folder: Path, to: str = "open_clip", licence: str | None = None) -> list[str]:
    """Write `source` to `folder` in the format `to`; returns what a user has to know, as sentences in Markdown.

    Replaces an older export and an empty folder, but nothing else. `licence`: the Hub's name of the model's licence,
    for the card. Raises ConfigError for an unknown format or a missing package; ArtefactError for a folder in use
    (`check_free`), for weights that are not finite, and for a model that the format cannot describe.
    """
    kind = FORMATS[to]
    kind.check_packages(to)
    folder = Path(folder)
    check_free(folder, source.path)
    shapes = expected_shapes(source.state, source.spec)
    module, _, name = kind.writer.partition(":")
    writer: Callable[[Artefact, Path], list[str]] = getattr(importlib.import_module(module), name)
    with new_folder(folder) as temporary:
        for parameter in shapes:
            check_finite(source.state[parameter], f"{source.path}: nothing was exported: {parameter}")
        notes = writer(source, temporary)
        write_text(temporary / CARD, model_card(source, kind, notes, licence))
        _write_record(source, temporary, to)
    return notes


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
