"""Faults put into a real chain of two processes, and kill -9 at random moments: what became of each.

`python -m benchmarks.faults` writes docs/results/faults/result.json, and the page docs/faults.md from it. Called again
it goes on where it was stopped. It takes about half an hour, and root for the faults that need a small disk.
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
`engine.timeout: {timeout:g}`, and `engine.name: ddp` where no other engine is named. Then the same command was given
again, and its end compared with a run that nothing had disturbed: weights and scores bit for bit, log lines, and for
each step the samples that it saw.

{machines}

`python -m benchmarks.faults` makes this page; docs/results/faults/result.json has the whole of every message.

{faults}

*Ended in*: seconds from the fault until the last process had ended. *Same*: whether the same command went on to the
weights of the undisturbed run. *Steps again*: those after the newest checkpoint, which were trained a second time from
it. *Samples lost or twice*: steps of the final model that saw other samples than without the fault.

{random}

Who is killed before the processes have met is missed after `COMPT_CONNECT_SECONDS`, {connect:g} in these runs.

## How it is found

A thread of each process (`compt/dist/watch/thread.py`) shows a sign of life twice a second, where the processes have
found each other, and measures how long its own main thread has not got on.

- A process of the same machine that is **gone** is noticed within a second; one of another machine, or one that is
  stopped, after 20 s of silence, or half of `engine.timeout` where that is shorter.
- A process that **does not get on** for `engine.timeout` seconds counts as hanging. Evaluation, expansion, the first
  step and writing may take six times as long. Who has got least far is named; the stacks of all processes lie in
  `RUN/faults/rank-N-….txt`.
- The **lowest process that lives** tells the cause, once, and writes it to `RUN/faults/cause-….txt`. All processes end
  with its exit code, also those whose main thread is stuck in a collective; one that is stopped is killed by those of
  its machine.
- Before that thread begins, while recipe and data are read, a message between processes fails: rank 1 and the first of
  each machine say so.
- When the whole job is suspended and goes on, nobody is to blame.

**Out of memory** on any rank ends all with the changes of the recipe that should fit, in numbers of the planner.
`engine.find_micro_batch: true` looks for the largest micro-batch before a training, by trial steps in processes of
their own. With several processes the log has `step_seconds_max`, `step_seconds_mean`, `data_wait_max` and
`slowest_rank`.
"""


def fault_table(rows: list[dict[str, Any]]) -> TextTable:
    """A row each fault."""
    return TextTable(
        "Faults",
        ["Fault", "Exit codes", "Ended in", "Message", "Same", "Steps again", "Samples lost or twice"],
        [
            [
                row["fault"],
                " ".join(map(str, row["exit_codes"])),
                f"{row['seconds']:.1f} s",
                row["message"].split(". ")[0][:160] or "-",
                {True: "yes", False: "no", None: "does not end it"}[row["same"]],
                str(row["repeated_steps"]),
                row["note"] or str(row["wrong_samples"]),
            ]
            for row in rows
        ],
    )


def random_table(rows: list[dict[str, Any]]) -> TextTable:
    """The campaign of random kills, a row each engine."""
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
    """docs/faults.md."""
    machine = f"{result['date']}, {result['device']}, {result['cores']} cores, torch {result['versions']['torch']}."
    # Of a result that several starts have made; `--fresh` begins without one.
    machine += f"\n\n{result['note']}" if result.get("note") else ""
    return TEXT.format(
        timeout=result["timeout"],
        connect=result["connect_seconds"],
        machines=machine,
        faults=fault_table(result["faults"]).markdown().strip(),
        random=random_table(result["random"]).markdown().strip() if result["random"] else "",
    )


def measure(only: list[str], kills: int, seed: int, fresh: bool) -> None:
    """Run what RESULT does not have yet, and write it after every fault."""
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
            # Names of this machine and of temporary folders say nothing.
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
    parser.add_argument("--only", action="append", default=[], help="faults that contain this word, once more")
    parser.add_argument("--kills", type=int, default=KILLS, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--fresh", action="store_true", help="forget the result that is there")
    parser.add_argument("--page", action="store_true", help="write the page from the result that is there")
    options = parser.parse_args()
    with one_line():
        if not options.page:
            measure(options.only, options.kills, options.seed, options.fresh)
        write_text(PAGE, page(json.loads(RESULT.read_text(encoding="utf-8"))))
        print(f"written: {RESULT} and {PAGE}")


if __name__ == "__main__":
    main()
