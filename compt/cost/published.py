"""The accounting of the published tables (CoM-PT, Table G and Table 2).

- A sample is an image with six captions of 77 tokens, padding included, whatever the recipe says. The paper's text says
  four captions, and the authors' code draws seven (the raw caption and six others), but the forward MACs of Table G
  fit six.
- Training costs 3 Cf - C1 + 9 P per sample; a teacher adds its forward pass. Cf is the
  forward pass; its backward pass costs twice as much. C1 is the patch embedding, whose input needs no gradient. P are
  the parameters of `paper_parameters`. 9 P is for AdamW, charged per sample although an optimizer steps once per
  batch: only that gives the published numbers.
- As in the table, P has only the blocks of the text tower and no logit scale, and the forward pass of a Swin has no
  attention products.
- There are no projectors, no loss, no trimming, and no readout: every block computes every position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from compt.cost.counts import Count, image_tower, text_tower_of, total
from compt.cost.training import Breakdown, JobCost, Record, Tower, backward_macs, frozen
from compt.models.presets import ModelSpec

PAPER_TEXT_PASSES = 6
"""Captions per sample that Table G's forward MACs fit. The paper's text says 4, the authors' code draws 7."""
PAPER_TOKENS = 77
"""Tokens of a caption in the published accounting, padding included."""
PAPER_PARAMETER_MACS = 9
"""MACs of AdamW per parameter and *sample* in the published tables (the paper's text says 3)."""


def _towers(spec: ModelSpec) -> Iterator[tuple[Tower, dict[str, Count], int]]:
    """Each tower with its counts as in Table G, and its forward passes per sample."""
    image = image_tower(spec, readout=False)
    if spec.arch == "swin":
        image["attention_matmuls"] = Count()
    yield "image", image, 1
    text = text_tower_of(spec, PAPER_TOKENS, PAPER_TOKENS**2, readout=False)
    for kind in ("embeddings", "final_norm", "projection"):
        text[kind] = replace(text[kind], parameters=0)
    yield "text", text, PAPER_TEXT_PASSES


def paper_parameters(spec: ModelSpec) -> int:
    """Parameters as in Table G: the image tower with its projection, and the blocks of the text tower.

    The text tower's embeddings, final norm and projection, and the logit scale are left out.
    """
    return sum(total(counts.values()).parameters for _, counts, _ in _towers(spec))


def paper_breakdown(spec: ModelSpec, teacher: ModelSpec | None, *, batch: int = 1) -> Breakdown:
    """The published accounting of training `spec`, part by part, with the parameters that it counts."""
    records: list[Record] = []
    for tower, counts, times in _towers(spec):
        for module, count in counts.items():
            forward = times * count.macs
            records.append(
                Record(
                    "student",
                    tower,
                    module,
                    count.parameters,
                    forward_macs=forward,
                    backward_macs=backward_macs(module, forward),
                    update_macs=PAPER_PARAMETER_MACS * count.parameters,
                )
            )
    if teacher is not None:
        for tower, counts, times in _towers(teacher):
            records += frozen(tower, counts, times)
    return Breakdown("paper", batch, tuple(records))


def paper_cost(spec: ModelSpec, teacher: ModelSpec | None, *, samples: float, steps: int) -> JobCost:
    """The cost of `samples` samples in the published accounting, which has no projectors, loss or trimming."""
    return paper_breakdown(spec, teacher).cost(samples, steps)
