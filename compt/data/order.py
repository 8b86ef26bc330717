"""Which samples, captions and crops a step sees: pure functions of (seed, epoch, ...).

Only the raw words of a counter-based generator and of a hash are used: other versions of a library, and other numbers of
workers or ranks, give the same order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from hashlib import blake2b

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


def epoch_order(
    seed: int, epoch: int, shard_sizes: Sequence[int] | NDArray[np.int64], window: int
) -> NDArray[np.int64]:
    """A permutation of all sample ids, [sum(shard_sizes)].

    Shards are permuted, then the samples within each window of `window` successive shards. So reading stays nearly
    sequential. Raises ValueError where `window` is below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else sizes
    key = int.from_bytes(blake2b(f"{seed}\0{epoch}\0order".encode(), digest_size=16).digest(), "little")
    source = np.random.Philox(key=key)
    shards = np.argsort(source.random_raw(len(sizes)), kind="stable")
    order = np.empty(int(sizes.sum()), dtype=np.int64)
    position = 0
    for first in range(0, len(sizes), window):
        chosen = shards[first : first + window]
        ids = np.concatenate([np.arange(starts[shard], starts[shard] + sizes[shard]) for shard in chosen])
        order[position : position + len(ids)] = ids[np.argsort(source.random_raw(len(ids)), kind="stable")]
        position += len(ids)
    return order


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
    """A box with the distribution of torchvision's RandomResizedCrop: area uniform in `scale`, aspect log-uniform in `ratio`.

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


def substitute(seed: int, epoch: int, key: str, attempt: int, n: int) -> int:
    """The id, below `n`, of the sample that replaces the unusable sample `key` at this attempt."""
    return _words(seed, epoch, "substitute", key, attempt)[0] * n >> 64
