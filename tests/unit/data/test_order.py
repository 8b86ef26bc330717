from __future__ import annotations

from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from compt.data.order import EpochOrder, caption_choice, crop_box, substitute

CHI2_999 = {2: 13.82, 15: 37.70}
"""99.9 % quantiles of chi-squared by degrees of freedom."""

GOLDEN_ORDER = [5, 6, 4, 3, 1, 2, 0, 10, 11, 7, 8, 9]
GOLDEN_CAPTIONS = [1, 6, 12, 5]
GOLDEN_REPLACED = [0, 0, 1, 0]
GOLDEN_CROP = (7, 0, 317, 240)
GOLDEN_SUBSTITUTES = [156, 102, 589]


def epoch_order(seed: int, epoch: int, sizes: list[int], window: int) -> np.ndarray:
    return EpochOrder(seed, epoch, sizes, window)[:]


def order_made_whole(seed: int, epoch: int, sizes: list[int], window: int) -> np.ndarray:
    """The order of the whole epoch from one stream of words, as the first versions made it."""
    key = int.from_bytes(blake2b(f"{seed}\0{epoch}\0order".encode(), digest_size=16).digest(), "little")
    source = np.random.Philox(key=key)
    starts = np.cumsum([0, *sizes])
    shards = np.argsort(source.random_raw(len(sizes)), kind="stable")
    parts = []
    for first in range(0, len(sizes), window):
        ids = [np.arange(starts[shard], starts[shard + 1]) for shard in shards[first : first + window]]
        joined = np.concatenate(ids)
        parts.append(joined[np.argsort(source.random_raw(len(joined)), kind="stable")])
    return np.concatenate(parts)


def chi2(counts: np.ndarray) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_epoch_order_is_a_permutation() -> None:
    sizes = [5, 9, 0, 7, 30, 1, 4]
    for window in (1, 2, 7, 100):
        assert sorted(epoch_order(3, 0, sizes, window).tolist()) == list(range(sum(sizes)))


def test_samples_are_shuffled_within_windows_of_shuffled_shards() -> None:
    shards = epoch_order(3, 0, [10] * 9, 2) // 10
    windows = [shards[first : first + 20] for first in range(0, 90, 20)]
    for window in windows[:-1]:
        assert sorted(np.bincount(window, minlength=9))[-2:] == [10, 10]
        assert (np.diff(window) != 0).sum() > 3, "the shards of a window are mixed"
    together = [tuple(sorted(set(window.tolist()))) for window in windows]
    assert together != sorted(together), "shards come in another order than they lie"


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = epoch_order(0, 0, [100] * 5, 5)
    assert (first == epoch_order(0, 0, [100] * 5, 5)).all()
    for other in (epoch_order(0, 1, [100] * 5, 5), epoch_order(1, 0, [100] * 5, 5)):
        assert (first == other).mean() < 0.02
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.15


def test_every_position_is_reached_equally_often() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(1200):
        counts[np.arange(6), epoch_order(0, epoch, [2, 2, 2], 3)] += 1
    assert max(chi2(row) for row in counts) < 30


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(0, 3),
    st.lists(st.integers(0, 1300), min_size=2, max_size=8),
)
def test_a_part_of_the_order_equals_that_part_of_the_whole(
    sizes: list[int], window: int, epoch: int, cuts: list[int]
) -> None:
    """Windows are drawn on their own, in any sequence. A run of an older version continues with the same samples."""
    whole = order_made_whole(5, epoch, sizes, window)
    order = EpochOrder(5, epoch, sizes, window)
    assert len(order) == len(whole)
    for first, last in pairwise(cuts):
        assert order[first:last].tolist() == whole[first:last].tolist()


def test_two_billion_samples_open_anywhere() -> None:
    """The last windows of 2e9 samples in 200,000 shards. All ids together would take 15 GiB."""
    order = EpochOrder(0, 0, np.full(200_000, 10_000), 8)
    tail = order[len(order) - 100_000 :]
    assert len(set(tail.tolist())) == 100_000
    assert len({one // 10_000 for one in tail.tolist()}) <= 16


def test_a_window_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        epoch_order(0, 0, [3], 0)


def test_captions_are_uniform_over_all_and_without_replacement() -> None:
    counts, pairs = np.zeros(16), np.zeros((16, 16))
    for number in range(6000):
        chosen = caption_choice(7, 0, f"{number:09d}", 16, 4)
        assert len(set(chosen)) == 4
        counts[chosen] += 1
        pairs[chosen[0], chosen[1]] += 1
    # Drawing 4 of 16 without replacement lowers the variance, so the bound is on the safe side.
    assert chi2(counts) < CHI2_999[15]
    assert chi2(pairs[~np.eye(16, dtype=bool)]) < 320  # 239 degrees of freedom


def test_captions_of_epochs_are_independent() -> None:
    joint = np.zeros((4, 4))
    for number in range(4000):
        key = f"{number:09d}"
        joint[caption_choice(0, 0, key, 4, 1)[0], caption_choice(0, 1, key, 4, 1)[0]] += 1
    assert chi2(joint.ravel()) < CHI2_999[15]


def test_one_key_meets_every_caption_over_the_epochs() -> None:
    seen = np.bincount([i for epoch in range(400) for i in caption_choice(0, epoch, "000012", 16, 4)], minlength=16)
    assert seen.min() > 60
    assert chi2(seen) < CHI2_999[15]


def test_fewer_captions_are_drawn_with_replacement() -> None:
    counts = np.zeros(3)
    for number in range(2000):
        chosen = caption_choice(0, 0, str(number), 3, 4)
        assert len(chosen) == 4
        counts[chosen] += 1
    assert chi2(counts) < CHI2_999[2]
    assert caption_choice(0, 0, "k", 1, 12) == [0] * 12
    assert sorted(caption_choice(0, 0, "k", 20, 20)) == list(range(20))
    with pytest.raises(ValueError, match="no captions"):
        caption_choice(0, 0, "k", 0, 1)


@pytest.mark.parametrize(
    ("width", "height", "scale"), [(320, 200, (0.08, 1.0)), (64, 64, (0.9, 1.0)), (90, 300, (0.5, 1.0))]
)
def test_crop_boxes_have_the_distribution_of_random_resized_crop(
    width: int, height: int, scale: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = np.array([crop_box(0, 0, str(number), width, height, scale) for number in range(4000)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2] <= width).all()
    assert (ours[:, 3] <= height).all()
    ours = np.stack([ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], axis=1)
    for column in range(4):
        # Two-sample Kolmogorov-Smirnov at about 99.9 %: 1.95 sqrt(2 / n).
        at = np.arange(max(width, height) + 1)
        mine = np.searchsorted(np.sort(ours[:, column]), at, side="right") / 4000
        other = np.searchsorted(np.sort(theirs[:, column]), at, side="right") / 4000
        assert np.abs(mine - other).max() < 0.044


def test_impossible_crops_fall_back_to_the_centre() -> None:
    assert crop_box(0, 0, "a", 1000, 10, (1.0, 1.0)) == (493, 0, 506, 10)
    assert crop_box(0, 0, "a", 10, 1000, (1.0, 1.0)) == (0, 493, 10, 506)
    assert crop_box(0, 0, "a", 1, 1, (0.9, 1.0)) == (0, 0, 1, 1)


def test_stored_values_do_not_move() -> None:
    """A change of these moves the data of every recipe."""
    assert epoch_order(1, 2, [3, 4, 5], 2).tolist() == GOLDEN_ORDER
    assert caption_choice(1, 2, "000000017", 16, 4) == GOLDEN_CAPTIONS
    assert caption_choice(1, 2, "000000017", 2, 4) == GOLDEN_REPLACED
    assert crop_box(1, 2, "000000017", 320, 240, (0.9, 1.0)) == GOLDEN_CROP
    assert [substitute(1, 2, "000000017", attempt, 1000) for attempt in range(3)] == GOLDEN_SUBSTITUTES
