"""Join a group, sum the ranks, and say so; print an error.

TOGETHER=N of the environment: only when N of them are as far.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from compt.dist import collectives as dist
from compt.dist.environment import own_rank
from compt.errors import ComptError


def wait_for_others(number: int) -> None:
    """Importing torch takes one process seconds longer than another on a machine that is busy."""
    Path(f"imported-{own_rank(os.environ)}").touch()
    while len(list(Path.cwd().glob("imported-*"))) < number:
        time.sleep(0.02)


if __name__ == "__main__":
    wait_for_others(int(os.environ.get("TOGETHER", "0")))
    try:
        dist.init("cpu", timeout_seconds=60.0)
        total = dist.all_reduce_sum(dist.rank())
        print(
            f"rank {dist.rank()} of {dist.world_size()}: {total:g} by {os.environ.get('GLOO_SOCKET_IFNAME')}",
            flush=True,
        )
        dist.shutdown()
    except ComptError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
