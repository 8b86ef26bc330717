"""Folders of timm: the image tower alone, with the projection as its classifier."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compt.errors import ArtefactError
from compt.files import write_json
from compt.models.preprocess import Preprocess
from compt.models.presets import NORM_EPS, ModelSpec
from compt.weights.artefact import Artefact
from compt.weights.lazy import TensorSource, View, Weights
from compt.weights.safetensors import write_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_CROPS = {"shortest": "center", "longest": "border", "squash": "squash"}
# Parts of a name below `visual.`, and timm's.
_VIT = (
    (r"conv1\.", "patch_embed.proj."),
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"ln_pre\.", "norm_pre."),
    (r"ln_post\.", "norm."),
    (r"transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_", ".norm"),
    (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


def write(source: Artefact, folder: Path) -> list[str]:
    """The weights of the image tower, and a config with all of its sizes. Reads one tensor at a time.

    Raises ArtefactError for an eps of the LayerNorms that timm's configs cannot say.
    """
    spec = source.spec
    if spec.arch == "vit" and spec.norm_eps != NORM_EPS:
        raise ArtefactError(
            f"{source.path}: timm's configs cannot be this model: its LayerNorms add {spec.norm_eps:g} to the "
            f"variance, and a config can only say {NORM_EPS:g}"
        )
    view = (_swin_view if spec.arch == "swin" else _vit_view)(source.state, spec)
    write_tensors(folder / WEIGHTS, view, {name: view.shape(name) for name in view}, {"format": "pt"})
    write_json(folder / CONFIG, timm_config(spec, source.preprocess))
    features = "`model.forward_head(model.forward_features(images), pre_logits=True)`"
    return [f"`model(images)` gives the image features of the joint embedding, {features} those before the projection."]


def timm_config(spec: ModelSpec, preprocess: Preprocess) -> dict[str, Any]:
    """The config.json of an image tower: an architecture of timm, with every size in `model_args`."""
    arguments: dict[str, Any] = {"img_size": spec.image_size, "patch_size": spec.patch_size, "embed_dim": spec.width}
    arguments["mlp_ratio"] = spec.mlp_ratio
    if spec.arch == "swin":
        arch, classifier = "swin_tiny_patch4_window7_224", "head.fc"
        arguments |= {"depths": list(spec.depths), "num_heads": list(spec.stage_heads), "window_size": spec.window}
    else:
        arch, classifier = f"vit_base_patch16_clip_{'quickgelu_' if spec.quick_gelu else ''}224", "head"
        arguments |= {"depth": spec.depth, "num_heads": spec.heads, "pre_norm": not spec.no_ln_pre}
    size = [3, spec.image_size, spec.image_size]
    described = {
        "input_size": size,
        "fixed_input_size": True,
        "interpolation": preprocess.interpolation,
        "crop_pct": 1.0,
        "crop_mode": _CROPS[preprocess.resize_mode],
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_classes": spec.embed_dim,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": classifier,
    }
    return {
        "architecture": arch,
        "num_classes": spec.embed_dim,
        "num_features": spec.final_width,
        "global_pool": "avg" if spec.arch == "swin" else "token",
        "model_args": arguments,
        "pretrained_cfg": described,
    }


def _vit_view(state: Weights, spec: ModelSpec) -> View:
    parts: dict[str, TensorSource] = {}
    for name in state:
        if not name.startswith("visual."):
            continue
        shape, theirs = tuple(state.shape(name)), name.removeprefix("visual.")
        if theirs == "proj":
            parts["head.weight"] = TensorSource((name,), shape[::-1], "transpose")
            continue
        for ours, new in _VIT:
            theirs = re.sub(ours, new, theirs)
        front = {"cls_token": (1, 1), "pos_embed": (1,)}.get(theirs, ())
        parts[theirs] = TensorSource((name,), (*front, *shape), "reshape" if front else "same")
    biases = {"head.bias": ("visual.proj", spec.embed_dim)}
    if spec.no_ln_pre:  # timm leaves the bias of the patches out only where a norm follows
        biases["patch_embed.proj.bias"] = ("visual.conv1.weight", spec.width)
    return View(state, parts | _zeros(biases))


def _swin_view(state: Weights, spec: ModelSpec) -> View:
    parts = {
        name.removeprefix("visual.trunk."): TensorSource((name,), tuple(state.shape(name)))
        for name in state
        if name.startswith("visual.trunk.")
    }
    head = "visual.head.proj.weight"
    parts["head.fc.weight"] = TensorSource((head,), tuple(state.shape(head)))
    return View(state, parts | _zeros({"head.fc.bias": (head, spec.embed_dim)}))


def _zeros(biases: dict[str, tuple[str, int]]) -> dict[str, TensorSource]:
    return {name: TensorSource((like,), (size,), "zeros") for name, (like, size) in biases.items()}
