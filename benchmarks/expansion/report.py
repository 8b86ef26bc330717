"""Tables and plots of the study of expansion, from its results alone."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.common import COLOUR, SERIES, svg
from benchmarks.expansion.settings import IFD_ONLY, IWI_ONLY, SCRATCH
from compt.errors import RunError
from compt.files import write_text
from compt.text import TextTable

Record = dict[str, Any]

README, RESULTS = "README.md", "results.json"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
"""The report replaces the text between these marks. The rest of the page is written by hand."""

TOLD_APART = 2.5
"""Standard errors of a mean difference: Student's t is 2.4 for 95 % at the seven degrees of freedom of eight operators
and two seeds.
"""

PUBLISHED = (
    ("scratch", "from scratch, 24 epochs", 26.48),
    ("iwi_only", "+ IWI (Table 4b)", 28.03),
    ("ifd_only", "+ IFD", 29.29),
    ("insert", "+ IFD + IWI", 30.24),
    ("net2net", "+ IFD + Net2Net", 30.07),
    ("netexpand", "+ IFD + NetExpand", 30.36),
)
"""CoM-PT (arXiv 2604.12391), Tables H and 4b: ViT-T/16 to ViT-S/16 on CC3M, zero-shot top-1 on ImageNet."""

CONTROLS = {
    SCRATCH.name: "from scratch",
    IFD_ONLY.name: "from scratch + IFD",
    IWI_ONLY.name: "insert, without IFD",
}
NAMES = {**CONTROLS, "net2net_duplicate_zero": "duplicate, zero outputs, width net2net"}


def read_results(folder: Path) -> Record:
    """Read the results that `collect` wrote. Raises RunError if they are missing or damaged."""
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not {"pairs", "variants", "compared"} <= results.keys():
            raise ValueError("it lacks pairs, variants or compared")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} cannot be read: {error}; `python -m benchmarks.expansion collect` writes it") from None
    return dict(results)


def label(variant: str) -> str:
    """The name of a variant in tables and plots."""
    plain = variant.removesuffix("_zero")
    return NAMES.get(variant) or (plain if plain == variant else f"{plain}, zero outputs")


@dataclass(frozen=True)
class Row:
    """A variant over its seeds; numbers a seed each, in the order of `seeds`. Losses in nats, accuracies in percent."""

    variant: str
    seeds: tuple[int, ...]
    loss_0: tuple[float, ...]
    select_0: tuple[float, ...]
    early: tuple[float, ...]
    loss: tuple[float, ...]
    select: tuple[float, ...]
    report: tuple[float, ...]


def rows(results: Record, pair: Record) -> list[Row]:
    """The variants of a pair that at least one seed has finished, in the order of the study."""
    found = []
    for variant in pair["variants"]:
        records = [item for item in results["variants"] if (item["pair"], item["variant"]) == (pair["name"], variant)]
        if not records:
            continue
        records.sort(key=lambda item: int(item["seed"]))
        select, report = results["select"], results["report"]
        at = early_index(records[0]["curve"]["epoch"])
        found.append(
            Row(
                variant,
                tuple(item["seed"] for item in records),
                _numbers(item["step_0"]["validation_loss"] for item in records),
                _numbers(item["step_0"][select] for item in records),
                _numbers(item["curve"][select][at] for item in records),
                _numbers(item["end"]["validation_loss"] for item in records),
                _numbers(item["end"][select] for item in records),
                _numbers(item["end"][report] for item in records),
            )
        )
    return found


def _numbers(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)


def early_index(epochs: Sequence[float]) -> int:
    """Which point of a curve lies nearest to the end of the first epoch."""
    return min(range(len(epochs)), key=lambda at: abs(epochs[at] - 1))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and half the distance between the highest and the lowest seed."""
    if not values:
        return "-"
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def operators(results: Record, pair: Record, name: str) -> list[Record]:
    """The comparisons of a pair on a set in which operators alone differ."""
    return [
        item
        for item in results["compared"]
        if (item["pair"], item["set"]) == (pair["name"], name) and item["variant"] not in CONTROLS
    ]


def scatter(results: Record, pair: Record, name: str) -> float | None:
    """The standard deviation from seed to seed of a difference to the reference, in points, pooled over operators."""
    several = [item["by_seed"] for item in operators(results, pair, name) if len(item["by_seed"]) > 1]
    return math.sqrt(np.mean([np.var(by_seed, ddof=1) for by_seed in several])) if several else None


def judge(item: Record, deviation: float | None) -> str:
    """Whether a difference is more than chance, both over seeds and over images."""
    if deviation is None or len(item["by_seed"]) < 2:
        return "one seed"
    error = deviation / math.sqrt(len(item["by_seed"]))
    if abs(item["difference"]) <= TOLD_APART * error or item["low"] <= 0 <= item["high"]:
        return "not told apart"
    return "better" if item["difference"] > 0 else "worse"


def table(results: Record, pair: Record) -> TextTable:
    """A row for each variant: at step 0, after about an epoch, at the end, and against the reference."""
    select, report = results["select"], results["report"]
    found = rows(results, pair)
    compared = {
        item["variant"]: item for item in results["compared"] if (item["pair"], item["set"]) == (pair["name"], report)
    }
    deviation = scatter(results, pair, report)
    curve = next(item["curve"] for item in results["variants"] if item["pair"] == pair["name"])
    length = f"{curve['epoch'][-1]:.2g}"
    lines = []
    for row in found:
        item = compared.get(row.variant)
        against = "-" if item is None else f"{item['difference']:+.1f} ({item['low']:+.1f} to {item['high']:+.1f})"
        lines.append(
            (
                label(row.variant),
                spread(row.loss_0, 2),
                spread(row.select_0),
                spread(row.early),
                spread(row.loss, 2),
                spread(row.select),
                *((spread(row.report),) if report != select else ()),
                against,
                "-" if item is None else judge(item, deviation),
            )
        )
    return TextTable(
        title=f"{pair['name'].capitalize()}: {size(pair['teacher'])} to {size(pair['student'])}, {length} epochs",
        header=(
            "",
            "Step 0: loss",
            f"Step 0: {select}",
            f"{curve['epoch'][early_index(curve['epoch'])]:.2g} epochs: {select}",
            "End: loss",
            f"End: {select}",
            *((f"End: {report}",) if report != select else ()),
            f"Minus {label(pair['reference'])} (95 %)",
            "",
        ),
        rows=lines,
        notes=(
            rates(results, pair),
            (
                "Loss: contrastive, on held-out pairs, in nats. Accuracies: zero-shot top-1 in percent. Mean over "
                f"seeds ± half their distance. Differences are in points of {report}; their intervals are over its "
                "images."
            ),
        ),
    )


def rates(results: Record, pair: Record) -> str:
    """At which learning rate the students were trained."""
    by_rate: dict[float, dict[str, None]] = {}
    for item in results["variants"]:
        if item["pair"] == pair["name"]:
            by_rate.setdefault(item["lr"], {})[label(item["variant"])] = None
    usual = max(by_rate, key=lambda rate: len(by_rate[rate]))
    others = "".join(f"; {rate:g} {' and '.join(names)}" for rate, names in by_rate.items() if rate != usual)
    return f"Learning rate: {usual:g}{others}."


def size(model: Record) -> str:
    """A preset and what is changed in it: "vit_mini (depth 8, text_depth 4)"."""
    changed = ", ".join(f"{key} {value}" for key, value in model.items() if key != "preset")
    return f"{model['preset']} ({changed})" if changed else str(model["preset"])


def findings(results: Record, pair: Record) -> list[str]:
    """What the numbers of a pair show, in sentences; [] where nothing is finished."""
    found = rows(results, pair)
    reference = next((row for row in found if row.variant == pair["reference"]), None)
    if reference is None:
        return []
    report, name = results["report"], label(pair["reference"])
    ours = sorted((row for row in found if row.variant not in CONTROLS), key=lambda row: -_mean(row.select_0))
    starts = "; ".join(f"{label(row.variant)} {_mean(row.select_0):.1f}" for row in ours)
    teachers = [item[results["select"]] for item in results["teachers"] if item["model"] == pair["teacher"]["preset"]]
    teacher = f" The teacher has {_mean(teachers):.1f} %." if teachers else ""
    texts = [f"Accuracy at step 0 ({results['select']}, %): {starts}.{teacher}"]
    deviation = scatter(results, pair, report)
    if deviation is None:
        return [*texts, "One seed has been trained: what differs at the end may be chance."]
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for item in operators(results, pair, report):
        if (verdict := judge(item, deviation)) in verdicts:
            verdicts[verdict].append(f"{label(item['variant'])} ({item['difference']:+.1f})")
    listed = ". ".join(f"{key.capitalize()}: {'; '.join(names) or 'none'}" for key, names in verdicts.items())
    least = TOLD_APART * deviation / math.sqrt(len(reference.seeds))
    return [
        *texts,
        f"At the end, against {name} ({report}, points). {listed}.",
        (
            f"From seed to seed such a difference varies by {deviation:.1f} points (standard deviation, pooled over "
            f"operators), so that means closer than {least:.1f} points are not told apart; for many comparisons at "
            "once nothing is corrected."
        ),
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def table_h(results: Record) -> TextTable | None:
    """The paper's Table H beside the same variants here; None where none of them is finished."""
    pair = next((item for item in results["pairs"] if item["name"] == "width"), None)
    found = {row.variant: row for row in rows(results, pair)} if pair else {}
    if not found.keys() & {name for name, _, _ in PUBLISHED}:
        return None
    return TextTable(
        title="As the paper's Table H",
        header=("", "Paper, CC3M, ImageNet", f"Here, {results['report']}"),
        rows=[
            (text, f"{value:.2f}", spread(found[name].report) if name in found else "-")
            for name, text, value in PUBLISHED
        ],
        notes=(
            (
                "Paper: arXiv 2604.12391, Tables H and 4b, ViT-T/16 to ViT-S/16, 24 epochs. IWI is width insert. Its "
                "NetExpand is that method as published; width netexpand is our reading of it."
            ),
        ),
    )


def page(results: Record) -> str:
    """The measured part of the page."""
    machines = "; ".join(
        f"{item['device']}, {item['threads']} threads, torch {item['torch']}" for item in results["machines"]
    )
    trained = ", ".join(
        f"{item['model']} (seed {item['seed']}, {item['epochs']:g} epochs)" for item in results["teachers"]
    )
    parts = [
        f"`{results['command']}`, finished {results['finished']}, {60 * results['device_hours']:.0f} minutes of "
        f"training; seeds {', '.join(map(str, results['seeds']))}; {machines}."
        + (f" Teachers: {trained}." if trained else ""),
    ]
    for pair in results["pairs"]:
        if not rows(results, pair):
            continue
        parts.append(table(results, pair).markdown().strip())
        parts += findings(results, pair)
        parts += [f"![{pair['name']}: {what}]({pair['name']}_{what}.svg)" for what in ("accuracy", "loss")]
    if (published := table_h(results)) is not None:
        parts.append(published.markdown().strip())
    if results["missing"]:
        count = len(results["missing"])
        parts.append(f"Not finished: {count} training{'s' * (count > 1)}, the next of them {results['missing'][0]}.")
    return "\n\n".join(parts)


def plots(results: Record) -> dict[str, Callable[[Axes], None]]:
    """Accuracy and loss over training of each pair, by the name of the file."""
    kinds = {"accuracy": results["select"], "loss": "validation_loss"}
    return {
        f"{pair['name']}_{what}": functools.partial(_draw, results, pair, key)
        for pair in results["pairs"]
        if rows(results, pair)
        for what, key in kinds.items()
    }


def _draw(results: Record, pair: Record, key: str, axis: Axes) -> None:
    accuracy = key != "validation_loss"
    plain = [name for name in pair["variants"] if name not in CONTROLS and not name.endswith("_zero")]
    palette = [*SERIES, COLOUR["ink"]]
    for row in rows(results, pair):
        curves = [
            item["curve"]
            for item in results["variants"]
            if (item["pair"], item["variant"]) == (pair["name"], row.variant)
        ]
        values = [_mean(_numbers(at)) for at in zip(*(curve[key] for curve in curves), strict=True)]
        base = row.variant.removesuffix("_zero")
        if row.variant in CONTROLS:
            colour, style = COLOUR["alone"], {SCRATCH.name: ":", IFD_ONLY.name: "-.", IWI_ONLY.name: "--"}[row.variant]
        elif base in plain:
            colour = palette[plain.index(base) % len(palette)]
            style = "-" if base == row.variant else "--"
        else:
            colour, style = COLOUR["ink"], "-"
        axis.plot(curves[0]["epoch"], values, style, color=colour, label=label(row.variant), linewidth=1.5)
    teachers = [item[key] for item in results["teachers"] if item["model"] == pair["teacher"]["preset"]]
    if _numbers(teachers):
        axis.axhline(_mean(_numbers(teachers)), color=COLOUR["muted"], linewidth=0.8, label="teacher")
    what = f"{results['select']}, top-1 (%)" if accuracy else "loss on held-out pairs (nats)"
    axis.set(xlabel="epochs", ylabel=what, title=f"{size(pair['teacher'])} to {size(pair['student'])}")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)


EMPTY = f"""# Expansion operators, compared by training

Each operator expands a student from the same trained teacher, and all students train alike, as in Figure B and Table H
of the paper. How to repeat it: [benchmarks](../../../benchmarks/README.md). All numbers: [results.json]({RESULTS}).

{BEGIN}
{END}

## What we recommend, and why
"""


def write_report(results: Record, folder: Path) -> Path:
    """Write the page and its plots into `folder`. Keeps the hand-written text. Raises RunError if a mark is missing."""
    path = folder / README
    text = path.read_text(encoding="utf-8") if path.exists() else EMPTY
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise RunError(f"{path} lacks the lines {BEGIN} and {END}, between which the numbers go")
    for name, draw in plots(results).items():
        write_text(folder / f"{name}.svg", svg(draw))
    write_text(path, f"{before}{BEGIN}\n{page(results)}\n{END}{after}")
    return path
