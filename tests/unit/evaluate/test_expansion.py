"""What `evaluate.expansion` says: its numbers against independent ones, and broken promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import compt.evaluate.expansion
from compt.data.index import open_index
from compt.data.loaders import fixed_caption_batches
from compt.errors import ArtefactError
from compt.evaluate.expansion import COMPARED_EXACTLY, TOLERANCE, Difference, check_kept, verify
from compt.evaluate.sets import evaluate_set
from compt.evaluate.task import EvalSettings
from compt.expand.execute import expand
from compt.expand.plan import ExpansionPlan, make_plan
from compt.models.clip import build
from compt.models.growth import ExpandConfig
from compt.models.pixels import to_input
from compt.models.preprocess import AS_OPENAI
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, resolve
from compt.recipe.schema import EvalSet
from compt.weights.artefact import Artefact, read_artefact, write_artefact
from tests.helpers.shards import WORDS, make_shards, picture
from tests.helpers.states import export_state

CLASSES, IMAGES, BATCH = 7, 28, 8

# The smallest model with CLIP's vocabulary. With no_ln_pre, every operator that can be exact is exact.
SIZES = {"width": 16, "text_width": 16, "head_width": 8, "text_head_width": 8, "depth": 2, "text_depth": 1}
SMALL = resolve("vit_pico", {**SIZES, "embed_dim": 24, "context_length": 16, "no_ln_pre": True})
WIDE = resolve("vit_pico", {**SIZES, "width": 32, "text_width": 32, "embed_dim": 24, "context_length": 16})
DOUBLE = replace(WIDE, no_ln_pre=True)
LONGER = replace(DOUBLE, embed_dim=36)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder, n=IMAGES, shards=2, captions=2, classes=CLASSES)
    (folder / "classnames.txt").write_text("\n".join(WORDS[:CLASSES]))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """A model whose every parameter is far from its initialization."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    draw = torch.Generator().manual_seed(5)
    state = export_state(build(SMALL, seed=1))
    state = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}
    write_artefact(folder, state, SMALL, {})
    return read_artefact(folder)


def item(data: Path, files: str = "*.tar", **other: Any) -> EvalSet:
    return EvalSet(**{"name": "tiny", "task": "zeroshot", "data": [str(data / files)], **other})


SETTINGS = EvalSettings(AS_OPENAI, batch=BATCH)


def check(teacher: Artefact, data: Path, plan: ExpansionPlan, **other: Any) -> compt.evaluate.expansion.Verification:
    return verify(teacher, plan, 3, item(data), SETTINGS, **other)


def test_an_exact_operator_keeps_everything(teacher: Artefact, data: Path) -> None:
    plan = make_plan(SMALL, DOUBLE, ExpandConfig.both("net2net", zero_new_outputs=True))
    found = check(teacher, data, plan)
    assert found.broken() == []
    check_kept(found, "student")
    for tower in ("image", "text"):
        part = found.differences[tower]
        assert part.reasons == ()
        assert part.kept
        assert part.float64 is not None
        assert 0 < part.float64 < TOLERANCE
        assert part.float64 < part.float32 < 1e-4
    assert found.dot_products is not None
    assert found.dot_products < TOLERANCE
    assert found.scores["student"].loss == pytest.approx(found.scores["teacher"].loss, abs=1e-4)
    assert found.scores["student"].top1 == found.scores["teacher"].top1
    assert abs(found.scores["random"].loss - found.scores["teacher"].loss) > 1e-2
    assert (found.samples, found.classes, found.batch, found.captions) == (IMAGES, CLASSES, BATCH, "of the data")


def test_the_scores_are_those_of_the_three_models(teacher: Artefact, data: Path) -> None:
    plan = make_plan(SMALL, DOUBLE)
    found = check(teacher, data, plan)
    assert all(part.reasons and part.float64 is None for part in found.differences.values())
    check_kept(found, "student")  # nothing was promised
    student = build(DOUBLE)
    student.load_state_dict({k: v.reshape(student.state_dict()[k].shape) for k, v in expanded(plan, teacher).items()})
    for name, model in (("teacher", teacher.load_model()), ("student", student), ("random", build(DOUBLE, seed=3))):
        result = evaluate_set(model, item(data), SETTINGS)
        assert found.scores[name].top1 == result.top1
        assert found.scores[name].loss == pytest.approx(loss_of(model, data), rel=1e-5)


def expanded(plan: ExpansionPlan, teacher: Artefact) -> dict[str, torch.Tensor]:
    return dict(expand(plan, teacher.state, 3))


def loss_of(model: torch.nn.Module, data: Path) -> float:
    """The contrastive loss, from its definition; whole batches alone."""
    index = open_index([str(data / "*.tar")], Path())
    total = []
    with torch.no_grad():
        for batch in fixed_caption_batches(index, batch=BATCH, image_size=32, captions=1, context_length=16):
            image = functional.normalize(model.encode_image(to_input(batch.images, OPENAI_MEAN, OPENAI_STD)), dim=-1)
            text = functional.normalize(model.encode_text(batch.tokens[:, 0]), dim=-1)
            logits = model.logit_scale.exp() * image @ text.T
            right = torch.arange(len(logits))
            total.append((functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2)
    assert len(total) == IMAGES // BATCH
    return float(torch.stack(total).mean())


def test_a_longer_embedding_is_compared_by_dot_products(teacher: Artefact, data: Path) -> None:
    """Each of the towers alone, and both together, which may not fit though each is exact."""
    found = check(teacher, data, make_plan(SMALL, LONGER, ExpandConfig.both("net2net")))
    assert found.broken() == []
    assert found.dot_products is not None
    assert found.dot_products < TOLERANCE
    assert all(part.float32 < 1e-4 for part in found.differences.values())
    apart = replace(found, dot_products=0.5)
    assert apart.broken() == ["dot products of images with texts differ by 5.0e-01, both towers are exact"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_broken_promise_is_an_error_that_names_the_tower(teacher: Artefact, data: Path, tower: str) -> None:
    honest = make_plan(SMALL, DOUBLE, ExpandConfig.both("insert"))
    lying = replace(honest)
    vars(lying)["inexact"] = {**honest.inexact, tower: ()}
    found = check(teacher, data, lying)
    assert not found.differences[tower].kept
    with pytest.raises(ArtefactError, match=rf"student: .*promise: {tower} tower: its features differ by") as caught:
        check_kept(found, "student")
    other = {"image": "text", "text": "image"}[tower]
    assert f"{other} tower" not in str(caught.value)
    assert found.to_dict()["kept"] is False


@pytest.mark.parametrize(("tower", "name"), [("image", "visual.proj"), ("text", "text_projection")])
def test_one_weight_that_is_hardly_wrong_breaks_a_promise(
    teacher: Artefact, data: Path, monkeypatch: pytest.MonkeyPatch, tower: str, name: str
) -> None:
    def wrong(*given: Any) -> dict[str, torch.Tensor]:
        state = dict(expand(*given))
        state[name][0, 0] += 1e-8
        return state

    monkeypatch.setattr(compt.evaluate.expansion, "expand", wrong)
    found = check(teacher, data, make_plan(SMALL, DOUBLE, ExpandConfig.both("net2net")))
    part = found.differences[tower]
    assert part.float64 is not None
    assert 1e-10 < part.float64 < 5e-9
    assert not part.kept
    (broken,) = found.broken()
    assert broken.startswith(f"{tower} tower: its features differ by")
    assert broken.endswith("the plan promises less than 1e-10")


def test_longer_features_are_compared_by_their_dot_products() -> None:
    before = torch.eye(4, dtype=torch.float64)
    turned = torch.cat([torch.zeros_like(before), before.flip(1)], dim=1)
    assert compt.evaluate.expansion._moved(before, turned) == 0
    assert compt.evaluate.expansion._moved(before, 2 * turned) == 3
    assert compt.evaluate.expansion._moved(before, before.flip(1)) == 1


def test_a_nan_breaks_a_promise() -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, float("nan"), 0.0], [0.0, 0.0, 0.0]])
    assert compt.evaluate.expansion._moved(good, bad) == float("inf")
    assert not Difference(1.0, float("inf"), ()).kept
    assert not Difference(1.0, None, ()).kept
    assert Difference(1.0, None, ("a reason",)).kept


def test_the_model_that_was_written_is_the_one_that_is_scored(teacher: Artefact, data: Path, tmp_path: Path) -> None:
    plan = make_plan(SMALL, DOUBLE, ExpandConfig.both("net2net"))
    write_artefact(tmp_path / "other", export_state(build(DOUBLE, seed=9)), DOUBLE, {})
    found = check(teacher, data, plan, student=read_artefact(tmp_path / "other"))
    assert found.scores["student"] != found.scores["teacher"]
    assert found.differences["image"].float32 > 1e-2


def test_data_without_captions_are_scored_with_class_names(teacher: Artefact, tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for seed in range(6):
            (tmp_path / name / f"{seed}.png").write_bytes(picture(10 * label + seed, 36, 36))
    plan = make_plan(SMALL, DOUBLE, ExpandConfig.both("net2net"))
    found = verify(teacher, plan, 3, item(tmp_path, files=""), SETTINGS)
    assert found.broken() == []
    assert (found.samples, found.classes, found.captions) == (12, 2, "class names")
    assert found.scores["student"].top5 is None
    assert found.scores["student"].loss == pytest.approx(found.scores["teacher"].loss, abs=1e-4)


def test_few_pairs_are_compared_in_float64(teacher: Artefact, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = compt.evaluate.expansion._features

    def spy(model: torch.nn.Module, pairs: object, count: int) -> compt.evaluate.expansion.Features:
        found = real(model, pairs, count)
        seen.append((found["image"].dtype, len(found["image"]), len(found["text"])))
        return found

    monkeypatch.setattr(compt.evaluate.expansion, "_features", spy)
    check(teacher, data, make_plan(SMALL, DOUBLE, ExpandConfig.both("net2net")))
    assert seen == [(torch.float32, 24, 24)] * 3 + [(torch.float64, COMPARED_EXACTLY, COMPARED_EXACTLY)] * 2
