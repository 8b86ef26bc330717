"""What the planner asks of expansions: which pairs may follow each other in a chain, and what they need. No torch."""

from __future__ import annotations

from compt.cost.counts import parameters
from compt.errors import ConfigError
from compt.models.growth import TOWERS, ExpandConfig, Tower, check_sizes, inexact
from compt.models.presets import VOCAB_SIZE, ModelSpec

EXACT = frozenset({"net2net", "lemon", "insert_exact"})
"""Width operators that promise to keep what a model computes."""

_AGREE = ("quick_gelu", "no_ln_pre", "head_width", "text_head_width")
_IMAGE = ("no_ln_pre", "head_width")


def check_growth(teacher: ModelSpec, student: ModelSpec, *, strictly: bool = True) -> None:
    """Raise ConfigError where `student` cannot grow from `teacher`: an axis that shrinks, or sizes that must agree.

    Between a ViT and a Swin the image towers have no axis in common; the numbers of parameters are compared instead.
    `strictly`: a student of its teacher's size is refused too.
    """
    before, after = parameters(teacher), parameters(student)
    if after < before or (strictly and after == before):
        raise ConfigError(
            f"its {after:,} parameters are not more than the {before:,} of '{teacher.name}', which it grows from; "
            "a chain goes from small to large"
        )
    check_sizes(teacher, student)


def check_start(start: ModelSpec, student: ModelSpec) -> None:
    """`check_growth` for a model from outside; where sizes must agree, the error says what the recipe has to say."""
    alike = start.arch == student.arch
    wanted = {
        name: getattr(start, name)
        for name in _AGREE
        if getattr(start, name) != getattr(student, name) and (alike or name not in _IMAGE)
    }
    if wanted:
        found = ", ".join(f"{name} is {_yaml(getattr(student, name))}" for name in wanted)
        write = ", ".join(f"{name}: {_yaml(value)}" for name, value in wanted.items())
        raise ConfigError(
            f"its {found}, unlike that of '{start.name}' at chain.from; for all members, write "
            f"family.common: {{{write}}}"
        )
    if start.vocab_size < VOCAB_SIZE:
        words = f"{start.vocab_size} tokens, CLIP's tokenizer {VOCAB_SIZE}"
        raise ConfigError(f"'{start.name}' at chain.from knows {words}")
    check_growth(start, student, strictly=False)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def averaging(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> list[str]:
    """The towers that take layers from the moving average of the teacher's weights."""
    if config.reference_compatible:
        return []
    image = teacher.arch == student.arch and (teacher.depth, teacher.depths) != (student.depth, student.depths)
    grows = {"image": image, "text": teacher.text_depth != student.text_depth}
    return [tower for tower in TOWERS if grows[tower] and config.tower(tower).depth == "netexpand"]


def broken_promises(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> dict[Tower, tuple[str, ...]]:
    """For each tower whose width operator promises to keep what the model computes, and cannot for this pair, why."""
    found = inexact(teacher, student, config)
    return {tower: found[tower] for tower in TOWERS if config.tower(tower).width in EXACT and found[tower]}
