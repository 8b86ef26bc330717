"""The figures of a report, each as an SVG that follows the page's colours and as a PNG for Markdown."""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from compt.design.crossing import isotonic
from compt.design.curves import Curves, LinkCurve, Point, names
from compt.text import count, visible

# People with colour-blindness can distinguish these colours. The page has a variable of the same name for each, so that
# a dark page can have its own. The PNGs have these.
COLOURS = {
    "ink": "#1b2733",
    "muted": "#5d6b79",
    "grid": "#dfe4ea",
    "paper": "#fefefe",
    "chain": "#0b62c4",
    "teacher": "#7db4ee",
    "other": "#c6def8",
    "alone": "#7a8591",
    "control": "#b45309",
    "m0": "#0072b2",
    "m1": "#d55e00",
    "m2": "#009e73",
    "m3": "#b0558f",
    "m4": "#c98a00",
    "m5": "#3fa0d8",
    "m6": "#6b5b4b",
}
MODEL_COLOURS = [COLOURS[name] for name in COLOURS if name.startswith("m") and name != "muted"]
WIDE, NARROW = 8.6, 4.3
"""Inches."""
LOG_FROM = 12.0
"""An axis of costs is logarithmic when they span more than this factor."""
POINTS = 240
"""Points of a curve; more are averaged in groups."""

STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    **dict.fromkeys((f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")), 0),
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure. `svg` is for wide screens, `narrow` for phones; `text` says what it shows."""

    name: str
    text: str
    svg: str
    narrow: str
    png: bytes


@dataclass(frozen=True)
class Dot:
    """A trained model in the figure of accuracy over cost; `low` and `high` bound `top1`, in percent."""

    label: str
    macs: float
    top1: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """The numbers of one run: `values[key]` holds pairs of samples and value. `model` counts models from 0."""

    label: str
    kind: str
    model: int
    values: Mapping[str, Sequence[tuple[float, float]]] = field(repr=False)


Bar = tuple[str, Sequence[float]]
"""The label of one run and its MACs by part. `PARTS` names the parts."""

PARTS = (
    ("student", COLOURS["chain"]),
    ("teacher's forward passes", COLOURS["teacher"]),
    ("loss, optimizer, recomputation", COLOURS["other"]),
    ("baseline", COLOURS["alone"]),
)


def _render(name: str, text: str, draw: Callable[[bool], Canvas]) -> Figure:
    with mpl.rc_context(STYLE):
        drawings = []
        for narrow in (False, True):
            # Ids within the page differ from figure to figure.
            mpl.rcParams["svg.hashsalt"] = f"{name}{narrow}"
            canvas, buffer = draw(narrow), io.StringIO()
            canvas.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
            drawings.append(_for_page(buffer.getvalue(), text))
        image = io.BytesIO()
        draw(False).savefig(image, format="png", dpi=130, facecolor="white")
    return Figure(name, text, drawings[0], drawings[1], image.getvalue())


def _for_page(svg: str, text: str) -> str:
    """Return the drawing alone. The page sets its size, colours and fonts."""
    svg, text = visible(svg[svg.index("<svg") :]), visible(text)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    label = text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    start = f'<svg {box[0] if box else ""} role="img" aria-label="{label}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: start, svg, count=1)  # the label may have backslashes
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--font)", svg)


def _new(narrow: bool, height: float) -> Canvas:
    return Canvas(figsize=(NARROW if narrow else WIDE, height), layout="constrained")


def _cost_axis(axes: Axes, values: Sequence[float], narrow: bool) -> None:
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1e3 or narrow else (1.0, 3.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(low / 1.6, high * 1.6)
    else:
        axes.set_xlim(0, high * 1.14)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4 if narrow else 7))
    axes.xaxis.set_major_formatter(_tick(count))


def _bars(axes: Axes, x: Sequence[float], points: Sequence[Dot] | Sequence[Point], colour: str, **how: Any) -> None:
    """Accuracies with their intervals."""
    errors = np.array([(point.top1 - point.low, point.high - point.top1) for point in points]).T.clip(min=0)
    axes.errorbar(x, [point.top1 for point in points], yerr=errors, color=colour, elinewidth=1, capsize=2.5, **how)


def _line(axes: Axes, points: Sequence[Dot], name: str, marker: str, style: str, label: str) -> None:
    face = COLOURS["paper" if marker == "o" else name]
    how = {"marker": marker, "markerfacecolor": face, "markeredgewidth": 1.6, "linestyle": style, "label": label}
    _bars(axes, [point.macs for point in points], points, COLOURS[name], **how)


_SIDES: dict[str, Any] = {
    "above": ("high", (0, 5), "center"),
    "below": ("low", (0, -14), "center"),
    "right": ("top1", (8, -3), "left"),
    "left": ("top1", (-8, -3), "right"),
    "above, to the right": ("high", (-6, 5), "left"),
    "above, to the left": ("high", (6, 5), "right"),
    "below, to the right": ("low", (-6, -14), "left"),
    "below, to the left": ("low", (6, -14), "right"),
}
"""Where the name of a dot can stand: beside which value, at which offset in points, and aligned to which side."""


def _name_dots(axes: Axes, named: Sequence[tuple[Dot, str, str]], every: Sequence[Dot]) -> None:
    """Write each dot's name in a colour on the wanted side; on another one where it would cross bars or other names."""
    canvas = axes.get_figure(root=True)
    assert canvas is not None
    canvas.draw_without_rendering()  # before, no place is known
    ends = [axes.transData.transform([(dot.macs, dot.low), (dot.macs, dot.high)]) for dot in every]
    taken = [Bbox([low, high]).padded(4, 2) for low, high in ends]

    def crossed(name: Annotation, dot: Dot, side: str) -> int:
        end, name.xyann, align = _SIDES[side]
        name.xy = dot.macs, getattr(dot, end)
        name.set_horizontalalignment(align)
        box = name.get_window_extent()
        inside = Bbox.intersection(box, axes.bbox)
        return box.count_overlaps(taken) + (inside is None or inside != box)

    for dot, colour, wanted in named:
        how: Any = {"textcoords": "offset points", "color": COLOURS[colour], "fontsize": 8.5}
        name = axes.annotate(dot.label, (dot.macs, dot.top1), (0, 0), **how)
        best = min((wanted, *_SIDES), key=partial(crossed, name, dot))
        crossed(name, dot, best)
        taken.append(name.get_window_extent())


def accuracy_figure(
    primary: str, chain: Sequence[Dot], individual: Sequence[Sequence[Dot]], controls: Sequence[Dot]
) -> Figure | None:
    """Top-1 over the MACs spent up to each member; None without a scored model."""
    every = [*chain, *(point for line in individual for point in line), *controls]
    if not every:
        return None

    def draw(narrow: bool) -> Canvas:
        canvas = _new(narrow, 4.3 if narrow else 4.1)
        axes = canvas.add_subplot()
        _cost_axis(axes, [point.macs for point in every], narrow)
        for line in individual:
            _line(axes, line, "alone", "o", "--", "baselines" if line is individual[0] else "_")
        if chain:
            _line(axes, chain, "chain", "s", "-", "chain")
        if controls:
            _line(axes, controls, "control", "D", "none", "last model from scratch")
        axes.margins(y=0.14)
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.set_title(f"Top-1 on {primary}, %")
        axes.set_xlabel("accumulated training MACs")
        canvas.legend(loc="outside lower left", ncols=1 if narrow else 3)
        met = {(point.macs, point.top1) for point in chain}
        alone = [point for point in (individual[0] if individual else ()) if (point.macs, point.top1) not in met]
        named = [(point, "chain", "above") for point in chain] + [(point, "alone", "below") for point in alone]
        _name_dots(axes, [*named, *((point, "control", "right") for point in controls)], every)
        return canvas

    text = f"Top-1 on {primary} against accumulated training MACs, for the chain and for the baselines."
    return _render("accuracy", text, draw)


def _thin(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    finite = [(x, y) for x, y in pairs if math.isfinite(y)]
    size = max(1, math.ceil(len(finite) / POINTS))
    means = [np.mean(finite[at : at + size], axis=0) for at in range(0, len(finite), size)]
    return [float(x) for x, _ in means], [float(y) for _, y in means]


def curves_figure(name: str, curves: Sequence[Curve], panels: Mapping[str, str]) -> Figure | None:
    """One panel for each key of `panels` (key to title) that some run logged; None if there is none.

    The axis of gradient norms is logarithmic where they jump; speeds start at 0.
    """
    shown = [(key, title) for key, title in panels.items() if any(curve.values.get(key) for curve in curves)]
    if not shown:
        return None
    styles: dict[str, Any] = {"link": "-", "baseline": (0, (4, 2)), "control": (0, (1, 1.4)), "try": "-."}

    def style(curve: Curve) -> dict[str, Any]:
        alike = [other.label for other in curves if (other.kind, other.model) == (curve.kind, curve.model)]
        paler = 0.6 * alike.index(curve.label) / max(1, len(alike) - 1)
        colour = MODEL_COLOURS[curve.model % len(MODEL_COLOURS)]
        return {"color": colour, "linestyle": styles[curve.kind], "alpha": 1 - paler}

    def draw(narrow: bool) -> Canvas:
        columns = 1 if narrow else min(2, len(shown))
        rows = math.ceil(len(shown) / columns)
        keys = 0.2 * (len(curves) if narrow else math.ceil(len(curves) / 3)) + 0.15
        canvas = _new(narrow, (2.3 if narrow else 2.6) * rows + keys)
        for at, (key, title) in enumerate(shown):
            axes = canvas.add_subplot(rows, columns, at + 1)
            for curve in curves:
                x, y = _thin(curve.values.get(key, ()))
                dots = "o" if len(x) == 1 or (key.endswith("/top1") and len(x) <= 20) else ""
                width = 2 if curve.kind == "link" else 1.4
                axes.plot(x, y, linewidth=width, marker=dots, markersize=3, **style(curve))
            axes.set_title(title)
            if key == "grad_norm":
                values = [y for curve in curves for _, y in curve.values.get(key, ()) if 0 < y < math.inf]
                if values and max(values) / min(values) > LOG_FROM:
                    axes.set_yscale("log")
                    few = max(values) / min(values) < 1e3
                    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
                    # The usual labels are formulas, and this style shows none.
                    axes.yaxis.set_major_formatter("{x:g}")
                    axes.yaxis.set_minor_formatter(NullFormatter())
            elif key in ("samples_per_s", "data_wait"):
                axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter(_tick(count))
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
            axes.set_xlim(left=0)
            if at >= len(shown) - columns:
                axes.set_xlabel("images seen")
        # Made apart from the panels: the legend of a figure lists each curve once for every panel.
        handles = [Line2D([], [], label=curve.label, **style(curve)) for curve in curves]
        canvas.legend(handles=handles, loc="outside lower left", ncols=1 if narrow else 3)
        return canvas

    text = f"Curves against images seen: {'; '.join(title for _, title in shown)}."
    return _render(name, text, draw)


def _tick(number: Callable[[float], str]) -> FuncFormatter:
    """Numbers with a prefix, without zeros behind the point."""

    def text(value: float, _: int) -> str:
        digits, space, prefix = number(value).partition(" ")
        return f"{float(digits.replace(',', '')):g}{space}{prefix}"

    return FuncFormatter(text)


def cost_figure(bars: Sequence[Bar]) -> Figure | None:
    """Stacked bars of MACs, from top to bottom; None without a bar."""
    if not bars:
        return None

    def draw(narrow: bool) -> Canvas:
        canvas = _new(narrow, 0.34 * len(bars) + (1.6 if narrow else 1.1))
        axes = canvas.add_subplot()
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        # The bar of a baseline lies close under the chain's bar that it is compared with.
        places = np.cumsum([0.0 if not at else 0.78 if not label else 1.15 for at, (label, _) in enumerate(bars)])
        start = np.zeros(len(bars))
        for part, (name, colour) in enumerate(PARTS):
            widths = np.array([parts[part] for _, parts in bars])
            if widths.any():
                axes.barh(places, widths, left=start, height=0.68, color=colour, label=name)
            start += widths
        for place, total in zip(places, start, strict=True):
            axes.annotate(count(total), (total, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(places, [label for label, _ in bars])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(_tick(count))
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3 if narrow else 6))
        axes.set_xlim(0, start.max() * (1.25 if narrow else 1.12))
        axes.set_xlabel("training MACs")
        canvas.legend(loc="outside lower left", ncols=1 if narrow else 4)
        return canvas

    return _render("cost", "What each training costs in MACs, by part.", draw)


@dataclass(frozen=True)
class SheetImage:
    """A held-out image with its true name and what a model took it for; `right` None: not known."""

    image: np.ndarray
    name: str
    answer: str
    right: bool | None

    @property
    def mark(self) -> str:
        """A sign for right or wrong that needs no colour."""
        return "" if self.right is None else "✓" if self.right else "✗"

    @property
    def uri(self) -> str:
        """The image itself as an address: lossless where it is small."""
        item = Image.fromarray(self.image.transpose(1, 2, 0))
        small = max(item.size) <= 64
        item.thumbnail((128, 128))
        buffer = io.BytesIO()
        item.save(buffer, "PNG" if small else "JPEG", quality=88)
        return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def contact_png(images: Sequence[SheetImage], columns: int = 8) -> bytes:
    """All images in one, each with its true name and the answer."""
    rows = math.ceil(len(images) / columns)
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(1.3 * columns, 1.62 * rows))
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for at, item in enumerate(images):
            x, y = at % columns * 1.3 + 0.2, (rows - 1 - at // columns) * 1.62 + 0.62
            smooth = "nearest" if item.image.shape[-1] <= 64 else "antialiased"
            axes.imshow(item.image.transpose(1, 2, 0), extent=(x, x + 0.9, y, y + 0.9), interpolation=smooth)
            axes.text(x + 0.45, y - 0.06, _fold(item.name), ha="center", va="top", fontsize=6.5, weight="bold")
            axes.text(x + 0.45, y - 0.32, _fold(f"{item.mark} {item.answer}"), ha="center", va="top", fontsize=6.5)
        axes.set_xlim(0, 1.3 * columns)
        axes.set_ylim(0, 1.62 * rows)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def _fold(text: str) -> str:
    """On two lines at most."""
    return textwrap.fill(text, 22, max_lines=2, placeholder="…", break_on_hyphens=False)


_PANEL_HEIGHT = 3.3
_COLUMNS = 2


def links_figure(found: Curves) -> tuple[str, bytes]:
    """SVG and PNG with one panel for each link of `found`, of which there is at least one."""
    columns = min(_COLUMNS, len(found.links))
    rows = -(-len(found.links) // columns)
    with mpl.rc_context({**STYLE, "svg.hashsalt": "curves", "svg.fonttype": "path", "axes.facecolor": "white"}):
        canvas = Canvas(figsize=(WIDE * (0.4 + 0.3 * columns), _PANEL_HEIGHT * rows), layout="constrained")
        panels = canvas.subplots(rows, columns, squeeze=False).flatten()
        for axes, name, link in zip(panels, names(found.links), found.links, strict=False):
            _panel(axes, name, link)
        for axes in panels[len(found.links) :]:
            axes.set_axis_off()
        text, image = io.StringIO(), io.BytesIO()
        canvas.savefig(text, format="svg", metadata={"Date": None}, facecolor="white")
        canvas.savefig(image, format="png", dpi=130, facecolor="white")
    return visible(text.getvalue()), image.getvalue()


def _panel(axes: Axes, name: str, link: LinkCurve) -> None:
    epochs = [point.epochs for point in link.points]
    fitted = isotonic([point.top1 for point in link.points], [len(point.jobs) for point in link.points])
    right = 1.08 * max(epochs)
    if link.baseline is not None:
        label = f"baseline, {link.baseline.epochs:.4g} epochs"
        axes.axhspan(link.baseline.low, link.baseline.high, color=COLOURS["alone"], alpha=0.16, linewidth=0)
        axes.axhline(link.baseline.top1, color=COLOURS["alone"], label=label)
        if link.target is not None and link.target != link.baseline.top1:
            axes.axhline(link.target, color=COLOURS["alone"], linestyle=":", label="target")
    axes.plot(epochs, fitted, color=COLOURS["chain"], linewidth=1.4, label="the link")
    _bars(axes, epochs, link.points, COLOURS["chain"], linestyle="", marker="o", label="")
    within = [point for point in link.scratch if point.epochs <= right]
    if within:
        x, how = [point.epochs for point in within], {"linestyle": "", "marker": "s", "label": "from scratch"}
        _bars(axes, x, within, COLOURS["control"], **how)
    if link.match is not None and link.target is not None:
        _meeting(axes, link, link.match.epochs, link.target, right)
    axes.set_xlim(0, right)
    axes.set_title(name, wrap=True)
    axes.set_xlabel("epochs, each training a complete schedule")
    axes.set_ylabel(f"top-1 on {link.evaluation_set}, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)


def _meeting(axes: Axes, link: LinkCurve, epochs: float, target: float, right: float) -> None:
    """A line down from where the curve meets its target; its interval, open where it leaves the points."""
    if link.paired:
        low, high = (at if at is not None else end for at, end in ((link.low, 0.0), (link.high, right)))
        axes.axvspan(low, high, color=COLOURS["m2"], alpha=0.12, linewidth=0)
    axes.axvline(epochs, color=COLOURS["m2"], linestyle="--", linewidth=1.2, label=f"meets it at {epochs:.2f}")
    axes.plot([epochs], [target], marker="D", color=COLOURS["m2"], markersize=6, linestyle="")
