"""The operators by which a model grows, one table for widths and one for depths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from compt.errors import nearest


@dataclass(frozen=True)
class TowerNames:
    """Parameter names that explain why a tower is not exact.

    `block`, `norm` and `reader` are the first layer, its first LayerNorm and the first matrix that reads the residual
    stream; `out` and `down` are the last parts of the names of the two matrices that write into the stream.
    `mixing` pairs a LayerNorm with the reason why scaling its gain and eps cannot keep the function there.
    """

    block: str
    norm: str
    reader: str
    out: str
    down: str
    projection: str
    mixing: tuple[tuple[str, str], ...] = ()


def _no_copies(old: int, new: int, names: TowerNames) -> Iterator[str]:
    yield f"{names.norm}: its statistics cover {new} channels that are not copies of the teacher's {old}"


def _undivided(old: int, new: int, names: TowerNames) -> Iterator[str]:
    yield f"{names.reader}: it reads copies and does not divide by their number"


def _whole_copies(old: int, new: int, names: TowerNames) -> Iterator[str]:
    if new % old:
        yield f"{names.norm}: {new} channels are not a whole number of copies of {old}"


def _rescaled(old: int, new: int, names: TowerNames) -> Iterator[str]:
    yield from (f"{name}: {reason}" for name, reason in names.mixing)


def _whole_copies_or_rescaled(old: int, new: int, names: TowerNames) -> Iterator[str]:
    yield from _rescaled(old, new, names) if new % old else ()


@dataclass(frozen=True)
class WidthOperator:
    """A way to grow widths: the residual stream, MLP units, attention heads and the joint embedding of a tower.

    An entry in `WIDTH_OPERATORS` is all that a new operator needs; recipes, `compt expand`, the plan and
    docs/recipes.md read it from there.

    - `maps`: the function that makes the map of an axis, as "module:name" (`compt.expand.maps.Maps`). It is a
      string because this module loads without torch.
    - `copies`: it makes copies of units, which `noise` then tells apart.
    - `exact`: it keeps the function where MLP units, heads or the joint embedding grow.
    - `stream`: (teacher width, student width, names) -> the reasons why growing the residual stream changes the
      function, each as "parameter: reason"; none where it does not.
    - `norm_factor`: (teacher width, student width) -> the variance in a LayerNorm over the teacher's. Its eps is
      multiplied by it, its gain by the root.
    - `embedding`: operators with the same word map the joint embedding alike, so that two towers may combine them.
      Empty: only with itself.
    - `complement`: new rows of matrices are an orthonormal complement of the old ones (`compt.expand.linalg`).
    - `packed`: a packed dimension, such as (q/k/v, head, channel), is treated as one axis.
    """

    name: str
    meaning: str
    maps: str
    copies: bool = False
    exact: bool = False
    stream: Callable[[int, int, TowerNames], Iterable[str]] = _no_copies
    norm_factor: Callable[[int, int], float] = lambda old, new: 1.0
    embedding: str = ""
    complement: bool = False
    packed: bool = False


_MAPS = "compt.expand.maps"

WIDTH_OPERATORS = {
    operator.name: operator
    for operator in (
        WidthOperator(
            "insert",
            "the teacher's channels and heads first, new ones behind them",
            f"{_MAPS}:insert",
            embedding="insert",
        ),
        WidthOperator(
            "duplicate",
            "the teacher's channels and heads again and again, nothing divided",
            f"{_MAPS}:duplicate",
            copies=True,
            stream=_undivided,
        ),
        WidthOperator(
            "interpolate",
            "each channel or head blended from the two nearest ones of the teacher",
            f"{_MAPS}:interpolate",
        ),
        WidthOperator(
            "net2net",
            "as `duplicate`, but what reads copies is divided by their number: exact if the residual stream grows by "
            "a whole factor",
            f"{_MAPS}:net2net",
            copies=True,
            exact=True,
            stream=_whole_copies,
            embedding="copies",
        ),
        WidthOperator(
            "lemon",
            "as `net2net`, with the mean of all channels where no whole copy fits, and norms rescaled: exact at any "
            "ratio for text towers and for ViTs without `ln_pre`",
            f"{_MAPS}:lemon",
            copies=True,
            exact=True,
            stream=_whole_copies_or_rescaled,
            norm_factor=lambda old, new: new // old * old / new,  # rho of LEMON, section 4
            embedding="copies",
        ),
        WidthOperator(
            "insert_exact",
            "as `insert`, but new channels are silent at first and norms are rescaled: exact at any ratio for text "
            "towers and for ViTs without `ln_pre`",
            f"{_MAPS}:insert_exact",
            exact=True,
            stream=_rescaled,
            norm_factor=lambda old, new: old / new,
            embedding="copies",
        ),
        WidthOperator(
            "netexpand",
            "as `insert`, but new rows of matrices are an orthonormal complement of the teacher's rows",
            f"{_MAPS}:insert",
            complement=True,
        ),
        WidthOperator(
            "insert_packed",
            "as `insert`, but each matrix is one block, whatever its heads, query, key and value: what the authors' "
            "code does",
            f"{_MAPS}:insert",
            embedding="insert",
            packed=True,
        ),
    )
}
"""Width operators by name. The first is the paper's choice and the default."""


def _repeat_in_place(teacher: int, student: int) -> list[int]:
    return [layer * teacher // student for layer in range(student)]


def _stack(teacher: int, student: int) -> list[int]:
    return [layer % teacher for layer in range(student)]


def _new_on_top(teacher: int, student: int) -> list[int]:
    return [layer if layer < teacher else -1 for layer in range(student)]


def _new_between(teacher: int, student: int) -> list[int]:
    return [-1 if layer * teacher % student else layer * teacher // student for layer in range(student)]


@dataclass(frozen=True)
class DepthOperator:
    """A way to add layers; an entry in `DEPTH_OPERATORS` is all that a new one needs.

    `sources`: (teacher's layers, student's layers) -> the source of each student layer, -1 for none. `average`: added
    layers come from the moving average of the teacher's weights.
    """

    name: str
    meaning: str
    sources: Callable[[int, int], list[int]]
    average: bool = False


DEPTH_OPERATORS = {
    operator.name: operator
    for operator in (
        DepthOperator("duplicate", "each layer repeated in place", _repeat_in_place),
        DepthOperator("stack", "all layers, then again from the first", _stack),
        DepthOperator("constant", "new layers on top", _new_on_top),
        DepthOperator("interval", "new layers in between", _new_between),
        DepthOperator(
            "netexpand",
            "as `duplicate`, but repeated layers come from the moving average of the teacher's weights, which needs "
            "`optimizer.ema`",
            _repeat_in_place,
            average=True,
        ),
    )
}
"""Depth operators by name. The first is the default."""


def wrong_operator(kind: str, name: str) -> str | None:
    """What is wrong with the name of a `width` or `depth` operator; None if it is known."""
    known = list(WIDTH_OPERATORS if kind == "width" else DEPTH_OPERATORS)
    return None if name in known else f"unknown {kind} operator{nearest(name, known)}; known: {', '.join(known)}"
