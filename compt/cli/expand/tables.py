"""Tables that show an expansion plan and its verification."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compt.models.growth import TOWERS, added_layers
from compt.models.scalars import SCALAR_NAMES
from compt.recipe.expansion import expand_words
from compt.text import TextTable, count

if TYPE_CHECKING:
    from compt.evaluate.expansion import Verification
    from compt.expand.plan import ExpandedParameter, ExpansionPlan

_IN_LAYER = re.compile(r"(?P<stack>.*blocks)\.(?P<layer>\d+)\.(?P<leaf>.*)")
_STAGE = re.compile(r"\.layers\.(\d+)\.")
# What the first row of a layer says for all its parameters.
_OF_LAYER = re.compile(r"(, layer \d+ ← .*|: layer \d+ (is added|has no source))$")
NO_BREAK = "\u00a0"
HEADER = ("parameter", "shape: rule", "copied", "new", "zero")


@dataclass
class _TowerRows:
    """Entries of one table, in the plan's order: a stack of layers, or a tower's other parameters."""

    title: str
    prefix: str
    entries: list[ExpandedParameter] = field(default_factory=list)


def plan_tables(plan: ExpansionPlan) -> Iterator[TextTable]:
    """Every parameter: a table for each stack of layers, with sums per layer, and one for the rest of each tower."""
    for part in _parts(plan):
        rows: list[tuple[str, ...]] = []
        layer = ""
        for entry in part.entries:
            inside = _IN_LAYER.match(entry.name)
            if inside and inside["layer"] != layer:
                layer = inside["layer"]
                own = [other for other in part.entries if other.name.startswith(f"{part.prefix}{layer}.")]
                rows.append(_layer_row(plan, inside["stack"], int(layer), own))
            name = f"  {inside['leaf']}" if inside else entry.name.removeprefix(part.prefix)
            rows.append((name, _shape_and_rule(entry), *_shares([entry])))
        title = f"{part.title}: {part.prefix}*" if part.prefix else part.title
        yield TextTable(title, HEADER, rows, left=2)


def summary_table(plan: ExpansionPlan, rounded_to: str | None = None, notes: Sequence[str] = ()) -> TextTable:
    """Sums by part and in total; below, the operators, and for each tower whether it is exact, or why not.

    `rounded_to`: the type of the student's weights, if it is less than float32.
    """
    rows = [_sum_row(part.title, part.entries) for part in _parts(plan)]
    rows.append(_sum_row("all", plan.entries))
    header = ("part", "parameters", *HEADER[2:])
    title = f"{plan.teacher.name} to {plan.student.name}"
    words = expand_words(plan.config)
    return TextTable(title, header, rows, [f"{words[0].upper()}{words[1:]}.", *_promises(plan, rounded_to), *notes])


def _promises(plan: ExpansionPlan, rounded_to: str | None) -> Iterator[str]:
    rounding = f", up to rounding to {rounded_to}, in which it is stored" if rounded_to else ""
    for tower in TOWERS:
        reasons = plan.inexact[tower]
        if reasons:
            more = f" (and {len(reasons) - 1} more such)" if len(reasons) > 1 else ""
            yield f"The {tower} tower changes its function: {reasons[0]}{more}."
        else:
            yield f"The {tower} tower keeps its function (in float64 to 1e-10){rounding}."


def _parts(plan: ExpansionPlan) -> list[_TowerRows]:
    parts: dict[str, _TowerRows] = {}
    for entry in plan.entries:
        inside = _IN_LAYER.match(entry.name)
        image = entry.name.startswith("visual.")
        tower = "Image tower" if image else "Text tower"
        if entry.name in SCALAR_NAMES:
            part = _TowerRows("Both towers", "")
        elif inside is None:
            part = _TowerRows(f"{tower}, outside its layers", "visual." if image else "")
        else:
            stage = _STAGE.search(entry.name)
            part = _TowerRows(f"{tower}, stage {stage[1]}" if stage else f"{tower}, layers", f"{inside['stack']}.")
        parts.setdefault(part.title, part).entries.append(entry)
    return list(parts.values())


def _layer_row(plan: ExpansionPlan, stack: str, layer: int, entries: Sequence[ExpandedParameter]) -> tuple[str, ...]:
    sources = plan.layers.get(stack)
    if sources is None or sources[layer] < 0:
        text = "own"
    else:
        average = "the average of " if any(entry.average for entry in entries) else ""
        text = f"from {average}{sources[layer]}"
    if sources is not None and added_layers(sources)[layer]:
        text += ", added"
    name, size, *shares = _sum_row(f"layer {layer}", entries)
    return (name, f"{text}; {size.replace(' ', NO_BREAK)}", *shares)


def _shape_and_rule(entry: ExpandedParameter) -> str:
    """`64→128 × 256: insert res`: the teacher's size and the student's where they differ; then how."""
    rule = _OF_LAYER.sub("", entry.rule)
    if not entry.shape:
        return f"scalar: {rule}"
    old = entry.source_shape if len(entry.source_shape) == len(entry.shape) else entry.shape
    sizes = [str(new) if a == new else f"{a}→{new}" for a, new in zip(old, entry.shape, strict=True)]
    for size in sizes:  # the rule repeats it
        rule = re.sub(rf" {size}(?=[,;]|$)", "", rule)
    return f"{' × '.join(sizes)}: {rule}"


def _sum_row(name: str, entries: Sequence[ExpandedParameter]) -> tuple[str, ...]:
    size = sum(entry.size for entry in entries)
    return (name, f"{count(size)}", *_shares(entries))


def _shares(entries: Sequence[ExpandedParameter]) -> tuple[str, str, str]:
    size = sum(entry.size for entry in entries)
    counts = (sum(getattr(entry, what) for entry in entries) for what in ("copied", "new", "zeroed"))
    copied, new, zeroed = (_share(number, size) for number in counts)
    return copied, new, zeroed


def _share(number: int, size: int) -> str:
    if number in (0, size):
        return "100 %" if number else "-"
    # Rounding must not turn a share into 0 % or 100 %.
    return f"{min(max(100 * number / size, 0.1), 99.9):.1f} %"


def verification_tables(found: Verification, plan: ExpansionPlan) -> Iterator[TextTable]:
    """The scores of teacher, student and random student, and how far features moved."""
    student = plan.student.name
    names = {"teacher": f"teacher {plan.teacher.name}", "student": f"expanded {student}", "random": f"random {student}"}
    rows = []
    for name, scores in found.scores.items():
        top5 = [] if scores.top5 is None else [f"{scores.top5:.2f}"]
        rows.append((names[name], f"{scores.loss:.4f}", f"{scores.top1:.2f}", *top5))
    header = ("model", "loss", "top-1 %", "top-5 %")[: len(rows[0])]
    note = (
        f"Loss: contrastive, in batches of {found.batch}, captions: {found.captions}. Accuracy: zero-shot, "
        f"{found.samples:,} images, {found.classes:,} classes."
    )
    if found.skipped:
        note += f" {found.skipped:,} images could not be read."
    yield TextTable("At step 0", header, rows, [note])
    features = []
    for tower, part in found.differences.items():
        promise = "not exact" if part.reasons else "exact: kept" if part.kept else "exact: BROKEN"
        features.append((tower, promise, f"{part.float32:.1e}", "-" if part.float64 is None else f"{part.float64:.1e}"))
    notes = ["Largest difference of an element of normalized features, or of their dot products if they grew longer."]
    if found.dot_products is not None:
        notes.append(f"Dot products of image and text features, in float64: {found.dot_products:.1e}.")
    yield TextTable("Features, teacher to student", ("tower", "promise", "float32", "float64"), features, notes, left=2)
