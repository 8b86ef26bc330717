"""Training in shards on 1, 2 and 4 processes, compared with a plain loop over the whole batch on one."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from compt.dist import collectives as dist
from compt.engines.base import AdamWSettings
from compt.engines.ddp import DataParallelEngine
from compt.engines.fsdp2 import ShardedEngine
from compt.engines.shards import local, make_mesh, shard_frozen, sharded_parts
from compt.errors import ArtefactError
from compt.models.clip import ClipModel, build
from compt.models.presets import PACKED, ModelSpec, resolve
from compt.train.accumulate import cached_backward
from compt.train.task import ClipTask, DistillTask
from tests.dist.spawn import run_ranks

SMALL = {"image_size": 16, "depth": 2, "context_length": 10, "vocab_size": 63, "text_depth": 2}
SWIN = {
    "image_size": 32,
    "window": 4,
    "width": 32,
    "head_width": 16,
    "depths": (1, 2),
    "text_width": 32,
    "text_head_width": 16,
    "text_depth": 1,
    "embed_dim": 18,
    "context_length": 10,
    "vocab_size": 63,
}
SAMPLES = 16
STEPS = 3
EPS = 1e-4
"""Large, so that noise in gradients of zero does not become steps."""
DECAY = 0.9
LR = 2e-3
MAX_NORM = 1.0
CAPS = {"model.logit_scale": 2.65}
"""Below where it starts."""


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """A single process makes its own process group, which other tests do not expect."""
    yield
    dist.shutdown()


def vit(embed_dim: int) -> ModelSpec:
    return resolve("vit_pico", {**SMALL, "embed_dim": embed_dim})


SPECS = {"vit": vit(18), "swin": resolve("swin_t", SWIN)}
TEACHER = vit(24)


def make_task(student: str, distil: bool, *, meta: bool = False, sharded: bool = False) -> ClipTask:
    model = build(SPECS[student], device="meta" if meta else "cpu", seed=0)
    if not distil:
        return ClipTask(model, text_buckets=2)
    teacher = build(TEACHER, seed=1)
    if sharded:
        values = teacher.state_dict()
        teacher = shard_frozen(build(TEACHER, device="meta"), values, dtype=torch.float32, device="cpu")
    return DistillTask(model, teacher, text_buckets=2)


def batch(student: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    size = SPECS[student].image_size
    images = torch.randn(SAMPLES, 3, size, size, generator=generator)
    tokens = torch.randint(1, 61, (SAMPLES, 2, 10), generator=generator)
    lengths = torch.randint(3, 11, (SAMPLES, 2, 1), generator=generator)
    positions = torch.arange(10)
    return images, tokens.masked_fill(positions >= lengths, 0).masked_fill(positions == lengths - 1, 62)


def own_rows(student: str) -> tuple[Tensor, Tensor]:
    images, tokens = batch(student)
    share = SAMPLES // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    return images[own], tokens[own]


class Cell:
    """Results of one training run: numbers of each step, the first gradients, and the final state."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}


def oracle(student: str, distil: bool) -> Cell:
    """torch's plain AdamW over the whole batch at once, and averages by their formula."""
    task, found = make_task(student, distil), Cell()
    parameters = dict(task.module.named_parameters())
    decayed = [p for n, p in parameters.items() if p.ndim > 1 and "bias" not in n]
    free = [p for n, p in parameters.items() if p.ndim <= 1 or "bias" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=EPS, foreach=False)
    images, tokens = batch(student)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _ = task.loss(task.module(images, tokens), task.targets(images, tokens))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: cast(Tensor, p.grad) for name, p in parameters.items()}
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        found.losses.append(loss.item())
        found.norms.append(norm.item())
        if step == 0:
            found.gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        for gradient in gradients.values():
            gradient *= min(1.0, MAX_NORM / (norm.item() + 1e-6))
        optimizer.step()
        with torch.no_grad():
            parameters["model.logit_scale"].clamp_(max=CAPS["model.logit_scale"])
            now = {name: p.clone() for name, p in parameters.items()}
        old = found.averages or now
        found.averages = {name: DECAY * old[name] + (1 - DECAY) * value for name, value in now.items()}
    found.weights = now
    return found


def open_engine(task: ClipTask, kind: type[Any], **options: Any) -> Any:
    return kind(task.module, AdamWSettings(eps=EPS), caps=CAPS, ema_decay=DECAY, **options)


def train(
    student: str,
    distil: bool,
    pieces: int,
    options: dict[str, Any],
    *,
    meta: bool = True,
    sharded: bool = False,
    kind: type[Any] = ShardedEngine,
) -> Cell:
    """Like the oracle; the numbers are those of all ranks."""
    found = Cell()
    task = make_task(student, distil, meta=meta, sharded=sharded)
    if meta:
        options = {**options, "initial": make_task(student, distil).module.state_dict()}
    engine = open_engine(task, kind, **options)
    images, tokens = own_rows(student)
    for step in range(STEPS):
        loss, _ = cached_backward(task, engine, images, tokens, len(images) // pieces)
        found.losses.append(dist.all_reduce_sum(loss.item()) / dist.world_size())
        if step == 0:
            found.gradients = dict(engine.gradients())
        found.norms.append(engine.step(LR, MAX_NORM).item())
    found.weights = dict(engine.weights())
    found.averages = dict(engine.weights(average=True))
    return found


CELLS: dict[int, list[tuple[str, bool, int, dict[str, Any]]]] = {
    1: [
        ("vit", True, 1, {}),
        ("vit", True, 4, {"recompute": True}),
        ("swin", False, 4, {"cpu_offload": True}),
    ],
    2: [
        ("vit", True, 1, {}),
        ("vit", True, 4, {"reshard_after_forward": False}),
        ("swin", True, 4, {"recompute": True}),
        ("swin", False, 1, {"reduce_precision": "fp32", "cpu_offload": True}),
        ("vit", False, 4, {"replicas": 2}),
    ],
    4: [
        ("vit", True, 4, {}),
        ("vit", False, 1, {"reshard_after_forward": False}),
        ("swin", True, 1, {}),
        ("swin", True, 4, {"replicas": 2, "recompute": True}),
        ("vit", True, 4, {"replicas": 2, "reshard_after_forward": False}),
        ("vit", True, 4, {"cpu_offload": True, "recompute": True}),
    ],
}


def train_all(world: int) -> list[Cell]:
    """Every second cell starts from a module with values and from a whole teacher."""
    return [train(*cell, meta=at % 2 == 0, sharded=at % 2 == 0) for at, cell in enumerate(CELLS[world])]


def difference(name: str, found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Error and correct value, without key biases: their gradient is rounding noise."""
    keep = torch.ones_like(expected, dtype=torch.bool)
    if name.endswith(("attn.in_proj_bias", "attn.qkv.bias")):
        third = len(expected) // 3
        keep[third : 2 * third] = False
    return (found - expected)[keep], expected[keep]


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_equals_a_plain_loop(world: int) -> None:
    expected = {(student, distil): oracle(student, distil) for student, distil, _, _ in CELLS[world]}
    results = [train_all(world)] if world == 1 else run_ranks(train_all, world, world, timeout=300.0)
    for at, (student, distil, pieces, options) in enumerate(CELLS[world]):
        correct, label = expected[student, distil], f"{student} {distil} {pieces} {options}"
        for ranks in results:
            found = ranks[at]
            assert found.losses == pytest.approx(correct.losses, rel=2e-6), label
            assert found.norms == pytest.approx(correct.norms, rel=5e-6), label
        found = results[0][at]
        assert found.gradients.keys() == correct.gradients.keys() == found.weights.keys() == found.averages.keys()
        for name, gradient in correct.gradients.items():
            error, compared = difference(name, found.gradients[name], gradient)
            assert error.norm() <= 5e-6 * compared.norm(), f"{label}: {name}"
            torch.testing.assert_close(found.weights[name], correct.weights[name], rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(found.averages[name], correct.averages[name], rtol=2e-6, atol=1e-6)
        assert correct.norms[0] > MAX_NORM, "nothing was clipped"


def bf16_steps(kind: type[Any], pieces: int, **options: Any) -> Cell:
    """Outputs and gradients of the first step, norms of two, and the weights after them."""
    task, found = make_task("vit", True), Cell()
    engine = open_engine(task, kind, precision="bf16", **options)
    images, tokens = own_rows("vit")
    with torch.no_grad():
        found.outputs = engine.forward(images, tokens)
    for step in range(2):
        loss, _ = cached_backward(task, engine, images, tokens, len(images) // pieces)
        found.losses.append(loss.item())
        if step == 0:
            found.gradients = dict(engine.gradients())
        found.norms.append(engine.step(LR, MAX_NORM).item())
    found.weights = dict(engine.weights())
    return found


def bf16_cells() -> list[tuple[Cell, Cell]]:
    cells: list[tuple[int, dict[str, Any]]] = [(4, {}), (1, {"reduce_precision": "bf16"})]
    return [
        (bf16_steps(DataParallelEngine, pieces), bf16_steps(ShardedEngine, pieces, **options))
        for pieces, options in cells
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_is_autocast_over_fp32_parameters(world: int) -> None:
    """The forward pass has the bits of DDP; only sums of gradients are rounded in another order."""
    exact = oracle("vit", True)
    cells = bf16_cells() if world == 1 else run_ranks(bf16_cells, world, timeout=300.0)[0]
    for ddp, sharded in cells:
        assert sharded.losses[0] == ddp.losses[0]
        assert all(torch.equal(value, ddp.outputs[name]) for name, value in sharded.outputs.items())
        assert ddp.outputs["logit_scale"].dtype == torch.float32
        assert sharded.norms == pytest.approx(ddp.norms, rel=2e-2)
        for name, value in ddp.weights.items():
            torch.testing.assert_close(sharded.weights[name], value, rtol=0, atol=LR)
    (ddp, sharded), (_, coarse) = cells
    assert largest(ddp.gradients, exact.gradients) > 8e-3, "bf16 is not what was computed in"
    assert largest(sharded.gradients, ddp.gradients) < 4e-3
    assert (1e-3 if world > 1 else 0) < largest(coarse.gradients, ddp.gradients) < 3e-2


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    pairs = [difference(name, found[name], value) for name, value in expected.items()]
    return max(float(error.norm() / value.norm()) for error, value in pairs)


def averages_of_both() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Beside a sharded teacher each."""
    kinds = (DataParallelEngine, ShardedEngine)
    ddp, sharded = (train("vit", True, 1, {}, kind=kind, sharded=True).averages for kind in kinds)
    return ddp, sharded


def nonfinite() -> dict[str, Any]:
    task = make_task("vit", False)
    engine = open_engine(task, ShardedEngine)
    images, tokens = own_rows("vit")

    def held() -> dict[str, Tensor]:
        return {name: local(tensor).clone() for name, tensor in engine.state().items()}

    def advance(pictures: Tensor, spoil: bool = False) -> float:
        cached_backward(task, engine, pictures, tokens, len(images) // 2)
        if spoil and dist.rank() == 0:
            # In a slice that no other rank has.
            local(cast(Tensor, task.model.text_projection.grad))[0, 0] = math.inf
        return float(engine.step(LR, MAX_NORM))

    advance(images)
    before = held()
    spoilt = images.clone()
    spoilt[0, 0, 0, 0] = math.nan if dist.rank() == 0 else 0.0
    norms = [advance(spoilt), advance(images, spoil=True)]
    after = held()
    same = all(torch.equal(value, before[name]) for name, value in after.items())
    norms.append(advance(images))
    later = held()
    moved = {name for name, value in later.items() if value.numel() and not torch.equal(value, before[name])}
    still = {name for name, value in later.items() if value.numel() and name not in moved}
    return {"norms": norms, "same": same, "still": still, "steps": later["ema.updates"].item()}


def overflow() -> dict[str, Any]:
    """fp16 on all ranks until a step is finite: the first gradients may be too large for it."""
    task = make_task("vit", True)
    engine = open_engine(task, ShardedEngine, precision="fp16")
    images, tokens = own_rows("vit")
    before = {name: value for name, value in engine.weights() if "logit_scale" not in name}  # its cap is held always
    norm, lost = math.inf, -1
    while not math.isfinite(norm):
        lost += 1
        now = dict(engine.weights())
        unchanged = all(torch.equal(now[name], value) for name, value in before.items())
        cached_backward(task, engine, images, tokens)
        if lost == 0:
            # In a slice that no other rank has.
            where = local(cast(Tensor, task.model.text_projection.grad))
            where[0, 0] = math.inf if dist.rank() == 0 else where[0, 0]
        norm = float(engine.step(LR, MAX_NORM))
    now = dict(engine.weights())
    moved = any(not torch.equal(now[name], value) for name, value in before.items())
    return {
        "unchanged": unchanged,
        "moved": moved,
        "lost": lost,
        "scale": float(engine.state()["scaler.scale"]),
        "norm": norm,
    }


def faults() -> tuple[Any, ...]:
    return nonfinite(), overflow(), averages_of_both()


@pytest.mark.parametrize("world", [1, 2])
def test_nonfinite_steps_are_left_out_together(world: int) -> None:
    exact = oracle("vit", True)
    for found, half, (ddp, sharded) in [faults()] if world == 1 else run_ranks(faults, world, timeout=300.0):
        assert not any(math.isfinite(norm) for norm in found["norms"][:2])
        assert math.isfinite(found["norms"][2])
        assert found["same"]
        assert found["steps"] == 2
        assert found["still"] <= {"model.model.logit_scale"}, "a capped logit_scale may stay where it is"
        assert half["unchanged"]
        assert half["moved"]
        assert half["lost"] >= 1
        assert half["scale"] == 65536 / 2 ** half["lost"]
        assert half["norm"] == pytest.approx(exact.norms[0], rel=5e-2), "the scale is taken off the norm"
        for name, value in ddp.items():
            torch.testing.assert_close(sharded[name], value, rtol=2e-6, atol=5e-7)


def scored() -> dict[str, Any]:
    """Forwards that only one rank makes, before and after steps, in bf16 training."""
    task = make_task("vit", True, meta=True)
    initial = make_task("vit", True).module.state_dict()
    images, tokens = own_rows("vit")
    engine = open_engine(task, ShardedEngine, precision="bf16", initial=initial, recompute=True)
    plain = build(SPECS["vit"])
    losses, errors = [], []
    for step in range(2):
        task.module.train()
        if step != 1 or dist.world_size() > 1:
            reference = {n.removeprefix("model."): v for n, v in engine.weights() if n.startswith("model.")}
            plain.load_state_dict(reference)
            with engine.scoring():
                assert not task.module.training
                assert not torch.is_grad_enabled()
                for _ in range(dist.rank() * 2 + 1):
                    features = task.model.encode_image(images)
                    text = task.model.encode_captions(tokens[:, 0], buckets=1 + dist.rank())
                if dist.rank() == 0:
                    task.module(images, tokens)
                    task.model.transformer.resblocks[0](torch.zeros(1, 2, plain.spec.text_width))
                with torch.no_grad():
                    errors += [
                        (features - plain.encode_image(images)).abs().max().item(),
                        (text - plain.encode_captions(tokens[:, 0])).abs().max().item(),
                    ]
            assert task.module.training
            assert all(isinstance(p, DTensor) for p in task.module.parameters() if p.ndim > 1)
        loss, _ = cached_backward(task, engine, images, tokens, len(images) // 2)
        engine.step(LR, MAX_NORM)
        losses.append(loss.item())
    return {"errors": errors, "losses": losses, "weights": dict(engine.weights())}


def sizes() -> dict[str, float]:
    """Bytes of tensors that one step adds, and bytes that a rank should hold."""
    task = make_task("vit", False)
    total = sum(p.numel() for p in task.module.parameters() if p.ndim > 1)
    vectors = sum(p.numel() for p in task.module.parameters() if p.ndim < 2)
    images, tokens = own_rows("vit")
    initial = {name: value.clone() for name, value in task.module.state_dict().items()}
    del task
    gc.collect()
    before = _storages()
    task = make_task("vit", False, meta=True)
    engine = open_engine(task, ShardedEngine, initial=initial)
    cached_backward(task, engine, images, tokens, len(images) // 2)
    engine.step(LR, MAX_NORM)
    return {"bytes": _held(before), "matrices": total * 16, "vectors": vectors * 16}


def _storages() -> dict[int, int]:
    """Bytes by address of all tensors that Python knows."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            storage = local(thing.detach()).untyped_storage()
            found[storage.data_ptr()] = storage.size()
    return found


def _held(others: Collection[int]) -> int:
    """Bytes of all tensors except `others`, the minimum within a second: gloo frees what it sent a little later."""
    found = []
    for _ in range(12):
        gc.collect()
        found.append(sum(size for place, size in _storages().items() if place not in others))
        time.sleep(0.1)
    return min(found)


def frozen() -> dict[str, Any]:
    """A sharded teacher beside a whole one, and what is left of it between two calls."""
    whole = build(TEACHER, seed=1).requires_grad_(False)
    images, tokens = own_rows("vit")
    gc.collect()
    before = _storages()
    values = {name: value.clone() for name, value in whole.state_dict().items()}
    kept = {value.untyped_storage().data_ptr() for value in values.values()}
    teacher = shard_frozen(build(TEACHER, device="meta"), values, dtype=torch.float32, device="cpu")
    assert not teacher.training
    errors, bytes_held, noted = [], [], []
    vectors = _vectors_taken(teacher)
    for _ in range(3):
        errors += [
            (teacher.encode_image(images) - whole.encode_image(images)).abs().max().item(),
            (teacher.encode_text(tokens[:, 0]) - whole.encode_text(tokens[:, 0])).abs().max().item(),
            *(
                (teacher.encode_captions(tokens[:, 1], n) - whole.encode_captions(tokens[:, 1])).abs().max().item()
                for n in (3, PACKED)
            ),
        ]
        bytes_held.append(_held({*before, *kept}))
        groups = [part._get_fsdp_state()._fsdp_param_group for part in sharded_parts(teacher)]
        noted.append(sum(len(group.comm_ctx.post_forward_order) for group in groups if group))
    half = shard_frozen(build(TEACHER, device="meta"), values, dtype=torch.bfloat16, device="cpu")
    coarse = half.encode_image(images.bfloat16())
    with pytest.raises(ArtefactError, match="missing"):
        shard_frozen(build(TEACHER, device="meta"), {}, dtype=torch.float32, device="cpu")
    return {
        "errors": errors,
        "bytes": bytes_held,
        "vectors": vectors,
        "noted": noted,
        "all": 4 * sum(p.numel() for p in whole.parameters()),
        "graph": coarse.requires_grad,
        "coarse": (coarse.float() - whole.encode_image(images)).abs().max().item(),
        "dtype": coarse.dtype,
        "trained": any(p.requires_grad for p in teacher.parameters()),
    }


def _vectors_taken(teacher: ClipModel) -> list[torch.Size]:
    """The shapes of all vectors that FSDP takes as arguments of the model, and would move to a GPU."""
    taken: list[torch.Size] = []
    state = teacher._get_fsdp_state()  # type: ignore[operator]
    before = state._pre_forward

    def noted(module: Any, args: Any, options: Any) -> Any:
        given = (*args, *options.values())
        taken.extend(value.shape for value in given if isinstance(value, Tensor) and value.ndim < 2)
        return before(module, args, options)

    state._pre_forward = noted
    return taken


def alone_and_apart() -> tuple[Any, ...]:
    return scored(), sizes(), frozen()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_score_alone_and_hold_shares(world: int) -> None:
    # A process of its own even for one rank: here, other tests may have left tensors without storage (torch.export).
    results = run_ranks(alone_and_apart, world, timeout=300.0)
    for scores, held, teacher in results:
        assert max(scores["errors"]) < 2e-6
        assert all(torch.equal(value, results[0][0]["weights"][n]) for n, value in scores["weights"].items())
        share = held["matrices"] / world + held["vectors"]
        assert 0.95 * share <= held["bytes"] < 1.15 * share + 20_000
        assert max(teacher["errors"]) < 2e-6
        assert max(teacher["noted"]) == 0
        assert teacher["vectors"] == [], "lengths of captions belong on the CPU"
        assert teacher["bytes"][0] == teacher["bytes"][-1]
        assert 0.95 * teacher["all"] / world <= teacher["bytes"][0] < 1.15 * teacher["all"] / world + 20_000
        assert teacher["dtype"] == torch.bfloat16
        assert 0 < teacher["coarse"] < 0.1
        assert not teacher["graph"]
        assert not teacher["trained"]


def train_and_save(folder: Path) -> dict[str, Tensor]:
    """Two steps, a save, a third step; returns what was saved, whole."""
    task = make_task("swin", True)
    engine = open_engine(task, ShardedEngine)
    for _ in range(2):
        cached_backward(task, engine, *own_rows("swin"))
        engine.step(LR, MAX_NORM)
    engine.save(folder)()
    return state_of(engine)


def state_of(engine: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = engine.state()
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for n, v in state.items()}


def load_and_train(folder: Path, other: Path | None) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """Load a state into other weights, save it again, and train one more step."""
    task = make_task("swin", True)
    for parameter in task.module.parameters():
        parameter.data.add_(0.1)
    engine = open_engine(task, ShardedEngine, reshard_after_forward=False)
    cached_backward(task, engine, *own_rows("swin"))
    engine.step(LR, MAX_NORM)
    with torch.no_grad():
        engine.forward(*own_rows("swin"))  # leaves weights gathered that loading has to forget
    engine.load(folder)
    loaded = state_of(engine)
    if other is not None:
        engine.save(other, asynchronous=True)()
    cached_backward(task, engine, *own_rows("swin"))
    return loaded, engine.step(LR, MAX_NORM).item(), state_of(engine)


def test_states_go_from_shards_to_ddp_and_back(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("four", "one", "two")]
    for folder in folders:
        folder.mkdir()
    saved = run_ranks(train_and_save, 4, folders[0])[0]
    task = make_task("swin", True)
    engine = open_engine(task, DataParallelEngine)
    engine.load(folders[0])
    assert_same(engine.state(), saved)
    engine.save(folders[1])()
    cached_backward(task, engine, *own_rows("swin"))
    norm = engine.step(LR, MAX_NORM).item()
    for loaded, found, after in run_ranks(load_and_train, 2, folders[1], folders[2]):
        assert_same(loaded, saved)
        assert found == pytest.approx(norm, rel=5e-6)
        for name, value in engine.state().items():
            if name.startswith(("model.", "ema.")):
                torch.testing.assert_close(after[name], value, rtol=2e-6, atol=2e-6)
    again = open_engine(make_task("swin", True), DataParallelEngine)
    again.load(folders[2])
    assert_same(again.state(), saved)
    with pytest.raises(ArtefactError, match="unexpected"):
        open_engine(make_task("swin", False), ShardedEngine).load(folders[2])


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def replicas() -> set[float]:
    """The timeouts of the groups of two replicas."""
    groups = [make_mesh(torch.device("cpu"), 2).get_group(name) for name in ("replicate", "shard")]
    backends: Any = [group._get_backend(torch.device("cpu")) for group in groups]
    return {backend.options._timeout.total_seconds() for backend in backends}


def test_what_does_not_fit_is_refused_and_all_groups_give_up_as_the_first_one() -> None:
    assert run_ranks(replicas, 2, timeout=99.0) == [{99.0}] * 2
    with pytest.raises(ArtefactError, match=r"weight has shape \[2, 3\] instead of \[2, 2\]"):
        values = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        ShardedEngine(nn.Linear(2, 2, device="meta"), initial=values)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers_at_any_length() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in ("off", "blocks"):
        task = make_task("vit", False)
        engine = open_engine(task, ShardedEngine, compile=compiled)
        images, tokens = own_rows("vit")
        for cut in (10, 9, 8, 7):
            shorter = tokens.masked_fill(torch.arange(10) >= cut, 0)
            shorter[..., cut - 1] = 62
            loss, _ = cached_backward(task, engine, images, shorter, 8)
            found.append((loss.item(), engine.step(LR, MAX_NORM).item()))
            if cut == 8:
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for plain, quick in zip(found[:4], found[4:], strict=True):
        assert quick == pytest.approx(plain, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled again for another length"
