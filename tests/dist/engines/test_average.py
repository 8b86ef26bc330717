"""The moving average of weights: a plain loop in double precision, also where small tensors are updated together."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engines.optimizer import AVERAGED, CLIPPED, _setup
from compt.bench.launches import count
from compt.engines import average as averages
from compt.engines.average import Average

DECAY = 0.9


@pytest.mark.parametrize("together", [False, True])
def test_it_is_that_of_a_plain_loop_and_leaves_out_steps_that_were_none(
    together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averages, "_is_small", lambda tensor: together and tensor.numel() < 20)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=generator) for name, size in (("a", 3), ("b", 12), ("large", 40))}
    held = Average(tensors, DECAY)
    wanted = {name: tensor.double() for name, tensor in tensors.items()}
    for step, finite in enumerate((False, True, True, False, True, True)):
        before = {name: tensor.clone() for name, tensor in held.tensors.items()}
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        held.update(torch.tensor(finite))
        for name, tensor in tensors.items():
            if not finite:
                assert torch.equal(held.tensors[name], before[name])
                continue
            new = tensor.double() if step == 1 else DECAY * wanted[name] + (1 - DECAY) * tensor.double()
            wanted[name] = new
            if step == 1:
                assert torch.equal(held.tensors[name], tensor)
            torch.testing.assert_close(held.tensors[name].double(), new, rtol=1e-6, atol=1e-6)
    assert int(held.updates) == 4


@pytest.mark.slow
def test_clipping_and_average_launch_few_kernels_on_a_gpu() -> None:
    seen = [count(_setup("vit_s16", "vit_t16", one), 16, torch.device("cuda", 0)) for one in (CLIPPED, AVERAGED)]
    clipped, averaged = (one.of("optimizer") for one in seen)
    assert clipped < 30
    assert averaged - clipped < 20
