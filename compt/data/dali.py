"""NVIDIA DALI as a decoder of training images: JPEGs on the GPU (`mixed`), or on the CPU where there is none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from compt.data.decode import MAX_RESIZED, Decoder, Encoded, Pixels, TorchDecoder, Unusable, open_image, quiet
from compt.data.order import Box
from compt.errors import ConfigError

_THREADS = 8
"""The most threads of a pipeline. More do not help: on a GPU they only read headers and decode what it cannot."""
_END_OF_JPEG = b"\xff\xd9"
# A forked process has no threads of the pipelines that it inherits, and would hang if it freed one, so it keeps
# a reference to each.
_pipelines: WeakSet[Any] = WeakSet()
_inherited: list[Any] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_pipelines))


@dataclass
class Ready(Encoded):
    """An image that a worker has decoded. pixels: uint8 [3, size, size]."""

    pixels: Pixels = field(default_factory=lambda: np.empty(0, np.uint8))


class DaliDecoder(Decoder):
    """Decodes the box of each JPEG and resizes it, cubic with antialiasing, in the training process.

    `TorchDecoder` decodes everything else. The workers use it for other formats, for CMYK, and for JPEGs without an
    end, which DALI would fill with grey. This process uses it for the images that DALI refuses. Raises ConfigError
    where DALI is not installed or cannot use the GPU.
    """

    in_worker: ClassVar[bool] = False

    def __init__(self) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"data.decoder: dali needs NVIDIA DALI ({error}). Install compt[dali-cuda13], or compt[dali-cuda12] "
                "for a CUDA 12 driver, or take data.decoder: torch"
            ) from None
        self._cpu = TorchDecoder()
        # Remembered here: in the thread that decodes ahead, torch's current device is the first GPU of the machine.
        self._device = torch.device("cpu")
        if torch.cuda.is_initialized():  # by now a process that trains on a GPU has used it
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._step, self._copies = torch.cuda.current_stream(), torch.cuda.Stream()
        self._pipelines: dict[int, Any] = {}

    def prepare(self, image: Encoded, box: Box, size: int) -> Encoded:
        """The image itself if DALI decodes it as Pillow does, else its pixels. Raises Unusable."""
        opened = image.header or open_image(image.data)
        plain = opened.format == "JPEG" and opened.mode in ("L", "RGB")
        whole = image.data.rstrip(b"\0").endswith(_END_OF_JPEG)
        if plain and whole and size * max(box[2] - box[0], box[3] - box[1]) <= MAX_RESIZED:
            return replace(image, header=None)
        with quiet():
            return Ready(b"", image.width, image.height, pixels=self._cpu.pixels(image, box, size))

    def decode(
        self, keys: Sequence[str], images: Sequence[Encoded], boxes: Sequence[Box], size: int
    ) -> tuple[Tensor, dict[int, Unusable]]:
        """The box of each image, on the GPU if the process uses one."""
        places = [place for place, image in enumerate(images) if not isinstance(image, Ready)]
        broken: dict[int, Unusable] = {}
        parts = list(self._parts(places, images, boxes, size, broken))
        if len(parts) == 1 and len(places) == len(images):
            return parts[0], broken
        device = parts[0].device if parts else torch.device("cpu")
        pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=device)
        if parts:
            pixels[places] = torch.cat(parts)
        for place, image in enumerate(images):
            if isinstance(image, Ready):
                pixels[place] = torch.from_numpy(image.pixels.copy())
        return pixels, broken

    def _parts(
        self,
        places: list[int],
        images: Sequence[Encoded],
        boxes: Sequence[Box],
        size: int,
        broken: dict[int, Unusable],
    ) -> Iterator[Tensor]:
        """The pixels of the images at these places, in one or more parts, each uint8 [b, 3, size, size].

        DALI refuses a whole batch for one image. Halves are tried until it stands alone, so the pixels of an image do
        not depend on which others are in its batch.
        """
        if not places:
            return
        pipeline = self._pipeline(len(places), size)
        corners = np.array([boxes[place] for place in places], np.int32)
        pipeline.feed_input("encoded", [np.frombuffer(images[place].data, np.uint8) for place in places])
        pipeline.feed_input("start", [np.array((top, left)) for left, top, _, _ in corners])
        pipeline.feed_input("shape", [np.array((bottom - top, right - left)) for left, top, right, bottom in corners])
        try:
            made: Tensor = from_dlpack(pipeline.run()[0].as_tensor())
        except RuntimeError as error:
            self._pipelines.clear()  # DALI says that it is no longer valid
            if len(places) > 1:
                yield from self._parts(places[: len(places) // 2], images, boxes, size, broken)
                yield from self._parts(places[len(places) // 2 :], images, boxes, size, broken)
            else:
                yield self._refused(places[0], images[places[0]], boxes[places[0]], size, broken, error)
        else:
            yield self._copied(made) if made.is_cuda else made

    def _copied(self, made: Tensor) -> Tensor:
        """A copy in torch's memory. DALI would use its own for later batches while kernels of the step wait to read it.

        It is made on a stream of its own, so that it does not wait for the step's kernels.
        """
        with torch.cuda.stream(self._copies):
            copy = made.clone()
        self._copies.synchronize()
        copy.record_stream(self._step)
        return copy

    def _refused(
        self, place: int, image: Encoded, box: Box, size: int, broken: dict[int, Unusable], reason: RuntimeError
    ) -> Tensor:
        """The pixels [1, 3, size, size] of an image that DALI refuses, which may yet be in order."""
        try:
            pixels = self._cpu.pixels(image, box, size).copy()
        except Unusable as error:
            broken[place] = error
            pixels = np.zeros((3, size, size), np.uint8)
        else:
            cause = str(reason).rpartition("encountered:")[2].strip().partition("\n")[0]
            warnings.warn(f"DALI refuses images that the CPU decodes, for example because of {cause}", stacklevel=2)
        return torch.from_numpy(pixels)[None].to(self._device)

    def _pipeline(self, batch: int, size: int) -> Any:
        """A pipeline for up to `batch` images. Raises ConfigError where DALI cannot use the GPU."""
        from nvidia.dali import Pipeline, fn, types

        ready = self._pipelines.get(size)
        if ready is not None and ready.max_batch_size >= batch:
            return ready
        threads = min(_THREADS, len(os.sched_getaffinity(0)))
        pipeline = Pipeline(batch, threads, self._device.index, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            decoded = fn.decoders.image_slice(
                encoded,
                start,
                shape,
                device="mixed" if self._device.type == "cuda" else "cpu",
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                adjust_orientation=False,  # EXIF is ignored, as everywhere
                jpeg_fancy_upsampling=True,  # as libjpeg does
                output_type=types.RGB,
            )
            resized = fn.resize(decoded, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)
            pipeline.set_outputs(fn.transpose(resized, perm=[2, 0, 1]))
        try:
            pipeline.build()
        except RuntimeError as error:
            raise ConfigError(f"data.decoder: dali cannot use {self._device}: {str(error).splitlines()[0]}") from None
        _pipelines.add(pipeline)
        self._pipelines[size] = pipeline
        return pipeline
