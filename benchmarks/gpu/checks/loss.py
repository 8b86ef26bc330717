"""The losses by tiles on a GPU: first their values and gradients, then time and memory beside the other ways."""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu.checks.finding import Finding
from compt.recipe.engine import LossChunk
from compt.train.losses import contrastive_loss, siglip_loss

KINDS = ("slot", "all", "sigmoid")
WIDTH, CHUNK = 512, 256
SIZES = [(images, captions) for images in (1024, 4096, 16384, 32768) for captions in (1, 4)]


def _inputs(images: int, captions: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(shape, generator=generator) for shape in ((images, WIDTH), (images, captions, WIDTH), (1,), (1,))
    ]
    features[2], features[3] = torch.tensor([30.0]), torch.tensor([-5.0])
    return [value.to(device, dtype).requires_grad_() for value in features]


def _run(kind: str, values: list[Tensor], chunk: LossChunk) -> list[Tensor]:
    """The value and the gradients."""
    if kind == "sigmoid":
        value = siglip_loss(*values, chunk=chunk)[0]
    else:
        values = values[:3]
        value = contrastive_loss(*values, image_to_text="all" if kind == "all" else "slot", chunk=chunk).task
    return [value.detach(), *torch.autograd.grad(value, values)]


def check_tiled(device: torch.device) -> list[Finding]:
    """Tiles give the dense loss of a CPU in double precision; then how long they take and what memory they need."""
    if device.type != "cuda":
        return []
    findings = []
    for kind in KINDS:
        for images, captions in ((200, 1), (200, 4), (2048, 4)):  # 2,048: several tiles a program
            expected = _run(kind, _inputs(images, captions, torch.device("cpu"), torch.float64), None)
            found = _run(kind, _inputs(images, captions, device), "tiled")
            off = max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
            findings.append(Finding(f"{kind}, {images} x {captions}", off, 1e-5))
    for images, captions in SIZES:
        findings += _speed(images, captions, device)
    return findings


def _speed(images: int, captions: int, device: torch.device) -> list[Finding]:
    """Milliseconds and MiB of each way; no bound, as these are what the check is to find out."""
    ways: dict[str, LossChunk] = {"dense": None, "chunks": CHUNK, "tiles": "tiled"}
    # Dense, the two directions keep a matrix each, and backward holds two more.
    if 4 * images * images * captions * 4 > torch.cuda.mem_get_info(device)[0]:
        del ways["dense"]
    findings = []
    for name, chunk in ways.items():
        values = _inputs(images, captions, device)
        _run("slot", values, chunk)  # compiles the kernels
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        times = []
        for _ in range(5):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            _run("slot", values, chunk)
            ended.record()
            torch.cuda.synchronize(device)
            times.append(began.elapsed_time(ended))
        most = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        findings.append(Finding(f"{name}, {images} x {captions}: ms", median(times), math.inf))
        findings.append(Finding(f"{name}, {images} x {captions}: MiB", most, math.inf))
    return findings
