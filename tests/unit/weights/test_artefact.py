"""The model folder: stock open_clip reads it, nothing torn or foreign is read, it appears whole or not at all."""

import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compt.cli.main import app
from compt.errors import ArtefactError, RunError
from compt.export.write import export_model
from compt.models.clip import ClipModel, build
from compt.models.open_clip_config import spec_from_open_clip
from compt.models.preprocess import Preprocess
from compt.models.presets import PRESETS, ModelSpec, resolve
from compt.weights.artefact import (
    CONFIG,
    INDEX,
    MANIFEST,
    OPEN_CLIP_WEIGHTS,
    check_free,
    read_artefact,
    write_artefact,
)
from compt.weights.open import open_model
from tests.helpers.states import export_state

PICO = PRESETS["vit_pico"]
SPECS = {
    "head width 32": PICO,
    "head width 64": resolve("vit_t16", {"depth": 2, "text_depth": 2, "vocab_size": 49_408, "no_ln_pre": True}),
    "swin": resolve("swin_t", {"text_depth": 1}),
}


def write(folder: Path, spec: ModelSpec = PICO, **options) -> ClipModel:
    model = build(spec, seed=4)
    write_artefact(folder, export_state(model), spec, {"step": 7, "parent": None}, **options)
    return model


def inputs(spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.tokenize(["a photo of a cat", "dog"], context_length=spec.context_length)
    return pixels, tokens


@torch.no_grad()
def assert_same_logits(ours: ClipModel, theirs: open_clip.CLIP) -> None:
    pixels, tokens = inputs(ours.spec)
    ours.eval()
    theirs.eval()
    assert type(theirs) is open_clip.CLIP
    torch.testing.assert_close(ours.encode_image(pixels), theirs.encode_image(pixels), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), atol=1e-5, rtol=1e-5)
    for a, b in zip(ours.get_logits(pixels, tokens), theirs.get_logits(pixels, tokens), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_stock_open_clip_reads_the_folder(tmp_path, spec):
    model = write(tmp_path / "model", spec)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        MANIFEST,
        CONFIG,
        "open_clip_model.safetensors",
    ]
    assert_same_logits(model, open_clip.create_model(f"local-dir:{tmp_path / 'model'}"))


def test_stock_open_clip_reads_the_weights_into_a_registered_config(tmp_path):
    model = write(tmp_path / "model")
    config = tmp_path / "compt-registered.json"
    config.write_text(json.dumps(PICO.open_clip_config()))
    open_clip.add_model_config(config)
    theirs = open_clip.create_model("compt-registered")
    theirs.load_state_dict(load_file(tmp_path / "model" / "open_clip_model.safetensors"), strict=True)
    assert_same_logits(model, theirs)


def test_open_clip_finds_the_preprocessing(tmp_path):
    write(tmp_path / "model", preprocess=Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear"))
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'model'}", return_transform=True)
    assert "mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)" in str(transform).replace("[", "(").replace("]", ")")
    assert "bilinear" in str(transform)
    assert read_artefact(tmp_path / "model").preprocess.mean == (0.1, 0.2, 0.3)


def test_a_folder_of_several_files_comes_back_and_can_be_merged_for_open_clip(tmp_path):
    model = write(tmp_path / "model", max_shard_bytes=100_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    # All but the one tensor that is larger than the bound.
    assert sorted(path.stat().st_size for path in files)[-2] < 110_000
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in export_state(model).values())

    found = read_artefact(tmp_path / "model")
    assert_same_state(found.load_model(), model)
    export_model(found, tmp_path / "merged")
    assert_same_logits(model, open_clip.create_model(f"local-dir:{tmp_path / 'merged'}"))
    assert_same_state(open_model(tmp_path / "merged").load_model(), model)


def assert_same_state(one: ClipModel, other: ClipModel) -> None:
    a, b = export_state(one), export_state(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_written_comes_back(tmp_path):
    model = write(tmp_path / "model")
    found = read_artefact(tmp_path / "model")
    assert found.spec == PICO
    assert found.manifest["step"] == 7
    assert found.manifest["hash"] == found.hash
    assert found.manifest["tokenizer"]["context_length"] == 32
    assert set(found.manifest["versions"]) == {"python", "compt", "torch", "open_clip", "timm"}
    assert found.state["logit_scale"].shape == ()
    assert found.state.shape("visual.proj") == (32, 128)
    assert "nothing" not in found.state
    assert len(found.state) == len(model.state_dict())
    assert_same_state(found.load_model(), model)


def test_the_hash_is_that_of_the_weights(tmp_path):
    model = write(tmp_path / "one")
    write_artefact(tmp_path / "same", export_state(model), PICO, {"step": 8})
    write_artefact(tmp_path / "other", export_state(build(PICO, seed=5)), PICO, {"step": 7})
    one, same, other = (read_artefact(tmp_path / name).hash for name in ("one", "same", "other"))
    assert one == same != other


def test_further_weights_are_a_model_folder_of_their_own(tmp_path):
    other = build(PICO, seed=9)
    model = write(tmp_path / "model", extra_states={"ema": export_state(other)})
    assert_same_state(read_artefact(tmp_path / "model").load_model(), model)
    ema = read_artefact(tmp_path / "model" / "ema")
    assert_same_state(ema.load_model(), other)
    assert read_artefact(tmp_path / "model").manifest["extra"] == {"ema": ema.hash}
    assert_same_logits(other, open_clip.create_model(f"local-dir:{tmp_path / 'model' / 'ema'}"))
    with pytest.raises(ArtefactError, match="not a plain file name"):
        write(tmp_path / "model", extra_states={"../ema": export_state(other)})


def test_views_into_one_buffer_are_written(tmp_path):
    state = export_state(build(PICO, seed=4))
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    sizes = [tensor.numel() for tensor in state.values()]
    views = {k: part.view(t.shape) for (k, t), part in zip(state.items(), flat.split(sizes), strict=True)}
    write_artefact(tmp_path / "model", views, PICO, {})
    found = read_artefact(tmp_path / "model")
    assert all(torch.equal(found.state[name], state[name]) for name in state)


def test_weights_of_another_model_are_not_written(tmp_path):
    state = export_state(build(PICO, seed=4))
    for wrong, message in (
        ({k: v for k, v in state.items() if k != "visual.proj"}, "visual.proj"),
        (state | {"extra": torch.zeros(1)}, "extra"),
        (state | {"visual.proj": torch.zeros(2, 2)}, r"visual.proj is \[2, 2\] where the model has \[32, 128\]"),
    ):
        with pytest.raises(ArtefactError, match=message):
            write_artefact(tmp_path / "model", wrong, PICO, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    model = write(tmp_path / "model")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compt.weights.safetensors.os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_state(read_artefact(tmp_path / "model").load_model(), model)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))


WEIGHTS = "model-00001-of-00003.safetensors"
DAMAGES = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json: missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: missing"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "bytes where the manifest"),
    "altered": (lambda f: flip_a_byte(f / WEIGHTS), "SHA-256 differs"),
    "torn manifest": (lambda f: (f / MANIFEST).write_text('{"format": "co'), "not JSON"),
    "binary manifest": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "list": (lambda f: (f / MANIFEST).write_text("[]"), "not a JSON object"),
    "other format": (lambda f: edit(f / MANIFEST, lambda m: m.update(format="x")), "not the manifest of a compt"),
    "later version": (lambda f: edit(f / MANIFEST, lambda m: m.update(format_version=9)), "format version 9"),
    "no files": (lambda f: edit(f / MANIFEST, lambda m: m.pop("files")), "files is missing"),
    "odd files": (lambda f: edit(f / MANIFEST, lambda m: m.update(files=[1])), "manifest.json: "),
    "odd spec": (lambda f: edit(f / MANIFEST, lambda m: m["spec"].update(widht=3)), "widht"),
    "impossible spec": (lambda f: edit(f / MANIFEST, lambda m: m["spec"].update(width=3)), "width 3"),
    "a size without end": (
        lambda f: edit(f / MANIFEST, lambda m: m["files"][WEIGHTS].update(bytes=float("inf"))),
        "cannot convert float infinity to integer",
    ),
    "a spec without end": (lambda f: edit(f / MANIFEST, lambda m: m["spec"].update(mlp_ratio=10**400)), "too large"),
    "a number of many digits": (lambda f: (f / MANIFEST).write_text("1" * 5000), "not JSON (Exceeds the limit"),
    "traversal": (
        lambda f: edit(f / MANIFEST, lambda m: m["files"].update({"../x.safetensors": {"sha256": "", "bytes": 1}})),
        "'../x.safetensors' is not a plain file name",
    ),
    "absolute": (
        lambda f: edit(f / MANIFEST, lambda m: m["files"].update({"/etc/passwd": {"sha256": "", "bytes": 1}})),
        "'/etc/passwd' is not a plain file name",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_with_one_message(tmp_path, damage, message):
    write(tmp_path / "model", max_shard_bytes=6_300_000)
    assert read_artefact(tmp_path / "model").spec == PICO
    damage(tmp_path / "model")
    with pytest.raises(ArtefactError) as caught:
        read_artefact(tmp_path / "model")
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_stay_in_the_folder_or_in_the_cache_that_it_is_of(tmp_path):
    write(tmp_path / "model")
    weights = tmp_path / "model" / "open_clip_model.safetensors"
    weights.rename(weights.with_name("weights"))
    weights.symlink_to("weights")
    assert read_artefact(tmp_path / "model").spec == PICO
    weights.unlink()
    weights.with_name("weights").rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    for verify in (True, False):
        with pytest.raises(ArtefactError, match=r"open_clip_model\.safetensors: a link out of its folder, to .*"):
            read_artefact(tmp_path / "model", verify)
    manifest = (tmp_path / "model" / MANIFEST).rename(tmp_path / MANIFEST)
    (tmp_path / "model" / MANIFEST).symlink_to(manifest)
    with pytest.raises(ArtefactError, match=r"model/manifest\.json: a link out of its folder, to .*"):
        read_artefact(tmp_path / "model")
    manifest.replace(tmp_path / "model" / MANIFEST)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "weights").rename(tmp_path / "blobs" / "weights")
    (tmp_path / "snapshots").mkdir()
    snapshot = (tmp_path / "model").rename(tmp_path / "snapshots" / "abc")
    (snapshot / weights.name).unlink()
    (snapshot / weights.name).symlink_to("../../blobs/weights")
    assert read_artefact(snapshot).spec == PICO
    (snapshot / "ema").mkdir()
    for path in [path for path in snapshot.iterdir() if path.is_file() and not path.is_symlink()]:
        path.rename(snapshot / "ema" / path.name)
    (snapshot / "ema" / weights.name).symlink_to("../../../blobs/weights")
    assert read_artefact(snapshot / "ema").spec == PICO


def test_without_verification_sizes_are_still_compared(tmp_path):
    write(tmp_path / "model")
    weights = tmp_path / "model" / "open_clip_model.safetensors"
    flip_a_byte(weights)
    assert read_artefact(tmp_path / "model", verify=False).spec == PICO
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="bytes where"):
        read_artefact(tmp_path / "model", verify=False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_open_clips_config(name):
    spec = PRESETS[name]
    assert spec_from_open_clip({"model_cfg": json.loads(json.dumps(spec.open_clip_config()))}, name) == spec


def test_open_clips_own_configs_are_read_or_refused_by_name():
    spec = spec_from_open_clip(open_clip.get_model_config("ViT-B-16"), "vit_b16")
    assert spec == PRESETS["vit_b16"]
    quick = spec_from_open_clip(open_clip.get_model_config("ViT-B-16-quickgelu"), "quick")
    assert quick == resolve("vit_b16", {"quick_gelu": True, "name": "quick"})
    for name, message in (
        ("RN50", "layers = "),
        ("ViT-B-16-SigLIP", "not supported"),
        ("convnext_base", "not supported"),
        ("roberta-ViT-B-32", "not supported"),
        ("coca_ViT-B-32", "not supported"),
    ):
        with pytest.raises(ArtefactError, match=message):
            spec_from_open_clip(open_clip.get_model_config(name), name)
    for broken in ({}, {"embed_dim": "x", "vision_cfg": {}, "text_cfg": {}}, {"embed_dim": 1, "vision_cfg": 3}):
        with pytest.raises(ArtefactError, match="open_clip config of model"):
            spec_from_open_clip(broken)
    for part, key, value in (
        ("vision_cfg", "width", "wide"),
        ("text_cfg", "heads", 0),
        ("vision_cfg", "head_width", 0),
    ):
        config = PICO.open_clip_config()
        config[part][key] = value
        with pytest.raises(ArtefactError, match="open_clip config of model"):
            spec_from_open_clip(config)


def _own_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")


def _others_model(folder: Path) -> None:
    folder.mkdir()
    (folder / CONFIG).write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / OPEN_CLIP_WEIGHTS, metadata={"format": "pt"})


def _model_and_more(folder: Path) -> None:
    write(folder)
    (folder / "thesis.txt").write_text("mine")


def _ema_and_more(folder: Path) -> None:
    write(folder, extra_states={"ema": export_state(build(PICO, seed=9))})
    (folder / "ema" / "thesis.txt").write_text("mine")


def _export_and_more(folder: Path) -> None:
    write(folder.with_name("before"))
    export_model(read_artefact(folder.with_name("before")), folder)
    (folder / "thesis.txt").write_text("mine")


def _other_manifest(folder: Path) -> None:
    folder.mkdir()
    (folder / MANIFEST).write_text('{"format": "another", "files": {}, "extra": {}}')


IN_USE = [
    _own_folder,
    _others_model,
    _model_and_more,
    _ema_and_more,
    _export_and_more,
    _other_manifest,
    lambda path: path.write_text("a file"),
]


@pytest.mark.parametrize("fill", IN_USE)
def test_a_folder_with_other_files_is_never_replaced(tmp_path, fill):
    write(tmp_path / "model")
    out = tmp_path / "out"
    fill(out)
    before = {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()}
    with pytest.raises(ArtefactError, match=rf"{out}: exists and is not a model folder that compt wrote"):
        export_model(read_artefact(tmp_path / "model"), out)
    with pytest.raises(ArtefactError, match=r"name another folder, or remove it"):
        write(out)
    for command in (["export", "model", "out"], ["expand", "model", "vit_nano", "out"]):
        words = [str(tmp_path / word) if word in ("model", "out") else word for word in command]
        assert isinstance(CliRunner().invoke(app, words).exception, ArtefactError)
    assert {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()} == before


def test_models_of_ours_and_empty_folders_are_replaced(tmp_path):
    model = write(tmp_path / "model", extra_states={"ema": export_state(build(PICO, seed=9))})
    source = read_artefact(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    export_model(source, out)
    export_model(source, out)
    write(out, extra_states={"ema": export_state(build(PICO, seed=9))})
    export_model(source, out)
    assert_same_state(open_model(out).load_model(), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_model_is_not_replaced_by_what_is_made_of_it(tmp_path):
    write(tmp_path / "model")
    for words in (["export", "model", "model"], ["expand", "model", "vit_nano", "model"]):
        paths = [str(tmp_path / word) if word == "model" else word for word in words]
        found = CliRunner().invoke(app, paths).exception
        assert isinstance(found, ArtefactError)
        assert "is read and would be replaced" in str(found)
    check_free(tmp_path / "model")
    check_free(tmp_path / "nothing" / "there")


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("model/ema", "model", "model: holds .*ema, which is read"),
        ("model/WEIGHTS", "model", r"model: holds .*safetensors, which is read"),
        ("link/ema", "model", "model: holds .*ema, which is read"),
        ("WEIGHTS", "model", r"model: holds .*safetensors, which is read"),
        ("model/ema", "link", "link: holds .*ema, which is read"),
        ("model", "link", "is read and would be replaced"),
        ("model", "model/ema", "ema: lies in .*model, which is read"),
        ("model", "link/new", "new: lies in .*model, which is read"),
    ],
)
@pytest.mark.parametrize("command", ["export", "expand"])
def test_what_is_read_is_neither_replaced_nor_added_to(tmp_path, command, source, out, message):
    write(tmp_path / "model", extra_states={"ema": export_state(build(PICO, seed=9))})
    (tmp_path / "link").symlink_to("model")
    weights = "open_clip_model.safetensors"
    (tmp_path / weights).symlink_to(tmp_path / "model" / weights)
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    words = [tmp_path / source.replace("WEIGHTS", weights), tmp_path / out, "--teacher-model", "vit_pico"]
    if command == "expand":
        words.insert(1, "vit_nano")
    found = CliRunner().invoke(app, [command, *map(str, words)]).exception
    assert isinstance(found, ArtefactError)
    assert re.search(message, str(found))
    assert {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()} == before


def test_a_folder_beside_what_is_read_is_free(tmp_path):
    write(tmp_path / "model")
    check_free(tmp_path / "model-2", tmp_path / "model")
    check_free(tmp_path / "model-2", tmp_path / "model" / "open_clip_model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(tmp_path, value):
    model = build(PICO, seed=0)
    with torch.no_grad():
        model.visual.proj[0, 1] = value
    write_artefact(tmp_path / "model", export_state(model), PICO, {})
    with pytest.raises(ArtefactError, match=r"model: nothing was exported: visual\.proj: 1 of [\d,]+ numbers are NaN"):
        export_model(read_artefact(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
