"""Zero-shot classification of images that may show several classes: the mean over classes of average precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compt.data.batch import EvalBatch
from compt.errors import DataError
from compt.evaluate.encoder import Arrays, Encoder, Tokenize, by_id, over_batches
from compt.evaluate.stats import bootstrap
from compt.evaluate.task import Result, ScoreRow
from compt.evaluate.zeroshot import ZeroShot, check_labels, classifier
from compt.recipe.schema import MAX_BAD_SHARE


@dataclass
class MultilabelResult(Result):
    """Average precision in percent. labels: bool [n, C]; scores: fp32 [n, C], cosines of images and classes."""

    task: ClassVar[str] = "multilabel"

    labels: NDArray[np.bool_]
    scores: NDArray[np.float32]
    names: list[str] = field(default_factory=list, kw_only=True)

    @property
    def per_class(self) -> list[float | None]:
        """Average precision of each class in percent; None for a class without an image."""
        return [
            100 * average_precision(scores, labels) if labels.any() else None
            for scores, labels in zip(self.scores.T, self.labels.T, strict=True)
        ]

    def headline(self) -> dict[str, float]:
        """mean_average_precision: over the classes that have an image."""
        present = [value for value in self.per_class if value is not None]
        return {"mean_average_precision": sum(present) / len(present) if present else 0.0}

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the score: a bootstrap over images. A class without a drawn image does not count."""
        orders = np.argsort(-self.scores, axis=0, kind="stable")
        sorted_labels = np.take_along_axis(self.labels, orders, axis=0)

        def score(drawn: NDArray[np.int64]) -> float:
            columns = zip(sorted_labels.T, orders.T, strict=True)
            drawn_labels = [np.repeat(labels, drawn[order]) for labels, order in columns]
            return 100 * float(np.mean([_precision(labels) for labels in drawn_labels if labels.any()] or [np.nan]))

        return bootstrap(score, np.ones(self.n, dtype=np.int64))

    def details(self) -> dict[str, Any]:
        """The number of classes, the score with its interval, and that of each class."""
        interval = {"mean_average_precision_interval": list(self.interval)} if self.labels.any() else {}
        return {"classes": self.labels.shape[1], **self.headline(), **interval, "per_class": self.per_class}

    def arrays(self) -> Arrays:
        """ids, labels, scores."""
        return {"ids": self.ids, "labels": self.labels, "scores": self.scores}


def average_precision(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> float:
    """The mean, over the images with the class, of the share of such images among those with at least their score.

    scores, labels: [n]. Images are in descending order of scores, of equal ones in the order of the set, as in
    clip_benchmark. 0 without an image of the class.
    """
    return _precision(labels[np.argsort(-scores, kind="stable")]) if labels.any() else 0.0


def _precision(right: NDArray[np.bool_]) -> float:
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].mean())


def multilabel(
    encoder: Encoder,
    loader: Iterable[EvalBatch],
    weights: Tensor,
    *,
    name: str = "multilabel",
    max_bad_share: float = MAX_BAD_SHARE,
) -> MultilabelResult:
    """Score this rank's batches with `weights` [D, C] and collect the scores of all ranks.

    Raises DataError, on every rank, for a batch without such labels and for a set without a usable sample.
    """
    classes = weights.shape[1]
    parts = [torch.zeros(0, 1 + 2 * classes, dtype=torch.float64)]

    def score(batch: EvalBatch) -> None:
        if batch.labels is None or batch.labels.ndim != 2:
            raise DataError(f"evaluation set '{name}': {batch.keys[0]} has no .npy with a label for each class")
        features = encoder.images(batch.images)
        # In half precision, images with nearly the same score would tie.
        with torch.autocast(weights.device.type, enabled=False):
            scores = features @ weights
        ids = torch.tensor(batch.ids)[:, None]
        parts.append(torch.cat([ids.double(), batch.labels.double(), scores.double().cpu()], dim=1))

    with encoder.frozen():
        losses = over_batches(loader, score)
    rows = by_id(torch.cat(parts))
    skipped, examples = losses.over_ranks()
    check_labels(name, None, skipped, examples, classes, "the class names", max_bad_share, len(rows))
    if not len(rows):
        raise DataError(f"evaluation set '{name}': no sample can be used{': ' + examples[0] if examples else ''}")
    ids, labels, scores = np.split(rows, [1, 1 + classes], axis=1)
    return MultilabelResult(
        name, ids[:, 0].astype(np.int64), labels > 0, scores.astype(np.float32), skipped=skipped, examples=examples
    )


@dataclass(frozen=True)
class Multilabel(ZeroShot):
    """Classes by names in templates, with a `.npy` of labels for each sample as clip_benchmark writes it."""

    title: ClassVar[str] = "Multi-label classification"
    note: ClassVar[str] = "Mean average precision in percent."
    first_note: ClassVar[str] = "Multi-label classification: mean average precision in percent."
    classifies: ClassVar[bool] = False
    label: ClassVar[str] = "npy"

    def run(self, encoder: Encoder, tokenize: Tokenize) -> MultilabelResult:  # type: ignore[override]
        """Build the classifier and score every sample for every class."""
        weights = classifier(encoder, self.names, self.templates, tokenize, self.settings.batch)
        batches = self.data.batches(encoder.image_size, self.settings, len(self.names))
        share = self.settings.max_bad_share
        result = multilabel(encoder, batches, weights, name=self.item.name, max_bad_share=share)
        result.names = self.names
        return result

    @classmethod
    def answers(cls, arrays: Arrays) -> list[NDArray[np.float64]]:
        """None: average precision is no mean over images."""
        return []

    @classmethod
    def rows(cls, record: Mapping[str, Any]) -> list[ScoreRow]:
        """One line: mean average precision."""
        scores = {"mean_average_precision": record["mean_average_precision"]}
        return [ScoreRow("", scores, {"names": record["classes"]})]
