"""Engines on a GPU against one process on the CPU: `benchmarks.gpu.checks`, each kind in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu.checks.table import CHECKS
from benchmarks.gpu.suite import check
from benchmarks.gpu.worker import Worker

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    log: Path = tmp_path_factory.mktemp("checks") / "log"
    made = {check.process: Worker(log) for check in CHECKS.values()}
    yield made
    for worker in made.values():
        worker.stop()


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_of_the_suite_passes(name: str, workers: dict[str, Worker]) -> None:
    found = workers[CHECKS[name].process].run(check, name, "cuda", seconds=2 * CHECKS[name].seconds)
    if name == "dali" and not found:
        pytest.skip("NVIDIA DALI is not installed")
    assert found
    assert [finding for finding in found if not finding["passed"]] == []
