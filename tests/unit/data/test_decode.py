"""Image shapes and modes: the right value, or a refusal by name, in bounded memory."""

from __future__ import annotations

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from compt.data import decode
from compt.data.decode import Encoded, PillowDecoder, Unusable, evaluation_pixels, open_image, to_rgb


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    blob = io.BytesIO()
    image.save(blob, kind, **options)
    return blob.getvalue()


def clear_grey(values: np.ndarray, clear: int) -> bytes:
    """A 16-bit grey PNG, of which one value is transparent."""
    data = encoded(Image.fromarray(values))
    chunk = io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"tRNS", clear.to_bytes(2, "big"))
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk.getvalue() + data[at:]


def test_16_bit_grey_with_a_transparent_value() -> None:
    values = np.array([[40_000, 0, 255, 256], [65_535, 1_000, 999, 1_001]], np.uint16)
    red = np.asarray(to_rgb(open_image(clear_grey(values, 1_000))))[..., 0]
    assert red.tolist() == [[156, 0, 0, 1], [255, 255, 3, 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_in_every_format(kind: str) -> None:
    values = np.array([[40_000, 0, 65_535]], np.uint16)
    assert np.asarray(to_rgb(open_image(encoded(Image.fromarray(values), kind))))[..., 1].tolist() == [[156, 0, 255]]


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_numbers_without_a_range_are_refused_by_name(dtype: type, name: str) -> None:
    data = encoded(Image.fromarray(np.full((4, 4), 3, dtype)), "TIFF")
    with pytest.raises(Unusable, match=f"{name} pixels have no fixed range"):
        evaluation_pixels(data, 4)


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1), (2, 400_000), (400_000, 3)])
def test_long_images_take_no_more_memory_than_their_pixels(size: tuple[int, int]) -> None:
    data = encoded(Image.new("L", size, 77))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (evaluation_pixels(data, 224) == 77).all()
    assert (PillowDecoder().pixels(Encoded(data, *size), (0, 0, *size), 224) == 77).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; unbounded: 2.6 GB and more


@pytest.mark.parametrize("size", [(9, 700), (700, 9), (40, 33), (64, 64), (5, 3)])
def test_the_bounded_way_gives_the_same_pixels(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)  # no extreme values: the two ways clip at different places
    data = encoded(Image.fromarray(rng.integers(96, 160, (size[1], size[0], 3), dtype=np.uint8)))
    ways = []
    for limit in (1 << 40, 0):
        monkeypatch.setattr(decode, "MAX_RESIZED", limit)
        box = (0, 0, size[0] - 1, size[1] - 1)
        ways.append((evaluation_pixels(data, 16), PillowDecoder().pixels(Encoded(data, *size), box, 16)))
    for plain, bounded in zip(*ways, strict=True):
        assert np.abs(plain.astype(int) - bounded).max() <= 2


def many_scans(scans: int) -> bytes:
    """A progressive JPEG of 40 x 30 pixels whose last scan is repeated."""
    data = encoded(Image.new("RGB", (40, 30), (9, 99, 200)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def test_scans_of_a_jpeg_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = many_scans(0).count(b"\xff\xda")
    assert scans > 1
    monkeypatch.setattr(decode, "MAX_SCANNED", 40 * 30 * (scans + 5))
    evaluation_pixels(many_scans(5), 4)
    with pytest.raises(Unusable, match=f"^{scans + 6} scans over 40 x 30 pixels take too long"):
        open_image(many_scans(6))


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xda", b"a\xff\xda\xff\xda", b"\xff\xff\xda\xda\xff", b"\xda\xff\xda\xffa"]
)
def test_scans_count_at_even_and_odd_places(data: bytes) -> None:
    assert decode._scans(b"\xff\xd8" + data) == data.count(b"\xff\xda")
    assert decode._scans(b"\xff\xd8a" + data) == data.count(b"\xff\xda")


def tiled(side: int) -> bytes:
    """A TIFF of 10 x 10 pixels in one compressed tile of `side` x `side`."""
    data = zlib.compress(bytes([77]) * side * side)
    tags = [(256, 10), (257, 10), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side)]
    tags += [(324, 14 + 12 * (len(tags) + 2)), (325, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + data


def test_tiles_larger_than_any_image_are_refused() -> None:
    assert (evaluation_pixels(tiled(64), 4) == 77).all()
    with pytest.raises(Unusable, match="its tiles of 9600 x 9600 pixels are too large"):
        open_image(tiled(9600))


@pytest.mark.parametrize(("kind", "turned"), [("JPEG", False), ("PNG", False), ("WEBP", False), ("TIFF", True)])
def test_orientation_is_as_pillow_leaves_it(kind: str, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    opened = open_image(encoded(Image.new("RGB", (60, 40)), kind, exif=exif))
    assert opened.size == to_rgb(opened).size == ((40, 60) if turned else (60, 40))


def test_lab_becomes_rgb() -> None:
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (136, 128, 128)])
    grey = np.asarray(to_rgb(open_image(encoded(lab, "TIFF"))))
    assert np.abs(grey.astype(int) - 127).max() <= 4
