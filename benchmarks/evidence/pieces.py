"""The pieces of the evidence study, in order of worth. A piece is one training run of at most 100 minutes on a core."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe, parse_recipe
from compt.recipe.schema import Recipe

RECIPE = Path("benchmarks/evidence/icons.yaml")
MEMBERS = ("a", "b", "c", "d")
"""The family. Each member costs about three times its predecessor."""

BETWEEN = {"ab": (48, 3), "bc": (80, 4), "cd": (144, 4)}
"""Width and depth of members between them. Their costs are 2, 6.4 and 20 times that of a."""

OTHER_FAMILIES = {3: ("a", "bc", "d"), 7: ("a", "ab", "b", "bc", "c", "cd", "d")}
"""Families of 3 and 7 in the same range of costs, by their number of members."""

SEEDS = (0, 1, 2)
MORE_SEEDS = (*SEEDS, 3, 4, 5)
"""Of chains on few images: three seeds can hardly tell whether a member loses a point there (docs/log.md)."""

LADDER = (40, 80, 160, 320)
"""Epochs of baselines on parts of the training set. Links there have a quarter."""
PARTS = (2, 1)
"""Shards of the parts."""

IMAGES = {1: 1594, 2: 3189, 8: 12759}
"""Training images in the first shards, by their number. Images are shuffled, so the first shards are a random part."""
ALL = 8
"""All shards."""

LENGTHS = (10, 20, 40, 80, 160, 320)
"""Epochs of the baselines: complete schedules, each twice as long as the last."""
SHORT, LENGTH = LENGTHS[2:4]
"""Epochs of the first model: of the whole family's chain, and of the pair's a → b. Baselines have as many."""
LENGTHS_OF_EQUAL = LENGTHS[:3]
"""Epochs of the baselines with all seeds. Members of the family's chain should lie between them."""

RATES = {
    "a": (3e-3, 1e-3, 6e-3, 1.7e-3),
    "b": (3e-3, 1e-3, 6e-3, 1.7e-3),
    "c": (3e-3, 1e-3, 1.7e-3, 6e-4),
    "d": (1e-3, 6e-4, 1.7e-3),
}
"""The peak rates that are tried for each model's baselines. Until results choose one, it is the first."""
Kind = Literal["quarter", "quick", "few"]
KINDS: tuple[Kind, ...] = ("quarter", "quick", "few")
"""Of chains, and of links that choose their rates in them. The last is on few images."""

LINK_RATES: dict[Kind, dict[str, tuple[float, ...]]] = {
    "quarter": {"b": (3e-3, 1e-3, 6e-3, 1.7e-3, 1e-2, 1.7e-2), "c": (3e-3, 1.7e-3, 6e-3), "d": (1e-3, 1.7e-3, 3e-3)},
    "quick": {"b": (3e-3, 1e-3, 1e-2), "c": (3e-3, 1e-3, 1.7e-3), "d": (1e-3, 6e-4, 1.7e-3)},
    "few": {"b": (1e-2, 6e-3, 1.7e-2), "c": (6e-3, 3e-3, 1e-2), "d": (3e-3, 1.7e-3, 6e-3)},
}
"""The same for its links, in each kind of chain: short links from a good teacher want lower rates. On few images, the
best rates of "quarter" and their neighbours."""
SMALL_RATES: dict[float, dict[str, tuple[float, ...]]] = {
    320: {"b": (1.7e-3, 3e-3, 6e-3), "c": (1e-3, 1.7e-3, 3e-3), "d": (6e-4, 1e-3, 1.7e-3)},
    160: {"c": (1e-3, 1.7e-3), "d": (6e-4, 1e-3)},
}
"""The same for baselines on the smallest part of the images, by their epochs: the rate of all images and higher ones,
as links have higher ones. Links of "quarter" keep their rates of all images."""
LR = RATES["a"][0]
"""The rate of pieces that name none."""
RATED = LENGTHS[1]
"""Epochs of the baselines by which rates are chosen."""
SELECT = "val_style"
"""The evaluation set by which rates are chosen."""

LINKS = (5, 10, 20, 40)
"""Epochs of the links from a to b, after a of LENGTH epochs."""

STABLE = round(0.8 * LENGTH)
"""Epochs in which "wsd" stays at the peak."""

SHARES = (4, 5, 6)
"""A chain's links train for these parts of the first model's length: lengths fall linearly along a chain."""

QUICK = (16, 20, 24)
"""The shares of a chain of short links, from a first model of LENGTH epochs: close to their teachers' accuracy, they
save the most against baselines of equal accuracy."""


class Design(NamedTuple):
    """A chain of the family: the first model's epochs, the parts of them that links train for, rates, data, seeds."""

    epochs: float
    shares: tuple[float, ...]
    kind: Kind
    shards: int = ALL
    seeds: tuple[int, ...] = SEEDS


FIRST = Design(SHORT, SHARES, "quarter")
CHAINS = (
    FIRST,
    Design(LENGTH, QUICK, "quick"),
    Design(2 * LENGTH, QUICK, "quick"),
    Design(LENGTH, SHARES, "quarter"),
    Design(2 * LENGTH, (32, 40, 160 / 3), "quick"),
)
"""The chains of the whole family. The third and the fourth have one seed."""

SMALL = (
    Design(LADDER[-1], SHARES, "quarter", PARTS[-1], MORE_SEEDS),
    Design(LADDER[-1], (*SHARES[:2], 8), "quarter", PARTS[-1], MORE_SEEDS),
    Design(LADDER[-1], tuple(2 * share for share in SHARES), "quick", PARTS[-1]),
    Design(LADDER[-1], (SHARES[0], SHARES[0], 8), "few", PARTS[-1], MORE_SEEDS),
    Design(LADDER[-1], (3, 3, 4), "few", PARTS[-1], MORE_SEEDS),
)
"""Chains on an eighth of the images, where the pair's link of a quarter was as good as its baseline (seed 0). The last
link of the second is shorter, as d costs most. The third has one seed; its links have half the first one's length:
about as many steps as short links on all images, whose rates they take. The fourth came after the results of the first
two: c trains for a quarter, too, and links have rates of their own. The fifth has these rates and longer links."""

AGAIN = SMALL[-1]._replace(seeds=tuple(range(6, 14)))
"""The fifth on seeds that chose nothing, with baselines of their own."""

LAST_SHARES = {3: 5, 4: SHARES[-1], 7: 8}
"""The last link's share by the number of members: the closer two neighbours are, the shorter their link, as in the
paper. So a family of 7 saves more than one of 3, if its last model is as good all the same."""

ALPHAS = (0.0, 500.0, 1e3, 3e3, 10e3)
"""Weights of distillation. r = IFD / task is 0.05 to 0.08 with the paper's 500; the others aim at 0.1, 0.3, 1."""

OPERATORS = ("insert", "net2net", "insert_exact", "netexpand")
"""Width operators: the method's own, copies, new channels that are silent at first, orthonormal new rows."""

COSINE = "cosine"
"""The recipe's schedule."""

EQUAL_MACS, EQUAL_TIME, EQUAL_PAIR, EQUAL_CLASSICAL = 13, 15.7, 45.7, 5.25
"""Epochs of model d from scratch that cost the MACs, and the device time, of the whole first chain from a to d; of
model b that cost the MACs of a of LENGTH epochs and a link of a quarter; and of every member in classical distillation,
where d trains alone and teaches the others, for the MACs of the first chain."""


ALONE_WARMUP = 200
"""Steps of the warm-up of models from scratch. Links have 50."""


@dataclass(frozen=True)
class Piece:
    """One training run: a model from scratch, or as a link that grows from the model of another piece.

    `alpha`: weight of distillation; None: the recipe's. `warmup` in steps. Without `expanded`, a link starts from
    random weights, and its teacher only distils. `width`: the operator that expands it. `shards`: how many of the
    training set, the first ones. `schedule`: how the rate falls.
    """

    model: str
    epochs: float
    seed: int = 0
    teacher: Piece | None = None
    lr: float = LR
    warmup: int = ALONE_WARMUP
    alpha: float | None = None
    expanded: bool = True
    width: str = OPERATORS[0]
    shards: int = ALL
    schedule: str = COSINE

    @property
    def name(self) -> str:
        """The name of its folder and of its files of results: `b-e10-s0-lr0.001-w50-from-a-e40-s0`."""
        text = f"{self.model}-e{self.epochs:g}-s{self.seed}"
        if self.lr != LR:
            text += f"-lr{self.lr:g}"
        if self.shards != ALL:
            text += f"-shards{self.shards}"
        if self.schedule != COSINE:
            text += f"-{self.schedule}"
        if self.teacher is None:
            return text if self.warmup == ALONE_WARMUP else f"{text}-w{self.warmup}"
        alpha = "" if self.alpha is None else f"-alpha{self.alpha:g}"
        start = "-random" if not self.expanded else "" if self.width == OPERATORS[0] else f"-{self.width}"
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
        values = base_recipe(RECIPE).model_dump(mode="json", by_alias=True, exclude_none=True)
        link: dict[str, Any] = {
            "model": self.model,
            "train": {"epochs": self.epochs},
            "warmup": {"steps": self.warmup},
            "lr": self.lr,
        }
        if self.alpha is not None:
            link["alpha"] = self.alpha
        if not self.expanded:
            link["initial"] = "random"
        if self.width != OPERATORS[0]:
            link["expand"] = {"width": self.width}
        chain: dict[str, Any] = {**values["chain"], "links": [link]}
        if self.teacher is not None:
            chain["from"] = str(self.teacher.model_folder(runs))
        # A pattern of its own for all shards would give runs of before another identity.
        if self.shards != ALL:
            values["data"]["train"] = [f"data/icons/train/icon-train-{at:06d}.tar" for at in range(self.shards)]
            values["data"]["images"] = IMAGES[self.shards]
        values["optimizer"]["schedule"]["shape"] = self.schedule
        values |= {"name": self.name, "seed": self.seed, "chain": chain, "baselines": None}
        # Scores while training would cost time that differs between pieces: a model is scored at its end.
        values["evaluation"]["every"] = {"epochs": self.epochs}
        return parse_recipe(values, f"{RECIPE} for {self.name}")


@functools.cache
def base_recipe(path: Path) -> Recipe:
    """The recipe from which those of all pieces are made: with the members between those of the family."""
    values = load_recipe(path, []).model_dump(mode="json", by_alias=True, exclude_none=True)
    values["family"]["members"] += [
        {"name": name, "preset": "vit_nano", "width": width, "depth": depth, "text_width": width, "text_depth": 2}
        for name, (width, depth) in BETWEEN.items()
    ]
    return parse_recipe(values, str(path))


def link_recipe(model: str, teacher: str | None, epochs: float = 1, shards: int = ALL) -> Recipe:
    """A recipe whose last job is `model` from scratch or as a link, to plan and time it without data or weights."""
    values = base_recipe(RECIPE).model_dump(mode="json", by_alias=True, exclude_none=True)
    values["data"]["images"] = IMAGES[shards]
    links: list[dict[str, Any]] = [{"model": model, "train": {"epochs": epochs}, "warmup": {"steps": 1}}]
    if teacher is not None:
        # A link needs its teacher's size, which the plan takes from the link before. With random weights that may be
        # the larger model, and steps cost the same.
        links = [{**links[0], "model": teacher}, {**links[0], "initial": "random"}]
    return parse_recipe({**values, "chain": {**values["chain"], "links": links}, "baselines": None}, str(RECIPE))


@functools.cache
def macs_of(piece: Piece) -> float:
    """The MACs of its training, with the teacher's forward passes, without reading data or weights."""
    teaches = piece.teacher is not None and piece.alpha != 0
    teacher = piece.teacher.model if teaches and piece.teacher else None
    plan = make_plan(link_recipe(piece.model, teacher, piece.epochs, piece.shards))
    return plan.cost(plan.jobs[-1]).total_macs


@dataclass(frozen=True)
class Rates:
    """Peak rates that results have chosen, by model, and the pieces that train at them."""

    alone: Mapping[str, float] = field(default_factory=dict)
    quarter: Mapping[str, float] = field(default_factory=dict)
    quick: Mapping[str, float] = field(default_factory=dict)
    few: Mapping[str, float] = field(default_factory=dict)
    small: Mapping[tuple[str, float], float] = field(default_factory=dict)
    """Of long baselines on the smallest part of the images, by model and epochs; others have the rate of all images."""

    def baseline(self, model: str, epochs: float, seed: int = 0, shards: int = ALL) -> Piece:
        """A model from scratch."""
        lr = self.alone.get(model, _of(model, RATES)[0])
        if shards == PARTS[-1]:
            lr = self.small.get((model, epochs), lr)
        return Piece(model, epochs, seed, lr=lr, shards=shards)

    def link(self, model: str, epochs: float, teacher: Piece, kind: Kind = "quarter") -> Piece:
        """A link with a short warm-up, of its teacher's seed and images."""
        lr = _of(model, getattr(self, kind)) or _of(model, LINK_RATES[kind])[0]
        return Piece(model, epochs, teacher.seed, teacher, lr, warmup=50, shards=teacher.shards)

    def chain(
        self, first: Piece, members: Sequence[str], shares: Sequence[float] = SHARES, kind: Kind = "quarter"
    ) -> Iterator[Piece]:
        """The links of a chain. `shares` are those of the first model's length, one for each link."""
        model = first
        for name, share in zip(members[1:], shares, strict=False):
            model = self.link(name, round(first.epochs / share), model, kind)
            yield model

    def trials(self, model: str, kind: Kind = "quarter") -> list[Piece]:
        """The links by which the rate of the model's links is chosen: of the chain that has been chosen so far."""
        design = next(design for design in (*CHAINS, *SMALL) if design.kind == kind)
        one = family_arms(self, design=design)[MEMBERS.index(model)].pieces[0]
        return [replace(one, lr=lr) for lr in LINK_RATES[kind][model]]

    def settled(self, piece: Piece) -> bool:
        """Whether no rate on which it depends is still open; trials depend on those of the models before."""
        return all(self._settled(one) for one in piece.chain)

    def _settled(self, one: Piece) -> bool:
        if one.teacher is None and one.shards == PARTS[-1] and one.model in SMALL_RATES.get(one.epochs, ()):
            return (one.model, one.epochs) in self.small or one in small_trials(one.model, one.epochs)
        if one.shards != ALL and one.lr == LR and (one.teacher is None or one.model == MEMBERS[1]):
            return True
        if one.teacher is None or not one.expanded:
            return one.model in self.alone or (one.epochs, one.seed) == (RATED, 0)
        model = one.model[-1]
        before = MEMBERS[1 : MEMBERS.index(model)]
        chosen = {kind: getattr(self, kind) for kind in KINDS if kind != "few" or one.shards != ALL}
        return all(model in rates for rates in chosen.values()) or any(
            all(name in rates for name in before) and one in self.trials(model, kind) for kind, rates in chosen.items()
        )


def _of(model: str, by_member: Mapping[str, Any]) -> Any:
    """What holds for the model: between two members, as `bc`, it is that of the larger one."""
    return by_member.get(model[-1])


def pieces(rates: Rates) -> Iterator[Piece]:
    """All pieces, in order of worth; a teacher comes before its students, and no piece comes twice."""
    claims = arms(rates)
    # Of (a), all seeds of the chains first: their baselines take four times as long.
    chains = [arm for arm in claims["a"] if arm.pieces[0].teacher]
    first = pieces_of([claims["f"], chains, claims["l"]])
    found = itertools.chain(of_the_family(rates), first, pieces_of(claims.values()))
    return once(itertools.chain(found, _last(rates)))


def pieces_of(claims: Iterable[Sequence[Arm]]) -> Iterator[Piece]:
    """All that these claims compare: claim by claim, in each of them one seed after the other."""
    return once(
        piece
        for claim in claims
        for at in range(max(len(arm.pieces) for arm in claim))
        for arm in claim
        for piece in arm.pieces[at : at + 1]
    )


def once(found: Iterable[Piece]) -> Iterator[Piece]:
    """Each piece once, its teachers before it."""
    seen = set()
    for piece in found:
        for needed in piece.chain:
            if needed.name not in seen:
                seen.add(needed.name)
                yield needed


def baseline_trials(model: str) -> list[Piece]:
    """The models from scratch by which the rate of the model's baselines is chosen."""
    return [Piece(model, RATED, lr=lr) for lr in RATES[model]]


def small_trials(model: str, epochs: float) -> list[Piece]:
    """The same on the smallest part of the images."""
    return [Piece(model, epochs, lr=lr, shards=PARTS[-1]) for lr in SMALL_RATES[epochs][model]]


def all_small_trials() -> list[Piece]:
    """All of them, the longest first."""
    return [piece for epochs, rates in SMALL_RATES.items() for model in rates for piece in small_trials(model, epochs)]


def link_trials(rates: Rates) -> Iterator[Piece]:
    """All links by which rates are chosen, chain by chain."""
    for kind, model in itertools.product(KINDS, MEMBERS[1:]):
        yield from rates.trials(model, kind)


def trials(rates: Rates) -> Iterator[Piece]:
    """All trials that settle rates."""
    for model in MEMBERS:
        yield from baseline_trials(model)
    yield from link_trials(rates)
    yield from all_small_trials()


def of_the_family(rates: Rates) -> Iterator[Piece]:
    """What leads to the family's chain, with one seed; pieces may come twice, and teachers are left out."""
    # A first look, far from the plateau: a link of a quarter at two rates.
    for model in MEMBERS[:2]:
        yield from (Piece(model, epochs) for epochs in LENGTHS[:3])
    for epochs in LENGTHS[1:3]:
        yield from (replace(rates.link("b", round(epochs / 4), Piece("a", epochs)), lr=lr) for lr in RATES["b"][:2])
    # The rates of baselines, and the pair: lengths of baselines, and links of several lengths.
    for model in MEMBERS[:2]:
        yield from baseline_trials(model)
        yield from (rates.baseline(model, epochs) for epochs in LENGTHS[:5])
    # At the first rate too, which is another than b's own: what a rate for the whole family does to a comparison.
    yield from (Piece("b", epochs) for epochs in LENGTHS[3:5])
    first = rates.baseline("a", LENGTH)
    for epochs, lr in itertools.product(LINKS, RATES["b"][:2]):
        yield replace(rates.link("b", epochs, first), lr=lr)
    # Whether less data leaves a plateau within reach.
    yield from ladder(rates)
    # The larger members: rates and lengths, and a chain from a short first model, link by link at its best rate.
    for model in MEMBERS[2:]:
        yield from baseline_trials(model)
    yield Piece("c", LENGTHS[0])
    yield from (rates.baseline(model, SHORT) for model in MEMBERS[2:])
    yield from link_trials(rates)
    # As many epochs of links as in the first chain, after a first model that trains for longer: it costs little.
    yield family_arms(rates, design=CHAINS[2])[-1].pieces[0]
    yield from (rates.baseline(model, LENGTHS[0]) for model in MEMBERS[2:])
    yield from (rates.link("b", epochs, first) for epochs in LINKS)
    # Why a short link is not lossless: its start, its distillation, or its teacher.
    one = rates.link("b", LINKS[1], first)
    yield from (replace(one, warmup=300), replace(one, alpha=0.0))
    yield replace(one, teacher=rates.baseline("a", 2 * LENGTH))
    # A start that is exact, at lower rates too; other falls of the rate, and a teacher whose rate has not fallen.
    yield from (replace(one, width="insert_exact", lr=lr) for lr in (1e-2, 3e-3, 1e-3))
    yield from (replace(one, schedule=schedule) for schedule in ("linear", "wsd"))
    yield replace(one, teacher=replace(first, schedule="constant"))
    # A chain where data is short, and the larger members alone there.
    yield from all_small_trials()
    yield from (family_arms(rates, design=design)[-1].pieces[0] for design in SMALL)
    for epochs in LADDER[:1:-1]:
        yield from (rates.baseline(model, epochs, shards=SMALL[0].shards) for model in MEMBERS[2:])


def ladder(rates: Rates) -> Iterator[Piece]:
    """The smallest pair on parts of the training set: alone, and links of a quarter. First at the first rate."""
    for used, shards in itertools.product((Rates(), rates), PARTS):
        yield from (used.baseline(model, epochs, shards=shards) for model in MEMBERS[:2] for epochs in LADDER)
        yield from (quarter_arm(used, epochs, shards).pieces[0] for epochs in LADDER)


def quarter_arm(rates: Rates, epochs: float, shards: int = ALL) -> Arm:
    """The link from a to b after `epochs` of a, for a quarter of them."""
    seeds = MORE_SEEDS if (epochs, shards) == (LADDER[-1], PARTS[-1]) else SEEDS  # those of chains there
    return family_arms(rates, MEMBERS[:2], FIRST._replace(epochs=epochs, shards=shards, seeds=seeds))[1]


def _last(rates: Rates) -> Iterator[Piece]:
    """Longer trainings."""
    # What training longer does to the savings of the pair.
    for epochs in LENGTHS[4:]:
        yield from (rates.baseline(model, epochs) for model in MEMBERS[:2])
        yield rates.link("b", round(epochs / 4), rates.baseline("a", epochs))
    yield family_arms(rates, design=CHAINS[3])[-1].pieces[0]
    yield from (rates.baseline(model, LENGTH) for model in MEMBERS[2:])


@dataclass(frozen=True)
class Arm:
    """One way to train a model, with one piece for each seed: what a claim compares."""

    name: str
    pieces: tuple[Piece, ...]


def family_arms(rates: Rates, members: Sequence[str] = MEMBERS, design: Design = FIRST) -> list[Arm]:
    """The members of a chain, the smallest first."""
    firsts = [rates.baseline(members[0], design.epochs, seed, design.shards) for seed in design.seeds]
    by_seed = [(first, *rates.chain(first, members, design.shares, design.kind)) for first in firsts]
    return [Arm(chain_name(found[0]), found) for found in zip(*by_seed, strict=True)]


def chain_name(piece: Piece) -> str:
    """The models that it grows from with their epochs, and itself: `a(40) → b(10)`."""
    return " → ".join(f"{one.model}({one.epochs:g})" for one in piece.chain)


def shares_of(count: int) -> tuple[float, ...]:
    """The shares of a chain of `count` members: in equal steps from the first of SHARES to that of LAST_SHARES."""
    first, last = SHARES[0], LAST_SHARES[count]
    return tuple(first + (last - first) * at / (count - 2) for at in range(count - 1))


def arms(rates: Rates) -> dict[str, list[Arm]]:
    """What each claim compares, by its letter in `benchmarks.evidence.claims`, in order of worth.

    Claims (f), (g), (h) take the pair of LENGTH epochs: its teacher is better. Those with c and d take the first chain.
    """

    def alone(model: str, epochs: float, shards: int = ALL, seeds: tuple[int, ...] = SEEDS) -> Arm:
        found = (rates.baseline(model, epochs, seed, shards) for seed in seeds)
        return Arm(f"{model} alone, {epochs:g}", tuple(found))

    def few(design: Design) -> list[Arm]:
        where = design.epochs, design.shards, design.seeds
        return [*family_arms(rates, design=design), *(alone(model, *where) for model in MEMBERS[1:])]

    whole = family_arms(rates)
    firsts = alone("a", LENGTH).pieces
    quarter = round(LENGTH / SHARES[0])
    both = Arm("both", tuple(rates.link("b", quarter, first) for first in firsts))
    neither = alone("b", quarter)
    return {
        "f": [
            both,
            Arm("IWI alone", tuple(replace(piece, alpha=0.0) for piece in both.pieces)),
            Arm(
                "IFD alone",
                # As a model from scratch: its rate and warm-up.
                tuple(
                    replace(plain, teacher=first, expanded=False)
                    for plain, first in zip(neither.pieces, firsts, strict=True)
                ),
            ),
            replace(neither, name="neither"),
            replace(alone("b", EQUAL_PAIR), name="neither, for the MACs of a and both"),
        ],
        "a": [
            *whole,
            *family_arms(rates, design=CHAINS[1]),
            *family_arms(rates, design=CHAINS[4]),
            *(alone(model, epochs) for model in MEMBERS for epochs in LENGTHS_OF_EQUAL),
        ],
        "l": schedules(rates),
        "k": list(dict.fromkeys((*family_arms(rates, design=SMALL[0]), *few(SMALL[1])))),
        "m": few(SMALL[3]),
        "n": few(SMALL[4]),
        "e": [
            arm
            for epochs in LENGTHS[1:4]
            for arm in (
                replace(quarter_arm(rates, epochs), name=f"{epochs:g} epochs"),
                alone("b", epochs),
            )
        ],
        "g": [
            Arm(
                f"alpha {alpha:g}",
                tuple(replace(piece, alpha=None if alpha == 500 else alpha) for piece in both.pieces),
            )
            for alpha in ALPHAS
        ],
        "h": [Arm(operator, tuple(replace(piece, width=operator) for piece in both.pieces)) for operator in OPERATORS],
        # The same student after the same steps, from teachers of 1/3, 1/10 and 1/35 of its cost.
        "d": [
            Arm(
                chain_name(rates.link(model, round(SHORT / share), whole[at].pieces[0])),
                tuple(rates.link(model, round(SHORT / share), one) for one in whole[at].pieces),
            )
            for model, share, teachers in (("c", SHARES[1], (1, 0)), ("d", SHARES[2], (2, 1, 0)))
            for at in teachers
        ],
        "o": few(AGAIN),
        "i": [*whole, *(alone(model, SHORT) for model in MEMBERS[1:])],
        "b": [
            *(family_arms(rates, MEMBERS[at:], FIRST._replace(shares=SHARES[at:]))[-1] for at in (2, 1, 0)),
            alone("d", SHORT),
        ],
        "j": [*whole, alone("d", EQUAL_MACS), alone("d", EQUAL_TIME), *classical(rates)],
        "c": [
            family_arms(rates, members, FIRST._replace(shares=shares_of(count)))[-1]
            for count, members in sorted(families().items())
        ],
    }


def schedules(rates: Rates) -> list[Arm]:
    """A link from a model whose rate has not fallen, and what that model is itself.

    STABLE epochs at the peak are what "wsd" trains before its rate falls, so one training gives a finished model and
    a start for the next link.
    """

    def alone(model: str, epochs: float, schedule: str) -> tuple[Piece, ...]:
        return tuple(replace(rates.baseline(model, epochs, seed), schedule=schedule) for seed in SEEDS)

    def link(firsts: Iterable[Piece]) -> tuple[Piece, ...]:
        return tuple(rates.link("b", LINKS[1], first) for first in firsts)

    return [
        Arm(f"a({LENGTH}, constant) → b({LINKS[1]})", link(alone("a", LENGTH, "constant"))),
        Arm(f"a({STABLE}, constant) → b({LINKS[1]})", link(alone("a", STABLE, "constant"))),
        Arm(f"a({LENGTH}, wsd) → b({LINKS[1]})", link(alone("a", LENGTH, "wsd"))),
        Arm(f"a({LENGTH}) → b({LINKS[1]})", link(alone("a", LENGTH, COSINE))),
        Arm(f"a({LENGTH}, wsd)", alone("a", LENGTH, "wsd")),
        Arm(f"a({LENGTH})", alone("a", LENGTH, COSINE)),
        Arm(f"b({SHORT}, wsd)", alone("b", SHORT, "wsd")),
        Arm(f"b({SHORT})", alone("b", SHORT, COSINE)),
    ]


def classical(rates: Rates) -> list[Arm]:
    """Classical distillation: the members from large to small, d alone and the others from random weights with its
    help.

    They train at their own rates of models from scratch, with a link's warm-up, as they are short.
    """
    largest = MEMBERS[-1]
    teachers = [replace(rates.baseline(largest, EQUAL_CLASSICAL, seed), warmup=50) for seed in SEEDS]
    students = (
        (
            f"{largest}({EQUAL_CLASSICAL:g}) distilled to {model}({EQUAL_CLASSICAL:g})",
            [
                replace(rates.baseline(model, EQUAL_CLASSICAL, one.seed), teacher=one, expanded=False, warmup=50)
                for one in teachers
            ],
        )
        for model in reversed(MEMBERS[:-1])
    )
    return [
        Arm(f"{largest} alone, {EQUAL_CLASSICAL:g}", tuple(teachers)),
        *(Arm(name, tuple(found)) for name, found in students),
    ]


def families() -> dict[int, tuple[str, ...]]:
    """The families by their number of members."""
    return {len(MEMBERS): MEMBERS, **OTHER_FAMILIES}
