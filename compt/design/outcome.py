"""What a chain is expected to cost and to save, with ranges, and the recipe that trains it. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from compt.cost.gpus import Device
from compt.cost.speed import Conditions, Throughput, speed
from compt.cost.training import JobCost
from compt.design.candidates import ladder
from compt.design.confidence import MEDIAN
from compt.design.costs import distils, epoch_steps
from compt.design.epochs import EpochModel, Floats, LinkEpochs, Range, log2_size
from compt.models.presets import ModelSpec, resolve
from compt.plan.jobs import recipe_cost
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Link, Recipe
from compt.recipe.types import Duration

Kind = Literal["measured", "projected", "measured and projected"]


@dataclass(frozen=True)
class Setting:
    """What a chain is judged by: recipe, epochs model, machine; without a device there are no GPU-hours.

    `confidence` is the probability with which the planned epochs of each link are enough.
    """

    recipe: Recipe
    epochs: EpochModel
    baseline_epochs: float
    device: Device | None = None
    gpus: int = 1
    throughput: Throughput | None = None
    confidence: float = MEDIAN

    def links(self, specs: Sequence[ModelSpec]) -> list[LinkEpochs]:
        """The links of a chain of `specs`."""
        images, distilled = self.recipe.data.images, distils(self.recipe)
        return self.epochs.links(specs, images=images, baseline_epochs=self.baseline_epochs, distilled=distilled)


@dataclass(frozen=True)
class HoursRange:
    """GPU-hours with a range; whether every speed, none or some were measured, and what they come from."""

    hours: Range
    kind: Kind
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One chain. `epochs` are those that are trained, `needed` what the model says of each (a point for the first).

    `long_enough` is for each link the probability that its epochs are enough, `all_long_enough` that all are at once.
    The middle of every other range is what `epochs` cost. Its ends are central quantiles (`LEVEL`) of what it comes to
    where links that turn out too short go on until they are long enough; so no cost lies below its middle, but for
    GPU-hours, which also span the bounds of the speeds. Accelerations are over the same models trained individually.
    `positions` are those of the links after the first. GPU-hours are None without a device.
    """

    label: str
    specs: tuple[ModelSpec, ...]
    epochs: tuple[float, ...]
    needed: tuple[Range, ...]
    positions: tuple[int, ...]
    long_enough: tuple[float, ...]
    all_long_enough: float
    macs: Range
    baseline_macs: float
    acceleration: Range
    gpu_hours: HoursRange | None
    baseline_gpu_hours: HoursRange | None
    gpu_hours_acceleration: Range | None
    predicted: bool = True
    """Whether `epochs` are the model's, and not given."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; models by name and sizes."""
        return {**asdict(self), "specs": [spec.to_dict() for spec in self.specs]}


def outcome(setting: Setting, label: str, specs: Sequence[ModelSpec], epochs: Sequence[float]) -> Outcome:
    """What the chain of `specs`, trained for `epochs`, costs, and what it may come to.

    Draws are joint and have one seed, so that outcomes differ by their chains alone.
    """
    links = setting.links(specs)
    drawn, own = setting.epochs.draws(links), np.array(epochs, dtype=np.float64)
    enough = drawn <= own[1:] * (1 + 1e-9)
    spent = np.concatenate([np.full((len(drawn), 1), own[0]), np.maximum(drawn, own[1:])], axis=1)
    e = setting.baseline_epochs
    teachers: list[ModelSpec | None] = [None, *specs[:-1]] if distils(setting.recipe) else [None] * len(specs)
    jobs = list(zip(specs, teachers, strict=True))
    costs = np.array([_epoch_cost(setting, *job).total_macs for job in jobs])
    individual = float(e * sum(_epoch_cost(setting, spec, None).total_macs for spec in specs))
    total = float(own @ costs)
    found = Outcome(
        label=label,
        specs=tuple(specs),
        epochs=tuple(map(float, epochs)),
        needed=(
            Range(e, e, e),
            *(Range.of(setting.epochs.epochs(link), drawn[:, at]) for at, link in enumerate(links)),
        ),
        positions=tuple(link.position for link in links),
        long_enough=tuple(map(float, enough.mean(axis=0))),
        all_long_enough=float(enough.all(axis=1).mean()),
        macs=Range.of(total, spent @ costs),
        baseline_macs=individual,
        acceleration=Range.of(individual / total, individual / (spent @ costs)),
        gpu_hours=None,
        baseline_gpu_hours=None,
        gpu_hours_acceleration=None,
    )
    if setting.device is None:
        return found
    (low, middle, high), kind, sources = _epoch_hours(setting, setting.device, jobs)
    alone, alone_kind, alone_sources = _epoch_hours(setting, setting.device, [(spec, None) for spec in specs])
    time, individual_times = float(own @ middle), e * alone.sum(axis=1)
    least, most = Range.of(time, spent @ low).low, Range.of(time, spent @ high).high
    return replace(
        found,
        gpu_hours=HoursRange(Range(time, least, most), kind, sources),
        baseline_gpu_hours=HoursRange(
            Range(float(individual_times[1]), float(individual_times[0]), float(individual_times[2])),
            alone_kind,
            alone_sources,
        ),
        gpu_hours_acceleration=Range.of(individual_times[1] / time, individual_times[1] / (spent @ middle)),
    )


def _epoch_cost(setting: Setting, student: ModelSpec, teacher: ModelSpec | None) -> JobCost:
    recipe = setting.recipe
    return recipe_cost(recipe, student, teacher, epoch_steps(recipe), setting.gpus, recipe.data.caption_tokens)


def _epoch_hours(
    setting: Setting, device: Device, jobs: Sequence[tuple[ModelSpec, ModelSpec | None]]
) -> tuple[Floats, Kind, tuple[str, ...]]:
    """GPU-hours [3, n] of an epoch of each job, at the least, the middle and the most; what those are, and whence."""
    recipe, kinds, rows = setting.recipe, set(), []
    sources: dict[str, None] = {}
    for student, teacher in jobs:
        conditions = Conditions.of(recipe, setting.gpus, student.name)
        cost = _epoch_cost(setting, student, teacher)
        found = speed(student, teacher, cost, device, conditions, setting.throughput)
        rows.append([found.low, found.seconds_per_sample, found.high])
        kinds.add(found.kind)
        sources[f"{found.kind} {found.source}"] = None
    samples = epoch_steps(recipe) * recipe.optimizer.batch
    kind: Kind = kinds.pop() if len(kinds) == 1 else "measured and projected"
    return np.array(rows).T * samples / 3600, kind, tuple(sources)


def designed_recipe(recipe: Recipe, chain: Sequence[ModelSpec], epochs: Sequence[float], source: str) -> dict[str, Any]:
    """`recipe` as plain values, with family and links replaced by `chain`; called NAME_auto. What was set stays set.

    The first model takes the baselines' length and warm-up. Warm-up, learning rate, alpha and expansion of a link are
    those of the recipe's own link of that model, or else of its second link. Raises ConfigError where a chain does not
    come out that the planner accepts the models of.
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
            said = {key: getattr(like, key) for key in ("lr", "alpha", "expand")}
            link |= {key: _plain(value) for key, value in said.items() if value is not None}
        links.append(link)
    kept = {member.name: _plain(member) for member in recipe.family.members}
    members = [kept.get(spec.name) or _member(spec, recipe.family.common) for spec in chain]
    values["name"] = f"{recipe.name}_auto"
    values["family"] |= {"members": [one["name"] if list(one) == ["name"] else one for one in members]}
    values["chain"] |= {"links": links}
    made = parse_recipe(values, f"the chain designed from {source}").family.specs()
    assert list(made.values()) == list(chain), (made, chain)
    return values


def _warmup(recipe: Recipe, epochs: float, like: Link | None) -> dict[str, Any]:
    """That of `like`, 1000 steps without; at most a tenth of the training where it would be longer than all of it."""
    steps = round(epochs * epoch_steps(recipe))
    wanted = like.warmup if like is not None else Duration(steps=1000)
    if wanted.to_steps(recipe.data.images, recipe.optimizer.batch) > steps:
        return {"steps": steps // 10}
    return dict(_plain(wanted))


_SIZES = (
    *("width", "heads", "head_width", "image_size", "patch_size", "mlp_ratio", "no_ln_pre", "depths", "window"),
    *("text_width", "text_depth", "text_heads", "text_head_width", "context_length", "vocab_size", "embed_dim"),
    "quick_gelu",
)


def _member(spec: ModelSpec, common: Mapping[str, Any]) -> dict[str, Any]:
    """A member of a family with `common` sizes that comes to `spec`: a preset and what differs from it."""
    family = ladder(spec)
    preset = next((one for one in family if one.name == spec.name), None)
    preset = preset or min(family, key=lambda one: abs(log2_size(one) - log2_size(spec)))
    usual = resolve(preset.name, common)
    # A Swin's depth is the sum of its depths.
    known = _SIZES if spec.arch == "swin" else (*_SIZES, "depth")
    sizes = {key: _plain(getattr(spec, key)) for key in known if getattr(spec, key) != getattr(usual, key)}
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
