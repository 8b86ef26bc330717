from __future__ import annotations

import math

import numpy as np
import pytest

from compt.evaluate.multilabel import MultilabelResult, average_precision
from compt.evaluate.retrieval import RetrievalResult
from compt.evaluate.stats import bootstrap, paired_bootstrap, verdict, wilson
from compt.evaluate.zeroshot import ZeroShotResult


@pytest.mark.parametrize("successes, n", [(5, 10), (1, 100), (0, 10), (10, 10), (230, 1000)])
def test_wilson_bounds_are_where_the_normal_test_tips(successes, n) -> None:
    """(share - p)^2 = z^2 p (1 - p) / n, solved for p."""
    share, c = successes / n, 1.959964**2 / n
    roots = sorted(np.roots([1 + c, -(2 * share + c), share**2]).real)
    assert wilson(successes, n) == pytest.approx([100 * root for root in roots], abs=1e-4)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 100.0
    assert wilson(0, 0) == (0.0, 100.0)


def test_wilson_covers_the_truth_about_95_times_in_100() -> None:
    draws = np.random.default_rng(0).binomial(200, 0.1, size=2000)
    bounds = np.array([wilson(int(x), 200) for x in draws])
    assert 0.93 < ((bounds[:, 0] <= 10) & (bounds[:, 1] >= 10)).mean() < 0.97


def _results(n: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    b = rng.random(n) < 0.3
    flips = rng.random(n)
    return np.where(flips < 0.1 + shift, True, np.where(flips > 0.9, False, b)), b


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    a, b = _results(5000, 0.05)
    difference, low, high = paired_bootstrap(a, b)
    gains = a.astype(float) - b
    error = 1.96 * gains.std() / math.sqrt(len(gains)) * 100
    assert difference == pytest.approx(100 * gains.mean(), abs=1e-9)
    assert low == pytest.approx(difference - error, abs=0.1)
    assert high == pytest.approx(difference + error, abs=0.1)


def test_bootstrap_is_signed_paired_and_repeatable() -> None:
    a, b = _results(500, 0.1)
    assert paired_bootstrap(a, b)[0] == -paired_bootstrap(b, a)[0]
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, samples=99, seed=3) != paired_bootstrap(a, b, samples=99, seed=4)
    shuffled = np.random.default_rng(0).permutation(b)
    width = np.subtract(*paired_bootstrap(a, b)[:0:-1])
    assert width < np.subtract(*paired_bootstrap(a, shuffled)[:0:-1])


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.1, 2.0, "lossless"),
        (-0.4, 0.3, "lossless"),
        (-0.6, 0.3, "undecided"),
        (-0.5, 0.3, "undecided"),
        (-2.0, -0.4, "undecided"),
        (-2.0, -0.6, "not lossless"),
        (math.nan, 1.0, "undecided"),
    ],
)
def test_verdict(low, high, expected) -> None:
    assert verdict(low, high) == expected


def test_verdict_with_another_margin() -> None:
    assert verdict(-1.2, -0.6, margin=2.0) == "lossless"


def test_an_interval_over_seeds_is_students_t_where_images_agree() -> None:
    """Without noise from images, the interval over seeds is that of Behrens and Fisher: Student's t for one side."""
    n, ours = 1000, (400, 420, 440)
    a = np.stack([np.arange(n) < k for k in ours])
    b = np.stack([np.arange(n) < 300] * 3)
    gain, low, high = paired_bootstrap(a, b)
    assert gain == pytest.approx(12.0)
    images = np.subtract(*paired_bootstrap(a.mean(axis=0), b.mean(axis=0))[:0:-1])
    half = 4.303 * 2 / np.sqrt(3)  # t of 2 degrees of freedom, standard deviation of 2 points
    assert np.hypot(images / 2, half) == pytest.approx((high - low) / 2, rel=0.1)
    assert paired_bootstrap(a, b[:1]) == paired_bootstrap(a.mean(axis=0), b[0]), "one side without a spread"


def test_the_bootstrap_of_a_share_is_its_normal_interval() -> None:
    right = 700
    low, high = bootstrap(lambda drawn: 100 * drawn[1] / 1000, [1000 - right, right], samples=4000)
    half = 1.96 * 100 * math.sqrt(0.7 * 0.3 / 1000)
    assert (low, high) == pytest.approx((70 - half, 70 + half), abs=0.25)
    assert (low, high) == bootstrap(lambda drawn: 100 * drawn[1] / 1000, [300, 700], samples=4000)


def test_the_interval_of_the_mean_per_class_is_that_of_drawn_images() -> None:
    """Against a plain bootstrap of images. With few images of a class, it is wider than that of top-1."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(3), [200, 40, 6])
    ranks = (rng.random(len(labels)) < 0.4).astype(np.int64)
    found = ZeroShotResult("set", np.arange(len(labels)), 3, labels, labels, ranks)
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, len(labels), len(labels))
        per_class = [found.correct[drawn][labels[drawn] == k] for k in range(3)]
        means.append(100 * np.mean([share.mean() for share in per_class if len(share)]))
    record = found.to_dict()
    assert record["mean_per_class_interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1.5)
    assert np.diff(record["mean_per_class_interval"]) > 1.5 * np.diff(record["top1_interval"])


def tipping(successes: int, n: int) -> list[float]:
    """Wilson's bounds as roots of (share - p)^2 = z^2 p (1 - p) / n, in percent."""
    share, c = successes / n, 1.959964**2 / n
    return [100 * float(root) for root in sorted(np.roots([1 + c, -(2 * share + c), share**2]).real)]


def test_top5_and_recall_of_captions_have_wilson_s_interval() -> None:
    ranks = np.random.default_rng(5).geometric(0.15, size=200) - 1
    ids = np.arange(200)
    record = ZeroShotResult("set", ids, 40, ids % 40, ids % 40, ranks).to_dict()
    assert record["top5_interval"] == pytest.approx(tipping(int((ranks < 5).sum()), 200), abs=1e-4)
    assert "top5_interval" not in ZeroShotResult("set", ids, 5, ids % 5, ids % 5, ranks).to_dict()
    record = RetrievalResult("set", ids, ranks, ids, ranks, ids).to_dict()
    for k in (1, 5, 10):
        found = record[f"image_to_text_r{k}_interval"]
        assert found == pytest.approx(tipping(int((ranks < k).sum()), 200), abs=1e-4)


def test_the_interval_of_the_recall_of_images_is_that_of_drawn_images() -> None:
    """Against a plain bootstrap of images with all of their captions. Captions that were drawn alone would give a
    narrower one."""
    rng = np.random.default_rng(6)
    ids = np.sort(rng.permutation(1000)[:150])
    owners = np.repeat(ids, rng.integers(1, 8, size=150))
    easy = dict(zip(ids.tolist(), (rng.random(150) < 0.4).tolist(), strict=True))
    ranks = np.array([rng.geometric(0.6 if easy[owner] else 0.03) - 1 for owner in owners.tolist()])
    found = RetrievalResult("set", ids, np.zeros(150, np.int64), owners, ranks, np.zeros(150, np.int64))
    record = found.to_dict()
    own = [ranks[owners == each] for each in ids]
    for k in (1, 5, 10):
        drawn = [np.concatenate([own[at] for at in rng.integers(0, 150, 150)]) for _ in range(1500)]
        expected = np.percentile([100 * (each < k).mean() for each in drawn], [2.5, 97.5])
        interval = record[f"text_to_image_r{k}_interval"]
        assert interval == pytest.approx(expected, abs=1.2)
        assert interval[0] < record[f"text_to_image_r{k}"] < interval[1]
        alone = np.subtract(*wilson(int((ranks < k).sum()), len(ranks))[::-1])
        assert np.subtract(*interval[::-1]) > 1.4 * alone


def test_the_interval_of_average_precision_is_that_of_drawn_images() -> None:
    rng = np.random.default_rng(4)
    labels = rng.random((120, 3)) < (0.5, 0.2, 0.05)
    scores = (labels + rng.normal(size=labels.shape)).astype(np.float32)
    found = MultilabelResult("set", np.arange(120), labels, scores)
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 120, 120)
        pairs = [(scores[drawn, k], labels[drawn, k]) for k in range(3) if labels[drawn, k].any()]
        means.append(100 * np.mean([average_precision(*pair) for pair in pairs]))
    interval = found.to_dict()["mean_average_precision_interval"]
    assert interval == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1.5)
    assert interval[0] < found.headline()["mean_average_precision"] < interval[1]


def test_drawn_sets_without_a_score_are_left_out() -> None:
    assert bootstrap(lambda drawn: math.nan if drawn[0] == 0 else 1.0, [1, 9]) == (1.0, 1.0)
