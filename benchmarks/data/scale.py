"""Time and memory of indexes and orders from a million to two billion samples.

`python -m benchmarks.data.scale` writes docs/results/data/scale. It takes 10 minutes on an idle machine of two cores,
and 6 GB in the folder for temporary files. Every measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from benchmarks.common import SERIES, Result, one_line, show, write
from compt.bench.throughput import device_name
from compt.data import index as indexes
from compt.data.account import Account
from compt.data.index import open_index
from compt.data.loaders import Steps
from compt.data.merged import ShardRows
from compt.data.order import EpochOrder
from compt.data.scan import COLUMNS, ShardScan
from compt.errors import RunError
from compt.files import memory_sizes
from compt.text import TextTable
from compt.weights.artefact import versions

OUT = Path("docs/results/data")
SEED, BATCH, WINDOW, BATCHES = 0, 1024, 8, 100
SETS = (
    ("scanned from tars", 100, 10_000),
    ("merged from the indexes of shards", 1_000, 10_000),
    ("written at once", 10_000, 10_000),
    ("written at once", 200_000, 500),
)
"""How the index is made, shards, and samples of a shard."""
ORDERS = ((100, 10_000), (1_000, 10_000), (10_000, 10_000), (200_000, 10_000))
"""Shards, and samples of a shard, of the orders that are measured alone."""
IMAGE, CAPTION = b"\xff\xd8\xff", b"a small test"

Row = dict[str, Any]


def _cpu_seconds() -> float:
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


class Cost:
    """Seconds, CPU seconds, and the most private memory, in bytes, that this process takes from now on.

    Pages of files are not private: all processes share them, and the system takes them back when it needs memory.
    """

    def __init__(self) -> None:
        self._first, self.most = memory_sizes()["RssAnon"], 0
        self._started, self._cpu = time.perf_counter(), _cpu_seconds()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, memory_sizes()["RssAnon"] - self._first)
            if self._ended.wait(0.005):
                return

    def end(self, name: str) -> Row:
        """Stop, and return what was taken."""
        taken = {"seconds": time.perf_counter() - self._started, "cpu_seconds": _cpu_seconds() - self._cpu}
        self._ended.set()
        self._thread.join()
        return {f"{name}_{what}": value for what, value in {**taken, "bytes": self.most}.items()}


def _rows(samples: int) -> tuple[NDArray[np.int64], bytes]:
    """Rows and keys of a shard with one image of 2 kB to 60 kB and one caption a sample."""
    generator = np.random.default_rng(SEED)
    rows = np.zeros((samples, len(COLUMNS)), np.int64)
    at = {name: rows[:, number] for number, name in enumerate(COLUMNS)}
    at["key_start"][:], at["key_size"][:] = 9 * np.arange(samples), 9
    at["image_size"][:], at["text_size"][:] = generator.integers(2_000, 60_000, samples), 60
    ends = np.cumsum(at["image_size"] + 2048)
    at["image_offset"][:], at["text_offset"][:] = ends - at["image_size"] - 1024, ends
    at["text_kind"][:], at["captions"][:], at["label"][:] = 2, 1, -1
    return rows, b"".join(b"%09d" % number for number in range(samples))


def _parts(samples: int, files: Any, *_: Any) -> Iterator[ShardRows]:
    rows, keys = _rows(samples)
    for shard in files._shards:
        yield ShardRows(shard.name, rows, keys, "0" * 64, Account(), Counter({1: samples}), "0" * 64, 0)


def write_tar(path: Path, first: int, samples: int) -> None:
    """A tar of tiny files, a `.jpg` and a `.txt` a sample. `tarfile` alone would take longer than the scan."""
    ends, data, base = (b".jpg", b".txt"), (IMAGE, CAPTION), list[tuple[bytes, int, bytes]]()
    for body in data:
        info = tarfile.TarInfo("")
        info.size = len(body)
        block = info.tobuf(tarfile.USTAR_FORMAT)
        total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        base.append((block, total, body.ljust(tarfile.BLOCKSIZE, b"\0")))
    with path.open("wb") as file:
        for number in range(first, first + samples):
            for end, (block, total, body) in zip(ends, base, strict=True):
                name = b"%09d%s" % (number, end)
                checksum = b"%06o\0 " % (total + sum(name))
                file.write(name.ljust(100, b"\0") + block[100:148] + checksum + block[156:] + body)
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def prepare(folder: Path, how: str, shards: int, samples: int) -> None:
    """Write the shards, which are empty unless they are scanned, and the indexes of shards that are merged."""
    rows, keys = _rows(samples)
    for number in range(shards):
        path = folder / f"{number:06d}.tar"
        if how == "scanned from tars":
            write_tar(path, number * samples, samples)
        else:
            path.touch()
    if how == "merged from the indexes of shards":
        paths = sorted(folder.glob("*.tar"))
        files = indexes._IndexFiles(paths, None, [None] * shards)
        for number in range(shards):
            name, identity = files._one(number)
            scan = ShardScan(rows, keys, Account(), Counter({1: samples}))
            indexes._store(folder / indexes.INDEX_FOLDER / name, {**identity, "content": "0" * 64}, scan)


def make(folder: Path, how: str, shards: int, samples: int) -> Row:
    """Make the index: scan, merge or write."""
    if how == "written at once":
        indexes._IndexFiles._parts = lambda files, *_: _parts(samples, files)  # type: ignore[method-assign]
    cost = Cost()
    index = open_index(f"{{000000..{shards - 1:06d}}}.tar", folder)
    found = cost.end("make")
    assert len(index) == shards * samples
    size = next((folder / indexes.INDEX_FOLDER).glob("merged-*")).stat().st_size
    return {**found, "index_bytes": size, "fingerprint": index.fingerprint}


def read(folder: Path, how: str, shards: int, samples: int) -> Row:
    """Open the index as a rank does, then look up the samples of some batches in the middle of an epoch."""
    del how
    cost = Cost()
    index = open_index(f"{{000000..{shards - 1:06d}}}.tar", folder)
    found = cost.end("open")
    cost, started = Cost(), time.process_time()
    middle = len(index) // BATCH // 2
    steps = Steps(index, SEED, WINDOW, BATCH, middle, middle + BATCHES, 0, 1)
    for count, step in enumerate(steps):
        for sample in step.ids.tolist():
            assert index.entry(sample).key.isdigit()
        if not count:
            found["first_cpu_seconds"] = time.process_time() - started
    return {**found, **cost.end("read"), "file_bytes": memory_sizes()["RssFile"]}


def order(shards: int, samples: int) -> Row:
    """The order of an epoch alone: its first ids, and those of another window."""
    sizes = np.full(shards, samples)
    cost = Cost()
    made = EpochOrder(SEED, 0, sizes, WINDOW)
    made[:BATCH]
    found = cost.end("first")
    cost = Cost()
    made[len(made) // 2 : len(made) // 2 + BATCH]
    return {"samples": shards * samples, "shards": shards, **found, **cost.end("window")}


def _alone(stage: str, *arguments: Any) -> Row:
    """Run a stage in a process of its own. Raises RunError."""
    command = [sys.executable, "-m", "benchmarks.data.scale", "--stage", json.dumps([stage, *map(str, arguments)])]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RunError(f"{stage} {' '.join(map(str, arguments))} failed with code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, how: str, shards: int, samples: int) -> Row:
    """Everything about one set, which is removed afterwards."""
    print(f"{datetime.now(UTC):%H:%M:%S} {shards * samples:,} in {shards:,}: {how}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="compt-scale-", dir=folder) as name:
        place = Path(name)
        prepare(place, how, shards, samples)
        made = _alone("make", place, how, shards, samples)
        return {
            "samples": shards * samples,
            "shards": shards,
            "how": how,
            **made,
            **_alone("read", place, how, shards, samples),
        }


def index_table(rows: Sequence[Row]) -> TextTable:
    """One row for each set."""
    body = [
        (
            f"{row['samples']:,}",
            f"{row['shards']:,}",
            row["how"],
            f"{row['make_cpu_seconds']:,.1f}",
            f"{row['index_bytes'] / 1e6:,.0f}",
            f"{row['open_cpu_seconds']:.2f}",
            f"{row['open_bytes'] / 1e6:,.0f}",
            f"{row['first_cpu_seconds']:.3f}",
            f"{1e6 * row['read_cpu_seconds'] / BATCHES / BATCH:.1f}",
            f"{row['read_bytes'] / 1e6:,.1f}",
        )
        for row in rows
    ]
    header = ("Samples", "Shards", "Index", "Made, s", "File, MB", "Opened, s", "Memory, MB", "First batch, s")
    notes = (
        "Seconds are CPU seconds of the process and its children.",
        "Opened: from the names of the shards to an index, with the size and time of every shard.",
        "Memory: the most private memory to open the index. Pages of its file are not private: processes share them.",
        "First batch: the order of an epoch, and the places of the samples of a batch in the middle of it.",
        f"Lookup: order and place, a sample, in {BATCHES} batches of {BATCH:,}. Read: memory for it. No image is read.",
    )
    return TextTable("Index", (*header, "Lookup, µs", "Read, MB"), body, notes, left=3)


def order_table(rows: Sequence[Row]) -> TextTable:
    """One row for each order."""
    body = [
        (
            f"{row['samples']:,}",
            f"{row['shards']:,}",
            f"{row['first_cpu_seconds']:.3f}",
            f"{row['window_cpu_seconds']:.3f}",
            f"{max(row['first_bytes'], row['window_bytes']) / 1e6:,.1f}",
        )
        for row in rows
    ]
    header = ("Samples", "Shards", "First batch, s", "Another window, s", "Memory, MB")
    return TextTable(f"Order alone, windows of {WINDOW} shards", header, body, left=2)


def draw(values: str, label: str, sets: Sequence[Row], orders: Sequence[Row]) -> Callable[[Axes], None]:
    """CPU seconds or megabytes over the number of samples."""
    unit = 1e6 if values == "bytes" else 1.0
    lines: list[tuple[str, Sequence[Row], str]] = [
        (f"index, opened ({shards})", some, f"open_{values}")
        for shards, some in (
            ("10,000 samples a shard", [row for row in sets if row["samples"] == 10_000 * row["shards"]]),
            ("200,000 shards", [row for row in sets if row["shards"] == 200_000]),
        )
    ]
    lines.append(("order, first batch", orders, f"first_{values}"))

    def plot(axes: Axes) -> None:
        for (name, rows, key), colour in zip(lines, SERIES, strict=False):
            axes.plot([row["samples"] for row in rows], [row[key] / unit for row in rows], "o-", label=name, c=colour)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:,g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("million samples")
        axes.set_ylabel(label)
        axes.legend(loc="upper left")

    return plot


def findings(sets: Sequence[Row], orders: Sequence[Row]) -> list[str]:
    """The two ends, in words."""
    most, last = max(sets, key=lambda row: (row["shards"], row["samples"])), orders[-1]
    opened = f"{most['open_cpu_seconds']:.1f} CPU seconds and {most['open_bytes'] / 1e6:,.0f} MB"
    ordered = f"{last['first_cpu_seconds']:.2f} CPU seconds and {last['first_bytes'] / 1e6:,.0f} MB"
    return [
        f"Opening {most['shards']:,} shards with {most['samples']:,} samples opens one file and takes {opened}.",
        f"The order of {last['samples']:,} samples in {last['shards']:,} shards takes {ordered} for the first batch.",
    ]


STAGES: dict[str, Callable[..., Row]] = {"make": make, "read": read}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the samples; the numbers mean nothing")
    parser.add_argument("--folder", type=Path, help="folder for the sets (default: the one for temporary files)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: the committed one)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.stage:
        stage, *arguments = json.loads(options.stage)
        if stage == "order":
            print(json.dumps(order(*map(int, arguments))))
        else:
            folder, how, *numbers = arguments
            print(json.dumps(STAGES[stage](Path(folder), how, *map(int, numbers))))
        return
    share, load = (100 if options.quick else 1), os.getloadavg()[0]
    with one_line():
        orders = [_alone("order", shards // share, samples) for shards, samples in ORDERS]
        sets = [measure(options.folder, how, shards // share, samples) for how, shards, samples in SETS]
        about: Row = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": " ".join(["python -m benchmarks.data.scale", *(sys.argv[1:] if argv is None else argv)]),
            "seed": SEED,
            "device": device_name(torch.device("cpu")),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": load,
            "system": platform.platform(),
            "numpy": np.__version__,
            **versions(),
        }
        said = findings(sets, orders)
        if load > 0.5:
            said.append(f"The machine was not idle (load average {load:.1f} at the start).")
        said.append(
            f"Measured on {about['device']}, {about['cores']} cores, {about['date'][:10]}, Python {about['python']}, "
            f"numpy {about['numpy']}: `{about['command']}`, seed {SEED}. Files are in the page cache."
        )
        result = Result(
            "scale",
            "Indexes and orders of up to two billion samples",
            tables=(index_table(sets), order_table(orders)),
            records={"about": [about], "indexes": sets, "orders": orders},
            findings=tuple(said),
            plots={
                "seconds": draw("cpu_seconds", "CPU seconds", sets, orders),
                "memory": draw("bytes", "private memory, MB", sets, orders),
            },
        )
        place = write(result, options.out)
        show(result)
    print(f"written: {place}")


if __name__ == "__main__":
    main()
