"""What one pass over the parameters could save: clipping, AdamW and the moving average.

`python -m benchmarks.engines.optimizer` prints two tables: on a CPU, the share of a step that each part of the update
takes; on a GPU, counted on fake tensors, the launches and bytes of the update with and without clipping and average.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from compt.bench.launches import count
from compt.bench.step import Setup, TrainingStep
from compt.engines.adamw import AdamWEngine
from compt.models.presets import PRESETS
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Ema, Optimizer
from compt.text import TextTable, terminal

BATCH, CAPTIONS, TOKENS, ROUNDS = 128, 4, 20.0, 7
PLAIN = Optimizer(batch=BATCH)
CLIPPED = PLAIN.model_copy(update={"clip_grad_norm": 1.0})
AVERAGED = CLIPPED.model_copy(update={"ema": Ema(decay=0.99)})


def _setup(student: str, teacher: str, optimizer: Optimizer) -> Setup:
    return Setup(
        student=PRESETS[student],
        teacher=PRESETS[teacher],
        optimizer=optimizer,
        engine=EngineConfig(text="packed"),
        captions=CAPTIONS,
        tokens=TOKENS,
    )


def _parts(engine: AdamWEngine) -> dict[str, Callable[[], Any]]:
    """The passes over all parameters, as `AdamWEngine.step` makes them."""
    norm, average = engine._norm(), engine._average
    assert average is not None
    stepped = engine._stepped.values()
    return {
        "norm": engine._norm,
        "scaling": lambda: torch.nn.utils.clip_grads_with_norm_(stepped, 1.0, norm),
        "AdamW": engine.optimizer.step,
        "average": lambda: average.update(norm.isfinite()),
    }


def _times(setup: Setup) -> dict[str, float]:
    """Median seconds of a step and of each part of its update, interleaved."""
    step = TrainingStep(setup, torch.device("cpu"))
    engine, batch = step.engine, step.data(BATCH)
    assert isinstance(engine, AdamWEngine)
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        work()
        found.setdefault(name, []).append(time.perf_counter() - started)

    step(batch)
    for _ in range(ROUNDS):
        timed("step", lambda: step(batch))
        for tensor in engine._stepped.values():
            tensor.grad = torch.ones_like(tensor)
        for name, work in _parts(engine).items():
            timed(name, work)
        for tensor in engine._stepped.values():
            tensor.grad = None
    return {name: median(values) for name, values in found.items()}


def _on_cpu() -> TextTable:
    rows = []
    for student, teacher in (("vit_micro", "vit_nano"), ("vit_mini", "vit_micro")):
        found = _times(_setup(student, teacher, AVERAGED.model_copy(update={"precision": "fp32"})))
        whole = found.pop("step")
        rows.append([student, f"{1e3 * whole:,.0f}", *(f"{100 * part / whole:.2f} %" for part in found.values())])
    header = ["Student", "Step, ms", "Norm", "Scaling", "AdamW", "Average"]
    return TextTable("Shares of a step on this CPU, fp32, one thread", header, rows)


def _on_gpu() -> TextTable:
    rows = []
    for name, optimizer in (("AdamW", PLAIN), ("clipped", CLIPPED), ("clipped, averaged", AVERAGED)):
        seen = count(_setup("vit_s16", "vit_t16", optimizer), BATCH, torch.device("cuda", 0))
        moved = sum(size for (part, _), size in seen.moved.items() if part == "optimizer")
        rows.append([name, f"{seen.of('optimizer'):,}", f"{moved / 1e9:.2f}", f"{seen.total:,}"])
    header = ["Update", "Launches", "GB", "Launches of the step"]
    return TextTable("The update of vit_s16 after vit_t16 on a GPU, counted", header, rows)


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    terminal().print(_on_gpu())
    terminal().print(_on_cpu())


if __name__ == "__main__":
    main()
