"""Flips, colours and grey: against torchvision's functions for one image, and the same for every way to load."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as oracle

from compt.data import loaders
from compt.data.augment import change_pixels
from compt.data.batch import Batch
from compt.data.index import Index, open_index
from compt.data.loaders import train_loader
from compt.data.order import Change, image_change
from compt.recipe.schema import Augment
from tests.helpers.optional import optional
from tests.helpers.shards import make_shards

ALL = Augment(flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.3)
FUNCTIONS = (oracle.adjust_brightness, oracle.adjust_contrast, oracle.adjust_saturation, oracle.adjust_hue)
N, BATCH, SEED = 22, 6, 5


def one_by_one(pixels: Tensor, changes: list[Change]) -> Tensor:
    images = []
    for image, change in zip(pixels, changes, strict=True):
        image = oracle.hflip(image) if change.flip else image
        for kind, factor in change.jitter:
            image = FUNCTIONS[kind](image, factor)
        images.append(oracle.rgb_to_grayscale(image, 3) if change.grey else image)
    return torch.stack(images)


def changes_of(keys: list[str], how: Augment = ALL, epoch: int = 0, seed: int = SEED) -> list[Change]:
    return [image_change(seed, epoch, key, how.flip, how.strengths, how.jitter, how.grey) for key in keys]


def strong(*kinds: int) -> list[Change]:
    """Changes of every size that a strong jitter draws, by these functions one after the other."""
    return [
        Change(False, tuple((kind, at / 40 if kind == 3 else 1 + at / 21) for kind in kinds), False)
        for at in range(-20, 21)
    ]


@pytest.mark.parametrize("kinds", [(0,), (1,), (2,), (0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_brightness_contrast_and_saturation_are_torchvisions_to_the_bit(kinds: tuple[int, ...]) -> None:
    changes = strong(*kinds)
    pixels = torch.randint(0, 256, (len(changes), 3, 9, 9), dtype=torch.uint8)
    pixels[::2] //= 9  # dark images and single colours
    pixels[::5] = pixels[::5, :, :1, :1]
    wanted = one_by_one(pixels, changes)
    change_pixels(pixels, changes)
    assert torch.equal(pixels, wanted)


def test_hue_is_torchvisions_within_a_level() -> None:
    changes = strong(3)
    pixels = torch.randint(0, 256, (len(changes), 3, 40, 40), dtype=torch.uint8)
    pixels[::4, 1] = pixels[::4, 0]  # two colours are the largest
    pixels[::5] = pixels[::5, :1]  # grey: without a hue
    before, wanted = pixels.clone(), one_by_one(pixels, changes)
    change_pixels(pixels, changes)
    apart = (pixels.int() - wanted.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3
    still = next(place for place, change in enumerate(changes) if change.jitter == ((3, 0.0),))
    assert torch.equal(pixels[still], before[still])


def test_a_mixed_batch_is_changed_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = changes_of([f"{key:05}" for key in range(60)])
    assert {(change.flip, bool(change.jitter), change.grey) for change in changes} == {
        (flip, jitter, grey) for flip in (False, True) for jitter in (False, True) for grey in (False, True)
    }
    pixels = torch.randint(0, 256, (60, 3, 12, 12), dtype=torch.uint8)
    wanted = one_by_one(pixels, changes).int()
    together = pixels.clone()
    change_pixels(together, changes)
    # A level of the hue is amplified by functions after it.
    assert ((together.int() - wanted).abs() > 2).float().mean() < 1e-3
    for size in (1, 144 * 7):
        monkeypatch.setattr("compt.data.augment._CPU_PIXELS", size)
        again = pixels.clone()
        change_pixels(again, changes)
        assert torch.equal(again, together)


def test_changes_are_drawn_as_torchvision_draws_them() -> None:
    keys = [f"{key:06}" for key in range(20_000)]
    changes = changes_of(keys)
    shares = (sum(change.flip for change in changes), sum(bool(change.jitter) for change in changes))
    assert [*shares, sum(change.grey for change in changes)] == pytest.approx([10_000, 16_000, 6_000], rel=0.04)
    assert sum(change.flip and change.grey for change in changes) == pytest.approx(3_000, rel=0.06)
    orders = Counter(tuple(kind for kind, _ in change.jitter) for change in changes if change.jitter)
    assert set(orders) == set(permutations(range(4)))
    assert all(count == pytest.approx(16_000 / 24, rel=0.2) for count in orders.values())
    for kind, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        factors = torch.tensor([factor for change in changes for at, factor in change.jitter if at == kind])
        assert factors.min() == pytest.approx(low, abs=1e-3)
        assert factors.max() == pytest.approx(high, abs=1e-3)
        assert factors.mean() == pytest.approx((low + high) / 2, abs=5e-3)
    assert min(factor for change in changes_of(keys[:500], Augment(contrast=3.0)) for _, factor in change.jitter) >= 0


def test_no_setting_changes_what_others_draw() -> None:
    keys = [f"{key}" for key in range(200)]
    changes = changes_of(keys)
    alone = changes_of(keys, Augment(flip=0.5, hue=0.1, jitter=0.8))
    assert [change.flip for change in alone] == [change.flip for change in changes]
    hues = [dict(change.jitter).get(3) for change in changes]
    assert [dict(change.jitter).get(3) for change in alone] == hues
    assert {change.grey for change in alone} == {False}
    assert changes_of(keys, epoch=1) != changes != changes_of(keys, seed=6)
    assert changes_of(keys) == changes


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("shards")
    make_shards(folder, n=N, shards=3)
    return open_index("*.tar", folder)


def load(index: Index, augment: Augment | None = ALL, **other: Any) -> list[Batch]:
    settings: dict[str, Any] = {
        "seed": SEED,
        "batch": BATCH,
        "image_size": 16,
        "captions": 1,
        "context_length": 12,
        "start_step": 0,
        "total_steps": 5,
        "window": 2,
    }
    return list(train_loader(index, augment=augment, **settings | other))


@pytest.mark.parametrize("decoder", ["pillow", "torch", "dali"])
def test_every_decoder_gets_the_same_changes(index: Index, decoder: str) -> None:
    if decoder == "dali":
        optional("nvidia.dali", "dali-cuda13")
    plain, changed = load(index, None, decoder=decoder), load(index, decoder=decoder)
    for step, (before, after) in enumerate(zip(plain, changed, strict=True)):
        assert before.keys == after.keys
        assert torch.equal(before.tokens, after.tokens)
        wanted = one_by_one(before.images, changes_of(before.keys, epoch=step // (N // BATCH))).int()
        assert ((after.images.int() - wanted).abs() > 2).float().mean() < 1e-3


def test_workers_ranks_cache_and_a_resume_change_nothing(index: Index) -> None:
    whole = load(index)
    assert not torch.equal(whole[0].images, load(index, None)[0].images)
    for other in ({"workers": 2}, {"cache": True}, {"workers": 2, "cache": True, "start_step": 2}):
        same = load(index, **other)
        assert all(
            torch.equal(one.images, two.images)
            for one, two in zip(same, whole[int(other.get("start_step", 0)) :], strict=True)
        )
    parts = [load(index, rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)


def test_without_settings_no_pixel_is_touched(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "change_pixels", None)
    for augment in (None, Augment()):
        load(index, augment)
