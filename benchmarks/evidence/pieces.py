"""The pieces of the evidence study, in order of worth. A piece is one training run of at most 100 minutes on a core."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe, parse_recipe
from compt.recipe.schema import Recipe

RECIPE = Path("benchmarks/evidence/icons.yaml")
MEMBERS = ("a", "b", "c", "d")
"""The family. Each member costs about three times its predecessor."""

OTHER_FAMILIES = {3: ("a", "bc", "d"), 7: ("a", "ab", "b", "bc", "c", "cd", "d")}
"""Families of 3 and 7 in the same range of costs, by their number of members."""

SEEDS = (0, 1, 2)

LADDER = (40, 80, 160, 320)
"""Epochs of baselines on parts of the training set."""
PARTS = (2, 1)
"""Shards of the parts."""

IMAGES = {1: 1594, 2: 3189, 8: 12759}
"""Training images in the first shards, by their number. Images are shuffled, so the first shards are a random part."""
ALL = 8
"""All shards."""

LENGTHS = (10, 20, 40, 80, 160)
"""Epochs of the baselines: complete schedules, each twice as long as the last."""

BASELINE_LR = 3e-3
"""The rate of a baseline, unless another of RATES is better on the validation sets after RATED epochs."""

RATES = {
    "a": (3e-3, 1e-3, 6e-3, 1.7e-3),
    "b": (3e-3, 1e-3, 6e-3, 1.7e-3),
    "c": (3e-3, 1e-3, 1.7e-3, 6e-4),
    "d": (1e-3, 6e-4, 1.7e-3),
}
"""The rates that are tried for each model's baselines, in their order. The wider a model, the lower its best."""
RATED = LENGTHS[1]
SELECT = "val_style"
"""The evaluation set by which lengths and rates are chosen."""

LENGTH = LENGTHS[3]
"""Epochs of the baselines that have all seeds, and of the first model of a chain."""

LINKS = (5, 10, 20, 40)
"""Epochs of the links from a to b."""

SHARES = (4, 5, 6)
"""A chain's links train for these parts of the first model's length: lengths fall linearly along a chain."""

LAST_SHARES = {3: 5, 4: SHARES[-1], 7: 8}
"""The last link's share by the number of members: the closer two neighbours are, the shorter their link, as in the
paper. So a family of 7 saves more than one of 3, if its last model is as good all the same."""

LINK_LRS = (3e-3, 1e-3)
"""Peak rates of links: the first of the baselines', and a lower one that spoils the expanded weights less."""
LINK_LR = LINK_LRS[0]
"""The rate of chains: the better on the validation sets after links of 5 epochs from a(20), and of 10 from a(40)."""

ALPHAS = (0.0, 500.0, 2e3, 8e3, 32e3, 128e3)
"""Weights of distillation. With the paper's 500, r = IFD / task is about 0.02 here; these span r from 0 to about 1."""

ALPHA_SEEDS = SEEDS[:2]

EQUAL_EPOCHS = 25
"""Epochs of model d from scratch that cost the MACs of the whole chain from a to d."""


@dataclass(frozen=True)
class Piece:
    """One training run: a model from scratch, or as a link that grows from the model of another piece.

    `alpha`: weight of distillation; None: the recipe's. `warmup` in steps. Without `expanded`, a link starts from
    random weights, and its teacher only distils. `shards`: how many of the training set, the first ones.
    """

    model: str
    epochs: float
    seed: int = 0
    teacher: Piece | None = None
    lr: float = BASELINE_LR
    warmup: int = 200
    alpha: float | None = None
    expanded: bool = True
    shards: int = ALL

    @property
    def name(self) -> str:
        """The name of its folder and of its files of results: `b-e10-s0-lr0.001-w50-from-a-e40-s0`."""
        text = f"{self.model}-e{self.epochs:g}-s{self.seed}"
        if self.lr != BASELINE_LR:
            text += f"-lr{self.lr:g}"
        if self.shards != ALL:
            text += f"-shards{self.shards}"
        if self.teacher is None:
            return text
        alpha = "" if self.alpha is None else f"-alpha{self.alpha:g}"
        start = "" if self.expanded else "-random"
        return f"{text}-w{self.warmup}{alpha}{start}-from-{self.teacher.name}"

    @property
    def chain(self) -> tuple[Piece, ...]:
        """The models that it grows from, the smallest first, and itself."""
        return (self,) if self.teacher is None else (*self.teacher.chain, self)

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
        # A pattern of its own for all shards would give runs of before another identity.
        if self.shards != ALL:
            values["data"]["train"] = [f"data/icons/train/icon-train-{at:06d}.tar" for at in range(self.shards)]
            values["data"]["images"] = IMAGES[self.shards]
        values |= {"name": self.name, "seed": self.seed, "chain": chain, "baselines": None}
        # Scores while training would cost time that differs between pieces: a model is scored at its end.
        values["evaluation"]["every"] = {"epochs": self.epochs}
        return parse_recipe(values, f"{RECIPE} for {self.name}")


def link_recipe(model: str, teacher: str | None, epochs: float = 1, shards: int = ALL) -> Recipe:
    """A recipe whose last job is `model` from scratch or as a link, to plan and time it without data or weights."""
    values = load_recipe(RECIPE, []).model_dump(mode="json", by_alias=True, exclude_none=True)
    # A link needs its teacher's size, which the plan takes from the link before.
    models = [model] if teacher is None else [teacher, model]
    values["data"]["images"] = IMAGES[shards]
    links = [{"model": name, "train": {"epochs": epochs}, "warmup": {"steps": 1}} for name in models]
    return parse_recipe({**values, "chain": {**values["chain"], "links": links}, "baselines": None}, str(RECIPE))


@functools.cache
def macs_of(piece: Piece) -> float:
    """The MACs of its training, with the teacher's forward passes, without reading data or weights."""
    teaches = piece.teacher is not None and piece.alpha != 0
    teacher = piece.teacher.model if teaches and piece.teacher else None
    plan = make_plan(link_recipe(piece.model, teacher, piece.epochs, piece.shards))
    return plan.cost(plan.jobs[-1]).total_macs


Baseline = Callable[..., Piece]
"""(model, epochs, seed=0) -> a model from scratch at its own rate."""


def baselines_at(rates: Mapping[str, float]) -> Baseline:
    """Baselines at the `rates` of their models; a model that is not named trains at BASELINE_LR."""
    return lambda model, epochs, seed=0: Piece(model, epochs, seed, lr=rates.get(model, BASELINE_LR))


def pieces(rates: Mapping[str, float], plateaus: Mapping[str, float | None] | None = None) -> Iterator[Piece]:
    """All pieces; a teacher comes before its students, and no piece comes twice.

    `rates`: of baselines, by model. `plateaus`: lengths of models whose plateau is known; there they get all seeds.
    """
    baseline = baselines_at(rates)
    return _once(itertools.chain(of_the_family(baseline, plateaus or {}), pieces_of(arms(baseline).values())))


def pieces_of(claims: Iterable[Sequence[Arm]]) -> Iterator[Piece]:
    """All that these claims compare: one seed after the other, in each of them claim by claim."""
    claims = list(claims)
    return _once(arm.pieces[seed] for seed in SEEDS for claim in claims for arm in claim if seed < len(arm.pieces))


def _once(found: Iterable[Piece]) -> Iterator[Piece]:
    """Each piece once, its teachers before it."""
    seen = set()
    for piece in found:
        for needed in piece.chain:
            if needed.name not in seen:
                seen.add(needed.name)
                yield needed


def of_the_family(baseline: Baseline, plateaus: Mapping[str, float | None]) -> Iterator[Piece]:
    """The family's baselines and chain, and what led to them; they may come twice, and teachers are left out."""
    short = LENGTHS[2]
    # A first look, far from the plateau: a link of a quarter at two rates.
    yield from (baseline(model, LENGTHS[1]) for model in MEMBERS[:2])
    yield from _links(baseline("a", LENGTHS[1]), LINKS[:1])
    # The regime: baselines of the smallest pair, then links between them.
    for model in MEMBERS[:2]:
        yield from (baseline(model, epochs) for epochs in LENGTHS[:3])
    yield from _links(baseline("a", short), (10,))
    # Each model's own rate, as links choose theirs too. Where another is better, its baselines are trained with that.
    for model in MEMBERS[:2]:
        yield from (Piece(model, RATED, lr=lr) for lr in RATES[model])
    for model in MEMBERS[:2]:
        yield baseline(model, LENGTH)
    first = baseline("a", LENGTH)
    yield from _links(first, LINKS)
    # Whether that length is the plateau.
    for model in MEMBERS[:2]:
        yield baseline(model, LENGTHS[-1])
    # Whether less data leaves a plateau within reach.
    yield from ladder()
    # The larger members: rates and lengths, and a chain from a shorter first model.
    for model in MEMBERS[2:]:
        yield from (Piece(model, RATED, lr=lr) for lr in RATES[model])
    for model in MEMBERS[2:]:
        yield baseline(model, short)
    for piece in chain(baseline("a", short), MEMBERS):
        yield from (replace(piece, lr=lr) for lr in LINK_LRS)
    yield from (baseline(model, LENGTHS[0]) for model in MEMBERS[2:])
    yield from chain(first, MEMBERS)
    # Why short links are not lossless: a longer warm-up, no distillation, a teacher of another length.
    yield Piece("b", 10, 0, first, LINK_LR, warmup=300)
    yield Piece("b", 10, 0, first, LINK_LR, warmup=50, alpha=0.0)
    yield Piece("b", 10, 0, baseline("a", LENGTHS[-1]), LINK_LR, warmup=50)
    # All seeds of the whole family, then the longest schedules of the larger members.
    for seed, model in itertools.product(SEEDS, MEMBERS):
        yield baseline(model, LENGTH, seed)
        yield from chain(baseline("a", LENGTH, seed), MEMBERS[: MEMBERS.index(model) + 1])
    yield from _on_plateau(baseline, plateaus, MEMBERS)
    yield from (baseline(model, LENGTHS[-1]) for model in MEMBERS[2:])


def ladder() -> Iterator[Piece]:
    """Baselines of the smallest pair on parts of the training set, at the first rate."""
    combined = itertools.product(PARTS, MEMBERS[:2], LADDER)
    return (Piece(model, epochs, shards=shards) for shards, model, epochs in combined)


def _on_plateau(baseline: Baseline, plateaus: Mapping[str, float | None], models: Iterable[str]) -> Iterator[Piece]:
    """All seeds on a plateau that was found at another length than LENGTH."""
    for model in models:
        if (epochs := plateaus.get(model)) is not None:
            yield from (baseline(model, epochs, seed) for seed in SEEDS)


def _links(teacher: Piece, lengths: Iterable[int]) -> Iterator[Piece]:
    for epochs, lr in itertools.product(lengths, LINK_LRS):
        yield link("b", epochs, teacher, lr=lr)


def link(model: str, epochs: float, teacher: Piece, *, lr: float = LINK_LR, alpha: float | None = None) -> Piece:
    """A link with a short warm-up, of its teacher's seed."""
    return Piece(model, epochs, teacher.seed, teacher, lr, warmup=50, alpha=alpha)


def chain(first: Piece, members: Sequence[str], shares: Sequence[float] = SHARES) -> Iterator[Piece]:
    """The links of a chain. `shares` are those of the first model's length, one for each link."""
    model = first
    for name, share in zip(members[1:], shares, strict=False):
        model = link(name, round(first.epochs / share), model)
        yield model


@dataclass(frozen=True)
class Arm:
    """One way to train a model, with one piece for each seed: what a claim compares."""

    name: str
    pieces: tuple[Piece, ...]


def family_arms(baseline: Baseline, members: Sequence[str], shares: Sequence[float] = SHARES) -> list[Arm]:
    """The members of a chain, the smallest first."""
    by_seed = [(first, *chain(first, members, shares)) for first in _firsts(baseline, members[0])]
    return [Arm(" → ".join(members[: at + 1]), found) for at, found in enumerate(zip(*by_seed, strict=True))]


def _firsts(baseline: Baseline, model: str) -> list[Piece]:
    return [baseline(model, LENGTH, seed) for seed in SEEDS]


def shares_of(count: int) -> list[float]:
    """The shares of a chain of `count` members: in equal steps from the first of SHARES to that of LAST_SHARES."""
    first, last = SHARES[0], LAST_SHARES[count]
    return [first + (last - first) * at / (count - 2) for at in range(count - 1)]


def arms(baseline: Baseline) -> dict[str, list[Arm]]:
    """What each claim compares, by its letter in `benchmarks.evidence.claims`, in order of worth.

    Baselines on their plateau are not among them: which length that is follows from the results.
    """
    firsts = _firsts(baseline, "a")
    whole = family_arms(baseline, MEMBERS)
    short_b = round(LENGTH / SHARES[0])
    from_scratch = Arm("neither", tuple(baseline("b", short_b, seed) for seed in SEEDS))
    return {
        "a": [Arm(f"{epochs} epochs", tuple(link("b", epochs, first) for first in firsts)) for epochs in LINKS],
        "f": [
            whole[1],
            Arm("IWI alone", tuple(link("b", short_b, first, alpha=0.0) for first in firsts)),
            Arm(
                "IFD alone",
                # As a model from scratch: its rate and warm-up.
                tuple(
                    replace(plain, teacher=first, expanded=False)
                    for plain, first in zip(from_scratch.pieces, firsts, strict=True)
                ),
            ),
            from_scratch,
        ],
        "b": [family_arms(baseline, MEMBERS[at:], SHARES[at:])[-1] for at in (2, 1, 0)],
        "j": [whole[-1], Arm("d from scratch", tuple(baseline("d", EQUAL_EPOCHS, seed) for seed in SEEDS))],
        "c": [family_arms(baseline, members, shares_of(count))[-1] for count, members in sorted(families().items())],
        # The same student after the same steps, from teachers of 1/3, 1/10 and 1/35 of its cost.
        "d": [
            Arm(
                f"{whole[at].name} → {model}",
                tuple(link(model, round(LENGTH / share), one) for one in whole[at].pieces),
            )
            for model, share, teachers in (("c", SHARES[1], (1, 0)), ("d", SHARES[2], (2, 1, 0)))
            for at in teachers
        ],
        "g": [
            Arm(
                f"alpha {alpha:g}",
                tuple(
                    link("b", short_b, first, alpha=None if alpha == ALPHAS[1] else alpha)
                    for first in firsts[: len(ALPHA_SEEDS)]
                ),
            )
            for alpha in ALPHAS
        ],
    }


def families() -> dict[int, tuple[str, ...]]:
    """The families by their number of members."""
    return {len(MEMBERS): MEMBERS, **OTHER_FAMILIES}
