"""Model cards: what they say of a run's model, and that no name in it becomes markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from compt.export.card import model_card
from compt.export.formats import FORMATS
from compt.export.write import export_model
from compt.files import write_json
from compt.weights.open import open_model
from tests.helpers.run import make_run
from tests.unit.export.conftest import SPECS, write_model

LAST = "3-vit_mini"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with invented numbers, whose last job has a model folder."""
    folder = tmp_path / "run"
    make_run(folder)
    source = open_model(write_model(folder / "jobs" / LAST / "model", SPECS["vit"]))
    path = folder / "jobs" / LAST / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"model_hash": source.hash})
    return folder


def test_the_card_of_a_job_names_its_chain_costs_scores_and_data(run: Path, tmp_path: Path) -> None:
    export_model(open_model(run / "jobs" / LAST), tmp_path / "out", "hf", "apache-2.0")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license) == ("transformers", "apache-2.0")
    assert card.data.model_name == "vit_pico"
    assert {"clip", "compt", "vit"} <= set(card.data.tags)
    manifest = json.loads((run / "jobs" / LAST / "manifest.json").read_text())
    score = manifest["scores"]["test_style"]
    low, high = score["top1_interval"]
    assert f"| test_style | top1 | {score['top1']:.2f} | {low:.2f} to {high:.2f} | {score['n']:,} |" in card.text
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith(("| test_style", "| captions"))]
    assert len(rows) == 8
    assert not [row for row in rows if row[3] == "-"], "a score without an interval"
    jobs = [line.split(" | ")[0] for line in card.text.splitlines() if " T | " in line or " P | " in line]
    assert jobs == ["| 1-vit_nano", "| 2-vit_micro", "| 3-vit_mini", "| Together"]
    assert "| Fingerprint of the training data | 9f8e7d6c5b4a |" in card.text
    assert 'CLIPModel.from_pretrained("FOLDER")' in card.text


def test_the_card_of_a_resized_model_says_what_its_hash_and_scores_are_of(run: Path, tmp_path: Path) -> None:
    source = open_model(run / "jobs" / LAST)
    trained = source.spec.image_size
    for size, hashed, title in (
        (2 * trained, "Hash of the weights that it was made from", f"Scores at {trained} pixels"),
        (None, "Hash of the weights", "Scores"),
    ):
        export_model(source, tmp_path / "out", image_size=size)
        text = ModelCard.load(tmp_path / "out" / "README.md").text
        assert f"| {hashed} | {source.hash} |" in text
        assert text.count(source.hash) == 1
        assert f"\n### {title}\n" in text


def test_a_model_that_the_job_did_not_write_gets_none_of_its_scores(run: Path) -> None:
    write_model(run / "jobs" / LAST / "model", replace(SPECS["vit"], no_ln_pre=True))
    text = model_card(open_model(run / "jobs" / LAST), FORMATS["timm"], [], None)
    assert "test_style" not in text
    assert "Training" not in text
    assert "license" not in ModelCard(text).data.to_dict()


def test_names_become_neither_markup_nor_metadata_nor_escape_sequences(models: dict[str, Path]) -> None:
    source = open_model(models["vit"])
    hostile = "x\n---\nlicense: mit\n<script>alert(1)</script> [a](javascript:b) | \x1b[31m ![](//e.org/i) `c` \u202e"
    manifest = {"job": hostile, "parent": hostile, "seed": hostile}
    text = model_card(
        replace(source, spec=replace(source.spec, name=hostile), manifest=manifest), FORMATS["open_clip"], [], hostile
    )
    data = ModelCard(text).data.to_dict()
    assert data["license"] == data["model_name"]
    assert data["license"].startswith(r"x\n---\nlicense: mit")
    body = ModelCard(text).text
    assert not {"\x1b", "\u202e"} & set(text)
    assert "<script>" not in body
    assert "\n---" not in body
    assert len(re.findall(r"\\\]\(", body)) == 8, "two links in each of a title and three cells, all escaped"
    assert re.search(r"(?<!\\)\]\(", body) is None
    assert re.search(r"(?<!\\)`c", body) is None


def test_a_name_cannot_lead_out_of_the_folder(models: dict[str, Path], tmp_path: Path) -> None:
    source = open_model(models["vit"])
    export_model(replace(source, spec=replace(source.spec, name="../../x>")), tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path / "deep" / "out").glob("compt-*")] == ["compt-.._.._x_.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
