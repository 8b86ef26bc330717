"""What the sections of a recipe are built from: strict sections, tables of names, counts, durations."""

from __future__ import annotations

import math
import pkgutil
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from compt.errors import nearest


def execution(default: Any, **constraints: Any) -> Any:
    """A field that changes how a run is done, not what comes out of it."""
    source = "default_factory" if isinstance(default, type) else "default"
    return Field(**{source: default}, json_schema_extra={"kind": "execution"}, **constraints)


def is_execution(field: FieldInfo) -> bool:
    """Whether a field was declared with `execution()`."""
    return _kind(field) == "execution"


def _kind(field: FieldInfo) -> str:
    return str(field.json_schema_extra.get("kind")) if isinstance(field.json_schema_extra, dict) else ""


def later(default: Any) -> Any:
    """A result field that older versions did not have: `result_fields` leaves it out while it has its default.

    Otherwise the field would change the hash of every recipe, and no older run could be resumed.
    """
    return Field(default=default, json_schema_extra={"kind": "later"})


@dataclass(frozen=True, eq=False)
class OneOf:
    """Accepts the names of a table and raises ValueError for others. A name added to the table is valid from then on.

    A table may map a name to its class as "module:Class". `load` imports that when it is used, so that checking a
    recipe stays fast.
    """

    table: dict[str, Any]

    def __call__(self, name: str) -> str:
        """`name` itself. Raises ValueError for one that the table does not have."""
        if name not in self.table:
            *others, last = map(repr, self.table)
            choices = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"should be {choices}{nearest(name, self.table)}")
        return name

    def load(self, name: str) -> Any:
        """The class called `name`."""
        return pkgutil.resolve_name(self.table[self(name)])


MOST = 10**18
"""The largest number in a recipe: costs are products of several, and have to be numbers that Python can print."""


def bounded(value: Any) -> Any:
    """`value` itself. Raises ValueError for a number beyond `MOST`."""
    if isinstance(value, int | float) and abs(value) > MOST:
        raise ValueError(f"should be at most {MOST:.0e}")
    return value


class Section(BaseModel):
    """A part of a recipe: immutable, unknown keys and wrong types refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    _bounded = field_validator("*")(bounded)

    def result_fields(self) -> dict[str, Any]:
        """The fields that change the result, as plain JSON values."""
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not is_execution(field) and not (_kind(field) == "later" and getattr(self, name) == field.default)
        }


def first_mistake(error: ValidationError) -> str:
    """The first mistake that pydantic found, in words: key, value if it is short, and what would be right."""
    first = error.errors()[0]
    key, value = ".".join(map(str, first["loc"])), first["input"]
    text = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    plain = key and first["type"] != "missing" and not isinstance(value, dict)
    shown = f" = {textwrap.shorten(ascii(value), 60)}" if plain else ""
    return f"{key}{shown}: {text}" if key else text


def section_within(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section within an annotation, None without one, and whether there is a list of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        inner, many = section_within(part)
        if inner is not None:
            return inner, many or get_origin(annotation) is list
    return None, False


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.result_fields()
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
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
        value = float(match[1]) * _SUFFIX[match[2]]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def listed(value: Any) -> Any:
    """A list, also of a single value."""
    return [value] if isinstance(value, str | dict) else value


def checked_address(value: str) -> str:
    """The place of shards. Raises ValueError for one that would write a password or a signature into run folders."""
    scheme, _, rest = value.partition("://")
    if "@" in rest.partition("/")[0] and scheme != "hf":
        raise ValueError(
            f"the address {scheme}://… holds a user or password: put them into ~/.netrc, or the variables of the store"
        )
    if rest and scheme.startswith("http") and "?" in rest:
        raise ValueError(
            f"the address {value.partition('?')[0]} goes on with a query: a signature is a secret that expires; use "
            "s3://, gs:// or az:// with the credentials of the environment"
        )
    return value


def _named(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ValueError(
            "becomes a file's name: should be of letters, digits, '_', '.' and '-', a letter or digit first"
        )
    return value


Name = Annotated[str, AfterValidator(_named)]
Count = Annotated[int, BeforeValidator(_count)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Address = Annotated[str, AfterValidator(checked_address)]
Paths = Annotated[list[Address], BeforeValidator(listed)]
Shards = Annotated[list[Address], BeforeValidator(listed), Field(min_length=1)]


def checked_caption_tokens(value: Any) -> Any:
    """A mean number of tokens, or {length: share of captions} as int and float. Raises ValueError otherwise.

    Shares are weights of any sum above 0; zeros are allowed among them.
    """
    if not isinstance(value, Mapping):
        if not _positive(bounded(value)):
            raise ValueError("should be a number above 0, or a mapping of lengths to shares")
        return float(value)
    # JSON knows only keys of text, and a recipe has to come back from it.
    shares = {int(at) if isinstance(at, str) and at.isdecimal() else at: share for at, share in value.items()}
    for length, share in shares.items():
        if not isinstance(bounded(length), int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"the length {length!r} should be a whole number of tokens, at least 1")
        if share != 0 and not _positive(bounded(share)):
            raise ValueError(f"the share {share!r} of length {length} should be a number, at least 0")
    if not any(shares.values()):
        raise ValueError("a mapping of lengths to shares needs a share above 0")
    return {length: float(share) for length, share in shares.items()}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


CaptionTokens = Annotated[float | dict[int, float], BeforeValidator(checked_caption_tokens)]


class Duration(Section):
    """A length of training with its unit: exactly one of epochs, steps and samples."""

    epochs: float | None = Field(default=None, ge=0)
    """Passes over the training set, of floor(images / batch) steps each."""
    steps: Count | None = Field(default=None, ge=0)
    """Optimizer steps."""
    samples: Count | None = Field(default=None, ge=0)
    """Images, rounded up to whole steps. `5M` is five million."""

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
