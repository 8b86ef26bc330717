"""Tasks: a trainable module, its targets and its loss. A new way of pretraining is one class here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compt.dist.collectives import mean_of_scalars
from compt.errors import ConfigError
from compt.models.clip import ClipModel
from compt.models.init import init_tensor, linear_rule
from compt.models.packing import Lengths, Packing
from compt.models.presets import VOCAB_SIZE
from compt.models.scalars import SCALAR_NAMES
from compt.models.states import State, shape_of
from compt.train.losses import ContrastiveLoss, Loss, ifd_loss, learned_scalars
from compt.train.teacher_cache import CaptionFeatures

SHARED_OUTPUTS = frozenset(SCALAR_NAMES)
"""Outputs of a module that belong to the whole batch; every other output has a row for each sample."""

Scalars = dict[str, Tensor]


class Task(Protocol):
    """One trainable module and its loss.

    `images` is float [b, 3, H, W], normalised by mean and std; `tokens` int64 [b, M, T]; `lengths` int64 [b, M] on the
    CPU, the tokens of each caption, or a `Packing` of all of them; `known`: the tokens on the CPU, for `kept`. Without
    them the CPU waits for the GPU.
    """

    name: str
    kept: CaptionFeatures | None
    """Features of captions that a teacher does not compute again; None: it computes all."""

    @property
    def model(self) -> ClipModel:
        """The model that is trained, without parts that only training needs."""

    @property
    def module(self) -> nn.Module:
        """Everything that is trained; `forward(images, tokens, lengths)` returns the outputs by name."""

    def targets(
        self, images: Tensor, tokens: Tensor, lengths: Lengths | None = None, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Inputs of the loss that are not trained, a row for each sample, without gradient."""

    def loss(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> tuple[Tensor, Scalars]:
        """This rank's loss (the mean over ranks is the global one) and detached scalars to report."""

    @property
    def caps(self) -> Mapping[str, float]:
        """Parameter of the module -> its largest value. The engine clamps them after each step."""


class StudentModule(nn.Module):
    """A CLIP model and, where the teacher's embedding has another width, a linear projector for each tower.

    State: `model.*` and `projector.image.*`, `projector.text.*`. Only checkpoints have the projectors; the trained
    model does not.
    """

    def __init__(self, model: ClipModel, projected: int | None = None, text_buckets: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.text_buckets = text_buckets
        self.projector = nn.ModuleDict()
        self._seed = seed
        self._shapes: dict[str, tuple[int, ...]] = {}
        width, device = model.spec.embed_dim, model.logit_scale.device
        if projected is not None and projected != width:
            for tower in ("image", "text"):
                self.projector[tower] = nn.Linear(width, projected, device=device)
            with torch.no_grad():
                for name, parameter in self.projector.named_parameters(prefix="projector"):
                    self._shapes[name] = tuple(parameter.shape)
                    parameter.copy_(self._drawn(name))

    def _drawn(self, name: str) -> Tensor:
        return init_tensor(linear_rule(self.model.spec.embed_dim), self._seed, name, self._shapes[name])

    def initial(self, model: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values of this module's state before the first step: `model` for the model, drawn ones for projectors.

        Each access reads or draws one value.
        """
        return _InitialState(model, self._shapes, self._drawn)

    def forward(self, images: Tensor, tokens: Tensor, lengths: Lengths | None = None) -> dict[str, Tensor]:
        """`image` [b, D] and `text` [b, M, D], not normalised; each learned scalar [1], exponentiated where it is a
        logarithm; with projectors also `image_projected` [b, D'] and `text_projected` [b, M, D'].
        """
        image, text = encode(self.model, images, tokens, lengths, self.text_buckets)
        outputs = {"image": image, "text": text, **learned_scalars(self.model, self.model.spec.scalars)}
        for tower, projector in self.projector.items():
            outputs[f"{tower}_projected"] = projector(outputs[tower])
        return outputs


class _InitialState(State):
    """The model's values from their source, and drawn values for the projectors."""

    def __init__(
        self, model: Mapping[str, Tensor], drawn: Mapping[str, tuple[int, ...]], draw: Callable[[str], Tensor]
    ) -> None:
        self._parts = {**{f"model.{name}": name for name in model}, **dict.fromkeys(drawn)}
        self._model, self._drawn, self._draw = model, drawn, draw

    def __getitem__(self, name: str) -> Tensor:
        own = self._parts[name]
        return self._draw(name) if own is None else self._model[own]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value. Reads the value only where its source does not know the shape."""
        own = self._parts[name]
        return self._drawn[name] if own is None else shape_of(self._model, own)


def encode(
    model: ClipModel, images: Tensor, tokens: Tensor, lengths: Lengths | None = None, buckets: int = 1
) -> tuple[Tensor, Tensor]:
    """Un-normalised features: images [b, 3, H, W] -> [b, D], captions [b, M, T] -> [b, M, D]."""
    samples, captions = tokens.shape[:2]
    flat = lengths.reshape(-1) if isinstance(lengths, Tensor) else lengths
    text = model.encode_captions(tokens.reshape(samples * captions, -1), buckets, flat)
    return model.encode_image(images), text.reshape(samples, captions, -1)


def cut_captions(tokens: Tensor, lengths: Lengths | None, context: int) -> tuple[Tensor, Lengths | None]:
    """Captions cut to `context` tokens as the tokenizer cuts them: the last token becomes the end of text.

    tokens int64 [b, M, T] -> [b, M, min(T, context)]; `lengths` as in `Task`. Raises ValueError for packed captions
    that would have to be cut.
    """
    if tokens.shape[-1] <= context:
        return tokens, lengths
    if isinstance(lengths, Packing):
        raise ValueError(f"captions packed for {tokens.shape[-1]} tokens do not fit into {context}")
    end, at = tokens.max(dim=-1)
    cut = tokens[..., :context].clone()
    cut[..., -1] = torch.where(at >= context, end, cut[..., -1])
    return cut, None if lengths is None else lengths.clamp(max=context)


def fit_images(images: Tensor, size: int) -> Tensor:
    """Images [b, 3, H, W] resized to float [b, 3, size, size], uncropped: bicubic, antialiased where they shrink.

    The weights of a resize sum to one, so it commutes with normalising colours. Values are not rounded to 256 levels,
    so they differ slightly from those of an image decoded at `size`.
    """
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False, antialias=True)


class ClipTask:
    """Training on images with several captions each, by one loss: baselines and the first link of a chain.

    `loss` takes the learned scalars that the model has; None: the contrastive loss. `text_buckets` as in
    `ClipModel.encode_captions`. Raises ValueError for a model of another loss's scalars.
    """

    name = "clip"
    kept: CaptionFeatures | None = None

    def __init__(
        self,
        model: ClipModel,
        loss: Loss | None = None,
        *,
        text_buckets: int = 1,
        seed: int = 0,
        projected: int | None = None,
    ) -> None:
        self.task_loss = loss or ContrastiveLoss()
        has, takes = ({one.name for one in scalars} for scalars in (model.spec.scalars, self.task_loss.scalars))
        if has != takes:
            raise ValueError(
                f"model {model.spec.name} has the scalars {', '.join(sorted(has))}; the loss '{self.task_loss.name}' "
                f"takes {', '.join(sorted(takes))}"
            )
        self.module = StudentModule(model, projected, text_buckets, seed)

    @property
    def model(self) -> ClipModel:
        """The model that is trained."""
        return self.module.model

    def targets(
        self, images: Tensor, tokens: Tensor, lengths: Lengths | None = None, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Nothing: the batch says which caption belongs to which image."""
        return {}

    def loss(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> tuple[Tensor, Scalars]:
        """The task loss; reports `loss` and the terms of the task loss, `task` among them."""
        value, terms = self.task_loss(outputs)
        return value, _detached({"loss": value, **terms})

    @property
    def caps(self) -> Mapping[str, float]:
        """The caps of the learned scalars that have one."""
        return {f"model.{one.name}": one.cap for one in self.task_loss.scalars if one.cap is not None}


class DistillTask(ClipTask):
    """A task loss plus inverse feature distillation from a frozen teacher: every later link.

    The task freezes the teacher, puts it into evaluation mode and casts it to `teacher_dtype` (the compute dtype). The
    teacher is in no optimizer and in no state dict. `alpha` and `reference_compatible` as in `ifd_loss`. `seed` draws
    the projectors. A teacher for another image size or a shorter context sees the same images and captions fitted to
    it. Raises ConfigError where the teacher's vocabulary lacks tokens of the student's data.
    """

    name = "clip_distill"

    def __init__(
        self,
        model: ClipModel,
        teacher: ClipModel,
        loss: Loss | None = None,
        *,
        alpha: float = 500.0,
        reference_compatible: bool = False,
        text_buckets: int = 1,
        seed: int = 0,
        teacher_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, loss, text_buckets=text_buckets, seed=seed, projected=teacher.spec.embed_dim)
        if teacher.spec.vocab_size < min(model.spec.vocab_size, VOCAB_SIZE):
            raise ConfigError(
                f"'{teacher.spec.name}' knows {teacher.spec.vocab_size} tokens, too few to teach "
                f"'{model.spec.name}' of {model.spec.vocab_size}"
            )
        self.teacher = teacher.requires_grad_(False).eval().to(teacher_dtype)
        self.teacher_dtype = teacher_dtype
        self.alpha = alpha
        self.reference_compatible = reference_compatible

    def keep_captions(self, limit: int) -> None:
        """Keep the teacher's features of captions in up to `limit` bytes. Raises ConfigError as `CaptionFeatures`."""
        width, buckets = self.teacher.spec.embed_dim, self.module.text_buckets
        self.kept = CaptionFeatures(limit, width, self.teacher_dtype, buckets)

    @torch.no_grad()
    def targets(
        self, images: Tensor, tokens: Tensor, lengths: Lengths | None = None, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The teacher's features: image [b, D'], text [b, M, D'], not normalised.

        `fit_images` resizes the images to its image size, `cut_captions` cuts the captions to its context.
        """
        context = self.teacher.spec.context_length
        cut, lengths = cut_captions(tokens, lengths, context)
        with torch.autocast(images.device.type, enabled=False):
            fitted = fit_images(images, self.teacher.spec.image_size).to(self.teacher_dtype)
            if self.kept is None:
                image, text = encode(self.teacher, fitted, cut, lengths, self.module.text_buckets)
                return {"image": image, "text": text}
            known, _ = cut_captions(tokens.cpu() if known is None else known, None, context)
            text = self.kept.of(cut.flatten(0, 1), known.flatten(0, 1), self._text)
            image = self.teacher.encode_image(fitted)
        return {"image": image, "text": text.view(*cut.shape[:2], -1)}

    def _text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        features: Tensor = self.teacher.encode_captions(tokens, self.module.text_buckets, lengths)
        return features

    def loss(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> tuple[Tensor, Scalars]:
        """Task loss plus distillation; adds ifd, ifd_image, ifd_text (all times alpha) and r = ifd / task."""
        task, report = super().loss(outputs, targets)
        image, text = (outputs.get(f"{tower}_projected", outputs[tower]) for tower in ("image", "text"))
        ifd = ifd_loss(
            targets["image"],
            targets["text"],
            image,
            text,
            alpha=self.alpha,
            reference_compatible=self.reference_compatible,
        )
        loss = task + ifd.total
        report |= {"loss": loss, "ifd": ifd.total, "ifd_image": ifd.image, "ifd_text": ifd.text, "r": ifd.total / task}
        return loss, _detached(report)


def _detached(report: Mapping[str, Tensor]) -> Scalars:
    return {name: value.detach() for name, value in report.items()}


def reduce_report(report: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over ranks of a report, with one collective; r is the ratio of means, not the mean of ratios."""
    means = mean_of_scalars(report)
    if "r" in means:
        means["r"] = means["ifd"] / means["task"] if means["task"] else math.nan
    return means


def surrogate(outputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], micro_batches: int) -> Tensor:
    """A scalar whose backward passes `gradients` (of the loss by each output) on to the parameters behind `outputs`.

    `gradients` has the rows of this micro-batch. For SHARED_OUTPUTS it has the whole gradient, and each of the
    `micro_batches` takes an equal share.
    """
    terms = []
    for name, output in outputs.items():
        gradient = gradients[name]
        share = micro_batches if name in SHARED_OUTPUTS else 1
        terms.append((output.to(gradient.dtype) * gradient).sum() / share)
    return torch.stack(terms).sum()
