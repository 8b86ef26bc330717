"""Images per second and core of decoders and of whole loaders, in one interleaved run, on the same photographs.

`python -m benchmarks.data PHOTOS` writes docs/results/data. PHOTOS is a folder of tars that
`python -m benchmarks.data.photos PHOTOS` makes. Every process is bound to one core. Speed is counted in CPU time, so
that another load disturbs it less; the seconds beside it mean something on an idle machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import IDLE_LOAD, Result, one_line, show, write
from benchmarks.data import decoding, pipelines
from compt.bench.throughput import device_name
from compt.data.index import open_index
from compt.errors import RunError
from compt.text import TextTable
from compt.weights.artefact import versions

OUT = Path("docs/results")
SIZES = (64, 224)
PACKAGES = ("pillow", "torchvision", "webdataset", "nvidia-dali-cuda130", "nvidia-dali-cuda120")

Row = dict[str, Any]


class Server:
    """A process of `benchmarks.data.process`. Raises RunError where it fails."""

    def __init__(self, kind: str, way: str) -> None:
        self._name = f"{kind} {way}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.data.process", kind, way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: Mapping[str, Any]) -> Row:
        """One measurement."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"the process of {self._name} failed with code {self._process.wait()}; its error is above")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def measure(options: argparse.Namespace, files: Path, ways: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """The rows of decoding and of the loaders: every way in turn, then the next repeat."""
    decoders, loaders = [], []
    tars = str(options.photos.resolve())
    alone = Server("decoding", "all")
    servers = {way: Server("loader", way) for way in ways}
    pixels = [way for way in decoding.WAYS if way.rpartition(" ")[2] != "dali" or not pipelines.lacking(way)]
    for repeat in range(options.repeats):
        print(f"{datetime.now(UTC):%H:%M:%S} repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
        for short, size, scale in decoding.SETTINGS:
            for way in pixels:
                setting = {"way": way, "short": short, "size": size, "scale": scale}
                found = alone.ask({**setting, "tars": tars, "images": options.decoded})
                decoders.append({"repeat": repeat, **setting, **found})
        for size in SIZES:
            for way, server in servers.items():
                request = {"tars": tars, "files": str(files), "batch": options.batch, "seconds": options.seconds}
                found = server.ask({**request, "size": size})
                loaders.append({"repeat": repeat, "way": way, "size": size, **found})
    for server in (alone, *servers.values()):
        server.close()
    return decoders, loaders


def ratios(rows: Iterable[Row], reference: str, key: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by `key` and way, each with its images per CPU second and that over the reference of its repeat."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    rows = list(rows)
    speed = {
        (*(row[name] for name in key), row["way"], row["repeat"]): row["images"] / max(row["cpu_seconds"], 1e-9)
        for row in rows
    }
    for row in rows:
        place = tuple(row[name] for name in key)
        mine, other = speed[*place, row["way"], row["repeat"]], speed.get((*place, reference, row["repeat"]))
        ratio = mine / other if other else None
        groups.setdefault((*place, row["way"]), []).append({**row, "speed": mine, "ratio": ratio})
    return groups


def _spread(values: Sequence[float | None], digits: int) -> str:
    """Median, least and most."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    return f"{median(found):,.{digits}f} ({min(found):,.{digits}f} to {max(found):,.{digits}f})"


def decoding_table(rows: Iterable[Row]) -> TextTable:
    """Images per CPU second of each way, and its ratio to Pillow with open_clip's transform."""
    groups = ratios(rows, decoding.OPENCLIP, ("short", "size", "scale"))
    body = [
        (
            f"{short} to {size}, crops of {scale[0]:g} to {scale[1]:g}",
            way,
            _spread([row["speed"] for row in found], 0),
            _spread([row["ratio"] for row in found], 2),
            f"{median(row['images'] / row['seconds'] for row in found):,.0f}",
        )
        for (short, size, scale, way), found in groups.items()
    ]
    header = ("Pixels", "Way", "Images per CPU second", "Ratio", "Images per second")
    notes = (
        "Pixels: the short side of the image, the side of the result, and the share of the area that a crop has.",
        "The ways with Pillow and a transform give normalized float32, the others uint8, which the device normalizes.",
        f"Ratio: to {decoding.OPENCLIP}, in the same repeat. All: median (least to most).",
    )
    return TextTable("Decoding alone, one thread", header, body, notes, left=2)


def loader_table(rows: Iterable[Row], size: int) -> TextTable:
    """Speed, ratio to OpenCLIP, time to the first batch, and memory of each loader at one size."""
    groups = ratios((row for row in rows if row["size"] == size), pipelines.OPENCLIP, ("size",))
    body = [
        (
            way,
            _spread([row["speed"] for row in found], 0),
            _spread([row["ratio"] for row in found], 2),
            f"{median(row['images'] / row['seconds'] for row in found):,.0f}",
            f"{median(row['first_seconds'] for row in found):.2f}",
            f"{found[0]['memory_bytes'] / 1e6:,.0f}",
        )
        for (_, way), found in groups.items()
    ]
    header = ("", "Images per CPU second", "Ratio", "Images per second", "First batch, s", "Memory, MB")
    notes = (
        "OpenCLIP and torchvision give normalized float32, compt and DALI's reader uint8. All tokenize one caption.",
        "Memory: what all processes of the loader take beyond Python and its libraries, without pages of files.",
    )
    return TextTable(f"Whole loaders at {size} pixels, one core", header, body, notes)


def findings(rows: Iterable[Row]) -> list[str]:
    """The best loader of compt over OpenCLIP's, in words."""
    rows, said = list(rows), []
    for size in SIZES:
        groups = ratios((row for row in rows if row["size"] == size), pipelines.OPENCLIP, ("size",))
        ours = {
            way: median(found)
            for (_, way), each in groups.items()
            if way.startswith("compt") and (found := [row["ratio"] for row in each if row["ratio"] is not None])
        }
        if ours:
            best = max(ours, key=lambda way: ours[way])
            others = ", ".join(f"{way.removeprefix('compt, ')} {value:.2f}" for way, value in ours.items())
            said.append(
                f"At {size} pixels {best} makes {ours[best]:.2f} times OpenCLIP's batches per CPU second ({others})."
            )
    return said


def installed() -> dict[str, str]:
    """Versions of what is compared."""
    found = versions()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of tars from benchmarks.data.photos")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds a repeat of a loader (default: 2)")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--decoded", type=int, default=64, help="images a repeat of decoding (default: 64)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: the committed one)")
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    missing = {way: name for way in pipelines.WAYS if (name := pipelines.lacking(way))}
    with one_line(), tempfile.TemporaryDirectory(prefix="compt-data-") as folder:
        index = open_index("*.tar", options.photos)  # it is built once for a set
        files = Path(folder) / "files"
        pipelines.unpack(options.photos, files)
        ways = [way for way in pipelines.WAYS if way not in missing]
        decoders, loaders = measure(options, files, ways)
        about: Row = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": " ".join(["python -m benchmarks.data", *(sys.argv[1:] if argv is None else argv)]),
            "seed": pipelines.SEED,
            "images": len(index),
            "data": index.fingerprint,
            "device": device_name(torch.device("cpu")),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": load,
            "system": platform.platform(),
            **installed(),
        }
        said = findings(loaders)
        for name in sorted(set(missing.values())):
            said.append(f"Skipped without {name}: {'; '.join(way for way, lack in missing.items() if lack == name)}.")
        if load > IDLE_LOAD:
            said.append(
                f"The machine was not idle: its load average was {load:.1f} at the start. Compare CPU seconds; seconds "
                "and times to the first batch are too long."
            )
        said.append(
            f"Measured on {about['device']}, {about['date'][:10]}, {about['images']:,} photographs, torch "
            f"{about['torch']}, Pillow {about['pillow']}: `{about['command']}`, seed {about['seed']}."
        )
        result = Result(
            "data",
            "Decoders and loaders on one core",
            tables=(*(loader_table(loaders, size) for size in SIZES), decoding_table(decoders)),
            records={"about": [about], "loaders": loaders, "decoding": decoders},
            findings=tuple(said),
        )
        place = write(result, options.out)
        show(result)
    print(f"written: {place}")
