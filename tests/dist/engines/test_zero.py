"""DeepSpeed's ZeRO against a plain loop in one process: numbers, files, other numbers of ranks, faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch

from compt.cost.memory import checkpoint_bytes
from compt.weights.deepspeed import read_zero_state
from tests.dist.engines import zero_cases as cases
from tests.dist.engines.zero_cases import Cell, Result
from tests.dist.spawn import run_ranks
from tests.helpers.cases import matrix

# Only looked for: importing takes seconds, and the ranks do it.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no deepspeed: pip install 'compt[deepspeed]'")

STAGES = range(4)
OFFLOAD = (("offload_optimizer", {"device": "cpu", "pin_memory": False}),)
OFFLOAD_BOTH = (*OFFLOAD, ("offload_param", {"device": "cpu", "pin_memory": False}))
ROBIN = (("round_robin_gradients", True),)
TIMEOUT = 400.0


def check(found: Result, expected: Result, cell: Cell) -> None:
    """Tensor by tensor, relative to norms. Key biases absolutely: their gradient is rounding noise."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-5), cell
    assert found.norms == pytest.approx(expected.norms, rel=1e-5), cell
    assert found.gradients.keys() == expected.gradients.keys(), cell
    for name, correct in expected.gradients.items():
        error = found.gradients[name].double() - correct
        if name.endswith(("attn.in_proj_bias", "attn.qkv.bias")):
            third = len(correct) // 3
            assert error[third : 2 * third].norm() < 1e-5, (cell, name)
            error = torch.cat((error[:third], error[2 * third :]))
        assert error.norm() <= 2e-5 * correct.norm(), (cell, name, error.norm() / correct.norm())
    for key in ("weights", "average"):
        weights, correct_weights = getattr(found, key), getattr(expected, key)
        for name, correct in correct_weights.items():
            torch.testing.assert_close(weights[name].double(), correct, rtol=0, atol=2e-6, msg=f"{cell}: {key} {name}")
    # The cap was reached, and the gradients were cut down.
    assert found.weights["model.logit_scale"].item() <= cases.CAP
    assert min(expected.norms) > cases.MAX_NORM


def check_all(function: object, world: int, cells: list[Cell]) -> None:
    expected = {(cell.arch, cell.distil): cases.plain(cell.arch, cell.distil) for cell in cells}
    for results in run_ranks(function, world, cells, timeout=TIMEOUT):  # type: ignore[arg-type]
        for cell, found in zip(cells, results, strict=True):
            check(found, expected[cell.arch, cell.distil], cell)


def test_two_ranks_equal_one_process_and_keep_their_state(tmp_path: Path) -> None:
    """The quick test: one start of two ranks for the first case of each test below."""
    cells = [Cell(stage, pieces=2) for stage in STAGES]
    cells = [*cells[:2], *(cell._replace(scaled=True) for cell in cells[2:])]
    expected = cases.plain("vit", True)
    for results in run_ranks(cases.quick, 2, str(tmp_path), cells, timeout=TIMEOUT):
        for cell, found in zip(cells, results, strict=True):
            check(found, expected, cell)


@pytest.mark.slow
def test_a_process_without_a_group_equals_one_process() -> None:
    check_all(cases.alone, 1, [Cell(stage, pieces=4) for stage in STAGES])


@pytest.mark.full
def test_every_model_and_task_equals_one_process() -> None:
    """The other worlds are in tests/engines/test_matrix.py, and some of these cells in every test above and below."""
    choices = product(STAGES, ("vit", "swin"), (False, True), (1, 4))
    check_all(cases.compare, 2, [Cell(*choice) for choice in choices])


@pytest.mark.parametrize("world", matrix([1, 2, 4], [2]))
def test_every_setting_equals_one_process(world: int) -> None:
    cells = [Cell(stage, "swin", True, pieces) for stage, pieces in zip(STAGES, (4, 1, 4, 1), strict=True)]
    cells += [Cell(stage, zero=ROBIN, pieces=pieces) for stage in (1, 2) for pieces in (1, 4)]
    cells += [Cell(stage, zero=OFFLOAD, pieces=pieces) for stage in (1, 2, 3) for pieces in (1, 4)]
    cells += [Cell(3, zero=OFFLOAD_BOTH, pieces=pieces) for pieces in (1, 4)]
    cells += [Cell(stage, recompute=True, shipped=f"zero{stage}", pieces=4) for stage in STAGES]
    cells += [Cell(stage, shipped=f"zero{stage}_offload", pieces=pieces) for stage in (2, 3) for pieces in (1, 4)]
    cells += [Cell(3, "swin", recompute=True), Cell(2, "swin", shipped="zero2")]
    cells += [Cell(stage, scaled=True, pieces=pieces) for stage in STAGES for pieces in (1, 4)]
    cells += [Cell(stage, scaled=True, zero=OFFLOAD) for stage in (2, 3)]
    check_all(cases.compare, world, cells)


@pytest.mark.full
def test_compiled_blocks_equal_one_process() -> None:
    cells = [Cell(stage, pieces=4, compile="blocks") for stage in (2, 3)]
    check_all(cases.compare_traced, 2, [*cells, Cell(3, "swin", recompute=True, compile="blocks")])


def go_on(found: dict, expected: dict) -> None:
    for own, correct in zip(found["numbers"], expected["numbers"], strict=True):
        assert own == pytest.approx(correct, rel=1e-5)
    for key in ("weights", "average"):
        for name, correct in expected[key].items():
            torch.testing.assert_close(found[key][name], correct, rtol=0, atol=2e-6, msg=f"{key} {name}")


@pytest.mark.slow
def test_what_was_saved_goes_on_bit_for_bit(tmp_path: Path) -> None:
    cells = [Cell(stage) for stage in STAGES]
    run_ranks(cases.save_and_go_on, 2, str(tmp_path), cells, timeout=TIMEOUT)
    spec = cases.SPECS["vit"]
    teacher = replace(spec, embed_dim=24)
    for stage in STAGES:
        size = sum(path.stat().st_size for path in (tmp_path / str(stage)).rglob("*") if path.is_file())
        planned = checkpoint_bytes(spec, teacher, engine=f"zero{stage}", ema=True, precision="fp32")
        # Headers take up to 65 kB; the weights once more would be 145 kB.
        assert 0 < size - planned < 80_000, f"zero{stage}: what is written is not what a plan says"


@pytest.mark.slow
def test_other_numbers_of_ranks_and_other_stages_go_on(tmp_path: Path) -> None:
    cells = [Cell(stage) for stage in STAGES] + [Cell(2, zero=ROBIN), Cell(2, zero=OFFLOAD), Cell(3, zero=OFFLOAD_BOTH)]
    for saving, loading in ((2, 4), (4, 1)):
        folder, cells = tmp_path / str(saving), cells if saving == 2 else cells[:4]
        folder.mkdir()
        expected = run_ranks(cases.save_and_go_on, saving, str(folder), cells, timeout=TIMEOUT)[0]
        for found, correct in zip(
            run_ranks(cases.resume, loading, str(folder), cells, timeout=TIMEOUT)[0], expected, strict=True
        ):
            go_on(found, correct)
        if loading == 1:
            continue
        turned = [Cell((cell.stage + 1) % 4) for cell in cells]
        for found, correct in zip(
            run_ranks(cases.resume, loading, str(folder), turned, timeout=TIMEOUT)[0], expected, strict=True
        ):
            go_on(found, correct)


@pytest.mark.parametrize("precision", matrix(["bf16", "fp16"], ["fp16"]))
def test_in_half_precision_too(tmp_path: Path, precision: str) -> None:
    run_ranks(cases.save_and_go_on, 2, str(tmp_path), [Cell(stage) for stage in STAGES], precision, timeout=TIMEOUT)
    run_ranks(cases.skip, 2, [Cell(stage) for stage in STAGES], precision, timeout=TIMEOUT)


def faults(source: Path, folder: Path) -> None:
    for name in (
        "whole",
        "other",
        "no average wanted",
        "no file",
        "torn",
        "no average",
        "no latest",
        "half an average",
    ):
        shutil.copytree(source, folder / name)
    (sorted((folder / "no file" / "state").glob("*optim_states.pt"))[-1]).unlink()
    (folder / "no latest" / "latest").unlink()
    torn = sorted((folder / "torn" / "state").glob("*optim_states.pt"))[-1]
    torn.write_bytes(torn.read_bytes()[:-1000])
    for file in (folder / "no average").glob("average-*"):
        file.unlink()
    sorted((folder / "half an average").glob("average-*"))[0].unlink()


@pytest.mark.parametrize("stage", matrix([2, 3], [3]))
def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path: Path, stage: int) -> None:
    run_ranks(cases.save_and_go_on, 2, str(tmp_path / "saved"), [Cell(stage)], timeout=TIMEOUT)
    faults(tmp_path / "saved" / "0", tmp_path / "faults")
    shutil.rmtree(tmp_path / "faults" / "whole")
    for said in run_ranks(cases.refuse, 2, str(tmp_path / "faults"), stage, timeout=TIMEOUT):
        assert "average is missing" in said["no average"]
        assert "average is unexpected" in said["no average wanted"]
        assert "not all there" in said["half an average"]
        assert "another model" in said["other"]
        assert "files of 1 ranks of 2" in said["no file"]
        assert "torn" in said["torn"]
        assert "latest" in said["no latest"]


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_everywhere() -> None:
    run_ranks(cases.skip, 2, [Cell(stage) for stage in STAGES], "fp32", timeout=TIMEOUT)


@pytest.mark.slow
def test_ranks_may_score_alone() -> None:
    run_ranks(cases.score, 2, [Cell(2), Cell(3)], timeout=TIMEOUT)


@pytest.mark.slow
def test_a_module_without_memory_takes_its_values() -> None:
    run_ranks(cases.from_meta, 2, [Cell(2, "swin"), Cell(3, "swin"), Cell(3)], timeout=TIMEOUT)


@pytest.mark.slow
def test_an_engine_leaves_nothing_behind() -> None:
    cells = [Cell(stage, pieces=pieces) for stage in STAGES for pieces in (1, 4)]
    run_ranks(cases.forgotten, 2, cells, timeout=TIMEOUT)


@pytest.mark.slow
def test_frozen_parameters_stay(tmp_path: Path) -> None:
    run_ranks(cases.frozen, 2, str(tmp_path), list(STAGES), timeout=TIMEOUT)


@pytest.mark.slow
def test_what_is_read_is_what_deepspeeds_universal_checkpoint_holds(tmp_path: Path) -> None:
    """DeepSpeed's own way to other numbers of ranks rewrites a folder; the weights and moments in it are the oracle."""
    cells = [Cell(1), Cell(2), Cell(3)]
    run_ranks(cases.save_and_go_on, 2, str(tmp_path), cells, timeout=TIMEOUT)
    for number, cell in enumerate(cells):
        universal = tmp_path / f"universal{number}"
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(tmp_path / str(number) / "state"), "--output_folder", str(universal)]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        state = read_zero_state(tmp_path / str(number), "compt")
        values = {"fp32": state.weights, **state.moments}
        assert sorted(values) == ["exp_avg", "exp_avg_sq", "fp32"]
        for key, tensors in values.items():
            assert len(tensors) == len(list((universal / "zero").iterdir())) - 1  # and optimizer_state.pt
            for name, found in tensors.items():
                whole = torch.load(universal / "zero" / name / f"{key}.pt", weights_only=True)
                whole = whole["param"] if isinstance(whole, dict) else whole
                assert torch.equal(whole.reshape(found.shape), found), (cell, key, name)
