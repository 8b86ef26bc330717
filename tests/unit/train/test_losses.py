"""The losses against plain loops in double precision, on one process."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.nn import functional

from compt.models.scalars import LOSS_TRAITS, SCALAR_NAMES
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.losses import (
    LOSSES,
    ImageToText,
    contrastive_loss,
    feature_distance,
    ifd_loss,
    loss_of,
    siglip_loss,
)


def oracle(image: Tensor, text: Tensor, scale: Tensor, image_to_text: ImageToText) -> tuple[Tensor, Tensor, Tensor]:
    """Section 3.2 of the paper written as loops: (task, text to image, image to text)."""
    n, m, _ = text.shape
    v = [image[i] / image[i].norm() for i in range(n)]
    t = [[text[i, j] / text[i, j].norm() for j in range(m)] for i in range(n)]
    t2v = image.new_zeros(())
    v2t = image.new_zeros(())
    for i in range(n):
        for j in range(m):
            to_images = torch.stack([scale * (t[i][j] * v[k]).sum() for k in range(n)])
            t2v = t2v - to_images[i] + torch.log(to_images.exp().sum())
            if image_to_text == "slot":
                candidates = [scale * (v[i] * t[k][j]).sum() for k in range(n)]
            else:
                candidates = [scale * (v[i] * t[k][slot]).sum() for k in range(n) for slot in range(m)]
            v2t = v2t - scale * (v[i] * t[i][j]).sum() + torch.log(torch.stack(candidates).exp().sum())
    t2v, v2t = t2v / (n * m), v2t / (n * m)
    return (t2v + v2t) / 2, t2v, v2t


def inputs(n: int = 6, m: int = 3, d: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n, d, generator=generator, dtype=torch.float64)
    text = torch.randn(n, m, d, generator=generator, dtype=torch.float64)
    scale = torch.tensor([7.5], dtype=torch.float64)
    return tuple(value.to(dtype).requires_grad_() for value in (image, text, scale))  # type: ignore[return-value]


@pytest.mark.parametrize("image_to_text", ["slot", "all"])
@pytest.mark.parametrize("chunk", [None, 1, 4, 6, 99])
@pytest.mark.parametrize("captions", [1, 3])
def test_contrastive_equals_the_loops(image_to_text: ImageToText, chunk: int | None, captions: int) -> None:
    values = inputs(m=captions)
    ours = contrastive_loss(*values, image_to_text=image_to_text, chunk=chunk)
    expected = oracle(*values, image_to_text)
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected).reshape(3), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(ours.task, values)
    for gradient, correct in zip(gradients, torch.autograd.grad(expected[0], values), strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-10, atol=1e-12)


def test_uniform_features_give_the_logarithm_of_the_candidates() -> None:
    image, text, scale = torch.ones(5, 4), torch.ones(5, 2, 4), torch.tensor(10.0)
    slot = contrastive_loss(image, text, scale)
    whole = contrastive_loss(image, text, scale, image_to_text="all")
    assert slot.image_to_text.item() == pytest.approx(math.log(5), abs=1e-5)
    assert slot.text_to_image.item() == pytest.approx(math.log(5), abs=1e-5)
    assert whole.image_to_text.item() == pytest.approx(math.log(10), abs=1e-5)


def test_half_precision_features_are_treated_in_fp32() -> None:
    values = inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = contrastive_loss(*values)
        distance = feature_distance(values[1].detach() + 1, values[1], 500.0)
    exact = contrastive_loss(*(value.double() for value in values))
    assert ours.task.dtype == distance.dtype == torch.float32
    torch.testing.assert_close(ours.task.double(), exact.task, rtol=1e-6, atol=1e-6)


def test_chunks_keep_memory_linear() -> None:
    """What autograd keeps for backward: one row of logits per caption and image when dense, none when in chunks."""

    def kept(chunk: int | None) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        image, text, scale = inputs(n=64, m=2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            contrastive_loss(image, text, scale, chunk=chunk)
        return max(sizes)

    assert kept(None) == 64 * 2 * 64
    assert kept(8) <= 64 * 2 * 8


@pytest.mark.parametrize(
    ("image", "text"), [((4, 8), (4, 8)), ((4, 8), (3, 2, 8)), ((4, 8), (4, 2, 7)), ((4, 1, 8), (4, 1, 8))]
)
def test_mismatching_shapes_are_refused(image: tuple[int, ...], text: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected image"):
        contrastive_loss(torch.ones(image), torch.ones(text), torch.ones(1))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("width", [128, 512, 768])
def test_distillation_equals_the_loops(reference: bool, width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = ((4, width), (4, 2, width), (4, width), (4, 2, width))
    features = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    ours = ifd_loss(*features, alpha=500.0, reference_compatible=reference)
    towers = []
    for teacher, student in ((features[0], features[2]), (features[1], features[3])):
        pairs = list(zip(teacher.reshape(-1, width).detach(), student.reshape(-1, width), strict=True))
        squares = [((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in pairs]
        factor = 1.0 if reference else width / 512  # the authors' code has no factor
        towers.append(500.0 * factor * torch.stack(squares).sum() / (len(pairs) * width))
    expected = (towers[0] + towers[1]) / (1 if reference else 2)
    torch.testing.assert_close(torch.stack(ours), torch.stack((expected, *towers)), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(ours.total, features[2:])
    for gradient, correct in zip(gradients, torch.autograd.grad(expected, features[2:]), strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-10, atol=1e-12)


def test_distillation_weight_does_not_depend_on_the_width() -> None:
    opposite = [feature_distance(torch.ones(1, width), -torch.ones(1, width), 500.0).item() for width in (64, 512, 768)]
    assert opposite == pytest.approx([500.0 * 4 / 512] * 3, rel=1e-5)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = torch.randn(3, 4, requires_grad=True)
    student = torch.randn(3, 4, requires_grad=True)
    feature_distance(teacher, student, 1.0).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("image_to_text", ["slot", "all"])
def test_without_gathering_a_rank_is_alone(monkeypatch, image_to_text):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(9, 5, generator=generator), torch.randn(9, 3, 5, generator=generator)
    alone = contrastive_loss(image, text, torch.tensor(14.0), image_to_text=image_to_text)

    def refuse(_):
        raise AssertionError("a collective")

    monkeypatch.setattr("compt.train.losses.gather_with_grad", refuse)
    monkeypatch.setattr("compt.train.losses.rank", lambda: 3)
    found = contrastive_loss(image, text, torch.tensor(14.0), image_to_text=image_to_text, gather=False)
    assert [float(value) for value in found] == [float(value) for value in alone]
    with pytest.raises(AssertionError, match="a collective"):
        contrastive_loss(image, text, torch.tensor(14.0))


def pairs_oracle(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of SigLIP written as loops over images and captions: (whole, share of the matching pairs)."""
    n, m, _ = text.shape
    v = [image[i] / image[i].norm() for i in range(n)]
    t = [[text[i, j] / text[i, j].norm() for j in range(m)] for i in range(n)]
    whole, matching = image.new_zeros(()), image.new_zeros(())
    for i in range(n):
        for k in range(n):
            for j in range(m):
                z = 1 if i == k else -1
                value = torch.log1p(torch.exp(-z * (scale * (v[i] * t[k][j]).sum() + bias))).reshape(())
                whole = whole + value
                matching = matching + (value if i == k else 0)
    return whole / (n * m), matching / (n * m)


def pair_inputs(m: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    image, text, scale = inputs(m=m, dtype=dtype)
    return image, text, scale, torch.tensor([-4.5], dtype=dtype, requires_grad=True)


def test_candidates_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="image_to_text should be 'slot' or 'all', got 'slots'"):
        contrastive_loss(*inputs(), image_to_text="slots")  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [None, 1, 4, 99])
@pytest.mark.parametrize("captions", [1, 3])
def test_siglip_equals_the_loops(chunk: int | None, captions: int) -> None:
    values = pair_inputs(captions)
    ours, expected = siglip_loss(*values, chunk=chunk), pairs_oracle(*values)
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert not ours[1].requires_grad
    gradients = torch.autograd.grad(3 * ours[0], values)
    for gradient, correct in zip(gradients, torch.autograd.grad(3 * expected[0], values), strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("captions", [1, 3])
def test_siglip_is_the_mean_of_open_clip_s_over_the_slots(captions: int) -> None:
    image, text, scale, bias = values = pair_inputs(captions)
    unit_image, unit_text = (functional.normalize(value, dim=-1) for value in (image, text))
    slots = [SigLipLoss()(unit_image, unit_text[:, slot], scale, bias) for slot in range(captions)]
    expected, ours = torch.stack(slots).mean(), siglip_loss(*values)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(ours, values)
    for gradient, correct in zip(gradients, torch.autograd.grad(expected, values), strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-10, atol=1e-12)


def test_siglip_treats_half_precision_in_fp32_and_needs_no_gradient() -> None:
    values = pair_inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = siglip_loss(*values)[0]
        with torch.no_grad():
            alone = siglip_loss(*values, chunk=2)[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), siglip_loss(*(value.double() for value in values))[0])
    torch.testing.assert_close(alone, ours.detach())
    assert {value.dtype for value in torch.autograd.grad(ours, values)} == {torch.bfloat16}


def test_siglip_keeps_features_and_gradients_but_no_logits() -> None:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    image, text, scale = inputs(n=64, m=2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        siglip_loss(image, text, scale, torch.zeros(1))
    assert max(sizes) == text.numel()


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_object_is_its_function(name: str, chunk: int | None) -> None:
    image, text, scale, bias = (value.detach() for value in pair_inputs())
    loss = loss_of(Optimizer(loss=name), EngineConfig(loss_chunk=chunk))
    value, terms = loss({"image": image, "text": text, "logit_scale": scale, "logit_bias": bias}, gather=False)
    expected = (
        contrastive_loss(image, text, scale)[0] if name == "contrastive" else siglip_loss(image, text, scale, bias)[0]
    )
    torch.testing.assert_close(value, expected)
    assert {"task", *(one.name for one in loss.scalars)} <= terms.keys()
    shares = ("positive", "negative") if name == "siglip" else ("t2v", "v2t")
    torch.testing.assert_close(sum(terms[share] for share in shares), value * (1 if name == "siglip" else 2))


def test_every_loss_has_its_traits() -> None:
    assert LOSSES.keys() == LOSS_TRAITS.keys()
    for name, traits in LOSS_TRAITS.items():
        names = [scalar.name for scalar in traits.scalars]
        assert LOSSES[name].name == name
        assert set(names) <= set(SCALAR_NAMES)
        assert names[0] == "logit_scale"
