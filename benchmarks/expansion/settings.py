"""The training runs of the expansion study: pairs of models, variants of each, and their recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.recipe.read import load_recipe, parse_recipe
from compt.recipe.schema import Recipe

TEACHER, STUDENT = "teacher", "student"
"""Names of the two models of a pair in their recipes."""


@dataclass(frozen=True)
class Variant:
    """One way to start and train a student. Without `expanded` it starts from scratch; without `distilled` it does not
    learn from its teacher's features. With neither, it has no teacher.
    """

    name: str
    width: str = "insert"
    depth: str = "duplicate"
    zero_new_outputs: bool = False
    expanded: bool = True
    distilled: bool = True

    @property
    def compared(self) -> bool:
        """Whether it differs from the reference only by its operators."""
        return self.expanded and self.distilled


def _depth(operator: str, zero: bool) -> Variant:
    return Variant(f"{operator}_zero" if zero else operator, depth=operator, zero_new_outputs=zero)


SCRATCH = Variant("scratch", expanded=False, distilled=False)
IFD_ONLY = Variant("ifd_only", expanded=False)
IWI_ONLY = Variant("iwi_only", distilled=False)
EXACT = Variant("net2net_duplicate_zero", width="net2net", zero_new_outputs=True)
"""Preserves the teacher's function in width and depth at integer ratios."""

WIDTHS = (
    Variant("insert"),
    SCRATCH,
    *(Variant(operator, width=operator) for operator in [*WIDTH_OPERATORS][1:]),
    IFD_ONLY,
    IWI_ONLY,
)
DEPTHS = (
    _depth("duplicate", False),
    SCRATCH,
    _depth("duplicate", True),
    EXACT,
    *(_depth(operator, False) for operator in DEPTH_OPERATORS if operator != "duplicate"),
    *(_depth(operator, True) for operator in ("constant", "interval")),
)


@dataclass(frozen=True)
class Pair:
    """A teacher, its student, and how long the student trains. `variants` come in the order of training; the first is
    the one that others are compared with. `start`: the folder of the teacher, where it is not trained here.
    """

    name: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    variants: tuple[Variant, ...]
    train: dict[str, float]
    warmup: dict[str, float]
    start: str | None = None

    @property
    def reference(self) -> str:
        return self.variants[0].name


@dataclass(frozen=True)
class Setting:
    """A study: the recipe that data, optimizer and evaluation come from, `changes` to it as of `--set`, and the pairs.

    `select` and `report` are the evaluation sets of curves and of final scores, perhaps the same. Students that start
    from their teacher train at `lr`, those from scratch at the recipe's.
    """

    name: str
    recipe: Path
    changes: tuple[str, ...]
    pairs: tuple[Pair, ...]
    select: str
    report: str
    every: dict[str, float]
    lr: float
    seeds: tuple[int, ...] = (0, 1)
    ema: float | None = None
    """Decay of the moving average of the teachers that are trained here, which depth `netexpand` reads."""
    teacher_train: dict[str, float] = field(default_factory=dict)
    teacher_warmup: dict[str, float] = field(default_factory=dict)

    def pair(self, name: str) -> Pair:
        return next(pair for pair in self.pairs if pair.name == name)


@dataclass(frozen=True)
class Training:
    """One training run of the study; `variant` is None for a teacher."""

    pair: Pair
    seed: int
    variant: Variant | None = None

    @property
    def folder(self) -> str:
        """The run folder, relative to the study's."""
        if self.variant is None:
            return f"teachers/{self.pair.teacher['preset']}-s{self.seed}"
        return f"{self.pair.name}/{self.variant.name}-s{self.seed}"

    @property
    def job(self) -> str:
        return f"1-{TEACHER if self.variant is None else STUDENT}"


def trainings(setting: Setting, seeds: Sequence[int] | None = None) -> Iterator[Training]:
    """All training runs, one seed after another, so that the first seed is a whole study. Teachers precede students.

    A teacher that two pairs share trains once.
    """
    known = set()
    for seed in setting.seeds if seeds is None else seeds:
        for pair in setting.pairs:
            teacher = Training(pair, seed)
            if pair.start is None and teacher.folder not in known:
                known.add(teacher.folder)
                yield teacher
            yield from (Training(pair, seed, variant) for variant in pair.variants)


def recipe_of(setting: Setting, training: Training, run: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of one training run: the setting's, with `changes`. Raises ConfigError."""
    source = f"{setting.recipe} for {training.folder}"
    base = load_recipe(setting.recipe, [*setting.changes, *changes])
    values = base.model_dump(mode="json", by_alias=True, exclude_none=True)
    pair, variant = training.pair, training.variant
    member = {"name": TEACHER, **pair.teacher} if variant is None else {"name": STUDENT, **pair.student}
    values["family"] = {"members": [member], "common": values["family"]["common"]}
    values |= {"name": training.folder.replace("/", "-"), "seed": training.seed, "baselines": None}
    values["evaluation"] |= {
        "every": setting.every if variant else setting.teacher_train,
        "primary": setting.report,
        "contact_sheet": None,
        "sets": _sets(values["evaluation"]["sets"], setting),
    }
    if variant is None:
        link = {"model": TEACHER, "train": setting.teacher_train, "warmup": setting.teacher_warmup}
        values["chain"] = {"links": [link]}
        values["optimizer"]["ema"] = {"decay": setting.ema} if setting.ema else None
    else:
        values["chain"] = _chain(values["chain"], setting, training, run)
    return parse_recipe(values, source)


def _sets(sets: list[dict[str, Any]], setting: Setting) -> list[dict[str, Any]]:
    roles = {setting.report: "report", setting.select: "select"}
    return [{**item, "role": roles[item["name"]]} for item in sets if item["name"] in roles]


def _chain(base: dict[str, Any], setting: Setting, training: Training, run: Path) -> dict[str, Any]:
    pair, variant = training.pair, training.variant
    assert variant is not None
    link: dict[str, Any] = {"model": STUDENT, "train": pair.train, "warmup": pair.warmup}
    if variant.expanded:
        link["lr"] = setting.lr
    if not (variant.expanded or variant.distilled):
        return {"links": [link]}
    if not variant.distilled:
        link["alpha"] = 0.0
    teacher = Training(pair, training.seed)
    expand = {"width": variant.width, "depth": variant.depth, "zero_new_outputs": variant.zero_new_outputs}
    return {
        "links": [link],
        "from": pair.start or str(run / teacher.folder / "jobs" / teacher.job / "model"),
        "expand": expand,
        "distill": base["distill"],
    }


def _small(preset: str, **sizes: int) -> dict[str, Any]:
    return {"preset": preset, **sizes}


EMOJI = Setting(
    name="emoji",
    recipe=Path("recipes/emoji.yaml"),
    changes=(),
    pairs=(
        Pair("width", _small("vit_nano"), _small("vit_mini"), WIDTHS, {"steps": 200}, {"steps": 20}),
        Pair(
            "depth",
            _small("vit_nano"),
            _small("vit_mini", depth=8, text_depth=4),
            DEPTHS,
            {"steps": 150},
            {"steps": 20},
        ),
    ),
    select="val_style",
    report="test_style",
    every={"steps": 25},
    lr=2e-3,
    ema=0.999,
    teacher_train={"epochs": 60},
    teacher_warmup={"steps": 100},
)
"""Three quarters of an hour on two cores, on the sample that comes along. From scratch, the rate of the recipe's links
is worse than that of its first model: after 175 of 200 steps the loss was 4.65 instead of 4.42 (seed 0).
"""

TINY = Setting(
    name="tiny",
    recipe=EMOJI.recipe,
    changes=("optimizer.batch=32", "optimizer.eps=1e-4"),
    pairs=tuple(
        Pair(name, _small("vit_pico"), _small("vit_nano", **sizes), variants, {"steps": 2}, {"steps": 1})
        for name, sizes, variants in (
            ("width", {"depth": 2, "text_depth": 1}, WIDTHS),
            ("depth", {"text_depth": 2}, DEPTHS),
        )
    ),
    select="val_style",
    report="test_style",
    every={"steps": 1},
    lr=2e-3,
    ema=0.9,
    teacher_train={"steps": 4},
    teacher_warmup={"steps": 1},
)
"""Checks that everything runs; says nothing about operators."""

CC3M = Setting(
    name="cc3m",
    recipe=Path("recipes/cc3m_vit.yaml"),
    changes=("evaluation.validation=data/cc3m/val/*.tar",),
    pairs=(
        Pair(
            "width",
            _small("vit_t16"),
            _small("vit_s16"),
            WIDTHS,
            {"epochs": 24},
            {"steps": 1000},
            start="runs/cc3m_vit/jobs/1-vit_t16/model",
        ),
        Pair(
            "depth",
            _small("vit_b16"),
            _small("vit_l16"),
            DEPTHS,
            {"epochs": 15},
            {"steps": 1000},
            start="runs/cc3m_vit/jobs/3-vit_b16/model",
        ),
    ),
    select="imagenet1k",
    report="imagenet1k",
    every={"epochs": 1},
    lr=1e-3,
    seeds=(0,),
)
"""The paper's figure B and table H, from the links of `compt chain recipes/cc3m_vit.yaml`; depth `netexpand` needs
`--set optimizer.ema.decay=0.9999` there.
"""

SETTINGS = {setting.name: setting for setting in (EMOJI, TINY, CC3M)}
