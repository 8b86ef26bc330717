"""Scores of a model on evaluation sets: exact, shared out over the ranks, and tied to what they were measured on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from compt.data.batch import EvalBatch
from compt.data.index import expand_patterns, open_index
from compt.data.loaders import eval_loader
from compt.dist import collectives as dist
from compt.errors import ConfigError, DataError
from compt.evaluate.encoder import Encoder, Tokenize
from compt.evaluate.folder import FolderLoader, class_folders_of, read_class_folders
from compt.evaluate.retrieval import RetrievalResult, retrieval
from compt.evaluate.zeroshot import PLACEHOLDER, ZeroShotResult, classifier, zero_shot
from compt.files import hash_json
from compt.recipe.schema import EvalSet

Result = ZeroShotResult | RetrievalResult

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATES = ("a photo of {c}",)
"""For a set that brings no templates; their hash stands in the result like any others'."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate. Relative paths of a set start at `base`; `tokenize` defaults to open_clip's tokenizer."""

    mean: Sequence[float]
    std: Sequence[float]
    base: Path = Path()
    batch: int = 256
    workers: int = 0
    dtype: torch.dtype = torch.float32
    index_dir: Path | None = None
    tokenize: Tokenize | None = None


def _lines(path: Path, what: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{what} {path}: is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{what} {path}: line {number} is empty")
    return [line.strip() for line in lines]


def read_classnames(path: Path) -> list[str]:
    """One name a line, in the order of the labels. Raises DataError naming file and line."""
    return _lines(path, "class names")


def read_templates(path: Path) -> list[str]:
    """One template a line, each with {c} or {}. Raises DataError naming file, line and template."""
    templates = _lines(path, "templates")
    for number, template in enumerate(templates, 1):
        if not PLACEHOLDER.search(template):
            raise DataError(
                f"templates {path}: line {number} {template!r} has no place for the class name: write {{c}} or {{}}"
            )
    return templates


def _beside(places: Iterable[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


@dataclass(frozen=True)
class _OpenedSet:
    """A set that is ready to be read. places: folders in which class names and templates may lie."""

    loader: Iterable[EvalBatch]
    fingerprint: str
    places: tuple[Path, ...]
    classes: tuple[str, ...] | None = None


def _open(item: EvalSet, settings: EvalSettings, image_size: int = 1, *, together: bool = False) -> _OpenedSet:
    """`together`: all ranks call this, and those after the first wait for what it has to index."""
    shares: dict[str, Any] = {"rank": dist.rank(), "world_size": dist.world_size(), "workers": settings.workers}
    folder = class_folders_of(item.data, settings.base)
    if folder is not None:
        if item.task != "zeroshot":
            raise DataError(f"evaluation set '{item.name}': class folders {folder} have no captions to retrieve")
        data = read_class_folders(folder)
        loader = FolderLoader(data, image_size, settings.batch, **shares)
        return _OpenedSet(loader, data.fingerprint, (folder,), data.classes)
    if together:
        dist.on_main(lambda: open_index(item.data, settings.base, settings.index_dir) and None)
    index = open_index(item.data, settings.base, settings.index_dir)
    kind: dict[str, Any] = {"label": item.label} if item.task == "zeroshot" else {"captions": True}
    shards = eval_loader(index, image_size=image_size, batch=settings.batch, **kind, **shares)
    place = expand_patterns(item.data, settings.base)[0].parent
    return _OpenedSet(shards, index.fingerprint, (place, place.parent))


def _class_names(item: EvalSet, settings: EvalSettings, data: _OpenedSet) -> tuple[list[str], str]:
    """Names and, for messages, where they come from."""
    path = settings.base / item.classnames if item.classnames else _beside(data.places, CLASSNAMES)
    if path is not None:
        names = read_classnames(path)
        if data.classes is not None and len(names) != len(data.classes):
            raise DataError(f"class names {path}: {len(names)} for the {len(data.classes)} folders in {data.places[0]}")
        return names, str(path)
    if data.classes is not None:
        return [name.replace("_", " ") for name in data.classes], f"folder {data.places[0]}"
    looked = " nor in ".join(str(place) for place in data.places)
    raise DataError(f"evaluation set '{item.name}': there is no {CLASSNAMES} in {looked}; name one as `classnames`")


def _templates(item: EvalSet, settings: EvalSettings, data: _OpenedSet) -> list[str]:
    path = settings.base / item.templates if item.templates else _beside(data.places, TEMPLATES)
    if path is not None:
        return read_templates(path)
    _log.info("evaluation set '%s' has no templates: using %s", item.name, DEFAULT_TEMPLATES)
    return list(DEFAULT_TEMPLATES)


def _image_size(model: nn.Module) -> int:
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    return int(size[0] if isinstance(size, tuple | list) else size)


def evaluate_set(model: nn.Module, item: EvalSet, settings: EvalSettings) -> Result:
    """Score a CLIP model (ours or open_clip's own) on one set; all ranks call it and get the same result.

    Raises DataError, on every rank, for data, class names, templates or labels that cannot be used.
    """
    encoder = Encoder(model, settings.mean, settings.std, settings.dtype)
    context_length: Any = model.context_length
    tokenize: Tokenize = settings.tokenize or SimpleTokenizer(context_length=context_length)
    data = _open(item, settings, _image_size(model), together=True)
    pins = _pins(item, settings, data)
    result: Result
    if item.task == "retrieval":
        result = retrieval(encoder, data.loader, tokenize, name=item.name, pins=pins)
    else:
        names, source = _class_names(item, settings, data)
        templates = _templates(item, settings, data)
        weights = classifier(encoder, names, templates, tokenize, settings.batch)
        result = zero_shot(encoder, data.loader, weights, name=item.name, classes_from=source, pins=pins)
    if result.skipped:
        _log.warning("evaluation set '%s': %s not read: %s", item.name, result.skipped, "; ".join(result.examples))
    return result


def _pins(item: EvalSet, settings: EvalSettings, data: _OpenedSet) -> dict[str, str]:
    pins = {"data": data.fingerprint}
    if item.task == "zeroshot":
        pins["classnames"] = hash_json(_class_names(item, settings, data)[0])
        pins["templates"] = hash_json(_templates(item, settings, data))
        pins["label"] = item.label
    return pins


def set_pins(item: EvalSet, settings: EvalSettings) -> dict[str, str]:
    """Hashes of what scores on a set depend on beside the model, as they stand in results; images are not read.

    Any rank may call this alone. Shards that are new or changed are indexed first. Raises DataError.
    """
    return _pins(item, settings, _open(item, settings))


def class_names(item: EvalSet, settings: EvalSettings) -> list[str]:
    """The names of a zero-shot set's classes, by class number; any rank may call this alone. Raises DataError."""
    return _class_names(item, settings, _open(item, settings))[0]


def check_sets(sets: Iterable[EvalSet], settings: EvalSettings, contact_sheet: str | None = None) -> None:
    """Open every set and its class names and templates; all ranks call this.

    Raises DataError for the first that cannot be used, ConfigError where `contact_sheet` names a set without classes.
    """
    for item in sets:
        if item.name == contact_sheet and item.task != "zeroshot":
            raise ConfigError(
                f"evaluation.contact_sheet = '{item.name}' is a {item.task} set; pictures are shown with the class "
                "that a model says they are: name a zero-shot set"
            )
        data = _open(item, settings, together=True)
        if item.task == "zeroshot":
            _class_names(item, settings, data)
            _templates(item, settings, data)


def labelled(
    item: EvalSet, settings: EvalSettings, image_size: int
) -> tuple[Iterable[EvalBatch], list[str], list[str]]:
    """This rank's batches of a zero-shot set, the names of its classes, its templates. Raises DataError."""
    data = _open(item, settings, image_size)
    return data.loader, _class_names(item, settings, data)[0], _templates(item, settings, data)


def evaluate_sets(model: nn.Module, sets: Iterable[EvalSet], settings: EvalSettings) -> dict[str, Result]:
    """`evaluate_set` of each, by name."""
    return {item.name: evaluate_set(model, item, settings) for item in sets}
