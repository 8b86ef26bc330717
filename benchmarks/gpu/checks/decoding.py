"""The check of DALI, which decodes the JPEGs of training on a GPU."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.checks.finding import Finding, holds, largest
from compt.data.decode import Encoded, TorchDecoder
from compt.errors import ConfigError
from compt.recipe.schema import DECODERS

SIZES = ((500, 375), (256, 384), (1024, 768), (224, 224))
SIZE = 224
MEAN_OFF, MOST_OFF = 1.5, 40
"""How far DALI's pixels may be from torch's, of 255: JPEG decoders round differently, most at sharp edges."""


def check_dali(device: torch.device) -> list[Finding]:
    """DALI's crops are near those of torch on the CPU, and on the GPU there is. Nothing to check without DALI."""
    try:
        dali = DECODERS.load("dali")()
    except ConfigError:
        return []
    if device.type == "cuda":
        torch.zeros(1, device=device)  # it decodes on the GPU that the process uses
    rng, files = np.random.default_rng(0), []
    for width, height in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize((width, height))
        coarse.save(blob := io.BytesIO(), "JPEG", quality=90)
        files.append(Encoded(blob.getvalue(), width, height))
    boxes = [(3, 5, width - 7, height - 2) for width, height in SIZES]
    ready = [dali.prepare(image, box, SIZE) for image, box in zip(files, boxes, strict=True)]
    pixels, broken = dali.decode([str(at) for at in range(len(files))], ready, boxes, SIZE)
    cpu, _ = TorchDecoder().decode([""] * len(files), files, boxes, SIZE)
    off = (pixels.cpu().int() - cpu.int()).abs().float()
    return [
        holds("every image was decoded", not broken),
        holds("the pixels are on the device", pixels.device.type == device.type),
        Finding("pixels: mean difference", largest(off.mean((1, 2, 3)).tolist()), MEAN_OFF),
        Finding("pixels: largest difference", off.max().item(), MOST_OFF),
    ]
