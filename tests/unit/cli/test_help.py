"""Help pages: plain text of 80 columns with choices and defaults; recipes by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from compt.cli.main import COMMANDS, GROUPS, app
from compt.cli.options import Kind
from compt.cost.gpus import ALIASES, DEVICES
from compt.errors import ConfigError
from compt.recipe.read import shipped

PAGES = [[name] for name in COMMANDS] + [[group, name] for group, (_, commands) in GROUPS.items() for name in commands]


def page(*words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.output


def helps(command: object) -> Iterator[tuple[str, str]]:
    for parameter in command.params:  # type: ignore[attr-defined]
        yield parameter.name, parameter.help or ""


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_a_help_page(words: list[str]) -> None:
    text = page(*words)
    assert max(map(len, text.splitlines())) <= 80
    types = set(re.findall(r"<(\w[\w ]*)>", text))
    assert not types & {"bool", "str", "path", "int", "float", "int range", "float range", "list[str]"}
    command = get_command(app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    long = [(name, text) for name, text in helps(command) if not 3 < len(text) <= 70]
    assert long == []


def test_every_command_is_in_one_line_of_the_overview() -> None:
    text = page()
    for name in [*COMMANDS, *GROUPS]:
        assert re.search(rf"^  {name} +[A-Z]", text, re.MULTILINE), name


def test_choices_are_named_with_a_wrong_value() -> None:
    done = CliRunner().invoke(app, ["plan", "demo", "--memory", "zero9"])
    assert done.exit_code == 2
    assert "--memory" in done.output
    assert "'ddp', 'fsdp2', 'zero0'" in done.output
    assert "<zeroshot|multilabel|retrieval|linear_probe|knn>" in page("eval")


def test_kinds_of_gpu_are_those_that_are_known() -> None:
    (kinds, _) = get_args(get_args(Kind)[0])
    assert set(get_args(kinds)) == {*DEVICES, *ALIASES}


def test_shipped_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    listed = run.invoke(app, ["recipes", "list"]).output
    assert all(re.search(rf"^{name} ", listed, re.MULTILINE) for name in shipped("recipes"))
    text = shipped("recipes")["demo"].read_text(encoding="utf-8")
    assert run.invoke(app, ["recipes", "show", "demo"]).output == text
    assert run.invoke(app, ["recipes", "copy", "demo"]).exit_code == 0
    assert (tmp_path / "demo.yaml").read_text(encoding="utf-8") == text
    again = run.invoke(app, ["recipes", "copy", "demo"])
    assert isinstance(again.exception, ConfigError)
    for words in (["plan", "demo"], ["plan", "demo.yaml"]):
        assert "Plan of demo" in run.invoke(app, words).output
    assert isinstance(run.invoke(app, ["plan", "dmeo"]).exception, ConfigError)
