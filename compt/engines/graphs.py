"""CUDA graphs: a training step is captured once for each size of its text, and then launched as a whole.

A captured step reads its batch from fixed buffers and writes gradients to fixed buffers. The optimizer and all
collectives stay outside of the graphs. With one rank, a step is one graph. With several, it is a graph of the forward
pass, then the loss, which gathers features, then a graph of the backward pass. The CPU launches the loss while the GPU
still computes the forward pass.

Gradients come from `torch.autograd.grad`, and DistributedDataParallel does not wrap the module. Its hooks keep the
nodes that add up gradients on the stream where they were made, and a capture on another stream may not wait for it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compt.dist import collectives as dist
from compt.engines.base import AdamWSettings, EngineArguments
from compt.engines.ddp import DataParallelEngine
from compt.errors import is_out_of_memory
from compt.models.clip import caption_lengths, models_in
from compt.models.packing import SIZES, Lengths, Packing, pack

_log = logging.getLogger(__name__)

Scalars = dict[str, Tensor]
Part = Callable[[], None]


class Recorder(Protocol):
    """Captures what functions launch. What one recorder captures shares memory, and is replayed one after another."""

    def warm_up(self, part: Part) -> None:
        """Run `part` as it is, where captures run."""

    def capture(self, part: Part) -> Part:
        """Capture `part`, without running it; returns what replays it. Raises RuntimeError where that cannot be."""


class CudaGraphs:
    """Captures as `torch.cuda.CUDAGraph`, on one stream and in one pool of memory.

    Graphs that share a pool overwrite each other's memory. Here nothing in it is read after a step is over.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, part: Part) -> None:
        """Run `part` on the stream of the captures: libraries take their workspaces there."""
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            part()
        before.wait_stream(self._stream)

    def capture(self, part: Part) -> Part:
        """Capture `part`; returns the graph's replay."""
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile: one pins batches, NCCL's looks after collectives. The
        # outer context gives the stream back where the inner one fails to end a capture.
        try:
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                part()
        except RuntimeError:
            # Where torch cannot end a capture, its allocator stays in it: `empty_cache` then fails, and memory that
            # other streams used is never free again. The call raises where torch has ended it.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            raise
        return graph.replay


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaGraphs}
"""What captures, by the type of device."""


class LossTask(Protocol):
    """What a step needs of a task (`compt.train.task.Task`)."""

    def targets(self, images: Tensor, tokens: Tensor, lengths: Lengths | None = None) -> dict[str, Tensor]:
        """Inputs of the loss that are not trained."""

    def loss(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> tuple[Tensor, Scalars]:
        """This rank's loss and scalars to report."""


class GraphEngine(DataParallelEngine):
    """As DataParallelEngine, with steps that are captured: `whole_step`.

    `device` has one of `RECORDERS`. `replays` counts steps that were replayed.
    """

    def __init__(
        self, module: nn.Module, settings: AdamWSettings | None = None, **given: Unpack[EngineArguments]
    ) -> None:
        super().__init__(module, settings, **given)
        self.recorder: Recorder | None = RECORDERS[self.device.type](self.device)
        self.replays = 0
        self._steps: dict[Any, _CapturedStep] = {}
        self._inputs: dict[Any, Tensor] = {}
        self._gradients: Scalars = {}
        (self._model,) = models_in(module)
        self._model.text_sizes = SIZES

    @property
    def sizes(self) -> int:
        """The number of sizes of text and batches that have come by."""
        return len(self._steps)

    def _wrapped(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Backward of `loss` outside of graphs. The last one before a step averages the gradients over ranks."""
        super().backward(loss, last=last)
        if last:
            dist.average([one.grad for one in self._names.values() if one.grad is not None])

    def whole_step(
        self, task: LossTask, images: Tensor, tokens: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Scalars]:
        """Set the gradients of this rank's batch, averaged over ranks; returns the detached loss and the report.

        images float [b, 3, H, W], tokens int64 [b, M, T], lengths int64 [b, M] on the CPU. The first step of a size
        runs as it is, the second is captured, and replayed like all that follow.
        """
        if lengths is None:
            lengths = caption_lengths(tokens).cpu()
        context = self._model.spec.context_length
        tokens = F.pad(tokens, (0, context - tokens.shape[-1]))
        packing = pack(lengths.flatten(), context, context, self.device, SIZES)
        held = self._load(images, tokens, *packing.tensors)
        key = (task, *(one.shape for one in held))
        if key not in self._steps:
            self._steps[key] = _CapturedStep(self, task, held, context)
        loss, report = self._steps[key].run()
        dist.average(list(self._gradients.values()))
        for name, gradient in self._gradients.items():
            self._names[name].grad = gradient
        return loss, report

    def _load(self, *inputs: Tensor) -> list[Tensor]:
        """Copy a batch into buffers; steps of other sizes have those of the same shape in common."""
        values = {(at, one.shape): one for at, one in enumerate(inputs)}
        _put(self._inputs, values)
        return [self._inputs[key] for key in values]

    def upstream(self, loss: Tensor, outputs: Mapping[str, Tensor]) -> Scalars:
        """The gradient of the scaled loss by each of `outputs` that it depends on."""
        found: Any = torch.autograd.grad(self._scaled(loss), list(outputs.values()), allow_unused=True)
        return {name: one for name, one in zip(outputs, found, strict=True) if one is not None}

    def downstream(self, outputs: Mapping[str, Tensor], upstream: Scalars) -> None:
        """Write the gradients of the parameters from those of the outputs."""
        roots = [outputs[name] for name in upstream]
        found: Any = torch.autograd.grad(roots, list(self._names.values()), list(upstream.values()), allow_unused=True)
        _put(self._gradients, {name: one for name, one in zip(self._names, found, strict=True) if one is not None})


def _put(buffers: dict[Any, Tensor], values: Mapping[Any, Tensor]) -> None:
    """Copy into the buffers, which are made at the first call."""
    for name, value in values.items():  # in this order on every rank
        if name not in buffers:
            buffers[name] = torch.empty_like(value)
    torch._foreach_copy_([buffers[name] for name in values], list(values.values()))


class _CapturedStep:
    """The forward and backward pass over inputs of one shape, which lie in the engine's buffers."""

    def __init__(self, engine: GraphEngine, task: LossTask, inputs: list[Tensor], context: int) -> None:
        self._engine, self._task = engine, task
        packed: Any = (*inputs[2:], (), context)
        self._given = inputs[0], inputs[1], Packing(*packed)
        self._outputs: Scalars = {}
        self._features: Scalars = {}
        self._targets: Scalars = {}
        self._upstream: Scalars = {}
        self._report: Scalars = {}
        self._parts: list[Part] = []
        self._seen = False

    def run(self) -> tuple[Tensor, Scalars]:
        """The detached loss and the report; the gradients are in the engine's buffers."""
        recorder = self._engine.recorder
        if recorder is not None and self._seen and not self._parts:
            self._capture(recorder)
        if self._parts:
            self._engine.replays += 1
            for part in self._parts:
                part()
        elif recorder is not None:
            recorder.warm_up(self._whole)
        else:
            self._whole()
        self._seen = True
        # Copies, as the next step writes to the same memory.
        report = {name: value.clone() for name, value in self._report.items()}
        return report.pop(_LOSS), report

    def _capture(self, recorder: Recorder) -> None:
        try:
            if self._engine.world_size == 1:
                self._parts = [recorder.capture(self._whole)]
            else:
                self._parts = [recorder.capture(self._forward), self._loss, recorder.capture(self._backward)]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._engine.recorder = None
            _log.warning("engine.graphs: steps run eagerly, as one cannot be captured: %s", str(error).splitlines()[0])

    def _whole(self) -> None:
        self._forward()
        self._loss()
        self._backward()

    def _forward(self) -> None:
        self._targets = self._task.targets(*self._given)
        self._outputs = self._engine.forward(*self._given)
        self._features = {name: one.detach() for name, one in self._outputs.items()}

    def _loss(self) -> None:
        features = {name: one.detach().requires_grad_() for name, one in self._features.items()}
        loss, report = self._task.loss(features, self._targets)
        _put(self._upstream, self._engine.upstream(loss, features))
        self._report = {**report, _LOSS: loss.detach()}

    def _backward(self) -> None:
        outputs, self._outputs = self._outputs, {}  # its activations are free afterwards
        self._engine.downstream(outputs, self._upstream)


_LOSS = "whole loss"
"""The loss's name beside those of a report."""
