"""Count the tensors of a real training step: memory kept for backward, and the peak.

On a CPU the tensors are real. For a GPU the same modules run on tensors without memory (`FakeTensorMode`), with CUDA's
autocast rules and the outputs of its attention kernels. This needs no GPU, and measures none.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compt.engines.base import COMPUTE_DTYPES, Precision
from compt.engines.ddp import DataParallelEngine
from compt.models.clip import ClipModel, build, materialise
from compt.models.presets import ModelSpec
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.accumulate import cached_backward
from compt.train.build import Blueprint, build_task
from compt.train.losses import ImageToText
from compt.train.task import SHARED_OUTPUTS, ClipTask, DistillTask

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Case:
    """One step of one process: its images, captions of `tokens` tokens each, and settings."""

    student: ModelSpec
    teacher: ModelSpec | None = None
    rows: int = 2
    captions: int = 2
    tokens: int = 16
    short: int | None = None
    """If given, every second caption has this many tokens and runs in a text bucket of its own (only on a CPU)."""
    precision: Precision = "bf16"
    world_size: int = 1
    """GPUs whose features are gathered. Copies of this one's features replace the others'."""
    micro_batch: int | None = None
    recompute: bool = False
    chunk: int | None = None
    image_to_text: ImageToText = "slot"


@dataclass(frozen=True)
class Kept:
    """Bytes kept for backward by the towers and the losses (with features), and by half-precision weight copies."""

    image: int
    text: int
    loss: int
    copies: int


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Storages:
    """Counts the bytes of distinct storages, each once. `known` ones do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.tensors: list[Tensor] = list(known)
        self._known = {_address(tensor) for tensor in self.tensors}
        self.bytes = 0

    def __contains__(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._known

    def add(self, tensor: Tensor) -> Tensor:
        if tensor not in self:
            self._known.add(_address(tensor))
            self.tensors.append(tensor)  # keep it alive, or another storage could get its address
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


class _Copies(TorchDispatchMode):
    """Records the copies of parameters in another type: those of autocast, and those of a block's one kernel."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {_address(parameter) for parameter in parameters}
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _address(args[0]) in self._parameters:
            self.made.append(result)
        if func is torch.ops.aten._foreach_copy_.default:
            self.made += [copy for copy, one in zip(*args[:2], strict=True) if _address(one) in self._parameters]
        return result


def _cuda_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """What `scaled_dot_product_attention` calls on a GPU: flash attention, or the efficient kernel in fp32 and with
    a mask. torch needs a driver to choose one, and there is none here."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]  # type: ignore[no-any-return]
    if attn_mask is not None:
        length = attn_mask.shape[-1]
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        bias = F.pad(bias, (0, -length % 8))[..., :length]  # the kernel needs aligned rows
        attn_mask = bias.expand(*query.shape[:3], length)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, 0.0, is_causal)[0]  # type: ignore[no-any-return]


def _encode_whole(model: ClipModel, tokens: Tensor, buckets: int = 1, lengths: Tensor | None = None) -> Tensor:
    """`encode_captions` without reading token values: fake tensors have none."""
    return model.encode_text(tokens, length=tokens.shape[-1])


@contextlib.contextmanager
def _pretended_gpu() -> Iterator[None]:
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(F, "scaled_dot_product_attention", _cuda_attention),
        mock.patch.object(ClipModel, "encode_captions", _encode_whole),
    ):
        yield


@contextlib.contextmanager
def _autocast(device: Device, precision: Precision) -> Iterator[None]:
    """torch.autocast, also for "cuda" without a driver, which torch.autocast refuses."""
    if device == "cpu" or precision == "fp32":
        with torch.autocast("cpu", COMPUTE_DTYPES[precision], enabled=precision != "fp32"):
            yield
        return
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", COMPUTE_DTYPES[precision])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def _gathered(local: Tensor, ranks: int) -> Tensor:
    return torch.cat([local] * ranks) if ranks > 1 else local


def _shapes(case: Case) -> ClipTask:
    """The task of `case` on the meta device. Build it before `FakeTensorMode`: timm needs real numbers to build."""
    models = [build(spec, device="meta") for spec in (case.student, case.teacher) if spec is not None]
    for module in models[0].modules():
        if case.recompute and hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = True
    plan = Blueprint(
        student=case.student,
        teacher=case.teacher,
        optimizer=Optimizer(loss=case.student.loss, precision=case.precision, image_to_text=case.image_to_text),
        engine=EngineConfig(loss_chunk=case.chunk, text_buckets=2 if case.short else 1),
    )
    return build_task(plan, *models)


def _place(task: ClipTask, device: Device) -> ClipTask:
    """Allocate the task on `device`, with small random weights so that no step overflows."""
    models = [task.model, *([task.teacher] if isinstance(task, DistillTask) else [])]
    task.module.projector.to_empty(device=device)
    for model in models:
        materialise(model, device)
    for module in (task.module, *models):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return task


def make_batch(case: Case, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens and lengths, as the trainer passes them to `cached_backward`."""
    size = case.student.image_size
    images = torch.zeros(case.rows, 3, size, size, device=device)
    lengths = torch.full((case.rows * case.captions,), case.tokens)
    lengths[::2] = case.short or case.tokens
    tokens = torch.zeros(len(lengths), case.tokens, dtype=torch.long, device=device)
    tokens[torch.arange(len(lengths)), lengths - 1] = case.student.vocab_size - 1
    return images, tokens.unflatten(0, (case.rows, case.captions)), lengths.unflatten(0, (case.rows, case.captions))


def kept(case: Case, device: Device) -> Kept:
    """Count what a forward pass of the whole local batch keeps, part by part. "cuda" is simulated."""
    task = _shapes(case)
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(_pretended_gpu())
        gather = partial(_gathered, ranks=case.world_size)
        stack.enter_context(mock.patch("compt.train.losses.gather_with_grad", gather))
        _place(task, device)
        images, tokens, lengths = make_batch(case, device)
        known = [*task.module.parameters(), *task.module.buffers(), images, tokens]
        copies = stack.enter_context(_Copies(task.module.parameters()))

        def run(function: Callable[[], Any]) -> tuple[int, int, Any]:
            copies.made.clear()
            with _autocast(device, case.precision), _keeping(known) as storages:
                result = function()
            copied = sum(tensor.untyped_storage().nbytes() for tensor in copies.made if tensor in storages)
            return storages.bytes - copied, copied, result

        targets = task.targets(images, tokens, lengths)
        image, _, _ = run(lambda: task.model.encode_image(images))
        flat = tokens.flatten(0, 1), task.module.text_buckets, lengths.flatten()
        text, _, _ = run(lambda: task.model.encode_captions(*flat))
        _, copied, outputs = run(lambda: task.module(images, tokens, lengths))
        learned = {name: outputs.pop(name) for name in SHARED_OUTPUTS & outputs.keys()}
        with _keeping([*known, *targets.values(), *learned.values()]) as losses:
            for output in outputs.values():
                losses.add(output)
            task.loss({**outputs, **learned}, targets)
        return Kept(image, text, losses.bytes, copied)


@contextlib.contextmanager
def _keeping(known: Iterable[Tensor]) -> Iterator[Storages]:
    """Count what autograd saves. A checkpoint holds its arguments without calling autograd's hooks: patch it too."""
    storages = Storages(known)
    original = torch.utils.checkpoint.checkpoint

    def noted(function: Any, *arguments: Any, **options: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, Tensor):
                storages.add(argument)
        return original(function, *arguments, **options)

    with contextlib.ExitStack() as stack:
        for place in ("compt.models.clip", "compt.train.losses", "timm.models._manipulate"):
            stack.enter_context(mock.patch(f"{place}.checkpoint", noted))
        stack.enter_context(saved_tensors_hooks(storages.add, lambda tensor: tensor))
        yield storages


class Alive(TorchDispatchMode):
    """Tracks the peak bytes of living storages that operators created, without the `known` ones."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {_address(tensor) for tensor in known}
        self._storages: dict[int, weakref.ref[Any]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in self._known:
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        # Read the sizes each time: FSDP2 resizes storages to zero and back.
        living: dict[int, Any] = {at: alive for at, ref in self._storages.items() if (alive := ref()) is not None}
        self._storages = {at: self._storages[at] for at in living}
        self.most = max(self.most, sum(storage.nbytes() for storage in living.values()))
        return result


def engine_and_task(case: Case, device: Device = "cpu") -> tuple[DataParallelEngine, ClipTask]:
    """The engine of one process, on a real device, and the task it trains."""
    task = _place(_shapes(case), device)
    return DataParallelEngine(task.module, precision=case.precision, device=device), task


def step(engine: DataParallelEngine, task: ClipTask, case: Case, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """One step as the trainer takes it."""
    images, tokens, lengths = batch
    cached_backward(task, engine, images, tokens, case.micro_batch, lengths)
    engine.step(0.0)


def most_alive(case: Case) -> int:
    """Peak bytes, weights included, of the second step of real training on the CPU."""
    engine, task = engine_and_task(case)
    batch = make_batch(case, "cpu")
    step(engine, task, case, batch)
    held = Storages(())
    for tensor in (*static_tensors(engine, task), *batch):
        held.add(tensor)
    with Alive(held.tensors) as alive:
        step(engine, task, case, batch)
    return int(held.bytes + alive.most)


def static_tensors(engine: DataParallelEngine, task: ClipTask) -> list[Tensor]:
    """Tensors that live longer than a step: weights, masks, moments, the teacher."""
    tensors = [*task.module.parameters(), *task.module.buffers()]
    tensors += [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
    if isinstance(task, DistillTask):
        tensors += [*task.teacher.parameters(), *task.teacher.buffers()]
    return tensors
