"""DeepSpeed folders as two ranks really write them, against the weights gathered live in the run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compt.errors import ArtefactError
from compt.weights.open import open_model
from tests.unit.weights.written import FROZEN, ORACLE, SPEC, STEPS, ZEROS, load_deepspeed

TAG = f"global_step{STEPS}"
PROJECTOR = [f"projector.{tower}.{part}" for tower in ("image", "text") for part in ("bias", "weight")]


def live(folder: Path) -> dict[str, Tensor]:
    whole = load_file(folder / ORACLE)
    return {name.removeprefix("model."): value for name, value in whole.items() if name.startswith("model.")}


def same(state, oracle: dict[str, Tensor]) -> bool:
    return set(state) == set(oracle) and all(
        torch.equal(state[name], value.reshape(state[name].shape)) for name, value in oracle.items()
    )


def copied(zeros: Path, tmp_path: Path, name: str) -> Path:
    shutil.copytree(zeros / name, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", ZEROS)
def test_the_weights_are_those_of_the_optimizer(zeros, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it fails
    found = open_model(zeros / name, SPEC)
    oracle = live(zeros / name)
    assert len(oracle) == len(found.state) == 50
    assert same(found.state, oracle)
    assert all(value.dtype == torch.float32 for value in found.state.values())
    assert found.manifest["left_out"] == PROJECTOR
    trained = {name: value for name, value in oracle.items() if f"model.{name}" != FROZEN}
    # If training is in bfloat16, the module's own copy of the weights is not exact enough.
    masters = all(any(value.bfloat16().float().ne(value).flatten()) for value in trained.values() if value.ndim > 1)
    # Without ZeRO, no record says which of the optimizer's weights is which.
    assert masters == (name != "zero0-bf16")
    changed = {**oracle, "visual.proj": oracle["visual.proj"] + 1e-7}
    assert not same(found.state, changed)


def test_a_tag_folder_may_be_given_directly(zeros):
    whole, tag = open_model(zeros / "zero2", SPEC), open_model(zeros / "zero2" / TAG, SPEC)
    assert same(tag.state, live(zeros / "zero2"))
    assert tag.hash == whole.hash
    assert tag.hash != open_model(zeros / "zero1", SPEC).hash


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("zero1", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "files of 1 ranks of 2"),
        ("zero1", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "rank 0 is not among them"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_model_states.pt", "files of 2 ranks of 2|files of 1 ranks"),
    ],
)
def test_a_missing_rank_is_named(zeros, tmp_path, name, gone, message):
    folder = copied(zeros, tmp_path, name)
    (folder / TAG / gone).unlink()
    with pytest.raises(ArtefactError, match=message):
        open_model(folder, SPEC)


def test_the_fp32_weights_are_not_replaced_by_others(zeros, tmp_path):
    folder = copied(zeros, tmp_path, "zero2")
    for path in (folder / TAG).glob("*_optim_states.pt"):
        path.unlink()
    with pytest.raises(ArtefactError, match="hold the weights in fp32, are missing"):
        open_model(folder, SPEC)


@pytest.mark.parametrize("tag", ["../elsewhere", "..", "", "/etc", "a/b", "nothing"])
def test_latest_does_not_lead_elsewhere(zeros, tmp_path, tag):
    folder = copied(zeros, tmp_path, "zero1")
    shutil.copytree(folder / TAG, tmp_path / "elsewhere")
    (folder / "latest").write_text(tag)
    with pytest.raises(ArtefactError, match="not the name of a folder|missing, though|no model folder"):
        open_model(folder, SPEC)


def test_links_out_of_the_folder_are_not_followed(zeros, tmp_path):
    folder = copied(zeros, tmp_path, "zero1")
    name = "mp_rank_00_model_states.pt"
    (folder / TAG / name).rename(tmp_path / name)
    (folder / TAG / name).symlink_to(tmp_path / name)
    with pytest.raises(ArtefactError, match="a link out of its folder"):
        open_model(folder, SPEC)
    (folder / TAG / name).unlink()
    (tmp_path / name).rename(folder / TAG / name)
    assert len(open_model(folder, SPEC).state) == 50
    (folder / TAG).rename(tmp_path / TAG)
    (folder / TAG).symlink_to(tmp_path / TAG)
    with pytest.raises(ArtefactError, match="a link out of its folder"):
        open_model(folder, SPEC)


def test_models_cut_otherwise_are_refused(zeros, tmp_path):
    folder = copied(zeros, tmp_path, "zero1")
    shutil.copy(folder / TAG / "mp_rank_00_model_states.pt", folder / TAG / "mp_rank_01_model_states.pt")
    with pytest.raises(ArtefactError, match="parallelism"):
        open_model(folder, SPEC)


def change(path: Path, edit) -> None:
    values = load_deepspeed(path)
    edit(values)
    torch.save(values, path)


def test_shared_parameters_take_the_value_of_the_other_one(zeros, tmp_path):
    folder = copied(zeros, tmp_path, "zero1")

    def tie(values):
        values["shared_params"] = {"model.ln_final.weight": "model.ln_final.bias", "model.absent": "model.gone"}

    change(folder / TAG / "mp_rank_00_model_states.pt", tie)
    found = open_model(folder, SPEC)
    assert torch.equal(found.state["ln_final.weight"], live(folder)["ln_final.bias"])
    assert torch.equal(found.state["visual.proj"], live(folder)["visual.proj"])


def test_paddings_between_parameters_are_skipped(zeros, tmp_path):
    """Lay the first group out again with gaps, as DeepSpeed does for parameters that need alignment."""
    folder = copied(zeros, tmp_path, "zero1")
    files = sorted((folder / TAG).glob("*_optim_states.pt"))
    shapes = torch.load(folder / TAG / "mp_rank_00_model_states.pt", weights_only=True)["param_shapes"][0]
    parts = [load_deepspeed(path)["optimizer_state_dict"] for path in files]
    vector = torch.cat([part["single_partition_of_fp32_groups"][0] for part in parts])
    gaps = [index % 3 for index in range(len(shapes))]
    pieces, at = [], 0
    for shape, gap in zip(shapes.values(), gaps, strict=True):
        pieces += [vector[at : at + shape.numel()], torch.full((gap,), torch.nan)]
        at += shape.numel()
    spread = torch.cat(pieces)
    spread = torch.cat([spread, torch.full((-len(spread) % 4,), torch.nan)])

    for path, half in zip(files, spread.chunk(2), strict=True):

        def place(values, half=half):
            values["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = half.clone()
            values["optimizer_state_dict"]["param_alignment_paddings"][0] = gaps

        change(path, place)
    assert same(open_model(folder, SPEC).state, live(folder))

    def forget(values):
        values["optimizer_state_dict"]["param_alignment_paddings"][0] = [0] * len(gaps)

    change(files[0], forget)
    with pytest.raises(ArtefactError, match="elements, its parts"):
        open_model(folder, SPEC)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
@pytest.mark.parametrize("field", ["param_shapes", "module", "buffer_names", "shared_params"])
def test_files_of_another_layout_are_refused(zeros, tmp_path, name, field):
    folder = copied(zeros, tmp_path, name)
    path = next((folder / TAG).glob("*rank_00_model_states.pt" if name == "zero1" else "*rank_0_*_model_states.pt"))
    change(path, lambda values: values.pop(field))
    with pytest.raises(ArtefactError, match="not laid out as a checkpoint of DeepSpeed"):
        open_model(folder, SPEC)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_shapes_without_end_are_refused(zeros, tmp_path, name):
    folder = copied(zeros, tmp_path, name)
    path = next((folder / TAG).glob("*rank_00_model_states.pt" if name == "zero1" else "*rank_0_*_model_states.pt"))

    def grow(values):
        shapes = values["param_shapes"][0]
        shapes[next(iter(shapes))] = [10**200, 10**200]

    change(path, grow)
    with pytest.raises(ArtefactError, match="not laid out as a checkpoint of DeepSpeed .OverflowError"):
        open_model(folder, SPEC)


def test_vectors_of_another_length_are_refused(zeros, tmp_path):
    folder = copied(zeros, tmp_path, "zero3")
    path = next((folder / TAG).glob("*rank_1_*_optim_states.pt"))

    def cut(values):
        groups = values["optimizer_state_dict"]["fp32_flat_groups"]
        groups[0] = groups[0][:-1].clone()

    change(path, cut)
    with pytest.raises(ArtefactError, match="for rank 1, its file"):
        open_model(folder, SPEC)
