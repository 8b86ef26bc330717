"""`compt.drawings.svg`: metadata and pixels of files that nobody has checked."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from compt.drawings import svg
from compt.drawings.build import Pixels
from compt.drawings.svg import RefusedError, SafeReader, read_drawing
from tests.helpers.optional import optional

WORK = (
    '<metadata><Work xmlns="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/">'
    "<dc:title>Square</dc:title></Work></metadata>"
)
SQUARE = '<rect x="10" y="30" width="20" height="20" fill="#f00"/>'


def drawing(body: str, before: str = "") -> bytes:
    return (
        f'{before}<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="100" height="100">{WORK}{body}</svg>'
    ).encode()


def bomb(levels: int) -> str:
    """A square that is used 10 ** levels times."""
    groups = [f'<g id="g0">{SQUARE}</g>']
    for level in range(levels):
        uses = f'<use xlink:href="#g{level}"/>' * 10
        groups.append(f'<g id="g{level + 1}">{uses}</g>')
    return f'<defs>{"".join(groups)}</defs><use xlink:href="#g{levels}"/>'


def is_red(pixels: Pixels) -> bool:
    """Whether the inner ones are; those at the edge are mixed with white."""
    return bool((pixels[1:-1, 1:-1] == [255, 0, 0]).all())


@pytest.fixture(autouse=True)
def renderer() -> None:
    optional("resvg_py", "data")


@pytest.fixture(scope="module")
def read() -> Iterator[SafeReader]:
    with SafeReader(16, seconds=10) as reader:
        yield reader


def test_metadata_and_pixels_of_a_real_file(root: Path) -> None:
    path = root / "tests/fixtures/clipart/signs_and_symbols/flags/flag_of_poland_marcin_wi_01.svg"
    found = read_drawing(path.read_bytes(), 32)
    assert (found.title, found.author) == ("Flag of Poland", "Marcin Wilk")
    assert found.description == "Flag of Poland. Country in central Europe."
    assert found.keywords == ("poland", "flag")
    assert found.licence == "http://web.resource.org/cc/PublicDomain"
    assert found.pixels.shape == (32, 32, 3)
    red, white = found.pixels[20, 16], found.pixels[11, 16]
    assert red[0] > 200 > 100 > red[1]
    assert white.min() > 200


@pytest.mark.parametrize("box", ["0 0 100 100", "0 0 800 400"])
def test_the_drawing_fills_the_square_without_the_rest_of_its_page(box: str) -> None:
    wide = '<rect x="10" y="30" width="40" height="20" fill="#f00"/>'
    found = read_drawing(drawing(wide).replace(b'width="100"', f'viewBox="{box}" width="100"'.encode(), 1), 16)
    assert (found.pixels[6:10, 1:15] == [255, 0, 0]).all()
    assert (found.pixels[[0, 1, 14, 15]] == 255).all()


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (drawing(SQUARE).replace(WORK.encode(), b""), "no metadata"),
        (b"no XML", "not readable as XML"),
        (drawing(SQUARE, '<?xml version="1.0" encoding="shift-jis"?>'), "not readable as XML"),
        (drawing(SQUARE, '<!DOCTYPE svg [<!ENTITY a "aaaaaaaa">]>'), "declares XML entities"),
        (drawing(SQUARE, '<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>'), "declares XML entities"),
        (
            drawing(SQUARE, '<!DOCTYPE svg [<!ENTITY a "a">]>').decode().encode("utf-16"),
            "declares XML entities",
        ),
        (drawing('<image xlink:href="/etc/passwd" width="9" height="9"/>'), "refers to another file"),
        (drawing('<image href=" ../a.png" width="9" height="9"/>'), "refers to another file"),
        (drawing('<use xlink:href="other.svg#a"/>'), "refers to another file"),
        (drawing("<text>words</text>"), "has text, which needs fonts"),
        (drawing('<rect width="9" height="9" fill="#fff"/>'), "blank"),
        (drawing(f"{'<g>' * 3000}{SQUARE}{'</g>' * 3000}"), "not rendered"),
        (drawing(SQUARE).replace(b'height="100"', b'height="0"'), "not rendered"),
        (drawing(" " * svg.BYTES), "file of more than 4,194,304 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_out_has_a_cause(read: SafeReader, data: bytes, cause: str) -> None:
    with pytest.raises(RefusedError, match=cause):
        read(data)
    with pytest.raises(RefusedError, match=cause):
        read_drawing(data, 16)


def test_a_harmless_doctype_links_and_empty_text_are_drawn(read: SafeReader) -> None:
    body = f'<text> </text><a xlink:href="https://example.org">{SQUARE}</a>'
    found = read(drawing(body, '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.0//EN" "http://www.w3.org/svg10.dtd">'))
    assert is_red(found.pixels)


def test_no_other_file_is_read(read: SafeReader, tmp_path: Path) -> None:
    """Nor in a way that the parser does not see: an image within an image."""
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")
    file = f'<image href="{tmp_path}/blue.png" width="50" height="50"/>'
    green = '<rect width="50" height="50" fill="#0f0"/>'
    inner = f'<svg xmlns="http://www.w3.org/2000/svg" width="50" height="50">{green}{file}</svg>'
    address = f"data:image/svg+xml;base64,{base64.b64encode(inner.encode()).decode()}"
    found = read(drawing(f'<image width="50" height="50" href="{address}"/>'))
    assert (found.pixels == [0, 255, 0]).all()


def test_a_drawing_without_end_is_stopped_and_the_next_one_is_read() -> None:
    with SafeReader(16, seconds=0.5) as reader:
        # How long a drawing takes depends on the machine; a stopped process takes for ever.
        os.kill(reader._process.pid or 0, signal.SIGSTOP)
        with pytest.raises(RefusedError, match="takes too long"):
            reader(drawing(SQUARE))
        reader.seconds = 60
        assert is_red(reader(drawing(SQUARE)).pixels)


def test_a_drawing_of_a_billion_elements_is_refused(read: SafeReader) -> None:
    with pytest.raises(RefusedError, match=r"not rendered|takes too long|takes too much memory|ends the renderer"):
        read(drawing(bomb(9)))
    assert is_red(read(drawing(SQUARE)).pixels)


def test_a_renderer_that_dies_is_replaced(read: SafeReader) -> None:
    read._process.kill()
    read._process.join()
    with pytest.raises(RefusedError, match="ends the renderer"):
        read(drawing(SQUARE))
    assert read(drawing(SQUARE)).title == "Square"


def test_memory_is_limited() -> None:
    with SafeReader(16) as reader:
        lines = Path(f"/proc/{reader._process.pid}/limits").read_text().splitlines()
    limit = next(line for line in lines if line.startswith("Max address space")).split()[3]
    assert svg.MEMORY < int(limit) < svg.MEMORY + 16 * 2**30
