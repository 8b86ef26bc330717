"""Loaders: batches of training, of the validation loss, and of evaluation sets.

The samples of a step depend only on the index, the seed, the batch and the step. Workers get references (epoch, ids).
So any step opens without replaying earlier ones, and the number of workers and ranks changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from compt.data.account import CAUSES
from compt.data.augment import change_pixels
from compt.data.batch import Batch, EvalBatch
from compt.data.decode import Decoder, EvaluationDecoder, Pixels, Unusable, evaluation_pixels
from compt.data.index import Index
from compt.data.labels import label_fault
from compt.data.order import EpochOrder, substitute
from compt.data.remote import staged
from compt.data.samples import Drawer, Drawn, EvalSample, EvalSamples, Kind, ShardSamples
from compt.data.tokens import CaptionTokens, Tokenizer, pad
from compt.data.workers import IN_WORK, read_batches
from compt.errors import DataError
from compt.models.preprocess import AS_OPENAI, Preprocess
from compt.recipe.schema import DECODERS, MAX_BAD_SHARE, Augment

MAX_SUBSTITUTES = 20
"""Unusable samples in a row, for one place of a batch, after which loading stops."""
WATCHED_SAMPLES = 1_000, 20_000
"""The share of unusable samples is judged over at least and over about at most this many samples."""
AHEAD = 2
"""Batches that a decoder in the training process decodes ahead."""
EVALUATED_SHARDS = 2
"""Shards in object storage that an evaluation has in the cache at a time."""
CACHE_BYTES = 1 << 30
"""The most that `cache=True` keeps in memory."""


_T = TypeVar("_T")


class Reference(NamedTuple):
    """The samples of one rank's share of a step, as a worker gets them."""

    epoch: int
    ids: NDArray[np.int64]


class Steps(Sampler[Reference]):
    """References of the steps from `start` to `stop`. Step s has samples s B to (s + 1) B of its epoch's order.

    An epoch has floor(n / B) steps; the samples left over are dropped. Rank r takes the r-th contiguous part of a step.
    """

    def __init__(
        self, index: Index, seed: int, window: int, batch: int, start: int, stop: int, rank: int, world_size: int
    ) -> None:
        self._index, self._mixture = index, index.mixture
        self._sizes, self._seed, self._window = (self._mixture or index).sizes, seed, window
        self._batch, self._start, self._stop = batch, start, stop
        share = batch // world_size
        self._part = slice(rank * share, (rank + 1) * share)
        self.steps_per_epoch = index.images // batch

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __iter__(self) -> Iterator[Reference]:
        epoch, order = -1, EpochOrder(0, 0, [], 1)
        for step in range(self._start, self._stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = EpochOrder(self._seed, epoch, self._sizes, self._window)
            first = step % self.steps_per_epoch * self._batch
            ids = order[first : first + self._batch][self._part]
            yield Reference(epoch, self._mixture.find(epoch, ids, self._index.sizes) if self._mixture else ids)


class Read(NamedTuple):
    """A batch, how many unusable samples were replaced for it, and the first of them in words."""

    batch: Batch
    replaced: int
    offender: str


class Failure(NamedTuple):
    """The message of an error in a worker. An exception would arrive with the worker's traceback in its message."""

    message: str


@dataclass
class Share:
    """One rank's share of a step, before its images are decoded.

    asked: the samples that the order names. samples, tried, drawn: for each place the sample that is there now, the
    number of samples that could not be used before it, and what was drawn of it. bad: place and description of each
    sample that was replaced.
    """

    epoch: int
    asked: list[int]
    samples: list[int]
    tried: list[int]
    drawn: list[Drawn] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)


class _Draws(Dataset["Read | Share | Failure"]):
    """Makes whole batches: draws the samples, decodes them, and replaces those that cannot be used."""

    def __init__(self, drawer: Drawer, kind: Kind, decoder: Decoder) -> None:
        self._drawer, self._kind, self._decoder = drawer, kind, decoder

    def __getitem__(self, reference: Reference) -> Read | Share | Failure:
        ids = reference.ids.tolist()
        share = Share(reference.epoch, ids, list(ids), [0] * len(ids))
        try:
            share.drawn = [self._draw(share, place) for place in range(len(ids))]
            return self.decode(share) if self._decoder.in_worker else share
        except DataError as error:
            return Failure(str(error))

    def decode(self, share: Share) -> Read:
        """The finished batch. Raises DataError where a place finds no sample that can be used.

        A sample may turn out to be broken only here. Its substitute is then drawn and decoded as well, so a decoder in
        the training process gets the same samples as one in a worker.
        """
        places, pixels = list(range(len(share.drawn))), torch.empty(0)
        while places:
            drawn = [share.drawn[place] for place in places]
            keys, images, boxes, *_ = zip(*drawn, strict=True)
            decoded, broken = self._decoder.decode(keys, images, boxes, self._kind.image_size)
            if len(places) == len(share.drawn):
                pixels = decoded
            else:
                pixels[places] = decoded
            places = [places[at] for at in sorted(broken)]
            for place, error in zip(places, (broken[at] for at in sorted(broken)), strict=True):
                self._replace(share, place, error)
                share.drawn[place] = self._draw(share, place)
        if self._kind.augment.active:
            change_pixels(pixels, [one.change for one in share.drawn if one.change])
        for one in share.drawn:
            share.skipped.update(one.lost)
        rows = [ids for one in share.drawn for ids in one.tokens]
        few = sum(one.few for one in share.drawn)
        keys_in_order = [one.key for one in share.drawn]
        batch = Batch(pixels, pad(rows, self._kind.captions), keys_in_order, dict(share.skipped), few)
        return Read(batch, len(share.bad), min(share.bad, key=itemgetter(0))[1] if share.bad else "")

    def _draw(self, share: Share, place: int) -> Drawn:
        """The sample of a place, or the first substitute whose captions and header can be read."""
        while True:
            try:
                return self._drawer.draw(share.samples[place], share.epoch)
            except Unusable as error:
                self._replace(share, place, error)

    def _replace(self, share: Share, place: int, error: Unusable) -> None:
        """Count an unusable sample and put a substitute in its place. Raises DataError after `MAX_SUBSTITUTES`."""
        index = self._drawer.reader.index
        share.skipped[error.cause] += 1
        share.bad.append((place, f"{index.describe(share.samples[place] % len(index))}: {error.cause}: {error}"))
        attempt = share.tried[place]
        share.tried[place] += 1
        if share.tried[place] == MAX_SUBSTITUTES:
            raise DataError(f"{MAX_SUBSTITUTES} samples in a row cannot be used; the last is {share.bad[-1][1]}")
        copy, asked = divmod(share.asked[place], len(index))
        key = index.key(asked) + (f"\0{copy}" if copy else "")
        share.samples[place] = substitute(self._kind.seed, share.epoch, key, attempt, len(index))


class _BadShare:
    """Stops a run if clearly more than `max_share` of its last samples are unusable.

    Clearly: by five standard deviations. In a long run, some thousand samples in a row have more than their share by
    chance alone.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._recent: deque[tuple[int, int]] = deque()
        self._seen = self._bad = 0

    def add(self, read: Read) -> None:
        """Count one batch. Raises DataError, which names shard, key and cause of one sample."""
        # An unusable substitute counts as a sample that was tried, too.
        tried = len(read.batch) + read.replaced
        self._recent.append((tried, read.replaced))
        self._seen += tried
        self._bad += read.replaced
        least, most = WATCHED_SAMPLES
        while self._seen - self._recent[0][0] >= most:
            seen, bad = self._recent.popleft()
            self._seen -= seen
            self._bad -= bad
        allowed = self._max_share * self._seen
        if read.replaced and self._seen >= least and self._bad > allowed + 5 * math.sqrt(allowed):
            raise DataError(
                f"{self._bad} of the last {self._seen} samples that were tried cannot be used, more than "
                f"data.max_bad_share {self._max_share:g} allows; for example {read.offender}"
            )


@dataclass
class TrainLoader:
    """One rank's batches of a range of steps. Each iteration starts at the first of them.

    shards_ahead: shards in object storage to have in the cache at a time.
    """

    steps: Iterable[Reference]
    count: int
    index: Index
    shards_ahead: int
    reads: _Draws
    workers: int
    max_bad_share: float

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        watch = _BadShare(self.max_bad_share)
        steps = _with_shards(self.steps, self.index, self.shards_ahead, self.workers)
        for read in self._decoded(read_batches(self.reads, steps, self.workers)):
            watch.add(read)
            yield read.batch

    def _decoded(self, reads: Iterator[Read | Share | Failure]) -> Iterator[Read]:
        """Finished batches. A decoder in this process decodes the next ones in a thread, while the step computes.

        Without workers the thread would share the files of the reader with this one, so there is none.
        """
        # A new thread begins on the first GPU, and would open a context there.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        enter = None if device is None else partial(torch.cuda.set_device, device)
        with ThreadPoolExecutor(1, "decoder", enter) as thread:
            ahead: deque[Future[Read]] = deque()
            for read in reads:
                if isinstance(read, Read):
                    yield read
                elif isinstance(read, Failure):
                    yield from (ready.result() for ready in ahead)
                    raise DataError(read.message)
                elif self.workers:
                    ahead.append(thread.submit(self._decode, read))
                    if len(ahead) > AHEAD:
                        yield ahead.popleft().result()
                else:
                    yield self._decode(read)
            yield from (ready.result() for ready in ahead)

    def _decode(self, share: Share) -> Read:
        read = self.reads.decode(share)
        if torch.cuda.is_initialized():
            # The loader pins batches, and what the workers sent was not yet one.
            read = read._replace(batch=read.batch.pin_memory())
        return read


def _with_shards(items: Iterable[_T], index: Index, ahead: int, workers: int) -> Iterable[_T]:
    """The items, each once its shards are on this machine."""
    if not index.remote:
        return items
    behind = IN_WORK * workers + 1
    return staged(items, partial(_ids, len(index)), index.ends, index.shards, ahead, behind)


def _ids(samples: int, item: Any) -> NDArray[np.int64]:
    return item.ids % samples if isinstance(item, Reference) else item


def train_loader(
    index: Index,
    *,
    seed: int,
    batch: int,
    image_size: int,
    captions: int,
    context_length: int,
    start_step: int,
    total_steps: int,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    augment: Augment | None = None,
    window: int = 8,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    tokenizer: Tokenizer | None = None,
    decoder: str = "pillow",
    max_bad_share: float = MAX_BAD_SHARE,
    cache: bool = False,
) -> TrainLoader:
    """This rank's batches of steps `start_step` to `total_steps`.

    batch: images of a step over all ranks. captions: drawn for each image. window: shards that are shuffled together.
    decoder: a name of `DECODERS`. cache: keep images and captions in memory, up to `CACHE_BYTES`. Workers, cache and
    the number of ranks do not change the samples. Raises DataError at once where the set is smaller than a batch or the
    ranks cannot share a batch evenly, and while iterating where too many samples cannot be used; ValueError for an
    unknown decoder.
    """
    if batch % world_size:
        raise DataError(f"a batch of {batch} cannot be cut into {world_size} equal parts, one for each process")
    if index.images < batch:
        raise DataError(f"{index.images} samples are fewer than one batch of {batch}: lower the batch, or add data")
    kind = Kind(image_size, captions, crop_scale, seed, crop_ratio=crop_ratio, augment=augment or Augment())
    tokens = CaptionTokens(context_length, tokenizer)
    chosen: Decoder = DECODERS.load(decoder)()
    drawer = Drawer(index, kind, tokens, chosen, CACHE_BYTES if cache else 0)
    if cache and workers:
        drawer.fill()  # before the workers fork: each would fill a cache of its own
    steps = Steps(index, seed, window, batch, start_step, total_steps, rank, world_size)
    return TrainLoader(steps, len(steps), index, 2 * window, _Draws(drawer, kind, chosen), workers, max_bad_share)


def fixed_caption_batches(
    index: Index,
    *,
    batch: int,
    image_size: int,
    captions: int,
    context_length: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    tokenizer: Tokenizer | None = None,
    preprocess: Preprocess = AS_OPENAI,
) -> TrainLoader:
    """Whole batches for a validation loss: the same images and captions in the same order for every model.

    Images are preprocessed as for evaluation; the `captions` of an image are evenly spread over all it has. Batch b
    goes to rank b mod world_size. Samples beyond the last whole batch are left out, unless there is no whole batch.
    """
    order = EpochOrder(0, 0, index.sizes, max(len(index.sizes), 1))
    whole = [order[first : first + batch] for first in range(0, len(order) - batch + 1, batch)] or [order[:]]
    steps = [Reference(0, ids) for ids in whole[rank::world_size]]
    kind = Kind(image_size, captions, (1.0, 1.0), 0, fixed=True)
    decoder = EvaluationDecoder(preprocess)
    drawer = Drawer(index, kind, CaptionTokens(context_length, tokenizer), decoder)
    draws = _Draws(drawer, kind, decoder)
    return TrainLoader(steps, len(steps), index, len(index.shards), draws, workers, MAX_BAD_SHARE)


def _check_label(label: int | NDArray[np.bool_] | None, classes: int) -> None:
    """Raise Unusable for a label that does not fit the number of classes; 0 where that is not known."""
    if label is None or not (cause := label_fault(label, classes)):
        return
    if isinstance(label, np.ndarray):
        raise Unusable(cause, f"{len(label)} labels, but there are {classes} classes")
    beyond = f"label {label}, but the classes are 0 to {classes - 1}"
    raise Unusable(cause, beyond if cause == "label_range" else CAUSES[cause].text)


class _Evaluations(Dataset["EvalBatch | Failure"]):
    """Reads batches of an evaluation set."""

    def __init__(self, samples: EvalSamples, image_size: int, preprocess: Preprocess, classes: int) -> None:
        self._samples, self._size, self._preprocess, self._classes = samples, image_size, preprocess, classes

    def __getitem__(self, ids: NDArray[np.int64]) -> EvalBatch | Failure:
        batch = EvalBatch(torch.empty(0), [], [])
        found: list[EvalSample] = []
        pixels: list[Pixels] = []
        for sample in ids.tolist():
            try:
                read = self._samples.read(sample)
                _check_label(read.label, self._classes)
                pixels.append(evaluation_pixels(read.image, self._size, self._preprocess))
            except Unusable as error:
                batch.bad.append(f"{self._samples.describe(sample)}: {error.cause}: {error}")
                batch.skipped[error.cause] = batch.skipped.get(error.cause, 0) + 1
                continue
            except DataError as error:
                return Failure(str(error))
            found.append(read)
            batch.keys.append(read.key)
            batch.ids.append(sample)
        stacked = np.stack(pixels) if pixels else np.zeros((0, 3, self._size, self._size), np.uint8)
        batch.images = torch.from_numpy(np.ascontiguousarray(stacked))
        labels = [read.label for read in found if read.label is not None]
        batch.labels = torch.from_numpy(np.array(labels)) if labels else None
        captions = [read.captions for read in found if read.captions is not None]
        batch.captions = captions or None
        return batch


@dataclass
class EvalLoader:
    """One rank's batches of an evaluation set. It can be iterated several times."""

    ids: list[NDArray[np.int64]]
    reads: Dataset[EvalBatch | Failure]
    workers: int
    index: Index | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[EvalBatch]:
        ids = _with_shards(self.ids, self.index, EVALUATED_SHARDS, self.workers) if self.index else self.ids
        for batch in read_batches(self.reads, ids, self.workers):
            if isinstance(batch, Failure):
                raise DataError(batch.message)
            yield batch


def eval_loader(
    samples: EvalSamples,
    *,
    image_size: int,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    preprocess: Preprocess = AS_OPENAI,
    classes: int = 0,
) -> EvalLoader:
    """Every sample exactly once over all ranks: rank r has ids r, r + world_size, ... in batches of `batch`.

    `preprocess` says how images are resized (default: as OpenAI's CLIP does). classes: the number of classes, which
    labels are below, if it is known. A sample that cannot be used is named in its batch's `bad` and counted in
    `skipped`. Raises DataError while iterating where the whole set cannot be used.
    """
    ids = np.arange(rank, len(samples), world_size, dtype=np.int64)
    parts = [ids[first : first + batch] for first in range(0, len(ids), batch)]
    index = samples.index if isinstance(samples, ShardSamples) else None
    return EvalLoader(parts, _Evaluations(samples, image_size, preprocess, classes), workers, index)
