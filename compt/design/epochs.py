"""How many epochs a link needs to match its individually trained baseline: a straight line and one factor.

For one link, with f = epochs / baseline epochs,

    log f = a + b log2(student / teacher) + c (position - 1) + d log2(images / images of CC3M),   f at most 1

The line is fitted by least squares to the nine links that the paper (CoM-PT) publishes with distillation. The range of
a prediction is a factor both ways: the largest error over these links, each predicted from the other eight. Two
published links pass on weights only: they shift the line for such links, and their distance from it widens the range.

Your own runs come first. A link that you measured takes your number; for other links the line is shifted by the median
of what your links needed over what it says. That f does not depend on the baseline's epochs is an assumption, which
figure 9(a) supports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.cost.paper import CAPTIONS_PER_IMAGE, FIGURE_8_EPOCHS, FIGURE_9B_EXTRAPOLATED, IMAGES, TABLE_2, TABLE_4A
from compt.design.curves import LinkCurve, LinkEpochs, Match
from compt.design.sizes import halvings, log2_size, log2_smallest
from compt.models.presets import PRESETS

Floats = NDArray[np.float64]

FEATURES = ("constant", "size step", "position", "number of images")
"""Sizes are parameters as Table G counts them."""
START_FACTOR = 2.0
"""Each halving of a teacher below the smallest size that fits the data multiplies its student's epochs by this."""


@dataclass(frozen=True)
class Range:
    """A predicted value and the ends of its range."""

    middle: float
    low: float
    high: float


def paper_matches() -> list[Match]:
    """Every published number of epochs: figure 8, the links of table 2, and table 4(a)'s links without distillation.

    Table 2's numbers were enough, perhaps more than needed. For the ViTs on CC3M figure 8 has the least numbers.
    """
    found = []
    for block, family in TABLE_2.items():
        for at in range(1, len(family.models)):
            student, teacher = PRESETS[family.models[at]], PRESETS[family.models[at - 1]]
            least = FIGURE_8_EPOCHS[student.name] if block == "cc3m_vit" else None
            source = "figure 8, interpolated" if least else f"table 2, allotted ({block})"
            link = (student, teacher, at, IMAGES[family.dataset], family.baseline_epochs)
            found.append(Match(*link, epochs=least or float(family.chain_epochs[at]), source=source))
    for row in TABLE_4A:
        if row.method == "IWI":
            link = (PRESETS[row.model], PRESETS[row.start], 1, IMAGES["cc3m"], 128)
            found.append(Match(*link, False, epochs=row.epochs, source="table 4(a), weights only"))
    return found


def features(log2_student: ArrayLike, log2_teacher: ArrayLike, position: ArrayLike, images: ArrayLike) -> Floats:
    """The features [..., 4] of links, broadcast over the arguments."""
    step = np.asarray(log2_student, dtype=np.float64) - np.asarray(log2_teacher, dtype=np.float64)
    columns = (1.0, step, np.asarray(position) - 1.0, np.log2(np.asarray(images) / IMAGES["cc3m"]))
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def _row(link: LinkEpochs) -> Floats:
    return features(log2_size(link.student), log2_size(link.teacher), link.position, link.images)


def leave_one_out(rows: Floats, values: Floats) -> Floats:
    """Error of each value [n], predicted by least squares from the other rows [n, k]: residual / (1 - leverage)."""
    inverse = np.linalg.pinv(rows)
    leverage = np.einsum("ij,ji->i", rows, inverse)
    return np.asarray((values - rows @ (inverse @ values)) / (1 - leverage))


@dataclass(frozen=True)
class EpochModel:
    """The fitted line. `points` are published, `own` the curves of a user's runs.

    `errors` are the leave-one-out errors of the fit. `moves` are (shift, spread) for links without and with features,
    in logarithms of f: how far the line is shifted, and how far the range reaches to both sides.
    """

    points: tuple[Match, ...]
    own: tuple[LinkCurve, ...]
    coefficients: Floats
    errors: Floats
    moves: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))

    @classmethod
    def fit(cls, matches: Sequence[Match], own: Sequence[LinkCurve] = ()) -> EpochModel:
        """Fit the line to published `matches`, and shift it by the matches in `own`, where there are any."""
        points = tuple(match for match in matches if match.distilled)
        rows = np.array([_row(match) for match in points])
        values = np.array([math.log(match.epochs / match.baseline_epochs) for match in points])
        errors = leave_one_out(rows, values)
        line = cls(points, tuple(own), np.linalg.lstsq(rows, values)[0], errors)
        without = line.matches(False) or [match for match in matches if not match.distilled]
        return replace(line, moves=(line._moved(without), line._moved(line.matches(True))))

    def matches(self, distilled: bool) -> list[Match]:
        """The user's own matches of links with or without features: those of one kind say nothing of the other."""
        return [curve.match for curve in self.own if curve.match is not None and curve.match.distilled == distilled]

    def _moved(self, matches: Sequence[Match]) -> tuple[float, float]:
        """(shift, spread) of the line that `matches` ask for; none without them."""
        logs = np.array([math.log(match.epochs / match.baseline_epochs) - self._log(match) for match in matches])
        shift = float(np.median(logs)) if matches else 0.0
        return shift, float(np.abs([*self.errors, *(logs - shift)]).max())

    def log_fraction(
        self, log2_student: ArrayLike, log2_teacher: ArrayLike, position: ArrayLike, images: float, distilled: bool
    ) -> Floats:
        """log f of links, not capped at 0, broadcast over the arguments; measured links are not looked up.

        Leaving the published range never saves epochs: a smaller step, a later position and fewer images count as the
        least, the last and the fewest that are published. Otherwise the line goes on.
        """
        rows, (low, high) = features(log2_student, log2_teacher, position, images), self._edges()
        held = np.stack(
            [rows[..., 0], rows[..., 1].clip(low[1]), rows[..., 2].clip(None, high[2]), rows[..., 3].clip(low[3])], -1
        )
        start = math.log(START_FACTOR) * halvings(log2_teacher, images, self.smallest(images, distilled))
        return np.asarray(held @ self.coefficients + start + self.moves[distilled][0])

    def smallest(self, images: float, distilled: bool = True) -> float:
        """The base-2 logarithm of the smallest teacher without a penalty: by the rule, or one that was measured.

        Only links of the same kind count. A measured link shows what its teacher's size does. With the penalty in its
        prediction as well, the line would be shifted down for all links whose teachers have none.
        """
        measured = [log2_size(match.teacher) for match in self.matches(distilled)]
        return min([log2_smallest(images), *measured])

    def _edges(self) -> tuple[Floats, Floats]:
        rows = np.array([_row(match) for match in self.points])
        return rows.min(axis=0), rows.max(axis=0)

    def _log(self, link: LinkEpochs) -> float:
        sizes = (log2_size(link.student), log2_size(link.teacher))
        return float(self.log_fraction(*sizes, link.position, link.images, link.distilled))

    def factor(self, distilled: bool = True) -> float:
        """By how much the range reaches to both sides."""
        return math.exp(self.moves[distilled][1])

    def measured(self, link: LinkEpochs) -> list[LinkCurve]:
        """The user's own curves of this very link: matches before bounds, then the same position, then the latest."""
        same = [curve for curve in reversed(self.own) if curve.link is not None and curve.link.key == link.key]
        return sorted(same, key=lambda one: (one.match is None, one.position != link.position))

    def match(self, link: LinkEpochs) -> Match | None:
        """The user's own match of this very link."""
        return next((curve.match for curve in self.measured(link)), None)

    def predict(self, link: LinkEpochs) -> Range:
        """Epochs that `link` needs, at most those of its baseline.

        Of a link with known bounds the range is moved to lie within them. Where they leave too little room for it, the
        lower bound holds: too few epochs cost accuracy.
        """
        factor, match, curves = self.factor(link.distilled), self.match(link), self.measured(link)
        middle = link.baseline_epochs * math.exp(self._log(link))
        middle = min([middle, *(curve.at_most / factor for curve in curves if curve.at_most is not None)])
        middle = max([middle, *(curve.more_than * factor for curve in curves if curve.more_than is not None)])
        found = Range(middle, middle / factor, middle * factor)
        if match is not None:
            middle = match.epochs
            found = Range(middle, match.low or middle / factor, match.high or middle * factor)
        most = link.baseline_epochs
        return Range(min(found.middle, most), min(found.low, most), min(found.high, most))

    def outside(self, link: LinkEpochs) -> list[str]:
        """Names of the features of `link` that no published link has; none for a link that was measured."""
        row, (low, high) = _row(link), self._edges()
        if self.match(link) is not None:
            return []
        return [FEATURES[at] for at in range(1, len(row)) if not low[at] - 1e-6 <= row[at] <= high[at] + 1e-6]

    def caution(self, images: int) -> str | None:
        """What to know about plans for more images than are published; None for no more."""
        most = max(match.images for match in self.points)
        if images <= most:
            return None
        pairs, speedup = next(iter(FIGURE_9B_EXTRAPOLATED.items()))
        return (
            f"{images:,} images are beyond the {most:,} of the largest published data set. There such plans are far "
            f"too pessimistic: at {pairs / CAPTIONS_PER_IMAGE:,.0f} images ({pairs / 1e9:g} billion pairs) the paper "
            f"extrapolates {speedup:g}x, where the line gives no saving: train a pair, use --runs."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; models by name."""
        return {
            "features": list(FEATURES),
            "coefficients": self.coefficients.tolist(),
            "shift": {"distilled": self.moves[True][0], "weights_only": self.moves[False][0]},
            "range_factor": {"distilled": self.factor(True), "weights_only": self.factor(False)},
            "points": [
                {**asdict(match), "student": match.student.name, "teacher": match.teacher.name} for match in self.points
            ],
        }
