"""The Python API: lazy names, what the functions compute, the page, and the examples on it."""

from __future__ import annotations

import pkgutil
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import compt
from compt.api.reference import reference
from compt.errors import ConfigError
from compt.models.clip import build
from compt.models.growth import ExpandConfig
from compt.models.presets import PRESETS
from compt.train.losses import ifd_loss
from compt.weights.artefact import write_artefact
from tests.helpers.recipe import FIRST, SECOND, chain, equal, make_data, recipe_of, recipe_values, weights

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link's folder with a model of 32 pixels."""
    model = compt.create_model("vit_nano", seed=5)
    folder = tmp_path_factory.mktemp("link")
    write_artefact(folder / "model", model.state_dict(), model.spec, {})
    return folder


# --- the names


def test_importing_compt_loads_nothing() -> None:
    code = (
        "import sys, compt; assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'pydantic')]\n"
        "assert 'compt.api' not in sys.modules and 'Chain' in dir(compt)\n"
        "compt.plan_chain('cc3m_vit'); compt.list_models(); compt.Recipe; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_name_is_that_of_a_module() -> None:
    modules = {found.name for found in pkgutil.iter_modules(compt.__path__)}
    assert "expand" in modules
    assert modules & set(compt.__all__) == set()
    promised = "list_models create_model load_model expand_model plan_chain Chain evaluate_model contrastive_loss"
    assert {*promised.split(), "feature_distillation", "Recipe"} <= set(compt.__all__)
    with pytest.raises(AttributeError, match="module 'compt' has no attribute 'train_model'"):
        compt.train_model  # noqa: B018


def test_the_page_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == reference(EXAMPLES), "run: python -m compt.api.reference docs/api.md"
    for name in compt.__all__:
        assert getattr(compt, name).__doc__
        assert f"### {name}\n" in page


# --- models


def test_a_created_model_is_that_of_its_seed() -> None:
    made = compt.create_model("vit_nano", seed=3, width=96)
    assert (made.spec.width, made.spec.heads) == (96, 3)
    same = build(compt.create_model("vit_nano", width=96).spec, seed=3)
    assert equal(made.state_dict(), same.state_dict())
    assert compt.list_models() == list(PRESETS)
    with pytest.raises(ConfigError, match=r"unknown model 'vit_nan' \(did you mean 'vit_nano'"):
        compt.create_model("vit_nan")


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_loaded_model_comes_with_what_its_inputs_need(nano: Path, inside: str) -> None:
    model, preprocess, tokenizer = compt.load_model(nano / inside)
    assert not model.training
    assert equal(model.state_dict(), compt.create_model("vit_nano", seed=5).state_dict())
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    transform = open_clip.image_transform(model.spec.image_size, is_train=False)
    assert torch.equal(preprocess(Image.fromarray(noise)), transform(Image.fromarray(noise)))
    texts = ["a cat", "two dogs on a beach, at night"]
    length = model.spec.context_length
    assert torch.equal(tokenizer(texts), open_clip.SimpleTokenizer(context_length=length)(texts))
    assert model.encode_text(tokenizer(texts)).shape == (2, model.spec.embed_dim)
    assert model.encode_image(preprocess(Image.fromarray(noise))[None]).shape == (1, model.spec.embed_dim)


def test_a_model_and_its_folder_expand_alike(nano: Path) -> None:
    """As `compt expand` does it, from a module or from its folder, by default and with another operator."""
    from typer.testing import CliRunner

    from compt.cli.main import app

    loaded = compt.load_model(nano).model
    for operator in ("insert", "net2net"):
        out = nano / operator
        words = ["expand", str(nano / "model"), "vit_micro", str(out), "--both", f"width={operator}", "--seed", "7"]
        assert CliRunner().invoke(app, words).exit_code == 0
        wanted = compt.load_model(out).model.state_dict()
        for teacher in (loaded, str(nano)):
            assert equal(compt.expand_model(teacher, "vit_micro", operator=operator, seed=7).state_dict(), wanted)
    config = ExpandConfig.both("net2net", noise=0)
    assert not equal(compt.expand_model(loaded, "vit_micro", config=config, seed=7).state_dict(), wanted)
    whole = compt.expand_model(compt.load_model(nano), "vit_micro", operator=operator, seed=7)
    assert equal(whole.state_dict(), wanted)
    with pytest.raises(ConfigError, match="vit_pico"):
        compt.expand_model(loaded, "vit_pico")


# --- losses


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_the_contrastive_loss_is_open_clip_s() -> None:
    image, text = features(6, 8).requires_grad_(), features(6, 9)[:, :8]
    unit = torch.nn.functional.normalize
    scale = torch.tensor(12.0, dtype=torch.float64)
    wanted = open_clip.ClipLoss()(unit(image, dim=-1), unit(text, dim=-1), scale)
    found = compt.contrastive_loss(image, text, scale)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, image)[0] for loss in (found, wanted)))
    several = torch.stack([text, text.flip(0)], 1)
    both = [compt.contrastive_loss(image, several[:, slot], scale) for slot in range(2)]
    torch.testing.assert_close(compt.contrastive_loss(image, several, scale), sum(both) / 2)
    with pytest.raises(ValueError, match=r"expected image \[b, D\] and text \[b, M, D\]"):
        compt.contrastive_loss(image, text[:3], scale)


def test_the_scale_of_the_contrastive_loss_may_be_a_plain_number() -> None:
    image, text = features(6, 8).float(), features(6, 9)[:, :8].float()
    found = compt.contrastive_loss(image, text, 1 / 0.07)
    torch.testing.assert_close(found, compt.contrastive_loss(image, text, torch.tensor([1 / 0.07])))
    assert found.dtype == torch.float32


def test_feature_distillation_is_what_the_trainer_adds() -> None:
    image, text, of_image, of_text = features(6, 8), features(6, 2, 8), features(6, 8) + 1, features(6, 2, 8) - 1
    wanted = ifd_loss(of_image, of_text, image, text, alpha=300.0).total
    found = [compt.feature_distillation(*pair, alpha=300.0) for pair in ((image, of_image), (text, of_text))]
    torch.testing.assert_close(sum(found) / 2, wanted)
    assert found[0] > 0
    with pytest.raises(ValueError, match=r"student \[6, 8\] and teacher \[6, 2, 8\]"):
        compt.feature_distillation(image, of_text)


# --- chains and scores


def test_a_chain_runs_and_its_models_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_data(tmp_path))
    values = recipe_values("evaluation.every=")
    assert [job.name for job in compt.plan_chain(values).links] == [FIRST, SECOND]
    said: list[str] = []
    summary = compt.Chain(values).run("run", say=said.append)
    assert said
    chain(tmp_path, tmp_path / "other", "evaluation.every=")
    assert equal(weights(tmp_path / "run", SECOND), weights(tmp_path / "other", SECOND))
    last = summary.links[-1]
    assert (last.job, last.state, last.images) == (SECOND, "done", 20)
    scored = compt.evaluate_model(f"run/jobs/{SECOND}", "eval/*.tar")["eval"]
    assert scored.headline()["top1"] == last.top1
    assert tuple(scored.to_dict()["top1_interval"]) == (last.low, last.high)
    with pytest.raises((RuntimeError, AssertionError), match="(?i)cuda|nvidia"):
        compt.evaluate_model(f"run/jobs/{SECOND}", "eval/*.tar", device="cuda:99")
    with pytest.raises(ConfigError, match="`device` is for a model that is opened"):
        compt.evaluate_model(compt.create_model("vit_nano"), "eval/*.tar", device="cpu")
    # A second call trains nothing, and open_clip's own module gets the same score.
    said.clear()
    assert compt.Chain(recipe_of("evaluation.every=")).run("run", say=said.append) == summary
    assert said == []
    with pytest.raises(ConfigError, match="two sets have the name 'eval'"):
        compt.evaluate_model(f"run/jobs/{SECOND}", ["eval/*.tar", "eval/*.tar"])


def test_a_set_may_be_a_path_and_a_model_what_was_loaded(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_data(tmp_path))
    loaded = compt.load_model(nano)
    wanted = compt.evaluate_model(loaded.model, "eval/*.tar")["eval"].to_dict()
    assert compt.evaluate_model(loaded, Path("eval/*.tar"))["eval"].to_dict() == wanted
    assert compt.evaluate_model(loaded, [Path("eval/*.tar")])["eval"].to_dict() == wanted


def test_a_mistake_in_a_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"evaluate_model: .*dat.*: unknown key \(did you mean 'data'"):
        compt.evaluate_model(compt.create_model("vit_nano"), {"name": "x", "dat": "eval/*.tar"})


def test_a_chain_runs_in_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_data(tmp_path))
    values = recipe_values("evaluation={}", "chain.links.1=", "chain.links.0.train.steps=2")
    with ThreadPoolExecutor() as threads:
        summary = threads.submit(compt.Chain(values).run, "run").result()
    assert [(row.job, row.state) for row in summary.links] == [(FIRST, "done")]


def test_overrides_are_for_files_and_names(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_values()))
    assert compt.plan_chain(path, overrides=["chain.links.1.train.steps=9"]).links[1].steps == 9
    assert len(compt.plan_chain(path, baselines=True).jobs) > 2
    with pytest.raises(ConfigError, match="overrides: change a recipe of a file"):
        compt.plan_chain(recipe_of(), overrides=["seed=3"])


# --- the examples


def test_both_methods_work_in_a_loop_of_one_s_own(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train: Any = runpy.run_path(str(EXAMPLES / "own_loop.py"))["train"]
    spec = PRESETS["vit_nano"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, spec.image_size, spec.image_size, generator=generator)
    tokens = torch.randint(1, 99, (4, spec.context_length), generator=generator)
    tokens[:, -1] = spec.vocab_size - 1
    student = train(nano, [(images, tokens)] * 12)
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert losses[-1] < losses[0] - 0.1
    grown = compt.expand_model(nano, "vit_micro", operator="net2net")
    assert not equal(student.state_dict(), grown.state_dict())


@pytest.mark.slow
def test_the_whole_path_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The example with two steps a model instead of 54, and a ninth of the images to score."""
    from compt.drawings.emoji import build as build_emoji

    text = (EXAMPLES / "whole_path.py").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= 30
    monkeypatch.chdir(tmp_path)
    build_emoji(Path("data/emoji"))
    for name in ("val_style", "test_style"):
        shutil.rmtree(tmp_path / "data" / "emoji" / name)
        shutil.copytree(tmp_path / "data" / "emoji" / "test_concepts", tmp_path / "data" / "emoji" / name)
    exec(compile(text.replace('("train", 54), ("warmup", 5)', '("train", 2), ("warmup", 1)'), "example", "exec"), {})
    out = capsys.readouterr().out
    assert "3-vit_mini: 2 steps" in out
    assert "of 184 images, 95 % interval" in out
    assert "vit_midi, expanded pairs {" in out
