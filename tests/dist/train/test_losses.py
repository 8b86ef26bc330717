"""The losses on two ranks: mean of the values and averaged parameter gradients equal one process on the whole batch."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn import functional

from compt.dist import collectives as dist
from compt.train.losses import ImageToText, contrastive_loss, siglip_loss
from tests.dist.spawn import run_ranks
from tests.unit.train.test_losses import oracle, pairs_oracle

N, M, IN, D = 6, 3, 5, 8


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(N, IN),
        "y": draw(N, M, IN),
        "image": draw(IN, D),
        "text": draw(IN, D),
        "scale": torch.tensor([1.5], dtype=torch.float64),
        "bias": torch.tensor([-4.0], dtype=torch.float64),
    }


def local_gradients(image_to_text: ImageToText, chunk: int | None) -> tuple[float, dict[str, Tensor]]:
    """This rank's loss and its parameter gradients averaged over ranks by hand, as DDP does."""
    values = data()
    share = N // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    weights = {name: values[name].requires_grad_() for name in ("image", "text", "scale")}
    loss = contrastive_loss(
        values["x"][own] @ weights["image"],
        values["y"][own] @ weights["text"],
        weights["scale"].exp(),
        image_to_text=image_to_text,
        chunk=chunk,
    ).task
    loss.backward()
    gradients = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        torch.distributed.all_reduce(weight.grad)
        gradients[name] = weight.grad / dist.world_size()
    return dist.all_reduce_sum(loss.item()) / dist.world_size(), gradients


@pytest.mark.parametrize("image_to_text", ["slot", "all"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_two_ranks_equal_the_loops(image_to_text: ImageToText, chunk: int | None) -> None:
    values = data()
    weights = {name: values[name].requires_grad_() for name in ("image", "text", "scale")}
    expected, _, _ = oracle(
        values["x"] @ weights["image"], values["y"] @ weights["text"], weights["scale"].exp(), image_to_text
    )
    expected.sum().backward()
    for loss, gradients in run_ranks(local_gradients, 2, image_to_text, chunk):
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        for name, weight in weights.items():
            assert weight.grad is not None
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-9, atol=1e-11)


def local_pair_gradients(chunk: int | None) -> tuple[float, float, dict[str, Tensor]]:
    """Like `local_gradients`, for the sigmoid loss."""
    values = data()
    share = N // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    weights = {name: values[name].requires_grad_() for name in ("image", "text", "scale", "bias")}
    image, text = values["x"][own] @ weights["image"], values["y"][own] @ weights["text"]
    loss, positive = siglip_loss(image, text, weights["scale"].exp(), weights["bias"], chunk=chunk)
    loss.backward()
    gradients = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        torch.distributed.all_reduce(weight.grad)
        gradients[name] = weight.grad / dist.world_size()
    means = [dist.all_reduce_sum(value.item()) / dist.world_size() for value in (loss, positive)]
    return means[0], means[1], gradients


@pytest.mark.parametrize(("ranks", "chunk"), [(2, None), (2, 2), (3, 1)])
def test_siglip_on_several_ranks_equals_the_loops(ranks: int, chunk: int | None) -> None:
    values = data()
    weights = {name: values[name].requires_grad_() for name in ("image", "text", "scale", "bias")}
    image, text = values["x"] @ weights["image"], values["y"] @ weights["text"]
    expected, matching = pairs_oracle(image, text, weights["scale"].exp(), weights["bias"])
    expected.backward()
    for loss, positive, gradients in run_ranks(local_pair_gradients, ranks, chunk):
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        assert positive == pytest.approx(matching.item(), rel=1e-10)
        for name, weight in weights.items():
            assert weight.grad is not None
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-9, atol=1e-11)


def open_clip_pair_gradients() -> tuple[float, dict[str, Tensor]]:
    """open_clip's own sigmoid loss on several ranks, one caption an image."""
    values, size = data(), dist.world_size()
    own = slice(dist.rank() * N // size, (dist.rank() + 1) * N // size)
    weights = {name: values[name].requires_grad_() for name in ("image", "text", "scale", "bias")}
    image, text = values["x"][own] @ weights["image"], values["y"][own, 0] @ weights["text"]
    features = (functional.normalize(value, dim=-1) for value in (image, text))
    theirs = SigLipLoss(rank=dist.rank(), world_size=size)(*features, weights["scale"].exp(), weights["bias"])
    ours, _ = siglip_loss(image, text[:, None], weights["scale"].exp(), weights["bias"])
    names = list(weights)
    gradients = [torch.autograd.grad(loss, list(weights.values()), retain_graph=True) for loss in (ours, theirs)]
    return abs(ours.item() - theirs.item()), {name: a - b for name, a, b in zip(names, *gradients, strict=True)}


def test_siglip_on_two_ranks_equals_open_clip_s() -> None:
    for loss, gradients in run_ranks(open_clip_pair_gradients, 2):
        assert loss < 1e-12
        assert max(difference.abs().max().item() for difference in gradients.values()) < 1e-12


def collectives() -> dict[str, object]:
    own = dist.rank()
    uneven = torch.arange(own * 3, dtype=torch.float32).reshape(-1, 1) + 10 * own
    return {
        "rank": own,
        "main": dist.is_main(),
        "broadcast": dist.broadcast_object({"from": own}, source=1),
        "objects": dist.gather_objects(own),
        "sum": dist.all_reduce_sum(own + 1),
        "mean": dist.all_reduce_sum(own + 1) / dist.world_size(),
        "max": dist.all_reduce_max(-own - 1),
        "any": (dist.any_true(own == 1), dist.any_true(False)),
        "gather": dist.gather(uneven).flatten().tolist(),
        "scalars": dist.mean_of_scalars({"a": torch.tensor(own), "b": torch.tensor([2.0])}),
    }


def test_collectives() -> None:
    for rank, found in enumerate(run_ranks(collectives, 2)):
        assert found == {
            "rank": rank,
            "main": rank == 0,
            "broadcast": {"from": 1},
            "objects": [0, 1],
            "sum": 3.0,
            "mean": 1.5,
            "max": -1.0,
            "any": (True, False),
            "gather": [10.0, 11.0, 12.0],
            "scalars": {"a": 0.5, "b": 2.0},
        }


def test_alone_every_collective_is_the_identity() -> None:
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    value = torch.ones(2, requires_grad=True)
    assert dist.gather_with_grad(value) is value
    assert not dist.gather(value).requires_grad
    assert dist.broadcast_object("x") == "x"
    assert dist.mean_of_scalars({"a": torch.tensor(2.0)}) == {"a": 2.0}
    assert dist.all_reduce_sum(3) / dist.world_size() == 3.0
    dist.barrier()


def fail_on_one() -> None:
    if dist.rank() == 1:
        raise RuntimeError("the cause")
    dist.barrier()


def test_a_failing_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match="the cause"):
        run_ranks(fail_on_one, 2)
