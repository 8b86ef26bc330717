"""Tasks on one process: outputs, reports, projectors, the frozen teacher."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compt.data.tokens import CaptionTokens, pad
from compt.errors import ConfigError
from compt.models.clip import ClipModel, build, caption_lengths
from compt.models.presets import PACKED, VOCAB_SIZE, ModelSpec, resolve
from compt.train.losses import contrastive_loss, ifd_loss
from compt.train.task import ClipTask, DistillTask, StudentModule, cut_captions, fit_images, reduce_report, surrogate

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tiny(embed_dim: int = 16) -> ModelSpec:
    return resolve(
        "vit_pico",
        {"image_size": 16, "depth": 1, "context_length": 10, "vocab_size": 64, "embed_dim": embed_dim},
    )


def model(embed_dim: int = 16, seed: int = 0) -> ClipModel:
    return build(tiny(embed_dim), seed=seed)


def batch(samples: int = 8, captions: int = 2) -> tuple[Tensor, Tensor]:
    """Random images, and captions of 3 to 10 tokens that end with the highest number."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(samples, 3, 16, 16, generator=generator)
    tokens = torch.randint(1, 62, (samples, captions, 10), generator=generator)
    lengths = torch.randint(3, 11, (samples, captions, 1), generator=generator)
    positions = torch.arange(10)
    tokens = tokens.masked_fill(positions >= lengths, 0).masked_fill(positions == lengths - 1, 63)
    return images, tokens


def distill(student: int = 16, teacher: int = 24, **settings: float) -> DistillTask:
    return DistillTask(model(student), model(teacher, seed=1), **settings)  # type: ignore[arg-type]


def test_outputs_and_their_shapes() -> None:
    images, tokens = batch(4)
    task = distill()
    outputs = task.module(images, tokens)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "image": (4, 16),
        "text": (4, 2, 16),
        "logit_scale": (1,),
        "image_projected": (4, 24),
        "text_projected": (4, 2, 24),
    }
    assert outputs["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
    alone = task.model.encode_text(tokens[3, 1:2])
    torch.testing.assert_close(outputs["text"][3, 1:2], alone)


def test_text_buckets_and_known_lengths_change_nothing() -> None:
    images, tokens = batch()
    student = model()
    plain = StudentModule(student)(images, tokens)["text"]
    lengths = tokens.argmax(dim=-1) + 1
    for buckets in (2, 3, PACKED):
        torch.testing.assert_close(StudentModule(student, text_buckets=buckets)(images, tokens, lengths)["text"], plain)


def test_projectors_exist_only_between_different_widths() -> None:
    same, different = distill(16, 16), distill(16, 24)
    assert {name.split(".")[0] for name in same.module.state_dict()} == {"model"}
    added = set(different.module.state_dict()) - set(same.module.state_dict())
    assert added == {f"projector.{tower}.{part}" for tower in ("image", "text") for part in ("weight", "bias")}
    assert not any("projector" in name for name in different.model.state_dict())


def test_projectors_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = DistillTask(model(), model(24), seed=3).module.projector.state_dict()
    torch.manual_seed(2)
    again = DistillTask(model(), model(24), seed=3).module.projector.state_dict()
    other = DistillTask(model(), model(24), seed=4).module.projector.state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
    assert not torch.equal(first["image.weight"], first["text.weight"])


def test_report_of_the_plain_task() -> None:
    images, tokens = batch()
    task = ClipTask(model())
    outputs = task.module(images, tokens)
    loss, report = task.loss(outputs, task.targets(images, tokens))
    assert set(report) == {"loss", "task", "t2v", "v2t", "logit_scale"}
    assert not any(value.requires_grad for value in report.values())
    torch.testing.assert_close(loss.detach(), (report["t2v"] + report["v2t"]) / 2)
    expected = contrastive_loss(outputs["image"], outputs["text"], outputs["logit_scale"]).task
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("reference", [False, True])
def test_report_of_distillation(reference: bool) -> None:
    images, tokens = batch()
    task = distill(reference_compatible=reference)
    outputs, targets = task.module(images, tokens), task.targets(images, tokens)
    loss, report = task.loss(outputs, targets)
    towers = report["ifd_image"] + report["ifd_text"]
    torch.testing.assert_close(report["ifd"], towers if reference else towers / 2)
    torch.testing.assert_close(loss.detach(), report["task"] + report["ifd"])
    torch.testing.assert_close(report["r"], report["ifd"] / report["task"])
    projected = (outputs["image_projected"], outputs["text_projected"])
    expected = ifd_loss(targets["image"], targets["text"], *projected, reference_compatible=reference)
    assert torch.equal(report["ifd"], expected.total.detach())
    assert reduce_report(report)["r"] == pytest.approx(report["r"].item(), rel=1e-5)


def test_a_copy_of_the_teacher_has_no_distance_to_it() -> None:
    images, tokens = batch()
    task = DistillTask(model(), model())
    _, report = task.loss(task.module(images, tokens), task.targets(images, tokens))
    assert report["ifd"].item() == pytest.approx(0.0, abs=1e-6)
    assert report["task"].item() > 1.0


def test_the_teacher_is_frozen_and_outside() -> None:
    images, tokens = batch()
    teacher = model(24)
    teacher.train()
    task = DistillTask(model(), teacher, teacher_dtype=torch.bfloat16)
    loss, _ = task.loss(task.module(images, tokens), task.targets(images, tokens))
    loss.backward()
    assert not teacher.training
    own = {id(parameter) for parameter in task.module.parameters()}
    for parameter in teacher.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert id(parameter) not in own
    assert all(parameter.grad is not None for parameter in task.module.parameters())


class Letters:
    """One token a letter."""

    sot_token_id, eot_token_id = 62, 63

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 1 for letter in text]


def test_captions_are_cut_as_the_tokenizer_cuts_them() -> None:
    texts = ["abcdefgh", "abc", "zzzzzz", "xyzxy", "", "abcd"]
    rows = {length: [CaptionTokens(length, Letters()).ids(text) for text in texts] for length in (10, 6)}
    whole, short = (pad(rows[length], 2) for length in (10, 6))
    cut, lengths = cut_captions(whole, caption_lengths(whole), 6)
    assert torch.equal(cut, short)
    assert lengths is not None
    assert torch.equal(lengths, caption_lengths(short))
    assert int(whole.max(dim=-1).values.min()) == 63, "the batch itself is left as it was"
    assert cut_captions(short, None, 6) == (short, None)


def test_a_teacher_of_a_shorter_context_reads_what_fits() -> None:
    images, tokens = batch()
    teacher = build(replace(tiny(24), context_length=6), seed=1)
    alone = teacher.encode_text(cut_captions(tokens, None, 6)[0].reshape(-1, 6))
    for buckets, lengths in ((1, None), (2, caption_lengths(tokens)), (PACKED, None)):
        task = DistillTask(model(), teacher, text_buckets=buckets)
        targets = task.targets(images, tokens, lengths)
        torch.testing.assert_close(targets["text"].reshape(len(alone), -1), alone)
    loss, report = task.loss(task.module(images, tokens), targets)
    assert loss.isfinite()
    assert report["ifd"] > 0


def resized(images: Tensor, size: int) -> Tensor:
    """Pillow's own resize, in fp32, of every channel."""
    planes = [
        np.asarray(Image.fromarray(plane.numpy(), mode="F").resize((size, size), Image.Resampling.BICUBIC))
        for plane in images.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, images.shape[:2])


@pytest.mark.parametrize("size", [8, 12, 24, 40])
def test_images_fit_a_teacher_as_pillow_would_resize_them(size: int) -> None:
    images, _ = batch(2)
    fitted = fit_images(images, size)
    # Pillow takes -0.5 for the free constant of the bicubic kernel; without antialiasing torch takes -0.75.
    torch.testing.assert_close(fitted, resized(images, size), rtol=0, atol=2e-5)
    assert fit_images(images, 16) is images
    assert fit_images(images.bfloat16(), size).dtype == torch.float32


def test_fitting_images_does_not_mind_normalised_colours() -> None:
    mean, std = torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 0.5
    images, _ = batch(2)
    torch.testing.assert_close(fit_images((images - mean) / std, 12), (fit_images(images, 12) - mean) / std)


@pytest.mark.parametrize("sizes", [{"image_size": 8}, {"image_size": 32, "patch_size": 16}, {"image_size": 24}])
def test_a_teacher_for_images_of_another_size_sees_the_same_ones(sizes: dict[str, int]) -> None:
    images, tokens = batch()
    teacher = build(replace(tiny(24), **sizes), seed=1)
    task = DistillTask(model(), teacher)
    targets = task.targets(images, tokens)
    torch.testing.assert_close(targets["image"], teacher.encode_image(resized(images, sizes["image_size"])), **CLOSE)
    assert torch.equal(targets["text"], DistillTask(model(), build(tiny(24), seed=1)).targets(images, tokens)["text"])
    loss, report = task.loss(task.module(images, tokens), targets)
    loss.backward()
    assert report["ifd"] > 0


def test_a_teacher_of_a_smaller_vocabulary_is_fed_the_tokenizer_s_tokens_alone() -> None:
    grown, _ = build(replace(tiny(), vocab_size=VOCAB_SIZE + 8)), batch()
    DistillTask(grown, build(replace(tiny(), vocab_size=VOCAB_SIZE)))
    with pytest.raises(ConfigError, match=f"'vit_pico' knows 64 tokens, too few to teach .* of {VOCAB_SIZE + 8}"):
        DistillTask(grown, model())


def test_logit_scale_is_capped_at_a_hundred() -> None:
    task = ClipTask(model())
    assert {name: math.exp(most) for name, most in task.caps.items()} == {"model.logit_scale": pytest.approx(100.0)}
    assert task.module.get_parameter("model.logit_scale") is task.model.logit_scale


def test_surrogate_shares_the_gradient_of_the_scale() -> None:
    scale = torch.tensor([2.0], requires_grad=True)
    image = torch.ones(2, 3, requires_grad=True)
    gradients = {"image": torch.full((2, 3), 0.5), "logit_scale": torch.tensor([8.0])}
    surrogate({"image": image, "logit_scale": scale}, gradients, 4).backward()
    assert scale.grad is not None
    assert scale.grad.item() == 2.0
    assert image.grad is not None
    assert torch.equal(image.grad, gradients["image"])
