"""Classification from frozen image features and a labelled training split: linear probe and nearest neighbours."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from compt.data.batch import EvalBatch
from compt.data.labels import CLASSNAMES, beside, read_classnames
from compt.dist import collectives as dist
from compt.errors import DataError
from compt.evaluate.encoder import Arrays, Encoder, Tokenize, by_id, everywhere, over_batches
from compt.evaluate.task import EvalSettings, EvaluationTask, ScoreRow, SetData, open_data
from compt.evaluate.zeroshot import ZeroShot, ZeroShotResult, check_labels, true_ranks
from compt.files import hash_json
from compt.recipe.schema import EvalSet

_log = logging.getLogger(__name__)

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""k and the temperature of the votes, as in DINO's evaluation (Wu et al. 2018)."""
EXPONENTS = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)
"""Of the penalties 10 ** e / n that are tried first: in scikit-learn's terms, C = 10 ** -e."""
REFINEMENTS = 3
"""How often the step between exponents is halved around the best: to a quarter of a decade."""
CHUNK = 1 << 14
"""Training samples that are computed at a time."""
HELD_OUT = 5
"""Every fifth training sample chooses the penalty. The final fit has all of them."""


class Features(NamedTuple):
    """Unit features fp32 [n, D], labels int64 [n] and ids int64 [n] of all ranks, in ascending order of ids."""

    features: Tensor
    labels: Tensor
    ids: Tensor
    skipped: dict[str, int]
    examples: list[str]


def features_of(encoder: Encoder, loader: Iterable[EvalBatch], name: str) -> Features:
    """Encode this rank's batches and gather what all ranks have, on the model's device.

    Raises DataError, on every rank, for a batch without class numbers and for a set without a usable sample.
    """
    parts: list[Tensor] = []
    ids: list[int] = []
    own: list[int] = []

    def encode(batch: EvalBatch) -> None:
        if batch.labels is None or batch.labels.ndim != 1:
            raise DataError(f"evaluation set '{name}': {batch.keys[0]} has no class number")
        parts.append(encoder.images(batch.images))
        ids.extend(batch.ids)
        own.extend(batch.labels.tolist())

    with encoder.frozen():
        losses = over_batches(loader, encode)
    skipped, examples = losses.over_ranks()
    features, order = everywhere(parts, ids, encoder.device, name, examples)
    labels = by_id(torch.tensor([ids, own], dtype=torch.int64).T)[:, 1]
    return Features(features, torch.from_numpy(labels.copy()).to(features.device), order, skipped, examples)


def fit_probe(features: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """Logistic regression by L-BFGS: weights and, in the last row, biases, fp64 [D + 1, C].

    Minimizes the sum over samples of the cross-entropy, plus penalty * n * |weights|^2 / 2: scikit-learn's
    LogisticRegression with C = 1 / (penalty * n). `start`: weights to begin from.
    """
    n, width = features.shape
    weights = torch.zeros(width + 1, classes, dtype=torch.float64, device=features.device)
    if start is not None:
        weights.copy_(start)
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = penalty / 2 * weights[:-1].square().sum()
        loss.backward()
        total = loss.detach()
        # ImageNet's features in fp64 and their logits would take 15 GB.
        for part, own in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            inputs = functional.pad(part.double(), (0, 1), value=1.0)
            loss = functional.cross_entropy(inputs @ weights, own, reduction="sum") / n
            loss.backward()
            total += loss.detach()
        return total

    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        optimizer.step(closure)
    return weights.detach()


def choose_penalty(train: Features, classes: int) -> float:
    """The penalty with the best accuracy on the held-out fifth of the training samples; of equal ones the larger.

    The sweep is that of CLIP's authors (Radford et al. 2021, appendix A.3): a coarse one, then finer ones around the
    best. Their features are those before the projection; here they are of the joint embedding.
    """
    # Every fifth sample of each class, in a random order: sets list their classes in turn, or one after the other.
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0)).to(train.labels.device)
    order = order[train.labels[order].argsort(stable=True)]
    held = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    held[order[HELD_OUT - 1 :: HELD_OUT]] = True
    if not held.any():
        return 1.0 / len(train.labels)
    inputs, n = functional.pad(train.features[held].double(), (0, 1), value=1.0), int((~held).sum())
    scores: dict[float, float] = {}
    start: Tensor | None = None

    def score(exponent: float) -> None:
        nonlocal start
        start = fit_probe(train.features[~held], train.labels[~held], classes, 10**exponent / n, start)
        right = (inputs @ start).argmax(dim=1) == train.labels[held]
        scores[exponent] = float(right.double().mean())

    def best() -> float:
        return max(scores, key=lambda exponent: (scores[exponent], exponent))

    # From the strongest penalty on: each fit starts from the one before, and weights grow as the penalty falls.
    for exponent in EXPONENTS:
        score(exponent)
    step = 2.0
    for _ in range(REFINEMENTS):
        step /= 2
        middle = best()
        for exponent in (middle + step, middle - step):
            if exponent not in scores and min(EXPONENTS) <= exponent <= max(EXPONENTS):
                score(exponent)
    return 10 ** best() / len(train.labels)


def vote(queries: Tensor, train: Features, classes: int, chunk: int = 1024) -> Tensor:
    """Scores fp32 [Q, C]: the sum over the nearest training samples of exp(cosine / temperature), by class."""
    rows = []
    for some in queries.split(chunk):
        near, labels = torch.zeros(len(some), 0, device=some.device), train.labels[:0].expand(len(some), 0)
        for part, own in zip(train.features.split(CHUNK), train.labels.split(CHUNK), strict=True):
            near, labels = (
                torch.cat([near, some @ part.T], dim=1),
                torch.cat([labels, own.expand(len(some), -1)], dim=1),
            )
            near, places = near.topk(min(NEIGHBOURS, near.shape[1]), dim=1)
            labels = labels.gather(1, places)
        votes = torch.zeros(len(some), classes, device=some.device)
        rows.append(votes.scatter_add_(1, labels, (near / TEMPERATURE).exp()))
    return torch.cat(rows)


@dataclass
class NeighboursResult(ZeroShotResult):
    """As of zero-shot classification. train_images: labelled samples."""

    task: ClassVar[str] = "knn"

    train_images: int = field(default=0, kw_only=True)

    def details(self) -> dict[str, Any]:
        """Those of zero-shot classification, and the number of training samples."""
        return {**super().details(), "train_images": self.train_images}


@dataclass
class ProbeResult(NeighboursResult):
    """As of nearest neighbours. penalty: the one that was chosen."""

    task: ClassVar[str] = "linear_probe"

    penalty: float = field(default=0.0, kw_only=True)

    def details(self) -> dict[str, Any]:
        """Those of nearest neighbours, and the penalty."""
        return {**super().details(), "penalty": self.penalty}


@dataclass(frozen=True)
class LabelledTask(EvaluationTask):
    """Scores images by features of a labelled training split. names: of the classes, empty without a file of them."""

    note: ClassVar[str] = ZeroShot.note
    classifies: ClassVar[bool] = True

    train: SetData
    names: list[str]

    @classmethod
    def open(cls, item: EvalSet, settings: EvalSettings) -> Self:
        """Both splits, with their class numbers. Raises DataError."""
        if item.train is None:
            raise DataError(f"evaluation set '{item.name}': the task {item.task} needs labelled shards: name `train`")
        data = open_data(item, settings, label=item.label)
        train = open_data(item.model_copy(update={"data": item.train}), settings, label=item.label)
        if data.classes != train.classes:
            raise DataError(f"evaluation set '{item.name}': `data` and `train` have folders of different classes")
        path = settings.base / item.classnames if item.classnames else beside(data.places, CLASSNAMES)
        names = list(data.classes or ()) or (read_classnames(path) if path else [])
        return cls(item, settings, data, train, names)

    @property
    def splits(self) -> tuple[SetData, ...]:
        """Both splits."""
        return self.data, self.train

    def pins(self) -> dict[str, str]:
        """Both splits, the class names and the name of the label."""
        names = {"classnames": hash_json(self.names)} if self.names else {}
        return {**super().pins(), **names, "train": self.train.samples.fingerprint, "label": self.item.label}

    @abstractmethod
    def score(self, queries: Tensor, train: Features, classes: int) -> tuple[Tensor, dict[str, Any]]:
        """Scores [Q, C] of unit features [Q, D], and fields of the result."""

    result_class: ClassVar[type[ZeroShotResult]]

    def run(self, encoder: Encoder, tokenize: Tokenize) -> ZeroShotResult:
        """Encode both splits once, and score the test split on rank 0."""
        count = len(self.names)
        train, test = (
            features_of(encoder, data.batches(encoder.image_size, self.settings, count), self.item.name)
            for data in (self.train, self.data)
        )
        known = 1 + int(train.labels.max())
        if not count and int(test.labels.max()) >= known:
            raise DataError(
                f"evaluation set '{self.item.name}': label {int(test.labels.max())} occurs, but the labels of `train` "
                f"end at {known - 1}; name a file of class names"
            )
        if not count and known > len(train.labels):
            raise DataError(
                f"evaluation set '{self.item.name}': label {known - 1} with {len(train.labels)} labelled images; "
                "number classes from 0, or name a file of class names"
            )
        classes = count or known

        def scored() -> tuple[list[list[int]], dict[str, Any]]:
            scores, about = self.score(test.features, train, classes)
            ranks, first = true_ranks(scores, test.labels)
            return torch.stack([test.ids, test.labels, first, ranks], dim=1).tolist(), about

        for data in (train, test):
            source, share = "the class names" if count else "the labels", self.settings.max_bad_share
            check_labels(self.item.name, data.labels.cpu().numpy(), data.skipped, data.examples, classes, source, share)
        rows, about = dist.from_main_slowly(scored)  # a fit on ImageNet's features can take more than half an hour
        ids, labels, predictions, ranks = torch.tensor(rows, dtype=torch.int64).T.contiguous().numpy()
        about |= {"skipped": test.skipped, "examples": test.examples, "train_images": len(train.labels)}
        if train.skipped:
            lost = ", ".join(f"{cause} {count}" for cause, count in train.skipped.items())
            _log.warning("evaluation set '%s': left out of the training split: %s", self.item.name, lost)
        result = self.result_class(self.item.name, ids, classes, labels, predictions, ranks, **about)
        result.names = self.names
        return result

    @classmethod
    def answers(cls, arrays: Arrays) -> list[Any]:
        """1 for each image that got its class."""
        return ZeroShot.answers(arrays)

    @classmethod
    def rows(cls, record: Mapping[str, Any]) -> list[ScoreRow]:
        """One line: top-1 and top-5."""
        about = {"classes": record["classes"], "chance": record["chance"]}
        return [ScoreRow("", {key: record.get(key) for key in ("top1", "top5")}, about)]


@dataclass(frozen=True)
class LinearProbe(LabelledTask):
    """Logistic regression on the features."""

    title: ClassVar[str] = "Linear probe"
    first_note: ClassVar[str] = "Linear probe: top-1 in percent."
    result_class: ClassVar[type[ZeroShotResult]] = ProbeResult

    def score(self, queries: Tensor, train: Features, classes: int) -> tuple[Tensor, dict[str, Any]]:
        """The regression's logits."""
        penalty = choose_penalty(train, classes)
        weights = fit_probe(train.features, train.labels, classes, penalty)
        return queries.double() @ weights[:-1] + weights[-1], {"penalty": penalty}


@dataclass(frozen=True)
class Neighbours(LabelledTask):
    """Votes of the nearest training samples."""

    title: ClassVar[str] = "Nearest neighbours"
    first_note: ClassVar[str] = f"Nearest neighbours: top-1 in percent, {NEIGHBOURS} neighbours."
    result_class: ClassVar[type[ZeroShotResult]] = NeighboursResult

    def score(self, queries: Tensor, train: Features, classes: int) -> tuple[Tensor, dict[str, Any]]:
        """The sum of votes for each class."""
        return vote(queries, train, classes), {}
