"""What each process of a job sees of its machine, compared between nodes: one finding for each difference or defect."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from compt.dist import collectives as dist
from compt.dist.environment import Place

State = Literal["ok", "note", "wrong", "not checked"]

Facts = Mapping[str, Any]

GIB = 2**30
MIB = 2**20
UNLIMITED = float("inf")

LIMITS: tuple[tuple[str, float, float, int, str, str], ...] = (
    (
        *("free disk", 20 * GIB, GIB, GIB, " GiB"),
        "make room, or use another --run-folder; keep_checkpoints limits what is kept",
    ),
    (
        *("shared memory", 2 * GIB, 64 * MIB, MIB, " MiB in /dev/shm"),
        "docker run --shm-size=16g; Kubernetes: an emptyDir of medium Memory at /dev/shm; or engine.workers: 0",
    ),
    ("open files", 4096, 0, 1, "", "ulimit -n 4096 before the start, or LimitNOFILE of slurmd"),
    ("locked memory", UNLIMITED, 0, MIB, " MiB", "ulimit -l unlimited (LimitMEMLOCK of slurmd): InfiniBand needs it"),
)
"""Name, least value that is ok, greatest value that is wrong, unit in bytes, its name, remedy. 64 MiB is what
containers start with; data workers pass images through shared memory."""

HARMLESS = ("caching_allocator_config", "clang_", "cmake_", "gcc_", "libc_", "nvidia_gpu_models", "os", "pip_version")
"""Beginnings of names in the environment that may differ between nodes."""


@dataclass(frozen=True)
class Finding:
    """One line of the table. `remedy` says what to do about a note or a defect."""

    check: str
    state: State
    found: str
    remedy: str = ""


def facts_here(folder: Path, place: Place | None) -> dict[str, Any]:
    """Collect what this process sees of its machine; sizes are in bytes.

    `place` is what the environment said about the process before it joined the group.
    """
    import torch

    gpus, problem = [], ""
    try:
        # Unlike is_available(), init() says what is wrong.
        torch.cuda.init()
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
    own = place.gpu(len(gpus)) if place else 0
    return {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "rank": dist.rank(),
        "gpu": own,
        "gpus": gpus,
        "cuda_error": problem,
        "gpu_memory": torch.cuda.mem_get_info(own) if own < len(gpus) else None,
        # It takes seconds, so once a node.
        "environment": _environment() if dist.local_rank() == 0 else {},
        "limits": _limits(folder),
        "home": os.path.expanduser("~"),  # "~" for a user without a home folder
    }


def _environment() -> dict[str, str]:
    """Return the versions of all installed packages, and torch's report for bug reports."""
    from torch.utils.collect_env import get_env_info

    packages = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    left_out = ("cpu_info", "pip_packages", "conda_packages")
    return packages | {name: str(value) for name, value in get_env_info()._asdict().items() if name not in left_out}


def _limits(folder: Path) -> dict[str, float]:
    shared, cards = Path("/dev/shm"), Path("/sys/class/infiniband")
    limits = {"open files": resource.RLIMIT_NOFILE}
    if cards.is_dir() and any(cards.iterdir()):
        limits["locked memory"] = resource.RLIMIT_MEMLOCK
    soft = {name: resource.getrlimit(kind)[0] for name, kind in limits.items()}
    return {
        "free disk": shutil.disk_usage(folder).free,
        "shared memory": shutil.disk_usage(shared).total if shared.is_dir() else 0,
        **{name: UNLIMITED if value == resource.RLIM_INFINITY else value for name, value in soft.items()},
    }


def judge(everyone: Sequence[Facts]) -> list[Finding]:
    """Return the findings for the facts of all ranks, in their order."""
    nodes: dict[str, Facts] = {}
    for facts in everyone:
        nodes.setdefault(facts["node"], facts)
    counts = {name: sum(facts["node"] == name for facts in everyone) for name in nodes}
    found = f"{len(everyone)} on {len(nodes)} node{'s' * (len(nodes) > 1)}: {', '.join(nodes)}"
    findings = [Finding("processes", "ok", found)]
    if len(set(counts.values())) > 1:
        findings = [Finding("processes", "note", _by_value(counts), "start as many on each node: --ntasks-per-node")]
    homeless = [name for name, facts in nodes.items() if facts.get("home") == "~"]
    if homeless:
        remedy = "set HOME to a folder that can be written: torch, Triton and Hugging Face keep files there"
        findings.append(Finding("home folder", "note", f"user {os.getuid()} has none on {', '.join(homeless)}", remedy))
    return [*findings, *_judge_environment(nodes), *_judge_gpus(everyone, nodes), *_judge_limits(nodes)]


def _by_value(items: Mapping[str, Any]) -> str:
    """Write {"n1": 1, "n2": 1, "n3": 2} as "1 on n1, n2; 2 on n3", or the value alone if all have the same."""
    groups: dict[str, list[str]] = {}
    for name, value in items.items():
        groups.setdefault(str(value), []).append(name)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in groups.items())


def _judge_environment(nodes: Mapping[str, Facts]) -> list[Finding]:
    names = sorted({name for facts in nodes.values() for name in facts["environment"]})
    values = {name: {node: facts["environment"].get(name, "none") for node, facts in nodes.items()} for name in names}
    remedy = "use the same environment and image on all nodes, or exclude this one (sbatch --exclude)"
    different = [
        Finding(name, "note" if name.startswith(HARMLESS) else "wrong", _by_value(values[name]), remedy)
        for name in names
        if len(set(values[name].values())) > 1
    ]
    first = next(iter(nodes.values()))["environment"]
    shown = ("compt", "torch", "deepspeed", "cuda_runtime_version", "nvidia_driver_version", "python_version")
    same = [
        f"{name.removesuffix('_version')} {first[name].split()[0]}"
        for name in shown
        if first.get(name, "None") != "None"
    ]
    return different or [Finding("environment", "ok", ", ".join(same))]


def _judge_gpus(everyone: Sequence[Facts], nodes: Mapping[str, Facts]) -> list[Finding]:
    if not any(facts["gpus"] or facts["environment"].get("nvidia_gpu_models", "None") != "None" for facts in everyone):
        return [Finding("GPUs", "not checked", "no NVIDIA driver here: driver, CUDA, GPUs and NCCL were not checked")]
    unusable = {name: facts["cuda_error"] or "no GPU visible" for name, facts in nodes.items() if not facts["gpus"]}
    if unusable:
        remedy = "use a torch for this driver's CUDA (12: torch 2.10), or a newer driver; ask for GPUs: --gpus"
        return [Finding("CUDA", "wrong", _by_value(unusable), remedy)]
    kinds = {name: f"{len(facts['gpus'])} x {' + '.join(sorted({*facts['gpus']}))}" for name, facts in nodes.items()}
    mixed = len(set(kinds.values())) > 1 or any(" + " in kind for kind in kinds.values())
    remedy = "use nodes of one kind (sbatch --constraint): the slowest GPU sets the pace"
    findings = [Finding("GPUs", "note" if mixed else "ok", _by_value(kinds), remedy)]
    lacking = [f"rank {facts['rank']} on {facts['node']}" for facts in everyone if facts["gpu"] >= len(facts["gpus"])]
    if lacking:
        remedy = "start one process for each GPU: --gpus-per-node"
        findings.append(Finding("a GPU for each", "wrong", f"none for {', '.join(lacking)}", remedy))
    used = {f"rank {facts['rank']}": facts["gpu_memory"] for facts in everyone if facts["gpu_memory"]}
    found = {name: f"{free / GIB:.0f} of {total / GIB:.0f} GiB free" for name, (free, total) in used.items()}
    full = any(free < 0.9 * total for free, total in used.values())
    remedy = "another process uses the GPU: nvidia-smi names it"
    return [*findings, Finding("GPU memory", "note" if full else "ok", _by_value(found), remedy)]


def _judge_limits(nodes: Mapping[str, Facts]) -> list[Finding]:
    findings = []
    for check, enough, wrong, unit, name, remedy in LIMITS:
        values = {node: facts["limits"][check] for node, facts in nodes.items() if check in facts["limits"]}
        least = min(values.values(), default=UNLIMITED)
        state: State = "ok" if least >= enough else "wrong" if least <= wrong else "note"
        shown = {
            node: f"{value / unit:,.0f}{name}" if value < UNLIMITED else "unlimited" for node, value in values.items()
        }
        findings += [Finding(check, state, _by_value(shown), remedy)] if values else []
    return findings
