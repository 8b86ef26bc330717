"""Image-to-text and text-to-image retrieval with any number of captions per image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compt.data.batch import EvalBatch
from compt.dist import collectives as dist
from compt.errors import DataError
from compt.evaluate.encoder import Arrays, Encoder, Tokenize, by_id, everywhere, over_batches
from compt.evaluate.stats import bootstrap, wilson
from compt.evaluate.task import EvalSettings, EvaluationTask, Result, ScoreRow, open_data
from compt.files import hash_json
from compt.recipe.schema import EvalSet

KS = (1, 5, 10)


@dataclass
class RetrievalResult(Result):
    """Recall at 1, 5 and 10 in percent, both ways.

    The rank of a query is the number of wrong candidates that score at least as high as its best right one. So ties
    count against the model, also between two images with the same caption. image_ranks [images]; text_ranks and owners
    (the image's id) [captions], in ascending order of ids and, within an image, of captions. found [images]: the place
    of the best caption among all, as an example of what the model finds.
    """

    task: ClassVar[str] = "retrieval"

    image_ranks: NDArray[np.int64]
    owners: NDArray[np.int64]
    text_ranks: NDArray[np.int64]
    found: NDArray[np.int64]

    def headline(self) -> dict[str, float]:
        """The recalls: image_to_text_r1 ... text_to_image_r10."""
        ways = {"image_to_text": self.image_ranks, "text_to_image": self.text_ranks}
        return {f"{way}_r{k}": 100 * float((ranks < k).mean()) for way, ranks in ways.items() for k in KS}

    @cached_property
    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals of the recalls: Wilson's where the queries are images, else a bootstrap over images.

        The captions of an image are drawn together: they are not independent.
        """
        found = {f"image_to_text_r{k}": wilson(int((self.image_ranks < k).sum()), self.n) for k in KS}
        image = np.searchsorted(self.ids, self.owners)
        captions = np.bincount(image, minlength=self.n)
        for k in KS:
            hits = np.bincount(image, weights=self.text_ranks < k, minlength=self.n)
            # Images with as many captions, of which as many find it, are of one kind: few kinds are fast to draw.
            kinds, counts = np.unique(np.stack([hits, captions]), axis=1, return_counts=True)

            def recall(drawn: NDArray[np.int64], kinds: NDArray[Any] = kinds) -> float:
                right, every = kinds @ drawn
                return 100 * float(right / every)

            found[f"text_to_image_r{k}"] = bootstrap(recall, counts)
        return {key: list(interval) for key, interval in found.items()}

    def details(self) -> dict[str, Any]:
        """The number of captions, and the recalls with their intervals."""
        intervals = {f"{key}_interval": interval for key, interval in self.intervals.items()}
        return {"texts": len(self.owners), **self.headline(), **intervals}

    def arrays(self) -> Arrays:
        """ids, image_ranks, owners, text_ranks, found."""
        return {name: getattr(self, name) for name in ("ids", "image_ranks", "owners", "text_ranks", "found")}


def query_ranks(
    queries: Tensor, candidates: Tensor, query_of: Tensor, candidate_of: Tensor, chunk: int = 256
) -> Tensor:
    """For each query the rank of its best right candidate, and the place of its best candidate: int64 [Q, 2].

    Scores of `chunk` queries are in memory at a time.

    queries [Q, D], candidates [K, D]; a candidate is right where candidate_of [K] equals query_of [Q].
    """
    ranks = []
    for start in range(0, len(queries), chunk):
        own = slice(start, start + chunk)
        scores = queries[own] @ candidates.T
        right = candidate_of == query_of[own, None]
        best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
        # "Not below" instead of "at least": a NaN then counts against the model.
        ranks.append(torch.stack([(~(scores < best) & ~right).sum(dim=1), scores.argmax(dim=1)], dim=1))
    return torch.cat(ranks) if ranks else torch.zeros(0, 2, dtype=torch.int64, device=queries.device)


def retrieval(
    encoder: Encoder,
    loader: Iterable[EvalBatch],
    tokenize: Tokenize,
    *,
    name: str = "retrieval",
    chunk: int = 256,
) -> RetrievalResult:
    """Recalls over the images and captions of all ranks. Every rank has all features and scores its share of queries.

    Memory: (images + captions) * D numbers and `chunk` rows of scores. Raises DataError, on every rank, for an image
    without a caption and for a set without a readable image.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    ids: list[int] = []
    owners: list[int] = []

    def encode(batch: EvalBatch) -> None:
        captions = batch.captions or [[] for _ in batch.ids]
        for key, own in zip(batch.keys, captions, strict=True):
            if not own:
                raise DataError(f"evaluation set '{name}': {key} has no caption")
        images.append(encoder.images(batch.images))
        ids.extend(batch.ids)
        flat = [caption for own in captions for caption in own]
        texts.extend(encoder.texts(tokenize(flat[at : at + chunk])) for at in range(0, len(flat), chunk))
        owners.extend(sample for sample, own in zip(batch.ids, captions, strict=True) for _ in own)

    with encoder.frozen():
        losses = over_batches(loader, encode)
    skipped, examples = losses.over_ranks()
    # Every rank has all features: a query may find its answer among the rows of any rank.
    image, image_of = everywhere(images, ids, encoder.device, name, examples)
    text, text_of = everywhere(texts, owners, encoder.device, name, examples)
    image_ranks, found = _shared(image, text, image_of, text_of, chunk)
    text_ranks, _ = _shared(text, image, text_of, image_of, chunk)
    return RetrievalResult(
        name,
        image_of.cpu().numpy(),
        image_ranks,
        text_of.cpu().numpy(),
        text_ranks,
        found,
        skipped=skipped,
        examples=examples,
    )


def _shared(
    queries: Tensor, candidates: Tensor, query_of: Tensor, candidate_of: Tensor, chunk: int
) -> list[NDArray[np.int64]]:
    """The columns of `query_ranks`, with the queries shared between the ranks."""
    own = torch.arange(dist.rank(), len(queries), dist.world_size(), device=queries.device)
    ranks = query_ranks(queries[own], candidates, query_of[own], candidate_of, chunk)
    _, *columns = by_id(torch.cat([own[:, None], ranks], dim=1)).T.copy()
    return columns


@dataclass(frozen=True)
class Retrieval(EvaluationTask):
    """Finding the captions of an image among all captions, and the image of a caption among all images."""

    title: ClassVar[str] = "Retrieval"
    note: ClassVar[str] = "Recall at 1 / 5 / 10 in percent."
    first_note: ClassVar[str] = "Retrieval: recall at 1 in percent."

    @classmethod
    def open(cls, item: EvalSet, settings: EvalSettings) -> Retrieval:
        """The data with the captions. Raises DataError."""
        return cls(item, settings, open_data(item, settings, captions=True))

    def pins(self) -> dict[str, str]:
        """The data, and the fields of its captions if the set names them."""
        columns = self.item.caption_columns
        return {**super().pins(), **({} if columns is None else {"caption_columns": hash_json(columns)})}

    def run(self, encoder: Encoder, tokenize: Tokenize) -> RetrievalResult:
        """Rank all pairs, both ways."""
        batches = self.data.batches(encoder.image_size, self.settings)
        return retrieval(encoder, batches, tokenize, name=self.item.name)

    @classmethod
    def answers(cls, arrays: Arrays) -> list[NDArray[np.float64]]:
        """1 for each image that found one of its captions first; and each image's share of captions that found it.

        The captions of an image are drawn together: they are not independent.
        """
        image = np.searchsorted(arrays["ids"], arrays["owners"])
        found = np.bincount(image, weights=arrays["text_ranks"] < 1, minlength=len(arrays["ids"]))
        return [(arrays["image_ranks"] < 1).astype(np.float64), found * len(found) / len(image)]

    @classmethod
    def rows(cls, record: Mapping[str, Any]) -> list[ScoreRow]:
        """One line for each way."""
        ways = {"image_to_text": "text by image", "text_to_image": "image by text"}
        return [
            ScoreRow(label, {key: record[key] for key in (f"{way}_r{k}" for k in KS)}, {"texts": record["texts"]})
            for way, label in ways.items()
        ]
