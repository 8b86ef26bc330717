"""Checkpoints written once for all tests: starting ranks takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.dist.spawn import run_ranks
from tests.helpers.optional import optional
from tests.unit.weights.written import write_dcp, write_zeros


def _once(factory: pytest.TempPathFactory, name: str, write: Callable[..., Any]) -> Path:
    """The folder that two ranks wrote, for all of pytest-xdist's processes."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{name}.unfinished")
            unfinished.mkdir()
            run_ranks(write, 2, str(unfinished))
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DeepSpeed checkpoint for each of `written.ZEROS`, by two ranks."""
    optional("deepspeed", "deepspeed")
    return _once(tmp_path_factory, "zero", write_zeros)


@pytest.fixture(scope="session")
def dcps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of torch.distributed.checkpoint, `alone` and `two`, by two ranks."""
    return _once(tmp_path_factory, "dcp", write_dcp)
