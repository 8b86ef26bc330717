"""Which samples, captions and crops a step sees: pure functions of (seed, epoch, ...).

Only the raw words of a counter-based generator and of a hash are used: other versions of a library, and other numbers
of workers or ranks, give the same order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""

_EIGHT_WORDS = struct.Struct("<8Q")
_UNIT = 2.0**-53


def _words(seed: int, epoch: int, purpose: str, key: str, counter: int) -> tuple[int, ...]:
    """Eight uniform 64-bit words."""
    name = f"{seed}\0{epoch}\0{purpose}\0{counter}\0{key}"
    return _EIGHT_WORDS.unpack(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=64).digest())


class EpochOrder:
    """A permutation of all sample ids of an epoch, of which one window is in memory at a time.

    Shards are permuted, then the samples within each window of `window` successive shards. So reading stays nearly
    sequential. `order[first:last]` gives ids, int64. Raises ValueError where `window` is below 1.
    """

    def __init__(self, seed: int, epoch: int, shard_sizes: Sequence[int] | NDArray[np.int64], window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._key = int.from_bytes(blake2b(f"{seed}\0{epoch}\0order".encode(), digest_size=16).digest(), "little")
        self._shards = np.argsort(self._random(0, len(self._sizes)), kind="stable")
        self._window = window
        firsts = np.arange(0, len(self._sizes), window)
        self._ends = np.cumsum(np.add.reduceat(self._sizes[self._shards], firsts) if len(firsts) else firsts)
        self._ready = -1
        self._ids = np.empty(0, np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, part: slice) -> NDArray[np.int64]:
        first, last, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"the order has no slices with a step; got {step}")
        pieces = []
        while first < last:
            window = int(self._ends.searchsorted(first, side="right"))
            end = int(self._ends[window])
            ids = self._window_ids(window)
            start = end - len(ids)
            pieces.append(ids[first - start : last - start])
            first = end
        # A copy: a slice of a window would keep the whole window in memory while a worker's queue holds it.
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _window_ids(self, window: int) -> NDArray[np.int64]:
        if window != self._ready:
            chosen = self._shards[window * self._window : (window + 1) * self._window]
            starts, sizes = self._starts[chosen], self._sizes[chosen]
            ids = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
            # One stream of words serves the shards and all windows in turn, so a window's first word is known.
            words = self._random(len(self._sizes) + int(self._ends[window]) - len(ids), len(ids))
            self._ready, self._ids = window, ids[np.argsort(words, kind="stable")]
        return self._ids

    def _random(self, first: int, count: int) -> NDArray[np.uint64]:
        """`count` words of the epoch's stream, beginning with number `first`."""
        source = np.random.Philox(key=self._key).advance(first // 4)  # the counter moves once for four words
        return source.random_raw(first % 4 + count)[first % 4 :]


@dataclass(frozen=True)
class Mixture:
    """What an epoch has of several sets: of weight w, each sample floor(w) times, and a share w - floor(w) once more.

    These shares rotate: in each epoch a shard goes on where it stopped in the epoch before. So a sample is seen w times
    an epoch on average, and a set of weight 1 as without weights.

    Each array has an item for each copy of a shard. shards: its number. copies: how often the epoch has the shard
    before. sizes: samples of it in an epoch.
    """

    shards: NDArray[np.int64]
    copies: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, sets: Sequence[tuple[float, NDArray[np.int64]]]) -> Mixture:
        """The mixture of sets with their weights and the sizes of their shards, which are numbered through all sets."""
        parts: list[tuple[NDArray[np.int64], int, NDArray[np.int64]]] = []
        first = 0
        for weight, sizes in sets:
            numbers, whole = np.arange(first, first + len(sizes)), int(weight)
            parts += [(numbers, copy, sizes) for copy in range(whole)]
            if weight > whole:
                # Rounded sums: the parts of small shards add up to the share of the set.
                ends = np.rint((weight - whole) * np.cumsum(sizes)).astype(np.int64)
                parts.append((numbers, whole, np.diff(ends, prepend=0)))
            first += len(sizes)
        return cls(
            np.concatenate([numbers for numbers, _, _ in parts]),
            np.concatenate([np.full(len(numbers), copy) for numbers, copy, _ in parts]),
            np.concatenate([sizes for _, _, sizes in parts]),
        )

    def find(self, epoch: int, places: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at `places` of an epoch, which count the samples of all copies; `sizes` are those of all shards.

        The sample s of n is s + c n where it is that of copy c.
        """
        ends = np.cumsum(self.sizes)
        at = ends.searchsorted(places, side="right")
        shards, taken = self.shards[at], self.sizes[at]
        within = (places - ends[at] + taken + epoch * taken) % sizes[shards]
        starts: NDArray[np.int64] = (np.cumsum(sizes) - sizes)[shards]
        return starts + within + self.copies[at] * int(sizes.sum())


def caption_choice(seed: int, epoch: int, key: str, n: int, m: int) -> list[int]:
    """`m` of `n` caption ids, uniform and without replacement; with replacement where `n` is below `m`.

    Raises ValueError where there is no caption.
    """
    if n < 1:
        raise ValueError(f"sample {key} has no captions")
    words: list[int] = []
    for counter in range((m + 7) // 8):
        words.extend(_words(seed, epoch, "caption", key, counter))
    if n < m:
        return [word * n >> 64 for word in words[:m]]
    pool = list(range(n))
    for place in range(m):
        other = place + (words[place] * (n - place) >> 64)
        pool[place], pool[other] = pool[other], pool[place]
    return pool[:m]


def crop_box(
    seed: int,
    epoch: int,
    key: str,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A box as torchvision's RandomResizedCrop draws it: area uniform in `scale`, aspect log-uniform in `ratio`.

    After ten attempts that do not fit, the largest central box within `ratio`.
    """
    area = width * height
    words: tuple[int, ...] = ()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        if attempt % 2 == 0:
            words = _words(seed, epoch, "crop", key, attempt // 2)
        first, second, third, fourth = words[4:] if attempt % 2 else words[:4]
        target = area * (scale[0] + (scale[1] - scale[0]) * ((first >> 11) * _UNIT))
        aspect = math.exp(low + (high - low) * ((second >> 11) * _UNIT))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = third * (width - w + 1) >> 64, fourth * (height - h + 1) >> 64
            return left, top, left + w, top + h
    w, h = width, height
    if width < ratio[0] * height:
        h = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class Change(NamedTuple):
    """How the pixels of an image change after the crop.

    jitter: places among brightness, contrast, saturation and hue, with a factor (or the turn of the hue), in the order
    in which they are applied.
    """

    flip: bool
    jitter: tuple[tuple[int, float], ...]
    grey: bool


def image_change(
    seed: int, epoch: int, key: str, flip: float, strengths: Sequence[float], jitter: float, grey: float
) -> Change:
    """A change as torchvision's RandomHorizontalFlip, ColorJitter (for a share `jitter` of images) and RandomGrayscale
    draw it. `strengths` are those of brightness, contrast, saturation and hue; 0 leaves the pixels alone.

    Each choice has a word of its own, so no setting has an effect on what others draw.
    """
    drawn, *words = _words(seed, epoch, "augment", key, 0)
    flipped, jittered, greyed, *places = ((word >> 11) * _UNIT for word in words)
    factors: list[tuple[int, float]] = []
    if jittered < jitter:
        for place, (strength, at) in enumerate(zip(strengths, places, strict=True)):
            low, high = (-strength, strength) if place == 3 else (max(0.0, 1 - strength), 1 + strength)
            if strength:
                factors.append((place, low + (high - low) * at))
    ordered = []
    for left in range(len(factors), 0, -1):
        place, drawn = divmod(drawn * left, 1 << 64)
        ordered.append(factors.pop(place))
    return Change(flipped < flip, tuple(ordered), greyed < grey)


def substitute(seed: int, epoch: int, key: str, attempt: int, n: int) -> int:
    """The id, below `n`, of the sample that replaces the unusable sample `key` at this attempt."""
    return _words(seed, epoch, "substitute", key, attempt)[0] * n >> 64
