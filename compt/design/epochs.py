"""How many epochs a link needs to match its individually trained baseline, and how sure that is. No torch in here.

The model is a Bayesian linear regression. For one link, with f = epochs / baseline epochs,

    log f = features . coefficients + noise + start,    f at most 1 (a link is no worse than training from scratch)

The coefficients and the variance of the noise have a normal-inverse-gamma prior (`PRIOR`), which data turn into one of
the same form (Bishop, Pattern Recognition and Machine Learning, 3.3; Murphy, Machine Learning, 7.6.3). Its predictive
is a Student t. `start` is a separate term, a stated prior that no published number pins down: `StartPrior`.

The predecessor's quality, which the paper's third rule is about, stands in the form as its size and its position in the
chain: a plan knows no accuracies of models that are not trained yet. That f does not depend on the baseline's epochs is
an assumption; figure 9(a) of the paper (CoM-PT) supports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.cost.paper import CAPTIONS_PER_IMAGE, FIGURE_8_EPOCHS, FIGURE_9B_EXTRAPOLATED, IMAGES, TABLE_2, TABLE_4A
from compt.cost.published import paper_parameters
from compt.design.curves import Match
from compt.design.regression import Posterior, truncated_t
from compt.errors import ConfigError
from compt.models.presets import PRESETS, ModelSpec

Floats = NDArray[np.float64]

FEATURES = ("intercept", "log2 size ratio", "position - 1", "log2 images", "log2 predecessor", "weights only")
"""Sizes are parameters as Table G counts them; images are in units of CC3M, the predecessor's size in ViT-T's: it
stands for the predecessor's quality."""

IMAGES_AT = FEATURES.index("log2 images")
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
OPEN_END = math.log(2.0)
"""An open end of a lab's own interval counts as twice as far away as the other end, in logarithms of epochs, and at
least as this; a known end counts as no further than an open one would."""
FURTHEST = math.log(8.0)
"""An end counts as no further away than this: both do where neither is known."""
GROWTH_SPREAD = 1.0
"""Beyond the images of the points, what each further doubling adds in the median is uncertain by a factor around 1 of
this standard deviation, never below 0: no published number says whether it goes on, levels off or becomes steeper. The
same factor holds for how the start prior's threshold grows beyond the two data sets that it is stated for."""
_NORMAL = np.array([NormalDist().inv_cdf((at + 0.5) / 33) for at in range(33)])
DRAWS = 4000
LEVEL = 0.8
"""Probability that a range holds."""


@dataclass(frozen=True)
class StartPrior:
    """How the best first model depends on the number of images: stated, not fitted.

    The smallest model that fits the data has `smallest` parameters: a power law through ViT-T at CC3M and ViT-S at
    Merged-15M, the best starts that the paper names (figure 6). Each halving of a predecessor below that multiplies its
    student's epochs by `factor`, uncertain by a factor of `spread` in either direction (one standard deviation; never
    below 1). Below and above those two data sets the exponent may be another one: `growth` times that between them.
    """

    factor: float = 2.0
    spread: float = math.sqrt(2.0)

    def log2_smallest(self, images: ArrayLike, growth: ArrayLike = 1.0) -> Floats:
        """Base-2 logarithm of the parameters of the smallest model that fits, broadcast over the arguments."""
        ends = [IMAGES["cc3m"], IMAGES["merged15m"]]
        sizes = [math.log2(paper_parameters(PRESETS[name])) for name in ("vit_t16", "vit_s16")]
        power = (sizes[1] - sizes[0]) / math.log2(ends[1] / ends[0])
        wanted = np.asarray(images, dtype=np.float64)
        inside = np.clip(wanted, ends[0], ends[1])
        beyond = np.log2(wanted / inside)
        return np.asarray(sizes[0] + power * (np.log2(inside / ends[0]) + np.asarray(growth) * beyond))

    def smallest(self, images: float) -> float:
        """Parameters (as Table G counts them) of the smallest model that fits `images` pictures."""
        return float(2.0 ** self.log2_smallest(images))

    def fits(self, log2_sizes: ArrayLike, images: float) -> NDArray[np.bool_]:
        """Whether models of 2 ** `log2_sizes` parameters are large enough for `images` pictures."""
        return self.halvings(log2_sizes, images) < 1e-6

    def halvings(self, log2_teacher: ArrayLike, images: ArrayLike, growth: ArrayLike = 1.0) -> Floats:
        """How far predecessors of 2 ** `log2_teacher` parameters are below the smallest that fits, in halvings."""
        below = self.log2_smallest(images, growth) - np.asarray(log2_teacher, dtype=np.float64)
        return np.asarray(np.maximum(0.0, below))


START = StartPrior()


@dataclass(frozen=True)
class LinkEpochs:
    """A link whose epochs are asked for; fields as in `compt.design.curves.Match`."""

    student: ModelSpec
    teacher: ModelSpec
    position: int
    images: int
    baseline_epochs: float
    distilled: bool = True


@dataclass(frozen=True)
class Bound:
    """What runs show of a link that no length of theirs just matches: more than the longest, or at most the least.

    No point of the fit; what the fit says of the epochs of this very link is conditioned on it. Both are in epochs.
    """

    link: LinkEpochs
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


def allotted(match: Match) -> bool:
    """Whether the epochs of a published match were enough, perhaps more than needed: what `paper_matches` says."""
    return match.low is None and match.high == match.epochs


def _row(link: LinkEpochs | Match) -> Floats:
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

    def further(self, rows: Floats) -> Floats:
        """By how many doublings `rows` [..., 6] have more images than any point."""
        return np.asarray(np.maximum(0.0, rows[..., IMAGES_AT] - self.high[IMAGES_AT]))

    def outside(self, row: Floats) -> list[str]:
        """Names of the features of one link that no point comes up to."""
        beyond = (row < self.low - 1e-6) | (row > self.high + 1e-6)
        return [name for name, out in zip(FEATURES, beyond, strict=True) if out]


PRIOR = Posterior(
    PRIOR_MEANS,
    np.asarray(np.diag(np.square(PRIOR_SPREADS / NOISE)), dtype=np.float64),
    NOISE_WEIGHT,
    NOISE**2 * (NOISE_WEIGHT - 1),
)


def half_widths(match: Match) -> tuple[float, float]:
    """How far the 95 % interval of a match reaches down and up, in logarithms of epochs, an open end by `OPEN_END`."""
    ends = (match.low and match.epochs / match.low, match.high and match.high / match.epochs)
    down, up = (max(0.0, math.log(end)) if end else math.inf for end in ends)
    return min(down, max(OPEN_END, 2 * up), FURTHEST), min(up, max(OPEN_END, 2 * down), FURTHEST)


def _observed(
    matches: Sequence[Match], start: StartPrior | None, noise: float, published: bool = False
) -> tuple[Floats, Floats, Floats]:
    """Rows, values log f and weights of matches; what the start prior adds is taken off.

    Among `published` ones an allotted number of epochs stands for a least one that is smaller by `OVERSHOOT`, and one
    without an interval is as exact as the noise lets it be. A `low` and a `high` are taken as the ends of a 95 %
    interval, whose variance adds to the noise.
    """
    rows = np.array([_row(match) for match in matches]).reshape(len(matches), len(FEATURES))
    values, weights = np.empty(len(matches)), np.empty(len(matches))
    for at, match in enumerate(matches):
        value, extra = math.log(match.epochs / match.baseline_epochs), 0.0
        if published and allotted(match):
            value, extra = value - OVERSHOOT[0], OVERSHOOT[1]
        elif not published or match.low or match.high:
            extra = sum(half_widths(match)) / 4
        if start is not None:
            value -= math.log(start.factor) * float(start.halvings(log2_size(match.teacher), match.images))
        values[at], weights[at] = value, noise**2 / (noise**2 + extra**2)
    return rows, values, weights


@dataclass(frozen=True)
class EpochModel:
    """The fitted model. `points` are the matches it is fitted to; `own` those of them that were measured here.

    A link that was measured itself (same sizes, images and baseline epochs) takes its measured epochs; one that
    `bounds` are known of takes those of the fit conditioned on them.
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
        start: StartPrior | None = START,
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
        posterior = PRIOR.updated(*_observed(matches, start, NOISE, published=True)) if matches else PRIOR
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
    ) -> list[LinkEpochs]:
        """The links of a chain. A position counts the models before it that fit the data, and is at least 1."""
        sizes = [log2_size(spec) for spec in specs]
        fits = np.ones(len(specs)) if self.start is None else self.start.fits(sizes, images)
        return [
            LinkEpochs(specs[at], specs[at - 1], max(1, int(fits[:at].sum())), images, baseline_epochs, distilled)
            for at in range(1, len(specs))
        ]

    def measured(self, link: LinkEpochs) -> Match | None:
        """The own match of this very link, the latest given; position counts only where several differ in it."""
        same = [match for match in self.own if _key(match) == _key(link)]
        here = [match for match in same if match.position == link.position]
        return next(reversed(here or same), None)

    def epochs(self, link: LinkEpochs) -> float:
        """Epochs that `link` needs: measured, or the median of the fit; at most those of the baseline."""
        match, bound = self.measured(link), self.bound(link)
        if match is not None:
            return min(match.epochs, link.baseline_epochs)
        if bound is not None:
            logs = self._conditioned(link, bound, 0.5)
        else:
            sizes = (log2_size(link.student), log2_size(link.teacher))
            logs = self.log_fraction(*sizes, link.position, link.images, link.distilled)
        return float(link.baseline_epochs * np.exp(np.minimum(0.0, logs)))

    def bound(self, link: LinkEpochs) -> Bound | None:
        """What is known of the epochs of this very link, where it was not measured, the latest given."""
        return next((bound for bound in reversed(self.bounds) if _key(bound.link) == _key(link)), None)

    def known(self) -> list[LinkEpochs | Match]:
        """The links whose epochs do not follow from their features alone."""
        return [*self.own, *(bound.link for bound in self.bounds)]

    def _conditioned(self, link: LinkEpochs, bound: Bound, shares: ArrayLike) -> Floats:
        """Quantiles, at `shares`, of log f of `link`, not capped at 0, given that its epochs lie within `bound`.

        The predictive is taken for a mixture of Student t's over the factor of `GROWTH_SPREAD`, to each of which the
        start prior adds its variance.
        """
        row, post = self.edges.held(_row(link)), self.posterior
        growth = np.maximum(0.0, 1.0 + GROWTH_SPREAD * _NORMAL)
        middles = row @ post.mean + (growth - 1) * post.mean[IMAGES_AT] * self.edges.further(row)
        variances = np.full(len(growth), post.width(row) ** 2)
        if self.start is not None:
            below = self.start.halvings(log2_size(link.teacher), link.images, growth)
            middles = middles + math.log(self.start.factor) * below
            variances += (math.log(self.start.spread) * below) ** 2
        low = math.log(bound.more_than / link.baseline_epochs) if bound.more_than else -math.inf
        high = math.log(bound.at_most / link.baseline_epochs) if bound.at_most else math.inf
        return truncated_t(shares, 2 * post.shape, middles, np.sqrt(variances), low, max(low, high))

    def draws(self, links: Sequence[LinkEpochs], *, count: int = DRAWS, seed: int = 0) -> Floats:
        """Joint draws [count, n] of the epochs of `links` from the posterior predictive; the same seed, the same draws.

        Coefficients, noise variance, start factor and growth beyond the points are common to a draw, the noise itself
        is each link's own. A link within bounds keeps its ranks among the draws.
        """
        generator = np.random.default_rng(seed)
        post, n = self.posterior, len(links)
        deviation = np.sqrt(post.rate / generator.gamma(post.shape, size=(count, 1)))
        normal = generator.standard_normal((count, len(FEATURES))) @ np.linalg.cholesky(post.scale).T
        standard = generator.standard_normal((count, n))
        steep = generator.standard_normal((count, 1))
        growth = np.maximum(0.0, 1.0 + GROWTH_SPREAD * generator.standard_normal((count, 1)))
        rows = np.array([self.edges.held(_row(link)) for link in links]).reshape(n, len(FEATURES))
        logs = (post.mean + deviation * normal) @ rows.T + deviation * standard
        logs += (growth - 1) * post.mean[IMAGES_AT] * self.edges.further(rows)
        if self.start is not None:
            each = np.maximum(0.0, math.log(self.start.factor) + math.log(self.start.spread) * steep)
            teachers = np.array([log2_size(link.teacher) for link in links])
            logs += each * self.start.halvings(teachers, np.array([link.images for link in links]), growth)
        for at, link in enumerate(links):
            match, bound = self.measured(link), self.bound(link)
            if match is not None:
                down, up = half_widths(match)
                reach = np.where(standard[:, at] < 0, down, up) / 2
                logs[:, at] = math.log(match.epochs / link.baseline_epochs) + reach * standard[:, at]
            elif bound is not None:
                ranks = logs[:, at].argsort().argsort()
                logs[:, at] = self._conditioned(link, bound, (ranks + 0.5) / count)
        return np.asarray(np.array([link.baseline_epochs for link in links]) * np.exp(np.minimum(0.0, logs)))

    def predict(self, link: LinkEpochs) -> Range:
        """The epochs of one link with their range."""
        return Range.of(self.epochs(link), self.draws([link])[:, 0])

    def caution(self, images: int) -> str | None:
        """What to know about plans for more images than any point has; None for no more."""
        most = REFERENCE_IMAGES * 2.0 ** float(self.edges.high[IMAGES_AT])
        if images <= most * (1 + 1e-6):
            return None
        pairs, speedup = next(iter(FIGURE_9B_EXTRAPOLATED.items()))
        return (
            f"{images:,} images are beyond the {most:,.0f} of the largest data set in the fit. There such plans are "
            f"far too pessimistic: at {pairs / CAPTIONS_PER_IMAGE:,.0f} images ({pairs / 1e9:g} billion pairs) the "
            f"paper extrapolates {speedup:g}x, where the fit to its points gives no saving: train a pair, use --runs."
        )

    def outside(self, link: LinkEpochs) -> list[str]:
        """Names of the features of `link` that lie outside those of the points."""
        return [] if self.measured(link) else self.edges.outside(_row(link))


def _key(link: LinkEpochs | Match) -> tuple[object, ...]:
    """What makes two links the same; names of models do not count."""
    specs = (replace(link.student, name=""), replace(link.teacher, name=""))
    return (*specs, link.images, round(link.baseline_epochs, 3), link.distilled)
