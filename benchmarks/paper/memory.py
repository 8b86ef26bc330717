"""The memory model against counted tensors: memory kept for backward, and the peak within a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.common import Result, main, percent
from benchmarks.paper.counting import Case, kept, most_alive
from compt.cost.activations import Shape, image_tower, task_loss_working, text_tower
from compt.cost.memory import PRECISION_BYTES, Memory, memory_per_gpu
from compt.models.presets import PRESETS, resolve
from compt.text import TextTable

MEGA = 1e6

_WIDE = resolve("vit_nano", {"embed_dim": 96, "name": "vit_nano with 96 features"})
KEPT = (
    Case(PRESETS["vit_nano"], rows=16, captions=4, tokens=20),
    Case(_WIDE, PRESETS["vit_pico"], rows=16, captions=4, tokens=20, world_size=4),
    Case(PRESETS["vit_t16"], rows=2, captions=4, tokens=30),
    Case(PRESETS["vit_t16"], rows=2, captions=4, tokens=30, precision="fp32"),
    Case(PRESETS["vit_b16"], PRESETS["vit_t16"], rows=2, captions=4, tokens=77, world_size=8),
    Case(PRESETS["swin_t"], rows=2, captions=4, tokens=30),
    Case(PRESETS["swin_t"], rows=2, captions=4, tokens=30, recompute=True),
)
ALIVE = (
    Case(PRESETS["vit_nano"], rows=64, captions=4, tokens=20),
    Case(PRESETS["vit_nano"], PRESETS["vit_pico"], rows=64, captions=4, tokens=32, short=8),
    Case(_WIDE, PRESETS["vit_nano"], rows=64, captions=4, tokens=20),
    Case(_WIDE, PRESETS["vit_nano"], rows=64, captions=4, tokens=20, micro_batch=16),
    Case(PRESETS["vit_micro"], rows=64, captions=4, tokens=20, recompute=True),
    Case(PRESETS["vit_pico"], rows=512, captions=8, tokens=3),
    Case(PRESETS["vit_pico"], rows=512, captions=8, tokens=3, chunk=64),
)


def predicted(case: Case) -> Memory:
    """What the memory model predicts for a case under DDP."""
    return memory_per_gpu(
        case.student,
        case.teacher,
        engine="ddp",
        world_size=case.world_size,
        batch=case.rows * case.world_size,
        captions=case.captions,
        tokens={case.short: 0.5, case.tokens: 0.5} if case.short else case.tokens,
        precision=case.precision,
        micro_batch=case.micro_batch,
        recompute=case.recompute,
        loss_chunk=case.chunk,
    )


def _described(case: Case) -> dict[str, Any]:
    return {
        "student": case.student.name,
        "teacher": case.teacher.name if case.teacher else "",
        "precision": case.precision,
        "images": case.rows,
        "captions": case.captions,
        "tokens": f"{case.short}, {case.tokens}" if case.short else str(case.tokens),
        "gpus": case.world_size,
        "micro_batch": case.micro_batch or "",
        "recompute": "yes" if case.recompute else "",
        "chunk": case.chunk or "",
    }


def _compared(case: Case, part: str, model: float, counted: float) -> dict[str, Any]:
    return {**_described(case), "part": part, "predicted_bytes": round(model), "counted_bytes": counted}


def kept_records() -> list[dict[str, Any]]:
    """Towers and losses on a simulated GPU."""
    records = []
    for case in KEPT:
        counted, compute = kept(case, "cuda"), PRECISION_BYTES[case.precision]
        shape = Shape(case.rows, case.world_size, case.captions, case.student.embed_dim, case.chunk)
        text = text_tower(case.student, case.tokens).kept(compute, case.recompute)
        image = image_tower(case.student, compute).kept(compute, case.recompute)
        losses = predicted(case).loss - task_loss_working(shape)
        records += [
            _compared(case, "image tower", case.rows * image, counted.image),
            _compared(case, "text tower", case.rows * case.captions * text, counted.text),
            _compared(case, "losses", losses, counted.loss),
        ]
    return records


def alive_records() -> list[dict[str, Any]]:
    """Whole steps on the CPU, in fp32, where autocast on CPU and GPU differ least."""
    cases = [Case(**{**vars(case), "precision": "fp32"}) for case in ALIVE]
    return [_compared(case, "whole step", predicted(case).total_bytes, most_alive(case)) for case in cases]


def _difference(record: dict[str, Any]) -> float:
    return float(record["predicted_bytes"] / record["counted_bytes"] - 1)


def _label(record: dict[str, Any]) -> str:
    """A short name of a case."""
    teacher = f" from {record['teacher']}" if record["teacher"] else ""
    parts = [
        f"{record['student']}{teacher}",
        f"{record['images']} x {record['captions']} captions of {record['tokens']}",
    ]
    parts += [record["precision"], f"{record['gpus']} GPUs" if record["gpus"] > 1 else ""]
    parts += [f"{key.replace('_', '-')} {record[key]}" for key in ("micro_batch", "chunk") if record[key]]
    return ", ".join(filter(None, [*parts, "recomputed" if record["recompute"] else ""]))


def _table(title: str, records: Iterable[dict[str, Any]], note: str) -> TextTable:
    return TextTable(
        title=title,
        header=("", "Part", "Predicted, MB", "Counted, MB", "Difference"),
        rows=[
            (
                _label(record),
                record["part"],
                f"{record['predicted_bytes'] / MEGA:,.2f}",
                f"{record['counted_bytes'] / MEGA:,.2f}",
                percent(_difference(record)),
            )
            for record in records
        ],
        notes=(note,),
    )


def make() -> Result:
    """Compare the memory model with counted tensors, without a GPU."""
    towers, steps = kept_records(), alive_records()
    part, step = (percent(max(abs(_difference(record)) for record in records))[1:] for records in (towers, steps))
    return Result(
        name="memory",
        title="The memory model against counted tensors",
        findings=(
            (
                f"The memory kept for backward differs by at most {part} in any part; the peak of a whole step differs "
                f"by at most {step}."
            ),
            (
                "Nothing here was measured on a GPU. Tensors without memory follow a GPU's autocast rules and "
                "attention kernels."
            ),
        ),
        tables=(
            _table(
                "Kept for backward by one GPU, under DDP",
                towers,
                "Losses: including the features. Recomputed: blocks keep only their inputs.",
            ),
            _table(
                "Peak within a step of one process on a CPU",
                steps,
                "Weights, gradients, moments, teacher, batch, and all tensors that operators create.",
            ),
        ),
        records={"kept": towers, "alive": steps},
    )


if __name__ == "__main__":
    main(make)
