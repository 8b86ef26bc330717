"""Kernels that one training step launches on a GPU, and the bytes that they move, counted without one.

The step runs on fake tensors, which have shapes, types and a device but no numbers. Every operation that computes or
copies on that device counts as one launch, as attention does; views and new memory do not. An operation moves the
bytes of the tensors that it takes and gives; a lookup only what it looks up.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compt.bench.step import Setup, TrainingStep, random_batch
from compt.engines.base import Engine
from compt.engines.graphs import GraphEngine
from compt.recipe.engine import changed_engine
from compt.train.task import Task

PARTS = ("input", "teacher", "forward", "loss", "backward", "graph", "optimizer")
"""The parts of a step, in their order; `input` is also what no other part does, `graph` the four before of a captured
step."""
_NO_KERNEL = {
    "device",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
}
_LOOKUPS = {"embedding", "index", "index_select"}


class Launches(TorchDispatchMode):
    """Counts what runs on `device`: `counts` and `moved` (bytes) by part of the step and operation.

    With `fake`, what has no fake tensor among its inputs and is for the CPU is computed there as usual.
    """

    def __init__(self, device: torch.device, fake: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self._fake = device, fake
        self.part = PARTS[0]
        self.counts: Counter[tuple[str, str]] = Counter()
        self.moved: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._fake:
            if func in (torch.ops.aten.is_pinned.default, torch.ops.aten._pin_memory.default):
                return func is torch.ops.aten.is_pinned.default or args[0]
            fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
            if not fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        found = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in _NO_KERNEL:
            return found
        given, taken = (
            [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.device == self.device]
            for value in (found, args)
        )
        if given or taken:
            self.counts[self.part, name] += 1
            touched = [*given, *(given if name in _LOOKUPS else taken), *self._written(func, args)]
            self.moved[self.part, name] += sum(leaf.numel() * leaf.element_size() for leaf in touched)
        return found

    def _written(self, func: Any, args: tuple[Any, ...]) -> list[Tensor]:
        """What an operation on lists of tensors writes in place: such operations return nothing."""
        if func._schema.returns:
            return []
        # AdamW writes gradients only where it divides them by a scale, which compt does not ask of it.
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        ]
        return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor) and leaf.device == self.device]

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Count what the method `name` of `owner` launches as `part` of the step."""
        method = getattr(owner, name)

        def run(*arguments: Any, **options: Any) -> Any:
            before, self.part = self.part, part
            try:
                return method(*arguments, **options)
            finally:
                self.part = before

        setattr(owner, name, run)

    def of(self, part: str) -> int:
        """The launches of one part of the step."""
        return sum(number for (where, _), number in self.counts.items() if where == part)

    @property
    def total(self) -> int:
        """The launches of the whole step."""
        return sum(self.counts.values())


@contextlib.contextmanager
def _pretended_gpu() -> Iterator[None]:
    """Fake tensors, with the autocast of a GPU, which torch switches off without one. No weights are drawn."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _one_kernel),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch("compt.models.clip.load_state"),
    ):
        yield


def _one_kernel(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_: Any
) -> Tensor:
    """Attention as one operator. Without a GPU torch would take the formula, which launches seven kernels."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
    found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, 0.0, is_causal)
    return cast(Tensor, found[0])


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's: the module on another device or in another type. Torch's own refuses fake tensors."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(change(value.detach()), value.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else change(buffer)
    return module


@torch.no_grad()
def _backward(loss: Tensor) -> None:
    """What `loss.backward()` computes, node after node. Torch's own engine wants the streams of a GPU that is there."""
    assert loss.grad_fn is not None
    uses: Counter[Any] = Counter()
    nodes, seen = [loss.grad_fn], {loss.grad_fn}
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    nodes.append(node)
    arrived: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = arrived.pop(node, {})
        if hasattr(node, "variable"):
            grad = node.variable.grad
            node.variable.grad = given[0] if grad is None else grad + given[0]
            continue
        run: Any = getattr(node, "apply", node)  # a Function in Python, or torch's own node
        found = run(*(given.get(at) for at in range(len(node._input_metadata)))) if given else ()
        found = found if isinstance(found, tuple) else (found,)
        for (after, at), gradient in zip_longest(node.next_functions, found[: len(node.next_functions)]):
            if after is None:
                continue
            if gradient is not None:
                # In the shape and type of what it is for, as it was broadcast or cast in the forward pass.
                wanted, held = after._input_metadata[at], arrived.setdefault(after, {})
                fitted = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                held[at] = held[at] + fitted if at in held else fitted
            uses[after] -= 1
            if not uses[after]:
                ready.append(after)


def methods_of_parts(task: Task, engine: Engine) -> list[tuple[str, Any, str]]:
    """Each part of a step but `input`, with the object and the method that is this part."""
    if isinstance(engine, GraphEngine):
        return [("graph", engine, "whole_step"), ("optimizer", engine, "step")]
    return [
        ("teacher", task, "targets"),
        ("forward", engine, "forward"),
        ("loss", task, "loss"),
        ("backward", engine, "backward"),
        ("optimizer", engine, "step"),
    ]


def count(setup: Setup, batch: int, device: torch.device) -> Launches:
    """Count the launches of one training step of `setup` with `batch` images, by ddp in one process and in one piece.

    On a CPU the step is computed. On a GPU it is not, and there need be none. Counted is the second step: the first one
    makes the optimizer's moments.
    """
    fake = device.type == "cuda"
    plain = {"name": "ddp", "shard_teacher": False, "compile": "off", "compile_mode": "default", "recompute": False}
    plain |= {"graphs": "off"}
    engine = changed_engine(setup.engine.on(device.type), {**plain, "micro_batch": None, "loss_chunk": None})
    plan = replace(setup, engine=engine)
    data = random_batch(plan, batch)
    seen = Launches(device, fake)
    with _pretended_gpu() if fake else contextlib.nullcontext(), seen:
        step = TrainingStep(plan, device)
        if fake:
            step.engine.backward = lambda loss, **_: _backward(loss)  # type: ignore[method-assign]
        for part, owner, name in methods_of_parts(step.task, step.engine):
            seen.watch(part, owner, name)
        step(data)
        seen.counts.clear()
        seen.moved.clear()
        step(data)
    return seen
