"""What the names of files mean: keys, images, captions, hidden files."""

from __future__ import annotations

import re

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp", "jpe", "jfif", "gif", "tif", "tiff", "bmp", "ppm")
"""Extensions of images. Of several images of a key, the one whose extension comes first here is the image."""
FOREIGN = frozenset(
    (
        "avif",
        "avifs",
        "dng",
        "eps",
        "heic",
        "heif",
        "ico",
        "j2k",
        "jp2",
        "jpx",
        "jxl",
        "pbm",
        "pgm",
        "psd",
        "svg",
        "tga",
    )
)
"""Extensions of images in formats that are not read."""
TEXT_ENDINGS = frozenset(("text", "caption", "captions", "cap"))
"""Extensions that others give to captions, beside `txt`."""
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_HIDDEN = re.compile(r"(^|/)(\.(?!\.?(/|$))|__MACOSX(/|$)|(Thumbs\.db|desktop\.ini)$)")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension, as webdataset splits them; None for a name without either and for metadata."""
    match = _NAME.match(name)
    if match is None or is_metadata(name):
        return None
    return match.group(1), match.group(2).lower()


def is_metadata(name: str) -> bool:
    """Whether a member of a tar is WebDataset's own."""
    return _META.match(name) is not None


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden, or a system's own."""
    return _HIDDEN.search(name) is not None


def image_stem(name: str) -> str | None:
    """What precedes the extension of an image, in any case; None for another file."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and extension.lower() in IMAGE_EXTENSIONS else None
