"""Task losses over several captions per image, and inverse feature distillation, in fp32 whatever the training dtype.

In a process group each rank computes the loss of its own images against the captions of all ranks. The mean of the
ranks' values is the loss of the whole batch, and averaging parameter gradients over ranks gives its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compt.dist.collectives import gather_with_grad, pass_on, rank, world_size
from compt.errors import ConfigError
from compt.models.scalars import LOSS_TRAITS, Scalar
from compt.recipe.engine import EngineConfig, LossChunk
from compt.recipe.optimizer import Optimizer

ImageToText = Literal["slot", "all"]
Terms = dict[str, Tensor]

ALPHA_EMBED_DIM = 512
"""The embedding width at which the distillation weight alpha is quoted."""


class Loss(ABC):
    """What a task minimises: a scalar of the features of a batch and the model's learned scalars.

    A new loss is a subclass in LOSSES and an entry in `LOSS_TRAITS`, both under `name`.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def of(cls, optimizer: Optimizer, chunk: LossChunk) -> Loss:
        """The loss as a recipe describes it. `chunk`: images of this rank to treat at a time, or `tiled`
        (`engine.loss_chunk`).
        """

    @abstractmethod
    def __call__(self, outputs: Mapping[str, Tensor], *, gather: bool = True) -> tuple[Tensor, Terms]:
        """This rank's value, and the terms to report beside it.

        `outputs`: `image` [b, D] and `text` [b, M, D], features of any length, and each learned scalar by name [1].
        Without `gather` this rank's samples are the whole batch and no other rank takes part. Raises ValueError for
        shapes that do not match.
        """

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """The learned scalars that the loss takes, with their first values and caps."""
        return LOSS_TRAITS[self.name].scalars


class ContrastiveTerms(NamedTuple):
    """Scalars: the two directions and their mean."""

    task: Tensor
    text_to_image: Tensor
    image_to_text: Tensor


class IfdLoss(NamedTuple):
    """Scalars, already times alpha: the two towers and their mean (or sum)."""

    total: Tensor
    image: Tensor
    text: Tensor


def _wide(value: Tensor) -> Tensor:
    """fp32, unless it is wider already."""
    return value if value.dtype == torch.float64 else value.float()


def unit(features: Tensor) -> Tensor:
    """[..., D] -> the same scaled to length one, in fp32 at least."""
    return functional.normalize(_wide(features), dim=-1)


def learned_scalars(model: nn.Module, scalars: Iterable[Scalar]) -> dict[str, Tensor]:
    """The model's learned scalars by name, each [1], exponentiated where the parameter is a logarithm."""
    values = {one: _wide(model.get_parameter(one.name)) for one in scalars}
    return {one.name: (value.exp() if one.log else value).reshape(1) for one, value in values.items()}


def _check(image: Tensor, text: Tensor) -> None:
    if image.ndim != 2 or text.ndim != 3 or image.shape[0] != text.shape[0] or image.shape[1] != text.shape[2]:
        raise ValueError(f"expected image [b, D] and text [b, M, D], got {list(image.shape)} and {list(text.shape)}")


@dataclass(frozen=True)
class ContrastiveLoss(Loss):
    """`contrastive_loss`; reports task, t2v, v2t and logit_scale."""

    name = "contrastive"
    image_to_text: ImageToText = "slot"
    chunk: LossChunk = None

    @classmethod
    def of(cls, optimizer: Optimizer, chunk: LossChunk) -> ContrastiveLoss:
        """The loss as a recipe describes it."""
        return cls(optimizer.image_to_text, chunk)

    def __call__(self, outputs: Mapping[str, Tensor], *, gather: bool = True) -> tuple[Tensor, Terms]:
        """This rank's value, and the terms to report beside it."""
        scale = outputs["logit_scale"]
        parts = contrastive_loss(
            outputs["image"],
            outputs["text"],
            scale,
            image_to_text=self.image_to_text,
            chunk=self.chunk,
            gather=gather,
        )
        directions = {"t2v": parts.text_to_image, "v2t": parts.image_to_text}
        return parts.task, {"task": parts.task, **directions, "logit_scale": scale.reshape(())}


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    image_to_text: ImageToText = "slot",
    chunk: LossChunk = None,
    gather: bool = True,
) -> ContrastiveTerms:
    """Symmetric contrastive loss of N images with M captions each (CoM-PT, section 3.2, with the mean over N*M).

    `image` [b, D], `text` [b, M, D]: this rank's features, normalised here. `scale`: exp(logit_scale), one element.

    text_to_image: each caption t_ij classifies its image: mean over (i, j) of -log softmax_k(s t_ij·v_k)[i].
    image_to_text "slot": v_i classifies its caption among the N of slot j: mean over (i, j) of
    -log softmax_k(s v_i·t_kj)[i]. "all": all N*M captions are candidates of one softmax and image i has M positives:
    mean over (i, j) of -log softmax_kl(s v_i·t_kl)[i, j].

    `chunk`: how many images of this rank to treat at a time. Backward computes their logits again, so that memory is
    chunk * M * N instead of b * M * N numbers. `tiled`: Triton's kernels hold no logits in memory
    (`compt.train.tiled`), on a GPU. Without `gather` this rank's samples are the whole batch and no other
    rank takes part. Raises ValueError for shapes that do not match, and for another `image_to_text`.
    """
    _check(image, text)
    if image_to_text not in get_args(ImageToText):
        raise ValueError(f"image_to_text should be 'slot' or 'all', got {image_to_text!r}")
    rows = image.shape[0]
    # Autocast would compute the logits in half precision, where exp(logit_scale) up to 100 costs their last digits.
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = unit(image), unit(text), _wide(scale).reshape(())
        if chunk == "tiled":
            from compt.train.tiled import softmax_sums  # Triton comes with torch's builds for CUDA alone

            means = softmax_sums(image, text, scale, image_to_text, gather) / (rows * text.shape[1])
            return ContrastiveTerms(means.mean(), means[0], means[1])
        every_image, every_text = (gather_with_grad(image), gather_with_grad(text)) if gather else (image, text)
        first = rank() * rows if gather else 0
        if chunk is None or chunk >= rows:
            sums = _sums(image, text, every_image, every_text, scale, first, image_to_text)
        else:
            parts = []
            for start in range(0, rows, chunk):
                own = slice(start, start + chunk)
                inputs = (image[own], text[own], every_image, every_text, scale, first + start, image_to_text)
                parts.append(checkpoint(_sums, *inputs, use_reentrant=False, preserve_rng_state=False))
            sums = torch.stack(parts).sum(0)
        means = sums / (rows * text.shape[1])
        return ContrastiveTerms(means.mean(), means[0], means[1])


def _sums(
    image: Tensor,
    text: Tensor,
    every_image: Tensor,
    every_text: Tensor,
    scale: Tensor,
    first: int,
    image_to_text: ImageToText,
) -> Tensor:
    """[2]: both directions summed over the c images that start at global row `first` and their M captions."""
    count, captions, width = text.shape
    total = every_image.shape[0]
    own = torch.arange(first, first + count, device=image.device)
    # The scale multiplies the features: on the logits, backward would have to keep them once more.
    logits = (scale * text).reshape(count * captions, width) @ every_image.T
    text_to_image = functional.cross_entropy(logits, own.repeat_interleave(captions), reduction="sum")
    logits = (scale * image) @ every_text.reshape(total * captions, width).T
    if image_to_text == "slot":
        per_slot = logits.reshape(count, total, captions)
        labels = own[:, None].expand(count, captions)
        return torch.stack((text_to_image, functional.cross_entropy(per_slot, labels, reduction="sum")))
    logs = functional.log_softmax(logits, dim=1).reshape(count, total, captions)
    positives = logs[torch.arange(count, device=image.device), own]
    return torch.stack((text_to_image, -positives.sum()))


@dataclass(frozen=True)
class SiglipLoss(Loss):
    """`siglip_loss`; reports task, its shares `positive` and `negative`, logit_scale and logit_bias."""

    name = "siglip"
    chunk: LossChunk = None

    @classmethod
    def of(cls, optimizer: Optimizer, chunk: LossChunk) -> SiglipLoss:
        """The loss as a recipe describes it."""
        return cls(chunk)

    def __call__(self, outputs: Mapping[str, Tensor], *, gather: bool = True) -> tuple[Tensor, Terms]:
        """This rank's value, and the terms to report beside it."""
        scale, bias = outputs["logit_scale"], outputs["logit_bias"]
        task, positive = siglip_loss(outputs["image"], outputs["text"], scale, bias, chunk=self.chunk, gather=gather)
        learned = {"logit_scale": scale.reshape(()), "logit_bias": bias.reshape(())}
        return task, {"task": task, "positive": positive, "negative": task - positive, **learned}


def siglip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, chunk: LossChunk = None, gather: bool = True
) -> tuple[Tensor, Tensor]:
    """Pairwise sigmoid loss of N images with M captions each (SigLIP, arXiv 2303.15343).

    Returns the loss, and the part of it that comes from matching pairs (k = i), which has no gradient.

    `image` [b, D], `text` [b, M, D]: this rank's features, normalised here. `scale`: exp(logit_scale), `bias`:
    logit_bias, one element each.

    Every image meets every caption: with z = 1 where caption t_kj belongs to image v_i (k = i) and z = -1 elsewhere,
    1/(N*M) * sum over (i, k, j) of -log sigmoid(z (s v_i·t_kj + b)). That is the mean over the M slots of the loss of
    one caption an image. No softmax relates the pairs, so candidates of one slot and of all slots give the same value.

    `chunk`: how many images of this rank meet the captions of one rank at a time. The captions travel from rank to
    rank in a ring, with the gradient that each rank adds to them: a rank holds the features of two ranks at most and
    chunk * b * M logits. Backward expects the same factor on every rank. Raises ValueError for shapes that do not
    match.
    """
    _check(image, text)
    with torch.autocast(image.device.type, enabled=False):
        inputs = (unit(image), unit(text), _wide(scale).reshape(()), _wide(bias).reshape(()))
        sums: tuple[Tensor, Tensor] = _SigmoidPairs.apply(*inputs, chunk or len(image), gather)  # type: ignore[no-untyped-call]
        return sums


class _SigmoidPairs(torch.autograd.Function):
    """The sigmoid loss of all pairs, and its share of the matching ones. The forward pass computes the gradients too.

    The loss is a sum over pairs, so a block of captions is done with as soon as this rank's images have met it. If
    autograd computed the gradients, it would keep every block that comes by, and its logits, until backward.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk: int | Literal["tiled"], gather: bool
    ) -> tuple[Tensor, Tensor]:
        rows, captions, width = text.shape
        ranks = world_size() if gather else 1
        by_image, by_scale, by_bias = (torch.zeros_like(value) for value in (image, scale, bias))
        total, positive = torch.zeros_like(scale), torch.zeros_like(scale)
        # [2, b*M, D]: the captions that are here now, and their gradient so far.
        block = torch.stack((text, torch.zeros_like(text))).reshape(2, rows * captions, width)
        for hop in range(ranks):
            here, by_text = block
            if chunk == "tiled":
                from compt.train.tiled import sigmoid_pairs

                wanted = any(ctx.needs_input_grad)
                sums = (total, positive, by_image, by_scale, by_bias, by_text)[: 6 if wanted else 2]
                for held, met in zip(sums, sigmoid_pairs(image, here, scale, bias, hop == 0, wanted), strict=True):
                    held += met
                block = pass_on(block) if ranks > 1 else block
                continue
            for start in range(0, rows, chunk):
                images = image[start : start + chunk]
                logits = ((scale * images) @ here.T).add_(bias)
                at = torch.arange(len(images), device=image.device)
                # Own captions are here only in the first round: -log sigmoid(z x) is softplus(-x) for them.
                own = (at, start + at)
                if hop == 0:
                    logits.view(-1, rows, captions)[own] *= -1
                values = -functional.logsigmoid(-logits)
                total += values.sum()
                if hop == 0:
                    positive += values.view(-1, rows, captions)[own].sum()
                if not any(ctx.needs_input_grad):
                    continue
                slope = logits.sigmoid_()
                if hop == 0:
                    slope.view(-1, rows, captions)[own] *= -1
                products = slope @ here
                by_image[start : start + chunk] += scale * products
                by_scale += (images * products).sum()
                by_bias += slope.sum()
                by_text += slope.T @ (scale * images)
            if ranks > 1:
                block = pass_on(block)
        pairs = rows * captions
        gradients = (by_image, block[1].reshape(text.shape), by_scale, by_bias)
        ctx.save_for_backward(*(gradient / pairs for gradient in gradients))
        positive /= pairs
        ctx.mark_non_differentiable(positive)
        return total / pairs, positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradients[0] * saved for saved in ctx.saved_tensors), None, None)


LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (ContrastiveLoss, SiglipLoss)}
"""The losses that a recipe can name as `optimizer.loss`."""


def loss_of(optimizer: Optimizer, engine: EngineConfig) -> Loss:
    """The loss that a recipe asks for. Raises ConfigError for a tiled loss where Triton is missing."""
    if engine.loss_chunk == "tiled" and find_spec("triton") is None:
        raise ConfigError("engine.loss_chunk: tiled needs Triton (pip install triton), or give a number of rows")
    return LOSSES[optimizer.loss].of(optimizer, engine.loss_chunk)


def feature_distance(teacher: Tensor, student: Tensor, alpha: float, *, scaled: bool = True) -> Tensor:
    """alpha * D/512 * mean over elements of (normalise(teacher) - normalise(student))^2, both [..., D]; a scalar.

    The element mean of unit vectors falls as 1/D, hence the factor D/512: the weight does not depend on the width.
    Without `scaled` the factor is left out.
    """
    with torch.autocast(student.device.type, enabled=False):
        distance = functional.mse_loss(unit(student), unit(teacher.detach()))
        return alpha * (teacher.shape[-1] / ALPHA_EMBED_DIM if scaled else 1.0) * distance


def ifd_loss(
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_image: Tensor,
    student_text: Tensor,
    *,
    alpha: float = 500.0,
    reference_compatible: bool = False,
) -> IfdLoss:
    """Inverse feature distillation (CoM-PT, section 3.2) of this rank's samples.

    Image features [b, D], text features [b, M, D], the student's already projected to the teacher's width; normalised
    here. The total is (image + text) / 2 as in the paper. With `reference_compatible` it is image + text without the
    factor D/512, as in the authors' code.
    """
    image = feature_distance(teacher_image, student_image, alpha, scaled=not reference_compatible)
    text = feature_distance(teacher_text, student_text, alpha, scaled=not reference_compatible)
    total = image + text
    return IfdLoss(total if reference_compatible else total / 2, image, text)
