"""The contrastive loss on held-out pairs: comparable between models, as nothing is drawn and nothing distilled."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from compt import dist
from compt.data.records import Batch
from compt.errors import DataError
from compt.evaluate.common import Encoder
from compt.losses import ImageToText


def local_contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, image_to_text: ImageToText = "slot") -> Tensor:
    """`losses.contrastive_loss` of one whole batch on one rank, without collectives: ranks may have unequal numbers.

    Unit features [N, D] and [N, M, D]; `scale` is exp(logit_scale).
    """
    n, captions, width = text.shape
    logits = scale * (image @ text.reshape(n * captions, width).T)
    own = torch.arange(n, device=image.device)
    text_to_image = functional.cross_entropy(logits.T, own.repeat_interleave(captions))
    if image_to_text == "slot":
        right = functional.cross_entropy(logits.view(n, n, captions), own[:, None].expand(n, captions))
    else:
        right = -functional.log_softmax(logits, dim=1).view(n, n, captions)[own, own].mean()
    return (text_to_image + right) / 2


def validation_loss(encoder: Encoder, batches: Iterable[Batch], image_to_text: ImageToText = "slot") -> float:
    """Mean over images of the loss of fixed batches, of which every rank has some (`fixed_caption_batches`).

    The loss depends on the size of a batch, which gives the number of wrong candidates: compare equal ones only.
    Raises DataError, on every rank, when a batch cannot be read or there is none.
    """
    total, images, fault = 0.0, 0, ""
    with encoder.frozen():
        try:
            for batch in batches:
                image = encoder.images(batch.images)
                captions = batch.tokens.shape[1]
                text = encoder.texts(batch.tokens.flatten(0, 1)).view(len(image), captions, -1)
                scale = encoder.model.logit_scale.float().exp().reshape(())  # type: ignore[operator]
                with torch.autocast(image.device.type, enabled=False):
                    total += float(local_contrastive_loss(image, text, scale, image_to_text)) * len(image)
                images += len(image)
        except DataError as error:
            fault = str(error)
    faults = [text for text in dist.gather_objects(fault) if text]
    if faults:
        raise DataError(faults[0])
    images = int(dist.all_reduce_sum(images))
    if not images:
        raise DataError("the validation loss has no batch to be computed on")
    return dist.all_reduce_sum(total) / images
