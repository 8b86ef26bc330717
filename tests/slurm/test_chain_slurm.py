"""The shipped scripts on a real cluster of two nodes: chains to the end, and what clusters do to them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from compt.train.metrics import read_metrics
from tests.helpers.optional import optional
from tests.helpers.recipe import FIRST, SECOND, manifest, weights_hash
from tests.slurm.cluster import Cluster, until
from tests.slurm.conftest import Files

ONE_EACH = ("--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1")
"""Options of sbatch for one process on each node, which typed sbatch does not learn from GPUS."""


def results(run: Path) -> list[str]:
    """The digests of a finished chain's weights."""
    return [weights_hash(run, job) for job in (FIRST, SECOND)]


def steps(run: Path, job: str) -> list[int]:
    """The steps that a job's metrics have lines of, in their order."""
    path = run / "jobs" / job / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return [int(row["step"]) for row in rows if "loss" in row]


def processes(run: Path, job: str) -> list[int]:
    """How many processes each start of a job had."""
    return [start["processes"] for start in manifest(run, job)["starts"]]


def begin(cluster: Cluster, files: Files, recipe: Path, run: Path, *options: str) -> str:
    """Submit the ViT chain on two nodes as the documentation says."""
    command = ("slurm/chain_vit.sbatch", "--cpus-per-task=1", cluster.output, *options)
    return cluster.submit(*command, **files.settings(recipe, run), NODES="2")


def at_step(run: Path, job: str, step: int) -> None:
    until(lambda: step in steps(run, job), 150, f"step {step} of {job}")


@pytest.fixture(scope="module")
def finished(cluster: Cluster, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed chain, submitted with a plain sbatch: on one node, with NODES=2."""
    run = tmp_path_factory.mktemp("runs") / "a run"
    command = ("sbatch", *ONE_EACH, cluster.output, "slurm/chain_vit.sbatch")
    settings = files.settings(files.recipe("whole"), run)
    job = cluster.submit(*command, **settings, NODES="2")
    shown = cluster.wait_for(job, "COMPLETED")
    assert shown["NumNodes"] == "2"
    assert "requeue for that many nodes" in cluster.said(job)
    return run


def test_a_chain_finishes_on_two_nodes(finished: Path) -> None:
    for job in (FIRST, SECOND):
        assert manifest(finished, job)["state"] == "done"
        assert processes(finished, job) == [2]
    assert steps(finished, FIRST) == list(range(1, 121))
    assert (finished / "report.html").exists()


def test_its_images_were_decoded_by_dali(finished: Path) -> None:
    optional("nvidia.dali", "dali-cuda13")
    assert manifest(finished, FIRST)["result"]["data"]["decoder"] == "dali"


def test_missing_data_is_not_queued(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    settings = {**files.settings(files.recipe("missing"), tmp_path), "DATA": ""}
    refused = cluster.run("slurm/chain_vit.sbatch", check=False, **settings)
    assert refused.returncode == 2
    assert refused.stderr.startswith("chain_vit.sbatch: DATA is missing")
    assert cluster.run("squeue", "--noheader").stdout == ""
    # sbatch runs no line of the file, so the job itself checks this first.
    job = cluster.submit("sbatch", *ONE_EACH, cluster.output, "slurm/chain_vit.sbatch", **settings)
    shown = cluster.wait_for(job, "FAILED", seconds=120)
    assert shown["ExitCode"] == "2:0"
    assert cluster.said(job).startswith("chain_vit: DATA is missing")
    assert "00:00:00" <= shown["RunTime"] <= "00:00:20"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RECIPE": "/nowhere.yaml"}, "/nowhere.yaml: no such file"),
        ({"NODES": "two"}, "NODES='two' should be a whole number"),
        ({"GPUS": "0"}, "GPUS='0' (per node) should be a whole number"),
        ({"PYTHON": "/nowhere/python"}, "PYTHON='/nowhere/python' cannot be started"),
    ],
)
def test_a_wrong_setting_is_not_queued(
    cluster: Cluster, files: Files, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    settings = files.settings(files.recipe("wrong"), tmp_path) | variables
    refused = cluster.run("slurm/chain_swin.sbatch", check=False, **settings)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert cluster.run("squeue", "--noheader").stdout == ""


def test_a_wrong_recipe_is_not_queued(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    recipe = files.recipe("wrong_recipe", "optimizer.batsh=3")
    refused = cluster.run("slurm/chain_vit.sbatch", check=False, **files.settings(recipe, tmp_path))
    assert refused.returncode == 2
    assert "optimizer.batsh" in refused.stderr
    assert cluster.run("squeue", "--noheader").stdout == ""


def test_nodes_that_contradict_sbatch_end_the_job(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    settings = files.settings(files.recipe("contradicting"), tmp_path)
    command = ("sbatch", "--nodes=2", *ONE_EACH, cluster.output, "slurm/chain_vit.sbatch")
    job = cluster.submit(*command, **settings, NODES="3")
    cluster.wait_for(job, "FAILED", seconds=120)
    assert "has 2 nodes, but NODES=3" in cluster.said(job)


def test_a_requeue_does_not_change_the_result(cluster: Cluster, files: Files, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = begin(cluster, files, files.recipe("requeued"), run)
    at_step(run, FIRST, 33)
    cluster.run("scontrol", "requeue", job)
    shown = cluster.wait_for(job, "COMPLETED")
    assert shown["Restarts"] == "1"
    assert processes(run, FIRST) == [2, 2]
    assert steps(run, FIRST) == list(range(1, 121))
    assert results(run) == results(finished)


def test_a_chain_requeues_on_the_signal_before_its_time_limit(
    cluster: Cluster, files: Files, finished: Path, tmp_path: Path
) -> None:
    """What --signal=B:USR1@120 sends before a time limit, sent at once."""
    run = tmp_path / "run"
    job = begin(cluster, files, files.recipe("told"), run)
    at_step(run, SECOND, 10)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    shown = cluster.wait_for(job, "COMPLETED")
    assert shown["Restarts"] == "1"
    assert "interrupted; requeued" in cluster.said(job)
    assert processes(run, FIRST) == [2]
    assert processes(run, SECOND) == [2, 2]
    assert steps(run, SECOND) == list(range(1, 61))
    assert results(run) == results(finished)


def test_a_chain_requeues_after_a_time_limit(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    """Slurm's own notice, which comes up to half a minute early; submitted with `sbatch --export`."""
    run = tmp_path / "run"
    recipe = files.recipe("limited", "chain.links.0.train.steps=9000", "engine.checkpoint_every.steps=9000")
    settings = files.settings(recipe, run)
    data = settings.pop("DATA")
    command = ("sbatch", f"--export=ALL,DATA={data}", "--nodes=2", *ONE_EACH, cluster.output, "slurm/chain_vit.sbatch")
    job = cluster.submit(*command, **settings)
    at_step(run, FIRST, 5)
    # The file asks for a notice two minutes before.
    hours, minutes, _ = map(int, cluster.show(job)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    until(lambda: cluster.show(job)["Restarts"] == "1", 120, "the job has gone back to the queue")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    before = steps(run, FIRST)[-1]
    assert "stopped by SIGUSR1" in cluster.said(job)
    assert "Improperly formed" not in cluster.said(job)
    at_step(run, FIRST, before + 20)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    done = steps(run, FIRST)
    assert done == list(range(1, len(done) + 1))


def test_a_killed_rank_ends_the_job_and_the_same_command_resumes(
    cluster: Cluster, files: Files, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = files.recipe("killed")
    job = begin(cluster, files, recipe, run)
    at_step(run, FIRST, 50)
    os.kill(cluster.rank(job, 1), signal.SIGKILL)
    shown = cluster.wait_for(job, "FAILED", seconds=150)
    assert shown["Restarts"] == "0"
    assert "task 1: Killed" in cluster.said(job)
    # The other rank says which one it missed.
    assert "rank 1" in cluster.said(job)
    again = begin(cluster, files, recipe, run)
    cluster.wait_for(again, "COMPLETED")
    assert steps(run, FIRST) == list(range(1, 121))
    assert results(run) == results(finished)


def test_a_chain_requeues_after_a_node_failure(cluster: Cluster, files: Files, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = begin(cluster, files, files.recipe("powerless"), run)
    at_step(run, FIRST, 50)
    cluster.crash_node("n2")
    # Slurm gets no report: either the controller or the job itself notices first.
    try:
        until(lambda: cluster.show(job)["Restarts"] != "0", 150, "the job has gone back to the queue")
    finally:
        cluster.start_node("n2")
    cluster.wait_for(job, "COMPLETED")
    assert steps(run, FIRST) == list(range(1, 121))
    assert results(run) == results(finished)
