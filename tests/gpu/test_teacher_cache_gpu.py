"""On a GPU: the cache of the teacher's captions, and the moving average of small tensors together."""

from __future__ import annotations

import pytest
import torch

from compt.engines.average import Average
from compt.models.clip import build, caption_lengths
from compt.models.presets import PACKED, resolve
from compt.train.task import DistillTask

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
SPEC = resolve("vit_pico", {"image_size": 16, "depth": 2, "context_length": 10, "vocab_size": 64, "embed_dim": 16})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buckets", [1, 2, PACKED])
def test_kept_features_are_computed_ones(buckets: int, dtype: torch.dtype) -> None:
    def task() -> DistillTask:
        student, teacher = (build(SPEC, seed=seed).to(CUDA) for seed in (0, 1))
        return DistillTask(student, teacher, text_buckets=buckets, teacher_dtype=dtype)

    plain, kept = task(), task()
    kept.keep_captions(10**6)
    assert kept.kept is not None
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(1, 62, (40, 2, 10), generator=generator)
    pool[..., 9] = 63
    images = torch.randn(8, 3, 16, 16, generator=generator).to(CUDA)
    for _ in range(12):  # so many that nothing waits for the copies of the steps before
        known = pool[torch.randint(40, (8,), generator=generator)].pin_memory()
        tokens, lengths = known.to(CUDA, non_blocking=True), caption_lengths(known)
        found = kept.targets(images, tokens, lengths, known)
        right = plain.targets(images, tokens, lengths)
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found["text"], right["text"], rtol=close, atol=close)
    hits, misses, _ = kept.kept.looked()
    assert hits + misses == 12 * 16
    assert hits > 2 * 40


def test_the_average_of_small_tensors_is_that_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    here = {name: torch.randn(size, generator=generator) for name, size in (("small", 7), ("large", 2_000_000))}
    there = {name: tensor.to(CUDA) for name, tensor in here.items()}
    both = Average(here, 0.9), Average(there, 0.9)
    for finite in (True, False, True, True):
        for name, tensor in here.items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            there[name].copy_(tensor)
        for one in both:
            one.update(torch.tensor(finite))
    for name, tensor in both[0].tensors.items():
        torch.testing.assert_close(both[1].tensors[name].cpu(), tensor, rtol=1e-6, atol=1e-6)
