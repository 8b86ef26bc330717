"""The process group of a training run, with one process per GPU.

On one GPU it is a group of one, where a sum changes nothing. That only shows that the groups can be made and used.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

from benchmarks.gpu.checks.cases import LINK, Trained, compare, oracle, step_waits, train
from benchmarks.gpu.checks.chain import processes
from benchmarks.gpu.checks.finding import Finding, holds
from compt.dist import collectives as dist


def check_processes(device: torch.device) -> list[Finding]:
    """A process on each GPU (on a CPU: two) in the group that trainings join; on one GPU a group of one."""
    count = processes(device)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, device.type, store.port, folder)
        start_processes(_rank, arguments, nprocs=count, start_method="spawn")
        found = torch.load(Path(folder) / "0.pt", weights_only=True)
    right = oracle(LINK)
    return [
        Finding("processes", count, math.inf, 1),
        holds("sums over all of them", found["sums"]),
        holds("sums on the CPU", found["cpu"]),
        holds("packed text: nobody waited", found["packed"]),
        holds("2 text buckets: nobody waited", found["buckets"]),
        *compare(f"{found['backend']} of {count}", Trained(**found["trained"]), right),
    ]


def sums(rank: int, count: int, device: torch.device) -> bool:
    """Whether the group sums the numbers from 1 to `count`, one from each process, on a device.

    Calls torch directly: `compt.dist.collectives` skips the collective in a group of one.
    """
    number = torch.tensor([rank + 1.0], device=device)
    torch_dist.all_reduce(number)
    return number.item() == count * (count + 1) / 2


def _rank(rank: int, count: int, kind: str, port: int, folder: str) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in environment.items()})
    device = dist.init(kind)
    found = {"sums": sums(rank, count, device), "cpu": sums(rank, count, torch.device("cpu"))}
    rows = LINK.rows // count
    part = slice(rank * rows, (rank + 1) * rows)
    trained = train(LINK, device, part=part)
    waited = [step_waits(replace(LINK, buckets=buckets), device, part=part) for buckets in (None, 2)]
    losses = torch.tensor(trained.losses, device=device)
    torch_dist.all_reduce(losses)
    if not rank:
        trained = replace(trained, losses=(losses / count).tolist())
        backend = torch_dist.get_backend_config()
        found |= {"packed": not waited[0], "buckets": not waited[1]}
        torch.save({**found, "backend": backend, "trained": vars(trained)}, f"{folder}/0.pt")
    dist.shutdown()
