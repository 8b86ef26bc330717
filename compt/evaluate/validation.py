"""The task loss on held-out pairs: comparable between models of one loss, since nothing is drawn or distilled."""

from __future__ import annotations

from collections.abc import Iterable

from compt.data.batch import Batch
from compt.dist import collectives as dist
from compt.dist.watch.thread import alive
from compt.errors import DataError
from compt.evaluate.encoder import Encoder
from compt.train.losses import ContrastiveLoss, Loss, learned_scalars


def validation_loss(encoder: Encoder, batches: Iterable[Batch], loss: Loss | None = None) -> float:
    """Mean over images of the loss of fixed batches (`fixed_caption_batches`), which the ranks share out.

    `loss`: None for the contrastive one. A loss depends on the number of wrong candidates, and so on the batch size:
    compare values of equal batches only.
    Raises DataError, on every rank, when a batch cannot be read or there is none.
    """
    loss = loss or ContrastiveLoss()

    def sums() -> tuple[float, int]:
        total, images = 0.0, 0
        for batch in batches:
            alive()
            image = encoder.images(batch.images)
            captions = batch.tokens.shape[1]
            text = encoder.texts(batch.tokens.flatten(0, 1)).view(len(image), captions, -1)
            learned = learned_scalars(encoder.model, loss.scalars)
            # Ranks may have unequal numbers of batches, so each value is of this rank's batch alone.
            value, _ = loss({"image": image, "text": text, **learned}, gather=False)
            total += float(value) * len(image)
            images += len(image)
        return total, images

    with encoder.frozen():
        total, own = dist.on_all(sums)
    images = int(dist.all_reduce_sum(own))
    if not images:
        raise DataError("the validation loss has no batch to be computed on")
    return dist.all_reduce_sum(total) / images
