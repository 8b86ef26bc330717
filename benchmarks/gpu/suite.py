"""Check correctness and measure speed on this GPU within a few minutes: `python -m benchmarks.gpu.suite`.

It runs the checks of `benchmarks.gpu.checks`. Then it times the training step beside those of OpenCLIP and of the
paper's settings (`benchmarks.peers`). Then it measures throughput and MFU of the presets, each alone (a baseline) and
with a teacher (a link); the paper's models come before variants of one of them. It writes every result at once, and a
second call continues. Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.checks.table import CHECKS, run_check
from benchmarks.gpu.worker import Worker, WorkerError, WorkerTimeout
from compt.bench.step import Setup
from compt.bench.throughput import device_name, measure, new_file, peak_flops
from compt.cli.bench import CHAINS, MOST
from compt.cost.memory import memory_per_gpu
from compt.cost.speed import Measurement
from compt.cost.training import exact_breakdown
from compt.dist import collectives as dist
from compt.engines.base import Precision
from compt.errors import ComptError, ConfigError, nearest
from compt.files import write_json
from compt.models.presets import PRESETS
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.text import TextTable, terminal
from compt.weights.artefact import versions

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("runs/gpu_suite.json")
SOURCES = (
    "compt/**/*.py",
    "compt/ds_configs/*.json",
    "benchmarks/gpu/**/*.py",
    "benchmarks/common.py",
    "benchmarks/paper/counting.py",
    "benchmarks/peers/*.py",
    "launchers/train.py",
    "tests/helpers/recipe.py",
    "tests/helpers/shards.py",
)
"""The source of the checks and of what they run. A check is repeated when one of these files has changed."""
BUDGET = 480.0
STEP_SECONDS = 0.6
"""Expected seconds of a timed step. The batch is as large as this allows, up to `LARGEST`."""
GUESSED_PEAK, GUESSED_SHARE = 100e12, 0.25
LARGEST = 512
LEAST = {"check": 15.0, "peers": 40.0, "speed": 10.0}
"""No item starts with fewer seconds left than this."""
SPEED_SECONDS, PEERS_SECONDS = 75.0, 150.0
PEERS_WAYS = ("text=packed", "text=buckets", "text=packed,compile=true")
VARIANTS: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "graphs": {"graphs": "on", "text": "packed"},
    "recomputed": {"recompute": True},
    "fsdp2": {"name": "fsdp2"},
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3"},
    "fp16": {"precision": "fp16"},
}
OF_VARIANTS = "vit_b16"
PEERS = (("vit_t16",), ("vit_t16", "vit_s16"), ("vit_s16", "vit_b16"), ("vit_b16", "vit_l16"))
"""What is compared with peers: the links of the paper's first chain."""


@dataclass(frozen=True)
class Item:
    """A check, a comparison with peers, or a measurement of the speed of `setup`.

    `models` are a student alone, or a teacher and its student. Items with the same `process` share a process.
    """

    name: str
    process: str
    seconds: float
    setup: Setup | None = None
    search: bool = False
    models: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`check`, `peers` or `speed`."""
        return self.name.partition("/")[0]


@dataclass
class State:
    """The results file. It holds records of any device and version, and uses those of this machine and source."""

    path: Path
    stamp: dict[str, Any]
    source: str
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, stamp: dict[str, Any], fresh: Collection[str] = ()) -> State:
        """Without this machine's records of the items `fresh`.

        Raises ConfigError for a file that this program did not write, or a folder that cannot be made.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # the log beside it comes before the first result
        except OSError as error:
            raise ConfigError(f"--out {path}: its folder cannot be made ({error.strerror})") from None
        state = cls(path, stamp, source_hash())
        if path.exists():
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
                records = [dict(record) for record in value["gpu_suite"]]
                state.records = [one for one in records if one["name"] not in fresh or not state.is_here(one)]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}: not a results file of the suite ({error}); name another") from None
        return state

    def is_here(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this machine."""
        return all(record.get(key) == value for key, value in self.stamp.items())

    def find(self, item: Item) -> dict[str, Any] | None:
        """The record of an item for this machine. Checks and errors count with this source alone, others with any."""

        def answers(record: dict[str, Any]) -> bool:
            measured = item.kind != "check" and "error" not in record
            current = measured or record["source"] == self.source
            return bool(record["name"] == item.name and self.is_here(record) and current)

        return next(filter(answers, reversed(self.records)), None)

    def put(self, item: Item, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
        """Add a result and write the file."""
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        record = {"name": item.name, **self.stamp, "source": self.source, "date": date, "seconds": round(seconds, 1)}
        self.records.append({**record, **found})
        write_json(self.path, {"gpu_suite": self.records})
        return self.records[-1]


def source_hash() -> str:
    """Of `SOURCES`: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def setup_of(student: str, teacher: str | None = None, precision: Precision = "bf16", **engine: Any) -> Setup:
    """The job of a preset as recipes train it, with captions of full length. `engine` are fields of the engine."""
    return Setup(
        student=PRESETS[student],
        teacher=PRESETS[teacher] if teacher else None,
        optimizer=Optimizer(precision=precision),
        engine=EngineConfig(**{"text_buckets": 4, **engine}),
    )


def all_items() -> list[Item]:
    """All items, the most important first."""
    items = [Item(f"check/{name}", check.process, check.seconds) for name, check in CHECKS.items()]

    def speed(name: str, setup: Setup, search: bool = False, process: str = "plain") -> Item:
        return Item(f"speed/{name}", process, SPEED_SECONDS, setup, search)

    pairs = [list(zip(chain, (None, *chain[:-1]), strict=True)) for chain in CHAINS]
    small, vit, swin, large = pairs
    items += [Item(f"peers/{'<'.join(reversed(one))}", "peers", PEERS_SECONDS, models=one) for one in PEERS]
    for student, teacher in (*vit, *swin):
        items.append(speed(student, setup_of(student)))
        if teacher:
            items.append(speed(f"{student}<{teacher}", setup_of(student, teacher)))
    for name, other in VARIANTS.items():
        process = "deepspeed" if name.startswith("zero") else "sharded" if name == "fsdp2" else "plain"
        items.append(speed(f"{OF_VARIANTS}+{name}", setup_of(OF_VARIANTS, **other), process=process))
    items.append(speed(f"{OF_VARIANTS}+largest", setup_of(OF_VARIANTS), search=True))
    for student, teacher in (*large, *small):
        items.append(speed(student, setup_of(student)))
        if teacher:
            items.append(speed(f"{student}<{teacher}", setup_of(student, teacher)))
    return items


def batch_for(setup: Setup, device: torch.device) -> int:
    """The batch: a power of two whose step should take about `STEP_SECONDS` and fit into memory. 4 on a CPU."""
    if device.type == "cpu":
        return 4
    peak = peak_flops(device, setup.optimizer.precision) or GUESSED_PEAK
    memory = 0.85 * torch.cuda.mem_get_info(device)[1]
    batch = LARGEST
    while batch > 1:
        cost = exact_breakdown(
            setup.student, setup.teacher, batch=batch, captions=setup.captions, tokens=setup.tokens
        ).of_steps(1)
        needed = memory_per_gpu(
            setup.student,
            setup.teacher,
            engine=setup.engine.name,
            world_size=1,
            batch=batch,
            captions=setup.captions,
            tokens=setup.tokens,
            precision=setup.optimizer.precision,
            recompute=setup.engine.recompute,
        )
        seconds = 2 * cost.sample_macs * batch / (peak * GUESSED_SHARE)
        if seconds <= STEP_SECONDS and needed.total_bytes <= memory:
            break
        batch //= 2
    return batch


def measure_speed(setup: Setup, device: str, batch: int | None, search: bool, seconds: float) -> dict[str, Any]:
    """A measurement as plain values. Halves a batch that does not fit. Runs in the worker."""
    chosen = dist.init(device)
    gc.collect()
    if chosen.type == "cuda":
        torch.cuda.empty_cache()
    size = None if search else batch or batch_for(setup, chosen)
    found = measure(setup, chosen, size, MOST[chosen.type], seconds)
    while found.failure and size and size > 1 and batch is None:
        size //= 2
        found = measure(setup, chosen, size, size, seconds)
    return found.model_dump(mode="json")


def compare_peers(models: tuple[str, ...], device: str, batch: int | None) -> list[dict[str, Any]]:
    """The rows of `benchmarks.peers` for a job, with four captions as in DreamLIP. Runs in the worker."""
    from benchmarks.peers.sides import PEERS as OTHERS
    from benchmarks.peers.study import BATCH, ROUNDS, cases, compare

    chosen = dist.init(device)
    case = cases(models, ["dreamlip"], batch or (4 if chosen.type == "cpu" else BATCH), "bf16")[-1]
    ways = PEERS_WAYS if chosen.type == "cuda" else PEERS_WAYS[:2]
    return compare(case, chosen, ways, ROUNDS[chosen.type], list(OTHERS))


def check(name: str, device: str) -> list[dict[str, Any]]:
    """The findings of a check as plain values. Runs in the worker."""
    dist.init(device)
    return [{**asdict(finding), "passed": finding.passed} for finding in run_check(name, device)]


@dataclass(frozen=True)
class Options:
    """Runs items. If `batch` is None, `batch_for` chooses it."""

    device: str
    budget: float
    batch: int | None = None
    seconds: float = 1.0


def run_item(item: Item, worker: Worker, options: Options, limit: float) -> dict[str, Any]:
    """What is to be recorded of an item. Raises WorkerTimeout after `limit` seconds."""
    try:
        if item.setup is not None:
            arguments = (item.setup, options.device, options.batch, item.search, options.seconds)
            return {"measurement": worker.run(measure_speed, *arguments, seconds=limit)}
        if item.models:
            return {"rows": worker.run(compare_peers, item.models, options.device, options.batch, seconds=limit)}
        findings = worker.run(check, item.name.removeprefix("check/"), options.device, seconds=limit)
        return {"passed": all(finding["passed"] for finding in findings), "findings": findings}
    except WorkerTimeout:
        raise
    except WorkerError as error:
        return {"error": str(error)} | ({"passed": False} if item.kind == "check" else {})


def run(
    items: Sequence[Item], state: State, options: Options, say: Callable[[Item, dict[str, Any], bool], None]
) -> list[Item]:
    """Run items without a record until the budget ends; returns the items that are left."""
    started = time.monotonic()
    worker, process, left = Worker(state.path.with_suffix(".log")), "", []
    try:
        for item in items:
            known = state.find(item)
            if known is not None:
                say(item, known, True)
                continue
            rest = options.budget - (time.monotonic() - started)
            if rest < LEAST[item.kind]:
                left.append(item)
                continue
            if item.process != process:
                worker.stop()
                process = item.process
            begun = time.monotonic()
            try:
                found = run_item(item, worker, options, min(item.seconds, rest))
            except WorkerTimeout as error:
                if rest < item.seconds:  # more time may do
                    left.append(item)
                    continue
                found = {"error": str(error)} | ({"passed": False} if item.kind == "check" else {})
            say(item, state.put(item, time.monotonic() - begun, found), False)
    finally:
        worker.stop()
    return left


def worst(record: dict[str, Any]) -> str:
    """Describe the finding that failed, or the one nearest to its limit."""
    if "error" in record:
        return str(record["error"])
    findings = record["findings"]
    if not findings:
        return "nothing to check here"

    def nearness(finding: dict[str, Any]) -> float:
        most = finding["most"]
        share = abs(finding["value"] / most) if 0 < most < float("inf") else 0.0
        return share if finding["passed"] else float("inf")

    found = max(findings, key=nearness)
    limits = f"at most {found['most']:.3g}" + (f", at least {found['least']:.3g}" if found["least"] > -1e300 else "")
    return f"{found['what']} {found['value']:.3g} ({limits})"


def check_table(records: Sequence[dict[str, Any]], device: str) -> TextTable:
    """One row per check."""
    rows = [
        [
            record["name"].removeprefix("check/"),
            "passed" if record["passed"] else "FAILED",
            worst(record),
            f"{record['seconds']:.0f} s",
        ]
        for record in records
    ]
    return TextTable(
        f"Correctness on {device}", ["Check", "Result", "What failed, or came nearest to failing", "Time"], rows, []
    )


def speed_table(records: Sequence[dict[str, Any]], device: str, source: str) -> TextTable:
    """One row per measurement."""
    rows, old = [], False
    for record in records:
        name = record["name"].removeprefix("speed/")
        if record["source"] != source:
            name, old = f"{name} *", True
        if "error" in record:
            rows.append([name, "-", record["error"], "-", "-"])
            continue
        entry = Measurement.model_validate(record["measurement"])
        if entry.seconds_per_sample is None:
            rows.append([name, "-", str(entry.failure), "-", "-"])
            continue
        memory = "-" if entry.peak_memory_bytes is None else f"{entry.peak_memory_bytes / 2**30:.1f} GiB"
        mfu = "-" if entry.mfu is None else f"{entry.mfu:.1%}"
        rows.append([name, str(entry.batch), f"{1 / entry.seconds_per_sample:,.4g}", memory, mfu])
    notes = [
        "model<teacher: a link, with the forward pass of its teacher. bf16, 4 captions of the whole context an image."
    ]
    notes += ["*: measured with an earlier state of the source."] if old else []
    return TextTable(f"Throughput on {device}", ["Job", "Batch", "Samples/s", "Peak memory", "MFU"], rows, notes)


def peers_line(rows: Sequence[dict[str, Any]]) -> str:
    """The time of each peer's step over that of compt's."""
    own = rows[0]["side"]
    return f"over {own}: " + "; ".join(f"{row['side']} {median(row['ratios']):.2f}" for row in rows[1:])


def peers_table(rows: Sequence[dict[str, Any]], device: torch.device) -> TextTable:
    """A row for each side of each job."""
    from benchmarks.peers.study import table

    peak = peak_flops(device, "bf16")
    return table(rows, peak, {"peak": "the datasheet's dense peak" if peak else "an unknown peak"})


def write_throughput(state: State, items: Sequence[Item], device: torch.device) -> Path | None:
    """Write the bf16 measurements as a file for `compt plan --throughput`; None if there are none."""
    entries = []
    for item in items:
        record = state.find(item)
        if record is not None and "measurement" in record and item.setup and item.setup.optimizer.precision == "bf16":
            entries.append(Measurement.model_validate(record["measurement"]))
    if not entries:
        return None
    path = state.path.with_suffix(".throughput.json")
    made = new_file(device, setup_of(OF_VARIANTS), "python -m benchmarks.gpu.suite")
    write_json(path, made.model_copy(update={"entries": tuple(entries)}).model_dump(mode="json"))
    return path


def chosen_items(only: Sequence[str]) -> list[Item]:
    """The items whose name matches a pattern. Raises ConfigError for a pattern without a match."""
    items = all_items()
    for pattern in only:
        if not any(fnmatch.fnmatchcase(item.name, pattern) for item in items):
            names = [item.name for item in items]
            raise ConfigError(f"--only {pattern}{nearest(pattern, names)}: fits nothing; there are {', '.join(names)}")
    return [item for item in items if not only or any(fnmatch.fnmatchcase(item.name, pattern) for pattern in only)]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.suite", description=(__doc__ or "").split("\n\n", 1)[1]
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"the results file (default {OUT})")
    parser.add_argument("--budget", type=float, default=BUDGET, help="time limit of this call in seconds (default 480)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="run only matching items, such as check/* or speed/vit_*",
    )
    parser.add_argument("--batch", type=int, help="samples per step (default: by memory and time; 4 on a CPU)")
    parser.add_argument("--seconds", type=float, default=1.0, help="least seconds to time each job (default 1)")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results of these items")
    parser.add_argument("--list", action="store_true", help="print the names of all items and stop")
    return parser.parse_args(argv)


def suite(given: argparse.Namespace, started: float) -> int:
    """Run the suite and return the exit code. Raises ConfigError for invalid options."""
    items = chosen_items(given.only)
    if given.list:
        print("\n".join(item.name for item in items))
        return 0
    device = dist.init(given.device)
    name = device_name(device)
    stamp = {"device": name, "versions": versions()}
    if given.batch:
        items = [item if item.kind == "check" else replace(item, name=f"{item.name}@{given.batch}") for item in items]
    state = State.open(given.out, stamp, [item.name for item in items] if given.fresh else ())
    console = terminal()

    def say(item: Item, record: dict[str, Any], known: bool) -> None:
        when = " (from an earlier call)" if known else ""
        if item.kind == "check":
            line = f"{'passed' if record['passed'] else 'FAILED'}: {worst(record)}"
        elif item.kind == "peers":
            line = str(record.get("error") or peers_line(record["rows"]))
        else:
            found = record.get("measurement", {})
            seconds = found.get("seconds_per_sample")
            line = f"{1 / seconds:,.4g} samples/s" if seconds else str(record.get("error") or found.get("failure"))
        console.print(f"{item.name}: {line}{when}", markup=False, soft_wrap=True)

    options = Options(device.type, given.budget - (time.monotonic() - started), given.batch, given.seconds)
    left = run(items, state, options, say)
    found = [record for item in items if (record := state.find(item)) is not None]
    checks = [record for record in found if record["name"].startswith("check/")]
    speeds = [record for record in found if record["name"].startswith("speed/")]
    rows = [row for record in found for row in record.get("rows", [])]
    tables = [check_table(checks, name)] if checks else []
    tables += [peers_table(rows, device)] if rows else []
    tables += [speed_table(speeds, name, state.source)] if speeds else []
    for table in tables:
        console.print(table)
    written = [str(state.path), str(write_throughput(state, items, device) or "")]
    console.print(f"Written: {', '.join(filter(None, written))}", markup=False, soft_wrap=True)
    if left:
        names = ", ".join(item.name for item in left)
        console.print(
            f"Left, as the time was up: {names}. The same command goes on there.", markup=False, soft_wrap=True
        )
    return 0 if all(record["passed"] for record in checks) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    started = time.monotonic()
    try:
        return suite(_options(argv), started)
    except ComptError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
