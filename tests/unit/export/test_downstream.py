"""Table 3's programs on exports of compt: SAN and LLaVA-1.5 see the features of compt's towers, at larger images too.

`make test-matrices` with SAN=FOLDER and LLAVA=FOLDER, checkouts of both, runs their own classes with the versions that
they pin: docs/downstream.md.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from compt.cli.main import app
from compt.errors import ConfigError
from compt.export.write import export_model, for_images
from compt.models.clip import ClipModel
from compt.models.preprocess import Preprocess
from compt.models.presets import PRESETS
from compt.weights.open import open_model
from tests.helpers.optional import optional
from tests.unit.export.conftest import SPECS, write_model
from tests.unit.export.test_formats import TRANSFORMERS_4_37, assert_same, load

FILES = Path(__file__).parents[3] / "docs" / "downstream"
LARGER = 56
"""Pixels: 7 patches a side instead of 4."""


@pytest.fixture(scope="module")
def larger(models: dict[str, Path]) -> ClipModel:
    """compt's model for larger images."""
    return for_images(open_model(models["vit"]), LARGER).load_model().eval()


def pixels(size: int = LARGER) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(size))


def with_grid(positions: Tensor, antialias: bool) -> Tensor:
    """Positions of 4 x 4 patches for 7 x 7, by torch. Its kernel is another one with `antialias`, as in open_clip."""
    grid = positions[1:].T.reshape(1, -1, 4, 4)
    grid = F.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])


@torch.no_grad()
def of_blocks(model: ClipModel, images: Tensor) -> list[Tensor]:
    """What each block of compt's image tower reads, [N, patches + 1, width], and the features, [N, embed_dim]."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for block in model.visual.transformer.resblocks
    ]
    features = model.encode_image(images)
    for hook in hooks:
        hook.remove()
    return [*seen, features]


# An export for larger images


@torch.no_grad()
def test_only_positions_change_for_larger_images(models: dict[str, Path]) -> None:
    source = open_model(models["vit"])
    found = for_images(source, LARGER)
    name = "visual.positional_embedding"
    assert found.spec.image_size == LARGER
    assert all(torch.equal(found.state[key], source.state[key]) for key in source.state if key != name)
    positions = source.state[name]
    torch.testing.assert_close(found.state[name], with_grid(positions, antialias=True), atol=1e-6, rtol=0)
    for size, words in ((60, "not a multiple of patch_size 8"), (24, "3 is smaller than the 4")):
        with pytest.raises(ConfigError, match=words) as caught:
            for_images(source, size)
        assert str(caught.value).startswith(f"--image-size {size}: ")


@torch.no_grad()
def test_the_command_exports_a_model_of_any_kind_for_larger_images(models: dict[str, Path], tmp_path: Path) -> None:
    for name, size in (("vit", LARGER), ("swin", 64)):
        words = ["export", str(models[name]), str(tmp_path / name), "--image-size", str(size)]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert f"images of 32 pixels. Its position embeddings are resized for {size} pixels." in " ".join(
            (tmp_path / name / "README.md").read_text().split()
        )
        theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / name}")
        ours = for_images(open_model(models[name]), size).load_model().eval()
        assert preprocess.transforms[0].size == size
        assert_same(theirs.eval().encode_image(pixels(size)), ours.encode_image(pixels(size)))


# SAN


@pytest.mark.parametrize("size", [None, LARGER], ids=["resized by SAN", "resized by compt"])
@torch.no_grad()
def test_san_reads_the_blocks_that_compt_computes(
    models: dict[str, Path], tmp_path: Path, larger: ClipModel, size: int | None
) -> None:
    """SAN runs open_clip's parts one by one, and resizes positions for other images without antialiasing."""
    export_model(open_model(models["vit"]), tmp_path / "out", image_size=size)
    visual = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval().visual
    ours = for_images(open_model(models["vit"]), LARGER).load_model().eval()
    if size is None:
        ours.visual.positional_embedding.copy_(with_grid(visual.positional_embedding, antialias=False))
        assert not torch.equal(ours.visual.positional_embedding, larger.visual.positional_embedding)
    patches = visual.conv1(pixels()).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(3, 1, -1), patches], dim=1)
    positions = visual.positional_embedding
    x = visual.ln_pre(x + (positions if size else with_grid(positions, antialias=False)))
    *blocks, features = of_blocks(ours, pixels())
    for block, wanted in zip(visual.transformer.resblocks, blocks, strict=True):
        assert_same(x, wanted)
        x = block(x)
    assert_same(visual.ln_post(x[:, 0]) @ visual.proj, features)


def test_the_files_for_san_are_table_e() -> None:
    base, large = (yaml.safe_load((FILES / f"compt_vit_{size}16.yaml").read_text()) for size in "bl")
    assert large["_BASE_"] == "compt_vit_b16.yaml"
    solver = base["SOLVER"]
    assert [solver[key] for key in ("IMS_PER_BATCH", "BASE_LR", "POLY_LR_POWER", "WEIGHT_DECAY", "MAX_ITER")] == [
        *(32, 1e-3, 0.9, 1e-4, 60_000)
    ]
    assert solver["AMP"] == {"ENABLED": True}
    assert base["MODEL"]["SIDE_ADAPTER"]["IMAGE_SIZE"] == 640
    for values, spec, fused in ((base, PRESETS["vit_b16"], 9), (large, PRESETS["vit_l16"], 18)):
        san, adapter = values["MODEL"]["SAN"], values["MODEL"]["SIDE_ADAPTER"]
        assert san["FEATURE_LAST_LAYER_IDX"] == fused == spec.depth * 3 // 4
        assert adapter["ATTN_BIAS"]["NUM_HEADS"] == spec.heads
        assert adapter["FUSION_MAP"] == [f"{fused * k // 3}->{k}" for k in range(4)]
        assert 640 * san["CLIP_RESOLUTION"] % spec.patch_size == 0


def test_the_launcher_of_san_registers_the_export_and_sets_the_betas(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in of train_net.py: its names are SAN's."""
    theirs: Any = ModuleType("train_net")
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs.Trainer = type("Trainer", (), {"build_optimizer": classmethod(lambda *_: torch.optim.AdamW([parameter]))})
    monkeypatch.setitem(sys.modules, "train_net", theirs)

    def launch(name: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["train_san.py", str(tmp_path / name)])
        return runpy.run_path(str(FILES / "train_san.py"), run_name="__mp_main__")

    spec = open_model(models["vit"]).spec
    write_model(tmp_path / "model", type(spec)(**{**spec.to_dict(), "name": "long", "context_length": 77}))
    export_model(open_model(tmp_path / "model"), tmp_path / "out")
    options = launch("out")["OPTIONS"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    made = open_clip.create_model(given["MODEL.SAN.CLIP_MODEL_NAME"], given["MODEL.SAN.CLIP_PRETRAINED_NAME"])
    assert torch.equal(made.visual.proj, open_model(tmp_path / "model").state["visual.proj"])
    assert theirs.Trainer.build_optimizer(None, None).param_groups[0]["betas"] == (0.9, 0.98)
    for name, words in (("vit", "this model reads 32"), ("swin", "this image tower is a Swin")):
        export_model(open_model(models[name]), tmp_path / name)
        with pytest.raises(SystemExit, match=words):
            launch(name)
    export_model(open_model(models["vit"]), tmp_path / "hf", "hf")
    with pytest.raises(SystemExit, match=r"hf is not an export of compt export --to open_clip"):
        launch("hf")
    source = open_model(tmp_path / "model")
    for key in ("mean", "std"):
        colours = Preprocess(
            **{"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, key: (0.5,) * 3}
        )
        export_model(replace(source, preprocess=colours), tmp_path / key)
        with pytest.raises(SystemExit, match=rf"this model has a {key} of \[0\.5, 0\.5, 0\.5\]"):
            launch(key)
    monkeypatch.setattr(sys, "argv", ["train_san.py"])
    with pytest.raises(SystemExit, match="name the folder of an export"):
        runpy.run_path(str(FILES / "train_san.py"), run_name="__mp_main__")


# LLaVA


@torch.no_grad()
def test_llava_reads_the_patches_that_compt_computes(
    models: dict[str, Path], tmp_path: Path, larger: ClipModel
) -> None:
    """LLaVA takes CLIPVisionModel's hidden_states[-2] without the class token, and the processor's size of a crop."""
    transformers = optional("transformers", "dev")
    export_model(open_model(models["vit"]), tmp_path / "out", "hf", image_size=LARGER)
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "out").eval()
    hidden = tower(pixels(), output_hidden_states=True).hidden_states
    assert_same(hidden[-2][:, 1:], of_blocks(larger, pixels())[-2][:, 1:])
    assert tower.config.image_size == LARGER
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (LARGER, LARGER)


def flags(name: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+) (\S+)", (FILES / name).read_text().partition("train_mem.py")[2]))


def test_the_scripts_for_llava_are_table_f() -> None:
    align, lora = flags("llava_align.sh"), flags("llava_lora.sh")
    for name in ("llava_align.sh", "llava_lora.sh"):
        subprocess.run(["bash", "-n", str(FILES / name)], check=True)
    for script in (align, lora):
        wanted = {"mm_projector_type": "mlp2x_gelu", "model_max_length": "2048", "gradient_accumulation_steps": "1"}
        wanted |= {"lr_scheduler_type": "cosine", "warmup_ratio": "0.03", "num_train_epochs": "1", "bf16": "True"}
        wanted |= {"mm_vision_select_layer": "-2", "model_name_or_path": "lmsys/vicuna-7b-v1.5"}
        assert script.items() >= wanted.items()
    assert (align["per_device_train_batch_size"], align["learning_rate"]) == ("48", "2e-3")
    wanted = {"lora_enable": "True", "lora_r": "128", "lora_alpha": "256", "per_device_train_batch_size": "16"}
    assert lora.items() >= (wanted | {"mm_projector_lr": "2e-5", "learning_rate": "2e-4"}).items()
    assert "tune_mm_mlp_adapter" not in lora


# Their own classes, with the versions that they pin

SAN = """
import sys, types, torch
from unittest.mock import MagicMock
place, folder, given = sys.argv[1], sys.argv[2], torch.load(sys.argv[3], weights_only=True)
for name in ("detectron2", *("detectron2." + part for part in ("config", "data", "layers", "utils", "utils.registry"))):
    sys.modules[name] = MagicMock()
for name in ("san", "san.model", "san.model.clip_utils"):  # without what they import: detectron2's trainer and data
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [place + "/" + name.replace(".", "/")]
import open_clip
from san.model.clip_utils.classifier import PredefinedOvClassifier
from san.model.clip_utils.visual import FeatureExtractor, RecWithAttnbiasHead
open_clip.add_model_config(folder + "/compt-vit_pico.json")
model, _, _ = open_clip.create_model_and_transforms(
    "compt-vit_pico", pretrained=folder + "/open_clip_pytorch_model.bin"
)
model.eval()
cut = len(model.visual.transformer.resblocks) - 1
first = FeatureExtractor(model.visual, last_layer_idx=cut)
rest = RecWithAttnbiasHead(
    model.visual, first_layer_idx=cut, sos_token_num=2, cross_attn=False, downsample_method="max"
)
with torch.no_grad():
    seen = first(given["pixels"])
    image = rest(seen, [torch.zeros(len(given["pixels"]), 1, 2, 10, 10)])
    blocks = [torch.cat([seen[f"{k}_cls_token"].transpose(0, 1), seen[k].flatten(2).transpose(1, 2)], 1)
              for k in range(cut + 1)]
    text = PredefinedOvClassifier(model, templates=["a photo of a {}."])(given["words"])
torch.save({"file": open_clip.__file__, "blocks": blocks, "image": image[:, 0], "text": text}, sys.argv[4])
"""
LLAVA = """
import sys, types, torch, transformers
place, folder, given = sys.argv[1], sys.argv[2], torch.load(sys.argv[3], weights_only=True)
for name in ("llava", "llava.model", "llava.model.multimodal_encoder"):  # without the language models they import
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [place + "/" + name.replace(".", "/")]
from llava.model.multimodal_encoder.builder import build_vision_tower
tower = build_vision_tower(types.SimpleNamespace(vision_tower=folder, mm_vision_select_layer=-2))
assert tower.image_processor.crop_size["height"] == given["pixels"].shape[2] == tower.config.image_size
torch.save({"file": transformers.__file__, "patches": tower(given["pixels"]), "sides": tower.num_patches_per_side,
            "hidden": tower.hidden_size}, sys.argv[4])
"""


def theirs_with(
    program: str, packages: list[str], checkout: str, folder: Path, given: dict[str, Any], tmp_path: Path
) -> Any:
    """What `program` saves, with `packages` and the classes of the checkout that the variable `checkout` names."""
    if not os.environ.get(checkout):
        pytest.skip(f"the variable {checkout} names no checkout")
    place = tmp_path / "place"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place)]
    subprocess.run([*pip, *packages], check=True)
    torch.save(given, tmp_path / "given.pt")
    words = [os.environ[checkout], *map(str, (folder, tmp_path / "given.pt", tmp_path / "theirs.pt"))]
    subprocess.run([sys.executable, "-c", program, *words], check=True, env={**os.environ, "PYTHONPATH": str(place)})
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert theirs["file"].startswith(str(place))
    return theirs


@pytest.mark.full
@torch.no_grad()
def test_san_s_own_classes_on_open_clip_2_16(tmp_path: Path) -> None:
    spec = SPECS["vit"]
    write_model(tmp_path / "model", type(spec)(**{**spec.to_dict(), "context_length": 77}))
    source = open_model(tmp_path / "model")
    export_model(source, tmp_path / "out", image_size=LARGER)
    given = {"pixels": pixels(), "words": ["cat", "traffic light"]}
    theirs = theirs_with(SAN, ["open_clip_torch==2.16.0"], "SAN", tmp_path / "out", given, tmp_path)
    *blocks, features = of_blocks(for_images(source, LARGER).load_model().eval(), pixels())
    assert len(theirs["blocks"]) == len(blocks)
    for one, wanted in zip(theirs["blocks"], blocks, strict=True):
        assert_same(one, wanted)
    assert_same(theirs["image"], features)  # SAN's queries without a mask are class tokens
    tokens = open_clip.tokenize([f"a photo of a {word}." for word in given["words"]])
    assert_same(theirs["text"], load(tmp_path / "model").encode_text(tokens, normalize=True))


@pytest.mark.full
def test_llava_s_own_class_on_transformers_4_37(models: dict[str, Path], tmp_path: Path, larger: ClipModel) -> None:
    export_model(open_model(models["vit"]), tmp_path / "out", "hf", image_size=LARGER)
    theirs = theirs_with(LLAVA, TRANSFORMERS_4_37, "LLAVA", tmp_path / "out", {"pixels": pixels()}, tmp_path)
    assert_same(theirs["patches"], of_blocks(larger, pixels())[-2][:, 1:])
    assert (theirs["sides"], theirs["hidden"]) == (7, larger.spec.width)
