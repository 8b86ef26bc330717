"""What a chain is expected to cost and to save, with ranges, and the recipe that trains it. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from compt.config import Duration, Recipe, parse_recipe
from compt.config import Link as RecipeLink
from compt.design.candidates import ladder
from compt.design.costs import distils, epoch_steps
from compt.design.epochs import EpochModel, Floats, Link, Range, log2_size
from compt.hardware import Conditions, Throughput, speed
from compt.hardware_devices import Device
from compt.planner import recipe_cost
from compt.presets import ModelSpec, resolve

Kind = Literal["measured", "projected", "measured and projected"]


@dataclass(frozen=True)
class Setting:
    """What a chain is judged by: recipe, epochs model, machine."""

    recipe: Recipe
    epochs: EpochModel
    baseline_epochs: float
    device: Device
    gpus: int = 1
    throughput: Throughput | None = None

    def links(self, specs: Sequence[ModelSpec]) -> list[Link]:
        """The links of a chain of `specs`."""
        images, distilled = self.recipe.data.images, distils(self.recipe)
        return self.epochs.links(specs, images=images, baseline_epochs=self.baseline_epochs, distilled=distilled)


@dataclass(frozen=True)
class Hours:
    """GPU-hours with a range, and whether every speed, none or some were measured."""

    hours: Range
    kind: Kind


@dataclass(frozen=True)
class Outcome:
    """One chain. `epochs` are those that are trained, `needed` what the model says of each (a point for the first).

    Ranges hold with probability `LEVEL` as far as epochs go; those of GPU-hours also span the bounds of the speeds.
    Accelerations are over the same models trained individually. `positions` are those of the links after the first.
    """

    label: str
    specs: tuple[ModelSpec, ...]
    epochs: tuple[float, ...]
    needed: tuple[Range, ...]
    positions: tuple[int, ...]
    macs: Range
    baseline_macs: float
    acceleration: Range
    gpu_hours: Hours
    baseline_gpu_hours: Hours
    gpu_hours_acceleration: Range
    predicted: bool = True
    """Whether `epochs` are the model's; where they are given, ranges are still those of what may be needed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; models by name and sizes."""
        return {**asdict(self), "specs": [spec.to_dict() for spec in self.specs]}


def outcome(setting: Setting, label: str, specs: Sequence[ModelSpec], epochs: Sequence[float]) -> Outcome:
    """What the chain of `specs`, trained for `epochs`, costs; ranges are those of the epochs that it may need.

    Draws are joint and have one seed, so that outcomes differ by their chains alone.
    """
    links = setting.links(specs)
    drawn = setting.epochs.draws(links)
    needed = [Range.of(setting.epochs.epochs(link), drawn[:, at]) for at, link in enumerate(links)]
    e = setting.baseline_epochs
    teachers: list[ModelSpec | None] = [None, *specs[:-1]] if distils(setting.recipe) else [None] * len(specs)
    macs, low, middle, high, kind = _epoch_costs(setting, list(zip(specs, teachers, strict=True)))
    alone, alone_low, alone_middle, alone_high, alone_kind = _epoch_costs(setting, [(spec, None) for spec in specs])
    whole = np.concatenate([np.full((len(drawn), 1), epochs[0]), drawn], axis=1)
    own = np.array(epochs)
    total, time = float(own @ macs), float(own @ middle)
    least, most = Range.of(time, whole @ low).low, Range.of(time, whole @ high).high
    individual, individual_time = float(e * alone.sum()), float(e * alone_middle.sum())
    return Outcome(
        label=label,
        specs=tuple(specs),
        epochs=tuple(map(float, epochs)),
        needed=(Range(e, e, e), *needed),
        positions=tuple(link.position for link in links),
        macs=Range.of(total, whole @ macs),
        baseline_macs=individual,
        acceleration=Range.of(individual / total, individual / (whole @ macs)),
        gpu_hours=Hours(Range(time, least, most), kind),
        baseline_gpu_hours=Hours(
            Range(individual_time, float(e * alone_low.sum()), float(e * alone_high.sum())), alone_kind
        ),
        gpu_hours_acceleration=Range.of(individual_time / time, individual_time / (whole @ middle)),
    )


def _epoch_costs(
    setting: Setting, jobs: Sequence[tuple[ModelSpec, ModelSpec | None]]
) -> tuple[Floats, Floats, Floats, Floats, Kind]:
    """MACs [n] of an epoch of each job, its GPU-hours at the least, the middle and the most, and what those are."""
    recipe, kinds = setting.recipe, set()
    conditions, steps = Conditions.of(recipe, setting.gpus), epoch_steps(recipe)
    rows = []
    for student, teacher in jobs:
        cost = recipe_cost(recipe, student, teacher, steps, setting.gpus, conditions.tokens)
        found = speed(student, teacher, cost, setting.device, conditions, setting.throughput)
        hours = steps * recipe.optimizer.batch / 3600
        rows.append([cost.total_macs, *(hours * s for s in (found.low, found.seconds_per_sample, found.high))])
        kinds.add(found.kind)
    macs, low, middle, high = np.array(rows).T
    return macs, low, middle, high, kinds.pop() if len(kinds) == 1 else "measured and projected"


def designed_recipe(recipe: Recipe, chain: Sequence[ModelSpec], epochs: Sequence[float], source: str) -> dict[str, Any]:
    """`recipe` as plain values, with family and links replaced by `chain`; called NAME_auto. What was set stays set.

    The first model takes the baselines' length and warm-up. Warm-up, learning rate and alpha of a link are those of the
    recipe's own link of that model, or else of its second link. Raises ConfigError where a chain does not come out that
    the planner accepts the models of.
    """
    values: dict[str, Any] = _plain(recipe)
    own = {link.model: link for link in recipe.chain.links[1:]}
    second = next(iter(own.values()), None)
    baselines = recipe.baselines
    assert baselines is not None
    first = recipe.chain.links[0] if recipe.chain.links[0].model == chain[0].name else None
    links = []
    for at, (spec, length) in enumerate(zip(chain, epochs, strict=True)):
        like = own.get(spec.name, second) if at else first
        link: dict[str, Any] = {
            "model": spec.name,
            "train": {"epochs": length} if at else _plain(baselines.train),
            "warmup": _warmup(recipe, length, like) if at else _plain(baselines.warmup),
        }
        if like is not None:
            link |= {key: value for key in ("lr", "alpha") if (value := getattr(like, key)) is not None}
        links.append(link)
    kept = {member.name: _plain(member) for member in recipe.family.members}
    members = [kept.get(spec.name) or _member(spec, recipe.family.common) for spec in chain]
    values["name"] = f"{recipe.name}_auto"
    values["family"] |= {"members": [one["name"] if list(one) == ["name"] else one for one in members]}
    values["chain"] |= {"links": links}
    made = parse_recipe(values, f"the chain designed from {source}").family.specs()
    assert list(made.values()) == list(chain), (made, chain)
    return values


def _warmup(recipe: Recipe, epochs: float, like: RecipeLink | None) -> dict[str, Any]:
    """That of `like`, 1000 steps without; at most a tenth of the training where it would be longer than all of it."""
    steps = round(epochs * epoch_steps(recipe))
    wanted = like.warmup if like is not None else Duration(steps=1000)
    if wanted.to_steps(recipe.data.images, recipe.optimizer.batch) > steps:
        return {"steps": steps // 10}
    return dict(_plain(wanted))


_IMAGE_SIZES = ("width", "depth", "heads", "head_width", "image_size", "patch_size", "mlp_ratio", "no_ln_pre")
_TEXT_SIZES = ("text_width", "text_depth", "text_heads", "text_head_width", "context_length", "vocab_size", "embed_dim")


def _member(spec: ModelSpec, common: Mapping[str, Any]) -> dict[str, Any]:
    """A member of a family with `common` sizes that comes to `spec`: a preset and what differs from it."""
    family = ladder(spec)
    preset = next((one for one in family if one.name == spec.name), None)
    preset = preset or min(family, key=lambda one: abs(log2_size(one) - log2_size(spec)))
    usual = resolve(preset.name, common)
    known = _TEXT_SIZES if spec.arch == "swin" else (*_IMAGE_SIZES, *_TEXT_SIZES)
    sizes = {key: getattr(spec, key) for key in known if getattr(spec, key) != getattr(usual, key)}
    for width, heads in (("width", "heads"), ("text_width", "text_heads")):
        if width in sizes and heads not in common:
            sizes.pop(heads, None)  # follow from the width
    return {"name": spec.name, **({} if preset.name == spec.name else {"preset": preset.name}), **sizes}


def _plain(value: Any) -> Any:
    """A section as it was set, in values that YAML has; lengths of captions stay whole numbers."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(by_alias=True, exclude_unset=True))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
