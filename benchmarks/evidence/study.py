"""The finished pieces of the evidence study, and what follows from them alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.pieces import AGAIN, ALL, COSINE, LENGTHS, MEMBERS, Piece
from benchmarks.evidence.run import RAW, SETS, read_raw
from benchmarks.evidence.speeds import SPEEDS, read_speeds
from benchmarks.evidence.statistics import (
    DRAWS,
    Difference,
    Length,
    difference,
    equal_length,
    equal_lengths,
    interval_of,
)
from compt.chain.record import MANIFEST, read_manifest
from compt.evaluate.encoder import load_arrays

CALIBRATED = "calibrated"
"""The folder, beside the raw results, of the chain with the lengths that the first-pair test found."""

REPORT, UNSEEN, RETRIEVAL = "test_style", "unseen_concepts", "retrieval"
"""The evaluation sets of results: test sets, concepts that training never shows, and the caption of each image."""

FINGERPRINT = "8aad55b4c9c38d75e168469b1891012ee49bc9683342325b5e3d66e2e7ffdfce"
"""Of the training shards of `compt data icons`: with others, no result can be compared."""

Record = dict[str, Any]
Cost = Literal["macs", "seconds"]
COSTS: tuple[Cost, ...] = ("macs", "seconds")
ByLength = tuple[NDArray[np.float64], list[int], list[NDArray[np.float64]]]


@dataclass(frozen=True)
class Saving:
    """How many times as much training alone costs, with a 95 % interval over concepts, and for each seed."""

    ratio: float
    low: float
    high: float
    by_seed: list[float]


class Study:
    """The finished pieces, and what follows from them."""

    def __init__(self, raw: Path = RAW) -> None:
        self.all, self.rates = read_raw(raw)
        self.by_name = {item["piece"]: item for item in self.all}
        self.labels = load_arrays(raw / SETS) if self.all else {}
        self.speeds = read_speeds(raw.parent / SPEEDS.name)
        jobs = [raw.parent / CALIBRATED / "jobs" / f"{at}-{model}" for at, model in enumerate(MEMBERS, 1)]
        jobs = [job for job in jobs if (job / MANIFEST).exists()]
        self.calibrated = [read_manifest(job) for job in jobs]
        self.calibrated_answers = {job.name: load_arrays(job / "scores" / f"{REPORT}.npz")["correct"] for job in jobs}

    def find(self, pieces: Iterable[Piece]) -> list[Record]:
        """The records of those that are finished."""
        return [self.by_name[piece.name] for piece in pieces if piece.name in self.by_name]

    def baselines(self, model: str, epochs: float | None = None, shards: int = ALL) -> list[Record]:
        """The model from scratch at its own rate of each length, by length and seed."""
        wanted = {"model": model, "teacher": None, "shards": shards, "schedule": COSINE}
        return [
            item
            for item in self.all
            if all(item[key] == value for key, value in wanted.items())
            and epochs in (None, item["epochs"])
            and item["lr"] == self.rates.baseline(model, item["epochs"], shards=shards).lr
        ]

    def links(self) -> list[list[Record]]:
        """Links, those that differ only by their seed together; the seeds of AGAIN are never pooled with others."""
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for item in self.all:
            if item["teacher"]:
                key = (
                    item["model"],
                    item["epochs"],
                    item["lr"],
                    item["warmup"],
                    item["alpha"],
                    item["expanded"],
                    item["width"],
                    item["shards"],
                    item["schedule"],
                    seedless(item["teacher"]),
                    apart(item),
                )
                groups.setdefault(key, []).append(item)
        return list(groups.values())

    def accuracy(self, items: Iterable[Record], name: str) -> float | None:
        """Mean top-1 in percent; of retrieval, from image to text."""
        found = [item["scores"][name]["image_to_text_r1" if name == RETRIEVAL else "top1"] for item in items]
        return float(np.mean(found)) if found else None

    def seconds(self, item: Record) -> float | None:
        """Seconds of its training on an idle core: steps x measured seconds of a step; None before speeds are there."""
        teacher = item["teacher"].partition("-")[0] if item["teacher"] and item["alpha"] else None
        step = self.speeds.get((item["model"], teacher))
        return None if step is None else item["steps"] * step

    def compare(self, own: list[Record], others: list[Record], name: str = REPORT) -> Difference | None:
        """own - others over the seeds that both have; None without one."""
        by_seed = {item["seed"]: item for item in others}
        pairs = [
            (item["correct"][name], by_seed[item["seed"]]["correct"][name]) for item in own if item["seed"] in by_seed
        ]
        if not pairs:
            return None
        return difference([one for one, _ in pairs], [other for _, other in pairs], self.labels[name])

    def equal(self, items: Sequence[Record]) -> Length | None:
        """The length at which a baseline of the model is as accurate on the test sets.

        More seeds have fewer lengths: the most seeds with lengths below and above count.
        """
        for count in range(len(items), 0, -1):
            seeds = {item["seed"] for item in items[:count]}
            own, lengths, means = self._by_length(items, seeds)
            found = equal_length(own, lengths, means, self.labels[REPORT], count) if len(lengths) > 1 else None
            if found:
                return found
        return None

    def _by_length(self, items: Iterable[Record], seeds: AbstractSet[int]) -> ByLength:
        """By image, the shares of `seeds` that are right: of `items`, and of the baselines that have all of them."""

        def mean(found: Iterable[Record]) -> NDArray[np.float64]:
            rows = np.array([item["correct"][REPORT] for item in found if item["seed"] in seeds], dtype=np.float64)
            return np.asarray(rows.mean(axis=0))

        items = list(items)
        one = items[0]
        by_length = {epochs: self.baselines(one["model"], epochs, one["shards"]) for epochs in LENGTHS}
        found = {epochs: seeds & {item["seed"] for item in found} for epochs, found in by_length.items()}
        lengths = [epochs for epochs, known in found.items() if known == seeds]
        return mean(items), lengths, [mean(by_length[epochs]) for epochs in lengths]

    def comparable(self, chain: Sequence[Sequence[Record]]) -> set[int]:
        """The first seeds that have all members, and for each link baselines of the same two lengths at least."""
        if not all(chain):
            return set()
        links = [items for items in chain if items[0]["teacher"]]
        seeds = sorted(set.intersection(*({item["seed"] for item in items} for items in chain)))
        while seeds and any(len(self._by_length(items, set(seeds))[1]) < 2 for items in links):
            seeds.pop()
        return set(seeds)

    def saving(self, chain: Sequence[Sequence[Record]], kind: Cost, last: bool = False) -> Saving | None:
        """What all members of a chain cost alone, each until it is as accurate as in the chain, over the chain's cost.

        With `last`, only what the last member costs alone, over the whole chain. A member that is below its shortest
        baseline counts nothing, and one above its longest counts as that. Between lengths, accuracy is taken as linear
        in their logarithm; it is concave, so a baseline seems to need slightly more epochs than it does. None without a
        seed to compare (`comparable`), or if a cost is not known.
        """
        seeds = self.comparable(chain)
        costs = (
            cost
            for items in chain
            for cost in (
                self.cost(items[0], kind),
                self.cost_of_epochs(items[0]["model"], 1, kind, items[0]["shards"]),
            )
        )
        if not seeds or None in costs:
            return None
        draws = self._saving(chain, seeds, kind, last)
        by_seed = [float(self._saving(chain, {seed}, kind, last)[0]) for seed in sorted(seeds)]
        return Saving(float(draws[0]), *interval_of(draws[1:]), by_seed)

    def _saving(
        self, chain: Sequence[Sequence[Record]], seeds: AbstractSet[int], kind: Cost, last: bool
    ) -> NDArray[np.float64]:
        paid, alone = 0.0, np.zeros(1 + DRAWS)
        for items in chain:
            cost = self.cost(items[0], kind) or 0.0
            paid += cost
            if last and items is not chain[-1]:
                continue
            if items[0]["teacher"] is None:
                alone = alone + cost  # It is a baseline itself.
            else:
                own, lengths, means = self._by_length(items, seeds)
                if not lengths:
                    continue
                epochs = np.minimum(equal_lengths(own, lengths, means, self.labels[REPORT]), lengths[-1])
                one = self.cost_of_epochs(items[0]["model"], 1, kind, items[0]["shards"])
                alone = alone + (one or 0.0) * epochs
        return alone / paid

    def cost(self, item: Record, kind: Cost) -> float | None:
        """MACs or seconds of a training. Seeds cost the same."""
        return self.seconds(item) if kind == "seconds" else float(item["macs"])

    def cost_of_epochs(self, model: str, epochs: float, kind: Cost, shards: int = ALL) -> float | None:
        """The cost of a baseline of this length, from one that was measured."""
        found = self.baselines(model, shards=shards)
        cost = self.cost(found[0], kind) if found else None
        return None if cost is None else cost / found[0]["epochs"] * epochs


def seedless(name: str) -> str:
    return re.sub(r"-s\d+", "", name)


def apart(item: Record) -> bool:
    """Whether its seed is one of those that are judged alone."""
    return item["seed"] in AGAIN.seeds


def first_epochs(item: Record) -> float:
    """The epochs of the first model of the chain that it ends."""
    first = str(item["teacher"] or item["piece"]).rpartition("-from-")[2]
    return float(first.split("-")[1].removeprefix("e"))


def interval(found: Difference | None) -> str:
    """A difference in points with its interval."""
    return "-" if found is None else f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def span(found: Length | None) -> str:
    """A length in epochs with its interval."""
    if found is None:
        return "-"
    low, high = ("?" if one is None else f"{one:.0f}" for one in (found.low, found.high))
    return f"{found.epochs:.0f} [{low}, {high}], {found.seeds} seed{'s' * (found.seeds > 1)}"


def times(cost: float | None, other: float | None) -> str:
    """How many times `other` the first cost is."""
    return "-" if cost is None or other is None else f"{cost / other:.2f}"


def minutes(seconds: float | None) -> str:
    """Seconds as minutes."""
    return "-" if seconds is None else f"{seconds / 60:.1f}"


def mean_r(items: Iterable[Record]) -> float | None:
    """The mean of r = IFD / task over seeds, of means over the training."""
    found = [item["r"] for item in items if item["r"] is not None]
    return float(np.mean(found)) if found else None
