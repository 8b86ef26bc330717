"""Find and read recipes: strict YAML, overrides, and a clear message for each mistake.

The sections and fields are in `compt.recipe.schema` and `compt.recipe.types`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from compt.errors import ConfigError, nearest
from compt.files import read_text
from compt.recipe.schema import Control, Recipe
from compt.recipe.types import Duration, section_within


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number. It refuses a key that occurs twice, and the merge of mappings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1}: a key should be a plain word")
            if key.tag == "tag:yaml.org,2002:merge":  # merges of merges fill the memory at the word of a few bytes
                raise ConfigError(f"line {key.start_mark.line + 1}: '<<' is not supported; write the keys themselves")
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: the key '{key.value}' occurs twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str, source: str) -> Any:
    """The value of a YAML text. Raises ConfigError that names `source`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except ValueError as error:  # a number of thousands of digits, an impossible date
        raise ConfigError(f"{source}: a value cannot be read: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply to be a recipe") from None


def read_override(option: str, text: str, example: str) -> tuple[str, Any]:
    """Key and value of a KEY=VALUE option; the value is YAML. Raises ConfigError that names the option."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{option} {text}: should be KEY=VALUE, as in {option} {example}")
    return key, read_yaml(value, f"{option} {text}")


def _child(place: Any, parents: Sequence[str], key: str, source: str) -> str | int:
    """`key` as an index of `place`. Raises ConfigError for an item that does not exist."""
    where = ".".join(parents) or "the recipe"
    if isinstance(place, list):
        if not key.isdecimal() or int(key) >= len(place):
            raise ConfigError(f"{source}: '{where}' has the items 0 to {len(place) - 1}, not '{key}'")
        return int(key)
    if not isinstance(place, dict):
        raise ConfigError(f"{source}: '{where}' is the value {place!r}, not a section")
    return key


def _set(values: Any, override: str) -> None:
    """Apply one `a.b.0.c=YAML` override. A duration of another unit is replaced as a whole."""
    source = f"--set {override}"
    path, value = read_override("--set", override, "optimizer.lr=5e-4")
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
    place[index] = value


_UNITS = set(Duration.model_fields)


def _keys(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_at(section: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The section at a location below `section`, or the closest section around it."""
    for key in location:
        field = section.model_fields.get("from_" if key == "from" else str(key))
        if field is not None:
            section = section_within(field.annotation)[0] or section
    return section


def _lines(error: ValidationError, section: type[BaseModel], set_keys: Sequence[str]) -> list[str]:
    """A line for each mistake: key, value, what is wrong, and the nearest that would be right."""
    lines: dict[str, str] = {}
    meant = set()
    # Unknown keys come first: a misspelt key is missing as well, and one line is enough for both.
    for item in sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden"):
        value, kind = item.get("input"), item["type"]
        # pydantic puts types such as `list[str]` between the keys. An unknown key is last, and may have a bracket.
        *parents, last = item["loc"] or ("",)
        location = [part for part in parents if not (isinstance(part, str) and "[" in part)]
        if kind == "extra_forbidden" or "[" not in str(last):
            location.append(last)
        key = ".".join(map(str, location))
        text = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if kind == "extra_forbidden":
            known = _keys(_section_at(section, location[:-1]))
            close = nearest(str(location[-1]), known)
            meant |= {".".join(map(str, [*location[:-1], name])) for name in known if f"'{name}'" in close}
            text = f"unknown key{close}; known here: {', '.join(known)}"
        elif kind == "missing":
            if key in meant:
                continue
            text = "is missing"
        elif kind == "model_type":
            text = f"should be a section with the keys {', '.join(_keys(_section_at(section, location)))}"
        elif kind == "literal_error" and isinstance(value, str):
            text += nearest(value, re.findall(r"'([^']*)'", item["ctx"]["expected"]))
        text = _LISTS.get(key, text) if kind == "list_type" else _INSTEAD.get(kind, text)
        # An address may hold a password, and this line goes into logs.
        plain = isinstance(value, str | int | float | bool) and "://" not in str(value)
        shown = f"{key} = {value!r}" if key and plain else key
        if any(f"{key}.".startswith(f"{name}.") for name in set_keys):
            shown = f"--set {shown}"
        lines.setdefault(key, f"{shown}: {text}" if shown else text)
    return list(lines.values())


_INSTEAD = {
    "dict_type": "should be a mapping",
    "too_short": "should not be empty",
    "tuple_type": "should be a list of numbers",
}
"""Words for pydantic's messages that name Python types."""

_LISTS = {
    "data.train": "should be shards (text), a list of them, or a list of {shards, weight}",
    "baselines.controls": f"should be a list of {', '.join(get_args(Control))}",
}
"""Words for lists whose items pydantic does not name."""

_LISTED = 20
"""The most mistakes that one message lists."""


def refuse(source: str, error: ValidationError, section: type[BaseModel], set_keys: Sequence[str] = ()) -> ConfigError:
    """The error that names `source` and, for each mistake, the key, the value and what would be right.

    A mistake at or below one of `set_keys` is named as one of `--set`.
    """
    lines = _lines(error, section, set_keys)
    if len(lines) == 1:
        return ConfigError(f"{source}: {lines[0]}")
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    listed = "".join(f"\n  {line}" for line in [*lines[:_LISTED], *more])
    return ConfigError(f"{source}: {len(lines)} mistakes{listed}")


def parse_recipe(values: Mapping[str, Any], source: str = "recipe", set_keys: Sequence[str] = ()) -> Recipe:
    """Check plain values, of which `--set` gave those at `set_keys`.

    Raises ConfigError that names `source` and, for each mistake, the key, the value and what would be right.
    """
    try:
        recipe = Recipe.model_validate(values)
        recipe.family.specs()
    except ValidationError as error:
        raise refuse(source, error, Recipe, set_keys) from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return recipe


S = TypeVar("S", bound=BaseModel)


def parse_pairs(section: type[S], text: str, option: str) -> S:
    """A section from the text of an option: KEY=VALUE pairs with commas between, values in YAML.

    Raises ConfigError that names the option and, for each mistake, the key, the value and what would be right.
    """
    values: dict[str, Any] = {}
    for pair in text.split(",") if text else ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"{option} {text}: should be KEY=VALUE pairs with the keys {', '.join(_keys(section))}")
        if key in values:
            raise ConfigError(f"{option} {text}: sets {key} twice")
        values[key] = read_yaml(value, f"{option} {pair}")
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise refuse(option, error, section) from None


def shipped(kind: Literal["recipes", "suites"]) -> dict[str, Path]:
    """The recipes or suites that come with compt, by name."""
    folder = Path(str(resources.files("compt"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The path of a recipe: `name` if that file exists, else the shipped recipe of that name. Raises ConfigError."""
    known = shipped("recipes")
    if Path(name).exists() and not Path(name).is_dir():
        return Path(name)
    if str(name) in known:
        return known[str(name)]
    close = difflib.get_close_matches(Path(name).stem, known, cutoff=0.4) or list(known)
    raise ConfigError(f"{name}: no such file, and no recipe of that name; the nearest are {', '.join(close)}")


def recipe_text(path: Path) -> str:
    """The text of the file of a recipe or a suite. Raises ConfigError."""
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def load_recipe(path: Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `a.b=c` overrides. Raises ConfigError."""
    values = read_yaml(recipe_text(path), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: should be a mapping with the keys {', '.join(_keys(Recipe))}")
    for override in overrides or ():
        _set(values, override)
    return parse_recipe(values, str(path), [override.partition("=")[0] for override in overrides or ()])


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return next(n for n in range(most, 0, -1) if number % n == 0)


def split_batch(batch: int, world_size: int, micro_batch: int | None) -> tuple[int, int]:
    """Images of a rank in a step, and images of a micro-batch. Raises ConfigError when they do not divide evenly."""
    if batch % world_size:
        fewer = largest_divisor(batch, min(world_size, batch))
        more = next((n for n in range(world_size, batch) if batch % n == 0), batch)
        text = f"optimizer.batch {batch} cannot be shared evenly by {world_size} processes"
        raise ConfigError(f"{text}; {' or '.join(map(str, dict.fromkeys((fewer, more))))} can share it")
    per_rank = batch // world_size
    micro = min(micro_batch or per_rank, per_rank)
    if per_rank % micro:
        raise ConfigError(
            f"engine.micro_batch {micro} does not divide the {per_rank} images of a process; "
            f"take {largest_divisor(per_rank, micro)}"
        )
    return per_rank, micro
