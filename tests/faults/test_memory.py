"""Out of memory: the advice, the search for a micro-batch that fits, and one rank that has less memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compt.chain import job as jobs
from compt.dist import child
from compt.dist import collectives as dist
from compt.errors import RunError, is_out_of_memory
from compt.plan.jobs import make_plan
from compt.plan.remedies import Room, advice, explained
from compt.recipe.engine import EngineConfig
from compt.recipe.read import load_recipe
from compt.train.metrics import read_metrics, straggler_report
from compt.train.micro_batch import Trial, fits_apart, largest, steps
from tests.dist.spawn import run_ranks
from tests.faults.group import Group
from tests.helpers.recipe import FIRST, SECOND, chain, make_data, manifest, recipe_of

ROOT = Path(__file__).resolve().parents[2]


def large(**changes: Any) -> str:
    recipe = load_recipe(ROOT / "recipes" / "cc3m_vit.yaml", [])
    job = make_plan(recipe, baselines=False, controls=()).jobs[-1]
    engine = EngineConfig(**changes)
    share = recipe.optimizer.batch // 8
    return advice(recipe, job, engine, 8, Room(10**9, 80 * 10**9), engine.micro_batch or share)


def test_advice_names_changes_with_their_bytes() -> None:
    text = large()
    assert "(1.00 GB free and 80.0 GB in all)" in text
    counted = re.search(r"counts (\S+) GB for each of 8 processes", text)
    assert counted is not None
    assert float(counted[1]) > 40
    micro = re.search(r"engine\.micro_batch: (\d+) \(now (\d+)\): (\S+) GB", text)
    assert micro is not None
    assert int(micro[2]) % int(micro[1]) == 0
    sizes = [float(size) for size in re.findall(r": (\S+) GB$", text, re.MULTILINE)]
    assert sizes
    assert max(sizes) <= 75
    assert "engine.recompute: true" in text


def test_advice_leaves_out_what_is_done_already_and_what_does_not_help() -> None:
    text = large(recompute=True, name="fsdp2", micro_batch=1, loss_chunk=1, shard_teacher=True)
    assert "engine.recompute" not in text
    assert "engine.name: fsdp2" not in text
    assert "engine.micro_batch" not in text
    assert "take more GPUs, or larger ones" in text or "engine.name: zero3" in text


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shape '[2]' is invalid"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_what_counts_as_a_lack_of_memory(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one
    wanted = pytest.raises(RunError if is_one else type(error), match="take less" if is_one else None)
    with wanted, explained(lambda: "take less"):
        raise error


@pytest.mark.parametrize("limit", range(14))
def test_the_search_finds_the_largest(limit: int) -> None:
    sizes, tried = [1, 2, 3, 4, 6, 12], []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest(sizes, fits) == max((size for size in sizes if size <= limit), default=None)
    assert len(tried) <= 4
    assert len(set(tried)) == len(tried)


def limited(trial: Trial, micro_batch: int) -> None:
    """A step on two ranks; the second can hold three images at a time."""
    if torch.distributed.get_rank() == 1 and micro_batch > 3:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    steps(trial, micro_batch)


def failing(trial: Trial, micro_batch: int) -> None:
    raise KeyError("no matter of memory")


def searched(folder: Path) -> None:
    child.METHOD = "forkserver"
    recipe = recipe_of()
    job = make_plan(recipe, baselines=False, controls=()).jobs[-1]
    trial = Trial.of(job, recipe, folder, torch.device("cpu"))
    before = torch.random.get_rng_state()
    assert [fits_apart(trial, size, limited) for size in (6, 3)] == [False, True]
    with pytest.raises(RunError, match="large: looking for a micro-batch failed: rank [01]: KeyError: 'no") as caught:
        fits_apart(trial, 6, failing)
    assert caught.value.agreed
    assert torch.equal(before, torch.random.get_rng_state())
    dist.barrier()


@pytest.mark.slow
def test_one_rank_with_less_memory_decides_for_all(tmp_path: Path) -> None:
    ended = Group(tmp_path / "group", 2, searched, tmp_path).end(240)
    assert ended.codes == [0, 0], ended.said


def test_a_run_notes_the_micro_batch_that_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_data(tmp_path)
    asked: list[Trial] = []

    def found(trial: Trial) -> int:
        asked.append(trial)
        return 4

    monkeypatch.setattr(jobs, "find_micro_batch", found)
    said = chain(base, tmp_path / "run", "engine.find_micro_batch=true", "engine.micro_batch=6")
    assert [
        (trial.blueprint.student.name, trial.blueprint.teacher and trial.blueprint.teacher.name, trial.share)
        for trial in asked
    ] == [
        ("small", None, 12),
        ("large", "small", 12),
    ]
    assert manifest(tmp_path / "run", SECOND)["starts"][-1]["micro_batch"] == 4
    assert f"{FIRST}: 4 images of a process fit into memory at once" in said


def test_nothing_is_looked_for_where_no_step_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, write, asked = make_data(tmp_path), jobs.JobRun._write_artefact, []

    def stopping(self: jobs.JobRun, name: str, *arguments: Any, **options: Any) -> None:
        if name == "model" and not asked:
            raise RunError("disk full")
        write(self, name, *arguments, **options)

    def found(trial: Trial) -> int:
        asked.append(trial.blueprint.student.name)
        return 4

    monkeypatch.setattr(jobs.JobRun, "_write_artefact", stopping)
    with pytest.raises(RunError, match="disk full"):
        chain(base, tmp_path / "run")
    asked.append("resumed")
    monkeypatch.setattr(jobs, "find_micro_batch", found)
    chain(base, tmp_path / "run", "engine.find_micro_batch=true")
    assert asked == ["resumed", "large"]


def exhausted(folder: Path, base: Path) -> None:
    """A chain whose second rank runs out of memory in its third step."""
    from compt.train import loop as trainer

    step = trainer.training_step
    done = [0]

    def training_step(*arguments: Any, **options: Any) -> Any:
        done[0] += 1
        if dist.rank() == 1 and done[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(*arguments, **options)

    trainer.training_step = training_step
    chain(base, folder / "run")


@pytest.mark.slow
def test_one_rank_out_of_memory_ends_all_with_advice(tmp_path: Path) -> None:
    base = make_data(tmp_path)
    group = Group(tmp_path / "group", 2, exhausted, tmp_path / "group", base)
    ended = group.end(120)
    assert ended.codes == [5, 5], ended.said
    assert ended.said.count("out of memory (") == 1
    assert f"compt: rank 1: {FIRST}: out of memory (" in ended.said
    assert "engine.name: fsdp2 (now ddp): " in ended.said
    assert "Traceback" not in ended.said


def reported(seconds: list[float], waited: list[float]) -> dict[str, float]:
    return straggler_report(seconds[dist.rank()], waited[dist.rank()], 2)


def test_the_slowest_rank_is_named() -> None:
    wanted = {"step_seconds_max": 4.0, "step_seconds_mean": 3.0, "data_wait_max": 2.5, "slowest_rank": 1}
    assert run_ranks(reported, 2, [4.0, 8.0], [5.0, 1.0]) == [wanted, wanted]
    assert straggler_report(1.0, 1.0, 1) == {}


def sleepy(base: Path, run: Path) -> None:
    train_loader = jobs.train_loader

    def slowly(*arguments: Any, **options: Any) -> Any:
        import time

        for batch in train_loader(*arguments, **options):
            if dist.rank() == 1:
                time.sleep(0.2)
            yield batch

    jobs.train_loader = slowly
    chain(base, run)


def test_a_run_reports_the_rank_that_waits_for_its_data(tmp_path: Path) -> None:
    base = make_data(tmp_path)
    run_ranks(sleepy, 2, base, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "jobs" / FIRST / "metrics.jsonl", "train")
    assert all(row["data_wait_max"] >= 0.2 for row in rows)
    assert sum(row["slowest_rank"] == 1 for row in rows) >= len(rows) - 1
