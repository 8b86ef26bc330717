"""Reading recipes: strict YAML, overrides, and one clear message for whatever is wrong. No torch in here.

The sections and fields themselves are in `compt.recipe.schema` and `compt.recipe.types`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compt.errors import ConfigError, nearest
from compt.recipe.schema import (
    Recipe,
)
from compt.recipe.types import Duration


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1}: a key should be a plain word")
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: the key '{key.value}' stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _child(place: Any, parents: Sequence[str], key: str, source: str) -> str | int:
    """`key` as it indexes `place`. Raises ConfigError where there is no such item."""
    where = ".".join(parents) or "the recipe"
    if isinstance(place, list):
        if not key.isdigit() or int(key) >= len(place):
            raise ConfigError(f"{source}: '{where}' has the items 0 to {len(place) - 1}, not '{key}'")
        return int(key)
    if not isinstance(place, dict):
        raise ConfigError(f"{source}: '{where}' is the value {place!r}, not a section")
    return key


def _set(values: Any, override: str) -> None:
    """Apply one `a.b.0.c=YAML` override. A duration is replaced whole, whatever its unit was."""
    source = f"--set {override}"
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"{source}: should be KEY=VALUE, as in --set optimizer.lr=5e-4")
    *parents, last = path.split(".")
    place = values
    for at, key in enumerate(parents):
        index = _child(place, parents[:at], key, source)
        if isinstance(place, dict) and place.get(index) is None:
            place[index] = {}
        place = place[index]
    index = _child(place, parents, last, source)
    if isinstance(place, dict) and set(place) <= _UNITS and last in _UNITS:
        place.clear()
    place[index] = _yaml(text, source)


_UNITS = set(Duration.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := _section_of(part):
            return found
    return None


def _keys(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_at(location: Sequence[int | str]) -> type[BaseModel]:
    """The section at a location of a recipe, or the closest around it."""
    section: type[BaseModel] = Recipe
    for key in location:
        field = section.model_fields.get("from_" if key == "from" else str(key))
        if field is not None:
            section = _section_of(field.annotation) or section
    return section


def _message(source: str, error: ValidationError) -> str:
    """One line for the first error: file, key, value, what is wrong, and the nearest that would be right."""
    errors = error.errors()
    # A misspelt key is missing as well; its own error says which one was meant.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    location = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    key = ".".join(str(part) for part in location)
    value = first.get("input")
    shown = f"{key} = {value!r}" if key and isinstance(value, str | int | float | bool) else key
    if first["type"] == "extra_forbidden":
        known = _keys(_section_at(location[:-1]))
        text = f"unknown key{nearest(str(location[-1]), known)}; known here: {', '.join(known)}"
    elif first["type"] == "missing":
        text = "is missing"
    elif first["type"] == "dict_type":
        text = "should be a mapping"
    elif first["type"] == "model_type":
        text = f"should be a section with the keys {', '.join(_keys(_section_at(location)))}"
    elif first["type"] == "too_short":
        text = "should not be empty"
    elif first["type"] == "tuple_type":
        text = "should be a list of numbers"
    else:
        text = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if first["type"] == "literal_error" and isinstance(value, str):
            text += nearest(value, re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    others = len(errors) - 1
    more = f" (and {others} more error{'s' * (others > 1)})" if others else ""
    return f"{source}: {shown}{': ' if shown else ''}{text}{more}"


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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    values = _yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: should be a mapping with the keys {', '.join(_keys(Recipe))}")
    for override in overrides:
        _set(values, override)
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
