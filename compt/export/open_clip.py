"""Folders of stock open_clip: version 3 opens them as `local-dir:`, versions from 2.16 on by two of their files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import HF_WEIGHTS_NAME

from compt.files import disk_errors, write_json
from compt.models.preprocess import AS_OPENAI
from compt.models.presets import ModelSpec, is_own_swin
from compt.weights.artefact import CONFIG, HF_PIXELS, OPEN_CLIP_WEIGHTS, Artefact, expected_shapes
from compt.weights.safetensors import write_tensors

# The first version whose configs have a key, of those between 2.16 and 2.32 that were tried; all have the others.
_SINCE = {
    "init_logit_bias": "2.22",
    **dict.fromkeys(("norm_kwargs", "no_ln_pre", "mlp_ratio of text_cfg"), "2.23"),
    **dict.fromkeys(("image_interpolation", "image_resize_mode"), "2.23"),
}


def write(source: Artefact, folder: Path) -> list[str]:
    """Weights as safetensors and for versions below 2.28 as a pickle, open_clip's config, and that of older versions.

    Reads one tensor at a time for safetensors, and holds all of them for the pickle. Where transformers'
    CLIPImageProcessor can prepare the model's images, its config is beside them.
    """
    spec, size = source.spec, source.spec.image_size
    shapes = expected_shapes(source.state, spec)
    write_tensors(folder / OPEN_CLIP_WEIGHTS, source.state, shapes, {"format": "pt"})
    with disk_errors(folder / HF_WEIGHTS_NAME):
        torch.save({name: source.state[name].reshape(shapes[name]) for name in shapes}, folder / HF_WEIGHTS_NAME)
    config = spec.open_clip_config()
    write_json(folder / CONFIG, {"model_cfg": config, "preprocess_cfg": source.preprocess.to_dict(size)})
    # Older versions read a model only from their registry: a bare config, found by the name of its file.
    old = "compt-" + re.sub(r"[^A-Za-z0-9._-]", "_", spec.name)
    write_json(folder / f"{old}.json", config)
    processor = source.preprocess.to_hugging_face(size)
    if processor is not None:
        write_json(folder / HF_PIXELS, processor)
    return [*_swin(spec), _older(source, config, old)]


def _swin(spec: ModelSpec) -> list[str]:
    if not is_own_swin(spec.timm_name):
        return []
    register = f'from compt.models import register_swin; register_swin("{spec.timm_name}")'
    return [f"timm has no Swin of these sizes: before open_clip loads it, call `{register}`."]


def _older(source: Artefact, config: dict[str, Any], name: str) -> str:
    """How versions from 2.16 on load the folder."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    keys = {*config, *vision, *text} - {"mlp_ratio"} | ({"mlp_ratio of text_cfg"} if "mlp_ratio" in text else set())
    images = source.preprocess
    load = f'open_clip.create_model_and_transforms("{name}", pretrained="FOLDER/{HF_WEIGHTS_NAME}"'
    if (images.mean, images.std) != (AS_OPENAI.mean, AS_OPENAI.std):
        load += f", image_mean={images.mean}, image_std={images.std}"
    resized = {"image_interpolation": images.interpolation, "image_resize_mode": images.resize_mode}
    if (images.interpolation, images.resize_mode) != (AS_OPENAI.interpolation, AS_OPENAI.resize_mode):
        load += "".join(f', {key}="{value}"' for key, value in resized.items())
        keys |= resized.keys()
    since = max((_SINCE[key] for key in keys & _SINCE.keys()), default="2.16")
    note = f'open_clip {since} to 2.32: `open_clip.add_model_config("FOLDER/{name}.json")`, then `{load})`'
    if source.spec.context_length != 77:
        note += f"; its tokenizer needs `context_length={source.spec.context_length}`"
    return f"{note}."
