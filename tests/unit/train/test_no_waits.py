"""What a step copies to and from a GPU: nothing that makes the process wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.checkpoint import filesystem
from torch.distributed.utils import _to_kwargs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compt.data.batch import Batch
from compt.engines import ddp
from compt.engines.state_dcp import load_state, save_state
from compt.models import packing
from compt.models.clip import build
from compt.models.pixels import to_input
from compt.models.presets import PACKED, resolve
from compt.train.losses import ContrastiveLoss
from compt.train.task import ClipTask, DistillTask

SPEC = resolve("vit_pico", {"image_size": 16, "depth": 1, "context_length": 10, "vocab_size": 64, "embed_dim": 16})
GPU = torch.device("cuda", 0)


class PretendedGpu(TorchDispatchMode):
    """A GPU of shapes without numbers: to ask one of them is an error.

    `copies`: of each between it and the CPU whether one waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.copies: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten.is_pinned.default:
            return args[0].data_ptr() in self.pinned
        if func is aten._pin_memory.default:
            self.pinned.add(args[0].data_ptr())
            return args[0]
        fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not fake and not to_gpu:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._to_copy.default:
            self._note(kwargs.get("device") or args[0].device, args[0], kwargs.get("non_blocking"))
        elif func is aten.copy_.default:
            self._note(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return func(*args, **kwargs)

    def _note(self, to: Tensor | torch.device, source: Tensor, non_blocking: bool | None) -> None:
        """A copy to a tensor or, where torch takes memory for it (pinned, if it is not to wait), to a device."""
        device = to.device if isinstance(to, Tensor) else torch.device(to)
        if device.type != source.device.type:
            host = to if device.type == "cpu" else source
            self.copies.append(not non_blocking or (isinstance(host, Tensor) and not self._is_pinned(host)))

    def _is_pinned(self, host: Tensor) -> bool:
        return not isinstance(host, FakeTensor) and host.data_ptr() in self.pinned


@pytest.mark.parametrize(("buckets", "sent"), [(1, 0), (2, 1), (PACKED, 1)])
def test_a_step_waits_for_nothing_up_to_its_loss(buckets: int, sent: int) -> None:
    lengths = torch.tensor([[3, 9], [10, 4], [5, 5], [7, 6]])
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGpu() as gpu:
        task = DistillTask(build(SPEC, GPU), build(SPEC, GPU), text_buckets=buckets)
        images: Tensor = torch.zeros((4, 3, 16, 16), dtype=torch.uint8, device=GPU)
        tokens = torch.zeros((4, 2, 10), dtype=torch.int64, device=GPU)
        gpu.copies.clear()
        inputs = to_input(images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), tokens, lengths
        loss, _ = task.loss(task.module(*inputs), task.targets(*inputs))
    assert loss.device == GPU
    # What pixels are normalised by; the order of the captions, or where their tokens lie, for student and teacher.
    assert gpu.copies == [False] * (1 + 2 * sent)


@pytest.mark.parametrize(("buckets", "sent"), [(2, 1), (PACKED, 1)])
def test_ddp_leaves_the_lengths_on_the_cpu(buckets: int, sent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP moves every input to the GPU if it is told which one; back on the CPU, the lengths would make a step wait."""
    monkeypatch.setattr(ddp, "DistributedDataParallel", Wrapped)
    lengths = torch.tensor([[3, 9], [10, 4], [5, 5], [7, 6]])
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGpu() as gpu:
        task = ClipTask(build(SPEC, GPU), text_buckets=buckets)
        whole: Any = SimpleNamespace(device=GPU)
        module = ddp.DataParallelEngine._wrapped(whole, task.module)
        images = torch.zeros((4, 3, 16, 16), device=GPU)
        tokens = torch.zeros((4, 2, 10), dtype=torch.int64, device=GPU)
        gpu.copies.clear()
        module(images, tokens, lengths)
    assert gpu.copies == [False] * sent


class Wrapped(torch.nn.Module):
    """What torch's DistributedDataParallel does with its inputs."""

    def __init__(self, module: torch.nn.Module, device_ids: list[Any] | None = None, **_: Any) -> None:
        super().__init__()
        self.module, self.device_ids = module, device_ids

    def forward(self, *inputs: Any) -> Any:
        if self.device_ids:
            inputs = _to_kwargs(inputs, {}, torch.device(self.device_ids[0]), False)[0][0]
        return self.module(*inputs)


def test_a_batch_whose_images_are_on_the_gpu_waits_for_nothing() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGpu() as gpu:
        images = torch.zeros((2, 3, 16, 16), dtype=torch.uint8, device=GPU)
        batch = Batch(images, torch.zeros((2, 2, 10), dtype=torch.int64), ["a", "b"]).pin_memory()
        gpu.copies.clear()
        assert batch.images is images
        batch.tokens.to(GPU, non_blocking=True)
    assert gpu.copies == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [ContrastiveLoss(), ContrastiveLoss("all"), ContrastiveLoss(chunk=3)], ids=repr)
def test_what_is_captured_copies_nothing_and_asks_for_no_number(
    loss: ContrastiveLoss, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernel of attention that half precision takes on a GPU, and with padded attention."""
    # Torch switches the autocast of a GPU off without one.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    kernels, attend = [], packing._by_kernel
    monkeypatch.setattr(packing, "_by_kernel", lambda *given: kernels.append(given) or attend(*given))
    lengths = torch.tensor([[3, 9], [10, 4], [5, 5], [7, 6]])
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGpu() as gpu:
        task = DistillTask(build(SPEC, GPU), build(SPEC, GPU), loss, text_buckets=PACKED)
        images: Tensor = torch.zeros((4, 3, 16, 16), device=GPU)
        tokens = torch.zeros((4, 2, 10), dtype=torch.int64, device=GPU)
        made = packing.pack(lengths.flatten(), 10, 10, GPU, packing.SIZES)
        packed = packing.Packing(*made.tensors, (), 10)
        gpu.copies.clear()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            outputs = task.module(images, tokens, packed)
        value, _ = task.loss(outputs, task.targets(images, tokens, packed))
    assert value.device == GPU
    assert gpu.copies == []
    # One block of the student; the teacher is in fp32 here.
    assert len(kernels) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("copy", "waits"),
    [
        (lambda gpu, cpu: gpu.cpu(), [True]),
        (lambda gpu, cpu: gpu.to("cpu", non_blocking=True), [False]),
        (lambda gpu, cpu: gpu.copy_(cpu), [True]),
        (lambda gpu, cpu: gpu.copy_(cpu, non_blocking=True), [True]),
        (lambda gpu, cpu: gpu.copy_(cpu.pin_memory()), [True]),
        (lambda gpu, cpu: gpu.copy_(cpu.pin_memory(), non_blocking=True), [False]),
        (lambda gpu, cpu: cpu.copy_(gpu), [True]),
        (lambda gpu, cpu: cpu.to(GPU), [True]),
        (lambda gpu, cpu: cpu.pin_memory().to(GPU, non_blocking=True), [False]),
        (lambda gpu, cpu: gpu.cpu().to(GPU, non_blocking=True), [True, True]),
        (lambda gpu, cpu: gpu.copy_(gpu.to(torch.float64)), []),
    ],
)
def test_the_pretended_gpu_notices(copy: Callable[[Tensor, Tensor], Tensor], waits: list[bool]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGpu() as gpu:
        there, here = torch.zeros(3, device=GPU), torch.zeros(3)
        gpu.copies.clear()
        copy(there, here)
    assert gpu.copies == waits


def test_a_thread_that_writes_asks_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's reader ahead makes itself a stream: on the first GPU of the machine, whosever that is."""
    made: list[Any] = []
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", lambda *_, **__: made.append(1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    state = {"weight": torch.arange(6.0)}
    save_state(state, tmp_path, asynchronous=True)()
    assert not made
    found = {"weight": torch.zeros(6)}
    load_state(found, tmp_path)
    assert torch.equal(found["weight"], state["weight"])
