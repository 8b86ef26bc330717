"""More numbers published with the paper (arXiv 2604.12391), which only these comparisons use.

What compt itself plans and fits with is in `compt.cost.paper`, with the units.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelRow:
    """A row of Table G: parameters in millions, GMACs a sample. A Swin's width is that of its last stage."""

    width: int
    depth: int
    image_millions: float
    text_width: int
    text_depth: int
    text_millions: float
    total_millions: float
    forward_gmacs: float
    training_gmacs: float


TABLE_G = {
    "vit_t16": ModelRow(192, 12, 5.62, 256, 12, 9.48, 15.10, 5.82, 17.57),
    "vit_c16": ModelRow(256, 12, 9.86, 320, 12, 14.80, 24.66, 9.23, 27.87),
    "vit_s16": ModelRow(384, 12, 21.81, 384, 12, 21.29, 43.10, 14.44, 43.65),
    "vit_m16": ModelRow(512, 12, 38.59, 448, 12, 28.97, 67.56, 21.88, 66.17),
    "vit_b16": ModelRow(768, 12, 86.19, 512, 12, 37.83, 124.02, 35.09, 106.27),
    "vit_xb16": ModelRow(1024, 12, 171.36, 512, 12, 37.83, 209.19, 48.76, 148.05),
    "vit_l16": ModelRow(1024, 24, 304.09, 768, 12, 85.05, 389.14, 100.92, 306.11),
    "swin_t": ModelRow(768, 12, 27.91, 256, 12, 9.48, 37.39, 8.76, 26.60),
    "swin_s": ModelRow(768, 24, 49.23, 384, 12, 21.29, 70.52, 18.40, 55.82),
    "swin_b": ModelRow(1024, 24, 87.27, 512, 12, 37.83, 125.10, 32.71, 98.84),
    "swin_l": ModelRow(1536, 24, 195.78, 768, 12, 85.05, 280.83, 73.48, 222.94),
}

FIGURE_6_REDUCTION = 0.72
"""Largest saving of a chain on CC3M against ViT-L trained individually (section 5.3.1)."""
FULL_CHAIN_SAVES_OVER_LAST_PAIR = 0.20
"""CC3M: T to S to B to L costs this much less than B to L (introduction), as a share."""


@dataclass(frozen=True)
class RatioChain:
    """A chain of Figure 7: CC3M, from ViT-T to ViT-L in steps of `ratio`; acceleration over the whole family."""

    ratio: int
    models: tuple[str, ...]
    speedup: float


FIGURE_7 = (
    RatioChain(8, ("vit_t16", "vit_m16", "vit_l16"), 4.13),
    RatioChain(4, ("vit_t16", "vit_s16", "vit_b16", "vit_l16"), 5.68),
    RatioChain(2, ("vit_t16", "vit_c16", "vit_s16", "vit_m16", "vit_b16", "vit_xb16", "vit_l16"), 7.09),
)
FIGURE_7_SAVING_OF_4_OVER_8 = 0.073
"""Share by which the chain of ratio 4 is said to cost less than that of ratio 8 (section 5.3.1)."""

FIGURE_9A_LEAST_SPEEDUP = 4.0
"""CC3M, ViT family, baselines of 32, 64 and 128 epochs: the acceleration stays above this."""
FIGURE_9A_EPOCHS = (32, 64, 128)
FIGURE_9B_SPEEDUP = {103_400_000: 2.8, 206_800_000: 2.8}
"""Acceleration by number of pairs, 64 baseline epochs, four models; "around 2.8 from 103.4M to 206.8M"."""
