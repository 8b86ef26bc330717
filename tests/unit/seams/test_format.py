"""A format of `compt export` that a user adds: one entry of the table and one function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compt.cli.main import app
from compt.export.formats import FORMATS, ExportFormat
from compt.files import write_json
from compt.models.clip import build
from compt.models.presets import PRESETS
from compt.weights.artefact import EXPORT_RECORD, Artefact, write_artefact
from tests.helpers.states import export_state

SPEC = PRESETS["vit_pico"]


def write_shapes(source: Artefact, folder: Path) -> list[str]:
    """The shape of each parameter."""
    write_json(folder / "shapes.json", {name: list(tensor.shape) for name, tensor in source.state.items()})
    return ["`shapes.json` has no weights."]


def test_a_format_from_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ("import json", 'shapes = json.load(open("FOLDER/shapes.json"))')
    monkeypatch.setitem(FORMATS, "shapes", ExportFormat("shapes alone", f"{__name__}:write_shapes", load, "json"))
    write_artefact(tmp_path / "model", export_state(build(SPEC, seed=1)), SPEC, {})
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(out), "--to", "shapes"])
    assert done.exception is None
    assert "`shapes.json` has no weights." in done.output
    assert json.loads((out / "shapes.json").read_text())["visual.proj"] == [32, 128]
    assert json.loads((out / EXPORT_RECORD).read_text())["files"].keys() == {"README.md", "shapes.json"}
    assert load[1] in (out / "README.md").read_text()
