"""Folders of torch.distributed.checkpoint as two ranks of FSDP2 write them, against the weights gathered live."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from compt.errors import ArtefactError
from compt.weights.dcp import read_dcp
from compt.weights.open import open_model
from tests.unit.weights.written import ORACLE, SPEC

METADATA = ".metadata"
PROJ = "student.model.visual.proj"


def live(dcps: Path) -> dict[str, Tensor]:
    whole = load_file(dcps / ORACLE)
    return {name.removeprefix("model."): value for name, value in whole.items() if name.startswith("model.")}


def edited(dcps: Path, tmp_path: Path, edit: Any) -> Path:
    """A copy of the checkpoint `alone` whose metadata was changed."""
    folder = tmp_path / "edited"
    shutil.copytree(dcps / "alone", folder)
    metadata = pickle.loads((folder / METADATA).read_bytes())
    edit(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return folder


def test_the_model_is_found_among_everything_else(dcps):
    found = open_model(dcps / "alone", SPEC)
    oracle = live(dcps)
    assert set(found.state) == set(oracle)
    for name, value in oracle.items():
        assert torch.equal(found.state[name], value.reshape(found.state[name].shape)), name
    assert found.state["logit_scale"].shape == ()
    projectors = [f"student.projector.{tower}.{part}" for tower in ("image", "text") for part in ("bias", "weight")]
    assert found.manifest["left_out"] == ["optim.*", *projectors]


def test_both_ranks_files_are_needed(dcps, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dcps / "alone", folder)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(ArtefactError, match=r"__1_0.distcp: missing"):
        open_model(folder, SPEC)
    shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")
    with pytest.raises(ArtefactError, match="cannot read|torn"):
        dict(open_model(folder, SPEC).state)


def test_weights_that_are_no_floats_are_listed(dcps, tmp_path):
    def edit(metadata):
        metadata.state_dict_metadata[PROJ].properties.dtype = torch.int32

    with pytest.raises(ArtefactError, match=r": 1 of another dtype\n.*: visual.proj int32, weights are"):
        open_model(edited(dcps, tmp_path, edit), SPEC)


def test_one_of_several_models_is_chosen(dcps):
    with pytest.raises(ArtefactError, match=r"2 models in it, 'ema.model', 'student.model'; choose one with --teacher"):
        open_model(dcps / "two", SPEC)
    with pytest.raises(ArtefactError, match="'other' is not one of the models in it"):
        open_model(dcps / "two", SPEC, prefix="other")
    with pytest.raises(ArtefactError, match="'model' is not one of the models in it"):
        open_model(dcps / "two", SPEC, prefix="model")
    oracle = live(dcps)["visual.proj"]
    for prefix, factor in (("student", 1.0), ("student.model.", 1.0), ("ema", 0.5), ("ema.model", 0.5)):
        found = open_model(dcps / "two", SPEC, prefix=prefix)
        assert torch.equal(found.state["visual.proj"], oracle * factor), prefix
    assert "student.model.*" in found.manifest["left_out"]


def test_only_the_asked_tensor_is_read_and_never_an_object(dcps, tmp_path, monkeypatch):
    """Bytes of objects and of other tensors may be anything: they are never read."""
    folder = tmp_path / "copy"
    shutil.copytree(dcps / "alone", folder)
    metadata = pickle.loads((folder / METADATA).read_bytes())
    kept, objects = [], 0
    for index, place in metadata.storage_data.items():
        if index.fqn == PROJ:
            kept.append((place.relative_path, place.offset, place.length))
        objects += isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    assert len(kept) == 2
    assert objects >= 2, "epoch and text were to be objects"
    for path in folder.glob("*.distcp"):
        content, blank = path.read_bytes(), bytearray(path.stat().st_size)
        for name, offset, length in kept:
            if name == path.name:
                blank[offset : offset + length] = content[offset : offset + length]
        path.write_bytes(bytes(blank))
    state = open_model(folder, SPEC).state
    assert torch.equal(state["visual.proj"], live(dcps)["visual.proj"])
    with pytest.raises(ArtefactError, match=r"cannot read student.model.text_projection"):
        state["text_projection"]


def test_the_metadata_is_unpickled_once(dcps, monkeypatch):
    found = open_model(dcps / "alone", SPEC)
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    assert found.state["visual.proj"].shape == (24, 7)


def entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata[PROJ]


def escape(path: str) -> Any:
    def edit(metadata: Any) -> None:
        for index, place in list(metadata.storage_data.items()):
            if index.fqn == PROJ:
                metadata.storage_data[index] = _StorageInfo(path, place.offset, place.length)

    return edit


def overlap(metadata: Any) -> None:
    first, second = entry(metadata).chunks
    place = metadata.storage_data[MetadataIndex(PROJ, second.offsets)]
    second.offsets = torch.Size((first.sizes[0] - 1, 0))
    metadata.storage_data[MetadataIndex(PROJ, second.offsets)] = place


def off_the_end(metadata: Any) -> None:
    entry(metadata).chunks[1].offsets = torch.Size((entry(metadata).size[0], 0))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (escape("../outside.distcp"), "not a plain file name"),
        (escape("/etc/passwd"), "not a plain file name"),
        (escape("nothing.distcp"), "missing"),
        (lambda m: entry(m).chunks.pop(), "its parts do not make it up"),
        (lambda m: entry(m).chunks.append(entry(m).chunks[0]), "its parts do not make it up"),
        (overlap, "its parts do not make it up"),
        (off_the_end, "a chunk that reaches out of it"),
        (lambda m: setattr(entry(m), "chunks", None), "its size is missing"),
        (lambda m: setattr(entry(m), "size", [24, 7]), "its size is missing"),
        (lambda m: setattr(entry(m).properties, "dtype", torch.Size), "refused|its dtype is missing"),
        (lambda m: m.storage_data.pop(MetadataIndex(PROJ, (0, 0))), r"its part at \[0, 0\] is in no file"),
        (lambda m: setattr(m, "storage_data", None), "says nothing of where"),
        (lambda m: m.storage_data.update(a=1), "an entry of another kind"),
        (
            lambda m: setattr(m.storage_data[MetadataIndex(PROJ, (0, 0))], "transform_descriptors", ["zstd"]),
            "an entry of another kind",
        ),
        (lambda m: setattr(m, "state_dict_metadata", [1]), "not the metadata"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(dcps, tmp_path, edit, message):
    with pytest.raises(ArtefactError, match=message):
        open_model(edited(dcps, tmp_path, edit), SPEC)


def test_the_same_edit_of_nothing_is_read(dcps, tmp_path):
    assert len(open_model(edited(dcps, tmp_path, lambda metadata: None), SPEC).state) == 50


def test_shapes_cost_no_reading(dcps, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dcps / "alone", folder)
    for path in folder.glob("*.distcp"):
        path.write_bytes(b"")
    weights = read_dcp(folder).weights
    assert weights.shape(PROJ) == (24, 7)
