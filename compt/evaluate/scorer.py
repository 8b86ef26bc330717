"""Scores models as a recipe's evaluation section says, during training and at its end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compt.data.find import expand_patterns
from compt.data.index import Index, open_index
from compt.data.loaders import EVALUATED_SHARDS, fixed_caption_batches
from compt.data.remote import Cache, bytes_of
from compt.dist import collectives as dist
from compt.engines.base import COMPUTE_DTYPES
from compt.evaluate.contact import save_caption_sheet, save_contact_sheet
from compt.evaluate.encoder import Encoder
from compt.evaluate.retrieval import RetrievalResult
from compt.evaluate.sets import evaluate_set, open_set
from compt.evaluate.task import LONG, EvalSettings, Result
from compt.evaluate.validation import validation_loss
from compt.evaluate.zeroshot import ZeroShotResult
from compt.models.clip import ClipModel
from compt.models.preprocess import Preprocess
from compt.recipe.schema import EvalSet, Recipe
from compt.train.losses import loss_of


def index_folder_of(recipe: Recipe, base: Path) -> Path | None:
    """The folder of all indexes of a recipe; None for folders beside the shards."""
    return base / recipe.data.index_dir if recipe.data.index_dir else None


def open_held_out(recipe: Recipe, base: Path, cache: Cache | None = None) -> Index:
    """The index of the validation shards, with captions read as in training. Raises DataError."""
    folder, columns = index_folder_of(recipe, base), recipe.data.caption_columns or ()
    cache = cache or Cache.of(recipe.data, base)
    return open_index(recipe.evaluation.validation, base, folder, columns=columns, cache=cache)


def ask_once(cache: Cache, open_it: Callable[[], object]) -> None:
    """Let rank 0 open data, and give the others what stores have answered to it. All ranks call this."""
    dist.on_main(open_it)
    if cache.answers is not None:
        cache.answers.update(dist.broadcast_object(cache.answers))


def _remote(patterns: Sequence[str] | None) -> list[str]:
    return [one for one in patterns or () if "://" in one]


@dataclass(frozen=True)
class Scorer:
    """Scores models as `recipe` says; relative paths start at `base`. All ranks call its methods together.

    It asks the stores about each shard once: later looks read the shards of the first.
    """

    recipe: Recipe
    base: Path

    @functools.cached_property
    def cache(self) -> Cache:
        """The shards in object storage."""
        return Cache.of(self.recipe.data, self.base)

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
            cache=self.cache,
        )

    @property
    def looks_on(self) -> bool:
        """Whether there is something to score before the end of training."""
        evaluation = self.recipe.evaluation
        return bool(evaluation.validation) or any(item.role == "select" for item in evaluation.sets)

    @property
    def bytes_beside_training(self) -> int:
        """The most that a look during training has in the cache, while the shards of training stay there."""
        evaluation = self.recipe.evaluation
        looks: list[tuple[Sequence[str] | None, int | None]] = [(evaluation.validation, None)]
        for item in evaluation.sets:
            if item.role == "select":
                looks += [(item.data, EVALUATED_SHARDS), (item.train, EVALUATED_SHARDS)]
        found = ((_remote(patterns), most) for patterns, most in looks)
        return max(bytes_of(expand_patterns(p, self.base, cache=self.cache), most) if p else 0 for p, most in found)

    def held_out(self) -> Index:
        """The index of the validation shards. Raises DataError."""
        return open_held_out(self.recipe, self.base, self.cache)

    def ask(self, item: EvalSet) -> None:
        """Let rank 0 ask the stores about a set, so that no other rank does. Raises DataError."""
        self._ask([*item.data, *(item.train or ())], lambda: open_set(item, self.settings))

    def _ask(self, patterns: Sequence[str], open_it: Callable[[], object]) -> None:
        if dist.world_size() > 1 and _remote(patterns):
            ask_once(self.cache, open_it)

    def _evaluate(self, model: ClipModel, item: EvalSet) -> Result:
        self.ask(item)
        return evaluate_set(model, item, self.settings)

    def held_out_loss(self, model: ClipModel) -> dict[str, float]:
        """{"validation_loss": …}, the task loss on the validation shards; {} where the recipe has none."""
        recipe, settings = self.recipe, self.settings
        if not recipe.evaluation.validation:
            return {}
        self._ask(recipe.evaluation.validation, self.held_out)
        index = dist.on_all(self.held_out)
        batches = fixed_caption_batches(
            index,
            batch=recipe.optimizer.batch,
            image_size=model.spec.image_size,
            captions=recipe.data.captions,
            context_length=model.spec.context_length,
            rank=dist.rank(),
            world_size=dist.world_size(),
            workers=settings.workers,
        )
        encoder = Encoder(model, settings.preprocess, settings.dtype)
        engine, ranks = recipe.engine_of(model.spec.name).on(encoder.device.type), dist.world_size()
        if engine.loss_chunk is None and ranks > 1:
            # Each rank has whole batches here, and in training the rows of its share.
            engine = engine.model_copy(update={"loss_chunk": -(-recipe.optimizer.batch // ranks)})
        return {"validation_loss": validation_loss(encoder, batches, loss_of(recipe.optimizer, engine))}

    def during_training(self, model: ClipModel) -> dict[str, float]:
        """What may be looked at before the end of training: the validation loss and the scores on the `select` sets."""
        scores = self.held_out_loss(model)
        for item in self.recipe.evaluation.sets:
            if item.role == "select":
                result = self._evaluate(model, item)
                scores |= {f"{item.name}/{key}": value for key, value in result.headline().items()}
        return scores

    def at_the_end(self, model: ClipModel, folder: Path) -> dict[str, Any]:
        """Score every set. The answers to single samples, and the images of a contact sheet, go to `folder`."""
        evaluation, settings = self.recipe.evaluation, self.settings
        scores: dict[str, Any] = {}
        captioned = next((item for item in evaluation.sets if item.task == RetrievalResult.task), None)
        for item in evaluation.sets:
            result = self._evaluate(model, item)
            result.scored_by = {"precision": str(settings.dtype)}
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
