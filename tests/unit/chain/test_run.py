"""A chain is a state machine on disk: killed anywhere, it continues, and no finished work is repeated."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compt.chain import locks as chain_locks
from compt.chain import run as chain_module
from compt.chain import state as state_module
from compt.chain.job import JobRun
from compt.chain.locks import locked
from compt.chain.record import STATES, steps_left
from compt.chain.run import prepare, run_only, start_fresh, waiting
from compt.chain.start import open_start
from compt.chain.state import difference
from compt.cli.main import main
from compt.data.account import Account
from compt.data.index import open_index
from compt.data.workers import _shield
from compt.dist import collectives as dist
from compt.errors import ArtefactError, ConfigError, Interrupted, RunError
from compt.evaluate.scorer import Scorer
from compt.expand.execute import Draw
from compt.expand.plan import make_plan
from compt.export.write import export_model
from compt.files import read_json, sha256_file, temporary_of, write_json
from compt.models.clip import build
from compt.models.growth import ExpandConfig, TowerGrowth
from compt.models.init import DrawnState
from compt.models.presets import NORM_EPS, PRESETS
from compt.plan.jobs import make_plan as plan_jobs
from compt.recipe.read import load_recipe
from compt.report.content import data_tables
from compt.train.metrics import read_metrics
from compt.weights import lazy as sources_weights
from compt.weights.artefact import Artefact, read_artefact, write_artefact
from tests.dist.spawn import CONTEXT
from tests.helpers.process import (
    KILLED,
    chain_dying_at,
    chain_dying_at_write,
    chain_with_workers,
    die,
    finish,
    hold,
    start,
    writes_of,
)
from tests.helpers.recipe import (
    FIRST,
    SECOND,
    chain,
    equal,
    lines,
    make_data,
    manifest,
    plan_of,
    recipe_of,
    stopped_at,
    weights,
    write_recipe,
)
from tests.helpers.states import expand_state, export_state

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A finished chain. Tests do not change it."""
    chain(base, base / "whole")
    return base / "whole"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished chain."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def half(whole: Path, tmp_path: Path) -> Path:
    """The chain with its first link finished and the second not started."""
    run = shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(run / "jobs" / SECOND)
    return run


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of writing."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def assert_same(whole: Path, other: Path) -> None:
    for job in (FIRST, SECOND):
        assert equal(weights(whole, job), weights(other, job))
        assert lines(whole, job) == lines(other, job)
        assert manifest(whole, job)["scores"] == manifest(other, job)["scores"]
        assert manifest(other, job)["state"] == "done"
    assert list(other.rglob(".*")) == [], "no rubbish"


# --- from the start to the end


def test_a_finished_chain(base: Path, whole: Path) -> None:
    state = read_json(whole / "run.json")
    assert [job["name"] for job in state["jobs"]] == [FIRST, SECOND]
    assert load_recipe(whole / "recipe.yaml") == recipe_of()
    first, second = (manifest(whole, job) for job in (FIRST, SECOND))
    assert first["state"] == second["state"] == STATES[-1]
    assert first["parent_hash"] is None
    assert second["parent_hash"] == first["model_hash"]
    initial, model = (read_artefact(whole / "jobs" / SECOND / name).manifest for name in ("initial", "model"))
    assert (initial["parent"], initial["parent_hash"], initial["step"]) == (FIRST, first["model_hash"], 0)
    assert (model["parent"], model["parent_hash"], model["step"]) == (FIRST, first["model_hash"], 5)
    assert model["samples"] == 60
    assert set(first["scores"]) == {"held_out", "choose"}
    assert not (whole / "jobs" / FIRST / "initial").exists(), "the first link starts from scratch"
    assert not (whole / "jobs" / SECOND / "checkpoints").exists()
    assert waiting(plan_of(base, whole), whole) == []
    row = read_metrics(whole / "jobs" / SECOND / "metrics.jsonl", "train")[-1]
    assert {"loss", "task", "t2v", "v2t", "ifd", "r", "logit_scale", "grad_norm", "memory_gib"} <= row.keys()
    board = EventAccumulator(str(whole / "jobs" / SECOND / "tb"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")][-1] == 5
    (final,) = board.Scalars("final/held_out/top1")
    assert (final.step, final.value) == (5, pytest.approx(second["scores"]["held_out"]["top1"]))


def test_a_finished_chain_is_left_alone(base: Path, run: Path) -> None:
    before = files_of(run / "jobs")
    assert chain(base, run) == []
    assert files_of(run / "jobs") == before


# --- killed anywhere


def test_killed_at_each_state_in_turn(base: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    places = [
        place
        for job in (FIRST, SECOND)
        for place in (
            f"before expanded of {job}",  # initial/ is there
            f"after expanded of {job}",
            f"after training of {job}",
            f"step 4 of {job}",  # a checkpoint of step 2 is there
            f"scoring {job}",  # model/ is there
            f"before evaluated of {job}",  # scores/ are there
            f"after evaluated of {job}",
            f"before done of {job}",  # checkpoints/ are gone
            f"after done of {job}",
        )
    ]
    finished: dict[str, Any] = {}
    for place in places:
        assert finish(start(chain_dying_at, place, base, run)) == KILLED, place
        if finished:
            assert files_of(run / "jobs" / FIRST) == finished, f"{place}: the finished link was touched"
        elif manifest(run, FIRST)["state"] == "done" if (run / "jobs" / FIRST / "manifest.json").exists() else False:
            finished = files_of(run / "jobs" / FIRST)
    assert finished
    chain(base, run)
    assert files_of(run / "jobs" / FIRST) == finished
    assert_same(whole, run)


def test_killed_before_one_write_after_another(base: Path, whole: Path, tmp_path: Path) -> None:
    run, killed = tmp_path / "run", 0
    while finish(start(chain_dying_at_write, 3 + 2 * killed, base, run)) == KILLED:
        killed += 1
        assert killed < 30, "it does not get ahead"
    assert killed >= 4
    assert_same(whole, run)


def one_of_each_kind(names: list[str]) -> list[int]:
    """The numbers of one write of each kind, whatever its job, its step and its set: in turn the first and the last."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names, 1):
        kind = re.sub(r"^jobs/[^/]+|\d{8}|tmp-(?!deleted)\w+|held_out|choose", "", name)
        places.setdefault(kind, []).append(number)
    return sorted(found[-(at % 2)] for at, found in enumerate(places.values()))


@pytest.mark.full
def test_killed_before_each_kind_of_write(base: Path, whole: Path, tmp_path: Path) -> None:
    often = "engine.checkpoint_every={steps: 2}"  # so that an old checkpoint is deleted
    numbers = one_of_each_kind(writes_of(lambda data, run: chain(data, run, often), base, tmp_path / "all"))
    assert len(numbers) >= 16
    for number in numbers:
        run = tmp_path / f"run{number}"
        assert finish(start(chain_dying_at_write, number, base, run, often)) == KILLED
        chain(base, run, often)
        assert_same(whole, run)
        shutil.rmtree(run)


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_random_moments(kills: int, base: Path, whole: Path, tmp_path: Path) -> None:
    rng, run, codes = random.Random(1), tmp_path / "run", []
    for _ in range(kills):
        process = start(chain_with_workers, base, run, "engine.checkpoint_every={steps: 1}")
        time.sleep(rng.uniform(0.3, 2.0))
        process.kill()
        codes.append(finish(process))
        if codes[-1] == 0:
            assert_same(whole, run)
            run = tmp_path / f"run{len(codes)}"
    assert KILLED in codes
    chain(base, run)
    assert_same(whole, run)


def test_the_workers_of_a_killed_run_do_not_keep_the_folder(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(chain_with_workers, base, run, "chain.links.0.train={steps: 5000}")
    while not (run / "jobs" / FIRST / "checkpoints" / "latest").exists():
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    assert finish(process) == KILLED
    stopped_at(base, run, 3 + latest_step(run, FIRST), "chain.links.0.train={steps: 5000}")


def orphan(ready: Any, told: Path) -> None:
    """A worker whose parent dies before torch begins to watch it."""
    if child := os.fork():
        told.write_text(str(child))
        ready.wait(60)
        die()
    _shield(os.getppid(), 0)
    ready.set()
    time.sleep(120)


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    told = tmp_path / "child"
    assert finish(start(orphan, CONTEXT.Event(), told)) == KILLED
    child, deadline = int(told.read_text()), time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def latest_step(run: Path, job: str) -> int:
    return int((run / "jobs" / job / "checkpoints" / "latest").read_text().rpartition("-")[2])


# --- signals


def command(base: Path, run: Path, said: Path, *changes: str) -> subprocess.Popen[bytes]:
    """`compt chain`, which writes its output to the file `said`."""
    recipe = write_recipe(base / f"{run.parent.name}.yaml", *changes)
    with said.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "compt", "chain", str(recipe), "--run-folder", str(run)],
            cwd=base,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def forked_command(base: Path, run: Path, said: Path, *changes: str) -> None:
    """The same in a process that has imported torch already."""
    os.setsid()
    os.chdir(base)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    recipe = write_recipe(base / f"{run.parent.name}.yaml", *changes)
    main(lambda: ["chain", str(recipe), "--run-folder", str(run)])


def test_the_command_exits_with_75_on_signals_to_all_its_processes(base: Path, tmp_path: Path) -> None:
    run, changes = tmp_path / "run", ["chain.links.0.train={steps: 100000}", "engine.workers=2", "evaluation.every="]
    changes += ["engine.checkpoint_every={steps: 100000}"]
    for number in (signal.SIGTERM, signal.SIGINT):
        before = latest_step(run, FIRST) if run.exists() else 0
        metrics, said = run / "jobs" / FIRST / "metrics.jsonl", tmp_path / number.name
        metrics.unlink(missing_ok=True)
        # A new interpreter for Ctrl-C, which could leave a traceback while Python exits.
        forked = number == signal.SIGTERM
        process = start(forked_command, base, run, said, *changes) if forked else command(base, run, said, *changes)
        pid, until = process.pid, time.monotonic() + 120
        assert pid is not None
        try:
            while not (metrics.exists() and metrics.stat().st_size):  # the first step
                assert is_running(pid), said.read_text()
                assert time.monotonic() < until, f"no {metrics} after 120 s"
                time.sleep(0.05)
            os.killpg(pid, number)  # as a terminal, a batch system and `timeout` do: the loader's processes too
            code = process.wait(60) if isinstance(process, subprocess.Popen) else finish(process, 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        output = said.read_text()
        assert code == 75, output
        assert f"stopped by {number.name} at step" in output
        assert "Traceback" not in output
        assert latest_step(run, FIRST) > before


def test_a_signal_between_trainings_exits_at_once_and_loses_nothing(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Scorer.at_the_end

    def stopped(self: Scorer, model: Any, folder: Path) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return score(self, model, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "at_the_end", stopped)
        with pytest.raises(Interrupted, match="stopped by SIGTERM. Start the same command again"):
            chain(base, tmp_path / "run")
    assert manifest(tmp_path / "run", FIRST)["state"] == "training"
    chain(base, tmp_path / "run")
    assert_same(whole, tmp_path / "run")


def test_a_signal_before_and_after_the_jobs_ends_the_command_with_75(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(base)
    recipe, run = write_recipe(base / f"{tmp_path.name}.yaml", "chain.links.0.train={steps: 2}"), tmp_path / "run"
    words = ["chain", str(recipe), "--run-folder", str(run), "--only", FIRST]
    for place in ("compt.chain.run.open_data", "compt.report.write.write_report"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(SystemExit) as ended:
                main(lambda: words)
        assert ended.value.code == 75
        assert "stopped by SIGTERM. Start the same command again" in " ".join(capsys.readouterr().err.split())
    assert manifest(run, FIRST)["state"] == "done"


# --- what may change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=0.002", "optimizer.lr: 0.001 -> 0.002"),
        ("seed=4", "seed: 3 -> 4"),
        ("chain.links.0.train={steps: 7}", "steps: 6 -> 7"),
        ("family.members.0.depth=2", "model.depth: 1 -> 2"),
        ("data.captions=3", "data.captions: 2 -> 3"),
        ("optimizer.ema={decay: 0.5}", "optimizer.ema.decay: (absent) -> 0.5"),
    ],
)
def test_a_changed_recipe_is_refused_with_what_changed(change: str, message: str, base: Path, half: Path) -> None:
    before = files_of(half)
    with pytest.raises(RunError) as caught:
        chain(base, half, change)
    assert f"the recipe has changed since {FIRST} was begun" in str(caught.value)
    assert f"  {message}\n" in str(caught.value)
    assert files_of(half) == before


def test_later_links_baselines_and_execution_fields_may_change(base: Path, half: Path) -> None:
    before = files_of(half / "jobs" / FIRST / "model")
    changes = [
        "chain.links.1.train={steps: 3}",
        "chain.links.1.alpha=10.0",
        "baselines.train={steps: 9}",
        "engine.workers=1",
        "engine.micro_batch=4",
        "engine.log_every={steps: 2}",
        "optimizer.max_nonfinite=2",
        "evaluation.every=",
        "name=other",
    ]
    chain(base, half, *changes)
    assert files_of(half / "jobs" / FIRST / "model") == before
    assert manifest(half, SECOND)["steps"] == 3
    with pytest.raises(RunError, match=r"alpha: 10\.0 -> 500\.0"):
        chain(base, half, "chain.links.1.train={steps: 3}")


def test_a_longer_chain_goes_on_from_a_finished_one(base: Path, run: Path) -> None:
    before = files_of(run / "jobs")
    changes = [
        "family.members.1={name: large, preset: vit_pico, depth: 2, embed_dim: 48}",
        "chain.links.1={model: large, train: {steps: 5}, warmup: {steps: 1}}",
    ]
    recipe = recipe_of(*changes).model_dump(mode="json", by_alias=True)
    recipe["family"]["members"].append({"name": "third", "preset": "vit_pico", "depth": 3, "embed_dim": 48})
    recipe["chain"]["links"].append({"model": "third", "train": {"steps": 2}, "warmup": {"steps": 0}})
    context, plan = prepare(type(recipe_of()).model_validate(recipe), run, base=base)
    assert [job.name for job in waiting(plan, run)] == ["3-third"]
    chain_module.run_chain(context, plan, lambda _: None)
    after = files_of(run / "jobs")
    assert {name: after[name] for name in before} == before
    assert manifest(run, "3-third")["parent_hash"] == manifest(run, SECOND)["model_hash"]


def test_other_shards_are_refused(base: Path, half: Path, tmp_path: Path) -> None:
    other = make_data(tmp_path / "other", 60)
    with pytest.raises(RunError, match=f"the training shards changed since {FIRST} started"):
        chain(other, half)
    # The same shards in another place are the same data.
    moved = shutil.copytree(base, tmp_path / "moved", ignore=shutil.ignore_patterns("whole", "*.yaml"))
    chain(moved, half)


SETS = "data.train=[{shards: 'train/000000.tar', weight: 1.5}, {shards: 'train/{000001..000003}.tar', weight: 2}]"


def test_sets_with_weights_make_longer_epochs_and_resume(base: Path, tmp_path: Path) -> None:
    chain(base, tmp_path / "whole", SETS, "chain.links.0.train={epochs: 1}")
    run = tmp_path / "run"
    stopped_at(base, run, 3, SETS, "chain.links.0.train={epochs: 1}")
    with pytest.raises(RunError, match="the training shards, or their weights, changed since"):
        chain(base, run, SETS.replace("1.5", "1"), "chain.links.0.train={epochs: 1}")
    chain(base, run, SETS, "chain.links.0.train={epochs: 1}")
    assert_same(tmp_path / "whole", run)
    state = read_json(run / "run.json")
    assert [(one["samples"], one["images"]) for one in state["sets"]] == [(12, 18), (36, 72)]
    assert (state["images"], manifest(run, FIRST)["trained"]["steps"]) == (90, 90 // 12)
    table = data_tables(state)[0]
    assert [row[:4] for row in table.rows] == [
        ["train/000000.tar", "1.5", "12", "18"],
        ["train/{000001..000003}.tar", "2", "36", "72"],
    ]


def test_what_the_data_hold_is_said_before_training(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(base, tmp_path / "data", ignore=shutil.ignore_patterns("whole", "half", ".compt-index"))
    with tarfile.open(next((tmp_path / "data" / "train").glob("*.tar")), "a") as archive:
        for name in ("extra.1.jpg", "alone.txt"):
            archive.addfile(tarfile.TarInfo(name))
    run = tmp_path / "run"
    stopped_at(tmp_path / "data", run, 1, "data.captions=7")
    messages = [record.getMessage() for record in caplog.records]
    (held,) = [text for text in messages if "holds more than is used" in text]
    assert "key with dots (the key ends at the first dot): 1 (1 image); file of a key without an image: 1" in held
    (few,) = [text for text in messages if "data.captions is 7" in text]
    assert "but 48 of 48 images have fewer, 3 on average" in few
    account = Account.from_json(json.loads((run / "run.json").read_text())["account"])
    assert (account.unused["dots"], account.unused["no_image"]) == (1, 1)
    assert account.used["member"] == 96


def test_a_resume_on_another_machine_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    stopped_at(base, run, 3)
    path = run / "jobs" / FIRST / "manifest.json"
    begun = json.loads(path.read_text())
    begun["starts"][-1]["machine"] |= {"threads": "17", "torch": "1.0"}
    path.write_text(json.dumps(begun))
    chain(base, run)
    (said,) = [record.getMessage() for record in caplog.records if "last bits" in record.getMessage()]
    assert said.startswith(f"{FIRST}: the last bits may differ, as it goes on with ")
    assert "machine.torch 1.0 -> " in said
    assert "machine.threads 17 -> " in said


def replace_bytes(shard: Path) -> None:
    """Put other bytes into the first image. Sizes and names stay; the modification time changes."""
    with tarfile.open(shard) as archive:
        image = next(member for member in archive if member.name.endswith(("png", "jpg")))
    with shard.open("r+b") as file:
        file.seek(image.offset_data + image.size // 2)
        file.write(bytes(255 - byte for byte in shard.read_bytes()[file.tell() : file.tell() + 4]))


def test_other_captions_are_refused_and_a_run_of_before_goes_on(base: Path, half: Path) -> None:
    """Neither the numbers of captions nor the shards need to change with `data.caption_columns`."""
    with pytest.raises(RunError, match=r"what data\.caption_columns names changed since"):
        prepare(recipe_of("data.caption_columns=[captions]"), half, base=base)
    state = read_json(half / "run.json")
    assert state["contents"].pop("what data.caption_columns names")
    write_json(half / "run.json", state)
    prepare(recipe_of("data.caption_columns=[captions]"), half, base=base)


@pytest.mark.parametrize(
    ("shards", "what"),
    [
        ("train/*.tar", "the training shards changed since"),
        ("eval/*.tar", "the files of evaluation set 'held_out' (.*) changed since"),
        ("val/*.tar", "the shards val/.* changed since"),
    ],
)
def test_replaced_data_of_the_same_sizes_are_refused(
    shards: str, what: str, base: Path, half: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(base, tmp_path / "moved", ignore=shutil.ignore_patterns("whole", "*.yaml"))
    for shard in moved.glob(shards):
        os.utime(shard)
    prepare(recipe_of(), half, base=moved)  # another time alone is no change
    replace_bytes(next(moved.glob(shards)))
    with pytest.raises(RunError, match=what):
        prepare(recipe_of(), half, base=moved)
    # A run of an older version has not noted what its data held.
    state = json.loads((half / "run.json").read_text())
    del state["contents"]
    (half / "run.json").write_text(json.dumps(state))
    prepare(recipe_of(), half, base=moved)


@pytest.mark.parametrize(
    "change", ["data.captions_csv=captions.csv", "data.train=[{shards: train/*.tar, captions_csv: captions.csv}]"]
)
def test_a_table_replaced_by_one_of_the_same_size_and_time_is_refused(base: Path, tmp_path: Path, change: str) -> None:
    moved = shutil.copytree(base, tmp_path / "moved", ignore=shutil.ignore_patterns("whole", "half", "*.yaml"))
    table, run = moved / "captions.csv", tmp_path / "run"
    table.write_text(f"key,caption\n{open_index('train/*.tar', moved).key(0)},one\n")
    changes = (change, "data.min_matched=0")
    stopped_at(moved, run, 1, *changes)
    os.utime(table, ns=(1, 1))
    prepare(recipe_of(*changes), run, base=moved)  # another time alone is no change
    table.write_text(table.read_text().replace("one", "two"))
    os.utime(table, ns=(1, 1))
    with pytest.raises(RunError, match=f"the captions of table captions.csv changed since {FIRST} started"):
        prepare(recipe_of(*changes), run, base=moved)


def test_a_teacher_that_was_trained_again_is_noticed(base: Path, run: Path) -> None:
    shutil.rmtree(run / "jobs" / FIRST)
    chain(base, run)  # on the same machine the result is the same, so the second link stays
    shutil.rmtree(run / "jobs" / FIRST)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match=f"began with another {FIRST}"):
        patch.setattr("compt.train.build.DrawnState", lambda model, spec, seed: DrawnState(model, spec, seed + 1))
        chain(base, run)


def test_a_recipe_in_a_new_run_folder_is_not_replaced(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own" / "recipe.yaml"
    own.parent.mkdir()
    own.write_text("# mine\n")
    with pytest.raises(RunError, match="recipe.yaml: is not a run's, and a run in this folder would replace it"):
        prepare(recipe_of(), own.parent, base=base)
    assert own.read_text() == "# mine\n"


def test_difference() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}}
    assert difference(old, {"a": {"b": 2, "c": [1, 2]}, "d": 3, "e": {}}) == ["a.b: 1 -> 2", "d: None -> 3"]
    assert difference(old, old) == []
    assert difference({}, {"x": 1}) == ["x: (absent) -> 1"]


# --- scoring again


def test_changed_evaluation_sets_are_scored_and_nothing_is_trained(base: Path, run: Path) -> None:
    models = {job: files_of(run / "jobs" / job / "model") for job in (FIRST, SECOND)}
    change = "evaluation.sets.1={name: texts, task: retrieval, data: val/*.tar}"
    plan = plan_of(base, run, change)
    assert [job.name for job in waiting(plan, run)] == [FIRST, SECOND]
    assert [steps_left(job, run / "jobs" / job.name) for job in plan.jobs] == [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobRun, "_fit", lambda _: pytest.fail("it is trained again"))
        assert chain(base, run, change) == [f"{FIRST}: evaluating", f"{SECOND}: evaluating"]
    for job in (FIRST, SECOND):
        assert set(manifest(run, job)["scores"]) == {"held_out", "texts"}
        assert manifest(run, job)["state"] == "done"
        assert files_of(run / "jobs" / job / "model") == models[job]
    assert waiting(plan, run) == []


def test_steps_left(base: Path, half: Path) -> None:
    first, second = plan_of(base, half).jobs
    assert (steps_left(first, half / "jobs" / FIRST), steps_left(second, half / "jobs" / SECOND)) == (0, 5)
    stopped_at(base, half, 3)
    assert steps_left(second, half / "jobs" / SECOND) == 2


# --- baselines and controls


def test_baselines_controls_and_what_is_trained_once(base: Path, whole: Path, half: Path) -> None:
    changes = ["baselines.train={steps: 6}", "baselines.warmup={steps: 2}", "baselines.seeds=[3, 4]"]
    changes += ["baselines.controls=[equal_epochs, equal_macs]", "evaluation.every="]
    chain(base, half, *changes, baselines=True, controls=None)
    names = {path.name for path in (half / "jobs").iterdir()}
    baselines = {"baseline-small-s4", "baseline-large-s3", "baseline-large-s4"}
    assert names == {FIRST, SECOND, *baselines, "control-equal_epochs"}
    listed = {job["name"]: job for job in read_json(half / "run.json")["jobs"]}
    assert listed["baseline-small-s3"]["same_as"] == FIRST, "the first link is its own baseline"
    assert manifest(half, "control-equal_epochs")["steps"] == 5
    assert listed["control-equal_macs"]["steps"] == 6
    assert listed["control-equal_macs"]["same_as"] == "baseline-large-s3"
    assert all(manifest(half, name)["state"] == "done" for name in names)
    assert equal(weights(whole, SECOND), weights(half, SECOND))
    assert not equal(weights(half, "baseline-large-s3"), weights(half, "baseline-large-s4"))
    # Without --baselines they stay on the record.
    chain(base, half, "evaluation.every=")
    assert {job["name"] for job in read_json(half / "run.json")["jobs"]} == {*listed}


# --- a model from outside


def test_a_chain_from_an_existing_model(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(sources_weights, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    given = whole / "jobs" / FIRST / "model"
    export_model(read_artefact(given), tmp_path / "stock")
    links = 'chain.links=[{"model": "large", "train": {"steps": 5}, "warmup": {"steps": 1}}]'
    for name, start_from in (("a", given), ("b", tmp_path / "stock")):
        chain(base, tmp_path / name, links, f"chain.from={start_from}")
        assert equal(weights(tmp_path / "a", "1-large"), weights(tmp_path / name, "1-large"))
        assert equal(weights(whole, SECOND, "initial"), weights(tmp_path / name, "1-large", "initial"))
        found = read_artefact(tmp_path / name / "jobs" / "1-large" / "model").manifest
        assert found["parent"] == str(start_from)
    assert len(hashed) == 1
    # Other weights in the same place are another recipe.
    shutil.rmtree(tmp_path / "stock")
    export_model(read_artefact(whole / "jobs" / SECOND / "model"), tmp_path / "stock")
    deeper = 'family.members.1={"name": "large", "preset": "vit_pico", "depth": 2, "embed_dim": 48}'
    with pytest.raises(RunError, match="teacher: "):
        chain(base, tmp_path / "b", deeper, links, f"chain.from={tmp_path / 'stock'}")


def test_a_chain_from_weights_that_are_not_finite_is_refused(base: Path, whole: Path, tmp_path: Path) -> None:
    given = read_artefact(whole / "jobs" / FIRST / "model")
    state = dict(given.state)
    state["visual.proj"][0, 0] = torch.inf
    write_artefact(tmp_path / "broken", state, given.spec, {})
    links = 'chain.links=[{"model": "large", "train": {"steps": 5}, "warmup": {"steps": 1}}]'
    with pytest.raises(ArtefactError, match=r"teacher parameter visual\.proj: 1 of [\d,]+ numbers are NaN or infinite"):
        chain(base, tmp_path / "run", links, f"chain.from={tmp_path / 'broken'}")


def test_a_model_that_does_not_fit_is_refused_before_anything_starts(base: Path, whole: Path, tmp_path: Path) -> None:
    run, large = tmp_path / "run", whole / "jobs" / SECOND / "model"
    with pytest.raises(ConfigError, match=r"chain\.links\.0\.model = 'small': its [\d,]+ parameters are not more than"):
        chain(base, run, f"chain.from={large}")
    links = 'chain.links=[{"model": "large", "train": {"steps": 5}, "warmup": {"steps": 1}}]'
    with pytest.raises(ConfigError, match=r"quick_gelu is true, .* write family\.common: \{quick_gelu: false\}"):
        chain(base, run, links, f"chain.from={whole / 'jobs' / FIRST / 'model'}", "family.common.quick_gelu=true")
    with pytest.raises(ArtefactError, match="no such model"):
        chain(base, run, "chain.from=nowhere")
    with pytest.raises(ArtefactError, match="no model folder"):
        chain(base, run, f"chain.from={base / 'train'}")
    checkpoint = authors_checkpoint(tmp_path)
    with pytest.raises(ArtefactError, match=r"chain\.from: .* name the model with chain\.from_model"):
        chain(base, run, f"chain.from={checkpoint}")
    with pytest.raises(ArtefactError, match=r"chain\.from: .*the weights are not those of this model, vit_nano"):
        chain(base, run, f"chain.from={checkpoint}", "chain.from_model=vit_nano")
    with pytest.raises(ConfigError, match=r"^recipe: chain\.from_model: unknown model 'vit_pika' \(did you mean"):
        chain(base, run, f"chain.from={checkpoint}", "chain.from_model=vit_pika")
    assert not run.exists()


def authors_checkpoint(folder: Path) -> Path:
    """A vit_pico in a file as the authors' code writes it."""
    state = {f"module.{name}": value for name, value in export_state(build(PRESETS["vit_pico"], seed=1)).items()}
    torch.save({"epoch": 3, "name": "theirs", "state_dict": state}, folder / "theirs.pt")
    return folder / "theirs.pt"


def test_a_chain_from_a_file_that_does_not_say_what_it_is(base: Path, tmp_path: Path) -> None:
    path = authors_checkpoint(tmp_path)
    members = 'family={"members": [{"name": "large", "preset": "vit_pico", "depth": 3, "embed_dim": 160}]}'
    links = 'chain.links=[{"model": "large", "train": {"steps": 2}, "warmup": {"steps": 1}}]'
    chain(base, tmp_path / "run", members, links, f"chain.from={path}", "chain.from_model=vit_pico")
    theirs = export_state(build(PRESETS["vit_pico"], seed=1))
    grown = weights(tmp_path / "run", "1-large", "initial")
    assert torch.equal(grown["visual.conv1.weight"], theirs["visual.conv1.weight"])
    assert torch.equal(grown["visual.proj"][:, :128], theirs["visual.proj"])
    assert manifest(tmp_path / "run", "1-large")["state"] == "done"


def test_one_of_two_models_in_a_file(base: Path, tmp_path: Path) -> None:
    models = {name: export_state(build(PRESETS["vit_pico"], seed=seed)) for seed, name in enumerate(("old", "new"))}
    torch.save({f"{name}.{key}": value for name in models for key, value in models[name].items()}, tmp_path / "two.pt")
    said = (f"chain.from={tmp_path / 'two.pt'}", "chain.from_model=vit_pico")
    with pytest.raises(ArtefactError, match=r"2 models in it, .*; choose one with chain\.from_prefix$"):
        open_start(recipe_of(*said).chain, base)
    for name, state in models.items():
        found = open_start(recipe_of(*said, f"chain.from_prefix={name}").chain, base)
        assert torch.equal(found.state["visual.conv1.weight"], state["visual.conv1.weight"])


# --- how links grow


def test_images_context_and_each_tower_grow_in_a_way_of_their_own(base: Path, half: Path) -> None:
    large = {"name": "large", "preset": "vit_pico", "depth": 2, "embed_dim": 48, "width": 64, "text_width": 96}
    large |= {"image_size": 48, "patch_size": 12, "context_length": 20}
    expand = {"text": {"width": "insert_exact", "zero_new_outputs": True}, "image": {"width": "net2net"}}
    chain(base, half, f"family.members.1={json.dumps(large)}", f"chain.links.1.expand={json.dumps(expand)}")
    teacher, initial = (
        read_artefact(half / "jobs" / job / kind) for job, kind in ((FIRST, "model"), (SECOND, "initial"))
    )
    config = ExpandConfig(TowerGrowth("net2net"), TowerGrowth("insert_exact", zero_new_outputs=True))
    assert (initial.spec.image_size, initial.spec.context_length) == (48, 20)
    assert initial.spec.text_norm_eps == pytest.approx(NORM_EPS / 3)
    assert ExpandConfig.from_dict(manifest(half, SECOND)["expand"]) == config
    wanted = expand_state(make_plan(teacher.spec, initial.spec, config), teacher.state, Draw(initial.spec, 3))
    assert equal(weights(half, SECOND, "initial"), wanted)
    rows = [row for row in lines(half, SECOND) if row["kind"] == "train"]
    assert all(row["ifd"] > 0 for row in rows)
    assert manifest(half, SECOND)["state"] == "done"


def test_netexpand_takes_added_layers_from_the_moving_average(base: Path, tmp_path: Path) -> None:
    expand = 'chain.expand={"depth": "netexpand"}'
    with pytest.raises(ConfigError, match=r"^recipe: chain\.expand: depth netexpand .*; set optimizer\.ema$"):
        chain(base, tmp_path / "run", expand)
    chain(base, tmp_path / "run", expand, 'optimizer.ema={"decay": 0.5}')
    model, average = (weights(tmp_path / "run", FIRST, kind) for kind in ("model", "model/ema"))
    grown = weights(tmp_path / "run", SECOND, "initial")
    name = "visual.transformer.resblocks.{}.mlp.c_fc.weight"
    assert torch.equal(grown[name.format(0)], model[name.format(0)])
    assert torch.equal(grown[name.format(1)], average[name.format(0)])
    assert not torch.equal(model[name.format(0)], average[name.format(0)])


# --- options of a link


def test_a_link_without_distillation_and_with_its_own_rate(base: Path, half: Path) -> None:
    chain(base, half, "chain.links.1.alpha=0.0", "chain.links.1.lr=0.0003")
    rows = [row for row in lines(half, SECOND) if row["kind"] == "train"]
    assert not {"ifd", "r"} & rows[0].keys()
    assert max(row["lr"] for row in rows) == 0.0003
    assert (half / "jobs" / SECOND / "initial").exists(), "it is expanded all the same"


def test_alpha_of_a_link(base: Path, whole: Path, half: Path) -> None:
    chain(base, half, "chain.links.1.alpha=250.0")
    assert lines(half, SECOND)[0]["ifd"] == pytest.approx(lines(whole, SECOND)[0]["ifd"] / 2, rel=1e-5)


def test_a_link_of_random_weights_has_a_teacher_all_the_same(base: Path, half: Path) -> None:
    chain(base, half, "chain.links.1.initial=random", "chain.links.1.lr=1.0e-30")
    assert not (half / "jobs" / SECOND / "initial").exists()
    trained = read_artefact(half / "jobs" / SECOND / "model")
    drawn = DrawnState(build(trained.spec, device="meta"), trained.spec, 3)
    assert max(float((trained.state[name] - drawn[name]).abs().max()) for name in trained.state) < 1e-6
    assert manifest(half, SECOND)["parent_hash"] == manifest(half, FIRST)["model_hash"]
    assert all(row["r"] > 0 for row in lines(half, SECOND) if row["kind"] == "train")


def test_classical_distillation_goes_from_large_to_small(base: Path, tmp_path: Path) -> None:
    large, small = ({"model": name, "train": {"steps": 4}, "warmup": {"steps": 1}} for name in ("large", "small"))
    with pytest.raises(ConfigError, match=r"chain\.links\.1\.model = 'small': .*; a chain goes from small to large"):
        chain(base, tmp_path / "run", f"chain.links={json.dumps([large, small])}")
    chain(base, tmp_path / "run", f"chain.links={json.dumps([large, {**small, 'initial': 'random'}])}")
    assert all(row["ifd"] > 0 for row in lines(tmp_path / "run", "2-small") if row["kind"] == "train")
    assert manifest(tmp_path / "run", "2-small")["teacher_spec"]["name"] == "large", "nothing else says its sizes"
    cost = manifest(tmp_path / "run", "2-small")["cost"]
    assert cost["teacher_forward_macs"] > cost["student_forward_macs"]


def test_without_anything_to_score_no_model_is_loaded_for_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], Artefact.load_model

    def load_model(self: Artefact, *arguments: Any, **options: Any) -> Any:
        loaded.append(self.path.parent.name)
        return load(self, *arguments, **options)

    def scoring(_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(Artefact, "load_model", load_model)
    monkeypatch.setattr("compt.engines.ddp.DataParallelEngine.scoring", scoring)
    nothing = ["evaluation.sets=[]", "evaluation.validation=[]", "evaluation.primary="]
    said = chain(base, tmp_path / "run", *nothing)
    assert loaded == []  # training reads the weights of the teacher without it
    assert not any("evaluating" in text for text in said)
    assert [manifest(tmp_path / "run", job)["scores"] for job in (FIRST, SECOND)] == [{}, {}]
    monkeypatch.undo()
    # They can be added later.
    chain(base, tmp_path / "run", "evaluation.sets.1.role=report")
    assert manifest(tmp_path / "run", SECOND)["scores"].keys() == {"held_out", "choose"}


# --- the folder


def test_a_second_process_is_refused(base: Path, half: Path) -> None:
    ready, release = CONTEXT.Event(), CONTEXT.Event()
    process = start(hold, half, ready, release)
    try:
        assert ready.wait(60)
        for action in (lambda: chain(base, half), lambda: start_fresh(half)):
            with pytest.raises(RunError, match="is in use by another process"):
                action()
    finally:
        release.set()
    assert finish(process) == 0
    assert not (half / "jobs" / SECOND).exists()
    chain(base, half)


def test_what_a_process_at_one_job_has_is_not_removed(run: Path) -> None:
    ready, release = CONTEXT.Event(), CONTEXT.Event()
    process, before = start(hold, run / "jobs" / SECOND, ready, release), files_of(run)
    try:
        assert ready.wait(60)
        with pytest.raises(RunError, match=f"jobs/{SECOND} is in use by another process"):
            start_fresh(run)
    finally:
        release.set()
    assert finish(process) == 0
    assert {path: seen for path, seen in files_of(run).items() if not path.endswith("lock")} == {
        path: seen for path, seen in before.items() if not path.endswith("lock")
    }
    start_fresh(run)


@pytest.mark.parametrize("begun_again", [False, True])
def test_a_job_does_not_start_in_a_run_that_was_started_over(
    begun_again: bool, base: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, after this one has checked everything and before it takes its job."""
    context, plan = prepare(recipe_of(), half, base=base, names=[SECOND])
    write = chain_module.write_state

    def overtaken(*arguments: Any) -> str:
        started = write(*arguments)
        start_fresh(half)
        if begun_again:
            write_json(half / "run.json", {"data_fingerprint": "x", "started": "later", "jobs": []})
        return started

    monkeypatch.setattr(chain_module, "write_state", overtaken)
    with pytest.raises(RunError, match="another process has restarted this run; start the same command again"):
        run_only(context, plan, [plan.job(SECOND)], print)
    assert not (half / "jobs").exists()


def test_no_job_is_begun_while_a_run_is_removed(base: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_locks, "SECONDS", 0.2)
    context, plan = prepare(recipe_of(), half, base=base, names=[SECOND])
    remove, refused = shutil.rmtree, []

    def meanwhile(path: Path) -> None:
        try:
            run_only(context, plan, [plan.job(SECOND)], print)
        except RunError as error:
            refused.append(str(error))
        remove(path)

    # What was written of the run before is as it was, so that the job's lock is next.
    monkeypatch.setattr(chain_module, "write_state", lambda *_: read_json(half / "run.json")["started"])
    monkeypatch.setattr(shutil, "rmtree", meanwhile)
    start_fresh(half)
    assert refused
    assert all("another process has held run.lock for 0.2 s" in text for text in refused)
    assert not (half / "jobs").exists()


def test_processes_of_one_run_lose_nothing_of_what_each_plans(
    base: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one that writes the plan of the baselines between the first one's reading and writing of run.json."""
    links, baselines = (prepare(recipe_of(), half, base=base, baselines=each) for each in (False, True))
    read, second = state_module.read_state, threading.Thread(target=chain_module.write_state, args=(*baselines, None))

    def slow(folder: Path) -> dict[str, Any]:
        state = read(folder)
        if threading.current_thread() is not second and not second.is_alive():
            second.start()
            second.join(1.0)
        return state

    monkeypatch.setattr(state_module, "read_state", slow)
    monkeypatch.setattr(state_module, "read_calibration", lambda _: None)
    chain_module.write_state(*links, None)
    second.join(60)
    assert [job["name"] for job in read(half)["jobs"]] == [job.name for job in baselines[1].jobs]


def test_what_another_process_is_writing_is_left_to_it(base: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_locks, "SECONDS", 0.2)
    new = temporary_of(half / "run.json")
    new.write_text("{")
    ready, release = threading.Event(), threading.Event()

    def writes() -> None:
        with chain_locks.writing(half):
            ready.set()
            release.wait(60)

    other = threading.Thread(target=writes)
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(RunError, match=r"another process has held run.lock for 0.2 s"):
            chain(base, half)
        assert new.exists()
    finally:
        release.set()
        other.join()
    chain(base, half)
    assert not new.exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_flock_a_lock_does_not_outlive_its_machine(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", missing)
    monkeypatch.setattr(chain_locks, "TOUCHING", 0.05)
    lock = tmp_path / "lock"
    with locked(tmp_path):
        os.utime(lock, (1e9, 1e9))
        until = time.monotonic() + 30
        while lock.stat().st_mtime == 1e9 and time.monotonic() < until:
            time.sleep(0.02)
        assert lock.stat().st_mtime > 1e9, "the holder shows that it lives"
    assert not lock.exists()
    lock.write_text("4242\nanother-host\n")
    stale = rf"pid 4242 on another-host holds {lock}.* stale if that process no longer runs: then remove the file"
    with pytest.raises(RunError, match=stale), locked(tmp_path):
        pass
    for text in ("4242\nanother-host\n", ""):  # no holder: one that could lock files left it
        lock.write_text(text)
        os.utime(lock, (time.time() - 301, time.time() - 301))
        with locked(tmp_path):
            assert lock.read_text().startswith(f"{os.getpid()}\n")
    lock.write_text("4242\nanother-host\n")
    monkeypatch.setattr("time.time", lambda: 1e10)  # this machine's clock, which is not the file system's
    with pytest.raises(RunError, match=stale), locked(tmp_path):
        pass


def test_a_stale_lock_is_taken_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", missing)
    lock, age = tmp_path / "lock", chain_locks._Lock._age

    def overtaken(self: Any) -> float:
        """Another process takes the lock just after this one has found it stale."""
        found = age(self)
        if lock.read_text().startswith("4242"):
            lock.write_text("5353\nanother-host\n")
        return found

    monkeypatch.setattr(chain_locks._Lock, "_age", overtaken)
    lock.write_text("4242\nanother-host\n")
    os.utime(lock, (time.time() - 301, time.time() - 301))
    with pytest.raises(RunError, match="pid 5353 on another-host holds"), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with FileLock(tmp_path / "lock").acquire(timeout=0):
        pass


def test_starting_over(run: Path, tmp_path: Path) -> None:
    start_fresh(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (run / "notes.txt").write_text("of the user")
    (run / "faults").mkdir()
    start_fresh(run)
    assert sorted(path.name for path in run.iterdir()) == ["lock", "notes.txt", "run.lock"]
    (run / "notes.txt").unlink()
    start_fresh(run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds other files than a run's"):
        start_fresh(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_what_does_not_fit_the_gpu_is_said_before_the_first_link(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On four A100 with 40 GB, vit_l16 alone would run out of memory, days later."""
    recipe = load_recipe(root / "recipes" / "cc3m_vit.yaml", [])
    jobs = plan_jobs(recipe, world_size=4).jobs
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=42e9))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})

    def said(*changes: str, device: torch.device = gpu) -> list[str]:
        changed = load_recipe(root / "recipes" / "cc3m_vit.yaml", list(changes))
        return list(chain_module.device_warnings(changed, jobs, device))

    cores, large = said()
    assert cores.startswith("engine.workers is 8, but each process can use 1 of the cores")
    assert large.startswith("4-vit_l16: by the plan's count it needs ")
    assert "engine.micro_batch" in large
    assert said("engine.micro_batch=32", "engine.workers=1") == []
    assert said("engine.find_micro_batch=true", "engine.workers=1") == []
    assert said(device=torch.device("cpu")) == []


def test_a_script_without_a_guard_is_told_what_it_lacks(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that tries a micro-batch imports the user's script again, which would train inside it."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ConfigError, match="put what it starts below `if __name__ == '__main__':`"):
        prepare(recipe_of(), tmp_path / "run", base=base)


def test_compiled_code_goes_with_its_job(half: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variants of all models of a process count against one limit of torch's."""
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    chain(base, half)
    assert "torch._dynamo" in sys.modules
    assert len(forgotten) == len(list((half / "jobs").iterdir()))
