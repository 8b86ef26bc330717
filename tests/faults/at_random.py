"""kill -9 at random moments, under one engine after another."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.group import Ended
from tests.faults.injected import Bench, Found

ENGINES = ("ddp", "fsdp2", "zero2")
KILLS_A_CHAIN = 3
CONNECT_SECONDS = 20.0
"""How long a rank waits for one that was killed before they met."""


def kill_at_random(
    bench: Bench, rng: random.Random, kills: int, folder: Path, show: Callable[[dict[str, Any]], None]
) -> None:
    """Kill one of two ranks `kills` times at random moments; each start continues where the last one was killed.

    A chain that was killed three times is let end, and the next one takes the next of ENGINES. `show` gets a record of
    each kill; that of the last one of a chain says how the chain ended.
    """
    number = 0
    while kills:
        run, engine = folder / f"random{number}", ENGINES[number % len(ENGINES)]
        rows: list[dict[str, Any]] = []
        ended = Ended([], [], 0.0)
        bench.whole(engine)
        while kills and len(rows) < KILLS_A_CHAIN and ended.codes != [0, 0]:
            wait, rank = rng.uniform(0.5, bench.seconds[engine]), rng.randrange(2)
            group = bench.start("none", run, engine=engine, connect_seconds=CONNECT_SECONDS)
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and any(process.is_alive() for process in group.processes):
                time.sleep(0.02)
            alive, started = group.processes[rank].is_alive(), time.monotonic()
            if alive:
                os.kill(group.pid(rank), signal.SIGKILL)
                kills -= 1
            ended = group.end(180)
            assert alive or ended.codes == [0, 0], ended.said
            if alive:
                seconds = round(time.monotonic() - started, 2)
                told = {"engine": engine, "rank": rank, "after_seconds": round(wait, 2), "exit_codes": ended.codes}
                rows.append(told | {"seconds": seconds})
        found = bench.finish(Found("", ended.codes, 0.0, "", engine=engine), run)
        for row in rows[:-1]:
            show(row)
        if rows:
            show(rows[-1] | {"finished": found.went_on, "same": found.same, "wrong_samples": found.wrong_samples})
        shutil.rmtree(run)
        number += 1
