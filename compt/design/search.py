"""The best chain among many, by dynamic programming over its length and its last model.

What a link costs depends only on its position, its teacher and its student. So the cheapest chain of k models that ends
in model j is found from those of k - 1 models: exact, in k^2 n^2 steps.

A position counts the models before it that fit the data (`compt.design.sizes.position`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compt.cost.speed import nameless
from compt.design.candidates import Candidates
from compt.design.costs import Costs
from compt.design.curves import LinkEpochs
from compt.design.epochs import EpochModel, Floats
from compt.design.sizes import fits, log2_size
from compt.errors import ConfigError

LEAST_STEP = 1.5
"""A model that is not wanted has at least so many times the parameters of its predecessor, and so has its student.

The published steps begin at 1.57; without a least step the greatest acceleration would be one of near-equal models.
"""
WHOLE = (0.5, 0.1, 0.05, 0.01, 0.005)
"""Epochs of a link are rounded up to multiples of the first of these that is at most 1/80 of the baselines' epochs."""
MOST_MEMBERS = 8
"""Longest chain that is looked for, unless more are wanted."""
SIMPLER = 0.03
"""A simpler chain is preferred to the best one where it is worse by no more than this share."""


@dataclass(frozen=True)
class Problem:
    """Everything the search needs, as arrays over n candidates in rising order.

    `first` [n]: cost of a model from scratch. `links` [k, n, n]: cost of a link at position 1..k from row to column;
    inf where there can be none. `epochs` [k, n, n] go with them, rounded as they would be trained. `wanted` are places
    in rising order; no link passes one over. `fits` [n]: whether a model counts in the positions after it.
    """

    first: Floats
    links: Floats
    epochs: Floats
    baseline_epochs: float
    wanted: tuple[int, ...]
    fits: NDArray[np.bool_]

    @property
    def allowed_first(self) -> NDArray[np.bool_]:
        """[n]: whether no wanted model lies below."""
        return np.arange(len(self.first)) <= self.wanted[0]

    def without(self, out: NDArray[np.bool_]) -> Problem:
        """The same without the models in `out` [n], unless they are wanted."""
        out = out.copy()
        out[list(self.wanted)] = False
        links = self.links.copy()
        links[:, :, out] = np.inf
        return replace(self, first=np.where(out, np.inf, self.first), links=links)

    def large_enough(self) -> Problem:
        """The same without the models that are too small for the data, unless they are wanted."""
        return self.without(~self.fits)

    def positions(self, chain: Sequence[int]) -> list[int]:
        """Position of each link of a chain: how many of the models before it fit the data, at least 1."""
        return [max(1, int(self.fits[list(chain[:at])].sum())) for at in range(1, len(chain))]


def whole_epochs(epochs: ArrayLike, most: float) -> Floats:
    """`epochs` rounded up to multiples of one of `WHOLE`, but not above `most`, the epochs of the baselines."""
    whole = next((step for step in WHOLE if step <= most / 80), WHOLE[-1])
    return np.asarray(np.minimum(most, np.round(np.ceil(np.asarray(epochs) / whole - 1e-9) * whole, 3)))


def problem(
    models: Candidates,
    costs: Costs,
    epochs: EpochModel,
    *,
    images: int,
    baseline_epochs: float,
    distilled: bool = True,
    most: int = MOST_MEMBERS,
) -> Problem:
    """All possible links, with their epochs and costs. `most` bounds the models of a chain."""
    n, sizes = len(models.specs), np.array([log2_size(spec) for spec in models.specs])
    steps = max(1, most - 1)
    positions = np.arange(1, steps + 1)[:, None, None]
    students, teachers = sizes[None, None, :], sizes[None, :, None]
    logs = epochs.log_fraction(students, teachers, positions, images, distilled)
    needed = np.broadcast_to(baseline_epochs * np.exp(np.minimum(0.0, logs)), (steps, n, n)).copy()
    places = {nameless(spec): at for at, spec in enumerate(models.specs)}
    for curve in epochs.own:
        teacher, student = (places.get(nameless(spec)) for spec in (curve.teacher, curve.student))
        if teacher is not None and student is not None:
            for at in range(steps):
                link = LinkEpochs(curve.student, curve.teacher, at + 1, images, baseline_epochs, distilled)
                needed[at, teacher, student] = epochs.predict(link).middle
    needed = whole_epochs(needed, baseline_epochs)
    wanted = np.zeros(n, dtype=bool)
    wanted[list(models.wanted)] = True
    order = np.arange(n)
    before = np.concatenate([[0], np.cumsum(wanted)])  # wanted models before each place
    passed = before[None, :n] - before[1 : n + 1, None]  # wanted ones strictly between row and column
    far = sizes[None, :] - sizes[:, None] >= np.log2(LEAST_STEP)
    allowed = models.grows & (order[:, None] < order[None, :]) & (passed <= 0)
    allowed &= far | (wanted[:, None] & wanted[None, :])
    links = np.where(allowed, needed * costs.links, np.inf)
    large = fits(sizes, images)
    return Problem(costs.alone * baseline_epochs, links, needed, baseline_epochs, models.wanted, large)


@dataclass(frozen=True)
class FoundChain:
    """A chain as places of candidates, with its epochs and its cost."""

    chain: tuple[int, ...]
    epochs: tuple[float, ...]
    cost: float
    baseline_cost: float

    @property
    def acceleration(self) -> float:
        """How many times more the same models cost individually."""
        return self.baseline_cost / self.cost


def found(task: Problem, chain: Sequence[int]) -> FoundChain:
    """The chain of these places, with what it costs, and what the same models cost individually."""
    links = [(position - 1, *pair) for position, pair in zip(task.positions(chain), pairwise(chain), strict=True)]
    epochs = (task.baseline_epochs, *(float(task.epochs[link]) for link in links))
    cost = float(task.first[chain[0]]) + sum(float(task.links[link]) for link in links)
    return FoundChain(tuple(chain), epochs, cost, float(task.first[list(chain)].sum()))


def cheapest(first: Floats, links: Floats, fits: NDArray[np.bool_], last: int) -> list[tuple[float, tuple[int, ...]]]:
    """For 1 to k + 1 members the chain to `last` of least sum: (sum, places); (inf, ()) where there is none.

    `first` [n] is what a chain's first model adds, `links` [k, n, n] what a link at each position adds, `fits` [n] says
    which models count in positions. Any finite numbers, negative ones too.
    """
    k, n = len(links), len(first)
    small, large = np.where(fits, np.inf, 0.0), np.where(fits, 0.0, np.inf)
    # best[q, j]: least sum of a chain to j with q models before it that fit. A link from one that fits leads from q to
    # q + 1 at position q + 1; from one that does not (then q is 0) it stays at 0, at position 1.
    best = np.full((k + 1, n), np.inf)
    best[0] = first
    tables, origins = [best], []
    for members in range(1, k + 1):
        after, origin = np.full((k + 1, n), np.inf), np.zeros((k + 1, n), dtype=int)
        for q in range(members + 1):
            rows = best[max(q - 1, 0)] + (large if q else small)
            totals = rows[:, None] + links[max(q - 1, 0)]
            origin[q] = totals.argmin(axis=0)
            after[q] = totals[origin[q], np.arange(n)]
        best = after
        tables.append(best)
        origins.append(origin)
    chains: list[tuple[float, tuple[int, ...]]] = []
    for length, table in enumerate(tables):
        q = int(table[:, last].argmin())
        value, chain = float(table[q, last]), [last]
        for origin in reversed(origins[:length]):
            chain.append(int(origin[q, chain[-1]]))
            q = max(q - 1, 0)
        chains.append((value, tuple(reversed(chain)) if np.isfinite(value) else ()))
    return chains


def by_size(task: Problem, last: int | None = None) -> dict[int, FoundChain]:
    """The cheapest chain of each possible number of members that ends in `last`, by default the largest wanted one."""
    end = task.wanted[-1] if last is None else last
    first = np.where(task.allowed_first, task.first, np.inf)
    chains = cheapest(first, task.links, task.fits, end)
    return {len(chain): found(task, chain) for _, chain in chains if chain}


def least_cost(task: Problem, size: int | None = None) -> FoundChain:
    """The cheapest chain with all wanted models, of `size` members where that is given.

    Raises ConfigError where there is none.
    """
    chains = by_size(task)
    return _sized(chains, size) if size else min(chains.values(), key=lambda one: one.cost)


def _sized(chains: dict[int, FoundChain], size: int) -> FoundChain:
    if size not in chains:
        known = ", ".join(map(str, sorted(chains))) or "none"
        raise ConfigError(
            f"--members {size}: there is no chain of {size} models with all that are wanted; possible here: {known}"
        )
    return chains[size]


def most_acceleration(task: Problem, size: int | None = None) -> FoundChain:
    """The chain with all wanted models and the largest ratio of baseline cost to chain cost.

    Of `size` members, or of any number. A ratio of two sums, found by Dinkelbach's iteration: the chain of least
    (acceleration so far) * cost - baseline cost, until none is below zero. Raises ConfigError where there is none.
    """
    best = least_cost(task, size)
    alone = np.where(np.isfinite(task.first), task.first, 0.0)  # models that are left out cost infinity
    while True:
        rate = best.acceleration
        first = np.where(task.allowed_first, rate * task.first - alone, np.inf)
        chains = cheapest(first, rate * task.links - alone, task.fits, task.wanted[-1])
        possible = [item for item in chains if item[1] and (size is None or len(item[1]) == size)]
        better = found(task, min(possible, key=lambda item: item[0])[1])
        if better.acceleration <= rate * (1 + 1e-12):
            return best
        best = better


def within_budget(task: Problem, budget: float, size: int | None = None) -> FoundChain:
    """The best family that costs at most `budget`, in the unit of the task.

    Best: the largest last model, one of the wanted ones; then the most members (at most `size`); then the least cost.
    Every wanted model up to the last is in it. So a larger budget never gives a worse family. Members that are too
    small for the data do not make a family better: those are only in it where they are wanted. Raises ConfigError where
    even the cheapest family costs more, with what that would be.
    """
    task = task.large_enough()
    cheap: list[FoundChain] = []
    for place, last in reversed(list(enumerate(task.wanted))):
        chains = [one for one in by_size(task, last).values() if size is None or len(one.chain) <= max(size, place + 1)]
        affordable = [one for one in chains if one.cost <= budget]
        if affordable:
            return max(affordable, key=lambda one: len(one.chain))
        cheap += chains
    least = min(cheap, key=lambda one: one.cost)
    raise ConfigError(
        f"--budget {budget:g}: even the cheapest family, {len(least.chain)} model{'s' * (len(least.chain) > 1)}, takes "
        f"{least.cost:.4g} GPU-hours"
    )


def simplest(chains: Iterable[FoundChain], presets: frozenset[int], loss: Callable[[FoundChain], float]) -> FoundChain:
    """The simplest of `chains` whose `loss` is at most `SIMPLER` above the least.

    Simpler: fewer models; then fewer that are not among `presets`; then less loss. What such a chain loses is far less
    than is known of any.
    """
    known = list(chains)
    most = (1 + SIMPLER) * min(map(loss, known))
    near = [one for one in known if loss(one) <= most]
    return min(near, key=lambda one: (len(one.chain), len(set(one.chain) - presets), loss(one)))
