"""What one process sees of its machine. Nothing here waits for another process."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

from compt import __version__
from compt.dist import collectives as dist
from compt.dist.environment import Place
from compt.dist.rendezvous import interface_of

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "deepspeed", "safetensors", "numpy")


def node_name() -> str:
    """What Slurm calls this node, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def facts_here(folder: Path, place: Place | None) -> dict[str, Any]:
    """Everything about this process's machine; `folder` is where runs are going to lie. Sizes are in bytes.

    `place` is what the environment said of the process before it joined the group.
    """
    cuda = _cuda()
    address = own_address()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "node": node_name(),
        "rank": dist.rank(),
        "local_rank": dist.local_rank(),
        "versions": {"compt": __version__, "python": platform.python_version(), **_packages()},
        "driver": driver_version(),
        **cuda,
        "gpu": place.gpu(len(cuda["gpus"])) if place else 0,
        "folder": str(folder),
        "free_disk": shutil.disk_usage(folder).free,
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        "open_files": 2**63 if soft == resource.RLIM_INFINITY else soft,
        "locked_memory": None if locked == resource.RLIM_INFINITY else locked,
        "infiniband": Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()),
        "address": address,
        "interface": interface_of(address) or "unknown",
    }


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def driver_version() -> str | None:
    """The version of the NVIDIA driver that is loaded, None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else "unknown"


def _cuda() -> dict[str, Any]:
    """The GPUs that torch sees, each as its name and memory, and the CUDA and NCCL that torch was built with."""
    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda or "none", "gpus": [], "nccl": "none", "cuda_error": ""}
    try:
        # Unlike is_available, this says what is wrong.
        torch.cuda.init()
        found["gpus"] = [_gpu(number) for number in range(torch.cuda.device_count())]
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except (RuntimeError, AssertionError) as error:
        found["cuda_error"] = str(error).splitlines()[0]
    return found


def _gpu(number: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(number)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB".replace(",", "")


def own_address() -> str:
    """The address that the process group's master is reached from, or else that of the host's name."""
    master = os.environ.get("MASTER_ADDR")
    if master:
        with contextlib.suppress(OSError):
            family, kind, _, _, target = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                # Nothing is sent: it only asks which way packets would go.
                probe.connect(target)
                return str(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "unknown"
