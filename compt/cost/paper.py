"""Numbers published with Chain-of-Models Pre-Training (arXiv 2604.12391): what tables and fits are compared with.

MACs are multiply-accumulates; a sample is one image of 224 pixels with its captions of 77 tokens. Accelerations are
baseline over chain. All values are published but the epochs of the Swins, which follow from the published MACs.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGES = {"cc3m": 2_753_427, "cc12m": 10_173_631, "merged15m": 12_927_058}
CAPTIONS_PER_IMAGE = 16
"""Pairs are images times this many captions."""


@dataclass(frozen=True)
class Efficiency:
    """Four cells of Table 2: training MACs in units of 1e19 (1e10 G) and A100 hours in hundreds.

    Each is of this model alone, and summed up to this model (`accumulated`).
    """

    macs: float
    accumulated_macs: float
    hours: float
    accumulated_hours: float


@dataclass(frozen=True)
class PaperFamily:
    """One block of Table 2. `speedup` has the same four cells as ratios; accuracies are zero-shot top-1, in percent.

    `published_epochs`: the authors published `chain_epochs`. Those of the ViTs on CC3M are in Table 4(a) (24, 18) and
    in the authors' README, which names the checkpoint of ViT-L `com_vit-l_e15`; those on Merged-15M are in Table D.
    Those of the Swins are the whole numbers whose costs are nearest to the published MACs.
    """

    dataset: str
    models: tuple[str, ...]
    baseline_epochs: int
    chain_epochs: tuple[int, ...]
    published_epochs: bool
    baseline: tuple[Efficiency, ...]
    chain: tuple[Efficiency, ...]
    speedup: tuple[Efficiency, ...]
    baseline_top1: tuple[float, ...]
    chain_top1: tuple[float, ...]


def _rows(*rows: tuple[float, float, float, float]) -> tuple[Efficiency, ...]:
    return tuple(Efficiency(*row) for row in rows)


TABLE_2 = {
    "cc3m_vit": PaperFamily(
        dataset="cc3m",
        models=("vit_t16", "vit_s16", "vit_b16", "vit_l16"),
        baseline_epochs=128,
        chain_epochs=(128, 24, 18, 15),
        published_epochs=True,
        baseline=_rows(
            (0.62, 0.62, 1.54, 1.54), (1.54, 2.16, 2.40, 3.94), (3.75, 5.91, 3.45, 7.39), (10.79, 16.70, 7.56, 14.95)
        ),
        chain=_rows(
            (0.62, 0.62, 1.54, 1.54), (0.32, 0.94, 0.52, 2.06), (0.59, 1.53, 0.54, 2.62), (1.41, 2.94, 1.02, 3.64)
        ),
        speedup=_rows(
            (1.00, 1.00, 1.00, 1.00), (4.81, 2.30, 4.62, 1.91), (6.36, 3.86, 6.16, 2.82), (7.65, 5.68, 7.41, 4.10)
        ),
        baseline_top1=(26.16, 30.16, 31.80, 33.77),
        chain_top1=(26.16, 30.24, 31.83, 34.27),
    ),
    "cc3m_swin": PaperFamily(
        dataset="cc3m",
        models=("swin_t", "swin_s", "swin_b", "swin_l"),
        baseline_epochs=128,
        chain_epochs=(128, 24, 16, 12),
        published_epochs=False,
        baseline=_rows(
            (0.94, 0.94, 2.22, 2.22), (1.97, 2.91, 3.29, 5.51), (3.48, 6.39, 3.73, 9.24), (7.86, 14.25, 6.76, 16.00)
        ),
        chain=_rows(
            (0.94, 0.94, 2.22, 2.22), (0.43, 1.37, 0.68, 2.90), (0.52, 1.89, 0.58, 3.48), (0.84, 2.73, 0.73, 4.21)
        ),
        speedup=_rows(
            (1.00, 1.00, 1.00, 1.00), (4.58, 2.12, 4.83, 1.90), (6.69, 3.38, 6.43, 2.66), (9.35, 5.22, 9.26, 3.80)
        ),
        baseline_top1=(33.84, 35.88, 36.13, 36.77),
        chain_top1=(33.84, 36.19, 36.71, 37.06),
    ),
    "merged15m_vit": PaperFamily(
        dataset="merged15m",
        models=("vit_s16", "vit_m16", "vit_b16", "vit_l16"),
        baseline_epochs=64,
        chain_epochs=(64, 21, 17, 15),
        published_epochs=True,
        baseline=_rows(
            (3.61, 3.61, 5.10, 5.10),
            (5.52, 9.13, 6.20, 11.30),
            (8.79, 17.92, 7.94, 19.24),
            (25.33, 43.25, 16.28, 35.52),
        ),
        chain=_rows(
            (3.61, 3.61, 5.10, 5.10), (2.19, 5.80, 2.60, 7.70), (2.82, 8.62, 2.75, 10.45), (6.62, 15.24, 4.52, 14.97)
        ),
        speedup=_rows(
            (1.00, 1.00, 1.00, 1.00), (2.52, 1.57, 2.38, 1.46), (3.12, 2.08, 2.89, 1.84), (3.83, 2.84, 3.60, 2.37)
        ),
        baseline_top1=(43.97, 45.89, 47.13, 48.88),
        chain_top1=(43.97, 45.85, 47.15, 49.03),
    ),
}

FIGURE_8_EPOCHS = {"vit_s16": 23.45, "vit_b16": 18.28, "vit_l16": 12.34}
"""Fewest epochs, by interpolation, for which each link of T, S, B, L matches its 128-epoch baseline on CC3M."""

FIGURE_9B_EXTRAPOLATED = {2_000_000_000: 2.3}
"""The paper's own extrapolation: "maintains above 2.3"."""


@dataclass(frozen=True)
class AblationRow:
    """A row of Table 4(a), CC3M: the epochs that bring `model` to its 128-epoch baseline's accuracy."""

    model: str
    method: str
    start: str
    epochs: int


TABLE_4A = (
    AblationRow("vit_s16", "IWI", "vit_t16", 32),
    AblationRow("vit_s16", "CoM-PT", "vit_t16", 24),
    AblationRow("vit_b16", "IWI", "vit_t16", 92),
    AblationRow("vit_b16", "CoM-PT", "vit_s16", 18),
)
LOSSLESS_POINTS = 0.5
"""A model is lossless less than this many points of accuracy below its individually trained baseline."""
