"""Joining the process group, and the few collectives that compt needs. In one process each of them is the identity."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as torch_dist
import torch.distributed.nn  # before a group exists: default arguments in there would keep it and its threads alive
from torch import Tensor
from torch.distributed import ReduceOp, distributed_c10d

from compt.dist.environment import Place, connect_limit, find_place
from compt.dist.rendezvous import choose_interface, meet, of_attempt
from compt.errors import ComptError, ConfigError, Gone, RunError, is_out_of_memory

T = TypeVar("T")

_log = logging.getLogger(__name__)

_DEVICES = Path("/dev")
"""Has nvidia0, nvidia1, … on a machine with NVIDIA's GPUs and driver; a container may have only some of them."""
_BUCKET = 32 * 2**20
"""Numbers that a collective averages: 128 MiB in fp32."""
_NO_LIMIT = datetime.timedelta(days=365)

_joined: list[Place] = []
"""This process's place in the group that `init` joined. LOCAL_RANK may change later: DeepSpeed's is the GPU's index."""
_beside: list[Any] = []
"""The default group, and the second one that `group_beside` made for it."""


def init(
    device: str = "auto", *, timeout_seconds: float = 1800.0, connect_seconds: float | None = None
) -> torch.device:
    """Join the process group that the environment describes and return this process's device.

    The environment is torchrun's, or srun's, which this completes with torchrun's variables (compt.dist.environment). A
    single process joins nothing. `device` is "auto", "cpu", "cuda" or "cuda:1". A collective times out after
    `timeout_seconds`, the meeting of all ranks after `connect_seconds` (default: COMPT_CONNECT_SECONDS, or 60).
    A group that the caller has made stays. Raises ConfigError for an environment that contradicts itself, a missing
    device, or a group without a backend for the CPU, and RunError, on each rank that is there, when the ranks do not
    find each other.
    """
    place = find_place(os.environ)
    if place is not None:
        os.environ.update(place.variables())
    chosen = _choose_device(device, place)
    if torch_dist.is_initialized() or place is None:
        _check_group()
        return chosen
    limit = connect_limit(os.environ) if connect_seconds is None else connect_seconds
    store = meet(place, limit)
    interface = choose_interface(place)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    timeout, short = (datetime.timedelta(seconds=seconds) for seconds in (timeout_seconds, limit))
    level: Any = torch_dist.get_debug_level()  # type: ignore[attr-defined]
    if level.name == "DETAIL":  # the timeout of its groups cannot be changed later
        short = timeout
    store.set_timeout(short)
    try:
        torch_dist.init_process_group(
            backend_of(chosen),
            store=of_attempt("group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=short,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise _not_joined(error, place, chosen) from error
    store.set_timeout(timeout)
    distributed_c10d._set_pg_timeout(timeout, torch_dist.group.WORLD)
    _joined[:] = [place]
    return chosen


def _check_group() -> None:
    """Raise ConfigError where a group of the caller's has NCCL alone: all that is not training passes CPU tensors."""
    group: Any = torch_dist.group.WORLD
    if world_size() > 1 and torch.device("cpu") not in group._device_types:
        raise ConfigError(
            f"the process group (backend {torch_dist.get_backend_config()}) has no backend for CPU tensors; make it "
            'with torch.distributed.init_process_group("cpu:gloo,cuda:nccl")'
        )


def _not_joined(error: RuntimeError, place: Place, device: torch.device) -> RunError:
    who, nccl = f"rank {place.rank} of {place.world_size}", device.type == "cuda"
    if _is_own(error) or (isinstance(error, torch_dist.DistBackendError) and "ncclRemoteError" not in str(error)):
        return RunError(f"{who} cannot join the others: {_reason(error)}")
    return RunError(
        f"{who} has no connection to the others ({_reason(error)}): one exited after it had connected, or "
        f"{'NCCL' if nccl else 'GLOO'}_SOCKET_IFNAME must name the network interface to use"
    )


def _choose_device(device: str, place: Place | None) -> torch.device:
    if device == "auto" and not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
        if not hidden and any(_DEVICES.glob("nvidia[0-9]*")):
            _say_unusable(place)
        device = "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if device != "auto" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise ConfigError(f"device '{device}' is not supported; use auto, cpu or cuda")
    chosen = torch.device("cuda" if device == "auto" else device)
    if not torch.cuda.is_available():
        raise ConfigError(f"device '{device}': torch sees no CUDA device")
    if chosen.index is None:
        own = place.gpu(torch.cuda.device_count()) if place is not None else int(os.environ.get("LOCAL_RANK", "0"))
        chosen = torch.device("cuda", own)
    if chosen.index >= torch.cuda.device_count():
        raise ConfigError(f"device {chosen} does not exist: this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(chosen)
    true_fp32()
    return chosen


def _say_unusable(place: Place | None) -> None:
    """The machine has a GPU, and torch cannot use it. One process goes on with a warning; a job raises ConfigError."""
    try:
        torch.cuda.init()
        reason = "torch sees no CUDA device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(" (")[0]
    text = (
        f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: {reason}. For a CUDA 12 driver, "
        "take torch 2.10: constraints-cu12.txt, or pip install 'torch==2.10.*' 'torchvision==0.25.*'"
    )
    if place is not None and place.world_size > 1:
        raise ConfigError(f"engine.device: auto: {text}; engine.device: cpu trains without GPUs")
    _log.warning("%s. This runs on the CPU", text)


def true_fp32() -> None:
    """Turn TF32 off on GPUs: losses and scores have to be true fp32, and autocast covers all that TF32 would speed up.

    By default torch takes it for convolutions.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def backend_of(device: torch.device) -> str:
    """Return the backend for processes on such devices."""
    # Small messages use gloo on GPU machines too, so that they do not wait for the GPU.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def join_alone(device: torch.device) -> None:
    """Make a process group of this process alone, if there is no group: what shards a model needs one."""
    if not torch_dist.is_initialized():
        store = torch_dist.HashStore()  # type: ignore[attr-defined]
        torch_dist.init_process_group(backend_of(device), store=store, rank=0, world_size=1)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    _joined.clear()
    _beside.clear()
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def new_cpu_group() -> Any:
    """Make another process group of all ranks, on the CPU, with the timeout of the first. All ranks call it."""
    return torch_dist.new_group(backend="gloo", timeout=_timeout())


def group_beside() -> Any:
    """Return a second group on the CPU, which a thread may use while training uses the first. All ranks call it.

    None without a group.
    """
    if not torch_dist.is_initialized():
        return None
    if not _beside or _beside[0] is not torch_dist.group.WORLD:
        _beside[:] = [torch_dist.group.WORLD, new_cpu_group()]
    return _beside[1]


def share_timeout() -> None:
    """Give every group of this process, DeepSpeed's too, the timeout of the first one."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(_timeout(), group)


def _timeout() -> datetime.timedelta:
    """Return the timeout of the first group; torch's default for others is half an hour."""
    first: Any = torch_dist.group.WORLD
    found: datetime.timedelta = first._get_backend(first._device_types[0]).options._timeout
    return found


def rank() -> int:
    """Return the index of this process, 0 in a single process."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise Gone for what torch raises in a collective when another process is missing."""
    try:
        yield
    except RuntimeError as error:
        if _is_own(error):
            raise
        raise _gone(error) from error


def _is_own(error: RuntimeError) -> bool:
    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)


def _reason(error: RuntimeError) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    # NCCL's first line only names the kind of failure.
    last = [line.strip() for at, line in enumerate(lines) if at and lines[at - 1].startswith("Last error")]
    return ": ".join([lines[0], *last])


def _gone(error: RuntimeError) -> Gone:
    return Gone(
        f"another process of this job has exited or cannot be reached; look for its message. Start the same "
        f"command again to go on. ({_reason(error)})"
    )


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        with together():
            torch_dist.barrier()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return the picklable `value` of rank `source` on every rank."""
    if world_size() == 1:
        return value
    box = [value if rank() == source else None]
    with together():
        torch_dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable `value` of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with together():
        torch_dist.all_gather_object(values, value)
    return values


def local_rank() -> int:
    """Return the index of this process on its machine, 0 in a single process."""
    return _joined[0].local_rank if _joined else 0


def agree(error: ComptError | None) -> None:
    """Raise the error of the lowest rank that has one on every rank. All ranks call it."""
    found = [other for other in gather_objects(error) if other is not None]
    if found:
        found[0].agreed = True
        raise found[0]


def fail(error: ComptError) -> NoReturn:
    """Raise an error that every rank has found for itself, so that rank 0 alone prints it. All ranks call it."""
    error.agreed = True
    raise error


def on_all(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; a ComptError on one rank is raised on every rank."""
    try:
        result = action()
    except ComptError as error:
        agree(error)
        raise
    agree(None)
    return result


def on_main(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait; its ComptError is raised on every rank."""
    on_all(lambda: action() if is_main() else None)


def from_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its picklable result on all ranks. Its ComptErrors are raised on all ranks."""
    result: T = broadcast_object(on_all(lambda: action() if is_main() else None))
    return result


def from_main_slowly(action: Callable[[], T]) -> T:
    """As `from_main`, for an `action` that may take longer than a collective: the others wait without a limit.

    They notice when rank 0 exits.
    """
    if world_size() == 1:
        return action()
    # `from_main` alone would hold the others in a collective of the first group, which ends them after its timeout.
    group = torch_dist.new_group(backend="gloo", timeout=_NO_LIMIT)
    result: T | None = None
    error: ComptError | None = None
    if is_main():
        try:
            result = action()
        except ComptError as caught:
            error = caught
    with together():
        torch_dist.barrier(group)
    torch_dist.destroy_process_group(group)
    agree(error)
    found: T = broadcast_object(result)
    return found


def _reduce_scalar(value: float, operation: Any) -> float:
    if world_size() == 1:
        return float(value)
    tensor = torch.tensor(value, dtype=torch.float64)
    with together():
        torch_dist.all_reduce(tensor, op=operation)
    return float(tensor.item())


def all_reduce_sum(value: float) -> float:
    """Return the sum of a number over ranks (exact for integers below 2^53)."""
    return _reduce_scalar(value, ReduceOp.SUM)


def all_reduce_max(value: float) -> float:
    """Return the maximum of a number over ranks."""
    return _reduce_scalar(value, ReduceOp.MAX)


def any_true(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return any_of(flag)[0]


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is set on any rank, in one collective."""
    if world_size() == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.uint8)
    with together():
        torch_dist.all_reduce(tensor, op=ReduceOp.MAX)
    return tuple(map(bool, tensor.tolist()))


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, with a collective for about each `_BUCKET` numbers."""
    if world_size() == 1:
        return
    ends = itertools.accumulate(one.numel() for one in tensors)
    for _, pairs in itertools.groupby(zip(ends, tensors, strict=True), lambda pair: pair[0] // _BUCKET):
        bucket = [one for _, one in pairs]
        # Divided first, as DistributedDataParallel does: a sum of fp16's scaled gradients could overflow.
        flat = torch.cat([one.flatten() for one in bucket]).div_(world_size())
        with together():
            torch_dist.all_reduce(flat)
        parts = flat.split([one.numel() for one in bucket])
        torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])


def mean_of_scalars(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean over ranks of named scalar tensors, in one collective and one wait for the device."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().double().reshape(()) for value in values.values()])
    if world_size() > 1:
        stacked = stacked.cpu()
        with together():
            torch_dist.all_reduce(stacked)
        stacked = stacked / world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; backward sums the gradients of all ranks for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        whole = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
        torch_dist.all_gather_into_tensor(whole, local.contiguous())
        ctx.rows = local.shape[0]
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        local = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
        torch_dist.reduce_scatter_tensor(local, gradient.contiguous(), op=ReduceOp.SUM)
        return local


def gather_with_grad(local: Tensor) -> Tensor:
    """[b, ...] on each of W ranks -> [W*b, ...] on all, in the order of ranks; b must be the same everywhere.

    Backward is a reduce-scatter that sums. If every rank's loss is a mean over its own rows, then averaging parameter
    gradients over ranks (as DDP does) gives the gradient of the mean of the ranks' losses.
    """
    if world_size() == 1:
        return local
    return _Gather.apply(local)  # type: ignore[no-any-return, no-untyped-call]


def pass_on(tensor: Tensor) -> Tensor:
    """Send this rank's tensor to the next rank and return the one that the previous rank sent, without gradient.

    Shape and dtype are the same on all ranks; the last rank sends to the first. All ranks call it.
    """
    received, ranks = torch.empty_like(tensor), world_size()
    sending = torch_dist.P2POp(torch_dist.isend, tensor.contiguous(), (rank() + 1) % ranks)
    receiving = torch_dist.P2POp(torch_dist.irecv, received, (rank() - 1) % ranks)
    with together():
        for work in torch_dist.batch_isend_irecv([sending, receiving]):
            work.wait()
    return received


def gather(local: Tensor) -> Tensor:
    """[b_r, ...] on rank r -> [sum of b_r, ...] on all ranks, in the order of ranks, without gradient.

    The sizes may differ, zero included; the other axes and the dtype may not.
    """
    local = local.detach()
    if world_size() == 1:
        return local
    sizes = [torch.zeros((), dtype=torch.int64, device=local.device) for _ in range(world_size())]
    with together():
        torch_dist.all_gather(sizes, torch.tensor(local.shape[0], device=local.device))
    counts = [int(size.item()) for size in sizes]
    padded = local.new_zeros((max(counts), *local.shape[1:]))
    padded[: local.shape[0]] = local
    parts = [torch.empty_like(padded) for _ in counts]
    with together():
        torch_dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
