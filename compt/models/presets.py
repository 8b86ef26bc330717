"""Model sizes: the paper's ViT and Swin families (Table G) and a small family for CPUs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from compt.errors import ConfigError, nearest
from compt.models.scalars import DEFAULT_LOSS, LOSS_TRAITS, Scalar

VOCAB_SIZE = 49_408
"""Size of OpenAI CLIP's byte-pair vocabulary."""

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue that OpenAI's CLIP subtracts, of values between 0 and 1."""
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation that it divides by."""


NORM_EPS = 1e-5
"""What a LayerNorm adds to the variance, unless an expansion changed it."""
PACKED = 0
"""The number of text buckets that means packed text, which has no padding."""

MLP_RATIO = 4.0
"""Width of the hidden layer of an MLP over the width of its block, in open_clip's default."""

# Left out of written descriptions where they have their default: descriptions and hashes are older than these fields.
_OPTIONAL = ("quick_gelu", "norm_eps", "text_norm_eps", "loss")
# Fields that count something.
_COUNTS = (
    *("width", "head_width", "depth", "text_width", "text_head_width", "text_depth"),
    *("image_size", "patch_size", "context_length", "vocab_size", "embed_dim"),
)


class SwinStage(NamedTuple):
    """One stage: places along a side, channels, blocks, heads, places along the side of a window."""

    side: int
    width: int
    depth: int
    heads: int
    window: int


@dataclass(frozen=True)
class ModelSpec:
    """The full description of one CLIP model: image tower, text tower, joint embedding, learned scalars.

    For a Swin, `width` and `heads` are those of the first stage and double with each stage, `depth` is the sum of
    `depths`, and an empty `timm_name` is filled in from the sizes. Widths are in channels; `image_size` and
    `patch_size` in pixels; `window` in patches; `context_length` in tokens. `quick_gelu`: the activation of OpenAI's
    own models instead of GELU; a Swin's image tower has GELU anyway. `norm_eps`, `text_norm_eps`: what the LayerNorms
    of a ViT and of the text tower add to the variance. `loss`: the loss that the model is trained with, which decides
    its learned scalars (`LOSS_TRAITS`).

    Raises ConfigError for sizes that no model has, and for an unknown loss.
    """

    name: str
    arch: Literal["vit", "swin"]
    width: int
    depth: int
    heads: int
    text_width: int
    text_depth: int
    text_heads: int
    image_size: int = 224
    patch_size: int = 16
    context_length: int = 77
    vocab_size: int = VOCAB_SIZE
    embed_dim: int = 512
    head_width: int = 64
    text_head_width: int = 64
    mlp_ratio: float = MLP_RATIO
    depths: tuple[int, ...] = ()
    stage_heads: tuple[int, ...] = ()
    window: int = 7
    timm_name: str = ""
    no_ln_pre: bool = False
    quick_gelu: bool = False
    norm_eps: float = NORM_EPS
    text_norm_eps: float = NORM_EPS
    loss: str = DEFAULT_LOSS

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "heads", "text_heads"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"model {self.name}: {name} is {getattr(self, name)!r}; it must be a whole number")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"model {self.name}: {name} is {getattr(self, name)}; it must be at least 1")
        for tower, width, heads, head_width in (
            ("width", self.width, self.heads, self.head_width),
            ("text_width", self.text_width, self.text_heads, self.text_head_width),
        ):
            if width != heads * head_width:
                raise ConfigError(
                    f"model {self.name}: {tower} {width} is not {heads} x {head_width} (heads x head width); "
                    f"take a multiple of the head width {head_width}"
                )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model {self.name}: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        for name in ("norm_eps", "text_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model {self.name}: {name} is {getattr(self, name)}; it must be a number above 0")
        least = min(self.width, self.text_width)
        if not (math.isfinite(self.mlp_ratio) and least * self.mlp_ratio >= 1):
            raise ConfigError(f"model {self.name}: mlp_ratio is {self.mlp_ratio}; it must be at least 1 / {least}")
        if self.loss not in LOSS_TRAITS:
            raise ConfigError(
                f"model {self.name}: loss is '{self.loss}'{nearest(self.loss, LOSS_TRAITS)}; known: "
                f"{', '.join(LOSS_TRAITS)}"
            )
        if self.arch == "swin":
            self._check_swin()
            if self.timm_name not in ("", name := swin_name(self)):
                raise ConfigError(f"timm_model_name {self.timm_name}: a Swin of these sizes is called {name}")
            object.__setattr__(self, "timm_name", name)

    def _check_swin(self) -> None:
        if not self.depths or min(self.depths) < 1:
            raise ConfigError(
                f"model {self.name}: depths is {list(self.depths)}; it must be the blocks of each stage, at least 1"
            )
        if self.depth != sum(self.depths):
            raise ConfigError(
                f"model {self.name}: depth is {self.depth}; the depths {list(self.depths)} have {sum(self.depths)}"
            )
        heads = _stage_heads(self.heads, len(self.depths))
        if self.stage_heads != heads:
            raise ConfigError(
                f"model {self.name}: stage_heads is {list(self.stage_heads)}; each stage has twice the heads of the "
                f"last one: {list(heads)}"
            )
        if self.window < 1:
            raise ConfigError(f"model {self.name}: window is {self.window}; it must be at least 1")
        if self.norm_eps != NORM_EPS or self.no_ln_pre:
            given = "no_ln_pre" if self.no_ln_pre else f"norm_eps {self.norm_eps:g}"
            raise ConfigError(f"model {self.name}: {given} is for ViTs; the norms of a Swin are those of timm")

    @property
    def stage_windows(self) -> tuple[int, ...]:
        """Side of the attention windows in each stage of a Swin, in places; no window is larger than its stage."""
        return tuple(stage.window for stage in self.stages)

    @property
    def stages(self) -> list[SwinStage]:
        """The stages of a Swin: each has half as many places along a side as the last one, and twice the width."""
        sides = [math.ceil(self.image_size // self.patch_size / 2**at) for at in range(len(self.depths))]
        rows = zip(sides, self.depths, self.stage_heads, strict=True)
        return [
            SwinStage(side, self.width * 2**at, depth, heads, min(self.window, side))
            for at, (side, depth, heads) in enumerate(rows)
        ]

    @property
    def final_width(self) -> int:
        """Channels of the image tower before its projection."""
        return self.width * 2 ** (len(self.depths) - 1) if self.arch == "swin" else self.width

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """The learned scalars."""
        return LOSS_TRAITS[self.loss].scalars

    def open_clip_config(self) -> dict[str, Any]:
        """The model config from which stock open_clip builds this model.

        What has open_clip's default is left out where older versions do not know the key, and would refuse it.
        """
        vision: dict[str, Any] = {"image_size": self.image_size}
        if self.arch == "swin":
            vision |= {
                "timm_model_name": self.timm_name,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "timm_drop_path": 0.0,
            }
        else:
            vision |= {
                "layers": self.depth,
                "width": self.width,
                "head_width": self.head_width,
                "patch_size": self.patch_size,
                "mlp_ratio": self.mlp_ratio,
            }
            if self.no_ln_pre:
                vision["no_ln_pre"] = True
            if self.norm_eps != NORM_EPS:
                vision["norm_kwargs"] = {"eps": self.norm_eps}
        text: dict[str, Any] = {
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "width": self.text_width,
            "heads": self.text_heads,
            "layers": self.text_depth,
        }
        if self.mlp_ratio != MLP_RATIO:
            text["mlp_ratio"] = self.mlp_ratio
        if self.text_norm_eps != NORM_EPS:
            text["norm_kwargs"] = {"eps": self.text_norm_eps}
        activation = {"quick_gelu": True} if self.quick_gelu else {}
        # open_clip gives a model a logit_bias where its config says what it starts from.
        usual = LOSS_TRAITS[DEFAULT_LOSS].scalars[0].initial
        initial = {f"init_{one.name}": one.initial for one in self.scalars if one.initial != usual}
        return {"embed_dim": self.embed_dim, **activation, **initial, "vision_cfg": vision, "text_cfg": text}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for manifests; `from_dict` reads them back."""
        default = {field.name: field.default for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key not in _OPTIONAL or value != default[key]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The model that `to_dict` described. Raises ConfigError, or TypeError for an unknown field."""
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)


def _vit(name: str, image: tuple[int, int], text: tuple[int, int], **other: Any) -> ModelSpec:
    head = other.get("head_width", 64)
    text_head = other.get("text_head_width", 64)
    return ModelSpec(
        name=name,
        arch="vit",
        width=image[0],
        depth=image[1],
        heads=image[0] // head,
        text_width=text[0],
        text_depth=text[1],
        text_heads=text[0] // text_head,
        **other,
    )


_small = partial(_vit, image_size=32, patch_size=8, context_length=32, embed_dim=128, head_width=32, text_head_width=32)


# timm's own Swins: width, depths, window, image_size.
_TIMM_SWINS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    f"swin_{size}_patch4_window{window}_{pixels}": (width, (2, 2, third, 2), window, pixels)
    for size, width, third, resolutions in (
        ("tiny", 96, 6, ((7, 224),)),
        ("small", 96, 18, ((7, 224),)),
        ("base", 128, 18, ((7, 224), (12, 384))),
        ("large", 192, 18, ((7, 224), (12, 384))),
    )
    for window, pixels in resolutions
}
_OWN_SWIN = re.compile(
    r"compt_swin_w(?P<width>\d+)_d(?P<depths>\d+(-\d+)*)_h(?P<head_width>\d+)_p(?P<patch_size>\d+)_win(?P<window>\d+)"
    r"(_mlp(?P<mlp_ratio>\d+(p\d+)?))?_(?P<image_size>\d+)"
)


def _stage_heads(heads: int, stages: int) -> tuple[int, ...]:
    return tuple(heads * 2**stage for stage in range(stages))


def swin_name(spec: ModelSpec) -> str:
    """The name of a Swin's image tower in timm's registry: timm's own, or one that spells out all sizes.

    `compt_swin_w112_d2-2-8-2_h16_p4_win7_mlp2p5_224`: width, depths, head width, patch size, window, mlp_ratio (left
    out where it is 4), image size. `swin_sizes` reads the name; `compt.models.swin.register_swin` registers it.
    """
    usual = spec.head_width == 32 and spec.patch_size == 4 and spec.mlp_ratio == 4
    for name, sizes in _TIMM_SWINS.items():
        if usual and sizes == (spec.width, spec.depths, spec.window, spec.image_size):
            return name
    depths = "-".join(map(str, spec.depths))
    # timm would take what follows a dot for the tag of pretrained weights.
    ratio = "" if spec.mlp_ratio == 4 else f"_mlp{float(spec.mlp_ratio)!r}".removesuffix(".0").replace(".", "p")
    return (
        f"compt_swin_w{spec.width}_d{depths}_h{spec.head_width}_p{spec.patch_size}_win{spec.window}{ratio}"
        f"_{spec.image_size}"
    )


def is_own_swin(name: str) -> bool:
    """Whether timm knows `name` only after `compt.models.swin.register_swin(name)`."""
    return _OWN_SWIN.fullmatch(name) is not None


def swin_sizes(name: str) -> dict[str, Any]:
    """The fields of ModelSpec that belong to the image tower called `name` in timm's registry.

    Raises ConfigError unless `name` is one of timm's Swins that compt has, or a name made by `swin_name`.
    """
    values: dict[str, Any] = {"head_width": 32, "patch_size": 4, "mlp_ratio": 4.0}
    own = _OWN_SWIN.fullmatch(name)
    if own:
        found = {key: value for key, value in own.groupdict().items() if value is not None}
        values["depths"] = tuple(int(depth) for depth in found.pop("depths").split("-"))
        values["mlp_ratio"] = float(found.pop("mlp_ratio", "4").replace("p", "."))
        values |= {key: int(value) for key, value in found.items()}
    elif name in _TIMM_SWINS:
        values |= dict(zip(("width", "depths", "window", "image_size"), _TIMM_SWINS[name], strict=True))
    else:
        raise ConfigError(f"timm_model_name {name} is not supported{nearest(name, _TIMM_SWINS)}")
    heads = values["width"] // max(1, values["head_width"])
    values |= {"arch": "swin", "depth": sum(values["depths"]), "heads": heads, "timm_name": name}
    values["stage_heads"] = _stage_heads(heads, len(values["depths"]))
    ModelSpec(name=name, text_width=64, text_depth=1, text_heads=1, **values)  # refuses what no Swin has
    return values


def _swin(timm_name: str, text_width: int) -> ModelSpec:
    size, pixels = timm_name.split("_")[1], timm_name.rpartition("_")[2]
    return ModelSpec(
        name=f"swin_{size[0]}{'' if pixels == '224' else pixels}",
        text_width=text_width,
        text_depth=12,
        text_heads=text_width // 64,
        **swin_sizes(timm_name),
    )


PRESETS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _vit("vit_t16", (192, 12), (256, 12)),
        _vit("vit_c16", (256, 12), (320, 12)),
        _vit("vit_s16", (384, 12), (384, 12)),
        _vit("vit_m16", (512, 12), (448, 12)),
        _vit("vit_b16", (768, 12), (512, 12)),
        _vit("vit_xb16", (1024, 12), (512, 12)),
        _vit("vit_l16", (1024, 24), (768, 12)),
        _swin("swin_tiny_patch4_window7_224", 256),
        _swin("swin_small_patch4_window7_224", 384),
        _swin("swin_base_patch4_window7_224", 512),
        _swin("swin_large_patch4_window7_224", 768),
        _swin("swin_base_patch4_window12_384", 512),
        _swin("swin_large_patch4_window12_384", 768),
        _small("vit_pico", (32, 2), (32, 1)),
        _small("vit_nano", (64, 4), (64, 2)),
        _small("vit_micro", (96, 4), (96, 2)),
        _small("vit_mini", (128, 4), (128, 2)),
        _small("vit_midi", (192, 6), (192, 3)),
        _small("vit_maxi", (256, 8), (256, 4)),
    )
}


def mlp_ratio_of(*towers: tuple[int, int]) -> float:
    """The `mlp_ratio` of a model whose towers have these widths and hidden sizes.

    Raises ValueError if no ratio gives all hidden sizes. A spec cuts width x ratio to a whole number, so the ratio lies
    at the upper end of what fits: the largest quotient, or one step above it where the product is rounded down.
    """
    ratio = max(hidden / width for width, hidden in towers)
    if any(int(width * ratio) < hidden for width, hidden in towers):
        ratio = math.nextafter(ratio, math.inf)
    if any(int(width * ratio) != hidden for width, hidden in towers):
        found = sorted({hidden / width for width, hidden in towers})
        raise ValueError(f"towers of different MLP width / width ({found}) are not supported")
    return ratio


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The preset `name` with fields replaced by `resized`. Raises ConfigError, also for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model '{name}'{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return resized(PRESETS[name], overrides or {})


def resized(spec: ModelSpec, overrides: Mapping[str, Any]) -> ModelSpec:
    """A model with fields replaced. Raises ConfigError for an impossible size.

    A changed width changes the number of heads, unless the heads are given too. The depth of a Swin follows from its
    `depths`, the heads of its stages and its timm name from its sizes.
    """
    values = dict(overrides)
    for width, heads, head_width in (("width", "heads", "head_width"), ("text_width", "text_heads", "text_head_width")):
        if (width in values or head_width in values) and heads not in values:
            size, of = (values.get(key, getattr(spec, key)) for key in (width, head_width))
            values[heads] = size // of
    if spec.arch == "swin":
        depths = tuple(values.get("depths", spec.depths))
        stage_heads = _stage_heads(values.get("heads", spec.heads), len(depths))
        values |= {"depths": depths, "depth": sum(depths), "stage_heads": stage_heads, "timm_name": ""}
    return replace(spec, **values)
