"""Captured steps, with a stand-in for CUDA graphs: replays give what eager steps give, over any number of ranks."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compt.dist import collectives as dist
from compt.engines import graphs
from compt.engines.base import AdamWSettings, Precision
from compt.engines.ddp import DataParallelEngine
from compt.engines.graphs import GraphEngine
from compt.models.clip import build, caption_lengths
from compt.models.packing import SIZES
from compt.models.presets import PACKED, resolve
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.accumulate import cached_backward
from compt.train.build import Blueprint, build_training
from compt.train.losses import ContrastiveLoss, Loss, SiglipLoss
from compt.train.task import ClipTask, DistillTask
from tests.dist.spawn import run_ranks
from tests.helpers.recipe import FIRST, SECOND, chain, lines, make_data, manifest, stopped_at, weights
from tests.helpers.recorded import Recorded, RecordedGraphs
from tests.unit.train.test_task import batch, model, tiny

GRAPHS = ("engine.graphs=on", "engine.text=packed")
LENGTHS = (10, 4, 10, 4, 7, 10, 4, 7)
"""The longest caption of each step: a size first comes by, then is captured, then replayed among others."""
REPLAYED = len(LENGTHS) - 3
CLOSE = 5e-5
"""Differences in fp32 after all steps. Text of one length and padded text take other kernels of attention."""


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraphs]:
    """All stand-ins that a test makes."""
    made: list[RecordedGraphs] = []

    def make(device: torch.device) -> RecordedGraphs:
        made.append(RecordedGraphs(device))
        return made[-1]

    monkeypatch.setitem(graphs.RECORDERS, "cpu", make)
    return made


@dataclass
class Course:
    """Loss, norm and report of each step, the gradients of the last one, and the state after it."""

    steps: list[dict[str, float]]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    engine: DataParallelEngine


def cut(tokens: Tensor, longest: int) -> Tensor:
    """Captions of at most `longest` tokens, in a batch no wider than that."""
    end = tokens.max(dim=-1, keepdim=True).values
    within = tokens[..., :longest].clone()
    within[..., -1:] = torch.where((within == end).any(dim=-1, keepdim=True), within[..., -1:], end)
    return within


def course(
    kind: type[DataParallelEngine],
    teacher: int | None = 24,
    precision: Precision = "fp32",
    loss: Loss | None = None,
    lengths: tuple[int, ...] = LENGTHS,
) -> Course:
    """Steps with other batches, other learning rates and captions of other lengths, on this rank's share."""
    spec = tiny() if loss is None or loss.name == "contrastive" else resolve("vit_pico", {**TINY, "loss": "siglip"})
    student, options = build(spec, seed=0), {"loss": loss, "text_buckets": PACKED}
    task = ClipTask(student, **options)
    if teacher is not None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        task = DistillTask(student, model(teacher, seed=1), teacher_dtype=dtype, **options)
    engine = kind(task.module, AdamWSettings(eps=1e-4), precision=precision)
    if engine._scale is not None:
        engine._scale.scale.fill_(256.0)
        engine._scale.growth_tracker.fill_(1996)  # the scale doubles during the course
    images, tokens = batch()
    share = len(images) // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    steps, gradients = [], {}
    for step, longest in enumerate(lengths):
        at = images[own].roll(step, 0) * (1 + 0.1 * step)
        ids = cut(tokens[own].roll(3 * step, 0), longest)
        value, report = cached_backward(task, engine, at, ids, None, caption_lengths(ids))
        gradients = dict(engine.gradients())
        numbers = {"whole": value.item(), **{key: one.item() for key, one in report.items()}}
        steps.append({**numbers, "norm": engine.step(1e-3 * (1 + step), 1.0).item()})
    return Course(steps, gradients, {key: one.detach().clone() for key, one in engine.state().items()}, engine)


TINY = {"image_size": 16, "depth": 1, "context_length": 10, "vocab_size": 64, "embed_dim": 16}


def apart(found: Course, right: Course) -> float:
    """The largest difference: of any number of a step, relative; of gradients, weights or moments, tensor by tensor.

    A tensor's is relative to its norm, or to a hundredth of the largest one's of its kind: some are rounding noise.
    """
    differences = [0.0]
    for one, other in zip(found.steps, right.steps, strict=True):
        assert one.keys() == other.keys()
        differences += [abs(one[key] - value) / max(abs(value), 0.1) for key, value in other.items()]
    for mine, others in ((found.gradients, right.gradients), (found.state, right.state)):
        assert mine.keys() == others.keys()
        largest: dict[str, float] = {}
        for name, value in others.items():
            kind = name.partition(".")[0] + name.rpartition(".")[2] * name.startswith("optim")
            largest[kind] = max(largest.get(kind, 0.0), float(value.float().norm()))
            floor = max(float(value.float().norm()), 1e-2 * largest[kind], 1e-12)
            differences.append(float((mine[name].float() - value.float()).norm()) / floor)
    return max(one if math.isfinite(one) else math.inf for one in differences)


@pytest.mark.parametrize("teacher", [None, 16, 24])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replayed_steps_equal_eager_steps(
    teacher: int | None, precision: Precision, recorded: list[RecordedGraphs]
) -> None:
    right = course(DataParallelEngine, teacher, precision)
    found = course(GraphEngine, teacher, precision)
    # In half precision, attention of one length and padded attention round otherwise. What is left of that after all
    # steps depends on the CPU: gradients have been 18 % apart, losses 0.5 %.
    assert apart(found, right) < {"fp32": CLOSE, "bf16": 0.4, "fp16": 0.2}[precision]
    assert [one["loss"] for one in found.steps] == pytest.approx([one["loss"] for one in right.steps], rel=2e-2)
    assert found.engine.replays == REPLAYED
    (one,) = recorded
    assert (one.warm, len(one.captured)) == (3, 3)
    # In the same arithmetic: exactly.
    plain = eager(teacher, precision)
    assert plain.engine.replays == 0
    assert apart(found, plain) == 0


def eager(teacher: int | None, precision: Precision) -> Course:
    """The course of an engine that captures nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs._CapturedStep, "_capture", lambda step, recorder: None)
        return course(GraphEngine, teacher, precision)


@pytest.mark.parametrize(
    "loss", [ContrastiveLoss("all"), ContrastiveLoss(chunk=3), SiglipLoss(), SiglipLoss(chunk=3)], ids=repr
)
def test_every_loss_is_captured(loss: Loss) -> None:
    found = course(GraphEngine, loss=loss)
    assert apart(found, course(DataParallelEngine, loss=loss)) < CLOSE
    assert found.engine.replays == REPLAYED


def on_ranks(kind: type[DataParallelEngine], loss: Loss | None) -> tuple[Any, ...]:
    graphs.RECORDERS["cpu"] = RecordedGraphs
    lengths = tuple(10 if dist.rank() and at % 3 else longest for at, longest in enumerate(LENGTHS))
    found = course(kind, loss=loss, lengths=lengths)
    if isinstance(found.engine, GraphEngine):
        assert isinstance(found.engine.recorder, RecordedGraphs)
        assert len(found.engine.recorder.captured) == 2 * len([s for s in found.engine._steps.values() if s._parts])
    return found.steps, found.gradients, found.state, getattr(found.engine, "replays", 0)


@pytest.mark.parametrize("loss", [None, SiglipLoss()], ids=["contrastive", "siglip"])
def test_ranks_that_replay_other_sizes_equal_ranks_that_replay_none(loss: Loss | None) -> None:
    """The collectives are those of eager steps, wherever each rank is with its captures."""
    right, found = (run_ranks(on_ranks, 2, kind, loss) for kind in (DataParallelEngine, GraphEngine))
    assert [each[3] for each in right] == [0, 0]
    assert [each[3] for each in found] == [5, 6]
    for one, other in zip(found, right, strict=True):
        assert apart(Course(*one[:3], None), Course(*other[:3], None)) < CLOSE  # type: ignore[arg-type]
    assert all(torch.equal(found[1][2][name], value) for name, value in found[0][2].items())


def stale(engine: GraphEngine, images: Tensor, *others: Tensor) -> list[Tensor]:
    return LOAD(engine, engine._inputs.get((0, images.shape), images), *others)


def added(buffers: dict[Any, Tensor], values: dict[Any, Tensor]) -> None:
    again = [name for name in values if name in buffers and str(name).startswith("model.")]  # gradients
    PUT(buffers, {name: value for name, value in values.items() if name not in again})
    for name in again:
        buffers[name].add_(values[name])


LOAD, PUT = GraphEngine._load, graphs._put


def crossed(step: Any, recorder: Any) -> None:
    """Each step after the first replays the first one's graph."""
    CAPTURE(step, recorder)
    recorder.first = getattr(recorder, "first", step._parts)
    step._parts = recorder.first


CAPTURE = graphs._CapturedStep._capture
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "the first images stay in their buffer": (GraphEngine, "_load", stale),
    "gradients are added to those of the last step": (graphs, "_put", added),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = course(DataParallelEngine)
    monkeypatch.setattr(*FAULTS[fault])
    assert apart(course(GraphEngine), right) > 1e-2


def test_a_graph_of_another_size_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs._CapturedStep, "_capture", crossed)
    with pytest.raises(RuntimeError, match="size does not match"):
        course(GraphEngine)


def test_a_step_that_reads_a_number_runs_eagerly_and_says_why(
    caplog: pytest.LogCaptureFixture, recorded: list[RecordedGraphs]
) -> None:
    found = course(GraphEngine, loss=Curious())
    assert found.engine.replays == 0
    assert apart(found, course(DataParallelEngine, loss=Curious())) < CLOSE
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("engine.graphs: steps run eagerly, as one cannot be captured: _local_scalar_dense")


class Curious(ContrastiveLoss):
    """Looks at its scale."""

    def __call__(self, outputs: Any, *, gather: bool = True) -> Any:
        value, terms = super().__call__(outputs, gather=gather)
        return (value if float(outputs["logit_scale"]) < 1e9 else value * 0), terms


class Fixed(ContrastiveLoss):
    """Has a scale of its own."""

    def __call__(self, outputs: Any, *, gather: bool = True) -> Any:
        return super().__call__({**outputs, "logit_scale": torch.full((1,), 5.0)}, gather=gather)


def test_a_parameter_without_gradient_stays_without() -> None:
    found, right = (course(kind, loss=Fixed()) for kind in (GraphEngine, DataParallelEngine))
    assert found.engine.replays == REPLAYED
    assert "model.logit_scale" not in found.engine._gradients
    assert apart(found, right) < CLOSE


def test_memory_that_runs_out_is_no_reason_to_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RecordedGraphs, "capture", full)
    with pytest.raises(torch.OutOfMemoryError):
        course(GraphEngine)


def test_reports_and_losses_are_not_overwritten_by_the_next_step() -> None:
    task = ClipTask(model(), text_buckets=PACKED)
    engine = GraphEngine(task.module)
    images, tokens = batch()
    kept = []
    for step in range(4):
        kept.append(cached_backward(task, engine, images * step, tokens, None, caption_lengths(tokens)))
        if step:
            assert kept[-1][0] != kept[-2][0]
            assert kept[-1][1]["task"] != kept[-2][1]["task"]
        engine.step(1e-3)


def test_the_backward_pass_outside_of_graphs_averages() -> None:
    right, found = (run_ranks(accumulated, 2, kind) for kind in (DataParallelEngine, GraphEngine))
    for one, other in zip(found, right, strict=True):
        assert all(torch.allclose(one[name], value, rtol=1e-5, atol=1e-7) for name, value in other.items())


def accumulated(kind: type[DataParallelEngine]) -> dict[str, Tensor]:
    """The gradients of two micro-batches."""
    graphs.RECORDERS["cpu"] = RecordedGraphs
    task = ClipTask(model(), text_buckets=PACKED)
    engine = kind(task.module)
    images, tokens = batch()
    own = slice(4 * dist.rank(), 4 * dist.rank() + 4)
    cached_backward(task, engine, images[own], tokens[own], 2)
    return dict(engine.gradients())


def averaged() -> list[Tensor]:
    dist._BUCKET = 6  # type: ignore[misc]
    values = [torch.full((2, 2), 1.0 + dist.rank()), torch.full((5,), 3.0), torch.full((9,), 2.0 * dist.rank())]
    dist.average(values)
    return values


def test_averages_in_buckets() -> None:
    for values in run_ranks(averaged, 2):
        assert [value.tolist() for value in values] == [[[1.5, 1.5]] * 2, [3.0] * 5, [1.0] * 9]


# --- whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_a_chain_of_captured_steps_equals_an_eager_one_and_resumes(
    base: Path, tmp_path: Path, recorded: list[RecordedGraphs]
) -> None:
    """The second link's student has the teacher of the first one."""
    eager, whole, halves = (tmp_path / name for name in ("eager", "whole", "halves"))
    chain(base, eager, "engine.text=packed")
    assert not recorded
    chain(base, whole, *GRAPHS)
    assert len(recorded) == 2
    assert all(one.captured for one in recorded)
    stopped_at(base, halves, 5, *GRAPHS)
    chain(base, halves, *GRAPHS)
    for job in (FIRST, SECOND):
        for name, value in weights(eager, job).items():
            torch.testing.assert_close(weights(whole, job)[name], value, rtol=1e-4, atol=1e-5)
            assert torch.equal(weights(halves, job)[name], weights(whole, job)[name])
        assert lines(halves, job) == lines(whole, job)
        for one, other in zip(lines(whole, job), lines(eager, job), strict=True):
            assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-4)
        # Tokens that fill a step up are computed too.
        more, fewer = (manifest(run, job)["trained"]["tokens_per_caption"] for run in (whole, eager))
        captions, step = 12 * 2, 12 * 2 * 16 // SIZES
        assert fewer < more <= fewer + 2 * step / captions
        steps = {FIRST: 6, SECOND: 5}[job]
        assert round(more * captions * steps) % step == 0


# --- where nothing is captured


def build_line(caplog: pytest.LogCaptureFixture, engine: dict[str, Any], teacher: Any = None) -> tuple[str, Any]:
    plan = Blueprint(
        student=tiny(), teacher=teacher, optimizer=Optimizer(precision="fp32"), engine=EngineConfig(**engine)
    )
    made = build_training(plan, torch.device("cpu"))[1]
    return " ".join(record.getMessage() for record in caplog.records), made


def test_a_device_without_graphs_runs_eagerly_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(graphs.RECORDERS, "cpu")
    said, engine = build_line(caplog, {"graphs": "on", "text": "packed"})
    assert said == "engine.graphs: steps run eagerly: cpu has no CUDA graphs"
    assert type(engine) is DataParallelEngine


def test_a_teacher_of_a_shorter_context_runs_eagerly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    short = resolve("vit_pico", {**TINY, "context_length": 8})
    said, engine = build_line(caplog, {"graphs": "on", "text": "packed"}, short)
    assert "has a shorter context than" in said
    assert type(engine) is DataParallelEngine
    caplog.clear()
    said, engine = build_line(caplog, {"graphs": "on", "text": "packed"}, resolve("vit_pico", TINY))
    assert (said, type(engine)) == ("", GraphEngine)


def test_the_compilers_graphs_need_a_gpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    said, engine = build_line(caplog, {"compile": "towers", "text": "packed", "compile_mode": "reduce-overhead"})
    assert said == "engine.compile_mode: reduce-overhead is default here: cpu has no CUDA graphs"
    assert engine.unwrapped.model.text_sizes is None


# --- CUDA's own graphs, as far as their calls go


class Streams:
    """torch.cuda's streams and graphs, with the arguments that its functions take. Notes what runs on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.stream, self.log, self.fails = "main", [], fails
        self.graph_arguments = inspect.signature(torch.cuda.graph.__init__)
        for name in ("Stream", "current_stream", "graph_pool_handle", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))

    def _Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name="side", wait_stream=lambda other: self.log.append(f"side waits for {other.name}"))

    def _current_stream(self) -> Any:
        return SimpleNamespace(
            name=self.stream, wait_stream=lambda other: self.log.append(f"{self.stream} waits for {other.name}")
        )

    def _graph_pool_handle(self) -> str:
        return "pool"

    def _CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append(f"replay on {self.stream}"))

    @contextlib.contextmanager
    def _stream(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def _graph(self, *arguments: Any, **options: Any) -> Iterator[None]:
        given = self.graph_arguments.bind(None, *arguments, **options).arguments
        self.log.append(f"capture on {given['stream'].name} in {given['pool']}, {given['capture_error_mode']}")
        self.stream = given["stream"].name
        yield
        if self.fails:  # as torch's own: it leaves its stream only after a capture that ended well
            raise RuntimeError("capture failed")


def test_captures_share_a_stream_and_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Streams(monkeypatch)
    recorder = graphs.CudaGraphs(torch.device("cuda", 0))
    recorder.warm_up(lambda: seen.log.append(f"warm on {seen.stream}"))
    replay = recorder.capture(lambda: seen.log.append(f"part on {seen.stream}"))
    replay()
    assert seen.log == [
        *("side waits for main", "warm on side", "main waits for side"),
        *("capture on side in pool, thread_local", "part on side", "replay on main"),
    ]


@pytest.mark.parametrize("ended", [True, False])
def test_a_capture_that_fails_leaves_its_stream_and_the_allocator(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch could not end it. Where it has, ending it again raises."""
    seen, tried = Streams(monkeypatch, fails=True), []

    def end(device: int, pool: Any) -> None:
        tried.append(device)
        if ended:
            raise RuntimeError("not currently recording")

    monkeypatch.setattr("torch._C._cuda_endAllocateToPool", end, raising=False)
    with pytest.raises(RuntimeError, match="capture failed"):
        graphs.CudaGraphs(torch.device("cuda", 1)).capture(lambda: None)
    assert (seen.stream, tried) == ("main", [1])


# --- the stand-in


def test_the_stand_in_computes_only_when_it_is_replayed() -> None:
    given, out = torch.ones(3), torch.zeros(3)

    def part() -> None:
        out.copy_((given * 2).add_(1).view(3, 1).squeeze(1))

    replay = RecordedGraphs(torch.device("cpu")).capture(part)
    assert out.isnan().all()
    for value in (1.0, 5.0):
        given.fill_(value)
        replay()
        assert torch.equal(out, torch.full((3,), 2 * value + 1))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0]) + x,
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64)),
    ],
)
def test_the_stand_in_refuses_what_the_host_reads(read: Any) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), Recorded():
        read(x)
