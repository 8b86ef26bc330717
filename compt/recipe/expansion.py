"""The recipe's sections about expansion, and the operators that they come to for each link. No torch in here."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from compt.models.growth import TOWERS, ExpandConfig, Tower, TowerGrowth
from compt.models.operators import wrong_operator
from compt.recipe.types import Section


class TowerExpand(Section):
    """Operators of one tower; what is left out is as for both towers."""

    width: str | None = None
    """Operator for widths, as in `chain.expand.width`."""
    depth: str | None = None
    """Operator for depths, as in `chain.expand.depth`."""
    zero_new_outputs: bool | None = None
    """As in `chain.expand.zero_new_outputs`."""

    @field_validator("width", "depth")
    @classmethod
    def _operator(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and (wrong := wrong_operator(str(info.field_name), value)):
            raise ValueError(wrong)
        return value


class BothExpand(TowerExpand):
    """Operators of both towers; what is left out is as in `chain.expand`."""

    noise: float | None = Field(default=None, ge=0, lt=1)
    """As in `chain.expand.noise`."""
    reference_compatible: bool | None = None
    """As in `chain.expand.reference_compatible`."""


class LinkExpand(BothExpand):
    """How this link's weights come from its predecessor's, where that is not as `chain.expand` says.

    Fields that are left out are the chain's. What stands here for both towers comes before what the chain says for one;
    what stands here for one tower comes before all else. Not for a link that starts from scratch.
    """

    image: TowerExpand = TowerExpand()
    """Operators of the image tower alone."""
    text: TowerExpand = TowerExpand()
    """Operators of the text tower alone."""


class Expand(LinkExpand):
    """Inverse weight initialization: how a model's weights come from its predecessor's, in every link."""

    width: str = "insert"
    """Operator for widths: one of those in the table below."""
    depth: str = "duplicate"
    """Operator for depths: one of those in the table below."""
    zero_new_outputs: bool = False
    """Whether added layers start with zero outputs, so that they change nothing at first."""
    noise: float = Field(default=0.1, ge=0, lt=1)
    """Where an operator makes copies (`duplicate`, `net2net`, `lemon`): the share by which weights that read copies
    differ at most, so that copies learn apart. The differences cancel: the model's outputs stay. 0: copies stay equal
    forever."""
    reference_compatible: bool = False
    """Whether layers are filled as the authors' code fills them: those of a ViT image tower twice each where its depth
    doubles, all others from the first on, one by one, whatever `depth` says."""


def expansion(chain: Expand, link: LinkExpand | None) -> ExpandConfig:
    """What the chain's section and a link's own come to."""
    link = LinkExpand() if link is None else link
    noise = chain.noise if link.noise is None else link.noise
    compatible = chain.reference_compatible if link.reference_compatible is None else link.reference_compatible
    return ExpandConfig(
        **{tower: TowerGrowth(**_tower(chain, link, tower)) for tower in TOWERS},
        noise=noise,
        reference_compatible=compatible,
    )


def _tower(chain: Expand, link: LinkExpand, tower: Tower) -> dict[str, Any]:
    """The fields of one tower, each from the first section that has it."""
    sections: list[TowerExpand] = [getattr(link, tower), link, getattr(chain, tower), chain]
    return {
        name: next(value for section in sections if (value := getattr(section, name)) is not None)
        for name in TowerExpand.model_fields
    }


def expand_result(config: ExpandConfig) -> dict[str, Any]:
    """What of an expansion changes the weights: equal for two that come to the same, and plain for plain ones.

    Where both towers have the same operators, these alone; the noise only where an operator makes copies.
    """
    towers: dict[str, Any] = {tower: config.to_dict()[tower] for tower in TOWERS}
    result: dict[str, Any] = towers["image"] if config.image == config.text else towers
    if config.noise and config.copies:
        result["noise"] = config.noise
    if config.reference_compatible:
        result["reference_compatible"] = True
    return result


def expand_words(config: ExpandConfig) -> str:
    """The operators in words: `width lemon, depth stack`, each tower apart where they differ."""
    if config.image == config.text:
        words = _words(config.image)
    else:
        words = "; ".join(f"{tower} tower: {_words(config.tower(tower))}" for tower in TOWERS)
    if config.copies:
        words += f"; noise {config.noise:g}"
    return words + ("; layers as the authors' code" if config.reference_compatible else "")


def _words(tower: TowerGrowth) -> str:
    return f"width {tower.width}, depth {tower.depth}" + (", outputs of new layers zero" * tower.zero_new_outputs)
