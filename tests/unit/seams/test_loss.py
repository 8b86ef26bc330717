"""One class and two table entries add a loss, and a chain trains with it; the sigmoid loss goes the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compt.cost.counts import parameters
from compt.engines.ddp import DataParallelEngine
from compt.errors import ConfigError
from compt.expand.execute import Draw
from compt.expand.plan import make_plan as make_expansion
from compt.export.write import export_model
from compt.models.clip import build
from compt.models.open_clip_config import spec_from_open_clip
from compt.models.presets import PRESETS, ModelSpec
from compt.models.scalars import LOSS_TRAITS, LossTraits, Scalar
from compt.plan.jobs import make_plan
from compt.recipe.optimizer import Optimizer
from compt.train.accumulate import cached_backward
from compt.train.losses import LOSSES, Loss, SiglipLoss, Terms
from compt.train.task import ClipTask, DistillTask
from compt.weights.artefact import read_artefact, write_artefact
from compt.weights.open import open_model
from tests.helpers.recipe import FIRST, SECOND, chain, lines, make_data, manifest, recipe_of, weights
from tests.helpers.states import expand_state, export_state
from tests.unit.train.test_task import batch, tiny

SHORT = ("chain.links.0.train.steps=3", "chain.links.0.warmup.steps=1", "chain.links.1.train.steps=3", "evaluation=")
HASHES = ["3e75c2f844b0", "4d0363d41f6f"]


class MarginLoss(Loss):
    """Each image is to be closer to its own captions than to the mean of all captions."""

    name = "margin"

    @classmethod
    def of(cls, optimizer: Optimizer, chunk: int | None) -> MarginLoss:
        return cls()

    def __call__(self, outputs: Mapping[str, Tensor], *, gather: bool = True) -> tuple[Tensor, Terms]:
        image, text = (functional.normalize(outputs[tower].float(), dim=-1) for tower in ("image", "text"))
        own, mean = torch.einsum("nd,nmd->nm", image, text), image @ text.flatten(0, 1).mean(0)
        value = functional.softplus(outputs["logit_scale"] * (mean[:, None] - own)).mean()
        return value, {"task": value, "own": own.mean()}


@pytest.fixture
def margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "margin", MarginLoss)
    monkeypatch.setitem(LOSS_TRAITS, "margin", LossTraits((Scalar("logit_scale", math.log(5), cap=1.625, log=True),)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), images=24)


@pytest.mark.usefixtures("margin")
def test_a_loss_from_outside_trains_a_chain(base: Path, tmp_path: Path) -> None:
    chain(base, tmp_path / "run", "optimizer.loss=margin", "data.images=24", *SHORT)
    first, second = (lines(tmp_path / "run", job) for job in (FIRST, SECOND))
    assert {"task", "own"} <= first[0].keys()
    assert not {"t2v", "logit_scale"} & first[0].keys()
    assert first[-1]["task"] < first[0]["task"] <= math.log(2) + 0.5
    assert second[-1]["r"] == pytest.approx(second[-1]["ifd"] / second[-1]["task"])
    for job in (FIRST, SECOND):
        assert read_artefact(tmp_path / "run" / "jobs" / job / "model").spec.loss == "margin"
        assert math.log(5) != weights(tmp_path / "run", job)["logit_scale"].item() <= 1.625


@pytest.mark.usefixtures("margin")
def test_a_loss_from_outside_has_its_own_start_and_hash() -> None:
    plain, other = (make_plan(recipe_of(*changes)).jobs[0] for changes in ((), ("optimizer.loss=margin",)))
    assert plain.hash != other.hash
    assert build(other.spec, seed=0).logit_scale.item() == pytest.approx(math.log(5))
    with pytest.raises(
        ConfigError, match=r"optimizer.loss = 'margi': should be 'contrastive', 'siglip' or 'margin' \(did"
    ):
        recipe_of("optimizer.loss=margi")


def test_the_default_loss_leaves_hashes_as_they_were() -> None:
    """Values of the commit before losses could be chosen: run folders from then still resume."""
    said = make_plan(recipe_of("optimizer.loss=contrastive")).jobs[0]
    assert said.hash == make_plan(recipe_of()).jobs[0].hash
    assert "loss" not in said.result["optimizer"]
    assert "loss" not in said.result["model"]
    assert [job.hash[:12] for job in make_plan(recipe_of()).jobs] == HASHES


# --- the sigmoid loss


def siglip(spec: ModelSpec) -> ModelSpec:
    return replace(spec, loss="siglip")


def test_a_siglip_model_has_a_bias_and_starts_from_its_own_values() -> None:
    spec = siglip(PRESETS["vit_pico"])
    model = build(spec, seed=0)
    assert (model.logit_scale.item(), model.logit_bias.item()) == (pytest.approx(math.log(10)), -10.0)
    assert parameters(spec) == parameters(PRESETS["vit_pico"]) + 1 == sum(p.numel() for p in model.parameters())
    assert ModelSpec.from_dict(spec.to_dict()) == spec_from_open_clip(spec.open_clip_config(), spec.name) == spec
    assert {"model.logit_scale", "model.logit_bias"} & set(ClipTask(model, SiglipLoss()).caps) == set()
    with pytest.raises(ValueError, match="has the scalars logit_bias, logit_scale; the loss 'contrastive' takes"):
        ClipTask(model)


def test_the_recipe_refuses_candidates_for_a_loss_of_single_pairs() -> None:
    with pytest.raises(ConfigError, match="image_to_text: leave it out; the loss 'siglip' compares no candidates"):
        recipe_of("optimizer.loss=siglip", "optimizer.image_to_text=all")


def test_stock_open_clip_loads_a_siglip_model_and_gives_its_logits(tmp_path: Path) -> None:
    spec = siglip(tiny())
    model = build(spec, seed=0)
    with torch.no_grad():
        model.logit_bias.fill_(-7.25)
    write_artefact(tmp_path / "model", export_state(model), spec, {})
    export_model(read_artefact(tmp_path / "model"), tmp_path / "export")
    images, tokens = batch(4, 1)
    for folder in ("model", "export"):
        stock = open_clip.create_model(f"local-dir:{tmp_path / folder}").eval()
        assert stock.logit_bias.item() == -7.25
        found, _ = stock.get_logits(images, tokens[:, 0])
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens[:, 0], normalize=True)
        torch.testing.assert_close(found, model.logit_scale.exp() * image @ text.T + model.logit_bias)
        assert open_model(tmp_path / folder).spec.loss == "siglip"


def test_a_file_of_weights_says_by_its_scalars_which_loss_they_are_of(tmp_path: Path) -> None:
    for loss in ("contrastive", "siglip"):
        torch.save(export_state(build(replace(tiny(), loss=loss), seed=0)), tmp_path / f"{loss}.pt")
        assert open_model(tmp_path / f"{loss}.pt", tiny()).spec.loss == loss


@pytest.mark.parametrize(("old", "new"), [("contrastive", "siglip"), ("siglip", "contrastive"), ("siglip", "siglip")])
def test_expansion_copies_scalars_and_starts_those_that_the_teacher_lacks(old: str, new: str) -> None:
    teacher, student = replace(tiny(), loss=old), replace(tiny(), loss=new, depth=2)
    plan, state = make_expansion(teacher, student), export_state(build(teacher, seed=1))
    state |= {
        name: torch.tensor(value) for name, value in (("logit_scale", 3.5), ("logit_bias", -4.0)) if name in state
    }
    grown = expand_state(plan, state, Draw(student, 0))
    assert grown["logit_scale"] == 3.5
    assert set(grown) == set(export_state(build(student, seed=0)))
    if new == "siglip":
        assert grown["logit_bias"] == (-4.0 if old == "siglip" else -10.0)
        rule = next(entry.rule for entry in plan.entries if entry.name == "logit_bias")
        assert rule == ("copy" if old == "siglip" else "own: the teacher has none")


def test_a_chain_of_siglip_models(base: Path, tmp_path: Path) -> None:
    chain(base, tmp_path / "run", "optimizer.loss=siglip", "data.images=24", "engine.micro_batch=6", *SHORT)
    first, second = (lines(tmp_path / "run", job)[-1] for job in (FIRST, SECOND))
    for row in (first, second):
        assert row["task"] == pytest.approx(row["positive"] + row["negative"])
    assert second["loss"] == pytest.approx(second["task"] + second["ifd"])
    assert manifest(tmp_path / "run", SECOND)["spec"]["loss"] == "siglip"
    scalars = [weights(tmp_path / "run", SECOND, kind)["logit_bias"].item() for kind in ("initial", "model")]
    assert -10 != scalars[0] == weights(tmp_path / "run", FIRST)["logit_bias"].item() != scalars[1]


@pytest.mark.parametrize("distil", [False, True])
def test_siglip_in_micro_batches_has_the_gradient_of_the_whole_batch(distil: bool) -> None:
    images, tokens = batch(8)
    found = []
    for micro in (8, 2):
        model, teacher, loss = build(siglip(tiny()), seed=0), build(tiny(24), seed=1), SiglipLoss(chunk=3)
        wide = torch.float64
        task = DistillTask(model, teacher, loss, teacher_dtype=wide) if distil else ClipTask(model, loss)
        engine = DataParallelEngine(task.module.to(wide), caps=task.caps)
        value, _ = cached_backward(task, engine, images.to(wide), tokens, micro)
        found.append((value, dict(engine.gradients())))
    (loss, gradients), (other, pieces) = found
    torch.testing.assert_close(other, loss)
    assert gradients["model.logit_bias"].abs() > 0
    for name, value in gradients.items():
        torch.testing.assert_close(pieces[name], value)
