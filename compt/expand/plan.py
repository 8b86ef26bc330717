"""The plan of an expansion: what happens to every parameter. It needs the two model descriptions, but no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from compt.cost import counts
from compt.errors import ArtefactError, ConfigError
from compt.expand import axes, maps
from compt.expand.axes import Axis, Dim, Kind, Parameter, Use
from compt.expand.maps import AxisMap
from compt.models import growth
from compt.models.growth import ExpandConfig, Tower
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import ModelSpec


@dataclass(frozen=True)
class ExpandedParameter:
    """One student parameter. `gather` maps `sources[0]` by `maps`, one per dimension; `own` and `zero` need no source.

    `average`: the source is in the moving average of the teacher's weights. `roles`: the number of matrices stacked in
    it that each get an orthonormal complement instead of the student's own initialization; 0 for none.
    """

    name: str
    shape: tuple[int, ...]
    action: Literal["gather", "own", "zero"]
    rule: str
    sources: tuple[str, ...] = ()
    source_shape: tuple[int, ...] = ()
    maps: tuple[AxisMap, ...] = field(default=(), compare=False)
    average: bool = False
    roles: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def copied(self) -> int:
        """The number of elements that come from the teacher: copied, scaled or blended."""
        return math.prod(len(m.known) for m in self.maps) if self.action == "gather" else 0

    @property
    def new(self) -> int:
        """The number of elements from the student's own initialization or an orthonormal complement."""
        return self.size - self.copied - self.zeroed

    @property
    def zeroed(self) -> int:
        """The number of elements that are set to zero."""
        if self.action != "gather":
            return self.size if self.action == "zero" else 0
        if self.roles:
            rows, *others = (len(m.known) for m in self.maps)
            # With new rows, old rows are zero in new columns. If only columns grow, the new ones are drawn.
            return 0 if rows == self.shape[0] else rows * (math.prod(self.shape[1:]) - math.prod(others))
        return self.size - math.prod(len(m.index) - len(m.zero) for m in self.maps)


@dataclass(frozen=True)
class ExpansionPlan:
    """How `student` grows from `teacher`. `layers`: for each layer stack, the source of each layer (-1: none).

    `student` has the LayerNorm eps that the operators need. Teacher, student and config determine the plan.
    """

    teacher: ModelSpec
    student: ModelSpec
    config: ExpandConfig
    layers: dict[str, list[int]]
    entries: tuple[ExpandedParameter, ...]

    @cached_property
    def inexact(self) -> dict[Tower, tuple[str, ...]]:
        """For each tower, the reasons why its function changes; see `growth.inexact`."""
        return growth.inexact(self.teacher, self.student, self.config)

    @property
    def needs_average(self) -> bool:
        """Whether some layers come from the moving average of the teacher's weights."""
        return any(entry.average for entry in self.entries)

    @cached_property
    def totals(self) -> dict[str, int]:
        """Numbers of elements: all `parameters`, and as in `ExpandedParameter` those `copied`, `new` and `zeroed`."""
        kinds = {"parameters": "size", "copied": "copied", "new": "new", "zeroed": "zeroed"}
        return {kind: sum(getattr(entry, own) for entry in self.entries) for kind, own in kinds.items()}

    def to_json(self) -> dict[str, Any]:
        """A small description for manifests: operators, models, layer sources and totals. `from_json` reads it."""
        return {
            "config": self.config.to_dict(),
            "teacher": self.teacher.to_dict(),
            "student": self.student.to_dict(),
            "layers": self.layers,
            **self.totals,
        }

    def table_json(self) -> dict[str, Any]:
        """The whole plan, parameter by parameter, in plain values."""
        return {
            "teacher": self.teacher.to_dict(),
            "student": self.student.to_dict(),
            "config": self.config.to_dict(),
            "inexact": {tower: list(reasons) for tower, reasons in self.inexact.items()},
            "totals": self.totals,
            "parameters": [
                {
                    "name": entry.name,
                    "shape": list(entry.shape),
                    "rule": entry.rule,
                    "sources": list(entry.sources),
                    "source_shape": list(entry.source_shape) if entry.sources else None,
                    "copied": entry.copied,
                    "new": entry.new,
                    "zeroed": entry.zeroed,
                }
                for entry in self.entries
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExpansionPlan:
        """Rebuild a plan from `to_json`. Raises ArtefactError if it does not have the recorded layers and totals."""
        try:
            plan = make_plan(
                ModelSpec.from_dict(values["teacher"]),
                ModelSpec.from_dict(values["student"]),
                ExpandConfig.from_dict(values["config"]),
            )
        except (KeyError, TypeError, ConfigError) as error:
            raise ArtefactError(f"expansion plan: unreadable ({error})") from error
        rebuilt = plan.to_json()
        for key in ("layers", "parameters", "copied", "new", "zeroed"):
            if rebuilt[key] != values.get(key):
                raise ArtefactError(f"expansion plan: '{key}' is {values.get(key)}, but compt plans {rebuilt[key]}")
        return plan


def make_plan(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig | None = None) -> ExpansionPlan:
    """Plan the expansion of `teacher` into `student`; no weights are read or allocated.

    Between a ViT and a Swin the image tower keeps its own initialization and the rest is expanded. Raises ConfigError
    if an axis would shrink, if sizes or operators that must agree do not, or if a parameter has no known axes.
    """
    config = config or ExpandConfig()
    _check(teacher, student, config)
    student = growth.grown_spec(teacher, student, config)
    for spec in (teacher, student):
        axes.check_parameters(spec)
    layers = growth.stack_sources(teacher, student, config)
    planner = _ExpansionPlanner(teacher, student, config, layers)
    entries = tuple(planner.entry(parameter) for parameter in axes.parameters(student).values())
    return ExpansionPlan(teacher, student, config, layers, entries)


# How axes are resized that do not depend on the width operator.
_OTHER_AXES = {"prefix": "insert", "grid": "bicubic", "offsets": "bicubic", "pixels": "pseudo-inverse"}


class _ExpansionPlanner:
    """Plans single parameters. Parameters with equal dimensions share their maps."""

    def __init__(
        self, teacher: ModelSpec, student: ModelSpec, config: ExpandConfig, layers: dict[str, list[int]]
    ) -> None:
        self.config = config
        self.layers = layers
        self.added = {stack: growth.added_layers(sources) for stack, sources in layers.items()}
        self.cross = teacher.arch != student.arch
        self.teacher = axes.parameters(teacher)
        self.maps: dict[tuple[str, Use, Dim, Dim], AxisMap] = {}

    def entry(self, parameter: Parameter) -> ExpandedParameter:
        name, shape = parameter.name, parameter.shape
        tower = self.config.image if parameter.in_image_tower else self.config.text
        if self.cross and parameter.in_image_tower:
            return ExpandedParameter(name, shape, "own", "own: image tower of another architecture")
        if not parameter.dims and name not in self.teacher:
            return ExpandedParameter(name, shape, "own", "own: the teacher has none")
        source_name, where, average = name, "", False
        if parameter.stack:
            layer = self.layers[parameter.stack][parameter.layer]
            added = self.added[parameter.stack][parameter.layer]
            if added and tower.zero_new_outputs and parameter.closes_branch:
                return ExpandedParameter(name, shape, "zero", f"zero: layer {parameter.layer} is added")
            if layer < 0:
                return ExpandedParameter(name, shape, "own", f"own: layer {parameter.layer} has no source")
            average = added and DEPTH_OPERATORS[tower.depth].average and not self.config.reference_compatible
            of = "average of " if average else ""
            source_name, where = parameter.name_in_layer(layer), f"layer {parameter.layer} ← {of}{layer}"
        source = self.teacher[source_name]
        dims = zip(parameter.uses, source.dims, parameter.dims, strict=True)
        along = tuple(self._map(tower.width, use, old, new) for use, old, new in dims)
        grown = _grown(tower.width, source, parameter)
        rule = ", ".join(part for part in (grown or "copy", where) if part)
        grows = any(len(m.known) < len(m.index) for m in along)
        roles = parameter.matrices if WIDTH_OPERATORS[tower.width].complement and grows else 0
        return ExpandedParameter(name, shape, "gather", rule, (source_name,), source.shape, along, average, roles)

    def _map(self, operator: str, use: Use, old: Dim, new: Dim) -> AxisMap:
        key = (operator, use, old, new)
        if key not in self.maps:
            if WIDTH_OPERATORS[operator].packed:
                old, new = _packed(old), _packed(new)
            noise = self.config.noise
            self.maps[key] = maps.pack(
                maps.axis_map(operator, a.kind, use, a.size, b.size, noise) for a, b in zip(old, new, strict=True)
            )
        return self.maps[key]


def _packed(dim: Dim) -> Dim:
    """A dimension as one axis, of the kind of its axis that can grow."""
    kind: Kind = next((axis.kind for axis in dim if axis.kind != "fixed"), "fixed")
    return (Axis(dim[0].name, math.prod(axis.size for axis in dim), kind),)


def _grown(operator: str, source: Parameter, parameter: Parameter) -> str:
    """`insert res 64→96, ff 256→384`: the axes that grow, by operator."""
    by_operator: dict[str, list[str]] = {}
    for old, new in zip(source.dims, parameter.dims, strict=True):
        for a, b in zip(old, new, strict=True):
            if a.size != b.size:
                rule = _OTHER_AXES.get(a.kind, operator)
                by_operator.setdefault(rule, []).append(f"{a.name} {a.size}→{b.size}")
    return "; ".join(f"{rule} {', '.join(grown)}" for rule, grown in by_operator.items())


def _check(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> None:
    try:
        growth.check_sizes(teacher, student)
        growth.check_config(teacher, student, config)
        before, after = counts.parameters(teacher), counts.parameters(student)
        if teacher.arch != student.arch and after < before:
            raise ConfigError(f"its {after:,} parameters are fewer than the {before:,} of '{teacher.name}'")
    except ConfigError as error:
        raise ConfigError(f"cannot expand {teacher.name} to {student.name}: {error}") from None
