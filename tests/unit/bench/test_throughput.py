"""Measuring throughput: what is timed, how a batch is found, and that nothing finished is lost."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compt.bench import throughput
from compt.bench.estimate import seconds_of
from compt.bench.step import QuicklyDrawn, Setup, TrainingStep, random_captions
from compt.bench.throughput import largest_batch, measure, measure_apart, run
from compt.cost.gpus import DEVICES
from compt.cost.speed import Measurement, Throughput, other_settings
from compt.cost.training import exact_breakdown
from compt.dist import child
from compt.errors import ConfigError, RunError
from compt.files import memory_sizes
from compt.models.clip import build, caption_lengths, padded_tokens
from compt.models.init import DrawnState
from compt.models.presets import PRESETS, resolve
from compt.plan.jobs import make_plan
from compt.recipe.engine import EngineConfig, Fsdp2
from compt.recipe.optimizer import Ema, Optimizer
from compt.recipe.read import load_recipe
from compt.train.losses import ContrastiveLoss
from compt.train.metrics import read_metrics
from tests.helpers.process import finish, start
from tests.helpers.recipe import FIRST, SECOND, chain, make_data, manifest

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
PICO, NANO = PRESETS["vit_pico"], PRESETS["vit_nano"]
FP32, BF16 = Optimizer(precision="fp32"), Optimizer(precision="bf16")
LINK = Setup(student=NANO, teacher=PICO, captions=2, tokens=6, optimizer=FP32)
ALONE = replace(LINK, student=PICO, teacher=None)


def with_engine(setup: Setup, changes: dict[str, Any]) -> Setup:
    """`setup` with changes of its own fields and of those of its engine."""
    own = {key: value for key, value in changes.items() if key in Setup.__dataclass_fields__}
    return engine_of(replace(setup, **own), **{key: value for key, value in changes.items() if key not in own})


def engine_of(setup: Setup, **engine: Any) -> Setup:
    """`setup` with other settings of the engine."""
    return replace(setup, engine=EngineConfig(**{**setup.engine.model_dump(exclude_unset=True), **engine}))


@given(st.integers(0, 5000), st.integers(1, 4096))
def test_the_largest_batch_is_found(limit: int, most: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest_batch(fits, most)
    best = min(limit, most)
    assert found <= best
    assert found == 0 or found in tried
    assert best - found <= max(8, best // 15) if best > 64 else found == best or best - found <= best // 16
    assert max(tried) <= most
    assert len(tried) == len(set(tried)) <= 20


def lengths_of(batch: int, **changes: Any) -> torch.Tensor:
    return caption_lengths(random_captions(with_engine(LINK, changes), batch, torch.Generator().manual_seed(0)))


def test_captions_are_as_long_as_is_to_be_computed() -> None:
    tokens = random_captions(with_engine(LINK, {"tokens": {9: 1.0, 5: 3.0}, "text_buckets": 4}), 10, torch.Generator())
    lengths = caption_lengths(tokens)
    assert tokens.shape == (10, 2, 9)
    assert sorted(lengths.flatten().tolist()) == [5] * 15 + [9] * 5
    assert lengths.flatten().tolist() != sorted(lengths.flatten().tolist())
    assert ((tokens == NANO.vocab_size - 1).sum(-1) == 1).all()
    assert all((caption[length:] == 0).all() for caption, length in zip(tokens[0], lengths[0], strict=True))
    assert (tokens[..., :4] > 0).all()
    assert lengths_of(3, tokens=6.4, text_buckets=1).unique().tolist() == [6]
    assert sorted(lengths_of(5, tokens=6.4).flatten().tolist()) == [6] * 6 + [7] * 4
    assert lengths_of(3, tokens=None).unique().tolist() == [32]
    assert lengths_of(3, tokens={99: 1.0}).unique().tolist() == [32]
    # In one bucket all are computed as long as the longest: no other lengths come to the mean.
    assert lengths_of(10, tokens={5: 3.0, 9: 1.0}, text_buckets=1).unique().tolist() == [6]
    assert sorted(lengths_of(8, tokens=7.4, text_buckets=4).flatten().tolist()) == [7] * 8 + [8] * 8
    assert sorted(lengths_of(10, tokens={5: 3.0, 9: 1.0}).flatten().tolist()) == [5] * 15 + [9] * 5
    assert sorted(lengths_of(10, tokens=7.4, micro_batch=2, text_buckets=1)[::2, 0].tolist()) == [7, 7, 7, 8, 8]


@given(
    st.dictionaries(st.integers(1, 32), st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(0, 6),
    st.integers(1, 12),
)
def test_what_is_computed_is_what_was_asked_for(shares: dict[int, int], batch: int, buckets: int, micro: int) -> None:
    text = {"text_buckets": buckets} if buckets else {"text": "packed"}
    made = lengths_of(batch, tokens=shares, micro_batch=micro, **text)
    computed = sum(padded_tokens(piece.flatten(), buckets) for piece in made.split(micro))
    mean = sum(length * share for length, share in shares.items()) / sum(shares.values())
    bucket = -(-2 * min(micro, batch) // (buckets or 2 * batch))
    # Half a token of a bucket is left by rounding; ends of the range and a last, smaller bucket take a little more.
    assert abs(computed - 2 * batch * mean) <= 0.5 * bucket + batch * 0.5


def test_a_step_trains_the_student_and_runs_the_teacher() -> None:
    step = TrainingStep(LINK, CPU)
    student = {name: value.clone() for name, value in step.task.model.state_dict().items()}
    teacher = {name: value.clone() for name, value in step.task.teacher.state_dict().items()}
    seen: list[tuple[int, bool]] = []
    step.task.teacher.visual.register_forward_hook(lambda *_: seen.append((1, torch.is_grad_enabled())))
    original = step.task.teacher.encode_image
    step.task.teacher.encode_image = lambda images: (
        seen.append((len(images), torch.is_grad_enabled())) or original(images)
    )
    data = step.data(4)
    assert (data.images.shape, data.images.dtype, data.tokens.shape) == ((4, 3, 32, 32), torch.uint8, (4, 2, 6))
    step(data)
    assert seen == [(4, False)]
    assert all(torch.equal(value, teacher[name]) for name, value in step.task.teacher.state_dict().items())
    moved = [name for name, value in step.task.model.named_parameters() if not torch.equal(value, student[name])]
    assert {"visual.proj", "text_projection", "token_embedding.weight"} <= set(moved)
    assert all(parameter.grad is None for parameter in step.task.model.parameters())


def test_options_of_the_setup_arrive() -> None:
    step = TrainingStep(replace(engine_of(ALONE, text_buckets=3, loss_chunk=2), optimizer=BF16), CPU)
    assert (step.task.module.text_buckets, step.task.task_loss) == (3, ContrastiveLoss(chunk=2))
    assert step.engine.precision == "bf16"
    pieces: list[int] = []
    step = TrainingStep(engine_of(LINK, micro_batch=3), CPU)
    forward = step.engine.forward
    step.engine.forward = lambda images, *more, **how: pieces.append(len(images)) or forward(images, *more, **how)
    step(step.data(7))
    assert pieces == [3, 3, 1] * 2
    assert TrainingStep(replace(LINK, optimizer=BF16), CPU).task.teacher_dtype == torch.bfloat16


def test_seconds_are_those_of_steps_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0, 30.0, 39.0])
    step = TrainingStep(ALONE, CPU)
    calls: list[int] = []
    monkeypatch.setattr(TrainingStep, "__call__", lambda self, batch: calls.append(len(batch)))
    monkeypatch.setattr("compt.bench.throughput.time.perf_counter", lambda: next(clock))
    assert step.seconds(step.data(2), warm_up=2, repeats=2, seconds=5.5) == [1.0, 3.0, 2.0]
    assert calls == [2] * 5


def out_of_memory_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that cannot run steps of more than `limit` samples. Returns the batches that were tried."""
    original = TrainingStep.__call__
    tried: list[int] = []

    def limited(self: TrainingStep, batch: Any) -> None:
        tried.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, batch)

    monkeypatch.setattr(TrainingStep, "__call__", limited)
    monkeypatch.setattr(throughput, "CPU_STEP_SECONDS", 1e6)
    return tried


def test_the_batch_is_searched_for_up_to_what_memory_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = out_of_memory_above(5, monkeypatch)
    found = measure(ALONE, CPU, None, 32, 0.0)
    assert (found.batch, found.failure, found.repeats) == (5, None, 3)
    assert tried == [1, 1, 2, 4, 8, 1, 6, 1, 5, 5, 5, 5, 5]  # after a failure everything is built again
    assert measure(ALONE, CPU, None, 3, 0.0).batch == 3


def test_what_fits_only_once_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(40, monkeypatch)
    original = TrainingStep.seconds

    def seconds(self: TrainingStep, data: Any, **options: Any) -> list[float]:
        if len(data) > 36:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, data, **options)

    monkeypatch.setattr(TrainingStep, "seconds", seconds)
    found = measure(ALONE, CPU, None, 64, 0.0)
    assert (found.failure, found.batch) == (None, 36)  # 40, less a sixteenth of it at a time


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(4, monkeypatch)
    found = measure(LINK, CPU, 6, 32, 0.0)
    assert found.failure == "a batch of 6 does not fit into memory"
    assert (found.batch, found.seconds_per_sample, found.mfu) == (6, None, None)
    assert (found.student, found.teacher, found.captions, found.tokens) == (NANO, PICO, 2, 6)
    out_of_memory_above(0, monkeypatch)
    assert measure(LINK, CPU, None, 32, 0.0).failure == "a batch of 1 does not fit into memory"


def test_a_cpu_stops_at_long_steps_and_before_its_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "CPU_STEP_SECONDS", 0.0)
    assert measure(ALONE, CPU, None, 32, 0.0).batch == 1
    monkeypatch.setattr(throughput, "CPU_STEP_SECONDS", 1e6)
    sizes = {**memory_sizes(), "MemAvailable": 1000}
    monkeypatch.setattr(throughput, "memory_sizes", lambda: sizes)
    search = throughput._LargestBatch(ALONE, CPU)
    search.last_batch, search.first_peak, search.last_peak = 4, 10**12, 10**12 + 3000  # 1000 bytes a sample
    assert search._is_too_much(8)
    sizes["VmRSS"] = 10**12 + 6200
    assert not search._is_too_much(8)  # 7000 - 6200 < 900
    sizes["VmRSS"] = 10**12 + 6000
    assert search._is_too_much(8)


def test_numbers_of_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0.5, 0.1, 0.2]
    monkeypatch.setattr(TrainingStep, "seconds", lambda self, data, **options: times)
    monkeypatch.setattr(throughput, "known_device", lambda device: DEVICES["h200"])
    setup = with_engine(LINK, {"tokens": {4: 1.0, 8: 1.0}, "text_buckets": 2})
    found = measure(setup, CPU, 8, 32, 0.0)
    assert (found.seconds_per_sample, found.low, found.high) == (median(times) / 8, 0.1 / 8, 0.5 / 8)
    assert (found.tokens, found.computed_tokens, found.repeats) == (6.0, 6.0, 3)
    cost = exact_breakdown(NANO, PICO, batch=8, captions=2, tokens=6.0).of_steps(1)
    useful = cost.student_training_macs + cost.teacher_forward_macs + cost.loss_macs
    assert found.mfu == pytest.approx(2 * useful * 8 / 0.2 / 66.9e12)
    one_bucket = measure(engine_of(setup, text_buckets=1), CPU, 8, 32, 0.0)
    assert (one_bucket.tokens, one_bucket.computed_tokens) == (6.0, 6.0)
    half = measure(replace(setup, tokens=6.5), CPU, 8, 32, 0.0)
    assert (half.tokens, half.computed_tokens) == (6.5, 6.5)
    ways = {"micro_batch": 4, "loss_chunk": 4}
    with_ways = measure(engine_of(setup, **ways), CPU, 8, 32, 0.0)
    assert {key: getattr(with_ways, key) for key in (*ways, "text_buckets", "compile")} == {
        **ways,
        "text_buckets": 2,
        "compile": "off",
    }
    in_one = measure(engine_of(setup, **ways), CPU, 4, 32, 0.0)
    assert (in_one.micro_batch, in_one.loss_chunk) == (None, None)
    made = {"task": SimpleNamespace(model=build(NANO, "meta"))}
    monkeypatch.setattr(TrainingStep, "__init__", lambda self, setup, device: vars(self).update(setup=setup, **made))
    monkeypatch.setattr(TrainingStep, "data", lambda self, batch: found_data)
    found_data = SimpleNamespace(tokens=random_captions(setup, 8, torch.Generator()))
    assert measure(engine_of(setup, compile="blocks"), CPU, 8, 32, 0.0).compile == "blocks"
    monkeypatch.undo()
    assert throughput.known_device(CPU) is None
    assert throughput.peak_flops(CPU, "bf16") is None


def test_a_measurement_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "METHOD", "spawn")  # as users have it
    found = measure_apart(LINK, CPU, 4, 32, 0.0)
    assert found.failure is None
    assert (found.student, found.teacher, found.batch) == (NANO, PICO, 4)
    assert 0 < found.low <= found.seconds_per_sample <= found.high
    assert found.mfu is None
    # Weights, two moments and gradients in fp32 of some 3.4 M parameters are the least that it grew by.
    if found.peak_memory_bytes is not None:
        assert 5e7 < found.peak_memory_bytes < 1e9


def test_a_measurement_takes_the_gpu_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process is on the first GPU, where Triton would launch its kernels."""
    seen: list[Any] = []
    monkeypatch.setattr("torch.cuda.set_device", seen.append)
    monkeypatch.setattr(throughput, "measure", lambda setup, device, *rest: seen.append((device, *rest)))
    gpu = torch.device("cuda", 3)
    throughput._send_measurement(SimpleNamespace(send=seen.append), LINK, gpu, 4, 32, 0.5)
    assert seen == [gpu, (gpu, 4, 32, 0.5), None]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_another_engine_is_measured_on_one_device(engine: Any) -> None:
    setup = engine_of(LINK, name=engine, recompute=True)
    found = measure_apart(setup, CPU, 4, 32, 0.0)
    assert (found.failure, found.engine, found.recompute, found.batch) == (None, engine, True, 4)
    assert 0 < found.low <= found.seconds_per_sample <= found.high


class _Killed:
    def __reduce__(self) -> Any:
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


def test_a_killed_process_is_one_failed_job() -> None:
    found = measure_apart(ALONE, _Killed(), 4, 32, 0.0)
    assert found.failure == "its process was killed, which the system does when memory runs out"
    assert (found.student, found.batch) == (PICO, 4)
    missing = engine_of(ALONE, name="zero1", deepspeed_config="/nowhere/mine.json")
    with pytest.raises(ConfigError, match=r"/nowhere/mine\.json: engine\.deepspeed_config cannot be read"):
        measure_apart(missing, CPU, 4, 32, 0.0)


def measure_wrongly(told: Path) -> None:
    child.METHOD = "fork"
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    measure_apart(replace(LINK, captions="two"), CPU, 4, 32, 0.0)


def test_a_fault_of_the_process_is_printed_above_the_error(tmp_path: Path) -> None:
    assert finish(start(measure_wrongly, tmp_path / "told")) == RunError.exit_code
    told = (tmp_path / "told").read_text()
    assert told.index("TypeError") < told.index("measuring vit_nano failed (exit code 1); its error is above")


ENGINE_KEYS = ("micro_batch", "loss_chunk", "compile", "recompute")
SETUPS = [ALONE, replace(ALONE, captions=3), LINK, replace(LINK, captions=3)]


class Meter:
    """Replaces `measure_apart`. Stops at call `stop`, like a kill."""

    def __init__(self, stop: int | None = None, failure: str | None = None) -> None:
        self.seen: list[Setup] = []
        self.stop, self.failure = stop, failure

    def __call__(self, setup: Setup, device: torch.device, batch: int | None, most: int, seconds: float) -> Measurement:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(setup)
        done = {"failure": self.failure} if self.failure else {"seconds_per_sample": 0.5, "low": 0.25, "high": 1.0}
        asked = {"captions": setup.captions, "tokens": setup.tokens, "batch": batch or most, "repeats": 3}
        asked |= {key: getattr(setup.engine, key) for key in ENGINE_KEYS}
        asked |= {"engine": setup.engine.name, "text_buckets": setup.engine.buckets}
        asked["settings"] = other_settings(setup.optimizer, setup.engine)
        return Measurement(student=setup.student, teacher=setup.teacher, **asked, **done)


def bench(out: Path, meter: Meter, setups: list[Setup] = SETUPS, **options: Any) -> tuple[Throughput, list[bool]]:
    kept: list[bool] = []
    made = run(
        setups, CPU, out, command="compt bench", measure=meter, show=lambda entry, old: kept.append(old), **options
    )
    assert Throughput.read(out) == made
    return made, kept


def test_a_rerun_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    with pytest.raises(KeyboardInterrupt):
        bench(out, Meter(stop=2))
    assert [entry.captions for entry in Throughput.read(out).entries] == [2, 3]
    meter = Meter()
    made, kept = bench(out, meter)
    assert meter.seen == SETUPS[2:]
    assert kept == [True, True, False, False]
    assert [(entry.student, entry.captions) for entry in made.entries] == [(s.student, s.captions) for s in SETUPS]
    assert (made.kind, made.precision, made.threads, made.command) == (
        None,
        "fp32",
        torch.get_num_threads(),
        "compt bench",
    )
    assert torch.__version__.startswith(made.versions["torch"])
    meter = Meter()
    bench(out, meter)
    assert meter.seen == []
    meter = Meter()
    assert len(bench(out, meter, SETUPS[:1], fresh=True)[0].entries) == len(meter.seen) == 1


def test_a_model_that_does_not_fit_is_not_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    bench(out, Meter(failure="a batch of 1 does not fit into memory"), SETUPS[:2])
    made, kept = bench(out, Meter())
    assert kept == [True, True, False, False]
    assert [entry.failure is None for entry in made.entries] == [False, False, True, True]


def test_another_batch_or_setting_is_measured_too(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    bench(out, Meter(), batch=4)
    assert bench(out, Meter(), batch=4)[1] == [True] * 4
    made, kept = bench(out, Meter(), SETUPS[:1], batch=6)
    assert kept == [False]
    assert sorted(entry.batch for entry in made.entries) == [4, 4, 4, 4, 6]
    for changes in (
        {"micro_batch": 2},
        {"loss_chunk": 2},
        {"compile": "blocks"},
        {"recompute": True},
        {"name": "fsdp2"},
        {"text_buckets": 2},
        {"text": "padded"},
        {"shard_teacher": True},
        {"name": "fsdp2", "fsdp2": Fsdp2(cpu_offload=True)},
        {"name": "zero2", "deepspeed_config": "mine.json"},
        {"tokens": 8.0},
        {"optimizer": Optimizer(precision="fp32", ema=Ema(decay=0.9))},
    ):
        other = [with_engine(SETUPS[0], changes)]
        assert bench(out, Meter(), other, batch=4)[1] == [False], changes
        assert bench(out, Meter(), other, batch=4)[1] == [True], changes
    # A micro-batch larger than the batch does nothing.
    assert bench(out, Meter(), [engine_of(SETUPS[0], micro_batch=4, loss_chunk=9)], batch=4)[1] == [True]


def test_a_batch_that_was_given_is_no_answer_to_a_search(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    bench(out, Meter(failure="a batch of 1024 does not fit into memory"), SETUPS[:1], batch=1024)
    bench(out, Meter(), SETUPS[:1], batch=8)
    made, kept = bench(out, Meter(), SETUPS[:1], most=64)
    assert kept == [False]
    assert [(entry.batch, entry.searched) for entry in made.entries] == [(1024, False), (8, False), (64, True)]
    assert bench(out, Meter(), SETUPS[:1])[1] == [True]
    assert bench(out, Meter(), SETUPS[:1], batch=64)[1] == [True]
    # Files of before do not say which it was.
    out.write_text(re.sub(r'"searched": \w+,', "", out.read_text()))
    assert [entry.searched for entry in Throughput.read(out).entries] == [False] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "NVIDIA H200"}, "device NVIDIA H200, this one has "),
        ({"precision": "bf16"}, "precision bf16, this one has fp32"),
        ({"seed": 7}, "seed 7, this one has 0"),
        ({"versions": {"torch": "1.0"}}, "versions torch 1.0, this one has python"),
    ],
)
def test_measurements_of_two_machines_do_not_mix(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    out = tmp_path / "t.json"
    made, _ = bench(out, Meter(), SETUPS[:1])
    text = made.model_copy(update=changes).model_dump_json()
    out.write_text(text)
    with pytest.raises(ConfigError, match=rf"t\.json holds measurements with {message}.*--fresh"):
        bench(out, Meter())
    assert out.read_text() == text
    assert bench(out, Meter(), fresh=True)[1] == [False] * 4


def test_a_damaged_file_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    out.write_text('{"format": 1')
    with pytest.raises(ConfigError, match="is not a throughput file"):
        bench(out, Meter())
    assert out.read_text() == '{"format": 1'


def test_metrics_have_the_mfu_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_data(tmp_path)
    chain(base, tmp_path / "unknown")
    assert all("mfu" not in row for row in read_metrics(tmp_path / "unknown" / "jobs" / FIRST / "metrics.jsonl"))
    asked: list[tuple[torch.device, str]] = []
    monkeypatch.setattr("compt.chain.job.peak_flops", lambda *of: asked.append(of) or 1e12)
    changes = ("engine.micro_batch=4", "engine.log_every={steps: 2}")
    chain(base, tmp_path / "known", *changes)
    assert asked == [(CPU, "fp32")] * 2
    for name in (FIRST, SECOND):
        rows = read_metrics(tmp_path / "known" / "jobs" / name / "metrics.jsonl", "train")
        cost = manifest(tmp_path / "known", name)["cost"]
        # Captions of two steps are about as long as those of the run, which the manifest's cost is counted with.
        useful = cost["student_training_macs"] + cost["teacher_forward_macs"] + cost["loss_macs"]
        for row in rows:
            assert row["mfu"] == pytest.approx(2 * useful * row["samples_per_s"] / 1e12, rel=0.1)
        assert cost["recompute_macs"] > 0.1 * useful


def test_an_estimate_times_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Setup, int]] = []
    monkeypatch.setattr(TrainingStep, "__init__", lambda self, setup, device: setattr(self, "setup", setup))
    monkeypatch.setattr(TrainingStep, "data", lambda self, batch: batch)
    monkeypatch.setattr(
        TrainingStep, "seconds", lambda self, batch: seen.append((self.setup, batch)) or [3.0, 1.0, 2.0]
    )
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", ["engine.micro_batch=16", "engine.loss_chunk=8"])
    jobs = make_plan(recipe, world_size=2).links
    twice = [(job, 10) for job in (*jobs, *jobs)]
    assert seconds_of(twice, recipe, CPU, 2) == 2 * 10 * 2.0 * len(jobs)
    assert [(setup.engine.micro_batch, setup.tokens, batch) for setup, batch in seen] == [(16, 7.4, 64)] * len(jobs)
    seen.clear()
    monkeypatch.setattr("compt.bench.estimate.find_micro_batch", lambda trial: trial.share // 4)
    found = load_recipe(ROOT / "recipes" / "demo.yaml", ["engine.find_micro_batch=true"])
    seconds_of([(jobs[0], 10)], found, CPU)
    assert [(setup.engine.micro_batch, batch) for setup, batch in seen] == [(32, 128)]


def test_timed_weights_have_the_distributions_of_trained_ones_and_are_the_same_on_all_ranks() -> None:
    spec = resolve("vit_pico", {"depth": 1})
    made = [kind(build(spec, device="meta"), spec, 3) for kind in (QuicklyDrawn, QuicklyDrawn, DrawnState)]
    for name in made[0]:
        quick, again, drawn = (state[name] for state in made)
        assert torch.equal(quick, again)
        if drawn.numel() > 2000:
            assert float(quick.std() / drawn.std()) == pytest.approx(1, abs=0.05), name
            assert float(quick.abs().max() / drawn.abs().max()) == pytest.approx(1, abs=0.4), name
        elif not torch.equal(drawn, torch.zeros_like(drawn)):
            assert quick.abs().sum() > 0
