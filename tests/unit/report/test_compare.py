"""Several runs compared: groups over seeds, differences on the same images, and what cannot be compared."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from compt.cli.chain import compare, report
from compt.errors import ConfigError
from compt.files import read_json, write_json
from compt.report.compare import ModelDifference, SeedGroup, compare_runs
from compt.report.summary import summarise
from compt.report.tables import comparison_table
from compt.text import count
from tests.helpers.run import RECIPE, SHARES, make_run, recipe


def run(folder: Path, seed: int = 0, shares: dict[str, float] | None = None, **changes: Any) -> Path:
    """A run whose models are trained with `seed`."""
    wanted = {key.replace("s0", f"s{seed}"): share for key, share in {**SHARES, **(shares or {})}.items()}
    make_run(folder, use=recipe(seed=seed, **changes), shares=wanted)
    return folder


def edit(path: Path, *keys: str, to: Any) -> None:
    values = part = read_json(path)
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    write_json(path, values)


def by_name(groups: list[SeedGroup]) -> dict[str, SeedGroup]:
    return {group.label: group for group in groups}


def pair(differences: list[ModelDifference], model: str, against: str) -> ModelDifference:
    return next(item for item in differences if (item.model, item.against) == (model, against))


def test_one_run_gives_the_differences_of_its_report(tmp_path: Path) -> None:
    found, summary = compare_runs([run(tmp_path / "a")]), summarise(tmp_path / "a")
    ours = {(item.model, item.points, item.low, item.high) for item in found.differences if item.points is not None}
    theirs = [*summary.comparisons, *summary.control_comparisons]
    assert ours == {(item.link, item.difference, item.low, item.high) for item in theirs}
    assert {group.kind for group in found.groups} == {"link", "baseline", "control"}


def test_what_no_run_has_to_compare_with_is_named_as_in_the_report(tmp_path: Path) -> None:
    """And a control that one run has serves the links of all runs with the same settings."""
    controls = {**RECIPE["baselines"], "controls": ["equal_epochs"]}
    first, second = run(tmp_path / "a", baselines=controls), tmp_path / "b"
    assert summarise(first).missing == {"control-equal_chain_macs": "not run"}
    table = compare_runs([first]).tables()[1]
    assert table.rows[-1] == ["3-vit_mini", "vit_mini, chain's MACs", "-", "-", "-", "not run"]
    assert [row[-1] for row in table.rows].count("not run") == 1
    shown = comparison_table(summarise(first))
    assert shown is not None
    assert table.notes[-1] == shown.notes[-1], "the command"
    assert [note for note in table.notes if "compt chain" in note] == [table.notes[-1]]
    every = {**RECIPE["baselines"], "controls": ["equal_epochs", "equal_macs", "equal_chain_macs"]}
    run(second, 1, baselines=every)
    assert "not run" not in {item.verdict for item in compare_runs([first, second]).differences}
    make_run(second, use=recipe(seed=1, baselines=every), states={"control-equal_chain_macs": "training"})
    (second / "jobs" / "control-equal_chain_macs" / "manifest.json").unlink()
    assert [item.verdict for item in compare_runs([second]).differences].count("pending") == 1
    make_run(tmp_path / "c", baselines=False)
    assert compare_runs([tmp_path / "c"]).differences == [], "nothing is compared"


def test_a_link_s_cost_so_far_has_those_of_the_links_before_it(tmp_path: Path) -> None:
    controls = {**RECIPE["baselines"], "controls": ["equal_epochs", "equal_macs", "equal_chain_macs"]}
    runs = [run(tmp_path / f"s{seed}", seed, baselines=controls) for seed in range(3)]
    for each in runs:
        for path in each.glob("jobs/*/manifest.json"):
            edit(path, "model_hash", to=f"{path.parent.name} of {each.name}")
        for job, teacher in (("2-vit_micro", "1-vit_nano"), ("3-vit_mini", "2-vit_micro")):
            edit(each / "jobs" / job / "manifest.json", "parent_hash", to=f"{teacher} of {each.name}")
    found = compare_runs(runs)
    groups = by_name(found.groups)
    costs = [groups[name].point.macs for name in ("1-vit_nano", "2-vit_micro", "3-vit_mini")]
    shown = [groups[name].macs_so_far for name in ("1-vit_nano", "2-vit_micro", "3-vit_mini")]
    assert shown == [pytest.approx(sum(costs[: at + 1])) for at in range(3)]
    assert groups["vit_mini baseline"].macs_so_far == pytest.approx(groups["vit_mini baseline"].point.macs)
    assert found.to_json()["models"][2]["macs_so_far"] == shown[2]
    text = io.StringIO()
    Console(file=text, width=80, color_system=None).print(found.tables()[0])
    [line] = [line for line in text.getvalue().splitlines() if line.startswith("3-vit_mini ")]
    assert line.split()[-4:] == [part for macs in (costs[2], shown[2]) for part in count(macs).split()]
    assert "MACs so far" in text.getvalue()
    edit(runs[0] / "jobs" / "1-vit_nano" / "manifest.json", "state", to="training")
    assert by_name(compare_runs(runs[:1]).groups)["3-vit_mini"].macs_so_far is None, "the first model's cost is unknown"


def test_seeds_are_one_model_with_a_spread(tmp_path: Path) -> None:
    shares = [(0.26, 0.24), (0.28, 0.23), (0.30, 0.22)]
    runs = [
        run(tmp_path / f"s{seed}", seed, {"3-vit_mini": ours, "baseline-vit_mini-s0": theirs})
        for seed, (ours, theirs) in enumerate(shares)
    ]
    found = compare_runs(runs)
    assert [group.label for group in found.groups[:3]] == ["1-vit_nano", "2-vit_micro", "3-vit_mini"]
    group = by_name(found.groups)["3-vit_mini"]
    assert (group.point.seeds, group.point.top1) == ((0, 1, 2), pytest.approx(28.0))
    assert group.point.spread == pytest.approx(np.std([26, 28, 30], ddof=1))
    item = pair(found.differences, "3-vit_mini", "vit_mini baseline")
    assert item.points == pytest.approx(28 - 23)
    assert item.seeds == "3, 3"
    # Student's t over seeds only, and the interval over images only, are both narrower.
    error = math.sqrt((2.0**2 + 1.0**2) / 3)
    single = pair(compare_runs(runs[1:2]).differences, "3-vit_mini", "vit_mini baseline")
    assert single.seeds == "1, 1"
    width = item.high - item.low
    assert width > 2 * 2.776 * error
    assert width > single.high - single.low


def test_a_baseline_of_another_seed_in_the_same_run_joins_its_group(tmp_path: Path) -> None:
    run(tmp_path / "a", baselines={**RECIPE["baselines"], "seeds": [0, 3]})
    groups = by_name(compare_runs([tmp_path / "a"]).groups)
    assert groups["vit_mini baseline"].point.seeds == (0, 3)
    assert groups["1-vit_nano"].point.seeds == (0, 3), "a baseline with the first link's settings is that link again"


def test_a_seed_that_was_trained_twice_counts_once(tmp_path: Path) -> None:
    """As of one recipe on two machines, which round differently."""
    runs = [run(tmp_path / "a"), run(tmp_path / "b")]
    for path in runs[1].glob("jobs/*/manifest.json"):
        edit(path, "model_hash", to=f"other {path.parent.name}")
    found = compare_runs(runs)
    assert {group.point.seeds for group in found.groups} == {(0,)}
    assert {group.point.spread for group in found.groups} == {None}
    assert {item.seeds for item in found.differences if item.points is not None} == {"1, 1"}
    again = f"Left out: {runs[1]}/3-vit_mini is 3-vit_mini again, with the same seed (0)."
    assert again in found.tables()[0].notes


def test_a_model_that_one_run_calls_a_try_has_the_name_of_its_link(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b")]
    edit(runs[0] / "jobs" / "3-vit_mini" / "manifest.json", "kind", to="try")
    state = read_json(runs[0] / "run.json")
    write_json(
        runs[0] / "run.json", {**state, "jobs": [job for job in state["jobs"] if not job["name"].startswith("3-")]}
    )
    (runs[0] / "jobs" / "3-vit_mini").rename(runs[0] / "jobs" / "try-1-vit_mini")
    edit(runs[1] / "jobs" / "3-vit_mini" / "manifest.json", "model_hash", to="other")
    found = compare_runs(runs)
    assert by_name(found.groups)["3-vit_mini"].kind == "link"
    again = f"{runs[0]}/try-1-vit_mini"
    assert [item.reason for item in found.skipped if item.job == again] == [
        "is 3-vit_mini again, with the same seed (0)"
    ]


def test_the_command_for_what_is_not_run_needs_no_report_that_shows_it(tmp_path: Path) -> None:
    """A run without comparisons shows no command. Here another run has what its last link is compared with."""
    longer = [*RECIPE["chain"]["links"][:2], {**RECIPE["chain"]["links"][2], "train": {"epochs": 20}}]
    first, second = run(tmp_path / "a"), tmp_path / "b"
    make_run(second, use=recipe(chain={"links": longer}), baselines=False)
    assert summarise(second).missing == {}
    commands = [note for note in compare_runs([first, second]).tables()[1].notes if "compt chain" in note]
    assert [f"--run-folder {folder} " in " ".join(commands) for folder in (first, second)] == [True, True]


def test_runs_with_other_settings_are_compared_link_by_link(tmp_path: Path) -> None:
    longer = [*RECIPE["chain"]["links"][:2], {**RECIPE["chain"]["links"][2], "train": {"epochs": 20}}]
    runs = [run(tmp_path / "short"), run(tmp_path / "long", shares={"3-vit_mini": 0.3}, chain={"links": longer})]
    found = compare_runs(runs)
    item = pair(found.differences, "3-vit_mini (long)", "3-vit_mini (short)")
    assert item.points == pytest.approx(4.0)
    assert item.verdict == "better"
    steps = [read_json(each / "jobs" / "3-vit_mini" / "manifest.json")["steps"] for each in reversed(runs)]
    assert f"3-vit_mini (long) differs from 3-vit_mini (short) in steps ({steps[0]}, not {steps[1]})." in found.notes
    assert by_name(found.groups)["1-vit_nano"].runs == [str(runs[0])], "the same model in two runs counts once"


def test_scores_of_other_images_or_texts_are_named_and_not_compared(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b", 1)]
    for name in ("3-vit_mini", "baseline-vit_mini-s1"):
        edit(runs[1] / "jobs" / name / "manifest.json", "scores", "test_style", "pins", "templates", to="00")
    found = compare_runs(runs)
    item = pair(found.differences, "3-vit_mini", "vit_mini baseline")
    assert (item.points, item.verdict) == (None, "not compared")
    assert item.reason == "; ".join(
        f"{runs[1]}/{name} was scored with other templates" for name in ("3-vit_mini", "baseline-vit_mini-s1")
    )
    assert pair(found.differences, "2-vit_micro", "vit_micro baseline").points is not None
    assert f"Not compared: 3-vit_mini and vit_mini baseline, as {item.reason}." in found.tables()[1].notes


def test_other_training_data_is_named(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b", 1)]
    edit(runs[1] / "run.json", "data_fingerprint", to="another")
    notes = compare_runs(runs).notes
    assert "3-vit_mini (b) differs from 3-vit_mini (a) in training shards." in notes
    assert notes[-1].startswith("The training data differ: 1-vit_nano (a), 2-vit_micro (a)")


def test_unfinished_models_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a", states={"3-vit_mini": "training"})
    notes = compare_runs([tmp_path / "a"]).tables()[0].notes
    assert f"Left out: {tmp_path / 'a'}/3-vit_mini is not finished (training)." in notes


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b", 1)]
    out = tmp_path / "out"
    compare(runs, out=out)
    shown = capsys.readouterr().out
    assert "Models on test_style" in shown
    stored = read_json(out / "compare.json")
    assert [item["label"] for item in stored["models"]][:3] == ["1-vit_nano", "2-vit_micro", "3-vit_mini"]
    assert "7 models of 2 runs on test_style" in (out / "compare.html").read_text(encoding="utf-8")
    assert "| 3-vit_mini | 12 | 0, 1 |" in (out / "compare.md").read_text(encoding="utf-8")
    monkeypatch.setattr("compt.report.write.write_report", lambda folder: folder / "report.html")
    report(runs)
    both = capsys.readouterr().out
    assert [line for line in both.splitlines() if line.startswith(("Results of", "Report:", "Models on"))] == [
        *(line for folder in runs for line in (f"Results of {folder.name}", f"Report: {folder / 'report.html'}")),
        "Models on test_style",
    ]
    with pytest.raises(ConfigError, match=r"--on other: no job was scored on it"):
        compare(runs, on="other")


@pytest.mark.usefixtures("no_figures")
def test_reports_of_runs_with_different_primary_sets_are_written_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    primary = {**RECIPE["evaluation"], "primary": "val_style"}
    runs = [run(tmp_path / "a"), run(tmp_path / "b", 1, evaluation=primary)]
    report(runs)
    shown = " ".join(capsys.readouterr().out.split())
    assert all((folder / "report.html").is_file() for folder in runs)
    assert (
        "Not compared: the runs report on test_style and val_style: give runs that report on one, or name it" in shown
    )
    assert "(compt compare RUN… --on NAME); scored were: test_style, val_style." in shown
