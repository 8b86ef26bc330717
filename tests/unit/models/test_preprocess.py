"""How a model expects its images, read and written; the oracles are open_clip's and transformers' own transforms."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from compt.cli.main import main
from compt.data.decode import evaluation_pixels
from compt.errors import ArtefactError
from compt.evaluate.sets import evaluate_set
from compt.evaluate.task import EvalSettings
from compt.export.write import export_model
from compt.models.pixels import to_input
from compt.models.preprocess import AS_OPENAI, Preprocess
from compt.recipe.schema import EvalSet
from compt.weights.open import open_model
from tests.helpers.optional import optional
from tests.helpers.shards import picture
from tests.unit.models.test_open_clip_config import save, stock

SIZE = 32
# Landscape, portrait, square, tiny, the exact size, very long.
SHAPES = ((50, 40), (41, 60), (36, 36), (7, 9), (32, 32), (150, 11), (33, 65))
GREY = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
PREPROCESS_CFGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "colours": GREY,
    "bilinear": {"interpolation": "bilinear"},
    "squash": {"resize_mode": "squash", **GREY},
    "bilinear squash": {"resize_mode": "squash", "interpolation": "bilinear"},
    "longest": {"resize_mode": "longest", "interpolation": "bilinear", "fill_color": 90, **GREY},
    "one number": {"mean": 0.5, "std": 0.25},
    "none": {"mean": None, "interpolation": None, "size": 999},
}
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
}


def images() -> list[bytes]:
    return [picture(i, *shape) for i, shape in enumerate(SHAPES)]


def ours(preprocess: Preprocess) -> Tensor:
    pixels = [torch.from_numpy(evaluation_pixels(data, SIZE, preprocess).copy()) for data in images()]
    return to_input(torch.stack(pixels), preprocess.mean, preprocess.std)


def opened() -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in images()]


@pytest.fixture(scope="module")
def model() -> Any:
    return stock(CONFIG)


@pytest.mark.parametrize("name", PREPROCESS_CFGS)
def test_pixels_are_those_of_open_clip_before_and_after_an_export(tmp_path: Path, model: Any, name: str) -> None:
    source = save(tmp_path / "theirs", CONFIG, model, PREPROCESS_CFGS[name])
    found = open_model(source)
    export_model(found, tmp_path / "exported")
    assert open_model(tmp_path / "exported").preprocess == found.preprocess
    for folder in (source, tmp_path / "exported"):
        _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        theirs = torch.stack([transform(image) for image in opened()])
        assert (ours(found.preprocess) - theirs).abs().max() < 1e-5, folder


@pytest.mark.parametrize("name", ["nothing", "squash", "longest"])
def test_eval_gives_the_predictions_of_open_clip(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG).eval()
    with torch.no_grad():  # leave out what all images share, so that predictions differ
        model.visual.conv1.weight.mul_(10)
        shared = torch.nn.functional.normalize(model.encode_image(ours(AS_OPENAI)).mean(0), dim=0)
        model.visual.proj -= model.visual.proj @ torch.outer(shared, shared)
    source = save(tmp_path / "model", CONFIG, model, PREPROCESS_CFGS[name])
    classes = sorted(["ant", "blue dog", "cat", "seven green boats", "zebra", "moon", "an old red car", "x"])
    for number, label in enumerate(classes):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i, shape in enumerate(SHAPES):
            (tmp_path / "images" / label / f"{i}.png").write_bytes(picture(10 * number + i, *shape))
    (tmp_path / "images" / "templates.txt").write_text("a photo of a {c}.\nart of {c}\n")
    found = open_model(source)
    item = EvalSet(name="images", data=["images"], templates="images/templates.txt")
    result = evaluate_set(found.load_model(), item, EvalSettings(found.preprocess, tmp_path))
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{source}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{source}")
    theirs.eval()
    templates = ["a photo of a {}.", "art of {}"]
    weights = open_clip.build_zero_shot_classifier(theirs, tokenizer, classes, templates)
    paths = [tmp_path / "images" / label / f"{i}.png" for label in classes for i in range(len(SHAPES))]
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(path)) for path in paths])
        scores = theirs.encode_image(batch, normalize=True) @ weights
    assert result.predictions.tolist() == scores.argmax(dim=1).tolist()
    words = ["eval", source, "--data", tmp_path / "images", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit):
        main(lambda: [*map(str, words), "--templates", str(tmp_path / "images" / "templates.txt")])
    [answers] = (tmp_path / "out").glob("*/images.npz")
    assert np.load(answers)["predictions"].tolist() == result.predictions.tolist()
    assert len(set(result.predictions.tolist())) > 3, "a model that says one thing always proves nothing"
    other = evaluate_set(found.load_model(), item, EvalSettings(Preprocess((0.1, 0.6, 0.9)), tmp_path))
    assert other.predictions.tolist() != result.predictions.tolist()


def processors() -> Any:
    transformers = optional("transformers", "dev")
    # Since transformers 5 the class that resizes with Pillow, as open_clip does, has a name of its own.
    return getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)


# Shapes for which transformers and open_clip cut out the same centre: see docs/checkpoints.md.
AGREEING, APART = [0, 1, 2, 3, 4, 5], 6


@pytest.mark.parametrize("name", ["nothing", "colours", "bilinear", "squash", "bilinear squash"])
def test_an_export_gives_transformers_the_same_pixels(tmp_path: Path, model: Any, name: str) -> None:
    found = open_model(save(tmp_path / "theirs", CONFIG, model, PREPROCESS_CFGS[name]))
    export_model(found, tmp_path / "exported")
    processor = processors().from_pretrained(tmp_path / "exported")
    chosen = range(len(SHAPES)) if "squash" in name else AGREEING
    theirs = torch.cat([torch.as_tensor(processor(opened()[at])["pixel_values"][0])[None] for at in chosen])
    assert (ours(found.preprocess)[list(chosen)] - theirs).abs().max() < 1e-5
    again = json.loads((tmp_path / "exported" / "preprocessor_config.json").read_text())
    assert Preprocess.of_hugging_face(again, SIZE, "it") == found.preprocess


def test_an_export_says_nothing_to_transformers_that_it_cannot_do(tmp_path: Path, model: Any) -> None:
    found = open_model(save(tmp_path / "theirs", CONFIG, model, PREPROCESS_CFGS["longest"]))
    for _ in range(2):  # an export may replace an export
        export_model(found, tmp_path / "exported")
    assert not (tmp_path / "exported" / "preprocessor_config.json").exists()


SQUARE = {"height": SIZE, "width": SIZE}
HUGGING_FACE: dict[str, tuple[dict[str, Any], Preprocess]] = {
    "nothing": ({}, AS_OPENAI),
    "a number": ({"size": SIZE, "crop_size": SIZE, "resample": 3}, AS_OPENAI),
    "shortest edge": ({"size": {"shortest_edge": SIZE}, "crop_size": SQUARE}, AS_OPENAI),
    "square": ({"size": SQUARE, "do_center_crop": False}, Preprocess(resize_mode="squash")),
    "square and crop": ({"size": SQUARE, "crop_size": SQUARE}, Preprocess(resize_mode="squash")),
    "bilinear": ({"resample": 2}, Preprocess(interpolation="bilinear")),
    "colours": (
        {"image_mean": GREY["mean"], "image_std": GREY["std"], "feature_extractor_type": "CLIPFeatureExtractor"},
        Preprocess((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_pixels_are_those_of_transformers(name: str) -> None:
    values, wanted = HUGGING_FACE[name]
    found = Preprocess.of_hugging_face(values, SIZE, "it")
    assert found == wanted
    sizes = {"size": SIZE, "crop_size": SIZE} if "size" not in values else {}
    options = {key: value for key, value in (values | sizes).items() if key != "feature_extractor_type"}
    processor = processors()(**options)
    theirs = torch.cat([torch.as_tensor(processor(opened()[at])["pixel_values"][0])[None] for at in AGREEING])
    assert (ours(found)[AGREEING] - theirs).abs().max() < 1e-5
    if found.resize_mode == "shortest":  # 31 rows too many: transformers cuts off 15 at the top, open_clip 16
        apart = torch.as_tensor(processor(opened()[APART])["pixel_values"][0])
        assert (ours(found)[APART][:, :-1] - apart[:, 1:]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation = 'lanczos' is not supported; it must be bilinear or bicubic"),
        ({"interpolation": "random"}, "interpolation = 'random'"),
        ({"resize_mode": "crop"}, "resize_mode = 'crop' is not supported; it must be shortest or longest or squash"),
        ({"mode": "L"}, "mode = 'L' is not supported; it must be RGB"),
        ({"fill_color": 300}, "fill_color = 300; it must be a whole number from 0 to 255"),
        ({"mean": [0.5, 0.5]}, r"mean = \[0.5, 0.5\]; it must be three numbers, of red"),
        ({"std": [0.5, 0, 0.5]}, r"std = \[0.5, 0, 0.5\]; it must be three numbers above 0"),
        ({"std": "0.5"}, "std = '0.5'"),
        ({"mean": 10**400}, "mean = 10*; it must be three numbers"),
        ({"crop_pct": 0.9}, "crop_pct = 0.9 is not supported; the keys are size, mode, mean, std"),
    ],
)
def test_what_open_clip_cannot_have_meant_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtefactError, match=f"^FILE: {message}"):
        Preprocess.of(values, "FILE")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = 'ViTImageProcessor' is not supported"),
        ({"resample": 1}, "resample = 1 is not supported; it must be 2 or 3"),
        ({"do_normalize": False}, "do_normalize = False is not supported; it must be True"),
        ({"do_rescale": False}, "do_rescale = False"),
        ({"do_resize": False}, "do_resize = False"),
        ({"do_pad": True}, "do_pad = True is not supported; it must be False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = 0.0078"),
        ({"default_to_square": True, "size": 32}, "default_to_square = True is not supported; it must be False"),
        ({"use_square_size": True, "size": {"shortest_edge": 32}}, "use_square_size = True"),
        ({"do_center_crop": False}, "size = 32, crop_size = 32, do_center_crop = False is not supported; both sizes"),
        ({"size": {"shortest_edge": 40}}, "size = {'shortest_edge': 40}, crop_size = 32"),
        ({"size": 224, "crop_size": 224}, "size = 224, crop_size = 224"),
        ({"crop_size": {"height": 16, "width": 16}}, "size = 32, crop_size = {'height': 16"),
        ({"image_mean": [0.5]}, r"image_mean = \[0.5\]; it must be three numbers"),
    ],
)
def test_what_compt_cannot_do_as_transformers_does_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtefactError, match=f"^FILE: {message}"):
        Preprocess.of_hugging_face(values, SIZE, "FILE")
