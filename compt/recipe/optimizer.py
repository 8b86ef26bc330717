"""How models are optimized: the sections `optimizer`, `optimizer.schedule` and `optimizer.ema` of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from compt.models.scalars import DEFAULT_LOSS, LOSS_TRAITS
from compt.recipe.types import OneOf, Pair, Section, execution, later


class Ema(Section):
    """Exponential moving average of the weights, restarted at each link."""

    decay: float = Field(gt=0, lt=1)
    """Share of the average that each step keeps, for example 0.999."""


class Schedule(Section):
    """The learning rate after a linear warm-up. A name alone is its shape: `schedule: linear`."""

    shape: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """`cosine` and `linear` fall from the peak to the end. `wsd` (warm-up, stable, decay) stays at the peak, and falls
    linearly in the last steps. `constant` stays."""
    end: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps in which `wsd` falls."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"shape": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _used(self) -> Schedule:
        # A resolved recipe names every field, those of other shapes with their defaults.
        if self.shape == "constant" and self.end:
            raise ValueError(f"end = {self.end:g}: a constant learning rate has no other one at the end; leave it out")
        if self.shape != "wsd" and self.decay != type(self).model_fields["decay"].default:
            raise ValueError(f"decay = {self.decay:g}: only wsd has one, and the shape is {self.shape}; leave it out")
        return self


class Optimizer(Section):
    """AdamW with linear warm-up and a decay of the learning rate, and the task loss."""

    batch: int = Field(default=1024, gt=0)
    """Images in a step, over all ranks."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    schedule: Schedule = later(Schedule())
    """How the learning rate falls after the warm-up. Default: a cosine to zero, as in the paper."""
    betas: Pair = (0.9, 0.98)
    """Decay of AdamW's two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon, added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; none on norms, biases and learned scalars."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Norm to which the whole gradient is clipped. Default: no clipping."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of matrix products. Weights, normalization and losses are fp32."""
    ema: Ema | None = None
    """Moving average of the weights. It is stored beside them, as the model `RUN/jobs/JOB/model/ema`. Scores are those
    of the weights, and the next link starts from them."""
    loss: Annotated[str, AfterValidator(OneOf(LOSS_TRAITS))] = later(DEFAULT_LOSS)
    """Task loss: `contrastive`, the softmax loss of CLIP, or `siglip`, the sigmoid loss of single pairs, which adds a
    learned `logit_bias` to the models."""
    image_to_text: Literal["slot", "all"] = "slot"
    """Candidates in the softmax of an image, if images have M captions each. `slot`: M softmaxes, the k-th over the
    k-th caption of every image. `all`: one softmax over all captions of all images. With `siglip` only `slot` is
    allowed and has no effect."""
    max_nonfinite: int = execution(10, gt=0)
    """A run stops after this many steps in a row whose loss or gradient is not finite. Each of them is skipped."""

    @model_validator(mode="after")
    def _betas(self) -> Optimizer:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas[0]}, {self.betas[1]} have to be at least 0 and below 1")
        return self

    @model_validator(mode="after")
    def _candidates(self) -> Optimizer:
        if LOSS_TRAITS[self.loss].pairwise and self.image_to_text != "slot":
            raise ValueError(f"image_to_text: leave it out; the loss '{self.loss}' compares no candidates")
        return self
