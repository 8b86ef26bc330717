"""How long a step waits for data, and how much slower it is than with batches that lie in memory.

`python -m benchmarks.data.waiting PHOTOS` writes docs/results/data_wait. It times the steps of two recipes on all
cores of this machine: the demo's links on the emoji sample, as the demo runs them and with a loader process, and the
first link of `cc3m_vit` at 224 pixels on the photographs of `benchmarks.data`. Blocks of steps with the loader and with
batches in memory alternate. The first needs data/emoji (`compt data emoji`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import IDLE_LOAD, Result, one_line, show, write
from benchmarks.data.process import cpu_seconds
from benchmarks.data.study import OUT, installed
from compt.bench.step import Setup, TrainingStep
from compt.bench.throughput import device_name
from compt.data.batch import Batch
from compt.data.index import open_index
from compt.data.loaders import train_loader
from compt.data.mixture import open_training
from compt.errors import RunError
from compt.plan.jobs import make_plan
from compt.recipe.read import find_recipe, load_recipe
from compt.text import TextTable

SETTLING = 8
"""Steps of a block before the measured ones: the loader's queues were full, or fill, while the others ran."""
PHOTOGRAPHS = (
    "data.captions=1",
    "data.caption_tokens=null",
    "optimizer.batch=32",
    "optimizer.precision=fp32",
    "engine.device=cpu",
    "engine.workers=1",
)
"""What the paper's recipe needs to run on a CPU with photographs that have one caption."""
GOAL = 0.03
"""Share of a step that may be spent waiting for data."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Links of a recipe, and where its shards are. decoders: each is tried."""

    recipe: str
    links: int
    decoders: Sequence[str]
    shards: str | None = None
    settings: Sequence[str] = ()


def _timed(step: TrainingStep, batches: Iterator[Batch], steps: int) -> Row:
    """Seconds and waits of `steps` steps after `SETTLING` others, and the CPU seconds of the loader's workers."""
    for _ in range(SETTLING):
        step(next(batches))
    waited, cpu, started = 0.0, cpu_seconds(own=False), time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    seconds = time.perf_counter() - started
    return {"steps": steps, "seconds": seconds, "waited": waited, "loader_cpu": cpu_seconds(own=False) - cpu}


def measure(case: Case, repeats: int, seconds: float) -> Iterator[Row]:
    """One row for each link, decoder, repeat and source of batches."""
    recipe = load_recipe(find_recipe(case.recipe), case.settings)
    index = open_index(case.shards, Path()) if case.shards else open_training(recipe.data, Path())
    for job, decoder in itertools.product(make_plan(recipe).links[: case.links], case.decoders):
        step = TrainingStep(Setup.of_job(job, recipe, Path()), torch.device("cpu"))
        engine = step.setup.engine
        loader = train_loader(
            index,
            seed=recipe.seed,
            batch=recipe.optimizer.batch,
            image_size=job.spec.image_size,
            captions=recipe.data.captions,
            context_length=job.spec.context_length,
            crop_scale=recipe.data.crop_scale,
            crop_ratio=recipe.data.crop_ratio,
            augment=recipe.data.augment,
            decoder=decoder,
            window=recipe.data.shuffle_shards,
            start_step=0,
            total_steps=1 << 40,
            workers=engine.workers,
            cache=engine.cache,
        )
        loaded = iter(loader)
        # After an epoch the cache holds all images, as in most of a run.
        first = len(index) // recipe.optimizer.batch + 1 if engine.cache else SETTLING
        held = [next(loaded) for _ in range(first)][:SETTLING]
        steps = max(2, round(seconds / median(step.seconds(held[0], warm_up=2))))
        sources = {"loader": loaded, "memory": itertools.cycle(held)}
        for repeat in range(repeats):
            for source in sorted(sources, reverse=bool(repeat % 2)):
                found = _timed(step, sources[source], steps)
                about = {"recipe": case.recipe, "model": job.spec.name, "workers": engine.workers, "decoder": decoder}
                yield {**about, "repeat": repeat, "source": source, **found}
        del step, loader, loaded, sources  # ends the workers
        gc.collect()


def table(rows: Sequence[Row], cores: int) -> tuple[TextTable, list[str]]:
    """Wait, slowdown, and the share of the CPU that the loader's workers take; and what the goals say of them."""
    body, said = [], []
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["model"], row["workers"], row["decoder"]), []).append(row)
    worst: dict[bool, tuple[float, float]] = {}
    for (recipe, model, workers, decoder), found in groups.items():
        pairs = [
            [next(row for row in found if (row["repeat"], row["source"]) == (repeat, source)) for source in _SOURCES]
            for repeat in sorted({row["repeat"] for row in found})
        ]
        wait = median(loaded["waited"] / loaded["seconds"] for loaded, _ in pairs)
        slower = median(loaded["seconds"] / held["seconds"] for loaded, held in pairs) - 1
        share = median(loaded["loader_cpu"] / (cores * loaded["seconds"]) for loaded, _ in pairs)
        step = median(held["seconds"] / held["steps"] for _, held in pairs)
        before = worst.get(workers > 0, (wait, slower))
        worst[workers > 0] = (max(before[0], wait), max(before[1], slower))
        body.append(
            (
                recipe,
                model,
                str(workers),
                decoder,
                f"{1000 * step:,.0f}",
                f"{wait:.2%}",
                f"{slower:+.1%}",
                f"{share:.1%}",
            )
        )
    for own in sorted(worst, reverse=True):
        how = "with a loader process" if own else "without one"
        wait, slower = worst[own]
        said.append(
            f"A step {how} waits for data for at most {wait:.2%} of its time; the goal is {GOAL:.0%}. It is at most "
            f"{slower:.1%} slower than one with batches in memory."
        )
    header = ("Recipe", "Link", "Workers", "Decoder", "Step, ms", "Wait", "Slower by", "Loader's CPU")
    notes = (
        "Step: with batches in memory. Wait: share of a step's time with the loader.",
        "Slower by: a step with the loader against one with batches in memory.",
        "Loader's CPU: share of all cores that its workers take. The demo itself has none; its images stay in memory.",
    )
    return TextTable("Steps with the loader, and with batches in memory", header, body, notes, left=4), said


_SOURCES = ("loader", "memory")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of tars from benchmarks.data.photos")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of blocks (default: 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of a block (default: 10)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: the committed one)")
    options = parser.parse_args(argv)
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    cases = (
        Case("demo", 3, ("pillow",)),
        Case("demo", 3, ("pillow",), settings=("engine.workers=1",)),
        Case("cc3m_vit", 1, ("pillow", "torch"), str(options.photos.resolve() / "*.tar"), PHOTOGRAPHS),
    )
    with one_line():
        if not list(Path("data/emoji/train").glob("*.tar")):
            raise RunError("data/emoji is missing: `compt data emoji` makes it")
        rows = []
        for case in cases:
            for row in measure(case, options.repeats, options.seconds):
                print("{recipe} {model} {decoder} {repeat} {source} {seconds:.1f} s".format(**row), file=sys.stderr)
                rows.append(row)
        found, said = table(rows, cores)
        about: Row = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": " ".join(["python -m benchmarks.data.waiting", *(sys.argv[1:] if argv is None else argv)]),
            "device": device_name(torch.device("cpu")),
            "cores": cores,
            "load_average": load,
            "system": platform.platform(),
            **installed(),
        }
        if load > IDLE_LOAD:
            said.append(f"The machine was not idle: its load average was {load:.1f} at the start.")
        said.append(
            f"Measured on {cores} cores of {about['device']}, {about['date'][:10]}, torch {about['torch']}, seed 0: "
            f"`{about['command']}`."
        )
        records = {"about": [about], "steps": rows}
        result = Result("data_wait", "Waiting for data", tables=(found,), records=records, findings=tuple(said))
        place = write(result, options.out)
        show(result)
    print(f"written: {place}")


if __name__ == "__main__":
    main()
