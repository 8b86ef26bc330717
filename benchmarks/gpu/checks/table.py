"""Checks of correctness on a GPU. Each check compares with an oracle and reports the differences.

Every check is a function of a device, so it also runs on a CPU, except for parts that only a GPU has. The oracle is one
fp32 process on the CPU; the tests compare it with plain loops in double precision.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.gpu.checks.cases import (
    CASES,
    LINK,
    LR,
    STEPS,
    apart,
    backward,
    compare,
    make_batch,
    open_case,
    oracle,
    ratio,
    step_waits,
    train,
    waits,
)
from benchmarks.gpu.checks.chain import SECONDS, check_chain
from benchmarks.gpu.checks.decoding import check_dali
from benchmarks.gpu.checks.finding import Finding, holds
from benchmarks.gpu.checks.loss import check_tiled
from benchmarks.gpu.checks.processes import check_processes
from compt.engines.base import AdamWSettings, Engine, Precision
from compt.engines.ddp import DataParallelEngine
from compt.engines.graphs import RECORDERS, GraphEngine
from compt.models.clip import caption_lengths
from compt.models.presets import PRESETS
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.accumulate import cached_backward
from compt.train.task import ClipTask

if TYPE_CHECKING:
    from benchmarks.paper.counting import Case as Step

HALF: dict[Precision, float] = {"bf16": 0.1, "fp16": 0.02}
"""Tolerances of losses and the whole gradient in half precision: several times the differences seen."""


def half_precision(
    device: torch.device, config: EngineConfig, first: Callable[[ClipTask, Engine], object] = lambda task, engine: None
) -> list[Finding]:
    """bf16 and fp16 stay near fp32, and are not fp32. DeepSpeed has no fp16 on a CPU."""
    findings = []
    right = oracle(LINK)
    size = math.sqrt(sum(gradient.double().norm().item() ** 2 for gradient in right.gradients.values()))
    for precision, most in HALF.items():
        if device.type == "cpu" and config.name.startswith("zero") and precision == "fp16":
            continue
        found = train(LINK, device, config, precision, first=first)
        off = math.sqrt(sum(apart(found.gradients[name], g) ** 2 for name, g in right.gradients.items()))
        findings.append(Finding(f"{precision}: loss", ratio(found.losses, right.losses), most, 1e-8))
        findings.append(Finding(f"{precision}: gradient", off / size, most, 1e-5))
    return findings


def check_arithmetic(device: torch.device) -> list[Finding]:
    """fp32 products are computed in fp32: an open engine turns TF32 off."""
    open_case(LINK, device, EngineConfig())
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    right = a.double() @ b.double()
    product = apart((a.to(device) @ b.to(device)).cpu(), right) / right.norm().item()
    images, kernels = torch.randn(8, 64, 16, 16, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    right = nn.functional.conv2d(images.double(), kernels.double())
    convolved = nn.functional.conv2d(images.to(device), kernels.to(device)).cpu()
    convolution = apart(convolved, right) / right.norm().item()
    return [Finding("matrix product in fp32", product, 1e-5), Finding("convolution in fp32", convolution, 1e-5)]


def check_engine(name: str) -> Callable[[torch.device], list[Finding]]:
    """An engine gives the oracle's results in fp32, in every case, and is close to them in half precision."""

    def check(device: torch.device) -> list[Finding]:
        config = EngineConfig.model_validate({"name": name})
        findings = [f for case in CASES for f in compare(case.name, train(case, device, config), oracle(case))]
        return findings + half_precision(device, config)

    return check


def check_adamw(device: torch.device) -> list[Finding]:
    """The engine's step uses torch's fused kernel and agrees with AdamW's formulas in double precision."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(64, 48)
    initial = {name: tensor.detach().double() for name, tensor in module.named_parameters()}
    settings = AdamWSettings(eps=1e-6)
    engine = DataParallelEngine(module, settings, device=device)
    expected = {name: tensor.clone() for name, tensor in initial.items()}
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in initial.items()} for _ in range(2))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for step in range(1, STEPS + 1):
            for name, parameter in module.named_parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient.to(device)
                value, gradient = expected[name], gradient.double()
                value *= 1 - LR * (settings.weight_decay if name == "weight" else 0.0)
                first[name] = settings.betas[0] * first[name] + (1 - settings.betas[0]) * gradient
                second[name] = settings.betas[1] * second[name] + (1 - settings.betas[1]) * gradient**2
                root = (second[name] / (1 - settings.betas[1] ** step)).sqrt() + settings.eps
                value -= LR * first[name] / (1 - settings.betas[0] ** step) / root
            engine.step(LR)
    ops = {event.key for event in profile.key_averages()}
    way = math.sqrt(sum(apart(expected[name], initial[name]) ** 2 for name in initial))
    off = math.sqrt(sum(apart(value.cpu(), expected[name]) ** 2 for name, value in engine.weights()))
    return [holds("fused", "aten::_fused_adamw_" in ops), Finding("weights", off / way, 1e-4)]


def check_packed(device: torch.device) -> list[Finding]:
    """Packed captions have the features and gradients of padded ones; on a GPU by torch's kernel for any lengths."""
    findings = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32",)
    for precision in precisions:
        found = []
        for text in ("padded", "packed"):
            config = EngineConfig.model_validate({"text": text})
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                task, engine = open_case(replace(LINK, teacher=None), device, config, precision)
                loss = backward(LINK, task, engine, 0)
            gradients = [value.flatten() for name, value in engine.gradients() if "visual" not in name]
            found.append((float(loss), torch.cat(gradients), {event.key for event in seen.key_averages()}))
        (right, gradient, _), (loss_packed, gradient_packed, names) = found
        most = 1e-5 if precision == "fp32" else HALF[precision]
        off = apart(gradient_packed, gradient) / gradient.norm().item()
        findings.append(Finding(f"{precision}: loss", abs(loss_packed - right) / abs(right), most))
        findings.append(Finding(f"{precision}: gradient", off, most))
        if precision != "fp32":
            used = any("varlen_attn" in name for name in names)
            findings.append(holds(f"{precision}: torch's kernel ran", used))
    return findings


def check_launches(device: torch.device) -> list[Finding]:
    """A step launches about as many kernels as are counted without a GPU; says how long the host needs for each.

    Some operations, such as the backward pass of a LayerNorm, are two kernels, and the count takes them as one.
    """
    from compt.bench.launches import count
    from compt.bench.step import Setup, TrainingStep

    if device.type != "cuda":
        return []
    findings = []
    for text in ("packed", "buckets"):
        setup = Setup(
            student=PRESETS["vit_t16"],
            tokens=20,
            optimizer=Optimizer(precision="bf16"),
            engine=EngineConfig.model_validate({"text": text}),
        )
        counted = count(setup, 16, device).total
        step = TrainingStep(setup, device)
        data = step.data(16)
        seconds = min(step.seconds(data, warm_up=3, repeats=5))  # so small a batch waits for the host
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
            step(data)
        launched = sum(row.count for row in seen.key_averages() if row.self_device_time_total > 0)
        findings.append(Finding(f"{text}: launched over counted", launched / counted, 1.6, 0.8))
        findings.append(Finding(f"{text}: microseconds a launch", 1e6 * seconds / counted, math.inf, 0.0))
    return findings


def check_scaler(device: torch.device) -> list[Finding]:
    """fp16's scale halves after an overflow, and stays after a good step."""
    task, engine = open_case(LINK, device, EngineConfig(), "fp16")
    assert isinstance(engine, DataParallelEngine)
    scales = []
    for step in range(2):
        scales.append(engine.state()["scaler.scale"].item())
        backward(LINK, task, engine, step)
        if not step:
            next(engine.unwrapped.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        engine.step(LR)
    scales.append(engine.state()["scaler.scale"].item())
    return [
        Finding("after an overflow", scales[1] / scales[0], 0.5, 0.5),
        Finding("after a good step", scales[2] / scales[1], 1.0, 1.0),
    ]


def check_nonfinite(device: torch.device) -> list[Finding]:
    """A step with a non-finite gradient changes nothing, and does not wait for the device to find out."""
    findings: list[Finding] = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
    for precision in precisions:
        task, engine = open_case(LINK, device, EngineConfig(), precision)
        assert isinstance(engine, DataParallelEngine)
        backward(LINK, task, engine, 0)
        engine.step(LR, max_norm=1.0)
        before = _copied(engine)
        backward(LINK, task, engine, 1)
        next(engine.unwrapped.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        waited = waits(lambda engine=engine: engine.step(LR, max_norm=1.0), device)  # type: ignore[misc]
        after = _copied(engine)
        same = all(torch.equal(after[name], value) for name, value in before.items())
        backward(LINK, task, engine, 2)
        engine.step(LR, max_norm=1.0)
        moved = any(not torch.equal(after[name], value) for name, value in _copied(engine).items())
        findings += [
            holds(f"{precision}: nothing changed", same),
            holds(f"{precision}: nobody waited", not waited),
            holds(f"{precision}: the next step counts", moved),
        ]
    return findings


def _copied(engine: DataParallelEngine) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone() for name, t in engine.state().items() if not name.startswith("scaler.")}


def check_skips(*names: str) -> Callable[[torch.device], list[Finding]]:
    """The same for the other engines and fp16's scale. ZeRO does wait, and has no fp16 on a CPU."""

    def check(device: torch.device) -> list[Finding]:
        findings = []
        for name in names:
            plain = name.startswith("zero") and device.type == "cpu"
            precisions: tuple[Precision, ...] = ("fp32",) if plain else ("fp32", "fp16")
            for precision in precisions:
                findings += _skipped(name, precision, device)
        return findings

    return check


def _skipped(name: str, precision: Precision, device: torch.device) -> list[Finding]:
    task, engine = open_case(LINK, device, EngineConfig.model_validate({"name": name}), precision)
    scale = getattr(engine, "_scale", None)
    backward(LINK, task, engine, 0)
    engine.step(LR, max_norm=1.0)
    before, scales = dict(engine.weights()), [scale.scale.item()] if scale else []
    images, tokens = make_batch(LINK, 1)
    cached_backward(task, engine, (images * math.inf).to(device), tokens.to(device), None, caption_lengths(tokens))
    zero, waited = name.startswith("zero"), False
    if zero:  # it waits, and `waits` ends a step where it does
        engine.step(LR, max_norm=1.0)
    else:
        waited = waits(lambda: engine.step(LR, max_norm=1.0), device)
    after = dict(engine.weights())
    scales += [scale.scale.item()] if scale else []
    same = all(torch.equal(after[key], value) for key, value in before.items())
    backward(LINK, task, engine, 2)
    engine.step(LR, max_norm=1.0)
    moved = any(not torch.equal(after[key], value) for key, value in engine.weights())
    what = f"{name} in {precision}"
    findings = [holds(f"{what}: nothing changed", same), holds(f"{what}: the next step counts", moved)]
    if not zero:
        findings.append(holds(f"{what}: nobody waited", not waited))
    return [*findings, *(Finding(f"{what}: scale", b / a, 0.5, 0.5) for a, b in pairwise(scales))]


def check_waits(device: torch.device) -> list[Finding]:
    """No training step waits for the GPU, from pinned images and captions to the update."""
    findings = []
    for precision in ("fp32", "bf16", "fp16"):
        for buckets, micro in ((None, LINK.rows), (2, LINK.rows), (2, 4)):
            waited = step_waits(replace(LINK, buckets=buckets, micro=micro), device, precision)
            text = "packed text" if buckets is None else f"{buckets} text buckets"
            what = f"{precision}, {text}, {micro} images at once"
            findings.append(holds(f"{what}: nobody waited", not waited))
    return findings


def check_compile(name: str, how: str = "blocks", **more: str) -> Callable[[torch.device], list[Finding]]:
    """Compiled models have the names and results of eager ones, and nothing recompiles after the first steps.

    `more` are other fields of the recipe's `engine`.
    """
    return lambda device: _compile({"name": name, "compile": how, **more}, device)


def _compile(given: dict[str, str], device: torch.device) -> list[Finding]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    config = EngineConfig.model_validate(given)
    # Modes that capture CUDA graphs take no micro-batches, and compile once more for each size of packed text.
    captures = "compile_mode" in given
    case = LINK if captures else CASES[1]
    findings = compare(case.name, train(case, device, config), oracle(case))
    task, engine = open_case(case, device, config)
    for step in range(STEPS):
        backward(case, task, engine, step)
        engine.step(LR)
    compiled = counters["stats"]["unique_graphs"]
    for step in range(STEPS, 3 * STEPS):
        backward(case, task, engine, step)
        engine.step(LR)
    again = counters["stats"]["unique_graphs"] - compiled
    skipped = sum(count for reason, count in counters["unimplemented"].items() if "limit" in reason)
    return [
        *findings,
        Finding("graphs", compiled, math.inf, 1),
        Finding("graphs after the first steps", again, 2 * STEPS if captures else 0),
        Finding("blocks left eager", skipped, 0),
    ]


def check_graphs(device: torch.device) -> list[Finding]:
    """Steps that are replayed from CUDA graphs give the oracle's results, and are near them in half precision.

    Each batch comes by twice before the steps that count, so that the graph of its size is there. Where the device has
    no graphs, steps are eager.
    """
    engines: list[Engine] = []

    def capture(task: ClipTask, engine: Engine) -> None:
        engines.append(engine)
        for step in (*range(STEPS), *range(STEPS)):
            backward(LINK, task, engine, step)
            task.module.zero_grad()

    config = EngineConfig.model_validate({"graphs": "on", "text": "packed"})
    findings = compare("replayed", train(LINK, device, config, first=capture), oracle(LINK))
    findings += half_precision(device, config, capture)
    for engine in engines if device.type in RECORDERS else []:
        assert isinstance(engine, GraphEngine)
        findings.append(holds("several sizes", engine.sizes > 1))
        # All but the first step of each size.
        findings.append(Finding("steps replayed", engine.replays, math.inf, 3 * STEPS - engine.sizes))
    return findings


def check_checkpoint(*names: str) -> Callable[[torch.device], list[Finding]]:
    """A checkpoint loads bit for bit, and training continues as if it had not stopped."""
    return lambda device: [finding for name in names for finding in _checkpoint(name, device)]


def _checkpoint(name: str, device: torch.device) -> list[Finding]:
    config = EngineConfig.model_validate({"name": name})
    task, engine = open_case(LINK, device, config)
    for step in range(2):
        backward(LINK, task, engine, step)
        engine.step(LR)
    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder))()
        saved = dict(engine.weights())
        backward(LINK, task, engine, 2)
        engine.step(LR)
        task, other = open_case(LINK, device, config)
        other.load(Path(folder))
    loaded = dict(other.weights())
    same = all(torch.equal(loaded[key], value) for key, value in saved.items())
    backward(LINK, task, other, 2)
    other.step(LR)
    right = dict(engine.weights())
    way = math.sqrt(sum(apart(value, saved[key]) ** 2 for key, value in right.items()))
    off = math.sqrt(sum(apart(value, right[key]) ** 2 for key, value in other.weights()))
    return [holds(f"{name}: loaded bit for bit", same), Finding(f"{name}: next step", off / way, 1e-4)]


def check_memory(device: torch.device) -> list[Finding]:
    """Peak memory of real steps against the planner's, which ignores workspaces and rounding of sizes."""
    if device.type != "cuda":
        return []
    from benchmarks.paper.counting import Case as Step
    from compt.cost.memory import memory_per_gpu

    findings = []
    for case in (
        Step(PRESETS["vit_s16"], PRESETS["vit_t16"], rows=128, captions=4, tokens=32),
        Step(PRESETS["vit_s16"], rows=128, captions=4, tokens=32, recompute=True),
        Step(PRESETS["swin_t"], rows=64, captions=4, tokens=32),
    ):
        peak = peak_of_a_step(case)
        predicted = memory_per_gpu(
            case.student,
            case.teacher,
            engine="ddp",
            world_size=1,
            batch=case.rows,
            captions=case.captions,
            tokens=case.tokens,
            recompute=case.recompute,
        )
        what = f"{case.student.name}{' link' if case.teacher else ''}{' recomputed' if case.recompute else ''}"
        findings.append(Finding(f"{what}: predicted over peak", predicted.total_bytes / peak, 1.15, 0.85))
    return findings


def peak_of_a_step(case: Step) -> int:
    """The peak bytes that torch holds on the GPU during a step, including the moments."""
    from benchmarks.paper.counting import engine_and_task, step
    from benchmarks.paper.counting import make_batch as empty_batch

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine, task = engine_and_task(case, "cuda")
    batch = empty_batch(case, "cuda")
    for _ in range(2):  # moments are made in the first step
        torch.cuda.reset_peak_memory_stats()
        step(engine, task, case, batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Check:
    """A check, the kind of process it runs in (shared with others), and its time limit in seconds on a GPU."""

    run: Callable[[torch.device], list[Finding]]
    process: str = "plain"
    seconds: float = 60.0


CHECKS: dict[str, Check] = {
    "arithmetic": Check(check_arithmetic),
    "ddp": Check(check_engine("ddp")),
    "adamw": Check(check_adamw),
    "scaler": Check(check_scaler),
    "nonfinite": Check(check_nonfinite),
    "waits": Check(check_waits),
    "packed": Check(check_packed),
    "launches": Check(check_launches),
    "memory": Check(check_memory),
    "dali": Check(check_dali),
    "tiled": Check(check_tiled, seconds=120),
    "fsdp2": Check(check_engine("fsdp2"), "sharded"),
    "skips": Check(check_skips("fsdp2"), "sharded"),
    "checkpoint": Check(check_checkpoint("ddp", "fsdp2"), "sharded"),
    "processes": Check(check_processes, "several", 90),
    "chain": Check(check_chain("chain"), "chain", SECONDS["chain"]),
    **{f"zero{stage}": Check(check_engine(f"zero{stage}"), "deepspeed", 90) for stage in range(4)},
    "zero_skips": Check(check_skips("zero2", "zero3"), "deepspeed", 90),
    "zero_checkpoint": Check(check_checkpoint("zero2", "zero3"), "deepspeed", 90),
    "chain_zero": Check(check_chain("chain_zero"), "chain", SECONDS["chain_zero"]),
    "graphs": Check(check_graphs, "graphs", 90),
    "compile": Check(check_compile("ddp"), "compiled", 240),
    "compile_towers": Check(check_compile("ddp", "towers"), "compiled", 240),
    "compile_graphs": Check(
        check_compile("ddp", "towers", compile_mode="reduce-overhead", text="packed"), "compiled", 240
    ),
    "compile_fsdp2": Check(check_compile("fsdp2"), "compiled", 240),
    "compile_zero2": Check(check_compile("zero2"), "compiled", 240),
    "compile_zero3": Check(check_compile("zero3"), "compiled", 240),
}
"""In the order of their value."""


def run_check(name: str, device: str) -> list[Finding]:
    """The findings of a check, on "cpu" or "cuda"."""
    chosen = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    return CHECKS[name].run(chosen)
