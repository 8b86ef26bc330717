"""What expansion will do to every parameter, worked out from the two model descriptions alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from compt import macs
from compt.errors import ArtefactError, ConfigError, nearest
from compt.expand import axes, operators
from compt.expand.axes import Axis, Dim, Parameter
from compt.expand.operators import AxisMap
from compt.growth import check_sizes
from compt.presets import ModelSpec


@dataclass(frozen=True)
class ExpandConfig:
    """Which operators expand a teacher. Raises ConfigError for an unknown one.

    `zero_new_outputs` sets to zero what the residual branches of added layers end in (attention output projection and
    second MLP matrix, with their biases), so that added layers start as the identity.
    """

    width: str = "insert"
    depth: str = "duplicate"
    zero_new_outputs: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("width", self.width, list(operators.WIDTH)),
            ("depth", self.depth, list(operators.DEPTH)),
        ):
            if value not in known:
                hint = nearest(value, known)
                raise ConfigError(f"unknown {name} operator '{value}'{hint}; known: {', '.join(known)}")


@dataclass(frozen=True)
class Entry:
    """One student parameter. `gather` takes `sources[0]` through `maps`, one a dimension; the others need no source."""

    name: str
    shape: tuple[int, ...]
    action: Literal["gather", "own", "zero"]
    rule: str
    sources: tuple[str, ...] = ()
    source_shape: tuple[int, ...] = ()
    maps: tuple[AxisMap, ...] = field(default=(), compare=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def copied(self) -> int:
        """How many elements come from the teacher."""
        return math.prod(len(m.known) for m in self.maps) if self.action == "gather" else 0

    @property
    def new(self) -> int:
        """How many elements keep the student's own initialization."""
        return 0 if self.action == "zero" else self.size - self.copied

    @property
    def zeroed(self) -> int:
        """How many elements are set to zero."""
        return self.size if self.action == "zero" else 0


@dataclass(frozen=True)
class Plan:
    """How `student` starts from `teacher`. `layers`: for each layer stack, the source of each layer (-1: none).

    A plan is a function of the two descriptions and the config; two plans of the same three are equal.
    """

    teacher: ModelSpec
    student: ModelSpec
    config: ExpandConfig
    layers: dict[str, list[int]]
    entries: tuple[Entry, ...]

    HEADER = ("parameter", "shape", "rule", "source", "copied", "new")

    @property
    def parameters(self) -> int:
        """Elements in all."""
        return sum(entry.size for entry in self.entries)

    @property
    def copied(self) -> int:
        """Elements that come from the teacher."""
        return sum(entry.copied for entry in self.entries)

    @property
    def new(self) -> int:
        """Elements that keep the student's own initialization."""
        return sum(entry.new for entry in self.entries)

    @property
    def zeroed(self) -> int:
        """Elements set to zero."""
        return sum(entry.zeroed for entry in self.entries)

    def rows(self) -> list[tuple[str, ...]]:
        """One row of text a parameter, under `HEADER`, and a row of totals."""
        rows = [
            (
                entry.name,
                "×".join(map(str, entry.shape)) or "scalar",
                entry.rule,
                ", ".join(entry.sources) or "-",
                *_shares(entry),
            )
            for entry in self.entries
        ]
        how = f"width {self.config.width}, depth {self.config.depth}"
        return [*rows, ("total", f"{self.parameters:,}", how, self.teacher.name, *_shares(self))]

    def to_json(self) -> dict[str, Any]:
        """A small description that `from_json` rebuilds the plan from: operators, models, layer sources and totals."""
        return {
            "config": asdict(self.config),
            "teacher": self.teacher.to_dict(),
            "student": self.student.to_dict(),
            "layers": self.layers,
            "parameters": self.parameters,
            "copied": self.copied,
            "new": self.new,
            "zeroed": self.zeroed,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises ArtefactError when the rebuilt plan is not the one described."""
        try:
            plan = make_plan(
                ModelSpec.from_dict(values["teacher"]),
                ModelSpec.from_dict(values["student"]),
                ExpandConfig(**values["config"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"expansion plan: unreadable ({error})") from error
        rebuilt = plan.to_json()
        for key in ("layers", "parameters", "copied", "new", "zeroed"):
            if rebuilt[key] != values.get(key):
                raise ArtefactError(f"expansion plan: '{key}' is {values.get(key)} but comes out as {rebuilt[key]}")
        return plan


def make_plan(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig | None = None) -> Plan:
    """Plan the expansion of `teacher` into `student`; no weights are read or allocated.

    Between a ViT and a Swin the image tower keeps its own initialization and the rest is expanded. Raises ConfigError
    when an axis would shrink, sizes that must agree do not, or a parameter has no known axes.
    """
    config = config or ExpandConfig()
    for spec in (teacher, student):
        axes.check_parameters(spec)
    _check(teacher, student)
    layers = _layer_sources(teacher, student, config)
    planner = _Planner(teacher, student, config, layers)
    entries = tuple(planner.entry(parameter) for parameter in axes.parameters(student).values())
    return Plan(teacher, student, config, layers, entries)


class _Planner:
    """Plans single parameters; maps of equal dimensions are made once and shared."""

    def __init__(
        self, teacher: ModelSpec, student: ModelSpec, config: ExpandConfig, layers: dict[str, list[int]]
    ) -> None:
        self.config = config
        self.layers = layers
        self.added = {stack: operators.added_layers(sources) for stack, sources in layers.items()}
        self.cross = teacher.arch != student.arch
        self.teacher = axes.parameters(teacher)
        self.maps: dict[tuple[Dim, Dim], AxisMap] = {}

    def entry(self, parameter: Parameter) -> Entry:
        name, shape = parameter.name, parameter.shape
        if self.cross and parameter.in_image_tower:
            return Entry(name, shape, "own", "own: image tower of another architecture")
        source_name, where = name, ""
        if parameter.stack:
            layer = self.layers[parameter.stack][parameter.layer]
            added = self.added[parameter.stack][parameter.layer]
            if added and self.config.zero_new_outputs and parameter.closes_branch:
                return Entry(name, shape, "zero", f"zero: layer {parameter.layer} is added")
            if layer < 0:
                return Entry(name, shape, "own", f"own: layer {parameter.layer} has no source")
            source_name, where = parameter.name_in_layer(layer), f"layer {parameter.layer} ← {layer}"
        source = self.teacher[source_name]
        maps = tuple(self._map(old, new) for old, new in zip(source.dims, parameter.dims, strict=True))
        grown = self._grown(source, parameter)
        rule = ", ".join(part for part in (grown or "copy", where) if part)
        return Entry(name, shape, "gather", rule, (source_name,), source.shape, maps)

    def _map(self, old: Dim, new: Dim) -> AxisMap:
        if (old, new) not in self.maps:
            pairs = zip(old, new, strict=True)
            self.maps[old, new] = operators.pack(operators.WIDTH[self._operator(a)](a.size, b.size) for a, b in pairs)
        return self.maps[old, new]

    def _operator(self, axis: Axis) -> str:
        return self.config.width if axis.kind == "width" else "insert"

    def _grown(self, source: Parameter, parameter: Parameter) -> str:
        """`insert res 64→96, ff 256→384`: the axes that grow, by operator."""
        by_operator: dict[str, list[str]] = {}
        for old, new in zip(source.dims, parameter.dims, strict=True):
            for a, b in zip(old, new, strict=True):
                if a.size != b.size:
                    by_operator.setdefault(self._operator(a), []).append(f"{a.name} {a.size}→{b.size}")
        return "; ".join(f"{operator} {', '.join(grown)}" for operator, grown in by_operator.items())


def _shares(part: Entry | Plan) -> tuple[str, str]:
    size = part.size if isinstance(part, Entry) else part.parameters
    return f"{part.copied / size:.1%}", f"{part.new / size:.1%}"


def _layer_sources(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> dict[str, list[int]]:
    found = {}
    old_depths = {stack.prefix: stack.depth for stack in axes.stacks(teacher)}
    for stack in axes.stacks(student):
        if stack.prefix not in old_depths:
            continue  # the image tower of another architecture
        old = old_depths[stack.prefix]
        operator = operators.DEPTH[config.depth]
        found[stack.prefix] = operators.repeat_period(operator, old, stack.depth, stack.period)
    return found


def _check(teacher: ModelSpec, student: ModelSpec) -> None:
    try:
        check_sizes(teacher, student)
        before, after = macs.parameters(teacher), macs.parameters(student)
        if after < before:  # possible between two architectures alone
            raise ConfigError(f"its {after:,} parameters are fewer than the {before:,} of '{teacher.name}'")
    except ConfigError as error:
        raise ConfigError(f"cannot expand {teacher.name} to {student.name}: {error}") from None
