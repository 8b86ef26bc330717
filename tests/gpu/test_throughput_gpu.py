"""Measuring throughput on a real GPU: batches up to its memory, and the share of its peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compt.bench.step import Setup
from compt.bench.throughput import known_device, measure, measure_apart, peak_flops
from compt.cost.counts import parameters
from compt.cost.speed import Measurement
from compt.cost.training import exact_breakdown
from compt.dist import child
from compt.models.presets import PRESETS
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer

CUDA = torch.device("cuda", 0)
T, S = PRESETS["vit_t16"], PRESETS["vit_s16"]
LINK = Setup(student=S, teacher=T, captions=4, tokens=30, engine=EngineConfig(text_buckets=4))


@pytest.fixture
def little_memory() -> None:
    """Limits torch to 6 GiB, so that memory runs out soon."""
    whole = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 6 * 2**30 / whole), CUDA)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    torch.cuda.empty_cache()


def check(found: Measurement, setup: Setup) -> None:
    assert found.failure is None
    assert 0 < found.low <= found.seconds_per_sample <= found.high
    assert found.peak_memory_bytes > 16 * parameters(setup.student)  # weights, gradients and two moments in fp32
    peak = peak_flops(CUDA, setup.optimizer.precision)
    if peak is None:
        assert found.mfu is None
    else:
        tokens = found.computed_tokens
        cost = exact_breakdown(
            setup.student, setup.teacher, batch=found.batch, captions=setup.captions, tokens=tokens
        ).of_steps(1)
        assert found.mfu == pytest.approx(2 * cost.sample_macs / found.seconds_per_sample / peak)
        assert 0 < found.mfu < 1


def test_the_batch_grows_until_memory_is_full(little_memory: None) -> None:
    found = measure(LINK, CUDA, None, 8192, 0.0)
    check(found, LINK)
    assert 8 <= found.batch < 8192
    assert found.peak_memory_bytes < 6 * 2**30
    too_large = measure(LINK, CUDA, 2 * found.batch, 8192, 0.0)
    assert too_large.failure == f"a batch of {2 * found.batch} does not fit into memory"
    again = measure(LINK, CUDA, found.batch, 8192, 0.0)
    assert (again.failure, again.batch) == (None, found.batch)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_gpu_is_measured_in_its_own_process(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As users run it: the tests' fork server has imported torch's compiler, which opens CUDA's driver.
    monkeypatch.setattr(child, "METHOD", "spawn")
    setup = replace(LINK, optimizer=Optimizer(precision=precision))
    found = measure_apart(setup, CUDA, 16, 8192, 0.1)
    check(found, setup)
    assert found.repeats >= 3


def test_this_gpu_has_the_memory_the_planner_assumes() -> None:
    known = known_device(CUDA)
    if known is None:
        pytest.skip(f"no datasheet of {torch.cuda.get_device_name(CUDA)}")
    assert torch.cuda.get_device_properties(CUDA).total_memory == pytest.approx(known.memory_bytes, rel=0.005)
