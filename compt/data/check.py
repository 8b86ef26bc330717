"""Check a WebDataset: read every sample, and account for everything that the shards hold."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compt.data.account import CAUSES, UNIT_NAMES, Account
from compt.data.captions import by_column, parse_json
from compt.data.decode import Unusable, open_image, to_rgb
from compt.data.index import Index, open_index
from compt.data.labels import CLASSNAMES, NONE, beside, label_fault, read_classnames, read_label_array
from compt.data.lengths import as_found, store_lengths
from compt.data.remote import Cache, local
from compt.data.samples import SampleReader
from compt.data.scan import KIND_JSON, KIND_TABLE
from compt.data.table import count_columns
from compt.data.tokens import CaptionTokens
from compt.dist.child import process_pool
from compt.errors import DataError
from compt.plan.jobs import make_plan
from compt.recipe.schema import MIN_MATCHED, Recipe

_CHUNK = 500
"""Samples that a worker process checks at a time."""
_LONGEST = 4096
"""Longer captions are counted as this long, in tokens."""
Progress = Callable[[int, int], None]
"""Samples done, samples in all."""


@dataclass
class Findings:
    """What some of the samples hold.

    account: its samples. lengths: captions by their number of tokens, start and end included. smallest, largest: width
    and height in pixels. captions_per_image: images by their number of captions. columns: captions by the field of the
    `.json` that they come from, or `.txt`.
    """

    samples: int = 0
    account: Account = field(default_factory=Account)
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_LONGEST + 1, np.int64))
    smallest: tuple[int, int] = (1 << 30, 1 << 30)
    largest: tuple[int, int] = (0, 0)
    captions_per_image: Counter[int] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)

    def size(self, width: int, height: int) -> None:
        """Note the size of an image."""
        self.smallest = min(self.smallest[0], width), min(self.smallest[1], height)
        self.largest = max(self.largest[0], width), max(self.largest[1], height)

    def add(self, other: Findings) -> None:
        """Add the findings on later samples."""
        self.samples += other.samples
        self.account.add(other.account)
        self.lengths += other.lengths
        if other.largest != (0, 0):
            self.size(*other.smallest)
            self.size(*other.largest)
        self.captions_per_image += other.captions_per_image
        self.columns += other.columns

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
    """The findings on all samples of `index`.

    account: everything that was read. classes: what is known of the class names, "" for a set without class numbers.
    captioned: whether samples need captions; one that has only class numbers can only be classified. table: rows of
    the table of captions, and captions by column.
    """

    index: Index
    found: Findings
    account: Account
    classes: str
    captioned: bool
    context_length: int
    table: tuple[int, Counter[str]] = (0, Counter())

    def usable(self, max_bad_share: float) -> bool:
        """Whether a run would go on, with this share of unusable samples or, without captions, class numbers."""
        return self.account.lost_share(self._judged(max_bad_share)) <= max_bad_share

    def _judged(self, max_bad_share: float) -> str:
        """The unit that decides."""
        return "label" if not self.captioned and self.account.lost_share("label") > max_bad_share else "sample"

    def title(self, max_bad_share: float) -> str:
        """The verdict."""
        unit = self._judged(max_bad_share)
        lost, read = self.account.lost(unit), self.account.read(unit)
        counts = f"{lost:,} of {read:,} {'class numbers' if unit == 'label' else 'samples'} are unusable"
        if not self.usable(max_bad_share):
            return f"Cannot be used: {counts} ({100 * lost / read:.3g} %)"
        if not self.account.faults:
            return "Every sample can be used"
        units = dict.fromkeys(CAUSES[cause].unit for cause in self.account.faults)
        parts = [f"{self.account.lost(unit):,} of {self.account.read(unit):,} {UNIT_NAMES[unit]}" for unit in units]
        return f"Can be used, but not all of it. Not used: {', '.join(parts)}"

    def to_json(self, max_bad_share: float) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "usable": self.usable(max_bad_share),
            "judged_by": "captions" if self.captioned else "labels",
            "max_bad_share": max_bad_share,
            "fingerprint": self.index.fingerprint,
            "shards": len(self.index.shards),
            "samples": self.found.samples,
            "labels": self.account.used["label"],
            "captions": self.found.captions,
            "mean_tokens": self.found.mean_tokens,
            "captions_per_image": {str(n): images for n, images in sorted(self.found.captions_per_image.items())},
            "captions_by_column": dict(self.found.columns),
            "table": {"rows": self.table[0], "captions_by_column": dict(self.table[1])} if self.table[0] else None,
            "account": self.account.to_json(),
        }

    def compare(self, recipe: Recipe, images: int) -> list[tuple[str, float | None, float]]:
        """What a recipe assumes (None: the whole context), and what was found; `images` are those of an epoch.

        Images, captions of an image that are drawn and that are there, tokens computed for a caption, MACs of all that
        the recipe trains. Raises ConfigError.
        """
        found = as_found(recipe, images, self.found.lengths if self.found.captions else None)
        tokens, padded = (each.data.caption_tokens for each in (recipe, found))
        if isinstance(tokens, dict):
            tokens = sum(length * share for length, share in tokens.items()) / sum(tokens.values())
        before, after = (
            sum(job.cost.total_macs for job in make_plan(each).jobs if job.same_as is None) for each in (recipe, found)
        )
        return [
            ("images of an epoch", recipe.data.images, images),
            ("captions of an image", recipe.data.captions, self.found.captions / max(self.found.samples, 1)),
            ("tokens computed for a caption", tokens, padded if isinstance(padded, float) else 0),
            ("MACs", before, after),
        ]

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each finding, for a table."""
        found, index = self.found, self.index
        images = found.captions_per_image or {0: 0}
        smallest = found.smallest if found.largest != (0, 0) else (0, 0)
        return [
            ("shards", f"{len(index.shards):,}"),
            ("samples", f"{found.samples:,} ({_span(index.sizes.min(), index.sizes.max())} per shard)"),
            ("captions", f"{found.captions:,} usable ({_span(min(images), max(images))} per image)"),
            *_by_column("captions per image", found.samples, found.columns),
            *_by_column("captions per row of the table", *self.table),
            (
                "tokens per caption",
                (
                    f"mean {found.mean_tokens:.1f}, median {found.tokens(0.5)}, 95 % {found.tokens(0.95)}, "
                    f"longest {found.tokens(1)}"
                ),
            ),
            (f"over {self.context_length} tokens", f"{100 * found.share_over(self.context_length):.2f} %"),
            (
                "image sizes",
                " to ".join(dict.fromkeys(f"{width} x {height}" for width, height in (smallest, found.largest))),
            ),
            *([("class names", self.classes)] if self.classes else []),
            ("fingerprint", index.fingerprint[:16]),
        ]


def _span(least: int, most: int) -> str:
    """Both ends of a range, or the one number that both are."""
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _by_column(name: str, count: int, columns: Counter[str]) -> list[tuple[str, str]]:
    """A line with the mean number of captions of each column."""
    shown = ", ".join(f"{column} {found / count:.3g}" for column, found in columns.items())
    return [(name, shown)] if shown else []


def _examine(
    index: Index,
    tokens: CaptionTokens,
    captioned: bool,
    names: Sequence[str] | None,
    from_one: bool,
    several: bool,
    work: tuple[int, int, int],
) -> Findings:
    """Examine samples `start` to `stop` of a shard.

    from_one: class numbers are too large by one. several: samples may have several classes.
    """
    shard, start, stop = work
    found = Findings(samples=stop - start)
    reader = SampleReader(index)
    # A label and an image are counted apart: a sample may lose one and keep the other.
    with local(index.shards[shard]):
        for sample in range(start, stop):
            entry = index.entry(sample)
            where = f"{index.shards[shard].name}: {entry.key}"
            texts, by = list[str](), dict[str, list[str]]()
            if names is not None:
                label = read_label_array(reader.json(entry)) if several else entry.label
                if cause := label_fault(label, len(names), from_one):
                    found.account.lose(cause, where)
                else:
                    found.account.used["label"] += 1
            try:
                if captioned and entry.text_kind == KIND_JSON:
                    by = by_column(parse_json(reader.text(entry)) or {}, index.columns)
                    texts = [text for column in by.values() for text in column]
                if captioned and not texts:  # this says why there is none
                    texts = reader.captions(entry).texts
                image = to_rgb(open_image(reader.image(entry)))
                found.size(image.width, image.height)
                found.account.used["sample"] += 1
            except Unusable as error:
                found.account.lose(error.cause, f"{where}: {error}")
            found.captions_per_image[len(texts)] += 1
            for caption in texts:
                found.lengths[min(tokens.length(caption), _LONGEST)] += 1
            if texts and entry.text_kind < KIND_TABLE:
                found.columns.update({column: len(captions) for column, captions in (by or {".txt": texts}).items()})
    return found


def _class_names(index: Index, captioned: bool) -> tuple[list[str], str]:
    """The class names beside the shards, none without a file of them, and what is known of them.

    Raises DataError, as evaluation does, for a damaged file, unless training can use the set.
    """
    path = beside(index.places, CLASSNAMES)
    if path is None:
        return [], f"no {CLASSNAMES} beside the shards"
    try:
        names = read_classnames(path)
    except DataError as error:
        if not captioned:
            raise
        return [], str(error)
    return names, f"{len(names):,}"


def check(
    shards: str | Sequence[str] | Index,
    base: Path = Path(),
    *,
    index_dir: Path | None = None,
    captions_csv: Path | None = None,
    columns: Sequence[str] = (),
    min_matched: float = MIN_MATCHED,
    context_length: int = 77,
    workers: int | None = None,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> CheckReport:
    """Read every sample once, with `workers` processes (default: one per CPU; one in all for few samples).

    shards: patterns of shards, which the options describe as in `open_index`, or the index of a recipe. Raises
    DataError for what no index can be built from: a missing or compressed shard, no sample at all.
    """
    index = (
        shards
        if isinstance(shards, Index)
        else open_index(shards, base, index_dir, captions_csv, None, columns, min_matched, cache)
    )
    labels = set[int]().union(*(np.unique(part).tolist() for part in index.column("label")))
    kinds, others = (np.concatenate([*index.column(name)]) for name in ("text_kind", "json_size"))
    several = (
        labels == {NONE} and not kinds.any() and bool(others.any()) and beside(index.places, CLASSNAMES) is not None
    )
    labelled = bool(labels - {NONE}) or several
    captioned = not labelled or index.account.used["caption"] > 0
    names, said = _class_names(index, captioned) if labelled else (None, "")
    from_one = bool(names) and 0 not in labels and len(names or ()) in labels
    examine = partial(_examine, index, CaptionTokens(context_length), captioned, names, from_one, several)
    workers = (os.cpu_count() or 1 if len(index) > 4 * _CHUNK else 1) if workers is None else workers
    works = (
        (shard, first, min(first + _CHUNK, end))
        for shard, (start, end) in enumerate(zip(index.starts.tolist(), index.ends.tolist(), strict=True))
        for first in range(start, end, _CHUNK)
    )
    total = Findings()
    for part in _run(examine, works, workers):
        total.add(part)
        if progress:
            progress(total.samples, len(index))
    store_lengths(index, index_dir, total.lengths)  # compt plan reads them
    account = Account()
    account.add(index.account)
    account.add(total.account)
    rows, by = 0, Counter[str]()
    for path in {table.path: None for table in index.tables if table}:
        more, counts = count_columns(path, index.columns)
        rows, by = rows + more, by + counts
    return CheckReport(index, total, account, said, captioned, context_length, (rows, by))


def _run(
    examine: Callable[[tuple[int, int, int]], Findings], works: Iterator[tuple[int, int, int]], workers: int
) -> Iterator[Findings]:
    if workers < 2:
        yield from map(examine, works)
        return
    # `examine` reaches the workers through the fork: the tokenizer in it cannot be pickled.
    with process_pool(workers, _begin, (examine,)) as pool:
        while some := list(islice(works, 64 * workers)):  # the pool would take all at once
            yield from pool.map(_examine_here, some)


_in_worker: list[Callable[[tuple[int, int, int]], Findings]] = []


def _begin(examine: Callable[[tuple[int, int, int]], Findings]) -> None:
    _in_worker[:] = [examine]


def _examine_here(work: tuple[int, int, int]) -> Findings:
    return _in_worker[0](work)
