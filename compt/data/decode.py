"""Bytes to pixels with Pillow: random crops for training, open_clip's preprocessing for evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compt.data.order import Box
from compt.errors import ComptError

Pixels = NDArray[np.uint8]
Crop = Callable[[int, int], Box]
"""Width and height of the whole image to the box to cut."""
Cause = Literal["image", "caption", "tar"]

MAX_PIXELS = 89_478_485
"""Images above this are refused before any pixel is decoded (the size from which Pillow warns of a bomb)."""
# No other reader is tried: some of Pillow's run external programs. The likely one first saves a third of the time.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MAGIC = {b"\x89PNG": ("PNG",), b"RIFF": ("WEBP",)}
_BICUBIC = Image.Resampling.BICUBIC


class Unusable(Exception):
    """A sample that cannot be used, for one `cause`."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause: Cause = cause


class Decoder(Protocol):
    """What a training loader needs of a decoder. It has no say in order, crops or captions."""

    def decode(self, data: bytes, crop: Crop, size: int) -> Pixels:
        """uint8 [3, size, size] of the crop. Raises Unusable."""
        ...

    def keep(self, data: bytes, size: int) -> Kept:
        """The decoded image, from which any crop can be cut later. Raises Unusable."""
        ...

    def cut(self, kept: Kept, crop: Crop, size: int) -> Pixels:
        """The same pixels as `decode` gives. Raises Unusable."""
        ...


@dataclass
class Kept:
    """A decoded image: `scaled[d]` is the image at 1/d of its size as the JPEG decoder gives it."""

    width: int
    height: int
    scaled: dict[int, Image.Image]
    jpeg: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return sum(image.width * image.height * 4 for image in self.scaled.values())


def open_image(data: bytes) -> Image.Image:
    """The image with only its header read. Raises Unusable when it is none, or too large to be decoded safely."""
    try:
        image = Image.open(io.BytesIO(data), formats=_MAGIC.get(data[:4], _FORMATS))
    except ComptError:  # a signal
        raise
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise Unusable("image", f"not an image: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise Unusable("image", f"{image.width} x {image.height} pixels are too many to decode safely")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB, transparency on white, 16-bit grey scaled to 8. EXIF orientation is ignored. Raises Unusable."""
    try:
        if image.mode == "RGB" and "transparency" not in image.info:
            image.load()
            return image
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            layer = image.convert("RGBA")
            white = Image.new("RGB", layer.size, (255, 255, 255))
            white.paste(layer, mask=layer.getchannel("A"))
            return white
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return Image.fromarray(grey).convert("RGB")
        return image.convert("RGB")
    except ComptError:
        raise
    except Exception as error:
        raise Unusable("image", f"cannot be decoded: {error}") from None


def _planes(image: Image.Image) -> Pixels:
    """A view [3, H, W] of the image's interleaved bytes."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3).transpose(2, 0, 1)


class PillowDecoder:
    """Decodes on the CPU, large JPEGs at the smallest of 1, 1/2, 1/4, 1/8 that still covers the crop."""

    def decode(self, data: bytes, crop: Crop, size: int) -> Pixels:
        """uint8 [3, size, size] of the crop, bicubic with antialiasing. Raises Unusable."""
        image = open_image(data)
        width, height = image.size
        box = crop(width, height)
        return self._cut(self._load(image, self._denominator(image, box, size)), box, width, height, size)

    def keep(self, data: bytes, size: int) -> Kept:
        """The image at every scale that `decode` may choose for crops to `size`. Raises Unusable."""
        image = open_image(data)
        width, height = image.size
        smallest = self._denominator(image, (0, 0, width, height), size)
        scaled = {1: self._load(image, 1)}
        for power in (2, 4, 8):
            if power <= smallest:
                scaled[power] = self._load(open_image(data), power)
        return Kept(width, height, scaled, jpeg=image.format == "JPEG")

    def cut(self, kept: Kept, crop: Crop, size: int) -> Pixels:
        """The same pixels as `decode` gives for the bytes behind `kept`."""
        box = crop(kept.width, kept.height)
        scale = _covering(box, size) if kept.jpeg else 1
        return self._cut(kept.scaled[scale], box, kept.width, kept.height, size)

    @staticmethod
    def _denominator(image: Image.Image, box: Box, size: int) -> int:
        return _covering(box, size) if image.format == "JPEG" else 1

    @staticmethod
    def _load(image: Image.Image, denominator: int) -> Image.Image:
        if denominator > 1:
            image.draft("RGB", (image.width // denominator, image.height // denominator))
        return to_rgb(image)

    @staticmethod
    def _cut(image: Image.Image, box: Box, width: int, height: int, size: int) -> Pixels:
        x, y = image.width / width, image.height / height
        part = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        return _planes(image.resize((size, size), _BICUBIC, box=part))


def _covering(box: Box, size: int) -> int:
    """The largest of 1, 2, 4, 8 by which the box can be divided without falling below `size`."""
    shortest = min(box[2] - box[0], box[3] - box[1])
    return next((scale for scale in (8, 4, 2) if shortest >= scale * size), 1)


def evaluation_pixels(data: bytes, size: int) -> Pixels:
    """uint8 [3, size, size] as open_clip's `image_transform(size, is_train=False)` before its normalisation.

    The shortest side is resized to `size` (bicubic), then the centre is cut. Raises Unusable.
    """
    image = to_rgb(open_image(data))
    width, height = image.size
    if width <= height:
        target = (size, max(size, int(size * height / width)))
    else:
        target = (max(size, int(size * width / height)), size)
    if target != image.size:
        image = image.resize(target, _BICUBIC)
    left, top = round((target[0] - size) / 2.0), round((target[1] - size) / 2.0)
    return _planes(image.crop((left, top, left + size, top + size)))


DECODERS: dict[str, Callable[[], Decoder]] = {"pillow": PillowDecoder}
"""Decoders by the name that a recipe gives."""
