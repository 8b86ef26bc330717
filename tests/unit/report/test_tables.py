"""Tables for terminals, Markdown and HTML: the same cells everywhere, readable where it is narrow."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console, RenderableType

from compt.cli.plan.tables import memory_table, parts_table, plan_table, plan_tables, speedup_table, warning
from compt.cost.gpus import DEVICES
from compt.files import read_json, write_json
from compt.plan.forecast import Forecast, Machine, make_forecast
from compt.recipe.schema import Control
from compt.report.summary import CONTROLS, Summary, summarise
from compt.report.tables import comparison_table, cost_table, summary_table
from compt.text import TextTable, count, escape_markdown, hours, macs
from tests.helpers.run import RECIPE, make_run, recipe


def shown(what: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    make_run(folder)
    return summarise(folder)


def rows_of(table: TextTable) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_numbers() -> None:
    assert [macs(value) for value in (1.234e15, 999.6e12, 3e13, 1.5e8, 5e3, 2.5e21)] == [
        "1.23 P",
        "1.00 P",
        "30.0 T",
        "150 M",
        "5.00 k",
        "2,500 E",
    ]
    assert [count(value) for value in (0, 12, 999, 12_345_678)] == ["0", "12", "999", "12.3 M"]
    assert [hours(value) for value in (None, 0.001, 0.055, 1, 12.345, 2091.6)] == [
        "-",
        "3.6 s",
        "3.3 min",
        "1.00 h",
        "12.35 h",
        "2,092 h",
    ]


def test_costs_in_the_shape_of_the_papers_table(summary: Summary) -> None:
    table = cost_table(summary)
    rows = rows_of(table)
    assert list(rows) == [
        *(f"Baseline vit_{size}" for size in ("nano", "micro", "mini")),
        *(f"CoM-PT vit_{size}" for size in ("nano", "micro", "mini")),
        "vit_mini from scratch, the link's epochs",
        "vit_mini from scratch, the link's MACs",
    ]
    alone, chain = rows["Baseline vit_mini"], rows["CoM-PT vit_mini"]
    assert alone["Top-1"] == "24.00 [20.1, 28.4]"
    assert (alone["Epochs"], chain["Epochs"]) == ("60", "12")
    item = summary.comparisons[-1]
    assert chain["MACs"] == f"{macs(summary.links[2].macs)} ({item.macs_speedup:.2f}x)"
    total = sum(row.macs for row in summary.links)
    assert chain["MACs accumulated"] == f"{macs(total)} ({item.macs_speedup_accumulated:.2f}x)"
    assert chain["Time accumulated"].endswith(f"({item.hours_speedup_accumulated:.2f}x)")
    assert "(" not in alone["MACs"] + rows["CoM-PT vit_nano"]["MACs"]
    assert "400 pictures, 200 names, chance 0.50" in table.notes[0]


def test_seeds_have_rows_of_their_own(tmp_path: Path) -> None:
    several = recipe(baselines={**RECIPE["baselines"], "seeds": [0, 3]})
    make_run(tmp_path, use=several)
    found = summarise(tmp_path)
    names = [row[0] for row in cost_table(found).rows]
    assert names[:6] == [f"Baseline, seed {seed}, vit_{size}" for seed in (0, 3) for size in ("nano", "micro", "mini")]
    compared = comparison_table(found)
    assert compared is not None
    assert compared.rows[-3][1] == "baseline-vit_mini-s0 and 1 more"
    assert compared.header[-1] == "SD over seeds"
    assert compared.rows[-3][-1] == f"{found.comparisons[-1].seed_spread:.2f}"
    assert compared.rows[-1][-1] == "-"
    assert "over seeds" in compared.notes[-1]


def test_sums_without_a_member_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, states={"baseline-vit_micro-s0": "planned"})
    row = rows_of(cost_table(summarise(tmp_path)))["Baseline vit_mini"]
    assert (row["MACs accumulated"], row["Time accumulated"]) == ("-", "-")
    assert row["MACs"] != "-"


def test_a_chain_that_has_just_begun(tmp_path: Path) -> None:
    rest = ("baseline-vit_micro-s0", "baseline-vit_mini-s0", "control-equal_epochs", "control-equal_macs")
    planned = dict.fromkeys(("2-vit_micro", "3-vit_mini", *rest), "planned")
    make_run(tmp_path, states={"1-vit_nano": "training", **planned})
    table = cost_table(summarise(tmp_path))
    assert [row[:3] for row in table.rows] == [["CoM-PT vit_nano", "60", "training"]]
    assert comparison_table(summarise(tmp_path)) is None


def test_differences(summary: Summary) -> None:
    table = comparison_table(summary)
    assert table is not None
    assert [row[0] for row in table.rows] == ["2-vit_micro", "3-vit_mini", "3-vit_mini", "3-vit_mini"]
    assert [row[1] for row in table.rows[2:]] == ["from scratch, the link's epochs", "from scratch, the link's MACs"]
    assert "not of training seeds" in table.notes[1]
    assert "SD over seeds" not in table.header
    assert table.rows[2][2] == "+15.00"
    assert table.rows[2][4] == "better"
    assert re.fullmatch(r"[+-]\d+\.\d\d to [+-]\d+\.\d\d", table.rows[2][3])


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    make_run(tmp_path)
    for job in ("2-vit_micro", "3-vit_mini"):
        path = tmp_path / "jobs" / job / "manifest.json"
        manifest = read_json(path)
        manifest["scores"]["test_style"]["pins"]["templates"] = "0000"
        write_json(path, manifest)
    table = comparison_table(summarise(tmp_path))
    assert table is not None
    assert [row[0::4] for row in table.rows] == [[job, "not compared"] for job in ("2-vit_micro", *["3-vit_mini"] * 3)]
    assert table.notes[0] == ("Not compared: 2-vit_micro, as baseline-vit_micro-s0 was scored with other templates.")


def test_every_control_is_described_in_words() -> None:
    for kind in get_args(Control):
        assert CONTROLS[f"control-{kind}"].startswith("from scratch, the ")
    assert len(set(CONTROLS.values())) == 3


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_every_cell_is_whole_at_any_width(summary: Summary, width: int) -> None:
    text = shown(summary_table(summary), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    table = cost_table(summary)
    words = {word for row in table.rows for cell in row for word in cell.split()}
    assert words <= set(text.split())


def test_a_narrow_terminal_has_blocks_and_a_wide_one_a_table(summary: Summary) -> None:
    narrow, wide = (shown(cost_table(summary).rich(), width) for width in (60, 150))
    assert re.search(r"^CoM-PT vit_mini\n  Epochs +12 *\n  Top-1 +26\.00 \[21\.9, 30\.5\] *$", narrow, re.MULTILINE)
    assert re.search(r"^ ?CoM-PT vit_mini +12 +26\.00 \[21\.9, 30\.5\] ", wide, re.MULTILINE)
    block = narrow[narrow.index("vit_mini from scratch, the link's MACs") :].split("\n\n")[0]
    assert "accumulated" not in block, "empty cells take no line"


def forecast(kind: str | None = "a100-80", gpus: int = 8, baselines: bool = True, **changes: Any) -> Forecast:
    machine = Machine(DEVICES[kind], gpus) if kind else None
    return make_forecast(recipe(**changes), machine, baselines=baselines)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("kind", [None, "a100-80"])
def test_plans_are_whole_at_any_width(kind: str | None, width: int) -> None:
    found = forecast(kind)
    text = shown(plan_tables(found, "exact", "fsdp2" if kind else None), width)
    assert "Plan of shapes" in text
    assert "as 1-vit_nano" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = {word for row in plan_table(found).rows for cell in row for word in cell.split() if "-" not in word}
    assert words <= set(text.split())


@pytest.mark.parametrize("width", [95, 100])
def test_the_plan_is_one_table_in_a_terminal_of_100(width: int) -> None:
    text = shown(plan_table(forecast(baselines=False)).rich(), width)
    assert re.search(r"^3-vit_mini +[\d.]+ M +12 +[\d.]+ k +[\d,]+ +[\d.]+ T +\d+ % +~[\d.]+ ", text, re.MULTILINE)
    assert re.search(r"^Chain +[\d.]+ M +82 ", text, re.MULTILINE)


def test_a_plan_s_numbers() -> None:
    found = forecast()
    rows = rows_of(plan_table(found))
    assert list(rows)[-3:] == ["Chain", "Individually", "Whole run"]
    first, last, total = (rows[name] for name in ("1-vit_nano", "3-vit_mini", "Chain"))
    hours = found.links[2].hours
    assert hours is not None
    assert last["GPU-hours"] == f"~{hours.gpu_hours:#.3g} ({hours.low:#.3g}-{hours.high:#.3g})"
    assert (first["Teacher"], total["Epochs"]) == ("", "82")
    share = found.plan.rows()[2]["teacher_share"]
    assert last["Teacher"] == f"{100 * share:.0f} %"
    assert total["MACs"] == macs(sum(item.job.cost.total_macs for item in found.links))
    assert rows["baseline-vit_nano-s0"]["GPU-hours"] == ""
    assert plan_table(found, "paper").rows[2][5] == macs(found.plan.rows("paper")[2]["total_macs"])
    notes = " ".join(plan_table(found).notes)
    assert "projected for A100 80 GB from the A100 hours of the paper's Table 2; ~ marks" in notes
    assert "as the paper counts" in plan_table(found, "paper").notes[0]


def test_a_plan_for_a_cpu_has_no_gpus_in_it() -> None:
    found = forecast(None)
    text = shown(plan_tables(found), 120)
    assert "GPU-hours and memory are shown with --kind" in text
    assert "Wall time" not in text
    assert memory_table(found) is None
    assert speedup_table(found).header == ["Model", "MACs", "MACs so far"]  # type: ignore[union-attr]


def test_accelerations_of_macs_and_of_hours() -> None:
    found = forecast()
    table = speedup_table(found)
    assert table is not None
    assert table.rows[0] == ["1-vit_nano", "1.00x", "1.00x", "1.00x", "1.00x"]
    row, hours = found.plan.rows()[2], found.speedups()[2]
    assert hours is not None
    ratios = (row["speedup"], row["accumulated_speedup"], *hours)
    assert table.rows[2][1:] == [f"{value:.2f}x" for value in ratios]
    paper = speedup_table(found, "paper")
    assert paper is not None
    assert paper.rows[2][2] == f"{found.plan.acceleration('paper'):.2f}x" != table.rows[2][2]
    assert paper.rows[2][2] in shown(plan_tables(found, "paper"), 100)
    without = make_forecast(recipe(baselines=None), None)
    assert speedup_table(without) is None


def test_memory_is_marked_where_it_does_not_fit() -> None:
    small = Machine(replace(DEVICES["a100-40"], memory_bytes=1.3e9 / 0.95), 1)
    found = make_forecast(recipe(optimizer={"batch": 512, "precision": "fp32"}), small)
    table = memory_table(found)
    assert table is not None
    for item, row in zip(found.trained, table.rows, strict=True):
        for engine, cell in zip(table.header[1:], row[1:], strict=True):
            fit = item.memory[engine]  # type: ignore[index]
            kept, again = cell.split(" ")
            assert kept.endswith("!") is not fit.stored_fits
            assert again.endswith("!)") is not fit.recomputed_fits
            assert float(kept.rstrip("!")) == pytest.approx(fit.stored.total_bytes / 1e9, rel=0.01)
    said = warning(found)
    assert said is not None
    assert found.remedy is not None
    assert f"engine.micro_batch: {found.remedy.micro_batch}" in said
    assert all(name in said for name in found.remedy.jobs)
    assert said.replace("\n", " ") in " ".join(shown(plan_tables(found), 100).split())
    assert warning(forecast()) is None


def test_the_parts_of_memory() -> None:
    found = forecast()
    table = parts_table(found, "zero1")
    fit = found.links[0].memory["zero1"]
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert float(row["Optimizer"]) == pytest.approx(fit.stored.optimizer / 1e9, rel=0.01)
    kept, again = row["Activations"].split(" ")
    assert float(again.strip("()")) == pytest.approx(fit.recomputed.activations / 1e9, rel=0.01)
    assert float(kept) > float(again.strip("()"))


@pytest.mark.parametrize("width", [76, 80])
def test_results_are_tables_in_a_usual_terminal(summary: Summary, width: int) -> None:
    costs = shown(cost_table(summary).rich(), width)
    assert re.search(r"^CoM-PT +12 +26\.00 ", costs, re.MULTILINE)
    assert re.search(r"^vit_mini +\[21\.9, 30\.5\] +\(", costs, re.MULTILINE)
    assert max(map(len, costs.splitlines())) <= width


def test_differences_over_seeds_in_a_usual_terminal(tmp_path: Path) -> None:
    make_run(tmp_path, use=recipe(baselines={**RECIPE["baselines"], "seeds": [0, 3]}))
    table = comparison_table(summarise(tmp_path))
    assert table is not None
    text = shown(table.rich(), 80)
    assert re.search(r"^3-vit_mini +baseline-vit_mini-s0( and)? +[+-]", text, re.MULTILINE)
    assert re.search(r"^ +(and )?1 more *$", text, re.MULTILINE)
    assert "…" not in text


def test_cells_are_no_markup() -> None:
    text = shown(TextTable("[bold]", ["a", "b"], [["[red]x", "[/]"]], ["[dim]"]).rich(), 60)
    assert all(cell in text for cell in ("[bold]", "[red]x", "[/]", "[dim]"))


def test_markdown_has_as_many_cells_in_every_row(summary: Summary) -> None:
    text = cost_table(summary).markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}
    assert lines[1] == "|:--|" + "--:|" * 6
    assert text.startswith("### Results of shapes\n\n|")
    assert "|\n\nTop-1 in percent" in text


def test_markdown_of_odd_names() -> None:
    table = TextTable("T", ["a|b", "c"], [["x|y\nz", "<b> & *d* _e_ f_g `h`"]], ["n_1 <i>"])
    lines = table.markdown().splitlines()
    assert lines[2] == r"| a\|b | c |"
    assert lines[4] == r"| x\|y z | &lt;b> &amp; \*d\* \_e\_ f_g \`h\` |"
    assert lines[6] == "n_1 &lt;i>"


@pytest.mark.parametrize("text", ["plain text", "vit_mini", "95 %: [1.0, 2.0]"])
def test_plain_text_stays_as_it_is(text: Any) -> None:
    assert escape_markdown(text) == text


@pytest.mark.parametrize("width", [60, 32, 28])
def test_tables_of_any_form_look_alike(width: int) -> None:
    row = ["vit_t16", "1.00 M", "2.00 G (1.00x)"]
    table = TextTable("A title", ["Model", "Params", "MACs so far"], [row], ["A note."])
    lines = [line.rstrip() for line in shown(table.rich(), width).splitlines()]
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("A title", "", "", "A note.")
    assert all(lines[2:-2])
    assert any(line.startswith("Model") for line in lines)
    assert any(line.startswith("─") for line in lines)
    assert any(line.startswith("vit_t16") for line in lines)
