"""`compt slurm submit`, job arrays, scoring and the doctor on a real cluster of two nodes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from compt.files import read_json
from tests.helpers.recipe import FIRST, SECOND, manifest
from tests.slurm.cluster import Cluster, until
from tests.slurm.conftest import Files

SHORT = ("chain.links.0.train.steps=8", "chain.links.1.train.steps=6")


def compt(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "compt", *words)


def send(cluster: Cluster, files: Files, recipe: Path, run: Path, data: str, *words: str) -> dict[str, str]:
    """Run `compt slurm submit --submit`. Returns the id of each job."""
    place = ("--run-folder", str(run), "--gpus", "1", "--set", f"data.train='{data}'")
    options = ("--sbatch=--cpus-per-task=1", f"--sbatch={cluster.output}")
    command = compt("slurm", "submit", str(recipe), *place, *options, "--submit", *words)
    said = cluster.run(*command, PYTHON=sys.executable, SBATCH_OPEN_MODE="append", OMP_NUM_THREADS="1").stdout
    return dict(re.findall(r"^(\S+): job (\d+) on \d+ nodes?$", said, re.MULTILINE))


def quoted(text: str) -> str:
    return text.replace("'", "''")


def test_each_link_has_its_own_nodes(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = files.recipe("links", *SHORT, "chain.links.0.nodes=1")
    data = quoted(files.data)
    jobs = send(cluster, files, recipe, run, data, "--nodes", "2")
    assert list(jobs) == [FIRST, SECOND]
    assert cluster.show(jobs[SECOND])["Dependency"] == f"afterok:{jobs[FIRST]}(unfulfilled)"
    # While it is in the queue, it is not submitted again.
    place = ("--run-folder", str(run), "--gpus", "1", "--set", f"data.train='{data}'", "--nodes", "2", "--submit")
    refused = cluster.run(*compt("slurm", "submit", str(recipe), *place), check=False, PYTHON=sys.executable)
    assert f"{SECOND} (job {jobs[SECOND]}); wait for them" in " ".join(refused.stderr.split())
    first, second = (cluster.wait_for(jobs[name], "COMPLETED") for name in (FIRST, SECOND))
    assert (first["NumNodes"], second["NumNodes"]) == ("1", "2")
    assert [start["processes"] for start in manifest(run, FIRST)["starts"]] == [1]
    assert [start["processes"] for start in manifest(run, SECOND)["starts"]] == [2]
    assert manifest(run, SECOND)["state"] == "done"
    # Finished jobs are not submitted again.
    assert send(cluster, files, recipe, run, data, "--nodes", "2") == {}


def test_a_failed_link_cancels_the_links_after_it(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    jobs = send(cluster, files, files.recipe("failing", *SHORT), run, "/nowhere/*.tar")
    shown = cluster.wait_for(jobs[FIRST], "FAILED")
    assert shown["ExitCode"] == "3:0"
    assert "/nowhere/*.tar" in cluster.said(jobs[FIRST])
    shown = cluster.wait_for(jobs[SECOND], "CANCELLED", seconds=60)
    assert shown["Reason"] == "DependencyNeverSatisfied"
    assert cluster.said(jobs[SECOND]) == ""


def test_baselines_run_as_a_job_array(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    """One task for each member. The baseline of the first is the first link, because both are the same job here."""
    run = tmp_path / "run"
    recipe = files.recipe("array", "chain.links.0.train.steps=4", "chain.links.0.warmup.steps=1")
    output = f"--output={cluster.folder}/out/%A_%a"
    command = ("slurm/baseline_array.sbatch", "--cpus-per-task=1", output)
    job = cluster.submit(*command, **files.settings(recipe, run))
    for task in ("0", "1"):
        cluster.wait_for(f"{job}_{task}", "COMPLETED")
    names = [FIRST, "baseline-large-s3"]
    assert sorted(path.name for path in (run / "jobs").iterdir()) == sorted(names)
    assert [manifest(run, name)["state"] for name in names] == ["done", "done"]


def test_an_array_that_is_too_short_is_refused(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    recipe = files.recipe("short_array")
    command = ("sbatch", "--array=0-0", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1")
    job = cluster.submit(*command, cluster.output, "slurm/baseline_array.sbatch", **files.settings(recipe, tmp_path))
    cluster.wait_for(job, "FAILED", seconds=60)
    assert "has 2 baselines: submit with --array=0-1" in cluster.said(cluster.show(job)["JobId"])


def test_two_nodes_evaluate_a_model(cluster: Cluster, files: Files, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = cluster.submit(
        *("slurm/chain_vit.sbatch", "--cpus-per-task=1", cluster.output, "--", "--only", FIRST),
        **files.settings(files.recipe("to_score", *SHORT), run),
    )
    cluster.wait_for(job, "COMPLETED")
    out = tmp_path / "scores"
    job = cluster.submit(
        *("slurm/eval.sbatch", "--cpus-per-task=1", cluster.output, "--", "--batch", "4"),
        MODEL=str(run / "jobs" / FIRST / "model"),
        DATA=str(files.folder / "eval" / "*.tar"),
        NODES="2",
        OUT=str(out),
        GPUS="1",
        PYTHON=sys.executable,
    )
    cluster.wait_for(job, "COMPLETED")
    (path,) = out.glob("*/*.json")
    scores, own = read_json(path), manifest(run, FIRST)["scores"]["held_out"]
    assert [scores[key] for key in ("top1", "n", "pins")] == [own[key] for key in ("top1", "n", "pins")]


def test_an_evaluation_without_a_model_is_not_queued(cluster: Cluster) -> None:
    refused = cluster.run("slurm/eval.sbatch", check=False, DATA="x", PYTHON=sys.executable)
    assert (refused.returncode, refused.stderr.split(":")[:2]) == (2, ["eval.sbatch", " MODEL is missing"])


def test_the_doctor_sees_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    until(lambda: set(cluster.node_states().values()) == {"idle"}, 60, "idle nodes")
    command = compt("doctor", str(tmp_path), "--json")
    told = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *command)
    found = json.loads(told.stdout)
    findings = {item["check"]: item for item in found["findings"]}
    assert found["ok"], found
    assert findings["processes"]["found"] == "2 on 2 nodes: n1, n2"
    for check in ("environment", "shared disk", "renaming", "locks", "gloo"):
        assert findings[check]["state"] == "ok", findings[check]
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_reports_a_disk_that_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    script = 'mount -t tmpfs none "$1" && exec "$0" -m compt doctor "$1"'
    own = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, sys.executable, str(tmp_path))
    told = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *own, check=False)
    assert told.returncode == 1
    assert "ranks 1 do not see what rank 0 wrote" in " ".join(told.stdout.split())
