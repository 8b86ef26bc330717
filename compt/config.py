"""The recipe: one strict YAML file that describes data, family, chain, baselines, optimizer, engine and evaluation.

Every field is a *result* field (it changes the trained weights and guards a resume) or an *execution* field (it only
says where and how to run); the latter are declared with `execution()`. No torch in here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from compt.errors import ConfigError, nearest
from compt.presets import ModelSpec, resolve

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def execution(default: Any, **constraints: Any) -> Any:
    """A field that changes how a run is done, not what comes out of it."""
    if isinstance(default, type):
        return Field(default_factory=default, json_schema_extra={"kind": "execution"}, **constraints)
    return Field(default=default, json_schema_extra={"kind": "execution"}, **constraints)


class Section(BaseModel):
    """A part of a recipe: immutable, unknown keys and wrong types refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    def result_fields(self) -> dict[str, Any]:
        """The fields that change the result, as plain JSON values."""
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("kind") == "execution")
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.result_fields()
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


_SUFFIX = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def _count(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGB]?)", value.replace("_", ""))
        if not match:
            raise ValueError("should be a whole number, or one with a suffix: 500k, 5M, 2B")
        return round(float(match[1]) * _SUFFIX[match[2]])
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(_count)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Shards = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


class Duration(Section):
    """A length of training with its unit: exactly one of epochs, steps (of the optimizer), samples (images)."""

    epochs: float | None = Field(default=None, ge=0)
    steps: Count | None = Field(default=None, ge=0)
    samples: Count | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _has_unit(cls, value: Any) -> Any:
        if isinstance(value, int | float | str):
            raise ValueError(f"needs a unit: write {{epochs: {value}}}, {{steps: {value}}} or {{samples: {value}}}")
        return value

    @model_validator(mode="after")
    def _one_unit(self) -> Duration:
        given = [unit for unit in ("epochs", "steps", "samples") if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of epochs, steps, samples; it has {' and '.join(given) or 'none'}")
        return self

    def to_steps(self, images: int, batch: int) -> int:
        """Optimizer steps for a set of `images` and a global `batch`; an epoch is floor(images / batch) steps."""
        if self.steps is not None:
            return self.steps
        if self.samples is not None:
            return math.ceil(self.samples / batch)
        assert self.epochs is not None
        return round(self.epochs * (images // batch))

    def __str__(self) -> str:
        if self.epochs is not None:
            return f"{self.epochs:g} epochs"
        return f"{self.steps} steps" if self.steps is not None else f"{self.samples} samples"


class Data(Section):
    """Training pictures and texts. `images` is checked against the shards when they are at hand."""

    train: Shards = execution(...)
    images: Count = Field(gt=0)
    captions: int = Field(default=4, gt=0)
    mean_caption_tokens: float | None = execution(None, gt=0)
    crop_scale: Pair = (0.9, 1.0)
    mean: Triple = OPENAI_MEAN
    std: Triple = OPENAI_STD
    shuffle_shards: int = Field(default=8, gt=0)
    captions_csv: str | None = execution(None)
    index_dir: str | None = execution(None)
    max_bad_share: float = execution(0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _crop(self) -> Data:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {low}, {high} is not a range within 0 to 1")
        return self


class Member(BaseModel):
    """A model of the family: a preset, with any of its fields changed."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str
    preset: str | None = None


def _member(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Family(Section):
    """The models that are wanted. `common` changes a field of all of them; each may change its own."""

    members: list[Annotated[Member, BeforeValidator(_member)]] = Field(min_length=1)
    common: dict[str, Any] = {}

    def specs(self) -> dict[str, ModelSpec]:
        """The members by name, in the order given. Raises ConfigError for a model that cannot exist."""
        specs: dict[str, ModelSpec] = {}
        for member in self.members:
            own = {**self.common, **(member.model_extra or {})}
            spec = resolve(member.preset or member.name, own)
            if member.name in specs:
                raise ConfigError(f"family.members: '{member.name}' stands there twice")
            specs[member.name] = ModelSpec.from_dict({**spec.to_dict(), "name": member.name})
        return specs


class Link(Section):
    """One model of the chain and how long it trains; `lr` and `alpha` replace the recipe's for this link."""

    model: str
    train: Duration
    warmup: Duration
    lr: float | None = Field(default=None, gt=0)
    alpha: float | None = Field(default=None, ge=0)


class Expand(Section):
    """Operators of inverse weight initialization."""

    width: str = "insert"
    depth: str = "duplicate"
    zero_new_outputs: bool = False


class Distill(Section):
    """Inverse feature distillation. `alpha` is quoted for 512 features; 0 leaves it out.

    `reference_compatible` adds the two towers' losses as the authors' code does; the paper averages them.
    """

    alpha: float = Field(default=500.0, ge=0)
    reference_compatible: bool = False


class Chain(Section):
    """The chain, smallest model first. With `from`, the first link starts from that existing model folder."""

    links: list[Link] = Field(min_length=1)
    from_: str | None = Field(default=None, alias="from", json_schema_extra={"kind": "execution"})
    expand: Expand = Expand()
    distill: Distill = Distill()


Control = Literal["equal_epochs", "equal_macs"]


class Baselines(Section):
    """How each member is trained individually for comparison, and the controls of the last link.

    `equal_epochs`: the last model from scratch for its link's epochs. `equal_macs`: from scratch for as many MACs as
    its link cost, the teacher's forward passes included.
    """

    train: Duration
    warmup: Duration
    seeds: list[int] = Field(default=[], description="seeds of the baselines; empty: the recipe's seed")
    controls: list[Control] = []


class Ema(Section):
    """Exponential moving average of the weights, restarted at each link."""

    decay: float = Field(gt=0, lt=1)


class Optimizer(Section):
    """AdamW with warm-up and cosine decay to zero. `batch` is global, whatever the number of processes."""

    batch: int = Field(default=1024, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    betas: Pair = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad_norm: float | None = Field(default=None, gt=0)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    ema: Ema | None = None
    image_to_text: Literal["slot", "all"] = "slot"
    max_nonfinite: int = execution(10, gt=0)


class EngineConfig(Section):
    """How and where to run. Nothing in here changes what is learnt."""

    name: Literal["ddp"] = execution("ddp")
    device: Literal["auto", "cpu", "cuda"] = execution("auto")
    micro_batch: int | None = execution(None, gt=0)
    text_buckets: int = execution(1, gt=0)
    loss_chunk: int | None = execution(None, gt=0)
    compile: bool = execution(False)
    workers: int = execution(4, ge=0)
    cache: bool = execution(False)
    log_every: Duration = execution(Duration(steps=50))
    checkpoint_every: Duration = execution(Duration(steps=1000))
    keep_checkpoints: int = execution(2, gt=0)


class EvalSet(Section):
    """A zero-shot or retrieval task on WebDataset shards or a folder of class folders.

    `select` sets are scored during training too, so that settings can be chosen on them; `report` sets only at a
    model's end. Class names and templates default to clip_benchmark's files beside the shards.
    """

    name: str
    task: Literal["zeroshot", "retrieval"] = "zeroshot"
    data: Shards
    role: Literal["select", "report"] = "report"
    label: str = "cls"
    classnames: str | None = None
    templates: str | None = None


class Evaluation(Section):
    """What is measured. `primary` names the zero-shot set that verdicts and curves are drawn on."""

    every: Duration | None = execution(None)
    validation: list[str] = execution(list)
    sets: list[EvalSet] = execution(list)
    primary: str | None = execution(None)
    batch: int = execution(256, gt=0)
    contact_sheet: str | None = execution(None)

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
    """A whole recipe. `load_recipe` reads one from disk."""

    name: str = execution(...)
    seed: int = Field(default=0, ge=0)
    data: Data
    family: Family
    chain: Chain
    baselines: Baselines | None = None
    optimizer: Optimizer = Optimizer()
    engine: EngineConfig = execution(EngineConfig())
    evaluation: Evaluation = execution(Evaluation())

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [member.name for member in self.family.members]
        for link in self.chain.links:
            if link.model not in names:
                raise ValueError(f"chain.links: '{link.model}' is no member of the family{nearest(link.model, names)}")
        if len({link.model for link in self.chain.links}) != len(self.chain.links):
            raise ValueError("chain.links: a model stands there twice")
        if self.data.images < self.optimizer.batch:
            raise ValueError(f"optimizer.batch {self.optimizer.batch} is larger than data.images {self.data.images}")
        return self


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: the key '{key.value}' stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _set(values: Any, path: str, text: str) -> None:
    """Replace the value at a dotted `path` (list items by their number) by YAML `text`."""
    *parents, last = path.split(".")
    place = values
    for at, key in enumerate(parents):
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ConfigError(f"--set {path}: '{'.'.join(parents[:at])}' has items 0 to {len(place) - 1}")
            place = place[int(key)]
        elif isinstance(place, dict):
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
        else:
            raise ConfigError(f"--set {path}: '{'.'.join(parents[:at])}' is a value, not a section")
    value = yaml.load(text, Loader=_Loader)
    if isinstance(place, list):
        if not last.isdigit() or int(last) >= len(place):
            raise ConfigError(f"--set {path}: '{'.'.join(parents)}' has items 0 to {len(place) - 1}")
        place[int(last)] = value
    elif isinstance(place, dict):
        if last in ("epochs", "steps", "samples"):
            place.clear()
        place[last] = value
    else:
        raise ConfigError(f"--set {path}: '{'.'.join(parents)}' is a value, not a section")


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """The keys that the section around `location` knows."""
    model: Any = Recipe
    for key in location:
        if isinstance(key, int):
            continue
        field = model.model_fields.get("from_" if key == "from" else key) if hasattr(model, "model_fields") else None
        if field is None:
            break
        model = _section_of(field.annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := _section_of(part):
            return found
    return None


def _message(source: str, error: ValidationError) -> str:
    first = error.errors()[0]
    location = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    key = ".".join(str(part) for part in location)
    value = first.get("input")
    shown = f" = {value!r}" if isinstance(value, str | int | float | bool) else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        text = f"{key}{shown}: unknown key{nearest(str(location[-1]), known)}; known here: {', '.join(known)}"
    elif first["type"] == "missing":
        text = f"{key}: is missing"
    else:
        text = f"{key}{shown}: " if key else ""
        text += first["msg"].removeprefix("Value error, ")
    more = len(error.errors()) - 1
    return f"{source}: {text}" + (f" (and {more} more like errors)" if more else "")


def parse_recipe(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check plain values. Raises ConfigError naming `source`, the key, the value and what would be right."""
    try:
        recipe = Recipe.model_validate(values)
        recipe.family.specs()
    except ValidationError as error:
        raise ConfigError(_message(source, error)) from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `a.b=c` overrides. Raises ConfigError with one message."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: should be a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override}: should be KEY=VALUE, as in --set optimizer.lr=5e-4")
        _set(values, key, text)
    return parse_recipe(values, str(path))


def split_batch(batch: int, world_size: int, micro_batch: int | None) -> tuple[int, int]:
    """(images of a rank a step, images of a micro-batch). Raises ConfigError when they do not divide evenly."""
    if batch % world_size:
        raise ConfigError(f"optimizer.batch {batch} cannot be shared evenly by {world_size} processes")
    per_rank = batch // world_size
    micro = min(micro_batch or per_rank, per_rank)
    if per_rank % micro:
        raise ConfigError(f"engine.micro_batch {micro} does not divide the {per_rank} images of a process")
    return per_rank, micro
