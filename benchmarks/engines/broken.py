"""Faults that the engine matrix must notice. Each one breaks one thing in the running program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partialmethod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.engines import cells
from benchmarks.engines.cells import Cell
from compt.dist import collectives as dist
from compt.engines import base, ddp, shards
from compt.engines.average import Average
from compt.train import build as building
from compt.train import losses
from compt.train.task import ClipTask, surrogate

Apply = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutation:
    """A claim, the change that breaks it, and the cell that must notice."""

    claim: str
    change: str
    cell: Cell
    apply: Apply


def _patched(place: str, new: Any) -> Apply:
    return lambda: mock.patch(place, new)


def _on_engine(change: Callable[[Any], None]) -> Apply:
    """Apply `change` to each engine after it is built."""

    def apply() -> AbstractContextManager[Any]:
        original = cells.open_cell

        def opened(*args: Any, **options: Any) -> tuple[ClipTask, Any]:
            task, engine = original(*args, **options)
            change(engine)
            return task, engine

        return mock.patch.object(cells, "open_cell", opened)

    return apply


def _no_gather() -> AbstractContextManager[Any]:
    original = losses.ContrastiveLoss.__call__
    return mock.patch.object(losses.ContrastiveLoss, "__call__", partialmethod(original, gather=False))


def _sum_buckets(engine: Any) -> None:
    def sent(_, bucket):  # type: ignore[no-untyped-def]  # torch accepts no other type than its own, or none
        future = torch_dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    engine.module.register_comm_hook(None, sent)


def _never_last(engine: Any) -> None:
    original = engine._sync
    engine._sync = lambda last: original(False)


def _every_piece_last(engine: Any) -> None:
    forward, backward = engine.forward, engine.backward
    engine.forward = lambda *inputs, last=True: forward(*inputs, last=True)
    engine.backward = lambda loss, last=True: backward(loss, last=True)


def _projector_alone() -> AbstractContextManager[Any]:
    class Partial(DistributedDataParallel):
        def __init__(self, module: Any, **options: Any) -> None:
            names = [name for name, _ in module.named_parameters() if name.startswith("projector.")]
            self._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]
            super().__init__(module, **options)

    return mock.patch.object(ddp, "DistributedDataParallel", Partial)


def _whole_scale(outputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], micro_batches: int) -> Tensor:
    return surrogate(outputs, gradients, 1)


def _rows_of_others(outputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], micro_batches: int) -> Tensor:
    return surrogate(outputs, {name: value.roll(1, 0) for name, value in gradients.items()}, micro_batches)


def _small_losses(
    task: Any, engine: Any, images: Tensor, tokens: Tensor, micro: int, lengths: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ordinary gradient accumulation: the mean of the losses of small batches."""
    total = torch.zeros(())
    pieces = list(zip(images.split(micro), tokens.split(micro), strict=True))
    for at, piece in enumerate(pieces):
        last = at == len(pieces) - 1
        loss, _ = task.loss(engine.forward(*piece, last=last), task.targets(*piece))
        engine.backward(loss / len(pieces), last=last)
        total += loss.detach() / len(pieces)
    return total, {}


def _scale_alone(engine: Any) -> None:
    """Average all vectors except logit_scale."""
    parameter, original = engine._names["model.logit_scale"], engine._average_vectors

    def average() -> None:
        kept = parameter.grad.clone()
        original()
        parameter.grad.copy_(kept)

    engine._average_vectors = average


def _no_division(engine: Any) -> None:
    for part in shards.sharded_parts(engine._root):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo supports no sum with a factor


def _own_norm(engine: Any) -> None:
    engine._shards = SimpleNamespace(size=lambda: 1)


def _own_norm_zero(engine: Any) -> None:
    engine._zero.get_grad_norm_direct = lambda gradients, *_, **__: torch.stack([g.norm() for g in gradients]).norm()


def _stay_gathered(engine: Any) -> None:
    for part in shards.sharded_parts(engine._root):
        part.set_reshard_after_forward(False)
        part.set_reshard_after_backward(False)


def _no_clipping(engine: Any) -> None:
    step = engine.step
    engine.step = lambda lr, max_norm=None: step(lr)


def _teacher_of_its_own() -> AbstractContextManager[Any]:
    original = building.build_task

    def made(*args: Any, **options: Any) -> ClipTask:
        task = original(*args, **options)
        with torch.no_grad():
            task.teacher.visual.proj.mul_(-1 if dist.rank() else 1)  # type: ignore[attr-defined]
        return task

    return mock.patch.object(building, "build_task", made)


def _lost_slice(value: Tensor, own: Any) -> Tensor:
    found = _SLICE_OF(value, own)
    return found if dist.rank() == 0 else torch.zeros_like(found)


_SLICE_OF = shards._slice_of


def _summed_bucket(engine: Any) -> None:
    engine._engine.gradient_average = False


def _summed_slices(engine: Any) -> None:
    engine._zero.gradient_average = False


def _summed_parts(engine: Any) -> None:
    original = engine._zero.partition_grads
    world = engine.world_size
    engine._zero.partition_grads = lambda parameters, parts: original(parameters, [part * world for part in parts])


def _divided_by_pieces(engine: Any) -> None:
    """DeepSpeed's default: divide each micro-batch's loss by their number. Here they are parts of a mean already."""
    original = engine._engine.backward
    pieces = 4
    engine._engine.backward = lambda loss, **_: original(loss / pieces, scale_wrt_gas=False)


def _old_parts(engine: Any) -> None:
    engine._zero._reassign_or_swap_out_partitioned_parameters = lambda _: None


def _old_weights() -> AbstractContextManager[Any]:
    return mock.patch("deepspeed.runtime.zero.stage_1_and_2.all_gather_dp_groups")


_DDP, _DDP_4 = Cell("ddp", 2), Cell("ddp", 2, 4)
_EVERY = "gradients are averaged over ranks"
_STEPPED = "the next step uses the updated weights"
_WHOLE_NORM = "the norm is that of the whole gradient"
_OWN_NORM = "each rank uses the norm of its own slices"

MUTATIONS = (
    Mutation("the loss uses the negatives of all ranks", "features are not gathered", _DDP, _no_gather),
    Mutation(
        "gradients flow back through gathering",
        "gathered features are detached",
        _DDP,
        _patched("compt.train.losses.gather_with_grad", dist.gather),
    ),
    Mutation(
        "each rank's labels are its positions in the global batch",
        "labels start at 0 on every rank",
        _DDP,
        _patched("compt.train.losses.rank", lambda: 0),
    ),
    Mutation(
        f"ddp: {_EVERY}",
        "gradients are summed",
        _DDP,
        _on_engine(_sum_buckets),
    ),
    Mutation(
        "ddp: the projectors' gradients are averaged",
        "projectors are left out of DistributedDataParallel",
        Cell("ddp", 2, 1, "projector"),
        _projector_alone,
    ),
    Mutation(
        "ddp: the last micro-batch averages gradients",
        "no micro-batch averages them",
        _DDP_4,
        _on_engine(_never_last),
    ),
    Mutation(
        "micro-batches share the negatives of the whole batch",
        "the loss is the mean of micro-batch losses",
        _DDP_4,
        _patched("benchmarks.engines.cells.cached_backward", _small_losses),
    ),
    Mutation(
        "logit_scale's gradient counts once per step",
        "it counts once per micro-batch",
        _DDP_4,
        _patched("compt.train.accumulate.surrogate", _whole_scale),
    ),
    Mutation(
        "each micro-batch gets the gradients of its own features",
        "rows of a micro-batch are shifted by one",
        Cell("ddp", 2, 4, "distillation", "swin"),
        _patched("compt.train.accumulate.surrogate", _rows_of_others),
    ),
    Mutation(
        "the towers' distances are averaged",
        "distances are summed",
        Cell("ddp", 1, 1, "distillation"),
        _patched(
            "compt.train.task.ifd_loss",
            lambda *args, **options: losses.ifd_loss(*args, **{**options, "reference_compatible": True}),
        ),
    ),
    Mutation(
        "all ranks have the same teacher",
        "one rank has another teacher",
        Cell("ddp", 2, 1, "projector", "vit"),
        _teacher_of_its_own,
    ),
    Mutation(
        "a sharded teacher equals the whole teacher",
        "one rank's slices are zero",
        Cell("ddp", 2, 1, "sharded teacher", "swin"),
        _patched("compt.engines.shards._slice_of", _lost_slice),
    ),
    Mutation("ddp: gradients are clipped", "gradients are not clipped", Cell("ddp", 1), _on_engine(_no_clipping)),
    Mutation(
        "ddp: norms and biases do not decay",
        "all parameters decay",
        Cell("ddp", 1, 1, "contrastive", "swin"),
        lambda: mock.patch.object(base, "decays", return_value=True),
    ),
    Mutation(
        "the average follows the weights",
        "the average keeps its first value",
        Cell("ddp", 1),
        lambda: mock.patch.object(Average, "update", _once(Average.update)),
    ),
    Mutation(f"fsdp2: {_EVERY}", "slices are summed", Cell("fsdp2", 2), _on_engine(_no_division)),
    Mutation(
        "fsdp2: the last micro-batch averages gradients of vectors",
        "gradients of vectors are not averaged",
        Cell("fsdp2", 2, 4, "projector"),
        _on_engine(lambda engine: setattr(engine, "_average_vectors", lambda: None)),
    ),
    Mutation(
        "fsdp2: logit_scale's gradient is averaged",
        "logit_scale's gradient is not averaged",
        Cell("fsdp2", 2),
        _on_engine(_scale_alone),
    ),
    Mutation(f"fsdp2: {_WHOLE_NORM}", _OWN_NORM, Cell("fsdp2", 2), _on_engine(_own_norm)),
    Mutation(
        f"fsdp2: {_STEPPED}", "weights stay gathered during the step", Cell("fsdp2", 2), _on_engine(_stay_gathered)
    ),
    Mutation(
        "fsdp2: norms and biases do not decay",
        "all parameters decay",
        Cell("fsdp2", 2, 1, "contrastive", "swin"),
        lambda: mock.patch.object(base, "decays", return_value=True),
    ),
    Mutation(f"zero0: {_EVERY}", "gradients are summed", Cell("zero0", 2, 4), _on_engine(_summed_bucket)),
    Mutation(f"zero1: {_EVERY}", "slices are summed", Cell("zero1", 2, 4), _on_engine(_summed_slices)),
    Mutation(
        "zero1: gradients are averaged once per step",
        "they are averaged after each micro-batch",
        Cell("zero1", 2, 4, "projector"),
        _on_engine(_every_piece_last),
    ),
    Mutation(
        "zero2: DeepSpeed does not scale the loss of a micro-batch",
        "it divides by the number of micro-batches",
        Cell("zero2", 2, 4),
        _on_engine(_divided_by_pieces),
    ),
    Mutation(f"zero2: {_EVERY}", "slices are summed", Cell("zero2", 2, 4), _on_engine(_summed_slices)),
    Mutation(f"zero2: {_WHOLE_NORM}", _OWN_NORM, Cell("zero2", 2), _on_engine(_own_norm_zero)),
    Mutation("zero2: gradients are clipped", "gradients are not clipped", Cell("zero2", 2), _on_engine(_no_clipping)),
    Mutation(f"zero2: {_STEPPED}", "each rank keeps old weights of the others", Cell("zero2", 2), _old_weights),
    Mutation(f"zero3: {_EVERY}", "slices are summed", Cell("zero3", 2, 4), _on_engine(_summed_parts)),
    Mutation(f"zero3: {_WHOLE_NORM}", _OWN_NORM, Cell("zero3", 2), _on_engine(_own_norm_zero)),
    Mutation(
        f"zero3: {_STEPPED}",
        "updated weights are not copied to the module's slices",
        Cell("zero3", 2, 1, "projector"),
        _on_engine(_old_parts),
    ),
)


def _once(update: Callable[..., None]) -> Callable[..., None]:
    def first(average: Average, finite: Tensor) -> None:
        if not average.updates:
            update(average, finite)

    return first
