"""Model sizes: the paper's ViT and Swin families (Table G) and a small family for CPUs. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from compt.errors import ConfigError, nearest

VOCAB_SIZE = 49_408
"""Size of OpenAI CLIP's byte-pair vocabulary."""

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue that OpenAI's CLIP subtracts, of values between 0 and 1."""
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation that it divides by."""


NORM_EPS = 1e-5
"""What a LayerNorm adds to the variance, unless an expansion changed it."""

# Left out of written descriptions where they have their default, so that the hash of a model without them stays.
_OPTIONAL = ("quick_gelu", "norm_eps", "text_norm_eps")


@dataclass(frozen=True)
class ModelSpec:
    """The full description of one CLIP model: image tower, text tower, joint embedding.

    For a Swin, `width` is that of the first stage, `depth` the sum of `depths`, and `heads` those of the first stage.
    Widths are in channels; `image_size` and `patch_size` in pixels; `context_length` in tokens. `quick_gelu`: the
    activation of OpenAI's own models instead of GELU. `norm_eps`: what the LayerNorms of a ViT add to the variance.
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
    mlp_ratio: float = 4.0
    depths: tuple[int, ...] = ()
    stage_heads: tuple[int, ...] = ()
    window: int = 7
    timm_name: str = ""
    no_ln_pre: bool = False
    quick_gelu: bool = False
    norm_eps: float = NORM_EPS
    text_norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        for tower, width, heads, head_width in (
            ("width", self.width, self.heads, self.head_width),
            ("text_width", self.text_width, self.text_heads, self.text_head_width),
        ):
            if width != heads * head_width:
                raise ConfigError(
                    f"model {self.name}: {tower} {width} is not {heads} heads of {head_width}; "
                    f"take a multiple of the head width {head_width}"
                )
        for name in ("image_size", "patch_size", "depth", "text_depth", "context_length", "vocab_size", "embed_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model {self.name}: {name} is {getattr(self, name)}; it must be at least 1")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model {self.name}: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def final_width(self) -> int:
        """Channels that leave the image tower before its projection."""
        return self.width * 2 ** (len(self.depths) - 1) if self.arch == "swin" else self.width

    def open_clip_config(self) -> dict[str, Any]:
        """The model config that stock open_clip builds this model from."""
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
                "no_ln_pre": self.no_ln_pre,
            }
            if self.norm_eps != NORM_EPS:
                vision["norm_kwargs"] = {"eps": self.norm_eps}
        text: dict[str, Any] = {
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "width": self.text_width,
            "heads": self.text_heads,
            "layers": self.text_depth,
            "mlp_ratio": self.mlp_ratio,
        }
        if self.text_norm_eps != NORM_EPS:
            text["norm_kwargs"] = {"eps": self.text_norm_eps}
        activation = {"quick_gelu": True} if self.quick_gelu else {}
        return {"embed_dim": self.embed_dim, **activation, "vision_cfg": vision, "text_cfg": text}

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
        """The inverse of `to_dict`. Raises ConfigError on an unknown field."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"model description: unknown field '{key}'{nearest(key, known)}")
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


def _small(name: str, image: tuple[int, int], text: tuple[int, int]) -> ModelSpec:
    return _vit(
        name,
        image,
        text,
        image_size=32,
        patch_size=8,
        context_length=32,
        embed_dim=128,
        head_width=32,
        text_head_width=32,
    )


def _swin(size: str, width: int, depths: tuple[int, ...], text_width: int) -> ModelSpec:
    heads = tuple(width // 32 * 2**stage for stage in range(len(depths)))
    return ModelSpec(
        name=f"swin_{size[0]}",
        arch="swin",
        width=width,
        depth=sum(depths),
        heads=heads[0],
        text_width=text_width,
        text_depth=12,
        text_heads=text_width // 64,
        patch_size=4,
        head_width=32,
        depths=depths,
        stage_heads=heads,
        timm_name=f"swin_{size}_patch4_window7_224",
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
        _swin("tiny", 96, (2, 2, 6, 2), 256),
        _swin("small", 96, (2, 2, 18, 2), 384),
        _swin("base", 128, (2, 2, 18, 2), 512),
        _swin("large", 192, (2, 2, 18, 2), 768),
        _small("vit_pico", (32, 2), (32, 1)),
        _small("vit_nano", (64, 4), (64, 2)),
        _small("vit_micro", (96, 4), (96, 2)),
        _small("vit_mini", (128, 4), (128, 2)),
        _small("vit_midi", (192, 6), (192, 3)),
        _small("vit_maxi", (256, 8), (256, 4)),
    )
}


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The preset `name` with fields replaced. Raises ConfigError for an unknown name or field, or an impossible size.

    A changed width changes the number of heads with it, unless the heads are given too.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown model '{name}'{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    spec = PRESETS[name]
    values = dict(overrides or {})
    known = {field.name for field in fields(ModelSpec)}
    for key in values:
        if key not in known:
            raise ConfigError(f"model {name}: unknown field '{key}'{nearest(key, known)}")
    for width, heads, head_width in (("width", "heads", "head_width"), ("text_width", "text_heads", "text_head_width")):
        if (width in values or head_width in values) and heads not in values:
            size, of = values.get(width, getattr(spec, width)), values.get(head_width, getattr(spec, head_width))
            if of < 1 or size % of:
                raise ConfigError(f"model {name}: {width} {size} is not a multiple of the head width {of}")
            values[heads] = size // of
    return replace(spec, **values)
