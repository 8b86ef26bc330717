"""What ranks do in test_zero.py, and the plain loop in one process that they are compared with."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.distributed import distributed_c10d

from compt.dist import collectives as dist
from compt.engines.base import AdamWSettings
from compt.engines.scale import LossScale
from compt.models.clip import build
from compt.models.presets import ModelSpec, resolve
from compt.recipe.deepspeed import deepspeed_config
from compt.recipe.engine import Compile, EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.accumulate import cached_backward
from compt.train.task import ClipTask, DistillTask
from tests.unit.train.test_losses import oracle

ROOT = Path(__file__).resolve().parents[3]

STEPS = 3
LR = 2e-3
MAX_NORM = 2.0
CAP = 2.657
DECAY = 0.8
BATCH = 16
# With the usual small eps, gradients that are only noise would move weights.
ADAMW = AdamWSettings(eps=1e-4)
CUT = {
    "reduce_bucket_size": 3000,
    "allgather_bucket_size": 3000,
    "stage3_param_persistence_threshold": 20,
    "sub_group_size": 4000,
    "stage3_prefetch_bucket_size": 2000,
}
"""Small enough that a tiny model has several of everything."""

VIT = resolve("vit_pico", {"image_size": 16, "depth": 1, "context_length": 10, "vocab_size": 64, "embed_dim": 16})
SWIN = resolve(
    "swin_t",
    {
        "image_size": 16,
        "window": 2,
        "width": 16,
        "head_width": 8,
        "depths": (1, 1),
        "text_width": 16,
        "text_head_width": 8,
        "text_depth": 1,
        "embed_dim": 16,
        "context_length": 10,
        "vocab_size": 64,
    },
)
SPECS = {"vit": VIT, "swin": SWIN}


class Cell(NamedTuple):
    """A ZeRO stage, a model, whether it distils with a projector, pieces that a rank's batch is computed in.

    `shipped`: a file of ds_configs to take the settings from, instead of CUT and `zero`. `scaled`: with fp16's scale of
    the loss, and one step first that is skipped.
    """

    stage: int
    arch: str = "vit"
    distil: bool = True
    pieces: int = 1
    zero: tuple[tuple[str, Any], ...] = ()
    recompute: bool = False
    shipped: str = ""
    compile: Compile = "off"
    scaled: bool = False

    def config(self) -> dict[str, Any]:
        if self.shipped:
            file = {"name": f"zero{self.stage}", "deepspeed_config": f"ds_configs/{self.shipped}.json"}
            engine = EngineConfig.model_validate(file)
            return deepspeed_config(engine, Optimizer(batch=BATCH), dist.world_size(), ROOT)
        return {"zero_optimization": {**CUT, **{key: copy.deepcopy(value) for key, value in self.zero}}}


def make_task(arch: str, distil: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> ClipTask:
    spec: ModelSpec = SPECS[arch]
    student = build(spec, seed=seed).to(dtype)
    if not distil:
        return ClipTask(student)
    teacher = build(VIT, seed=7)
    teacher = build(resolve("vit_pico", {**_sizes(VIT), "embed_dim": 24}), seed=7)
    task = DistillTask(student, teacher, teacher_dtype=dtype, alpha=50.0)
    task.module.to(dtype)
    return task


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    keys = ("image_size", "depth", "context_length", "vocab_size")
    return {key: getattr(spec, key) for key in keys}


def data(step: int) -> tuple[Tensor, Tensor]:
    """Pictures and captions of 3 to 10 tokens that end with the highest number, the whole batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator)
    tokens = torch.randint(1, 62, (BATCH, 2, 10), generator=generator)
    lengths = torch.randint(3, 11, (BATCH, 2, 1), generator=generator)
    positions = torch.arange(10)
    return images, tokens.masked_fill(positions >= lengths, 0).masked_fill(positions == lengths - 1, 63)


class Result(NamedTuple):
    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]


def plain(arch: str, distil: bool, steps: int = STEPS) -> Result:
    """One process, the whole batch, double precision, the losses as loops, AdamW by its formula."""
    task = make_task(arch, distil, dtype=torch.float64)
    parameters = dict(task.module.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    losses, norms, average, kept = [], [], {}, {}
    beta1, beta2 = ADAMW.betas
    for step in range(steps):
        loss = _plain_loss(task, *data(step))
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        kept = kept or gradients
        norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
        losses.append(loss.item())
        norms.append(norm)
        with torch.no_grad():
            for name, p in parameters.items():
                g = gradients[name] * min(1.0, MAX_NORM / norm)
                first[name] = beta1 * first[name] + (1 - beta1) * g
                second[name] = beta2 * second[name] + (1 - beta2) * g * g
                decay = p.ndim >= 2 and "bias" not in name
                p.mul_(1 - LR * (ADAMW.weight_decay if decay else 0.0))
                root = (second[name] / (1 - beta2 ** (step + 1))).sqrt() + ADAMW.eps
                p.sub_(LR * first[name] / (1 - beta1 ** (step + 1)) / root)
                if name == "model.logit_scale":
                    p.clamp_(max=CAP)
                average[name] = p.clone() if step == 0 else DECAY * average[name] + (1 - DECAY) * p
    return Result(losses, norms, kept, {name: p.detach() for name, p in parameters.items()}, average)


def _plain_loss(task: ClipTask, images: Tensor, tokens: Tensor) -> Tensor:
    images, student = images.double(), task.model
    image = student.encode_image(images)
    text = torch.stack([student.encode_text(tokens[:, slot]) for slot in range(2)], dim=1)
    loss = oracle(image, text, student.logit_scale.exp(), "slot")[0].sum()
    if isinstance(task, DistillTask):
        with torch.no_grad():
            goals = {
                "image": task.teacher.encode_image(images),
                "text": torch.stack([task.teacher.encode_text(tokens[:, slot]) for slot in range(2)], dim=1),
            }
        for tower, feature in (("image", image), ("text", text)):
            projector, goal = task.module.projector[tower], goals[tower]
            feature = feature @ projector.weight.T + projector.bias
            difference = functional.normalize(feature, dim=-1) - functional.normalize(goal, dim=-1)
            loss = loss + 0.5 * task.alpha * (goal.shape[-1] / 512) * (difference**2).sum() / goal.numel()
    return loss


def open_engine(task: ClipTask, cell: Cell, **options: Any) -> Any:
    from compt.engines.zero.engine import ZeroEngine

    options = {"caps": {"model.logit_scale": CAP}, "ema_decay": DECAY, "recompute": cell.recompute, **options}
    options["compile"] = cell.compile
    return ZeroEngine(task.module, ADAMW, stage=cell.stage, config=cell.config(), **options)


def train(task: ClipTask, engine: Any, pieces: int, steps: range, spoil: bool = False) -> tuple[list[float], ...]:
    """The losses over all ranks and the norms; with `spoil` the last rank's loss is infinite."""
    losses, norms = [], []
    share = BATCH // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    for step in steps:
        images, tokens = (part[own] for part in data(step))
        if spoil and dist.rank() == dist.world_size() - 1:
            images = images * float("inf")
        loss, _ = cached_backward(task, engine, images, tokens, share // pieces)
        losses.append(dist.all_reduce_sum(loss.item()) / dist.world_size())
        norms.append(engine.step(LR, MAX_NORM).item())
    return losses, norms


def compare(cells: list[Cell]) -> list[Result]:
    """Train each cell."""
    results = []
    for cell in cells:
        task = make_task(cell.arch, cell.distil)
        engine = open_engine(task, cell)
        if cell.scaled:
            engine._scale = LossScale(torch.device("cpu"))
            train(task, engine, cell.pieces, range(1), spoil=True)
            assert engine._scale.scale.item() == 2**15
        share = BATCH // dist.world_size()
        images, tokens = (part[dist.rank() * share :][:share] for part in data(0))
        loss, _ = cached_backward(task, engine, images, tokens, share // cell.pieces)
        gradients = dict(engine.gradients())
        first = [dist.all_reduce_sum(loss.item()) / dist.world_size()], [engine.step(LR, MAX_NORM).item()]
        rest = train(task, engine, cell.pieces, range(1, STEPS))
        losses, norms = (before + after for before, after in zip(first, rest, strict=True))
        results.append(Result(losses, norms, gradients, dict(engine.weights()), dict(engine.weights(average=True))))
        groups = distributed_c10d._world.pg_map
        limits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
        assert len(limits) == 1, "a group that DeepSpeed made has another timeout"
    return results


def compare_traced(cells: list[Cell]) -> list[Result]:
    """Like `compare`. Compiled code runs as torch traced it, since making kernels takes minutes on a CPU."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    return compare(cells)


def alone(cells: list[Cell]) -> list[Result]:
    """Like `compare`, in a process that no launcher put into a group."""
    dist.shutdown()
    return compare(cells)


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name].reshape(one[name].shape)) for name in one
    )


def whole(engine: Any) -> dict[str, dict[str, Tensor]]:
    return {"weights": dict(engine.weights()), "average": dict(engine.weights(average=True))}


@contextlib.contextmanager
def flushed() -> Iterator[list[str]]:
    """The names of the files that this process flushes to the disk."""
    names: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if not os.path.isdir(name):
            names.append(name)
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recorded)
        yield names


def save_and_go_on(folder: str, cells: list[Cell], precision: str = "fp32") -> list[dict[str, Any]]:
    """Train two steps, save, and continue. Then continue again from the checkpoint: the bits must be the same."""
    from compt.engines.zero.state import open_average
    from compt.weights.deepspeed import read_zero

    results = []
    for number, cell in enumerate(cells):
        path = Path(folder) / str(number)
        task = make_task(cell.arch, cell.distil)
        engine = open_engine(task, cell, precision=precision)
        train(task, engine, cell.pieces, range(2))
        with flushed() as found:
            files = engine.save(path)()
        # Only its own: another rank's may be renamed just now.
        assert sorted(re.sub(r"\.latest\.[\w.]+$", "latest", name) for name in found) == sorted(map(str, files))
        dist.barrier()
        before = whole(engine)
        assert equal(before["weights"], read_zero(path).weights), "the files hold other weights"
        assert equal(before["average"], open_average(path)), "the files hold another average"
        lists = dist.gather_objects([str(file) for file in files])
        listed = {file for files in lists for file in files}
        assert listed == {str(file) for file in path.rglob("*") if file.is_file()}
        assert sum(map(len, lists)) == len(listed)
        going_on = train(task, engine, cell.pieces, range(2, 4)), whole(engine)

        task = make_task(cell.arch, cell.distil, seed=5)
        engine = open_engine(task, cell, precision=precision)
        train(task, engine, cell.pieces, range(1))
        engine.load(path)
        assert all(equal(before[key], value) for key, value in whole(engine).items()), "other weights after loading"
        again = train(task, engine, cell.pieces, range(2, 4)), whole(engine)
        assert again[0] == going_on[0], cell
        assert all(equal(going_on[1][key], value) for key, value in again[1].items()), cell
        results.append({"numbers": again[0], **again[1]})
    return results


def resume(folder: str, cells: list[Cell]) -> list[dict[str, Any]]:
    """Continue from what other ranks saved."""
    results = []
    for number, cell in enumerate(cells):
        task = make_task(cell.arch, cell.distil, seed=5)
        engine = open_engine(task, cell)
        engine.load(Path(folder) / str(number))
        results.append({"numbers": train(task, engine, cell.pieces, range(2, 4)), **whole(engine)})
    return results


def refuse(folder: str, stage: int) -> dict[str, str]:
    """The messages for folders that do not fit. The engine stays as it was."""
    from compt.errors import ArtefactError

    said = {}
    for name in sorted(path.name for path in Path(folder).iterdir()):
        arch = "swin" if name == "other" else "vit"
        task = make_task(arch, True)
        engine = open_engine(task, Cell(stage), ema_decay=None if name == "no average wanted" else DECAY)
        train(task, engine, 1, range(1))
        before = whole(engine)
        try:
            engine.load(Path(folder) / name)
            said[name] = "loaded"
        except ArtefactError as error:
            said[name] = str(error)
        assert all(equal(before[key], value) for key, value in whole(engine).items()), name
        train(task, engine, 1, range(1))
    return said


def skip(cells: list[Cell], precision: str) -> None:
    """A step that is not finite on one rank leaves all as it was on all of them."""
    for cell in cells:
        ends = []
        for spoiled in (False, True):
            task = make_task(cell.arch, cell.distil)
            engine = open_engine(task, cell, precision=precision)
            if engine._scale:
                engine._scale.scale.fill_(256.0)
            train(task, engine, cell.pieces, range(1))
            before = whole(engine)
            if spoiled:
                _, norms = train(task, engine, cell.pieces, range(1, 2), spoil=True)
                assert not torch.tensor(norms).isfinite().any(), (cell, norms)
                assert all(equal(before[key], value) for key, value in whole(engine).items()), cell
                if engine._scale:
                    assert (engine._scale.scale.item(), engine._scale.growth_tracker.item()) == (128.0, 0)
                    engine._scale.scale.fill_(256.0)
            numbers = train(task, engine, cell.pieces, range(2, 4))
            ends.append((numbers, whole(engine)))
        assert ends[0][0] == ends[1][0], cell
        assert all(equal(ends[0][1][key], ends[1][1][key]) for key in ends[0][1]), cell


def score(cells: list[Cell]) -> None:
    """Each rank runs parts of the module in its own number; training continues as if nothing had happened."""
    images, tokens = data(9)
    for cell in cells:
        ends = []
        for scored in (False, True):
            task = make_task(cell.arch, cell.distil)
            engine = open_engine(task, cell)
            train(task, engine, cell.pieces, range(1))
            if scored:
                values = dict(engine.weights())
                reference = make_task(cell.arch, cell.distil)
                reference.module.load_state_dict(values)
                reference.module.eval()
                with engine.scoring():
                    assert not task.module.training
                    for _ in range(2 * dist.rank()):
                        found = task.model.encode_image(images[:2])
                        torch.testing.assert_close(found, reference.model.encode_image(images[:2]))
                    if dist.rank() == 0:
                        found = task.module(images[:2], tokens[:2])["text"]
                        torch.testing.assert_close(found, reference.module(images[:2], tokens[:2])["text"])
                        assert torch.equal(task.model.logit_scale, reference.model.logit_scale)
                assert task.module.training
                if cell.stage == 3:
                    held = sum(parameter.numel() for parameter in task.module.parameters())
                    assert held < sum(value.numel() for value in values.values()) / 4
            ends.append((train(task, engine, cell.pieces, range(1, 3)), whole(engine)))
        assert ends[0][0] == ends[1][0], cell
        assert all(equal(ends[0][1][key], ends[1][1][key]) for key in ends[0][1]), cell


class Asked(Mapping[str, Tensor]):
    """Values that are counted when they are read, and the elements that the module holds meanwhile."""

    def __init__(self, values: Mapping[str, Tensor], module: torch.nn.Module) -> None:
        self.values_, self.module = values, module
        self.asked: list[str] = []
        self.held = 0

    def __getitem__(self, name: str) -> Tensor:
        self.asked.append(name)
        whole = [p.numel() for p in self.module.parameters() if not p.is_meta]
        self.held = max(self.held, sum(whole))
        return self.values_[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values_

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def shape(self, name: str) -> torch.Size:
        return self.values_[name].shape


def from_meta(cells: list[Cell]) -> None:
    """A module without memory, given its values, trains as one that had them."""
    from compt.errors import ArtefactError
    from compt.train.task import StudentModule

    for cell in cells:
        ends = []
        values = make_task(cell.arch, False).module.state_dict()
        values = {name: value.clone() for name, value in values.items()}
        for meta in (False, True):
            task = ClipTask(build(SPECS[cell.arch], "meta") if meta else build(SPECS[cell.arch], seed=0))
            asked = Asked(values, task.module)
            if meta:
                wrong = StudentModule(build(SPECS[cell.arch], "meta"))
                with pytest.raises(ArtefactError, match=list(values)[-1]):
                    open_engine(ClipTask(wrong.model), cell, initial=dict(list(values.items())[:-1]))
            engine = open_engine(task, cell, initial=asked if meta else None)
            if meta:
                assert sorted(asked.asked) == sorted(values)
                if cell.stage == 3:
                    assert asked.held <= max(value.numel() for value in values.values())
            assert equal(values, dict(engine.weights()))
            ends.append((train(task, engine, cell.pieces, range(2)), whole(engine)))
        assert ends[0][0] == ends[1][0], cell
        assert all(equal(ends[0][1][key], ends[1][1][key]) for key in ends[0][1]), cell


def frozen(folder: str, stages: list[int]) -> None:
    """A frozen parameter stays, and is saved and loaded, or set, with the others."""
    from compt.errors import ArtefactError
    from compt.weights.deepspeed import read_zero
    from compt.weights.lazy import Tensors

    name = "model.visual.conv1.weight"
    for stage in stages:
        path = Path(folder) / f"frozen{stage}"
        task = make_task("vit", True)
        task.module.get_parameter(name).requires_grad_(False)
        at_first = task.module.get_parameter(name).detach().clone()
        engine = open_engine(task, Cell(stage))
        train(task, engine, 1, range(2))
        engine.save(path)()
        dist.barrier()
        weights = dict(engine.weights())
        assert torch.equal(weights[name], at_first)
        assert name not in dict(engine.weights(average=True)) or torch.equal(
            dict(engine.weights(average=True))[name], at_first
        )
        assert equal(weights, read_zero(path).weights)
        other = make_task("vit", True, seed=3)
        other.module.get_parameter(name).requires_grad_(False)
        again = open_engine(other, Cell(stage))
        again.load(path)
        assert equal(weights, dict(again.weights()))
        again.set_weights(Tensors({name: value * 0.5 for name, value in weights.items()}))
        halves = dict(again.weights())
        assert all(torch.equal(halves[name], value * 0.5) for name, value in weights.items())
        with pytest.raises(ArtefactError, match="logit_scale is missing"):
            again.set_weights(Tensors({name: value for name, value in weights.items() if "logit" not in name}))
        assert equal(halves, dict(again.weights()))
        again.set_weights(Tensors(weights))
        assert train(task, engine, 1, range(2, 3)) == train(other, again, 1, range(2, 3))


def forgotten(cells: list[Cell]) -> None:
    """An engine that is deleted frees its memory: the next link of a chain needs it."""
    for cell in cells:
        task = make_task(cell.arch, cell.distil)
        engine = open_engine(task, cell)
        train(task, engine, cell.pieces, range(2))
        with engine.scoring():
            pass
        held = [weakref.ref(task.module), *(weakref.ref(master) for master in engine._parts.masters)]
        del task, engine
        gc.collect()
        assert [ref() is None for ref in held] == [True] * len(held), cell


def own_gpu() -> None:
    """Slurm may show each process only its own GPU, as cuda:0. DeepSpeed has to use that one."""
    import deepspeed

    from compt.engines.zero.start import start_deepspeed

    accelerator, before = deepspeed.accelerator.get_accelerator(), dist.local_rank()
    taken: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(before))
        patch.setattr(accelerator, "device_name", lambda index=None: "cuda" if index is None else f"cuda:{index}")
        patch.setattr(accelerator, "set_device", taken.append)
        start_deepspeed(torch.device("cuda", 0))
        engine = object.__new__(deepspeed.DeepSpeedEngine)
        torch.nn.Module.__init__(engine)
        engine._configure_with_arguments(None, None)
        engine._set_distributed_vars(None)
        assert (taken, engine.device) == ([0], torch.device("cuda", 0))
        assert dist.local_rank() == before == dist.rank()


def quick(folder: str, cells: list[Cell]) -> list[Result]:
    """Some of each of the above, in one start."""
    results = compare(cells)
    save_and_go_on(folder, cells[2:])
    skip(cells[1:2], "fp32")
    score(cells[3:])
    from_meta([Cell(3)])
    frozen(folder, [1])
    forgotten([Cell(3)])
    own_gpu()
    return results
