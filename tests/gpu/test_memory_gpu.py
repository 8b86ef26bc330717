"""The memory model against what CUDA's allocator says of real steps."""

from __future__ import annotations

import pytest

from benchmarks.gpu.checks.table import peak_of_a_step
from benchmarks.paper.counting import Case
from compt.cost.memory import memory_per_gpu
from compt.models.presets import PRESETS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "case",
    [
        Case(PRESETS["vit_t16"], rows=256, captions=4, tokens=32),
        Case(PRESETS["vit_s16"], PRESETS["vit_t16"], rows=128, captions=4, tokens=32),
        Case(PRESETS["vit_s16"], PRESETS["vit_t16"], rows=256, captions=4, tokens=32, micro_batch=64),
        Case(PRESETS["vit_s16"], rows=128, captions=4, tokens=32, recompute=True),
        Case(PRESETS["vit_t16"], rows=128, captions=4, tokens=32, precision="fp32"),
        Case(PRESETS["swin_t"], rows=64, captions=4, tokens=32),
        Case(PRESETS["swin_t"], PRESETS["vit_t16"], rows=64, captions=4, tokens=32),
    ],
    ids=lambda case: f"{case.student.name}-{case.precision}-{'link' if case.teacher else 'alone'}-{case.rows}",
)
def test_peak_memory_of_a_step(case: Case) -> None:
    """Within 15 %: the allocator rounds sizes up, and cuBLAS has a workspace (32 MiB on Hopper) in no estimate."""
    peak = peak_of_a_step(case)
    predicted = memory_per_gpu(
        case.student,
        case.teacher,
        engine="ddp",
        world_size=1,
        batch=case.rows,
        captions=case.captions,
        tokens=case.tokens,
        precision=case.precision,
        micro_batch=case.micro_batch,
        recompute=case.recompute,
    )
    assert predicted.total_bytes == pytest.approx(peak, rel=0.15), predicted
