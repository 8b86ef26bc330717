"""The model of required epochs: its arithmetic against other formulas, its points, its edges, a lab's own matches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.curves import Match
from compt.design.epochs import (
    FEATURES,
    LEVEL,
    OVERSHOOT,
    PRIOR,
    Bound,
    EpochModel,
    Link,
    Range,
    StartPrior,
    features,
    log2_size,
    paper_matches,
)
from compt.errors import ConfigError
from compt.macs import paper_parameters
from compt.paper import IMAGES
from compt.presets import PRESETS, resolve

CC3M, MERGED = IMAGES["cc3m"], IMAGES["merged15m"]
T, S, B, L = (PRESETS[f"vit_{size}16"] for size in "tsbl")


def link(
    student: str = "vit_s16", teacher: str = "vit_t16", position: int = 1, images: int = CC3M, **other: object
) -> Link:
    values = {"baseline_epochs": 128.0, "distilled": True, **other}
    return Link(PRESETS[student], PRESETS[teacher], position, images, **values)  # type: ignore[arg-type]


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
        found.append(Match(one.student, one.teacher, 1, CC3M, 128.0, epochs, "measured in a test"))
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
    renamed = Link(replace(S, name="other"), T, 3, CC3M, 128.0)
    assert model.epochs(renamed) == 40.0
    found = model.predict(renamed)
    assert 36.0 < found.low < 40.0 < found.high < 44.0
    assert model.outside(renamed) == []
    for other in (link(images=CC3M + 1), link(baseline_epochs=64.0), link(distilled=False)):
        assert model.measured(other) is None
    later = replace(measured, position=2, epochs=30.0)
    both = fitted(own=[measured, later])
    assert [both.epochs(link(position=position)) for position in (1, 2, 3)] == [40.0, 30.0, 30.0]


def test_bounds_hold_for_their_own_link() -> None:
    one = link()
    longest = Bound(one, "here", more_than=50.0)
    shortest = Bound(one, "here", at_most=10.0)
    assert fitted(bounds=[longest]).epochs(one) == 50.0
    assert fitted(bounds=[shortest]).epochs(one) == 10.0
    assert fitted(bounds=[longest]).draws([one]).min() == 50.0
    assert fitted(bounds=[shortest]).draws([one]).max() == 10.0
    assert fitted(bounds=[Bound(one, "here", more_than=300.0)]).epochs(one) == 128.0
    elsewhere = link("vit_b16", "vit_s16", 2)
    assert fitted(bounds=[longest]).epochs(elsewhere) == fitted().epochs(elsewhere)


@pytest.mark.parametrize("change", [{"epochs": 0.0}, {"baseline_epochs": -1.0}, {"images": 0}])
def test_an_impossible_match_is_refused(change: dict[str, float]) -> None:
    wrong = replace(paper_matches()[0], **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="vit_t16 to vit_s16.*has to be above 0"):
        EpochModel.fit([wrong])
