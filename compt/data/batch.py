"""What the loaders hand out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass
class Batch:
    """One rank's share of one step.

    images: uint8 [B, 3, H, W]. tokens: int64 [B, M, T], T the longest caption of the share, zeros after each end.
    skipped: unusable samples and empty captions that were met, by cause. few_captions: images with fewer than M
    captions, for which captions were drawn with replacement.
    """

    images: Tensor
    tokens: Tensor
    keys: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    few_captions: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return replace(self, images=self.images.pin_memory(), tokens=self.tokens.pin_memory())


@dataclass
class EvalBatch:
    """Samples of an evaluation set, each exactly once over all ranks.

    images: uint8 [B, 3, H, W]. ids: their positions in the index. labels: int64 [B] or None. captions: a list an
    image, or None. bad: `shard: key: cause: reason` of each sample that could not be decoded and is missing here.
    """

    images: Tensor
    keys: list[str]
    ids: list[int]
    labels: Tensor | None = None
    captions: list[list[str]] | None = None
    bad: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> EvalBatch:
        """The same batch in page-locked memory."""
        return replace(self, images=self.images.pin_memory())
