"""The model of required epochs: its arithmetic against other formulas, its points, its edges, a lab's own matches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.cost.paper import IMAGES
from compt.cost.published import paper_parameters
from compt.design.curves import Match
from compt.design.epochs import (
    FEATURES,
    LEVEL,
    OPEN_END,
    OVERSHOOT,
    PRIOR,
    Bound,
    EpochModel,
    LinkEpochs,
    Range,
    StartPrior,
    features,
    log2_size,
    paper_matches,
)
from compt.design.regression import truncated_t
from compt.errors import ConfigError
from compt.models.presets import PRESETS, resolve

CC3M, MERGED = IMAGES["cc3m"], IMAGES["merged15m"]
T, S, B, L = (PRESETS[f"vit_{size}16"] for size in "tsbl")


def link(
    student: str = "vit_s16", teacher: str = "vit_t16", position: int = 1, images: int = CC3M, **other: object
) -> LinkEpochs:
    values = {"baseline_epochs": 128.0, "distilled": True, **other}
    return LinkEpochs(PRESETS[student], PRESETS[teacher], position, images, **values)  # type: ignore[arg-type]


def fitted(**options: object) -> EpochModel:
    return EpochModel.fit(paper_matches(), **options)  # type: ignore[arg-type]


def test_the_published_points() -> None:
    shown = [
        (m.teacher.name, m.student.name, m.position, m.images, m.baseline_epochs, m.epochs, m.high, m.distilled)
        for m in paper_matches()
    ]
    assert shown == [
        ("vit_t16", "vit_s16", 1, CC3M, 128, 23.45, None, True),
        ("vit_s16", "vit_b16", 2, CC3M, 128, 18.28, None, True),
        ("vit_b16", "vit_l16", 3, CC3M, 128, 12.34, None, True),
        ("swin_t", "swin_s", 1, CC3M, 128, 24.0, 24.0, True),
        ("swin_s", "swin_b", 2, CC3M, 128, 16.0, 16.0, True),
        ("swin_b", "swin_l", 3, CC3M, 128, 12.0, 12.0, True),
        ("vit_s16", "vit_m16", 1, MERGED, 64, 21.0, 21.0, True),
        ("vit_m16", "vit_b16", 2, MERGED, 64, 17.0, 17.0, True),
        ("vit_b16", "vit_l16", 3, MERGED, 64, 15.0, 15.0, True),
        ("vit_t16", "vit_s16", 1, CC3M, 128, 32, None, False),
        ("vit_t16", "vit_b16", 1, CC3M, 128, 92, None, False),
    ]


def test_features() -> None:
    row = features(log2_size(S), log2_size(T), 3, 4 * CC3M, True)
    ratio = math.log2(paper_parameters(S) / paper_parameters(T))
    assert row == pytest.approx([1, ratio, 2, 2, 0, 1])
    assert len(row) == len(FEATURES)
    assert features(np.zeros((4, 1)), np.zeros(5), 1, CC3M, False).shape == (4, 5, 6)


def test_the_update_is_ridge_regression_with_its_residuals() -> None:
    """Against least squares on the points with the prior written as six more of them."""
    rng = np.random.default_rng(3)
    rows, values = rng.normal(size=(9, 6)), rng.normal(size=9)
    weights = rng.uniform(0.3, 1.0, size=9)
    after = PRIOR.updated(rows, values, weights)
    root = np.linalg.cholesky(np.linalg.inv(PRIOR.scale)).T
    stacked = np.concatenate([np.sqrt(weights)[:, None] * rows, root])
    goal = np.concatenate([np.sqrt(weights) * values, root @ PRIOR.mean])
    mean, residual, _, _ = np.linalg.lstsq(stacked, goal, rcond=None)
    assert after.mean == pytest.approx(mean)
    assert after.shape == PRIOR.shape + 4.5
    assert after.rate == pytest.approx(PRIOR.rate + residual[0] / 2)
    assert after.scale == pytest.approx(np.linalg.inv(stacked.T @ stacked))


def test_draws_have_the_moments_of_the_student_t() -> None:
    model = replace(fitted(start=None), points=())
    one = link(position=2)
    logs = np.log(model.draws([one], count=100_000)[:, 0] / 128)
    post = model.posterior
    row = features(log2_size(S), log2_size(T), 2, CC3M, False)
    variance = post.rate / (post.shape - 1) * (1 + row @ post.scale @ row)
    assert logs.mean() == pytest.approx(row @ post.mean, abs=0.003)
    assert logs.std() == pytest.approx(math.sqrt(variance), rel=0.02)
    assert model.epochs(one) == pytest.approx(128 * math.exp(row @ post.mean))


def test_draws_of_links_are_joint_and_repeatable() -> None:
    model, links = fitted(), [link(), link("vit_b16", "vit_s16", 2)]
    drawn = model.draws(links)
    assert np.array_equal(drawn, model.draws(links))
    assert not np.array_equal(drawn, model.draws(links, seed=1))
    assert np.corrcoef(np.log(drawn.T))[0, 1] > 0.05
    found = model.predict(links[0])
    assert found.low < found.middle < found.high
    inside = (drawn[:, 0] >= found.low) & (drawn[:, 0] <= found.high)
    assert inside.mean() == pytest.approx(LEVEL, abs=0.01)
    assert model.draws([]).shape == (4000, 0)


def test_a_range_holds_its_middle() -> None:
    assert Range.of(5.0, np.zeros(10)) == Range(5.0, 0.0, 5.0)


def test_a_link_is_no_worse_than_scratch() -> None:
    hard = link("vit_l16", "vit_t16", images=1000 * CC3M, distilled=False)
    model = fitted()
    assert model.epochs(hard) == 128
    assert model.draws([hard]).max() <= 128


@given(st.floats(1, 500))
@settings(max_examples=20, deadline=None)
def test_epochs_grow_in_proportion_to_the_baseline_s(baseline: float) -> None:
    model = fitted()
    assert model.epochs(link(baseline_epochs=baseline)) == pytest.approx(
        baseline * model.epochs(link(baseline_epochs=1.0))
    )


def test_extrapolation_never_saves_epochs() -> None:
    model = fitted(start=None)
    sizes = np.array([log2_size(S), log2_size(T)])
    least = model.edges.low[1]

    def logs(student: float = sizes[0], teacher: float = sizes[1], position: int = 1, images: int = CC3M) -> float:
        return float(model.log_fraction(student, teacher, position, images, True))

    assert logs(student=sizes[1] + least / 2) == pytest.approx(logs(student=sizes[1] + least))
    assert logs(position=9) == pytest.approx(logs(position=3))
    assert logs(position=3) < logs(position=2)
    assert logs(images=CC3M // 100) == pytest.approx(logs())
    assert logs(images=100 * CC3M) > logs(images=MERGED) > logs()
    assert logs(student=sizes[1] + 4) > logs()
    big = log2_size(L)
    assert logs(student=big + 5, teacher=big + 3) == pytest.approx(logs(student=big + 5 - 3, teacher=big))
    assert model.outside(link()) == []
    assert model.outside(link(position=4, images=MERGED * 2)) == ["position - 1", "log2 images"]


def test_the_start_prior() -> None:
    start = StartPrior()
    assert start.smallest(CC3M) == pytest.approx(paper_parameters(T))
    assert start.smallest(MERGED) == pytest.approx(paper_parameters(S))
    assert start.fits([log2_size(T), log2_size(S)], MERGED).tolist() == [False, True]
    with_it, without = fitted(), fitted(start=None)
    halvings = math.log2(paper_parameters(S) / paper_parameters(T))
    logs = [float(one.log_fraction(log2_size(S), log2_size(T), 1, MERGED, True)) for one in (with_it, without)]
    assert logs[0] - logs[1] == pytest.approx(halvings * math.log(2))
    assert with_it.epochs(link()) == pytest.approx(without.epochs(link()))
    below = link("vit_s16", "vit_c16", images=MERGED)
    spread = [np.log(model.draws([below])).std() for model in (with_it, without)]
    assert spread[0] > spread[1]


@pytest.mark.parametrize("images", [MERGED * 3, 125_000_000, 2_000_000_000])
def test_beyond_the_points_a_range_spans_a_trend_that_levels_off(images: int) -> None:
    """Nothing published is that large: from what holds at the largest published data set to twice the trend."""
    far, known = link("vit_l16", "vit_b16", 3, images), link("vit_l16", "vit_b16", 3, MERGED)
    model = fitted()
    found = model.predict(far)
    assert found.middle > model.epochs(known)
    assert found.low < 1.3 * model.predict(known).high
    assert found.high > 1.8 * found.low
    levelled = model.draws([far, known])
    assert 0.1 < (levelled[:, 0] < 1.3 * model.epochs(known)).mean() < 0.35


def test_inside_the_points_the_trend_is_that_of_the_points() -> None:
    start = StartPrior()
    for images in (CC3M, 5_000_000, MERGED):
        assert start.log2_smallest(images, [0.0, 1.0, 3.0]) == pytest.approx(math.log2(start.smallest(images)))
    doublings = np.diff([float(start.log2_smallest(images)) for images in (CC3M, MERGED, MERGED**2 // CC3M)])
    assert doublings[0] == pytest.approx(doublings[1], rel=1e-3)
    assert start.log2_smallest(4 * MERGED, 0.0) == pytest.approx(math.log2(start.smallest(MERGED)))
    halved = start.log2_smallest(4 * MERGED, 0.5) - start.log2_smallest(MERGED)
    assert halved == pytest.approx((start.log2_smallest(4 * MERGED) - start.log2_smallest(MERGED)) / 2)
    assert start.log2_smallest(CC3M // 4, 2.0) < start.log2_smallest(CC3M // 4)


def test_plans_beyond_the_points_carry_a_caution() -> None:
    model = fitted()
    assert model.caution(CC3M) is None
    assert model.caution(MERGED) is None
    text = model.caution(2_000_000_000)
    assert text is not None
    for part in ("2,000,000,000 images", "2.3x", "pessimistic"):
        assert part in text
    large = Match(S, T, 1, 3_000_000_000, 64.0, 30.0, "here")
    assert fitted(own=[large]).caution(2_000_000_000) is None


def test_positions_count_the_models_that_fit() -> None:
    specs = [PRESETS[f"vit_{size}16"] for size in ("t", "c", "s", "m", "b")]

    def positions(model: EpochModel, images: int) -> list[int]:
        return [one.position for one in model.links(specs, images=images, baseline_epochs=64)]

    assert positions(fitted(), CC3M) == [1, 2, 3, 4]
    assert positions(fitted(), MERGED) == [1, 1, 1, 2]
    assert positions(fitted(start=None), MERGED) == [1, 2, 3, 4]


def test_an_allotted_number_counts_as_more_than_needed() -> None:
    allotted = paper_matches()
    exact = [replace(match, high=None) for match in allotted]
    one = link("swin_s", "swin_t")
    ratio = EpochModel.fit(allotted).epochs(one) / EpochModel.fit(exact).epochs(one)
    assert math.exp(-OVERSHOOT[0]) < ratio < 0.97


@given(st.floats(0.02, 1.0), st.floats(1.0, 50.0))
@settings(max_examples=60, deadline=None)
def test_a_match_never_weighs_more_without_an_end(low: float, high: float) -> None:
    def spread(**ends: float | None) -> float:
        own = Match(S, T, 1, CC3M, 128.0, 25.0, "here", **ends)
        return float(EpochModel.fit(paper_matches(), own=[own]).posterior.scale[0, 0])

    below, above = 25 * low, 25 * high
    both, neither = spread(low=below, high=above), spread()
    for one in (spread(low=below), spread(high=above)):
        assert both * (1 - 1e-9) <= one <= neither * (1 + 1e-9)
    assert spread(low=24.0, high=26.0) < spread(low=24.0) < neither
    assert spread(low=24.0, high=26.0) < spread(high=26.0) < neither


def test_a_wider_interval_weighs_less() -> None:
    close = [replace(match, low=match.epochs * 0.99, high=match.epochs * 1.01) for match in paper_matches()[:3]]
    wide = [replace(match, low=match.epochs / 3, high=match.epochs * 3) for match in close]
    spreads = [EpochModel.fit(matches).posterior.scale[0, 0] for matches in (close, wide)]
    assert spreads[0] < spreads[1] / 2


def own_matches(factor: float, count: int) -> list[Match]:
    """A lab whose links need `factor` times what the paper's law says, without noise."""
    model = fitted(start=None)
    names = ["vit_t16", "vit_c16", "vit_s16", "vit_m16", "vit_b16", "vit_xb16", "vit_l16"]
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 : at + 3]][:count]
    found = []
    for teacher, student in pairs:
        one = link(student, teacher)
        epochs = factor * model.epochs(one)
        ends = {"low": 0.99 * epochs, "high": 1.01 * epochs}
        found.append(Match(one.student, one.teacher, 1, CC3M, 128.0, epochs, "measured in a test", **ends))
    return found


def test_own_matches_outweigh_the_paper() -> None:
    unseen = link("vit_l16", "vit_b16", 1, CC3M)
    paper = fitted(start=None).epochs(unseen)
    own = [match for match in own_matches(2.5, 11) if match.student.name != "vit_l16"]
    learnt = fitted(start=None, own=own)
    assert learnt.epochs(unseen) == pytest.approx(2.5 * paper, rel=0.1)
    mixed = EpochModel.fit([*paper_matches(), *own], start=None)
    assert abs(learnt.epochs(unseen) - 2.5 * paper) < abs(mixed.epochs(unseen) - 2.5 * paper)


def test_the_paper_is_a_wide_prior() -> None:
    """One own match far from the target still widens the range."""
    one = own_matches(1.0, 1)
    target = link("vit_l16", "vit_b16", 3)
    paper, learnt = fitted().predict(target), fitted(own=one).predict(target)
    assert learnt.high / learnt.low > 1.5 * paper.high / paper.low


def test_a_measured_link_takes_its_measurement() -> None:
    measured = Match(resolve("vit_s16"), resolve("vit_t16"), 1, CC3M, 128.0, 40.0, "here", low=36.0, high=44.0)
    model = fitted(own=[measured])
    renamed = LinkEpochs(replace(S, name="other"), T, 3, CC3M, 128.0)
    assert model.epochs(renamed) == 40.0
    found = model.predict(renamed)
    assert 36.0 < found.low < 40.0 < found.high < 44.0
    assert model.outside(renamed) == []
    for other in (link(images=CC3M + 1), link(baseline_epochs=64.0), link(distilled=False)):
        assert model.measured(other) is None
    later = replace(measured, position=2, epochs=30.0)
    both = fitted(own=[measured, later])
    assert [both.epochs(link(position=position)) for position in (1, 2, 3)] == [40.0, 30.0, 30.0]


def test_an_open_end_shows_in_the_range_of_a_measured_link() -> None:
    def found(**ends: float | None) -> Range:
        return fitted(own=[Match(S, T, 1, CC3M, 128.0, 40.0, "here", **ends)]).predict(link())

    closed, above, below = found(low=36.0, high=44.0), found(low=36.0), found(high=44.0)
    neither = found()
    assert closed.middle == above.middle == below.middle == neither.middle == 40
    assert 36 < closed.low == pytest.approx(above.low)
    assert 44 > closed.high == pytest.approx(below.high)
    quantile = 1.2816 / 2  # of a normal distribution at 90 %, in units of the half-width of 95 %
    assert above.high == pytest.approx(40 * math.exp(quantile * OPEN_END), rel=0.03)
    assert below.low == pytest.approx(40 * math.exp(-quantile * OPEN_END), rel=0.03)
    assert neither.low < below.low < above.high < neither.high
    assert found(low=15.0).high > above.high, "at least twice as far as the known end"


@given(st.floats(-30, 30), st.floats(0.01, 20), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_quantiles_of_a_truncated_t_of_two_degrees(low: float, width: float, share: float) -> None:
    """Two degrees of freedom have their distribution in closed form, 1/2 + t / (2 root(2 + t^2))."""

    def below(t: float) -> float:
        return 0.5 + t / (2 * math.sqrt(2 + t * t))

    high = low + width
    for ends in ((low, high), (low, math.inf), (-math.inf, high)):
        found = float(truncated_t(share, 2.0, 0.0, 1.0, *ends))
        least, most = (below(end) if math.isfinite(end) else float(end > 0) for end in ends)
        assert ends[0] < found < ends[1]
        assert (below(found) - least) / (most - least) == pytest.approx(share, abs=2e-3)


FAR = 30_000_000


@pytest.mark.parametrize(
    ("one", "ends", "close"),
    [
        (link(), {"more_than": 27.0}, 0.01),
        (link(), {"at_most": 26.0}, 0.01),
        (link("vit_l16", "vit_b16", 3, FAR), {"more_than": 40.0}, 0.03),
        (link("vit_l16", "vit_b16", 3, FAR), {"at_most": 60.0}, 0.03),
        (link("vit_l16", "vit_s16", 1, FAR), {"at_most": 100.0}, 0.03),
    ],
)
def test_a_bound_conditions_the_prediction(one: LinkEpochs, ends: dict[str, float], close: float) -> None:
    """Against the draws that keep to the bound: those that do not are thrown away."""
    free = fitted().draws([one], count=400_000)[:, 0]
    kept = free[free > ends["more_than"]] if "more_than" in ends else free[free <= ends["at_most"]]
    found = fitted(bounds=[Bound(one, "here", **ends)]).predict(one)
    expected = np.quantile(kept, [0.5, (1 - LEVEL) / 2, (1 + LEVEL) / 2])
    assert [found.middle, found.low, found.high] == pytest.approx(expected, rel=close)


def test_quantiles_of_a_mixture_of_t() -> None:
    rng = np.random.default_rng(5)
    middles, scales = np.array([-3.0, 0.0, 4.0]), np.array([0.3, 1.0, 0.5])
    picked = rng.integers(0, 3, size=400_000)
    drawn = middles[picked] + scales[picked] * rng.standard_t(8.0, size=len(picked))
    for low, high in ((-math.inf, math.inf), (-2.9, 4.1), (0.5, math.inf)):
        kept, shares = drawn[(drawn > low) & (drawn < high)], np.array([0.1, 0.25, 0.6, 0.9])
        assert truncated_t(shares, 8.0, middles, scales, low, high) == pytest.approx(
            np.quantile(kept, shares), abs=0.02
        )


@given(st.floats(1.0, 120.0))
@settings(max_examples=30, deadline=None)
def test_a_bound_is_never_the_prediction_itself(epochs: float) -> None:
    one = link()
    for bound in (Bound(one, "here", more_than=epochs), Bound(one, "here", at_most=epochs)):
        model = fitted(bounds=[bound])
        found, drawn = model.predict(one), model.draws([one])
        assert found.low < found.middle < found.high or found.middle == 128
        assert found.low < found.high
        if bound.at_most is None:
            assert model.epochs(one) > epochs < drawn.min()
        else:
            assert model.epochs(one) < epochs > drawn.max()


def test_bounds_hold_for_their_own_link() -> None:
    one, elsewhere = link(), link("vit_b16", "vit_s16", 2)
    longest = fitted(bounds=[Bound(one, "here", more_than=50.0)])
    assert longest.epochs(elsewhere) == fitted().epochs(elsewhere)
    assert longest.predict(elsewhere) == fitted().predict(elsewhere)
    assert fitted(bounds=[Bound(one, "here", more_than=300.0)]).predict(one) == Range(128, 128, 128)
    nothing_new = fitted(bounds=[Bound(one, "here", more_than=1.0)]).predict(one)
    assert nothing_new.middle == pytest.approx(fitted().epochs(one))
    assert nothing_new.high == pytest.approx(fitted().predict(one).high, rel=0.01)
    links = [one, elsewhere]
    assert np.corrcoef(np.log(longest.draws(links).T))[0, 1] > 0.05, "draws stay joint"


def test_bounds_of_a_start_that_may_be_too_small() -> None:
    """The start prior widens what a bound leaves."""
    below = link("vit_s16", "vit_c16", images=MERGED)
    narrow, wide = (
        fitted(start=start, bounds=[Bound(below, "here", more_than=100.0)]).epochs(below)
        for start in (None, StartPrior())
    )
    assert 100 < narrow < wide


@pytest.mark.parametrize("change", [{"epochs": 0.0}, {"baseline_epochs": -1.0}, {"images": 0}])
def test_an_impossible_match_is_refused(change: dict[str, float]) -> None:
    wrong = replace(paper_matches()[0], **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="vit_t16 to vit_s16.*has to be above 0"):
        EpochModel.fit([wrong])
