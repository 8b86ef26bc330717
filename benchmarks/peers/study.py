"""Time the training step of compt beside those of its peers, interleaved in one process: `python -m benchmarks.peers`.

Every model is timed alone and as a link, with the model before it as its teacher. All sides start from the same
weights and take the same batch; before anything is timed, the losses of their first two steps have to agree. A round
runs one step of every side in turn. A ratio is of two steps of the same round. Results go to docs/results/peers.

On a CPU, small models in fp32 on one thread; on a GPU, the paper's in bf16.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from benchmarks.common import IDLE_LOAD, Result, one_line, show, write
from benchmarks.peers.sides import PEERS, SEED, Captions, Case, Clock, Own, Side
from compt.bench.throughput import device_name, peak_flops
from compt.cost.training import exact_breakdown
from compt.dist import collectives as dist
from compt.engines.base import Precision
from compt.errors import ConfigError, RunError
from compt.models.clip import caption_lengths
from compt.models.presets import resolve
from compt.recipe.engine import EngineConfig, changed_engine
from compt.text import TextTable
from compt.weights.artefact import versions

OUT = Path("docs/results")
CAPTIONS = {
    "full": Captions("one, no padding", 1, 32, None),
    "cc3m": Captions("one, as in CC3M", 1, 77, (2.45, 0.35)),
    "dreamlip": Captions("four, as in DreamLIP", 4, 77, (3.1, 0.5)),
}
AIMS = {"full": 1.10, "cc3m": 3.2, "dreamlip": 4.2}
"""OpenCLIP's time over compt's that is aimed at on a CPU, both with fused AdamW."""
RIVAL = "OpenCLIP, fused AdamW"
CHAINS = {"cpu": ("vit_nano", "vit_micro", "vit_mini"), "cuda": ("vit_t16", "vit_s16", "vit_b16", "vit_l16")}
BATCH = 128
ROUNDS = {"cpu": 4, "cuda": 8}
WARM_UP = {"cpu": 0, "cuda": 3}
"""Steps of each side after the first two and before the first round."""
WAYS = {"cpu": ("text=packed",), "cuda": ("text=packed", "text=packed,compile=true")}
"""Settings of `engine` that compt is timed with. The ratios are to the first."""
TOLERANCES: dict[Precision, tuple[float, float]] = {"fp32": (1e-5, 1e-3), "bf16": (2e-2, 2e-2), "fp16": (5e-3, 5e-3)}
"""Largest relative difference of the losses of the first and the second step. AdamW turns rounding into steps."""

Row = dict[str, Any]


def engine_of(way: str) -> EngineConfig:
    """The settings of `engine` in `key=value,key=value`. Raises ConfigError for others."""
    pairs = [part.partition("=") for part in way.split(",")]
    try:
        return changed_engine(EngineConfig(), {key: yaml.safe_load(value) for key, _, value in pairs})
    except ValueError as error:
        raise ConfigError(f"--ways {way}: {error}") from None


def cases(models: Sequence[str], captions: Sequence[str], batch: int, precision: Precision) -> list[Case]:
    """Each model alone and, after the first, with the one before it as its teacher; for all captions."""
    found = []
    for kind in captions:
        context = {"context_length": CAPTIONS[kind].context}
        for teacher, student in zip((None, *models[:-1]), models, strict=True):
            spec = resolve(student, context)
            before = None
            if teacher is not None:
                # The peers have no projector, so teacher and student need one embedding width.
                before = resolve(teacher, {**context, "embed_dim": spec.embed_dim})
            ways = (None, before) if before else (None,)
            found += [Case(spec, one, CAPTIONS[kind], batch, precision) for one in ways]
    return found


def compare(case: Case, device: torch.device, ways: Sequence[str], rounds: int, peers: Sequence[str]) -> list[Row]:
    """Time a case: a row for every side, compt's first. Raises RunError where the losses differ."""
    data, weights = case.data(), case.weights()
    makers: dict[str, Callable[[], Side]] = {}
    for way in ways:
        makers[f"compt, {way}"] = lambda way=way: Own(case, data, device, weights, engine_of(way))  # type: ignore[misc]
    for name in peers:
        makers[name] = lambda name=name: PEERS[name](case, data, device, weights)  # type: ignore[misc]
    sides: dict[str, Side] = {}
    held, losses = {}, {}
    for name, make in makers.items():
        before = _allocated(device)
        sides[name] = make()
        losses[name] = [sides[name].run()[1] for _ in range(2)]
        held[name] = _allocated(device) - before
    check_losses(case, losses)
    for side in sides.values():
        for _ in range(WARM_UP[device.type]):
            side.run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            started = _allocated(device, fresh=True)
            seconds[name].append(sides[name].run()[0])
            peaks[name] = max(peaks[name], held[name] + _peak(device) - started)
    tokens = float(caption_lengths(data.tokens).float().mean())
    useful = exact_breakdown(
        case.student, case.teacher, batch=case.batch, captions=case.captions.each, tokens=tokens
    ).of_steps(1)
    return [
        {
            "model": case.student.name,
            "teacher": case.teacher.name if case.teacher else None,
            "captions": case.captions.title,
            "tokens": tokens,
            "batch": case.batch,
            "precision": case.precision,
            "side": name,
            "loss": losses[name][0],
            "seconds": times,
            "ratios": [other / own for other, own in zip(times, seconds[f"compt, {ways[0]}"], strict=True)],
            "flops_per_second": 2 * useful.sample_macs * case.batch / median(times),
            "memory_bytes": peaks[name] or None,
        }
        for name, times in seconds.items()
    ]


def check_losses(case: Case, losses: Mapping[str, Sequence[float]]) -> None:
    """Raise RunError unless the losses of the first steps agree, which also says that gradients and updates do."""
    first, *others = losses
    for at, most in enumerate(TOLERANCES[case.precision]):
        for name in others:
            one, other = losses[first][at], losses[name][at]
            if not abs(other - one) <= most * abs(one):
                raise RunError(
                    f"{case.name}, {case.captions.title}: the loss of step {at + 1} is {one:.7g} with {first} and "
                    f"{other:.7g} with {name}; they have to agree to {most:g}"
                )


def _allocated(device: torch.device, fresh: bool = False) -> int:
    """Bytes of tensors on a GPU, 0 on a CPU. `fresh`: their peak is counted from now on."""
    if device.type != "cuda":
        return 0
    if fresh:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def product_flops(device: torch.device) -> float:
    """FLOP/s of the fastest of a few large matrix products in fp32: the peak of a CPU, which has no datasheet here."""
    a, b, clock = torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device), Clock(device)
    times = []
    for _ in range(8):
        started = clock()
        _ = a @ b
        times.append(clock() - started)
    return float(2 * 1024**3 / min(times))


def _span(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(rows: Sequence[Row], peak: float | None, about: Mapping[str, Any]) -> TextTable:
    """A row of the table for each side of each case."""
    body, last = [], None
    for row in rows:
        key = (row["model"], row["teacher"], row["captions"])
        job = row["model"] + (f"<{row['teacher']}" if row["teacher"] else "")
        cells = ["", ""] if key == last else [job, row["captions"]]
        last = key
        share = f"{row['flops_per_second'] / peak:.0%}" if peak else "-"
        memory = f"{row['memory_bytes'] / 2**30:.2f}" if row["memory_bytes"] else "-"
        speed = f"{row['batch'] / median(row['seconds']):,.4g}"
        body.append([*cells, row["side"], speed, share, memory, _span(row["ratios"])])
    header = ["Job", "Captions", "Step of", "Samples/s", "MFU", "GiB", "Time over compt's"]
    notes = [
        "model<teacher: a link, with the teacher's forward pass. Time: median (least to most) of the rounds.",
        "MFU: FLOPs that a step without padding needs, for every side, over " + str(about["peak"]) + ".",
        "GiB: a GPU's peak. OpenCLIP has AdamW unfused; it averages its loss over the captions of an image.",
    ]
    return TextTable("A training step beside its peers", header, body, notes, left=3)


def findings(rows: Sequence[Row], device: torch.device) -> list[str]:
    """OpenCLIP's time over compt's for each kind of captions, of models alone, beside the aims for a CPU."""
    said = []
    for kind, captions in CAPTIONS.items():
        found = [
            median(row["ratios"])
            for row in rows
            if (row["captions"], row["side"], row["teacher"]) == (captions.title, RIVAL, None)
        ]
        if found:
            aim = f"; the aim is {AIMS[kind]:.2f}" if device.type == "cpu" else ""
            said.append(
                f"Captions {captions.title}: a step of OpenCLIP takes {min(found):.2f} to {max(found):.2f} times as "
                f"long as compt's, both with fused AdamW{aim}."
            )
    return said


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="a chain of presets (default: by device)")
    parser.add_argument("--captions", nargs="+", choices=CAPTIONS, default=list(CAPTIONS))
    parser.add_argument("--ways", nargs="+", metavar="KEY=VALUE,...", help="engine settings of compt")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=tuple(TOLERANCES), help="default: fp32, on a GPU bf16")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step (default: 128)")
    parser.add_argument("--rounds", type=int, help="steps of each side (default: 4, on a GPU 8)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: the committed one)")
    given = parser.parse_args(argv)
    load = os.getloadavg()[0]
    with one_line():
        device = dist.init(given.device)
        kind = device.type
        if kind == "cpu":
            torch.set_num_threads(1)
        precision: Precision = given.precision or ("fp32" if kind == "cpu" else "bf16")
        ways = given.ways or WAYS[kind]
        for way in ways:
            engine_of(way)
        rows: list[Row] = []
        for case in cases(given.models or CHAINS[kind], given.captions, given.batch, precision):
            print(f"{datetime.now(UTC):%H:%M:%S} {case.name}, {case.captions.title}", file=sys.stderr, flush=True)
            rows += compare(case, device, ways, given.rounds or ROUNDS[kind], given.peers)
            gc.collect()
        peak = product_flops(device) if kind == "cpu" else peak_flops(device, precision)
        words = f"{peak / 1e9:,.0f} GFLOP/s" if peak else "an unknown peak"
        about: Row = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": " ".join(["python -m benchmarks.peers", *(sys.argv[1:] if argv is None else argv)]),
            "seed": SEED,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "peak": f"{words} of {'a large fp32 product on one thread' if kind == 'cpu' else 'the datasheet'}",
            "load_average": load,
            "system": platform.platform(),
            **versions(),
        }
        said = findings(rows, device)
        if kind == "cpu" and load > IDLE_LOAD:
            said.append(
                f"The machine was not idle: its load average was {load:.1f} at the start. Ratios are of CPU time of "
                "the same round; the samples per second are too few."
            )
        said.append(
            f"Measured on {about['device']}, {about['date'][:10]}, {precision}, torch {about['torch']}, open_clip "
            f"{about['open_clip']}: `{about['command']}`, seed {SEED}."
        )
        result = Result(
            "peers",
            "A training step beside those of OpenCLIP and of the paper's settings",
            tables=(table(rows, peak, about),),
            records={"about": [about], "steps": rows},
            findings=tuple(said),
        )
        place = write(result, given.out)
        show(result)
    print(f"written: {place}")


if __name__ == "__main__":
    main()
