"""Contact sheets: images of an evaluation set, kept in a run so that its report can show the model's answers."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compt.data.decode import evaluation_pixels
from compt.data.samples import EvalSamples
from compt.evaluate.encoder import Arrays, save_result
from compt.evaluate.retrieval import RetrievalResult
from compt.evaluate.zeroshot import ZeroShotResult

IMAGES = 40
PAIRS = 12
CHARACTERS = 160
"""Of a caption; the rest is left out."""
CLASSES_FILE, CAPTIONS_FILE = "contact", "contact_captions"


def save_contact_sheet(folder: Path, result: ZeroShotResult, samples: EvalSamples, image_size: int) -> None:
    """Write FOLDER/contact.npz: images uint8 [n, 3, H, W], their sample ids and labels, and all class names.

    Classes without names have their numbers. `IMAGES` of the scored samples are taken, evenly spread. Raises RunError.
    """
    chosen = _spread(len(result.ids), IMAGES)
    arrays: Arrays = {
        "images": _pixels(samples, result.ids[chosen], image_size),
        "ids": result.ids[chosen],
        "labels": result.labels[chosen],
        "classnames": np.array(list(result.names) or [str(number) for number in range(result.classes)]),
    }
    save_result(folder, CLASSES_FILE, {"set": result.name, "pictures": len(chosen)}, arrays)


def save_caption_sheet(folder: Path, result: RetrievalResult, samples: EvalSamples, image_size: int) -> None:
    """Write FOLDER/contact_captions.npz: images uint8 [n, 3, H, W], the first caption of each, the caption that the
    model finds among all, and whether that is one of its own.

    `PAIRS` of the scored samples are taken, evenly spread. Raises RunError.
    """
    chosen = _spread(len(result.ids), PAIRS)
    ids, found = result.ids[chosen], result.found[chosen]
    # Captions of one image stand together, in the order of the data.
    owners = result.owners[found]
    places = found - np.searchsorted(result.owners, owners)
    arrays: Arrays = {
        "images": _pixels(samples, ids, image_size),
        "ids": ids,
        "captions": np.array([_caption(samples, sample, 0) for sample in ids]),
        "answers": np.array([_caption(samples, *each) for each in zip(owners, places, strict=True)]),
        "right": result.image_ranks[chosen] < 1,
    }
    save_result(folder, CAPTIONS_FILE, {"set": result.name, "pictures": len(chosen)}, arrays)


def _spread(n: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(np.int64))


def _pixels(samples: EvalSamples, ids: NDArray[np.int64], image_size: int) -> NDArray[np.uint8]:
    return np.stack([evaluation_pixels(samples.image(int(sample)), image_size) for sample in ids])


def _caption(samples: EvalSamples, sample: int, place: int) -> str:
    captions = samples.read(int(sample)).captions or [""]
    return textwrap.shorten(captions[place], CHARACTERS, placeholder=" …")
