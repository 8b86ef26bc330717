"""Folders of Hugging Face's CLIPModel, against its features."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file

from compt.errors import ArtefactError
from compt.export.hugging_face import clip_config
from compt.models.preprocess import AS_OPENAI, Preprocess
from compt.models.presets import resolve
from compt.weights.files import spec_from_hugging_face
from compt.weights.open import open_model
from tests.helpers.optional import optional

CONFIG = "config.json"
TEXT = {
    "vocab_size": 30,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "eos_token_id": 29,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def write(folder: Path, act: str = "quick_gelu", eps: float = 1e-5, text_eps: float = 1e-5, **options: Any) -> Any:
    """A CLIPModel whose every parameter is random, biases and norms too; written to `folder` by transformers."""
    transformers = optional("transformers", "dev")
    config = transformers.CLIPConfig(
        text_config={**TEXT, "hidden_act": act, "layer_norm_eps": text_eps},
        vision_config={**VISION, "hidden_act": act, "layer_norm_eps": eps},
        projection_dim=20,
    )
    model = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, **options)
    return model


def pooled(output: Any) -> torch.Tensor:
    """transformers 5 gives an object where 4 gave the features."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def differences(model: Any, found: Any, dtype: torch.dtype) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 16, 16, generator=generator, dtype=dtype)
    tokens = torch.randint(1, 28, (3, 9), generator=generator)
    tokens[0, 4], tokens[1, 8], tokens[2, 2] = 29, 29, 29
    ours, theirs = found.load_model().to(dtype).eval(), model.to(dtype)
    with torch.no_grad():
        pairs = (
            (ours.encode_image(images), pooled(theirs.get_image_features(pixel_values=images))),
            (ours.encode_text(tokens), pooled(theirs.get_text_features(input_ids=tokens))),
        )
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


@pytest.mark.parametrize(
    ("act", "eps", "text_eps"), [("quick_gelu", 1e-5, 1e-5), ("gelu", 1e-5, 1e-5), ("gelu", 1e-2, 1e-3)]
)
def test_features_are_the_same(tmp_path, act, eps, text_eps):
    model = write(tmp_path, act, eps, text_eps)
    found = open_model(tmp_path)
    spec = found.spec
    assert (spec.quick_gelu, spec.norm_eps, spec.text_norm_eps) == (act == "quick_gelu", eps, text_eps)
    assert max(differences(model, found, torch.float32)) < 1e-5
    assert max(differences(model, found, torch.float64)) < 1e-10
    assert float(found.state["logit_scale"]) == float(model.logit_scale.detach())


@pytest.mark.parametrize("other", [{"quick_gelu": False}, {"norm_eps": 1e-4}, {"text_norm_eps": 1e-4}])
def test_what_the_config_says_matters(tmp_path, other):
    model = write(tmp_path)
    found = open_model(tmp_path)
    wrong = replace(found, spec=replace(found.spec, **other))
    assert max(differences(model, wrong, torch.float64)) > 1e-7


def test_sharded_and_whole_are_the_same(tmp_path):
    model = write(tmp_path / "whole")
    write(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = open_model(tmp_path / "whole"), open_model(tmp_path / "sharded")
    assert set(whole.state) == set(sharded.state)
    assert all(torch.equal(whole.state[name], sharded.state[name]) for name in whole.state)
    assert max(differences(model, sharded, torch.float64)) < 1e-10
    assert whole.manifest == {}


def test_old_folders_hold_positions_and_pickles(tmp_path):
    write(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for tower, count in (("text", 9), ("vision", 17)):
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(count)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = open_model(tmp_path)
    assert found.manifest["left_out"] == [f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")]
    found.load_model()


def test_an_index_does_not_lead_elsewhere(tmp_path):
    write(tmp_path / "model", max_shard_size="40KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    file = values["weight_map"]["logit_scale"]
    shutil.copy(tmp_path / "model" / file, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        moved = {key: name if value == file else value for key, value in values["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(ArtefactError, match="not a plain file name"):
            open_model(tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    (tmp_path / "model" / file).symlink_to(tmp_path / "outside.safetensors")
    index.write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match="a link out of its folder"):
        open_model(tmp_path / "model")
    values["weight_map"].pop("logit_scale")
    (tmp_path / "model" / file).unlink()
    shutil.copy(tmp_path / "outside.safetensors", tmp_path / "model" / file)
    index.write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match="does not list what the files hold"):
        open_model(tmp_path / "model")


def test_a_snapshot_in_the_cache_is_a_folder_of_links(tmp_path):
    write(tmp_path / "written")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (tmp_path / "written").iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    assert open_model(snapshot).spec.width == 32


def test_what_is_missing_is_listed(tmp_path):
    write(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("text_model.encoder.layers.1.self_attn.k_proj.bias")
    state.pop("visual_projection.weight")
    state["vision_model.encoder.layers.0.more.weight"] = torch.ones(2)
    state["text_projection.weight"] = torch.ones(24, 20)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtefactError) as error:
        open_model(tmp_path)
    for line in (
        "missing: transformer.resblocks.1.attn.in_proj_bias [72]",
        "missing: visual.proj [32, 20]",
        "unexpected: vision_model.encoder.layers.0.more.weight [2]",
        "of another shape: text_projection [20, 24], the model has [24, 20]",
    ):
        assert f"  {line}" in str(error.value).splitlines()


def test_integers_among_what_is_stacked_are_listed(tmp_path):
    write(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "text_model.encoder.layers.1.self_attn.v_proj.bias"
    save_file({**state, name: state[name].int()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match=r"\n  of another dtype: transformer.resblocks.1.attn.in_proj_bias int32"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("text_config", "num_hidden_layers", 200_000_000, "has 200000003 layers, the weights only 74 parameters"),
        ("vision_config", "num_hidden_layers", 10**40, "layers, the weights only 74 parameters"),
        ("text_config", "max_position_embeddings", 10**10, "has sizes that no model has"),
        ("text_config", "max_position_embeddings", 10**30, "has sizes that no model has"),
        ("vision_config", "image_size", 4 * 10**10, "has sizes that no model has"),
        (
            "text_config",
            "max_position_embeddings",
            10**6,
            r"of another shape: positional_embedding \[9, 24\], the model",
        ),
    ],
)
def test_sizes_of_no_model_end_at_once(tmp_path, part, key, value, message):
    write(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config[part][key] = value
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "model_type is 'siglip'"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1"),
        ({"vision_config": {"intermediate_size": 100}}, "different MLP width"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act is gelu and quick_gelu"),
        ({"text_config": {"hidden_act": "relu"}, "vision_config": {"hidden_act": "relu"}}, "hidden_act is relu"),
        ({"text_config": {"eos_token_id": 5}}, "eos_token_id is 5"),
        ({"text_config": {"num_attention_heads": 7}}, "is not 7 x 73"),
        ({"text_config": {"hidden_size": "x"}}, r"text_config\.hidden_size is 'x'; it must be a whole number"),
        ({"vision_config": {"hidden_size": 768.0}}, r"vision_config\.hidden_size is 768\.0; it must be a whole number"),
        ({"vision_config": {"num_hidden_layers": True}}, "num_hidden_layers is True; it must be a whole number"),
        ({"text_config": {"layer_norm_eps": "1e-5"}}, "layer_norm_eps is '1e-5'; it must be a number"),
        ({"text_config": {"hidden_act": ["gelu"]}}, "hidden_act is .* it must be a word"),
        ({"text_config": {"num_attention_heads": None}}, "num_attention_heads is None; it must be a whole number"),
        ({"projection_dim": 512.5}, r"of m: projection_dim is 512\.5; it must be a whole number"),
        ({"vision_config": {"num_attention_heads": 0}}, "config.json of m"),
        ({"text_config": [1]}, "config.json of m"),
        ({"vision_config": {"intermediate_size": 10**400}}, "config.json of m: .*too large"),
        ({"text_config": {"layer_norm_eps": 10**400}}, "config.json of m: .*too large"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ArtefactError, match=message):
        spec_from_hugging_face({"model_type": "clip", **change}, "m")


def test_images_are_prepared_as_the_folder_says(tmp_path):
    transformers = optional("transformers", "dev")
    write(tmp_path)
    assert open_model(tmp_path).preprocess == AS_OPENAI
    square, grey = {"height": 16, "width": 16}, [0.5, 0.4, 0.3]
    transformers.CLIPImageProcessor(size=square, crop_size=square, image_mean=grey, resample=2).save_pretrained(
        tmp_path
    )
    assert open_model(tmp_path).preprocess == Preprocess(
        mean=(0.5, 0.4, 0.3), interpolation="bilinear", resize_mode="squash"
    )
    # A processor of transformers 5 is one file, and its classes read that one first.
    processor = {"image_processor": {"image_processor_type": "CLIPImageProcessor", "size": 16, "crop_size": 16}}
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    assert open_model(tmp_path).preprocess == AS_OPENAI
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert open_model(tmp_path).preprocess.resize_mode == "squash"
    transformers.CLIPImageProcessor(size=24, crop_size=24).save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match=r"preprocessor_config.json: size = .*24.* both sizes must be 16"):
        open_model(tmp_path)


@pytest.mark.parametrize("words", [{}, {"cat</w>": 3}])
def test_a_tokenizer_has_the_vocabulary_of_openai_or_is_refused(tmp_path, words):
    transformers = optional("transformers", "dev")
    write(tmp_path)
    stock = SimpleTokenizer()
    merges = [pair for pair, _ in sorted(stock.bpe_ranks.items(), key=lambda item: item[1])]
    words_only = [word for word in stock.encoder if not word.startswith("<") or not word.endswith("_of_text>")]
    vocabulary = {word: number for number, word in enumerate([*words_only, "<|startoftext|>", "<|endoftext|>"])}
    if words:  # two words change places
        other = next(word for word, number in vocabulary.items() if number == 3)
        vocabulary[other], vocabulary["cat</w>"] = vocabulary["cat</w>"], 3
    transformers.CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(tmp_path)
    if not words:
        assert open_model(tmp_path).spec.width == 32
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    said = "tokenizer_class = 'XLMRobertaTokenizer'" if not words else "49408 tokens are not those of OpenAI's CLIP"
    with pytest.raises(ArtefactError, match=said):
        open_model(tmp_path)


def test_what_a_config_leaves_out_is_as_transformers_has_it():
    transformers = optional("transformers", "dev")
    default = transformers.CLIPConfig()
    spec = spec_from_hugging_face({"model_type": "clip"}, "m")
    assert spec == spec_from_hugging_face(default.to_dict(), "m")
    assert (spec.width, spec.heads, spec.patch_size, spec.text_width, spec.embed_dim) == (768, 12, 32, 512, 512)
    assert spec.quick_gelu
    older = {"model_type": "clip", "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12}}
    wide = older | {"vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}}
    wide["text_config_dict"]["intermediate_size"] = 3072
    assert spec_from_hugging_face(wide, "m").text_width == 768


@pytest.mark.parametrize(("width", "text_width", "ratio"), [(64, 128, 2.7), (704, 704, 1920 / 704), (96, 64, 3.3)])
def test_hidden_sizes_that_no_plain_quotient_gives_come_back(width, text_width, ratio):
    """A spec cuts width x ratio to a whole number: the two quotients differ, and one may be rounded down."""
    spec = resolve("vit_nano", {"width": width, "text_width": text_width, "mlp_ratio": ratio})
    found = spec_from_hugging_face(clip_config(spec), "m")
    for each in ("width", "text_width"):
        assert int(getattr(found, each) * found.mlp_ratio) == int(getattr(spec, each) * spec.mlp_ratio)
