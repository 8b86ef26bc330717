"""The memory model against tensors that are counted: states exactly, activations and a step within tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.paper.counting import (
    Alive,
    Case,
    Storages,
    engine_and_task,
    kept,
    make_batch,
    most_alive,
    static_tensors,
    step,
)
from compt.cost.activations import Shape, image_tower, task_loss_working, text_tower
from compt.cost.memory import (
    ENGINES,
    PRECISION_BYTES,
    ZERO_BUCKET,
    ZERO_PERSISTENT,
    Memory,
    artefact_bytes,
    checkpoint_bytes,
    held_bytes,
    memory_per_gpu,
)
from compt.engines.average import Average
from compt.engines.fsdp2 import ShardedEngine
from compt.models.clip import build
from compt.models.presets import PRESETS, ModelSpec, resolve
from compt.models.scalars import LOSS_TRAITS
from compt.recipe.deepspeed import deepspeed_config
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.accumulate import cached_backward
from compt.train.losses import contrastive_loss
from compt.train.task import ClipTask, DistillTask, StudentModule
from compt.weights.artefact import write_artefact
from tests.helpers.states import export_state

NANO, PICO, MICRO = (PRESETS[f"vit_{size}"] for size in ("nano", "pico", "micro"))
QUICK = resolve("vit_nano", {"quick_gelu": True, "name": "quick"})
LITTLE_SWIN = resolve(
    "swin_t",
    {"image_size": 48, "window": 5, "width": 32, "head_width": 16, "depths": (2, 3), "text_depth": 2, "mlp_ratio": 2.0},
)
WIDE = resolve("vit_nano", {"embed_dim": 96})  # its features need projectors to meet a teacher's


def of(case: Case, engine: str = "ddp") -> Memory:
    """What the model says of a case."""
    short = case.tokens if case.short is None else case.short
    return memory_per_gpu(
        case.student,
        case.teacher,
        engine=engine,
        world_size=case.world_size,
        batch=case.rows * case.world_size,
        captions=case.captions,
        tokens={short: 0.5, case.tokens: 0.5} if case.short else case.tokens,
        precision=case.precision,
        micro_batch=case.micro_batch,
        recompute=case.recompute,
        loss_chunk=case.chunk,
    )


def nbytes(tensors: object) -> int:
    return sum(tensor.nbytes for tensor in tensors)  # type: ignore[attr-defined]


# States: equality


@pytest.mark.parametrize(("student", "teacher"), [(NANO, None), (NANO, PICO), (WIDE, NANO)])
def test_states_are_those_of_a_real_engine_after_a_step(student: ModelSpec, teacher: ModelSpec | None) -> None:
    case = Case(student, teacher, rows=3, captions=2, tokens=9, precision="fp32")
    engine, task = engine_and_task(case)
    batch = make_batch(case, "cpu")
    images, tokens, lengths = batch
    cached_backward(task, engine, images, tokens, case.micro_batch, lengths)

    memory = of(case)
    assert memory.weights == nbytes(engine.module.parameters())
    assert memory.gradients == nbytes(p.grad for p in engine.module.parameters() if p.grad is not None)
    engine.step(0.0)
    assert memory.optimizer == nbytes(value for state in engine.optimizer.state.values() for value in state.values())
    assert checkpoint_bytes(student, teacher) == nbytes(engine.state().values())
    average = Average(dict(task.module.named_parameters()), 0.9).state().values()
    extra = memory_per_gpu(
        student, teacher, engine="ddp", world_size=1, batch=3, captions=2, precision="fp32", ema=True
    )
    assert extra.weights - memory.weights == nbytes(average)
    both = [*engine.state().values(), *average]
    assert checkpoint_bytes(student, teacher, ema=True) == nbytes(both)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_is_its_weights_masks_and_features_in_the_compute_type(precision: str) -> None:
    case = Case(WIDE, NANO, rows=3, captions=2, tokens=9, precision=precision)  # type: ignore[arg-type]
    _, task = engine_and_task(case)
    assert isinstance(task, DistillTask)
    held = [*task.teacher.parameters(), *task.teacher.buffers(), *task.targets(*make_batch(case, "cpu")).values()]
    assert of(case).teacher == nbytes(held)
    assert of(replace(case, teacher=None)).teacher == 0


OTHERS = {"little swin": LITTLE_SWIN, "windows of one": replace(LITTLE_SWIN, window=1, timm_name="")}


@pytest.mark.parametrize("name", [*PRESETS, *OTHERS])
def test_every_preset_has_these_weights_moments_and_masks(name: str) -> None:
    spec = {**PRESETS, **OTHERS}[name]
    model = build(spec, device="meta")
    memory = memory_per_gpu(spec, None, engine="ddp", world_size=1, batch=1, captions=1, precision="fp32")
    count, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * count, 4 * count, 8 * count + 4 * tensors)
    assert artefact_bytes(spec) == nbytes(model.state_dict().values())
    averaged = memory_per_gpu(spec, None, engine="ddp", world_size=1, batch=1, captions=1, precision="fp32", ema=True)
    assert averaged.weights - memory.weights == 4 * count + 8


def test_a_checkpoint_of_fp16_has_the_scaler_too() -> None:
    case = Case(PICO, rows=2, captions=1, tokens=5, precision="fp16")
    engine, _ = engine_and_task(case)
    assert checkpoint_bytes(PICO, None, precision="fp16") == nbytes(engine.state().values())


@pytest.mark.parametrize("engine", list(ENGINES))
def test_deepspeed_writes_whole_weights_beside_the_copies_that_it_steps(engine: str) -> None:
    """By the formula; tests/dist/engines/test_zero.py compares real files."""
    twice = 4 * sum(p.numel() for p in build(NANO, device="meta").parameters())
    more = checkpoint_bytes(NANO, None, engine=engine) - checkpoint_bytes(NANO, None, engine="ddp")
    assert more == (twice if engine in ("zero1", "zero2") else 0)


def test_a_model_folder_is_its_weights_and_little_else(tmp_path: Path) -> None:
    state = export_state(build(NANO, seed=0))
    write_artefact(tmp_path / "model", state, NANO, {}, extra_states={"ema": state})
    on_disk = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
    assert artefact_bytes(NANO, ema=True) < on_disk < 1.01 * artefact_bytes(NANO, ema=True)


# What is kept for backward: within 1 %, and 0.05 % on a CPU (losses 0.1 %)

GPU_CASES = [
    Case(NANO, rows=2, captions=3, tokens=11),
    Case(NANO, rows=2, captions=3, tokens=11, precision="fp32"),
    Case(NANO, rows=4, captions=3, tokens=11, precision="fp16", recompute=True),
    Case(WIDE, PICO, rows=16, captions=3, tokens=16, world_size=4),
    Case(WIDE, PICO, rows=16, captions=3, tokens=16, world_size=4, precision="fp32"),
    Case(WIDE, PICO, rows=16, captions=3, tokens=16, world_size=4, chunk=4),
    Case(NANO, PICO, rows=16, captions=3, tokens=32, world_size=2, image_to_text="all"),
    Case(PRESETS["vit_t16"], rows=2, captions=4, tokens=30),
    Case(resolve("vit_t16", {"no_ln_pre": True}), rows=1, captions=1, tokens=77, precision="fp32", recompute=True),
    Case(QUICK, rows=2, captions=3, tokens=11),
    Case(replace(NANO, loss="siglip"), rows=16, captions=3, tokens=11),
    Case(LITTLE_SWIN, rows=2, captions=2, tokens=20),
    Case(LITTLE_SWIN, PICO, rows=2, captions=2, tokens=20),
    Case(LITTLE_SWIN, rows=2, captions=2, tokens=20, recompute=True),
]
LARGE_GPU_CASES = [
    Case(PRESETS["swin_t"], PRESETS["vit_t16"], rows=1, captions=2, tokens=77),
    Case(PRESETS["swin_t"], rows=1, captions=2, tokens=20, recompute=True),
]


def name_of(case: Case) -> str:
    shown = [key if value is True else value for key, value in vars(case).items() if value and key != "tokens"]
    return "-".join(str(getattr(value, "name", value)) for value in shown if value != 1)


def check_kept(case: Case, device: str, rel: float) -> None:
    counted = kept(case, device)  # type: ignore[arg-type]
    compute, memory = PRECISION_BYTES[case.precision], of(case)
    mean = (case.tokens + (case.short or case.tokens)) / 2
    image = case.rows * image_tower(case.student, compute).kept(compute, case.recompute)
    text = case.rows * case.captions * text_tower(case.student, mean).kept(compute, case.recompute)
    pairwise = LOSS_TRAITS[case.student.loss].pairwise
    shape = Shape(case.rows, case.world_size, case.captions, case.student.embed_dim, case.chunk, pairwise)

    assert (image, text) == (pytest.approx(counted.image, rel=rel), pytest.approx(counted.text, rel=rel))
    assert memory.loss - task_loss_working(shape) == pytest.approx(counted.loss, rel=max(rel, 1e-3))
    if not case.recompute:
        assert memory.activations == pytest.approx(image + text)
        whole = of(replace(case, precision="fp32"))
        assert memory.weights - whole.weights == counted.copies


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*GPU_CASES, *(pytest.param(case, marks=pytest.mark.full) for case in LARGE_GPU_CASES)], ids=name_of
)
def test_what_a_gpu_would_keep_for_backward(case: Case) -> None:
    check_kept(case, "cuda", 0.01)


@pytest.mark.parametrize(
    "case",
    [
        Case(NANO, rows=2, captions=3, tokens=11, precision="fp32"),
        Case(WIDE, PICO, rows=8, captions=3, tokens=16, precision="fp32", world_size=4),
        Case(NANO, rows=4, captions=4, tokens=30, short=6, precision="fp32"),
        Case(QUICK, rows=2, captions=3, tokens=11, precision="fp32"),
        Case(PRESETS["vit_t16"], rows=1, captions=2, tokens=30, precision="fp32"),
        Case(LITTLE_SWIN, rows=2, captions=1, tokens=12, precision="fp32"),
        pytest.param(Case(PRESETS["swin_t"], rows=2, captions=1, tokens=12, precision="fp32"), marks=pytest.mark.full),
    ],
    ids=name_of,
)
def test_what_a_cpu_keeps_for_backward_in_fp32(case: Case) -> None:
    check_kept(case, "cpu", 0.01 if case.short else 5e-4)  # groups of lengths are put back in order


def test_a_cpu_keeps_less_of_norms_in_half_precision() -> None:
    """There autocast leaves norms in bf16; the text tower's stream is in fp32 on both."""
    case = Case(NANO, rows=2, captions=3, tokens=11)
    gpu, cpu = kept(case, "cuda"), kept(case, "cpu")
    assert 0.8 * gpu.image < cpu.image < 0.95 * gpu.image
    assert cpu.text == pytest.approx(gpu.text, rel=0.01)
    assert cpu.copies == gpu.copies


# The whole step: peak memory within 5 %


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(NANO, rows=64, captions=4, tokens=20),
        Case(QUICK, rows=64, captions=4, tokens=20),
        Case(LITTLE_SWIN, rows=16, captions=1, tokens=20),
        Case(NANO, PICO, rows=64, captions=4, tokens=32, short=8),
        Case(WIDE, NANO, rows=64, captions=4, tokens=20),
        Case(WIDE, NANO, rows=64, captions=4, tokens=20, micro_batch=16),
        Case(NANO, rows=16, captions=2, tokens=8, micro_batch=2),  # mostly states
        Case(MICRO, rows=64, captions=4, tokens=20, recompute=True),
        Case(PRESETS["swin_t"], rows=2, captions=1, tokens=20),  # its last stage has the gradients, its first the rest
        Case(PICO, rows=1024, captions=8, tokens=3),  # mostly similarities
        Case(PICO, rows=1024, captions=8, tokens=3, chunk=64),
        Case(PICO, rows=1024, captions=8, tokens=3, micro_batch=128),
    ],
    ids=name_of,
)
def test_the_most_that_is_alive_in_a_step(case: Case) -> None:
    case = replace(case, precision="fp32")
    assert of(case).total_bytes == pytest.approx(most_alive(case), rel=0.05)


# FSDP2: one rank of a process group whose collectives do nothing


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    monkeypatch.setattr("compt.dist.collectives.share_timeout", lambda: None)  # such groups have none

    def join(count: int) -> None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)

    yield join
    torch.distributed.destroy_process_group()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("name", "world_size", "precision", "rows", "replicas", "reshard"),
    [
        ("vit_nano", 8, "fp32", 4, 1, True),
        ("vit_nano", 8, "bf16", 4, 1, True),
        ("vit_micro", 4, "bf16", 64, 1, True),
        ("vit_nano", 2, "bf16", 8, 1, True),
        ("vit_nano", 1, "bf16", 2, 1, True),
        ("vit_mini", 1, "bf16", 64, 1, True),
        ("vit_micro", 1, "fp32", 64, 1, True),
        ("vit_nano", 8, "bf16", 4, 2, True),
        ("vit_nano", 4, "fp32", 4, 4, True),
        ("vit_nano", 8, "bf16", 4, 1, False),
        ("vit_micro", 4, "fp32", 32, 1, False),
    ],
)
def test_fsdp2_shards_and_gathers_so_much(
    ranks: Callable[[int], None],
    name: str,
    world_size: int,
    precision: str,
    rows: int,
    replicas: int,
    reshard: bool,
) -> None:
    """States within 1 % (shards are padded), peak memory of a step within 5 %."""
    spec = PRESETS[name]
    ranks(world_size)
    task = ClipTask(build(spec, seed=0))
    engine = ShardedEngine(task.module, precision=precision, replicas=replicas, reshard_after_forward=reshard)
    batch = make_batch(Case(spec, rows=rows, captions=2, tokens=10), "cpu")

    def backward() -> None:
        outputs = engine.forward(*batch)
        loss = contrastive_loss(outputs["image"], outputs["text"], outputs["logit_scale"], gather=False)
        engine.backward(loss.task)

    backward()
    memory = memory_per_gpu(
        spec,
        None,
        engine="fsdp2",
        world_size=world_size,
        batch=rows * world_size,
        captions=2,
        tokens=10,
        precision=precision,
        replicas=replicas,
        reshard=reshard,
    )
    held = held_bytes(spec, None, engine="fsdp2", world_size=world_size, precision=precision, replicas=replicas)
    parameters = list(map(local, task.module.parameters()))
    assert held.weights == pytest.approx(nbytes(parameters), rel=0.01)
    assert held.gradients == pytest.approx(nbytes(local(p.grad) for p in task.module.parameters()), rel=0.01)
    engine.step(0.0)
    moments = [local(value) for state in engine.optimizer.state.values() for value in state.values()]
    assert held.optimizer == pytest.approx(nbytes(moments), rel=0.01)
    known = Storages(())
    for tensor in (*parameters, *moments, *task.module.buffers(), *batch):
        known.add(tensor)
    with Alive(known.tensors) as alive:
        backward()
        engine.step(0.0)
    assert memory.total_bytes == pytest.approx(known.bytes + alive.most, rel=0.05)


# Sharded engines, and what has to hold whatever the numbers are


@pytest.mark.parametrize(
    ("engine", "precision", "bytes_per_parameter"),
    [
        ("ddp", "fp32", 4 + 4 + 8),
        ("fsdp2", "fp32", (4 + 4 + 8) / 8),
        ("zero0", "bf16", 4 + 4 + 8),
        ("zero1", "bf16", 4 + (4 + 12) / 8),
        ("zero2", "bf16", 4 + (4 + 12) / 8),
        ("zero3", "bf16", (4 + 4 + 12) / 8),
        ("zero3", "fp32", (4 + 4 + 12) / 8),
    ],
)
def test_bytes_per_parameter_of_the_engines(engine: str, precision: str, bytes_per_parameter: float) -> None:
    """ZeRO (arXiv 1910.02054, section 3.1) with fp32 weights, of which DeepSpeed steps a copy."""
    held = held_bytes(PRESETS["vit_l16"], None, engine=engine, world_size=8, precision=precision)
    count = sum(p.numel() for p in build(PRESETS["vit_l16"], device="meta").parameters())
    assert (held.weights + held.gradients + held.optimizer) / count == pytest.approx(bytes_per_parameter, rel=0.01)


@pytest.mark.parametrize("name", ["vit_l16", "swin_t"])
def test_vectors_are_counted_and_are_few(name: str) -> None:
    spec = resolve(name, {"embed_dim": 96})
    module = StudentModule(build(spec, device="meta"), 128)
    vectors = sum(p.numel() for p in module.parameters() if p.ndim < 2)
    found = {n: held_bytes(spec, resolve(name, {"embed_dim": 128}), engine="fsdp2", world_size=n) for n in (1, 10**9)}
    assert found[1].weights == 4 * sum(p.numel() for p in module.parameters())
    assert found[10**9].weights == pytest.approx(4 * vectors, abs=8)
    assert vectors < 2e-3 * found[1].weights


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("fp32", 4)])
def test_bytes_of_communication_by_hand(precision: str, size: int) -> None:
    def buffers(spec: ModelSpec, engine: str, world_size: int = 8) -> float:
        return memory_per_gpu(
            spec, None, engine=engine, world_size=world_size, batch=8, captions=1, precision=precision
        ).buffers

    large = PRESETS["vit_l16"]
    for spec in (large, PRESETS["vit_pico"]):
        for engine, times in (("zero1", 2), ("zero2", 2), ("zero3", 1)):
            found = buffers(spec, engine) - buffers(spec, "zero0")  # type: ignore[arg-type]
            assert found == times * 4 * 50_000_000, "buckets are as large as ds_configs says, however small the model"

    # A block of width 1024: q, k, v and output, an MLP of four times the width, with biases, and two norms. It is
    # gathered in one piece, its gradient is put together and sent off in fp32.
    block = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 5 * 1024 + 2 * 2 * 1024
    assert block == 12_596_224
    small = resolve("vit_l16", {"vocab_size": 64, "context_length": 7})
    # So few embeddings that the last gradient of FSDP2 is smaller than a block; that of ZeRO is the embeddings'.
    found = buffers(small, "fsdp2") - (buffers(small, "zero0") - 4 * 64 * 768)
    assert found == (size + size + 4) * block


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_settings_of_deepspeed_are_those_that_are_counted(stage: int) -> None:
    found = deepspeed_config(EngineConfig(name=f"zero{stage}"), Optimizer(batch=8), 1)["zero_optimization"]  # type: ignore[arg-type]
    assert found["reduce_bucket_size"] == ZERO_BUCKET
    assert found["overlap_comm"] is True
    assert found.get("stage3_param_persistence_threshold", ZERO_PERSISTENT) == ZERO_PERSISTENT


def states(memory: Memory) -> float:
    return memory.weights + memory.gradients + memory.optimizer


SIZES = {"batch": 4096, "captions": 4, "tokens": 20}  # so many that activations need more than states


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("world_size", [2, 4, 64])
def test_more_sharding_needs_less(precision: str, world_size: int) -> None:
    for name in ("vit_b16", "vit_l16", "swin_b"):
        by_engine = {
            engine: memory_per_gpu(
                PRESETS[name],
                PRESETS["vit_t16"],
                engine=engine,
                world_size=world_size,
                precision=precision,
                **SIZES,  # type: ignore[arg-type]
            )
            for engine in ENGINES
        }
        ordered = [states(by_engine[engine]) for engine in ("zero3", "zero2", "zero1", "zero0", "ddp")]
        assert ordered == sorted(ordered)
        assert states(by_engine["fsdp2"]) < states(by_engine["ddp"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_grows_with_what_is_asked_and_falls_with_gpus(engine: str, precision: str) -> None:
    def need(spec: ModelSpec = NANO, teacher: ModelSpec | None = None, **changed: object) -> Memory:
        options = {"engine": engine, "world_size": 4, "precision": precision, **SIZES, **changed}
        return memory_per_gpu(spec, teacher, **options)  # type: ignore[arg-type]

    base = need()
    for other in (
        need(batch=8192),
        need(captions=5),
        need(tokens=21),
        need(tokens={10: 0.1, 30: 0.9}),
        need(MICRO),
        need(resolve("vit_nano", {"depth": 5})),
        need(teacher=PICO),
        need(ema=True),
    ):
        assert other.total_bytes > base.total_bytes
    for cheaper in (need(recompute=True), need(micro_batch=8), need(world_size=8)):
        assert cheaper.total_bytes < base.total_bytes
    assert need(recompute=True).activations < base.activations
    assert need(loss_chunk=2).loss < base.loss
    assert need(tokens=20, teacher=PICO).teacher > 0
    assert need(tokens=400) == need(tokens=None)
    for memory in (base, need(recompute=True), need(micro_batch=8), need(teacher=PICO, loss_chunk=2)):
        assert min(vars(memory).values()) >= 0
        largest = max(memory.activations, memory.gradients, memory.loss)
        assert memory.total_bytes >= memory.weights + memory.optimizer + memory.teacher + largest
    if engine in ("fsdp2", "zero1", "zero2", "zero3"):
        assert states(need(world_size=8)) < states(base)
    else:
        assert states(need(world_size=8)) == states(base)


def test_the_counters_count() -> None:
    """Counts each storage once, however many views are kept, and no freed storage."""
    case = Case(PICO, rows=2, captions=1, tokens=4, precision="fp32")
    engine, task = engine_and_task(case)
    batch = make_batch(case, "cpu")
    step(engine, task, case, batch)
    distinct = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in static_tensors(engine, task)}
    assert sum(distinct.values()) == nbytes(static_tensors(engine, task))
    assert most_alive(case) >= sum(distinct.values()) + nbytes(task.module.parameters())
    assert torch.is_grad_enabled()
