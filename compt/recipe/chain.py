"""The sections of a recipe about the chain: its links, how they grow, and what they learn from their teachers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compt.recipe.expansion import Expand, LinkExpand
from compt.recipe.types import Duration, Section, execution


class Link(Section):
    """One model of the chain and how long it trains."""

    model: str
    """Name of a family member. A resumed run may change neither the name nor the sizes of a link that was begun."""
    train: Duration
    """Length of its training."""
    warmup: Duration
    """Length of the linear warm-up, a part of `train`."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this link. Default: `optimizer.lr`."""
    alpha: float | None = Field(default=None, ge=0)
    """Weight of distillation for this link. Default: `chain.distill.alpha`."""
    initial: Literal["expanded", "random"] = "expanded"
    """Where its first weights come from. `random` draws them from the seed, and the teacher only distils: the paper's
    ablation in table 4(b), and classical distillation, as the teacher may then be the larger model."""
    expand: LinkExpand | None = None
    """Changes to `chain.expand` for this link: `{width: lemon, image: {zero_new_outputs: true}}`."""
    engine: dict[str, Any] | None = execution(None)
    """Changes to `engine` while this model trains, as a link or a baseline: `{name: zero2, micro_batch: 64}`. With
    another `name`, `fsdp2` and `deepspeed_config` of `engine` do not apply. `device` and `timeout` cannot differ."""
    nodes: int | None = execution(None, gt=0)
    """Nodes that `compt slurm submit` requests for this link. Default: its `--nodes`."""


class Distill(Section):
    """Inverse feature distillation: a student also learns to reproduce its teacher's features.

    The teacher sees the same images and captions. If it takes images of another size, they are resized (bicubic,
    antialiased); if its context is shorter, captions are cut and keep the end token.
    """

    alpha: float = Field(default=500.0, ge=0)
    """Weight of the feature loss, for features of 512 dimensions; it is scaled for other widths. 0 turns it off."""
    reference_compatible: bool = False
    """Compute the feature loss as the authors' code does: add the losses of the two towers instead of averaging them,
    as the paper does, and do not scale `alpha` for teachers of other widths than 512."""


class ChainConfig(Section):
    """The chain, smallest model first; with `initial: random` a link may be smaller than its teacher."""

    links: list[Link] = Field(min_length=1)
    """The models in the order of training. With `from`, the first one starts from that model."""
    from_: str | None = Field(default=None, alias="from", json_schema_extra={"kind": "execution"})
    """An existing model that is the teacher of the first link. Default: the first link starts from scratch. It is a
    model folder of a run, a folder or file of open_clip, a Hugging Face CLIP folder, a checkpoint folder of torch or
    DeepSpeed, or `ARCHITECTURE:TAG` for weights that open_clip has on this disk. Costs of the chain do not include the
    training of that model, so accelerations over baselines look larger than they are. A resumed run may change the
    path, but not the weights behind it."""
    from_model: str | None = execution(None)
    """Architecture of the model at `from`, if its files do not name one: a preset, or a model name of open_clip."""
    from_prefix: str | None = None
    """Prefix of its parameters' names, if there are several models at `from`: `student`, `module.ema`."""
    expand: Expand = Expand()
    """Inverse weight initialization."""
    distill: Distill = Distill()
    """Inverse feature distillation."""
