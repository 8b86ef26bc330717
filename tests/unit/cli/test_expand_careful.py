"""`compt expand` compares a teacher's digests before it reads weights, and needs none for a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from compt.cli.main import app
from compt.errors import ArtefactError
from compt.models.clip import build
from compt.models.presets import resolve
from compt.weights.artefact import write_artefact
from tests.helpers.states import export_state

TINY = {"width": 16, "text_width": 16, "head_width": 8, "text_head_width": 8, "context_length": 16, "embed_dim": 24}
GROWN = ("--set", "width=32", "--set", "text_width=24", "--set", "embed_dim=24")


@pytest.fixture
def altered(tmp_path: Path) -> Path:
    """A model with one changed byte in its weights: the last one, so that all headers are intact."""
    spec = resolve("vit_pico", TINY)
    write_artefact(tmp_path / "model", export_state(build(spec, seed=1)), spec, {})
    (file,) = (tmp_path / "model").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return tmp_path / "model"


def expand(*words: object) -> None:
    result = CliRunner().invoke(app, ["expand", *map(str, words), *GROWN])
    if result.exception is not None:
        raise result.exception


def test_an_altered_teacher_is_not_expanded(altered: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"\.safetensors: .*SHA-256 differs"):
        expand(altered, "vit_pico", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_altered_teacher_is_not_verified(altered: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"\.safetensors: .*SHA-256 differs"):
        expand(altered, "vit_pico", "--verify", tmp_path / "*.tar")


def test_a_plan_needs_no_weights(altered: Path) -> None:
    expand(altered, "vit_pico", "--dry-run")
