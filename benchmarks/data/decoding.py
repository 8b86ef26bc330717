"""Decoding alone: the ways from an encoded image to the pixels of a crop that are compared, on one core."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from compt.data.decode import Encoded, open_image
from compt.data.index import open_index
from compt.data.order import crop_box
from compt.data.samples import SampleReader
from compt.recipe.schema import DECODERS

OPENCLIP = "Pillow, open_clip's image_transform"
SEED = 0
Scale = tuple[float, float]
SETTINGS: tuple[tuple[int, int, Scale], ...] = tuple(
    (short, size, scale) for scale in ((0.9, 1.0), (0.08, 1.0)) for short, size in ((256, 224), (500, 224), (256, 64))
)
"""Short side of the images, target size, and the share of the area that a crop has."""
Decoding = Callable[[Sequence[bytes]], Any]


def _compt(name: str, size: int, scale: Scale) -> Decoding:
    """A decoder of compt as its loader calls it: uint8 [n, 3, size, size]."""
    decoder = DECODERS.load(name)()

    def decode(datas: Sequence[bytes]) -> Any:
        prepared, boxes = [], []
        for at, data in enumerate(datas):
            header = open_image(data)
            box = crop_box(SEED, 0, str(at), header.width, header.height, scale)
            prepared.append(decoder.prepare(Encoded(data, header.width, header.height, header), box, size))
            boxes.append(box)
        return decoder.decode([""] * len(datas), prepared, boxes, size)

    return decode


def _torchvision(size: int, scale: Scale) -> Decoding:
    """`decode_jpeg` and a crop resized as uint8."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandomResizedCrop

    crop = RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True)

    def one(data: bytes) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: torch.Tensor = crop(decode_jpeg(encoded, ImageReadMode.RGB))
        return pixels

    return lambda datas: torch.stack([one(data) for data in datas])


def _pillow(transform: Callable[[Any], torch.Tensor]) -> Decoding:
    """Pillow's decoding, as webdataset's `pilrgb`, and a transform: float32, normalized."""
    return lambda datas: torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in datas])


def _transforms_1(size: int, scale: Scale) -> Decoding:
    from open_clip import image_transform

    return _pillow(image_transform(size, is_train=True, aug_cfg={"scale": scale}))


def _transforms_2(size: int, scale: Scale) -> Decoding:
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import InterpolationMode, v2

    steps = (
        v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
    )
    return _pillow(v2.Compose(steps))


WAYS: dict[str, Callable[[int, Scale], Decoding]] = {
    OPENCLIP: _transforms_1,
    "Pillow, torchvision.transforms.v2": _transforms_2,
    "torchvision, decode_jpeg": _torchvision,
    **{f"compt, {name}": partial(_compt, name) for name in DECODERS.table},
}


class Images:
    """Encoded images of one short side, from the tars."""

    def __init__(self, tars: Path, most: int) -> None:
        self.most = most
        index = open_index("*.tar", tars)
        reader = SampleReader(index)
        self._by_side: dict[int, list[bytes]] = {}
        for sample in range(len(index)):
            data = reader.image(index.entry(sample))
            side = min(Image.open(io.BytesIO(data)).size)
            if len(found := self._by_side.setdefault(side, [])) < most:
                found.append(data)

    def of(self, short: int) -> list[bytes]:
        return self._by_side.get(short, [])


def measure(way: str, images: Sequence[bytes], size: int, scale: Scale) -> dict[str, float]:
    """Images, CPU seconds and seconds of one pass over the images, after a pass over some of them to warm up."""
    torch.manual_seed(SEED)
    decode = WAYS[way](size, scale)
    decode(images[:4])
    started, cpu = time.perf_counter(), time.process_time()
    decode(images)
    return {
        "images": len(images),
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.perf_counter() - started,
    }
