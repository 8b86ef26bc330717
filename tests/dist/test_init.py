"""Joining a process group: what the environment must hold and what happens when nobody answers."""

from __future__ import annotations

import socket
import time

import pytest
import torch

from compt import dist
from compt.errors import ConfigError, RunError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        dist.init(device)


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_answers(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    start = time.monotonic()
    with pytest.raises(RunError, match=rf"rank {rank} of 2 found no process group at 127.0.0.1:{port}"):
        dist.init("cpu", connect_seconds=4.0)
    assert time.monotonic() - start < 10
    assert not torch.distributed.is_initialized()


@pytest.mark.dist
def test_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    try:
        dist.init("cpu")
        assert torch.distributed.is_initialized()
        assert dist.world_size() == 1
        assert dist.all_reduce_sum(2) == 2.0
        dist.barrier()
    finally:
        dist.shutdown()
    assert not torch.distributed.is_initialized()
