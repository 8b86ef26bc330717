"""DALI on a real GPU: JPEGs decoded there, near the CPU's pixels, and memory that is not used twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compt.data.dali import DaliDecoder
from compt.data.decode import Encoded, TorchDecoder
from tests.helpers.optional import optional
from tests.unit.data.test_decoders import BY_DALI, FILES, SIZES, jpegs, scene
from tests.unit.data.test_loaders import batches_of, load

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _a_process_that_uses_its_gpu() -> None:
    optional("nvidia.dali", "dali-cuda13")
    torch.zeros(1, device=CUDA)


@pytest.mark.parametrize("form", sorted(FILES))
def test_pixels_are_on_the_gpu_and_near_the_cpus(form: str) -> None:
    datas = [FILES[form](scene(at, *size)) for at, size in enumerate(SIZES)]
    boxes, size = [(1, 2, width - 3, height) for width, height in SIZES], 90
    made, cpu = DaliDecoder(), TorchDecoder()
    encoded = [Encoded(data, *size) for data, size in zip(datas, SIZES, strict=True)]
    if form in BY_DALI:
        made._cpu = None  # nothing may fall back to it
    prepared = [made.prepare(image, box, size) for image, box in zip(encoded, boxes, strict=True)]
    pixels, broken = made.decode(["-"] * len(prepared), prepared, boxes, size)
    assert not broken
    assert pixels.is_cuda is (form in BY_DALI)
    for got, image, box in zip(pixels.cpu(), encoded, boxes, strict=True):
        off = (got.int() - torch.from_numpy(cpu.pixels(image, box, size).copy()).int()).abs().float()
        assert off.mean() < 1.5
        assert off.max() <= 40


def test_a_batch_keeps_its_pixels_while_kernels_wait_for_it(tmp_path: Path) -> None:
    index = jpegs(tmp_path)
    expected = [batch.images.cpu() for batch in load(index, decoder="dali", workers=1, total_steps=30)]
    large = torch.rand(4096, 4096, device=CUDA)
    sums = []
    for batch in batches_of(index, decoder="dali", workers=1, total_steps=30):
        for _ in range(4):
            large = torch.tanh(large @ large)  # the copy below waits for it
        sums.append(batch.images.clone())
        del batch
    assert all(torch.equal(got.cpu(), whole) for got, whole in zip(sums, expected, strict=True))


def test_a_broken_image_is_left_out_alone(tmp_path: Path) -> None:
    data = FILES["JPEG"](scene(3, 60, 50))
    index = jpegs(tmp_path, k03=data[:300] + data[-2:])
    cpu, gpu = (load(index, decoder=name, max_bad_share=1.0) for name in ("torch", "dali"))
    for one, two in zip(cpu, gpu, strict=True):
        assert (one.keys, one.skipped) == (two.keys, two.skipped)
        assert (one.images.int() - two.images.cpu().int()).abs().float().mean() < 2
