"""The model that weights belong to, found from their shapes, and the comparison of shapes with a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any

import open_clip

from compt.errors import ArtefactError, ConfigError, first_line, nearest
from compt.models.clip import exported_shapes
from compt.models.growth import disagreeing
from compt.models.open_clip_config import spec_from_open_clip
from compt.models.presets import PRESETS, ModelSpec, mlp_ratio_of, resized
from compt.recipe.schema import checked_sizes
from compt.weights.lazy import FLOATS, View, Weights
from compt.weights.names import OPENAI_SIZES

HEAD_WIDTH = 64
_FLOATS = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)


def model_spec(name: str) -> ModelSpec:
    """The model of this name: a preset of compt or a model config of open_clip. Raises ConfigError."""
    if name in PRESETS:
        return PRESETS[name]
    known = open_clip.list_models()
    if name not in known:
        raise ConfigError(
            f"unknown model '{name}'{nearest(name, [*PRESETS, *known])}; name a preset ({', '.join(PRESETS)}) "
            "or a model config of open_clip"
        )
    try:
        return spec_from_open_clip(open_clip.get_model_config(name) or {}, name)
    except ArtefactError as error:
        raise ConfigError(str(error)) from error


def sizes_for(spec: ModelSpec, sizes: Mapping[str, Any], option: str = "") -> dict[str, Any]:
    """Checked fields to replace in a model. Raises ConfigError, which begins with `option`."""
    try:
        return checked_sizes("swin_t" if spec.arch == "swin" else "vit_b16", dict(sizes))
    except ConfigError as error:
        raise ConfigError(f"{option}{error}") from None


def student_of(
    teacher: ModelSpec, name: str, sizes: Mapping[str, Any], option: str = ""
) -> tuple[ModelSpec, dict[str, Any]]:
    """The student called `name` with `sizes`, and the sizes that it takes over from the teacher.

    Unless set, it takes over what must agree (activation, head widths, ln_pre), and the image, window, context and
    vocabulary sizes that would shrink. Raises ConfigError, which begins with `option` where it is about a size.
    """
    base = teacher if name == teacher.name else model_spec(name)
    values = sizes_for(base, sizes, option)
    alike = base.arch == teacher.arch
    names = disagreeing(teacher, base)
    shrinking = ("context_length", "vocab_size", *(("window",) if alike and base.arch == "swin" else ()))
    names += [key for key in shrinking if getattr(base, key) < getattr(teacher, key)]
    image = ("image_size", "patch_size")
    sides = [spec.image_size // spec.patch_size for spec in (base, teacher)]
    if alike and not any(key in values for key in image) and sides[0] < sides[1]:
        names += [key for key in image if getattr(base, key) != getattr(teacher, key)]
    taken = {key: getattr(teacher, key) for key in names if key not in values}
    return resized(base, {**taken, **values}), taken


def infer_spec(view: View, leftover: Collection[str], name: str, option: str) -> ModelSpec:
    """The model whose parameters have these shapes, with heads of 64 channels; called `name` unless it is a known one.

    Shapes do not determine the number of heads, the activation or a LayerNorm's eps. Raises ArtefactError, which names
    `option`, where the width allows no heads of 64, where a known model of the same shapes has other heads, and for a
    Swin that is no preset.
    """
    hint = f"name the model with {option}"
    try:
        spec = (_swin if "visual.trunk.patch_embed.proj.weight" in view else _vit)(view, name, hint)
    except (KeyError, IndexError, ZeroDivisionError, ConfigError, ValueError) as error:
        missing = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtefactError(f"{name}: the shapes are those of no model ({missing}); {hint}") from error
    for other in _known():
        if _sizes(other) == _sizes(spec) and (other.heads, other.text_heads) != (spec.heads, spec.text_heads):
            raise ArtefactError(
                f"{name}: the shapes are those of {other.name} (heads of {other.head_width} and {other.text_head_width}"
                f" channels), but also of a model with heads of {HEAD_WIDTH}; {hint}"
            )
    spec = replace(spec, quick_gelu=set(leftover) >= OPENAI_SIZES)
    return next((other for other in _known() if other == replace(spec, name=other.name)), spec)


def compare(view: Weights, spec: ModelSpec, where: str) -> None:
    """Raise ArtefactError unless `view` fits the model; the error lists every parameter that does not.

    Weights are fp16, bf16, fp32 or fp64. Reads no tensor.
    """
    wanted = _shapes(spec, len(view), where)
    found: dict[str, list[str]] = {"missing": [], "unexpected": [], "of another shape": [], "of another dtype": []}
    for name, shape in wanted.items():
        if name not in view:
            found["missing"].append(f"{name} {list(shape)}")
            continue
        if view.shape(name) != shape:
            found["of another shape"].append(f"{name} {list(view.shape(name))}, the model has {list(shape)}")
        if (dtype := view.dtype(name)) not in FLOATS:
            found["of another dtype"].append(f"{name} {str(dtype).removeprefix('torch.')}, weights are {_FLOATS}")
    found["unexpected"] += [f"{name} {list(view.shape(name))}" for name in view if name not in wanted]
    lines = [f"  {what}: {entry}" for what, entries in found.items() for entry in entries]
    if lines:
        counts = ", ".join(f"{len(entries)} {what}" for what, entries in found.items() if entries)
        head = f"{where}: the weights are not those of this model, {spec.name}: {counts}"
        raise ArtefactError("\n".join([head, *lines]))


def _shapes(spec: ModelSpec, parameters: int, where: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a model. Sizes come from a file and may be absurd: `parameters` is how many the file holds."""
    layers = spec.depth + spec.text_depth
    if layers > parameters:
        raise ArtefactError(f"{where}: {spec.name} has {layers} layers, the weights only {parameters} parameters")
    try:
        return exported_shapes(spec)
    except (RuntimeError, TypeError, OverflowError) as error:  # torch cannot count to such sizes
        raise ArtefactError(f"{where}: {spec.name} has sizes that no model has ({first_line(error)})") from error


def _vit(view: View, name: str, hint: str) -> ModelSpec:
    width, _, patch, _ = view.shape("visual.conv1.weight")
    tokens = view.shape("visual.positional_embedding")[0]
    grid = math.isqrt(tokens - 1)
    if grid * grid != tokens - 1:
        raise ValueError(f"visual.positional_embedding has {tokens} positions, not a square and one")
    return ModelSpec(
        arch="vit",
        width=width,
        depth=_layers(view, "visual.transformer.resblocks."),
        heads=_heads(width, "image", hint),
        image_size=grid * patch,
        patch_size=patch,
        mlp_ratio=mlp_ratio_of((width, view.shape("visual.transformer.resblocks.0.mlp.c_fc.weight")[0])),
        embed_dim=view.shape("visual.proj")[1],
        no_ln_pre="visual.ln_pre.weight" not in view,
        **_text(view, name, hint),
    )


def _swin(view: View, name: str, hint: str) -> ModelSpec:
    """The preset with these stages: shapes determine neither the image size nor the shift of windows."""
    width = view.shape("visual.trunk.patch_embed.proj.weight")[0]
    depths = tuple(
        _layers(view, f"visual.trunk.layers.{stage}.blocks.") for stage in range(_layers(view, "visual.trunk.layers."))
    )
    table = view.shape("visual.trunk.layers.0.blocks.0.attn.relative_position_bias_table")[0]
    for preset in PRESETS.values():
        if (preset.width, preset.depths, (2 * preset.window - 1) ** 2) == (width, depths, table):
            text = _text(view, name, hint)
            return replace(preset, embed_dim=view.shape("visual.head.proj.weight")[0], **text)
    raise ValueError(f"a Swin of width {width} with stages of {depths} blocks is not a preset")


def _text(view: View, name: str, hint: str) -> dict[str, Any]:
    context, width = view.shape("positional_embedding")
    return {
        "name": name,
        "text_width": width,
        "text_depth": _layers(view, "transformer.resblocks."),
        "text_heads": _heads(width, "text", hint),
        "context_length": context,
        "vocab_size": view.shape("token_embedding.weight")[0],
    }


def _heads(width: int, tower: str, hint: str) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(f"the {tower} width {width} is not a multiple of {HEAD_WIDTH}, the usual width of a head")
    return width // HEAD_WIDTH


def _layers(view: View, start: str) -> int:
    numbers = {int(key[len(start) :].partition(".")[0]) for key in view if key.startswith(start)}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ValueError(f"{start}* are not numbered from 0 on")
    return len(numbers)


@cache
def _known() -> tuple[ModelSpec, ...]:
    return (*PRESETS.values(), *_open_clips())


def _open_clips() -> Iterator[ModelSpec]:
    for name in open_clip.list_models():
        try:
            yield model_spec(name)
        except ConfigError:
            continue


def _sizes(spec: ModelSpec) -> tuple[Any, ...]:
    """The fields that determine the shapes of all parameters."""
    apart = ("name", "heads", "head_width", "text_heads", "text_head_width", "quick_gelu", "norm_eps", "text_norm_eps")
    return tuple(getattr(spec, field.name) for field in fields(spec) if field.name not in apart)
