"""The batches that the loaders return."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from compt.data.account import CAUSES

SKIPPED = tuple(cause for cause, known in CAUSES.items() if known.unit in ("sample", "caption"))
"""Causes for which training leaves out a sample or a caption; `account.CAUSES` explains them."""


@dataclass
class Batch:
    """One rank's share of one step.

    images: uint8 [B, 3, H, W]. tokens: int64 [B, M, T]: M captions per image, T the length of the longest one here,
    zeros after the end of each. skipped: unusable samples and captions, by cause. few_captions: images with fewer than
    M captions; theirs were drawn with replacement.
    """

    images: Tensor
    tokens: Tensor
    keys: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    few_captions: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory. Images that are on a GPU stay there."""
        images = self.images if self.images.is_cuda else self.images.pin_memory()
        return replace(self, images=images, tokens=self.tokens.pin_memory())


@dataclass
class EvalBatch:
    """Samples of an evaluation set. Over all ranks and batches each sample comes exactly once.

    images: uint8 [B, 3, H, W]. ids: their positions in the index. labels: int64 [B], bool [B, C] where a sample may
    have several of C classes, or None. captions: a list
    per image, or None. bad: `shard: key: cause: reason` of each sample that is missing here because it cannot be used.
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
