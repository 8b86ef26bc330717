"""What a launcher starts in these tests: like `compt chain` it has a rank, and saves and ends with 75 on request.

worker.py FOLDER RANK=WHAT…, where WHAT is `fail` or `die`; ranks that are not named wait to be asked to stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from compt.cli.launch import recorded
from compt.errors import ComptError, DataError, Interrupted


@recorded()
def main(folder: Path, plans: dict[str, str]) -> None:
    rank = os.environ["RANK"]
    plan = plans.get(rank, "wait")
    heard: list[int] = []

    def hear(number: int, _: FrameType | None) -> None:
        heard.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hear)
    (folder / f"begun-{rank}").write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not heard and time.monotonic() < deadline:
        time.sleep(0.02)
        if plan != "wait" and len(list(folder.glob("begun-*"))) == int(os.environ["WORLD_SIZE"]):
            break
    try:
        if plan == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if plan == "fail":
            raise DataError("bad data")
        time.sleep(0.3)
        (folder / f"saved-{rank}").write_text(signal.Signals(heard[0]).name)
        stop = Interrupted("stopped")
        # With a dead rank no agreement is possible.
        stop.agreed = not plans
        raise stop
    except ComptError as error:
        sys.exit(error.exit_code)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local")]
    main(Path(words[0]), dict(word.split("=") for word in words[1:]))
