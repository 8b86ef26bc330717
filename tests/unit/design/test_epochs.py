"""The line through the published epochs, its range, and how a user's own runs change both."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.cost.paper import IMAGES
from compt.cost.published import paper_parameters
from compt.design.curves import LinkCurve, LinkEpochs
from compt.design.epochs import (
    FEATURES,
    START_FACTOR,
    EpochModel,
    Range,
    features,
    leave_one_out,
    paper_matches,
)
from compt.design.sizes import fits, halvings, log2_size, log2_smallest
from compt.models.presets import PRESETS
from tests.helpers.curves import own

CC3M, MERGED = IMAGES["cc3m"], IMAGES["merged15m"]
T, S, B, L = (PRESETS[f"vit_{size}16"] for size in "tsbl")
PAPER = EpochModel.fit(paper_matches())


def link(
    student: str = "vit_s16", teacher: str = "vit_t16", position: int = 1, images: int = CC3M, **other: Any
) -> LinkEpochs:
    return LinkEpochs(PRESETS[student], PRESETS[teacher], position, images, **{"baseline_epochs": 128.0, **other})


def fitted(*curves: LinkCurve) -> EpochModel:
    return EpochModel.fit(paper_matches(), curves)


def test_the_published_points() -> None:
    shown = [
        (m.teacher.name, m.student.name, m.position, m.images, m.baseline_epochs, m.epochs, m.distilled)
        for m in paper_matches()
    ]
    assert shown == [
        ("vit_t16", "vit_s16", 1, CC3M, 128, 23.45, True),
        ("vit_s16", "vit_b16", 2, CC3M, 128, 18.28, True),
        ("vit_b16", "vit_l16", 3, CC3M, 128, 12.34, True),
        ("swin_t", "swin_s", 1, CC3M, 128, 24.0, True),
        ("swin_s", "swin_b", 2, CC3M, 128, 16.0, True),
        ("swin_b", "swin_l", 3, CC3M, 128, 12.0, True),
        ("vit_s16", "vit_m16", 1, MERGED, 64, 21.0, True),
        ("vit_m16", "vit_b16", 2, MERGED, 64, 17.0, True),
        ("vit_b16", "vit_l16", 3, MERGED, 64, 15.0, True),
        ("vit_t16", "vit_s16", 1, CC3M, 128, 32, False),
        ("vit_t16", "vit_b16", 1, CC3M, 128, 92, False),
    ]


def test_features() -> None:
    row = features(log2_size(S), log2_size(T), 3, 4 * CC3M)
    assert row == pytest.approx([1, math.log2(paper_parameters(S) / paper_parameters(T)), 2, 2])
    assert len(row) == len(FEATURES)
    assert features(np.zeros((4, 1)), np.zeros(5), 1, CC3M).shape == (4, 5, 4)


def test_the_line_is_least_squares() -> None:
    """Against the normal equations, written out from the published numbers alone."""
    points = [match for match in paper_matches() if match.distilled]
    rows = np.array(
        [
            [
                1,
                math.log2(paper_parameters(m.student) / paper_parameters(m.teacher)),
                m.position - 1,
                math.log2(m.images / CC3M),
            ]
            for m in points
        ]
    )
    logs = np.log([m.epochs / m.baseline_epochs for m in points])
    expected = np.linalg.solve(rows.T @ rows, rows.T @ logs)
    assert pytest.approx(expected) == PAPER.coefficients
    for match, row in zip(points, rows, strict=True):
        same = replace(link(), **{key: getattr(match, key) for key in vars(link())})
        assert PAPER.predict(same).middle == pytest.approx(match.baseline_epochs * math.exp(row @ expected))


def test_the_range_is_the_largest_error_with_a_point_left_out() -> None:
    """Against fits that really leave each point out."""
    points, errors = [match for match in paper_matches() if match.distilled], []
    for at, match in enumerate(points):
        line = EpochModel.fit([*points[:at], *points[at + 1 :]])
        row = features(log2_size(match.student), log2_size(match.teacher), match.position, match.images)
        errors.append(math.log(match.epochs / match.baseline_epochs) - row @ line.coefficients)
    assert pytest.approx(errors) == PAPER.errors
    assert PAPER.factor() == pytest.approx(math.exp(max(map(abs, errors))))
    found = PAPER.predict(link())
    assert found.middle / found.low == pytest.approx(PAPER.factor())
    assert found.high / found.middle == pytest.approx(PAPER.factor())


def test_leave_one_out_of_a_mean() -> None:
    assert leave_one_out(np.ones((3, 1)), np.array([1.0, 2.0, 6.0])) == pytest.approx([-3, -1.5, 4.5])


def test_without_distillation_a_link_takes_longer() -> None:
    """Both published numbers lie in the range; the median is the middle between them."""
    both = [(link(distilled=False), 32.0), (link("vit_b16", distilled=False), 92.0)]
    ratios = []
    for one, published in both:
        found, with_features = PAPER.predict(one), PAPER.predict(replace(one, distilled=True))
        assert found.low <= published * 1.0001
        assert published <= found.high * 1.0001
        ratios.append(published / with_features.middle)
        assert found.middle > with_features.high
    assert PAPER.moves[False][0] == pytest.approx(math.log(math.sqrt(ratios[0] * ratios[1])))


def test_a_link_is_no_worse_than_scratch() -> None:
    hard = link("vit_l16", "vit_t16", images=1000 * CC3M, distilled=False)
    assert PAPER.predict(hard) == Range(128, 128, 128)


@given(st.floats(1, 500))
@settings(max_examples=20, deadline=None)
def test_epochs_grow_in_proportion_to_the_baseline_s(baseline: float) -> None:
    one = PAPER.predict(link(baseline_epochs=1.0)).middle
    assert PAPER.predict(link(baseline_epochs=baseline)).middle == pytest.approx(baseline * one)


def test_extrapolation_never_saves_epochs() -> None:
    sizes = np.array([log2_size(S), log2_size(T)])
    least = log2_size(PRESETS["vit_m16"]) - log2_size(S)

    def logs(student: float = sizes[0], teacher: float = sizes[1], position: int = 1, images: int = CC3M) -> float:
        return float(PAPER.log_fraction(student, teacher, position, images, True))

    assert logs(student=sizes[1] + least / 2) == pytest.approx(logs(student=sizes[1] + least))
    assert logs(position=9) == pytest.approx(logs(position=3))
    assert logs(position=3) < logs(position=2)
    assert logs(images=CC3M // 100) == pytest.approx(logs())
    large = log2_size(L)
    assert logs(large + 1, large, images=100 * CC3M) > logs(large + 1, large, images=MERGED) > logs(large + 1, large)
    assert logs(student=sizes[1] + 4) > logs()
    assert PAPER.outside(link()) == []
    assert PAPER.outside(link(position=4, images=MERGED * 2)) == ["position", "number of images"]
    assert PAPER.outside(link("vit_l16")) == ["size step"]


def test_the_start_rule() -> None:
    assert 2 ** log2_smallest(CC3M) == pytest.approx(paper_parameters(T))
    assert 2 ** log2_smallest(MERGED) == pytest.approx(paper_parameters(S))
    doublings = np.diff([log2_smallest(images) for images in (CC3M, MERGED, MERGED**2 // CC3M)])
    assert doublings[0] == pytest.approx(doublings[1], rel=1e-3)
    assert fits([log2_size(T), log2_size(S)], MERGED).tolist() == [False, True]
    halvings = math.log2(paper_parameters(S) / paper_parameters(T))
    below, above = (float(PAPER.log_fraction(size + 1, size, 1, MERGED, True)) for size in map(log2_size, (T, S)))
    assert below - above == pytest.approx(halvings * math.log(START_FACTOR))


def test_plans_beyond_the_points_carry_a_caution() -> None:
    assert PAPER.caution(CC3M) is None
    assert PAPER.caution(MERGED) is None
    text = PAPER.caution(2_000_000_000)
    assert text is not None
    for part in ("2,000,000,000 images", "2.3x", "pessimistic"):
        assert part in text


def test_own_links_shift_the_line_by_their_median() -> None:
    pairs = [("vit_c16", "vit_t16"), ("vit_m16", "vit_s16"), ("vit_xb16", "vit_b16")]
    line = [PAPER.predict(link(*pair)).middle for pair in pairs]
    model = fitted(*(own(link(*pair), f * e) for pair, f, e in zip(pairs, (2.0, 2.5, 4.0), line, strict=True)))
    unseen = link("vit_l16", "vit_b16", 1)
    found, before = model.predict(unseen), PAPER.predict(unseen)
    assert found.middle == pytest.approx(2.5 * before.middle)
    assert found.high / found.middle == pytest.approx(4.0 / 2.5), "as far as the worst of them from the shifted line"
    alone = fitted(own(link(*pairs[0]), 2 * line[0]))
    assert alone.predict(unseen).middle == pytest.approx(2 * before.middle)
    assert alone.factor() == pytest.approx(PAPER.factor()), "one link shows no scatter: that of the paper stays"
    without = link("vit_l16", "vit_b16", 1, distilled=False)
    assert model.predict(without) == PAPER.predict(without), "links of another kind say nothing of it"


def test_a_small_start_that_was_measured_does_not_shorten_other_links() -> None:
    """The rule for small starts asks for 4 times the epochs. It needed 1.5 times the line's: others take that."""
    tiny = replace(T, depth=5, text_depth=5, name="tiny")
    first, other = LinkEpochs(T, tiny, 1, CC3M, 128.0), link("vit_l16", "vit_b16", 1)
    gone = 2.0 ** float(halvings(log2_size(tiny), CC3M))
    line = PAPER.predict(first).middle / gone
    assert 2 < gone < 128 / line
    model = fitted(own(first, 1.5 * line))
    assert model.predict(other).middle == pytest.approx(1.5 * PAPER.predict(other).middle)
    assert model.predict(first).middle == pytest.approx(1.5 * line)


def test_a_start_that_was_measured_counts_for_links_of_its_kind_alone() -> None:
    tiny = replace(T, depth=5, text_depth=5, name="tiny")
    for kind in (True, False):
        first = LinkEpochs(T, tiny, 1, CC3M, 128.0, kind)
        model, other = fitted(own(first, 60.0)), replace(first, student=S, distilled=not kind)
        assert model.smallest(CC3M, kind) == log2_size(tiny)
        assert model.smallest(CC3M, not kind) == log2_smallest(CC3M)
        assert model.predict(other) == PAPER.predict(other)


def test_a_measured_link_takes_its_measurement() -> None:
    measured = own(link(), 40.0, low=36.0, high=44.0)
    model = fitted(measured)
    renamed = LinkEpochs(replace(S, name="other"), T, 3, CC3M, 128.0)
    assert model.predict(renamed) == Range(40.0, 36.0, 44.0)
    assert model.outside(replace(renamed, position=9)) == []
    for other in (link(images=CC3M + 1), link(baseline_epochs=64.0), link(distilled=False)):
        assert model.measured(other) == []
    lemon = replace(S, norm_eps=2e-5, text_norm_eps=3e-5, timm_name="x")
    assert fitted(own(replace(link(), student=lemon), 40.0)).predict(link()).middle == 40, (
        "an operator changed its norms"
    )
    both = fitted(measured, own(link(position=2), 30.0))
    assert [both.predict(link(position=position)).middle for position in (1, 2, 3)] == [40.0, 30.0, 30.0]
    open_ends = fitted(own(link(), 40.0))
    found = open_ends.predict(link())
    assert found.high / 40 == pytest.approx(40 / found.low) == pytest.approx(open_ends.factor())


def test_a_bound_moves_the_range_of_its_link_alone() -> None:
    elsewhere = link("vit_b16", "vit_s16", 2)
    too_short, enough = fitted(own(link(), more_than=50.0)), fitted(own(link(), at_most=10.0))
    assert too_short.predict(link()).low == pytest.approx(50)
    assert enough.predict(link()).high == pytest.approx(10)
    for model in (too_short, enough):
        assert model.predict(elsewhere) == PAPER.predict(elsewhere)
        found = model.predict(link())
        assert found.high / found.low == pytest.approx(PAPER.factor() ** 2)
    assert fitted(own(link(), more_than=300.0)).predict(link()) == Range(128, 128, 128)
    assert fitted(own(link(), more_than=1.0)).predict(link()) == PAPER.predict(link())
    assert fitted(own(link(), at_most=100.0)).predict(link()) == PAPER.predict(link())
    assert fitted(own(link(), more_than=50.0), own(link(), 60.0)).predict(link()).middle == 60, "a match says more"


def test_all_bounds_of_a_link_hold_in_any_order() -> None:
    bounds = [own(link(), more_than=20.0), own(link(), more_than=50.0), own(link(), at_most=100.0)]
    for known in (bounds, bounds[::-1]):
        assert fitted(*known).predict(link()).low == pytest.approx(50)
        assert len(fitted(*known).measured(link())) == 3
    enough = [own(link(), at_most=10.0), own(link(), at_most=90.0), own(link(), more_than=2.0)]
    for known in (enough, enough[::-1]):
        assert fitted(*known).predict(link()).high == pytest.approx(10)
    against = [own(link(), more_than=50.0), own(link(), at_most=30.0)]
    for known in (against, against[::-1]):
        assert fitted(*known).predict(link()).low == pytest.approx(50), (
            "the larger one of two that contradict each other"
        )
