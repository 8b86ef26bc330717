"""The figure of measured curves: accuracy over epochs of each link, its baseline, and where they meet."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from compt.design.crossing import isotonic
from compt.design.curves import Curves, LinkCurve, Point, names
from compt.report.figures import COLOURS, STYLE, WIDE

_PANEL_HEIGHT = 3.3
_COLUMNS = 2


def curves_figure(found: Curves) -> tuple[str, bytes]:
    """SVG and PNG with one panel for each link of `found`, of which there is at least one."""
    columns = min(_COLUMNS, len(found.links))
    rows = -(-len(found.links) // columns)
    with mpl.rc_context({**STYLE, "svg.hashsalt": "curves", "svg.fonttype": "path"}):
        canvas = Canvas(figsize=(WIDE * (0.4 + 0.3 * columns), _PANEL_HEIGHT * rows), layout="constrained")
        panels = canvas.subplots(rows, columns, squeeze=False).flatten()
        for axes, name, link in zip(panels, names(found.links), found.links, strict=False):
            _panel(axes, name, link)
        for axes in panels[len(found.links) :]:
            axes.set_axis_off()
        text, image = io.StringIO(), io.BytesIO()
        canvas.savefig(text, format="svg", metadata={"Date": None}, facecolor="white")
        canvas.savefig(image, format="png", dpi=130, facecolor="white")
    return text.getvalue(), image.getvalue()


def _panel(axes: Axes, name: str, link: LinkCurve) -> None:
    epochs = [point.epochs for point in link.points]
    fitted = isotonic([point.top1 for point in link.points], [len(point.jobs) for point in link.points])
    right = 1.08 * max(epochs)
    if link.baseline is not None:
        label = f"trained individually, {link.baseline.epochs:.4g} epochs"
        axes.axhspan(link.baseline.low, link.baseline.high, color=COLOURS["alone"], alpha=0.16, linewidth=0)
        axes.axhline(link.baseline.top1, color=COLOURS["alone"], label=label)
        if link.target is not None and link.target != link.baseline.top1:
            axes.axhline(link.target, color=COLOURS["alone"], linestyle=":", label="target")
    axes.plot(epochs, fitted, color=COLOURS["chain"], linewidth=1.4, label="the link")
    _marks(axes, link.points, COLOURS["chain"], "o", "")
    within = [point for point in link.scratch if point.epochs <= right]
    if within:
        _marks(axes, within, COLOURS["control"], "s", "from scratch")
    if link.match is not None and link.target is not None:
        _meeting(axes, link, link.match.epochs, link.target, right)
    axes.set_xlim(0, right)
    axes.set_title(name, wrap=True)
    axes.set_xlabel("epochs, each training a complete schedule")
    axes.set_ylabel(f"top-1 on {link.evaluation_set}, %")
    axes.tick_params(which="both", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)


def _marks(axes: Axes, points: Sequence[Point], colour: str, marker: str, label: str) -> None:
    errors = np.array([(point.top1 - point.low, point.high - point.top1) for point in points]).T.clip(min=0)
    epochs, top1 = [point.epochs for point in points], [point.top1 for point in points]
    axes.errorbar(
        epochs, top1, yerr=errors, color=colour, linestyle="", marker=marker, elinewidth=1, capsize=2.5, label=label
    )


def _meeting(axes: Axes, link: LinkCurve, epochs: float, target: float, right: float) -> None:
    """A line down from where the curve meets its target; the interval of that, open where it leaves the points."""
    low, high = (at if at is not None else end for at, end in ((link.low, 0.0), (link.high, right)))
    axes.axvspan(low, high, color=COLOURS["m2"], alpha=0.12, linewidth=0)
    axes.axvline(epochs, color=COLOURS["m2"], linestyle="--", linewidth=1.2, label=f"meets it at {epochs:.2f}")
    axes.plot([epochs], [target], marker="D", color=COLOURS["m2"], markersize=6, linestyle="")
