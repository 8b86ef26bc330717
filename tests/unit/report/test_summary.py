"""The summary of a run: rows, accelerations by hand, verdicts, seeds, and unfinished runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compt.design.runs import score_file
from compt.errors import RunError
from compt.evaluate.stats import wilson
from compt.files import read_json, write_json
from compt.plan.jobs import Plan
from compt.report import figures
from compt.report.summary import Row, accumulated, stored_arrays, summarise
from compt.report.write import _gather
from tests.helpers.run import RECIPE, SHARES, answers, make_run, recipe

REST = ("baseline-vit_micro-s0", "baseline-vit_mini-s0", "control-equal_epochs", "control-equal_macs")


def several_seeds() -> dict[str, Any]:
    return {"use": recipe(baselines={**RECIPE["baselines"], "seeds": [0, 3], "controls": []})}


def macs(made: Plan, name: str) -> float:
    return made.job(name).cost.total_macs


def test_rows_of_a_finished_run(tmp_path: Path) -> None:
    made = make_run(tmp_path / "shapes")
    found = summarise(tmp_path / "shapes")
    assert (found.run, found.primary) == ("shapes", "test_style")
    assert [row.job for row in found.links] == ["1-vit_nano", "2-vit_micro", "3-vit_mini"]
    assert [row.job for row in found.baselines] == ["baseline-vit_micro-s0", "baseline-vit_mini-s0"]
    assert [row.job for row in found.controls] == ["control-equal_epochs", "control-equal_macs"]
    last = found.links[2]
    assert (last.model, last.top1, last.images, last.classes, last.state) == ("vit_mini", 26.0, 400, 200, "done")
    assert (last.low, last.high) == pytest.approx(wilson(104, 400))
    assert last.macs == macs(made, "3-vit_mini")


def test_a_link_that_is_its_own_baseline_replaces_it_and_is_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path)
    found = summarise(tmp_path)
    assert [row.job for row in found.individual[0]] == ["1-vit_nano", "baseline-vit_micro-s0", "baseline-vit_mini-s0"]
    assert [item.link for item in found.comparisons] == ["2-vit_micro", "3-vit_mini"]


def test_accelerations_by_hand(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    first, second, third = (macs(made, name) for name in ("1-vit_nano", "2-vit_micro", "3-vit_mini"))
    alone = [first, macs(made, "baseline-vit_micro-s0"), macs(made, "baseline-vit_mini-s0")]
    two, three = summarise(tmp_path).comparisons
    assert two.macs_speedup == pytest.approx(alone[1] / second)
    assert two.macs_speedup_accumulated == pytest.approx((alone[0] + alone[1]) / (first + second))
    assert three.macs_speedup == pytest.approx(alone[2] / third)
    assert three.macs_speedup_accumulated == pytest.approx(sum(alone) / (first + second + third))
    hours = [row.device_hours or 0 for row in summarise(tmp_path).rows]
    assert three.hours_speedup == pytest.approx(hours[4] / hours[2])
    assert three.hours_speedup_accumulated == pytest.approx((hours[0] + hours[3] + hours[4]) / sum(hours[:3]))
    assert made.acceleration() == pytest.approx(three.macs_speedup_accumulated)


def test_the_headline_and_the_figure_have_the_costs_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs measure theirs, which are not quite the planned ones."""
    bars: list[figures.Bar] = []
    monkeypatch.setattr(figures, "cost_figure", bars.extend)
    for name in ("accuracy_figure", "curves_figure"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    make_run(tmp_path)
    for path in tmp_path.glob("jobs/*/manifest.json"):
        manifest = read_json(path)
        manifest["cost"]["total_macs"] *= 2 if manifest["kind"] == "link" else 1.5
        write_json(path, manifest)
    shown, found = _gather(tmp_path), summarise(tmp_path)
    nano, micro, mini = found.links
    expected = [nano, nano, micro, found.baselines[0], mini, found.baselines[1]]
    assert [sum(parts) for _, parts in bars[:6]] == pytest.approx([row.macs for row in expected])
    assert f"costs {found.comparisons[-1].macs_speedup_accumulated:.1f}x fewer MACs than" in shown["sentence"]
    planned = " (planned ones where a job is not trained)."
    assert not (shown["sentence"] + shown["captions"]["costs"]).count(planned)
    make_run(tmp_path / "open", states={"3-vit_mini": "training"})
    shown = _gather(tmp_path / "open")
    assert [text.endswith(planned) for text in (shown["sentence"], shown["captions"]["costs"])] == [True, True]


@pytest.mark.parametrize(
    ("share", "baseline", "expected"),
    [(0.30, 0.20, "lossless"), (0.10, 0.30, "not lossless"), (0.24, 0.24, "undecided")],
)
def test_verdicts(tmp_path: Path, share: float, baseline: float, expected: str) -> None:
    make_run(tmp_path, shares={**SHARES, "3-vit_mini": share, "baseline-vit_mini-s0": baseline})
    item = summarise(tmp_path).comparisons[-1]
    assert item.difference == pytest.approx(100 * (share - baseline))
    assert item.low <= item.difference <= item.high
    assert item.verdict == expected
    assert item.seed_spread is None


def test_controls_are_compared_with_the_link_of_their_model(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    epochs, same_macs = summarise(tmp_path).control_comparisons
    assert (epochs.link, epochs.others) == ("3-vit_mini", ["control-equal_epochs"])
    assert epochs.difference == pytest.approx(15.0)
    assert epochs.macs_speedup == pytest.approx(macs(made, "control-equal_epochs") / macs(made, "3-vit_mini"))
    assert same_macs.macs_speedup == pytest.approx(1.0, abs=0.01)
    assert epochs.macs_speedup_accumulated is None


def test_seeds_are_averaged(tmp_path: Path) -> None:
    shares = {**SHARES, "baseline-vit_mini-s0": 0.20, "baseline-vit_mini-s3": 0.24}
    make_run(tmp_path, shares=shares, **several_seeds())
    found = summarise(tmp_path)
    assert [row.job for row in found.individual[3]] == [f"baseline-vit_{name}-s3" for name in ("nano", "micro", "mini")]
    last = found.comparisons[-1]
    assert last.others == ["baseline-vit_mini-s0", "baseline-vit_mini-s3"]
    assert last.difference == pytest.approx(26.0 - 22.0)
    assert last.seed_spread == pytest.approx(np.std([20.0, 24.0], ddof=1))
    # The first link is one of its baselines: a comparison with their mean would be one with itself.
    assert [item.link for item in found.comparisons] == ["2-vit_micro", "3-vit_mini"]


def test_a_seed_that_is_not_scored_yet_delays_the_comparison(tmp_path: Path) -> None:
    make_run(tmp_path, states={"baseline-vit_mini-s3": "training"}, **several_seeds())
    assert [item.link for item in summarise(tmp_path).comparisons] == ["2-vit_micro"]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path, states={"2-vit_micro": "training", "3-vit_mini": "planned", **dict.fromkeys(REST, "planned")})
    found = summarise(tmp_path)
    assert [(row.job, row.state, row.top1) for row in found.links] == [
        ("1-vit_nano", "done", 17.0),
        ("2-vit_micro", "training", None),
    ]
    assert (found.baselines, found.controls, found.comparisons, found.control_comparisons) == ([], [], [], [])
    assert found.links[1].device_hours is None
    assert [row.job for row in found.individual[0]] == ["1-vit_nano"]


def test_a_run_without_baselines_or_primary_set(tmp_path: Path) -> None:
    make_run(tmp_path / "chain", baselines=False)
    found = summarise(tmp_path / "chain")
    assert (len(found.links), found.individual, found.comparisons) == (3, {}, [])
    make_run(tmp_path / "nothing", use=recipe(evaluation=None))
    found = summarise(tmp_path / "nothing")
    assert found.primary is None
    assert {row.top1 for row in found.rows} == {None}
    assert found.comparisons == []


def test_a_retrieval_set_as_primary_has_no_accuracy(tmp_path: Path) -> None:
    make_run(tmp_path, use=recipe(evaluation={**RECIPE["evaluation"], "primary": "captions"}))
    found = summarise(tmp_path)
    assert {row.top1 for row in found.rows} == {None}
    assert found.comparisons == []


def test_missing_torn_or_other_answers_give_no_comparison(tmp_path: Path) -> None:
    make_run(tmp_path)
    path = score_file(tmp_path, "baseline-vit_mini-s0", "test_style")
    assert len(summarise(tmp_path).comparisons) == 2
    path.write_bytes(path.read_bytes()[:100])
    assert len(summarise(tmp_path).comparisons) == 1
    path.unlink()
    assert len(summarise(tmp_path).comparisons) == 1
    other = answers(0.2, 0)
    other.ids = other.ids + 1
    other.save(path.parent)
    assert len(summarise(tmp_path).comparisons) == 1
    answers(0.2, 0, n=200).save(path.parent)
    assert len(summarise(tmp_path).comparisons) == 1
    assert summarise(tmp_path).not_compared[0].reason == "baseline-vit_mini-s0 was scored on other images"
    answers(0.2, 0).save(path.parent)
    assert len(summarise(tmp_path).comparisons) == 2
    assert summarise(tmp_path).not_compared == []
    score_file(tmp_path, "3-vit_mini", "test_style").unlink()
    assert {item.reason for item in summarise(tmp_path).not_compared} == {"the answers of 3-vit_mini are missing"}


@pytest.mark.parametrize(
    ("pin", "what"),
    [("data", "images"), ("classnames", "class names"), ("templates", "templates"), ("label", "labels")],
)
def test_scores_of_another_set_are_not_compared(tmp_path: Path, pin: str, what: str) -> None:
    make_run(tmp_path)
    for job in ("baseline-vit_mini-s0", "control-equal_epochs"):
        path = tmp_path / "jobs" / job / "manifest.json"
        manifest = read_json(path)
        manifest["scores"]["test_style"]["pins"][pin] = "0000"
        write_json(path, manifest)
    found = summarise(tmp_path)
    assert [item.link for item in found.comparisons] == ["2-vit_micro"]
    assert [item.others for item in found.control_comparisons] == [["control-equal_macs"]]
    assert [(item.link, item.others, item.reason) for item in found.not_compared] == [
        ("3-vit_mini", [job], f"{job} was scored with other {what}")
        for job in ("baseline-vit_mini-s0", "control-equal_epochs")
    ]


def test_names_of_sets_that_are_no_file_names(tmp_path: Path) -> None:
    found = answers(0.2, 0, name="wds/imagenet")
    path = score_file(tmp_path, "1-vit_nano", found.name)
    found.save(path.parent)
    assert stored_arrays(path)["ids"].tolist() == found.ids.tolist()


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path} is not a run folder: it has no run.json"):
        summarise(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: cannot be read"):
        summarise(tmp_path)


def test_records_with_other_keys_or_types_are_one_line(tmp_path: Path) -> None:
    """As of another version of compt, or edited by hand."""
    make_run(tmp_path)
    said = []
    for path in (tmp_path / "run.json", next(tmp_path.glob("jobs/*/manifest.json"))):
        whole = read_json(path)
        for where in whole:
            rest = {key: value for key, value in whole.items() if key != where}
            for values in (rest, *({**rest, where: other} for other in (7, "x", [], {}))):
                path.write_text(json.dumps(values))
                with contextlib.suppress(RunError):
                    summarise(tmp_path)
                    continue
                said.append(where)
        write_json(path, whole)
    assert {"jobs", "primary", "state", "cost", "scores"} <= {*said}
    write_json(tmp_path / "run.json", {})
    with pytest.raises(RunError, match=r"another version .*\(KeyError: 'primary', in summary\.py:[0-9]+\); restore"):
        summarise(tmp_path)


def test_running_sums() -> None:
    assert accumulated([1.0, 2.0, None, 4.0]) == [1.0, 3.0, None, None]
    assert accumulated([]) == []


def test_rows_can_be_made_by_hand() -> None:
    row = Row("a", "link", "m", "done", 0, 10, 1.0, 5, 1e12, 0.0, None)
    assert (row.top1, row.scores) == (None, {})
