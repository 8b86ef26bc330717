"""How many epochs a link needs to match its individually trained baseline, and how sure that is. No torch in here.

The model is a Bayesian linear regression. For one link, with f = epochs / baseline epochs,

    log f = features . coefficients + noise + start,    f at most 1 (a link is no worse than training from scratch)

The coefficients and the variance of the noise have a normal-inverse-gamma prior (`PRIOR`), which data turn into one of
the same form (Bishop, Pattern Recognition and Machine Learning, 3.3; Murphy, Machine Learning, 7.6.3). Its predictive
is a Student t. `start` is a separate term, a stated prior that no published number pins down: `StartPrior`.

That f does not depend on the baseline's epochs is an assumption; figure 9(a) of the paper (CoM-PT) supports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.curves import Match
from compt.errors import ConfigError
from compt.macs import paper_parameters
from compt.paper import FIGURE_8_EPOCHS, IMAGES, TABLE_2, TABLE_4A
from compt.presets import PRESETS, ModelSpec

Floats = NDArray[np.float64]

FEATURES = ("intercept", "log2 size ratio", "position - 1", "log2 images", "log2 predecessor", "weights only")
"""Sizes are parameters as Table G counts them; images are in units of CC3M, the predecessor's size in ViT-T's."""

REFERENCE_IMAGES = IMAGES["cc3m"]
REFERENCE_SIZE = paper_parameters(PRESETS["vit_t16"])

PRIOR_MEANS = np.array([math.log(0.25), 0.2, -0.1, 0.0, -0.1, 0.4])
PRIOR_SPREADS = np.array([1.0, 0.2, 0.15, 0.25, 0.15, 0.4])
"""Means and standard deviations of the coefficients, in logarithms of f. A link takes a quarter of the epochs, within a
factor of e; a step twice as large takes a fifth more (the paper's second rule gives the sign); each link before it, and
each doubling of the predecessor, takes a tenth off (the third rule); nothing is known of the data; without distillation
half as much again (table 4b gives the sign)."""
NOISE = 0.12
"""Standard deviation of log f that is expected before data: about one epoch in eight, as interpolation leaves it."""
NOISE_WEIGHT = 3.0
"""Shape of the prior of the noise's variance: what some six points would say."""
OVERSHOOT = (math.log(1.25) / 2, math.log(1.25) / math.sqrt(12))
"""Mean and standard deviation of log(allotted / least epochs): uniform from none to the 1.25 of one relaxing step."""
WIDENING = 3.0
"""How many times wider the paper's fit becomes as a prior for a lab's own matches."""
OTHER_RECIPE = 0.7
"""Standard deviation of the intercept that is added then: another recipe may need twice or half the epochs."""
DRAWS = 4000
LEVEL = 0.8
"""Probability that a range holds."""


@dataclass(frozen=True)
class Link:
    """A link whose epochs are asked for; fields as in `compt.curves.Match`."""

    student: ModelSpec
    teacher: ModelSpec
    position: int
    images: int
    baseline_epochs: float
    distilled: bool = True


@dataclass(frozen=True)
class Bound:
    """What runs show of a link that no length of theirs just matches: more than the longest, or at most the least.

    No point of the fit; it bounds the epochs of this very link alone.
    """

    link: Link
    source: str
    more_than: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Range:
    """A median and the ends of a range that holds with probability `LEVEL`."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, middle: float, draws: Floats, level: float = LEVEL) -> Range:
        """`middle` with the central quantiles of `draws`, widened to hold it."""
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return cls(float(middle), float(min(low, middle)), float(max(high, middle)))


@dataclass(frozen=True)
class StartPrior:
    """How the best first model depends on the number of images: stated, not fitted.

    The smallest model that fits the data has `smallest` parameters: a power law through ViT-T at CC3M and ViT-S at
    Merged-15M, the best starts that the paper names (figure 6). Each halving of a predecessor below that multiplies its
    student's epochs by `factor`, uncertain by a factor of `spread` in either direction (one standard deviation; never
    below 1).
    """

    factor: float = 2.0
    spread: float = math.sqrt(2.0)

    def smallest(self, images: float) -> float:
        """Parameters (as Table G counts them) of the smallest model that fits `images` pictures."""
        sizes = [paper_parameters(PRESETS[name]) for name in ("vit_t16", "vit_s16")]
        power = math.log(sizes[1] / sizes[0]) / math.log(IMAGES["merged15m"] / IMAGES["cc3m"])
        return float(sizes[0] * (images / IMAGES["cc3m"]) ** power)

    def fits(self, log2_sizes: ArrayLike, images: float) -> NDArray[np.bool_]:
        """Whether models of 2 ** `log2_sizes` parameters are large enough for `images` pictures."""
        return self.halvings(log2_sizes, images) < 1e-6

    def halvings(self, log2_teacher: ArrayLike, images: float) -> Floats:
        """How far predecessors of 2 ** `log2_teacher` parameters are below the smallest that fits, in halvings."""
        return np.maximum(0.0, math.log2(self.smallest(images)) - np.asarray(log2_teacher, dtype=np.float64))


@lru_cache(maxsize=4096)
def log2_size(spec: ModelSpec) -> float:
    """Base-2 logarithm of the parameters as Table G counts them."""
    return math.log2(paper_parameters(spec))


def paper_matches() -> list[Match]:
    """Every published number of epochs that a link needs: figure 8, table 4(a), and what table 2's links were allotted.

    An allotted number is one that was enough: `high` equals it, and `low` is None. Those of CC3M's ViTs are left out:
    figure 8 has their least numbers.
    """
    found = []
    for block, family in TABLE_2.items():
        for at in range(1, len(family.models)):
            student, teacher = PRESETS[family.models[at]], PRESETS[family.models[at - 1]]
            least = FIGURE_8_EPOCHS[student.name] if block == "cc3m_vit" else None
            epochs = least or float(family.chain_epochs[at])
            source = "figure 8, interpolated" if least else f"table 2, allotted ({block})"
            high = None if least else epochs
            images = IMAGES[family.dataset]
            found.append(Match(student, teacher, at, images, family.baseline_epochs, epochs, source, high=high))
    for row in TABLE_4A:
        if row.method == "IWI":
            student, teacher = PRESETS[row.model], PRESETS[row.start]
            source = "table 4(a), weights only"
            found.append(Match(student, teacher, 1, IMAGES["cc3m"], 128, row.epochs, source, distilled=False))
    return found


def features(
    log2_student: ArrayLike, log2_teacher: ArrayLike, position: ArrayLike, images: ArrayLike, weights_only: ArrayLike
) -> Floats:
    """The features [..., 6] of links, broadcast over their arguments; sizes in log2 of parameters."""
    student, teacher = np.asarray(log2_student, dtype=np.float64), np.asarray(log2_teacher, dtype=np.float64)
    columns = (
        np.ones(()),
        student - teacher,
        np.asarray(position, dtype=np.float64) - 1,
        np.log2(np.asarray(images, dtype=np.float64) / REFERENCE_IMAGES),
        teacher - math.log2(REFERENCE_SIZE),
        np.asarray(weights_only, dtype=np.float64),
    )
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def _row(link: Link | Match) -> Floats:
    return features(log2_size(link.student), log2_size(link.teacher), link.position, link.images, not link.distilled)


@dataclass(frozen=True)
class Edges:
    """The least and greatest of each feature among the points [6]: what the fit has seen."""

    low: Floats
    high: Floats

    def held(self, rows: Floats) -> Floats:
        """`rows` [..., 6] without credit for extrapolation.

        Where going beyond the points would save epochs (a smaller step, a later position, fewer images, a larger
        predecessor), a feature stays at the edge; in the other direction it goes on.
        """
        held = rows.copy()
        for at in (1, 3):
            held[..., at] = np.maximum(rows[..., at], self.low[at])
        for at in (2, 4):
            held[..., at] = np.minimum(rows[..., at], self.high[at])
        return held

    def outside(self, row: Floats) -> list[str]:
        """Names of the features of one link that no point comes up to."""
        beyond = (row < self.low - 1e-6) | (row > self.high + 1e-6)
        return [name for name, out in zip(FEATURES, beyond, strict=True) if out]


@dataclass(frozen=True)
class Posterior:
    """Normal-inverse-gamma: variance ~ IG(shape, rate), coefficients ~ N(mean [6], variance * scale [6, 6])."""

    mean: Floats
    scale: Floats
    shape: float
    rate: float

    def updated(self, rows: Floats, values: Floats, weights: Floats) -> Posterior:
        """After `values` [n] at `rows` [n, 6], with noise of variance / `weights` [n]. The textbook update."""
        before = np.linalg.inv(self.scale)
        precision = before + rows.T @ (weights[:, None] * rows)
        scale: Floats = np.asarray(np.linalg.inv(precision), dtype=np.float64)
        mean = scale @ (before @ self.mean + rows.T @ (weights * values))
        rest = weights @ values**2 + self.mean @ before @ self.mean - mean @ precision @ mean
        return Posterior(mean, scale, self.shape + len(values) / 2, float(self.rate + rest / 2))

    @property
    def noise(self) -> float:
        """Standard deviation of the noise: root of the mean variance."""
        return math.sqrt(self.rate / (self.shape - 1))

    def spreads(self) -> Floats:
        """Standard deviations of the coefficients [6]."""
        return np.asarray(np.sqrt(np.diag(self.scale)) * self.noise)


PRIOR = Posterior(
    PRIOR_MEANS,
    np.asarray(np.diag(np.square(PRIOR_SPREADS / NOISE)), dtype=np.float64),
    NOISE_WEIGHT,
    NOISE**2 * (NOISE_WEIGHT - 1),
)


def _observed(matches: Sequence[Match], start: StartPrior | None, noise: float) -> tuple[Floats, Floats, Floats]:
    """Rows, values log f and weights of matches; what the start prior adds is taken off.

    An allotted number of epochs stands for a least one that is smaller by `OVERSHOOT`. A `low` and a `high` are taken
    as the ends of a 95 % interval, whose variance adds to the noise.
    """
    rows = np.array([_row(match) for match in matches]).reshape(len(matches), len(FEATURES))
    values, weights = np.empty(len(matches)), np.empty(len(matches))
    for at, match in enumerate(matches):
        value, extra = math.log(match.epochs / match.baseline_epochs), 0.0
        if match.low is None and match.high == match.epochs:
            value, extra = value - OVERSHOOT[0], OVERSHOOT[1]
        elif match.low and match.high:
            extra = math.log(match.high / match.low) / 4
        if start is not None:
            value -= math.log(start.factor) * float(start.halvings(log2_size(match.teacher), match.images))
        values[at], weights[at] = value, noise**2 / (noise**2 + extra**2)
    return rows, values, weights


@dataclass(frozen=True)
class EpochModel:
    """The fitted model. `points` are the matches it is fitted to; `own` those of them that were measured here.

    A link that was measured itself (same sizes, images and baseline epochs) takes its measured epochs; one that
    `bounds` are known of stays within them.
    """

    posterior: Posterior
    edges: Edges
    points: tuple[Match, ...]
    own: tuple[Match, ...] = ()
    start: StartPrior | None = field(default_factory=StartPrior)
    bounds: tuple[Bound, ...] = ()

    @classmethod
    def fit(
        cls,
        matches: Sequence[Match],
        *,
        own: Sequence[Match] = (),
        bounds: Sequence[Bound] = (),
        start: StartPrior | None = StartPrior(),
    ) -> EpochModel:
        """Fit to published `matches`, then to a lab's `own`.

        With `own` matches the fit to the published ones becomes their prior: the same means, `WIDENING` times the
        spread, `OTHER_RECIPE` more on the intercept, and the noise again as uncertain as before any data. Raises
        ConfigError for a match without epochs.
        """
        for match in (*matches, *own):
            if not (match.epochs > 0 and match.baseline_epochs > 0 and match.images > 0):
                raise ConfigError(
                    f"{match.source}: {match.teacher.name} to {match.student.name}: {match.epochs:g} of "
                    f"{match.baseline_epochs:g} epochs on {match.images} images: each has to be above 0"
                )
        posterior = PRIOR.updated(*_observed(matches, start, NOISE)) if matches else PRIOR
        if own:
            noise = posterior.noise
            scale = posterior.scale * WIDENING**2
            scale[0, 0] += (OTHER_RECIPE / noise) ** 2
            wide = Posterior(posterior.mean, scale, NOISE_WEIGHT, noise**2 * (NOISE_WEIGHT - 1))
            posterior = wide.updated(*_observed(own, start, noise))
        points = (*matches, *own)
        rows = np.array([_row(match) for match in points]) if points else np.zeros((1, len(FEATURES)))
        return cls(posterior, Edges(rows.min(axis=0), rows.max(axis=0)), points, tuple(own), start, tuple(bounds))

    def log_fraction(
        self, log2_student: ArrayLike, log2_teacher: ArrayLike, position: ArrayLike, images: float, distilled: bool
    ) -> Floats:
        """Median of log f of links, not capped at 0, broadcast; measured links are not looked up."""
        rows = self.edges.held(features(log2_student, log2_teacher, position, images, not distilled))
        middle = rows @ self.posterior.mean
        if self.start is not None:
            middle = middle + math.log(self.start.factor) * self.start.halvings(log2_teacher, images)
        return np.asarray(middle)

    def links(
        self, specs: Sequence[ModelSpec], *, images: int, baseline_epochs: float, distilled: bool = True
    ) -> list[Link]:
        """The links of a chain. A position counts the models before it that fit the data, and is at least 1."""
        sizes = [log2_size(spec) for spec in specs]
        fits = np.ones(len(specs)) if self.start is None else self.start.fits(sizes, images)
        return [
            Link(specs[at], specs[at - 1], max(1, int(fits[:at].sum())), images, baseline_epochs, distilled)
            for at in range(1, len(specs))
        ]

    def measured(self, link: Link) -> Match | None:
        """The own match of this very link, the latest given; position counts only where several differ in it."""
        same = [match for match in self.own if _key(match) == _key(link)]
        here = [match for match in same if match.position == link.position]
        return next(reversed(here or same), None)

    def epochs(self, link: Link) -> float:
        """Epochs that `link` needs: measured, or the median of the fit; at most those of the baseline."""
        match = self.measured(link)
        if match is not None:
            return min(match.epochs, link.baseline_epochs)
        middle = self.log_fraction(
            log2_size(link.student), log2_size(link.teacher), link.position, link.images, link.distilled
        )
        return float(self._bounded(link, link.baseline_epochs * np.exp(middle)))

    def bound(self, link: Link) -> Bound | None:
        """What is known of the epochs of this very link, where it was not measured, the latest given."""
        return next((bound for bound in reversed(self.bounds) if _key(bound.link) == _key(link)), None)

    def known(self) -> list[Link | Match]:
        """The links whose epochs do not follow from their features alone."""
        return [*self.own, *(bound.link for bound in self.bounds)]

    def _bounded(self, link: Link, epochs: Floats) -> Floats:
        """`epochs` within the link's own bounds, and at most those of the baseline."""
        bound = self.bound(link)
        least = 0.0 if bound is None or bound.more_than is None else bound.more_than
        most = link.baseline_epochs if bound is None or bound.at_most is None else bound.at_most
        return np.asarray(np.minimum(np.clip(epochs, least, max(least, most)), link.baseline_epochs))

    def draws(self, links: Sequence[Link], *, count: int = DRAWS, seed: int = 0) -> Floats:
        """Joint draws [count, n] of the epochs of `links` from the posterior predictive; the same seed, the same draws.

        Coefficients, noise variance and start factor are common to a draw, the noise itself is each link's own.
        """
        generator = np.random.default_rng(seed)
        post, n = self.posterior, len(links)
        deviation = np.sqrt(post.rate / generator.gamma(post.shape, size=(count, 1)))
        normal = generator.standard_normal((count, len(FEATURES))) @ np.linalg.cholesky(post.scale).T
        noise = deviation * generator.standard_normal((count, n))
        steep = generator.standard_normal((count, 1))
        rows = np.array([self.edges.held(_row(link)) for link in links]).reshape(n, len(FEATURES))
        logs = (post.mean + deviation * normal) @ rows.T + noise
        if self.start is not None:
            each = np.maximum(0.0, math.log(self.start.factor) + math.log(self.start.spread) * steep)
            below = [float(self.start.halvings(log2_size(link.teacher), link.images)) for link in links]
            logs += each * np.array(below).reshape(1, n)
        for at, link in enumerate(links):
            match = self.measured(link)
            if match is not None:
                middle = math.log(match.epochs / link.baseline_epochs)
                known = math.log(match.high / match.low) / 4 if match.low and match.high else None
                logs[:, at] = middle + (noise[:, at] if known is None else known * noise[:, at] / deviation[:, 0])
        columns = [
            np.minimum(link.baseline_epochs, link.baseline_epochs * np.exp(logs[:, at]))
            if self.measured(link)
            else self._bounded(link, link.baseline_epochs * np.exp(logs[:, at]))
            for at, link in enumerate(links)
        ]
        return np.stack(columns, axis=1) if links else np.empty((count, 0))

    def predict(self, link: Link) -> Range:
        """The epochs of one link with their range."""
        return Range.of(self.epochs(link), self.draws([link])[:, 0])

    def outside(self, link: Link) -> list[str]:
        """Names of the features of `link` that lie outside those of the points."""
        return [] if self.measured(link) else self.edges.outside(_row(link))


def _key(link: Link | Match) -> tuple[object, ...]:
    """What makes two links the same; names of models do not count."""
    specs = (replace(link.student, name=""), replace(link.teacher, name=""))
    return (*specs, link.images, round(link.baseline_epochs, 3), link.distilled)
