"""Checkpoints written once for all tests of a process: starting ranks takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.spawn import run_ranks
from tests.sources.written import write_dcp, write_zeros


@pytest.fixture(scope="session")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DeepSpeed checkpoint for each of `written.ZEROS`, by two ranks."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'compt[deepspeed]'")
    folder = tmp_path_factory.mktemp("zero")
    run_ranks(write_zeros, 2, str(folder))
    return folder


@pytest.fixture(scope="session")
def dcps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of torch.distributed.checkpoint, `alone` and `two`, by two ranks."""
    folder = tmp_path_factory.mktemp("dcp")
    run_ranks(write_dcp, 2, str(folder))
    return folder
