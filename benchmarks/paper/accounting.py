"""MACs of chains and baselines, with three ways to count the MACs of a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.paper.printed import TABLE_G
from compt.cost.paper import IMAGES
from compt.cost.published import paper_cost
from compt.cost.training import exact_breakdown
from compt.models.presets import PRESETS

MACS_UNIT = 1e19
"""Table 2 prints MACs in 1e10 G."""
BATCH = 1024
CAPTIONS = 4
"""Captions per sample in the paper's recipe."""

Source = Callable[[str, str | None], float]
"""(model, teacher or None) -> MACs to train the model on one sample, including the teacher's forward pass."""


def published(model: str, teacher: str | None = None) -> float:
    """From the paper's own figures per sample (Table G)."""
    return 1e9 * (TABLE_G[model].training_gmacs + (TABLE_G[teacher].forward_gmacs if teacher else 0.0))


def counters(model: str, teacher: str | None = None) -> float:
    """From the shapes of our presets, in the published accounting (six captions, 9 MACs per parameter and sample)."""
    return paper_cost(PRESETS[model], PRESETS[teacher] if teacher else None, samples=1, steps=1).sample_macs


def exact(model: str, teacher: str | None = None) -> float:
    """What this program executes: 4 captions of 77 tokens, contrastive loss, one optimizer step per 1,024 samples."""
    before = PRESETS[teacher] if teacher else None
    cost = exact_breakdown(PRESETS[model], before, batch=BATCH, captions=CAPTIONS).of_steps(1)
    return cost.total_macs / cost.samples


SOURCES: dict[str, Source] = {"from_inputs": published, "from_counters": counters, "exact": exact}
"""The sources, by the field of `Cell` that each one fills."""


def individual(source: Source, models: Sequence[str], epochs: float, dataset: str) -> list[float]:
    """MACs to train each model individually, in `MACS_UNIT`."""
    return [source(model, None) * epochs * IMAGES[dataset] / MACS_UNIT for model in models]


def chain(source: Source, models: Sequence[str], epochs: Sequence[float], dataset: str) -> list[float]:
    """MACs of each link, in `MACS_UNIT`. The first model has no teacher."""
    teachers = (None, *models[:-1])
    jobs = zip(models, teachers, epochs, strict=True)
    return [source(model, teacher) * length * IMAGES[dataset] / MACS_UNIT for model, teacher, length in jobs]


def acceleration(
    source: Source, models: Sequence[str], epochs: Sequence[float], baseline_epochs: float, dataset: str
) -> float:
    """The MACs of all baselines divided by those of the whole chain."""
    return sum(individual(source, models, baseline_epochs, dataset)) / sum(chain(source, models, epochs, dataset))
