"""The sections of a recipe about expansion, and the operators that follow from them for each link."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from compt.models.growth import TOWERS, ExpandConfig, TowerGrowth
from compt.models.operators import wrong_operator
from compt.recipe.types import Section


class TowerExpand(Section):
    """Operators of one tower. A field that is left out takes the value for both towers."""

    width: str | None = None
    """Width operator, as in `chain.expand.width`."""
    depth: str | None = None
    """Depth operator, as in `chain.expand.depth`."""
    zero_new_outputs: bool | None = None
    """As in `chain.expand.zero_new_outputs`."""

    @field_validator("width", "depth")
    @classmethod
    def _operator(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and (wrong := wrong_operator(str(info.field_name), value)):
            raise ValueError(wrong)
        return value


class BothExpand(TowerExpand):
    """Operators of both towers. A field that is left out has the value of `chain.expand`."""

    noise: float | None = Field(default=None, ge=0, lt=1)
    """As in `chain.expand.noise`."""
    reference_compatible: bool | None = None
    """As in `chain.expand.reference_compatible`."""


class LinkExpand(BothExpand):
    """How this link grows from its teacher, where it differs from `chain.expand`.

    The first value that is set counts: for one tower of this link, for both towers of this link, for the tower in
    `chain.expand`, for both towers there. Not for a link that starts from scratch.
    """

    image: TowerExpand = TowerExpand()
    """Operators of the image tower only."""
    text: TowerExpand = TowerExpand()
    """Operators of the text tower only."""


class Expand(LinkExpand):
    """Inverse weight initialization: how a student's first weights come from its teacher, for every link."""

    width: str = "insert"
    """Width operator: a name from the table below."""
    depth: str = "duplicate"
    """Depth operator: a name from the table below."""
    zero_new_outputs: bool = False
    """Set the outputs of added layers to zero, so that they change nothing at first."""
    noise: float = Field(default=0.1, ge=0, lt=1)
    """Some operators copy channels, heads or MLP units. Copies with equal weights would stay equal in training. So each
    weight that reads a copy is multiplied by 1 plus a random number of at most this size. The numbers cancel over the
    copies, so the outputs of the model do not change. With 0, copies stay equal. Without effect for operators that make
    no copies."""
    reference_compatible: bool = False
    """Copy layers as the authors' code does. If the depth of a ViT image tower doubles, each layer of the teacher is
    used twice. Otherwise layer i is copied to layer i, and further layers keep random weights. `depth` then has no
    effect."""


def expansion(chain: Expand, link: LinkExpand | None) -> ExpandConfig:
    """The operators of a link, from the chain's section and its own."""
    link = link or LinkExpand()
    towers: dict[str, Any] = {
        tower: TowerGrowth(
            **{name: _first(name, getattr(link, tower), link, getattr(chain, tower), chain) for name in _TOWER_FIELDS}
        )
        for tower in TOWERS
    }
    both = {name: _first(name, link, chain) for name in ("noise", "reference_compatible")}
    return ExpandConfig(**towers, **both)


_TOWER_FIELDS = tuple(TowerExpand.model_fields)


def _first(name: str, *sections: TowerExpand) -> Any:
    """The value of a field in the first section that sets it."""
    return next(value for section in sections if (value := getattr(section, name)) is not None)


def expand_result(config: ExpandConfig) -> dict[str, Any]:
    """What determines the weights, for the hash of a job: equal for two configs that give the same weights.

    Two equal towers are written once; the noise is left out where no operator makes copies.
    """
    towers: dict[str, Any] = {tower: config.to_dict()[tower] for tower in TOWERS}
    result: dict[str, Any] = towers["image"] if config.image == config.text else towers
    if config.noise and config.copies:
        result["noise"] = config.noise
    if config.reference_compatible:
        result["reference_compatible"] = True
    return result


def expand_words(config: ExpandConfig) -> str:
    """The operators in words: `width lemon, depth stack`; one part for each tower if they differ."""
    if config.image == config.text:
        words = _words(config.image)
    else:
        words = "; ".join(f"{tower} tower: {_words(config.tower(tower))}" for tower in TOWERS)
    if config.copies:
        words += f"; noise {config.noise:g}"
    return words + ("; layers as in the authors' code" if config.reference_compatible else "")


def _words(tower: TowerGrowth) -> str:
    return f"width {tower.width}, depth {tower.depth}" + (", outputs of new layers zero" * tower.zero_new_outputs)
