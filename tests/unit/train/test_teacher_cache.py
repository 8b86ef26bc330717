"""The cache of the teacher's captions: exact, bounded, counted, and without a wait for a GPU."""

from __future__ import annotations

import copy
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from compt.cost.memory import CAPTION_BYTES
from compt.engines.ddp import DataParallelEngine
from compt.errors import ConfigError
from compt.models.clip import build, caption_lengths
from compt.models.presets import PACKED, resolve
from compt.train.accumulate import cached_backward
from compt.train.task import DistillTask
from compt.train.teacher_cache import CaptionFeatures, Looked
from tests.unit.train.test_no_waits import GPU, PretendedGpu

SPEC = resolve("vit_pico", {"image_size": 16, "depth": 1, "context_length": 10, "vocab_size": 64, "embed_dim": 16})
PLENTY = 10**6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def captions(number: int, seed: int, longest: int = 10) -> Tensor:
    """Tokens int64 [number, longest]: different captions of 3 tokens or more, which end with the highest number."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 62, (number, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (number, 1), generator=generator)
    positions = torch.arange(longest)
    return tokens.masked_fill(positions >= lengths, 0).masked_fill(positions == lengths - 1, 63)


def batch(seed: int, samples: int = 6) -> tuple[Tensor, Tensor]:
    images = torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return images, captions(2 * samples, seed).view(samples, 2, 10)


def distill(buckets: int = 1, cache: int | None = PLENTY, context: int = 10, **settings: Any) -> DistillTask:
    teacher = resolve("vit_pico", {**_SIZES, "context_length": context, "embed_dim": 24})
    task = DistillTask(build(SPEC, seed=0), build(teacher, seed=1), text_buckets=buckets, **settings)
    if cache is not None:
        task.keep_captions(cache)
    return task


_SIZES = {"image_size": 16, "depth": 1, "vocab_size": 64}


def by_length(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Stands for a teacher: the sums of a caption's tokens and of their squares, its length, its last token but one."""
    last = tokens.gather(1, lengths[:, None] - 2)[:, 0]
    return torch.stack([tokens.sum(1), (tokens**2).sum(1), lengths, last], 1).float()


@pytest.mark.parametrize("buckets", [1, 3, PACKED])
def test_features_are_those_of_each_caption_alone(buckets: int) -> None:
    """Whatever the cache has: first nothing, then all, then half."""
    task, (images, tokens) = distill(buckets), batch(0)
    other = torch.cat([tokens[3:], batch(1)[1][:3]])
    plain = distill(buckets, cache=None)
    for at, shown in enumerate((tokens, tokens, other, tokens.flip(0))):
        found = task.targets(images, shown, caption_lengths(shown), shown)
        alone = torch.cat([task.teacher.encode_text(one[None]) for one in shown.flatten(0, 1)]).view(6, 2, 24)
        torch.testing.assert_close(found["text"], alone, **CLOSE)
        assert torch.equal(found["image"], plain.targets(images, shown)["image"])
        if at < 2:  # computed, and found as computed
            assert torch.equal(found["text"], plain.targets(images, shown)["text"])
    assert task.kept is not None
    assert task.kept.looked()[:2] == (12 + 6 + 12, 12 + 6)


def test_counts_are_those_of_a_set_of_texts() -> None:
    cache, seen = CaptionFeatures(PLENTY, 4, torch.float32), set[tuple[int, ...]]()
    pool = captions(40, 5)
    hits = misses = computed = 0
    for step in range(20):
        tokens = pool[torch.randint(40, (8,), generator=torch.Generator().manual_seed(step))]
        lengths = caption_lengths(tokens)
        texts = [tuple(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)]
        new = [len(text) for text in texts if text not in seen]
        hits, misses = hits + len(texts) - len(new), misses + len(new)
        computed += max(new, default=0) * len(new)
        seen.update(texts)
        assert torch.equal(cache.of(tokens, tokens, by_length), by_length(tokens, lengths))
    assert cache.looked() == Looked(hits, misses, computed)
    assert cache.looked() == Looked()


def test_captions_that_differ_in_one_token_are_different() -> None:
    one = torch.tensor([[1, 5, 6, 7, 63, 0], [1, 5, 6, 63, 0, 0], [1, 5, 6, 8, 63, 0], [1, 5, 63, 0, 0, 0]])
    cache = CaptionFeatures(PLENTY, 4, torch.float32)
    for row in one.split(1):
        cache.of(row, row, by_length)
    assert cache.looked()[:2] == (0, 4)
    # The same captions, padded to another length.
    wide = torch.cat([one, torch.zeros(4, 3, dtype=torch.int64)], 1).flip(0)
    assert torch.equal(cache.of(wide, wide, by_length), by_length(wide, caption_lengths(wide)))
    assert cache.looked() == Looked(4, 0, 0)


def test_large_token_ids_are_told_apart() -> None:
    tokens = torch.tensor([[1, 5, 70_000], [1, 5 + 65_536, 70_000]])
    cache = CaptionFeatures(PLENTY, 4, torch.float32)
    cache.of(tokens[:1], tokens[:1], by_length)
    assert torch.equal(cache.of(tokens[1:], tokens[1:], by_length), by_length(tokens[1:], torch.tensor([3])))
    assert cache.looked()[:2] == (0, 2)


def test_a_caption_that_is_there_twice_is_kept_once() -> None:
    tokens = captions(3, 0)[[0, 1, 0, 2, 1]]
    cache = CaptionFeatures(3 * (16 + CAPTION_BYTES + 40), 4, torch.float32)
    for _ in range(2):
        assert torch.equal(cache.of(tokens, tokens, by_length), by_length(tokens, caption_lengths(tokens)))
    assert cache.looked()[:2] == (5, 5)


def test_a_full_cache_computes_the_rest() -> None:
    tokens = captions(9, 0)
    taken = [16 + CAPTION_BYTES + 4 * int(length) for length in caption_lengths(tokens)]
    cache = CaptionFeatures(sum(taken[:4]), 4, torch.float32)
    for _ in range(3):
        assert torch.equal(cache.of(tokens, tokens, by_length), by_length(tokens, caption_lengths(tokens)))
    assert cache.looked()[:2] == (8, 9 + 5 + 5)
    none = CaptionFeatures(10, 4, torch.float32)
    for _ in range(2):
        assert torch.equal(none.of(tokens, tokens, by_length), by_length(tokens, caption_lengths(tokens)))
    assert none.looked()[:2] == (0, 18)


def test_the_memory_is_at_most_the_limit() -> None:
    """Python's part, which is measured; the rows are what is left of the limit by arithmetic."""
    kept = []
    for number in (3_000, 6_000, 12_000, 24_000):
        tokens = torch.arange(number)[:, None] * 10 + torch.tensor([1, 2, 3, 4, 10 * number])
        tracemalloc.start()
        cache = CaptionFeatures(10**8, 4, torch.float32)
        for part in tokens.split(100):
            cache.of(part, part, by_length)
        kept.append(tracemalloc.get_traced_memory()[0] / number)
        tracemalloc.stop()
        assert cache.looked()[:2] == (0, number)
    assert max(kept) < CAPTION_BYTES + 4 * 5
    assert max(kept) > 0.6 * (CAPTION_BYTES + 4 * 5)


def test_a_limit_beyond_the_machine_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"engine.teacher_cache = 1152921504606846976: this machine does not give"):
        CaptionFeatures(1 << 60, 512, torch.float32)


def test_half_precision_is_kept_as_it_is() -> None:
    task, (images, tokens) = distill(teacher_dtype=torch.bfloat16), batch(0)
    first, second = (task.targets(images, tokens, None, tokens)["text"] for _ in range(2))
    assert first.dtype == second.dtype == torch.bfloat16
    assert torch.equal(first, second)
    assert task.kept is not None
    assert task.kept.looked()[:2] == (12, 12)


@pytest.mark.parametrize("buckets", [1, PACKED])
def test_captions_are_cut_to_the_context_of_the_teacher(buckets: int) -> None:
    task, plain, (images, tokens) = distill(buckets, context=6), distill(context=6, cache=None), batch(0)
    for _ in range(2):
        found = task.targets(images, tokens, caption_lengths(tokens), tokens)["text"]
        torch.testing.assert_close(found, plain.targets(images, tokens)["text"], **CLOSE)
    assert task.kept is not None
    lengths = caption_lengths(tokens).clamp(max=6)
    assert task.kept.looked() == Looked(12, 12, int(lengths.sum() if buckets == PACKED else 12 * lengths.max()))


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("buckets", [2, PACKED])
def test_losses_and_gradients_are_those_without_it(buckets: int, micro_batch: int | None) -> None:
    images, tokens = batch(0)
    other = torch.cat([tokens[2:], batch(1)[1][:2]])
    found = []
    for cache in (PLENTY, None):
        task = distill(buckets, cache)
        engine = DataParallelEngine(copy.deepcopy(task.module))
        steps = []
        for shown in (tokens, other):
            loss, _ = cached_backward(task, engine, images, shown, micro_batch, caption_lengths(shown), shown)
            steps.append((loss, dict(engine.gradients())))
            engine.step(0.0)
        found.append(steps)
        if task.kept is not None:
            assert task.kept.looked()[:2] == (8, 16)
    torch.testing.assert_close(found[0], found[1], **CLOSE)


class _Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("buckets", [1, 2, PACKED])
def test_a_step_waits_for_no_gpu(buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.Event", _Event)
    known = captions(8, 0).view(4, 2, 10)
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGpu() as gpu:
        task = DistillTask(build(SPEC, GPU), build(SPEC, GPU), text_buckets=buckets)
        task.keep_captions(PLENTY)
        cache = task.kept
        assert cache is not None
        images: Tensor = torch.zeros((4, 3, 16, 16), device=GPU)
        tokens = torch.zeros((4, 2, 10), dtype=torch.int64, device=GPU)
        for some in (known, torch.cat([known[2:], captions(4, 1).view(2, 2, 10)]), known):
            gpu.copies.clear()
            targets = task.targets(images, tokens, caption_lengths(some), some)
            assert targets["text"].device == GPU
            assert not any(gpu.copies)
            assert gpu.copies
            cache._coming = None  # its numbers are pretended, too
    assert cache.looked()[:2] == (4 + 8, 8 + 4)
