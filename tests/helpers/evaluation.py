"""A model whose features are known, and evaluation batches without a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compt.data.batch import Batch, EvalBatch
from compt.evaluate.encoder import Encoder
from compt.models.preprocess import Preprocess

WIDTH = 6


class KnownModel(nn.Module):
    """Features are looked up: an image carries its number in its first bytes, a text in its first token."""

    def __init__(self, seed: int = 0, numbers: int = 4096) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image_table = nn.Parameter(torch.randn(numbers, WIDTH, generator=generator))
        self.text_table = nn.Parameter(torch.randn(numbers, WIDTH, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))

    def encode_image(self, images: Tensor) -> Tensor:
        byte = (images[:, :2, 0, 0] * 255).round().long()
        return self.image_table[byte[:, 0] * 256 + byte[:, 1]]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text_table[tokens[:, 0]]


def encoder(seed: int = 0) -> Encoder:
    return Encoder(KnownModel(seed), Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))


def images_of(numbers: list[int]) -> Tensor:
    images = torch.zeros(len(numbers), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([n // 256 for n in numbers], dtype=torch.uint8)
    images[:, 1, 0, 0] = torch.tensor([n % 256 for n in numbers], dtype=torch.uint8)
    return images


def tokenize(texts: list[str]) -> Tensor:
    """The number that ends each text."""
    return torch.tensor([[int(text.split()[-1]), 0] for text in texts], dtype=torch.int64).view(-1, 2)


def labels_of(n: int, classes: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(classes, size=n))


def captions_of(n: int) -> list[list[str]]:
    """One to four captions an image; image i has the texts 4 i ... of the table."""
    return [[f"text {4 * i + j}" for j in range(1 + i % 4)] for i in range(n)]


@dataclass
class Loader:
    """Sample i shows picture number i; rank r of W has samples r, r + W, ..."""

    n: int
    classes: int = 0
    rank: int = 0
    world_size: int = 1
    batch: int = 5
    with_captions: bool = False

    def __iter__(self) -> Iterator[EvalBatch]:
        own = list(range(self.rank, self.n, self.world_size))
        for start in range(0, len(own), self.batch):
            ids = own[start : start + self.batch]
            yield EvalBatch(
                images_of(ids),
                [f"key{i}" for i in ids],
                ids,
                labels_of(self.n, self.classes)[ids] if self.classes else None,
                [captions_of(self.n)[i] for i in ids] if self.with_captions else None,
            )


def validation_batches(count: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """Batches of 7 images with 3 captions; the last has 4."""
    batches = []
    for at in range(rank, count, world_size):
        numbers = list(range(7 * at, 7 * at + (4 if at == count - 1 else 7)))
        tokens = torch.tensor([[[3 * n + j, 0] for j in range(3)] for n in numbers])
        batches.append(Batch(images_of(numbers), tokens, [str(n) for n in numbers]))
    return batches
