"""Check a WebDataset: does every image decode, does every sample have captions, and how long are they?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from compt.dist.child import process_pool

_CHUNK = 500
"""Samples that a worker process checks at a time."""
_LONGEST = 4096
"""Longer captions are counted as this long, in tokens."""
Progress = Callable[[int, int], None]
"""Samples done, samples in all."""


@dataclass
class Findings:
    """What some of the samples hold.

    labels: samples with a class number. lengths: captions by their number of tokens, start and end included. smallest,
    largest: width and height in pixels. captions_per_image: images by their number of captions. causes: unusable
    samples and empty captions by cause; first: `shard: key: reason` of the first of each cause.
    """

    samples: int = 0
    labels: int = 0
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_LONGEST + 1, np.int64))
    smallest: tuple[int, int] = (1 << 30, 1 << 30)
    largest: tuple[int, int] = (0, 0)
    captions_per_image: Counter[int] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def fault(self, cause: str, where: str, count: int = 1) -> None:
        """Count something that cannot be used."""
        self.causes[cause] += count
        self.first.setdefault(cause, where)

    def size(self, width: int, height: int) -> None:
        """Note the size of an image."""
        self.smallest = min(self.smallest[0], width), min(self.smallest[1], height)
        self.largest = max(self.largest[0], width), max(self.largest[1], height)

    def add(self, other: Findings) -> None:
        """Add the findings on later samples."""
        self.samples += other.samples
        self.labels += other.labels
        self.lengths += other.lengths
        if other.largest != (0, 0):
            self.size(*other.smallest)
            self.size(*other.largest)
        self.captions_per_image += other.captions_per_image
        self.causes += other.causes
        self.first = {**other.first, **self.first}

    @property
    def captions(self) -> int:
        """Captions that are not empty."""
        return int(self.lengths.sum())

    @property
    def mean_tokens(self) -> float:
        """Mean length of a caption, 0 where there is none."""
        return float((self.lengths * np.arange(len(self.lengths))).sum() / max(self.captions, 1))

    def tokens(self, share: float) -> int:
        """The length that this share of the captions does not exceed: 0.5 gives the median, 1 the longest."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.captions)) if self.captions else 0

    def share_over(self, tokens: int) -> float:
        """The share of captions that are longer."""
        return float(self.lengths[tokens + 1 :].sum() / max(self.captions, 1))


@dataclass(frozen=True)
class CheckReport:
    """The findings on all samples of `index`."""

    index: Index
    found: Findings
    context_length: int

    @property
    def ok(self) -> bool:
        """Whether every sample can be used whole."""
        return not self.found.causes

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each finding, for a table."""
        found, index = self.found, self.index
        images = found.captions_per_image or {0: 0}
        smallest = found.smallest if found.largest != (0, 0) else (0, 0)
        rows = [
            ("shards", f"{len(index.shards):,}"),
            ("samples", f"{found.samples:,} ({index.sizes.min():,} to {index.sizes.max():,} a shard)"),
            ("captions", f"{found.captions:,} ({min(images)} to {max(images)} an image)"),
            (
                "tokens a caption",
                f"mean {found.mean_tokens:.1f}, median {found.tokens(0.5)}, 95 % {found.tokens(0.95)}, "
                f"longest {found.tokens(1)}",
            ),
            (f"over {self.context_length} tokens", f"{100 * found.share_over(self.context_length):.2f} %"),
            ("image sizes", " to ".join(f"{width} x {height}" for width, height in (smallest, found.largest))),
            ("labels (.cls)", f"{found.labels:,}"),
            ("fingerprint", index.fingerprint[:16]),
        ]
        for cause, count in sorted(found.causes.items()):
            rows.append((f"unusable: {cause}", f"{count:,}, first {found.first[cause]}"))
        return rows


def _examine(index: Index, tokens: CaptionTokens, work: tuple[int, int, int]) -> Findings:
    """Examine samples `start` to `stop` of a shard."""
    shard, start, stop = work
    found = Findings(samples=stop - start)
    reader = SampleReader(index)
    for sample in range(start, stop):
        entry = index.entry(sample)
        where = f"{index.shards[shard].shard.name}: {entry.key}"
        found.labels += entry.label >= 0
        try:
            image = to_rgb(open_image(reader.image(entry)))
            found.size(image.width, image.height)
            captions = reader.captions(entry)
        except Unusable as error:
            found.fault(error.cause, f"{where}: {error}")
            continue
        said = usable(captions)
        if len(said) < len(captions) or not said:
            found.fault("caption", f"{where}: {'an empty caption' if captions else 'it has no caption'}")
        found.captions_per_image[len(said)] += 1
        for caption in said:
            found.lengths[min(tokens.length(caption), _LONGEST)] += 1
    return found


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
    """Read every sample once, with `workers` processes (default: one per CPU; one in all for few samples).

    Raises DataError for what no index can be built from: a missing or compressed shard, no sample at all.
    """
    index = open_index(patterns, base, index_dir, captions_csv)
    examine = partial(_examine, index, CaptionTokens(context_length))
    workers = (os.cpu_count() or 1 if len(index) > 4 * _CHUNK else 1) if workers is None else workers
    works = [
        (shard, first, min(first + _CHUNK, end))
        for shard, (start, end) in enumerate(zip(index.starts.tolist(), index.ends.tolist(), strict=True))
        for first in range(start, end, _CHUNK)
    ]
    total = Findings()
    for part in _run(examine, works, workers):
        total.add(part)
        if progress:
            progress(total.samples, len(index))
    for shard in index.shards:
        for cause, count in shard.dropped.items():
            total.fault(cause, f"{shard.shard.name}: {shard.first[cause]}", count)
    return CheckReport(index, total, context_length)


def _run(
    examine: Callable[[tuple[int, int, int]], Findings], works: list[tuple[int, int, int]], workers: int
) -> Iterator[Findings]:
    if workers < 2:
        yield from map(examine, works)
        return
    # `examine` reaches the workers through the fork: the tokenizer in it cannot be pickled.
    with process_pool(workers, initializer=_begin, initargs=(examine,)) as pool:
        yield from pool.map(_examine_here, works)


_in_worker: list[Callable[[tuple[int, int, int]], Findings]] = []


def _begin(examine: Callable[[tuple[int, int, int]], Findings]) -> None:
    _in_worker[:] = [examine]


def _examine_here(work: tuple[int, int, int]) -> Findings:
    return _in_worker[0](work)
