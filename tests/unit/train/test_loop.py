"""The training loop: its schedule, what it counts, how it stops, and that a stop leaves no trace in the result."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from compt.bench.estimate import seconds_of
from compt.data.batch import SKIPPED, Batch
from compt.dist.watch.thread import STOPS
from compt.engines.base import AdamWSettings
from compt.engines.ddp import DataParallelEngine
from compt.errors import DataError, Interrupted, RunError
from compt.models.clip import build
from compt.models.init import init_parameters
from compt.models.presets import resolve
from compt.recipe.optimizer import Schedule
from compt.train import checkpoint, loop
from compt.train.accumulate import cached_backward
from compt.train.loop import TrainResult, TrainSettings, learning_rate, train
from compt.train.metrics import read_metrics
from compt.train.signals import StopSignal
from compt.train.task import ClipTask
from tests.helpers.recipe import (
    FIRST,
    SECOND,
    at_step,
    chain,
    equal,
    largest_difference,
    lines,
    make_data,
    manifest,
    plan_of,
    stopped_at,
    weights,
)

SETTINGS = TrainSettings(
    total_steps=6,
    warmup_steps=2,
    batch=4,
    micro_batch=4,
    steps_per_epoch=3,
    lr=1e-3,
    schedule=Schedule(),
    clip_grad_norm=None,
    max_nonfinite=3,
    log_every=1,
    checkpoint_every=100,
    evaluate_every=None,
    keep_checkpoints=2,
    keep_every=None,
    async_checkpoints=False,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    identity={"recipe": "r", "data": "d"},
)


def batches(start: int = 0, stop: int = 100) -> Iterator[Batch]:
    """The batch of step s depends only on s."""
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
        tokens = torch.randint(1, 1000, (4, 2, 6), generator=generator)
        tokens[..., -1] = 49407
        yield Batch(images, tokens, [f"{step}-{i}" for i in range(4)], {"image": 1} if step == 1 else {}, step % 2)


class Bench:
    """A small model and its engine, made from a seed, and the results of training it."""

    def __init__(self, folder: Path, ema_decay: float | None = None, **changes: Any) -> None:
        self.folder = folder
        self.settings = replace(SETTINGS, **changes)
        spec = resolve("vit_pico", {"patch_size": 16, "depth": 1})
        model = build(spec)
        init_parameters(model, spec, 0)
        self.task = ClipTask(model)
        self.engine = DataParallelEngine(
            self.task.module, AdamWSettings(eps=1e-4), caps=self.task.caps, ema_decay=ema_decay
        )

    def train(self, loader: Callable[[int], Iterable[Batch]] = batches, **options: Any) -> TrainResult:
        return train(self.task, self.engine, self.settings, self.folder, loader, **options)

    def lines(self, kind: str | None = None) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl", kind)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.engine.state().items()}

    def average(self) -> dict[str, Tensor]:
        return dict(self.engine.weights(average=True))


# --- schedule


@pytest.mark.parametrize(
    ("total", "warmup", "wanted"),
    [
        (10, 4, [0.25, 0.5, 0.75, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        (4, 0, [1.0, 0.8535534, 0.5, 0.1464466]),
        (2, 2, [0.5, 1.0]),
        (1, 0, [1.0]),
    ],
)
def test_the_learning_rate_by_hand(total: int, warmup: int, wanted: list[float]) -> None:
    settings = replace(SETTINGS, total_steps=total, warmup_steps=warmup, lr=2.0)
    assert [learning_rate(step, settings) / 2 for step in range(total)] == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ({"shape": "linear"}, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ({"shape": "linear", "end": 0.2}, [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ({"shape": "constant"}, [0.5, *[1.0] * 9]),
        ({"shape": "wsd", "decay": 0.4}, [0.5, *[1.0] * 6, 0.75, 0.5, 0.25]),
        ({"shape": "wsd", "decay": 1.0, "end": 0.2}, [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ({"end": 0.5}, [0.5, 1.0, *(0.75 + 0.25 * math.cos(math.pi * at / 8) for at in range(8))]),
    ],
)
def test_other_schedules_by_hand(schedule: dict[str, Any], wanted: list[float]) -> None:
    settings = replace(SETTINGS, total_steps=10, warmup_steps=2, lr=2.0, schedule=Schedule(**schedule))
    assert [learning_rate(step, settings) / 2 for step in range(10)] == pytest.approx(wanted)


def test_steps_are_made_at_the_scheduled_rate(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    used = []
    step = bench.engine.step

    def spy(lr: float, max_norm: float | None = None) -> Tensor:
        norm = step(lr, max_norm)
        used.append([group["lr"] for group in bench.engine.optimizer.param_groups])
        return norm

    bench.engine.step = spy  # type: ignore[method-assign]
    bench.train()
    wanted = [learning_rate(step, bench.settings) for step in range(6)]
    assert used == [[lr, lr] for lr in wanted]
    assert [line["lr"] for line in bench.lines()] == wanted


# --- what it counts and writes


def test_lines_share_one_axis(tmp_path: Path) -> None:
    bench = Bench(tmp_path, log_every=2, evaluate_every=4, total_steps=5, macs=lambda used: 10.0 * used.steps)
    result = bench.train(evaluate=lambda: {"score": 1.0})
    assert [(line["kind"], line["step"], line["samples"]) for line in bench.lines()] == [
        ("train", 2, 8),
        ("train", 4, 16),
        ("eval", 4, 16),
        ("train", 5, 20),
        ("eval", 5, 20),
    ]
    last = bench.lines("train")[-1]
    assert last["epoch"] == 5 / 3
    assert [line["macs"] for line in bench.lines("train")] == [20.0, 40.0, 50.0]
    assert last["skipped_image"] == 1
    assert last["device_hours"] == result.device_hours > 0
    assert 0 <= last["data_wait"] <= 1
    assert 0.01 < last["memory_gib"] < 100
    assert (result.steps, result.samples, result.few_captions) == (5, 20, 2)
    assert result.skipped_samples == {**dict.fromkeys(SKIPPED, 0), "image": 1}


def test_evaluation_sees_the_model_in_evaluation_mode_and_costs_no_device_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, evaluate_every=2)
    modes = []
    ahead = [0.0]
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead[0])

    def evaluate() -> dict[str, float]:
        modes.append(bench.task.module.training)
        ahead[0] += 3600.0
        return {}

    result = bench.train(evaluate=evaluate)
    assert modes == [False, False, False]
    assert bench.task.module.training
    assert 0 < result.device_hours < 0.9


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first = Bench(tmp_path, ema_decay=0.9)
    result = first.train()
    again = Bench(tmp_path, ema_decay=0.9)
    same = again.train(lambda _: pytest.fail("the data were opened"))
    assert same == result
    assert equal(first.state(), again.state())
    assert equal(first.average(), again.average())
    assert len(again.lines()) == 6


# --- stopping and resuming


def stopping_at(step: int) -> Callable[[int], Iterable[Batch]]:
    """Batches, with a SIGTERM while the batch of `step` (from 1) is waited for."""

    def loader(start: int) -> Iterator[Batch]:
        for at, batch in enumerate(batches(start), start + 1):
            if at == step:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    return loader


@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_stopped_and_resumed_is_uninterrupted(step: int, tmp_path: Path) -> None:
    whole = Bench(tmp_path / "whole", ema_decay=0.8, clip_grad_norm=5.0, micro_batch=2)
    result = whole.train()
    changes: dict[str, Any] = {"ema_decay": 0.8, "clip_grad_norm": 5.0, "micro_batch": 2}
    with pytest.raises(Interrupted, match=rf"stopped by SIGTERM at step {step - 1} of 6; saved") as caught:
        Bench(tmp_path / "parts", **changes).train(stopping_at(step))
    assert caught.value.exit_code == 75
    parts = Bench(tmp_path / "parts", **changes)
    again = parts.train()
    assert equal(whole.state(), parts.state())
    assert equal(whole.average(), parts.average())
    machine = {"samples_per_s", "data_wait", "device_hours", "memory_gib"}
    kept = [[{k: v for k, v in line.items() if k not in machine} for line in bench.lines()] for bench in (whole, parts)]
    assert kept[0] == kept[1]
    assert replace(again, device_hours=0.0) == replace(result, device_hours=0.0)
    hours = [line["device_hours"] for line in parts.lines()]
    assert hours == sorted(hours)


def test_a_signal_in_the_last_step_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 6 of 6"):
        at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        Bench(tmp_path).train()
    result = Bench(tmp_path).train(lambda _: pytest.fail("the data were opened"))
    assert result.steps == 6


def test_a_signal_ends_a_wait_for_data_that_never_come(tmp_path: Path) -> None:
    def endless(start: int) -> Iterator[Batch]:
        yield from batches(start, 2)
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(120)
        pytest.fail("the signal was not heard")

    with pytest.raises(Interrupted, match="at step 2 of 6; saved"):
        Bench(tmp_path, checkpoint_every=100).train(endless)
    assert checkpoint.find_latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"


def test_a_signal_after_the_last_step_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = checkpoint.Saver.finish

    def asked(saver: checkpoint.Saver) -> None:
        signal.raise_signal(signal.SIGTERM)
        finish(saver)

    monkeypatch.setattr(checkpoint.Saver, "finish", asked)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 6 of 6; saved"):
        Bench(tmp_path).train()


def test_it_goes_on_from_the_last_checkpoint_where_it_was_killed(tmp_path: Path) -> None:
    def dying(start: int) -> Iterator[Batch]:
        yield from batches(start, 5)
        raise KeyError("a bug")

    whole = Bench(tmp_path / "whole")
    whole.train()
    killed = Bench(tmp_path / "killed", checkpoint_every=3)
    with pytest.raises(KeyError):
        killed.train(dying)
    assert [line["step"] for line in killed.lines()] == [1, 2, 3, 4, 5]
    opened = []

    def watched(start: int) -> Iterator[Batch]:
        opened.append(start)
        return batches(start)

    parts = Bench(tmp_path / "killed", checkpoint_every=3)
    parts.train(watched)
    assert opened == [3], "nothing is replayed"
    assert equal(whole.state(), parts.state())
    assert [line["step"] for line in parts.lines()] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_that_are_gone_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Bench(tmp_path, checkpoint_every=2).train()
    caplog.clear()
    shutil.rmtree(tmp_path / "checkpoints")
    Bench(tmp_path, checkpoint_every=2).train()
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"no whole checkpoint is left in {tmp_path / 'checkpoints'}, though step 6 was logged" in said


def test_what_is_kept_is_also_saved_between_other_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Any] = {"total_steps": 11, "checkpoint_every": 3, "keep_every": 4, "keep_checkpoints": 1}
    Bench(tmp_path, **changes).train()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000004", "step-00000008", "step-00000011"]
    # The state of the step itself: a resume from there gives the same.
    shutil.rmtree(folder / "step-00000011")
    opened: list[int] = []
    parts = Bench(tmp_path, **changes)
    parts.train(lambda start: opened.append(start) or batches(start))
    whole = Bench(tmp_path / "whole", total_steps=11)
    whole.train()
    assert opened == [8]
    assert equal(whole.state(), parts.state())
    # A run knows that one was there, though none of the other distance was.
    seldom: dict[str, Any] = {"total_steps": 3, "keep_every": 2}
    Bench(tmp_path / "seldom", **seldom).train()
    shutil.rmtree(tmp_path / "seldom" / "checkpoints")
    Bench(tmp_path / "seldom", **seldom).train()
    assert "though step 3 was logged" in caplog.text


def test_a_clock_that_pauses_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    assert Bench(tmp_path, total_steps=2).train().steps == 2


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    Bench(tmp_path, total_steps=2).train()
    for key in ("recipe", "data"):
        with pytest.raises(RunError, match=f"belongs to another run: its {key} differs"):
            Bench(tmp_path, identity={**SETTINGS.identity, key: "other"}).train()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_remembered_or_raised_and_then_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted), StopSignal() as stop:
        assert not stop.raised()
        signal.raise_signal(number)
        signal.raise_signal(number)  # the signal that torchrun passes on is the same request
        assert stop.raised()
        assert stop.name == number.name
        raise Interrupted("saved")
    assert signal.getsignal(number) is before
    with pytest.raises(Interrupted, match=f"stopped by {number.name}"), StopSignal(at_once=True):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_signals_stay_as_they_are_in_another_thread() -> None:
    def work() -> bool:
        with StopSignal(at_once=True), StopSignal() as stop:
            assert [signal.getsignal(number) for number in STOPS] == before
            return stop.raised()

    before = [signal.getsignal(number) for number in STOPS]
    with ThreadPoolExecutor() as threads:
        assert not threads.submit(work).result()


def test_of_signals_within_one_another_one_raises_and_once() -> None:
    with pytest.raises(Interrupted, match="SIGINT: saved"), StopSignal(at_once=True):
        try:
            with StopSignal() as inner:
                signal.raise_signal(signal.SIGINT)
                raise Interrupted(f"{inner.name}: saved")
        finally:
            signal.raise_signal(signal.SIGINT)  # passed on late, and the same request


def test_a_signal_that_came_too_late_for_a_loop_goes_to_whoever_is_around_it() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGUSR1"), StopSignal(at_once=True):
        with StopSignal():
            signal.raise_signal(signal.SIGUSR1)
        pytest.fail("it is not heard")


def test_a_later_second_ctrl_c_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] = 102.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.raised()
        raise KeyboardInterrupt


# --- steps that are not finite


class Poison:
    """Makes the gradients of some steps (from 1) infinite."""

    def __init__(self, bench: Bench, steps: set[int]) -> None:
        self.steps, self.at = steps, 0
        self.before: dict[int, dict[str, Tensor]] = {}
        self.bench = bench
        bench.task.model.visual.proj.register_hook(lambda grad: grad * torch.inf if self.at in steps else grad)

    def __call__(self, start: int) -> Iterator[Batch]:
        for self.at, batch in enumerate(batches(start), start + 1):
            self.before[self.at] = self.bench.state()
            yield batch


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ema_decay=0.9)
    poison = Poison(bench, {3})
    result = bench.train(poison)
    assert equal(poison.before[3], poison.before[4]), "parameters, moments and step counts as before"
    assert not equal(poison.before[4], poison.before[5])
    assert all(value.isfinite().all() for value in bench.state().values())
    wanted: dict[str, Tensor] = {}
    for state in [*(poison.before[at] for at in (2, 3, 5, 6)), bench.state()]:
        model = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        wanted = {name: 0.9 * wanted.get(name, value) + 0.1 * value for name, value in model.items()}
    assert largest_difference(wanted, bench.average()) < 1e-6, "the average has no part of it"
    assert result.nonfinite_steps == 1
    assert [line["nonfinite_steps"] for line in bench.lines()] == [0, 0, 1, 1, 1, 1]
    assert result.steps == 6


def test_a_loss_that_is_not_finite_is_left_out_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    before = bench.state()
    monkeypatch.setattr("compt.train.loop.to_input", lambda images, mean, std: torch.full(images.shape, torch.nan))
    with pytest.raises(RunError, match=r"training: 3 steps in a row had a non-finite loss or gradient.*at step 3"):
        bench.train()
    model = {name: value for name, value in before.items() if name.startswith("model.")}
    assert equal({name: bench.state()[name] for name in model}, model)


def test_too_many_in_a_row_stop_the_run_and_others_do_not(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "a")
    assert bench.train(Poison(bench, {1, 2, 4, 5})).nonfinite_steps == 4
    bench = Bench(tmp_path / "b", checkpoint_every=1)
    with pytest.raises(RunError, match="3 steps in a row had a non-finite loss or gradient, the last at step 4"):
        bench.train(Poison(bench, {2, 3, 4}))
    late = Bench(tmp_path / "late", log_every=100)
    with pytest.raises(RunError, match="3 steps in a row had a non-finite loss or gradient, the last at step 4"):
        late.train(Poison(late, {2, 3, 4}))
    # The count goes through a resume: two of the three lie before it.
    bench = Bench(tmp_path / "b")
    with pytest.raises(RunError, match="at step 4"):
        bench.train(Poison(bench, {4}))
    # Once the cause is removed, the same folder resumes.
    assert Bench(tmp_path / "b").train().nonfinite_steps == 2


def test_norms_are_read_one_step_late_or_where_something_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    read: list[tuple[int, int]] = []

    class Norm:
        def __init__(self, value: Tensor) -> None:
            begun.append(len(begun) + 1)
            self.step, self.value = begun[-1], value

        def __float__(self) -> float:
            read.append((self.step, begun[-1]))
            return float(self.value)

    step = DataParallelEngine.step
    monkeypatch.setattr(DataParallelEngine, "step", lambda self, lr, most: Norm(step(self, lr, most)))
    Bench(tmp_path / "a", total_steps=9, log_every=4, checkpoint_every=6).train()
    assert dict(reversed(read)) == {1: 2, 2: 3, 3: 4, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8, 9: 9}
    begun.clear()
    read.clear()
    Bench(tmp_path / "b", total_steps=3, log_every=100, ema_decay=0.9).train()
    assert dict(reversed(read)) == {1: 2, 2: 3, 3: 3}, "an average does not wait for it"
    begun.clear()
    read.clear()
    Bench(tmp_path / "c", total_steps=4, log_every=100, keep_every=2).train()
    assert dict(reversed(read)) == {1: 2, 2: 2, 3: 4, 4: 4}, "a checkpoint that is kept looks too"


def test_a_stop_counts_the_steps_before_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, total_steps=9, log_every=100)

    def loader(start: int) -> Iterator[Batch]:
        for at, batch in enumerate(Poison(bench, {2, 3})(start), start + 1):
            if at == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(Interrupted):
        bench.train(loader)
    state = checkpoint.read_state(tmp_path / "checkpoints" / "step-00000003")
    assert (state["counts"]["nonfinite"], state["counts"]["nonfinite_in_a_row"]) == (2, 2)


# --- average, accumulation


def test_the_average_by_hand(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ema_decay=0.75)
    after: list[dict[str, Tensor]] = []
    step = bench.engine.step

    def spy(lr: float, max_norm: float | None = None) -> Tensor:
        norm = step(lr, max_norm)
        after.append({name: value.detach().clone() for name, value in bench.task.module.state_dict().items()})
        return norm

    bench.engine.step = spy  # type: ignore[method-assign]
    bench.train()
    wanted = after[0]
    for values in after[1:]:
        wanted = {name: 0.75 * wanted[name] + 0.25 * values[name] for name in wanted}
    found = bench.average()
    assert largest_difference(wanted, found) < 1e-6
    assert largest_difference(after[-1], found) > 1e-4


def test_accumulation_is_the_large_batch(tmp_path: Path) -> None:
    whole, parts = Bench(tmp_path / "whole"), Bench(tmp_path / "parts", micro_batch=1)
    whole.train()
    parts.train()
    assert largest_difference(whole.state(), parts.state()) < 2e-5
    assert [line["loss"] for line in whole.lines()] == pytest.approx([line["loss"] for line in parts.lines()], rel=1e-5)


def test_data_that_cannot_be_used_end_the_training(tmp_path: Path) -> None:
    def failing(start: int) -> Iterator[Batch]:
        yield from batches(start, 2)
        raise DataError("shard 7: key 8")

    with pytest.raises(DataError, match="shard 7: key 8"):
        Bench(tmp_path).train(failing)


# --- the same through a recipe: distillation, projectors, workers, order


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A chain with an average, never interrupted."""
    chain(base, base / "whole", "optimizer.ema={decay: 0.9}")
    return base / "whole"


def assert_same_run(whole: Path, other: Path) -> None:
    for job in (FIRST, SECOND):
        assert equal(weights(whole, job), weights(other, job))
        assert equal(weights(whole, job, "model/ema"), weights(other, job, "model/ema"))
        assert lines(whole, job) == lines(other, job)
        assert {**manifest(whole, job)["trained"], "device_hours": 0} == {
            **manifest(other, job)["trained"],
            "device_hours": 0,
        }
        assert manifest(whole, job)["scores"] == manifest(other, job)["scores"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "stops"),
    [([], ((1, 6), (3,))), (["engine.workers=2", "engine.cache=true"], ((3,), (2,)))],
    ids=["one process", "workers and a cache"],
)
def test_a_chain_stopped_in_every_training_is_uninterrupted(
    changes: list[str], stops: tuple[tuple[int, ...], tuple[int, ...]], base: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    every = ["optimizer.ema={decay: 0.9}", "engine.checkpoint_every={steps: 50}", *changes]
    for step in stops[0]:
        assert f"1-small: stopped by SIGTERM at step {step} of 6" in str(stopped_at(base, run, step, *every))
    for step in stops[1]:
        assert f"2-large: stopped by SIGTERM at step {step} of 5" in str(stopped_at(base, run, step, *every))
    chain(base, run, *every)
    assert_same_run(whole, run)


def test_the_processes_of_the_loader_end_with_the_training(base: Path, tmp_path: Path) -> None:
    error = stopped_at(base, tmp_path / "run", 2, "engine.workers=2")
    assert error.__traceback__ is not None, "the training's frames are still alive"
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_an_accumulating_chain_stopped_is_uninterrupted(base: Path, tmp_path: Path) -> None:
    changes = ["optimizer.ema={decay: 0.9}", "engine.micro_batch=4", "engine.text_buckets=2"]
    chain(base, tmp_path / "whole", *changes)
    for step in (3, 2):
        stopped_at(base, tmp_path / "run", step, *changes)
    chain(base, tmp_path / "run", *changes)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_accumulating_chain_is_one_of_large_batches(base: Path, whole: Path, tmp_path: Path) -> None:
    changes = ["optimizer.ema={decay: 0.9}", "engine.micro_batch=3", "engine.text_buckets=3"]
    chain(base, tmp_path / "run", *changes)
    for job in (FIRST, SECOND):
        assert largest_difference(weights(whole, job), weights(tmp_path / "run", job)) < 2e-5


def test_the_average_is_stored_and_the_next_link_starts_from_the_weights(
    base: Path, whole: Path, tmp_path: Path
) -> None:
    chain(base, tmp_path / "run")
    for job in (FIRST, SECOND):
        average, raw = weights(whole, job, "model/ema"), weights(whole, job)
        assert equal(raw, weights(tmp_path / "run", job)), "the average changes nothing"
        assert largest_difference(average, raw) > 1e-5
        stock = open_clip.create_model(f"local-dir:{whole / 'jobs' / job / 'model' / 'ema'}")
        assert equal({name: value.cpu() for name, value in stock.state_dict().items()}, average)
    assert not (tmp_path / "run" / "jobs" / FIRST / "model" / "ema").exists()


def test_checkpoints_and_their_interval(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped_at(base, run, 5, "engine.checkpoint_every={steps: 2}", "engine.keep_checkpoints=3")
    folder = run / "jobs" / FIRST / "checkpoints"
    assert sorted(os.listdir(folder)) == ["latest", "step-00000002", "step-00000004", "step-00000005"]
    state = checkpoint.read_state(folder / "step-00000005")
    assert (state["samples"], state["world_size"], state["counts"]["step"]) == (60, 1, 5)
    chain(base, run)
    assert not folder.exists(), "a finished job needs no checkpoint"


def test_the_estimate_takes_every_kind_of_job_and_changes_nothing(base: Path, whole: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path / "run")
    torch.manual_seed(5)
    device = torch.device("cpu")
    one = seconds_of([(job, 1) for job in plan.jobs], plan.recipe, device)
    assert 0.0005 < one < 5
    assert seconds_of([(job, 0) for job in plan.jobs], plan.recipe, device) == 0
    assert seconds_of([(plan.jobs[0], 100)], plan.recipe, device) > seconds_of([(plan.jobs[0], 1)], plan.recipe, device)
    chain(base, tmp_path / "run")
    assert equal(weights(whole, SECOND), weights(tmp_path / "run", SECOND))


def test_cached_backward_is_what_the_loop_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(task: Any, engine: Any, images: Tensor, tokens: Tensor, micro: int, lengths: Tensor, known: Tensor) -> Any:
        sizes.append((len(images), micro, lengths.shape))
        assert torch.equal(known, tokens)
        return cached_backward(task, engine, images, tokens, micro, lengths, known)

    monkeypatch.setattr("compt.train.loop.cached_backward", spy)
    Bench(tmp_path, micro_batch=2, total_steps=2).train()
    assert sizes == [(4, 2, (4, 2))] * 2


def test_device_hours_and_mfu_are_those_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.dist, "world_size", lambda: 4)
    counts, window = loop.Counts(), loop.Window()
    model = build(resolve("vit_pico", {"patch_size": 16, "depth": 1}), device="meta")
    loop._count(counts, window, SETTINGS, model, next(batches()), 2.0)
    assert (counts.device_seconds, window.seconds) == (8.0, 2.0)
    asked: list[tuple[float, float]] = []
    settings = replace(SETTINGS, peak_flops=1e12, useful_macs=lambda *of: asked.append(of) or 5e9)
    window = loop.Window(steps=10, seconds=2.0, captions=100, text_tokens=1500, teacher_hits=25)
    assert loop._mfu(window, settings) == {"mfu": pytest.approx(2 * 5e9 * settings.batch * 10 / (4 * 1e12 * 2.0))}
    assert asked == [(15.0, 0.75)]
