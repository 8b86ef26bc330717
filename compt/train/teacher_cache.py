"""The teacher's features of captions, kept so that no caption is computed twice.

Captions are fixed texts and the teacher is frozen, so these features never change. Those of images change with every
crop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compt.cost.memory import CAPTION_BYTES, CAPTION_TOKEN
from compt.errors import ConfigError
from compt.models.clip import caption_lengths, padded_tokens
from compt.models.pixels import sent


class Looked(NamedTuple):
    """Captions that were found and not found, and the token positions that were computed for the latter."""

    hits: int = 0
    misses: int = 0
    tokens: int = 0


class CaptionFeatures:
    """An exact cache of features [width] of `dtype`, in the CPU's memory, of at most `limit` bytes for this process.

    The key of a caption is its token ids, which a dict compares: two captions are never confused. A full
    cache keeps what it has, and the rest is computed every time. Features equal those that are computed up to rounding,
    as the teacher then computes other captions together. `buckets` as in `ClipModel.encode_captions`. Raises
    ConfigError where the machine does not give as much memory.
    """

    def __init__(self, limit: int, width: int, dtype: torch.dtype, buckets: int = 1) -> None:
        self._left = limit
        self._each = width * dtype.itemsize + CAPTION_BYTES
        try:
            # The system gives memory when it is first written.
            self._rows = torch.empty(limit // self._each, width, dtype=dtype)
        except RuntimeError:
            raise ConfigError(
                f"engine.teacher_cache = {limit}: this machine does not give a process as many bytes; write fewer"
            ) from None
        self._places: dict[bytes, int] = {}
        self._coming: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._buckets = buckets
        self._looked = Looked()

    def of(self, tokens: Tensor, known: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The features [N, width] of `tokens` int64 [N, L]; `known` are the same tokens on the CPU.

        `compute(tokens, lengths)` gives the features of those that are not kept; `lengths` are on the CPU.
        """
        self._settle()
        lengths = caption_lengths(known)
        keys = _keys(known, lengths)
        places = torch.tensor([self._places.get(key, -1) for key in keys])
        missing = (places < 0).nonzero().flatten()
        computed = padded_tokens(lengths[missing], self._buckets) if len(missing) else 0
        now = Looked(len(keys) - len(missing), len(missing), computed)
        self._looked = Looked(*(before + one for before, one in zip(self._looked, now, strict=True)))
        if len(missing) == len(keys):
            features = compute(tokens, lengths)
            self._keep(keys, features)
            return features
        found = sent(self._rows.index_select(0, places.clamp(min=0)), tokens.device)
        if len(missing):
            at = sent(missing, tokens.device)
            features = compute(tokens.index_select(0, at), lengths[missing])
            self._keep([keys[place] for place in missing.tolist()], features)
            found.index_copy_(0, at, features)
        return found

    def looked(self) -> Looked:
        """What was looked for since the last call."""
        looked, self._looked = self._looked, Looked()
        return looked

    def _keep(self, keys: list[bytes], features: Tensor) -> None:
        """Keep the features of `keys` as far as there is room; a key that is there twice, once."""
        taken: dict[bytes, int] = {}
        for at, key in enumerate(keys):
            if key in taken:
                continue
            if (bytes_of_it := self._each + len(key)) > self._left:
                break
            self._left -= bytes_of_it
            taken[key] = at
        if not taken:
            return
        first = len(self._places)
        self._places.update(zip(taken, range(first, first + len(taken)), strict=True))
        rows = features.index_select(0, sent(torch.tensor([*taken.values()]), features.device))
        # Into pinned memory, as torch takes it for such a copy. The next look-up waits for it, not this step.
        rows, copied = rows.to("cpu", non_blocking=True), torch.cuda.Event() if rows.is_cuda else None
        if copied is not None:
            copied.record()
        self._coming = first, rows, copied

    def _settle(self) -> None:
        if self._coming is not None:
            first, rows, copied = self._coming
            if copied is not None:
                copied.synchronize()
            self._rows[first : first + len(rows)] = rows
            self._coming = None


def _keys(known: Tensor, lengths: Tensor) -> list[bytes]:
    ids = known.to(torch.int32).numpy().tobytes()
    row = CAPTION_TOKEN * known.shape[1]
    ends = (CAPTION_TOKEN * lengths).tolist()
    return [ids[at * row : at * row + end] for at, end in enumerate(ends)]
