"""Zero-shot classification as CLIP's authors do it: the classifier is made of class names in templates."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from compt.data.account import CAUSES, Account
from compt.data.batch import EvalBatch
from compt.data.folder import are_wnids, folder_names, read_names
from compt.data.labels import CLASSNAMES, TEMPLATES, are_numbered, beside, read_classnames, read_lines
from compt.dist import collectives as dist
from compt.errors import DataError
from compt.evaluate.encoder import Arrays, Encoder, Tokenize, by_id, over_batches
from compt.evaluate.stats import bootstrap, wilson
from compt.evaluate.task import EvalSettings, EvaluationTask, Result, ScoreRow, SetData, open_data
from compt.files import hash_json
from compt.recipe.schema import MAX_BAD_SHARE, EvalSet

_log = logging.getLogger(__name__)

PLACEHOLDER = re.compile(r"\{c?\}")
"""The place of the class name in a template: {c} as in clip_benchmark, or {}."""


def fill_template(template: str, classname: str) -> str:
    """The template with the class name in its place."""
    return PLACEHOLDER.sub(lambda _: classname, template)


def classifier(
    encoder: Encoder, classnames: Sequence[str], templates: Sequence[str], tokenize: Tokenize, batch: int = 256
) -> Tensor:
    """fp32 [D, classes] on the model's device: the normalized mean of the normalized features of each class's texts.

    The same as open_clip's `build_zero_shot_classifier`. The ranks share the classes; `batch` texts are encoded at a
    time.
    """
    own = range(dist.rank(), len(classnames), dist.world_size())
    texts = [fill_template(template, classnames[at]) for at in own for template in templates]
    with encoder.frozen():
        parts = range(0, len(texts), batch)
        features = [encoder.texts(tokenize(texts[start : start + batch])) for start in parts]
    width = int(dist.all_reduce_max(features[0].shape[1] if features else 0))
    stacked = torch.cat(features) if features else torch.zeros(0, width, device=encoder.device)
    means = functional.normalize(stacked.view(len(own), len(templates), width).mean(dim=1), dim=-1)
    every = dist.gather(means)
    place = torch.tensor([at for r in range(dist.world_size()) for at in range(r, len(classnames), dist.world_size())])
    return every[place.argsort().to(every.device)].T.contiguous()


@dataclass
class ZeroShotResult(Result):
    """Shares are in percent. top5 is None for five classes or fewer, where it would say nothing.

    labels, predictions, ranks, correct: one per sample. A prediction is -1 where the scores were not finite. ranks: how
    many classes score higher than the true one. per_class: None for a class without a sample. names: of the classes.
    """

    task: ClassVar[str] = "zeroshot"

    classes: int
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    ranks: NDArray[np.int64]
    names: Sequence[str] = field(default=(), kw_only=True)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is the label: bool [n]."""
        return np.equal(self.ranks, 0)

    @property
    def top1(self) -> float:
        """Percent of samples whose class has the highest score. Of equal scores the lower class number wins."""
        return 100 * float(self.correct.mean())

    @property
    def top5(self) -> float | None:
        """Percent of samples whose class is among the five highest."""
        return 100 * float((self.ranks < 5).mean()) if self.classes > 5 else None

    @property
    def chance(self) -> float:
        """Percent that random guesses reach."""
        return 100 / self.classes

    @property
    def per_class(self) -> list[float | None]:
        """Percent correct of each class, by class number."""
        counts = np.bincount(self.labels, minlength=self.classes)
        hits = np.bincount(self.labels, weights=self.correct, minlength=self.classes)
        return [100 * float(hit / n) if n else None for hit, n in zip(hits, counts, strict=True)]

    @cached_property
    def mean_per_class_interval(self) -> tuple[float, float]:
        """95 % interval of mean_per_class: a bootstrap over images. A class without a drawn image does not count."""
        kinds = np.bincount(self.labels + self.classes * self.correct, minlength=2 * self.classes)

        def mean(drawn: NDArray[np.int64]) -> float:
            wrong, right = drawn.reshape(2, -1)
            present = wrong + right > 0
            return 100 * float((right[present] / (wrong + right)[present]).mean())

        return bootstrap(mean, kinds)

    def headline(self) -> dict[str, float]:
        """top1, and top5 where there is one."""
        return {"top1": self.top1} | ({"top5": self.top5} if self.top5 is not None else {})

    def details(self) -> dict[str, Any]:
        """Scores, their intervals, the level of chance, and the accuracy of each class."""
        present = [share for share in self.per_class if share is not None]
        return {
            "classes": self.classes,
            **self.headline(),
            "top1_interval": list(wilson(int(self.correct.sum()), self.n)),
            **({"top5_interval": list(wilson(int((self.ranks < 5).sum()), self.n))} if self.top5 is not None else {}),
            "mean_per_class": sum(present) / len(present),
            "mean_per_class_interval": list(self.mean_per_class_interval),
            "chance": self.chance,
            "per_class": self.per_class,
            **({"classnames": list(self.names)} if self.names else {}),
        }

    def arrays(self) -> Arrays:
        """ids, labels, predictions, ranks (0: correct), correct."""
        names = ("ids", "labels", "predictions", "ranks", "correct")
        return {name: getattr(self, name) for name in names}


def true_ranks(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, C], labels int64 [B] -> (number of classes before the true one, the first class), each int64 [B].

    Of equal scores the lower class number comes first, on any device. Where a score is not finite, all other classes
    come before the true one and the first class is -1: a broken model is never right.
    """
    classes = torch.arange(scores.shape[1], device=scores.device)
    true = scores.gather(1, labels[:, None])
    before = (scores > true) | ((scores == true) & (classes < labels[:, None]))
    best = scores == scores.amax(dim=1, keepdim=True)
    first = torch.where(best, classes, scores.shape[1]).amin(dim=1)
    broken = ~scores.isfinite().all(dim=1)
    return before.sum(dim=1).masked_fill(broken, max(1, scores.shape[1] - 1)), first.masked_fill(broken, -1)


def zero_shot(
    encoder: Encoder,
    loader: Iterable[EvalBatch],
    weights: Tensor,
    *,
    name: str = "zeroshot",
    classes_from: str = "the class names",
    max_bad_share: float = MAX_BAD_SHARE,
) -> ZeroShotResult:
    """Score this rank's batches with `weights` [D, classes] and collect the answers of all ranks.

    Raises DataError, on every rank, for a batch without labels, for a set without a readable sample, where labels count
    from 1, and where more than `max_bad_share` of the samples have no usable label. `classes_from` names the source of
    the class names.
    """
    classes = weights.shape[1]
    parts = [torch.zeros(0, 4, dtype=torch.int64)]

    def score(batch: EvalBatch) -> None:
        if batch.labels is None:
            raise DataError(f"evaluation set '{name}': {batch.keys[0]} has no label")
        labels = batch.labels.to(weights.device)
        features = encoder.images(batch.images)
        # In half precision, classes with nearly the same score would tie.
        with torch.autocast(weights.device.type, enabled=False):
            rank, first = true_ranks(features @ weights, labels)
        parts.append(torch.stack([torch.tensor(batch.ids), batch.labels.cpu(), first.cpu(), rank.cpu()], dim=1))

    with encoder.frozen():
        losses = over_batches(loader, score)
    rows = by_id(torch.cat(parts))
    skipped, examples = losses.over_ranks()
    check_labels(name, rows[:, 1], skipped, examples, classes, classes_from, max_bad_share)
    if not len(rows):
        raise DataError(f"evaluation set '{name}': no sample can be read{': ' + examples[0] if examples else ''}")
    ids, labels, predictions, ranks = rows.T.copy()
    return ZeroShotResult(name, ids, classes, labels, predictions, ranks, skipped=skipped, examples=examples)


def check_labels(
    name: str,
    labels: NDArray[np.int64] | None,
    skipped: Mapping[str, int],
    examples: Sequence[str],
    classes: int,
    classes_from: str,
    max_bad_share: float,
    n: int = 0,
) -> None:
    """Raise DataError where labels count from 1, or where more than `max_bad_share` of the samples have no usable one.

    labels: of the usable samples; None where the `n` usable samples may have several. `skipped` and
    `examples`: the others.
    """
    without = {cause: count for cause, count in skipped.items() if CAUSES[cause].unit == "label"}
    used = sum(skipped.values()) - sum(without.values()) + (n if labels is None else len(labels))
    lost = sum(without.values())
    if without.get("label_range") and labels is not None and 0 not in labels:
        raise DataError(
            f"evaluation set '{name}': no sample has the class number 0, and {without['label_range']:,} have numbers "
            f"beyond the {classes} classes of {classes_from}: count class numbers from 0, not from 1"
        )
    if lost > max_bad_share * (used + lost):
        raise DataError(
            f"evaluation set '{name}': {lost:,} of {used + lost:,} samples have no usable label for the {classes} "
            f"classes of {classes_from}, more than data.max_bad_share {max_bad_share:g} allows: "
            f"{Account(unused=Counter(without)).line()}; such as {examples[0]}"
        )


DEFAULT_TEMPLATES = ("a photo of {c}",)
"""For a set without templates; like all templates they enter the set's pins."""


def read_templates(path: Path) -> list[str]:
    """One template a line, each with {c} or {}. Raises DataError naming file, line and template."""
    templates = read_lines(path, "templates")
    for number, template in enumerate(templates, 1):
        if not PLACEHOLDER.search(template):
            raise DataError(
                f"templates {path}: line {number} {template!r} has no place for the class name: write {{c}} or {{}}"
            )
    return templates


@dataclass(frozen=True)
class ZeroShot(EvaluationTask):
    """Classification by class names in templates. source: where the names come from, for messages."""

    title: ClassVar[str] = "Zero-shot classification"
    note: ClassVar[str] = "Percent, top-1 / top-5."
    first_note: ClassVar[str] = "Zero-shot classification: top-1 in percent."
    classifies: ClassVar[bool] = True
    label: ClassVar[str] = ""
    """The label to read, where the recipe does not choose it."""

    names: list[str]
    source: str
    templates: list[str]

    @classmethod
    def open(cls, item: EvalSet, settings: EvalSettings) -> Self:
        """The data with class names and templates. Raises DataError."""
        data = open_data(item, settings, label=cls.label or item.label)
        return cls(item, settings, data, *_class_names(item, settings, data), _templates(item, settings, data))

    def pins(self) -> dict[str, str]:
        """The data, the class names, the templates and the name of the label."""
        names = {"classnames": hash_json(self.names), "templates": hash_json(self.templates)}
        return {**super().pins(), **names, "label": self.item.label}

    def run(self, encoder: Encoder, tokenize: Tokenize) -> ZeroShotResult:
        """Build the classifier and score every sample."""
        weights = classifier(encoder, self.names, self.templates, tokenize, self.settings.batch)
        batches = self.data.batches(encoder.image_size, self.settings, len(self.names))
        share = self.settings.max_bad_share
        result = zero_shot(
            encoder, batches, weights, name=self.item.name, classes_from=self.source, max_bad_share=share
        )
        result.names = self.names
        return result

    @classmethod
    def answers(cls, arrays: Arrays) -> list[NDArray[np.float64]]:
        """1 for each image that got its class."""
        return [arrays["correct"].astype(np.float64)]

    @classmethod
    def rows(cls, record: Mapping[str, Any]) -> list[ScoreRow]:
        """One line: top-1 and top-5."""
        about = {"names": record["classes"], "chance": record["chance"]}
        return [ScoreRow("", {key: record.get(key) for key in ("top1", "top5")}, about)]


def _class_names(item: EvalSet, settings: EvalSettings, data: SetData) -> tuple[list[str], str]:
    """The names, and where they come from: the recipe's file, the file beside the data, or the class folders."""
    path = settings.base / item.classnames if item.classnames else beside(data.places, CLASSNAMES)
    if path is not None:
        if data.classes is not None:
            return read_names(path, data.classes, data.places[0], item.class_order), str(path)
        return read_classnames(path), str(path)
    if data.classes is not None:
        return _folder_names(item, data.classes, data.places[0]), f"folder {data.places[0]}"
    looked = " nor in ".join(str(place) for place in data.places)
    raise DataError(f"evaluation set '{item.name}': there is no {CLASSNAMES} in {looked}; name one as `classnames`")


def _folder_names(item: EvalSet, classes: Sequence[str], folder: Path) -> list[str]:
    warn = _log.warning if dist.is_main() else _log.debug
    names = folder_names(classes)
    if are_wnids(classes):
        warn(
            "evaluation set '%s': %s has no %s; its folders are WordNet identifiers: using the class names and, unless "
            "there are others, the prompts of OpenAI's CLIP for ImageNet, as '%s' for %s",
            *(item.name, folder, CLASSNAMES, names[0], classes[0]),
        )
        return names
    if all(re.fullmatch("[0-9]+", name) for name in classes):
        warn(
            "evaluation set '%s': %s has no %s, so the class names are numbers; name a file of class names as "
            "`classnames`",
            *(item.name, folder, CLASSNAMES),
        )
    if are_numbered(classes):
        warn(
            "evaluation set '%s': the class names are those of the folders with numbers, such as '%s'; name a file of "
            "class names as `classnames`",
            *(item.name, classes[0]),
        )
    return names


def _templates(item: EvalSet, settings: EvalSettings, data: SetData) -> list[str]:
    path = settings.base / item.templates if item.templates else beside(data.places, TEMPLATES)
    if path is not None:
        return read_templates(path)
    if data.classes is not None and are_wnids(data.classes):
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    warn = _log.warning if dist.is_main() else _log.debug
    warn(
        "evaluation set '%s' has no %s: using the one prompt '%s'; published scores often use more: name a file of "
        "prompts as `templates`",
        *(item.name, TEMPLATES, DEFAULT_TEMPLATES[0]),
    )
    return list(DEFAULT_TEMPLATES)
