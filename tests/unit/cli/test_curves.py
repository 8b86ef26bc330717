"""`compt curves`: what it shows and what it writes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from compt.cli.curves import curves_table
from compt.cli.main import app
from compt.design.curves import read_curves
from compt.errors import ConfigError, RunError
from tests.helpers.curves import BASELINE, NANO, SET, lengths, link, write_run

POINTS = {5: 20.0, 10: 24.0, 20: 28.0}


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["curves", *map(str, words)], env={"COLUMNS": "120"})


def shown(*words: object) -> str:
    result = run(*words)
    assert result.exception is None, result.exception
    return " ".join(result.output.split())


def test_a_row_for_each_link(tmp_path: Path) -> None:
    table = curves_table(read_curves(lengths(tmp_path, POINTS)))
    ((name, points, baseline, epochs, interval, speed),) = table.rows
    assert (name, points, baseline) == ("vit_nano → vit_micro", "5:20.00, 10:24.00, 20:28.00", "60:25.00")
    assert (epochs, speed) == ("12.50", "3.20x")
    low, high = map(float, interval.split(" to "))
    assert 10 < low < 12.5 < high < 20


@pytest.mark.parametrize(
    ("points", "cells", "reason"),
    [
        ({10: 20.0, 20: 22.0}, ("> 20", "≥ 20.00", "< 2.00x"), "its longest schedule, 20 epochs, is not enough."),
        ({10: 27.0, 20: 29.0}, ("≤ 10", "≤ 10.00", "≥ 4.00x"), "its shortest schedule, 10 epochs, is enough."),
    ],
)
def test_bounds_are_shown_as_bounds(
    tmp_path: Path, points: dict[int, float], cells: tuple[str, ...], reason: str
) -> None:
    table = curves_table(read_curves(lengths(tmp_path, points)))
    assert tuple(table.rows[0][3:]) == cells
    assert f"vit_nano → vit_micro: {reason}" in table.notes


def test_what_is_known_without_a_baseline_and_what_was_left_out(tmp_path: Path) -> None:
    going = write_run(tmp_path / "going", [link(40, 30.0, state="training")])
    table = curves_table(read_curves([*lengths(tmp_path, POINTS, None), going]))
    assert table.rows[0][2:] == ["-", "-", "-", "-"]
    assert "vit_nano → vit_micro: there is no finished baseline of vit_micro." in table.notes
    assert f"Left out: {going}/2-vit_micro is not finished (training)." in table.notes


def test_how_an_interval_was_made_is_said(tmp_path: Path) -> None:
    jobs = [NANO, BASELINE, link(10, 24.0, "a"), link(20, 28.0, "b"), link(20, 29.0, "c", seed=1)]
    paired = curves_table(read_curves([write_run(tmp_path / "a", jobs)], average_seeds=True))
    assert any("bootstrap over images" in note for note in paired.notes)
    assert any("standard deviation" in note for note in paired.notes)
    assert "20:28.50±0.71" in paired.rows[0][1]
    without = curves_table(read_curves([write_run(tmp_path / "b", jobs, answers=False)]))
    assert not any("bootstrap over images" in note or "standard deviation" in note for note in without.notes)
    assert any("seed 0; vit_nano → vit_micro, seed 1: stored answers are missing" in note for note in without.notes)
    assert [row[4] for row in without.rows] == ["-", "-"]
    (tmp_path / "a" / "jobs" / "c" / "scores" / f"{SET}.npz").unlink()
    notes = curves_table(read_curves([tmp_path / "a"])).notes
    assert any("bootstrap over images" in note for note in notes)
    assert any(note.startswith("No interval of vit_nano → vit_micro, seed 1: ") for note in notes)


@pytest.mark.parametrize("width", [60, 120])
def test_the_table_fits_a_terminal(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(curves_table(read_curves(lengths(tmp_path, POINTS))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text for word in ("5:20.00", "60:25.00", "12.50", "3.20x"))


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    runs, out = lengths(tmp_path, POINTS), tmp_path / "out" / "figures"
    text = shown(*runs, "--out", out)
    assert f"on {SET}" in text
    assert "12.50" in text
    assert sorted(path.name for path in out.iterdir()) == ["curves.json", "curves.png", "curves.svg"]
    printed = json.loads(run(*runs, "--json").output)
    assert printed == json.loads((out / "curves.json").read_text())
    assert printed["links"][0]["match"]["epochs"] == pytest.approx(12.5)
    pixels = np.asarray(Image.open(out / "curves.png").convert("RGB"))
    # The link, the crossing and its baseline are drawn in their colours.
    for colour in ((0x0B, 0x62, 0xC4), (0x00, 0x9E, 0x73), (0x7A, 0x85, 0x91)):
        assert (pixels == colour).all(axis=-1).sum() > 50, colour
    # The line goes from the first point to the last.
    assert (pixels == (0x0B, 0x62, 0xC4)).all(axis=-1).any(axis=0).sum() > 200
    svg = (out / "curves.svg").read_text()
    assert svg.startswith("<?xml")
    assert "var(--" not in svg
    again = tmp_path / "again"
    run(*runs, "--out", again)
    assert (again / "curves.svg").read_text() == svg


def test_the_figure_has_a_panel_for_each_link_and_marks_only_what_is_there(tmp_path: Path) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    runs = lengths(tmp_path, {10: 20.0})
    shown(*runs, "--out", one)
    pixels = np.asarray(Image.open(one / "curves.png").convert("RGB"))
    assert not (pixels == (0x00, 0x9E, 0x73)).all(axis=-1).any()
    shown(
        *runs, write_run(tmp_path / "o", [NANO, link(9, 22.0, "a", seed=1), link(9, 22.0, "b", seed=2)]), "--out", three
    )
    assert len(re.findall('id="axes_', (three / "curves.svg").read_text())) == 4
    assert Image.open(three / "curves.png").height > 1.5 * Image.open(one / "curves.png").height


def test_runs_without_a_link(tmp_path: Path) -> None:
    run_folder, out = write_run(tmp_path / "run", [NANO, BASELINE]), tmp_path / "out"
    assert "No link in these runs is trained to its end." in shown(run_folder, "--out", out)
    assert [path.name for path in out.iterdir()] == ["curves.json"]


def test_options_reach_the_fit(tmp_path: Path) -> None:
    runs = [*lengths(tmp_path, POINTS), write_run(tmp_path / "s", [NANO, link(20, 30.0, seed=1)])]
    assert "11.25" in shown(*runs, "--target", "lossless")
    assert "0.5 points below the baseline" in shown(*runs, "--target", "lossless")
    assert "20:29.00±1.41" in shown(*runs, "--average-seeds")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--on", "nothing"], ConfigError, f"--on nothing: no job was scored on it.*scored were: {SET}"),
        (["nowhere"], RunError, "nowhere is not a run folder"),
    ],
)
def test_one_message_for_bad_input(tmp_path: Path, words: list[str], error: type[Exception], message: str) -> None:
    found = run(*lengths(tmp_path, POINTS), *words).exception
    assert isinstance(found, error)
    assert re.search(message, str(found))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = run(*lengths(tmp_path, POINTS), "--out", tmp_path / "file").exception
    assert isinstance(found, RunError)
    assert "file" in str(found)
