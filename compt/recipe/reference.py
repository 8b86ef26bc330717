"""The reference of recipe fields, written from the schema: `python -m compt.recipe.reference FILE`."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from compt.files import write_text
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import PRESETS
from compt.recipe.expansion import Expand
from compt.recipe.schema import Member, Recipe, TrainSet
from compt.recipe.types import Duration, OneOf, is_execution, section_within

_INTRODUCTION = """# Recipes

A recipe is one YAML file. Unknown keys, wrong types and impossible chains are errors before anything starts: one line
names the file, the key, the value and the nearest key that is right. `--set` replaces any field on the command line;
list items are numbered from 0: `--set optimizer.lr=5e-4 --set chain.links.1.train.epochs=30`. YAML's anchors and
aliases (`&a`, `*a`) work; the merge of mappings (`<<`) is refused.

Fields are of two kinds. **result** fields change the trained weights: a run cannot be resumed after one of them has
changed. **execution** fields say where and how to run: they may change before a run is resumed. Paths are execution
fields, because data may move. The data itself must stay the same: a resume compares hashes of the shards, their
weights, the tables and names of captions, and the evaluation sets.

This page is written by `python -m compt.recipe.reference docs/recipes.md`.
"""

EXPANSION_EXAMPLE = """\
chain:
  expand: {width: insert, depth: duplicate}       # every link, both towers
  links:
    - {model: vit_nano, train: {epochs: 4}, warmup: {steps: 9}}
    - {model: vit_micro, train: {epochs: 2}, warmup: {steps: 9}, expand: {text: {width: lemon}, zero_new_outputs: true}}
    - {model: vit_mini, train: {epochs: 2}, warmup: {steps: 9}, expand: {width: net2net, noise: 0.05}}
"""
"""A chain whose links grow in different ways."""

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def reference() -> str:
    """The whole page, as Markdown: a table of fields for each section."""
    return "\n".join([_INTRODUCTION, *_section("", Recipe, execution=False), *_section("duration", Duration, None)])


def _section(path: str, section: type[BaseModel], execution: bool | None) -> Iterator[str]:
    """The table of one section, then those below it. `execution` is that of the section; None where it depends."""
    doc = " ".join((section.__doc__ or "").split())
    yield f"## {f'`{path}`' if path else 'Recipe'}\n\n{doc}\n"
    yield "| field | value | default | kind | meaning |\n|---|---|---|---|---|"
    below = []
    for name, field in section.model_fields.items():
        key = field.alias or name
        own = execution if execution is None else execution or is_execution(field)
        inner, many = section_within(field.annotation)
        if inner is not None and inner is not Duration:
            below.append((f"{path}.{key}".lstrip(".") + (".N" if many else ""), inner, own))
        kind = "as its section" if own is None else "execution" if own else "result"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{key}` | {_type(field.annotation, field)} | {_default(field)} | {kind} | {meaning} |"
    yield ""
    if section is Expand:
        yield from _operators()
    if section is Member:
        yield from _presets()
    for inner_path, inner, own in below:
        yield from _section(inner_path, inner, own)


def _operators() -> Iterator[str]:
    """The operators of widths and depths, and how they are chosen for one link or one tower."""
    for what, operators in (("width", WIDTH_OPERATORS), ("depth", DEPTH_OPERATORS)):
        yield f"| {what} operator | what it does |\n|---|---|"
        yield from (f"| `{operator.name}` | {operator.meaning} |" for operator in operators.values())
        yield ""
    yield "A link takes what it does not set from `chain.expand`; a tower takes it from the value for both towers:\n"
    yield f"```yaml\n{EXPANSION_EXAMPLE}```\n"


def _presets() -> Iterator[str]:
    """The models that a recipe can name, and their sizes."""
    yield "## Presets\n"
    yield "Sizes of towers are width x depth; of a Swin, the width of the first stage x the blocks of each stage."
    yield "`vit_t16` to `swin_l` are the paper's models (Table G), `vit_pico` to `vit_maxi` are small models for CPUs."
    yield "`compt macs PRESET` shows parameters and costs.\n"
    yield "| preset | image tower | text tower | joint embedding | image, patch in pixels | tokens of a caption |"
    yield "|---|---|---|--:|---|--:|"
    for spec in PRESETS.values():
        depth = "-".join(map(str, spec.depths)) or spec.depth
        towers = f"{spec.width} x {depth} | {spec.text_width} x {spec.text_depth}"
        image = f"{spec.image_size}, {spec.patch_size}"
        yield f"| `{spec.name}` | {towers} | {spec.embed_dim} | {image} | {spec.context_length} |"
    yield ""


def _type(annotation: Any, field: FieldInfo) -> str:
    inner, many = section_within(annotation)
    if inner is not None:
        kind = "texts or sections" if inner is TrainSet else "sections"
        return "duration" if inner is Duration else f"list of {kind}" if many else "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part, field) for part in arguments if part is not type(None))
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is list:
        return "list of " + _type(arguments[0], field).replace("whole number", "whole numbers").replace("text", "texts")
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0], field)
    for limit in field.metadata:
        if isinstance(limit, AfterValidator) and isinstance(limit.func, OneOf):
            return ", ".join(f"`{name}`" for name in limit.func.table)
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(limit, name, None) is not None
    ]
    return " ".join([_PLAIN[annotation], ", ".join(limits)]).strip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Duration):
        return f"`{value}`"
    if value is None or value is PydanticUndefined or value in ([], {}) or isinstance(value, BaseModel):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), reference())
