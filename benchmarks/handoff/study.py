"""The hand-off from one model to the next, larger one: seconds, bytes, and memory against loading both.

`python -m benchmarks.handoff` writes docs/results/handoff: ViT-B to ViT-L, and a pair of one and two billion
parameters, by one process and by two, each under a limit of memory below the two models; then a program that loads
both, under the same limit. It takes about 14 GB of disk, removed at the end, and measures well only on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from benchmarks.common import COLOUR, Result, one_line, show, write
from benchmarks.handoff.run import SEED, Pair, check_space, measure, model_bytes, sizes, student_hash, write_teacher
from compt.bench.throughput import device_name
from compt.chain.job import INITIAL_SHARD_BYTES
from compt.models.presets import PRESETS, ModelSpec
from compt.text import TextTable
from compt.weights.artefact import versions

OUT = Path("docs/results")
STREAM, MEMORY = "stream", "in memory"

VIT_1B = ModelSpec(
    "vit_1b",
    "vit",
    width=1280,
    depth=36,
    heads=20,
    text_width=1024,
    text_depth=20,
    text_heads=16,
    embed_dim=768,
)
VIT_2B = ModelSpec(
    "vit_2b",
    "vit",
    width=1536,
    depth=52,
    heads=24,
    text_width=1280,
    text_depth=26,
    text_heads=20,
    embed_dim=1024,
)
MEDIUM = ModelSpec(
    "medium_small",
    "vit",
    width=768,
    depth=12,
    heads=12,
    text_width=128,
    text_depth=1,
    text_heads=2,
    vocab_size=1000,
    embed_dim=128,
)
PAIRS = {
    "vit_l16": Pair(PRESETS["vit_b16"], PRESETS["vit_l16"], load=True),
    "vit_l16-net2net": Pair(PRESETS["vit_b16"], PRESETS["vit_l16"], "net2net"),
    "vit_2b": Pair(VIT_1B, VIT_2B, limit_share=0.25),
    "medium": Pair(MEDIUM, replace(MEDIUM, name="medium_large", width=1024, depth=16, heads=16), load=True),
    "smoke": Pair(PRESETS["vit_pico"], PRESETS["vit_nano"], limit_share=None, load=True),
}
DEFAULT = ("vit_l16", "vit_l16-net2net", "vit_2b")

NOTES = (
    """Read and written: what the processes passed to the kernel (rchar, wchar of /proc/self/io), all writers together;
    each reads the teacher to check its digests, what it needs of it, and what it wrote, for the manifest's digests.""",
    """Peak extra: the largest anonymous memory of a process (RssAnon, every 5 ms) beyond what it had before, Python and
    torch; of several writers the largest. x largest: in units of the student's largest parameter. Of both: of the two
    models in fp32.""",
    "Limit: on all memory of one process, Python, torch and page cache included.",
)

Say = Callable[[str], None]


def run_pair(pair: Pair, folder: Path, writers: Sequence[int], say: Say) -> list[dict[str, Any]]:
    """All measurements of one pair; the folders that it writes are gone at the end."""
    teacher, out = folder / "teacher", folder / "student"
    found = []
    try:
        say(f"{pair.name}: writing a teacher of {model_bytes(pair.teacher) / 1e9:.2f} GB")
        write_teacher(teacher, pair.teacher)
        for number in writers:
            say(f"{pair.name}: expanding, {number} writing")
            run = measure(STREAM, pair, teacher, out, number, pair.limit)
            run["hash"] = student_hash(out) if not run["errors"] else None
            found.append(run)
            shutil.rmtree(out, ignore_errors=True)
        for limit in dict.fromkeys((pair.limit, None)) if pair.load else (pair.limit,):
            say(f"{pair.name}: loading both, {'without a limit' if limit is None else 'under the same limit'}")
            found.append(measure(MEMORY, pair, teacher, out, 1, limit))
    finally:
        shutil.rmtree(teacher, ignore_errors=True)
        for path in folder.glob("*student*"):
            shutil.rmtree(path, ignore_errors=True)
    return found


def record(pair: Pair, run: Mapping[str, Any]) -> dict[str, Any]:
    """One measurement as plain values; sums over the writers, and the largest of their peaks."""
    ranks = [rank for rank in run["ranks"] if rank]
    largest = max(sizes(pair.student).values())
    whole = len(ranks) == run["writers"]
    peak = max(rank["peak_extra"] for rank in ranks) if whole else None
    return {
        "pair": pair.name,
        "width": pair.width,
        "way": run["way"],
        "writers": run["writers"],
        "threads": ranks[0]["threads"] if whole else None,
        "seconds": max(rank["seconds"] for rank in ranks) if whole else None,
        "bytes_read": sum(rank["bytes_read"] for rank in ranks) if whole else None,
        "bytes_written": sum(rank["bytes_written"] for rank in ranks) if whole else None,
        "teacher_bytes": model_bytes(pair.teacher),
        "student_bytes": model_bytes(pair.student),
        "largest_parameter_bytes": largest,
        "largest_parameter": max(sizes(pair.student), key=lambda name: sizes(pair.student)[name]),
        "peak_extra_bytes": peak,
        "peak_extra_of_largest": peak / largest if peak else None,
        "peak_extra_of_both": peak / pair.both_bytes if peak else None,
        "peak_resident_bytes": max(rank["peak_resident"] for rank in ranks) if whole else None,
        "anonymous_before_bytes": max(rank["anonymous_before"] for rank in ranks) if whole else None,
        "limit_bytes": run["limit"],
        "limited_by": run["limited_by"],
        "group_peak_bytes": max((peak for peak in run["group_peaks"] if peak), default=None),
        "exit_codes": run["exit_codes"],
        "killed": run["killed"],
        "out_of_memory_kills": run["out_of_memory_kills"],
        "errors": run["errors"],
        "hash": run.get("hash"),
    }


def _gb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"


def _ending(row: Mapping[str, Any]) -> str:
    if row["killed"]:
        return "killed: out of memory" if row["out_of_memory_kills"] else "killed"
    return "done" if not row["errors"] else f"failed: {row['errors'][0]}"


def table(rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """Every measurement in a row."""
    header = (
        "",
        "Writers",
        "Seconds",
        "Read, GB",
        "Written, GB",
        "Peak extra, GB",
        "x largest",
        "of both",
        "Limit, GB",
        "",
    )
    body = [
        (
            f"{row['pair']}: {'streaming' if row['way'] == STREAM else 'both loaded'}",
            str(row["writers"]),
            "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
            _gb(row["bytes_read"]),
            _gb(row["bytes_written"]),
            _gb(row["peak_extra_bytes"]),
            "-" if row["peak_extra_of_largest"] is None else f"{row['peak_extra_of_largest']:.1f}",
            "-" if row["peak_extra_of_both"] is None else f"{row['peak_extra_of_both']:.0%}",
            _gb(row["limit_bytes"]) if row["limit_bytes"] else "none",
            _ending(row),
        )
        for row in rows
    ]
    return TextTable("The hand-off from teacher to student", header, body, [" ".join(note.split()) for note in NOTES])


def models(pairs: Sequence[Pair], rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """What is handed over, and what loading both takes: measured where it was, else computed."""
    body = []
    for pair in pairs:
        loaded = [row for row in rows if row["pair"] == pair.name and row["way"] == MEMORY and not row["errors"]]
        both = f"{_gb(loaded[-1]['peak_extra_bytes'])} (measured)" if loaded else f"{_gb(pair.both_bytes)} (computed)"
        largest = max(sizes(pair.student), key=lambda name: sizes(pair.student)[name])
        body.append(
            (
                pair.name,
                _gb(model_bytes(pair.teacher)),
                _gb(model_bytes(pair.student)),
                f"{_gb(sizes(pair.student)[largest])} ({largest})",
                both,
            )
        )
    header = ("", "Teacher, GB", "Student, GB", "Largest parameter, GB", "Both loaded, GB")
    return TextTable("The models, in fp32", header, body)


def findings(pairs: Sequence[Pair], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What came out, in words."""
    said = []
    for pair in pairs:
        own = [row for row in rows if row["pair"] == pair.name]
        streamed = [row for row in own if row["way"] == STREAM and row["peak_extra_bytes"]]
        if not streamed:
            continue
        worst = max(streamed, key=lambda row: row["peak_extra_bytes"])
        hashes = {row["hash"] for row in streamed}
        text = (
            f"{pair.name}: at most {_gb(worst['peak_extra_bytes'])} GB beside Python and torch, "
            f"{worst['peak_extra_of_largest']:.1f} times the largest parameter and {worst['peak_extra_of_both']:.0%} "
            f"of the two models; any number of writers wrote {'the same' if len(hashes) == 1 else 'OTHER'} bytes."
        )
        if pair.limit is not None:
            controls = [row for row in own if row["way"] == MEMORY and row["limit_bytes"]]
            ended = "is killed" if controls and controls[0]["errors"] else "is NOT killed"
            text += f" Under the same {_gb(pair.limit)} GB ({worst['limited_by']}) a program that loads both {ended}."
        said.append(text)
    return said


def draw(pairs: Sequence[Pair], rows: Sequence[Mapping[str, Any]]) -> Callable[[Axes], None]:
    """Bars: largest parameter, peaks of one and several writers, limit, both models."""

    def bars(axes: Axes) -> None:
        labels: list[str] = []
        for pair in reversed(pairs):
            values = [("both models", pair.both_bytes, COLOUR["muted"])]
            values += [("limit on everything", pair.limit, COLOUR["other"])] if pair.limit else []
            streamed = [row for row in rows if row["pair"] == pair.name and row["way"] == STREAM]
            for row in reversed(streamed):
                name = f"peak extra, {row['writers']} writing"
                values.append((name, row["peak_extra_bytes"] or 0, COLOUR["chain"]))
            values.append(("largest parameter", max(sizes(pair.student).values()), COLOUR["teacher"]))
            for name, value, colour in values:
                share = 100 * value / pair.both_bytes
                axes.barh(len(labels), share, color=colour)
                axes.annotate(f" {value / 1e9:.2f} GB", (share, len(labels)), va="center")
                labels.append(name)
            labels.append(pair.name)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 115)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("percent of both models in fp32")
        axes.set_title("Memory of a hand-off, beside Python and torch")

    return bars


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(DEFAULT), help="what to hand off")
    parser.add_argument("--writers", nargs="+", type=int, default=[1, 2], help="numbers of processes")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: the committed one)")
    parser.add_argument("--temporary", type=Path, help="where the models are written (default: the system's)")
    options = parser.parse_args(argv)
    pairs = [PAIRS[name] for name in options.pairs]

    def say(text: str) -> None:
        print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)

    with one_line(), tempfile.TemporaryDirectory(prefix="compt-handoff-", dir=options.temporary) as folder:
        check_space(Path(folder), pairs)
        rows = [record(pair, run) for pair in pairs for run in run_pair(pair, Path(folder), options.writers, say)]
        about: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": " ".join(["python -m benchmarks.handoff", *(sys.argv[1:] if argv is None else argv)]),
            "seed": SEED,
            "shard_bytes": INITIAL_SHARD_BYTES,
            "device": device_name(torch.device("cpu")),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            **versions(),
        }
        machine = (
            f"Measured on {about['device']}, {about['cores']} cores, {about['memory_bytes'] / 1e9:.0f} GB, "
            f"{about['date'][:10]}, torch {about['torch']}: `{about['command']}`, seed {SEED}."
        )
        result = Result(
            "handoff",
            "Handing a model off to a larger one",
            tables=(table(rows), models(pairs, rows)),
            records={"about": [about], "runs": rows},
            findings=(*findings(pairs, rows), machine),
            plots={"memory": draw(pairs, rows)},
        )
        place = write(result, options.out)
        show(result)
    print(f"written: {place}")


if __name__ == "__main__":
    main()
