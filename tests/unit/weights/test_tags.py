"""Pretrained tags of open_clip: found in the caches on the disk, never downloaded."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import open_clip.factory
import open_clip.pretrained
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compt.errors import ArtefactError
from compt.models.clip import build
from compt.models.preprocess import Preprocess
from compt.weights.open import open_model
from compt.weights.tags import split_tag
from tests.helpers.states import export_state
from tests.unit.weights.written import SPEC

ARCH = "Tiny-CLIP"
HUB = "somebody/tiny-clip"
OPENAI = "https://openaipublic.example/clip/models/{digest}/tiny.pt"


@pytest.fixture
def state(tmp_path, monkeypatch) -> dict[str, Tensor]:
    """Weights of an architecture that open_clip knows by ARCH; caches in `tmp_path`; no way into the network."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {ARCH: SPEC.open_clip_config()})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def connect(*_: Any) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    return export_state(build(SPEC, seed=5))


def tag(monkeypatch, **config: Any) -> str:
    known = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(known, ARCH, {"one": {"url": "", "hf_hub": "", "mean": (0.1, 0.2, 0.3), **config}})
    return f"{ARCH}:one"


def cached(tmp_path: Path, name: str, state: dict[str, Tensor]) -> Path:
    """As huggingface_hub keeps a file: a link to a blob, below the commit that the branch points to."""
    home = tmp_path / "hub" / f"models--{HUB.replace('/', '--')}"
    for folder in ("refs", "blobs", "snapshots/abc"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text("abc")
    blob = home / "blobs" / name.replace(".", "-")
    if name.endswith(".safetensors"):
        save_file(state, blob)
    else:
        torch.save(state, blob)
    (home / "snapshots" / "abc" / name).symlink_to(blob)
    return blob


def same(found: Any, state: dict[str, Tensor]) -> bool:
    return set(found.state) == set(state) and all(torch.equal(found.state[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_in_the_cache_of_hugging_face(tmp_path, monkeypatch, state, name):
    cached(tmp_path, name, state)
    found = open_model(tag(monkeypatch, hf_hub=f"{HUB}/"))
    assert same(found, state)
    assert found.spec.name == ARCH
    assert found.preprocess.mean == (0.1, 0.2, 0.3)
    assert found.preprocess.resize_mode == "shortest"
    assert not found.spec.quick_gelu


def test_the_registry_says_how_images_are_resized(tmp_path, monkeypatch, state):
    cached(tmp_path, "model.safetensors", state)
    given = {"interpolation": "bilinear", "resize_mode": "squash"}
    found = open_model(tag(monkeypatch, hf_hub=f"{HUB}/model.safetensors", **given))
    assert found.preprocess == Preprocess((0.1, 0.2, 0.3), **given)
    with pytest.raises(ArtefactError, match="^Tiny-CLIP:one: resize_mode = 'crop' is not supported; it must be"):
        open_model(tag(monkeypatch, hf_hub=f"{HUB}/model.safetensors", resize_mode="crop"))


def test_safetensors_come_first(tmp_path, monkeypatch, state):
    cached(tmp_path, "model.bin", {name: value * 2 for name, value in state.items()})
    cached(tmp_path, "model.safetensors", state)
    assert same(open_model(tag(monkeypatch, hf_hub=f"{HUB}/model.bin")), state)


def test_the_activation_of_the_tag_counts(tmp_path, monkeypatch, state):
    cached(tmp_path, "open_clip_model.safetensors", state)
    assert open_model(tag(monkeypatch, hf_hub=f"{HUB}/", quick_gelu=True)).spec.quick_gelu


def test_in_open_clips_own_cache(tmp_path, monkeypatch, state):
    path = tmp_path / "home" / ".cache" / "clip" / "tiny.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = tag(monkeypatch, url=OPENAI.format(digest=digest), hf_hub=f"{HUB}/")
    assert same(open_model(name), state)
    # Callers put the folder of a recipe in front of what it says.
    assert same(open_model(tmp_path / "recipes" / name), state)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ArtefactError, match="its content is not what its address says"):
        open_model(name)


def test_what_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch, state):
    name = tag(monkeypatch, url="https://elsewhere.example/tiny.pt", hf_hub=f"{HUB}/")
    with pytest.raises(ArtefactError) as error:
        open_model(name)
    text = str(error.value)
    assert f"open_clip_model.safetensors of {HUB} in {tmp_path / 'hub'}" in text
    assert f"open_clip_pytorch_model.bin of {HUB}" in text
    assert str(tmp_path / "home" / ".cache" / "clip" / "tiny.pt") in text
    assert f"open_clip.create_model('{ARCH}', pretrained='one')" in text


def test_what_is_no_tag(monkeypatch, state):
    tag(monkeypatch)
    for name, message in (
        (f"{ARCH}:two", "has no tag 'two' of Tiny-CLIP; known: one|did you mean 'one'"),
        ("Tiny-CLAP:one", "no model 'Tiny-CLAP' .did you mean 'Tiny-CLIP'"),
        ("nothing", "no such model"),
        ("a:b:c", "no such model"),
    ):
        with pytest.raises(ArtefactError, match=message):
            open_model(name)


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch, state):
    name = tag(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    save_file(state, Path(name) / "open_clip_model.safetensors")
    (Path(name) / "open_clip_config.json").write_text(json.dumps({"model_cfg": SPEC.open_clip_config()}))
    assert same(open_model(name), state)


def test_splitting():
    assert split_tag("ViT-B-32:laion2b_s34b_b79k") == ("ViT-B-32", "laion2b_s34b_b79k")
    for other in ("ViT-B-32", "a:b:c", ":b", "a:", "a/b:c"):
        assert split_tag(other) is None
