"""`compt macs`: its numbers, its table at several widths, its messages; without torch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from compt.cli.macs import macs_table, sums
from compt.cli.main import app
from compt.cost.counts import parameters
from compt.cost.published import paper_breakdown, paper_cost
from compt.cost.training import exact_breakdown
from compt.errors import ConfigError
from compt.models.presets import PRESETS, ModelSpec, resolve

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["macs", *arguments], env={"COLUMNS": "120"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def values(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


def test_json_has_the_records_and_their_sums() -> None:
    found = values("vit_s16", "--teacher", "vit_t16", "--set", "embed_dim=640", "--batch", "16", "--tokens", "20")
    spec = resolve("vit_s16", {"embed_dim": 640})
    breakdown = exact_breakdown(spec, PRESETS["vit_t16"], batch=16, captions=4, tokens=20)
    cost = exact_breakdown(spec, PRESETS["vit_t16"], batch=16, captions=4, tokens=20).of_steps(1)
    assert found["records"] == [asdict(record) for record in breakdown.records]
    assert ModelSpec.from_dict(found["model"]) == spec
    assert ModelSpec.from_dict(found["teacher"]) == PRESETS["vit_t16"]
    assert found["step_macs"] == cost.total_macs
    assert found["sample_macs"] == cost.sample_macs
    assert set(found["parts"]) == {"student", "projector", "loss", "teacher"}
    assert found["parts"]["student"]["parameters"] == parameters(spec)
    assert found["parts"]["teacher"]["forward_macs"] == cost.teacher_forward_macs
    assert sum(part["step_macs"] for part in found["parts"].values()) == pytest.approx(cost.total_macs, rel=1e-13)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--captions", "6"], {"captions": 6}),
        (["--tokens", "7:3,30:1"], {"tokens": {7: 3, 30: 1}}),
        (["--micro-batches"], {"recompute": True}),
        (["--checkpointing"], {"checkpointing": True}),
        (["--chunked-loss"], {"chunked_loss": True}),
        (["--batch", "64"], {"batch": 64}),
    ],
)
def test_every_option_counts(arguments: list[str], options: dict[str, Any]) -> None:
    wanted = exact_breakdown(PRESETS["vit_s16"], None, **{"batch": 1024, "captions": 4, **options}).of_steps(1)
    found = values("vit_s16", *arguments)
    assert found["step_macs"] == wanted.total_macs
    assert bool(options) == (wanted.total_macs != values("vit_s16")["step_macs"])


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [("7.5", "7.5"), ("500", "77"), ("7:1,9:3", "7 to 9"), ("7:1,90:3", "7 to 77"), ("90:1", "77"), ("context", "77")],
)
def test_the_lengths_that_are_computed_are_shown(tokens: str, shown: str) -> None:
    assert values("vit_s16", "--tokens", tokens)["sample"] == f"4 captions of {shown} tokens"
    assert values("vit_s16")["sample"] == "4 captions of 77 tokens"


def test_the_sizes_of_model_and_teacher_change() -> None:
    sizes = ("--set", "width=448", "--set", "depth=13", "--teacher", "vit_t16", "--teacher-set", "depth=11")
    changed = values("vit_s16", *sizes)
    assert (changed["model"]["width"], changed["model"]["heads"], changed["model"]["depth"]) == (448, 7, 13)
    assert (changed["teacher"]["depth"], changed["teacher"]["width"]) == (11, 192)


def test_the_published_mode() -> None:
    found = values("swin_s", "--teacher", "swin_t", "--mode", "paper", "--batch", "8")
    wanted = paper_cost(PRESETS["swin_s"], PRESETS["swin_t"], samples=8, steps=1).total_macs
    assert found["step_macs"] == pytest.approx(wanted, rel=1e-13)
    shown = " ".join(run("swin_s", "--mode", "paper").split())
    assert "6 captions of 77 tokens" in shown
    assert "3 forward - patch embedding + 9 parameters" in shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits(width: int) -> None:
    breakdown = exact_breakdown(PRESETS["vit_l16"], PRESETS["vit_t16"], batch=8192, captions=4, recompute=True)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(macs_table(breakdown, "a model", "4 captions of 77 tokens"))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any("─" in line for line in lines), "still a table"


def test_the_rows_of_the_table() -> None:
    breakdown = exact_breakdown(PRESETS["vit_s16"], PRESETS["vit_t16"], batch=1024, captions=4)
    table = macs_table(breakdown, "a model", "4 captions of 77 tokens")
    assert list(table.header) == ["Module", "Params", "Fwd", "Bwd", "Update", "Step"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["student image patch embedding"] == ["295 k", "57.8 M", "57.8 M", "885 k", "118 G"]
    assert rows["student logit scale"] == ["1", "", "", "3", "3"]
    assert rows["teacher text embeddings"] == ["12.7 M", "", "", "", ""]
    assert rows["student, all"][0] == "62.4 M"
    again = replace(breakdown, records=(replace(breakdown.records[0], recompute_macs=1e9),))
    assert list(macs_table(again, "a model", "a caption").header)[4] == "Again"
    alone = paper_breakdown(PRESETS["vit_s16"], None)
    assert [row[0] for row in macs_table(alone, "a model", "a caption").rows][-1] == "student, all"
    assert [record.part for record in sums(alone)] == ["student"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_s61"], "unknown model 'vit_s61' (did you mean 'vit_s16'?)"),
        (["vit_s16", "--teacher", "vit_t61"], "unknown model 'vit_t61' (did you mean 'vit_t16'?)"),
        (["vit_s16", "--teacher", "vit_l16"], "vit_s16 with --teacher vit_l16: its 62,355,841 parameters are not more"),
        (
            ["vit_s16", "--teacher", "vit_nano"],
            "vit_s16 with --teacher vit_nano: its head_width is 64, but 'vit_nano'",
        ),
        (["vit_s16", "--teacher-set", "depth=3"], "--teacher-set: there is no --teacher"),
        (["vit_s16", "--set", "width"], "--set width: should be KEY=VALUE, as in --set width=448"),
        (["vit_s16", "--set", "width=100"], "width 100 is not 1 x 64"),
        (["vit_s16", "--set", "width=-64"], "--set: width = -64: should be greater than 0"),
        (["vit_s16", "--set", "width=["], "--set width=[: is not YAML"),
        (["vit_s16", "--set", "widht=64"], "--set: widht: unknown key (did you mean 'width'?)"),
        (["swin_t", "--set", "depth=64"], "--set: depth: a Swin has none; known here: width, depths, heads"),
        (["vit_s16", "--mode", "paper", "--captions", "4"], "--captions: --mode paper always counts 6 captions of 77"),
        (["vit_s16", "--mode", "paper", "--chunked-loss"], "--chunked-loss: --mode paper always counts"),
        (
            ["vit_s16", "--tokens", "many"],
            "--tokens many: should be a length, lengths with shares as in 20:0.7,40:0.3",
        ),
        (["vit_s16", "--tokens", "7:-1"], "or context (the share -1.0 of length 7 should be a number"),
        (["vit_s16", "--tokens", "{7: 0.8}"], "--tokens {7: 0.8}: should be a length, lengths with shares"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(*arguments)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from compt.cli.main import app\n"
        "app(['macs', 'vit_s16', '--teacher', 'vit_t16'], standalone_mode=False)\n"
        "assert not {'torch', 'open_clip', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "student, all" in done.stdout


def test_the_page_on_costs_shows_what_is_printed() -> None:
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    command, shown = re.search(r"```text\n\$ COLUMNS=88 compt macs (.*?)\n(.*?)```", page, re.DOTALL).groups()  # type: ignore[union-attr]
    printed = CliRunner().invoke(app, ["macs", *command.split()], env={"COLUMNS": "88"}).output
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()
    for tokens in ("17.5", "7:0.5,28:0.5"):
        found = values("vit_s16", "--tokens", tokens)["sample_macs"]
        assert re.search(rf"{found:,.0f}[^`]*`--tokens {re.escape(tokens)}`", " ".join(page.split())), tokens
