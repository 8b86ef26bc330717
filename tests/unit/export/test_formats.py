"""Exports, loaded by the programs that they are for: their features are compt's, in fp32, to 2e-5 of the largest."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from compt.errors import ArtefactError
from compt.export.formats import FORMATS
from compt.export.write import export_model
from compt.models.clip import ClipModel
from compt.models.preprocess import Preprocess
from compt.models.presets import PRESETS
from compt.weights.open import open_model
from tests.helpers.optional import optional
from tests.unit.export.conftest import SPECS, write_model

CAPTIONS = ["a", "a photo of a red fox", "two dogs, one of them asleep; and " * 9, "Grüße: 日本 🙂 it's 3.5 &c", ""]
TOLERANCE = 2e-5


def assert_same(theirs: Any, ours: Tensor) -> None:
    """The largest difference is at most TOLERANCE of the largest value."""
    theirs = torch.as_tensor(theirs)
    assert theirs.shape == ours.shape
    assert float((theirs - ours).abs().max() / ours.abs().max()) < TOLERANCE


def pixels_for(model: ClipModel, number: int = 3) -> Tensor:
    return torch.randn(number, 3, *[model.spec.image_size] * 2, generator=torch.Generator().manual_seed(number))


def tokens_for(model: ClipModel, captions: Sequence[str] = CAPTIONS) -> Tensor:
    return open_clip.tokenize(list(captions), model.spec.context_length)


def load(folder: Path) -> ClipModel:
    return open_model(folder).load_model().eval()


def images() -> list[Image.Image]:
    """Noise that a camera could have made: smooth, and of several shapes."""
    draw = torch.Generator().manual_seed(5)
    sizes = ((64, 48), (40, 40), (33, 97))
    small = [torch.randint(0, 256, (6, 6, 3), generator=draw, dtype=torch.uint8).numpy() for _ in sizes]
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one, size in zip(small, sizes, strict=True)]


# Hugging Face


@pytest.mark.parametrize("name", ["vit", "quick"])
@torch.no_grad()
def test_transformers_computes_the_same_features(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    transformers = optional("transformers", "dev")
    ours = load(models[name])
    export_model(open_model(models[name]), tmp_path / "hf", "hf")
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    pixels, tokens = pixels_for(ours), tokens_for(ours)
    assert len(set(tokens.argmax(1).tolist())) > 3, "the ends of text should lie at several places"
    output = theirs.eval()(pixel_values=pixels, input_ids=tokens)
    assert_same(output.image_embeds, ours.encode_image(pixels, normalize=True))
    assert_same(output.text_embeds, ours.encode_text(tokens, normalize=True))
    assert_same(output.logits_per_image, ours.get_logits(pixels, tokens)[0])
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf").eval()
    assert_same(tower(pixel_values=pixels).image_embeds, ours.encode_image(pixels))
    # What LLaVA takes from CLIPVisionModel: the patches before the last block.
    llava = transformers.CLIPVisionModel.from_pretrained(tmp_path / "hf").eval()
    hidden = llava(pixel_values=pixels, output_hidden_states=True).hidden_states
    seen: list[Tensor] = []
    ours.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ours.encode_image(pixels)
    assert_same(hidden[-2], seen[0])
    again = open_model(tmp_path / "hf")
    assert replace(again.spec, name=ours.spec.name) == ours.spec
    assert all(torch.equal(again.state[key], value) for key, value in open_model(models[name]).state.items())


def test_the_processor_of_transformers_reads_text_and_images_as_compt_does(
    models: dict[str, Path], tmp_path: Path
) -> None:
    transformers = optional("transformers", "dev")
    found = open_model(models["vit"])
    export_model(found, tmp_path / "hf", "hf")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "hf")
    ours = tokens_for(load(models["vit"]), CAPTIONS[:3] + CAPTIONS[4:])
    theirs = processor(
        text=[*CAPTIONS[:3], CAPTIONS[4]], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    ends = ours.argmax(1)
    assert torch.equal(theirs.argmax(1), ends)
    for one, other, end in zip(ours, theirs, ends, strict=True):
        assert torch.equal(one[: end + 1], other[: end + 1])
    assert processor.tokenizer(CAPTIONS[3]).input_ids == [n for n in tokens_for(load(models["vit"]))[3].tolist() if n]
    expected = torch.stack([_transform(found.preprocess)(image) for image in images()])
    slow = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
    assert (torch.as_tensor(slow(images(), return_tensors="pt").pixel_values) - expected).abs().max() < 1e-5
    # The default class resizes with torch: at most three levels of 255 away, and a hundredth of one on average.
    difference = (processor(images=images(), return_tensors="pt").pixel_values - expected).abs() * 255 * 0.27
    assert difference.max() < 3
    assert difference.mean() < 0.3


def _transform(preprocess: Preprocess) -> Any:
    """open_clip's own transform, which compt's evaluation equals (tests/unit/models/test_preprocess.py)."""
    values = preprocess.to_dict(SPECS["vit"].image_size)
    return open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**values), is_train=False)


def test_what_clipmodel_cannot_be_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    for spec, words in (
        (SPECS["swin"], "its image tower is a Swin, CLIPModel's is a ViT"),
        (replace(SPECS["vit"], no_ln_pre=True), "no_ln_pre"),
        (replace(SPECS["vit"], loss="siglip"), "it has a logit_bias"),
        (replace(SPECS["vit"], vocab_size=600), "its vocabulary has 600 tokens"),
    ):
        source = open_model(write_model(tmp_path / "model", spec))
        with pytest.raises(ArtefactError, match="transformers' CLIPModel cannot be this model") as caught:
            export_model(source, tmp_path / "out", "hf")
        assert words in str(caught.value)
        assert not (tmp_path / "out").exists()
    longest = replace(open_model(models["vit"]), preprocess=Preprocess(resize_mode="longest"))
    with pytest.raises(ArtefactError, match="resize_mode longest"):
        export_model(longest, tmp_path / "out", "hf")


# open_clip


@pytest.mark.parametrize("name", ["vit", "swin"])
@torch.no_grad()
def test_open_clip_loads_the_export_and_the_model_folder_without_a_warning(
    models: dict[str, Path], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = load(models[name])
    export_model(open_model(models[name]), tmp_path / "out")
    pixels, tokens = pixels_for(ours), tokens_for(ours)
    with caplog.at_level(logging.WARNING):
        for folder in (tmp_path / "out", models[name]):
            theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            assert_same(theirs.eval().encode_image(pixels), ours.encode_image(pixels))
            assert_same(theirs.encode_text(tokens), ours.encode_text(tokens))
            assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS), tokens)
    assert caplog.records == []


# The keys of CLIPVisionCfg, CLIPTextCfg and CLIP in open_clip 2.16.0, which refuses all others. SAN pins that version.
OLD_KEYS = {
    "vision_cfg": "layers width head_width mlp_ratio patch_size image_size ls_init_value patch_dropout input_patchnorm "
    "global_average_pool attentional_pool n_queries attn_pooler_heads timm_model_name timm_model_pretrained timm_pool "
    "timm_proj timm_proj_bias timm_drop timm_drop_path output_tokens",
    "text_cfg": "context_length vocab_size width heads layers ls_init_value hf_model_name hf_tokenizer_name "
    "hf_model_pretrained proj pooler_type embed_cls pad_id output_tokens",
    "": "embed_dim vision_cfg text_cfg quick_gelu cast_dtype output_dict",
}


@pytest.mark.parametrize("name", PRESETS)
def test_open_clip_2_16_knows_every_key_of_a_preset(name: str) -> None:
    config = PRESETS[name].open_clip_config()
    for part, keys in OLD_KEYS.items():
        assert (config[part] if part else config).keys() <= set(keys.split())


def test_older_versions_of_open_clip_find_a_config_and_weights_that_they_can_read(
    models: dict[str, Path], tmp_path: Path
) -> None:
    found = replace(open_model(models["vit"]), preprocess=Preprocess(mean=(0.5, 0.5, 0.5)))
    (note,) = export_model(found, tmp_path / "out")
    assert note.startswith("open_clip 2.16 to 2.32: ")
    assert "image_mean=(0.5, 0.5, 0.5)" in note
    assert note.endswith("its tokenizer needs `context_length=32`.")
    assert json.loads((tmp_path / "out" / "compt-vit_pico.json").read_text()) == found.spec.open_clip_config()
    state = torch.load(tmp_path / "out" / "open_clip_pytorch_model.bin", weights_only=True)
    assert state.keys() == set(found.state)
    assert all(torch.equal(state[key], found.state[key]) for key in state)
    newer = open_model(write_model(tmp_path / "newer", replace(SPECS["vit"], no_ln_pre=True)))
    assert export_model(newer, tmp_path / "out")[0].startswith("open_clip 2.23 to 2.32: ")
    squashed = replace(open_model(models["vit"]), preprocess=Preprocess(resize_mode="squash"))
    (note,) = export_model(squashed, tmp_path / "out")
    assert note.startswith("open_clip 2.23 to 2.32: ")
    assert 'image_interpolation="bicubic", image_resize_mode="squash")' in note


OLD_OPEN_CLIP = """
import sys, torch, open_clip
folder, given = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
open_clip.add_model_config(f"{folder}/compt-vit_pico.json")
model, _, _ = open_clip.create_model_and_transforms(
    "compt-vit_pico", pretrained=f"{folder}/open_clip_pytorch_model.bin"
)
with torch.no_grad():
    image, text = model.eval().encode_image(given["pixels"]), model.encode_text(given["tokens"])
torch.save({"file": open_clip.__file__, "image": image, "text": text}, sys.argv[3])
"""
OLD_TRANSFORMERS = """
import sys, torch, transformers
folder, given = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
model = transformers.CLIPModel.from_pretrained(folder).eval()
ours = transformers.CLIPTokenizer.from_pretrained(folder)(given["caption"]).input_ids
assert ours == transformers.CLIPTokenizerFast.from_pretrained(folder)(given["caption"]).input_ids == given["ids"], ours
with torch.no_grad():
    image, text = model.get_image_features(given["pixels"]), model.get_text_features(given["tokens"])
torch.save({"file": transformers.__file__, "image": image, "text": text}, sys.argv[3])
"""
# What LLaVA 1.5 pins, with the packages of its time that it needs.
TRANSFORMERS_4_37 = ["transformers==4.37.2", "tokenizers==0.15.2", "huggingface_hub==0.24.7"]
TRANSFORMERS_4_37 += ["requests", "urllib3", "idna", "charset_normalizer", "certifi"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("to", "packages", "program"),
    [
        *(("open_clip", [f"open_clip_torch=={version}"], OLD_OPEN_CLIP) for version in ("2.16.0", "2.24.0", "2.32.0")),
        ("hf", TRANSFORMERS_4_37, OLD_TRANSFORMERS),
    ],
)
@torch.no_grad()
def test_older_versions_that_people_pin_compute_the_same_features(
    models: dict[str, Path], tmp_path: Path, to: str, packages: list[str], program: str
) -> None:
    place, ours = tmp_path / "place", load(models["vit"])
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place)]
    subprocess.run([*pip, *packages], check=True)
    export_model(open_model(models["vit"]), tmp_path / "out", to)
    pixels, tokens = pixels_for(ours), tokens_for(ours)
    given = {"pixels": pixels, "tokens": tokens, "caption": CAPTIONS[1], "ids": [n for n in tokens[1].tolist() if n]}
    torch.save(given, tmp_path / "given.pt")
    words = [sys.executable, "-c", program, *(str(tmp_path / name) for name in ("out", "given.pt", "theirs.pt"))]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(place)})
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert theirs["file"].startswith(str(place))
    assert_same(theirs["image"], ours.encode_image(pixels))
    assert_same(theirs["text"], ours.encode_text(tokens))


# timm


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_timm_computes_the_same_image_features(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    found, ours = open_model(models[name]), load(models[name])
    export_model(found, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    pixels = pixels_for(ours)
    assert_same(theirs(pixels), ours.encode_image(pixels))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    expected = torch.stack([_transform(found.preprocess)(image) for image in images()])
    assert torch.equal(torch.stack([transform(image) for image in images()]), expected)


@torch.no_grad()
def test_timm_says_the_other_settings_of_a_vit_or_refuses_them(tmp_path: Path) -> None:
    bare = open_model(write_model(tmp_path / "bare", replace(SPECS["vit"], no_ln_pre=True)))
    export_model(bare, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    pixels = pixels_for(bare.load_model())
    assert_same(theirs(pixels), bare.load_model().eval().encode_image(pixels))
    other = open_model(write_model(tmp_path / "eps", replace(SPECS["vit"], norm_eps=1e-3)))
    with pytest.raises(ArtefactError, match=r"its LayerNorms add 0\.001 to the variance"):
        export_model(other, tmp_path / "out", "timm")


# Programs


def _onnx(folder: Path, tower: str, given: Tensor) -> Any:
    session = optional("onnxruntime", "interop").InferenceSession(folder / f"{tower}.onnx")
    return session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]


def _torch(folder: Path, tower: str, given: Tensor) -> Any:
    return torch.export.load(folder / f"{tower}.pt2").module()(given)


RUNNERS = {"onnx": _onnx, "torch_export": _torch}


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("vit", "onnx"),
        pytest.param("swin", "torch_export", marks=pytest.mark.slow),
        pytest.param("swin", "onnx", marks=pytest.mark.full),
        pytest.param("vit", "torch_export", marks=pytest.mark.full),
    ],
)
@torch.no_grad()
def test_programs_compute_the_same_features_for_any_number(
    models: dict[str, Path], tmp_path: Path, name: str, to: str
) -> None:
    for package in FORMATS[to].packages:
        optional(package, "onnx")
    ours = load(models[name])
    export_model(open_model(models[name]), tmp_path / to, to)
    for number in (1, 5):
        pixels, tokens = pixels_for(ours, number), tokens_for(ours)[:number]
        assert_same(RUNNERS[to](tmp_path / to, "image", pixels), ours.encode_image(pixels))
        assert_same(RUNNERS[to](tmp_path / to, "text", tokens), ours.encode_text(tokens))
    here = str(Path(__file__).parents[3]).encode()
    assert not any(here in path.read_bytes() for path in (tmp_path / to).iterdir()), "a file names a folder"
