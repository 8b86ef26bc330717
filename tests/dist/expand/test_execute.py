"""Expansion by several ranks together writes the same bytes as one process, for every operator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from compt.dist import collectives as dist
from compt.expand.execute import Draw
from compt.expand.plan import ExpansionPlan
from compt.files import read_json
from compt.weights.artefact import read_artefact
from tests.dist.spawn import run_ranks
from tests.helpers.recipe import FIRST, SECOND, chain, make_data, manifest, weights
from tests.helpers.states import expand_state
from tests.helpers.stream import CASES, assert_bitwise_equal, digests, write_student, write_teachers

# Every operator, on one architecture; a table of a Swin is read like any other parameter.
OPERATORS = [name for name in CASES if name.startswith(("vit, width", "swin, depth"))]
# Operators do not see the number of ranks, so a few cases are enough for other numbers.
FEW = ["vit, width lemon", "vit, width netexpand", "vit, depth netexpand"]


def expand_all(teachers: Path, out: Path, names: list[str]) -> int:
    """Every case in one group of processes; returns how many there were."""
    for name in names:
        write_student(teachers, out / name, CASES[name])
    dist.barrier()
    return len(names)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def alone(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Write the folder in one process, without a group."""
    out = tmp_path_factory.mktemp("alone")
    names = {*OPERATORS, *FEW}
    for name in names:
        write_student(teachers, out / name, CASES[name], together=False)
    return {name: digests(out / name) for name in names}


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_any_number_of_writers_writes_the_same_bytes(
    world: int, teachers: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    names = OPERATORS if world == 2 else FEW
    assert run_ranks(expand_all, world, teachers, tmp_path, names) == [len(names)] * world
    for name in names:
        assert digests(tmp_path / name) == alone[name], name
        files = [file for file in alone[name] if file.endswith(".safetensors")]
        assert len(files) >= world, f"{name}: every rank has something to write"
    shutil.rmtree(tmp_path)


def test_a_run_of_two_processes_expands_as_its_manifest_says(tmp_path: Path) -> None:
    base = make_data(tmp_path)
    run_ranks(chain, 2, base, tmp_path / "run")
    assert manifest(tmp_path / "run", SECOND)["processes"] == 2
    initial = read_artefact(tmp_path / "run" / "jobs" / SECOND / "initial")
    teacher = read_artefact(tmp_path / "run" / "jobs" / FIRST / "model")
    trained = read_json(tmp_path / "run" / "jobs" / SECOND / "model" / "manifest.json")
    assert trained["initial_hash"] == initial.hash
    for key in ("expansion", "shard_bytes", "seed", "parent", "parent_hash"):
        assert trained[key] == initial.manifest[key], key
    assert trained["parent_hash"] == teacher.hash
    plan = ExpansionPlan.from_json(trained["expansion"])
    again = expand_state(plan, teacher.state, Draw(plan.student, trained["seed"]))
    assert_bitwise_equal(initial.state, again, "from the manifest")
    different = weights(tmp_path / "run", SECOND)
    assert not torch.equal(different["visual.proj"], again["visual.proj"])
