"""How one model grows into a larger one: the operators' names, what may grow, what is exact. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from compt.errors import ConfigError, nearest
from compt.presets import ModelSpec

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
