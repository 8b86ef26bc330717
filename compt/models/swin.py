"""Swins of any size in timm's registry, where open_clip finds an image tower by its name."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, is_model, register_model
from timm.models.swin_transformer import SwinTransformer

from compt.models.presets import swin_sizes


def register_swin(name: str) -> None:
    """Let timm, and so stock open_clip, build the Swin called `name` (`presets.swin_name`) in this process.

    Leaves timm's own names and registered names as they are. Raises ConfigError for a name that is no Swin's.
    """
    if is_model(name):
        return
    sizes = swin_sizes(name)
    arguments = {
        "img_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
        "embed_dim": sizes["width"],
        "depths": sizes["depths"],
        "num_heads": sizes["stage_heads"],
        "window_size": sizes["window"],
        "mlp_ratio": sizes["mlp_ratio"],
    }
    described = {"architecture": name, "input_size": (3, sizes["image_size"], sizes["image_size"])}

    def entrypoint(pretrained: bool = False, pretrained_cfg: Any = None, **options: Any) -> SwinTransformer:
        cfg = pretrained_cfg or described
        return build_model_with_cfg(SwinTransformer, name, pretrained, pretrained_cfg=cfg, **{**arguments, **options})

    entrypoint.__name__ = entrypoint.__qualname__ = name
    register_model(entrypoint)
