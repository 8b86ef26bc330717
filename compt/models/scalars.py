"""The learned scalars of a model and the losses that bring them: one list for the model, its costs, files and training.

A new loss has one entry here and one class in `compt.train.losses`, under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SCALAR_NAMES = ("logit_scale", "logit_bias")
"""The scalar parameters that open_clip's CLIP class knows. A loss chooses among them; logit_scale is always there."""


@dataclass(frozen=True)
class Scalar:
    """One learned number of a model: shape [1] inside a model, so that engines can shard it; shape () in files.

    `initial`: the value of the parameter from scratch. An expansion copies the teacher's value, and takes `initial`
    where the teacher has no such scalar. `cap`: the largest value, held after each step; None without a limit. `log`:
    the parameter is a logarithm, and the loss receives its exponential. Weight decay never applies.
    """

    name: str
    initial: float
    cap: float | None = None
    log: bool = False


@dataclass(frozen=True)
class LossTraits:
    """What models and costs depend on of a loss.

    `pairwise`: the loss is a sum over pairs of an image and a caption. It then takes one product of all images with
    all captions instead of two, computes nothing again when it works in chunks, and gathers no features of other ranks.
    """

    scalars: tuple[Scalar, ...]
    pairwise: bool = False

    def __post_init__(self) -> None:
        if "logit_scale" not in [scalar.name for scalar in self.scalars]:
            raise ValueError("a loss should have the scalar logit_scale, which every CLIP of open_clip has")
        unknown = [scalar.name for scalar in self.scalars if scalar.name not in SCALAR_NAMES]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: open_clip's CLIP has only the scalars {', '.join(SCALAR_NAMES)}")


LOSS_TRAITS: dict[str, LossTraits] = {
    # OpenAI's CLIP (arXiv 2103.00020): temperature 0.07 at the start, logits scaled by at most 100.
    "contrastive": LossTraits((Scalar("logit_scale", math.log(1 / 0.07), cap=math.log(100), log=True),)),
    # SigLIP (arXiv 2303.15343, table 4 and section 3.2), and open_clip's configs of it. big_vision has no cap either.
    "siglip": LossTraits(
        (Scalar("logit_scale", math.log(10), log=True), Scalar("logit_bias", -10.0)),
        pairwise=True,
    ),
}
"""The losses by the name that `optimizer.loss` of a recipe gives them."""

DEFAULT_LOSS = "contrastive"


def loss_with(names: Iterable[str], initial: Mapping[str, float] | None = None) -> str:
    """The first loss whose scalars are exactly those among `names`, which may hold other parameters too.

    `initial`: what the scalars started from, as far as a config says it. Where several losses have these scalars, it
    chooses. The default where no loss has these scalars: comparing the parameters then names what is missing.
    """
    found = {name for name in names if name in SCALAR_NAMES}
    fitting = [loss for loss, traits in LOSS_TRAITS.items() if {one.name for one in traits.scalars} == found]
    started = [loss for loss in fitting if initial and _started_from(LOSS_TRAITS[loss], initial)]
    return next(iter(started or fitting), DEFAULT_LOSS)


def _started_from(traits: LossTraits, initial: Mapping[str, float]) -> bool:
    return all(math.isclose(initial.get(one.name, math.nan), one.initial, rel_tol=1e-3) for one in traits.scalars)


def exported_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a parameter in files: () for a scalar, else the shape that it has inside the model."""
    return () if name in SCALAR_NAMES else tuple(shape)
