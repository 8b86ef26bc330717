"""A run, its estimate and its throughput build the same task and engine, with every setting of the recipe."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compt.bench.estimate import seconds_of
from compt.bench.step import TrainingStep
from compt.cli import bench as bench_command
from compt.dist import collectives as dist
from compt.engines import open as opening
from compt.engines.fsdp2 import ShardedEngine
from compt.engines.zero.engine import ZeroEngine
from compt.models.presets import resolve
from compt.recipe.chain import Distill
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train import build as building
from compt.train import loop
from compt.train.build import Blueprint
from compt.train.micro_batch import Trial, steps
from tests.helpers.recipe import BATCH, chain, make_data, plan_of, recipe_of, write_recipe

CPU = torch.device("cpu")

CASES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "sharded teacher": ("engine.shard_teacher=true",),
    "offload and bf16 sums": ("engine.name=fsdp2", "engine.fsdp2={cpu_offload: true, reduce_precision: bf16}"),
    "shards kept, moving average": (
        *("engine.name=fsdp2", "engine.fsdp2={reshard_after_forward: false}"),
        *("optimizer.ema={decay: 0.5}", "optimizer.precision=bf16"),
    ),
    "no distillation": ("chain.distill={alpha: 0}",),
    "another alpha, towers added": ("chain.distill={alpha: 100, reference_compatible: true}",),
    "alpha of a link": ("chain.links.1.alpha=7", "optimizer.betas=[0.8, 0.9]", "optimizer.weight_decay=0.3"),
    "recompute, chunks, buckets": (
        *("engine.recompute=true", "engine.loss_chunk=3", "engine.text_buckets=2", "engine.micro_batch=4"),
        *("optimizer.image_to_text=all", "optimizer.clip_grad_norm=0.5"),
    ),
    "DeepSpeed's file": ("engine.name=zero2", "engine.deepspeed_config=mine.json"),
}


SHORT = ("chain.links.0.train={steps: 1}", "chain.links.0.warmup={steps: 0}", "evaluation=")


class Taken(Exception):
    """Ends a command before the first step of the second link, when all of it is built."""


class Recorder:
    """Notes what each engine class and task class is given, and the pieces and clipping of the first step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[dict[str, Any]] = []
        for kind in (opening.DataParallelEngine, ShardedEngine, ZeroEngine):
            self._watch_class(monkeypatch, kind)
        original_task, original_shard = building.build_task, building.shard_frozen

        def build_task(blueprint: Any, student: Any, teacher: Any = None) -> Any:
            task = original_task(blueprint, student, teacher)
            note = {key: value for key, value in vars(task).items() if not isinstance(value, nn.Module)}
            note |= {"task": type(task).__name__, "text_buckets": task.module.text_buckets}
            note |= {"student": student.spec, "teacher": teacher and teacher.spec}
            note["projectors"] = {name: _shape(value) for name, value in task.module.projector.named_parameters()}
            self.notes.append(note)
            return task

        def shard_frozen(model: Any, weights: Any, **options: Any) -> Any:
            self.notes.append({"sharded teacher": model.spec, **options})
            return original_shard(model, weights, **options)

        monkeypatch.setattr(building, "build_task", build_task)
        monkeypatch.setattr(building, "shard_frozen", shard_frozen)

        original_step = loop.training_step

        def training_step(task: Any, engine: Any, batch: Any, **options: Any) -> Any:
            if task.model.spec.name == "small":
                self.notes = []
                return original_step(task, engine, batch, **options)
            self.notes.append({"rows": len(batch), **{key: options[key] for key in ("micro_batch", "clip_grad_norm")}})
            raise Taken

        monkeypatch.setattr(loop, "training_step", training_step)
        monkeypatch.setattr("compt.bench.step.training_step", training_step)

    def _watch_class(self, monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
        original = kind.__init__

        def init(engine: Any, module: nn.Module, *arguments: Any, **options: Any) -> None:
            given = {key: value for key, value in options.items() if key != "initial"}
            state = {name: _shape(value) for name, value in module.state_dict().items()}
            self.notes.append({"engine": kind.__name__, "settings": arguments, **given, "state": state})
            original(engine, module, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", init)

    def take(self, action: Callable[[], object]) -> list[dict[str, Any]]:
        """What `action` builds up to its first step."""
        self.notes = []
        with pytest.raises(Taken):
            action()
        assert self.notes
        return self.notes


def _shape(value: Tensor) -> tuple[tuple[int, ...], bool]:
    return tuple(value.shape), value.is_meta


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and with DeepSpeed's file."""
    base = make_data(tmp_path_factory.mktemp("data"))
    zero = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False}
    (base / "mine.json").write_text(json.dumps({"zero_optimization": zero, "train_micro_batch_size_per_gpu": BATCH}))
    return base


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Leaves the process group that sharding has made."""
    yield
    dist.shutdown()


@pytest.mark.parametrize("case", CASES)
def test_estimate_and_throughput_time_the_step_that_the_chain_runs(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*SHORT, *CASES[case])
    recipe, job = recipe_of(*changes), plan_of(data, tmp_path / "run", *changes).links[-1]
    monkeypatch.chdir(data)  # relative paths of a recipe start where the command does
    recorder = Recorder(monkeypatch)
    with pytest.raises(Taken):  # the first link is trained
        chain(data, tmp_path / "run", *changes)
    wanted = recorder.notes

    assert recorder.take(lambda: seconds_of([(job, 5)], recipe, CPU, 1, data)) == wanted

    jobs = bench_command._jobs(["large"], write_recipe(tmp_path / "recipe.yaml", *changes))
    setup = bench_command._setups(jobs, [recipe.data.captions], None, None, {}, recipe.seed)[-1]

    def time() -> None:
        step = TrainingStep(setup, CPU)
        step(step.data(BATCH))

    assert recorder.take(time) == wanted

    def try_micro_batch() -> None:
        trial = Trial.of(job, recipe, data, CPU)
        steps(trial, trial.share)
        raise Taken

    assert recorder.take(try_micro_batch) == wanted[:-1]  # it takes no step of the trainer


# --- the teacher is compiled as the student is


def _blueprint(**engine: Any) -> Blueprint:
    sizes = {"image_size": 16, "depth": 2, "context_length": 10, "vocab_size": 64, "embed_dim": 16}
    optimizer = Optimizer(batch=4, precision="fp32")
    spec = resolve("vit_pico", sizes)
    return Blueprint(student=spec, teacher=spec, optimizer=optimizer, engine=EngineConfig(device="cpu", **engine))


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        ({}, None),
        ({"compile": "blocks"}, ("blocks", "default")),
        ({"compile": "towers"}, ("towers", "default")),
        ({"compile": "towers", "shard_teacher": True}, ("blocks", "default")),
        ({"compile": "towers", "compile_mode": "max-autotune-no-cudagraphs"}, ("towers", "max-autotune-no-cudagraphs")),
        ({"compile": "towers", "compile_mode": "reduce-overhead", "text": "packed"}, ("towers", "default")),
        (
            {"compile": "towers", "compile_mode": "max-autotune", "text": "packed"},
            ("towers", "max-autotune-no-cudagraphs"),
        ),
    ],
)
def test_how_a_teacher_is_compiled(
    engine: dict[str, Any], wanted: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(building, "compile_model", lambda model, how, mode, device: seen.append((how, mode)))
    monkeypatch.setattr(building, "shard_frozen", lambda model, given, **_: building.fill(model, given, CPU))
    building._open_teacher(_blueprint(**engine), CPU, None)
    assert seen == ([] if wanted is None else [wanted])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "towers"])
@pytest.mark.parametrize("text", ["padded", "packed"])
def test_a_compiled_teacher_gives_the_same_features(how: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters, graphs, features = torch._dynamo.utils.counters, [], []
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for way in ("off", how):
        counters.clear()
        task, _ = building.build_training(_blueprint(compile=way, text=text), CPU)
        found = []
        for length in (10, 9, 8, 7):
            tokens = torch.arange(4 * 2 * length).view(4, 2, length) % 50 + 1
            tokens[..., -1] = 63
            found.append(task.targets(images, tokens))
            graphs.append(counters["stats"]["unique_graphs"])
        features.append(found)
    assert graphs[:4] == [0] * 4
    assert 0 < graphs[4] <= graphs[6] == graphs[7], "compiled again for another length"
    torch.testing.assert_close(features[1], features[0], rtol=1e-5, atol=1e-5)


def test_the_settings_of_a_recipe_reach_the_optimizer_and_the_losses() -> None:
    spec = resolve("vit_pico", {"image_size": 16, "depth": 1, "context_length": 10, "vocab_size": 64})
    asked = {"batch": 4, "precision": "fp32", "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.3}
    optimizer = Optimizer.model_validate({**asked, "image_to_text": "all", "ema": {"decay": 0.7}})
    engine, distill = EngineConfig(device="cpu", loss_chunk=2), Distill(alpha=7.0, reference_compatible=True)
    blueprint = Blueprint(student=spec, teacher=spec, optimizer=optimizer, engine=engine, distill=distill)
    task, built = building.build_training(blueprint, CPU)
    groups = built.optimizer.param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.9), 1e-5)}
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]
    assert built._average._decay == 0.7
    assert (task.task_loss.image_to_text, task.task_loss.chunk) == ("all", 2)
    assert (task.alpha, task.reference_compatible) == (7.0, True)
