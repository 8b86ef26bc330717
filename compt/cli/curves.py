"""`compt curves`: the epochs that links need to match their baselines, measured on runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compt.cli.options import AsJson, option, print_json
from compt.cost.paper import LOSSLESS_POINTS
from compt.design.curves import Curves, LinkCurve, Point, Target, names, read_curves
from compt.files import write_bytes, write_json, write_text
from compt.text import TextTable, say, show

_HEADER = ["Link", "Epochs:top-1", "Baseline", "Epochs to match", "95 % interval", "Speed-up in MACs"]


def curves(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="run folders, or their saved results", show_default=False)
    ],
    on: Annotated[str | None, option("evaluation set", metavar="SET", default="the primary set of the runs")] = None,
    target: Annotated[
        Target, option(f"accuracy to reach; lossless is {LOSSLESS_POINTS} points below the baseline")
    ] = "baseline",
    average_seeds: Annotated[bool, option("average over the seeds of a link", "--average-seeds")] = False,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, option("also write curves.json, curves.svg and curves.png here", metavar="FOLDER")
    ] = None,
) -> None:
    """Measure how many epochs links need to match baselines.

    Interpolates between complete training runs of different lengths.
    """
    found = read_curves(runs, on=on, target=target, average_seeds=average_seeds, option="--on")
    if out is not None:
        _write(found, out)
    if as_json:
        print_json(found.to_json())
        return
    show(curves_table(found))
    if out is not None:
        say(f"Wrote {out}")


def _write(found: Curves, out: Path) -> None:
    from compt.report.figures import links_figure

    write_json(out / "curves.json", found.to_json())
    if found.links:
        svg, png = links_figure(found)
        write_text(out / "curves.svg", svg)
        write_bytes(out / "curves.png", png)


def curves_table(found: Curves) -> TextTable:
    """A row for each link and baseline; below it what was left out, and why."""
    labels = names(found.links)
    rows = [_row(name, link) for name, link in zip(labels, found.links, strict=True)]
    aim = "the baseline's accuracy" if found.target == "baseline" else f"{LOSSLESS_POINTS} points below the baseline"
    about = (
        f"To match: to reach {aim}, on straight lines between complete schedules; falling neighbours are averaged, "
        "nothing is extrapolated. Speed-up: MACs of the baseline over those of the link, its teacher's included."
    )
    notes = [about]
    if any(link.paired for link in found.links):
        notes.append("Interval: bootstrap over images, the same for all models; it does not cover training seeds.")
    without = [name for name, link in zip(labels, found.links, strict=True) if link.baseline and not link.paired]
    if without:
        notes.append(f"No interval of {'; '.join(without)}: stored answers are missing, or not on the same images.")
    notes += [f"{name}: {link.reason}." for name, link in zip(labels, found.links, strict=True) if link.reason]
    notes += [f"Left out: {item.job} {item.reason}." for item in found.skipped]
    if any(point.spread is not None for link in found.links for point in (*link.points, link.baseline) if point):
        notes.append("±: standard deviation of top-1 over jobs.")
    if not rows:
        notes.insert(0, "No link in these runs is trained to its end.")
    return TextTable(f"Epochs to match, on {found.evaluation_set}", _HEADER, rows, notes)


def _row(name: str, link: LinkCurve) -> list[str]:
    points = ", ".join(map(_point, link.points))
    baseline = "-" if link.baseline is None else _point(link.baseline)
    epochs, speed = _epochs_and_speed(link)
    return [name, points, baseline, epochs, _interval(link), speed]


def _point(point: Point) -> str:
    # Without a space in it, so that a narrow table does not break it.
    spread = "" if point.spread is None else f"±{point.spread:.2f}"
    return f"{point.epochs:.4g}:{point.top1:.2f}{spread}"


def _epochs_and_speed(link: LinkCurve) -> list[str]:
    """Epochs to match, exactly or by a bound, and the acceleration that goes with them."""
    if link.match is not None:
        return [f"{link.match.epochs:.2f}", f"{link.acceleration(link.match.epochs):.2f}x"]
    if link.at_most is not None:
        return [f"≤ {link.at_most:.4g}", f"≥ {link.acceleration(link.at_most):.2f}x"]
    if link.more_than is not None:
        return [f"> {link.more_than:.4g}", f"< {link.acceleration(link.more_than):.2f}x"]
    return ["-", "-"]


def _interval(link: LinkCurve) -> str:
    if link.low is not None and link.high is not None:
        return f"{link.low:.2f} to {link.high:.2f}"
    if link.low is not None:
        return f"≥ {link.low:.2f}"
    return "-" if link.high is None else f"≤ {link.high:.2f}"
