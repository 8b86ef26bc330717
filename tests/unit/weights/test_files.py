"""Single files and open_clip's folders: prefixes, several models, layouts of others, what does not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from compt.cli.main import app
from compt.errors import ArtefactError, ConfigError
from compt.files import sha256_file
from compt.models.clip import build
from compt.models.preprocess import Preprocess
from compt.models.presets import PRESETS, resolve
from compt.weights import lazy as weights
from compt.weights.artefact import CONFIG, INDEX, OPEN_CLIP_WEIGHTS, write_artefact
from compt.weights.infer import infer_spec, model_spec
from compt.weights.lazy import Tensors, TensorSource, View, Weights
from compt.weights.names import models_in, open_clip_view
from compt.weights.open import average_of, open_model
from tests.helpers.states import export_state
from tests.unit.weights.written import SPEC

WIDE = resolve("vit_nano", {"width": 128, "head_width": 64, "text_width": 64, "text_head_width": 64})
"""A model with heads of 64 channels, as most have."""


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return export_state(build(SPEC, seed=5))


def same(found, wanted: dict[str, Tensor]) -> bool:
    return set(found) == set(wanted) and all(torch.equal(found[name], value) for name, value in wanted.items())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "a.b."])
def test_prefixes_are_found(tmp_path, state, prefix, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(prefixed(state, prefix), path)
    assert same(open_model(path, SPEC).state, state)
    whole = {"epoch": 3, "name": "run", "state_dict": prefixed(state, prefix), "optimizer": {"state": {0: {}}}}
    torch.save(whole, path)
    found = open_model(path, SPEC)
    assert same(found.state, state)
    assert found.manifest == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_safetensors_and_both_formats_of_torch_give_the_same(tmp_path, state, zipped):
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    one, other = (open_model(tmp_path / f"model.{suffix}", SPEC) for suffix in ("safetensors", "pt"))
    assert same(one.state, dict(other.state))
    assert one.hash != other.hash


def test_wrappers_in_the_middle_are_taken_off(tmp_path, state):
    wrapped = {
        name.replace("resblocks.0.", "resblocks.0._checkpoint_wrapped_module.").replace(
            "visual.", "_fsdp_wrapped_module.visual._orig_mod."
        ): value
        for name, value in state.items()
    }
    torch.save(wrapped, tmp_path / "model.pt")
    assert same(open_model(tmp_path / "model.pt", SPEC).state, state)
    torch.save({**wrapped, "visual.proj": state["visual.proj"]}, tmp_path / "model.pt")
    with pytest.raises(ArtefactError, match=r"_fsdp_wrapped_module.visual._orig_mod.proj and visual.proj are the same"):
        open_model(tmp_path / "model.pt", SPEC)


def test_dtypes_are_kept(tmp_path, state):
    half = {name: value.half() for name, value in state.items()}
    torch.save(half, tmp_path / "model.pt")
    assert same(open_model(tmp_path / "model.pt", SPEC).state, half)


def test_views_of_one_storage_come_apart(tmp_path, state):
    flat = torch.cat([value.flatten() for value in state.values()])
    views, at = {}, 0
    for name, value in state.items():
        views[name] = flat[at : at + value.numel()].view(value.shape)
        at += value.numel()
    torch.save(views, tmp_path / "model.pt")
    found = open_model(tmp_path / "model.pt", SPEC)
    assert same(found.state, state)
    assert all(found.state[name].untyped_storage().nbytes() == value.nbytes for name, value in state.items())


def test_tensors_are_read_when_asked_for(tmp_path, state):
    path = tmp_path / "model.pt"
    torch.save(state, path)
    found = open_model(path, SPEC)
    content, old = path.read_bytes(), state["visual.proj"].numpy().tobytes()
    assert content.count(old) == 1
    new = torch.full_like(state["visual.proj"], 7.0)
    with path.open("r+b") as file:
        file.seek(content.index(old))
        file.write(new.numpy().tobytes())
    assert torch.equal(found.state["visual.proj"], new)


def test_several_models_are_listed_and_one_is_chosen(tmp_path, state):
    ema = {name: value * 2 for name, value in state.items()}
    path = tmp_path / "model.pt"
    torch.save({"state_dict": prefixed(state, "module.student."), "ema": ema, "projector": {"w": torch.ones(1)}}, path)
    with pytest.raises(ArtefactError, match=r"2 models in it, 'ema', 'state_dict.module.student'; choose one with"):
        open_model(path, SPEC)
    assert same(open_model(path, SPEC, prefix="student").state, state)
    assert same(open_model(path, SPEC, prefix="state_dict.module.student.").state, state)
    found = open_model(path, SPEC, prefix="ema")
    assert same(found.state, ema)
    assert found.manifest["left_out"] == ["projector.w", "state_dict.module.student.*"]
    for wrong in ("teacher", "stud", "module.ema", ""):
        with pytest.raises(ArtefactError, match="is not one of the models in it"):
            open_model(path, SPEC, prefix=wrong)


def test_models_are_told_from_their_parts():
    image, text = "visual.proj", "token_embedding.weight"
    assert models_in([image, text]) == [""]
    assert models_in([f"a.{image}", f"a.{text}", f"b.c.{image}", f"b.c.text.{text}"]) == ["a.", "b.c."]
    assert models_in([f"a.{image}", f"b.{text}"]) == []
    assert models_in([image, f"not_a_{text}"]) == []
    assert models_in(["a.vision_model.x", f"a.text_model.embeddings.{text}"]) == ["a."]


def test_a_file_without_a_model_says_what_it_holds(tmp_path):
    torch.save({"layer": {"weight": torch.ones(2)}}, tmp_path / "model.pt")
    with pytest.raises(ArtefactError, match=r"no CLIP model in it.*layer\.weight"):
        open_model(tmp_path / "model.pt")


def test_checkpoints_of_the_authors(tmp_path, state):
    """{"epoch", "name", "state_dict", "optimizer"} with DDP's prefix, the projector of the distillation inside."""
    weights = prefixed(state, "module.")
    weights["module.logit_scale"] = weights["module.logit_scale"].reshape(())
    for tower in ("visual", "text"):
        weights[f"module.{tower}_proj.weight"] = torch.ones(9, 7)
        weights[f"module.{tower}_proj.bias"] = torch.ones(9)
    left_out = [f"module.{tower}_proj.{part}" for tower in ("text", "visual") for part in ("bias", "weight")]
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
    checkpoint = {"epoch": 24, "name": "vit_s", "state_dict": weights, "optimizer": moments, "scaler": {"scale": 1.0}}
    for content, place in ((checkpoint, "state_dict."), (weights, "")):
        torch.save(content, tmp_path / "epoch_24.pt")
        found = open_model(tmp_path / "epoch_24.pt", SPEC)
        assert same(found.state, state)
        assert found.manifest["left_out"] == [place + name for name in left_out]


SWIN = resolve("swin_t", {"width": 32, "text_width": 64, "text_depth": 1, "vocab_size": 30, "context_length": 5})


@pytest.fixture(scope="module")
def swin() -> dict[str, Tensor]:
    return export_state(build(SWIN, seed=0))


def test_swins_of_timm_before_0_9(tmp_path, swin):
    """Against timm's own conversion of its old checkpoints."""
    from timm.models.swin_transformer import checkpoint_filter_fn

    old = {}
    for name, value in swin.items():
        match = re.fullmatch(r"(visual\.trunk\.layers\.)(\d)(\.downsample\..*)", name)
        old[f"{match[1]}{int(match[2]) - 1}{match[3]}" if match else name] = value
    assert "visual.trunk.layers.0.downsample.norm.weight" in old
    for stage in range(4):
        block = f"visual.trunk.layers.{stage}.blocks.1"
        old[f"{block}.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
        old[f"{block}.attn_mask"] = torch.zeros(4, 49, 49)
    torch.save({"state_dict": prefixed(old, "module.")}, tmp_path / "swin.pt")
    found = open_model(tmp_path / "swin.pt", SWIN)
    assert same(found.state, swin)
    assert len(found.manifest["left_out"]) == 8

    trunk = build(SWIN, seed=1).visual.trunk
    given = {name.removeprefix("visual.trunk."): value for name, value in old.items() if ".trunk." in name}
    given["norm.weight"] = given["norm.weight"].clone()
    theirs = checkpoint_filter_fn({**given, "head.fc.weight": torch.ones(1)}, trunk)
    assert len(theirs) > 100
    for name in trunk.state_dict():
        assert torch.equal(found.state[f"visual.trunk.{name}"], theirs[name]), name


def test_a_swin_of_today_stays_as_it_is(tmp_path, swin):
    save_file(swin, tmp_path / "swin.safetensors")
    found = open_model(tmp_path / "swin.safetensors", SWIN)
    assert same(found.state, swin)
    assert found.manifest == {}


def test_a_text_tower_of_its_own(tmp_path, state):
    theirs = open_clip.model.CustomTextCLIP(**SPEC.open_clip_config()).eval()
    torch.save({"state_dict": prefixed(theirs.state_dict(), "module.")}, tmp_path / "model.pt")
    ours = open_model(tmp_path / "model.pt", SPEC).load_model().eval()
    images, tokens = torch.randn(2, 3, 8, 8), torch.randint(0, 11, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images))
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens))


def test_weights_of_openai_need_their_activation(tmp_path, state):
    sizes = {"input_resolution": torch.tensor(8), "context_length": torch.tensor(5), "vocab_size": torch.tensor(11)}
    torch.save({**state, **sizes}, tmp_path / "model.pt")
    with pytest.raises(ArtefactError, match="QuickGELU"):
        open_model(tmp_path / "model.pt", SPEC)
    found = open_model(tmp_path / "model.pt", replace(SPEC, quick_gelu=True))
    assert same(found.state, state)
    wide = export_state(build(WIDE, seed=0))
    torch.save({**wide, **sizes}, tmp_path / "model.pt")
    assert open_model(tmp_path / "model.pt").spec.quick_gelu
    torch.save(wide, tmp_path / "model.pt")
    assert not open_model(tmp_path / "model.pt").spec.quick_gelu


def test_what_does_not_fit_is_listed_key_by_key(tmp_path, state):
    wrong = dict(state)
    del wrong["ln_final.bias"], wrong["visual.conv1.weight"]
    wrong |= {"logit_extra": torch.zeros(()), "visual.proj": torch.ones(24, 8), "visual.extra": torch.ones(1)}
    torch.save(wrong, tmp_path / "model.pt")
    with pytest.raises(ArtefactError) as error:
        open_model(tmp_path / "model.pt", SPEC)
    head, *lines = str(error.value).splitlines()
    assert head.endswith("the weights are not those of this model, tiny: 2 missing, 2 unexpected, 1 of another shape")
    assert sorted(lines) == [
        "  missing: ln_final.bias [16]",
        "  missing: visual.conv1.weight [24, 3, 4, 4]",
        "  of another shape: visual.proj [24, 8], the model has [24, 7]",
        "  unexpected: logit_extra []",
        "  unexpected: visual.extra [1]",
    ]
    with pytest.raises(ArtefactError, match=r"110 missing, 2 unexpected, 47 of another shape\n") as error:
        open_model(tmp_path / "model.pt", PRESETS["vit_maxi"])
    lines = str(error.value).splitlines()[1:]
    for what, count in (("missing", 110), ("unexpected", 2), ("of another shape", 47)):
        assert len({line for line in lines if line.startswith(f"  {what}: ")}) == count


WHOLE = ("visual.proj", "ln_final.bias", "transformer.resblocks.0.mlp.c_fc.weight")


def refused_types(path: Path, *kinds: str) -> None:
    """That opening lists the parameters WHOLE as of these types, and nothing else."""
    with pytest.raises(ArtefactError) as error:
        open_model(path, SPEC)
    head, *lines = str(error.value).splitlines()
    assert head.endswith(": 3 of another dtype")
    right = "weights are float16, bfloat16, float32, float64"
    assert sorted(lines) == sorted(
        f"  of another dtype: {name} {kind}, {right}" for name, kind in zip(WHOLE, kinds, strict=True)
    )


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_no_floats_are_listed(tmp_path, state, suffix):
    """Every new row would be an integer, or complex, or cut down to two bits of fraction."""
    kinds = (torch.int32, torch.complex64, torch.float8_e4m3fn)
    wrong = state | {name: state[name].to(kind) for name, kind in zip(WHOLE, kinds, strict=True)}
    path = tmp_path / f"model.{suffix}"
    torch.save(wrong, path) if suffix == "pt" else save_file(wrong, path)
    refused_types(path, "int32", "complex64" if suffix == "pt" else "C64", "float8_e4m3fn")
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        right = {name: value.to(kind) for name, value in state.items()}
        torch.save(right, path) if suffix == "pt" else save_file(right, path)
        assert same(open_model(path, SPEC).state, right)


def test_weights_of_types_that_only_the_format_knows_are_listed(tmp_path, state):
    path = tmp_path / "model.safetensors"
    save_file(state | {name: state[name].to(torch.uint8) for name in WHOLE}, path)
    content = path.read_bytes()
    assert content.count(b'"U8"') == 3
    path.write_bytes(content.replace(b'"U8"', b'"F8_E8M0"'))
    grown = len(path.read_bytes()) - len(content)
    path.write_bytes((int.from_bytes(content[:8], "little") + grown).to_bytes(8, "little") + path.read_bytes()[8:])
    refused_types(path, *["F8_E8M0"] * 3)


def test_folders_with_weights_that_are_no_floats_are_refused(tmp_path, state):
    wrong = state | {name: state[name].to(torch.int64) for name in WHOLE}
    write_artefact(tmp_path / "compt", wrong, SPEC, {})
    refused_types(tmp_path / "compt", *["int64"] * 3)
    refused_types(open_clip_folder(tmp_path / "theirs", wrong), *["int64"] * 3)
    write_artefact(tmp_path / "averaged", state, SPEC, {}, extra_states={"ema": wrong})
    with pytest.raises(ArtefactError, match="3 of another dtype"):
        average_of(open_model(tmp_path / "averaged"))
    zero = tmp_path / "zero"
    zero.mkdir()
    torch.save({"module": wrong, "ds_config": {}}, zero / "mp_rank_00_model_states.pt")
    refused_types(zero, *["int64"] * 3)


def test_other_files_are_refused(tmp_path):
    for name, content, message in (
        ("model.onnx", b"x", "weights are read from"),
        ("model.safetensors", b"x" * 100, "safetensors"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtefactError, match=message):
            open_model(tmp_path / name, SPEC)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="no model folder: no weights"):
        open_model(tmp_path / "empty")
    with pytest.raises(ArtefactError, match="no such model"):
        open_model(tmp_path / "nothing")


def open_clip_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(state, folder / OPEN_CLIP_WEIGHTS)
    config = {"model_cfg": SPEC.open_clip_config(), "preprocess_cfg": {"mean": [0, 0, 0]}}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_open_clips_own_folder(tmp_path, state):
    folder = open_clip_folder(tmp_path / "theirs", state)
    found = open_model(folder)
    assert found.manifest == {}
    assert found.preprocess == Preprocess(mean=(0, 0, 0))
    assert replace(found.spec, name=SPEC.name) == SPEC
    assert same(found.state, state)
    assert found.hash == open_model(folder / OPEN_CLIP_WEIGHTS, SPEC).hash == open_model(folder, SPEC).hash
    with pytest.raises(ArtefactError, match="not a vit_nano: width, depth, heads, text_width, text_depth, image_size"):
        open_model(folder, PRESETS["vit_nano"])
    (folder / OPEN_CLIP_WEIGHTS).rename(tmp_path / "outside.safetensors")
    (folder / OPEN_CLIP_WEIGHTS).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ArtefactError, match="a link out of its folder"):
        open_model(folder)
    (folder / OPEN_CLIP_WEIGHTS).unlink()
    with pytest.raises(ArtefactError, match="no weights in it: none of open_clip_model.safetensors"):
        open_model(folder)
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    assert same(open_model(folder).state, state)


def test_files_are_hashed_when_the_hash_is_asked_for_and_once(tmp_path, state, monkeypatch):
    torch.save(state, tmp_path / "model.pt")
    wanted = weights.digest_of([tmp_path / "model.pt"])
    hashed: list[Path] = []
    monkeypatch.setattr(weights, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    weights._sha256.cache_clear()
    found = open_model(tmp_path / "model.pt", SPEC, verify=False)
    assert same(found.state, state)
    found.load_model()
    assert hashed == []
    assert found.hash == found.hash == open_model(tmp_path / "model.pt", SPEC).hash == wanted
    assert len(hashed) == 1
    torch.save({**state, "visual.proj": state["visual.proj"] + 1}, tmp_path / "model.pt")
    assert open_model(tmp_path / "model.pt", SPEC).hash != wanted
    assert len(hashed) == 2
    (tmp_path / "model.pt").unlink()
    with pytest.raises(ArtefactError, match=r"model.pt: cannot be read \(No such file"):
        weights.digest_of([tmp_path / "model.pt"])


def test_a_plan_hashes_nothing(tmp_path, monkeypatch):
    torch.save(export_state(build(PRESETS["vit_pico"], seed=0)), tmp_path / "model.pt")
    hashed: list[Path] = []
    monkeypatch.setattr(weights, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    arguments = ["expand", str(tmp_path / "model.pt"), "vit_nano", "--teacher-model", "vit_pico", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert hashed == []
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout)["parent_hash"] == weights.digest_of([tmp_path / "model.pt"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", 24.0, "width is 24.0; it must be a whole number"),
        ("layers", 200_000_000, "has 200000002 layers, the weights only 50 parameters"),
        ("context_length", 10**10, "has sizes that no model has"),
    ],
)
def test_sizes_of_no_model_end_at_once(tmp_path, state, key, value, message):
    folder = open_clip_folder(tmp_path / "theirs", state)
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"]["vision_cfg" if key == "width" else "text_cfg"][key] = value
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=message):
        open_model(folder)


def test_folders_of_open_clip_may_be_sharded_but_not_lead_elsewhere(tmp_path, state):
    folder = open_clip_folder(tmp_path / "theirs", state)
    (folder / OPEN_CLIP_WEIGHTS).unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert same(open_model(folder).state, state)
    shutil.copy(folder / "a.safetensors", tmp_path / "outside.safetensors")
    for change, message in (
        ({names[0]: "../outside.safetensors"}, "not a plain file name"),
        ({names[0]: "c.safetensors"}, "missing"),
        ({names[0]: "b.safetensors"}, "does not list what the files hold"),
        ({names[0]: 3}, "3 is not a plain file name"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, **change}}))
        with pytest.raises(ArtefactError, match=message):
            open_model(folder)
    (folder / CONFIG).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert same(open_model(folder, SPEC).state, state)
    (folder / INDEX).unlink()
    with pytest.raises(ArtefactError, match=r"2 \.safetensors files and no"):
        open_model(folder, SPEC)
    save_file(state, folder / "a.safetensors")
    (folder / "b.safetensors").unlink()
    assert same(open_model(folder, SPEC).state, state)


def test_folders_of_compt_and_their_average(tmp_path, state):
    ema = {name: value * 3 for name, value in state.items()}
    write_artefact(tmp_path / "model", state, SPEC, {}, extra_states={"ema": ema})
    found = open_model(tmp_path / "model", SPEC)
    assert same(found.state, state)
    average = average_of(found)
    assert average is not None
    assert same(average, ema)
    with pytest.raises(ArtefactError, match="holds one model"):
        open_model(tmp_path / "model", prefix="ema")
    with pytest.raises(ArtefactError, match="not a vit_nano"):
        open_model(tmp_path / "model", PRESETS["vit_nano"])
    write_artefact(tmp_path / "other", state, SPEC, {}, extra_states={"ema": state})
    shutil.rmtree(tmp_path / "model" / "ema")
    shutil.copytree(tmp_path / "other" / "ema", tmp_path / "model" / "ema")
    with pytest.raises(ArtefactError, match="not the average"):
        average_of(found)
    write_artefact(tmp_path / "alone", state, SPEC, {})
    assert average_of(open_model(tmp_path / "alone")) is None
    torch.save(state, tmp_path / "model.pt")
    assert average_of(open_model(tmp_path / "model.pt", SPEC)) is None


class Shapes(Weights):
    """The shapes of a model, without memory for it."""

    def __init__(self, spec) -> None:
        self._shapes = {name: tuple(value.shape) for name, value in build(spec, device="meta").state_dict().items()}

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


def inferred(spec):
    view, _, leftover = open_clip_view(Shapes(spec), None, "file", "--option")
    return infer_spec(view, leftover, "file", "--option")


@pytest.mark.parametrize(
    "name", ["vit_t16", "vit_s16", "vit_l16", "swin_t", "swin_b", "ViT-B-32", "ViT-L-14", "ViT-B-16-plus-240"]
)
def test_sizes_are_taken_from_the_shapes(name):
    assert inferred(model_spec(name)) == model_spec(name)


def test_unknown_sizes_are_taken_from_the_shapes_too():
    odd = replace(
        model_spec("vit_t16"), name="file", depth=5, image_size=64, no_ln_pre=True, vocab_size=50, mlp_ratio=2.0
    )
    assert inferred(odd) == odd
    wide = replace(model_spec("swin_t"), name="file", embed_dim=100)
    assert inferred(wide) == wide


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_micro", "width 96 is not a multiple of 64.*--option"),
        ("vit_nano", "the shapes are those of vit_nano .heads of 32 and 32.*--option"),
        ("ViT-H-14", "the shapes are those of ViT-H-14 .heads of 80 and 64.*--option"),
    ],
)
def test_heads_of_another_width_are_never_guessed(name, message):
    with pytest.raises(ArtefactError, match=message):
        inferred(model_spec(name))


def test_shapes_of_no_model_are_refused(state):
    for change, message in (
        ({"visual.positional_embedding": (6, 24)}, "has 6 positions"),
        ({"visual.proj": (24,)}, "the shapes are those of no model"),
    ):
        parts = {
            name: TensorSource((name,), tuple(value.shape)) for name, value in export_state(build(WIDE, seed=0)).items()
        }
        parts |= {name: TensorSource((name,), shape) for name, shape in change.items()}
        with pytest.raises(ArtefactError, match=message):
            infer_spec(View(Tensors({}), parts), [], "file", "--option")


def test_models_by_name():
    assert model_spec("vit_b16") == PRESETS["vit_b16"]
    assert replace(model_spec("ViT-B-16"), name="vit_b16") == PRESETS["vit_b16"]
    assert model_spec("ViT-B-32-quickgelu").quick_gelu
    with pytest.raises(ConfigError, match="unknown model 'vit_b17'.*did you mean 'vit_b16'"):
        model_spec("vit_b17")
    with pytest.raises(ConfigError, match="RN50"):
        model_spec("RN50")
