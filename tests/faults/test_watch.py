"""If one rank dies, hangs or fails, all ranks exit soon, with one message that names it."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore

from compt.dist import collectives as dist
from compt.dist.watch import thread
from compt.dist.watch.causes import Cause, Seen
from compt.dist.watch.store import Life, Post, process_state
from compt.dist.watch.thread import Watch, alive, beat
from compt.errors import DataError, Interrupted, RunError
from compt.train.signals import StopSignal
from tests.faults.group import Ended, Group, mark
from tests.helpers.process import ended as gone
from tests.helpers.recipe import FIRST, chain, make_data

TIMEOUT = 10.0
"""Half of it without a sign of life counts as dead: a busy machine has to give every process its turn in that time."""


def steps(folder: Path, fault: Callable[[int, int], None] | None = None, count: int = 100_000) -> None:
    """Steps with a collective each; `fault(rank, step)` may do anything."""
    with Watch(folder, TIMEOUT) as watch:
        for step in range(count):
            watch.beat(step, "reading data")
            if fault is not None:
                fault(dist.rank(), step)
            watch.beat(step, "computing")
            dist.all_reduce_sum(1.0)
            if step == 100 and dist.is_main():
                mark(folder, "begun")
            time.sleep(0.01)


def hang(rank: int, step: int) -> None:
    if (rank, step) == (1, 150):
        time.sleep(3600)


def hang_first(rank: int, step: int) -> None:
    if (rank, step) == (0, 150):
        time.sleep(3600)


def fail(rank: int, step: int) -> None:
    if (rank, step) == (1, 150):
        raise DataError("000007.tar holds nothing")


def break_down(rank: int, step: int) -> None:
    if (rank, step) == (1, 150):
        raise KeyError("no such thing")


def agreed(rank: int, step: int) -> None:
    if step == 150:
        dist.agree(RunError("together") if rank == 1 else None)


def interrupted(rank: int, step: int) -> None:
    if step == 150:
        raise Interrupted("stopped by SIGTERM")


def slowly(folder: Path) -> None:
    """Long phases that are not hangs: one with a longer limit, one that reports progress, ranks that end far apart."""
    watch = Watch(folder, 3.0)
    watch._silence = 30.0  # a busy machine may keep a process waiting that long
    with watch:
        beat(1, "evaluating", patience=4.0)
        time.sleep(4.0)
        beat(2, "reading data", patience=1.5)
        for _ in range(10):
            time.sleep(0.6)
            alive()
        beat(3, "ending", patience=10.0)
        if dist.rank() == 1:
            time.sleep(4.0)
    mark(folder, f"ended{dist.rank()}")


def unequal(folder: Path) -> None:
    """One rank hangs and the other waits for it, with no heartbeat in between."""
    with Watch(folder, TIMEOUT) as watch:
        watch.beat(7, "waiting for data")
        if dist.rank() == 1:
            time.sleep(3600)
        dist.any_true(False)


def in_step(folder: Path, timeout: float = TIMEOUT) -> None:
    """All hang in the same place."""
    with Watch(folder, timeout) as watch:
        watch.beat(7, "waiting for data")
        time.sleep(3600)


def looks_late(folder: Path) -> None:
    """Rank 0 pauses between reading rank 1's heartbeat and looking at its process, which exits normally meanwhile."""
    real = thread.dead

    def late(seen: dict[int, Seen], silence: float) -> Cause | None:
        life = seen[1].life
        if life is not None and not (folder / "looking").exists():
            mark(folder, "looking")
            wait_until(lambda: process_state(life.pid, life.born) == "gone")
        return real(seen, silence)

    if dist.is_main():
        thread.dead = late  # type: ignore[assignment]
    with Watch(folder, 30.0):
        wait_until((folder / "looking").exists)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)


def before_the_watch(folder: Path) -> None:
    """A rank ends before a run folder is known, and the others are in a collective."""
    dist.barrier()
    if dist.rank() == 1:
        mark(folder, "begun")
        time.sleep(3600)
    dist.gather_objects(dist.rank())


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    started: list[Group] = []

    def start(function: Callable[..., Any], *arguments: Any, world: int = 2, agent: bool = False) -> Group:
        folder = tmp_path / f"group{len(started)}"
        started.append(Group(folder, world, function, folder, *arguments, agent=agent))
        return started[-1]

    yield start
    for group in started:
        group.kill()


def message(ended: Ended) -> str:
    """The one message."""
    lines = [line for line in ended.said.splitlines() if line.startswith("compt")]
    assert len(lines) == 1, ended.said
    return lines[0]


def test_a_rank_that_is_killed_before_anybody_watches(groups: Callable[..., Group]) -> None:
    group = groups(before_the_watch, world=3)
    group.wait_for("begun")
    time.sleep(0.5)
    os.kill(group.pid(1), signal.SIGKILL)
    ended = group.end(60)
    for rank in (0, 2):
        assert "another process of this job has exited or cannot be reached" in ended.output[rank]
    assert ended.codes == [5, -signal.SIGKILL, 5]
    assert "Traceback" not in ended.said


@pytest.mark.parametrize(("rank", "agent"), [(0, False), (1, False), (0, True), (2, True)])
def test_a_rank_that_is_killed(rank: int, agent: bool, groups: Callable[..., Group]) -> None:
    group = groups(steps, world=3, agent=agent)
    group.wait_for("begun")
    os.kill(group.pid(rank), signal.SIGKILL)
    ended = group.end(60)
    text = message(ended)
    assert f"rank {rank} (host " in text
    assert f"pid {group.pid(rank)}), at step " in text
    assert "has died" in text
    assert ended.codes == [-signal.SIGKILL if other == rank else 5 for other in range(3)]
    assert "Traceback" not in ended.said
    assert "c10d" not in ended.said, "nobody asks a store that is gone"
    assert ended.seconds < 4 * TIMEOUT


@pytest.mark.parametrize(("rank", "agent"), [(0, False), (1, True)])
def test_a_rank_that_is_stopped(rank: int, agent: bool, groups: Callable[..., Group]) -> None:
    group = groups(steps, agent=agent)
    group.wait_for("begun")
    os.kill(group.pid(rank), signal.SIGSTOP)
    ended = group.end(90)
    text = message(ended)
    assert f"rank {rank} (host " in text
    assert "has been stopped" in text
    assert ended.codes[1 - rank] == 5
    assert ended.codes[rank] == -signal.SIGKILL, "what cannot end itself is ended"
    assert list((group.folder / "faults").glob(f"rank-{1 - rank}-*.txt"))
    assert ended.seconds < 4 * TIMEOUT


@pytest.mark.parametrize("fault", [hang, hang_first])
def test_a_rank_that_does_not_get_on(fault: Any, groups: Callable[..., Group]) -> None:
    group = groups(steps, fault)
    group.wait_for("begun")
    ended = group.end(90)
    rank = 1 if fault is hang else 0
    text = message(ended)
    assert f"rank {rank} (host " in text
    assert "at step 150, reading data for" in text
    assert "is stuck, and all others wait for it" in text
    assert ended.codes == [5, 5]
    stacks = {path.name.split("-")[1]: path.read_text() for path in (group.folder / "faults").glob("rank-*.txt")}
    assert stacks.keys() == {"0", "1"}
    assert fault.__name__ in stacks[str(rank)]
    assert "all_reduce" in stacks[str(1 - rank)]
    assert ended.seconds < 4 * TIMEOUT


def test_of_equally_far_ranks_the_one_that_waits_for_nobody_is_named(groups: Callable[..., Group]) -> None:
    assert "rank 1 (host " in message(groups(unequal).end(90))


def test_when_nobody_gets_on_nobody_is_blamed(groups: Callable[..., Group]) -> None:
    text = message(groups(in_step).end(90))
    assert f"no process made progress for {TIMEOUT:g} s" in text
    assert "like the others" in text


def test_an_error_of_one_rank_is_told_once(groups: Callable[..., Group]) -> None:
    ended = groups(steps, fail).end(90)
    assert message(ended) == "compt: rank 1: 000007.tar holds nothing"
    assert ended.codes == [3, 3]
    assert "Traceback" not in ended.said


def test_a_fault_of_the_program_on_one_rank(groups: Callable[..., Group]) -> None:
    group = groups(steps, break_down)
    ended = group.end(90)
    text = message(ended)
    assert "rank 1 (host " in text
    assert "failed: KeyError: 'no such thing'" in text
    (told,) = (group.folder / "faults").glob("rank-1-error-*.txt")
    assert "break_down" in told.read_text()
    assert str(told) in text
    assert "Traceback" not in ended.output[0]
    assert ended.output[1].count("Traceback") == 1
    assert ended.codes == [5, 1]


def test_jobs_that_share_a_folder_keep_what_each_has_to_tell(groups: Callable[..., Group], tmp_path: Path) -> None:
    group = groups(steps, break_down)
    other = Group(tmp_path / "other", 2, steps, group.folder, break_down)
    assert [each.end(90).codes for each in (group, other)] == [[5, 1]] * 2
    assert len(list((group.folder / "faults").glob("rank-1-error*.txt"))) == 2


def test_an_error_of_all_ranks_passes(groups: Callable[..., Group]) -> None:
    group = groups(steps, agreed)
    ended = group.end(90)
    assert message(ended) == "compt: together"
    assert ended.codes == [5, 5]
    assert not (group.folder / "faults").exists()


def test_a_signal_to_all_is_told_once(groups: Callable[..., Group]) -> None:
    ended = groups(steps, interrupted).end(90)
    assert message(ended) == "compt: stopped by SIGTERM"
    assert ended.codes == [75, 75]


def test_long_phases_and_ends_far_apart_are_no_fault(groups: Callable[..., Group]) -> None:
    group = groups(slowly)
    ended = group.end(60)
    assert ended.codes == [0, 0], ended.said
    assert "compt" not in ended.said
    assert (group.folder / "ended0").exists()
    assert (group.folder / "ended1").exists()
    assert not (group.folder / "faults").exists()


def test_a_rank_that_ends_in_order_while_it_is_looked_at(groups: Callable[..., Group]) -> None:
    ended = groups(looks_late).end(60)
    assert (ended.codes, ended.said) == ([0, 0], "")


def deaf(folder: Path) -> None:
    """The main thread is in a C call that no signal interrupts, so no Python handler runs."""
    thread.HURRY = 1.0
    mutex = ctypes.create_string_buffer(64)
    with StopSignal(), Watch(folder, 600.0) as watch:
        watch.beat(7, thread.TRAINING)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
        mark(folder, "begun")
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def test_a_single_process_that_hangs_ends(groups: Callable[..., Group]) -> None:
    group = groups(in_step, 2.0, world=1)
    ended = group.end(60)
    text = message(ended)
    assert text.startswith("compt: no process made progress for 2 s; rank 0 (host ")
    assert "at step 7, waiting for data for" in text
    assert "/dev/shm" in text, "the likely cause"
    assert "--shm-size" in text, "and the remedy"
    assert "engine.workers" in text
    assert ended.codes == [5]
    (stacks,) = (group.folder / "faults").glob("rank-0-*.txt")
    assert "in_step" in stacks.read_text()


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_is_heard_in_a_call_that_never_returns(world: int, groups: Callable[..., Group]) -> None:
    group = groups(deaf, world=world)
    group.wait_for("begun")
    time.sleep(0.5)
    for rank in range(world):
        os.kill(group.pid(rank), signal.SIGTERM)
    ended = group.end(60)
    assert "compt: stopped by SIGTERM, without saving what came after the newest checkpoint: " in message(ended)
    assert "at step 7, training for" in message(ended)
    assert ended.codes == [75] * world


# --- loader processes, in a real chain


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("loaders"))


def loader_process(group: Group, run: Path) -> int:
    """Wait until the first link trains, and return the pid of a loader process of the last rank."""
    for _ in range(6000):
        found = psutil.Process(group.pid(len(group.processes) - 1)).children()
        if found and (run / "jobs" / FIRST / "metrics.jsonl").exists():
            return found[0].pid
        time.sleep(0.02)
    raise AssertionError(group.output())


LONG_RUN = (
    "chain.links.0.train={steps: 100000}",
    "evaluation.every=",
    "engine.workers=1",
    "engine.log_every={steps: 1}",
)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loader_process_that_is_killed_is_named(
    world: int, base: Path, tmp_path: Path, groups: Callable[..., Group]
) -> None:
    run = tmp_path / "run"
    group = groups(in_folder, base, run, LONG_RUN, world=world)
    pid = loader_process(group, run)
    os.kill(pid, signal.SIGKILL)
    ended = group.end(60)
    assert f"loader process {pid} was killed by SIGKILL; the system does this when memory runs out" in message(ended)
    assert ended.codes == [5] * world
    assert "Traceback" not in ended.said


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [False, True])
def test_a_loader_process_that_is_stopped_is_named_and_a_signal_heard(
    signalled: bool, base: Path, tmp_path: Path, groups: Callable[..., Group]
) -> None:
    run = tmp_path / "run"
    group = groups(in_folder, base, run, (*LONG_RUN, "engine.timeout=4"), world=1)
    pid = loader_process(group, run)
    os.kill(pid, signal.SIGSTOP)
    if signalled:
        time.sleep(1.0)
        os.kill(group.pid(0), signal.SIGTERM)
    ended = group.end(60)
    assert ended.codes == [75 if signalled else 5], ended.said
    said = message(ended)
    assert ("stopped by SIGTERM at step" if signalled else f"stopped its loader process {pid}") in said
    assert gone([pid]), "nothing is left of it"


def in_folder(folder: Path, base: Path, run: Path, changes: tuple[str, ...]) -> None:
    chain(base, run, *changes)


@pytest.mark.full
def test_a_job_that_is_suspended_as_a_whole_goes_on(groups: Callable[..., Group]) -> None:
    group = groups(steps, None, 400)
    group.wait_for("begun")
    for rank in (0, 1):
        os.kill(group.pid(rank), signal.SIGSTOP)
    time.sleep(2.5 * TIMEOUT)
    for rank in (1, 0):
        os.kill(group.pid(rank), signal.SIGCONT)
        time.sleep(0.3)
    ended = group.end(60)
    assert ended.codes == [0, 0], ended.said


def other_machine(rank: int, tick: int, left: bool = False) -> str:
    """A heartbeat of a rank on another machine, of which nothing else can be seen."""
    return replace(
        Life.here(tick=tick, rank=rank, name="", count=9, step=9, doing="computing", age=0.0, where="", left=left),
        host=f"n{rank}",
        place=str(rank),
    ).to_json()


def test_a_watch_that_ended_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        with Watch(tmp_path, 600.0) as watch:
            watch.beat(1, "computing")
    del watch
    until = time.monotonic() + 20
    while (left := set(threading.enumerate()) - before) and time.monotonic() < until:
        time.sleep(0.01)
    assert left == set()


def test_who_asks_an_answer_waits_for_ranks_that_it_never_watched(tmp_path: Path) -> None:
    """Rank 2 of four machines is dead, which only rank 1 has seen; the launcher's signal to rank 0 is no cause."""
    store: Any = HashStore()
    watch = Watch(tmp_path, 600.0)
    watch.rank, watch.world, watch._token, watch._store_is_with_rank_0 = 0, 4, "token", True
    watch._post, watch._seen = Post(store), {1: Seen()}
    store.set("cause", "-")
    for rank in (1, 2, 3):
        store.set(str(rank), other_machine(rank, 1))
    watch._look()
    watch._error, watch._asked_at = Interrupted("stopped by SIGTERM"), time.monotonic()
    for tick in (2, 3):
        for rank in (1, 3):
            store.set(str(rank), other_machine(rank, tick))
        assert watch._look() is None
    store.set("2", other_machine(2, 2))
    cause = watch._look()
    assert cause is not None
    assert (cause.kind, cause.rank, cause.text) == ("failed", 0, "stopped by SIGTERM")


def test_who_holds_the_store_waits_for_those_that_live(tmp_path: Path) -> None:
    """Rank 1 exits a little later; rank 2 on a third machine sends no more heartbeats."""
    store: Any = HashStore()
    watch = Watch(tmp_path, 600.0)
    watch.rank, watch.world, watch._token, watch._store_is_with_rank_0 = 0, 3, "token", True
    watch._post, watch._seen, watch._silence = Post(store), {1: Seen()}, 3.0
    store.set("cause", "-")
    store.set("2", other_machine(2, 1))
    begun = time.monotonic()

    def live() -> None:
        for tick in range(50):
            store.set("1", other_machine(1, tick, left=tick == 49))
            time.sleep(0.1)

    threading.Thread(target=live).start()
    watch._leave(60.0)
    assert 4.9 < time.monotonic() - begun < 30.0
    assert Life.from_json(store.get("0")).left
