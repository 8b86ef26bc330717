"""Reading open_clip's model configs into ModelSpecs: each setting is honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import open_clip.model

from compt.errors import ArtefactError, ConfigError
from compt.models.presets import NORM_EPS, ModelSpec, swin_sizes
from compt.models.scalars import SCALAR_NAMES, loss_with
from compt.models.swin import register_swin

# What each of them becomes in a ModelSpec, or why it changes nothing, is in docs/checkpoints.md.
HONOURED: dict[str, tuple[str, ...]] = {
    "model_cfg": (
        *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"),
        # Other names of the same parameters, other shapes of scalars, another form of what forward returns.
        *("custom_text", "nonscalar_logit_scale", "output_dict"),
    ),
    "text_cfg": (
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"),
        # These act only with settings that are refused.
        *("pad_id", "eos_id", "tokenizer_mode", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    ),
    "vision_cfg of a ViT": (
        *("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "no_ln_pre", "norm_kwargs"),
        # The first acts in training only, the others with attentional_pool only.
        *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads"),
    ),
    "vision_cfg of a Swin": (
        *("timm_model_name", "image_size", "timm_pool", "timm_model_pretrained", "timm_drop", "timm_drop_path"),
    ),
}
"""Every setting of open_clip that a model may change. A setting that is not here has to have open_clip's default."""

# What a refused setting has to be, where open_clip's default alone would explain too little.
_RIGHT = {
    "multimodal_cfg": "left out; models that write captions are not supported",
    "vision_cfg.layers": "a whole number, the depth of a ViT; ResNets are not supported",
    "text_cfg.hf_model_name": "left out; the text tower is open_clip's own transformer",
    "text_cfg.hf_tokenizer_name": "left out; text is read with the vocabulary of OpenAI's CLIP",
}


def spec_from_open_clip(config: Mapping[str, Any], name: str = "model") -> ModelSpec:
    """The ModelSpec of an open_clip model config, bare or under "model_cfg".

    Registers the Swin of a config that compt wrote with timm, so that stock open_clip can build it too. Raises
    ArtefactError, which names the settings that compt's models do not have, with what would be right.
    """
    config = config.get("model_cfg", config)
    try:
        vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
        embed_dim = int(config["embed_dim"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtefactError(f"open_clip config of {name}: embed_dim, vision_cfg and text_cfg are needed") from error
    try:
        refused = list(_refused(config, vision, text))
        if refused:
            key, value, right = refused[0]
            more = f"; not supported either: {', '.join(key for key, _, _ in refused[1:])}" if refused[1:] else ""
            raise ArtefactError(
                f"open_clip config of {name}: {key} = {value} is not supported; it must be {right}{more}"
            )
        vision = asdict(open_clip.model.CLIPVisionCfg()) | vision
        text = asdict(open_clip.model.CLIPTextCfg()) | text
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
            "loss": _loss(config),
        }
        return (_swin_spec if vision["timm_model_name"] else _vit_spec)(name, vision, text, common)
    except (ConfigError, TypeError, ValueError, ArithmeticError) as error:
        raise ArtefactError(f"open_clip config of {name}: {error}") from error


def _refused(
    config: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
    """Settings that compt's models do not have: name, value, what would be right."""
    timm = vision.get("timm_model_name")
    try:
        swin_sizes(str(timm or "swin_tiny_patch4_window7_224"))
    except ConfigError as error:
        why = f" ({error})" if "swin" in str(timm) else ""
        yield "vision_cfg.timm_model_name", timm, f"a Swin, such as swin_tiny_patch4_window7_224{why}"
        return  # the other settings depend on the image tower
    vision_kind = "vision_cfg of a Swin" if timm else "vision_cfg of a ViT"
    parts: tuple[tuple[str, str, Mapping[str, Any], Mapping[str, Any]], ...] = (
        ("", "model_cfg", config, {}),
        ("vision_cfg.", vision_kind, vision, asdict(open_clip.model.CLIPVisionCfg())),
        ("text_cfg.", "text_cfg", text, asdict(open_clip.model.CLIPTextCfg())),
    )
    for prefix, kind, given, defaults in parts:
        for key, value in given.items():
            default = defaults.get(key)
            same = value == default if key in defaults else not (prefix or value)
            if key not in HONOURED[kind] and not same:
                right = f"{default!r}, or left out" if key in defaults else "left out; compt does not know it"
                yield prefix + key, value, _RIGHT.get(prefix + key, right)
    if not timm and not isinstance(vision.get("layers", 0), int):
        yield "vision_cfg.layers", vision["layers"], _RIGHT["vision_cfg.layers"]
    if timm and vision.get("timm_pool", "avg") not in ("avg", ""):
        yield "vision_cfg.timm_pool", vision["timm_pool"], "'avg' or empty"


def _loss(config: Mapping[str, Any]) -> str:
    initial = {scalar: config.get(f"init_{scalar}") for scalar in SCALAR_NAMES}
    given = {scalar: value for scalar, value in initial.items() if value is not None}
    return loss_with({"logit_scale", *given}, given)


def _vit_spec(name: str, vision: dict[str, Any], text: dict[str, Any], common: dict[str, Any]) -> ModelSpec:
    if vision["mlp_ratio"] != text["mlp_ratio"]:
        raise ArtefactError(
            f"open_clip config of {name}: vision_cfg.mlp_ratio = {vision['mlp_ratio']} and text_cfg.mlp_ratio = "
            f"{text['mlp_ratio']}; compt's models have one mlp_ratio for both towers"
        )
    return ModelSpec(
        arch="vit",
        width=vision["width"],
        depth=vision["layers"],
        heads=vision["width"] // vision["head_width"],
        head_width=vision["head_width"],
        image_size=_square(name, vision["image_size"]),
        patch_size=vision["patch_size"],
        mlp_ratio=float(vision["mlp_ratio"]),
        no_ln_pre=bool(vision["no_ln_pre"]),
        norm_eps=_norm_eps(name, "vision_cfg", vision),
        **common,
    )


def _swin_spec(name: str, vision: dict[str, Any], text: dict[str, Any], common: dict[str, Any]) -> ModelSpec:
    sizes = swin_sizes(vision["timm_model_name"])
    image_size = _square(name, vision["image_size"])
    for key, value, right in (
        ("text_cfg.mlp_ratio", text["mlp_ratio"], sizes["mlp_ratio"]),
        ("vision_cfg.image_size", image_size, sizes["image_size"]),
    ):
        if value != right:
            raise ArtefactError(
                f"open_clip config of {name}: {key} = {value}; it must be {right}, that of {sizes['timm_name']}"
            )
    register_swin(sizes["timm_name"])
    return ModelSpec(**common, **sizes)


def _norm_eps(name: str, part: str, given: dict[str, Any]) -> float:
    """The eps in a tower's keyword arguments of LayerNorm. Raises ArtefactError for other arguments."""
    arguments = given["norm_kwargs"] or {}
    eps = arguments.get("eps", NORM_EPS) if isinstance(arguments, dict) else None
    if not isinstance(eps, int | float) or isinstance(eps, bool) or set(arguments) - {"eps"}:
        raise ArtefactError(f"open_clip config of {name}: of {part}.norm_kwargs = {arguments} only eps is supported")
    return float(eps)


def _square(name: str, value: Any) -> int:
    side = value[0] if isinstance(value, tuple | list) and len(set(value)) == 1 else value
    if not isinstance(side, int):
        raise ArtefactError(
            f"open_clip config of {name}: vision_cfg.image_size = {value} is not supported; images must be square"
        )
    return side
