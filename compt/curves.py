"""Epochs that a link needs to match its baseline: what was published, and what runs on disk have shown."""

from __future__ import annotations

from dataclasses import dataclass

from compt.presets import ModelSpec


@dataclass(frozen=True)
class Match:
    """A link that reaches the accuracy of its individually trained baseline after `epochs` epochs.

    `position` is 1 for the first model that grows from another one. `images` are those of the training set, and
    `baseline_epochs` what the baseline took. `low` and `high` bound `epochs` where that is known. Without `distilled`
    only the weights were passed on, not the features.
    """

    student: ModelSpec
    teacher: ModelSpec
    position: int
    images: int
    baseline_epochs: float
    epochs: float
    source: str
    low: float | None = None
    high: float | None = None
    distilled: bool = True
