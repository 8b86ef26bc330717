"""When a process dies, hangs or fails alone, end the job on all processes and name the cause once.

Collectives wait for every rank. Without the watch, ranks whose neighbour is gone wait until the timeout, and a launcher
that does not kill them, such as `srun` by default, leaves them there. So each process has a thread that writes a
heartbeat to the store in which the ranks met, reads the heartbeat of the next rank, and measures how long its own main
thread has made no progress. A thread that finds a cause posts it in the store, where all others read it. A single
process has the same thread, and a store in its own memory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import psutil
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from compt.dist import collectives as dist
from compt.dist.rendezvous import of_attempt
from compt.dist.watch.causes import WAITING, Cause, Seen, dead, hanging, is_consequence, lost, obstacle, where
from compt.dist.watch.store import Life, Lost, Post
from compt.errors import ComptError, Gone, Interrupted
from compt.text import visible

FOLDER = "faults"
"""Folder below the run folder for stacks and causes."""
SILENCE = 20.0
"""Seconds without a heartbeat after which a process counts as dead."""
LEAVING = 60.0
"""Seconds that the rank with the store waits, at an orderly end, for slower ranks."""
LONG = 6.0
"""How many times longer than a step the long phases may take: evaluation, expansion, first step, writing."""
HURRY = 15.0
"""Seconds without progress, after SIGTERM, SIGUSR1 or Ctrl-C, that a phase of `HURRIED` may take."""
TRAINING, EVALUATING = "training", "evaluating"
HURRIED = frozenset({WAITING, TRAINING, EVALUATING})
"""Phases that a stop cuts off where they hang. Writing is not one: it keeps what was trained."""

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to save and end."""

_INTERVAL = 0.5
_NONE = "-"


def collective_timeout(timeout: float) -> float:
    """Return the timeout for collectives: longer than the watch takes, and long enough for the long phases."""
    return timeout * LONG + 2 * SILENCE


@dataclass(frozen=True)
class _Beat:
    """What the main thread has been doing since `at` (monotonic clock). At one place all ranks have one `count`."""

    count: int
    step: int
    doing: str
    patience: float
    at: float


class Watch:
    """Watches the processes of a job within its `with` block, which all of them enter and leave.

    `beat(step, doing)` reports progress of the main thread; `timeout` seconds without one (times the `patience` of what
    it does) count as hanging. After a signal to stop, `HURRY` seconds do, or three times what the same phase took
    before. Stacks are written below `folder`.

    An error that only one process raises ends the job on all of them; on the others the block raises RunError.
    Processes that are stuck and cannot raise it end with its exit code at once.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder, self.timeout = folder / FOLDER, timeout
        self._silence = min(SILENCE, timeout / 2)
        self._interval = min(_INTERVAL, self._silence / 5)
        self._beat = _Beat(0, 0, "starting", LONG, time.monotonic())
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._verdict = threading.Event()
        self._error: BaseException | None = None
        self._asked_at = 0.0
        self._cause: Cause | None = None
        self._tick = 0
        self._left = False
        self._name = ""
        self._seen: dict[int, Seen] = {}
        self._took: dict[str, float] = {}
        self._request, self._pipe = ("", 0.0), (-1, -1)
        self._main = threading.main_thread()

    # --- the main thread

    def beat(self, step: int, doing: str, patience: float = 1.0) -> None:
        """Report that the main thread starts something. Every rank makes the same calls in the same order."""
        self._proceed(_Beat(self._beat.count + 1, step, doing, patience, time.monotonic()))

    def _proceed(self, beat: _Beat) -> None:
        self._took[self._beat.doing] = beat.at - self._beat.at
        self._beat = beat

    def about(self, name: str) -> None:
        """Set the name of the job that the next steps belong to."""
        self._name = name

    def alive(self) -> None:
        """Report progress with the same thing; ranks may call it any number of times."""
        self._proceed(replace(self._beat, at=time.monotonic()))

    def __enter__(self) -> Watch:
        self.rank, self.world = dist.rank(), dist.world_size()
        self._beat = _Beat(0, 0, "starting", LONG, time.monotonic())
        self._stop.clear()
        self._left = False
        with dist.together():
            self._join()
        self._hear()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()
        _open.append(self)
        return self

    def _hear(self) -> None:
        """Let the system note signals in a pipe: Python's handlers wait until the main thread returns from a call."""
        self._request, self._pipe = ("", 0.0), os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        own = threading.current_thread() is self._main
        self._pipe_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False) if own else -1

    def _close_pipe(self) -> None:
        if threading.current_thread() is self._main:
            signal.set_wakeup_fd(self._pipe_before)
        for end in self._pipe:
            os.close(end)

    def _join(self) -> None:
        """Meet the other ranks in the store, over a connection of its own."""
        found = _get_default_store().clone() if self.world > 1 else HashStore()  # type: ignore[attr-defined]
        store = of_attempt(f"watch/{next(_numbers)}", found)
        store.set(str(self.rank), self._life().to_json())
        if self.rank == 0:
            store.set("token", time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + f"-{os.getpid()}")
        self._token = store.get("token").decode()
        store.compare_set("cause", "", _NONE)
        self._post = Post(store)
        self._store_is_with_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._seen = {rank: Seen() for rank in {(self.rank + 1) % self.world, 0} - {self.rank}}
        if self.rank:
            self._seen[0].update(Life.from_json(store.get("0")))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        _open.remove(self)
        if error is None:
            self.beat(self._beat.step, "waiting for the others to end", LONG)
            try:
                dist.barrier()
            except (ComptError, RuntimeError) as failure:
                self._judge(failure)
                raise
        if self.world == 1 or error is None or (isinstance(error, ComptError) and error.agreed):
            self._stop.set()
            self._wake.set()
            self._thread.join()
            self._close_pipe()
            return
        self._judge(error)

    @property
    def _error_file(self) -> str:
        return f"rank-{self.rank}-error-{self._token}.txt"  # jobs may share the folder

    def _judge(self, error: BaseException) -> None:
        """Raise the cause if another rank is to blame; return if this rank's `error` is the cause."""
        if not _said(error):
            self._write(self._error_file, "".join(traceback.format_exception(error)))
        self._error, self._asked_at = error, time.monotonic()
        self._wake.set()
        while self._cause is None and self._thread.is_alive():
            # Ignore the launcher's SIGTERM here: it follows from another rank's death and would hide the cause.
            with contextlib.suppress(Interrupted):
                self._verdict.wait(1.0)
        cause = self._cause
        if cause is None:
            return
        own = cause.kind == "failed" and cause.rank == self.rank
        raised = error if own else cause.error()
        if isinstance(raised, ComptError):
            raised.printed = True
        if not own:
            raise raised from None

    # --- the watching thread

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            self._wake.wait(self._interval)
            if self._stop.is_set():
                break
            if self._error is not None:
                # The sockets of a dying rank 0 close just before /proc shows it as gone: asking its store in between
                # would print torch's C++ stack.
                time.sleep(0.1)
            now = time.monotonic()
            if now - before > 5 * self._interval:  # this process was stopped, maybe with all others: no one is to blame
                self._forgive(now - before)
            try:
                cause = self._look()
            except Lost:
                ended = self._stop.wait(3 * self._interval)
                cause = None if ended else lost(self._seen.get(0), self._store_is_with_rank_0)
            before = time.monotonic()
            if cause is not None:
                self._end(cause)
                return
        self._leave(max(LEAVING, self._silence))

    def _leave(self, seconds: float, dead: int = -1) -> None:
        """Tell the others that this rank leaves; the rank with the store first waits up to `seconds` for them."""
        self._left, until = True, time.monotonic() + seconds
        with contextlib.suppress(Lost):
            self._exchange()
            while self.rank == 0 and self._store_is_with_rank_0 and time.monotonic() < until:
                self._look_at_all()
                others = [seen for rank, seen in self._seen.items() if rank != dead and not seen.gone]
                if all(seen.quiet > self._silence or (seen.life is not None and seen.life.left) for seen in others):
                    break
                time.sleep(0.05)

    def _forgive(self, seconds: float) -> None:
        beat = self._beat
        self._beat = replace(beat, at=beat.at + seconds)
        for seen in self._seen.values():
            seen.at = time.monotonic()

    def _life(self) -> Life:
        self._tick += 1
        beat, age = self._beat, time.monotonic() - self._beat.at
        late = age > 2 * self._interval
        line, hint = (where(self._main), obstacle(beat.doing)) if late else ("", "")
        about = {"rank": self.rank, "name": self._name, "tick": self._tick, "left": self._left}
        done = {"count": beat.count, "step": beat.step, "doing": beat.doing, "age": round(age, 1)}
        return Life.here(**about, **done, where=line, hint=hint)

    def _look(self) -> Cause | None:
        """Write a heartbeat, then check those of others and the main thread; return a cause or None."""
        posted = self._exchange()
        if posted is not None:
            return posted
        beat = self._beat
        if self._error is not None:
            return self._answer(self._error)
        now, limit = time.monotonic(), self.timeout * beat.patience
        if now - beat.at > limit:
            return self._published(self._hanging(limit))
        name, asked_at = self._asked()
        hurry = max(HURRY, 3 * self._took.get(beat.doing, 0.0))
        if name and beat.doing in HURRIED and now - max(beat.at, asked_at) > hurry:
            cause = self._hanging(hurry)
            text = f"stopped by {name}, without saving what came after the newest checkpoint: {cause.text}"
            return self._published(replace(cause, text=text, exit_code=Interrupted.exit_code))
        return self._published(dead(self._seen, self._silence))

    def _asked(self) -> tuple[str, float]:
        """Return the first signal that asked this process to stop, and when it was read; ("", 0.0) before."""
        with contextlib.suppress(OSError):  # nothing to read
            for number in os.read(self._pipe[0], 64):
                if not self._request[0] and number in STOPS:
                    self._request = (signal.Signals(number).name, time.monotonic())
        return self._request

    def _exchange(self) -> Cause | None:
        own = self._life().to_json()
        for seen in self._seen.values():
            seen.look()
        if self._store_is_with_rank_0 and self.rank and self._seen[0].gone:
            raise Lost  # a request would fill the terminal with torch's warnings

        def action(store: Any) -> tuple[list[bytes], dict[int, bytes]]:
            store.set(str(self.rank), own)
            there = [rank for rank in self._seen if self._seen[rank].life is not None or store.check([str(rank)])]
            found = store.multi_get(["cause", *map(str, there)])
            return found[0], dict(zip(there, found[1:], strict=True))

        cause, lives = self._post.ask(action, self._silence)
        for rank, text in lives.items():
            self._seen[rank].update(Life.from_json(text))
        return self._read(cause)

    def _read(self, value: Any) -> Cause | None:
        text = value.decode()
        return None if text == _NONE else Cause(**json.loads(text))

    def _look_at_all(self) -> None:
        """Read the newest heartbeat of every other rank. One read for the first time does not yet count as alive."""
        new = set(range(self.world)) - {self.rank, *self._seen}
        self._seen.update((rank, Seen()) for rank in new)
        self._exchange()
        if self._asked_at:
            for rank in new:
                self._seen[rank].at = self._asked_at

    def _hanging(self, seconds: float) -> Cause:
        self._look_at_all()
        lives = [self._life(), *(other.life for other in self._seen.values() if other.life is not None)]
        return hanging(lives, seconds, self.timeout, self.folder)

    def _answer(self, error: BaseException) -> Cause | None:
        """Decide whether another rank or this one caused the main thread's error; None: not known yet."""
        self._look_at_all()
        other = dead(self._seen, self._silence)
        if other is not None:
            return self._published(other)
        # A launcher signals the others when one rank dies, so first every other rank has to send a new heartbeat.
        unheard = any(
            seen.life is not None and not seen.life.left and seen.at <= self._asked_at for seen in self._seen.values()
        )
        waited = time.monotonic() - self._asked_at
        if (unheard or is_consequence(error)) and waited < self._silence + 3 * self._interval:
            return None
        if _said(error):
            text = str(error) if self.rank == 0 or isinstance(error, Interrupted) else f"rank {self.rank}: {error}"
            return self._published(Cause("failed", self.rank, text, error.exit_code))
        what = traceback.format_exception_only(error)[-1].strip()
        place = self.folder / self._error_file
        return self._published(Cause("failed", self.rank, f"{self._life().named()} failed: {what} (more in {place})"))

    def _published(self, cause: Cause | None) -> Cause | None:
        """Post a cause and return the one that was posted first."""
        if cause is None:
            return None
        text = json.dumps(asdict(cause) | {"finder": self.rank})
        return self._read(self._post.ask(lambda store: store.compare_set("cause", _NONE, text), self._silence))

    # --- the end

    def _end(self, cause: Cause) -> None:
        """Print the cause on one rank. Then let the main thread raise it, or end the process if it cannot."""
        if cause.kind in ("hung", "silent"):
            self._dump()
        if self._prints(cause):
            sys.stderr.write(f"compt: {visible(cause.text)}\n")
            sys.stderr.flush()
        if cause.kind == "silent" and cause.rank in self._seen:
            self._kill(self._seen[cause.rank])
        self._leave(self._silence, cause.rank if cause.kind in ("died", "silent") else -1)
        if self._error is not None:
            self._cause = cause
            self._verdict.set()
            time.sleep(self._silence)  # the main thread ends the process, unless leaving the group hangs
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()  # one that is stopped would stay for ever, with its memory
        sys.stderr.flush()
        os._exit(cause.exit_code)

    def _prints(self, cause: Cause) -> bool:
        """Whether this rank prints the cause: its finder, or the first rank to write the file if each found it."""
        if cause.finder not in (-1, self.rank):
            return False
        try:
            # The finder writes it too: a rank that loses the store before it reads the cause finds this file.
            written = self._write(f"cause-{self._token}.txt", cause.text + "\n", mode="x")
        except FileExistsError:
            return False
        return written or cause.finder == self.rank or self.rank <= 1

    def _kill(self, other: Seen) -> None:
        """End a process of this machine that cannot end itself, and still holds memory, ports and the run folder."""
        if other.life is not None and other.state in ("stopped", "running"):
            with contextlib.suppress(OSError):
                os.kill(other.life.pid, signal.SIGKILL)

    def _write(self, name: str, text: str, mode: str = "w") -> bool:
        """Write a file in the folder of faults; return whether it worked. Raises FileExistsError in mode "x"."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / name).open(mode, encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise
        except OSError:
            return False
        return True

    def _dump(self) -> None:
        """Write the stack of every thread of this process."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        beat = self._beat
        who = f"rank {self.rank} of {self.world}, {socket.gethostname()}, pid {os.getpid()}"
        head = f"{who}: {self._name} step {beat.step}, {beat.doing} for {time.monotonic() - beat.at:.1f} s\n"
        name = f"rank-{self.rank}-{stamp}-{os.getpid()}.txt"
        if not self._write(name, head):
            faulthandler.dump_traceback(sys.stderr)
            return
        with (self.folder / name).open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)


def _said(error: BaseException) -> TypeGuard[ComptError]:
    """Whether an error needs no traceback."""
    return isinstance(error, ComptError) and not isinstance(error, Gone)


_open: list[Watch] = []
_numbers = itertools.count()
"""Numbers the watches of this process, the same on all ranks, so that each has its own keys in the store."""


def beat(step: int, doing: str, patience: float = 1.0) -> None:
    """Call `Watch.beat` of the innermost watch, if there is one."""
    if _open:
        _open[-1].beat(step, doing, patience)


def alive() -> None:
    """Call `Watch.alive` of the innermost watch, if there is one."""
    if _open:
        _open[-1].alive()
