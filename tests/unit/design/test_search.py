"""The search for chains against a list of all chains, and the properties of what it finds."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.cost.paper import IMAGES
from compt.design import search
from compt.design.candidates import candidates
from compt.design.costs import macs_costs
from compt.design.curves import LinkEpochs
from compt.design.epochs import EpochModel, paper_matches
from compt.design.outcome import Setting
from compt.design.search import (
    LEAST_STEP,
    SIMPLER,
    FoundChain,
    Problem,
    by_size,
    found,
    least_cost,
    most_acceleration,
    problem,
    simplest,
    whole_epochs,
    within_budget,
)
from compt.design.sizes import log2_size
from compt.errors import ConfigError
from compt.models.presets import PRESETS
from compt.recipe.read import load_recipe
from tests.helpers.curves import own

ROOT = Path(__file__).resolve().parents[3]
CC3M = IMAGES["cc3m"]


@st.composite
def tasks(draw: st.DrawFn) -> Problem:
    """A small problem with any costs; some links missing; the first models may be too small for the data."""
    n, k = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    last = n - 1
    wanted = sorted({last, *draw(st.sets(st.integers(0, last), max_size=2))})
    rows, columns = np.indices((n, n))
    passed = np.array([[any(i < w < j for w in wanted) for j in range(n)] for i in range(n)])
    allowed = (rows < columns) & ~passed & (rng.random((n, n)) < 0.9)
    links = np.where(allowed, rng.uniform(0.1, 3.0, (k, n, n)), np.inf)
    fits = np.arange(n) >= draw(st.integers(0, n - 1))
    first = np.sort(rng.uniform(1.0, 9.0, n))
    return Problem(first, links, rng.uniform(1, 9, (k, n, n)), 10.0, tuple(wanted), fits)


def every_chain(task: Problem, last: int) -> list[tuple[float, float, tuple[int, ...]]]:
    """(cost, individual cost, places) of all chains to `last` with the wanted models below it, one by one."""
    found = []
    for count in range(last + 1):
        for before in combinations(range(last), count):
            chain = (*before, last)
            if len(chain) > len(task.links) + 1 or not {w for w in task.wanted if w <= last} <= set(chain):
                continue
            cost = task.first[chain[0]]
            for at in range(1, len(chain)):
                position = max(1, sum(bool(task.fits[place]) for place in chain[:at]))
                cost = cost + task.links[position - 1][chain[at - 1]][chain[at]]
            if np.isfinite(cost):
                found.append((float(cost), float(sum(task.first[place] for place in chain)), chain))
    return found


@given(tasks())
@settings(max_examples=150, deadline=None)
def test_the_cheapest_chain_is_that_of_brute_force(task: Problem) -> None:
    chains = every_chain(task, task.wanted[-1])
    if not chains:
        with pytest.raises(ConfigError):
            least_cost(task, 1)
        return
    found = least_cost(task)
    assert found.cost == pytest.approx(min(chains)[0])
    assert set(task.wanted) <= set(found.chain)
    sizes = by_size(task)
    assert set(sizes) == {len(chain) for _, _, chain in chains}
    for size, one in sizes.items():
        assert one.cost == pytest.approx(min(cost for cost, _, chain in chains if len(chain) == size))


@given(tasks(), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_the_greatest_acceleration_is_that_of_brute_force(task: Problem, size: int) -> None:
    chains = [one for one in every_chain(task, task.wanted[-1]) if not size or len(one[2]) == size]
    if not chains:
        with pytest.raises(ConfigError):
            most_acceleration(task, size or 1)
        return
    found = most_acceleration(task, size or None)
    assert found.acceleration == pytest.approx(max(alone / cost for cost, alone, _ in chains))
    assert not size or len(found.chain) == size


def best_within(task: Problem, budget: float) -> tuple[int, int, float] | None:
    """(last model, members, -cost) by going through all chains without needless models that are too small."""
    ranks = []
    for last in task.wanted:
        for cost, _, chain in every_chain(task, last):
            if cost <= budget and all(task.fits[place] or place in task.wanted for place in chain):
                ranks.append((last, len(chain), -cost))
    return max(ranks, default=None)


def rank(found: FoundChain) -> tuple[int, int, float]:
    return (found.chain[-1], len(found.chain), -found.cost)


@given(tasks(), st.floats(0.5, 20), st.floats(0, 10))
@settings(max_examples=150, deadline=None)
def test_a_budget_buys_the_best_family_and_more_never_a_worse_one(task: Problem, budget: float, more: float) -> None:
    expected = best_within(task, budget)
    if expected is None:
        with pytest.raises(ConfigError, match="--budget"):
            within_budget(task, budget)
        return
    found = within_budget(task, budget)
    assert rank(found) == pytest.approx(expected)
    assert found.cost <= budget
    assert rank(within_budget(task, budget + more)) >= rank(found)


@given(tasks(), st.sets(st.integers(0, 5)))
@settings(max_examples=100, deadline=None)
def test_a_simpler_chain_is_preferred_where_it_is_hardly_worse(task: Problem, presets: set[int]) -> None:
    chains = [found(task, chain) for _, _, chain in every_chain(task, task.wanted[-1])]
    if not chains:
        return
    chosen = simplest(chains, frozenset(presets), lambda one: one.cost)
    least = min(one.cost for one in chains)
    assert chosen.cost <= least * (1 + SIMPLER)
    strange = sum(place not in presets for place in chosen.chain)
    for one in chains:
        if one.cost <= least * (1 + SIMPLER):
            others = sum(place not in presets for place in one.chain)
            assert (len(chosen.chain), strange, chosen.cost) <= (len(one.chain), others, one.cost)


def test_what_is_simpler() -> None:
    """Fewest models, then fewest that are not presets, then lowest cost, all within 3 % of the lowest."""
    chains = {
        "best": FoundChain((0, 1, 2, 9), (), 100.0, 500.0),
        "shorter": FoundChain((1, 3, 9), (), 102.9, 500.0),
        "of presets": FoundChain((2, 4, 9), (), 102.95, 500.0),
        "too dear": FoundChain((2, 9), (), 103.1, 500.0),
    }

    def chosen(*names: str) -> str:
        found = simplest([chains[name] for name in names], frozenset({2, 4, 9}), lambda one: one.cost)
        return next(name for name, one in chains.items() if one == found)

    assert chosen("best", "too dear") == "best"
    assert chosen("best", "shorter", "too dear") == "shorter"
    assert chosen("best", "shorter", "of presets", "too dear") == "of presets"
    assert chosen("shorter", "of presets", "too dear") == "too dear"


@lru_cache
def real(names: tuple[str, ...], baseline: float = 128.0, most: int = 8, images: int = CC3M) -> Problem:
    recipe = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml")
    models = candidates({name: PRESETS[name] for name in names})
    costs = macs_costs(recipe, models.specs)
    model = EpochModel.fit(paper_matches())
    return problem(models, costs, model, images=images, baseline_epochs=baseline, most=most)


@pytest.mark.parametrize("names", [("vit_l16",), ("vit_t16", "vit_l16"), ("vit_t16", "vit_s16", "vit_b16", "vit_l16")])
@pytest.mark.parametrize("images", [CC3M, IMAGES["merged15m"]])
def test_no_useless_link_is_chosen(names: tuple[str, ...], images: int) -> None:
    """Leaving out any optional model makes the chain more expensive, or impossible."""
    task = real(names, images=images)
    found = least_cost(task)
    for place in set(found.chain) - set(task.wanted):
        shorter = [at for at in found.chain if at != place]
        assert search.found(task, shorter).cost > found.cost


def test_a_useless_link_is_left_out_and_a_useful_one_kept() -> None:
    links = np.full((2, 3, 3), np.inf)
    links[:, 0, 1], links[:, 0, 2], links[:, 1, 2] = 1.0, 5.0, 4.5
    task = Problem(np.array([1.0, 3.0, 9.0]), links, links, 10.0, (2,), np.ones(3, dtype=bool))
    assert least_cost(task).chain == (0, 2)
    links[:, 1, 2] = 3.5
    assert least_cost(task).chain == (0, 1, 2)


def test_more_wanted_models_are_never_cheaper() -> None:
    families = [("vit_l16",), ("vit_b16", "vit_l16"), ("vit_s16", "vit_b16", "vit_l16")]
    families += [("vit_t16", "vit_s16", "vit_b16", "vit_l16")]
    paid = [least_cost(real(names)).cost for names in families]
    assert paid == sorted(paid)
    assert paid[0] < paid[-1]


def test_cost_grows_with_the_baseline_s_epochs() -> None:
    paid = [least_cost(real(("vit_t16", "vit_l16"), baseline=epochs)).cost for epochs in (8.0, 32.0, 64.0, 128.0)]
    assert paid == sorted(paid)
    assert paid[-1] == pytest.approx(16 * paid[0], rel=0.1)


def test_chosen_models_keep_their_distance() -> None:
    task = real(("vit_m16", "vit_b16", "vit_l16"))
    models = candidates({name: PRESETS[name] for name in ("vit_m16", "vit_b16", "vit_l16")})
    sizes = [log2_size(spec) for spec in models.specs]
    rows, columns = np.nonzero(np.isfinite(task.links[0]))
    for row, column in zip(rows, columns, strict=True):
        both = row in task.wanted and column in task.wanted
        assert both or sizes[column] - sizes[row] >= np.log2(LEAST_STEP)
        assert not any(row < wanted < column for wanted in task.wanted)
    close = real(("vit_b16", "vit_xb16"))
    assert np.isfinite(close.links[0][close.wanted])


def test_epochs_are_those_of_the_model_rounded_up() -> None:
    names = ("vit_t16", "vit_s16", "vit_b16", "vit_l16")
    task, model = real(names), EpochModel.fit(paper_matches())
    chain = task.wanted
    recipe = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml")
    links = Setting(recipe, model, 128.0).links([PRESETS[name] for name in names])
    expected = [128.0, *np.ceil([2 * model.predict(link).middle for link in links]) / 2]
    assert list(search.found(task, chain).epochs) == expected
    assert whole_epochs([3.0, 3.01, 3.5, 200], 128).tolist() == [3.0, 3.5, 3.5, 128]
    assert whole_epochs([0.2, 0.201, 0.7, 9], 2).tolist() == [0.2, 0.21, 0.7, 2], "half an epoch would be the result"


def test_a_bounded_link_enters_the_search() -> None:
    names = ("vit_t16", "vit_s16")
    pair = LinkEpochs(PRESETS["vit_s16"], PRESETS["vit_t16"], 1, CC3M, 128.0)
    recipe = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml")
    models = candidates({name: PRESETS[name] for name in names})
    costs = macs_costs(recipe, models.specs)
    model = EpochModel.fit(paper_matches(), [own(replace(pair, position=7), more_than=60.0)])
    task = problem(models, costs, model, images=CC3M, baseline_epochs=128.0)
    planned = task.epochs[:, models.wanted[0], models.wanted[1]]
    assert 60 < planned.min() <= planned.max() < 128, "more than what was not enough"
    found = least_cost(task)
    assert len(found.chain) > 2, "a detour is cheaper than the link that is known to be slow"


def test_a_measured_link_enters_the_search_whatever_its_operator_did_to_its_norms() -> None:
    models = candidates({name: PRESETS[name] for name in ("vit_t16", "vit_s16")})
    costs = macs_costs(load_recipe(ROOT / "recipes" / "cc3m_vit.yaml"), models.specs)
    small, large = (PRESETS[name] for name in ("vit_t16", "vit_s16"))
    grown = LinkEpochs(replace(large, norm_eps=2e-5), replace(small, text_norm_eps=3e-5), 1, CC3M, 128.0)
    model = EpochModel.fit(paper_matches(), [own(grown, 77.0)])
    task = problem(models, costs, model, images=CC3M, baseline_epochs=128.0)
    assert (task.epochs[:, models.wanted[0], models.wanted[1]] == 77).all()


@pytest.mark.parametrize("size", [3, 40])
def test_sizes_that_cannot_be(size: int) -> None:
    task = real(("vit_t16", "vit_s16", "vit_b16", "vit_l16"))
    with pytest.raises(ConfigError, match=f"--members {size}.*possible here: 4, 5, 6"):
        least_cost(task, size)


def test_a_budget_below_the_cheapest_says_what_that_costs() -> None:
    task = real(("vit_t16", "vit_l16"))
    least = task.first[task.wanted[0]]
    with pytest.raises(ConfigError, match=rf"family, 1 model, takes {re.escape(f'{least:.4g}')} GPU-hours"):
        within_budget(task, 1.0)
    assert within_budget(task, least).chain == (task.wanted[0],)
    assert len(within_budget(task, 1e30, 3).chain) == 3
