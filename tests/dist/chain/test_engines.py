"""Whole chains under every engine: the same as on one process, from engine to engine, and from one world to another."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from compt.chain.run import only, prepare, run_only
from compt.errors import ConfigError, Interrupted, RunError
from compt.train import loop as trainer
from tests.dist.spawn import run_ranks
from tests.helpers.cases import matrix
from tests.helpers.recipe import chain, largest_difference, lines, make_data, manifest, recipe_of, weights

TOLERANCE = 5e-5
"""Of weights after a link: a step of AdamW at eps 1e-4 carries the rounding of another order of summation on."""

LARGER = "{name: larger, preset: vit_pico, depth: 2, width: 96, embed_dim: 64}"
MEMBERS = (
    "family.members=[{name: small, preset: vit_pico, depth: 1, embed_dim: 32}, "
    "{name: large, preset: vit_pico, depth: 2, embed_dim: 48}, " + LARGER + "]"
)
LINKS = (
    "chain.links=[{model: small, train: {steps: 6}, warmup: {steps: 2}}, "
    "{model: large, train: {steps: 5}, warmup: {steps: 1}}, {model: larger, train: {steps: 4}, warmup: {steps: 1}}]"
)
CHANGES = [MEMBERS, LINKS, "optimizer.ema={decay: 0.9}", "optimizer.clip_grad_norm=1.0"]
JOBS = ("1-small", "2-large", "3-larger")
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """The chain on one process under DDP, which is plain PyTorch there."""
    chain(base, base / "whole", *CHANGES)
    return base / "whole"


def some(base: Path, run: Path, changes: list[str], names: list[str], stop: int | None = None) -> str:
    """Run some jobs of the chain. All ranks get SIGTERM at step `stop`. Returns the reason for the stop."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            rate = trainer.learning_rate

            def learning_rate(step: int, settings: trainer.TrainSettings) -> float:
                if step + 1 == stop:
                    signal.raise_signal(signal.SIGTERM)
                return rate(step, settings)

            patch.setattr(trainer, "learning_rate", learning_rate)
        context, plan = prepare(recipe_of(*changes), run, base=base, names=names)
        try:
            run_only(context, plan, only(plan, names, run), lambda _: None)
        except Interrupted as error:
            return str(error)
    return ""


def each_engine(base: Path, folder: Path, engines: list[str]) -> None:
    """Run a chain under one engine after another in one set of processes."""
    for engine in engines:
        extra = [*CHANGES, f"engine.name={engine}", "engine.micro_batch=3", "engine.shard_teacher=true"]
        assert some(base, folder / engine, extra, list(JOBS)) == ""


def assert_same(whole: Path, run: Path) -> None:
    for job in JOBS:
        for kind in ("model", "model/ema"):
            assert largest_difference(weights(whole, job, kind), weights(run, job, kind)) < TOLERANCE, (job, kind)
        for one, two in zip(lines(whole, job), lines(run, job), strict=True):
            assert one.pop("kind") == two.pop("kind")
            for line in (one, two):
                line.pop("macs", 0)  # ranks and micro-batches pad to their own longest caption, and features come twice
            assert one == pytest.approx(two, rel=5e-4, abs=2e-6), job
        assert manifest(run, job)["state"] == "done"
        assert [line["macs"] for line in lines(run, job) if "macs" in line][-1] == pytest.approx(
            manifest(run, job)["cost"]["total_macs"]
        )


@pytest.mark.slow
def test_a_chain_from_engine_to_engine(base: Path, whole: Path, tmp_path: Path) -> None:
    """Link 1 under DDP on one process, link 2 under ZeRO-2 on two, link 3 under FSDP2 on four: one run folder."""
    run = tmp_path / "run"
    changes = [
        *CHANGES,
        *(f"chain.links.{at}.engine={value}" for at, value in enumerate(["{name: ddp}", "{name: zero2}"])),
        "chain.links.2.engine={name: fsdp2, fsdp2: {replicas: 2}, micro_batch: 3, shard_teacher: true}",
    ]
    assert some(base, run, changes, ["1-small"]) == ""
    with pytest.raises(ConfigError, match=r"engine\.fsdp2\.replicas = 2 does not divide the 1 processes"):
        some(base, run, changes, ["3-larger", "2-large"])
    with pytest.raises(RunError, match="3-larger grows from 2-large, which is planned; train that first"):
        some(base, run, changes, ["3-larger"])
    with pytest.raises(ConfigError, match="--only 2-larg: is none of the models to train .*'2-large'"):
        some(base, run, changes, ["2-larg"])
    assert run_ranks(some, 2, base, run, changes, ["2-large"], timeout=300) == [""] * 2
    assert run_ranks(some, 4, base, run, changes, ["3-larger"], timeout=300) == [""] * 4
    assert_same(whole, run)
    starts = [manifest(run, job)["starts"][-1] for job in JOBS]
    assert [(start["engine"], start["processes"]) for start in starts] == [("ddp", 1), ("zero2", 2), ("fsdp2", 4)]


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero3"])
def test_one_process_needs_no_launcher(engine: str, base: Path, whole: Path, tmp_path: Path) -> None:
    # In a process of its own, as DeepSpeed opens a process group.
    assert run_ranks(some, 1, base, tmp_path, [*CHANGES, f"engine.name={engine}"], ["1-small"], timeout=300) == [""]
    assert largest_difference(weights(whole, "1-small"), weights(tmp_path, "1-small")) < TOLERANCE


@pytest.mark.full
def test_every_engine_carries_a_whole_chain(base: Path, whole: Path, tmp_path: Path) -> None:
    run_ranks(each_engine, 4, base, tmp_path, list(ENGINES), timeout=900)
    for engine in ENGINES:
        assert_same(whole, tmp_path / engine)


@pytest.mark.parametrize("engine", matrix(["fsdp2", "zero1", "zero2", "zero3"], ["fsdp2", "zero3"]))
def test_stopped_on_two_processes_and_resumed_on_four_and_one(
    engine: str, base: Path, whole: Path, tmp_path: Path
) -> None:
    changes = [*CHANGES, f"engine.name={engine}"]
    first = run_ranks(some, 2, base, tmp_path, changes, list(JOBS), 4, timeout=300)
    assert "1-small: stopped by SIGTERM at step 4 of 6; saved" in first[0]
    second = run_ranks(some, 4, base, tmp_path, changes, list(JOBS), 3, timeout=300)
    assert "2-large: stopped by SIGTERM at step 3 of 5; saved" in second[0]
    assert run_ranks(some, 1, base, tmp_path, changes, list(JOBS), timeout=300) == [""]
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_another_kind_of_engine_goes_on_from_the_weights_and_says_so(base: Path, whole: Path, tmp_path: Path) -> None:
    def changes(engine: str) -> list[str]:
        return [*CHANGES, f"engine.name={engine}"]

    (stopped,) = run_ranks(some, 1, base, tmp_path, changes("zero1"), ["1-small"], 3, timeout=300)
    assert "at step 3 of 6" in stopped
    assert run_ranks(some, 2, base, tmp_path, changes("fsdp2"), ["1-small"], timeout=300) == [""] * 2
    assert manifest(tmp_path, "1-small")["trained"]["moments_anew"] == [3]
    assert manifest(whole, "1-small")["trained"]["moments_anew"] == []
    assert TOLERANCE < largest_difference(weights(whole, "1-small"), weights(tmp_path, "1-small")) < 0.1
    assert [line["step"] for line in lines(tmp_path, "1-small") if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
