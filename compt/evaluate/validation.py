"""The contrastive loss on held-out pairs: comparable between models, as nothing is drawn and nothing distilled."""

from __future__ import annotations

from collections.abc import Iterable

from compt.data.batch import Batch
from compt.dist import collectives as dist
from compt.dist.watch.thread import alive
from compt.errors import DataError
from compt.evaluate.encoder import Encoder
from compt.train.losses import ImageToText, contrastive_loss


def validation_loss(encoder: Encoder, batches: Iterable[Batch], image_to_text: ImageToText = "slot") -> float:
    """Mean over images of the loss of fixed batches, of which every rank has some (`fixed_caption_batches`).

    The loss depends on the size of a batch, which gives the number of wrong candidates: compare equal ones only.
    Raises DataError, on every rank, when a batch cannot be read or there is none.
    """
    total, images, fault = 0.0, 0, ""
    with encoder.frozen():
        try:
            for batch in batches:
                alive()
                image = encoder.images(batch.images)
                captions = batch.tokens.shape[1]
                text = encoder.texts(batch.tokens.flatten(0, 1)).view(len(image), captions, -1)
                scale = encoder.model.logit_scale.float().exp().reshape(())  # type: ignore[operator]
                # Ranks may have unequal numbers of batches, so that each loss is one rank's own.
                loss = contrastive_loss(image, text, scale, image_to_text=image_to_text, gather=False)
                total += float(loss.task) * len(image)
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
