"""Expansion from files into files gives what expansion in memory gives, and needs memory for one parameter."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compt.cost import counts
from compt.expand.execute import Draw, expand
from compt.expand.plan import ExpansionPlan
from compt.files import memory_sizes
from compt.models.growth import ExpandConfig
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import ModelSpec
from compt.weights.artefact import read_artefact, write_artefact
from compt.weights.open import average_of
from tests.helpers.process import finish, start
from tests.helpers.states import expand_state
from tests.helpers.stream import (
    CASES,
    SEED,
    SWIN,
    VIT,
    Case,
    assert_bitwise_equal,
    digests,
    weights,
    write_student,
    write_teachers,
)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teachers(tmp_path_factory.mktemp("teachers"))


def in_memory(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    plan = case.plan
    teacher, average = weights(plan.teacher, 1, dtype), weights(plan.teacher, 2, dtype)
    return expand_state(plan, teacher, Draw(plan.student, SEED), average if plan.needs_average else None)


def test_every_operator_is_among_the_cases() -> None:
    towers = [tower for case in CASES.values() for tower in (case.config.image, case.config.text)]
    assert {tower.width for tower in towers} == set(WIDTH_OPERATORS)
    assert {tower.depth for tower in towers} == set(DEPTH_OPERATORS)


class Watched(Mapping[str, Tensor]):
    """Counts the bytes of the tensors that it gave and that are still alive."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.alive, self.most, self.largest = state, 0, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.state[name].clone()
        self.alive += tensor.nbytes
        self.largest = max(self.largest, tensor.nbytes)
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._gone, tensor.nbytes)
        return tensor

    def _gone(self, size: int) -> None:
        self.alive -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_files_hold_what_comes_out_in_memory_and_one_parameter_is_alive(
    case: Case, teachers: Path, tmp_path: Path
) -> None:
    watched: list[Watched] = []

    def watch(state: Mapping[str, Tensor]) -> Watched:
        watched.append(Watched(state))
        return watched[-1]

    write_student(teachers, tmp_path / "student", case, together=False, watch=watch)
    found = read_artefact(tmp_path / "student")
    assert len(list((tmp_path / "student").glob("*.safetensors"))) > 3
    assert found.spec == case.plan.student
    assert_bitwise_equal(found.state, in_memory(case), "from files")
    assert len(watched) == (3 if case.plan.needs_average else 2)
    for state in watched:
        assert state.alive == 0
        assert state.most == state.largest > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    # There are layers without a source, and the tables of a Swin have odd sizes.
    case = Case(SWIN, ExpandConfig.both("lemon", "constant"))
    teacher = case.pair[0]
    write_artefact(tmp_path / "teachers" / teacher.name, weights(teacher, 1, dtype), teacher, {})
    write_student(tmp_path / "teachers", tmp_path / "student", case, together=False)
    found = read_artefact(tmp_path / "student").state
    assert {found[name].dtype for name in found} == {dtype}
    assert_bitwise_equal(found, in_memory(case, dtype), "from files")


def test_again_from_the_manifest(teachers: Path, tmp_path: Path) -> None:
    write_student(teachers, tmp_path / "once", CASES["vit, depth netexpand"], together=False)
    manifest = read_artefact(tmp_path / "once").manifest
    teacher = read_artefact(teachers / "vit_small")
    assert teacher.hash == manifest["parent_hash"]
    plan = ExpansionPlan.from_json(manifest["expansion"])
    state = expand(plan, teacher.state, manifest["seed"], average_of(teacher))
    fields = {key: manifest[key] for key in ("parent_hash", "seed", "expansion")}
    write_artefact(tmp_path / "again", state, plan.student, fields, max_shard_bytes=5000)
    assert digests(tmp_path / "again") == digests(tmp_path / "once")


WIDE = (
    replace(VIT[0], name="narrow", width=96, heads=24, text_width=64, text_heads=16, vocab_size=900, embed_dim=40),
    replace(VIT[1], name="wide", width=144, heads=36, text_width=128, text_heads=32, vocab_size=1000, embed_dim=56),
)


@pytest.mark.parametrize("width", WIDTH_OPERATORS)
def test_the_number_of_threads_changes_nothing(width: str) -> None:
    case = Case(WIDE, ExpandConfig.both(width))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = in_memory(case)
        torch.set_num_threads(4)
        assert_bitwise_equal(in_memory(case), one, "four threads")
    finally:
        torch.set_num_threads(before)


def write_long_pairs(folder: Path) -> None:
    """Note the peak of memory while each of three students is written; the first loads what else is needed."""
    peaks = []
    for depth in (2, 2, 12):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        case = Case(long_pair(depth), ExpandConfig.both("net2net"))
        write_student(folder, folder / f"long-{depth}", case, together=False, shard=10**9)
        peaks.append(memory_sizes()["VmHWM"])
    (folder / "peaks").write_text(json.dumps(peaks))


def long_pair(depth: int) -> tuple[ModelSpec, ModelSpec]:
    """Of 512 channels, which the student has, a layer takes 12 MiB and its largest parameter 4 MiB."""
    return (
        replace(VIT[0], name=f"short-{depth}", width=256, heads=64, depth=depth, text_width=64, text_heads=16),
        replace(VIT[1], name=f"long-{depth}", width=512, heads=128, depth=depth, text_width=64, text_heads=16),
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")
def test_memory_does_not_follow_the_number_of_parameters(tmp_path: Path) -> None:
    sizes = []
    for depth in (2, 12):
        teacher, student = long_pair(depth)
        write_artefact(tmp_path / teacher.name, weights(teacher, 1), teacher, {})
        sizes.append(4 * counts.parameters(teacher) + 4 * counts.parameters(student))
    assert finish(start(write_long_pairs, tmp_path)) == 0
    _, short, long = json.loads((tmp_path / "peaks").read_text())
    shutil.rmtree(tmp_path)
    assert sizes[1] - sizes[0] > 145 << 20
    # Allocators keep some of what was freed: a third of what would be there if all were kept.
    assert long - short < 48 << 20
