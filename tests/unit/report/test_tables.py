"""Tables for terminals, Markdown and HTML: the same cells everywhere, readable in narrow terminals."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from rich.console import Console

from compt.cli.plan.tables import (
    PARTS,
    cache_table,
    hours_table,
    memory_table,
    parts_table,
    plan_table,
    plan_tables,
    speedup_table,
    warning,
)
from compt.cost.gpus import DEVICES
from compt.files import read_json, write_json
from compt.plan.forecast import Forecast, Machine, make_forecast
from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe
from compt.recipe.schema import Control
from compt.report.content import jobs_table
from compt.report.summary import CONTROLS, Summary, summarise
from compt.report.tables import (
    SAME,
    acceleration_table,
    calibration_table,
    comparison_table,
    cost_table,
    results_table,
    summary_tables,
)
from compt.text import TextTable, count, escape_markdown, hours
from tests.helpers.run import RECIPE, make_run, recipe


def shown(what: TextTable | Iterable[TextTable], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for table in [what] if isinstance(what, TextTable) else what:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    make_run(folder)
    return summarise(folder)


def rows_of(table: TextTable) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_numbers() -> None:
    assert [count(value) for value in (1.234e15, 999.6e12, 3e13, 1.5e8, 5e3, 2.5e21)] == [
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


def test_results(summary: Summary) -> None:
    table = results_table(summary)
    rows = rows_of(table)
    assert list(rows) == [
        "1-vit_nano",
        "2-vit_micro",
        "3-vit_mini",
        "vit_micro baseline",
        "vit_mini baseline",
        "vit_mini, same epochs",
        "vit_mini, same MACs",
    ]
    own, link = rows["vit_mini baseline"], rows["3-vit_mini"]
    assert (own["Top-1"], own["95 % interval"]) == ("24.00", "20.1 to 28.4")
    assert (own["Epochs"], link["Epochs"]) == ("60", "12")
    assert link["MACs"] == count(summary.links[2].macs)
    assert "400 images, 200 classes, chance 0.50" in table.notes[0]


def test_costs_in_the_shape_of_the_papers_table(summary: Summary) -> None:
    table = cost_table(summary)
    item, total = summary.comparisons[-1], sum(row.macs for row in summary.links)
    assert [row[0] for row in table.rows[3:]] == ["vit_nano baseline", "vit_micro baseline", "vit_mini baseline"]
    assert table.rows[2][:2] == ["3-vit_mini", count(total)]
    faster = acceleration_table(summary)
    assert faster is not None
    assert all(len(set(one.header)) == len(one.header) for one in (table, faster)), "each column has its own name"
    ratios = (item.macs_speedup, item.macs_speedup_accumulated, item.hours_speedup, item.hours_speedup_accumulated)
    assert faster.rows[-1] == ["3-vit_mini", *(f"{value:.2f}x" for value in ratios if value)]
    assert [row[0] for row in faster.rows] == ["2-vit_micro", "3-vit_mini"]


def test_seeds_have_rows_of_their_own(tmp_path: Path) -> None:
    several = recipe(baselines={**RECIPE["baselines"], "seeds": [0, 3]})
    make_run(tmp_path, use=several)
    found = summarise(tmp_path)
    names = [row[0] for row in cost_table(found).rows]
    assert names[3:] == [f"vit_{size} baseline, seed {seed}" for seed in (0, 3) for size in ("nano", "micro", "mini")]
    assert set(names[4:6] + names[6:]) < {row[0] for row in results_table(found).rows}
    compared = comparison_table(found)
    assert compared is not None
    assert compared.rows[-4][1] == "vit_mini, 2 baselines"
    assert compared.header[-1] == "SD"
    assert compared.rows[-4][-1] == f"{found.comparisons[-1].seed_spread:.2f}"
    assert compared.rows[-1][-1] == "-"
    assert "over seeds" in compared.notes[-1]


def control_run(folder: Path, controls: list[str], baselines: bool = True, **options: Any) -> Summary:
    """A run with these controls, as of `compt chain`; without baselines as of `compt demo`."""
    use = recipe(baselines={**RECIPE["baselines"], "controls": controls})
    made = make_run(folder, use=use, **options)
    if not baselines:
        state = read_json(folder / "run.json")
        state["jobs"] = [job for job in state["jobs"] if job["kind"] != "baseline"]
        write_json(folder / "run.json", state)
    assert made.jobs
    return summarise(folder)


def test_a_flattering_comparison_never_comes_without_the_others(tmp_path: Path) -> None:
    """A run as of the demo, with the control of equal epochs only, names what is missing, and the command for it."""
    found = control_run(tmp_path / "a run", ["equal_epochs"], baselines=False)
    assert found.missing == {"baseline": "not run", "control-equal_chain_macs": "not run"}
    table = comparison_table(found)
    assert table is not None
    assert [row[1:] for row in table.rows[1:]] == [
        ["vit_mini baseline", "-", "-", "not run"],
        ["vit_mini, chain's MACs", "-", "-", "not run"],
    ]
    _, _, command = table.notes[-1].partition(": ")
    words = shlex.split(command)
    assert words[:5] == ["compt", "chain", f"{found.folder}/recipe.yaml", "--run-folder", str(found.folder)]
    again = make_plan(load_recipe(Path(words[2]), [words[-1]]), baselines="--baselines" in words, controls=None)
    assert {"control-equal_epochs", "control-equal_chain_macs", "baseline-vit_mini-s0"} <= {j.name for j in again.jobs}


def test_a_whole_comparison_names_nothing_as_missing(tmp_path: Path) -> None:
    controls = ["equal_epochs", "equal_macs", "equal_chain_macs"]
    assert control_run(tmp_path / "whole", controls).missing == {}
    found = control_run(tmp_path / "open", controls, states={"control-equal_chain_macs": "training"})
    assert found.missing == {"control-equal_chain_macs": "pending"}
    table = comparison_table(found)
    assert table is not None
    assert "compt chain" not in " ".join(table.notes)
    make_run(tmp_path / "plain", baselines=False)
    assert summarise(tmp_path / "plain").missing == {}, "nothing is compared"
    states = {"3-vit_mini": "planned", **dict.fromkeys((*controls, "baseline-vit_mini-s0"), "planned")}
    states |= {f"control-{name}": "planned" for name in controls}
    found = control_run(tmp_path / "first two", controls, states=states)
    assert [item.link for item in found.comparisons] == ["2-vit_micro"]
    assert found.missing == {}, "only the last link has controls, and it is not begun"


def test_costs_say_what_is_in_a_sum_of_baselines(summary: Summary, tmp_path: Path) -> None:
    so_far = "So far: with the models before it; for a baseline, with the baselines of the smaller models."
    assert cost_table(summary).notes == [so_far]
    make_run(tmp_path, baselines=False)
    assert cost_table(summarise(tmp_path)).notes == []


def test_a_job_in_training_has_no_cost_so_far(tmp_path: Path) -> None:
    make_run(tmp_path, states={"3-vit_mini": "training"}, at=0.1)
    assert cost_table(summarise(tmp_path)).rows[2] == ["3-vit_mini", "-", "-"]


def test_a_first_pair_test_has_a_row_a_try(summary: Summary) -> None:
    tried = {"lossless": False, "factor": 1.0, "epochs": 10.0, "macs": 2.53e12, "speedup": 5.21, "device_hours": 0.03}
    tried |= {"accuracy": 21.61, "difference": -4.17, "low": -7.29, "high": -1.04, "verdict": "not lossless"}
    tries = [{**tried, "number": at, "baseline_accuracy": 25.78} for at in (1, 2)]
    about = {
        "link": "2-vit_micro",
        "baseline": "baseline-vit_micro-s0",
        "dataset": "val_style",
        "outcome": "not lossless",
    }
    record = {**about, "tries": tries, "target": None, "margin": 0.5, "growth": 1.25, "factor": 1.56}
    table = calibration_table(replace(summary, calibration=record))
    assert table is not None
    assert rows_of(table)["try 2"]["95 % interval"] == "-7.29 to -1.04"
    block = shown(table, 80).split("try 1")[1].split("try 2")[0]
    assert [line.split()[0] for line in block.splitlines() if line.strip()] == [
        name.split()[0] for name in table.header[1:]
    ], "a block is a try"


def test_sums_without_a_member_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, states={"baseline-vit_micro-s0": "planned"})
    found = summarise(tmp_path)
    row = rows_of(cost_table(found))["vit_mini baseline"]
    assert (row["MACs so far"], row["Time so far"]) == ("-", "-")
    assert rows_of(results_table(found))["vit_mini baseline"]["MACs"] != "-"


def test_a_chain_that_has_just_begun(tmp_path: Path) -> None:
    rest = ("baseline-vit_micro-s0", "baseline-vit_mini-s0", "control-equal_epochs", "control-equal_macs")
    planned = dict.fromkeys(("2-vit_micro", "3-vit_mini", *rest), "planned")
    make_run(tmp_path, states={"1-vit_nano": "training", **planned})
    found = summarise(tmp_path)
    assert [row[:4] for row in results_table(found).rows] == [["1-vit_nano", "60", "training", ""]]
    assert [row[0] for row in cost_table(found).rows] == ["1-vit_nano"]
    assert comparison_table(found) is None


def test_differences(summary: Summary) -> None:
    table = comparison_table(summary)
    assert table is not None
    assert [row[0] for row in table.rows] == ["2-vit_micro", *["3-vit_mini"] * 4]
    controls = [f"vit_mini, {same}" for same in ("same epochs", "same MACs", "chain's MACs")]
    assert [row[1] for row in table.rows[1:]] == ["vit_mini baseline", *controls]
    assert "not training seeds" in table.notes[1]
    assert "SD" not in table.header
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


def test_every_control_has_a_name() -> None:
    for kind in get_args(Control):
        assert CONTROLS[f"control-{kind}"].startswith("from scratch, the ")
    assert len(set(CONTROLS.values())) == len(set(SAME.values())) == 3
    assert SAME.keys() == CONTROLS.keys()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_every_cell_is_whole_at_any_width(summary: Summary, width: int) -> None:
    text = shown(summary_tables(summary), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = {word for table in summary_tables(summary) for row in table.rows for cell in row for word in cell.split()}
    assert words <= set(text.split())


def test_a_narrow_terminal_has_blocks_and_a_log_has_a_line_a_row(summary: Summary, tmp_path: Path) -> None:
    narrow, usual = (shown(results_table(summary), width) for width in (40, 80))
    assert re.search(r"^3-vit_mini\n  Epochs +12 *\n  Top-1 +26\.00 *$", narrow, re.MULTILINE)
    assert re.search(r"^3-vit_mini +12 +26\.00 +21\.9 to 30\.5 ", usual, re.MULTILINE)
    block = shown(replace(results_table(summary), rows=[["a", "", "26.00", "", "", ""]]), 20)
    assert "Epochs" not in block, "empty cells take no line"
    make_run(tmp_path, use=recipe(baselines={**RECIPE["baselines"], "seeds": [0, 3]}))
    for found in (summary, summarise(tmp_path)):
        for table in summary_tables(found):
            lines = [*shown(table, 80).splitlines(), ""]
            assert len(lines[4 : lines.index("", 4)]) == len(table.rows)


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


def test_plans_have_a_line_a_row_in_a_log() -> None:
    for table in plan_tables(forecast(), "exact", "zero2"):
        lines = shown(table, 80).splitlines()
        assert len(lines[4 : lines.index("", 4)]) == len(table.rows), table.title


def test_a_plan_s_numbers() -> None:
    found = forecast()
    rows = rows_of(plan_table(found))
    assert list(rows)[-3:] == ["Chain", "Baselines", "Whole run"]
    first, last, total = (rows[name] for name in ("1-vit_nano", "3-vit_mini", "Chain"))
    hours = found.links[2].hours
    assert hours is not None
    table = hours_table(found)
    assert table is not None
    times = rows_of(table)
    assert times["3-vit_mini"]["GPU-hours"] == f"~{hours.gpu_hours:#.3g}"
    assert times["3-vit_mini"]["Range"] == f"{hours.low:#.3g}-{hours.high:#.3g}"
    assert (first["Teacher"], total["Epochs"]) == ("", "82")
    share = found.plan.rows()[2]["teacher_share"]
    assert last["Teacher"] == f"{100 * share:.0f} %"
    assert total["MACs"] == count(sum(item.job.cost.total_macs for item in found.links))
    assert "baseline-vit_nano-s0" not in times, "it is the first link"
    assert list(times)[-3:] == ["Chain", "Baselines", "Whole run"]
    assert plan_table(found, "paper").rows[2][5] == count(found.plan.rows("paper")[2]["total_macs"])
    notes = " ".join(table.notes)
    assert "projected for A100 80 GB from the A100 hours of the paper's Table 2; ~ marks" in notes
    assert "as the paper counts" in plan_table(found, "paper").notes[0]


def test_a_plan_for_a_cpu_has_no_gpus_in_it() -> None:
    found = forecast(None)
    text = shown(plan_tables(found), 120)
    assert "add --kind" in text
    assert "Wall time" not in text
    assert memory_table(found) is None
    assert speedup_table(found).header == ["Model", "MACs", "MACs so far"]  # type: ignore[union-attr]


def test_accelerations_of_macs_and_of_hours() -> None:
    found = forecast()
    table = speedup_table(found)
    assert table is not None
    assert table.rows[0] == ["1-vit_nano", "1.00x", "1.00x", "1.00x", "1.00x"]
    row, hours = found.plan.rows()[2], found.speedups()[2]
    ratios = (row["speedup"], row["accumulated_speedup"], *hours)
    assert table.rows[2][1:] == [f"{value:.2f}x" for value in ratios]
    paper = speedup_table(found, "paper")
    assert paper is not None
    assert paper.rows[2][2] == f"{found.plan.acceleration('paper'):.2f}x" != table.rows[2][2]
    assert paper.rows[2][2] in shown(plan_tables(found, "paper"), 100)
    without = make_forecast(recipe(baselines=None), None)
    assert speedup_table(without) is None


def test_a_plan_shows_what_the_teacher_s_cache_has() -> None:
    assert cache_table(forecast()) is None
    found = forecast(engine={"device": "cpu", "teacher_cache": "2M"})
    table = cache_table(found)
    assert table is not None
    row, item = rows_of(table)["2-vit_micro"], found.links[1]
    assert item.cached is not None
    later = item.cached.hits + item.cached.later_misses
    assert float(row["Hits"].split()[0]) == pytest.approx(100 * item.cached.hits / later, abs=0.5)
    assert row["Later"] == count(later)
    assert 0 < float(row["Saved"].split()[0]) < 100
    assert "Captions kept by engine.teacher_cache" in shown(plan_tables(found), 80)


def test_jobs_say_what_the_teacher_s_cache_had() -> None:
    def job(name: str, trained: dict[str, Any], **line: Any) -> Any:
        plan = {"parameters": 10, "steps": 4, "seed": 0}
        manifest = {"trained": trained} if trained else {}
        return SimpleNamespace(
            name=name, progress=lambda: "", plan=plan, manifest=manifest, train=[line] if line else []
        )

    jobs = [job("a", {"teacher_hits": 0, "teacher_misses": 0}), job("b", {"teacher_hits": 1, "teacher_misses": 3})]
    jobs += [job("c", {}, teacher_hits=0, teacher_misses=7), job("d", {})]
    assert jobs_table(jobs).notes[1:] == [
        "b: the teacher's cache had 25.0 % of 4 captions.",
        "c: the teacher's cache had 0.0 % of 7 captions.",
    ]


def test_memory_is_marked_where_it_does_not_fit() -> None:
    small = Machine(replace(DEVICES["a100-40"], memory_bytes=1.3e9 / 0.95), 1)
    found = make_forecast(recipe(optimizer={"batch": 512, "precision": "fp32"}), small)
    table = memory_table(found)
    assert table is not None
    for item, stored, recomputed in zip(found.trained, table.rows[::2], table.rows[1::2], strict=True):
        assert (stored[0], recomputed[0]) == (item.job.name, "  recomputed")
        for engine, kept, again in zip(table.header[1:], stored[1:], recomputed[1:], strict=True):
            fit = item.memory[engine]  # type: ignore[index]
            assert kept.endswith("!") is not fit.fits(False)
            assert again.endswith("!") is not fit.fits(True)
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
    assert table.rows[0][0] == "1-vit_nano"
    assert [row[1] for row in table.rows[:9]] == [*PARTS, "total"]
    for at, memory in ((2, fit.stored), (3, fit.recomputed)):
        for row in table.rows[:8]:
            assert float(row[at]) == pytest.approx(getattr(memory, row[1]) / 1e9, rel=0.01)
        assert float(table.rows[8][at]) == pytest.approx(memory.total_bytes / 1e9, rel=0.01)
    activations = table.rows[PARTS.index("activations")]
    assert float(activations[2]) > float(activations[3])


def test_cells_are_no_markup() -> None:
    text = shown(TextTable("[bold]", ["a", "b"], [["[red]x", "[/]"]], ["[dim]"]), 60)
    assert all(cell in text for cell in ("[bold]", "[red]x", "[/]", "[dim]"))


def test_markdown_has_as_many_cells_in_every_row(summary: Summary) -> None:
    text = results_table(summary).markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {7}
    assert lines[1] == "|:--|" + "--:|" * 5
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


@pytest.mark.parametrize("width", [60, 34, 20])
def test_tables_of_any_form_look_alike(width: int) -> None:
    row = ["vit_t16", "1.00 M", "2.00 G (1.00x)"]
    table = TextTable("A title", ["Model", "Params", "MACs so far"], [row], ["A note."])
    lines = [line.rstrip() for line in shown(table, width).splitlines()]
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("A title", "", "", "A note.")
    assert all(lines[2:-2])
    assert any(line.startswith("─") for line in lines) is (width > 20)
    assert any(line.startswith("vit_t16") for line in lines)
