"""Linear probe and nearest neighbours against scikit-learn, and as tasks of an evaluation set."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from compt.errors import ConfigError, DataError
from compt.evaluate import probe
from compt.evaluate.probe import NEIGHBOURS, TEMPERATURE, Features, choose_penalty, fit_probe, vote
from compt.evaluate.sets import evaluate_set
from compt.evaluate.suite import score_suite
from compt.evaluate.task import EvalSettings
from compt.models.clip import build
from compt.models.preprocess import Preprocess
from compt.recipe.schema import EvalSet
from compt.recipe.suite import Suite, load_suite
from compt.report.scores import SuiteReport
from compt.weights.artefact import write_artefact
from compt.weights.open import open_model
from tests.helpers.optional import optional
from tests.helpers.shards import sample, write_tar
from tests.unit.evaluate.test_sets import SPEC


def clusters(n: int, classes: int, noise: float, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    features = F.normalize(centres[labels] + noise * torch.randn(n, 8, generator=generator), dim=1)
    return Features(features, labels, torch.arange(n), {}, [])


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_probe_is_scikit_learns_logistic_regression(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHUNK", 32)
    optional("sklearn", "interop")
    from sklearn.linear_model import LogisticRegression

    data = clusters(90, 4, 1.0)
    theirs = LogisticRegression(C=1 / (penalty * 90), tol=1e-10, max_iter=10_000)
    theirs.fit(data.features.double().numpy(), data.labels.numpy())
    ours = fit_probe(data.features, data.labels, 4, penalty)
    assert np.allclose(ours[:-1].T.numpy(), theirs.coef_, atol=1e-4)
    biases = ours[-1].numpy()
    assert np.allclose(biases - biases.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)
    again = fit_probe(data.features, data.labels, 4, penalty, start=ours + 0.3)
    assert torch.allclose(again[:-1], ours[:-1], atol=1e-4)


def test_neighbours_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHUNK", 13)
    optional("sklearn", "interop")
    from sklearn.neighbors import KNeighborsClassifier

    train, queries = clusters(90, 4, 1.5), clusters(40, 4, 1.5, seed=1).features
    theirs = KNeighborsClassifier(
        NEIGHBOURS, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
    ).fit(train.features.numpy(), train.labels.numpy())
    scores = vote(queries, train, 4, chunk=7)
    shares = scores / scores.sum(dim=1, keepdim=True)
    assert np.allclose(shares.numpy(), theirs.predict_proba(queries.numpy()), atol=1e-5)
    few = Features(train.features[:3], train.labels[:3], train.ids[:3], {}, [])
    assert vote(queries, few, 4).count_nonzero(dim=1).tolist() == [3] * 40


def test_the_penalty_follows_the_noise() -> None:
    quiet, loud = (choose_penalty(clusters(200, 4, noise), 4) * 160 for noise in (0.1, 3.0))
    assert 1e-6 <= loud <= 1e6
    assert quiet > 1  # all held-out samples are right with any weak or strong fit: the strongest of these
    # The best of a fine grid, by the same measure, is no better than what the search found.
    data = clusters(200, 4, 1.5)
    held = torch.arange(200) % 5 == 4

    def accuracy(penalty: float) -> float:
        weights = fit_probe(data.features[~held], data.labels[~held], 4, penalty)
        scores = data.features[held].double() @ weights[:-1] + weights[-1]
        return float((scores.argmax(1) == data.labels[held]).double().mean())

    found = accuracy(choose_penalty(data, 4))
    assert found >= max(accuracy(10.0**exponent / 160) for exponent in range(-6, 7, 2)) - 1e-9


def test_the_penalty_of_classes_that_take_turns() -> None:
    """Every fifth sample would be of two classes of ten, which the fit would then never see."""
    data = clusters(200, 10, 0.3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    mixed = Features(data.features[order], data.labels[order], data.ids, {}, [])
    for one in (data, mixed):
        weights = fit_probe(one.features, one.labels, 10, choose_penalty(one, 10))
        right = (one.features.double() @ weights[:-1] + weights[-1]).argmax(1) == one.labels
        assert right.double().mean() > 0.95


@pytest.mark.parametrize("task", ["linear_probe", "knn"])
def test_a_set_with_a_training_split(tmp_path: Path, task: str) -> None:
    # One image a class: a probe that mixed up samples or labels would not find them all.
    for split, n in (("test", 12), ("train", 48)):
        members = [each for at in range(n) for each in sample(f"{at:03d}", at % 3, label=at % 3)]
        write_tar(tmp_path / split / "0.tar", members)
    model, settings = build(SPEC, seed=0), EvalSettings(Preprocess((0.5,) * 3, (0.25,) * 3), tmp_path, 5)
    state = model.state_dict()
    state["visual.conv1.weight"] *= 60  # features of a new model hardly differ
    item = EvalSet(name="things", task=task, data=["test/*.tar"], train=["train/*.tar"])
    result = evaluate_set(model, item, settings)
    assert (result.classes, result.n, result.to_dict()["train_images"]) == (3, 12, 48)
    assert result.labels.tolist() == [at % 3 for at in range(12)]
    assert result.top1 == 100
    assert set(result.pins) == {"data", "train", "label"}
    assert evaluate_set(model, item, settings).pins == result.pins
    with pytest.raises(DataError, match=f"set 'things': the task {task} needs labelled shards: name `train`"):
        evaluate_set(model, item.model_copy(update={"train": None}), settings)
    (tmp_path / "classnames.txt").write_text("a\nb\nc\nd\n")
    assert evaluate_set(model, item, settings).classes == 4
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="have no usable label for the 2 classes of the class names"):
        evaluate_set(model, item, settings)
    (tmp_path / "classnames.txt").unlink()
    write_tar(tmp_path / "test" / "0.tar", sample("a", 0, label=9))
    with pytest.raises(DataError, match="label 9 occurs, but the labels of `train` end at 2"):
        evaluate_set(model, item, settings)


def test_sets_without_a_training_split_are_not_missing(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "sets: [{name: whole, data: a/test/*.tar}, {name: gone, data: b/test/*.tar}, "
        "{name: v2, data: a/test/*.tar, train: []}]"
    )
    for split in ("test", "train"):
        members = [each for at in range(12) for each in sample(f"{at:03d}", at % 3, label=at % 3)]
        write_tar(tmp_path / "a" / split / "0.tar", members)
    suite = load_suite(tmp_path / "s.yaml").with_task("knn")
    settings = EvalSettings(Preprocess((0.5,) * 3, (0.25,) * 3), tmp_path, 5)
    write_artefact(tmp_path / "model", build(SPEC, seed=0).state_dict(), SPEC, {})
    scores = score_suite({"m": lambda: open_model(tmp_path / "model")}, suite, settings, torch.device("cpu"))
    assert set(scores["m"]) == {"whole-knn"}
    report = SuiteReport("s", suite, tmp_path, scores)
    assert [line.split(",")[4] for line in report.csv().splitlines()[1:]][-2:] == ["missing", "no training split"]
    (table,) = report.tables()
    assert [row[1] for row in table.rows][1:3] == ["missing", "-"]
    assert report.average_label == "Average of 1 of 2"
    assert "Without a training split: v2." in table.notes
    assert any("1 of 2 sets (gone)" in note for note in table.notes)


def test_a_suite_with_another_task() -> None:
    suite = load_suite("vtab+").with_task("linear_probe")
    assert len(suite.sets) == 35
    assert {item.task for item in suite.sets} == {"linear_probe"}
    assert suite.sets[0].train == ["wds_imagenet1k/train/*.tar"]
    assert not suite.published
    named = {"name": "x", "data": ["a/*.tar"], "train": ["b/*.tar"]}
    suite_of_one = Suite.model_validate({"sets": [named]}).with_task("linear_probe")
    assert suite_of_one.sets[0].train == ["b/*.tar"], "a zero-shot set may name its training split"
    assert [item.title for item in suite.sets if item.train == []] == [
        *("ImageNet-v2", "ImageNet-R", "ImageNet Sketch", "ObjectNet", "ImageNet-A")
    ]
    with pytest.raises(ConfigError, match="no set of the suite has a training split"):
        load_suite("retrieval").with_task("knn")


def test_a_penalty_is_one_of_the_sweep_for_all_training_samples() -> None:
    """Where most samples choose it, all of them train with it: their sum of losses is larger."""
    quarters = 4 * math.log10(choose_penalty(clusters(40, 2, 1.0), 2) * 40)
    assert quarters == pytest.approx(round(quarters), abs=1e-6)
