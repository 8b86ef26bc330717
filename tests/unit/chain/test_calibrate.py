"""The first-pair test: when it stops, what it keeps, what it costs, and that it continues wherever it was killed."""

from __future__ import annotations

import functools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from compt.chain.calibrate import GROWTH, FirstPair, NotLossless
from compt.chain.run import prepare
from compt.cli.main import app
from compt.cost.training import exact_breakdown
from compt.errors import ComptError, ConfigError, RunError
from compt.files import read_json, write_json
from compt.recipe.read import load_recipe
from compt.report.content import acceleration
from compt.report.summary import summarise
from compt.report.tables import acceleration_table, calibration_table, cost_table
from compt.report.write import write_report
from compt.text import TextTable
from tests.helpers.calibrate import (
    AT_THIRD,
    BASELINE,
    CHANGES,
    LAST,
    calibrate,
    calibrate_dying_at,
    calibrate_dying_at_write,
    calibrate_scored,
    scored,
    trained,
)
from tests.helpers.process import KILLED, finish, start, writes_of
from tests.helpers.recipe import (
    FIRST,
    SECOND,
    chain,
    equal,
    lines,
    make_data,
    manifest,
    recipe_of,
    weights,
    write_recipe,
)

TRY_1, TRY_2 = "try-1-large", "try-2-large"
SHORT = (
    "chain.links=[{model: small, train: {steps: 6}, warmup: {steps: 2}},"
    " {model: large, train: {steps: 5}, warmup: {steps: 1}}]"
)
ALL = [FIRST, SECOND, LAST, BASELINE, TRY_1, TRY_2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def third(base: Path) -> Path:
    """A finished chain that was lossless at the third try. Tests do not change it."""
    with scored(AT_THIRD), trained() as names:
        calibrate(base, base / "third")
    assert names == [f"{FIRST} 6", f"{BASELINE} 12", f"{SECOND} 5", f"{SECOND} 6", f"{SECOND} 8", f"{LAST} 6"]
    return base / "third"


@pytest.fixture(scope="module")
def with_baselines(base: Path, third: Path) -> Path:
    """A copy of it, with all baselines trained afterwards. Tests do not change it."""
    folder = shutil.copytree(third, base / "with baselines")
    with scored(AT_THIRD), trained() as names:
        chain(base, folder, *CHANGES, baselines=True)
    assert names == ["baseline-small-s3 12", "baseline-third-s3 12"]
    return folder


def copied(third: Path, folder: Path, *names: str) -> Path:
    """A run folder with only these jobs of another one."""
    for name in names:
        shutil.copytree(third / "jobs" / name, folder / "jobs" / name)
    return folder


@pytest.fixture
def begun(third: Path, tmp_path: Path) -> Path:
    """A run whose first link and baseline are done, and nothing else."""
    return copied(third, tmp_path / "begun", FIRST, BASELINE)


@pytest.fixture
def run(third: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(third, tmp_path / "run")


@pytest.fixture
def open_run(base: Path, third: Path, tmp_path: Path) -> Path:
    """A run whose first try has failed, and whose second one has not started."""
    folder = shutil.copytree(third, tmp_path / "open")
    for name in (SECOND, LAST, TRY_2):
        shutil.rmtree(folder / "jobs" / name)
    state = read_json(folder / "run.json")
    state["calibration"] |= {"outcome": "open", "factor": 1.0, "tries": []}
    write_json(folder / "run.json", state)
    return folder


def record(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(run / "run.json")["calibration"]
    return values


def jobs(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "jobs").iterdir())


def timeless(tries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key != "device_hours"} for item in tries]


def assert_same(third: Path, other: Path) -> None:
    """Both trained and decided the same, and left nothing behind."""
    assert jobs(other) == sorted(ALL)
    for name in ALL:
        assert equal(weights(third, name), weights(other, name)), name
        assert lines(third, name) == lines(other, name)
        assert manifest(other, name)["state"] == "done"
        assert manifest(other, name)["name"] == name
    ours, theirs = record(other), record(third)
    assert timeless(ours.pop("tries")) == timeless(theirs.pop("tries"))
    assert ours == theirs
    assert list(other.rglob(".*")) == [], "no rubbish"


# --- when it stops


def test_lossless_at_the_first_try(base: Path, begun: Path) -> None:
    with scored({5: 0.40}), trained() as names:
        said = calibrate(base, begun)
    assert names == [f"{SECOND} 5", f"{LAST} 4"]
    assert jobs(begun) == sorted([FIRST, SECOND, LAST, BASELINE])
    found = record(begun)
    assert (found["outcome"], found["factor"], len(found["tries"])) == ("lossless", 1.0, 1)
    (line,) = [text for text in said if "try 1" in text]
    assert line.startswith(
        f"{SECOND}, try 1: +0.00 points on choose [95 %: +0.0 to +0.0] against {BASELINE}, at 1.25 ep"
    )
    assert line.endswith("lossless.")


def test_lossless_at_the_third_try(third: Path) -> None:
    assert jobs(third) == sorted(ALL)
    found = record(third)
    assert {key: found[key] for key in ("dataset", "target", "link", "baseline", "margin", "growth", "outcome")} == {
        "dataset": "choose",
        "target": None,
        "link": SECOND,
        "baseline": BASELINE,
        "margin": 0.5,
        "growth": 1.25,
        "outcome": "lossless",
    }
    assert found["factor"] == 1.25**2
    assert [item["factor"] for item in found["tries"]] == [1.0, 1.25, 1.5625]
    assert [item["steps"] for item in found["tries"]] == [5, 6, 8]
    assert [item["difference"] for item in found["tries"]] == pytest.approx([-2.0, -0.5, -0.25])
    assert [item["accuracy"] for item in found["tries"]] == pytest.approx([38.0, 39.5, 39.75])
    assert {item["baseline_accuracy"] for item in found["tries"]} == {40.0}
    assert [item["lossless"] for item in found["tries"]] == [False, False, True]
    # Only 8, 2 and 1 images of 400 differ, so the interval is wider than the difference.
    assert [item["verdict"] for item in found["tries"]] == ["not lossless", "undecided", "undecided"]
    assert [item["job"] for item in found["tries"]] == [TRY_1, TRY_2, SECOND]
    for item in found["tries"]:
        own = manifest(third, item["job"])
        assert own["calibration"] == item, "the decision stands in the manifest"
        assert (own["kind"], own["name"]) == ("link" if item["lossless"] else "try", item["job"])
        assert item["macs"] == own["cost"]["total_macs"]
        assert item["speedup"] == manifest(third, BASELINE)["cost"]["total_macs"] / own["cost"]["total_macs"]
        assert item["device_hours"] == own["trained"]["device_hours"]


def test_all_links_after_the_first_are_lengthened_and_the_recipe_is_kept(third: Path) -> None:
    assert load_recipe(third / "recipe.yaml") == recipe_of(*CHANGES)
    # 6 and 2; 5 and 1, 4 and 1 times 1.5625.
    assert [
        (manifest(third, name)["steps"], manifest(third, name)["warmup_steps"]) for name in (FIRST, SECOND, LAST)
    ] == [
        (6, 2),
        (8, 2),
        (6, 2),
    ]
    assert manifest(third, LAST)["parent_hash"] == manifest(third, SECOND)["model_hash"]
    listed = {job["name"]: job for job in read_json(third / "run.json")["jobs"]}
    assert {name: listed[name]["kind"] for name in (TRY_1, TRY_2, SECOND)} == {
        TRY_1: "try",
        TRY_2: "try",
        SECOND: "link",
    }
    assert all(listed[name]["hash"] == manifest(third, name)["hash"] for name in ALL)


def test_the_accepted_try_is_the_link_of_that_length(base: Path, third: Path, tmp_path: Path) -> None:
    plain = copied(third, tmp_path / "plain", FIRST)
    links = (
        "{model: small, train: {steps: 6}, warmup: {steps: 2}}, {model: large, train: {steps: 8}, warmup: {steps: 2}}"
    )
    chain(base, plain, *CHANGES, f"chain.links=[{links}]")
    assert equal(weights(third, SECOND), weights(plain, SECOND))


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_never_lossless(base: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun
    with scored({}, baseline=0.40) as _, scored(dict.fromkeys((5, 6, 8, 10, 12), 0.30)), trained() as names:
        message = (
            r"large is not lossless at any acceleration: its last try gave -10\.00 points on choose .* at 2\.5 epochs "
            r".* the next would be no shorter than the baseline's 3 epochs. What was trained is kept \(4 tries\)"
        )
        with pytest.raises(NotLossless, match=message) as caught:
            calibrate(base, run)
        assert caught.value.exit_code == RunError.exit_code
        assert [name for name in names if SECOND in name] == [f"{SECOND} {steps}" for steps in (5, 6, 8, 10)]
        assert jobs(run) == sorted([FIRST, BASELINE, *(f"try-{number}-large" for number in (1, 2, 3, 4))])
        assert record(run)["outcome"] == "not lossless"
        names.clear()
        with pytest.raises(NotLossless, match=message):
            calibrate(base, run)
        with pytest.raises(RunError, match="its first-pair test found no lossless length; take another run folder"):
            chain(base, run, *CHANGES)
        assert names == []
        # The last try once more, by the command; and then nothing.
        shutil.rmtree(run / "jobs" / "try-4-large")
        state = read_json(run / "run.json")
        write_json(run / "run.json", {**state, "calibration": {**state["calibration"], "outcome": "open", "tries": []}})
        for trainings in (1, 0):
            output, error = command(base, monkeypatch, "--run-folder", str(run), "--calibrate")
            assert isinstance(error, NotLossless)
            assert "2-large was not lossless in 4 tries" in " ".join(output.split())
            assert ("continuing with" in output) == bool(trainings)
            assert names == [f"{SECOND} 10"] * trainings
            names.clear()
            assert (run / "report.html").exists()
    text = (run / "report.md").read_text()
    assert "2-large was not lossless in 4 tries, and the next would have been no shorter than its baseline" in text
    assert "| large, try 4 | 2.5 |" in text


@pytest.mark.slow
def test_a_test_whose_tries_are_not_kept_ends(base: Path, open_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("compt.chain.calibrate._decide", lambda *values: compared.append(values))
    with scored(AT_THIRD), trained() as names, pytest.raises(RunError, match=r"does not end: no more than 4 lengths"):
        calibrate(base, open_run)
    assert (names, len(compared)) == ([f"{SECOND} 6"], 6)


@pytest.mark.slow
def test_few_steps_are_not_tried_twice(base: Path, begun: Path) -> None:
    change = "chain.links.1={model: large, train: {steps: 1}, warmup: {steps: 0}}"
    with scored({1: 0.1, 2: 0.2, 3: 0.5}), trained() as names:
        calibrate(base, begun, change)
    assert [name for name in names if SECOND in name] == [f"{SECOND} {steps}" for steps in (1, 2, 3)]
    assert [item["factor"] for item in record(begun)["tries"]] == [1.0, 1.25**2, 1.25**5]


@pytest.mark.slow
def test_real_scores_decide_as_they_stand_on_disk(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    try:
        calibrate(base, run)
    except NotLossless:
        assert record(run)["outcome"] == "not lossless"
    tries = record(run)["tries"]
    assert tries
    for item in tries:
        own, other = (
            np.load(run / "jobs" / name / "scores" / "choose.npz")["correct"] for name in (item["job"], BASELINE)
        )
        assert item["difference"] == pytest.approx(100 * (own.mean() - other.mean()))
        assert item["lossless"] == (item["difference"] > -0.5)
    assert not any(item["lossless"] for item in tries[:-1])


@pytest.mark.slow
def test_scores_on_other_images_are_no_comparison(base: Path, begun: Path) -> None:
    message = f"{SECOND} and {BASELINE} were not scored on the same choose; restore the set"
    with scored({5: 0.40}, pins={SECOND: "cd34"}), pytest.raises(RunError, match=message):
        calibrate(base, begun)


# --- where it compares


def test_the_set_to_compare_on() -> None:
    def of(*changes: str, on: str | None = None) -> str:
        return FirstPair.of(recipe_of(*CHANGES, *changes), None, on, "tiny.yaml").dataset

    assert of() == "choose", "a set to select on keeps the primary one untouched"
    assert of("evaluation.sets.1.role=report") == "held_out"
    assert of(on="held_out") == "held_out"
    assert of("evaluation.sets.1={name: t, task: retrieval, data: x, role: select}") == "held_out"
    probe = "evaluation.sets.1={name: p, task: linear_probe, data: x, train: y, role: select}"
    assert of(probe) == "held_out", "a probe trains a head of its own"
    assert of(probe, on="p") == "p"


@pytest.mark.slow
@pytest.mark.parametrize(("on", "tries"), [(None, 1), ("held_out", 2)])
def test_it_compares_there(base: Path, begun: Path, on: str | None, tries: int) -> None:
    with scored({5: 0.38}, on="held_out"):
        calibrate(base, begun, SHORT, on=on)
    assert len(record(begun)["tries"]) == tries


# --- the first length


def macs(steps: int, *, teacher: bool) -> float:
    specs = recipe_of(*CHANGES).family.specs()
    return (
        exact_breakdown(specs["large"], specs["small"] if teacher else None, batch=12, captions=2, tokens=None)
        .of_steps(steps)
        .total_macs
    )


@pytest.mark.slow
def test_a_target_sets_the_first_length(base: Path, begun: Path) -> None:
    run = begun
    wanted = macs(12, teacher=False) / (1.5 * macs(1, teacher=True))
    assert 6.5 < wanted < 7.4, "neither the recipe's 5 nor, without the teacher, 8"
    with scored({7: 0.30}), trained() as names:
        calibrate(base, run, target=1.5)
    assert names == [f"{SECOND} 7", f"{SECOND} {round(1.25 * wanted)}", f"{LAST} {round(4 * 1.25 * wanted / 5)}"]
    first, second = record(run)["tries"]
    assert first["factor"] == pytest.approx(wanted / 5)
    assert second["factor"] == pytest.approx(1.25 * wanted / 5)
    assert first["target"] == record(run)["target"] == 1.5
    with pytest.raises(
        RunError, match=r"begun with --calibrate --target 1\.5 --calibrate-on choose, not --calibrate --ca"
    ):
        calibrate(base, run)
    with pytest.raises(RunError, match=r"not --calibrate --target 2 --calibrate-on choose; take another run folder"):
        calibrate(base, run, target=2)
    with pytest.raises(RunError, match=r"not --calibrate --target 1\.5 --calibrate-on held_out"):
        calibrate(base, run, target=1.5, on="held_out")


@pytest.mark.slow
def test_micro_batches_change_no_length(base: Path, tmp_path: Path) -> None:
    def steps(*changes: str) -> list[int]:
        test = FirstPair.of(recipe_of(*CHANGES, *changes), 1.5, None, "tiny.yaml")
        run = tmp_path / "run"
        _, plan = prepare(recipe_of(*CHANGES, *changes), run, base=base, scales=functools.partial(test.scales, run))
        return [job.steps for job in plan.links]

    assert steps() == steps("engine.micro_batch=2", "engine.loss_chunk=3") == [6, 7, 5]


@pytest.mark.slow
def test_a_model_from_outside_makes_the_first_link_the_one_that_is_tried(
    base: Path, third: Path, tmp_path: Path
) -> None:
    run = copied(third, tmp_path / "run", BASELINE)
    links = "chain.links=[{model: large, train: {steps: 5}, warmup: {steps: 1}}]"
    start = f"chain.from={third / 'jobs' / FIRST / 'model'}"

    with scored({5: 0.30, 6: 0.40}), pytest.MonkeyPatch.context() as patch, trained() as names:
        # A link from outside has a parent, but no teacher among the jobs.
        read = read_json
        patch.setattr("tests.helpers.calibrate.read_json", lambda path: {**read(path), "teacher": read(path)["start"]})
        calibrate(base, run, links, start)
    assert names == ["1-large 5", "1-large 6"]
    assert jobs(run) == ["1-large", BASELINE, TRY_1]


# --- what it costs


@pytest.mark.slow
def test_costs_by_hand(with_baselines: Path) -> None:
    run = with_baselines
    rest = ["baseline-small-s3", "baseline-third-s3"]
    cost = {name: manifest(run, name)["cost"]["total_macs"] for name in [*ALL, *rest]}
    time = {name: manifest(run, name)["trained"]["device_hours"] for name in [*ALL, *rest]}
    found = summarise(run)
    assert [row.job for row in found.paid] == [FIRST, TRY_1, TRY_2, SECOND, LAST]
    assert [row.job for row in found.tries] == [TRY_1, TRY_2]
    first, second, last = found.comparisons
    alone = cost["baseline-small-s3"] + cost[BASELINE]
    assert first.macs_speedup_accumulated == pytest.approx(cost["baseline-small-s3"] / cost[FIRST])
    assert second.macs_speedup == pytest.approx(cost[BASELINE] / cost[SECOND])
    tried = cost[FIRST] + cost[TRY_1] + cost[TRY_2] + cost[SECOND]
    assert second.macs_speedup_accumulated == pytest.approx(alone / tried)
    assert last.macs_speedup_accumulated == pytest.approx((alone + cost["baseline-third-s3"]) / (tried + cost[LAST]))
    hours = time["baseline-small-s3"] + time[BASELINE]
    assert second.hours_speedup_accumulated == pytest.approx(
        hours / (time[FIRST] + time[TRY_1] + time[TRY_2] + time[SECOND])
    )
    state = read_json(run / "run.json")
    planned = {job["name"]: job["cost"]["total_macs"] for job in state["jobs"]}
    links, tries = (sum(planned[name] for name in names) for names in ([FIRST, SECOND, LAST], [TRY_1, TRY_2]))
    individual = sum(planned[name] for name in [*rest, BASELINE])
    assert acceleration(state) == pytest.approx(individual / (links + tries))
    kept = state["calibration"]
    assert kept["chain_macs"] == pytest.approx(links)
    assert kept["failed_macs"] == pytest.approx(tries)
    assert kept["individual_macs"] == pytest.approx(individual)
    table = calibration_table(found)
    assert table is not None
    assert f"{individual / (links + tries):.2f}x with them, {individual / links:.2f}x without" in table.notes[1]
    assert [row[0] for row in cost_table(found).rows][:5] == [FIRST, "large, try 1", "large, try 2", SECOND, LAST]
    faster = acceleration_table(found)
    assert faster is not None
    assert {row[0]: row[2] for row in faster.rows}[SECOND] == f"{alone / tried:.2f}x"


@pytest.mark.slow
def test_the_report_says_what_was_decided(third: Path, run: Path) -> None:
    write_report(run)
    for text in ((run / "report.md").read_text(), (run / "report.html").read_text()):
        for words in (
            "Calibration",
            "2-large was lossless at try 3: it and the links after it train 1.56 times as long as the recipe says, ",
            ", each at most as long as its baseline.",
            "2 failed tries: ",
            "2-large against baseline-large-s3 on choose: ",
            "accepted",
        ):
            assert words in text, words
    table = calibration_table(summarise(run))
    assert table is not None
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert [row["Outcome"] for row in rows] == ["failed", "failed", "accepted"]
    [first] = [row for row in rows if row["95 % interval"] == "-3.50 to -0.75"]
    assert (first["Points"], first["Verdict"]) == ("-2.00", "not lossless")


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_the_table_of_a_test_that_goes_on(open_run: Path) -> None:
    state = read_json(open_run / "run.json")
    state["calibration"] |= {"factor": 1.25, "target": 4.0}
    write_json(open_run / "run.json", state)
    table = calibration_table(summarise(open_run))
    assert isinstance(table, TextTable)
    assert table.notes[0] == (
        "The first try was as long as a 4x acceleration of 2-large leaves. Not decided yet: try 2, 1.25 times as long "
        "as the recipe says, is next."
    )
    assert table.notes[1].startswith("1 failed try: ")
    assert "acceleration" not in table.notes[1]
    shutil.rmtree(open_run / "jobs" / TRY_1)
    table = calibration_table(summarise(open_run))
    assert table is not None
    assert (list(table.rows), len(table.notes)) == ([], 2)
    write_report(open_run)


# --- afterwards


@pytest.mark.slow
def test_baselines_afterwards_train_only_what_is_missing(base: Path, with_baselines: Path, tmp_path: Path) -> None:
    run = shutil.copytree(with_baselines, tmp_path / "run")
    with scored(AT_THIRD), trained() as names:
        chain(base, run, *CHANGES)
        calibrate(base, run)
        calibrate(base, run, baselines=True)
    assert names == []
    assert len(record(run)["tries"]) == 3


@pytest.mark.slow
def test_controls_have_the_accepted_lengths(base: Path, run: Path) -> None:
    with scored(AT_THIRD), trained() as names:
        chain(base, run, *CHANGES, controls=["equal_epochs"])
    assert names == ["control-equal_epochs 6"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_a_record_older_than_the_decision_is_brought_up_to_date(
    base: Path, third: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = read_json(run / "run.json")
    state["calibration"] |= {"outcome": "open", "tries": state["calibration"]["tries"][:2]}
    write_json(run / "run.json", state)
    assert summarise(run).calibration == record(third), "what is shown is what was decided"
    with scored(AT_THIRD):
        output, error = command(base, monkeypatch, "--run-folder", str(run), "--calibrate")
    assert (error, record(run)) == (None, record(third))
    assert "every model is done" in output


@pytest.mark.slow
def test_without_its_record_a_run_goes_on_from_the_manifests(base: Path, third: Path, run: Path) -> None:
    (run / "run.json").unlink()
    with scored(AT_THIRD), trained() as names:
        chain(base, run, *CHANGES)
        assert (record(run)["outcome"], len(record(run)["tries"])) == ("lossless", 3)
        calibrate(base, run)
    assert names == []
    assert_same(third, run)


@pytest.mark.slow
def test_a_removed_folder_is_trained_again_and_decides_nothing(base: Path, third: Path, run: Path) -> None:
    for name in (SECOND, LAST, TRY_1):
        shutil.rmtree(run / "jobs" / name)
    with scored({}), trained() as names:
        chain(base, run, *CHANGES)
    assert sorted(names) == [f"{SECOND} 8", f"{LAST} 6", f"{TRY_1} 5"]
    assert record(run)["tries"] == record(third)["tries"]
    assert all(equal(weights(third, name), weights(run, name)) for name in ALL)


@pytest.mark.slow
def test_a_changed_recipe_is_refused_and_later_lengths_may_change(base: Path, run: Path) -> None:
    with pytest.raises(
        RunError, match="the recipe has changed since 1-small was begun:\n  order_seed: 3000 -> 4000\n  seed: 3 -> 4"
    ):
        chain(base, run, *CHANGES, "seed=4")
    with pytest.raises(RunError, match=f"the recipe has changed since {BASELINE} was begun:\n  steps: 12 -> 13"):
        chain(base, run, *CHANGES, "baselines.train={steps: 13}")
    with pytest.raises(RunError, match=f"the recipe has changed since {SECOND} was begun:\n  steps: 8 -> 9"):
        chain(base, run, *CHANGES, "chain.links.1.train={steps: 6}")
    shutil.rmtree(run / "jobs" / LAST)
    with scored(AT_THIRD), trained() as names:
        chain(base, run, *CHANGES, "chain.links.2.train={steps: 10}")
    assert names == [f"{LAST} 12"], "10 times 1.5625 is longer than its baseline"


# --- begun otherwise


@pytest.mark.slow
def test_without_the_option_an_open_test_is_refused(base: Path, open_run: Path) -> None:
    message = (
        "its first-pair test is not decided yet; go on with --calibrate --calibrate-on choose, or take another run"
    )
    for keep in (True, False):
        if not keep:
            (open_run / "run.json").unlink()
        with pytest.raises(RunError, match=message):
            chain(base, open_run, *CHANGES)


@pytest.mark.slow
def test_an_open_test_goes_on(base: Path, third: Path, open_run: Path) -> None:
    with scored(AT_THIRD), trained() as names:
        calibrate(base, open_run)
    assert names == [f"{SECOND} 6", f"{SECOND} 8", f"{LAST} 6"]
    assert_same(third, open_run)


@pytest.mark.slow
def test_a_chain_that_was_begun_can_be_tested_until_a_later_link_has_begun(
    base: Path, third: Path, tmp_path: Path
) -> None:
    run = copied(third, tmp_path / "run", FIRST)
    with scored(AT_THIRD):
        chain(base, run, *CHANGES, SHORT)
        whole = Path(shutil.copytree(run, tmp_path / "whole"))
        with trained() as names:
            calibrate(base, run)
        assert names == [f"{BASELINE} 12", f"{SECOND} 6", f"{SECOND} 8", f"{LAST} 6"]
        assert_same(third, run)
        chain(base, whole, *CHANGES)
        with pytest.raises(RunError, match=f"{LAST} was begun without a first-pair test, which may change its teacher"):
            calibrate(base, whole)


# --- killed


@pytest.mark.slow
def test_killed_at_each_place_in_turn(base: Path, third: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    places = [
        f"after done of {SECOND}",  # the first try: trained, not compared yet
        "between deciding",
        f"before expanded of {SECOND}",  # of the second try
        f"step 5 of {SECOND}",  # with a checkpoint of step 4
        "after setting aside",
        f"after done of {SECOND}",  # the third
        f"step 3 of {LAST}",
    ]
    tries = []
    for place in places:
        assert finish(start(calibrate_dying_at, place, base, run)) == KILLED, place
        tries.append(sum(name.startswith("try-") for name in jobs(run)))
    assert tries == [0, 0, 1, 1, 2, 2, 2]
    with scored(AT_THIRD), trained() as names:
        calibrate(base, run)
    assert names == [f"{LAST} 6"], "what was finished is not trained again"
    assert_same(third, run)


@pytest.mark.full
def test_killed_before_one_write_after_another(base: Path, third: Path, tmp_path: Path) -> None:
    run, killed = tmp_path / "run", 0
    while finish(start(calibrate_dying_at_write, 7 + 5 * killed, base, run)) == KILLED:
        killed += 1
        assert killed < 30, "it does not get ahead"
    assert killed >= 4
    assert_same(third, run)


@pytest.mark.full
def test_killed_before_each_write_of_a_decision(base: Path, third: Path, tmp_path: Path) -> None:
    """From where a try is scored to where its length is in run.json; what trainings write is the same in any chain."""
    names = writes_of(partial(calibrate_scored, every=2), base, copied(third, tmp_path / "all", FIRST, BASELINE))
    aside = [number for number, name in enumerate(names, 1) if name in (f"jobs/{TRY_1}", f"jobs/{TRY_2}")]
    state = [number for number, name in enumerate(names, 1) if name in ("run.json", "recipe.yaml")]
    assert (len(aside), len(state)) == (2, 8)
    # Before a folder is set aside, or the last length is noted: the manifest of what is done, and of what is decided.
    manifests = [number - back for number in (aside[0], state[-2]) for back in (2, 1)]
    assert {names[number - 1] for number in manifests} == {f"jobs/{SECOND}/manifest.json"}
    for number in sorted({*manifests, *aside, *state[:2], *state[-2:], len(names)}):
        run = copied(third, tmp_path / f"run{number}", FIRST, BASELINE)
        assert finish(start(calibrate_dying_at_write, number, base, run)) == KILLED
        with scored(AT_THIRD):
            calibrate(base, run)
        assert_same(third, run)
        shutil.rmtree(run)


# --- refusals


NO_SETS = ("evaluation.sets=[]", "evaluation.primary=")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (["baselines="], {}, r"tiny\.yaml: baselines: is missing; --calibrate compares"),
        (
            ["chain.links=[{model: small, train: {steps: 6}, warmup: {steps: 2}}]"],
            {},
            r"tiny\.yaml: chain\.links: has only 'small'; --calibrate needs a second link",
        ),
        (NO_SETS, {}, r"tiny\.yaml: evaluation\.primary: is not a zero-shot set, and none has the role `select`"),
        (NO_SETS, {"on": "x"}, r"--calibrate-on x: is not an evaluation set of tiny\.yaml; the recipe has none"),
        (
            [],
            {"on": "chose"},
            r"is not an evaluation set of tiny\.yaml \(did you mean 'choose'\?\); sets: held_out, choose",
        ),
        (
            ["evaluation.sets.1={name: texts, task: retrieval, data: val/*.tar}"],
            {"on": "texts"},
            r"--calibrate-on texts: is a retrieval set; accuracies are compared: name a zero-shot one",
        ),
        ([], {"target": 1.0}, r"--target 1: should be greater than 1"),
        ([], {"target": float("nan")}, r"--target nan: should be greater than 1"),
        ([], {"target": 1000.0}, r"--target 1000: leaves 2-large no step at all"),
        (
            ["chain.links.1.alpha=0.0"],
            {"target": 1.0001},
            r"--target 1\.0001: 2-large would train for 12 steps, no fewer than its baseline \(12\)",
        ),
        (
            ["chain.links.1.train={steps: 12}"],
            {},
            r"tiny\.yaml: chain\.links\.1\.train = 12 steps: 2-large would train for 12 steps, no fewer than its base",
        ),
        (
            ["chain.links.2.train={steps: 1}", "chain.links.2.warmup={steps: 0}"],
            {"target": 4.5},
            r"chain\.links\.2\.train = 1 steps x 0\.\d+: is less than one step",
        ),
    ],
)
def test_what_cannot_be_tested(
    changes: list[str], options: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(base, tmp_path / "run", *changes, **options)
    assert not (tmp_path / "run").exists(), "nothing was started"


# --- the command


def command(base: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[str, BaseException | None]:
    monkeypatch.chdir(base)
    result = CliRunner().invoke(app, ["chain", str(write_recipe(base / "cli.yaml", *CHANGES)), *words])
    return result.output, result.exception


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_the_command(base: Path, open_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scored(AT_THIRD):
        output, error = command(base, monkeypatch, "--run-folder", str(open_run), "--calibrate", "--estimate")
        assert error is None, output
        assert "3 of 5 models are done; continuing with 2-large." in output
        assert "2-large, try 3: -0.25 points on choose" in output
        assert "Calibration" in output
        assert "2-large was lossless at try 3: it and the links after it train 1.56 times" in " ".join(output.split())
    assert json.loads((open_run / "run.json").read_text())["calibration"]["outcome"] == "lossless"


@pytest.mark.parametrize("words", [["--target", "4"], ["--calibrate-on", "choose"]])
def test_options_of_the_test_alone(base: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    _, error = command(base, monkeypatch, *words)
    assert isinstance(error, ComptError)
    assert str(error) == f"{words[0]}: needs --calibrate"


def test_the_growth_is_the_one_that_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "calibration.md").read_text(encoding="utf-8")
    assert f"by a factor of {GROWTH:g}" in page
