from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from compt.cli.main import app
from compt.data.batch import EvalBatch
from compt.data.check import check
from compt.data.decode import evaluation_pixels
from compt.data.index import open_index
from compt.data.labels import read_classnames
from compt.data.loaders import fixed_caption_batches
from compt.errors import ArtefactError, ConfigError, DataError
from compt.evaluate.contact import save_caption_sheet, save_contact_sheet
from compt.evaluate.encoder import Encoder, load_arrays
from compt.evaluate.retrieval import RetrievalResult, query_ranks, retrieval
from compt.evaluate.scorer import Scorer, open_held_out
from compt.evaluate.sets import check_sets, evaluate_set, open_set
from compt.evaluate.task import EvalSettings
from compt.evaluate.validation import validation_loss
from compt.evaluate.zeroshot import classifier, fill_template, read_templates, true_ranks, zero_shot
from compt.files import hash_json
from compt.models.clip import build
from compt.models.pixels import to_input
from compt.models.preprocess import Preprocess
from compt.models.presets import ModelSpec
from compt.recipe.schema import EvalSet
from compt.train.losses import contrastive_loss
from tests.helpers import evaluation as cases
from tests.helpers.recipe import recipe_of
from tests.helpers.shards import make_shards, picture, write_tar

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SPEC = ModelSpec(
    "tiny", "vit", 32, 2, 2, 32, 2, 2,
    image_size=32, patch_size=8, context_length=16, embed_dim=24, head_width=16, text_head_width=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build(SPEC, seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> open_clip.tokenizer.SimpleTokenizer:
    return open_clip.tokenizer.SimpleTokenizer(context_length=16)


# pixels


def test_to_input_is_torchvisions_normalisation() -> None:
    from torchvision.transforms.functional import normalize

    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    expected = normalize(images / 255, MEAN, STD)
    assert torch.allclose(to_input(images, MEAN, STD), expected, atol=1e-6)
    assert to_input(images, MEAN, STD, torch.bfloat16).dtype == torch.bfloat16
    assert images.dtype == torch.uint8


# zero-shot


def test_classifier_equals_open_clips(model, tokenizer) -> None:
    names = ["red cat", "a much longer name of a blue dog", "tree", "house {}", "fish", "ox", "bee"]
    templates = ["a photo of a {}.", "art of the {}", "{}"]
    expected = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, names, templates, 3)
    encoder = Encoder(model, Preprocess(MEAN, STD))
    for batch in (1, 4, 100):  # across and within classes
        found = classifier(encoder, names, templates, tokenizer, batch)
        assert found.shape == (24, 7)
        assert torch.allclose(found, expected, atol=1e-5)
    curly = [template.replace("{}", "{c}") for template in templates]
    assert torch.allclose(classifier(encoder, names, curly, tokenizer), expected, atol=1e-5)


def test_fill() -> None:
    assert fill_template("a photo of {c}.", "x") == "a photo of x."
    assert fill_template("{} and {}", "x{}\\1") == "x{}\\1 and x{}\\1"


def _naive_zero_shot(weights: torch.Tensor, n: int, classes: int) -> tuple[list[int], list[int]]:
    """Predictions and ranks, one sample and one class at a time."""
    table = cases.encoder().model.image_table.detach()
    predictions, ranks = [], []
    for i, label in enumerate(cases.labels_of(n, classes).tolist()):
        feature = table[i] / table[i].norm()
        scores = [float(feature @ weights[:, c]) for c in range(classes)]
        predictions.append(max(range(classes), key=lambda c: scores[c]))
        ranks.append(sorted(range(classes), key=lambda c: -scores[c]).index(label))
    return predictions, ranks


def test_zero_shot_against_one_by_one() -> None:
    n, classes = 83, 9
    weights = F.normalize(torch.randn(cases.WIDTH, classes, generator=torch.Generator().manual_seed(1)), dim=0)
    result = zero_shot(cases.encoder(), cases.Loader(n, classes), weights, name="set")
    predictions, ranks = _naive_zero_shot(weights, n, classes)
    labels = cases.labels_of(n, classes).numpy()
    assert result.ids.tolist() == list(range(n))
    assert result.labels.tolist() == labels.tolist()
    assert result.predictions.tolist() == predictions
    assert result.ranks.tolist() == ranks
    correct = np.array(ranks) == 0
    assert (result.predictions == result.labels).tolist() == correct.tolist() == result.correct.tolist()
    assert result.top1 == pytest.approx(100 * correct.mean())
    assert result.top5 == pytest.approx(100 * (np.array(ranks) < 5).mean())
    assert result.headline() == {"top1": result.top1, "top5": result.top5}
    record = result.to_dict()
    per_class = [100 * correct[labels == c].mean() for c in range(classes)]
    assert record["per_class"] == pytest.approx(per_class)
    assert record["mean_per_class"] == pytest.approx(np.mean(per_class))
    assert record["chance"] == pytest.approx(100 / 9)
    assert record["n"] == n
    low, high = record["top1_interval"]
    assert low < record["top1"] < high


def test_few_classes_have_no_top5_and_absent_classes_no_share() -> None:
    weights = F.normalize(torch.randn(cases.WIDTH, 5), dim=0)
    loader = [EvalBatch(cases.images_of([1, 2]), ["a", "b"], [0, 1], torch.tensor([4, 4]))]
    result = zero_shot(cases.encoder(), loader, weights)
    assert result.top5 is None
    assert list(result.headline()) == ["top1"]
    assert result.per_class[:4] == [None] * 4
    json.dumps(result.to_dict(), allow_nan=False)


def test_ties_go_to_the_lower_class_and_broken_scores_are_wrong() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0]] * 3 + [[float("nan")] * 4, [0.0, float("inf"), 0.0, 0.0]])
    labels = torch.tensor([1, 2, 0, 0, 1])
    ranks, first = true_ranks(scores, labels)
    assert ranks.tolist() == [0, 1, 2, 3, 3]
    assert first.tolist() == [1, 1, 1, -1, -1]
    assert true_ranks(torch.tensor([[float("nan")]]), torch.tensor([0]))[0].tolist() == [1]


def test_a_sample_seen_twice_is_an_error() -> None:
    loader = [EvalBatch(cases.images_of([1, 2]), ["a", "b"], [7, 7], torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="twice"):
        zero_shot(cases.encoder(), loader, torch.eye(cases.WIDTH))


def test_labels_that_cannot_be_used() -> None:
    batch = EvalBatch(cases.images_of([1, 2]), ["a/b", "c"], [0, 1])
    with pytest.raises(DataError, match="'emoji': a/b has no label"):
        zero_shot(cases.encoder(), [batch], torch.eye(cases.WIDTH), name="emoji")
    with pytest.raises(DataError, match="'emoji': no sample can be read: s.tar: k: image: broken"):
        empty = EvalBatch(torch.zeros(0, 3, 2, 2, dtype=torch.uint8), [], [], bad=["s.tar: k: image: broken"])
        zero_shot(cases.encoder(), [empty], torch.eye(cases.WIDTH), name="emoji")


def test_the_models_mode_comes_back(model, tokenizer) -> None:
    model.train()
    weights = classifier(Encoder(model, Preprocess(MEAN, STD)), ["x"], ["{}"], tokenizer)
    assert model.training
    assert not weights.requires_grad
    with Encoder(model, Preprocess(MEAN, STD)).frozen():
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    model.eval()
    classifier(Encoder(model, Preprocess(MEAN, STD)), ["x"], ["{}"], tokenizer)
    assert not model.training


def test_bf16_is_used_for_the_model_but_not_for_scores(model, tokenizer) -> None:
    full = classifier(Encoder(model, Preprocess(MEAN, STD)), ["cat", "dog"], ["{}"], tokenizer)
    half = classifier(Encoder(model, Preprocess(MEAN, STD), torch.bfloat16), ["cat", "dog"], ["{}"], tokenizer)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert torch.allclose(full, half, atol=0.02)


# retrieval


def _naive_ranks(n: int) -> tuple[list[int], list[int]]:
    source = cases.encoder().model
    captions = cases.captions_of(n)
    image = F.normalize(source.image_table.detach()[:n], dim=-1)
    text = [
        (i, F.normalize(source.text_table.detach()[int(c.split()[-1])], dim=-1))
        for i, cs in enumerate(captions)
        for c in cs
    ]
    image_ranks, found = [], []
    for i in range(n):
        order = sorted(range(len(text)), key=lambda t: -float(image[i] @ text[t][1]))
        image_ranks.append(next(place for place, t in enumerate(order) if text[t][0] == i))
        found.append(order[0])
    text_ranks = []
    for owner, feature in text:
        order = sorted(range(n), key=lambda i: -float(image[i] @ feature))
        text_ranks.append(order.index(owner))
    return image_ranks, text_ranks, found


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_retrieval_against_one_by_one(chunk: int) -> None:
    n = 41
    result = retrieval(cases.encoder(), cases.Loader(n, with_captions=True), cases.tokenize, name="set", chunk=chunk)
    image_ranks, text_ranks, found = _naive_ranks(n)
    assert result.found.tolist() == found
    assert result.image_ranks.tolist() == image_ranks
    assert result.text_ranks.tolist() == text_ranks
    assert result.ids.tolist() == list(range(n))
    assert result.owners.tolist() == [i for i, own in enumerate(cases.captions_of(n)) for _ in own]
    scores = result.headline()
    for k in (1, 5, 10):
        assert scores[f"image_to_text_r{k}"] == pytest.approx(100 * np.mean([r < k for r in image_ranks]))
        assert scores[f"text_to_image_r{k}"] == pytest.approx(100 * np.mean([r < k for r in text_ranks]))
    assert 0 < scores["image_to_text_r10"] < 100
    assert result.to_dict()["texts"] == len(text_ranks)


def test_retrieval_ties_and_broken_features_count_against_the_model() -> None:
    same = torch.ones(4, 3)
    of = torch.arange(4)
    assert query_ranks(same, same, of, of)[:, 0].tolist() == [3, 3, 3, 3]
    broken = torch.full((4, 3), float("nan"))
    assert query_ranks(broken, same, of, of)[:, 0].tolist() == [3, 3, 3, 3]
    # Two captions of one image with equal scores do not lower each other's rank.
    assert query_ranks(same[:1], same[:2], torch.tensor([0]), torch.tensor([0, 0])).tolist() == [[0, 0]]


def test_retrieval_names_an_image_without_caption() -> None:
    batch = EvalBatch(cases.images_of([1, 2]), ["a", "b"], [0, 1], captions=[["text 1"], []])
    with pytest.raises(DataError, match="'set': b has no caption"):
        retrieval(cases.encoder(), [batch], cases.tokenize, name="set")


def test_scores_never_need_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = torch.Tensor.masked_fill

    def spy(self: torch.Tensor, *arguments: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.shape[0])
        return original(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "masked_fill", spy)
    retrieval(cases.encoder(), cases.Loader(50, with_captions=True), cases.tokenize, chunk=8)
    assert largest == 8


# validation loss


def test_validation_loss_is_the_mean_over_images() -> None:
    source = cases.encoder()
    total = images = 0.0
    for batch in cases.validation_batches(3):
        with torch.no_grad():
            image = source.model.encode_image(batch.images / 255)
            text = source.model.encode_text(batch.tokens.flatten(0, 1)).view(len(image), 3, -1)
            total += float(contrastive_loss(image, text, torch.tensor([2.0]).exp()).task) * len(image)
        images += len(image)
    assert images == 18
    assert validation_loss(source, cases.validation_batches(3)) == pytest.approx(total / images, rel=1e-6)
    with pytest.raises(DataError, match="no batch"):
        validation_loss(source, [])


def test_validation_loss_of_shards_does_not_change(tmp_path: Path, model) -> None:
    make_shards(tmp_path, n=24)
    index = open_index(str(tmp_path), tmp_path)
    batches = fixed_caption_batches(index, batch=8, image_size=32, captions=2, context_length=16)
    first = validation_loss(Encoder(model, Preprocess(MEAN, STD)), batches)
    assert first == validation_loss(Encoder(model, Preprocess(MEAN, STD)), batches)
    assert 1 < first < 4  # an untrained model guesses among eight: ln 8 and more


# whole sets


def _settings(base: Path) -> EvalSettings:
    return EvalSettings(Preprocess(MEAN, STD), base=base, batch=7)


def _set(folder: Path, classes: int = 7) -> EvalSet:
    make_shards(folder / "test", n=26, classes=classes)
    (folder / "classnames.txt").write_text("".join(f"thing {i}\n" for i in range(classes)))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}\nart of {c}\n")
    return EvalSet(name="things", data=["data/test"])


def test_a_set_in_clip_benchmarks_layout(tmp_path: Path, model, tokenizer) -> None:
    item = _set(tmp_path / "data")
    result = evaluate_set(model, item, _settings(tmp_path))
    names, templates = [f"thing {i}" for i in range(7)], ["a photo of {c}", "art of {c}"]
    assert result.n == 26
    assert result.labels.tolist() == [i % 7 for i in range(26)]
    # open_clip's own preprocessing, model call and classifier
    stock = open_clip.model.CLIP(**SPEC.open_clip_config())
    state = model.state_dict()
    stock.load_state_dict({**state, "logit_scale": state["logit_scale"].reshape(())})
    stock.eval()
    transform = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    pictures = [Image.open(io.BytesIO(picture(i, 40, 36))) for i in range(26)]
    weights = open_clip.build_zero_shot_classifier(stock, tokenizer, names, [t.replace("{c}", "{}") for t in templates])
    with torch.no_grad():
        scores = stock.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True) @ weights
    assert result.predictions.tolist() == scores.argmax(dim=1).tolist()
    # open_clip's own model gives the same through our code
    assert evaluate_set(stock, item, _settings(tmp_path)).predictions.tolist() == result.predictions.tolist()


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    item, settings = _set(tmp_path / "data"), _settings(tmp_path)
    with pytest.raises(ArtefactError, match="vocab_size = 49407: .* another vocabulary .* of 49408 tokens"):
        evaluate_set(build(replace(SPEC, vocab_size=49_407), seed=0), item, settings)
    larger = replace(SPEC, vocab_size=49_500)
    assert evaluate_set(build(larger, seed=0), item, settings).n == 26, "a recipe of ours may leave room"
    with pytest.raises(ArtefactError, match="vocab_size = 49500"):
        evaluate_set(open_clip.model.CLIP(**larger.open_clip_config()), item, settings)


def test_pins_change_with_what_they_pin(tmp_path: Path, model) -> None:
    item = _set(tmp_path / "data")
    pins = evaluate_set(model, item, _settings(tmp_path)).pins
    assert set(pins) == {"data", "classnames", "templates", "label"}
    assert evaluate_set(model, item, _settings(tmp_path)).pins == pins
    (tmp_path / "data" / "zeroshot_classification_templates.txt").write_text("a photo of the {c}\n")
    other = evaluate_set(model, item, _settings(tmp_path)).pins
    assert {key for key in pins if pins[key] != other[key]} == {"templates"}


def test_pins_without_a_model(tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch) -> None:
    item, settings = _set(tmp_path / "data"), _settings(tmp_path)
    find = EvalSet(name="find", task="retrieval", data=["data/test/*.tar"])
    _folders(tmp_path / "pictures")
    folders = EvalSet(name="pictures", data=["pictures"])
    results = {each.name: evaluate_set(model, each, settings) for each in (item, find, folders)}

    def refuse(*_: object) -> None:
        raise AssertionError("a collective: one rank could not call it alone")

    monkeypatch.setattr("compt.dist.collectives.on_main", refuse)
    for each in (item, find, folders):
        assert open_set(each, settings).pins() == results[each.name].pins
    first = open_set(item, settings).pins()
    (tmp_path / "data" / "classnames.txt").write_text("".join(f"{i}\n" for i in range(7)))
    assert {key for key, value in open_set(item, settings).pins().items() if value != first[key]} == {"classnames"}
    make_shards(tmp_path / "data" / "test", n=20, classes=7)
    assert open_set(item, settings).pins()["data"] != first["data"]


FOLDERS = ["ant", "blue dog", "cat"]


@pytest.mark.parametrize("name", ["things", "pictures"])
def test_contact_sheets_of_shards_and_of_class_folders(tmp_path: Path, model, name: str) -> None:
    _folders(tmp_path / "pictures")
    item, settings = _set(tmp_path / "data"), _settings(tmp_path)
    if name == "pictures":
        item = EvalSet(name="pictures", data=["pictures"])
    check_sets([item], settings, contact_sheet=name)
    result = evaluate_set(model, item, settings)
    save_contact_sheet(tmp_path / "scores", result, open_set(item, settings).data.samples, 32)
    stored = load_arrays(tmp_path / "scores" / "contact.npz")
    assert stored["images"].shape == (result.n, 3, 32, 32)
    assert stored["ids"].tolist() == result.ids.tolist()
    assert stored["labels"].tolist() == result.labels.tolist()
    assert stored["classnames"].tolist() == (FOLDERS if name == "pictures" else [f"thing {i}" for i in range(7)])
    # Ids follow the classes: ant, blue_dog, cat have images 10.., 0.., 20...
    source = picture(3, 40, 36) if name == "things" else picture(0, 40, 50)
    assert np.array_equal(stored["images"][3], evaluation_pixels(source, 32))


def test_a_contact_sheet_of_classes_without_names_has_their_numbers(tmp_path: Path, model) -> None:
    for split in ("test", "train"):
        make_shards(tmp_path / split, n=20, shards=1, classes=3)
    item, settings = EvalSet(name="k", task="knn", data=["test/*.tar"], train=["train/*.tar"]), _settings(tmp_path)
    result = evaluate_set(model, item, settings)
    assert list(result.names) == []
    save_contact_sheet(tmp_path, result, open_set(item, settings).data.samples, 32)
    assert load_arrays(tmp_path / "contact.npz")["classnames"].tolist() == ["0", "1", "2"]


def test_a_sheet_of_captions_has_those_that_the_model_finds(tmp_path: Path, model) -> None:
    make_shards(tmp_path / "data" / "test", n=20, shards=2)
    item, settings = EvalSet(name="find", task="retrieval", data=["data/test/*.tar"]), _settings(tmp_path)
    result, samples = evaluate_set(model, item, settings), open_set(item, settings).data.samples
    assert isinstance(result, RetrievalResult)
    save_caption_sheet(tmp_path, result, samples, 32)
    stored = load_arrays(tmp_path / "contact_captions.npz")
    every = [(sample, text) for sample in result.ids.tolist() for text in samples.read(sample).captions]
    assert [sample for sample, _ in every] == result.owners.tolist()
    at = [result.ids.tolist().index(sample) for sample in stored["ids"].tolist()]
    assert len(at) == 12
    assert stored["captions"].tolist() == [samples.read(int(result.ids[i])).captions[0] for i in at]
    assert stored["answers"].tolist() == [every[result.found[i]][1] for i in at]
    assert stored["right"].tolist() == [bool(result.image_ranks[i] == 0) for i in at]
    assert stored["images"].shape == (12, 3, 32, 32)


def test_a_contact_sheet_of_a_retrieval_set_is_refused_early(tmp_path: Path) -> None:
    find = EvalSet(name="find", task="retrieval", data=["nowhere"])
    with pytest.raises(ConfigError, match=r"evaluation\.contact_sheet = 'find': is a retrieval set"):
        check_sets([find], _settings(tmp_path), contact_sheet="find")


def test_sets_without_labels_are_refused_before_a_model_is_trained(tmp_path: Path) -> None:
    make_shards(tmp_path / "data" / "test", n=20, shards=2)
    (tmp_path / "data" / "classnames.txt").write_text("one\ntwo\n")
    make_shards(tmp_path / "labelled", n=20, shards=2, classes=2)
    settings, wrong = (
        _settings(tmp_path),
        r": none of the 20 samples that were looked at has a usable label: .*such as 000000.tar: 0000",
    )
    with pytest.raises(DataError, match=f"'a'{wrong}"):
        check_sets([EvalSet(name="a", data=["data/test/*.tar"])], settings)
    with pytest.raises(DataError, match=f"'b'{wrong}"):
        check_sets([EvalSet(name="b", task="knn", data=["labelled/*.tar"], train=["data/test/*.tar"])], settings)
    with pytest.raises(DataError, match=f"'c'{wrong}"):
        check_sets([EvalSet(name="c", task="multilabel", data=["data/test/*.tar"])], settings)
    every = replace(settings, max_bad_share=1.0)
    check_sets([EvalSet(name="a", data=["data/test/*.tar"])], every)
    check_sets([EvalSet(name="find", task="retrieval", data=["data/test/*.tar"])], settings)


@pytest.mark.parametrize(("option", "value"), [("--batch", "0"), ("--workers", "-1")])
def test_the_command_refuses_sizes_that_cannot_be(option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["eval", "model", "--data", "data", option, value])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert f"Invalid value for '{option}'" in result.output


def test_a_label_in_the_json(tmp_path: Path, model) -> None:
    item = _set(tmp_path / "data")
    by_json = EvalSet(name="things", data=["data/test"], label="class")
    result = evaluate_set(model, by_json, _settings(tmp_path))
    assert result.labels.tolist() == [i % 7 for i in range(26)]
    assert result.pins["label"] == "class"
    with pytest.raises(DataError, match=r"26 of 26 samples have no usable label .* as 000000.tar: 000000000: label: "):
        evaluate_set(model, EvalSet(name="things", data=["data/test"], label="colour"), _settings(tmp_path))
    assert item.label == "cls"


def test_retrieval_of_a_set_and_several_sets(tmp_path: Path, model) -> None:
    item = _set(tmp_path / "data")
    found = EvalSet(name="find", task="retrieval", data=["data/test/*.tar"])
    assert evaluate_set(model, item, _settings(tmp_path)).n == 26
    result = evaluate_set(model, found, _settings(tmp_path))
    assert (result.name, result.n) == ("find", 26)
    assert len(result.owners) == 78
    assert set(result.pins) == {"data"}


def test_results_on_the_disk(tmp_path: Path, model) -> None:
    item = _set(tmp_path / "data")
    result = evaluate_set(model, item, _settings(tmp_path))
    result.save(tmp_path / "out")
    arrays = load_arrays(tmp_path / "out" / "things.npz")
    assert {key: value.tolist() for key, value in arrays.items()} == {
        key: value.tolist() for key, value in result.arrays().items()
    }
    assert json.loads((tmp_path / "out" / "things.json").read_text()) == result.to_dict()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["things.json", "things.npz"]
    result.name = "a/b"
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "a%2Fb.json").exists()
    stored = tmp_path / "out" / "things.npz"
    whole = stored.read_bytes()
    middle = len(whole) // 3
    header = io.BytesIO()  # an array whose shape is no code of Python
    with zipfile.ZipFile(header, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00\x10\x00{'shape': (3,   ")
    for torn in (b"PK torn", whole[:-30], whole[:middle] + bytes(40) + whole[middle + 40 :], b"", header.getvalue()):
        stored.write_bytes(torn)
        with pytest.raises(DataError, match=r"things\.npz"):
            load_arrays(stored)


def test_an_unreadable_image_is_counted(tmp_path: Path, model, caplog) -> None:
    members = [(f"{i}.png", picture(i, 32, 32)) if i % 2 else (f"{i}.png", b"no image") for i in range(8)]
    write_tar(tmp_path / "a.tar", [m for i in range(8) for m in (members[i], (f"{i}.cls", b"1"))])
    (tmp_path / "classnames.txt").write_text("one\ntwo\n")
    result = evaluate_set(model, EvalSet(name="set", data=["a.tar"]), _settings(tmp_path))
    assert result.ids.tolist() == [1, 3, 5, 7]
    assert result.to_dict()["skipped"] == {"image": 4}
    assert "a.tar: 0: image" in result.to_dict()["skipped_examples"][0]
    assert "a.tar: 0: image" in caplog.text


def test_class_numbers_that_cannot_be_used_are_left_out_up_to_a_share(tmp_path: Path, model) -> None:
    labels = [b"0", b"1", b"", b"one", None, b"2", b"1"]
    members = [(f"{i}.png", picture(i, 32, 32)) for i in range(7)]
    members += [(f"{i}.cls", label) for i, label in enumerate(labels) if label is not None]
    write_tar(tmp_path / "a.tar", sorted(members))
    (tmp_path / "classnames.txt").write_text("one\ntwo\n")
    item, settings = EvalSet(name="set", data=["a.tar"]), _settings(tmp_path)
    result = evaluate_set(model, item, replace(settings, max_bad_share=4 / 7))
    assert (result.ids.tolist(), result.labels.tolist()) == ([0, 1, 6], [0, 1, 1])
    assert result.skipped == {"label_text": 2, "label": 1, "label_range": 1}
    assert len(result.examples) == 3
    assert result.examples[0] == "a.tar: 2: label_text: class number that is not a whole number from 0"
    with pytest.raises(DataError, match="'set': 4 of 7 samples have no usable label for the 2 classes of"):
        evaluate_set(model, item, settings)
    for share in (0.5, 4 / 7):
        assert check("a.tar", tmp_path).usable(share) == (share > 0.5)


@pytest.mark.parametrize("label", ["cls", "class"])
def test_class_numbers_that_count_from_1_are_refused(tmp_path: Path, model, label: str) -> None:
    # Of 100 classes, only the last number is beyond the class names: one percent of the samples.
    members = [(f"{i:03d}.png", picture(i, 8, 8)) for i in range(100)]
    members += [(f"{i:03d}.cls", str(i + 1).encode()) for i in range(100)]
    members += [(f"{i:03d}.json", json.dumps({"class": i + 1}).encode()) for i in range(100)]
    write_tar(tmp_path / "a.tar", sorted(members))
    (tmp_path / "classnames.txt").write_text("".join(f"thing {i}\n" for i in range(100)))
    with pytest.raises(DataError, match="count class numbers from 0, not from 1"):
        evaluate_set(model, EvalSet(name="set", data=["a.tar"], label=label), _settings(tmp_path))
    report = check("a.tar", tmp_path)
    assert report.account.unused["label_shift"] == 100
    assert not report.usable(0.99)


@pytest.mark.parametrize(
    "lines",
    [
        *("0 cat|1 dog", "1: cat|2: dog", "0,cat|1,dog", "id,name|0,cat|1,dog", "01. cat|02. dog", "cat\t0|dog\t1"),
        *("n01440764 tench|n01443537 goldfish", "n01440764|n01443537", "'cat',|'dog',", '["cat", "dog"]'),
        *("[|'cat',|'dog'|]", "{0: 'cat',| 1: 'dog'}", "classes = [|'cat',|'dog'|]"),
    ],
)
def test_class_names_that_hold_more_than_names_are_refused(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "classnames.txt"
    path.write_text(lines.replace("|", "\n"))
    with pytest.raises(DataError, match=r"classnames\.txt: .*(each line|line 1 '.*' is code)"):
        read_classnames(path)


@pytest.mark.parametrize(
    "lines",
    [
        *("0|1|2", "1 star|2 stars|3 stars", "707-320|727-200", "1991 Audi|1992 Audi", "rock 'n' roll|\"x\" and y"),
        *("3D printer|4x4", "tench, Tinca tinca|dog", "1st place|2nd place", "a (b)|c"),
    ],
)
def test_numbers_and_quotes_are_part_of_class_names(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "classnames.txt"
    path.write_text(lines.replace("|", "\n"))
    assert read_classnames(path) == lines.split("|")


@pytest.mark.parametrize("line", ["'a photo of a {}.',", "lambda c: f'a photo of {c}.',", '["a {}", "the {}"]'])
def test_templates_that_are_code_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"t\.txt: line 1 '.*' is code"):
        read_templates(tmp_path / "t.txt")


def _folders(folder: Path) -> Path:
    for number, name in enumerate(["blue_dog", "ant", "cat"]):
        (folder / name / "more").mkdir(parents=True)
        for i in range(3):
            place = folder / name / "more" if i == 2 else folder / name
            (place / f"{i}.PNG").write_bytes(picture(10 * number + i, 40, 50))
        (folder / name / "notes.txt").write_text("no image")
    return folder


def test_class_folders_are_a_set(tmp_path: Path, model, tokenizer) -> None:
    from torchvision.datasets import ImageFolder

    folder = _folders(tmp_path / "pictures")
    item = EvalSet(name="pictures", data=["pictures"])
    result = evaluate_set(model, item, _settings(tmp_path))
    reference = ImageFolder(str(folder))
    assert result.labels.tolist() == [label for _, label in reference.samples]
    assert result.pins["classnames"] == hash_json(["ant", "blue dog", "cat"])
    encoder = Encoder(model, Preprocess(MEAN, STD))
    transform = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    weights = classifier(encoder, ["ant", "blue dog", "cat"], ["a photo of {c}"], tokenizer)
    with encoder.frozen():
        features = model.encode_image(torch.stack([transform(image) for image, _ in reference]))
    assert result.predictions.tolist() == (features @ weights).argmax(dim=1).tolist()
    (folder / "classnames.txt").write_text("insect\ndog\nfeline\n")
    named = evaluate_set(model, item, _settings(tmp_path))
    assert named.pins["classnames"] != result.pins["classnames"]
    assert named.pins["data"] == result.pins["data"]
    (folder / "cat" / "0.PNG").write_bytes(b"broken")
    broken = evaluate_set(model, item, _settings(tmp_path))
    assert broken.n == 8
    assert broken.skipped == {"image": 1}
    assert "cat/0.PNG" in broken.examples[0]
    assert broken.pins["data"] != result.pins["data"]


@pytest.mark.parametrize("workers", [0, 2])
def test_class_folders_with_workers(tmp_path: Path, model, workers: int) -> None:
    _folders(tmp_path / "pictures")
    settings = EvalSettings(Preprocess(MEAN, STD), base=tmp_path, batch=2, workers=workers)
    result = evaluate_set(model, EvalSet(name="pictures", data=["pictures"]), settings)
    assert result.ids.tolist() == list(range(9))


def test_messages_name_file_and_value(tmp_path: Path, model) -> None:
    item = _set(tmp_path / "data")
    settings = _settings(tmp_path)
    names = tmp_path / "data" / "classnames.txt"
    names.write_text("one\ntwo\n\n")
    wrong = r"18 of 26 samples have no usable label for the 2 classes of .*data/classnames\.txt, more than .* 0.01 .*: "
    with pytest.raises(DataError, match=wrong + r".*beyond classnames.txt: 18; such as 000000.tar: 000000002: label_r"):
        evaluate_set(model, item, settings)
    names.write_text("one\n\nthree\n")
    with pytest.raises(DataError, match=r"classnames\.txt: line 2 is empty"):
        read_classnames(names)
    names.write_text("\n")
    with pytest.raises(DataError, match=r"classnames\.txt: is empty"):
        read_classnames(names)
    names.unlink()
    os.mkfifo(names)
    with pytest.raises(DataError, match=r"classnames\.txt: cannot be read: it is not a plain file"):
        read_classnames(names)
    names.unlink()
    with pytest.raises(
        DataError, match=r"'things': there is no classnames\.txt in .*data/test nor in .*data; name one"
    ):
        evaluate_set(model, item, settings)
    templates = tmp_path / "t.txt"
    templates.write_text("a {c}\na photo\n")
    with pytest.raises(DataError, match=r"t\.txt: line 2 'a photo' has no place"):
        read_templates(templates)
    with pytest.raises(DataError, match=r"class names .*gone\.txt: cannot be read: No such file"):
        evaluate_set(model, EvalSet(name="x", data=["data/test"], classnames="gone.txt"), settings)
    with pytest.raises(DataError, match="nowhere"):
        evaluate_set(model, EvalSet(name="x", data=["nowhere"]), settings)


def test_class_folders_that_cannot_be_used(tmp_path: Path, model) -> None:
    folder = _folders(tmp_path / "pictures")
    with pytest.raises(DataError, match="'find': class folders .*pictures have no captions"):
        evaluate_set(model, EvalSet(name="find", task="retrieval", data=["pictures"]), _settings(tmp_path))
    (folder / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"classnames\.txt: 2 for the 3 folders"):
        evaluate_set(model, EvalSet(name="set", data=["pictures"]), _settings(tmp_path))
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="class folder .*empty has no image"):
        evaluate_set(model, EvalSet(name="set", data=["pictures"]), _settings(tmp_path))


def test_captions_of_evaluation_and_validation_are_those_of_the_recipes_columns(tmp_path: Path) -> None:
    members = [(f"{n}.png", picture(n, 8, 8)) for n in range(3)]
    members += [(f"{n}.json", json.dumps({"caption": "theirs", "mine": [f"mine {n}", "x"]}).encode()) for n in range(3)]
    write_tar(tmp_path / "s.tar", sorted(members))
    recipe = recipe_of("data.caption_columns=[mine]", "evaluation.validation=[s.tar]")
    held_out = open_held_out(recipe, tmp_path)
    assert held_out.counts == {2: 3}
    item = EvalSet(name="texts", task="retrieval", data=["s.tar"])
    for columns, expected in ((("mine",), ["mine 0", "x"]), ((), ["theirs"])):
        task = open_set(item, replace(_settings(tmp_path), columns=columns))
        assert task.data.samples.read(0).captions == expected
    own = item.model_copy(update={"caption_columns": []})
    found = [open_set(each, replace(_settings(tmp_path), columns=["mine"])) for each in (item, own)]
    assert found[1].data.samples.read(0).captions == ["theirs"], "the set's own come first"
    assert found[0].pins() != found[1].pins(), "other captions are another set"
    with pytest.raises(DataError, match=r"'texts': no image has a caption in the fields no of the \.json files"):
        open_set(item, replace(_settings(tmp_path), columns=["no"]))
    assert Scorer(recipe, tmp_path).settings.columns == ["mine"]


def test_all_indexes_of_a_recipe_are_in_its_folder(tmp_path: Path) -> None:
    make_shards(tmp_path / "data", n=4, shards=1)
    recipe = recipe_of("data.index_dir=ours", "evaluation.validation=[data]")
    settings = Scorer(recipe, tmp_path).settings
    for opened in (open_held_out(recipe, tmp_path), open_index("data", tmp_path, settings.index_dir)):
        assert len(opened) == 4
    assert len(list((tmp_path / "ours").iterdir())) == 2
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["000000.tar"]
    assert settings.max_bad_share == recipe.data.max_bad_share
