"""What a step launches, on the path of a GPU that is not there, and on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compt.bench import launches
from compt.bench.launches import PARTS, Launches, count
from compt.bench.step import Setup, TrainingStep
from compt.models.presets import resolve
from compt.recipe.engine import EngineConfig
from compt.recipe.schema import Optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TOKENS = {6: 1.0, 15: 3.0, 31: 1.0}
SMALL = {"image_size": 16, "text_depth": 2, "depth": 2, "context_length": 12, "vocab_size": 64}


def setup(model: str, precision: Any = "bf16", **engine: Any) -> Setup:
    optimizer, config = Optimizer(precision=precision, batch=64), EngineConfig(**engine)
    return Setup(student=resolve(model), captions=4, tokens=TOKENS, optimizer=optimizer, engine=config)


def test_a_step_of_vit_t16_with_packed_text_launches_few_kernels() -> None:
    packed = count(setup("vit_t16", text="packed"), 16, GPU)
    assert packed.counts["forward", "_varlen_attn"] == packed.counts["backward", "_varlen_attn_backward"] == 12
    assert [packed.of(part) for part in PARTS] == [6, 0, *map(packed.of, PARTS[2:])]
    assert packed.of("graph") == 0 < min(map(packed.of, ("forward", "loss", "backward", "optimizer")))
    assert packed.total == sum(map(packed.of, PARTS)) <= 1115
    assert packed.of("optimizer") <= 16
    assert packed.counts["optimizer", "_fused_adamw_"] == 2


def test_other_lengths_and_larger_batches_launch_as_much() -> None:
    spec = resolve("vit_pico", SMALL)
    few, many = (
        count(Setup(student=spec, tokens=tokens, optimizer=Optimizer(precision="bf16", batch=64)), batch, GPU).counts
        for tokens, batch in (({4: 1.0, 9: 1.0}, 4), ({3: 2.0, 7: 1.0, 11: 1.0}, 12))
    )
    assert few == many


def test_a_step_on_a_cpu_calls_attention_for_each_length() -> None:
    spec = resolve("vit_pico", SMALL)
    plan = Setup(student=spec, tokens={4: 1.0, 9: 1.0}, optimizer=Optimizer(precision="fp32", batch=8))
    packed = count(plan, 8, CPU)
    # Of two blocks each: one call for the images, one for the captions of each length.
    assert packed.counts["forward", "_scaled_dot_product_flash_attention_for_cpu"] == 2 + 2 * 2
    assert packed.total <= 310


def test_gradients_without_torchs_engine_are_those_of_torch() -> None:
    found = []
    for precision in ("fp32", "bf16"):
        spec, teacher = resolve("vit_pico", SMALL), resolve("vit_pico", {**SMALL, "embed_dim": 24})
        plan = Setup(student=spec, teacher=teacher, tokens=TOKENS, optimizer=Optimizer(precision=precision, batch=8))
        for own in (False, True):
            step = TrainingStep(plan, CPU)
            data = step.data(8)
            step.engine.backward = lambda loss, own=own, **_: launches._backward(loss) if own else loss.backward()
            step.engine.step = lambda *_: torch.zeros(())
            step(data)
            found.append(dict(step.engine.gradients()))
    for torchs, ours in zip(found[::2], found[1::2], strict=True):
        for name, gradient in torchs.items():
            torch.testing.assert_close(ours[name], gradient, msg=name)
            assert gradient.norm() > 0, name


@pytest.mark.parametrize(
    ("work", "launched"),
    [
        (lambda x: x.view(6).t(), 0),
        (torch.empty_like, 0),
        (lambda x: x + 1, 1),
        (lambda x: x.mul_(2), 1),
        (lambda x: x.float(), 0),
        (lambda x: x.bfloat16(), 1),
        (lambda x: torch._foreach_add([x, x], 1.0), 1),
        (lambda x: x.unbind(0), 0),
    ],
)
def test_what_counts_as_a_launch(work: Any, launched: int) -> None:
    with Launches(CPU, fake=False) as seen:
        work(torch.ones(2, 3))
    assert seen.total - 1 == launched, "the ones are one launch themselves"


def test_operations_on_lists_write_what_they_change() -> None:
    values = [torch.ones(4) for _ in range(4)]
    with Launches(CPU, fake=False) as seen:
        torch._foreach_mul_(values[:1], 2.0)
        torch._foreach_add_(values[:1], values[1:2])
        torch._fused_adamw_(
            *([value] for value in values),
            [],
            [torch.zeros(())],
            lr=0.1,
            beta1=0.9,
            beta2=0.9,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
    found = {name: moved // 16 for (_, name), moved in seen.moved.items() if name != "zeros"}
    assert found["_foreach_mul_"] == 2, "read and written"
    assert found["_foreach_add_"] == 3
    assert found["_fused_adamw_"] == 7, "weights, gradients and two moments are read, all but the gradients written"
