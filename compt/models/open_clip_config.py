"""Reading open_clip's model configs into ModelSpecs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import open_clip.model

from compt.errors import ArtefactError, ConfigError
from compt.models.presets import NORM_EPS, ModelSpec, swin_sizes
from compt.models.scalars import SCALAR_NAMES, loss_with
from compt.models.swin import register_swin

_TEXT_FIELDS = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs")
_VIT_FIELDS = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "no_ln_pre", "norm_kwargs")
# The weights of a pretrained tower are replaced anyway, and stochastic depth does not change the trained function.
_SWIN_FIELDS = ("image_size", "timm_model_name", "timm_model_pretrained", "timm_drop_path")


def spec_from_open_clip(config: Mapping[str, Any], name: str = "model") -> ModelSpec:
    """The ModelSpec of an open_clip model config, bare or under "model_cfg".

    Registers the Swin of a config that compt wrote with timm, so that stock open_clip can build it too. Raises
    ArtefactError, which names the first setting that compt's models do not have.
    """
    config = config.get("model_cfg", config)
    try:
        vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
        embed_dim = int(config["embed_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"open_clip config of {name}: embed_dim, vision_cfg and text_cfg are needed") from error
    initial = {f"init_{scalar}": scalar for scalar in SCALAR_NAMES}
    for key, value in config.items():
        if key not in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", *initial) and value:
            raise ArtefactError(f"open_clip config of {name}: {key} = {value} is not supported")
    _refuse_others(name, "text_cfg", text, open_clip.model.CLIPTextCfg, _TEXT_FIELDS)
    vision = asdict(open_clip.model.CLIPVisionCfg()) | _supported(name, vision)
    text = asdict(open_clip.model.CLIPTextCfg()) | text
    try:
        common = {
            "name": name,
            "embed_dim": embed_dim,
            "context_length": text["context_length"],
            "vocab_size": text["vocab_size"],
            "text_width": text["width"],
            "text_depth": text["layers"],
            "text_heads": text["heads"],
            "text_head_width": text["width"] // text["heads"],
            "text_norm_eps": _norm_eps(name, "text_cfg", text),
            "quick_gelu": bool(config.get("quick_gelu")),
            "loss": loss_with(["logit_scale", *(initial[key] for key in initial if config.get(key) is not None)]),
        }
        return (_swin_spec if vision["timm_model_name"] else _vit_spec)(name, vision, text, common)
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtefactError(f"open_clip config of {name}: {error}") from error


def _supported(name: str, vision: dict[str, Any]) -> dict[str, Any]:
    fields = _SWIN_FIELDS if vision.get("timm_model_name") else _VIT_FIELDS
    _refuse_others(name, "vision_cfg", vision, open_clip.model.CLIPVisionCfg, fields)
    return vision


def _vit_spec(name: str, vision: dict[str, Any], text: dict[str, Any], common: dict[str, Any]) -> ModelSpec:
    if vision["mlp_ratio"] != text["mlp_ratio"]:
        raise ArtefactError(f"open_clip config of {name}: towers of different mlp_ratio are not supported")
    return ModelSpec(
        arch="vit",
        width=vision["width"],
        depth=_integer(name, "layers", vision["layers"]),
        heads=vision["width"] // vision["head_width"],
        head_width=vision["head_width"],
        image_size=_integer(name, "image_size", vision["image_size"]),
        patch_size=_integer(name, "patch_size", vision["patch_size"]),
        mlp_ratio=float(vision["mlp_ratio"]),
        no_ln_pre=bool(vision["no_ln_pre"]),
        norm_eps=_norm_eps(name, "vision_cfg", vision),
        **common,
    )


def _swin_spec(name: str, vision: dict[str, Any], text: dict[str, Any], common: dict[str, Any]) -> ModelSpec:
    sizes = swin_sizes(vision["timm_model_name"])
    size = _integer(name, "image_size", vision["image_size"])
    if text["mlp_ratio"] != sizes["mlp_ratio"] or size != sizes["image_size"]:
        raise ArtefactError(f"open_clip config of {name}: mlp_ratio or image_size is not that of {sizes['timm_name']}")
    register_swin(sizes["timm_name"])
    return ModelSpec(**common, **sizes)


def _refuse_others(name: str, part: str, given: dict[str, Any], defaults: type, supported: tuple[str, ...]) -> None:
    default = asdict(defaults())
    for key, value in given.items():
        if key not in supported and (key not in default or value != default[key]):
            raise ArtefactError(f"open_clip config of {name}: {part}.{key} = {value} is not supported")


def _norm_eps(name: str, part: str, given: dict[str, Any]) -> float:
    """The eps in a tower's keyword arguments of LayerNorm. Raises ArtefactError for other arguments."""
    arguments = given["norm_kwargs"] or {}
    eps = arguments.get("eps", NORM_EPS) if isinstance(arguments, dict) else None
    if not isinstance(eps, int | float) or isinstance(eps, bool) or set(arguments) - {"eps"}:
        raise ArtefactError(f"open_clip config of {name}: of {part}.norm_kwargs = {arguments} only eps is supported")
    return float(eps)


def _integer(name: str, key: str, value: Any) -> int:
    if isinstance(value, (tuple, list)) and len(set(value)) == 1 and key != "layers":
        value = value[0]
    if not isinstance(value, int):
        raise ArtefactError(f"open_clip config of {name}: {key} = {value} is not supported")
    return value
