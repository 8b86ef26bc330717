"""Settings for all tests: one thread per process, no network, and a reason for every skipped test."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

# Before torch is imported anywhere: several test processes share few cores, and no test may ask a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest

# torch.distributed.checkpoint makes a debug record of every call, which pytest would keep: thousands for a small chain.
logging.disable(logging.DEBUG)

ROOT = Path(__file__).resolve().parent.parent


def has_cuda() -> bool:
    """Whether torch sees a CUDA device. Asks torch only if there is a driver, because importing torch takes seconds."""
    if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()):
        return False
    import torch

    return torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--must-run", action="store_true", help="a test that is skipped fails, but for want of a GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("must_run") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped under --must-run: {report.longrepr[2] if report.longrepr else ''}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0] if item.path.is_relative_to(ROOT / "tests") else ""
        if folder in ("gpu", "dist", "slurm"):
            item.add_marker(folder)
    if any(item.get_closest_marker("gpu") for item in items) and not has_cuda():
        skip = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while test modules are imported: it would take a quarter of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection: chains collect after each job, which would take 0.2 s."""
    gc.collect()
    gc.freeze()


# On a loaded machine, drawing an example may take long, which says nothing about the code.
hypothesis.settings.register_profile("loaded", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("loaded")


@pytest.fixture(autouse=True, scope="session")
def forked_children() -> None:
    """Fork the children of compt from the server that has imported torch; a new interpreter takes 5 s for that."""
    from compt.dist import child

    child.METHOD = "forkserver"


@pytest.fixture(autouse=True, scope="session")
def no_disk_waits() -> Iterator[None]:
    """Do not wait for the disk after each file. 200 waits take a second, and only a power cut could show a difference.

    Tests of `os.fsync` itself replace it.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.helpers.preload", "tests.helpers.no_disk_waits"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out of reports: drawing them takes two seconds."""
    for name in ("accuracy_figure", "curves_figure", "cost_figure"):
        monkeypatch.setattr(f"compt.report.figures.{name}", lambda *_: None)
