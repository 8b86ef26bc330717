"""Random changes to the pixels of training images: flips, colours and grey, for whole batches on any device.

Pixels are those of torchvision's functions for uint8 tensors, of one image after the other. Colours are cut to whole
numbers after every function, as there; the hue may differ by one level where float32 rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compt.data.order import Change

_CPU_PIXELS, _GPU_PIXELS = 1 << 16, 1 << 22
"""Pixels of the images that change together: on a CPU so few that they stay in its cache."""


def change_pixels(pixels: Tensor, changes: Sequence[Change]) -> None:
    """Change the images of a batch, uint8 [B, 3, H, W] on any device, in place: one change for each."""

    def on_device(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        made = torch.tensor(values, dtype=dtype)
        return made.pin_memory().to(pixels.device, non_blocking=True) if pixels.is_cuda else made

    def rows(places: Sequence[int]) -> Tensor:
        return on_device(places, torch.int64)

    if flipped := [place for place, change in enumerate(changes) if change.flip]:
        at = rows(flipped)
        pixels[at] = pixels[at].flip(-1)
    jittered = [place for place, change in enumerate(changes) if change.jitter]
    together = max(1, (_GPU_PIXELS if pixels.is_cuda else _CPU_PIXELS) // pixels[0, 0].numel())
    for first in range(0, len(jittered), together):
        part = jittered[first : first + together]
        at = rows(part)
        colours = pixels[at].float()
        # Images have different orders of the functions. Each round takes one function of each image, so images that
        # have the same one in this round are computed together.
        for step in zip(*(changes[place].jitter for place in part), strict=True):
            for kind, function in enumerate(_FUNCTIONS):
                same = [row for row, (wanted, _) in enumerate(step) if wanted == kind]
                if not same:
                    continue
                factors = on_device([step[row][1] for row in same], torch.float64)[:, None, None, None]
                if len(same) == len(part):
                    colours = function(colours, factors)
                else:
                    among = rows(same)
                    colours[among] = function(colours[among], factors)
        pixels[at] = colours.to(torch.uint8)
    if greyed := [place for place, change in enumerate(changes) if change.grey]:
        at = rows(greyed)
        pixels[at] = _grey(pixels[at].float()).to(torch.uint8).expand(-1, 3, -1, -1)


def _grey(colours: Tensor) -> Tensor:
    """[B, 1, H, W], of whole numbers."""
    red, green, blue = colours.split(1, 1)
    grey: Tensor = 0.2989 * red + 0.587 * green + 0.114 * blue
    return grey.floor_()


def _whole(colours: Tensor) -> Tensor:
    return colours.clamp_(0, 255).floor_()


def _brightness(colours: Tensor, factors: Tensor) -> Tensor:
    return _whole(colours * factors.float())


def _blended(colours: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    # 1 - f in double precision, as in torchvision: another rounding would give other levels.
    return _whole(colours * factors.float() + other * (1 - factors).float())


def _contrast(colours: Tensor, factors: Tensor) -> Tensor:
    # A sum of whole numbers: the same in any order, so on any number of threads and any device.
    total = _grey(colours).sum((1, 2, 3), dtype=torch.float64, keepdim=True)
    return _blended(colours, (total / colours[0, 0].numel()).float(), factors)


def _saturation(colours: Tensor, factors: Tensor) -> Tensor:
    return _blended(colours, _grey(colours), factors)


def _hue(colours: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue in HSV by a share of the circle, with value and chroma (value times saturation) as they are."""
    red, green, blue = colours.split(1, 1)
    value = colours.amax(1, keepdim=True)
    chroma = value - colours.amin(1, keepdim=True)
    # In sixths of the circle, from the two colours that are not the largest.
    apart = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red, red - green)
    ) / chroma.clamp(min=1)
    sixths = apart + torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0)) + 6 * turns.float()
    offsets = torch.arange(5, 0, -2, device=colours.device)[:, None, None]
    away = (sixths + offsets).remainder_(6)
    turned = value - chroma * torch.minimum(away, 4 - away).clamp_(0, 1)
    # torchvision goes from 0 to 1 and back with 255.999, so that a level comes back as itself.
    return turned.mul_(255.999 / 255).floor_()


_FUNCTIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)
