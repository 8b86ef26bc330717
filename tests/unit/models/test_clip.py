"""The models against stock open_clip: same parameters, same features, same gradients, with trimmed text too."""

import json
from dataclasses import replace

import open_clip.model
import pytest
import torch

from compt.errors import ArtefactError
from compt.models.clip import ClipModel, build, caption_lengths, materialise, shardable_blocks
from compt.models.open_clip_config import spec_from_open_clip
from compt.models.presets import PRESETS, resolve
from compt.models.swin import register_swin
from tests.helpers.states import export_state

EOT = 49_407
SMALL_SWIN = {
    "image_size": 44,
    "window": 3,
    "width": 32,
    "head_width": 16,
    "depths": (2, 3),
    "text_width": 64,
    "text_depth": 1,
    "embed_dim": 48,
    "vocab_size": 50_000,
}
DEFAULT = {"quick_gelu": False, "norm_eps": 1e-5, "text_norm_eps": 1e-5}
SPECS = {
    "vit_pico": PRESETS["vit_pico"],
    "no_ln_pre": resolve("vit_pico", {"no_ln_pre": True}),
    "head width 64": replace(resolve("vit_t16", {"depth": 2, "text_depth": 2, "image_size": 48}), name="small_t16"),
    "swin": replace(resolve("swin_t", {"text_depth": 1, "vocab_size": 50_000}), name="short_swin"),
    "custom swin": resolve("swin_t", SMALL_SWIN),
}


def stock(model: ClipModel) -> open_clip.model.CLIP:
    if model.spec.arch == "swin":
        register_swin(model.spec.timm_name)
    reference = open_clip.model.CLIP(**model.spec.open_clip_config())
    reference.load_state_dict(export_state(model), strict=True)
    return reference


def captions(model: ClipModel, lengths: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(len(lengths), model.spec.context_length, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(1, EOT - 1, (length - 1,), generator=generator)
        row[length - 1] = EOT
    return tokens


def images(model: ClipModel, count: int) -> torch.Tensor:
    size = model.spec.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradients(model: torch.nn.Module, features: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name == "logit_scale":
            continue
        # The gradient of the key third of a packed bias is only noise, so part of the tolerance is absolute.
        error = (found[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-5, f"{name}: {error} of {gradient.norm()}"


@pytest.mark.parametrize(
    "spec", [pytest.param(SPECS[name], id=name, marks=[pytest.mark.full] * (name == "swin")) for name in SPECS]
)
def test_features_and_gradients_are_those_of_open_clip(spec):
    model = build(spec, seed=1)
    reference = stock(model)
    assert list(model.state_dict()) == list(reference.state_dict())

    count = 2 if spec.arch == "swin" else 5
    pixels, tokens = images(model, count), captions(model, [3, 9, 5, 2, 16])
    for encode, inputs in (("encode_image", pixels), ("encode_text", tokens)):
        ours, theirs = getattr(model, encode)(inputs), getattr(reference, encode)(inputs)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert_gradients_equal(gradients(model, ours), gradients(reference, theirs))

    with torch.no_grad():
        for ours, theirs in zip(model(pixels, tokens), reference(pixels, tokens), strict=True):
            torch.testing.assert_close(ours.reshape(-1), theirs.reshape(-1), atol=1e-5, rtol=1e-5)


OTHER = {"quick_gelu": True, "norm_eps": 0.3, "text_norm_eps": 0.2}
EXACT = {
    "vit": resolve("vit_pico", OTHER),
    "no_ln_pre": resolve("vit_pico", {**OTHER, "no_ln_pre": True}),
    "swin": resolve("swin_t", {**SMALL_SWIN, "quick_gelu": True, "text_norm_eps": 0.2}),
}


@pytest.mark.parametrize("spec", EXACT.values(), ids=EXACT)
def test_activation_and_eps_of_every_norm_are_those_of_open_clip(spec):
    model = build(spec, seed=1)
    reference, plain = stock(model).double(), build(replace(spec, **DEFAULT), seed=1).double()
    model.double()
    pixels, tokens = images(model, 3).double(), captions(model, [3, 9, 5])
    for encode, inputs in (("encode_image", pixels), ("encode_text", tokens)):
        ours, theirs = getattr(model, encode)(inputs), getattr(reference, encode)(inputs)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        expected = gradients(reference, theirs)
        for name, gradient in gradients(model, ours).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=1e-10, msg=name)
        other = getattr(plain, encode)(inputs)
        if (spec.arch, encode) == ("swin", "encode_image"):
            torch.testing.assert_close(other, ours, atol=1e-12, rtol=0)
        else:
            assert (other - ours).abs().max() > 1e-3


@pytest.mark.parametrize("field", DEFAULT)
def test_each_of_them_reaches_the_tower_that_it_is_for(field):
    """Every LayerNorm and every activation of the tower, and nothing of the other one."""
    model = build(resolve("vit_nano", {field: OTHER[field]}), seed=1)
    default = _functions(build(PRESETS["vit_nano"], seed=1))
    changed = {name for name, what in _functions(model).items() if what != default[name]}
    image = {name for name in default if name.startswith("visual.")}
    norms = {name for name, what in default.items() if what == 1e-5}
    expected = {
        "quick_gelu": default.keys() - norms,
        "norm_eps": image & norms,
        "text_norm_eps": norms - image,
    }
    assert changed == expected[field]
    assert len(norms) == 2 * (4 + 2) + 2 + 1


def _functions(model):
    norms = {name: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    others = {name: type(m).__name__ for name, m in model.named_modules() if "GELU" in type(m).__name__}
    return norms | others


def test_autocast_computes_norms_with_their_eps():
    """In half precision the norms compute in fp32 with the eps of the description, as stock open_clip's do."""
    model = build(resolve("vit_pico", OTHER), seed=1)
    reference, pixels = stock(model), images(model, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model.encode_image(pixels), reference.encode_image(pixels)
        plain = build(resolve("vit_pico", {"quick_gelu": True}), seed=1).encode_image(pixels)
    size = theirs.float().norm()
    assert (ours.float() - theirs.float()).norm() < 0.01 * size
    assert (plain.float() - theirs.float()).norm() > 0.05 * size


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {}),
        ({"quick_gelu": True}, {"quick_gelu": True}),
        ({"quick_gelu": False, "vision_cfg": {"norm_kwargs": None}, "text_cfg": {"norm_kwargs": {}}}, {}),
        ({"vision_cfg": {"norm_kwargs": {"eps": 1}}}, {"norm_eps": 1.0}),
        ({"text_cfg": {"norm_kwargs": {"eps": 6.1e-7}}}, {"text_norm_eps": 6.1e-7}),
    ],
)
def test_activation_and_eps_are_read_from_open_clips_config(config, fields):
    written = PRESETS["vit_pico"].open_clip_config()
    for part, value in config.items():
        written[part] = {**written[part], **value} if isinstance(value, dict) else value
    spec = spec_from_open_clip(json.loads(json.dumps(written)), "vit_pico")
    assert spec == resolve("vit_pico", fields)
    assert spec_from_open_clip(spec.open_clip_config(), "vit_pico") == spec


@pytest.mark.parametrize("part", ["vision_cfg", "text_cfg"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"eps": 1e-6, "bias": False}, "only eps is supported"),
        ({"elementwise_affine": False}, "only eps is supported"),
        ({"eps": "small"}, "only eps is supported"),
        ({"eps": True}, "only eps is supported"),
        ("eps", "only eps is supported"),
        ({"eps": 0}, "norm_eps is 0.0; it must be a number above 0"),
        ({"eps": float("nan")}, "norm_eps is nan"),
    ],
)
def test_other_settings_of_norms_are_refused(part, value, message):
    config = PRESETS["vit_pico"].open_clip_config()
    config[part]["norm_kwargs"] = value
    with pytest.raises(ArtefactError, match=message) as error:
        spec_from_open_clip(config, "outside")
    assert "open_clip config of outside" in str(error.value)


@pytest.mark.parametrize("kept", [8, 11, 32])
def test_cutting_the_padding_changes_neither_features_nor_gradients(kept):
    model = build(PRESETS["vit_pico"], seed=1)
    tokens = captions(model, [8, 3, 5])
    reference = stock(model)
    expected = reference.encode_text(tokens)
    expected_gradients = gradients(reference, expected)
    for features in (
        model.encode_text(tokens[:, :kept]),
        model.encode_text(tokens[:, :kept], length=8),
        model.encode_text(tokens[:, :kept], length=kept),
        model.encode_text(tokens[:, :kept], length=32),
    ):
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        assert_gradients_equal(gradients(model, features), expected_gradients)


def test_a_caption_that_fills_the_context_is_not_cut():
    model = build(PRESETS["vit_pico"], seed=1)
    tokens = captions(model, [32, 31])
    assert caption_lengths(tokens).tolist() == [32, 31]
    torch.testing.assert_close(model.encode_text(tokens), stock(model).encode_text(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("buckets", [1, 2, 3, 7, 50])
def test_buckets_change_neither_features_nor_gradients(buckets):
    model = build(PRESETS["vit_pico"], seed=1)
    tokens = captions(model, [8, 3, 5, 30, 3, 17, 2, 8, 9, 4])
    expected = model.encode_text(tokens)
    expected_gradients = gradients(model, expected)
    for lengths in (None, caption_lengths(tokens)):
        features = model.encode_captions(tokens, buckets, lengths)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        assert_gradients_equal(gradients(model, features), expected_gradients)


def test_buckets_are_cut_to_their_own_longest_caption(monkeypatch):
    model = build(PRESETS["vit_pico"], seed=1)
    seen = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda text, length: seen.append(length) or encode(text, length=length))
    model.encode_captions(captions(model, [8, 3, 5, 30]), buckets=2)
    assert seen == [5, 30]


def test_no_captions_give_no_features():
    model = build(PRESETS["vit_pico"], seed=1)
    none = torch.zeros(0, 32, dtype=torch.long)
    assert model.encode_captions(none, 3).shape == (0, 128)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(40, 40\) for a model of \(32, 32\)"):
        build(PRESETS["vit_pico"], seed=1).encode_image(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("name", ["vit_pico", "swin_t"])
def test_recomputation_gives_the_same_gradients(name):
    model = build(resolve(name, {"text_depth": 2}), seed=1)
    pixels, tokens = images(model, 1), captions(model, [7])

    def both():
        return torch.cat([model.encode_image(pixels), model.encode_text(tokens)])

    expected = gradients(model, both())
    model.set_grad_checkpointing()
    assert_gradients_equal(gradients(model, both()), expected)


@pytest.mark.parametrize("name", ["vit_pico", "swin_t"])
def test_meta_models_take_no_memory_and_can_be_materialised(name):
    spec = resolve(name, {"text_depth": 1})
    model = build(spec, device="meta", seed=3)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    materialise(model, "cpu")
    expected = dict(ClipModel(spec).named_buffers())
    for buffer, tensor in model.named_buffers():
        torch.testing.assert_close(tensor, expected[buffer])


def test_the_seed_decides_the_parameters():
    one, same, other = (build(PRESETS["vit_pico"], seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["visual.proj"], other["visual.proj"])


def test_there_is_no_random_part_in_training_mode():
    model = build(resolve("swin_t", {"text_depth": 1}), seed=1).train()
    pixels = images(model, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), model.encode_image(pixels), rtol=0, atol=0)


def test_shardable_blocks_are_the_repeated_parts():
    assert len(shardable_blocks(build(PRESETS["vit_nano"], device="meta"))) == 4 + 2
    swin = build(PRESETS["swin_s"], device="meta")
    blocks = shardable_blocks(swin)
    assert len(blocks) == 24 + 12
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [name for name, p in swin.named_parameters() if id(p) not in inside]
    assert not [name for name in outside if "blocks" in name]


# Table G of arXiv 2604.12391: millions of parameters of the image tower with its projection, and of the text blocks.
# vit_s16 is published with an embedding of 384 and vit_l16 with 768; vit_xb16's published 171.36 follows from no width.
TABLE_G = {
    "vit_t16": (5.62, 9.48, 512),
    "vit_c16": (9.86, 14.80, 512),
    "vit_s16": (21.81, 21.29, 384),
    "vit_m16": (38.59, 28.97, 512),
    "vit_b16": (86.19, 37.83, 512),
    "vit_xb16": (None, 37.83, 512),
    "vit_l16": (304.09, 85.05, 768),
    "swin_t": (27.91, 9.48, 512),
    "swin_s": (49.23, 21.29, 512),
    "swin_b": (87.27, 37.83, 512),
    "swin_l": (195.78, 85.05, 512),
}


@pytest.mark.parametrize("name", TABLE_G)
def test_parameter_counts_are_those_of_table_g(name):
    image, text, embed_dim = TABLE_G[name]
    model = build(resolve(name, {"embed_dim": embed_dim}), device="meta")
    if image is not None:
        assert sum(p.numel() for p in model.visual.parameters()) / 1e6 == pytest.approx(image, abs=0.05)
    assert sum(p.numel() for p in model.transformer.parameters()) / 1e6 == pytest.approx(text, abs=0.01)
