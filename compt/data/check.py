"""Verify any WebDataset: every image decodes, every sample has captions, and how long they are."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compt.data.captions import usable
from compt.data.decode import Unusable, open_image, to_rgb
from compt.data.index import Index, open_index
from compt.data.samples import SampleReader
from compt.data.tokens import CaptionTokens

_CHUNK = 500
_LONGEST = 4096
"""Longer captions count as so long."""
Progress = Callable[[int, int], None]
"""Samples done, samples in all."""


@dataclass
class _Account:
    """Findings in one run of samples of one shard."""

    shard: int
    samples: int = 0
    captions: int = 0
    labels: int = 0
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_LONGEST + 1, np.int64))
    smallest: tuple[int, int] = (1 << 30, 1 << 30)
    largest: tuple[int, int] = (0, 0)
    few: Counter[int] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def fault(self, cause: str, where: str) -> None:
        self.causes[cause] += 1
        self.first.setdefault(cause, where)


@dataclass(frozen=True)
class ShardCount:
    """Samples of one shard, and how many of them cannot be used."""

    name: str
    samples: int
    bad: int


@dataclass(frozen=True)
class CheckReport:
    """What a data set holds.

    causes: unusable samples and empty captions by cause. first: `shard: key: reason` of the first of each cause.
    Token counts include start and end. captions_per_image: images by number of captions.
    """

    shards: list[ShardCount]
    samples: int
    captions: int
    labels: int
    causes: dict[str, int]
    first: dict[str, str]
    mean_tokens: float
    median_tokens: int
    p95_tokens: int
    max_tokens: int
    context_length: int
    share_over_context: float
    captions_per_image: dict[int, int]
    smallest_image: tuple[int, int]
    largest_image: tuple[int, int]
    fingerprint: str

    @property
    def ok(self) -> bool:
        """Whether every sample can be used whole."""
        return not self.causes

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each finding, for a table."""
        p95 = self.p95_tokens
        counts = [shard.samples for shard in self.shards]
        fewest, most = (
            (min(self.captions_per_image), max(self.captions_per_image)) if self.captions_per_image else (0, 0)
        )
        result = [
            ("shards", f"{len(self.shards):,}"),
            ("samples", f"{self.samples:,} ({min(counts):,} to {max(counts):,} a shard)"),
            ("captions", f"{self.captions:,} ({fewest} to {most} an image)"),
            (
                "tokens a caption",
                f"mean {self.mean_tokens:.1f}, median {self.median_tokens}, 95 % {p95}, longest {self.max_tokens}",
            ),
            (f"over {self.context_length} tokens", f"{100 * self.share_over_context:.2f} %"),
            (
                "image sizes",
                " to ".join(f"{width} x {height}" for width, height in (self.smallest_image, self.largest_image)),
            ),
            ("labels (.cls)", f"{self.labels:,}"),
            ("fingerprint", self.fingerprint[:16]),
        ]
        for cause, count in sorted(self.causes.items()):
            result.append((f"unusable: {cause}", f"{count:,}, first {self.first[cause]}"))
        return result


def _examine(index: Index, tokens: CaptionTokens, work: tuple[int, int, int]) -> _Account:
    """Examine samples `start` to `stop` of a shard."""
    shard, start, stop = work
    part = _Account(shard)
    reader = SampleReader(index)
    for sample in range(start, stop):
        part.samples += 1
        entry = index.entry(sample)
        where = f"{index.shards[shard].shard.name}: {entry.key}"
        part.labels += entry.label >= 0
        try:
            image = to_rgb(open_image(reader.image(entry)))
            part.smallest = min(part.smallest[0], image.width), min(part.smallest[1], image.height)
            part.largest = max(part.largest[0], image.width), max(part.largest[1], image.height)
        except Unusable as error:
            part.fault(error.cause, f"{where}: {error}")
            continue
        try:
            captions = reader.captions(entry)
        except Unusable as error:
            part.fault(error.cause, f"{where}: {error}")
            continue
        said = usable(captions)
        if len(said) < len(captions) or not said:
            part.fault("caption", f"{where}: {'an empty caption' if captions else 'it has no caption'}")
        part.few[len(said)] += 1
        part.captions += len(said)
        for caption in said:
            part.lengths[min(tokens.length(caption), _LONGEST)] += 1
    return part


def _works(index: Index) -> Iterator[tuple[int, int, int]]:
    for shard, (start, end) in enumerate(zip(index.starts.tolist(), index.ends.tolist(), strict=True)):
        for first in range(start, end, _CHUNK):
            yield shard, first, min(first + _CHUNK, end)


def check(
    patterns: str | Sequence[str],
    base: Path,
    *,
    index_dir: Path | None = None,
    captions_csv: Path | None = None,
    context_length: int = 77,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every sample once. `workers` processes do it (default: one a CPU, none for few samples).

    Raises DataError for what the index cannot be built from: a missing or compressed shard, no sample at all.
    """
    index = open_index(patterns, base, index_dir, captions_csv)
    examine = partial(_examine, index, CaptionTokens(context_length))
    workers = (os.cpu_count() or 1 if len(index) > 4 * _CHUNK else 1) if workers is None else workers
    works = list(_works(index))
    total = _Account(0)
    bad: Counter[int] = Counter()
    for part in _run(examine, works, workers):
        _merge(total, part)
        bad[part.shard] += sum(part.causes.values())
        if progress:
            progress(total.samples, len(index))
    for number, shard in enumerate(index.shards):
        for cause, count in shard.dropped.items():
            total.causes[cause] += count
            total.first.setdefault(cause, f"{shard.shard.name}: {shard.first[cause]}")
            bad[number] += count
    return _report(index, total, bad, context_length)


def _run(
    examine: Callable[[tuple[int, int, int]], _Account], works: list[tuple[int, int, int]], workers: int
) -> Iterator[_Account]:
    if workers < 2:
        yield from map(examine, works)
        return
    # A fork hands `examine` over as it is; the tokenizer in it cannot be pickled.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(examine,)) as pool:
        yield from pool.map(_examine_here, works)


_in_worker: list[Callable[[tuple[int, int, int]], _Account]] = []


def _begin(examine: Callable[[tuple[int, int, int]], _Account]) -> None:
    _in_worker[:] = [examine]


def _examine_here(work: tuple[int, int, int]) -> _Account:
    return _in_worker[0](work)


def _merge(total: _Account, part: _Account) -> None:
    total.samples += part.samples
    total.captions += part.captions
    total.labels += part.labels
    total.lengths += part.lengths
    total.smallest = min(total.smallest[0], part.smallest[0]), min(total.smallest[1], part.smallest[1])
    total.largest = max(total.largest[0], part.largest[0]), max(total.largest[1], part.largest[1])
    total.few += part.few
    total.causes += part.causes
    for cause, where in part.first.items():
        total.first.setdefault(cause, where)


def _report(index: Index, total: _Account, bad: Counter[int], context_length: int) -> CheckReport:
    lengths, count = total.lengths, int(total.lengths.sum())
    below = np.cumsum(lengths)

    def quantile(share: float) -> int:
        return int(np.searchsorted(below, share * count)) if count else 0

    return CheckReport(
        shards=[ShardCount(shard.shard.name, shard.samples, bad[number]) for number, shard in enumerate(index.shards)],
        samples=total.samples,
        captions=total.captions,
        labels=total.labels,
        causes=dict(total.causes),
        first=total.first,
        mean_tokens=float((lengths * np.arange(len(lengths))).sum() / count) if count else 0.0,
        median_tokens=quantile(0.5),
        p95_tokens=quantile(0.95),
        max_tokens=int(np.flatnonzero(lengths)[-1]) if count else 0,
        context_length=context_length,
        share_over_context=float(lengths[context_length + 1 :].sum() / count) if count else 0.0,
        captions_per_image=dict(sorted(total.few.items())),
        smallest_image=total.smallest if total.largest != (0, 0) else (0, 0),
        largest_image=total.largest,
        fingerprint=index.fingerprint,
    )
