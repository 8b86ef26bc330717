"""One SVG file of unknown origin: what its metadata say, and its pixels, within limits of size, time and memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import resource
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from PIL import Image

from compt.drawings.build import Pixels
from compt.drawings.packages import render_svg

BYTES = 4 * 2**20
"""Largest file. The largest drawing of the clip art has 1.7 MB."""

SECONDS = 60.0
"""For one drawing. The slowest of the clip art takes less than 1 s, or 5 s on a busy machine."""

MEMORY = 2 * 2**30
"""Bytes for one drawing, beyond what the process takes at its start."""

KEYWORDS = 50
"""Keywords of a drawing that are read."""

CANVAS, LARGEST = 4, 32
"""A page is rendered this many times larger than the drawing ends up; at most, if the drawing fills a part of it."""

DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"


class RefusedError(ValueError):
    """A drawing that is left out. The text is the cause."""


@dataclass(frozen=True)
class Drawing:
    """Dublin Core's metadata as they are in the file, and uint8 pixels [size, size, 3] on white."""

    title: str
    description: str
    keywords: tuple[str, ...]
    author: str
    licence: str
    pixels: Pixels


def read_drawing(data: bytes, size: int) -> Drawing:
    """Parse and render the bytes of a file. Raises RefusedError."""
    root = _parse(data)
    work = next((one for one in root.iter() if _local(one.tag) == "Work"), None)
    if work is None:
        raise RefusedError("no metadata")
    fields = {key: _text(work.find(DUBLIN_CORE + key)) for key in ("title", "description", "creator")}
    subject = work.find(DUBLIN_CORE + "subject")
    keywords = [_text(item) for item in subject.iter() if _local(item.tag) == "li"] if subject is not None else []
    licence = next((value for one in work if _local(one.tag) == "license" for value in one.attrib.values()), "")
    try:
        # What is rendered is what was checked: the tree, without the DOCTYPE and without processing instructions.
        pixels = _fit(ElementTree.tostring(root, "unicode"), size)
    except RefusedError:
        raise
    except (RecursionError, ValueError) as error:
        raise RefusedError("not rendered") from error
    return Drawing(
        fields["title"], fields["description"], tuple(keywords[:KEYWORDS]), fields["creator"], licence, pixels
    )


def _parse(data: bytes) -> ElementTree.Element:
    """The root element. Refuses entities, which can grow without end, references to files, and text."""

    def entity(*_: object) -> None:
        raise RefusedError("declares XML entities")

    if len(data) > BYTES:
        raise RefusedError(f"file of more than {BYTES:,} bytes")
    parser = expat.ParserCreate()
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(data, True)
        root = ElementTree.fromstring(data)
    except RefusedError:
        raise
    except (expat.ExpatError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise RefusedError("not readable as XML") from error
    for element in root.iter():
        name = _local(element.tag)
        links = [value.strip() for key, value in element.attrib.items() if _local(key) == "href" and name != "a"]
        if any(link and not link.startswith(("#", "data:")) for link in links):
            raise RefusedError("refers to another file")
        if name in ("text", "flowRoot") and _text(element):
            raise RefusedError("has text, which needs fonts")
    return root


def _local(name: object) -> str:
    """A name without its namespace. Comments and processing instructions have none."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""


def _text(element: ElementTree.Element | None) -> str:
    return " ".join("".join(element.itertext()).split()) if element is not None else ""


def _fit(svg: str, size: int) -> Pixels:
    """The drawing without the empty part of its page, in the centre of a white square."""
    drawing = _cropped(svg, CANVAS * size)
    if (side := max(drawing.size)) < CANVAS * size // 2:
        drawing = _cropped(svg, min(LARGEST * size, (CANVAS * size) ** 2 // side))
    side = max(drawing.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2), drawing)
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    if pixels.min() > 250:
        raise RefusedError("blank")
    return pixels


def _cropped(svg: str, size: int) -> Image.Image:
    """RGBA. Transparent is not white: the flag of Japan is more than a red disc."""
    page = render_svg(svg, size, background=None)
    box = page.getchannel("A").getbbox()
    if box is None:
        raise RefusedError("blank")
    return page.crop(box)


class SafeReader:
    """Reads drawings in a process of its own, which is replaced when one takes too long or ends it."""

    def __init__(self, size: int, seconds: float = SECONDS) -> None:
        self.size = size
        self.seconds = seconds
        self._start()

    def __call__(self, data: bytes) -> Drawing:
        """As `read_drawing`. Raises RefusedError."""
        cause = "takes too long"
        try:
            self._pipe.send_bytes(data)
            if self._pipe.poll(self.seconds):
                found: Drawing | str = self._pipe.recv()
                if isinstance(found, Drawing):
                    return found
                raise RefusedError(found)
        except (EOFError, OSError):
            cause = "ends the renderer"
        self.close()
        self._start()
        raise RefusedError(cause)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self.size), daemon=True)
        self._process.start()
        other.close()
        # The time of a drawing does not include that of the start.
        self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_all(files: Iterable[tuple[str, bytes]], size: int) -> Iterator[tuple[str, Drawing | str]]:
    """Name and drawing of each file, or the cause of leaving it out, in order; on all cores. Holds all files."""
    readers: queue.SimpleQueue[SafeReader] = queue.SimpleQueue()

    def read(item: tuple[str, bytes]) -> tuple[str, Drawing | str]:
        reader = readers.get()
        try:
            return item[0], reader(item[1])
        except RefusedError as error:
            return item[0], str(error)
        finally:
            readers.put(reader)

    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(cores) as pool:
        for _ in range(cores):
            readers.put(stack.enter_context(SafeReader(size)))
        yield from pool.map(read, files)


def _serve(pipe: Connection, size: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # other systems than Linux do not say how much memory they gave
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # What the renderer prints can have text of the drawing in it.
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            data = pipe.recv_bytes()
            try:
                found: Drawing | str = read_drawing(data, size)
            except RefusedError as error:
                found = str(error)
            except MemoryError:
                found = "takes too much memory"
            except BaseException:  # a panic of the renderer is no Exception
                found = "not rendered"
            pipe.send(found)
