"""What a check finds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A number and the range it has to lie in."""

    what: str
    value: float
    most: float
    least: float = -math.inf

    @property
    def passed(self) -> bool:
        """False for a number that is none, too."""
        return self.least <= self.value <= self.most


def holds(what: str, true: bool) -> Finding:
    """A finding that is a yes or a no: 0 where it is as it should be."""
    return Finding(what, 0.0 if true else 1.0, 0.0)


def largest(values: Iterable[float]) -> float:
    """The largest of them; nan, which fails, where there are none or one is not finite: `max` may pass over a nan."""
    found = list(values)
    return max(found) if found and all(map(math.isfinite, found)) else math.nan
