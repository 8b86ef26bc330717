"""Findings of a check."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A number and its allowed range, `least` to `most`."""

    what: str
    value: float
    most: float
    least: float = -math.inf

    @property
    def passed(self) -> bool:
        """Whether the value is in its range; False for nan."""
        return self.least <= self.value <= self.most


def holds(what: str, true: bool) -> Finding:
    """A yes-or-no finding: its value is 0 if `true`, else 1."""
    return Finding(what, 0.0 if true else 1.0, 0.0)


def largest(values: Iterable[float]) -> float:
    """The largest value, or nan (which fails) if there is none or one is not finite: `max` can skip a nan."""
    found = list(values)
    return max(found) if found and all(map(math.isfinite, found)) else math.nan
