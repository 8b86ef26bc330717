"""Tables and figures of the evidence study, from its raw results alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common import COLOUR, SERIES, number, svg
from benchmarks.evidence.claims import claims
from benchmarks.evidence.family import (
    EQUAL,
    calibrated_table,
    common,
    draw_family,
    draw_lengths_of_links,
    draw_savings,
    family_tables,
    savings_of_chains,
    search_table,
)
from benchmarks.evidence.pieces import AGAIN, ALL, CHAINS, COSINE, IMAGES, LENGTHS, MEMBERS, OPERATORS, SELECT, SMALL
from benchmarks.evidence.run import RAW
from benchmarks.evidence.statistics import MARGIN
from benchmarks.evidence.study import (
    REPORT,
    UNSEEN,
    Record,
    Study,
    apart,
    first_epochs,
    interval,
    mean_r,
    minutes,
    seedless,
    span,
    times,
)
from compt.files import write_text
from compt.text import TextTable

OUT = RAW.parent
FEW = 10
"""So many pieces of one machine are named one by one."""


def baseline_table(study: Study) -> TextTable:
    """Accuracy of each model by rate and length, on all images and on parts of them."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for item in study.all:
        if item["teacher"] is None:
            key = (-item["shards"], item["model"], -item["lr"], item["schedule"], item["epochs"], apart(item))
            groups.setdefault(key, []).append(item)
    rows = []
    for (_, model, _, schedule, epochs, _), items in sorted(groups.items()):
        rows.append(
            [
                f"{IMAGES[items[0]['shards']]:,}",
                model,
                f"{items[0]['lr']:g}",
                schedule,
                f"{epochs:g}",
                _seeds(items),
                *(number(study.accuracy(items, name), 2) for name in (SELECT, REPORT, UNSEEN)),
                f"{items[0]['macs'] / 1e12:.2f}",
                minutes(study.seconds(items[0])),
            ]
        )
    header = [
        "images",
        "model",
        "lr",
        "schedule",
        "epochs",
        "seeds",
        "validation sets",
        "test sets",
        "unseen concepts",
        "MACs, T",
    ]
    header += ["minutes (steps x measured seconds)"]
    return TextTable(title="From scratch: zero-shot top-1, %", header=header, rows=rows)


def link_table(study: Study) -> TextTable:
    """Each link against its model's baseline, on the test sets."""
    rows = []
    for items in study.links():
        one = items[0]
        items, baseline = common(items, study.baselines(one["model"], first_epochs(one), one["shards"]))
        found = study.compare(items, baseline)
        equal = study.equal(items)
        unseen = study.compare(items, baseline, UNSEEN)
        verdict = "-" if found is None else found.verdict
        rows.append(
            [
                f"{seedless(one['teacher'])} → {one['model']}" + _start(one),
                f"{one['epochs']:g}",
                f"{one['lr']:g}",
                str(one["warmup"]),
                f"{one['alpha']:g}",
                number(mean_r(items), 3),
                _seeds(items),
                number(study.accuracy(items, REPORT), 2),
                f"{baseline[0]['epochs']:g}" if baseline else "-",
                interval(found),
                verdict,
                interval(unseen),
                times(baseline[0]["macs"], one["macs"]) if baseline else "-",
                times(study.seconds(baseline[0]), study.seconds(one)) if baseline else "-",
                span(equal),
                "-"
                if equal is None
                else times(study.cost_of_epochs(one["model"], equal.epochs, "macs", one["shards"]), one["macs"]),
            ]
        )
    header = ["link", "epochs", "lr", "warm-up", "alpha", "r", "seeds", "top-1, %", "baseline's epochs"]
    header += ["points against it [95 %]", f"margin {MARGIN:g}", "unseen concepts [95 %]", "MACs x"]
    header += ["device time x (steps x measured seconds)", "epochs of equal accuracy [95 %]", "MACs x there"]
    verdicts = sum(row[header.index(f"margin {MARGIN:g}")] in ("lossless", "not lossless", "undecided") for row in rows)
    notes = [
        f"{verdicts} verdicts at 95 % each, without a correction for their number.",
        EQUAL,
    ]
    return TextTable(title="Links on the test sets", header=header, rows=rows, notes=notes)


def _seeds(items: Sequence[Record]) -> str:
    """Their number; of those that are judged alone, their names too."""
    names = ", ".join(str(item["seed"]) for item in items)
    return f"{len(items)} ({names})" if apart(items[0]) else str(len(items))


def _start(link: Record) -> str:
    """What else than its teacher and its numbers sets it apart."""
    words = [] if link["expanded"] else ["random start"]
    words += [] if link["width"] == OPERATORS[0] else [link["width"]]
    words += [] if link["schedule"] == COSINE else [f"{link['schedule']} schedule"]
    words += [] if link["shards"] == ALL else [f"{IMAGES[link['shards']]:,} images"]
    return f" ({', '.join(words)})" if words else ""


def _curves(study: Study, axis: Axes) -> None:
    for colour, model in zip(SERIES, MEMBERS, strict=False):
        lengths = [epochs for epochs in LENGTHS if study.baselines(model, epochs)]
        if lengths:
            values = [study.accuracy(study.baselines(model, epochs), REPORT) or 0.0 for epochs in lengths]
            axis.plot(lengths, values, "o-", color=colour, label=f"{model}, from scratch")
    axis.set_xscale("log")
    axis.set_xticks(LENGTHS, [f"{epochs:g}" for epochs in LENGTHS])
    axis.set(xlabel="epochs of a complete schedule", ylabel="top-1 on the test sets, %")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    axis.axhline(100 / 1018, color=COLOUR["muted"], linewidth=0.8)


def provenance(study: Study) -> list[str]:
    """What trained the pieces, and when: a line for each processor and version."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for item in study.all:
        groups.setdefault((item["machine"]["device"], item["machine"]["torch"]), []).append(item)
    lines = []
    for (device, version), items in groups.items():
        dates = sorted(item["finished"][:10] for item in items)
        which = "" if len(items) > FEW else f" ({', '.join(item['piece'] for item in items)})"
        lines.append(f"- {len(items)} pieces{which} on {device}, torch {version}, from {dates[0]} to {dates[-1]}")
    return lines


def files(study: Study) -> dict[str, str]:
    """What the report consists of: text by file name."""
    judged = claims(study)
    intervals = sum(claim.sentence.count(" [") for claim in judged)
    figures = {"family": draw_family, "lengths": _curves, "links": draw_lengths_of_links, "savings": draw_savings}
    page = [
        "# Measured",
        "Written by `python -m benchmarks.evidence report`.",
        "\n".join(provenance(study)),
        *_shown(savings_of_chains(study)),
        "## Claims",
        "\n".join(f"- {claim.sentence}" for claim in judged),
        f"{intervals} intervals at 95 % each, without a correction for their number.",
        "## The family",
        "![Accuracy against the MACs of training: each model alone, and chains](family.svg)",
        *_shown(*(table for design in (*CHAINS, *SMALL, AGAIN) for table in family_tables(study, design))),
        *_shown(calibrated_table(study), search_table(study)),
        "![Savings at equal accuracy by length of training](savings.svg)",
        "![Difference to the baseline by length of the link](links.svg)",
        "## Baselines and links",
        *_shown(baseline_table(study), link_table(study)),
        "![Accuracy by length](lengths.svg)",
        "## What the claims compare",
        *_shown(*(claim.table for claim in judged)),
    ]
    return {
        "tables.md": "\n\n".join(page) + "\n",
        **{f"{name}.svg": svg(functools.partial(draw, study)) for name, draw in figures.items()},
    }


def _shown(*tables: TextTable) -> list[str]:
    return [table.markdown().strip() for table in tables if table.rows]


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
