"""A task from outside the package: one class and one line in the table are all that it takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch.nn import functional
from typer.testing import CliRunner

from compt.cli.main import app
from compt.data.batch import EvalBatch
from compt.data.decode import evaluation_pixels
from compt.errors import ConfigError
from compt.evaluate.encoder import Arrays, Encoder, Tokenize, by_id, load_arrays, over_batches
from compt.evaluate.scorer import Scorer
from compt.evaluate.task import EvalSettings, EvaluationTask, Result, ScoreRow, open_data
from compt.files import read_json, write_json
from compt.models.clip import build
from compt.models.pixels import to_input
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, resolve
from compt.recipe.read import parse_recipe
from compt.recipe.reference import reference
from compt.recipe.schema import EVALUATION_TASKS, EvalSet
from compt.report.write import write_report
from compt.weights.artefact import write_artefact
from tests.helpers import run as runs
from tests.helpers.shards import make_shards, picture, texts
from tests.helpers.states import export_state

IMAGES = 9
SIZES = {"width": 16, "text_width": 16, "head_width": 8, "text_head_width": 8, "depth": 1, "text_depth": 1}
SPEC = resolve("vit_pico", {**SIZES, "embed_dim": 24, "context_length": 16})


@dataclass
class Cosines(Result):
    task: ClassVar[str] = "mean_cosine"

    cosines: np.ndarray

    def headline(self) -> dict[str, float]:
        return {"mean_cosine": float(self.cosines.mean())}

    def details(self) -> dict[str, Any]:
        return {**self.headline(), "lowest": float(self.cosines.min())}

    def arrays(self) -> Arrays:
        return {"ids": self.ids, "cosines": self.cosines}


@dataclass(frozen=True)
class MeanCosine(EvaluationTask):
    """The mean cosine of each image with its first caption."""

    title: ClassVar[str] = "Cosine of pairs"
    note: ClassVar[str] = "Between -1 and 1."

    @classmethod
    def open(cls, item: EvalSet, settings: EvalSettings) -> MeanCosine:
        return cls(item, settings, open_data(item, settings, captions=True))

    def pins(self) -> dict[str, str]:
        return {**super().pins(), "caption": "first"}

    def run(self, encoder: Encoder, tokenize: Tokenize) -> Cosines:
        found = [torch.zeros(0, 2, dtype=torch.float64)]

        def use(batch: EvalBatch) -> None:
            text = encoder.texts(tokenize([captions[0] for captions in batch.captions]))
            cosines = (encoder.images(batch.images) * text).sum(dim=1).double()
            found.append(torch.stack([torch.tensor(batch.ids, dtype=torch.float64), cosines], dim=1))

        with encoder.frozen():
            skipped, examples = over_batches(self.data.batches(encoder.image_size, self.settings), use).over_ranks()
        rows = by_id(torch.cat(found))
        return Cosines(self.item.name, rows[:, 0].astype(int), rows[:, 1], skipped=skipped, examples=examples)

    @classmethod
    def rows(cls, record: Any) -> list[ScoreRow]:
        return [ScoreRow("", {"mean_cosine": record["mean_cosine"]}, {"lowest": record["lowest"]}, digits=3)]


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVALUATION_TASKS.table, "mean_cosine", f"{__name__}:MeanCosine")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build(SPEC, seed=0)


def expected(model: torch.nn.Module) -> np.ndarray:
    """The cosines, one image at a time."""
    tokenize = SimpleTokenizer(context_length=SPEC.context_length)
    cosines = []
    for i in range(IMAGES):
        pixels = torch.from_numpy(evaluation_pixels(picture(i, 40, 36), SPEC.image_size).copy())[None]
        with torch.no_grad():
            image = model.encode_image(to_input(pixels, OPENAI_MEAN, OPENAI_STD))
            text = model.encode_text(tokenize(texts(i, 3)[:1]))
        cosines.append(float(functional.cosine_similarity(image, text)))
    return np.array(cosines)


@pytest.mark.usefixtures("_registered")
def test_a_recipe_names_it_a_run_scores_it_and_the_report_shows_it(tmp_path: Path, model: torch.nn.Module) -> None:
    make_shards(tmp_path / "pairs", n=IMAGES)
    item = {"name": "pairs", "task": "mean_cosine", "data": ["pairs/*.tar"], "role": "select"}
    values = {**runs.RECIPE, "engine": {"workers": 0}, "evaluation": {"sets": [item], "batch": 4}}
    recipe = parse_recipe(values)
    assert "`mean_cosine`" in reference()

    scorer = Scorer(recipe, tmp_path)
    folder = tmp_path / "run" / "jobs" / "1-vit_nano" / "scores"
    scores = scorer.at_the_end(model, folder)
    cosines = expected(model)
    assert scores["pairs"]["mean_cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert scores["pairs"] == read_json(folder / "pairs.json")
    assert scores["pairs"]["pins"].keys() == {"data", "caption"}
    assert np.allclose(load_arrays(folder / "pairs.npz")["cosines"], cosines, atol=1e-6)
    assert scorer.during_training(model) == {"pairs/mean_cosine": scores["pairs"]["mean_cosine"]}

    runs.make_run(tmp_path / "run", use=runs.recipe(), baselines=False)
    manifest = tmp_path / "run" / "jobs" / "1-vit_nano" / "manifest.json"
    record = read_json(manifest)
    write_json(manifest, {**record, "scores": {**record["scores"], **scores}})
    write_report(tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Cosine of pairs" in report
    assert "Between -1 and 1." in report
    assert f"{cosines.mean():.3f}" in report


def test_a_report_shows_the_scores_of_a_task_that_it_does_not_know(tmp_path: Path) -> None:
    runs.make_run(tmp_path, baselines=False)
    manifest = tmp_path / "jobs" / "1-vit_nano" / "manifest.json"
    record = read_json(manifest)
    score = {"name": "pairs", "task": "mean_cosine", "n": 9, "mean_cosine": 12.25, "skipped": {}, "pins": {}}
    write_json(manifest, {**record, "scores": {**record["scores"], "pairs": score}})
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "Further scores" in report
    assert "12.2" in report


@pytest.mark.usefixtures("_registered")
def test_the_command_scores_a_model(tmp_path: Path, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "pairs", n=IMAGES)
    write_artefact(tmp_path / "model", export_state(model), SPEC, {})
    monkeypatch.chdir(tmp_path)
    command = ["eval", "model", "--data", "pairs/*.tar", "--task", "mean_cosine", "--device", "cpu"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    mean, lowest = expected(model).mean(), expected(model).min()
    for text in ("mean_cosine", f"{mean:.4f}", "lowest", f"{lowest:.2f}", "Between -1 and 1."):
        assert text in shown.output
    record = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert record["mean_cosine"] == pytest.approx(mean, abs=1e-6)


def test_a_name_that_no_table_has_is_refused() -> None:
    values = {**runs.RECIPE, "evaluation": {"sets": [{"name": "x", "task": "zeroshots", "data": "a"}]}}
    known = "should be 'zeroshot', 'multilabel', 'retrieval', 'linear_probe' or 'knn'"
    with pytest.raises(ConfigError, match=rf"task = 'zeroshots': {known} \(did you mean"):
        parse_recipe(values)
    shown = CliRunner().invoke(app, ["eval", "model", "--data", "d", "--task", "retrieve"])
    assert shown.exit_code == 2
    assert f"'--task': {known}" in shown.output
