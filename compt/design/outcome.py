"""What a chain is expected to cost and to save, with ranges, and the recipe that trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from compt.cost.gpus import Device
from compt.cost.speed import Throughput
from compt.design.candidates import ladder
from compt.design.costs import distils, epoch_cost, epoch_steps, speed_of
from compt.design.curves import LinkEpochs
from compt.design.epochs import EpochModel, Floats, Range
from compt.design.sizes import log2_size, position
from compt.models.presets import ModelSpec, resolve
from compt.recipe.chain import Link
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Recipe, sizes_of
from compt.recipe.types import Duration

Kind = Literal["measured", "projected", "measured and projected"]


@dataclass(frozen=True)
class Setting:
    """What a chain is judged by: recipe, epoch model, machine. Without a device there are no GPU-hours."""

    recipe: Recipe
    epochs: EpochModel
    baseline_epochs: float
    device: Device | None = None
    gpus: int = 1
    throughput: Throughput | None = None

    def links(self, specs: Sequence[ModelSpec]) -> list[LinkEpochs]:
        """The links of a chain of `specs`."""
        images, distilled = self.recipe.data.images, distils(self.recipe)
        return [
            LinkEpochs(after, before, position(specs[:at], images), images, self.baseline_epochs, distilled)
            for at, (before, after) in enumerate(pairwise(specs), 1)
        ]


@dataclass(frozen=True)
class HoursRange:
    """GPU-hours with a range; whether every speed, none or some were measured, and what they come from."""

    hours: Range
    kind: Kind
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One chain: `epochs` are trained, `needed` is what the model says of each (a point for the first).

    The middle of every other range is what `epochs` cost. The dear end is what they cost where every link that is
    shorter than the upper end of its range goes on to there; the cheap end is the middle, except for GPU-hours, which
    also span the bounds of the speeds. Accelerations are over the same models trained individually. `positions` are
    those of the links after the first. GPU-hours are None without a device.
    """

    label: str
    specs: tuple[ModelSpec, ...]
    epochs: tuple[float, ...]
    needed: tuple[Range, ...]
    positions: tuple[int, ...]
    macs: Range
    baseline_macs: float
    acceleration: Range
    gpu_hours: HoursRange | None = None
    baseline_gpu_hours: HoursRange | None = None
    gpu_hours_acceleration: Range | None = None
    predicted: bool = True
    """Whether `epochs` are the model's, and not given."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; models by name and sizes."""
        return {**asdict(self), "specs": [spec.to_dict() for spec in self.specs]}


def outcome(setting: Setting, label: str, specs: Sequence[ModelSpec], epochs: Sequence[float]) -> Outcome:
    """What the chain of `specs`, trained for `epochs`, costs, and what it may come to."""
    e, links = setting.baseline_epochs, setting.links(specs)
    needed = (Range(e, e, e), *map(setting.epochs.predict, links))
    own = np.array(epochs, dtype=np.float64)
    longest = np.maximum(own, [one.high for one in needed])
    teachers: list[ModelSpec | None] = [None, *specs[:-1]] if distils(setting.recipe) else [None] * len(specs)
    jobs = list(zip(specs, teachers, strict=True))
    macs = np.array([epoch_cost(setting.recipe, *job, setting.gpus).total_macs for job in jobs])
    total, most = float(own @ macs), float(longest @ macs)
    individual = e * sum(epoch_cost(setting.recipe, spec, None, setting.gpus).total_macs for spec in specs)
    found = Outcome(
        label=label,
        specs=tuple(specs),
        epochs=tuple(map(float, epochs)),
        needed=needed,
        positions=tuple(link.position for link in links),
        macs=Range(total, total, most),
        baseline_macs=individual,
        acceleration=Range(individual / total, individual / most, individual / total),
    )
    if setting.device is None:
        return found
    (low, middle, high), kind, sources = _epoch_hours(setting, setting.device, jobs)
    alone, alone_kind, alone_sources = _epoch_hours(setting, setting.device, [(spec, None) for spec in specs])
    least, individual, greatest = (e * alone.sum(axis=1)).tolist()
    time, longer = float(own @ middle), float(longest @ middle)
    return replace(
        found,
        gpu_hours=HoursRange(Range(time, float(own @ low), float(longest @ high)), kind, sources),
        baseline_gpu_hours=HoursRange(Range(individual, least, greatest), alone_kind, alone_sources),
        gpu_hours_acceleration=Range(individual / time, individual / longer, individual / time),
    )


def _epoch_hours(
    setting: Setting, device: Device, jobs: Sequence[tuple[ModelSpec, ModelSpec | None]]
) -> tuple[Floats, Kind, tuple[str, ...]]:
    """GPU-hours [3, n] of an epoch of each job (least, middle, most), how they are known, and where from."""
    recipe = setting.recipe
    found = [speed_of(recipe, *job, device, setting.gpus, setting.throughput) for job in jobs]
    kinds = {one.kind for one in found}
    kind: Kind = kinds.pop() if len(kinds) == 1 else "measured and projected"
    hours = np.array([[one.low, one.seconds_per_sample, one.high] for one in found]).T / 3600
    sources = dict.fromkeys(f"{one.kind} {one.source}" for one in found)
    return hours * epoch_steps(recipe) * recipe.optimizer.batch, kind, tuple(sources)


def designed_recipe(recipe: Recipe, chain: Sequence[ModelSpec], epochs: Sequence[float], source: str) -> dict[str, Any]:
    """`recipe` as plain values, with family and links replaced by `chain`; called NAME_auto. What was set stays set.

    The first model takes the baselines' length and warm-up. Warm-up, learning rate, alpha and expansion of a link are
    those of the recipe's own link of that model, or else of its second link. The recipe's first link counts for its
    engine and nodes alone: how a model trains from scratch says nothing of how it trains as a link. `source` names the
    chain in messages.
    Raises ConfigError for models that no recipe can have.
    """
    values: dict[str, Any] = _plain(recipe)
    own = {link.model: link for link in recipe.chain.links}
    second = next(iter(recipe.chain.links[1:]), None)
    baselines = recipe.baselines
    assert baselines is not None
    links = []
    for at, (spec, length) in enumerate(zip(chain, epochs, strict=True)):
        same = own.get(spec.name)
        like = second if at and same in (None, recipe.chain.links[0]) else same
        link: dict[str, Any] = {
            "model": spec.name,
            "train": {"epochs": length} if at else _plain(baselines.train),
            "warmup": _warmup(recipe, length, like) if at else _plain(baselines.warmup),
        }
        for one, keys in ((like, ("lr", "alpha", "expand")), (same, ("engine", "nodes"))):
            said = _plain(one) if one is not None else {}
            link |= {key: said[key] for key in keys if said.get(key) is not None}
        links.append(link)
    kept = {member.name: _plain(member) for member in recipe.family.members}
    members = [kept.get(spec.name) or member_of(spec, recipe.family.common) for spec in chain]
    values["name"] = f"{recipe.name}_auto"
    values["family"] |= {"members": [one["name"] if list(one) == ["name"] else one for one in members]}
    values["chain"] |= {"links": links}
    values["baselines"]["lr"] = {name: lr for name, lr in baselines.lr.items() if name in [one.name for one in chain]}
    made = parse_recipe(values, source).specs()
    assert list(made.values()) == list(chain), (made, chain)
    return values


def _warmup(recipe: Recipe, epochs: float, like: Link | None) -> dict[str, Any]:
    """That of `like`, 1000 steps without; at most a tenth of the training."""
    most = round(epochs * epoch_steps(recipe)) // 10
    wanted = like.warmup if like is not None else Duration(steps=1000)
    if wanted.to_steps(recipe.data.images, recipe.optimizer.batch) > most:
        return {"steps": most}
    return dict(_plain(wanted))


def member_of(spec: ModelSpec, common: Mapping[str, Any]) -> dict[str, Any]:
    """A member of a family with `common` sizes that comes to `spec`: a preset and what differs from it."""
    family = ladder(spec)
    preset = next((one for one in family if one.name == spec.name), None)
    preset = preset or min(family, key=lambda one: abs(log2_size(one) - log2_size(spec)))
    usual = resolve(preset.name, common)
    known = {key: getattr(spec, key) for key in sizes_of(spec.arch)}
    sizes = {key: _plain(value) for key, value in known.items() if value != getattr(usual, key)}
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
