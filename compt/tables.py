"""The same numbers as tables for a terminal (rich) and for Markdown and HTML (rows of text)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from compt.macs import Mode
from compt.planner import Plan
from compt.summary import CONTROLS, Comparison, NotCompared, Row, Summary, accumulated

_GAP = 2
"""Columns of a terminal between those of a tight table."""


@dataclass(frozen=True)
class TextTable:
    """A table as plain text: first column to the left, the others to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def rich(self) -> RenderableType:
        """For a terminal; notes stand below. Where words would have to be broken, each row becomes a block."""
        return _Fitting(self)

    def markdown(self) -> str:
        """As GitHub renders it."""
        lines = [f"### {escape_markdown(self.title)}", "", _markdown_row(self.header)]
        lines.append("|" + "|".join(":--" if not at else "--:" for at in range(len(self.header))) + "|")
        lines += [_markdown_row(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"{escape_markdown(note)}\n" for note in self.notes)])


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: on one line, no markup, no cell ends."""
    return (
        re.sub(r"([\\`*|~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
        .replace("&", "&amp;")
        .replace("<", "&lt;")
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"


def _width(cells: Iterable[str]) -> int:
    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)


@dataclass(frozen=True)
class _Fitting:
    """The widest form that the terminal has room for.

    A table; one with names on several lines; with numbers too, as in 1.41 P over (7.65x); one broken at any word; a
    block of lines for each row.
    """

    table: TextTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for at, name in enumerate(self.table.header):
            least = None if at else _width([name, *(row[0] for row in self.table.rows)])
            wide.add_column(name, justify="right" if at else "left", no_wrap=at == 0, min_width=least)
        for row in self.table.rows:
            wide.add_row(*map(Text, row))
        yield Text(self.table.title, style="bold")
        needed = Measurement.get(console, options.update(max_width=10_000), wide)
        tight = self._tight(options.max_width, fold=False) or self._tight(options.max_width, fold=True)
        if needed.maximum <= options.max_width:
            yield wide
        elif tight is not None:
            yield from (Text(""), tight, Text(""))
        elif needed.minimum <= options.max_width:
            yield wide
        else:
            yield from self._blocks()
        yield from (Text(note, style="dim") for note in self.table.notes)

    def _tight(self, width: int, fold: bool) -> Table | None:
        """Headers on several lines, with `fold` cells too; of the first two columns the wider one takes what is left.

        None where `width` is not enough.
        """
        table = self.table
        rows = [[re.sub(r" (?=[(\[+])", "\n", cell) if fold else cell for cell in row] for row in table.rows]
        header = []
        for at, name in enumerate(table.header):
            words = name.replace("/", "/ ").split()
            widest = max(map(cell_len, (*words, *(line for row in rows for line in row[at].split("\n")))), default=1)
            header.append("\n".join(textwrap.wrap(" ".join(words), max(1, widest))).replace("/ ", "/"))
        widths = [_width(column) for column in zip(header, *rows, strict=True)]
        names = max(range(min(2, len(widths))), key=lambda at: widths[at])
        room = width - sum(widths) + widths[names] - _GAP * (len(widths) - 1)
        for row, whole in zip(rows, table.rows, strict=True):
            row[names] = "\n".join(textwrap.wrap(whole[names], max(1, room), break_long_words=False))
        if _width([header[names], *(row[names] for row in rows)]) > room:
            return None
        tight = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, _GAP - 1, 0, 0), pad_edge=False)
        for at, name in enumerate(header):
            tight.add_column(name, justify="right" if at else "left", no_wrap=True)
        for row in rows:
            tight.add_row(*map(Text, row))
        return tight

    def _blocks(self) -> Iterator[RenderableType]:
        for row in self.table.rows:
            yield Text(f"\n{row[0]}", style="cyan")
            block = Table.grid(padding=(0, 2))
            block.add_column(no_wrap=True)
            block.add_column()
            for name, cell in zip(self.table.header[1:], row[1:], strict=True):
                if cell:
                    block.add_row(Text(f"  {name}"), Text(cell))
            yield block
        yield Text("")


def _prefixed(value: float, prefixes: Sequence[tuple[float, str]]) -> str:
    """Three digits and the largest prefix that leaves a one before the point after rounding."""
    for size, prefix in prefixes:
        if float(f"{value / size:.3g}") >= 1:
            digits = f"{value / size:#.3g}".removesuffix(".")
            return f"{float(digits):,.0f}{prefix}" if "e" in digits else f"{digits}{prefix}"
    return f"{value:.3g}"


def macs(value: float) -> str:
    """1.234e15 -> "1.23 P": multiply-accumulates with a decimal prefix."""
    return _prefixed(value, ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")))


def count(value: float) -> str:
    """12_345_678 -> "12.3 M"."""
    return _prefixed(value, ((1e9, " G"), (1e6, " M"), (1e3, " k")))


def hours(value: float | None) -> str:
    """Device-hours, or minutes or seconds where they are few."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 60:.1f} min" if value * 60 >= 1 else f"{value * 3600:.1f} s"
    return f"{value:.2f} h" if value < 100 else f"{value:,.0f} h"


def _ratio(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f}x)"


def _score(row: Row) -> str:
    if row.top1 is None:
        return "-" if row.state in ("done", "evaluated") else row.state
    return f"{row.top1:.2f} [{row.low:.1f}, {row.high:.1f}]"


def plan_table(plan: Plan, mode: Mode = "exact") -> RenderableType:
    """What a recipe would train and its cost in MACs."""
    rows = []
    for row in plan.rows(mode):
        speedup = row.get("speedup")
        rows.append(
            [
                row["job"],
                count(row["parameters"]),
                f"{row['epochs']:.3g}",
                f"{row['steps']:,}",
                macs(row["student_training_macs"])
                + (f" + {macs(row['teacher_forward_macs'])}" if row["teacher_forward_macs"] else ""),
                (f"as {row['same_as']}" if row["same_as"] else macs(row["total_macs"])) + _ratio(speedup),
                macs(row["accumulated_macs"]) + _ratio(row["accumulated_speedup"]) if "accumulated_macs" in row else "",
            ]
        )
    recipe = plan.recipe
    note = (
        f"{plan.images:,} images, batch {recipe.optimizer.batch}, {recipe.data.captions} captions an image. "
        f"MACs are multiply-accumulates, counted in mode '{mode}'; a sample's: the student's training + the teacher's "
        "forward pass. (x): acceleration over the individual training."
    )
    header = ["Model", "Params", "Epochs", "Steps", "MACs/sample", "MACs", "Chain so far"]
    return TextTable(f"Plan of {recipe.name}", header, rows, [note]).rich()


def cost_table(summary: Summary) -> TextTable:
    """In the shape of the paper's Table 2: baseline, then chain; individual and accumulated cost; speed-ups."""
    by_link = {item.link: item for item in summary.comparisons}
    rows = []
    one = len(summary.individual) == 1
    chains = [("Baseline" if one else f"Baseline, seed {seed},", own) for seed, own in summary.individual.items()]
    # A first link alone is its own baseline: nothing was trained individually yet.
    chains = [(label, own) for label, own in chains if any(row.kind == "baseline" for row in own)]
    chains.append(("CoM-PT", summary.links))
    order = [row.model for row in summary.links]
    for label, members in chains:
        # Sums with a member missing are those of another family.
        whole = [row.model for row in members] == order[: len(members)]
        total_macs = accumulated([row.macs if whole else None for row in members])
        total_hours = accumulated([row.device_hours if whole else None for row in members])
        for at, row in enumerate(members):
            found = by_link.get(row.job) if label == "CoM-PT" else None
            running = total_macs[at]
            rows.append(
                [
                    f"{label} {row.model}",
                    f"{row.epochs:.3g}",
                    _score(row),
                    macs(row.macs) + _ratio(found.macs_speedup if found else None),
                    (macs(running) if running is not None else "-")
                    + _ratio(found.macs_speedup_accumulated if found else None),
                    hours(row.device_hours) + _ratio(found.hours_speedup if found else None),
                    hours(total_hours[at]) + _ratio(found.hours_speedup_accumulated if found else None),
                ]
            )
    rows += [
        [_control(row), f"{row.epochs:.3g}", _score(row), macs(row.macs), "", hours(row.device_hours), ""]
        for row in summary.controls
    ]
    top = next((row for row in summary.rows if row.classes), None)
    about = (
        f"Top-1 in percent on {summary.primary}: {top.images:,} pictures, {top.classes:,} names, chance "
        f"{100 / top.classes:.2f}; in brackets the 95 % interval (Wilson). "
        if top
        else ""
    )
    notes = [f"{about}MACs and device time of training, the teacher's forward passes included; (x) over the baseline."]
    header = ["Model", "Epochs", "Top-1", "MACs", "MACs accumulated", "Device time", "Time accumulated"]
    return TextTable(f"Results of {summary.run}", header, rows, notes)


def comparison_table(summary: Summary) -> TextTable | None:
    """Each link against its baseline and the last one against its controls, with interval and verdict."""
    items: list[Comparison | NotCompared] = [*summary.comparisons, *summary.control_comparisons, *summary.not_compared]
    if not items:
        return None
    seeds = any(isinstance(item, Comparison) and item.seed_spread is not None for item in items)
    rows = [_difference(item, seeds) for item in items]
    about = (
        "Points of top-1, chain minus the other, on the same pictures; 95 % interval by paired bootstrap over them. "
        "Lossless: less than 0.5 points below the baseline; undecided: the interval spans -0.5 (a control: 0)."
    )
    scope = "Interval and verdict cover the choice of pictures, not of training seeds: another seed moves results too."
    notes = [about, scope] if summary.comparisons or summary.control_comparisons else []
    notes += [f"Not compared: {item.link}, as {item.reason}." for item in summary.not_compared]
    header = ["Chain's model", "against", "points", "95 % interval", "verdict"]
    if seeds:
        header.append("SD over seeds")
        notes.append(
            "SD over seeds: standard deviation of the top-1 of the trainings that are compared with, in points."
        )
    return TextTable("Differences", header, rows, notes)


def _control(row: Row) -> str:
    return f"{row.model} {CONTROLS[row.job]}" if row.job in CONTROLS else row.job


def _difference(item: Comparison | NotCompared, seeds: bool) -> list[str]:
    other = CONTROLS.get(item.others[0], item.others[0])
    other += f" and {len(item.others) - 1} more" if len(item.others) > 1 else ""
    if isinstance(item, NotCompared):
        return [item.link, other, "-", "-", "not compared", *(["-"] if seeds else [])]
    verdict: str = item.verdict
    if item.others[0] in CONTROLS:
        verdict = "better" if item.low > 0 else "worse" if item.high < 0 else "undecided"
    cells = [item.link, other, f"{item.difference:+.2f}", f"{item.low:+.2f} to {item.high:+.2f}", verdict]
    if seeds:
        cells.append("-" if item.seed_spread is None else f"{item.seed_spread:.2f}")
    return cells


def summary_table(summary: Summary) -> RenderableType:
    """All that a terminal shows at the end of a run."""
    differences = comparison_table(summary)
    parts = [cost_table(summary).rich()] + ([Text(), differences.rich()] if differences is not None else [])
    return Group(*parts)
