"""Training runs and chains on two processes: same results as on one, resumed from one to two, stopped together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compt.data.batch import SKIPPED, Batch
from compt.dist import collectives as dist
from compt.errors import DataError, Interrupted
from compt.train import loop as trainer
from compt.train.metrics import read_metrics
from tests.dist.spawn import run_ranks
from tests.helpers.recipe import (
    FIRST,
    SECOND,
    chain,
    largest_difference,
    lines,
    make_data,
    manifest,
    weights,
    write_recipe,
)
from tests.helpers.shards import sample, write_tar

ROOT = Path(__file__).resolve().parents[3]

ONE_LINK = "chain.links=[{model: small, train: {steps: 6}, warmup: {steps: 2}}]"
"""The first link alone, for what no later link would show again."""

TOLERANCE = 2e-5
"""Of weights after a link: a step of AdamW at eps 1e-4 carries the rounding of another order of summation on."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A chain on one process."""
    chain(base, base / "whole", "optimizer.ema={decay: 0.9}")
    return base / "whole"


def run_chain(base: Path, run: Path, changes: list[str], stop: tuple[int, int] | None = None) -> str:
    """Run a chain on this rank. Rank `stop[0]` gets SIGTERM at step `stop[1]`. Returns the reason for the stop."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            rate = trainer.learning_rate

            def learning_rate(step: int, settings: trainer.TrainSettings) -> float:
                if (dist.rank(), step + 1) == stop:
                    signal.raise_signal(signal.SIGTERM)
                return rate(step, settings)

            patch.setattr(trainer, "learning_rate", learning_rate)
        try:
            chain(base, run, *changes)
        except (Interrupted, DataError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def assert_close(whole: Path, other: Path) -> None:
    for job in (FIRST, SECOND):
        for kind in ("model", "model/ema"):
            assert largest_difference(weights(whole, job, kind), weights(other, job, kind)) < TOLERANCE
        for one, two in zip(lines(whole, job), lines(other, job), strict=True):
            assert one.pop("kind") == two.pop("kind")
            for line in (one, two):
                line.pop("macs", 0)  # ranks and micro-batches pad to their own longest caption, and features come twice
            assert one == pytest.approx(two, rel=2e-4, abs=1e-6)
        for run in (whole, other):
            assert [line["macs"] for line in lines(run, job) if "macs" in line][-1] == pytest.approx(
                manifest(run, job)["cost"]["total_macs"]
            )
        # Each rank and group pads to its own longest caption.
        apart = {"device_hours": 0, "tokens_per_caption": 0}
        assert {**manifest(whole, job)["trained"], **apart} == {**manifest(other, job)["trained"], **apart}


@pytest.mark.parametrize("changes", [[], ["engine.micro_batch=2", "engine.text_buckets=2"]])
def test_two_processes_are_one(changes: list[str], base: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(run_chain, 2, base, run, ["optimizer.ema={decay: 0.9}", *changes]) == ["", ""]
    assert_close(whole, run)
    assert manifest(run, FIRST)["processes"] == 2


def test_from_one_process_to_two_and_back(base: Path, whole: Path, tmp_path: Path) -> None:
    run, changes = tmp_path / "run", ["optimizer.ema={decay: 0.9}"]
    assert f"Interrupted: {FIRST}: stopped by SIGTERM at step 1 of 6" in run_chain(base, run, changes, (0, 1))
    first, second = run_ranks(run_chain, 2, base, run, changes, (1, 3))
    assert first == second
    assert "stopped by SIGTERM at step 3 of 6; saved" in first
    assert "at step 2 of 5" in run_chain(base, run, changes, (0, 2))
    assert run_ranks(run_chain, 2, base, run, changes) == ["", ""]
    assert_close(whole, run)
    hours = [line["device_hours"] for line in read_metrics(run / "jobs" / FIRST / "metrics.jsonl", "train")]
    assert hours == sorted(hours)


def test_skipped_samples_are_counted_once_through_a_resume(base: Path, tmp_path: Path) -> None:
    for name in ("train", "val", "eval"):
        shutil.copytree(base / name, tmp_path / name)
    bad = [(name, b"no picture" if name.endswith(".png") else data) for name, data in sample("bad", 5)]
    write_tar(tmp_path / "train" / "000004.tar", bad + sample("good", 6))
    changes = ["data.images=50", "optimizer.batch=10", ONE_LINK, "chain.links.0.train={epochs: 2}"]
    chain(tmp_path, tmp_path / "whole", *changes)
    assert manifest(tmp_path / "whole", FIRST)["trained"]["skipped_samples"]["image"] == 2
    run = tmp_path / "run"
    assert "SIGTERM" in run_ranks(run_chain, 2, tmp_path, run, changes, (0, 7))[0], "after one of the two epochs"
    run_ranks(run_chain, 2, tmp_path, run, changes)
    for key in ("skipped_image", "skipped_caption", "nonfinite_steps"):
        found, wanted = ([line.get(key) for line in lines(path, FIRST)] for path in (run, tmp_path / "whole"))
        assert found == wanted
    assert manifest(run, FIRST)["trained"]["skipped_samples"] == {**dict.fromkeys(SKIPPED, 0), "image": 2}


def failing_on_one(base: Path, run: Path, step: int) -> str:
    from compt.chain import job as jobs

    open_loader = jobs.train_loader

    def train_loader(*arguments: Any, **options: Any) -> Iterable[Batch]:
        for at, batch in enumerate(open_loader(*arguments, **options), 1):
            if (dist.rank(), at) == (1, step):
                raise DataError("000007.tar: key 8: image: is no picture")
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "train_loader", train_loader)
        return run_chain(base, run, [ONE_LINK])


def test_data_that_one_rank_cannot_use_end_the_run_on_all(base: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = run_ranks(failing_on_one, 2, base, run, 4, timeout=60.0)
    assert found == ["DataError: 000007.tar: key 8: image: is no picture"] * 2
    assert not (run / "jobs" / FIRST / "model").exists()
    assert run_ranks(run_chain, 2, base, run, [ONE_LINK]) == ["", ""]
    assert largest_difference(weights(whole, FIRST), weights(run, FIRST)) < TOLERANCE


# --- with torchrun


@pytest.fixture
def torchrun(base: Path, tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(script: Path, run: Path, *changes: str, processes: int = 2) -> subprocess.Popen[str]:
        recipe = write_recipe(tmp_path / "tiny.yaml", *changes)
        words = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--", str(script)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *words, "--recipe", str(recipe), "--run-folder", str(run)],
                cwd=base,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


LAUNCHER = ROOT / "launchers" / "train.py"


@pytest.mark.slow
def test_a_signal_to_torchrun_saves(torchrun: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = ["chain.links.0.train={steps: 100000}", "engine.checkpoint_every={steps: 100000}", "engine.workers=1"]
    process = torchrun(LAUNCHER, run, *changes)
    metrics, deadline = run / "jobs" / FIRST / "metrics.jsonl", time.monotonic() + 120
    # A stop before the first step would have nothing to save.
    while time.monotonic() < deadline and process.poll() is None:
        if read_metrics(metrics, "train"):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # the terminal's Ctrl-C reaches torchrun and all it started
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert output.count("saved. Start the same command again to go on.") == 1, output
    assert (run / "jobs" / FIRST / "checkpoints" / "latest").exists()


FAILING = """
import os, sys
from compt.data import loaders as dataset
from compt.errors import DataError
if os.environ["RANK"] == "1":
    def add(self, read):
        raise DataError("shard 000007.tar, key 8 is no picture")
    dataset._BadShare.add = add
sys.argv[0] = {launcher!r}
exec(open({launcher!r}).read())
"""


@pytest.mark.slow
def test_a_failing_rank_ends_torchrun_with_its_cause(torchrun: Any, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(launcher=str(LAUNCHER)))
    started = time.monotonic()
    process = torchrun(script, tmp_path / "run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("shard 000007.tar, key 8 is no picture") == 1, output
    assert time.monotonic() - started < 90
