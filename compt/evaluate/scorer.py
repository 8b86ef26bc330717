"""Scores models as a recipe's evaluation section says, during training and at its end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compt.data.index import Index, open_index
from compt.data.loaders import fixed_caption_batches
from compt.data.remote import Cache
from compt.dist import collectives as dist
from compt.engines.base import COMPUTE_DTYPES
from compt.evaluate.contact import save_caption_sheet, save_contact_sheet
from compt.evaluate.encoder import Encoder
from compt.evaluate.retrieval import RetrievalResult
from compt.evaluate.sets import evaluate_set, open_set
from compt.evaluate.task import LONG, EvalSettings
from compt.evaluate.validation import validation_loss
from compt.evaluate.zeroshot import ZeroShotResult
from compt.models.clip import ClipModel
from compt.models.preprocess import Preprocess
from compt.recipe.schema import Recipe
from compt.train.losses import loss_of


def index_folder_of(recipe: Recipe, base: Path) -> Path | None:
    """The folder of all indexes of a recipe; None for folders beside the shards."""
    return base / recipe.data.index_dir if recipe.data.index_dir else None


def open_held_out(recipe: Recipe, base: Path) -> Index:
    """The index of the validation shards, with captions read as in training. Raises DataError."""
    folder, columns = index_folder_of(recipe, base), recipe.data.caption_columns or ()
    cache = Cache.of(recipe.data, base)
    return open_index(recipe.evaluation.validation, base, folder, columns=columns, cache=cache)


@dataclass(frozen=True)
class Scorer:
    """Scores models as `recipe` says; relative paths start at `base`. All ranks call its methods together."""

    recipe: Recipe
    base: Path

    @property
    def settings(self) -> EvalSettings:
        """How sets are evaluated."""
        recipe = self.recipe
        return EvalSettings(
            Preprocess(recipe.data.mean, recipe.data.std),
            base=self.base,
            batch=recipe.evaluation.batch,
            workers=recipe.engine.workers,
            dtype=COMPUTE_DTYPES[recipe.optimizer.precision],
            index_dir=index_folder_of(recipe, self.base),
            columns=recipe.data.caption_columns or (),
            max_bad_share=recipe.data.max_bad_share,
            cache=Cache.of(recipe.data, self.base),
        )

    @property
    def looks_on(self) -> bool:
        """Whether there is something to score before the end of training."""
        evaluation = self.recipe.evaluation
        return bool(evaluation.validation) or any(item.role == "select" for item in evaluation.sets)

    def held_out_loss(self, model: ClipModel) -> dict[str, float]:
        """{"validation_loss": …}, the task loss on the validation shards; {} where the recipe has none."""
        recipe, settings = self.recipe, self.settings
        if not recipe.evaluation.validation:
            return {}
        index = dist.on_all(lambda: open_held_out(recipe, self.base))
        batches = fixed_caption_batches(
            index,
            batch=recipe.optimizer.batch,
            image_size=model.spec.image_size,
            captions=recipe.data.captions,
            context_length=model.spec.context_length,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )
        encoder = Encoder(model, settings.preprocess, settings.dtype)
        return {"validation_loss": validation_loss(encoder, batches, loss_of(recipe.optimizer, recipe.engine))}

    def during_training(self, model: ClipModel) -> dict[str, float]:
        """What may be looked at before the end of training: the validation loss and the scores on the `select` sets."""
        scores = self.held_out_loss(model)
        for item in self.recipe.evaluation.sets:
            if item.role == "select":
                result = evaluate_set(model, item, self.settings)
                scores |= {f"{item.name}/{key}": value for key, value in result.headline().items()}
        return scores

    def at_the_end(self, model: ClipModel, folder: Path) -> dict[str, Any]:
        """Score every set. The answers to single samples, and the images of a contact sheet, go to `folder`."""
        evaluation, settings = self.recipe.evaluation, self.settings
        scores: dict[str, Any] = {}
        captioned = next((item for item in evaluation.sets if item.task == RetrievalResult.task), None)
        for item in evaluation.sets:
            result = evaluate_set(model, item, settings)
            dist.on_main(functools.partial(result.save, folder))
            scores[item.name] = {key: value for key, value in result.to_dict().items() if key not in LONG}
            save: Callable[..., None] | None = None
            if item.name == evaluation.contact_sheet and isinstance(result, ZeroShotResult):
                save = save_contact_sheet
            elif evaluation.contact_sheet and item is captioned and isinstance(result, RetrievalResult):
                save = save_caption_sheet
            if save:
                samples = open_set(item, settings).data.samples
                dist.on_main(functools.partial(save, folder, result, samples, model.spec.image_size))
        return scores
