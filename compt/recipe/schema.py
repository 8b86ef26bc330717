"""The sections of a recipe and their fields. No torch in here.

Every field is a *result* field (it changes the trained weights and guards a resume) or an *execution* field (it only
says where and how to run); the latter are declared with `execution()`, and a section declared so is so as a whole. The
docstrings below the fields are what docs/recipes.md is made of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from compt.errors import ConfigError, nearest
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, PRESETS, VOCAB_SIZE, ModelSpec, resolve
from compt.models.scalars import DEFAULT_LOSS, LOSS_TRAITS
from compt.recipe.engine import EngineConfig, changed_engine, placed
from compt.recipe.expansion import Expand, LinkExpand
from compt.recipe.types import (
    CaptionTokens,
    Count,
    Duration,
    Name,
    OneOf,
    Pair,
    Paths,
    Section,
    Shards,
    Triple,
    execution,
    later,
)

Control = Literal["equal_epochs", "equal_macs", "equal_chain_macs"]


DECODERS = OneOf({"pillow": "compt.data.decode:PillowDecoder"})
"""Decoders of training images. To add one: write a `compt.data.decode.Decoder`, and its name and place here."""

EVALUATION_TASKS = OneOf(
    {"zeroshot": "compt.evaluate.zeroshot:ZeroShot", "retrieval": "compt.evaluate.retrieval:Retrieval"}
)
"""Tasks of evaluation sets. To add one: write a `compt.evaluate.task.EvaluationTask`, and its name and place here."""


class Data(Section):
    """The training pictures and texts."""

    train: Shards = execution(...)
    """WebDataset shards: a path, a `*` or `{000..123}` pattern, or a list of them."""
    images: Count = Field(gt=0)
    """Number of pictures. The plan counts with it; it is checked against the shards when they are at hand."""
    captions: int = Field(default=4, gt=0)
    """Captions drawn for each picture and step, without replacement, afresh every epoch."""
    caption_tokens: CaptionTokens | None = execution(None)
    """Tokens that are really computed for a caption, up to its batch's or bucket's longest, padding included: their
    mean, which runs measure and report, or the share of captions of each length, `{7: 0.8, 9: 0.2}`, whose attention is
    counted exactly. It is for the planned cost alone (without it the whole context is counted), enters the
    number of steps of the controls of equal MACs, and nothing else that is trained."""
    crop_scale: Pair = (0.9, 1.0)
    """Smallest and largest share of a picture's area that a random crop keeps."""
    decoder: Annotated[str, AfterValidator(DECODERS)] = later("pillow")
    """What decodes the training images. Evaluation always decodes with `pillow`."""
    mean: Triple = OPENAI_MEAN
    """Mean of red, green and blue, of values between 0 and 1."""
    std: Triple = OPENAI_STD
    """Standard deviation of red, green and blue."""
    shuffle_shards: int = Field(default=8, gt=0)
    """Shards among whose samples the order is shuffled; the order of shards is shuffled as well."""
    captions_csv: str | None = execution(None)
    """CSV file with captions by sample key, where the shards have none."""
    index_dir: str | None = execution(None)
    """Folder of the shards' index; beside the shards without it."""
    max_bad_share: float = execution(0.01, ge=0, le=1)
    """Share of unusable samples above which a run stops."""

    @model_validator(mode="after")
    def _ranges(self) -> Data:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {low}, {high} is not a range within 0 to 1")
        if min(self.std) <= 0:
            raise ValueError(f"std {', '.join(map(str, self.std))} has to be above 0")
        return self


class Member(BaseModel):
    """A model of the family: a preset, with any of its sizes changed. A bare name stands for the preset itself.

    Of all models: `text_width`, `text_depth`, `text_heads`, `text_head_width`, `context_length`, `vocab_size`,
    `embed_dim`, `quick_gelu` (the activation of OpenAI's own models), `width`, `heads`, `head_width`, `image_size`,
    `patch_size`, `mlp_ratio`. Of a ViT: `depth`, `no_ln_pre`. Of a Swin: `depths` (the blocks of each stage) and
    `window`. A width changes the number of heads with it. Along a chain no size shrinks; a picture may, as long as it
    has no fewer patches. `quick_gelu`, `no_ln_pre` and the widths of heads stay.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, use_attribute_docstrings=True)

    name: Name = execution(...)
    """What the model is called here, in links, jobs and reports."""
    preset: str | None = None
    """The preset it starts from; without it, the one called `name`."""


_BOTH_SIZES = (
    *("text_width", "text_depth", "text_heads", "text_head_width", "context_length", "vocab_size", "embed_dim"),
    "quick_gelu",
)
_IMAGE_SIZES: dict[str, tuple[str, ...]] = {
    "vit": ("width", "depth", "heads", "head_width", "image_size", "patch_size", "mlp_ratio", "no_ln_pre"),
    "swin": ("width", "depths", "heads", "head_width", "image_size", "patch_size", "mlp_ratio", "window"),
}


def checked_sizes(preset: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes in their own types. Raises ConfigError for one that is unknown, of a wrong type, or without effect."""
    spec = PRESETS.get(preset)
    if spec is None:
        return sizes  # resolve() says so
    known = (*_IMAGE_SIZES[spec.arch], *_BOTH_SIZES)
    checked = {}
    for key, value in sizes.items():
        if key not in known:
            others = {size for arch in _IMAGE_SIZES.values() for size in arch}
            kind = {"vit": "ViT", "swin": "Swin"}[spec.arch]
            wrong = f"a {kind} has none" if key in others else f"unknown key{nearest(key, known)}"
            raise ConfigError(f"{key}: {wrong}; known here: {', '.join(known)}")
        checked[key] = _checked_size(key, value, type(getattr(spec, key)))
    return checked


def _checked_size(key: str, value: Any, wanted: type) -> Any:
    if wanted is tuple:
        if not isinstance(value, list | tuple) or not all(type(item) is int and item > 0 for item in value):
            raise ConfigError(f"{key} = {value!r}: should be a list of whole numbers above 0")
        return tuple(value)
    fits = isinstance(value, int | float if wanted is float else wanted) and (
        wanted is bool or not isinstance(value, bool)
    )
    if not fits:
        kind = {int: "a whole number", float: "a number", bool: "true or false"}[wanted]
        raise ConfigError(f"{key} = {value!r}: should be {kind}")
    if wanted is not bool and not value > 0:
        raise ConfigError(f"{key} = {value!r}: should be greater than 0")
    if key == "vocab_size" and value < VOCAB_SIZE:
        raise ConfigError(f"vocab_size = {value}: CLIP's tokenizer has {VOCAB_SIZE} tokens")
    return wanted(value)


def _member(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Family(Section):
    """The models that are wanted."""

    members: list[Annotated[Member, BeforeValidator(_member)]] = Field(min_length=1)
    """Names of presets, or mappings with a name and changed sizes: `{name: wide, preset: vit_nano, width: 96}`."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Sizes changed in all members: `{embed_dim: 512}`. A member's own sizes come first."""

    def specs(self) -> dict[str, ModelSpec]:
        """The members by name, in the order given. Raises ConfigError for a model that cannot exist."""
        specs: dict[str, ModelSpec] = {}
        for at, member in enumerate(self.members):
            preset = member.preset or member.name
            own = {**self.common, **(member.model_extra or {})}
            try:
                spec = resolve(preset, checked_sizes(preset, own))
                if member.name in specs:
                    raise ConfigError(f"the name '{member.name}' stands there twice")
            except ConfigError as error:
                raise ConfigError(f"family.members.{at}: {error}") from None
            specs[member.name] = ModelSpec.from_dict({**spec.to_dict(), "name": member.name})
        return specs


class Link(Section):
    """One model of the chain and how long it trains."""

    model: str
    """The name of a family member. Its sizes belong to the result, its name does not."""
    train: Duration
    """Length of its training."""
    warmup: Duration
    """Length of the linear warm-up, a part of `train`."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this link; without it `optimizer.lr`."""
    alpha: float | None = Field(default=None, ge=0)
    """Weight of distillation for this link; without it `chain.distill.alpha`."""
    expand: LinkExpand | None = None
    """What of `chain.expand` is otherwise for this link: `{width: lemon, image: {zero_new_outputs: true}}`."""
    engine: dict[str, Any] | None = execution(None)
    """What of `engine` is otherwise while this model trains, as a link and as a baseline: `{name: zero2, micro_batch:
    64}`. Another `name` leaves `fsdp2` and `deepspeed_config` of `engine` behind. `device` and `timeout` are the whole
    run's."""
    nodes: int | None = execution(None, gt=0)
    """Nodes that `compt slurm submit` asks for while this link trains; without it all."""


class Distill(Section):
    """Inverse feature distillation: a model also learns to reproduce its predecessor's features.

    A predecessor for pictures of another size sees the same pictures resized (bicubic, antialiased), one of a shorter
    context the same captions cut to it, the end token kept.
    """

    alpha: float = Field(default=500.0, ge=0)
    """Weight of the feature loss, quoted for 512 features; 0 leaves it out."""
    reference_compatible: bool = False
    """Whether the losses of the two towers are added, as in the authors' code; the paper averages them."""


class Chain(Section):
    """The chain, smallest model first."""

    links: list[Link] = Field(min_length=1)
    """The models in the order of training; with `from`, the first is the first student of the model there."""
    from_: str | None = Field(default=None, alias="from", json_schema_extra={"kind": "execution"})
    """An existing model that the first link grows from, as every other link grows from the one before; without it the
    first link starts from scratch. A model folder of a run, a folder or file of open_clip, a Hugging Face CLIP folder,
    a checkpoint folder of torch or DeepSpeed, or `ARCHITECTURE:TAG` for weights that open_clip has on this disk. What
    that model's own training cost is in no speed-up, neither a link's nor the accumulated one: set against individual
    trainings, they flatter the chain by it. Its weights, not its path, belong to the result."""
    from_model: str | None = execution(None)
    """Which model that is, where `from` does not say so itself: a preset, or a model name of open_clip."""
    from_prefix: str | None = None
    """Which of several models there it is, by what its parameters' names begin with: `student`, `module.ema`."""
    expand: Expand = Expand()
    """Inverse weight initialization."""
    distill: Distill = Distill()
    """Inverse feature distillation."""


class Baselines(Section):
    """How the members of the chain are trained individually, for comparison."""

    train: Duration
    """Length of each training from scratch."""
    warmup: Duration
    """Length of the linear warm-up, a part of `train`."""
    seeds: list[int] = Field(default_factory=list)
    """Seeds to train each member with; empty: the recipe's seed."""
    controls: list[Control] = Field(default_factory=list)
    """Further trainings of the last model from scratch, with the baselines' warm-up: `equal_epochs` for as many steps
    as its link, `equal_macs` for as many MACs as its link cost with the teacher's forward passes, `equal_chain_macs`
    for as many as the whole chain up to it. `--controls` trains them, and so does `--baselines`."""


class Ema(Section):
    """Exponential moving average of the weights, restarted at each link."""

    decay: float = Field(gt=0, lt=1)
    """Share of the average that each step keeps."""


def _known_loss(name: str) -> str:
    if name not in LOSS_TRAITS:
        raise ValueError(f"should be {' or '.join(LOSS_TRAITS)}{nearest(name, LOSS_TRAITS)}")
    return name


class Optimizer(Section):
    """AdamW with linear warm-up and a cosine decay to zero, and the task loss."""

    batch: int = Field(default=1024, gt=0)
    """Pictures a step, over all processes."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: Pair = (0.9, 0.98)
    """Decay of the two moments, a step."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; none on norms, biases and learnt scalars."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; without it nothing is clipped."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type that matrix products are computed in. Weights, normalisation and losses are fp32."""
    ema: Ema | None = None
    """Moving average, stored beside the weights; the weights themselves pass on to the next link."""
    loss: Annotated[str, AfterValidator(_known_loss)] = DEFAULT_LOSS
    """Task loss: `contrastive`, the softmax loss of CLIP, or `siglip`, the sigmoid loss of single pairs, which adds a
    learnt `logit_bias` to the models. A link copies the learnt scalars of its teacher; one that the teacher does not
    have starts as from scratch."""
    image_to_text: Literal["slot", "all"] = "slot"
    """Captions among which an image looks for its own: those of the same `slot` of every image, or `all`. The sigmoid
    loss has no such choice: each image meets every caption by itself."""
    max_nonfinite: int = execution(10, gt=0)
    """Skipped steps in a row (a loss or gradient that is not finite) after which a run stops."""

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

    def result_fields(self) -> dict[str, Any]:
        """The fields that change the result. `loss` is left out where it is the default: older runs were hashed so."""
        fields = super().result_fields()
        return {name: value for name, value in fields.items() if (name, value) != ("loss", DEFAULT_LOSS)}


class EvalSet(Section):
    """A task on WebDataset shards in clip_benchmark's layout, or on a folder with one folder per class."""

    name: Name
    """What the set is called in reports."""
    task: Annotated[str, AfterValidator(EVALUATION_TASKS)] = "zeroshot"
    """`zeroshot`: classification by class names. `retrieval`: finding captions by image and images by caption."""
    data: Shards
    """Shards, as in `data.train`, or a folder."""
    role: Literal["select", "report"] = "report"
    """`select`: scored during training too, to choose settings on. `report`: only at a model's end."""
    label: str = "cls"
    """Where a sample's class number stands: the `.cls` file, or a key of its `.json`."""
    classnames: str | None = None
    """File of class names, one a line; without it classnames.txt beside the shards."""
    templates: str | None = None
    """File of prompts with `{c}` for the class; without it zeroshot_classification_templates.txt beside the shards."""


class Evaluation(Section):
    """What is measured."""

    every: Duration | None = execution(None)
    """Distance of evaluations on the `select` sets during training; without it only at the end."""
    validation: Paths = execution(list)
    """Shards of held-out pictures and captions, as in `data.train`, for the loss on them."""
    sets: list[EvalSet] = execution(list)
    """Zero-shot and retrieval sets."""
    primary: str | None = execution(None)
    """The set that verdicts and curves are drawn on."""
    batch: int = execution(256, gt=0)
    """Pictures at once."""
    contact_sheet: str | None = execution(None)
    """A set whose pictures are shown with their predictions in the report."""

    @model_validator(mode="after")
    def _names(self) -> Evaluation:
        names = [item.name for item in self.sets]
        if len(set(names)) != len(names):
            raise ValueError("two evaluation sets have the same name")
        for key in ("primary", "contact_sheet"):
            value = getattr(self, key)
            if value is not None and value not in names:
                raise ValueError(f"{key} '{value}' is no evaluation set{nearest(value, names)}")
        return self


class Recipe(Section):
    """A whole recipe."""

    name: Name = execution(...)
    """What the run is called."""
    seed: int = Field(default=0, ge=0)
    """Seed of fresh weights, order, captions and crops."""
    data: Data
    """Training set."""
    family: Family
    """Models."""
    chain: Chain
    """Order and length of training."""
    baselines: Baselines | None = None
    """Individual trainings to compare with."""
    optimizer: Optimizer = Optimizer()
    """Optimizer and task loss."""
    engine: EngineConfig = execution(EngineConfig())
    """How and where to run."""
    evaluation: Evaluation = execution(Evaluation())
    """What is measured; null: nothing."""

    @field_validator("optimizer", "engine", "evaluation", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [member.name for member in self.family.members]
        for link in self.chain.links:
            if link.model not in names:
                raise ValueError(f"chain.links: '{link.model}' is no member of the family{nearest(link.model, names)}")
        if len({link.model for link in self.chain.links}) != len(self.chain.links):
            raise ValueError("chain.links: a model stands there twice")
        if self.chain.from_ is None:
            for key in ("from_model", "from_prefix"):
                if getattr(self.chain, key) is not None:
                    raise ValueError(f"chain.{key}: is for a model at chain.from, which is missing")
            if self.chain.links[0].expand is not None:
                raise ValueError("chain.links.0.expand: this link starts from scratch; leave it out")
        if self.data.images < self.optimizer.batch:
            raise ValueError(f"optimizer.batch {self.optimizer.batch} is larger than data.images {self.data.images}")
        for at, link in enumerate(self.chain.links):
            for key in ("device", "timeout"):
                if key in (link.engine or {}):
                    raise ValueError(f"chain.links.{at}.engine.{key}: is for the whole run; set engine.{key}")
            with placed(f"chain.links.{at}.engine"):
                self.engine_of(link.model)
        return self

    def specs(self) -> dict[str, ModelSpec]:
        """The family's members by name, with the learnt scalars of the loss. Raises ConfigError as `Family.specs`."""
        return {name: replace(spec, loss=self.optimizer.loss) for name, spec in self.family.specs().items()}

    def engine_of(self, model: str) -> EngineConfig:
        """How the family member `model` is trained: `engine` with what its link says otherwise.

        Raises ValidationError where that does not fit together.
        """
        own = next((link.engine for link in self.chain.links if link.model == model), None)
        return changed_engine(self.engine, own) if own else self.engine
