"""Every setting of open_clip's model configs is honoured or refused by name; the oracle is stock open_clip."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn

from compt.cost.counts import parameters
from compt.errors import ArtefactError
from compt.models.clip import exported_shapes
from compt.models.open_clip_config import HONOURED, spec_from_open_clip
from compt.models.scalars import LOSS_TRAITS, LossTraits, Scalar
from compt.weights.open import open_model

MODELS = open_clip.list_models()
TINY: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2},
}
SWIN: dict[str, Any] = {
    **TINY,
    "vision_cfg": {"image_size": 32, "timm_model_name": "compt_swin_w32_d2-2_h16_p4_win4_32"},
}


def config_of(name: str) -> dict[str, Any]:
    return copy.deepcopy(open_clip.get_model_config(name))


def refusal(config: dict[str, Any]) -> str | None:
    try:
        spec_from_open_clip(config, "it")
    except ArtefactError as error:
        return str(error)
    return None


def given(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config by their full names."""
    parts = {f"{part}.{key}": value for part in ("vision_cfg", "text_cfg") for key, value in config[part].items()}
    return {key: value for key, value in config.items() if not key.endswith("_cfg")} | parts


def stock(config: dict[str, Any]) -> nn.Module:
    """The model that open_clip's own factory builds, every parameter random."""
    config = copy.deepcopy(config)
    custom = config.pop("custom_text", False)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def save(folder: Path, config: dict[str, Any], model: nn.Module, preprocess: dict[str, Any] | None = None) -> Path:
    """A folder as open_clip's push_to_hf_hub writes it."""
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors", {"format": "pt"})
    whole = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    return folder


def difference(folder: Path, config: dict[str, Any], model: nn.Module) -> float:
    """The largest relative difference of image and text features between stock open_clip and compt."""
    generator = torch.Generator().manual_seed(1)
    sides = config["vision_cfg"]["image_size"]
    side = sides if isinstance(sides, int) else sides[0]
    images = torch.randn(3, 3, side, side, generator=generator)
    length, words = (
        config["text_cfg"].get(key, 77 if key == "context_length" else 49408)
        for key in ("context_length", "vocab_size")
    )
    tokens = torch.randint(1, words - 1, (3, length), generator=generator)
    ends = (length - 1, length // 2, 2)
    for row, end in enumerate(ends):
        tokens[row, end], tokens[row, end + 1 :] = words - 1, 0
    ours = open_model(save(folder, config, model)).load_model().eval()
    with torch.no_grad():
        pairs: list[tuple[Tensor, Tensor]] = [
            (ours.encode_image(images), model.encode_image(images)),  # type: ignore[operator]
            (ours.encode_text(tokens), model.encode_text(tokens)),  # type: ignore[operator]
        ]
    ours_scale, scale = (one.get_parameter("logit_scale").detach().flatten() for one in (ours, model))
    assert torch.equal(ours_scale, scale)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """A config of two heads and two layers a tower, and all its other settings."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" not in vision:
        head = vision.get("head_width", 64)
        vision |= {"width": 2 * head, "layers": 2, "image_size": 2 * vision["patch_size"]}
    head = text["width"] // text["heads"]
    config["text_cfg"] = text | {"width": 2 * head, "heads": 2, "layers": 2, "vocab_size": 64, "context_length": 9}
    return config | {"embed_dim": 48}


HONOURED_MODELS = [name for name in MODELS if refusal(config_of(name)) is None]


def test_every_config_of_open_clip_is_honoured_or_refused_by_name() -> None:
    for name in MODELS:
        config = config_of(name)
        message = refusal(config)
        if message is None:
            for part in ("vision_cfg", "text_cfg"):  # one layer has the shapes of all
                config[part] |= {"layers": 1} if "layers" in config[part] else {}
            with torch.device("meta"):
                theirs = open_clip.CLIP(**config).state_dict()
            spec = spec_from_open_clip(config, name)
            assert exported_shapes(spec) == {key: tuple(value.shape) for key, value in theirs.items()}, name
            continue
        key, _, rest = message.removeprefix("open_clip config of it: ").partition(" = ")
        value = config["multimodal_cfg"] if key == "multimodal_cfg" else given(config)[key]
        assert rest.startswith(str(value)), (name, message)
        assert "must be" in rest or "one mlp_ratio" in rest, (name, message)


def test_what_is_honoured_and_what_is_refused_for_which_reason() -> None:
    assert len(HONOURED_MODELS) >= 28
    some = {"ViT-B-16", "ViT-H-14-378-quickgelu", "ViT-S-32-alt", "swin_base_patch4_window7_224"}
    assert some <= set(HONOURED_MODELS)
    for name, words in {
        "ViT-B-16-SigLIP": "vision_cfg.timm_model_name = vit_base_patch16_siglip_224",
        "ViT-L-14-CLIPA": "vision_cfg.pool_type = avg is not supported; it must be 'tok'",
        "ViT-H-14-worldwide": "text_cfg.hf_tokenizer_name = facebook/xlm-v-base is not supported; it must be left out",
        "roberta-ViT-B-32": "text_cfg.hf_model_name = roberta-base",
        "RN50": "vision_cfg.layers = [3, 4, 6, 3] is not supported; it must be a whole number",
        "ViT-M-16-alt": "vision_cfg.ls_init_value = 0.0001 is not supported; it must be None",
        "ViT-g-14": "vision_cfg.mlp_ratio = 4.3637 and text_cfg.mlp_ratio = 4.0",
        "coca_ViT-B-32": "multimodal_cfg = ",
    }.items():
        assert words in str(refusal(config_of(name))), name


@pytest.mark.parametrize("name", [name for name in HONOURED_MODELS if not name.startswith("swin")])
def test_reduced_models_give_the_features_of_stock_open_clip(tmp_path: Path, name: str) -> None:
    config = reduced(config_of(name))
    assert difference(tmp_path, config, stock(config)) < 2e-5


SMALL = [name for name in HONOURED_MODELS if parameters(spec_from_open_clip(config_of(name))) < 100e6]


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_models_of_real_size_give_the_features_of_stock_open_clip(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    config = config_of(name)
    model = open_clip.CLIP(**config).eval()
    assert difference(tmp_path, config, model) < 2e-5


def test_a_swin_gives_the_features_of_stock_open_clip(tmp_path: Path) -> None:
    config = copy.deepcopy(SWIN)
    config["vision_cfg"] |= {"timm_pool": "", "timm_drop": 0.3, "timm_drop_path": 0.2}
    spec_from_open_clip(config)  # registers the Swin
    assert difference(tmp_path, config, stock(config)) < 2e-5


# A value other than the default for every setting whose type alone does not give one.
OTHER: dict[str, Any] = {
    "vision_cfg.layers": 3,
    "vision_cfg.width": 48,
    "vision_cfg.head_width": 8,
    "vision_cfg.patch_size": 4,
    "vision_cfg.image_size": [16, 16],
    "vision_cfg.ls_init_value": 1e-4,
    "vision_cfg.patch_dropout": 0.5,
    "vision_cfg.attn_pooler_queries": 4,
    "vision_cfg.attn_pooler_heads": 4,
    "vision_cfg.pos_embed_type": "sin_cos_2d",
    "vision_cfg.pool_type": "avg",
    "vision_cfg.act_kwargs": {"approximate": "tanh"},
    "vision_cfg.norm_kwargs": {"eps": 1e-2},
    "vision_cfg.block_type": "custom",
    "vision_cfg.timm_model_name": "vit_tiny_patch16_224",
    "vision_cfg.timm_drop_path": 0.1,
    "text_cfg.width": 48,
    "text_cfg.heads": 4,
    "text_cfg.layers": 3,
    "text_cfg.context_length": 7,
    "text_cfg.vocab_size": 40,
    "text_cfg.ls_init_value": 1e-4,
    "text_cfg.pool_type": "last",
    "text_cfg.proj_type": "none",
    "text_cfg.act_kwargs": {"approximate": "tanh"},
    "text_cfg.norm_kwargs": {"eps": 1e-2},
    "text_cfg.block_type": "custom",
    "text_cfg.hf_tokenizer_name": "bert-base-uncased",
    "text_cfg.tokenizer_mode": "clips",
    "text_cfg.tokenizer_kwargs": {"clean": "canonicalize"},
    "text_cfg.hf_model_name": "roberta-base",
    "text_cfg.hf_proj_type": "linear",
    "text_cfg.hf_pooler_type": "cls_pooler",
    "init_logit_scale": 2.0,
    "init_logit_bias": -10,
    "embed_dim": 20,
}
# These change two settings at once, or none that a tiny model can have.
TOGETHER = {"vision_cfg.mlp_ratio": {"text_cfg.mlp_ratio": 2.0}, "text_cfg.mlp_ratio": {"vision_cfg.mlp_ratio": 2.0}}


def settings() -> dict[str, Any]:
    """Every setting of open_clip's model configs, with a value other than its default."""
    found: dict[str, Any] = {}
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        for key, default in asdict(kind()).items():
            name = f"{part}.{key}"
            changed = not default if isinstance(default, bool) else 2.0 if key == "mlp_ratio" else None
            found[name] = OTHER.get(name, changed if changed is not None else default + 1 if default == 0 else 1)
    found |= {"quick_gelu": True, "custom_text": True, "output_dict": True, "nonscalar_logit_scale": True}
    return found | {key: OTHER[key] for key in ("init_logit_scale", "init_logit_bias", "embed_dim")}


def changed(name: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(TINY)
    for key, one in {name: value, **TOGETHER.get(name, {})}.items():
        part, _, inner = key.rpartition(".")
        (config[part] if part else config)[inner] = one
    return config


@pytest.mark.parametrize("name", sorted(settings()))
def test_every_setting_gives_the_features_of_open_clip_or_is_refused_by_name(tmp_path: Path, name: str) -> None:
    value = settings()[name]
    config = changed(name, value)
    message = refusal(config)
    if message is not None:
        assert f"{name} = {value} is not supported; it must be " in message
        return
    part, _, key = name.rpartition(".")
    assert key in HONOURED["vision_cfg of a ViT" if part == "vision_cfg" else part or "model_cfg"]
    config.pop("output_dict", None)
    assert difference(tmp_path, config, stock(config)) < 2e-5


def test_a_setting_that_open_clip_does_not_know_is_refused() -> None:
    for name in ("vision_cfg.sparkle", "text_cfg.sparkle", "sparkle"):
        assert f"{name} = 3 is not supported; it must be left out" in str(refusal(changed(name, 3)))


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (["embed_dim"], float("inf")),
        (["vision_cfg.mlp_ratio", "text_cfg.mlp_ratio"], 10**400),
        (["text_cfg.norm_kwargs"], {"eps": 10**400}),
        (["vision_cfg.timm_model_name"], ["swin"]),
        (["vision_cfg.timm_model_name"], f"compt_swin_w{5000 * '9'}_d2-2_h16_p4_win4_32"),
    ],
)
def test_values_that_no_model_has_are_refused(names: list[str], value: Any) -> None:
    config = copy.deepcopy(TINY)
    for name in names:
        part, _, key = name.rpartition(".")
        (config[part] if part else config)[key] = value
    assert str(refusal(config)).startswith("open_clip config of it: ")


def test_the_settings_are_those_of_open_clip() -> None:
    vision, text = asdict(CLIPVisionCfg()), asdict(CLIPTextCfg())
    assert set(HONOURED["vision_cfg of a ViT"]) | set(HONOURED["vision_cfg of a Swin"]) <= set(vision)
    assert set(HONOURED["text_cfg"]) <= set(text)


def test_the_page_names_every_setting_that_is_honoured() -> None:
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for part in HONOURED.values():
        for key in part:
            assert f"`{key}`" in page, key


def test_a_config_tells_losses_of_the_same_scalars_apart_by_what_they_start_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LOSS_TRAITS, "margin", LossTraits((Scalar("logit_scale", 1.6, log=True),)))
    for value, loss in ((None, "contrastive"), (1.6, "margin"), (2.6593, "contrastive"), (2.0, "contrastive")):
        config = TINY if value is None else {**TINY, "init_logit_scale": value}
        assert spec_from_open_clip(config).loss == loss
    assert spec_from_open_clip({**TINY, "init_logit_bias": -10}).loss == "siglip"
    assert spec_from_open_clip({**TINY, "init_logit_bias": -3}).loss == "siglip"
