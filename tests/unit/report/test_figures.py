"""Figures of a report: what is written in them can be read."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from compt.report import figures
from compt.report.figures import Curve, Dot

CHAIN = [Dot("nano", 6.1, 21.5, 19.6, 23.6), Dot("micro", 8.6, 22.3, 20.3, 24.3), Dot("mini", 15.0, 25.9, 23.9, 28.1)]
ALONE = [CHAIN[0], Dot("micro", 19.3, 24.8, 22.8, 26.9), Dot("mini", 42.4, 29.7, 27.6, 32.0)]
CONTROLS = [
    Dot("same epochs", 5.4, 12.7, 11.2, 14.3),
    Dot("same MACs", 6.4, 14.4, 12.8, 16.2),
    Dot("chain's MACs", 15.0, 23.2, 21.2, 25.3),
]


@pytest.fixture
def first_axes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, bool], Axes]:
    """Draws a figure for wide or narrow screens, and returns its first panel."""
    monkeypatch.setattr(figures, "_render", lambda name, text, draw: draw)

    def axes(draw: Any, narrow: bool) -> Axes:
        with mpl.rc_context(figures.STYLE):
            canvas = draw(narrow)
            canvas.draw_without_rendering()
        found: Axes = canvas.axes[0]
        return found

    return axes


@pytest.mark.parametrize("narrow", [False, True])
def test_names_of_models_cross_no_bar_and_no_name(first_axes: Callable[[Any, bool], Axes], narrow: bool) -> None:
    """Those of the committed emoji run, of which some stand close together."""
    axes = first_axes(figures.accuracy_figure("set", CHAIN, [ALONE], CONTROLS), narrow)
    names = {text.get_text() + str(at): text.get_window_extent() for at, text in enumerate(axes.texts)}
    assert len(names) == 8, "the first link is its own baseline"
    ends = [
        axes.transData.transform([(dot.macs, dot.low), (dot.macs, dot.high)]) for dot in (*CHAIN, *ALONE, *CONTROLS)
    ]
    assert [name for name, box in names.items() if box.count_overlaps([Bbox(each) for each in ends])] == []
    assert [pair for pair in combinations(names, 2) if names[pair[0]].overlaps(names[pair[1]])] == []


def test_gradient_norms_have_several_labels(first_axes: Callable[[Any, bool], Axes]) -> None:
    curve = Curve("1-nano", "link", 0, {"grad_norm": [(0.0, 0.4), (1.0, 12.0)]})
    axes = first_axes(figures.curves_figure("steps", [curve], {"grad_norm": "Gradient norm"}), False)
    low, high = axes.get_ylim()
    shown = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert shown == ["0.5", "1", "2", "5", "10"]


@pytest.mark.parametrize("kind", ["try", "baseline", "control"])
def test_curves_of_the_same_kind_and_model_differ(first_axes: Callable[[Any, bool], Axes], kind: str) -> None:
    curves = [Curve(f"{kind}-{at}", kind, 1, {"task": [(0.0, 2.0), (1.0, 1.0)]}) for at in range(6)]
    axes = first_axes(figures.curves_figure("curves", curves, {"task": "Task loss"}), False)
    assert len({line.get_alpha() for line in axes.lines}) == 6
    (legend,) = axes.get_figure(root=True).legends  # type: ignore[union-attr]
    assert [line.get_alpha() for line in legend.get_lines()] == [line.get_alpha() for line in axes.lines]
