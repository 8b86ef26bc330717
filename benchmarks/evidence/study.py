"""The finished pieces of the evidence study, and what follows from them alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.evidence.pieces import ALL, LENGTHS, LR, MEMBERS, SEEDS, SELECT, Piece
from benchmarks.evidence.run import RAW, SETS, own_rates, read_raw
from benchmarks.evidence.speeds import SPEEDS, read_speeds
from benchmarks.evidence.statistics import Difference, Length, difference, equal_length
from compt.evaluate.encoder import load_arrays

REPORT, UNSEEN, RETRIEVAL = "test_style", "unseen_concepts", "retrieval"
"""The evaluation sets of results: test sets, concepts that training never shows, and the caption of each image."""

FINGERPRINT = "8aad55b4c9c38d75e168469b1891012ee49bc9683342325b5e3d66e2e7ffdfce"
"""Of the training shards of `compt data icons`: with others, no result can be compared."""

PLATEAU_GAIN = 1.0
"""Points. A baseline is on its plateau if twice its length gains less, on the validation sets."""

Record = dict[str, Any]
Kind = Literal["macs", "seconds"]
"""Of costs."""


class Study:
    """The finished pieces, and what follows from them."""

    def __init__(self, raw: Path = RAW) -> None:
        self.all = read_raw(raw)
        self.by_name = {item["piece"]: item for item in self.all}
        self.labels = load_arrays(raw / SETS) if self.all else {}
        self.rates = own_rates(raw)
        self.speeds = read_speeds(raw.parent / SPEEDS.name)

    def find(self, pieces: Iterable[Piece]) -> list[Record]:
        """The records of those that are finished."""
        return [self.by_name[piece.name] for piece in pieces if piece.name in self.by_name]

    def baselines(self, model: str, epochs: float | None = None, shards: int = ALL) -> list[Record]:
        """The model from scratch at its own rate, or at the first one on fewer shards, by length and seed."""
        lr = self.rates.baseline(model, 1).lr if shards == ALL else LR
        return [
            item
            for item in self.all
            if (item["model"], item["teacher"], item["lr"], item["shards"]) == (model, None, lr, shards)
            and epochs in (None, item["epochs"])
        ]

    def links(self) -> list[list[Record]]:
        """Links, those that differ only by their seed together."""
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
                    seedless(item["teacher"]),
                )
                groups.setdefault(key, []).append(item)
        return list(groups.values())

    def accuracy(self, items: Iterable[Record], name: str) -> float | None:
        """Mean top-1 in percent; of retrieval, from image to text."""
        found = [item["scores"][name]["image_to_text_r1" if name == RETRIEVAL else "top1"] for item in items]
        return float(np.mean(found)) if found else None

    def plateau(self, model: str) -> float | None:
        """The shortest length after which doubling gains less than PLATEAU_GAIN points; None if it is not known yet."""
        for short, long in itertools.pairwise(LENGTHS):
            ends = [self.accuracy(self.baselines(model, epochs), SELECT) for epochs in (short, long)]
            if ends[0] is not None and ends[1] is not None and ends[1] - ends[0] < PLATEAU_GAIN:
                return short
        return None

    def plateaus(self) -> dict[str, float | None]:
        """The plateau of each member of the family."""
        return {model: self.plateau(model) for model in MEMBERS}

    def reference(self, model: str, epochs: float) -> list[Record]:
        """The baselines on the model's plateau; before it is known, those of as many epochs as the chain's first."""
        return self.baselines(model, self.plateau(model) or epochs)

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
        """The length at which a baseline of the model is as accurate on the validation sets, over the common seeds."""
        if not items:
            return None
        by_length = {epochs: self.baselines(items[0]["model"], epochs) for epochs in LENGTHS}
        # More seeds have fewer lengths: the most seeds with lengths below and above count.
        for count in range(len(items), 0, -1):
            seeds = {item["seed"] for item in items[:count]}
            own, *others = (
                [item["correct"][SELECT] for item in found if item["seed"] in seeds]
                for found in (items, *by_length.values())
            )
            known = [(epochs, other) for epochs, other in zip(LENGTHS, others, strict=True) if len(other) == count]
            if len(known) > 1:
                means = [np.mean(other, axis=0) for _, other in known]
                lengths = [epochs for epochs, _ in known]
                found = equal_length(np.mean(own, axis=0), lengths, means, self.labels[SELECT])
                if found:
                    return replace(found, seeds=count)
        return None

    def cost(self, item: Record, kind: Kind) -> float | None:
        """MACs or seconds of a training. Seeds cost the same."""
        return self.seconds(item) if kind == "seconds" else float(item["macs"])

    def cost_of_epochs(self, model: str, epochs: float, kind: Kind) -> float | None:
        """The cost of a baseline of this length, from one that was measured."""
        found = self.baselines(model)
        cost = self.cost(found[0], kind) if found else None
        return None if cost is None else cost / found[0]["epochs"] * epochs


def seedless(name: str) -> str:
    for seed in SEEDS:
        name = name.replace(f"-s{seed}", "")
    return name


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
    return f"{found.epochs:.0f} [{low}, {high}]{f', {found.seeds} seeds' if found.seeds > 1 else ''}"


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
