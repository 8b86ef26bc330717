"""Encoded images to pixels: the interface of decoders, and Pillow, which decodes crops for training and whole images
as open_clip does for evaluation.

To add a decoder of training images, write a `Decoder` in a module of its own and add its name and place to
`compt.recipe.schema.DECODERS`; a recipe can then name it as `data.decoder`.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info

from compt.data.order import Box
from compt.errors import ComptError
from compt.models.preprocess import AS_OPENAI, Preprocess
from compt.text import no_stderr

Pixels = NDArray[np.uint8]
Cause = Literal["image", "caption", "tar", "label", "label_text", "label_range", "label_shift"]

MAX_PIXELS = 89_478_485
"""Larger images are refused before any pixel is decoded; Pillow warns of decompression bombs from this size on."""
MAX_BYTES = 8 * MAX_PIXELS
"""Larger files are not read: this is the size of the largest image without compression, with 16 bits a channel."""
MAX_SCANNED = 16 * MAX_PIXELS
"""A progressive JPEG is not decoded if its scans pass over more pixels than this together. Encoders make about ten."""
JPEG_QUALITY = 95
"""Quality of images that are written again, as in img2dataset."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
MAX_RESIZED = 1 << 24
"""Larger images are never made on the way to the target size: of 1 x N pixels a resized one would have 224 x 224 N."""
# Only these readers are tried: some others of Pillow run external programs. Trying the likely one first saves a third
# of the time.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MAGIC = {b"\x89PNG": ("PNG",), b"RIFF": ("WEBP",)}
_BICUBIC = Image.Resampling.BICUBIC
_KERNELS = {"bicubic": _BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Unusable(Exception):
    """A sample cannot be used. `cause` says which part of it is to blame."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause: Cause = cause


@dataclass
class Encoded:
    """An image as it is stored, with its size in pixels.

    header: the image with only its header read, for a decoder that runs in the same process. It serves one decoding.
    """

    data: bytes
    width: int
    height: int
    header: Image.Image | None = None

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return len(self.data)


class Decoder(ABC):
    """Turns the encoded images of a batch into pixels. It has no influence on order, crops or captions."""

    in_worker: ClassVar[bool] = True
    """Whether it runs in the loader's worker processes. A decoder that uses a GPU has to run in the training process:
    the workers are forked, and CUDA does not survive a fork."""

    def prepare(self, image: Encoded, box: Box, size: int) -> Encoded:
        """What `decode` gets of an image, made in the worker. Raises Unusable.

        Pillow's image cannot go to another process. A decoder that cannot decode every format may decode here.
        """
        return image if self.in_worker else replace(image, header=None)

    @abstractmethod
    def decode(
        self, keys: Sequence[str], images: Sequence[Encoded], boxes: Sequence[Box], size: int
    ) -> tuple[Tensor, dict[int, Unusable]]:
        """The box of each image, resized: uint8 [B, 3, size, size], on any device.

        The mapping has the images that cannot be decoded, by their place in the batch; their pixels are not used. The
        loader counts each by its cause and puts another sample in its place.
        """

    def keep(self, image: Encoded, size: int) -> Encoded:
        """What `engine.cache` keeps in memory of an image, from which any box can be cut later. Raises Unusable."""
        return replace(image, header=None)


def open_image(data: bytes) -> Image.Image:
    """Open an image and read only its header. Raises Unusable for other data and for an image of too many pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=_MAGIC.get(data[:4], _FORMATS))
    except ComptError:  # a signal handler raised it, which says nothing about the image
        raise
    except UnidentifiedImageError:  # its message has an address in memory, another one in each run
        raise Unusable("image", f"not an image in one of the formats {', '.join(_FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise almost anything for a broken file
        raise Unusable("image", f"not an image: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise Unusable("image", f"{image.width} x {image.height} pixels are too many to decode safely")
    if isinstance(image, TiffImageFile):
        tile = (image.tag_v2.get(_TILE_WIDTH, 1), image.tag_v2.get(_TILE_LENGTH, 1))
        if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > MAX_PIXELS:
            raise Unusable("image", f"its tiles of {tile[0]} x {tile[1]} pixels are too large to decode safely")
    if data[:2] == b"\xff\xd8" and image.width * image.height * (scans := _scans(data)) > MAX_SCANNED:
        raise Unusable("image", f"{scans} scans over {image.width} x {image.height} pixels take too long to decode")
    return image


def _scans(data: bytes) -> int:
    """How often the marker FF DA of a scan occurs in a JPEG. Compressed data cannot contain it.

    Comparing pairs of bytes, at even and at odd places, takes a quarter of the time of `bytes.count`.
    """
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(pair == 0xDAFF)) for pair in pairs)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB: transparency becomes white, 16-bit grey is scaled to 8 bits.

    EXIF orientation is ignored as in open_clip. Only in a TIFF it counts, because Pillow itself turns those.
    Raises Unusable, also for numbers without a fixed range (float and 32-bit TIFF).
    """
    try:
        if image.mode == "RGB" and "transparency" not in image.info:
            image.load()
            return image
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise Unusable("image", f"{kind} pixels have no fixed range; convert the image to 8 or 16 bits a channel")
        if image.mode.startswith("I"):
            deep = np.asarray(image).astype(np.int64)
            grey = (deep >> 8).clip(0, 255).astype(np.uint8)
            clear = image.info.get("transparency")
            if isinstance(clear, int):  # Pillow would compare it with values that are cut to 255
                grey[deep == clear] = 255
            return Image.fromarray(grey).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            layer = image.convert("RGBA")
            white = Image.new("RGB", layer.size, (255, 255, 255))
            white.paste(layer, mask=layer.getchannel("A"))
            return white
        return image.convert("RGB")
    except (ComptError, Unusable):
        raise
    except Exception as error:
        raise Unusable("image", f"cannot be decoded: {error}") from None


def _planes(image: Image.Image) -> Pixels:
    """A view [3, H, W] of the image's interleaved bytes."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3).transpose(2, 0, 1)


class PillowDecoder(Decoder):
    """Decodes on the CPU, bicubic with antialiasing.

    A large JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 of its size that still covers the box: this takes a
    fraction of the time, since the JPEG decoder itself scales.
    """

    def decode(
        self, keys: Sequence[str], images: Sequence[Encoded], boxes: Sequence[Box], size: int
    ) -> tuple[Tensor, dict[int, Unusable]]:
        """The box of each image."""
        pixels = np.empty((len(images), 3, size, size), np.uint8)
        broken: dict[int, Unusable] = {}
        for place, (image, box) in enumerate(zip(images, boxes, strict=True)):
            try:
                pixels[place] = self.pixels(image, box, size)
            except Unusable as error:
                broken[place] = error
        return torch.from_numpy(pixels), broken

    def pixels(self, image: Encoded, box: Box, size: int) -> Pixels:
        """uint8 [3, size, size] of one image. Raises Unusable."""
        if isinstance(image, Kept):
            decoded = image.scaled[_covering(box, size) if image.jpeg else 1]
        else:
            opened = image.header or open_image(image.data)
            decoded = _load(opened, _covering(box, size) if opened.format == "JPEG" else 1)
        # The box is in pixels of the whole image.
        x, y = decoded.width / image.width, decoded.height / image.height
        part = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        if size * (part[3] - part[1]) > MAX_RESIZED:
            # Pillow resizes rows first, and would widen each of very many.
            decoded = decoded.resize((decoded.width, size), _BICUBIC, box=(0, part[1], decoded.width, part[3]))
            part = (part[0], 0, part[2], size)
        return _planes(decoded.resize((size, size), _BICUBIC, box=part))

    def keep(self, image: Encoded, size: int) -> Encoded:
        """The decoded image, at every scale that a box may need. Raises Unusable."""
        opened = image.header or open_image(image.data)
        jpeg = opened.format == "JPEG"
        smallest = _covering((0, 0, image.width, image.height), size) if jpeg else 1
        scaled = {1: _load(opened, 1)}
        for scale in (2, 4, 8):
            if scale <= smallest:
                scaled[scale] = _load(open_image(image.data), scale)
        return Kept(b"", image.width, image.height, scaled=scaled, jpeg=jpeg)


class TorchDecoder(PillowDecoder):
    """Decodes on the CPU with torchvision and resizes with torch, bicubic with antialiasing: twice as fast as Pillow.

    The box is cut out before it is resized, as torchvision does; Pillow's resize looks at pixels beside it, too. Apart
    from this border, pixels differ from Pillow's by the rounding of the resize. Boxes of four or more times the target
    size take the path of `PillowDecoder`, where the scaling of the JPEG decoder saves more. Boxes of two to four times
    do not: they are decoded at full size, so unlike Pillow's they keep all detail.
    """

    def decode(
        self, keys: Sequence[str], images: Sequence[Encoded], boxes: Sequence[Box], size: int
    ) -> tuple[Tensor, dict[int, Unusable]]:
        """The box of each image."""
        with quiet():  # once for a batch: for each image it would cost a twentieth more
            return super().decode(keys, images, boxes, size)

    def pixels(self, image: Encoded, box: Box, size: int) -> Pixels:
        """uint8 [3, size, size] of one image. Raises Unusable."""
        # Also here the box is resized along rows first.
        if _covering(box, size) >= 4 or size * (box[3] - box[1]) > MAX_RESIZED:
            return super().pixels(image, box, size)
        left, top, right, bottom = box
        whole = None if isinstance(image, Kept) else _jpeg(image)
        if whole is None:
            decoded = image.scaled[1] if isinstance(image, Kept) else to_rgb(image.header or open_image(image.data))
            part = decoded.crop(box)
            flat = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8)
            cropped = flat.view(part.height, part.width, 3).permute(2, 0, 1)
        else:
            cropped = whole[:, top:bottom, left:right]
        resized = interpolate(cropped[None], (size, size), mode="bicubic", antialias=True)[0]
        pixels: Pixels = resized.numpy()
        return pixels


def _jpeg(image: Encoded) -> Tensor | None:
    """uint8 [3, H, W] of a grey or RGB JPEG. None for other images, and where only Pillow can say what is wrong."""
    opened = image.header or open_image(image.data)
    if opened.format != "JPEG" or opened.mode not in ("L", "RGB"):
        return None
    # Imported late: it loads much that evaluation and plans do not need.
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        data = torch.frombuffer(bytearray(image.data), dtype=torch.uint8)
        decoded: Tensor = decode_jpeg(data, ImageReadMode.RGB)
        return decoded
    except RuntimeError:
        return None


def quiet() -> AbstractContextManager[None]:
    """In a loader worker, drop what libjpeg writes to the terminal about small faults of an image.

    Only there: no other thread of a worker writes, so that nothing else is lost.
    """
    return nullcontext() if get_worker_info() is None else no_stderr()


@dataclass
class Kept(Encoded):
    """A decoded image: `scaled[d]` is the image at 1/d of its size."""

    scaled: dict[int, Image.Image] = field(default_factory=dict)
    jpeg: bool = False

    @property
    def nbytes(self) -> int:
        """Pillow takes four bytes for a pixel."""
        return sum(image.width * image.height * 4 for image in self.scaled.values())


def _load(image: Image.Image, denominator: int) -> Image.Image:
    if denominator > 1:
        image.draft("RGB", (image.width // denominator, image.height // denominator))
    return to_rgb(image)


def shrunk(image: Image.Image, data: bytes, side: int) -> bytes:
    """`data` where its image has at most `side` pixels on the shorter side, else a smaller JPEG. Raises Unusable.

    An image that is to be shown turned (EXIF) is turned: training ignores this, and a JPEG written here has no EXIF.
    """
    width, height = image.size
    scale = min(side / min(image.size), 1.0)
    decoded = _load(image, _covering((0, 0, width, height), side) if image.format == "JPEG" else 1)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if scale == 1 and orientation == 1:
            return data
        small = decoded.resize((max(1, round(width * scale)), max(1, round(height * scale))), _BICUBIC)
        small.info.setdefault("exif", image.info.get("exif", b""))  # lost with transparency
        written = io.BytesIO()
        ImageOps.exif_transpose(small).save(written, "JPEG", quality=JPEG_QUALITY)
        return written.getvalue()
    except ComptError:
        raise
    except Exception as error:
        raise Unusable("image", f"cannot be written again: {error}") from None


class EvaluationDecoder(PillowDecoder):
    """Whole images, as evaluation preprocesses them; boxes are ignored."""

    def __init__(self, preprocess: Preprocess = AS_OPENAI) -> None:
        self._preprocess = preprocess

    def pixels(self, image: Encoded, box: Box, size: int) -> Pixels:
        """uint8 [3, size, size]. Raises Unusable."""
        return _whole(image.header or open_image(image.data), size, self._preprocess)

    def keep(self, image: Encoded, size: int) -> Encoded:
        """The encoded image: evaluation reads each image once."""
        return Decoder.keep(self, image, size)


def _covering(box: Box, size: int) -> int:
    """The largest of 1, 2, 4, 8 by which the box can be scaled down without becoming smaller than `size`."""
    shortest = min(box[2] - box[0], box[3] - box[1])
    return next((scale for scale in (8, 4, 2) if shortest >= scale * size), 1)


def evaluation_pixels(data: bytes, size: int, preprocess: Preprocess = AS_OPENAI) -> Pixels:
    """uint8 [3, size, size], the same as open_clip's `image_transform(size, is_train=False)` before normalization.

    `preprocess` has the resize mode and the interpolation. Raises Unusable.
    """
    return _whole(open_image(data), size, preprocess)


def _whole(image: Image.Image, size: int, preprocess: Preprocess) -> Pixels:
    image = to_rgb(image)
    width, height = image.size
    if preprocess.resize_mode == "squash":
        target = (size, size)
    elif preprocess.resize_mode == "longest":
        ratio = max(width / size, height / size)
        target = (max(1, round(width / ratio)), max(1, round(height / ratio)))
    elif width <= height:
        target = (size, max(size, int(size * height / width)))
    else:
        target = (max(size, int(size * width / height)), size)
    left, top = round((target[0] - size) / 2.0), round((target[1] - size) / 2.0)
    if target[0] * target[1] > MAX_RESIZED:
        x, y = width / target[0], height / target[1]
        box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
        return _planes(image.resize((size, size), _KERNELS[preprocess.interpolation], box=box))
    if target != image.size:
        image = image.resize(target, _KERNELS[preprocess.interpolation])
    if preprocess.resize_mode == "longest":
        padded = Image.new("RGB", (size, size), (preprocess.fill_color,) * 3)
        padded.paste(image, ((size - target[0]) // 2, (size - target[1]) // 2))
        return _planes(padded)
    return _planes(image.crop((left, top, left + size, top + size)))
