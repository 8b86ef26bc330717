"""The time of `data.augment` per image, on one core.

`python -m benchmarks.data.augment` prints a table: compt's batches, and torchvision's ColorJitter on one image
after the other, as OpenCLIP uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms import ColorJitter

from compt.data.augment import change_pixels
from compt.data.order import image_change
from compt.recipe.schema import Augment
from compt.text import TextTable, terminal

SETTINGS = {
    "flip: 0.5": Augment(flip=0.5),
    "grey: 0.2": Augment(grey=0.2),
    "brightness, contrast, saturation: 0.4": Augment(brightness=0.4, contrast=0.4, saturation=0.4),
    "all four colours, of every image": Augment(brightness=0.32, contrast=0.32, saturation=0.32, hue=0.08),
}
IMAGES = {32: 512, 224: 64}
REPEATS = 5


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _ours(how: Augment, size: int) -> float:
    """Seconds an image, with the drawing of what changes."""
    count = IMAGES[size]
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)

    def work() -> None:
        settings = (how.flip, how.strengths, how.jitter, how.grey)
        change_pixels(pixels, [image_change(0, 0, str(key), *settings) for key in range(count)])

    return _best(work) / count


def _theirs(size: int) -> float:
    images = [
        Image.fromarray(pixels) for pixels in torch.randint(0, 256, (64, size, size, 3), dtype=torch.uint8).numpy()
    ]
    jitter = ColorJitter(0.32, 0.32, 0.32, 0.08)
    return _best(lambda: [jitter(image) for image in images]) / len(images)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [(name, *(f"{_ours(how, size) * 1e6:.0f}" for size in IMAGES)) for name, how in SETTINGS.items()]
    rows.append(("all four, torchvision on PIL images", *(f"{_theirs(size) * 1e6:.0f}" for size in IMAGES)))
    headers = ("data.augment", *(f"µs an image of {size} pixels" for size in IMAGES))
    terminal().print(TextTable("Time of augmentation", headers, rows, left=1))


if __name__ == "__main__":
    main()
