"""Packed text against text that is padded: the same features and gradients, by each way of attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compt.models import clip, packing
from compt.models.clip import ClipModel, build, caption_lengths, padded_tokens
from compt.models.packing import Packing
from compt.models.presets import PACKED, resolve

SPEC = resolve("vit_pico", {"image_size": 16, "text_depth": 3, "context_length": 12, "vocab_size": 64})
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = {
    "mixed": [5, 12, 2, 5, 7, 3, 12, 5],
    "all alike": [4, 4, 4],
    "two": [9, 2],
    "one": [6],
}


def captions(lengths: list[int], padded: int = 12) -> Tensor:
    """Tokens int64 [N, padded] of captions that end with 63."""
    places, last = torch.arange(padded), torch.tensor(lengths)[:, None] - 1
    tokens = torch.randint(1, 62, (len(lengths), padded), generator=torch.Generator().manual_seed(3))
    return tokens.masked_fill(places > last, 0).masked_fill(places == last, 63)


def loop_over_captions(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *most: int, **how: Any) -> Tensor:
    """What torch's kernel computes on a GPU, caption by caption; causal where its arguments say so."""
    found = []
    starts = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for (a, b), (c, d) in starts:
        assert b - a <= most[0]
        assert d - c <= most[1]
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) / q.shape[-1] ** 0.5
        if how.get("is_causal") or how.get("window_size") == (-1, 0):
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
    return torch.cat(found)


def by_kernel(*arguments: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "varlen_attn", loop_over_captions)
        return packing._by_kernel(*arguments)


WAYS: dict[str, Callable[..., Tensor]] = {
    "length by length": packing._by_length,
    "padded for attention": packing._by_padding,
    "kernel": by_kernel,
}


def trained(model: ClipModel, tokens: Tensor, buckets: int) -> dict[str, Tensor]:
    """Features of captions, and the gradients of the text tower for one direction of these."""
    model.zero_grad()
    features = model.encode_captions(tokens, buckets, caption_lengths(tokens))
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return {"features": features.detach(), **gradients}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the norm of each tensor but to one at least."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm().clamp(min=1)) for name, value in expected.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_text_has_the_features_and_gradients_of_padded_text(
    way: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = build(SPEC, seed=1), captions(lengths)
    expected = trained(model, tokens, 1)
    monkeypatch.setattr(clip, "attention", WAYS[way])
    found = trained(model, tokens, PACKED)
    assert worst(found, expected) < 1e-5
    model.set_grad_checkpointing(True)
    assert worst(trained(model, tokens, PACKED), found) < 1e-6
    with torch.no_grad():
        # Padded to less than the context; and without the lengths.
        short = tokens[:, : max(lengths)]
        torch.testing.assert_close(model.encode_captions(short, PACKED), found["features"], **CLOSE)


def pack_with(**changes: Callable[[Packing], Tensor]) -> Callable[..., Packing]:
    original = packing.pack

    def pack(*arguments: Any) -> Packing:
        made = original(*arguments)
        return replace(made, **{name: change(made) for name, change in changes.items()})

    return pack


def later(made: Packing) -> Tensor:
    """The first boundary one token late."""
    return made.starts + torch.tensor([0, 1] + [0] * (len(made.starts) - 2), dtype=torch.int32)


FAULTS: dict[str, tuple[str, str, Any]] = {
    "a boundary one token late": ("kernel", "pack", pack_with(starts=later)),
    "groups one caption off": (
        "length by length",
        "pack",
        pack_with(groups=lambda made: ((8, 1), (6, 2), *made.groups[2:])),  # type: ignore[arg-type, return-value]
    ),
    "positions that go on from caption to caption": (
        "length by length",
        "pack",
        pack_with(positions=lambda made: torch.arange(len(made.positions), dtype=torch.int32) % 12),
    ),
    "no causal mask": ("length by length", "is_causal", False),
    "no causal mask, padded": ("padded for attention", "is_causal", False),
    "no causal mask in the kernel": ("kernel", "_CAUSAL", {}),
    "a caption's feature read one token early": ("kernel", "pack", pack_with(last=lambda made: made.last - 1)),
    "captions in packed order": ("kernel", "pack", pack_with(places=lambda made: made.places.sort().values)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, name, value = FAULTS[fault]
    lengths = [8, 4, 8, 11, 9]
    model, tokens = build(SPEC, seed=1), captions(lengths)
    expected = trained(model, tokens, 1)
    monkeypatch.setattr(clip, "attention", WAYS[way])
    if name == "pack":
        monkeypatch.setattr(clip, "pack", value)
    elif name == "is_causal":
        original = F.scaled_dot_product_attention

        def without_mask(*inputs: Tensor, is_causal: bool = False, **more: Any) -> Tensor:
            return original(*inputs, **more)

        monkeypatch.setattr(F, "scaled_dot_product_attention", without_mask)
    else:
        monkeypatch.setattr(packing, name, value)
    assert worst(trained(model, tokens, PACKED), expected) > 1e-3


def test_packed_text_computes_each_token_once() -> None:
    lengths = torch.tensor(LENGTHS["mixed"])
    assert padded_tokens(lengths, PACKED) == lengths.sum()
    seen = []
    model = build(SPEC, seed=1)
    model.transformer.resblocks[0].ln_2.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    model.encode_captions(captions(LENGTHS["mixed"]), PACKED)
    assert seen == [lengths.sum()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_formats(dtype: torch.dtype) -> None:
    model, tokens = build(SPEC, seed=1).to(dtype), captions(LENGTHS["mixed"])
    found, expected = (model.encode_captions(tokens, buckets) for buckets in (PACKED, 1))
    close = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("way", ["length by length", "padded for attention"])
def test_other_lengths_are_not_compiled_again(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counters = build(SPEC, seed=1), torch._dynamo.utils.counters
    monkeypatch.setattr(clip, "attention", WAYS[way])
    plain = [trained(model, captions(lengths), PACKED) for lengths in LONG]
    torch._dynamo.reset()
    counters.clear()
    for block in model.transformer.resblocks:
        block.compile(backend="eager")
    for step, lengths in enumerate(LONG):
        assert worst(trained(model, captions(lengths), PACKED), plain[step]) < 1e-5
        if step == 1:  # the second length makes the number of tokens a variable
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs > 0


LONG = [[5, 12, 2, 5], [3, 3, 7, 9], [12, 12, 11, 3], [2, 3, 4, 5], [6, 6, 6, 6]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [1, 3, 32])
def test_text_filled_up_to_a_few_sizes_has_the_same_features_and_gradients(
    way: str, sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(SPEC, seed=1)
    monkeypatch.setattr(clip, "attention", WAYS[way])
    for lengths in LENGTHS.values():
        expected = trained(model, captions(lengths), 1)
        for padded in (12, max(lengths)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(model, "text_sizes", sizes)
                assert worst(trained(model, captions(lengths)[:, :padded], PACKED), expected) < 1e-5


def test_an_epoch_has_few_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, context, sizes in ((64, 77, 32), (7, 12, 4), (3, 2, 32), (256, 77, 5)):
        shapes = set()
        for _ in range(200):
            longest = int(torch.randint(1, context + 1, (1,), generator=generator))
            lengths = torch.randint(1, longest + 1, (count,), generator=generator)
            made = packing.pack(lengths, context, context, torch.device("cpu"), sizes)
            assert made.lengths.min() >= 1
            assert made.lengths.max() <= context
            assert made.lengths.sum() == len(made.taken) == made.starts[-1]
            assert packing.filled(int(lengths.sum()), count, context, sizes) == len(made.taken)
            assert len(made.taken) - lengths.sum() < -(-count * context // sizes) + len(made.lengths) - count + 1
            parts = (made.taken, made.positions, made.starts, made.last, made.places, made.lengths)
            shapes.add(tuple(len(part) for part in parts))
        assert 1 < len(shapes) <= sizes + 1
        assert len({tokens for tokens, *_ in shapes}) == len(shapes), "shapes follow from the number of tokens"
