"""How one model grows into a larger one: the operators of each tower, which sizes may grow, and what stays exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from compt.errors import ConfigError
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS, TowerNames, WidthOperator, wrong_operator
from compt.models.presets import ModelSpec

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, Tower] = ("image", "text")


@dataclass(frozen=True)
class TowerGrowth:
    """The operators of one tower. Raises ConfigError for an unknown one.

    `zero_new_outputs` sets the last matrices of the residual branches of added layers (attention output projection and
    second MLP matrix, with their biases) to zero, so that added layers start as the identity.
    """

    width: str = "insert"
    depth: str = "duplicate"
    zero_new_outputs: bool = False

    def __post_init__(self) -> None:
        for kind in ("width", "depth"):
            name = getattr(self, kind)
            if wrong := wrong_operator(kind, name):
                raise ConfigError(f"{kind} = '{name}': {wrong}")


@dataclass(frozen=True)
class ExpandConfig:
    """The operators that expand a teacher, for each tower.

    `noise`: where an operator copies a unit, each weight that reads a copy is multiplied by 1 plus a number of at most
    this size, so that the copies learn apart. The numbers cancel over the copies, so that the function stays. With 0,
    copies stay equal forever. `reference_compatible`: fill the layers that the authors' code fills (each ViT layer
    twice where the depth doubles, otherwise layer by layer from the first on, ignoring the pairs of Swin's blocks).
    Raises ConfigError for a noise outside 0 to 1.
    """

    image: TowerGrowth = field(default_factory=TowerGrowth)
    text: TowerGrowth = field(default_factory=TowerGrowth)
    noise: float = 0.1
    reference_compatible: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ConfigError(f"noise {self.noise:g} should be at least 0 and less than 1")

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

    @property
    def copies(self) -> bool:
        """Whether an operator makes copies, so that `noise` matters."""
        return any(WIDTH_OPERATORS[self.tower(name).width].copies for name in TOWERS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpandConfig:
        """Read what `to_dict` wrote. Raises ConfigError, TypeError or KeyError."""
        towers: dict[str, Any] = {tower: TowerGrowth(**values[tower]) for tower in TOWERS}
        return cls(**{**values, **towers})


@dataclass(frozen=True)
class Stack:
    """A column of equal layers, named `prefix.<layer>`. Layers `k` and `k + period` play the same role."""

    prefix: str
    depth: int
    period: int = 1
    tower: Tower = "text"


def stacks(spec: ModelSpec) -> tuple[Stack, ...]:
    """The layer columns of a model, text last. A Swin has one per stage; every second layer shifts its windows."""
    text = Stack("transformer.resblocks", spec.text_depth)
    if spec.arch == "vit":
        return (Stack("visual.transformer.resblocks", spec.depth, tower="image"), text)
    stages = (
        Stack(f"visual.trunk.layers.{stage}.blocks", depth, 2, "image") for stage, depth in enumerate(spec.depths)
    )
    return (*stages, text)


def layer_sources(operator: str, teacher: int, student: int, period: int = 1) -> list[int]:
    """The source of each student layer, -1 for none.

    Operators act on groups of `period` layers; a layer keeps its place in the group. Both depths must be multiples of
    `period`, or equal (then every layer is its own source).
    """
    if teacher == student:
        return list(range(student))
    groups = DEPTH_OPERATORS[operator].sources(teacher // period, student // period)
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


SAME = ("quick_gelu", "no_ln_pre", "head_width", "text_head_width")
"""Sizes that must agree between teacher and student."""
IMAGE_ONLY = ("no_ln_pre", "head_width")
"""Those of `SAME` that do not matter between a ViT and a Swin, whose image towers have no axis in common."""
_GROWING = ("text_width", "text_depth", "text_heads", "context_length", "vocab_size", "embed_dim")
_GROWING_IMAGE = ("width", "depth", "heads", "window")


def disagreeing(teacher: ModelSpec, student: ModelSpec) -> list[str]:
    """The sizes of `SAME` that differ and should not."""
    alike = teacher.arch == student.arch
    return [
        name for name in SAME if getattr(teacher, name) != getattr(student, name) and (alike or name not in IMAGE_ONLY)
    ]


def check_sizes(teacher: ModelSpec, student: ModelSpec) -> None:
    """Raise ConfigError where `student` cannot grow from `teacher`: an axis that shrinks, or sizes that must agree.

    Between a ViT and a Swin the image towers have no axis in common. The patch size may change either way, as long as
    the number of patches along a side does not shrink.
    """
    alike = teacher.arch == student.arch
    if alike and len(teacher.depths) != len(student.depths):
        raise ConfigError(f"has {len(student.depths)} stages, but '{teacher.name}' has {len(teacher.depths)}")
    for name in disagreeing(teacher, student):
        old, new = getattr(teacher, name), getattr(student, name)
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
    towers = [WIDTH_OPERATORS[config.tower(tower).width] for tower in TOWERS]
    if alike and teacher.embed_dim != student.embed_dim and len({each.embedding or each.name for each in towers}) > 1:
        raise ConfigError(
            f"its embed_dim grows from {teacher.embed_dim} to {student.embed_dim}, which both towers share, but the "
            f"width operators {towers[0].name} of the image tower and {towers[1].name} of the text tower grow it in "
            "different ways"
        )


def grown_spec(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> ModelSpec:
    """`student` with the eps of its LayerNorms: the teacher's times the operator's factor. A Swin keeps timm's."""
    factor = WIDTH_OPERATORS[config.text.width].norm_factor(teacher.text_width, student.text_width)
    changed = replace(student, text_norm_eps=teacher.text_norm_eps * factor)
    if teacher.arch == student.arch == "vit":
        factor = WIDTH_OPERATORS[config.image.width].norm_factor(teacher.width, student.width)
        changed = replace(changed, norm_eps=teacher.norm_eps * factor)
    return changed


def inexact(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> dict[Tower, tuple[str, ...]]:
    """For each tower, the reasons why its function changes, each as "parameter: reason". No reason: it is exact.

    Exact means: for the same images, and for captions that fit both, teacher and student have the same features up to
    rounding. Where the joint embedding grows, norms and dot products of features are the same instead.
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
        reasons = [*_width_reasons(WIDTH_OPERATORS[growth.width], teacher, student, tower, names)]
        if tower == "image":
            reasons += _resizing_reasons(teacher, student)
        for stack in stacks(student):
            if stack.tower == tower:
                old = max(1, next(each.depth for each in stacks(teacher) if each.prefix == stack.prefix))
                reasons += _depth_reasons(stack.prefix, layers[stack.prefix], old, growth.zero_new_outputs, names)
        found[tower] = tuple(reasons)
    return found


def _names(spec: ModelSpec, tower: Tower) -> TowerNames:
    if tower == "image" and spec.arch == "swin":
        trunk, block = "visual.trunk", "visual.trunk.layers.0.blocks.0"
        stream = (f"{trunk}.patch_embed.norm.weight", "its output is the residual stream, whose mean is not zero")
        merging = (
            (f"{trunk}.layers.{stage}.downsample.norm.weight", "it mixes four neighbours, each with its own mean")
            for stage in range(1, len(spec.depths))
        )
        return TowerNames(
            block,
            f"{block}.norm1.weight",
            f"{block}.attn.qkv.weight",
            "attn.proj.weight",
            "mlp.fc2.weight",
            "visual.head.proj.weight",
            (stream, *merging, (f"{trunk}.norm.weight", "its eps cannot be changed")),
        )
    prefix = "visual." if tower == "image" else ""
    block = f"{prefix}transformer.resblocks.0"
    first = ("visual.ln_pre.weight", "its output is the residual stream, whose mean is not zero")
    return TowerNames(
        block,
        f"{block}.ln_1.weight",
        f"{block}.attn.in_proj_weight",
        "attn.out_proj.weight",
        "mlp.c_proj.weight",
        "visual.proj" if tower == "image" else "text_projection",
        (first,) if tower == "image" and not spec.no_ln_pre else (),
    )


def _width_reasons(
    operator: WidthOperator, teacher: ModelSpec, student: ModelSpec, tower: Tower, names: TowerNames
) -> Iterator[str]:
    size = "width" if tower == "image" else "text_width"
    old, new = getattr(teacher, size), getattr(student, size)
    if new != old:
        yield from operator.stream(old, new, names)
    if not operator.exact:
        if int(old * teacher.mlp_ratio) != int(new * student.mlp_ratio):
            yield f"{names.block}.{names.down}: new hidden units write into the residual stream"
        if teacher.embed_dim != student.embed_dim:
            yield f"{names.projection}: the new part of the joint embedding changes norms and products"


def _resizing_reasons(teacher: ModelSpec, student: ModelSpec) -> Iterator[str]:
    vit = student.arch == "vit"
    sides = [spec.image_size // spec.patch_size for spec in (teacher, student)]
    first = "visual.conv1.weight" if vit else "visual.trunk.patch_embed.proj.weight"
    if teacher.patch_size != student.patch_size:
        yield f"{first}: the patch size changes from {teacher.patch_size} to {student.patch_size} pixels"
    if vit and sides[0] != sides[1]:
        yield f"visual.positional_embedding: its grid is resized from {sides[0]} to {sides[1]}"
    if not vit and teacher.window != student.window:
        table = "visual.trunk.layers.0.blocks.0.attn.relative_position_bias_table"
        yield f"{table}: the windows grow from {teacher.window} to {student.window}"
    elif not vit and sides[0] != sides[1]:
        yield f"{first}: an image has {sides[1]} patches a side instead of {sides[0]}"


def _depth_reasons(prefix: str, sources: list[int], teacher: int, zeroed: bool, names: TowerNames) -> Iterator[str]:
    added = added_layers(sources)
    kept = [source for source, new in zip(sources, added, strict=True) if not new]
    if kept != list(range(teacher)):
        lost = next((layer for layer in range(teacher) if layer not in kept), None)
        what = "the teacher's layers change their order" if lost is None else f"the teacher's layer {lost} is left out"
        yield f"{prefix}.{lost or 0}.{names.out}: {what}"
    if any(added) and not zeroed:
        first = added.index(True)
        yield f"{prefix}.{first}.{names.out}: layer {first} is added and writes into the residual stream"
