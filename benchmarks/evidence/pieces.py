"""The pieces of the evidence study, in order of worth. A piece is one training run of at most 100 minutes on a core."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe, parse_recipe
from compt.recipe.schema import Recipe

RECIPE = Path("benchmarks/evidence/icons.yaml")
MEMBERS = ("a", "b", "c", "d")
SEEDS = (0, 1, 2)

LENGTHS = (10, 20, 40, 80, 160)
"""Epochs of the baselines: complete schedules, each twice as long as the last."""

BASELINE_LR = 3e-3
"""The rate of a baseline, unless another of BASELINE_LRS is better on the validation sets after RATED epochs."""

BASELINE_LRS = (BASELINE_LR, 1e-3, 6e-3)
RATED = LENGTHS[1]
SELECT = "val_style"
"""The evaluation set by which lengths and rates are chosen."""

LINKS = (5, 10, 20, 40)
"""Epochs of the links."""

LINK_LRS = (3e-3, 1e-3)
"""Peak rates of links: that of the baselines, and a lower one that spoils the expanded weights less."""


@dataclass(frozen=True)
class Piece:
    """One training run: a model from scratch, or as a link that grows from the model of another piece.

    `alpha`: weight of distillation; None: the recipe's. `warmup` in steps.
    """

    model: str
    epochs: float
    seed: int = 0
    teacher: Piece | None = None
    lr: float = BASELINE_LR
    warmup: int = 200
    alpha: float | None = None

    @property
    def name(self) -> str:
        """The name of its folder and of its files of results: `b-e10-s0-lr0.001-w50-from-a-e40-s0`."""
        text = f"{self.model}-e{self.epochs:g}-s{self.seed}"
        if self.lr != BASELINE_LR:
            text += f"-lr{self.lr:g}"
        if self.teacher is None:
            return text
        alpha = "" if self.alpha is None else f"-alpha{self.alpha:g}"
        return f"{text}-w{self.warmup}{alpha}-from-{self.teacher.name}"

    def model_folder(self, runs: Path) -> Path:
        """The trained model."""
        return runs / self.name / "jobs" / f"1-{self.model}" / "model"

    def recipe(self, runs: Path) -> Recipe:
        """The recipe of this run alone. Raises ConfigError."""
        values = load_recipe(RECIPE, []).model_dump(mode="json", by_alias=True, exclude_none=True)
        link: dict[str, Any] = {
            "model": self.model,
            "train": {"epochs": self.epochs},
            "warmup": {"steps": self.warmup},
            "lr": self.lr,
        }
        if self.alpha is not None:
            link["alpha"] = self.alpha
        chain: dict[str, Any] = {**values["chain"], "links": [link]}
        if self.teacher is not None:
            chain["from"] = str(self.teacher.model_folder(runs))
        values |= {"name": self.name, "seed": self.seed, "chain": chain, "baselines": None}
        # Scores while training would cost time that differs between pieces: a model is scored at its end.
        values["evaluation"]["every"] = {"epochs": self.epochs}
        return parse_recipe(values, f"{RECIPE} for {self.name}")


def macs_of(piece: Piece) -> float:
    """The MACs of its training, with the teacher's forward passes, without reading data or weights."""
    base = load_recipe(RECIPE, []).model_dump(mode="json", by_alias=True, exclude_none=True)
    # A link needs its teacher's size, which the plan takes from the link before.
    models = [piece.model] if piece.teacher is None else [piece.teacher.model, piece.model]
    base["chain"]["links"] = [
        {"model": model, "train": {"epochs": piece.epochs}, "warmup": {"steps": 1}} for model in models
    ]
    plan = make_plan(parse_recipe({**base, "baselines": None}, "piece"))
    job = plan.jobs[-1]
    return plan.cost(job).total_macs


def pieces(rates: Mapping[str, float]) -> Iterator[Piece]:
    """All pieces; a teacher comes before its students, and no piece comes twice. `rates`: of baselines, by model."""
    seen = set()
    for piece in _in_order(lambda model, epochs, seed=0: Piece(model, epochs, seed, lr=rates.get(model, BASELINE_LR))):
        for needed in (*_teachers(piece), piece):
            if needed.name not in seen:
                seen.add(needed.name)
                yield needed


def _teachers(piece: Piece) -> list[Piece]:
    if piece.teacher is None:
        return []
    return [*_teachers(piece.teacher), piece.teacher]


def _in_order(baseline: Callable[..., Piece]) -> Iterator[Piece]:
    short, plateau = LENGTHS[2], LENGTHS[3]
    # A first look, far from the plateau: a link of a quarter at two rates.
    yield from (baseline(model, LENGTHS[1]) for model in MEMBERS[:2])
    yield from _links(baseline("a", LENGTHS[1]), LINKS[:1])
    # The regime: baselines of the smallest pair, then links between them.
    for model in MEMBERS[:2]:
        yield from (baseline(model, epochs) for epochs in LENGTHS[:3])
    yield from _links(baseline("a", short), (10,))
    # Each model's own rate, as links choose theirs too. Where another is better, its baselines are trained with that.
    for model, lr in itertools.product(MEMBERS[:2], BASELINE_LRS):
        yield Piece(model, RATED, lr=lr)
    for model in MEMBERS[:2]:
        yield baseline(model, plateau)
    first = baseline("a", plateau)
    yield from _links(first, LINKS)
    # Whether that length is the plateau, and two more seeds of the smallest pair.
    for model in MEMBERS[:2]:
        yield baseline(model, LENGTHS[-1])
    for seed in SEEDS[1:]:
        yield from (baseline(model, plateau, seed) for model in MEMBERS[:2])
        yield from chain(baseline("a", plateau, seed), MEMBERS[:2])
    # Why short links are not lossless: a longer warm-up, no distillation, a teacher of another length.
    yield Piece("b", 10, 0, first, LINK_LRS[1], warmup=300)
    yield Piece("b", 10, 0, first, LINK_LRS[1], warmup=50, alpha=0.0)
    yield Piece("b", 10, 0, baseline("a", LENGTHS[-1]), LINK_LRS[1], warmup=50)
    # The larger members, one after the other: rates, lengths, their link, seeds.
    for count, model in enumerate(MEMBERS[2:], start=3):
        yield from (Piece(model, RATED, lr=lr) for lr in BASELINE_LRS)
        yield from (baseline(model, epochs) for epochs in LENGTHS)
        yield from chain(first, MEMBERS[:count])
        for seed in SEEDS[1:]:
            yield baseline(model, plateau, seed)
            yield from chain(baseline("a", plateau, seed), MEMBERS[:count])


def _links(teacher: Piece, lengths: Iterable[int]) -> Iterator[Piece]:
    for epochs, lr in itertools.product(lengths, LINK_LRS):
        yield Piece("b", epochs, teacher.seed, teacher, lr, warmup=50)


def chain(first: Piece, members: Sequence[str], lr: float = LINK_LRS[1]) -> Iterator[Piece]:
    """The links of a chain, of a quarter, a fifth and a sixth of the first model's length."""
    model = first
    for name, share in zip(members[1:], (4, 5, 6), strict=False):
        model = Piece(name, round(first.epochs / share), first.seed, model, lr, warmup=50)
        yield model
