"""Scores of a model on evaluation sets; the set's `task` names the class that opens and scores it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from compt.data.account import Account
from compt.data.content import spread
from compt.data.decode import Cause, Unusable
from compt.data.labels import label_fault
from compt.data.tokens import clip_tokenizer
from compt.dist import collectives as dist
from compt.errors import ArtefactError, ConfigError, DataError
from compt.evaluate.encoder import Encoder, Tokenize
from compt.evaluate.task import EvalSettings, EvaluationTask, Result
from compt.files import hash_json
from compt.models.clip import ClipModel
from compt.models.presets import VOCAB_SIZE
from compt.recipe.schema import EVALUATION_TASKS, EvalSet

SAMPLED = 32
"""Images of a set that are hashed, evenly spread over it."""

_log = logging.getLogger(__name__)


def task_class(name: str) -> type[EvaluationTask]:
    """The class of the task called `name`; the base class for a name that this version does not know.

    The base class can show scores, so a report also works for a run that another version has scored.
    """
    found: type[EvaluationTask] = EVALUATION_TASKS.load(name) if name in EVALUATION_TASKS.table else EvaluationTask
    return found


def open_set(item: EvalSet, settings: EvalSettings, *, together: bool = False) -> EvaluationTask:
    """Open a set and everything beside it; no image is read. Raises DataError.

    `together`: all ranks call this. Rank 0 opens the set first, so only one process indexes new shards.
    """
    kind = task_class(item.task)
    if not together:
        return kind.open(item, settings)
    if dist.world_size() > 1:
        dist.on_main(lambda: kind.open(item, settings))
    return dist.on_all(lambda: kind.open(item, settings))


def evaluate_set(model: nn.Module, item: EvalSet, settings: EvalSettings) -> Result:
    """Score a CLIP model (ours or open_clip's own) on one set; all ranks call this and get the same result.

    Raises DataError, on every rank, for data or files beside it that cannot be used, and ArtefactError for a model of
    another vocabulary.
    """
    task = open_set(item, settings, together=True)
    context_length: Any = model.context_length
    vocab_size: Any = model.vocab_size
    # A larger one is another tokenizer's (SigLIP2, XLM-R), unless a recipe of ours chose it.
    if vocab_size < VOCAB_SIZE or (vocab_size > VOCAB_SIZE and not isinstance(model, ClipModel)):
        raise ArtefactError(
            f"vocab_size = {vocab_size}: the model has another vocabulary than OpenAI's CLIP, of {VOCAB_SIZE} tokens, "
            "with which class names and captions are read"
        )
    tokenize: Tokenize = partial(clip_tokenizer(), context_length=context_length)
    result = task.run(Encoder(model, settings.preprocess, settings.dtype), tokenize)
    result.name, result.pins, result.account = item.name, task.pins(), task.data.account.to_json()
    if task.data.account.faults and dist.is_main():
        _log.warning("evaluation set '%s' holds more than is used: %s", item.name, task.data.account.line())
    if result.skipped:
        _log.warning(
            "evaluation set '%s': left out: %s, such as %s", item.name, result.left_out, "; ".join(result.examples)
        )
    return result


def check_sets(sets: Iterable[EvalSet], settings: EvalSettings, contact_sheet: str | None = None) -> dict[str, str]:
    """Open every set and the files beside it; all ranks call this. Returns, by name, a hash of each set.

    The hash is of keys, sizes, labels, class names and some of the images.

    Raises DataError for the first set that cannot be used, also as its labels cannot, and ConfigError where
    `contact_sheet` names one without classes.
    """
    hashes = {}
    for item in sets:
        if item.name == contact_sheet and not task_class(item.task).classifies:
            raise ConfigError(
                f"evaluation.contact_sheet = '{item.name}': is a {item.task} set; images are shown with the class that "
                "a model gives them: name a set with class names"
            )
        task = open_set(item, settings, together=True)
        hashes[item.name] = hash_json([task.pins(), dist.from_main(partial(_sampled, task))])
    return hashes


def _sampled(task: EvaluationTask) -> str:
    """Hex digest of a few images; one that cannot be read counts as empty. Raises DataError where none has a label.

    Without this look, wrong labels would end the run when its first model is scored.
    """
    sha = hashlib.sha256()
    for data in task.splits:
        faults: dict[int, Cause | None] = {}
        for at in spread(len(data.samples), SAMPLED):
            with contextlib.suppress(Unusable):
                if data is task.data:
                    sha.update(data.samples.image(at))
                label = data.samples.read(at).label
                faults[at] = None if label is None else label_fault(label)
        if faults and all(faults.values()) and task.settings.max_bad_share < 1:
            raise DataError(
                f"evaluation set '{task.item.name}': none of the {len(faults)} samples that were looked at has a "
                f"usable label: {Account(unused=Counter(filter(None, faults.values()))).line()}, such as "
                f"{data.samples.describe(min(faults))}"
            )
    return sha.hexdigest()
