"""Count the bytes that each engine holds on a rank, and compare them with `compt.cost.memory`.

`python -m benchmarks.engines.memory` writes docs/results/engines/memory.json and a table of docs/engines.md. It runs in
fp32 on CPU processes, with the DeepSpeed settings of `ds_configs`.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.common import one_line
from benchmarks.engines.cells import ENGINES, WORLDS
from benchmarks.engines.page import OUT, PAGE, about, write_results
from benchmarks.paper.counting import Storages
from compt.cost.memory import held_bytes
from compt.dist import collectives as dist
from compt.engines.base import Engine, in_groups
from compt.engines.open import open_engine
from compt.engines.shards import reshard, shard_frozen
from compt.models.clip import ClipModel, build
from compt.models.presets import ModelSpec, resolve
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.text import TextTable, terminal
from compt.train.accumulate import cached_backward
from compt.train.task import DistillTask

FILE = "memory.json"
PAIRS: dict[str, tuple[ModelSpec, ModelSpec]] = {
    "vit": (
        resolve("vit_mini", {"vocab_size": 8192}),
        resolve("vit_micro", {"vocab_size": 8192, "embed_dim": 96}),
    ),
    "swin": (
        resolve("swin_t", {"vocab_size": 8192}),
        resolve("vit_t16", {"vocab_size": 8192, "embed_dim": 192}),
    ),
}
"""Student and teacher. Their embedding widths differ, so that there are projectors."""
ROWS = 2
PARTS = ("weights", "gradients", "optimizer", "communication", "teacher")
_NOTE = """{:.1f} M parameters in fp32, at the end of a backward pass, after blocks are resharded. In brackets: what
compt.cost.memory predicts. Of ddp: weights, gradients and optimizer, relative to ddp. Communication: DeepSpeed's
buckets, whose size is a setting and does not depend on the model. With zero1 and zero2 a rank holds the whole gradient
of each tensor that its slice touches, and the counts equal exactly these; for parts outside the slice, the prediction
includes only the embedding's."""
TOLERANCE = 0.01
"""Largest relative difference of a part from its prediction: padding makes shards equal in size."""


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parameters(module: nn.Module) -> list[Tensor]:
    """This rank's part of a module's parameters: slices, or whole tensors."""
    found = []
    for parameter in module.parameters():
        found.append(_local(parameter.detach()))
        if hasattr(parameter, "ds_tensor"):
            found.append(parameter.ds_tensor)
    return found


def _optimizer(engine: Any) -> list[Tensor]:
    """Moments, and the tensors that the optimizer updates."""
    found = [value for state in engine.optimizer.state.values() for value in state.values()]
    if hasattr(engine, "_parts"):
        found += [master.detach() for master in engine._parts.masters]
    return found + [parameter.detach() for group in engine.optimizer.param_groups for parameter in group["params"]]


def _gradients(engine: Any) -> list[Tensor]:
    found = [_local(parameter.grad) for parameter in engine.unwrapped.parameters() if parameter.grad is not None]
    zero: Any = getattr(engine, "_zero", None)
    if getattr(engine, "stage", 0) in (1, 2):
        found += [piece for pieces in zero.averaged_gradients.values() if pieces for piece in pieces]
    elif getattr(engine, "stage", 0) == 3:
        found.append(zero.grad_partitions_flat_buffer)
    return found


def _watch_buckets(engine: Any) -> list[int]:
    """Record the bytes of DeepSpeed's gradient buckets in each backward; stages 1 and 2 free them at its end."""
    noted = [0]
    if getattr(engine, "stage", 0) == 0:
        return noted
    zero = engine._zero

    def note() -> None:
        held = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        tensors = [tensor for buffer in held for tensor in (buffer if isinstance(buffer, list) else [buffer])]
        noted.append(_bytes(Storages(()), [tensor for tensor in tensors if tensor is not None]))

    if engine.stage == 3:
        note()
        return noted
    original = zero.setup_buckets

    def watched() -> None:
        original()
        note()

    zero.setup_buckets = watched
    return noted


def _bytes(known: Storages, tensors: Iterable[Tensor]) -> int:
    before = known.bytes
    for tensor in tensors:
        known.add(tensor)
    return known.bytes - before


_TENSORS = (Tensor, nn.Parameter, DTensor)


def _living() -> list[Tensor]:
    gc.collect()
    return [_local(found) for found in gc.get_objects() if type(found) in _TENSORS and not found.is_meta]


def _batch(student: ModelSpec) -> tuple[Tensor, Tensor]:
    images = torch.randn(ROWS, 3, student.image_size, student.image_size)
    tokens = torch.randint(1, 8000, (ROWS, 1, 8))
    tokens[..., -1] = student.vocab_size - 1
    return images, tokens


def count(cells: Sequence[tuple[str, str, bool]]) -> list[dict[str, int]]:
    """Bytes of each part on this rank, for each (pair, engine, sharded teacher). All ranks must call it."""
    return [_count(*PAIRS[pair], name, shared) for pair, name, shared in cells]


def _count(student: ModelSpec, teacher_spec: ModelSpec, name: str, shard_teacher: bool) -> dict[str, int]:
    device = torch.device("cpu")
    weights = {key: value.detach() for key, value in build(student, seed=0).state_dict().items()}
    frozen = {key: value.detach() for key, value in build(teacher_spec, seed=1).state_dict().items()}
    # Before the engine, and so not by `build_training`: the DeviceMesh of a sharded teacher holds the numbers of its
    # ranks, which would count as the engine's.
    if shard_teacher:
        teacher = shard_frozen(build(teacher_spec, device="meta"), frozen, dtype=torch.float32, device=device)
    else:
        teacher = build(teacher_spec, seed=1)
    task = DistillTask(build(student, device="meta"), teacher)
    batch = _batch(student)
    before = Storages([*_living(), *weights.values(), *frozen.values(), *batch])
    engine = open_engine(
        task.module,
        EngineConfig(name=name, device="cpu"),
        Optimizer(batch=ROWS * dist.world_size(), precision="fp32"),
        device=device,
        initial=task.module.initial(weights),
    )
    noted = _watch_buckets(engine)
    # Count after a second backward: the moments exist only after a step.
    cached_backward(task, engine, *batch)
    engine.step(1e-3)
    cached_backward(task, engine, *batch)
    return {
        **engine_bytes(engine, before.tensors),
        "communication": max(noted),
        "teacher": _bytes(Storages(()), _teacher(task.teacher)),
    }


def _teacher(teacher: ClipModel) -> list[Tensor]:
    reshard(teacher)
    return [*_parameters(teacher), *teacher.buffers()]


def engine_bytes(engine: Engine, before: Iterable[Tensor]) -> dict[str, int]:
    """Bytes after a backward and before the step, when a rank holds most. `other` belongs to no known part."""
    if type(engine).__name__ == "ShardedEngine":
        reshard(cast(Any, engine)._root)
    known = Storages(before)
    found = {
        "weights": _bytes(known, _parameters(engine.unwrapped)),
        "optimizer": _bytes(known, _optimizer(engine)),
        "gradients": _bytes(known, _gradients(engine)),
    }
    masks = _bytes(known, engine.unwrapped.buffers())
    for bucket in getattr(getattr(engine, "_zero", None), "ipg_buckets", {}).values():
        _bytes(known, bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer])
    return {**found, "masks": masks, "other": _bytes(known, _living())}


def run(world: int, engines: Sequence[str] = ENGINES, pairs: Iterable[str] = PAIRS) -> list[dict[str, Any]]:
    """Count and predict each engine with a whole and a sharded teacher, on the rank that holds most."""
    from tests.dist.spawn import run_ranks

    wanted = [(pair, name, shared) for pair in pairs for name in engines for shared in (False, True)]
    ranks = run_ranks(count, world, wanted, timeout=1800)
    records = []
    for (pair, name, shared), found in zip(wanted, zip(*ranks, strict=True), strict=True):
        predicted = held_bytes(
            *PAIRS[pair],
            engine=name,
            world_size=world,
            precision="fp32",
            shard_teacher=shared,
        )
        counted = {part: max(one[part] for one in found) for part in (*PARTS, "other")}
        records.append(
            {
                "models": pair,
                "engine": name,
                "world_size": world,
                "shard_teacher": shared,
                "counted_bytes": counted,
                "predicted_bytes": {part: round(getattr(predicted, part)) for part in PARTS},
            }
        )
    return records


@cache
def _touched(pair: str, world: int) -> float:
    """Bytes of gradients on the rank that holds most under zero1 and zero2: every tensor that its slices touch, whole.

    ZeRO concatenates each parameter group and cuts it into equal slices.
    """
    task = DistillTask(*(build(spec, device="meta") for spec in PAIRS[pair]))
    kept = [0] * world
    tensors = dict(task.module.named_parameters())
    for names in in_groups(tensors).values():
        ends = list(accumulate((tensors[name].numel() for name in names), initial=0))
        share = -(-ends[-1] // world)
        for start, end in pairwise(ends):
            for rank in range(start // share, -(-end // share)):
                kept[rank] += end - start
    return 4.0 * max(kept)


def misses(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each part whose count differs too much from its prediction.

    Gradients of zero1 and zero2 must equal the tensors that slices touch; the prediction must not be larger.
    """
    found = []
    for record, part in product(records, PARTS):
        counted, predicted = float(record["counted_bytes"][part]), float(record["predicted_bytes"][part])
        exact, allowed = predicted, TOLERANCE * max(predicted, 1.0)
        if part == "gradients" and record["engine"] in ("zero1", "zero2"):
            exact = _touched(record["models"], record["world_size"])
        if abs(counted - exact) > allowed or predicted > counted + allowed:
            text = f"{record['models']}, {record['engine']} on {record['world_size']}: {part}"
            missed = exact if abs(counted - exact) > allowed else predicted
            found.append(f"{text} counted {counted:,.0f}, predicted {missed:,.0f} bytes")
    return found


def tables(results: Mapping[str, Any]) -> list[TextTable]:
    """One table for each pair of models: engines and processes in rows, parts in columns."""
    return [_table(pair, [one for one in results["records"] if one["models"] == pair]) for pair in PAIRS]


def _table(pair: str, records: Sequence[Mapping[str, Any]]) -> TextTable:
    def shown(record: Mapping[str, Any], part: str) -> str:
        return f"{record['counted_bytes'][part] / 1e6:.2f} ({record['predicted_bytes'][part] / 1e6:.2f})"

    whole = [record for record in records if not record["shard_teacher"]]
    shared = [record for record in records if record["shard_teacher"]]
    base = {
        record["world_size"]: sum(record["counted_bytes"][part] for part in ("weights", "gradients", "optimizer"))
        for record in whole
        if record["engine"] == "ddp"
    }
    rows = []
    for record, other in zip(whole, shared, strict=True):
        own = sum(record["counted_bytes"][part] for part in ("weights", "gradients", "optimizer"))
        rows.append(
            (
                record["engine"],
                str(record["world_size"]),
                *(shown(record, part) for part in PARTS),
                shown(other, "teacher"),
                f"{100 * own / base[record['world_size']]:.0f}" if record["world_size"] in base else "-",
            )
        )
    header = ("Engine", "Processes", *(part.capitalize() for part in PARTS), "Sharded teacher", "Of ddp, %")
    student, teacher = PAIRS[pair]
    count = sum(parameter.numel() for parameter in build(student, device="meta").parameters())
    note = " ".join(_NOTE.format(count / 1e6).split())
    return TextTable(
        f"Megabytes per rank, student {student.name}, teacher {teacher.name}: counted and predicted",
        header,
        rows,
        (note,),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Count, compare and write. Exit code 1 if a prediction is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, choices=WORLDS, default=WORLDS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the JSON (default: the committed one)")
    options = parser.parse_args(argv)
    with one_line():
        records = [record for world in options.worlds for record in run(world, options.engines)]
        results = {**about(), "tolerance": TOLERANCE, "records": records}
        made = tables(results)
        for table in made:
            terminal().print(table)
        if set(options.worlds) == set(WORLDS) and set(options.engines) == set(ENGINES):
            page = PAGE if options.out == OUT else None
            print(f"written: {write_results(FILE, results, made, options.out, page)}")
    found = misses(records)
    print("\n".join(found) or "every part agrees with its prediction")
    for record in records:
        print(
            record["models"], record["engine"], record["world_size"], "other bytes:", record["counted_bytes"]["other"]
        )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
