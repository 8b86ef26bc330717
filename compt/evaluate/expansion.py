"""Verify an expansion at step 0: score teacher, student and a random model, and compare features.

If the plan promises that a tower keeps its function, float64 checks it. The weights are expanded in float64 as well, so
that a difference can only come from the operators.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compt.data.batch import Batch
from compt.data.folder import class_folders_of
from compt.data.index import Index, open_index
from compt.data.loaders import fixed_caption_batches
from compt.data.tokens import clip_tokenizer
from compt.dist import collectives as dist
from compt.errors import ArtefactError
from compt.evaluate.encoder import Encoder
from compt.evaluate.sets import evaluate_set
from compt.evaluate.task import EvalSettings
from compt.evaluate.validation import validation_loss
from compt.evaluate.zeroshot import ZeroShot, ZeroShotResult, fill_template
from compt.expand.execute import Mapped, expand
from compt.expand.plan import ExpansionPlan
from compt.models.clip import ClipModel, build, fill
from compt.models.growth import TOWERS
from compt.models.pixels import to_input
from compt.models.presets import ModelSpec
from compt.recipe.schema import EvalSet
from compt.weights.artefact import Artefact

TOLERANCE = 1e-10
"""Normalized features in float64 differ by less than this if the plan promises exactness."""

COMPARED = 64
"""Pairs per rank whose features are compared in float32."""

COMPARED_EXACTLY = 16
"""Pairs per rank whose features are compared in float64."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Scores:
    """Scores of one model. `loss` is contrastive, in nats; `top1` and `top5` are percent. `top5` may be None."""

    loss: float
    top1: float
    top5: float | None


@dataclass(frozen=True)
class Difference:
    """How far the normalized features of a tower moved: the largest absolute difference of an element.

    If the joint embedding grew, dot products between features of the tower are compared instead. `reasons`: why the
    plan does not promise exactness; `float64` is measured if there are none.
    """

    float32: float
    float64: float | None
    reasons: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """False if a promise is broken."""
        return bool(self.reasons) or (self.float64 is not None and self.float64 < TOLERANCE)


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `dot_products`: largest difference of dot products between images and texts, in float64, if
    the plan promises both towers.
    """

    scores: dict[str, Scores]
    differences: dict[str, Difference]
    dot_products: float | None
    samples: int
    classes: int
    batch: int
    captions: str
    skipped: int

    def broken(self) -> list[str]:
        """One line for each broken promise."""
        found = [
            f"{tower} tower: its features differ by {difference.float64:.1e}, the plan promises less than {TOLERANCE:g}"
            for tower, difference in self.differences.items()
            if not difference.kept
        ]
        # Written with "not", so that a NaN counts as broken.
        if self.dot_products is not None and not found and not self.dot_products < TOLERANCE:
            found.append(f"dot products of images with texts differ by {self.dot_products:.1e}, both towers are exact")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "scores": {name: vars(scores) for name, scores in self.scores.items()},
            "features": {
                tower: {**vars(part), "reasons": list(part.reasons), "promised": not part.reasons, "kept": part.kept}
                for tower, part in self.differences.items()
            },
            "dot_products_float64": self.dot_products,
            "tolerance": TOLERANCE,
            "kept": not self.broken(),
            **{key: getattr(self, key) for key in ("samples", "classes", "batch", "captions", "skipped")},
        }


@dataclass(frozen=True)
class _Pairs:
    """Images with captions: those of the shards, or, if there are none, class names in the first template."""

    item: EvalSet
    settings: EvalSettings

    @property
    def captioned(self) -> bool:
        """Whether the data have captions."""
        if class_folders_of(self.item.data, self.settings.base) is not None:
            return False
        return any(number for number, images in self._index().counts.items() if images)

    def _index(self) -> Index:
        settings = self.settings
        places = (self.item.data, settings.base, settings.index_dir)
        return open_index(*places, columns=settings.columns, cache=settings.cache)

    def batches(self, spec: ModelSpec) -> Iterable[Batch]:
        """This rank's batches, tokens [B, 1, T]. Models with the same image size and context get the same ones."""
        settings = self.settings
        if self.captioned:
            return fixed_caption_batches(
                self._index(),
                batch=settings.batch,
                image_size=spec.image_size,
                captions=1,
                context_length=spec.context_length,
                rank=dist.rank(),
                world_size=dist.world_size(),
                workers=settings.workers,
                preprocess=settings.preprocess,
            )
        return self._named(spec)

    def _named(self, spec: ModelSpec) -> Iterator[Batch]:
        task = ZeroShot.open(self.item, self.settings)
        tokenize = partial(clip_tokenizer(), context_length=spec.context_length)
        for batch in task.data.batches(spec.image_size, self.settings):
            if len(batch) and batch.labels is not None and int(batch.labels.max()) < len(task.names):
                texts = [fill_template(task.templates[0], task.names[label]) for label in batch.labels.tolist()]
                yield Batch(batch.images, tokenize(texts)[:, None], batch.keys)


Features = dict[str, Tensor]


def _features(model: ClipModel, pairs: _Pairs, count: int) -> Features:
    """Normalized features of this rank's first pairs: [count, embed_dim] per tower, in the model's dtype."""
    encoder = Encoder(model, pairs.settings.preprocess)
    found: dict[str, list[Tensor]] = {tower: [] for tower in TOWERS}
    left = count
    with encoder.frozen():
        for batch in itertools.islice(pairs.batches(model.spec), count):
            images, tokens = batch.images[:left].to(encoder.device), batch.tokens[:left, 0].to(encoder.device)
            pixels = to_input(images, encoder.preprocess.mean, encoder.preprocess.std).to(model.logit_scale.dtype)
            found["image"].append(functional.normalize(model.encode_image(pixels), dim=-1))
            found["text"].append(functional.normalize(model.encode_text(tokens), dim=-1))
            left -= len(images)
            if not left:
                break
    empty = torch.zeros(0, model.spec.embed_dim, dtype=model.logit_scale.dtype, device=encoder.device)
    return {tower: torch.cat([empty, *parts]) for tower, parts in found.items()}


def _moved(before: Tensor, after: Tensor) -> float:
    """The largest difference over all ranks, inf for a NaN; of dot products if the embedding grew."""
    if before.shape != after.shape:
        before, after = before @ before.T, after @ after.T
    return _largest(before, after)


def _largest(before: Tensor, after: Tensor) -> float:
    difference = (before - after).abs().nan_to_num(nan=float("inf"))
    return dist.all_reduce_max(float(difference.max()) if difference.numel() else 0.0)


def verify(
    teacher: Artefact,
    plan: ExpansionPlan,
    seed: int,
    item: EvalSet,
    settings: EvalSettings,
    *,
    student: Artefact | None = None,
    average: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    say: Say = lambda text: None,
) -> Verification:
    """Score teacher, expanded student and a random student on one zero-shot set, and compare features.

    `student` is the model that was written; without it, the expansion happens in memory. The random student has the
    initialization of `seed`. `settings` has the batch size, of a step and of a contrastive loss, and the dtype of the
    scores. All ranks call this; each holds one model at a time. Raises DataError if the data cannot be used.
    """
    place = torch.device(device)
    pairs = _Pairs(item, settings)
    scores: dict[str, Scores] = {}
    features: dict[str, Features] = {}
    results: list[ZeroShotResult] = []

    def use(name: str, model: ClipModel) -> None:
        say(f"scoring the {name} student" if name == "random" else f"scoring the {name}")
        encoder = Encoder(model, settings.preprocess, settings.dtype)
        loss = validation_loss(encoder, pairs.batches(model.spec))
        result = evaluate_set(model, item, settings)
        assert isinstance(result, ZeroShotResult)
        scores[name] = Scores(loss, result.top1, result.top5)
        results.append(result)
        features[name] = _features(model, pairs, COMPARED)

    use("teacher", teacher.load_model(place))
    state = student.state if student is not None else expand(plan, teacher.state, seed, average)
    use("student", fill(build(plan.student, device="meta"), state, place))
    use("random", build(plan.student, seed=seed, device=place))

    # In float32 rounding hides a small fault. Float64 shows whether an operator that promises equal features keeps it.
    exact: dict[str, float] = {}
    dot_products = None
    if not all(plan.inexact[tower] for tower in TOWERS):
        say("comparing in float64")
        double = Mapped(teacher.state, Tensor.double)
        before = _features(fill(build(teacher.spec, device="meta").double(), double, place), pairs, COMPARED_EXACTLY)
        doubled = expand(plan, double, seed, Mapped(average, Tensor.double) if average is not None else None)
        after = _features(fill(build(plan.student, device="meta").double(), doubled, place), pairs, COMPARED_EXACTLY)
        exact = {tower: _moved(before[tower], after[tower]) for tower in TOWERS if not plan.inexact[tower]}
        if len(exact) == len(TOWERS):
            old, new = (part["image"] @ part["text"].T for part in (before, after))
            dot_products = _largest(old, new)
    differences: dict[str, Difference] = {
        tower: Difference(
            _moved(features["teacher"][tower], features["student"][tower]), exact.get(tower), plan.inexact[tower]
        )
        for tower in TOWERS
    }
    return Verification(
        scores,
        differences,
        dot_products,
        samples=results[0].n,
        classes=results[0].classes,
        batch=settings.batch,
        captions="of the data" if pairs.captioned else "class names",
        skipped=sum(results[0].skipped.values()),
    )


def check_kept(found: Verification, name: str) -> None:
    """Raise ArtefactError if a promise is broken; it names the towers."""
    broken = found.broken()
    if broken:
        raise ArtefactError(f"{name}: the expansion does not keep its promise: {'; '.join(broken)}")
