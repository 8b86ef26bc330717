"""Joining a process group: what the environment must contain, and what happens if no rank answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, TCPStore
from torch.distributed.distributed_c10d import _get_default_store
from torch.testing._internal.distributed.fake_pg import FakeStore

from compt.cli import main as cli
from compt.dist import collectives as dist
from compt.dist.environment import Place
from compt.dist.rendezvous import meet, of_attempt
from compt.errors import ComptError, ConfigError, Gone, RunError
from tests.dist.spawn import CONTEXT
from tests.faults.group import Group
from tests.helpers.ports import free_port
from tests.helpers.process import finish, start

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_an_environment_there_is_one_process_and_no_group() -> None:
    assert dist.init("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert dist.world_size() == 1
    dist.shutdown()


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="MASTER_ADDR is not"):
        dist.init("cpu")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", "cuda:-1", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        dist.init(device)


@pytest.mark.parametrize(("backend", "refused"), [("cuda:fake", True), ("cpu:fake,cuda:fake", False)])
def test_a_group_of_the_caller_s_needs_a_backend_for_the_cpu(backend: str, refused: bool) -> None:
    torch.distributed.init_process_group(backend, store=FakeStore(), rank=0, world_size=2)
    try:
        if refused:
            with pytest.raises(ConfigError, match=r"backend cuda:fake\) has no backend for CPU.*cpu:gloo,cuda:nccl"):
                dist.init("cpu")
        else:
            assert dist.init("cpu") == torch.device("cpu")
    finally:
        dist.shutdown()


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_answers(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    start = time.monotonic()
    why = f"It waited because RANK={rank} and WORLD_SIZE=2 are set; to run one process, unset both"
    with pytest.raises(RunError, match=rf"rank {rank} of 2 found no process group at 127.0.0.1:{port} .*{why}"):
        dist.init("cpu", connect_seconds=4.0)
    assert time.monotonic() - start < 20
    assert not torch.distributed.is_initialized()


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_somebody_else_listens_and_never_answers(world: int, tmp_path: Path) -> None:
    """torch's client would wait for ever. Every rank exits with its own line."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = Group(tmp_path, world, print, "together", port=port, connect_seconds=4).end(90)
    assert ended.codes == [RunError.exit_code] * world
    assert ended.seconds < 40
    for rank, said in enumerate(ended.output):
        assert said.count("\n") == 1, said
        assert f"compt: rank {rank} of {world} found no process group at 127.0.0.1:{port} within 4 s: " in said
        assert said.endswith("set MASTER_PORT to another port\n")
    assert f"rank 0 cannot open port {port} (address already in use)" in ended.output[0]
    assert "something listens there that never answers" in ended.output[1]


@pytest.mark.dist
@pytest.mark.parametrize("answers", [False, True])
def test_who_serves_the_store_does_not_answer(answers: bool) -> None:
    """A store that never answers, and one that stops while ranks are missing."""
    place = Place(1, 3, 1, "127.0.0.1", free_port())
    serves = CONTEXT.Event()
    server = start(serve, place.port, serves)
    assert server.pid is not None
    try:
        assert serves.wait(60)
        if answers:
            threading.Timer(2.0, os.kill, [server.pid, signal.SIGSTOP]).start()
        else:
            os.kill(server.pid, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(RunError, match="rank 0 stopped answering" if answers else "never answers"):
            meet(place, 6.0 if answers else 4.0)
        assert time.monotonic() - begun < 16
    finally:
        server.kill()
        server.join()


def serve(port: int, serves: Any) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    serves.set()
    time.sleep(60)
    del store


@pytest.mark.dist
def test_a_rank_ends_just_after_it_has_come(tmp_path: Path) -> None:
    """A rank fails before all are connected: the others wait at most as long as for connecting, and each prints it."""
    variables = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    begun = time.monotonic()
    places = [{**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(3)]
    ranks = [start(ending, place, tmp_path / place["RANK"]) for place in places]
    assert [finish(rank, 150.0) for rank in ranks] == [5, 9, 5]
    assert time.monotonic() - begun < 120  # a collective may take 300
    for rank in (0, 2):
        said = (tmp_path / str(rank)).read_text()
        assert f"rank {rank} of 3 has no connection to the others" in said
        assert "one exited after it had connected, or GLOO_SOCKET_IFNAME" in said


def ending(place: dict[str, str], said: Path) -> None:
    os.environ.update(place)
    if place["RANK"] == "1":
        dist.choose_interface = lambda place: os._exit(9)
    try:
        dist.init("cpu", timeout_seconds=300.0, connect_seconds=8.0)
    except ComptError as error:
        said.write_text(str(error))
        os._exit(error.exit_code)


@pytest.mark.parametrize("level", ["OFF", "DETAIL"])
def test_collectives_have_their_time_however_short_the_meeting_is(level: str, tmp_path: Path) -> None:
    """Under TORCH_DISTRIBUTED_DEBUG=DETAIL torch cannot change a group's limit later."""
    assert finish(start(limits, alone() | {"TORCH_DISTRIBUTED_DEBUG": level}, tmp_path / "said"), 90.0) == 0
    assert (tmp_path / "said").read_text().split() == ["333.0", "333.0"]


def alone() -> dict[str, str]:
    """The environment of a group of one."""
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def limits(place: dict[str, str], said: Path) -> None:
    os.environ.update(place)
    torch.distributed.set_debug_level_from_env()
    assert torch.distributed.get_debug_level().name == place["TORCH_DISTRIBUTED_DEBUG"]
    dist.init("cpu", timeout_seconds=333.0, connect_seconds=8.0)
    store = torch.distributed.distributed_c10d._get_default_store()
    said.write_text(f"{dist._timeout().total_seconds()} {store.timeout.total_seconds()}")
    os._exit(0)


@pytest.mark.dist
def test_a_restarted_attempt_does_not_see_the_keys_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun's agent keeps the store: the failure of an earlier trial would end the new attempt's first search."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    kept = HashStore()
    monkeypatch.setattr(dist, "meet", lambda place, seconds: kept)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        dist.init("cpu")
        try:
            store = _get_default_store()
            assert not store.check(["failed"])
            assert not of_attempt("meet", kept).check(["here/0"])
            store.set("failed", "")
            of_attempt("meet", kept).set("here/0", "")
        finally:
            dist.shutdown()


@pytest.mark.dist
def test_rank_0_prints_an_agreed_error_before_a_launcher_stops_it(tmp_path: Path) -> None:
    """torchrun stops all ranks as soon as one exits."""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [{**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    ranks = [start(agreeing, place, tmp_path / place["RANK"]) for place in places]
    ranks[1].join(90.0)
    ranks[0].terminate()
    assert [finish(rank, 90.0) for rank in ranks] == [RunError.exit_code] * 2
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["compt: they agree\n", ""]


def agreeing(place: dict[str, str], said: Path) -> None:
    """A slow rank 0 and a fast rank 1, which agree about an error."""
    os.environ.update(place)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)

    def app(*_: Any, **__: Any) -> None:
        dist.init("cpu")
        try:
            dist.agree(RunError("they agree"))
        finally:
            dist.shutdown()
            if place["RANK"] == "0":
                time.sleep(1.0)

    cli.app = app  # type: ignore[assignment]
    cli.run()


LEFT = """
import os
from pathlib import Path
from compt.dist import collectives as dist
def threads():
    return [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
dist.init("cpu")
import compt.chain.run, compt.engines.ddp, compt.engines.fsdp2, compt.evaluate.expansion
dist.group_beside()
before = threads()
dist.shutdown()
print(before.count("pt_gloo_runloop") > 0, threads().count("pt_gloo_runloop"))
"""


@pytest.mark.slow
def test_a_group_that_was_left_leaves_no_threads() -> None:
    """They would free Python's tensors while Python shuts down, which aborts the process."""
    # A new interpreter: what is imported after the group was made kept it alive.
    found = subprocess.run(
        [sys.executable, "-c", LEFT], env={**os.environ, **alone()}, capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == ["True", "0"], found.stderr


def test_a_rank_that_cannot_join_says_why() -> None:
    place = Place(3, 4, 3, "127.0.0.1", free_port())
    cuda = torch.device("cuda", 0)
    for text in ("NCCL error\nncclSystemError: x\nLast error:\nNo space left on /dev/shm", "CUDA out of memory"):
        error = dist._not_joined(torch.distributed.DistBackendError(text), place, cuda)
        assert str(error) == f"rank 3 of 4 cannot join the others: {text.splitlines()[0]}" + (
            ": No space left on /dev/shm" if "shm" in text else ""
        )


def test_rank_0_alone_prints_an_agreed_error() -> None:
    with pytest.raises(RunError) as caught:
        dist.agree(RunError("no samples"))
    assert [caught.value.printed_by(rank) for rank in "012"] == [True, False, False]
    assert RunError("its own").printed_by("2")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), Gone),
        (torch.distributed.DistBackendError("NCCL error\nncclRemoteError: x\nLast error:\n peer 3 left\n"), Gone),
        (torch.distributed.DistBackendError("NCCL error\nLast error:\nFailed to CUDA calloc: out of memory"), None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), None),
        (torch.OutOfMemoryError("CUDA out of memory."), None),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_what_fails_in_a_collective_is_anothers_end_or_ones_own(error: RuntimeError, kind: type | None) -> None:
    with pytest.raises(kind or type(error)) as caught, dist.together():
        raise error
    assert caught.value is error if kind is None else "another process of this job" in str(caught.value)
    assert ("peer 3 left" in str(error)) == ("(NCCL error: peer 3 left)" in str(caught.value))


@pytest.mark.dist
def test_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    try:
        dist.init("cpu", timeout_seconds=77.0)
        assert torch.distributed.is_initialized()
        assert dist.world_size() == 1
        assert dist.all_reduce_sum(2) == 2.0
        dist.barrier()
        for group in (dist.new_cpu_group(), dist.group_beside()):
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 77.0
    finally:
        dist.shutdown()
    assert not torch.distributed.is_initialized()
