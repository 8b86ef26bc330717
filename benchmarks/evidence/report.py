"""Tables and figures of the evidence study, from its raw results alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.common import COLOUR, SERIES, number, svg
from benchmarks.evidence.pieces import BASELINE_LR, LENGTHS, MEMBERS, SEEDS, SELECT
from benchmarks.evidence.run import RAW, SETS, own_rates, read_raw
from benchmarks.evidence.statistics import MARGIN, Difference, difference
from compt.evaluate.encoder import load_arrays
from compt.files import write_text
from compt.text import TextTable

OUT = RAW.parent
REPORT, UNSEEN = "test_style", "unseen_concepts"

FINGERPRINT = "8aad55b4c9c38d75e168469b1891012ee49bc9683342325b5e3d66e2e7ffdfce"
"""Of the training shards of `compt data icons`: with others, no result can be compared."""

PLATEAU = 1.0
"""Points. A baseline is on its plateau if twice its length gains less, on the validation sets."""

Record = dict[str, Any]


class Study:
    """The finished pieces, and what follows from them."""

    def __init__(self, raw: Path = RAW) -> None:
        self.all = read_raw(raw)
        self.labels = load_arrays(raw / SETS)
        self.rates = {**dict.fromkeys(MEMBERS, BASELINE_LR), **own_rates(raw)}

    def baselines(self, model: str, epochs: float | None = None) -> list[Record]:
        """The model from scratch at its own rate, by length and seed."""
        return [
            item
            for item in self.all
            if (item["model"], item["teacher"], item["lr"]) == (model, None, self.rates.get(model))
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
                    _seedless(item["teacher"]),
                )
                groups.setdefault(key, []).append(item)
        return list(groups.values())

    def accuracy(self, items: Iterable[Record], name: str) -> float | None:
        """Mean top-1 in percent."""
        found = [item["scores"][name]["top1"] for item in items]
        return float(np.mean(found)) if found else None

    def plateau(self, model: str) -> float | None:
        """The shortest length after which doubling gains less than PLATEAU points; None if it is not known yet."""
        for short, long in itertools.pairwise(LENGTHS):
            ends = [self.accuracy(self.baselines(model, epochs), SELECT) for epochs in (short, long)]
            if ends[0] is not None and ends[1] is not None and ends[1] - ends[0] < PLATEAU:
                return short
        return None

    def compare(self, own: list[Record], others: list[Record], name: str = REPORT) -> Difference | None:
        """own - others over the seeds that both have; None without one."""
        by_seed = {item["seed"]: item for item in others}
        pairs = [
            (item["correct"][name], by_seed[item["seed"]]["correct"][name]) for item in own if item["seed"] in by_seed
        ]
        if not pairs:
            return None
        return difference([one for one, _ in pairs], [other for _, other in pairs], self.labels[name])

    def as_good(self, items: list[Record]) -> Record | None:
        """The shortest baseline of the same model that is at least as accurate on the validation sets.

        None where no baseline is, or where the next shorter one was not measured: it may be as good too. Lengths go in
        factors of two, so a baseline of a length between them may be as good, at up to half the cost.
        """
        wanted = self.accuracy(items, SELECT) or 0.0
        for epochs in LENGTHS:
            found = self.baselines(items[0]["model"], epochs)
            if not found:
                return None
            if (self.accuracy(found, SELECT) or 0.0) >= wanted:
                return found[0]
        return None


def _seedless(name: str) -> str:
    for seed in SEEDS:
        name = name.replace(f"-s{seed}", "")
    return name


def baseline_table(study: Study) -> TextTable:
    """Accuracy of each model by length."""
    rows = []
    for model in MEMBERS:
        for epochs in LENGTHS:
            if items := study.baselines(model, epochs):
                scores = [number(study.accuracy(items, name), 2) for name in (SELECT, REPORT, UNSEEN)]
                minutes = 60 * float(np.mean([item["device_hours"] for item in items]))
                plateau = " (plateau)" if study.plateau(model) == epochs else ""
                macs = f"{items[0]['macs'] / 1e12:.2f}"
                rows.append(
                    [
                        model,
                        f"{study.rates[model]:g}",
                        f"{epochs:g}{plateau}",
                        str(len(items)),
                        *scores,
                        macs,
                        f"{minutes:.1f}",
                    ]
                )
    header = ["model", "lr", "epochs", "seeds", "validation sets", "test sets", "unseen concepts", "MACs, T", "minutes"]
    return TextTable(title="From scratch: zero-shot top-1, %", header=header, rows=rows)


def link_table(study: Study) -> TextTable:
    """Each link against its model's baseline, on the test sets."""
    rows = []
    for items in study.links():
        one = items[0]
        plateau = study.plateau(one["model"])
        epochs = plateau or max((item["epochs"] for item in study.baselines(one["model"])), default=0)
        baseline = study.baselines(one["model"], epochs)
        found = study.compare(items, baseline)
        short = study.as_good(items)
        unseen = study.compare(items, baseline, UNSEEN)
        verdict = "-" if found is None else found.verdict if plateau else "no plateau yet"
        times = [float(np.mean([item["device_hours"] for item in group])) for group in (baseline, items) if group]
        rows.append(
            [
                f"{_seedless(one['teacher'])} → {one['model']}",
                f"{one['epochs']:g}",
                f"{one['lr']:g}",
                str(one["warmup"]),
                f"{one['alpha']:g}",
                str(len(items)),
                number(study.accuracy(items, REPORT), 2),
                f"{epochs:g}",
                _interval(found),
                verdict,
                _interval(unseen),
                f"{baseline[0]['macs'] / one['macs']:.2f}" if baseline else "-",
                f"{times[0] / times[1]:.2f}" if baseline else "-",
                "-" if short is None else f"{short['macs'] / one['macs']:.2f} ({short['epochs']:g} epochs)",
            ]
        )
    header = ["link", "epochs", "lr", "warm-up", "alpha", "seeds", "top-1, %", "baseline's epochs"]
    header += ["points against it [95 %]", f"margin {MARGIN:g}", "unseen concepts [95 %]", "MACs x", "device time x"]
    header += ["MACs x, shortest as good"]
    verdicts = sum(row[header.index(f"margin {MARGIN:g}")] in ("lossless", "not lossless", "undecided") for row in rows)
    notes = [
        f"{verdicts} verdicts at 95 % each, without a correction for their number.",
        (
            "Shortest as good: the shortest baseline that is at least as accurate on the validation sets. Lengths go "
            "in factors of two, so up to half of it may do."
        ),
    ]
    return TextTable(title="Links on the test sets", header=header, rows=rows, notes=notes)


def _interval(found: Difference | None) -> str:
    return "-" if found is None else f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _curves(study: Study, axis: Axes) -> None:
    for colour, model in zip(SERIES, MEMBERS, strict=False):
        lengths = [epochs for epochs in LENGTHS if study.baselines(model, epochs)]
        if lengths:
            values = [study.accuracy(study.baselines(model, epochs), REPORT) or 0.0 for epochs in lengths]
            axis.plot(lengths, values, "o-", color=colour, label=f"{model}, from scratch")
        chosen = [items for items in study.links() if items[0]["model"] == model]
        if chosen:
            values = [study.accuracy(items, REPORT) or 0.0 for items in chosen]
            axis.plot([items[0]["epochs"] for items in chosen], values, "x", color=colour, label=f"{model}, as a link")
    axis.set_xscale("log")
    axis.set_xticks(LENGTHS, [f"{epochs:g}" for epochs in LENGTHS])
    axis.set(xlabel="epochs of a complete schedule", ylabel="top-1 on the test sets, %")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    axis.axhline(100 / 1018, color=COLOUR["muted"], linewidth=0.8)


def files(study: Study) -> dict[str, str]:
    """What the report consists of: text by file name."""
    draw: Callable[[Axes], None] = lambda axis: _curves(study, axis)  # noqa: E731
    tables = [table.markdown().strip() for table in (baseline_table(study), link_table(study)) if table.rows]
    page = "\n\n".join(
        [
            "# Measured",
            "Written by `python -m benchmarks.evidence report`.",
            *tables,
            "![Accuracy by length](lengths.svg)",
        ]
    )
    return {"tables.md": page + "\n", "lengths.svg": svg("lengths", draw)}


def write_report(out: Path = OUT, raw: Path = RAW) -> None:
    """Write tables and figures to `out`."""
    for name, text in files(Study(raw)).items():
        write_text(out / name, text)


def changed(out: Path = OUT, raw: Path = RAW) -> list[str]:
    """The files of `out` that differ from what the raw results give."""
    return [
        name
        for name, text in files(Study(raw)).items()
        if not (out / name).exists() or (out / name).read_text(encoding="utf-8") != text
    ]
