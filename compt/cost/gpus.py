"""Datasheets of GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """The datasheet of a GPU: dense peak in FLOP/s by precision, memory bandwidth in bytes per second.

    `fp32` is without tensor cores, which compt's engines do not use in fp32; `tf32` is for comparison. `memory_bytes`
    is what CUDA leaves to programs, as PyTorch's messages report it ("total capacity of 79.15 GiB"), not the round
    number of the datasheet. It differs between drivers by about 0.1 GiB.
    """

    name: str
    title: str
    peak_flops: Mapping[str, float]
    bandwidth_bytes: float
    memory_bytes: float
    source: str


_AMPERE = {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}
_HOPPER = {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}


def _gib(size: float) -> int:
    return round(size * 2**30)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("a100-40", "A100 40 GB", _AMPERE, 1.555e12, _gib(39.39), "NVIDIA A100 datasheet, SXM"),
        Device("a100-80", "A100 80 GB", _AMPERE, 2.039e12, _gib(79.15), "NVIDIA A100 datasheet, SXM"),
        Device("h100", "H100 80 GB SXM", _HOPPER, 3.35e12, _gib(79.10), "NVIDIA H100 datasheet, SXM5"),
        Device("h200", "H200 141 GB SXM", _HOPPER, 4.8e12, _gib(139.80), "NVIDIA H200 datasheet, SXM5"),
    )
}
ALIASES = {"a100": "a100-80"}
PAPER_DEVICE = DEVICES["a100-80"]
"""The GPU of the paper's hours (section 4 and Table C)."""


def find_device(name: str) -> Device:
    """The device called `name`, or by another of its names."""
    return DEVICES[ALIASES.get(name, name)]


def match_device(cuda_name: str, memory_bytes: float) -> Device | None:
    """The datasheet of the GPU that CUDA calls `cuda_name`; None for other GPUs, PCIe Hoppers and MIG slices."""
    words = set(re.split(r"[\s_-]+", cuda_name.upper()))
    if "MIG" in words:
        return None
    if "A100" in words:
        return DEVICES["a100-40" if memory_bytes < 60e9 else "a100-80"]
    if not words & {"PCIE", "NVL"}:
        for name in ("h100", "h200"):
            if name.upper() in words:
                return DEVICES[name]
    return None


def utilisation(macs: float, seconds: float, device: Device) -> float:
    """The share of the dense bf16 peak that `macs` multiply-accumulates (two FLOPs each) in `seconds` reach."""
    return 2 * macs / seconds / device.peak_flops["bf16"]
