"""Epochs to match a baseline, measured on runs whose answer is known by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compt.design.crossing import crossing, interval, isotonic, paired_draws
from compt.design.curves import LinkCurve, names, read_curves
from compt.design.sizes import position
from compt.errors import ConfigError, RunError
from tests.helpers import recipe as helpers_recipe
from tests.helpers.curves import (
    BASELINE,
    NANO,
    PICTURES,
    PINS,
    SET,
    job,
    lengths,
    link,
    right,
    write_answers,
    write_run,
)

POINTS = {5: 20.0, 10: 24.0, 20: 28.0}


def matches(runs: list[Path], **options: Any) -> list[LinkCurve]:
    return read_curves(runs, **options).links


def only(links: list[LinkCurve]) -> LinkCurve:
    (found,) = links
    return found


def met(link: LinkCurve) -> float:
    """Epochs to match."""
    assert link.match is not None, link.reason
    return link.match.epochs


# Fitting.


def pooled(values: list[float], weights: list[float]) -> list[float]:
    """Isotonic regression by pooling adjacent violators, block by block."""
    blocks: list[list[float]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, wa, na), (b, wb, nb) = blocks[-2:]
            blocks[-2:] = [[(a * wa + b * wb) / (wa + wb), wa + wb, na + nb]]
    return [value for value, _, count in blocks for _ in range(int(count))]


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), min_size=1, max_size=9))
def test_isotonic_is_pooling_of_adjacent_violators(pairs: list[tuple[float, int]]) -> None:
    values, weights = [float(value) for value, _ in pairs], [float(weight) for _, weight in pairs]
    np.testing.assert_allclose(isotonic(values, weights), pooled(values, weights), atol=1e-9)
    np.testing.assert_allclose(isotonic([values, values[::-1]], weights)[0], pooled(values, weights), atol=1e-9)


@pytest.mark.parametrize(
    ("accuracy", "target", "expected"),
    [
        ([20, 24, 28], 25, 12.5),
        ([20, 24, 28], 22, 7.5),
        ([20, 24, 28], 24, 10),
        ([20, 24, 28], 20, 5),
        ([20, 24, 28], 28, 20),
        ([20, 24, 28], 19.9, -np.inf),
        ([20, 24, 28], 28.1, np.inf),
        ([20, 24, 24], 24, 10),  # a flat end is reached where it begins
        ([24, 20, 28], 25, 15),  # 24 and 20 are pooled to 22
        ([20, 30, 26], 28, 10),  # pooled to 28
        ([30, 28, 26], 27, -np.inf),
    ],
)
def test_crossings_by_hand(accuracy: list[float], target: float, expected: float) -> None:
    assert float(crossing([5, 10, 20], accuracy, target, [1, 1, 1])) == pytest.approx(expected, abs=1e-9)


def test_many_curves_are_crossed_as_one_is() -> None:
    draws = np.random.default_rng(0).uniform(0, 100, (200, 4))
    together = crossing([1, 2, 4, 8], draws, draws.mean(axis=1), [1, 2, 1, 3])
    single = [float(crossing([1, 2, 4, 8], row, row.mean(), [1, 2, 1, 3])) for row in draws]
    np.testing.assert_array_equal(together, single)


def test_the_paired_interval_is_that_of_drawing_images() -> None:
    answers = [right(20), right(30, 50), right(24, 20)]
    low, high = interval([10, 20], paired_draws([item.astype(float) for item in answers]), 0.0, [1, 1])
    generator, found = np.random.default_rng(5), []
    for _ in range(4000):
        at = generator.integers(PICTURES, size=PICTURES)
        first, second, goal = (item[at].mean() for item in answers)
        found.append(10 + 10 * (goal - first) / (second - first))
    wanted = np.percentile(found, [2.5, 97.5])
    assert 10 < wanted[0] < wanted[1] < 20
    np.testing.assert_allclose([low, high], wanted, atol=0.2)


def test_sides_of_an_interval_outside_the_points_are_open() -> None:
    def draws(baseline: float) -> np.ndarray:
        return np.stack([np.full(200, 20.0), np.full(200, 30.0), baseline + np.linspace(-4, 4, 200)], axis=1)

    low, high = interval([10, 20], draws(25.0), 0.0, [1, 1])
    assert (low, high) == (pytest.approx(11.2, abs=0.2), pytest.approx(18.8, abs=0.2))
    assert interval([10, 20], draws(22.0), 0.0, [1, 1]) == (None, pytest.approx(15.8, abs=0.2))
    assert interval([10, 20], draws(28.0), 0.0, [1, 1]) == (pytest.approx(14.2, abs=0.2), None)
    assert interval([10, 20], draws(40.0), 0.0, [1, 1]) == (20, None)
    assert interval([10, 20], draws(10.0), 0.0, [1, 1]) == (None, 10)
    assert interval([10, 20], draws(25.0), 3.0, [1, 1]) == (None, pytest.approx(15.8, abs=0.2))


# From runs to curves.


def test_a_crossing_by_hand(tmp_path: Path) -> None:
    found = only(matches(lengths(tmp_path, POINTS)))
    assert [(point.epochs, point.top1) for point in found.points] == [(5, 20), (10, 24), (20, 28)]
    assert found.points[0].jobs == (f"{tmp_path}/e5/2-vit_micro",)
    assert found.baseline is not None
    assert (found.baseline.epochs, found.baseline.top1, found.target) == (60, 25, 25)
    match = found.match
    assert match is not None
    assert match.epochs == pytest.approx(10 + 10 * (25 - 24) / (28 - 24))
    # 60 epochs of 2e9 MACs over 12.5 of 3e9.
    assert found.acceleration(match.epochs) == pytest.approx(120 / 37.5)
    assert (match.student.name, match.teacher.name, match.position) == ("vit_micro", "vit_nano", 1)
    assert (match.images, match.baseline_epochs, match.distilled) == (5000, 60, True)
    assert match.source == f"measured on {SET}: {tmp_path}/e10, {tmp_path}/e20, {tmp_path}/e5"
    assert found.paired
    assert match.low is not None
    assert match.high is not None
    assert 10 < match.low < match.epochs < match.high < 20
    assert found.reason is found.at_most is found.more_than is None


def test_the_lossless_target_lies_half_a_point_lower(tmp_path: Path) -> None:
    found = only(matches(lengths(tmp_path, POINTS), target="lossless"))
    assert found.target == 24.5
    assert met(found) == pytest.approx(11.25)


@pytest.mark.parametrize(
    ("points", "at_most", "more_than"),
    [
        ({10: 26.0, 20: 28.0}, 10, None),
        ({10: 20.0, 20: 24.0}, None, 20),
        ({10: 26.0}, 10, None),
        ({10: 20.0}, None, 10),
    ],
)
def test_nothing_is_extrapolated(
    tmp_path: Path, points: dict[int, float], at_most: float | None, more_than: float | None
) -> None:
    runs = lengths(tmp_path, points)
    found = only(matches(runs))
    assert found.match is None
    assert (found.at_most, found.more_than) == (at_most, more_than)
    assert found.reason == (
        "its shortest schedule, 10 epochs, is enough"
        if at_most
        else f"its longest schedule, {more_than} epochs, is not enough"
    )


def test_noise_does_not_make_a_match_early(tmp_path: Path) -> None:
    found = only(matches(lengths(tmp_path, {5: 20.0, 10: 26.0, 15: 22.0, 20: 28.0})))
    # 26 and 22 are pooled to 24; the first crossing of the raw line would be 9.17.
    assert met(found) == pytest.approx(16.25)
    assert [point.top1 for point in found.points] == [20, 26, 22, 28]


def test_values_in_the_middle_of_a_schedule_are_no_points(tmp_path: Path) -> None:
    runs = lengths(tmp_path, POINTS)
    lines = [{"kind": "eval", "step": 10 * at, f"{SET}/top1": 90.0} for at in range(1, 20)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (runs[2] / "jobs" / "2-vit_micro" / "metrics.jsonl").write_text(text)
    going = write_run(tmp_path / "going", [link(40, 90.0, state="training")])
    (going / "jobs" / "2-vit_micro" / "metrics.jsonl").write_text(text)
    cut = write_run(tmp_path / "cut", [link(30, 90.0, trained={"steps": 120})])
    found = read_curves([*runs, going, cut])
    assert [point.top1 for point in only(found.links).points] == [20, 24, 28]
    assert [(item.job, item.reason) for item in found.skipped] == [
        (f"{tmp_path}/going/2-vit_micro", "is not finished (training)"),
        (f"{tmp_path}/cut/2-vit_micro", "was trained for 120 of 300 steps: that is not the end of its schedule"),
    ]


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path: Path) -> None:
    runs = lengths(tmp_path, POINTS)
    bad = write_run(
        tmp_path / "bad",
        [
            link(30, 30.0, "a"),
            link(31, 30.0, "b", state="wrong"),
            link(32, 30.0, "c", cost={}),
            link(33, 30.0, "d", cost={"total_macs": -1}),
            link(34, 30.0, "e", state="expanded"),
            link(35, 30.0, "f", result={"data": {"images": 5000}, "optimizer": {"lr": 1e-3}}),
            link(36, 30.0, "g", spec={"colour": 1}),
        ],
        listed=[{"name": "h", "kind": "link"}, {"name": "i", "kind": "baseline", "same_as": "h"}],
    )
    (bad / "jobs" / "a" / "manifest.json").write_text("{")
    other = write_run(tmp_path / "other", [link(37, 30.0)])
    manifest = json.loads((other / "jobs" / "2-vit_micro" / "manifest.json").read_text())
    manifest["scores"] = {"retrieval": {"text_to_image_r1": 3.0}}
    (other / "jobs" / "2-vit_micro" / "manifest.json").write_text(json.dumps(manifest))
    found = read_curves([*runs, bad, other])
    assert [point.epochs for point in only(found.links).points] == [5, 10, 20]
    reasons = {item.job.removeprefix(f"{tmp_path}/"): item.reason for item in found.skipped}
    assert set(reasons) == {*(f"bad/{name}" for name in "abcdefgh"), "other/2-vit_micro"}
    assert "cannot be read" in reasons["bad/a"]
    assert reasons["bad/b"] == "is not finished (wrong)"
    assert "damaged" in reasons["bad/c"]
    assert "total_macs" in reasons["bad/c"]
    assert "total_macs = -1" in reasons["bad/d"]
    assert reasons["bad/e"] == "is not finished (expanded)"
    assert "distill" in reasons["bad/f"]
    assert "spec.name" in reasons["bad/g"]
    assert reasons["bad/h"] == "was not begun"
    assert reasons["other/2-vit_micro"] == f"was not scored on {SET}"


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file", "."):
        with pytest.raises(RunError, match="is not a run folder"):
            matches([tmp_path / name])
    for text in ("{", "[]", '{"jobs": 3, "data_fingerprint": "", "primary": null}', '{"jobs": []}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunError, match=r"run\.json"):
            matches([tmp_path])


def test_models_scored_with_other_pins_are_not_joined(tmp_path: Path) -> None:
    runs = lengths(tmp_path, POINTS)
    other = write_run(tmp_path / "other", [NANO, link(40, 90.0, pins={**PINS, "templates": "templates-2"})])
    first, second = matches([*runs, other])
    assert [point.epochs for point in first.points] == [5, 10, 20]
    assert first.match is not None
    assert [point.epochs for point in second.points] == [40]
    assert second.match is second.baseline is None
    assert (
        second.reason == f"{tmp_path}/e5/baseline-vit_micro-s0 is not its baseline: they differ in evaluation templates"
    )
    assert names([first, second])[1] == "vit_nano → vit_micro, evaluation.templates templates-2"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr": 2e-3}, "optimizer.lr 0.002"),
        ({"alpha": 100.0}, "distill.alpha 100"),
        ({"seed": 1}, "seed 1"),
    ],
)
def test_another_setting_is_another_curve(tmp_path: Path, changes: dict[str, float], told: str) -> None:
    other = write_run(tmp_path / "other", [NANO, link(40, 40.0, **changes)])
    first, second = matches([*lengths(tmp_path, POINTS), other])
    assert [point.epochs for point in first.points] == [5, 10, 20]
    assert [point.epochs for point in second.points] == [40]
    assert names([first, second])[1] == f"vit_nano → vit_micro, {told}"
    # The baseline is the same: a link may have a learning rate of its own.
    assert first.baseline == second.baseline


def test_other_shards_are_another_curve_without_this_baseline(tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", [NANO, link(40, 40.0)], shards="shards-2")
    first, second = matches([*lengths(tmp_path, POINTS), other])
    assert len(first.points) == 3
    assert second.baseline is None
    assert second.reason == f"{tmp_path}/e5/baseline-vit_micro-s0 is not its baseline: they differ in data"


def test_without_a_baseline_there_is_no_target(tmp_path: Path) -> None:
    found = only(matches(lengths(tmp_path, POINTS, None)))
    assert found.match is found.target is found.baseline is found.acceleration(5) is None
    assert found.reason == "there is no finished baseline of vit_micro"


def test_seeds_are_curves_of_their_own_unless_averaged(tmp_path: Path) -> None:
    jobs = [NANO, BASELINE, job("baseline-vit_micro-s1", 60, 27.0, kind="baseline", seed=1)]
    jobs += [link(5, 20.0, "a"), link(20, 30.0, "b")]
    jobs += [link(5, 24.0, "c", seed=1), link(20, 32.0, "d", seed=1), link(10, 27.0, "e", seed=1)]
    run = write_run(tmp_path / "run", jobs)
    first, second = matches([run])
    assert first.baseline is not None
    assert (first.baseline.top1, first.baseline.seeds) == (26, (0, 1))
    assert first.baseline.spread == pytest.approx(2**0.5)
    assert met(first) == pytest.approx(14)
    assert met(second) == pytest.approx(5 + 5 * 2 / 3)
    found = only(matches([run], average_seeds=True))
    assert [(point.epochs, point.top1, point.seeds) for point in found.points] == [
        (5, 22, (0, 1)),
        (10, 27, (1,)),
        (20, 31, (0, 1)),
    ]
    assert found.points[0].spread == pytest.approx(4 / 2**0.5)
    assert found.points[1].spread is None
    assert met(found) == pytest.approx(9)


def test_a_mean_over_seeds_weighs_more_than_a_single_training(tmp_path: Path) -> None:
    jobs = [NANO, BASELINE, link(5, 28.0, "a"), link(5, 28.0, "b", seed=1), link(10, 22.0, "c"), link(20, 34.0, "d")]
    found = only(matches([write_run(tmp_path / "run", jobs)], average_seeds=True))
    # 28, twice, and 22 are pooled to 26, above the baseline's 25: were they equal, 25 would be met at 10 epochs.
    assert found.at_most == 5


def test_teachers_of_other_seeds_are_joined_only_when_averaged(tmp_path: Path) -> None:
    other = job("1-vit_nano", 60, 15.0, model="vit_nano", seed=1)
    longer = job("1-vit_nano", 90, 15.0, model="vit_nano", seed=1)
    runs = [
        write_run(tmp_path / "a", [NANO, BASELINE, link(5, 20.0)]),
        write_run(tmp_path / "b", [other, link(20, 30.0, teacher=other, seed=1)]),
        write_run(tmp_path / "c", [longer, link(30, 30.0, teacher=longer, seed=1)]),
    ]
    assert [len(found.points) for found in matches(runs)] == [1, 1, 1]
    assert [len(found.points) for found in matches(runs, average_seeds=True)] == [2, 1]


def test_a_teacher_is_its_recipe_on_its_data(tmp_path: Path) -> None:
    again = {**NANO, "model_hash": "another machine's weights"}
    longer = job("1-vit_nano", 90, 15.0, model="vit_nano")
    runs = [
        write_run(tmp_path / "a", [NANO, BASELINE, link(5, 20.0)]),
        write_run(tmp_path / "from", [link(10, 24.0, "1-vit_micro", outside=True)]),
        write_run(tmp_path / "again", [again, link(20, 28.0, teacher=again)]),
        write_run(tmp_path / "longer", [longer, link(40, 90.0, teacher=longer)]),
        write_run(tmp_path / "from-again", [link(50, 30.0, "1-vit_micro", teacher=again, outside=True)]),
    ]
    first, second = matches(runs)
    assert [point.epochs for point in first.points] == [5, 10, 20, 50]
    assert (first.position, second.position) == (1, 1)
    assert [point.epochs for point in second.points] == [40]
    assert "teacher " in names([first, second])[0]


def test_a_teacher_from_outside_needs_its_run_or_the_record_of_the_expansion(tmp_path: Path) -> None:
    jobs = [BASELINE, link(10, 24.0, "1-vit_micro", outside=True), link(20, 28.0, "other", outside=True)]
    run = write_run(tmp_path / "run", jobs)
    found = read_curves([run])
    assert found.links == []
    assert [item.reason for item in found.skipped] == [
        "its teacher's sizes are not known: give the run that trained the teacher too"
    ] * 2
    record = run / "jobs" / "1-vit_micro" / "initial" / "manifest.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"expansion": {"teacher": NANO["spec"]}}))
    known = only(matches([run]))
    assert known.teacher.name == "vit_nano"
    assert known.position == 1
    assert met(known) == pytest.approx(12.5)
    assert only(matches([run, write_run(tmp_path / "nano", [NANO])])).match is not None


def test_a_teacher_whose_manifest_is_lost_is_still_the_same_one(tmp_path: Path) -> None:
    inside = write_run(tmp_path / "inside", [NANO, BASELINE, link(10, 24.0)])
    (inside / "jobs" / "1-vit_nano" / "manifest.json").write_text("{")
    outside = write_run(tmp_path / "outside", [link(20, 28.0, "1-vit_micro", outside=True)])
    record = outside / "jobs" / "1-vit_micro" / "initial" / "manifest.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"expansion": {"teacher": NANO["spec"]}}))
    assert met(only(matches([inside, outside]))) == pytest.approx(12.5)


def test_jobs_that_the_run_no_longer_lists_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [NANO, BASELINE, link(10, 24.0), link(20, 28.0, "try-1-vit_micro")])
    state = json.loads((run / "run.json").read_text())
    state["jobs"] = [item for item in state["jobs"] if not item["name"].startswith("try")]
    (run / "run.json").write_text(json.dumps(state))
    assert met(only(matches([run]))) == pytest.approx(12.5)


def test_positions_count_the_models_before(tmp_path: Path) -> None:
    micro = link(10, 24.0)
    mini = job("3-vit_mini", 10, 30.0, model="vit_mini", teacher=micro)
    apart = job("1-vit_mini", 20, 34.0, model="vit_mini", teacher=micro, outside=True)
    alone = job("baseline-vit_mini-s0", 60, 31.0, model="vit_mini", kind="baseline")
    runs = [write_run(tmp_path / "a", [NANO, micro, mini, alone]), write_run(tmp_path / "b", [apart])]
    first, second = matches(runs[::-1])
    assert [(found.student.name, found.position) for found in (first, second)] == [("vit_micro", 1), ("vit_mini", 2)]
    assert second.match is not None
    assert (second.match.epochs, second.match.position) == (pytest.approx(12.5), 2)


def test_positions_count_as_those_of_a_plan(tmp_path: Path) -> None:
    """vit_pico is too small for 5,000 images. A line that was shifted at other positions would not predict its link."""
    pico = job("1-vit_pico", 60, 5.0, model="vit_pico")
    nano = job("2-vit_nano", 10, 15.0, model="vit_nano", teacher=pico)
    micro = link(10, 24.0, "3-vit_micro", teacher=nano)
    mini = job("4-vit_mini", 10, 30.0, model="vit_mini", teacher=micro)
    found = matches([write_run(tmp_path / "run", [pico, nano, micro, mini])])
    assert [(one.student.name, one.position) for one in found] == [("vit_nano", 1), ("vit_micro", 1), ("vit_mini", 2)]
    specs = [found[0].teacher, *(one.student for one in found)]
    assert [one.position for one in found] == [position(specs[: at + 1], 5000) for at in range(3)]


def test_a_teacher_from_outside_counts_in_positions(tmp_path: Path) -> None:
    micro = link(10, 24.0, outside=True)
    mini = job("3-vit_mini", 10, 30.0, model="vit_mini", teacher=micro)
    run = write_run(tmp_path / "run", [{**micro, "teacher_spec": NANO["spec"]}, mini])
    assert [found.position for found in matches([run])] == [1, 2]


def test_tries_are_points_and_a_copy_is_counted_once(tmp_path: Path) -> None:
    jobs = [NANO, BASELINE, link(20, 28.0), link(5, 20.0, "try-1-vit_micro", kind="try", warmup=1)]
    run = write_run(tmp_path / "run", [*jobs, link(10, 24.0, "try-2-vit_micro", kind="try")])
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    found = only(matches([run, copy, run]))
    assert [len(point.jobs) for point in found.points] == [1, 1, 1]
    assert found.baseline is not None
    assert len(found.baseline.jobs) == 1
    assert met(found) == pytest.approx(12.5)


def test_two_warmups_of_one_length_are_not_averaged(tmp_path: Path) -> None:
    runs = lengths(tmp_path, POINTS)
    found = read_curves([*runs, write_run(tmp_path / "other", [NANO, link(10, 90.0, warmup=5)])])
    assert [point.top1 for point in only(found.links).points] == [20, 24, 28]
    (item,) = found.skipped
    assert (item.job, item.reason) == (
        f"{tmp_path}/other/2-vit_micro",
        f"has the length and the seed of {tmp_path}/e10/2-vit_micro, but another warm-up",
    )


def test_each_length_of_the_baseline_is_a_target_and_controls_show_the_way_without_a_teacher(tmp_path: Path) -> None:
    jobs = [NANO, BASELINE, job("control-equal_epochs", 10, 12.0, kind="control"), link(10, 24.0), link(20, 28.0, "x")]
    longer = job("baseline-vit_micro-s0", 90, 27.0, kind="baseline")
    first, second = matches([write_run(tmp_path / "a", jobs), write_run(tmp_path / "b", [longer])])
    assert [found.match.epochs for found in (first, second) if found.match] == pytest.approx([12.5, 17.5])
    assert [point.epochs for point in first.scratch] == [10, 90]
    assert [point.epochs for point in second.scratch] == [10, 60]
    assert names([first, second]) == [f"vit_nano → vit_micro, baseline epochs {epochs}" for epochs in (60, 90)]


def test_every_training_from_scratch_is_a_baseline_but_a_control(tmp_path: Path) -> None:
    """The first link of another run, too. A job that is a baseline by another name is no control alone."""
    pico = job("1-vit_pico", 30, 10.0, model="vit_pico")
    grown = {"model": "vit_nano", "teacher": pico}
    jobs = [pico, job("a", 10, 14.0, **grown), job("b", 20, 16.0, **grown)]
    grow = write_run(tmp_path / "grow", jobs)
    control = job("control-equal_epochs", 60, 15.0, model="vit_nano", kind="control")
    without = only(matches([grow, write_run(tmp_path / "control", [control])]))
    assert (without.match, without.reason) == (None, "there is no finished baseline of vit_nano")
    alias = {"name": "baseline-vit_nano-s0", "kind": "baseline", "same_as": "control-equal_epochs"}
    for name, one, listed in (("first", NANO, []), ("alias", control, [alias])):
        found = only(matches([grow, write_run(tmp_path / name, [one], listed=listed)]))
        assert found.baseline is not None
        assert found.baseline.jobs == (f"{tmp_path}/{name}/{one['name']}",)
        assert met(found) == pytest.approx(15)


def test_weights_alone_are_not_distilled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [NANO, BASELINE, link(10, 24.0, alpha=0.0), link(20, 28.0, "x", alpha=0.0)])
    match = only(matches([run])).match
    assert match is not None
    assert not match.distilled


@pytest.mark.parametrize("spoil", ["missing", "torn", "other images"])
def test_without_answers_of_all_jobs_on_the_same_images_there_is_no_interval(tmp_path: Path, spoil: str) -> None:
    runs = lengths(tmp_path, POINTS)
    assert only(matches(runs)).paired
    file = runs[1] / "jobs" / "2-vit_micro" / "scores" / f"{SET}.npz"
    if spoil == "missing":
        file.unlink()
    elif spoil == "torn":
        file.write_bytes(file.read_bytes()[:100])
    else:
        write_answers(runs[1], "2-vit_micro", right(24.0), first=1)
    found = only(matches(runs))
    assert met(found) == pytest.approx(12.5)
    assert (found.paired, found.low, found.high) == (False, None, None)


def test_which_evaluation_set(tmp_path: Path) -> None:
    runs = lengths(tmp_path, POINTS)
    assert only(matches(runs, on=SET)).match is not None
    with pytest.raises(ConfigError, match=rf"test_stile.*did you mean '{SET}'"):
        matches(runs, on="test_stile")
    unnamed = write_run(tmp_path / "unnamed", [NANO], primary=None)
    assert only(matches([*runs, unnamed])).evaluation_set == SET
    with pytest.raises(ConfigError, match="the runs name no set that they report on: give runs"):
        matches([unnamed])
    with pytest.raises(ConfigError, match="report on another and test_style: .*; scored were: test_style"):
        matches([*runs, write_run(tmp_path / "another", [NANO], primary="another")])


def test_plain_values_for_files(tmp_path: Path) -> None:
    values = json.loads(json.dumps(read_curves(lengths(tmp_path, POINTS)).to_json(), allow_nan=False))
    (found,) = values["links"]
    assert found["match"]["epochs"] == pytest.approx(12.5)
    assert found["acceleration"]["match"] == pytest.approx(3.2)
    assert found["acceleration"]["low"] < 3.2 < found["acceleration"]["high"]
    assert found["name"] == "vit_nano → vit_micro"


def test_a_committed_run(root: Path) -> None:
    first, second = matches([root / "docs" / "results" / "emoji"])
    assert [point.epochs for point in (*first.points, *second.points)] == [10, 14]
    assert [(found.position, found.more_than, found.paired) for found in (first, second)] == [
        (1, 10, True),
        (2, 14, True),
    ]
    assert [point.epochs for point in second.scratch] == pytest.approx([14, 16.66, 39.09], abs=0.01)


# Real but tiny training runs.


QUICK = ("evaluation.validation=[]", "evaluation.every=", "engine.checkpoint_every={steps: 100}")


@pytest.mark.slow
def test_real_runs_of_several_lengths_from_one_teacher(tmp_path: Path) -> None:
    base = helpers_recipe.make_data(tmp_path)
    whole = tmp_path / "whole"
    helpers_recipe.chain(base, whole, *QUICK, baselines=True)
    first, second = helpers_recipe.FIRST, helpers_recipe.SECOND

    # Another length in a copy of the run folder: its first link is done and is not trained again.
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "jobs" / second)
    before = helpers_recipe.weights_hash(whole, first)
    helpers_recipe.chain(base, copy, *QUICK, "chain.links.1.train={steps: 9}")
    assert helpers_recipe.weights_hash(copy, first) == before

    # And in a run that starts from the first link's model.
    apart = tmp_path / "apart"
    links = "chain.links=[{model: large, train: {steps: 13}, warmup: {steps: 1}}]"
    helpers_recipe.chain(base, apart, *QUICK, f"chain.from={whole / 'jobs' / first / 'model'}", links)

    found = read_curves([whole, copy, apart])
    curve = only(found.links)
    assert found.skipped == []
    assert [(point.epochs, point.jobs) for point in curve.points] == [
        (5 / 4, (f"{whole}/{second}",)),
        (9 / 4, (f"{copy}/{second}",)),
        (13 / 4, (f"{apart}/1-large",)),
    ]
    scores = [
        helpers_recipe.manifest(run, name)["scores"]["held_out"]["top1"]
        for run, name in ((whole, second), (copy, second), (apart, "1-large"))
    ]
    assert [point.top1 for point in curve.points] == scores
    assert curve.baseline is not None
    assert curve.baseline.jobs == (f"{whole}/baseline-large-s3",)
    assert curve.position == 1
    assert curve.paired
    # Without the run that trained the teacher, the hash of the weights and the record of the expansion identify it.
    assert [point.epochs for point in only(matches([apart])).points] == [13 / 4]
