"""What `compt slurm submit` submits, and how, without a cluster: a script replaces sbatch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compt.chain.slurm import Order, make_orders, names, send
from compt.cli.main import app
from compt.errors import ConfigError, RunError
from compt.files import write_json
from compt.plan.jobs import make_plan
from compt.recipe.schema import Recipe
from tests.helpers.recipe import recipe_of, write_recipe

ROOT = Path(__file__).resolve().parents[3]
SOURCE = Path("a recipe.yaml")


def orders_of(recipe: Recipe, run: Path, **options: object) -> list[Order]:
    return make_orders(recipe, SOURCE, run, **options)  # type: ignore[arg-type]


def done(recipe: Recipe, run: Path, name: str, **found: Any) -> None:
    job = make_plan(recipe, baselines=True, **found).job(name)
    sets = recipe.evaluation.identity()
    folder = run / "jobs" / name
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"state": "done", "hash": job.hash, "sets": sets, "result": job.result})


def test_each_link_waits_for_the_one_before(tmp_path: Path) -> None:
    found = orders_of(recipe_of("chain.links.1.nodes=3"), tmp_path, nodes=2, gpus=2)
    assert [(order.name, order.nodes, order.after) for order in found] == [
        ("1-small", 2, None),
        ("2-large", 3, "1-small"),
    ]
    assert found[1].command("17") == [
        *("sbatch", "--parsable", "--job-name=tiny:2-large", "--nodes=3"),
        *("--gpus-per-node=2", "--ntasks-per-node=2", "--dependency=afterok:17", "--kill-on-invalid-dep=yes"),
        *("slurm/link.sbatch", "a recipe.yaml", "--run-folder", str(tmp_path), "--only", "2-large"),
    ]
    assert not any("dependency" in word for word in found[0].command(None))


def test_what_is_done_is_left_out(tmp_path: Path) -> None:
    recipe = recipe_of()
    done(recipe, tmp_path, "1-small")
    (left,) = orders_of(recipe, tmp_path, gpus=1)
    assert (left.name, left.after) == ("2-large", None)
    # Another recipe's model does not count.
    assert len(orders_of(recipe_of("optimizer.lr=0.5"), tmp_path, gpus=1)) == 2
    assert len(orders_of(recipe_of("evaluation.sets.0.name=other", "evaluation.primary="), tmp_path, gpus=1)) == 2


def test_what_is_done_is_that_of_the_data_and_of_the_first_pair_test(tmp_path: Path) -> None:
    recipe = recipe_of("chain.links.0.train={epochs: 1}")
    state: dict[str, Any] = {"data_fingerprint": "", "started": "", "jobs": [], "images": 36}
    write_json(tmp_path / "run.json", state)
    done(recipe, tmp_path, "1-small", images=36)
    assert [order.name for order in orders_of(recipe, tmp_path, gpus=1)] == ["2-large"]
    test = {"dataset": "held_out", "target": None, "outcome": "lossless"}
    tries = [{"number": 1, "factor": 0.5, "lossless": False}, {"number": 2, "factor": 2.0, "lossless": True}]
    write_json(tmp_path / "run.json", {**state, "calibration": {**test, "tries": tries}})
    done(recipe, tmp_path, "2-large", images=36, scales=(0.5, 2.0))
    assert orders_of(recipe, tmp_path, gpus=1) == []
    write_json(tmp_path / "run.json", {**state, "calibration": {**test, "tries": tries[:1], "outcome": "open"}})
    with pytest.raises(RunError, match="its first-pair test is not decided yet"):
        orders_of(recipe, tmp_path, gpus=1)


def test_baselines_are_one_array(tmp_path: Path) -> None:
    recipe = recipe_of("chain.links.0.train.steps=4", "chain.links.0.warmup.steps=1", "baselines.seeds=[3, 4]")
    found = orders_of(recipe, tmp_path, gpus=1, baselines=True)[-1]
    # The first one with the chain's seed is the first link.
    assert found.models == ("baseline-small-s4", "baseline-large-s3", "baseline-large-s4")
    assert "--array=0-2" in found.options
    assert found.words[-5:] == ("--baselines", "--each", *found.models)
    assert found.after is None
    assert names(recipe, "x", baselines=True) == ["1-small", *found.models]
    assert names(recipe, "x", baselines=False) == ["1-small", "2-large"]


def test_a_batch_that_cannot_be_shared_names_the_link(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2-large on 5 x 1 GPUs: optimizer\.batch 12 cannot be shared evenly by 5"):
        orders_of(recipe_of("chain.links.1.nodes=5"), tmp_path, gpus=1)


def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: str = "none") -> Path:
    """A script that writes its arguments, one a line, and refuses jobs of one name. The queue is the file `queue`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "log"
    note = f'printf "%s\\n" "$@" >>{shlex.quote(str(log))}\n'
    choose = f'case "$*" in *{refuse}*) echo no such account >&2; exit 1;; esac\n'
    scripts = {
        "sbatch": f'{note}echo "$PYTHON" >>{shlex.quote(str(log))}.python\n{choose}wc -l <{shlex.quote(str(log))}\n',
        "squeue": f"cat {shlex.quote(str(tmp_path / 'queue'))} 2>/dev/null || true\n",
        "scancel": f"echo scancel $* >>{shlex.quote(str(log))}\n",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return log


def test_sending_passes_on_ids_and_words_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_sbatch(tmp_path, monkeypatch)
    override = "data.train='/a b/$(touch gone)/*.tar'"
    said: list[str] = []
    sent = send(orders_of(recipe_of(), tmp_path / "run", gpus=1, overrides=[override]), tmp_path / "run", said.append)
    lines = log.read_text().splitlines()
    assert lines.count(override) == 2
    assert f"--dependency=afterok:{sent['1-small']}" in lines
    assert said == [f"1-small: job {sent['1-small']} on 1 node", f"2-large: job {sent['2-large']} on 1 node"]
    assert set(Path(f"{log}.python").read_text().split()) == {sys.executable}


def test_a_refused_job_takes_back_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_sbatch(tmp_path, monkeypatch, refuse="2-large")
    with pytest.raises(RunError, match=r"sbatch refused 2-large: no such account Cancelled: \d+\."):
        send(orders_of(recipe_of(), tmp_path / "run", gpus=1), tmp_path / "run", print)
    assert log.read_text().splitlines()[-1].startswith("scancel ")


def test_what_is_in_the_queue_is_not_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_sbatch(tmp_path, monkeypatch)
    run, override = tmp_path / "a run", "data.train='/a --only b'"
    recipe = recipe_of("chain.links.0.train.steps=4", "chain.links.0.warmup.steps=1")
    orders = orders_of(recipe, run, gpus=1, overrides=[override], baselines=True)

    def line(number: int, order: Order, folder: Path = run, sent_from: Path = tmp_path) -> str:
        words = [str(folder) if word == str(run) else word for word in order.words]
        return f"{number}\t{sent_from}\t{sent_from}/slurm/link.sbatch {' '.join(words)}\n"

    # Other runs, another model of this one, and jobs that are none of ours.
    link = replace(orders[1], words=(*orders[1].words[:-1], "3-third"))
    others = [line(7, orders[0], Path("a run"), tmp_path / "elsewhere"), line(8, orders[1], tmp_path / "a run 2")]
    (tmp_path / "queue").write_text("".join([*others, line(9, link), f"10\t{tmp_path}\t(null)\n", "11\t\n"]))
    assert len(send(orders, run, print)) == 3
    log.unlink()
    # A path relative to the submit folder names the same folder.
    own = [line(12, orders[1]), line(9, orders[0], Path("a run")), *[line(14, orders[2])] * 2]
    (tmp_path / "queue").write_text("".join(own))
    with pytest.raises(RunError) as refused:
        send(orders, run, print)
    jobs = "1-small (job 9), 2-large (job 12), baselines (job 14)"
    wanted = f"{run}: already in Slurm's queue: {jobs}; wait for them, or run `scancel 9 12 14` first"
    assert str(refused.value) == wanted
    assert not log.exists(), "nothing was sent"
    # A job that is left out because it is done may still be exiting.
    (tmp_path / "queue").write_text(line(9, orders[0]))
    assert len(send([replace(orders[1], after=None)], run, print)) == 1


def test_a_queue_that_cannot_be_asked_is_left_to_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, monkeypatch)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho no cluster >&2\nexit 1\n")
    assert len(send(orders_of(recipe_of(), tmp_path / "run", gpus=1), tmp_path / "run", print)) == 2


def test_without_sbatch_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="sbatch is not installed here"):
        send(orders_of(recipe_of(), tmp_path, gpus=1), tmp_path, print)


def test_the_command_shows_and_sends_nothing(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_sbatch(tmp_path, monkeypatch)
    monkeypatch.chdir(root)
    recipe = write_recipe(tmp_path / "a recipe.yaml")
    shown = CliRunner().invoke(app, ["slurm", "submit", str(recipe), "--gpus", "1", "--sbatch=--partition=a b"])
    assert shown.exit_code == 0, shown.output
    first, second = (shlex.split(line) for line in shown.stdout.splitlines())
    assert str(recipe) in first
    assert "--partition=a b" in first
    assert "--dependency=afterok:ID_OF_1-small" in second
    assert shown.stderr == "Nothing was submitted; --submit does that.\n"
    (tmp_path / "queue").write_text(f"17\t{root}\tslurm/link.sbatch x --run-folder runs/tiny --only 2-large\n")
    shown = CliRunner().invoke(app, ["slurm", "submit", str(recipe), "--gpus", "1"])
    assert len(shown.stdout.splitlines()) == 2
    assert shown.stderr.startswith(
        "Nothing was submitted; --submit would refuse: runs/tiny: already in Slurm's queue: 2"
    )
    assert not log.exists()


def test_the_scripts_are_copied_where_there_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_sbatch(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml")
    refused = CliRunner().invoke(app, ["slurm", "submit", str(recipe)])
    assert isinstance(refused.exception, ConfigError)
    assert "slurm/link.sbatch is missing; write it with `compt slurm copy`" in str(refused.exception)
    assert CliRunner().invoke(app, ["slurm", "copy"]).output == "Wrote slurm\n"
    assert CliRunner().invoke(app, ["slurm", "submit", str(recipe), "--gpus", "1"]).exit_code == 0
    assert str(CliRunner().invoke(app, ["slurm", "copy"]).exception) == "slurm: exists already"
    # The copies run there, with a shipped recipe by its name.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    environment = {**os.environ, "PYTHON": sys.executable, "DATA": "/a b/*.tar"}
    # Its decoder may not be installed here, which the scripts refuse.
    decoder = ["--set", "data.decoder=torch"]
    for name in ("chain_vit", "chain_swin"):
        subprocess.run([f"slurm/{name}.sbatch", "--", *decoder], env=environment, check=True)
        assert log.read_text().splitlines()[-3:] == [f"slurm/{name}.sbatch", *decoder]


def test_an_engine_that_the_processes_cannot_run_is_not_queued(tmp_path: Path) -> None:
    three = recipe_of("engine.name=fsdp2", "chain.links.1.engine={fsdp2: {replicas: 3}}")
    assert len(orders_of(three, tmp_path, nodes=3, gpus=2)) == 2
    with pytest.raises(ConfigError, match=r"2-large on 1 x 2 GPUs: engine\.fsdp2\.replicas = 3 does not divide the 2 "):
        orders_of(three, tmp_path, gpus=2)
    # Baselines of that member too, where the link has what it needs.
    with pytest.raises(ConfigError, match=r"baselines on 1 x 2 GPUs: engine\.fsdp2\.replicas = 3"):
        orders_of(
            recipe_of("engine.name=fsdp2", "chain.links.1.engine={fsdp2: {replicas: 3}}", "chain.links.1.nodes=3"),
            tmp_path,
            gpus=2,
            baselines=True,
        )
    with pytest.raises(ConfigError, match=r"1-small on 1 x 1 GPUs: nowhere\.json: engine\.deepspeed_config cannot be"):
        orders_of(recipe_of("engine.name=zero1", "engine.deepspeed_config=nowhere.json"), tmp_path, gpus=1)


# --- the scripts themselves


def script(name: str, log: Path, *words: str, **settings: str) -> tuple[int, list[str], str]:
    """Start a file of slurm/; its exit code, what sbatch was given, and errors."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "DATA": "/a b/*.tar", **settings}
    done = subprocess.run(
        [f"slurm/{name}.sbatch", *words], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr


def test_baselines_are_those_of_the_recipe_with_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_sbatch(tmp_path, monkeypatch)
    recipe = str(write_recipe(tmp_path / "a recipe.yaml"))
    seeds = ("--set", "baselines.seeds=[3, 4]")
    code, sent, errors = script("baseline_array", log, "--time=1", "--", *seeds, RECIPE=recipe, GPUS="1")
    assert code == 0
    # The shards and sets of this recipe are nowhere.
    assert all(line.endswith("on this machine") for line in errors.splitlines())
    assert "--array=0-3" in sent
    assert tuple(sent[-2:]) == seeds
    log.unlink()
    assert "--array=0-1" in script("baseline_array", log, RECIPE=recipe, GPUS="1")[1]


def test_a_mistake_behind_the_dashes_is_not_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_sbatch(tmp_path, monkeypatch)
    recipe = str(write_recipe(tmp_path / "a recipe.yaml"))
    code, sent, errors = script("chain_vit", log, "--", "--set=engine.nme=zero2", RECIPE=recipe, GPUS="1")
    assert (code, sent) == (2, [])
    assert "engine.nme" in errors
    three = ("--", "--set", "engine={name: fsdp2, device: cpu, fsdp2: {replicas: 3}}")
    code, sent, errors = script("chain_vit", log, *three, RECIPE=recipe, GPUS="1", NODES="2")
    assert (code, sent) == (2, [])
    assert "engine.fsdp2.replicas = 3 does not divide the 2 processes" in errors
    # The job itself has to check what options of sbatch say.
    assert script("chain_vit", log, "--nodes=3", *three, RECIPE=recipe, GPUS="1")[0] == 0
    log.unlink()
    code, sent, errors = script("chain_vit", log, "--nodes=3", RECIPE=recipe, GPUS="1", NODES="2")
    assert (code, sent) == (2, [])
    assert "NODES=2 and --nodes=3; set only one" in errors


@pytest.mark.parametrize(
    ("starts", "state", "probe", "requeued"),
    [
        (0, "IDLE", 1, True),
        (2, "MIXED", 1, True),
        (3, "ALLOCATED", 1, False),
        (3, "DOWN*", 1, True),
        (9, "ALLOCATED+NOT_RESPONDING", 1, True),
        (9, "ALLOCATED*", 1, True),
        (0, "DOWN*", 0, False),
    ],
)
def test_a_failed_step_goes_back_to_the_queue_for_a_node_alone(
    starts: int, state: str, probe: int, requeued: bool, tmp_path: Path
) -> None:
    scripts = {
        "srun": f'case "$*" in *--overlap*) exit {probe};; esac\nexit 5\n',
        "scontrol": 'case "$*" in *"show node"*) echo "NodeName=n1 State=IDLE "\n'
        f'echo "NodeName=n2 Arch=x State={state} Weight=1";; *) echo "$@" >>"$LOG";; esac\n',
        "sleep": "",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": str(starts),
    }
    command = ["bash", "-c", "source slurm/common.sh && step python train.py"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    log = tmp_path / "log"
    assert (log.read_text() if log.exists() else "") == ("requeue 7\n" if requeued else "")


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, ["--ntasks=16", "--ntasks-per-node=8"]),
        ({"GPUS": "4"}, ["--ntasks=8", "--ntasks-per-node=4"]),
        ({"SLURM_NTASKS_PER_NODE": "2", "GPUS": "4"}, ["--ntasks=4", "--ntasks-per-node=2"]),
        ({"SLURM_NTASKS": "6"}, []),
    ],
    ids=["salloc", "GPUS", "sbatch", "salloc --ntasks"],
)
def test_the_processes_of_an_allocation(variables: dict[str, str], asked: list[str], tmp_path: Path) -> None:
    """Without a number srun would start one process on each node."""
    (tmp_path / "srun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{shlex.quote(str(tmp_path / "log"))}\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", **variables}
    command = ["bash", "-c", "source slurm/common.sh && step python train.py"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    words = (tmp_path / "log").read_text().splitlines()
    assert [word for word in words if word.startswith("--ntasks")] == asked


def test_a_task_of_an_array_does_not_change_its_nodes() -> None:
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "NODES": "2"}
    command = ["bash", "-c", "source slurm/common.sh && take_nodes"]
    array = {**environment, "SLURM_ARRAY_JOB_ID": "6"}
    done = subprocess.run(command, env=array, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has 1 nodes, but NODES=2; start the file as a program, or give sbatch --nodes without NODES" in done.stderr
