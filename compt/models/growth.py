"""How one model grows into a larger one: the operators' names, what may grow, what is exact. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from compt.errors import ConfigError, nearest
from compt.models.presets import ModelSpec

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, Tower] = ("image", "text")

WIDTH_OPERATORS = (
    "insert",
    "duplicate",
    "interpolate",
    "net2net",
    "lemon",
    "insert_exact",
    "netexpand",
    "insert_packed",
)
"""Operators for widths; the first is the paper's choice and the default."""

SAME_EMBEDDING = (
    frozenset({"insert", "insert_packed"}),
    frozenset({"net2net", "lemon", "insert_exact"}),
)
"""Width operators that do the same to the joint embedding."""


def depth_duplicate(teacher: int, student: int) -> list[int]:
    """Layer k from layer floor(k teacher / student): each layer repeated in place."""
    return [layer * teacher // student for layer in range(student)]


def depth_stack(teacher: int, student: int) -> list[int]:
    """The teacher whole, then again from its first layer."""
    return [layer % teacher for layer in range(student)]


def depth_constant(teacher: int, student: int) -> list[int]:
    """The teacher's layers first, own initialization above them."""
    return [layer if layer < teacher else -1 for layer in range(student)]


def depth_interval(teacher: int, student: int) -> list[int]:
    """Layer k from layer k teacher / student where that is whole, own initialization elsewhere."""
    return [-1 if layer * teacher % student else layer * teacher // student for layer in range(student)]


DEPTH: dict[str, Callable[[int, int], list[int]]] = {
    "duplicate": depth_duplicate,
    "stack": depth_stack,
    "constant": depth_constant,
    "interval": depth_interval,
    # The places of `duplicate`; what is added comes from the moving average of the teacher's weights.
    "netexpand": depth_duplicate,
}
"""Operators for depths: (teacher's layers, student's layers) -> the source of each student layer, -1 for none."""


@dataclass(frozen=True)
class TowerGrowth:
    """The operators of one tower. Raises ConfigError for an unknown one.

    `zero_new_outputs` sets to zero what the residual branches of added layers end in (attention output projection and
    second MLP matrix, with their biases), so that added layers start as the identity.
    """

    width: str = "insert"
    depth: str = "duplicate"
    zero_new_outputs: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("width", self.width, WIDTH_OPERATORS), ("depth", self.depth, tuple(DEPTH))):
            if value not in known:
                raise ConfigError(
                    f"unknown {name} operator '{value}'{nearest(value, known)}; known: {', '.join(known)}"
                )


@dataclass(frozen=True)
class ExpandConfig:
    """Which operators expand a teacher, a tower each.

    `noise`: where an operator makes copies of a unit, every weight that reads one differs by up to this share, so that
    the copies learn apart; the differences cancel over the copies, so that the function stays. 0: copies stay equal
    forever. `reference_compatible`: the layers that the authors' code fills (each ViT layer twice where the depth
    doubles, all else layer by layer from the first on, without regard to the pairs of Swin's blocks).
    Raises ConfigError for a share outside 0 to 1.
    """

    image: TowerGrowth = field(default_factory=TowerGrowth)
    text: TowerGrowth = field(default_factory=TowerGrowth)
    noise: float = 0.1
    reference_compatible: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ConfigError(f"noise {self.noise:g} is not a share; it must be at least 0 and below 1")

    @classmethod
    def both(
        cls,
        width: str = "insert",
        depth: str = "duplicate",
        zero_new_outputs: bool = False,
        *,
        noise: float = 0.1,
        reference_compatible: bool = False,
    ) -> ExpandConfig:
        """The same operators for both towers."""
        tower = TowerGrowth(width, depth, zero_new_outputs)
        return cls(tower, tower, noise, reference_compatible)

    def tower(self, name: Tower) -> TowerGrowth:
        """The operators of a tower."""
        return self.image if name == "image" else self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpandConfig:
        """The inverse of `to_dict`. Raises ConfigError, TypeError or KeyError."""
        others = {key: value for key, value in values.items() if key not in TOWERS}
        unknown = sorted(set(others) - {item.name for item in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown field '{unknown[0]}' of an expansion")
        return cls(TowerGrowth(**values["image"]), TowerGrowth(**values["text"]), **others)


@dataclass(frozen=True)
class Stack:
    """A column of equal layers, named `prefix.<layer>`; layers `k` and `k + period` do the same job."""

    prefix: str
    depth: int
    period: int = 1
    tower: Tower = "text"


def stacks(spec: ModelSpec) -> tuple[Stack, ...]:
    """The layer columns of a model, text last. A Swin has one a stage, where every second layer shifts its windows."""
    text = Stack("transformer.resblocks", spec.text_depth)
    if spec.arch == "vit":
        return (Stack("visual.transformer.resblocks", spec.depth, tower="image"), text)
    stages = (
        Stack(f"visual.trunk.layers.{stage}.blocks", depth, 2, "image") for stage, depth in enumerate(spec.depths)
    )
    return (*stages, text)


def layer_sources(operator: str, teacher: int, student: int, period: int = 1) -> list[int]:
    """The source of each student layer; operators act on groups of `period` layers, which keep their place in them.

    Both depths must be multiples of `period`, or equal (then every layer is its own source).
    """
    if teacher == student:
        return list(range(student))
    groups = DEPTH[operator](teacher // period, student // period)
    return [-1 if group < 0 else group * period + place for group in groups for place in range(period)]


def added_layers(sources: list[int]) -> list[bool]:
    """For each student layer, whether it has no source or repeats the source of an earlier one."""
    return [source < 0 or source in sources[:layer] for layer, source in enumerate(sources)]


def stack_sources(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> dict[str, list[int]]:
    """For each layer stack that both models have, by prefix, the source of each student layer (-1: none)."""
    before = {stack.prefix: stack for stack in stacks(teacher)}
    found = {}
    for stack in stacks(student):
        if stack.prefix not in before:
            continue  # the image tower of another architecture
        old = before[stack.prefix].depth
        operator, period = config.tower(stack.tower).depth, stack.period
        if config.reference_compatible:
            doubled = stack.tower == "image" and student.arch == "vit" and stack.depth == 2 * old
            operator, period = "duplicate" if doubled else "constant", 1
        found[stack.prefix] = layer_sources(operator, old, stack.depth, period)
    return found


_SAME = ("text_head_width", "quick_gelu")
_SAME_IMAGE = ("head_width", "no_ln_pre")
_GROWING = ("text_width", "text_depth", "text_heads", "context_length", "vocab_size", "embed_dim")
_GROWING_IMAGE = ("width", "depth", "heads", "window")


def check_sizes(teacher: ModelSpec, student: ModelSpec) -> None:
    """Raise ConfigError where `student` cannot grow from `teacher`: an axis that shrinks, or sizes that must agree.

    Between a ViT and a Swin the image towers have no axis in common. Patches may change in size either way, as long as
    there are not fewer of them along a side.
    """
    alike = teacher.arch == student.arch
    if alike and len(teacher.depths) != len(student.depths):
        raise ConfigError(f"has {len(student.depths)} stages, but '{teacher.name}' has {len(teacher.depths)}")
    for name in (*_SAME, *(_SAME_IMAGE if alike else ())):
        old, new = getattr(teacher, name), getattr(student, name)
        if old != new:
            raise ConfigError(f"its {name} is {new}, but '{teacher.name}', which it grows from, has {old}")
    for name, old, new in _growing(teacher, student, alike):
        if new < old:
            raise ConfigError(f"its {name} {new} is smaller than the {old} of '{teacher.name}', which it grows from")


def _growing(teacher: ModelSpec, student: ModelSpec, alike: bool) -> list[tuple[str, int, int]]:
    names = (*_GROWING, *(_GROWING_IMAGE if alike else ()))
    sizes = [(name, getattr(teacher, name), getattr(student, name)) for name in names]
    for name in ("text_width", *(("width",) if alike else ())):
        hidden = [int(getattr(spec, name) * spec.mlp_ratio) for spec in (teacher, student)]
        sizes.append((f"mlp_ratio x {name}", hidden[0], hidden[1]))
    if alike:
        sides = [spec.image_size // spec.patch_size for spec in (teacher, student)]
        sizes.append(("image_size / patch_size", sides[0], sides[1]))
    for name in ("depths", "stage_heads") if alike else ():
        pairs = zip(getattr(teacher, name), getattr(student, name), strict=True)
        sizes += [(f"{name}[{stage}]", old, new) for stage, (old, new) in enumerate(pairs)]
    return sizes


def check_config(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> None:
    """Raise ConfigError where these operators cannot expand this pair, though others could."""
    alike = teacher.arch == student.arch
    for name, stage in (("depths", at) for at in range(len(student.depths)) if alike):
        old, new = teacher.depths[stage], student.depths[stage]
        if old != new and (new % 2 or old % 2) and not config.reference_compatible:
            raise ConfigError(
                f"its {name}[{stage}] grows from {old} to {new}; blocks with and without shifted windows come in pairs"
            )
    for name in ("image_size", "patch_size", "window") if alike and config.reference_compatible else ():
        old, new = getattr(teacher, name), getattr(student, name)
        if old != new:
            raise ConfigError(
                f"its {name} is {new}, but '{teacher.name}' has {old}; reference_compatible resizes nothing"
            )
    widths = {config.image.width, config.text.width}
    if (
        alike
        and teacher.embed_dim != student.embed_dim
        and len(widths) > 1
        and not any(widths <= group for group in SAME_EMBEDDING)
    ):
        raise ConfigError(
            f"its embed_dim grows from {teacher.embed_dim} to {student.embed_dim}, which both towers share, but the "
            f"width operator of the image tower is {config.image.width} and that of the text tower {config.text.width}"
        )


def norm_factor(operator: str, teacher: int, student: int) -> float:
    """By how much a width operator changes a LayerNorm's variance, and thereby its eps: gains grow by the root of it.

    `lemon` (rho of LEMON, section 4): copies as often as they go in whole, the mean in the rest; `insert_exact`: zeros
    in the rest.
    """
    if operator == "lemon":
        return student // teacher * teacher / student
    return teacher / student if operator == "insert_exact" else 1.0


def grown_spec(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> ModelSpec:
    """`student` with the eps of its LayerNorms: its teacher's, times the operators' factor. A Swin's is timm's."""
    text = norm_factor(config.text.width, teacher.text_width, student.text_width)
    changed = replace(student, text_norm_eps=teacher.text_norm_eps * text)
    if teacher.arch == student.arch == "vit":
        image = norm_factor(config.image.width, teacher.width, student.width)
        changed = replace(changed, norm_eps=teacher.norm_eps * image)
    return changed


def inexact(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> dict[Tower, tuple[str, ...]]:
    """Why the function of a tower is not preserved, each reason behind the name of a parameter; none: it is, exactly.

    Then the features of student and teacher are equal but for rounding, for the same pictures and for captions that fit
    both; where the joint embedding grows, their norms and their products are.
    """
    layers = stack_sources(teacher, student, config)
    found: dict[Tower, tuple[str, ...]] = {}
    for tower in TOWERS:
        if tower == "image" and teacher.arch != student.arch:
            first = "conv1" if student.arch == "vit" else "trunk.patch_embed.proj"
            found[tower] = (f"visual.{first}.weight: the image tower of another architecture starts fresh",)
            continue
        growth = config.tower(tower)
        names = _names(student, tower)
        reasons = [*_width_reasons(growth.width, teacher, student, tower, names)]
        if tower == "image":
            reasons += _resizing_reasons(teacher, student)
        for stack in stacks(student):
            if stack.tower == tower:
                old = max(1, next(each.depth for each in stacks(teacher) if each.prefix == stack.prefix))
                reasons += _depth_reasons(stack.prefix, layers[stack.prefix], old, growth.zero_new_outputs, names)
        found[tower] = tuple(reasons)
    return found


@dataclass(frozen=True)
class _Names:
    """The parameters that reasons speak of; `mixing`: norms whose output, or input, is not one residual stream."""

    norm: str
    reader: str
    out: str
    down: str
    projection: str
    mixing: tuple[tuple[str, str], ...] = ()


def _names(spec: ModelSpec, tower: Tower) -> _Names:
    if tower == "image" and spec.arch == "swin":
        trunk, block = "visual.trunk", "visual.trunk.layers.0.blocks.0"
        stream = (f"{trunk}.patch_embed.norm.weight", "its output is the residual stream, whose mean is not zero")
        merging = (
            (f"{trunk}.layers.{stage}.downsample.norm.weight", "it mixes four neighbours, each with a mean of its own")
            for stage in range(1, len(spec.depths))
        )
        eps = (f"{trunk}.norm.weight", "its eps cannot be changed")
        return _Names(
            f"{block}.norm1.weight",
            f"{block}.attn.qkv.weight",
            "attn.proj.weight",
            "mlp.fc2.weight",
            "visual.head.proj.weight",
            (stream, *merging, eps),
        )
    prefix = "visual." if tower == "image" else ""
    block = f"{prefix}transformer.resblocks.0"
    first = ("visual.ln_pre.weight", "its output is the residual stream, whose mean is not zero")
    return _Names(
        f"{block}.ln_1.weight",
        f"{block}.attn.in_proj_weight",
        "attn.out_proj.weight",
        "mlp.c_proj.weight",
        "visual.proj" if tower == "image" else "text_projection",
        (first,) if tower == "image" and not spec.no_ln_pre else (),
    )


def _width_reasons(operator: str, teacher: ModelSpec, student: ModelSpec, tower: Tower, names: _Names) -> Iterator[str]:
    field_name = "width" if tower == "image" else "text_width"
    old, new = getattr(teacher, field_name), getattr(student, field_name)
    hidden = [int(getattr(spec, field_name) * spec.mlp_ratio) for spec in (teacher, student)]
    exact = operator in {"net2net", "lemon", "insert_exact"}
    if new != old:
        if operator == "net2net" and new % old:
            yield f"{names.norm}: {new} channels are no whole number of copies of {old}"
        elif operator == "insert_exact" or (operator == "lemon" and new % old):
            yield from (f"{name}: {reason}" for name, reason in names.mixing)
        elif operator == "duplicate":
            yield f"{names.reader}: it reads copies without dividing by their number"
        elif not exact:
            yield f"{names.norm}: it takes its statistics over {new} channels that are not copies of {old}"
    if hidden[0] != hidden[1] and not exact:
        block = names.norm.rpartition(".")[0].rpartition(".")[0]
        yield f"{block}.{names.down}: new hidden units write into the residual stream"
    if teacher.embed_dim != student.embed_dim and not exact:
        yield f"{names.projection}: the new part of the joint embedding changes norms and products"


def _resizing_reasons(teacher: ModelSpec, student: ModelSpec) -> Iterator[str]:
    vit = student.arch == "vit"
    sides = [spec.image_size // spec.patch_size for spec in (teacher, student)]
    first = "visual.conv1.weight" if vit else "visual.trunk.patch_embed.proj.weight"
    if teacher.patch_size != student.patch_size:
        yield f"{first}: its patches change from {teacher.patch_size} to {student.patch_size} pixels"
    if vit and sides[0] != sides[1]:
        yield f"visual.positional_embedding: its grid is resized from {sides[0]} to {sides[1]}"
    if not vit and teacher.window != student.window:
        table = "visual.trunk.layers.0.blocks.0.attn.relative_position_bias_table"
        yield f"{table}: its windows grow from {teacher.window} to {student.window}"
    elif not vit and sides[0] != sides[1]:
        yield f"{first}: its patches are {student.image_size // student.patch_size} a side instead of {sides[0]}"


def _depth_reasons(prefix: str, sources: list[int], teacher: int, zeroed: bool, names: _Names) -> Iterator[str]:
    added = added_layers(sources)
    kept = [source for source, new in zip(sources, added, strict=True) if not new]
    if kept != list(range(teacher)):
        lost = next((layer for layer in range(teacher) if layer not in kept), None)
        what = "the teacher's layers change their order" if lost is None else f"the teacher's layer {lost} is left out"
        yield f"{prefix}.{0 if lost is None else lost}.{names.out}: {what}"
    if any(added) and not zeroed:
        first = added.index(True)
        yield f"{prefix}.{first}.{names.out}: layer {first} is added and writes into the residual stream"
