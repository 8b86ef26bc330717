"""Swins of sizes that timm has no name for: built as timm builds its own, loaded by stock open_clip, trained."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import open_clip
import open_clip.model
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor

from compt.errors import ArtefactError, ConfigError
from compt.models.clip import build, materialise, shardable_blocks
from compt.models.init import init_tensor, rule_for
from compt.models.open_clip_config import spec_from_open_clip
from compt.models.presets import PRESETS, ModelSpec, resolve
from compt.models.swin import register_swin
from compt.train.losses import contrastive_loss
from tests.helpers.states import export_state

TINY = {
    "image_size": 32,
    "window": 4,
    "width": 32,
    "head_width": 16,
    "depths": (2, 2),
    "text_width": 32,
    "text_head_width": 16,
    "text_depth": 1,
    "embed_dim": 24,
    "context_length": 8,
}


def tiny(**sizes: Any) -> ModelSpec:
    return resolve("swin_t", {**TINY, **sizes})


# Every window and shift that a stage can come to: shrunk, padded, one place, one stage, odd depths, an odd side.
SHAPES = {
    "plain": tiny(),
    "heads of 32": tiny(head_width=32, text_head_width=32),
    "one stage": tiny(depths=(2,)),
    "five stages": tiny(depths=(1, 1, 2, 1, 1), width=16),
    "odd depths": tiny(depths=(1, 3)),
    "padded windows": tiny(image_size=44, window=3),
    "odd side": tiny(image_size=28, window=2, depths=(2, 2, 2)),
    "shrunk windows": tiny(window=100),
    "one place": tiny(image_size=8, patch_size=8, depths=(2, 2, 2)),
    "windows of one": tiny(window=1),
    "fine patches": tiny(patch_size=2, window=7, mlp_ratio=2.5),
}


def inputs(spec: ModelSpec, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, spec.image_size, spec.image_size, generator=generator)
    tokens = torch.randint(1, 1000, (count, spec.context_length), generator=generator)
    tokens[:, -2] = spec.vocab_size - 1
    return images, tokens


@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_a_custom_swin_is_what_timm_builds_from_its_sizes(spec: ModelSpec) -> None:
    model = build(spec, seed=1)
    theirs = SwinTransformer(
        img_size=spec.image_size,
        patch_size=spec.patch_size,
        embed_dim=spec.width,
        depths=spec.depths,
        num_heads=spec.stage_heads,
        window_size=spec.window,
        mlp_ratio=spec.mlp_ratio,
        num_classes=0,
        drop_path_rate=0.0,
    )
    theirs.load_state_dict(model.visual.trunk.state_dict(), strict=True)
    images, _ = inputs(spec)
    expected = theirs(images) @ model.visual.head.proj.weight.T
    torch.testing.assert_close(model.encode_image(images), expected, rtol=1e-6, atol=1e-6)
    blocks = [block for block in model.modules() if isinstance(block, SwinTransformerBlock)]
    windows = [window for window, depth in zip(spec.stage_windows, spec.depths, strict=True) for _ in range(depth)]
    assert [block.window_size for block in blocks] == [(window, window) for window in windows]
    assert [len(block.attn.relative_position_bias_table) for block in blocks] == [(2 * w - 1) ** 2 for w in windows]
    assert len(shardable_blocks(model)) == spec.depth + spec.text_depth


@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_it_trains_and_every_parameter_has_a_gradient(spec: ModelSpec) -> None:
    model = build(spec, seed=1).train()
    images, tokens = inputs(spec)
    before = contrastive_loss(model.encode_image(images, normalize=True), _captions(model, tokens), model.logit_scale)
    before.task.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    after = contrastive_loss(model.encode_image(images, normalize=True), _captions(model, tokens), model.logit_scale)
    assert after.task < before.task


def _captions(model: Any, tokens: Tensor) -> Tensor:
    features: Tensor = model.encode_text(tokens, normalize=True)
    return features[:, None]


def test_a_step_of_a_tiny_one_takes_milliseconds() -> None:
    spec = tiny(vocab_size=1000)
    model, (images, tokens) = build(spec, seed=1), inputs(spec, count=8)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        (model.encode_image(images) * model.encode_text(tokens)).sum().backward()
        took.append(time.perf_counter() - start)
    assert min(took) < 0.2


@pytest.mark.parametrize("spec", [SHAPES["odd depths"], SHAPES["fine patches"]], ids=["odd depths", "fine patches"])
def test_a_description_survives_open_clips_config(spec: ModelSpec) -> None:
    config = json.loads(json.dumps(spec.open_clip_config()))
    assert config["vision_cfg"]["timm_model_name"] == spec.timm_name
    assert spec_from_open_clip({"model_cfg": config}, spec.name) == spec


SCRIPT = """
import json, sys, torch, open_clip
from compt.models import register_swin

folder = sys.argv[1]
name = json.load(open(folder + "/open_clip_config.json"))["model_cfg"]["vision_cfg"]["timm_model_name"]
try:
    open_clip.create_model("local-dir:" + folder)
except RuntimeError as error:
    assert name in str(error)
else:
    raise SystemExit("timm knows the name by itself")
register_swin(name)
model = open_clip.create_model("local-dir:" + folder).double()
images, tokens = torch.load(folder + "/inputs.pt", weights_only=True)
torch.save([model.encode_image(images.double()), model.encode_text(tokens)], folder + "/features.pt")
"""


def test_stock_open_clip_loads_a_folder_in_a_fresh_process(tmp_path: Path) -> None:
    from compt.weights.artefact import write_artefact

    spec = SHAPES["fine patches"]
    model, both = build(spec, seed=1), inputs(spec)
    folder = tmp_path / "model"
    write_artefact(folder, export_state(model), spec, {})
    torch.save(list(both), folder / "inputs.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)], check=True, timeout=120)
    model.double()
    image, text = torch.load(folder / "features.pt", weights_only=True)
    torch.testing.assert_close(image, model.encode_image(both[0].double()), rtol=0, atol=1e-12)
    torch.testing.assert_close(text, model.encode_text(both[1]), rtol=0, atol=1e-12)


def test_a_name_is_registered_once_and_timms_own_stay() -> None:
    name = tiny(width=48).timm_name
    assert not timm.is_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            register_swin(name)
        own = timm.model_entrypoint(PRESETS["swin_t"].timm_name)
        register_swin(PRESETS["swin_t"].timm_name)
    assert timm.is_model(name)
    assert timm.model_entrypoint(PRESETS["swin_t"].timm_name) is own
    trunk = timm.create_model(name, num_classes=0)
    assert trunk.embed_dim == 48
    assert trunk.default_cfg["architecture"] == name
    for bad in ("compt_swin_w1", "resnet18x", "compt_swin_w65_d2_h32_p4_win7_224"):
        with pytest.raises(ConfigError):
            register_swin(bad)
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model(name, pretrained=True)


def test_reading_a_config_registers_its_swin() -> None:
    spec = tiny(width=80)
    config = spec.open_clip_config()
    with pytest.raises(RuntimeError, match="Unknown model"):
        open_clip.model.CLIP(**config)
    assert spec_from_open_clip(config, "swin_t") == spec
    open_clip.model.CLIP(**config)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision_cfg", "timm_model_name", "compt_swin_w64_d2_h32_p4_win7", "compt_swin_w64_d2_h32_p4_win7 is not"),
        ("vision_cfg", "timm_model_name", "compt_swin_w65_d2_h32_p4_win7_224", "65 is not 2 x 32"),
        ("vision_cfg", "timm_model_name", "swinv2_tiny_window8_256", "swinv2_tiny_window8_256 is not supported"),
        (
            "vision_cfg",
            "timm_model_name",
            "swin_tiny_patch4_window7_244",
            "did you mean 'swin_tiny_patch4_window7_224'",
        ),
        ("vision_cfg", "image_size", 64, r"vision_cfg.image_size = 64; it must be 32, that of compt_swin_w32"),
        ("text_cfg", "mlp_ratio", 3.0, r"text_cfg.mlp_ratio = 3.0; it must be 4.0, that of compt_swin"),
        ("vision_cfg", "norm_kwargs", {"eps": 0.1}, r"vision_cfg.norm_kwargs = \{'eps': 0.1\} is not supported"),
        ("vision_cfg", "timm_pool", "rot_attn", "vision_cfg.timm_pool"),
    ],
)
def test_a_config_that_is_not_this_swins_is_refused(part: str, key: str, value: Any, message: str) -> None:
    config = tiny().open_clip_config()
    config[part][key] = value
    with pytest.raises(ArtefactError, match=message):
        spec_from_open_clip(config)


def test_meta_models_take_no_memory_and_can_be_materialised() -> None:
    spec = SHAPES["padded windows"]
    model = build(spec, device="meta", seed=3)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    materialise(model, "cpu")
    expected = dict(build(spec).named_buffers())
    assert any("attn_mask" in name for name in expected)
    for name, tensor in model.named_buffers():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("spec", [SHAPES["five stages"], SHAPES["fine patches"]], ids=["five stages", "fine patches"])
def test_each_parameter_is_distributed_as_in_open_clip(spec: ModelSpec) -> None:
    register_swin(spec.timm_name)
    torch.manual_seed(0)
    reference = dict(open_clip.model.CLIP(**spec.open_clip_config()).named_parameters())
    ours = dict(build(spec, seed=5).named_parameters())
    assert ours.keys() == reference.keys()
    for name, parameter in reference.items():
        a, b = parameter.detach().double().flatten(), ours[name].detach().double().flatten()
        rule = rule_for(spec, name, parameter.shape)
        assert torch.equal(b.float(), init_tensor(rule, 5, name, parameter.shape).flatten())
        if a.numel() < 2 or a.std() == 0:
            torch.testing.assert_close(b, a, rtol=1e-6, atol=0, msg=name)
            continue
        n, scale = a.numel(), a.std()
        assert abs(a.mean() - b.mean()) < 6 * scale * math.sqrt(2 / n), name
        assert abs(b.std() / scale - 1) < 6 * math.sqrt(1 / n), f"{name}: {b.std()} for {scale}"


@pytest.mark.parametrize("name", ["swin_b384", "swin_l384"])
def test_the_presets_for_large_images_are_timms(name: str) -> None:
    spec, small = PRESETS[name], PRESETS[name.removesuffix("384")]
    model, smaller = build(spec, device="meta"), build(small, device="meta")
    assert (spec.image_size, spec.window, spec.depths) == (384, 12, small.depths)
    shapes = [{name: tuple(p.shape) for name, p in one.named_parameters()} for one in (model, smaller)]
    assert shapes[0].keys() == shapes[1].keys()
    differ = {name for name, shape in shapes[0].items() if shapes[1][name] != shape}
    assert differ == {name for name in shapes[0] if name.endswith("relative_position_bias_table")}
    assert {shapes[0][name][0] for name in differ} == {23**2}


def test_all_small_sizes_build_and_run() -> None:
    """What ModelSpec accepts, timm builds and runs: sides, windows and stages of all kinds together."""
    for side, window, depths in itertools.product((1, 2, 3, 5, 7), (1, 2, 3, 8), ((2,), (2, 1, 2))):
        sizes = {"image_size": 3 * side, "patch_size": 3, "window": window, "depths": depths}
        spec = tiny(**sizes, width=8, head_width=4, vocab_size=50)
        images, _ = inputs(spec, count=2)
        features = build(spec, seed=0).encode_image(images)
        assert features.shape == (2, 24)
        assert features.isfinite().all()
