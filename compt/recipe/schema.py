"""The sections of a recipe and their fields.

Every field is a *result* field (it changes the trained weights and guards a resume) or an *execution* field (it only
says where and how to run); the latter are declared with `execution()`, and a section declared so is so as a whole. The
docstrings below the fields are what docs/recipes.md is made of.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from compt.errors import ConfigError, nearest
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, PRESETS, VOCAB_SIZE, ModelSpec, resolve
from compt.recipe.chain import ChainConfig, Link
from compt.recipe.engine import EngineConfig, changed_engine, placed
from compt.recipe.optimizer import Optimizer
from compt.recipe.types import (
    Address,
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
    listed,
)

Control = Literal["equal_epochs", "equal_macs", "equal_chain_macs"]
MIN_MATCHED, MAX_BAD_SHARE = 0.5, 0.01


DECODERS = OneOf(
    {
        "pillow": "compt.data.decode:PillowDecoder",
        "torch": "compt.data.decode:TorchDecoder",
        "dali": "compt.data.dali:DaliDecoder",
    }
)
"""Decoders of training images. To add one: write a `compt.data.decode.Decoder`, and its name and place here."""

EVALUATION_TASKS = OneOf(
    {
        "zeroshot": "compt.evaluate.zeroshot:ZeroShot",
        "multilabel": "compt.evaluate.multilabel:Multilabel",
        "retrieval": "compt.evaluate.retrieval:Retrieval",
        "linear_probe": "compt.evaluate.probe:LinearProbe",
        "knn": "compt.evaluate.probe:Neighbours",
    }
)
"""Tasks of evaluation sets. To add one: write a `compt.evaluate.task.EvaluationTask`, and its name and place here."""


SHARD_CACHE = 100 * 10**9
"""Bytes of shards from object storage that a machine keeps, unless the recipe says another number."""


class TrainSet(Section):
    """One of several training sets, as in `train: [{shards: cc3m/*.tar, weight: 2.5}, {shards: cc12m/*.tar}]`.

    An epoch has each sample of a set `weight` times: 2.5 is twice, and half of the set a third time. The halves take
    turns. Each time, other crops and captions are drawn.
    """

    shards: Shards = execution(...)
    """Shards, as in `data.train`."""
    weight: float = execution(1.0, gt=0)
    """How often an epoch has each sample. A run with other weights does not resume."""
    captions_csv: str | None = execution(None)
    """Table with the captions of this set, as `data.captions_csv`."""


_ShardsOrSet = Annotated[
    Annotated[Address, Tag("[shards]")] | Annotated[TrainSet, Tag("[set]")],  # messages leave out names in brackets
    Discriminator(lambda value: "[set]" if isinstance(value, dict | TrainSet) else "[shards]"),
]


class Augment(Section):
    """Random changes to the training images after the crop, as torchvision's functions make them: first the flip, then
    the colours, in a random order, then grey.

    A strength s is a factor between 1 - s and 1 + s, at least 0. The teacher sees the same pixels as the student.
    """

    flip: float = Field(default=0.0, ge=0, le=1)
    """Share of images that are flipped left to right. Captions stay: "on the left" becomes wrong."""
    brightness: float = Field(default=0.0, ge=0)
    """Strength of changes in brightness."""
    contrast: float = Field(default=0.0, ge=0)
    """Strength of changes in contrast."""
    saturation: float = Field(default=0.0, ge=0)
    """Strength of changes in saturation."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Largest turn of the hue, to either side, as a share of the colour circle."""
    jitter: float = Field(default=1.0, gt=0, le=1)
    """Share of images whose brightness, contrast, saturation and hue change."""
    grey: float = Field(default=0.0, ge=0, le=1)
    """Share of images that become grey."""

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """Of brightness, contrast, saturation and hue."""
        return self.brightness, self.contrast, self.saturation, self.hue

    @property
    def active(self) -> bool:
        """Whether anything changes."""
        return any((self.flip, self.grey, *self.strengths))

    @model_validator(mode="after")
    def _used(self) -> Augment:
        if self.jitter != 1 and not any(self.strengths):
            raise ValueError(
                f"jitter = {self.jitter:g}: set brightness, contrast, saturation or hue too, or leave it out"
            )
        return self


class Data(Section):
    """The training set: images with captions."""

    train: Annotated[list[_ShardsOrSet], BeforeValidator(listed), Field(min_length=1)] = execution(...)
    """WebDataset shards: a path, a `*` or `{000..123}` pattern, or a list of them. Object storage: `s3://bucket/path`,
    `gs://`, `az://`, `hf://`, `https://`. Or a list of sets, each with a weight."""
    images: Count = Field(gt=0)
    """Number of images in the shards, each as often as the weight of its set says. Plans use it; a run checks it
    against the shards."""
    captions: int = Field(default=4, gt=0)
    """Captions of an image in a step, drawn without replacement in every epoch."""
    caption_pool: float | None = execution(None, gt=0)
    """Captions that an image has, on average; a step draws `captions` of them. It affects only what plans say about
    `engine.teacher_cache`. Default: that of indexed shards, else `captions`."""
    caption_tokens: CaptionTokens | None = execution(None)
    """Tokens that the text tower computes for a caption, including the padding if text is not packed: their mean, which
    runs measure and report, or the share of captions of each length, `{7: 0.8, 9: 0.2}`. It affects planned costs
    (default: the whole context) and the number of steps of controls with equal MACs. It affects no other training."""
    crop_scale: Pair = (0.9, 1.0)
    """Smallest and largest share of an image's area that a random crop keeps."""
    crop_ratio: Pair = later((3 / 4, 4 / 3))
    """Smallest and largest ratio of a random crop's width to its height."""
    augment: Augment = later(Augment())
    """Random flips and colours. Default: none."""
    decoder: Annotated[str, AfterValidator(DECODERS)] = later("pillow")
    """Decoder of the training images. Evaluation always uses `pillow`."""
    mean: Triple = OPENAI_MEAN
    """Mean of red, green and blue, from 0 to 1, that images are normalized with."""
    std: Triple = OPENAI_STD
    """Standard deviation of red, green and blue that images are normalized with."""
    shuffle_shards: int = Field(default=8, gt=0)
    """Number of shards that are open at a time, with their samples mixed. The order of shards is random too."""
    captions_csv: str | None = execution(None)
    """Table with captions (CSV, TSV, JSONL, JSON or Parquet), joined with the samples by key, file name or URL. They
    replace the captions in the shards."""
    caption_columns: list[str] | None = execution(None)
    """Fields with captions, in each `.json` and in the table. Default: the known names."""
    min_matched: float = execution(MIN_MATCHED, ge=0, le=1)
    """Share of samples that need a row in the table of captions. With fewer, a run does not start."""
    index_dir: str | None = execution(None)
    """Folder for the index of the shards. Default: beside the shards; for object storage in `cache_dir`."""
    cache_dir: str | None = execution(None)
    """Folder on each machine for shards from object storage. Default: $COMPT_CACHE, or `~/.cache/compt/shards`."""
    cache_size: Count = execution(SHARD_CACHE, gt=0)
    """Bytes of shards in `cache_dir`, for all processes of a machine. Older ones are removed."""
    max_bad_share: float = execution(MAX_BAD_SHARE, ge=0, le=1)
    """Share of unusable samples that training accepts: it stops if clearly more of the last samples of a rank are
    unusable. Also the share of unusable class numbers that an evaluation set may have."""

    @property
    def tables(self) -> list[str]:
        """All tables of captions."""
        named = [self.captions_csv, *(one.captions_csv for one in self.train if isinstance(one, TrainSet))]
        return [*dict.fromkeys(name for name in named if name)]

    @model_validator(mode="after")
    def _ranges(self) -> Data:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {low}, {high} is not a range within 0 to 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {self.crop_ratio[0]}, {self.crop_ratio[1]} is not a range above 0")
        if min(self.std) <= 0:
            raise ValueError(f"std {', '.join(map(str, self.std))} has to be above 0")
        if self.captions_csv is not None and any(isinstance(one, TrainSet) for one in self.train):
            raise ValueError("captions_csv: goes with one set; give each set of train its own captions_csv")
        return self


class Member(BaseModel):
    """A model of the family: a preset, with any of its sizes changed. A bare name means the preset itself.

    Sizes of all models: `text_width`, `text_depth`, `text_heads`, `text_head_width`, `context_length`, `vocab_size`,
    `embed_dim`, `quick_gelu` (the activation of OpenAI's models), `width`, `heads`, `head_width`, `image_size`,
    `patch_size`, `mlp_ratio`. Of a ViT: `depth`, `no_ln_pre`. Of a Swin: `depths` (the blocks of each stage) and
    `window`. A changed width changes the number of heads too. Along a chain no size may shrink, except images that keep
    at least as many patches. `quick_gelu`, `no_ln_pre` and the widths of heads must stay the same.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, use_attribute_docstrings=True)

    name: Name = execution(...)
    """Name of the model in links, jobs and reports."""
    preset: str | None = None
    """Preset whose sizes it has. Default: the one called `name`."""


_BOTH_SIZES = (
    *("text_width", "text_depth", "text_heads", "text_head_width", "context_length", "vocab_size", "embed_dim"),
    "quick_gelu",
)
_IMAGE_SIZES: dict[str, tuple[str, ...]] = {
    "vit": ("width", "depth", "heads", "head_width", "image_size", "patch_size", "mlp_ratio", "no_ln_pre"),
    "swin": ("width", "depths", "heads", "head_width", "image_size", "patch_size", "mlp_ratio", "window"),
}


def sizes_of(arch: str) -> tuple[str, ...]:
    """The sizes that a recipe may set for a model with this kind of image tower."""
    return (*_IMAGE_SIZES[arch], *_BOTH_SIZES)


def checked_sizes(preset: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes in their own types. Raises ConfigError for one that is unknown, of a wrong type, or without effect."""
    spec = PRESETS.get(preset)
    if spec is None:
        return sizes  # resolve() says so
    known = sizes_of(spec.arch)
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
        if not isinstance(value, list | tuple) or not all(type(item) is int and 0 < item <= 10**6 for item in value):
            raise ConfigError(f"{key} = {reprlib.repr(value)}: should be a list of whole numbers above 0, at most 1e6")
        return tuple(value)
    if type(value) not in ((int, float) if wanted is float else (wanted,)):
        kind = {int: "a whole number", float: "a number", bool: "true or false"}[wanted]
        raise ConfigError(f"{key} = {value!r}: should be {kind}")
    if wanted is not bool and not 0 < value <= 10**6:  # compt loops over layers
        raise ConfigError(f"{key} = {value!r}: should be greater than 0, at most 1e6")
    if key == "vocab_size" and value < VOCAB_SIZE:
        raise ConfigError(f"vocab_size = {value}: CLIP's tokenizer has {VOCAB_SIZE} tokens")
    return wanted(value)


def _member(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Family(Section):
    """The models of the recipe."""

    members: list[Annotated[Member, BeforeValidator(_member)]] = Field(min_length=1)
    """Names of presets, or mappings with a name and changed sizes: `{name: wide, preset: vit_nano, width: 96}`."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Sizes changed in all members: `{embed_dim: 512}`. A member's own sizes have priority."""

    def specs(self) -> dict[str, ModelSpec]:
        """The members by name, in the order given. Raises ConfigError for a model that cannot exist."""
        specs: dict[str, ModelSpec] = {}
        for at, member in enumerate(self.members):
            preset = member.preset or member.name
            own = {**self.common, **(member.model_extra or {})}
            try:
                spec = resolve(preset, checked_sizes(preset, own))
                if member.name in specs:
                    raise ConfigError(f"the name '{member.name}' is there twice")
            except ConfigError as error:
                raise ConfigError(f"family.members.{at}: {error}") from None
            specs[member.name] = ModelSpec.from_dict({**spec.to_dict(), "name": member.name})
        return specs


class Baselines(Section):
    """How the baselines train: each member of the chain from scratch, for comparison."""

    train: Duration
    """Length of each baseline's training."""
    warmup: Duration
    """Length of the linear warm-up, a part of `train`."""
    lr: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Peak learning rates of members, as `{vit_b16: 5e-4}`, for the controls too. Others train at `optimizer.lr`. Links
    have `lr` for the same purpose: a comparison where only one side chose its rate says little."""
    seeds: list[int] = Field(default_factory=list)
    """Seeds to train each member with. Default: the recipe's seed."""
    controls: list[Control] = Field(default_factory=list)
    """Controls: the last model trained from scratch, with the baselines' warm-up, for as many steps as its link
    (`equal_epochs`), for as many MACs as its link including the teacher's forward passes (`equal_macs`), or for as many
    MACs as the whole chain (`equal_chain_macs`). `--controls` trains them, and so does `--baselines`."""


ONE_CLASS = ("zeroshot", "linear_probe", "knn")
"""The tasks in which a sample has one class."""
TASKS_OF_FIELDS = {
    "train": ("linear_probe", "knn"),
    "label": ONE_CLASS,
    "classnames": (*ONE_CLASS, "multilabel"),
    "class_order": ONE_CLASS,
    "templates": ("zeroshot", "multilabel"),
    "caption_columns": ("retrieval",),
}
"""The tasks that read each field of an evaluation set that not all read."""


def unread_by(task: str, fields: Iterable[str]) -> str | None:
    """The first of the fields that the task does not read, with the tasks that do; None for a task of others."""
    if not any(task in tasks for tasks in TASKS_OF_FIELDS.values()):
        return None
    unread = ((name, TASKS_OF_FIELDS[name]) for name in fields if task not in TASKS_OF_FIELDS[name])
    return next((f"{name} is for {', '.join(tasks)}, not for {task}" for name, tasks in unread), None)


class EvalSet(Section):
    """A task on WebDataset shards in clip_benchmark's layout, or on a folder with one folder per class."""

    of_other_tasks: ClassVar[frozenset[str]] = frozenset()
    """Fields that may be there for another task than `task`."""
    name: Name
    """Name of the set in reports."""
    task: Annotated[str, AfterValidator(EVALUATION_TASKS)] = "zeroshot"
    """`zeroshot`: classification by class names. `multilabel`: the same with several classes an image, from a `.npy`.
    `retrieval`: finding captions by image and images by caption. `linear_probe` and `knn`: classification from image
    features, with the labelled images of `train`."""
    data: Shards
    """Shards, as in `data.train`, or a folder."""
    train: Shards | None = later(None)
    """Labelled images for `linear_probe` and `knn`, written as `data`."""
    role: Literal["select", "report"] = "report"
    """`select`: also scored during training, to choose settings. `report`: scored only at the end of a job."""
    label: str = "cls"
    """Where a sample has its class number: `cls` for the `.cls` file, else a key of its `.json`."""
    classnames: str | None = None
    """File of class names, one a line. Default: classnames.txt beside the shards. Without it, class folders have the
    names of their folders; WordNet identifiers such as n01440764 become ImageNet's class names."""
    class_order: Literal["name", "number"] | None = later(None)
    """Order of class folders: by `name` (10 before 2, as in torchvision) or by `number` (as in ImageNetV2).
    Needed where the two differ and there is a file of class names."""
    templates: str | None = None
    """File of prompts with `{c}` for the class. Default: zeroshot_classification_templates.txt beside the shards.
    Without it, folders of WordNet identifiers have the 80 prompts of OpenAI's CLIP for ImageNet, and others `a photo of
    {c}`."""
    caption_columns: list[str] | None = later(None)
    """Fields of a `.json` with the captions of a `retrieval` set. Default: those of `data.caption_columns`. `[]`: the
    known ones."""

    @model_validator(mode="after")
    def _fields_are_read(self) -> EvalSet:
        fields = type(self).model_fields
        checked = [name for name in TASKS_OF_FIELDS if name not in self.of_other_tasks]
        given = [name for name in checked if getattr(self, name) != fields[name].get_default()]
        if text := unread_by(self.task, given):
            raise ValueError(text)
        return self


class Evaluation(Section):
    """What is scored."""

    every: Duration | None = execution(None)
    """Score the `select` sets this often during training. Default: only at the end."""
    validation: Paths = execution(list)
    """Shards of held-out images and captions for the validation loss, written as in `data.train`."""
    sets: list[EvalSet] = execution(list)
    """The sets that models are scored on."""
    primary: str | None = execution(None)
    """The set that comparisons, verdicts and curves use."""
    batch: int = execution(256, gt=0)
    """Images that are computed at once."""
    contact_sheet: str | None = execution(None)
    """A set of which the report shows images with their predictions. With it, the report also shows images of the first
    retrieval set with the captions that the model finds."""

    def identity(self) -> list[dict[str, Any]]:
        """What scores depend on beside the model. When it changes, models are scored again."""
        return [item.result_fields() for item in self.sets]

    @model_validator(mode="after")
    def _names(self) -> Evaluation:
        names = [item.name for item in self.sets]
        if len(set(names)) != len(names):
            raise ValueError("two evaluation sets have the same name")
        for key in ("primary", "contact_sheet"):
            value = getattr(self, key)
            if value is not None and value not in names:
                raise ValueError(f"{key} '{value}' is not an evaluation set{nearest(value, names)}")
        return self


class Recipe(Section):
    """A whole recipe."""

    name: Name = execution(...)
    """Name of the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, order, captions and crops."""
    data: Data
    """Training set."""
    family: Family
    """The models."""
    chain: ChainConfig
    """The links: which models are trained, in which order, for how long."""
    baselines: Baselines | None = None
    """Models trained from scratch to compare with."""
    optimizer: Optimizer = Optimizer()
    """Optimizer and task loss."""
    engine: EngineConfig = execution(EngineConfig())
    """How and where to run."""
    evaluation: Evaluation = execution(Evaluation())
    """What is scored. `null`: nothing."""

    @field_validator("optimizer", "engine", "evaluation", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [member.name for member in self.family.members]
        for link in self.chain.links:
            if link.model not in names:
                raise ValueError(
                    f"chain.links: '{link.model}' is not a member of the family{nearest(link.model, names)}"
                )
        for name in self.baselines.lr if self.baselines else ():
            if name not in names:
                raise ValueError(f"baselines.lr.{name}: is not a member of the family{nearest(name, names)}")
        if len({link.model for link in self.chain.links}) != len(self.chain.links):
            raise ValueError("chain.links: a model is there twice")
        if self.chain.from_ is None:
            for key in ("from_model", "from_prefix"):
                if getattr(self.chain, key) is not None:
                    raise ValueError(f"chain.{key}: is for a model at chain.from, which is missing")
            first = self.chain.links[0]
            for key, given in (("expand", first.expand is not None), ("initial", first.initial == "random")):
                if given:
                    raise ValueError(f"chain.links.0.{key}: this link starts from scratch; leave it out")
        if self.data.images < self.optimizer.batch:
            raise ValueError(f"optimizer.batch {self.optimizer.batch} is larger than data.images {self.data.images}")
        for at, link in enumerate(self.chain.links):
            self._check_initial(at, link)
            for key in ("device", "timeout"):
                if key in (link.engine or {}):
                    raise ValueError(f"chain.links.{at}.engine.{key}: is for the whole run; set engine.{key}")
            with placed(f"chain.links.{at}.engine"):
                self.engine_of(link.model)
        return self

    def _check_initial(self, at: int, link: Link) -> None:
        if link.initial == "expanded":
            return
        if link.expand is not None:
            raise ValueError(f"chain.links.{at}.expand: nothing is expanded with initial: random; leave it out")
        if not (self.chain.distill.alpha if link.alpha is None else link.alpha):
            raise ValueError(f"chain.links.{at}.initial: random with an alpha of 0 uses nothing of the teacher")

    def specs(self) -> dict[str, ModelSpec]:
        """The family's members by name, with the learned scalars of the loss. Raises ConfigError as `Family.specs`."""
        return {name: replace(spec, loss=self.optimizer.loss) for name, spec in self.family.specs().items()}

    def with_tokens(self, tokens: Any) -> Recipe:
        """The same with other `data.caption_tokens`."""
        return self.model_copy(update={"data": self.data.model_copy(update={"caption_tokens": tokens})})

    def engine_of(self, model: str) -> EngineConfig:
        """How the family member `model` is trained: `engine` with what its link says otherwise.

        Raises ValidationError where that does not fit together.
        """
        own = next((link.engine for link in self.chain.links if link.model == model), None)
        return changed_engine(self.engine, own) if own else self.engine
