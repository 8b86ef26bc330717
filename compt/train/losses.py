"""Contrastive loss over several captions and inverse feature distillation, in fp32 whatever the training dtype.

In a process group each rank computes the rows of its own samples against the features of all ranks. The mean of the
ranks' values is the loss of the whole batch, and averaging parameter gradients over ranks gives its gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compt.dist.collectives import gather_with_grad, rank

ImageToText = Literal["slot", "all"]

ALPHA_EMBED_DIM = 512
"""The embedding width at which the distillation weight alpha is quoted."""


class ContrastiveLoss(NamedTuple):
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


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    image_to_text: ImageToText = "slot",
    chunk: int | None = None,
    gather: bool = True,
) -> ContrastiveLoss:
    """Symmetric contrastive loss of N images with M captions each (CoM-PT, section 3.2, with the mean over N*M).

    `image` [b, D], `text` [b, M, D]: this rank's features, normalised here. `scale`: exp(logit_scale), one element.

    text_to_image: each caption t_ij classifies its image: mean over (i, j) of -log softmax_k(s t_ij·v_k)[i].
    image_to_text "slot": v_i classifies its caption among the N of slot j: mean over (i, j) of
    -log softmax_k(s v_i·t_kj)[i]. "all": all N*M captions are candidates of one softmax and image i has M positives:
    mean over (i, j) of -log softmax_kl(s v_i·t_kl)[i, j].

    `chunk`: how many images of this rank to treat at a time. Their logits are computed again in backward, so that
    memory is chunk * M * N instead of b * M * N numbers. Without `gather` this rank's samples are the whole batch and
    no other rank takes part. Raises ValueError on mismatching shapes.
    """
    if image.ndim != 2 or text.ndim != 3 or image.shape[0] != text.shape[0] or image.shape[1] != text.shape[2]:
        raise ValueError(f"expected image [b, D] and text [b, M, D], got {list(image.shape)} and {list(text.shape)}")
    if image_to_text not in ("slot", "all"):
        raise ValueError(f"image_to_text is 'slot' or 'all', not {image_to_text!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is at least 1, not {chunk}")
    rows = image.shape[0]
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = unit(image), unit(text), _wide(scale).reshape(())
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
        return ContrastiveLoss(means.mean(), means[0], means[1])


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
    # The scale goes on the features: on the logits, backward would have to keep them once more.
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


def feature_distance(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """alpha * D/512 * mean over elements of (normalise(teacher) - normalise(student))^2, both [..., D]; a scalar.

    The element mean of unit vectors falls as 1/D, hence the factor: the weight does not depend on the width.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"teacher features {list(teacher.shape)} and student features {list(student.shape)} differ")
    with torch.autocast(student.device.type, enabled=False):
        distance = functional.mse_loss(unit(student), unit(teacher.detach()))
        return alpha * teacher.shape[-1] / ALPHA_EMBED_DIM * distance


def ifd_loss(
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_image: Tensor,
    student_text: Tensor,
    *,
    alpha: float = 500.0,
    average_towers: bool = True,
) -> IfdLoss:
    """Inverse feature distillation (CoM-PT, section 3.2) of this rank's samples.

    Image features [b, D], text features [b, M, D], the student's already projected to the teacher's width; normalised
    here. The total is (image + text) / 2 as in the paper, or image + text as in the public code.
    """
    image = feature_distance(teacher_image, student_image, alpha)
    text = feature_distance(teacher_text, student_text, alpha)
    total = image + text
    return IfdLoss(total / 2 if average_towers else total, image, text)
