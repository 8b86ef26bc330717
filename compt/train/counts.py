"""What a training loop counts: over the whole run, and since its last log line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compt.data.batch import SKIPPED
from compt.dist import collectives as dist
from compt.train.teacher_cache import Looked

_OWN = ("few_captions", "text_tokens", "teacher_hits", "teacher_misses", "teacher_tokens")
"""Counts of each rank alone; their sums over ranks survive a resume."""


@dataclass
class Counts:
    """What adds up over a run and survives a resume.

    `few_captions`, `text_tokens`, `skipped` and what the teacher's cache counts are this rank's own. `moments_anew`:
    steps after which an engine of another kind took over only the weights.
    """

    step: int = 0
    device_seconds: float = 0.0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    few_captions: int = 0
    text_tokens: int = 0
    teacher_hits: int = 0
    teacher_misses: int = 0
    teacher_tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    moments_anew: list[int] = field(default_factory=list)

    def to_state(self) -> dict[str, Any]:
        """Plain values over all ranks."""
        sums = {name: int(dist.all_reduce_sum(getattr(self, name))) for name in _OWN}
        return {**self.__dict__, **sums, "skipped": over_ranks(self.skipped)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Counts:
        """Read what `to_state` gave. Rank 0 takes the sums over ranks, the others start from zero."""
        counts = cls(**{**state, "skipped": Counter(state["skipped"])})
        if not dist.is_main():
            for name in _OWN:
                setattr(counts, name, 0)
            counts.skipped.clear()
        return counts

    def add(self, looked: Looked) -> int:
        """Count what was looked for in the teacher's cache. Returns the hits."""
        self.teacher_hits += looked.hits
        self.teacher_misses += looked.misses
        self.teacher_tokens += looked.tokens
        return looked.hits

    def looked_over_ranks(self) -> Looked:
        """The sums over ranks of what `add` counted; all ranks call it."""
        own = (self.teacher_hits, self.teacher_misses, self.teacher_tokens)
        return Looked(*(int(dist.all_reduce_sum(value)) for value in own))


@dataclass
class Window:
    """What happened since the last log line.

    `seconds` of all `steps`; of these `waited` for data of any rank, `own_wait` for this rank's own. `text_tokens` are
    the token positions that this rank computed for its `captions`; of them the teacher's cache had `teacher_hits`.
    """

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    own_wait: float = 0.0
    captions: int = 0
    text_tokens: int = 0
    teacher_hits: int = 0


def over_ranks(counts: Counter[str]) -> dict[str, int]:
    """The sums over ranks of unusable samples and captions, by cause; all ranks call it."""
    return {cause: int(dist.all_reduce_sum(counts[cause])) for cause in SKIPPED}
