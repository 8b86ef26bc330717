"""Pictures of an evaluation set, kept with a run so that its report can show what the models said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from compt.data.decode import evaluation_pixels
from compt.data.index import open_index
from compt.data.samples import SampleReader
from compt.evaluate.encoder import save_result
from compt.evaluate.folder import class_folders_of, read_class_folders
from compt.recipe.schema import EvalSet

PICTURES = 40


def _reader(item: EvalSet, base: Path) -> Callable[[int], bytes]:
    """Sample id -> the image's file."""
    folder = class_folders_of(item.data, base)
    if folder is not None:
        files = read_class_folders(folder).files
        return lambda sample: files[sample].read_bytes()
    index = open_index(item.data, base)
    reader = SampleReader(index)
    return lambda sample: reader.image(index.entry(sample))


def save_contact_sheet(
    folder: Path, item: EvalSet, base: Path, names: list[str], ids: np.ndarray, labels: np.ndarray, image_size: int
) -> None:
    """Write FOLDER/contact.npz: images uint8 [n, 3, H, W], their sample ids and labels, and all class names.

    `ids` and `labels` are those of a scored set; `PICTURES` of them are taken, evenly spread. Raises RunError.
    """
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(PICTURES, len(ids))).round().astype(int))
    read = _reader(item, base)
    images = [evaluation_pixels(read(int(ids[at])), image_size) for at in chosen]
    arrays = {
        "images": np.stack([np.asarray(image) for image in images]),
        "ids": ids[chosen],
        "labels": labels[chosen],
        "classnames": np.array(names),
    }
    save_result(folder, "contact", {"set": item.name, "pictures": len(chosen)}, arrays)
