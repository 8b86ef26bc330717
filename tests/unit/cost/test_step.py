"""The model of compt's own step: its launches and bytes are those that the counter of launches finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from compt.bench.launches import Launches, count
from compt.bench.step import Setup
from compt.cost import step
from compt.cost.counts import parameters
from compt.cost.gpus import DEVICES
from compt.cost.speed import Conditions, channels, other_settings
from compt.cost.step import BANDWIDTH_SHARE, LAUNCH_SECONDS, PRODUCT_SHARE, StepTime, launches, step_time
from compt.cost.training import exact_breakdown
from compt.models.presets import ModelSpec, resolve
from compt.recipe.engine import EngineConfig
from compt.recipe.schema import Optimizer

BATCH, TOKENS = 16, 20
SIZES = ({"depth": 3, "text_depth": 2, "embed_dim": 512}, {"depth": 5, "text_depth": 4, "embed_dim": 512})
A100 = DEVICES["a100-80"]
PRODUCTS = ("mm", "bmm", "conv", "attention", "_varlen_attn")
"""Parts of the names of operations that multiply matrices, attention among them. The others only move numbers."""


def time_of(student: ModelSpec, teacher: ModelSpec | None, device: Any = A100, **conditions: Any) -> StepTime:
    asked = Conditions(4, TOKENS, "bf16", **{"batch": BATCH, "text_buckets": 0, **conditions})
    cost = exact_breakdown(student, teacher, batch=BATCH, captions=4, tokens=TOKENS).of_steps(1)
    return step_time(student, teacher, cost, device, asked)


def counted(student: ModelSpec, teacher: ModelSpec | None, engine: EngineConfig) -> Launches:
    optimizer = Optimizer(precision="bf16", batch=BATCH)
    plan = Setup(student=student, teacher=teacher, captions=4, tokens=TOKENS, optimizer=optimizer, engine=engine)
    return count(plan, BATCH, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [("vit_t16", None, "packed"), ("vit_s16", "vit_t16", "buckets"), ("vit_s16", "vit_t16", "packed")],
)
def test_launches_and_bytes_are_those_of_a_step(student: str, teacher: str | None, text: Any) -> None:
    engine = EngineConfig(text=text)
    # On this device a second moves a byte, and products take no time to compute.
    slow = replace(A100, bandwidth_bytes=1 / BANDWIDTH_SHARE, peak_flops={"bf16": 1e30})
    found, asked = [], []
    for sizes in SIZES:
        one, other = resolve(student, sizes), resolve(teacher, sizes) if teacher else None
        seen, model = counted(one, other, engine), time_of(one, other, slow, text_buckets=engine.buckets)
        assert model.launches == seen.total
        moved = {True: 0, False: 0}
        for (part, operation), size in seen.moved.items():
            moved[any(part in operation for part in PRODUCTS)] += size * (part != "optimizer")
        found.append((moved[True], moved[False]))
        asked.append((model.products, model.traffic - 32 * parameters(one)))
    # The last block of a tower and what is outside of blocks move other numbers, so more blocks are compared.
    products, rest = ((found[1][at] - found[0][at]) / (asked[1][at] - asked[0][at]) for at in (0, 1))
    assert products == pytest.approx(1, abs=0.1 if text == "packed" else 0.3)
    assert rest == pytest.approx(1, abs=0.1) if text == "packed" else rest > 1, "buckets add gradients of weights up"


@pytest.mark.slow
def test_launches_of_a_swin() -> None:
    one, packed = resolve("swin_t", {"text_depth": 2}), EngineConfig(text="packed")
    conditions = Conditions(4, TOKENS, "bf16", BATCH, text_buckets=packed.buckets)
    assert launches(one, one, conditions) == pytest.approx(counted(one, one, packed).total, rel=0.02)


def test_a_captured_step_does_not_wait_for_its_launches() -> None:
    recipe = EngineConfig(graphs="on", text="packed")
    eager, captured = (
        time_of(resolve("vit_t16"), None, DEVICES["h100"], settings=other_settings(Optimizer(), engine))
        for engine in (EngineConfig(text="packed"), recipe)
    )
    assert captured.host < 0.1 * eager.host
    assert captured.decides != "launches"
    assert captured.seconds == eager.device < eager.seconds


def test_a_step_takes_as_long_as_host_or_device() -> None:
    student = resolve("vit_t16")
    found = time_of(student, None)
    assert found.host == found.launches * LAUNCH_SECONDS
    assert found.seconds == max(found.host, found.products + found.traffic)
    assert found.low < found.device <= found.seconds < found.high
    few, many = time_of(student, None, batch=1), time_of(student, None, batch=512)
    assert (few.decides, few.seconds) == ("launches", few.host)
    assert (many.decides, many.seconds) == ("traffic", many.device)


def test_the_least_is_what_the_datasheet_allows() -> None:
    """The longer of FLOPs at the full peak and bytes at the full bandwidth: bytes for this model on an H100."""
    student, device = resolve("vit_t16"), DEVICES["h100"]
    found = time_of(student, None, device, batch=128)
    full = [found.computing * PRODUCT_SHARE, found.moving * BANDWIDTH_SHARE]
    assert full[0] < full[1], "the model is small"
    assert found.low == pytest.approx(full[1] + found.traffic * BANDWIDTH_SHARE)
    sheet = replace(device, bandwidth_bytes=device.bandwidth_bytes / BANDWIDTH_SHARE)
    sheet = replace(sheet, peak_flops={"bf16": device.peak_flops["bf16"] / PRODUCT_SHARE})
    assert found.low == pytest.approx(time_of(student, None, sheet, batch=128).device)


def test_what_saves_launches_or_memory_changes_them() -> None:
    student, teacher = resolve("vit_s16"), resolve("vit_t16")
    plain = time_of(student, teacher)
    compiled, pieces = time_of(student, teacher, compile="blocks"), time_of(student, teacher, micro_batch=4)
    again = time_of(student, teacher, recompute=True)
    assert compiled.launches < plain.launches < again.launches < pieces.launches
    assert compiled.traffic < plain.traffic
    assert pieces.launches > 4 * (plain.launches - 44)


def test_a_swin_moves_more_bytes_in_its_image_tower_alone() -> None:
    swin = resolve("swin_t")
    text = 4 * TOKENS * swin.text_width * swin.text_depth
    for part, more in step._SWIN_BYTES.items():
        images = channels(swin, 4, TOKENS) - text
        assert step._passed(swin, 4, part, TOKENS) == pytest.approx(more * images + text)


def test_recomputation_moves_bytes_again() -> None:
    spec, asked = resolve("vit_t16"), Conditions(4, TOKENS, "bf16", BATCH, text_buckets=0)
    plain, again = (
        exact_breakdown(spec, None, batch=BATCH, captions=4, tokens=TOKENS, checkpointing=on).of_steps(1)
        for on in (False, True)
    )
    assert step_time(spec, None, again, A100, asked).traffic > step_time(spec, None, plain, A100, asked).traffic
