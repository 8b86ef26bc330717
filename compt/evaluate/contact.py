"""The contact sheet: images of an evaluation set, kept in a run so that its report can show the models' answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compt.data.decode import evaluation_pixels
from compt.data.samples import EvalSamples
from compt.evaluate.encoder import save_result
from compt.evaluate.zeroshot import ZeroShotResult

IMAGES = 40


def save_contact_sheet(folder: Path, result: ZeroShotResult, samples: EvalSamples, image_size: int) -> None:
    """Write FOLDER/contact.npz: images uint8 [n, 3, H, W], their sample ids and labels, and all class names.

    `IMAGES` of the scored samples are taken, evenly spread. Raises RunError.
    """
    ids, labels = result.ids, result.labels
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(IMAGES, len(ids))).round().astype(int))
    arrays = {
        "images": np.stack([evaluation_pixels(samples.image(int(ids[at])), image_size) for at in chosen]),
        "ids": ids[chosen],
        "labels": labels[chosen],
        "classnames": np.array(result.names),
    }
    save_result(folder, "contact", {"set": result.name, "pictures": len(chosen)}, arrays)
