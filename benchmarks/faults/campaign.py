"""Put faults into a real chain of two processes, and kill it at random moments; compare each end with a whole run.

`python -m benchmarks.faults` writes docs/results/faults/result.json, and the page docs/faults.md from it. Run again, it
continues where it stopped. It takes about half an hour, and needs root for the faults with a small disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import one_line
from compt.bench.throughput import device_name
from compt.files import write_json, write_text
from compt.text import TextTable
from compt.weights.artefact import versions

RESULT, PAGE = Path("docs/results/faults/result.json"), Path("docs/faults.md")
KILLS, SEED = 50, 6

TEXT = """# What happens when something breaks

Each fault below was put into a real chain: two links, two processes on one machine, a checkpoint after every step,
`engine.timeout: {timeout:g}`, and `engine.name: ddp` where no other engine is named. Then the same command was run
again, and its end compared with an undisturbed run: weights and scores bit for bit, log lines, and the samples of
each step.

{machines}

`python -m benchmarks.faults` writes this page; docs/results/faults/result.json has the full messages, as the program
printed them on that day.

{faults}

*Exit codes*: of rank 0 and of rank 1; -9 is a process that was killed. *Ended in*: seconds from the fault until the
last process had ended. *Same*: whether the same command reached the weights of the undisturbed run. *Steps again*:
steps after the newest checkpoint, which were trained a second time. *Samples lost or twice*: steps of the final model
that saw other samples than without the fault.

{random}

If a process is killed before the ranks have met, the others end after `COMPT_CONNECT_SECONDS` ({connect:g} in
the campaign as it is now).

## How a fault is found

A thread of each process (`compt/dist/watch/thread.py`) writes a heartbeat twice a second to the store in which the
ranks met. It also measures how long its own main thread has made no progress. A single process has the same thread.

- A process of the same machine that is **gone** is noticed within a second. One of another machine, or one that is
  stopped, is noticed after 20 s without a heartbeat, or half of `engine.timeout` where that is shorter.
- A process without **progress** for `engine.timeout` seconds counts as hanging. Evaluation, expansion, the first step
  and writing may take six times as long. The rank that is furthest behind is named; `RUN/faults/rank-N-….txt` has the
  stacks of all processes. If it waits for data, the message names a loader process that is stopped, or the free
  shared memory.
- A **signal to stop** (SIGTERM, SIGUSR1, Ctrl-C) ends a wait for data at once, and the run saves. A step goes on to
  its end, then the run saves. If nothing moves for 15 s after the signal, or three times as long as the same phase
  took before, the run ends with code 75 and keeps the newest checkpoint. Writing a checkpoint is never cut off.
- A **loader process** that dies, cannot start or cannot pass on a batch ends the run with code 5. The message names
  the process, the signal that killed it, and what helps.
- The rank that **finds** the cause prints it once and writes it to `RUN/faults/cause-….txt`. All processes end with
  its exit code, also those whose main thread is stuck in a collective. A process that is stopped is killed by the
  others on its machine.
- Before that thread starts, while recipe and data are read, a collective fails on every rank, and each prints its own
  line.
- If the whole job is suspended and continued, no rank is to blame.

**Out of memory** on any rank ends all of them. The message lists changes of the recipe that should fit, computed by
the plan. `engine.find_micro_batch: true` searches for the largest micro-batch before a run, with trial steps in
child processes. With several processes the log has `step_seconds_max`, `step_seconds_mean`, `data_wait_max` and
`slowest_rank`.

## Exit codes

| code | meaning |
|--:|---|
| 0 | done |
| 2 | recipe or option wrong |
| 3 | data cannot be used |
| 4 | a model folder or checkpoint is missing, torn, or of another model |
| 5 | the run cannot continue (locked, changed recipe, full disk, non-finite steps), or a rank is gone: start again |
| 75 | stopped by SIGTERM, SIGUSR1 or Ctrl-C; a checkpoint was saved, unless the run hung. The same command resumes |

Launchers replace code 75 by their own, except under `compt launch`.
"""


def fault_table(rows: list[dict[str, Any]]) -> TextTable:
    """Return a table with a row for each fault."""
    return TextTable(
        "Faults",
        ["Fault", "Exit codes", "Ended in", "Message", "Same", "Steps again", "Samples lost or twice"],
        [
            [
                row["fault"],
                " ".join(map(str, row["exit_codes"])),
                f"{row['seconds']:.1f} s",
                textwrap.shorten(row["message"].split(". ")[0], 160, placeholder=" …") or "-",
                {True: "yes", False: "no", None: "does not end it"}[row["same"]],
                str(row["repeated_steps"]),
                row["note"] or str(row["wrong_samples"]),
            ]
            for row in rows
        ],
    )


def random_table(rows: list[dict[str, Any]]) -> TextTable:
    """Return a table of the random kills, with a row for each engine."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    return TextTable(
        "kill -9 at random moments",
        [
            "Engine",
            "Kills",
            "Chains finished",
            "Bitwise the same",
            "Samples lost or twice",
            "Ended in, median",
            "Ended in, longest",
        ],
        [_random_row(name, [row for row in rows if row["engine"] == name]) for name in engines],
    )


def _random_row(engine: str, rows: list[dict[str, Any]]) -> list[str]:
    ended = [row for row in rows if "same" in row]
    seconds = sorted(row["seconds"] for row in rows)
    return [
        engine,
        str(len(rows)),
        str(sum(row["finished"] for row in ended)),
        str(sum(row["same"] for row in ended)),
        str(sum(row["wrong_samples"] for row in ended)),
        f"{seconds[len(seconds) // 2]:.1f} s",
        f"{seconds[-1]:.1f} s",
    ]


def page(result: dict[str, Any]) -> str:
    """Return the text of docs/faults.md."""
    machine = f"{result['date']}, {result['device']}, {result['cores']} cores, torch {result['versions']['torch']}."
    # Several starts may have made a result; `--fresh` drops the note.
    machine += f"\n\n{result['note']}" if result.get("note") else ""
    return TEXT.format(
        timeout=result["timeout"],
        connect=result["connect_seconds"],
        machines=machine,
        faults=fault_table(result["faults"]).markdown().strip(),
        random=random_table(result["random"]).markdown().strip() if result["random"] else "",
    )


def measure(only: list[str], kills: int, seed: int, fresh: bool) -> None:
    """Run what RESULT does not have yet, and write RESULT after every fault."""
    from tests.faults.at_random import CONNECT_SECONDS, kill_at_random
    from tests.faults.injected import FAULTS, TIMEOUT, Bench, disturb
    from tests.helpers.recipe import make_data

    result: dict[str, Any] = {"faults": [], "random": []}
    if RESULT.exists() and not fresh:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
    result |= {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "versions": versions(),
        "seed": seed,
        "timeout": TIMEOUT,
        "connect_seconds": CONNECT_SECONDS,
    }
    folder = Path(tempfile.mkdtemp(prefix="compt-faults-"))

    def keep(fault: dict[str, Any] | None = None, killed: dict[str, Any] | None = None) -> None:
        if fault is not None:
            # Remove the names of this machine and of temporary folders.
            fault["message"] = fault["message"].replace(str(folder), "…").replace(platform.node(), "host")
            rows = {row["fault"]: row for row in [*result["faults"], fault]}
            result["faults"] = [rows[name] for name in FAULTS if name in rows]
        if killed is not None:
            result["random"].append(killed)
        print(json.dumps(fault or killed), flush=True)
        write_json(RESULT, result)

    try:
        bench = Bench(make_data(folder))
        there = {row["fault"] for row in result["faults"]}
        for number, fault in enumerate(FAULTS):
            if any(word in fault for word in only) if only else fault not in there:
                try:
                    keep(fault=disturb(bench, fault, folder / f"run{number}").to_json())
                except PermissionError as error:
                    sys.stderr.write(f"{fault}: left out: {error}\n")
        done = len(result["random"])
        if kills > done:
            kill_at_random(bench, random.Random(seed + done), kills - done, folder, lambda row: keep(killed=row))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="run the faults with this word again")
    parser.add_argument("--kills", type=int, default=KILLS, help="number of kills at random moments")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--fresh", action="store_true", help="discard the existing result")
    parser.add_argument("--page", action="store_true", help="only write the page, from the existing result")
    options = parser.parse_args()
    with one_line():
        if not options.page:
            measure(options.only, options.kills, options.seed, options.fresh)
        write_text(PAGE, page(json.loads(RESULT.read_text(encoding="utf-8"))))
        print(f"written: {RESULT} and {PAGE}")


if __name__ == "__main__":
    main()
