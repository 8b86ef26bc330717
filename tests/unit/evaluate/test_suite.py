"""Suites: what is missing or broken, averages, differences, files, and the same numbers as clip_benchmark."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from compt.cli.main import app
from compt.errors import ArtefactError, ConfigError, DataError, RunError
from compt.evaluate import suite as suites
from compt.evaluate.multilabel import average_precision
from compt.evaluate.retrieval import Retrieval
from compt.evaluate.sets import evaluate_set
from compt.evaluate.stats import paired_bootstrap
from compt.evaluate.suite import is_missing, model_labels
from compt.evaluate.task import EvalSettings
from compt.evaluate.zeroshot import ZeroShotResult
from compt.files import hash_json
from compt.models.clip import build
from compt.models.preprocess import Preprocess
from compt.recipe.read import shipped
from compt.recipe.schema import EvalSet
from compt.recipe.suite import load_suite, name_of
from compt.report.scores import SuiteReport
from compt.weights.artefact import Artefact, write_artefact
from tests.helpers.optional import optional
from tests.helpers.shards import make_shards, picture
from tests.unit.evaluate.test_sets import MEAN, SPEC, STD

PAPER_AVERAGES = [
    *(25.61, 28.84, 28.61, 30.08, 29.89, 30.39, 30.78, 28.72, 30.55, 31.35, 31.17, 32.53, 31.80, 32.68),
    *(35.35, 34.97, 35.22, 36.98, 36.89, 38.90, 38.89),
]
"""The last line of the paper's Table I, in the order of `published` in vtab+.yaml."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and sets in clip_benchmark's layout."""
    base = tmp_path_factory.mktemp("suite")
    for seed in range(2):
        write_artefact(
            base / "run" / "jobs" / f"{seed}-tiny" / "model",
            build(SPEC, seed=seed).state_dict(),
            SPEC,
            {},
            preprocess=Preprocess(MEAN, STD),
        )
    for name, classes in (("one", 3), ("two", 5)):
        place = base / "eval" / f"wds_{name}"
        make_shards(place / "test", n=24, shards=2, classes=classes)
        (place / "classnames.txt").write_text("".join(f"{name} {at}\n" for at in range(classes)))
        (place / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    make_shards(base / "eval" / "bare" / "test", n=4, classes=2)
    (base / "mine.yaml").write_text(
        f"""
root: {base}/eval
hub: clip-benchmark/wds_{{name}}
published: [theirs, others]
sets:
  - {{name: one, title: First, images: 24, classes: 3, metric: mean_per_class, published: [50, 60]}}
  - {{name: two, images: 25, templates_sha256: '{hash_json(["a photo of {c}"])[:8]}', published: [20, 30]}}
  - {{name: find, task: retrieval, data: wds_one/test/*.tar}}
  - {{name: gone, classnames_sha256: abc, published: [1, 2]}}
  - {{name: bare, data: bare/test/*.tar}}
"""
    )
    return base


def evaluate(folder: Path, *words: str, models: int = 2) -> str:
    names = [str(folder / "run" / "jobs" / f"{seed}-tiny" / "model") for seed in range(models)]
    command = ["eval", *names, "--suite", str(folder / "mine.yaml"), *words]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert isinstance(done.exception, DataError), done.output
    assert (
        "2 scores are missing: evaluation set 'bare': there is no classnames.txt" in str(done.exception) or models == 1
    )
    return done.output


def test_the_shipped_suites() -> None:
    assert {"vtab+", "imagenet", "retrieval", "recipes", "demo"} == set(shipped("suites"))
    vtab = load_suite("vtab+")
    scored = [item for item in vtab.sets if item.published]
    assert len(scored) == 35
    assert {item.task for item in scored} == {"zeroshot"}
    averages = np.mean([item.published for item in scored], axis=0)
    assert np.abs(averages - PAPER_AVERAGES).max() < 0.0051  # two digits
    assert all(item.hub == f"clip-benchmark/wds_{item.name}" for item in vtab.sets)
    assert vtab.sets[6].data == ["wds_vtab-cifar10/test/*.tar"]


def test_class_names_and_templates_are_clip_benchmarks() -> None:
    package = Path(optional("clip_benchmark", "interop").__file__ or "").parent / "datasets"
    names, templates = (
        json.loads((package / f"en_{kind}.json").read_text())
        for kind in ("classnames", "zeroshot_classification_templates")
    )
    same = {"imagenetv2": "imagenet1k", "imagenet_sketch": "imagenet1k", "caltech101": "caltech101_vtab"}
    pinned = 0
    for item in load_suite("vtab+").sets:
        short = item.name.removeprefix("vtab-")
        if item.classnames_sha256:
            listed = [name.strip() for name in names[same.get(short, short)]]
            assert hash_json(listed).startswith(item.classnames_sha256), item.name
            assert len(listed) == item.classes, item.name
            pinned += 1
        used = templates.get(short, templates["imagenet1k"])
        assert hash_json([template.strip() for template in used]).startswith(item.templates_sha256 or "-"), item.name
    assert pinned == 18


def test_a_table_of_models_and_sets(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = evaluate(folder, "--out", str(out), "--published", "others")
    scores = json.loads((out / "mine.json").read_text())
    top1 = {m: [scores["scores"][m][name]["top1"] for name in ("one", "two")] for m in ("0-tiny", "1-tiny")}
    table = text.split("Further metrics")[0].splitlines()
    lines = {cells[0]: cells[1:] for line in table if len(cells := re.split("  +", line.strip())) > 1}
    assert lines["First"] == [f"{top1[m][0]:.2f}" for m in top1] + ["60.00"]
    assert lines["gone"] == ["missing", "missing", "2.00"]
    assert lines["bare"] == ["fault", "fault"]
    # Only sets that both models have a score of; published scores too.
    assert lines["Average of 2 of 4"] == [f"{np.mean(top1[m]):.2f}" for m in top1] + ["45.00"]
    assert scores["averaged"] == ["one", "two"]
    assert scores["average"] == {m: pytest.approx(np.mean(top1[m])) for m in top1}
    flat = " ".join(text.split())
    assert f"Missing in {folder}/eval: 1 of 5 sets (gone): compt eval fetch {folder}/mine.yaml {folder}/eval" in flat
    assert "two: 24 of 25 images." in flat
    assert "First: 24" not in flat
    assert max(map(len, text.split("Scores on")[1].splitlines())) <= 80
    first = scores["scores"]["0-tiny"]["one"]
    assert re.search(rf"First, mean per class +{first['mean_per_class']:.2f} ", text)
    arrays = [np.load(out / m / "one.npz")["correct"] for m in top1]
    gain, low, high = paired_bootstrap(arrays[1], arrays[0])
    assert f"{gain:+.2f}  {low:+.2f} to {high:+.2f}" in text
    rows = list(csv.DictReader((out / "mine.csv").open()))
    assert {(row["set"], row["model"], row["metric"]): row["value"] for row in rows}["one", "1-tiny", "top1"] == str(
        top1["1-tiny"][0]
    )
    assert [row["value"] for row in rows if row["metric"] == "missing"] == ["", ""]
    page, markdown = (out / "mine.html").read_text(), (out / "mine.md").read_text()
    assert '<th scope="row">First</th>' in page
    assert "| First |" in markdown


def test_scores_on_disk_are_kept_while_nothing_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(folder, "--out", str(tmp_path), models=1)
    real, scored = evaluate_set, list[str]()

    def count(model: torch.nn.Module, item: EvalSet, settings: EvalSettings) -> object:
        scored.append(item.name)
        return real(model, item, settings)

    monkeypatch.setattr(suites, "evaluate_set", count)
    before = json.loads((tmp_path / "mine.json").read_text())["scores"]
    evaluate(folder, "--out", str(tmp_path), models=1)
    assert scored == ["bare"]
    assert json.loads((tmp_path / "mine.json").read_text())["scores"] == before
    templates = folder / "eval" / "wds_two" / "zeroshot_classification_templates.txt"
    kept = templates.read_text()
    templates.write_text("another {c}\n")
    text = evaluate(folder, "--out", str(tmp_path), models=1)
    templates.write_text(kept)
    assert scored == ["bare", "two", "bare"]
    assert "two: 24 of 25 images, other templates than clip_benchmark's." in " ".join(text.split())
    evaluate(folder, "--out", str(tmp_path), "--precision", "bf16", models=1)
    assert scored[3:] == ["one", "two", "find", "bare"]


def test_one_set_writes_what_a_suite_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, data = tmp_path / "out", str(folder / "eval/wds_one/test/*.tar")
    for model in ("0-tiny", "1-tiny"):
        words = ["eval", str(folder / "run/jobs" / model), "--data", data, "--out", str(out)]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        record = json.loads((out / model / "wds_one.json").read_text())
        assert re.search(rf"top1 +{record['top1']:.2f}", done.output)
        assert json.loads((out / "wds_one.json").read_text())["scores"][model]["wds_one"]["top1"] == record["top1"]
    assert {path.name for path in out.glob("*/*.npz")} == {"wds_one.npz"}
    assert len(list(out.glob("*/*.npz"))) == 2, "the second model replaced the answers of the first one"
    assert {path.suffix for path in out.iterdir() if path.is_file()} == {".json", ".csv", ".md", ".html"}
    # Where nothing can be written, no model is scored; and what was scored is shown before it is written.
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(suites, "evaluate_set", lambda *_: pytest.fail("scored"))
    done = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "file")])
    assert isinstance(done.exception, RunError), done.output
    monkeypatch.undo()
    monkeypatch.setattr(SuiteReport, "write", lambda *_: (_ for _ in ()).throw(RunError("the disk is full")))
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, RunError)
    assert f"{record['top1']:.2f}" in done.output
    monkeypatch.undo()
    monkeypatch.setattr(ZeroShotResult, "save", lambda *_: (_ for _ in ()).throw(RunError("the disk is full")))
    done = CliRunner().invoke(app, [*words, "--precision", "bf16"])
    assert isinstance(done.exception, RunError)
    assert re.search(r"1-tiny: wds_one: top1 \d+\.\d\d", done.output)


def test_one_folder_for_two_suites_loses_no_scores(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, sets in (
        ("first", "{name: one, data: wds_one/test/*.tar}"),
        ("second", "{name: one, data: wds_one/test/*.tar}, {name: two, data: wds_two/test/*.tar}"),
    ):
        (tmp_path / f"{name}.yaml").write_text(f"root: {folder}/eval\nsets: [{sets}]\n")
        words = ["eval", str(folder / "run/jobs/0-tiny"), "--suite", str(tmp_path / f"{name}.yaml"), "--out", str(out)]
        assert CliRunner().invoke(app, words).exit_code == 0
    assert {path.name for path in out.glob("*.csv")} == {"first.csv", "second.csv"}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # Another set of that name, in another suite of that name too.
    (tmp_path / "first.yaml").write_text(f"root: {folder}/eval\nsets: [{{name: one, data: wds_two/test/*.tar}}]\n")
    words[3] = str(tmp_path / "first.yaml")
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError)
    assert "first.json has scores of another set 'one', of wds_one/test/*.tar; name another folder" in str(
        done.exception
    )
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_several_models_on_one_set(folder: Path) -> None:
    models = [str(folder / "run" / "jobs" / f"{seed}-tiny" / "model") for seed in range(2)]
    done = CliRunner().invoke(app, ["eval", *models, "--data", str(folder / "eval" / "wds_one" / "test" / "*.tar")])
    assert done.exit_code == 0, done.output
    assert "1-tiny minus 0-tiny" in done.output
    assert "Average" not in done.output


def test_a_model_that_is_not_there_ends_before_anything_is_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "score_suite", lambda *_: pytest.fail("scored before every model was found"))
    command = ["eval", str(folder / "run" / "jobs" / "0-tiny"), str(folder / "typo"), "--suite"]
    done = CliRunner().invoke(app, [*command, str(folder / "mine.yaml")])
    assert isinstance(done.exception, ArtefactError), done.output
    assert f"{folder / 'typo'}: no such model" in str(done.exception)


@pytest.mark.parametrize("opens", [False, True], ids=["digest", "weights"])
def test_a_damaged_model_leaves_the_scores_of_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    """Its fault is found after the first model was scored: when its digest is compared, or when weights are read."""
    jobs = folder / "run" / "jobs"
    shutil.copytree(jobs / "1-tiny", tmp_path / "bad")
    [weights] = (tmp_path / "bad" / "model").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (tmp_path / "s.yaml").write_text(f"root: {folder}/eval\nsets: [{{name: one, data: wds_one/test/*.tar}}]\n")
    if opens:

        def load(artefact: Artefact, device: object) -> object:
            if artefact.path.parent.name == "bad":
                raise ArtefactError("weights.bin: cannot be read")
            return real(artefact)

        real = Artefact.load_model
        monkeypatch.setattr(Artefact, "load_model", load)
        shutil.copytree(jobs / "1-tiny", tmp_path / "bad", dirs_exist_ok=True)
    words = ["eval", str(jobs / "0-tiny"), str(tmp_path / "bad"), "--suite", str(tmp_path / "s.yaml")]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")], env={"COLUMNS": "80"})
    assert isinstance(done.exception, DataError), done.output
    assert "1 scores are missing" in str(done.exception)
    assert ("cannot be read" if opens else str(weights)) in str(done.exception)
    assert re.search(r"^one +\d+\.\d\d +fault", done.output, re.MULTILINE), done.output
    assert (tmp_path / "out" / "s.csv").is_file()


def test_names_of_models() -> None:
    assert model_labels(["runs/demo/jobs/3-vit_mini/model", "ViT-B-32:openai"]) == ["3-vit_mini", "ViT-B-32:openai"]
    assert model_labels(["a/jobs/1-x/model", "b/jobs/1-x/model/"]) == ["a/1-x", "b/1-x"]
    for twice in ("a/b", "a/b/model", "./a/b/"):
        with pytest.raises(ConfigError, match=f"{twice}: is named twice"):
            model_labels(["a/b", twice])
    assert model_labels(["."]) == [Path.cwd().name]
    assert model_labels(["x/.."]) == [Path.cwd().name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sets: []", "sets: should not be empty"),
        ("sets: [{name: a}]", "sets.0.data: is missing"),
        ("sets: [{name: a, data: x, size: 3}]", "sets.0.size = 3: unknown key"),
        ("sets: [{name: a, data: x}, {name: a, data: y}]", "two sets have the name 'a'"),
        (
            "published: [a]\nsets: [{name: a, data: x, published: [1, 2]}]",
            "has 2 published scores, but `published` names 1",
        ),
        ("sets: [{name: a, data: x, task: guess}]", "'multilabel'"),
        ("- a", "should be a section with the keys root, hub, published, sets"),
    ],
)
def test_a_wrong_suite_is_one_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_suite(tmp_path / "suite.yaml")
    assert str(caught.value).startswith(str(tmp_path / "suite.yaml"))
    assert said in str(caught.value)


def test_what_the_command_refuses(folder: Path) -> None:
    for words, said in (
        (["--suite", "vtabb"], "no such file, and no suite of that name (did you mean 'vtab+'?)"),
        ([], "name one of --data and --suite"),
        (["--suite", "demo", "--data", "x"], "name one of --data and --suite"),
        (["--suite", "vtab+", "--published", "vit_s16-cc3"], "no such model"),
        (["--suite", "demo", "--classnames", "x"], "--classnames goes with --data"),
        (["--data", "x", "--train", "y"], "--train is for linear_probe, knn, not for zeroshot: see --task"),
        (
            ["--data", "x", "--task", "retrieval", "--templates", "y"],
            "--templates is for zeroshot, multilabel, not for",
        ),
        (["--data", "x", "--task", "retrieval", "--label", "y"], "--label is for zeroshot"),
        (["--data", "x", "--task", "knn", "--per-class", "b"], "--per-class is for one model"),
        (["--data", "x", "--task", "retrieval", "--per-class"], "--per-class is for one model"),
    ):
        done = CliRunner().invoke(app, ["eval", "model", *words])
        assert isinstance(done.exception, ConfigError), done.output
        assert said in str(done.exception)


def test_missing_sets(tmp_path: Path) -> None:
    def missing(data: str) -> bool:
        return is_missing(load_one(tmp_path, data), tmp_path)

    make_shards(tmp_path / "there", n=2, shards=1)
    assert not missing("there/*.tar")
    assert not missing("there/{000000..000003}.tar")
    assert not missing("there")
    assert not missing("s3://bucket/there/*.tar")
    assert missing("gone/*.tar")
    assert missing("gone/{000000..000003}.tar")


def load_one(folder: Path, data: str) -> suites.SuiteSet:
    (folder / "one.yaml").write_text(json.dumps({"sets": [{"name": "one", "data": data}]}))
    return load_suite(folder / "one.yaml").sets[0]


def test_average_precision_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 50).astype(np.float32), rng.random(50) < 0.3
    order = sorted(range(50), key=lambda at: (-scores[at], at))
    hits, found = 0, []
    for place, at in enumerate(order, 1):
        if labels[at]:
            hits += 1
            found.append(hits / place)
    assert average_precision(scores, labels) == pytest.approx(np.mean(found))
    assert average_precision(scores, np.zeros(50, dtype=bool)) == 0


def test_captions_of_an_image_are_one_answer() -> None:
    arrays = {
        "ids": np.array([2, 5, 9]),
        "owners": np.array([2, 2, 2, 5, 9, 9]),
        "text_ranks": np.array([0, 0, 3, 0, 1, 2]),
        "image_ranks": np.array([0, 1, 0]),
    }
    by_image, by_text = Retrieval.answers(arrays)
    assert by_image.tolist() == [1, 0, 1]
    assert by_text.tolist() == [2 * 3 / 6, 1 * 3 / 6, 0]
    assert by_text.mean() == pytest.approx(3 / 6)


def spread_out() -> dict[str, torch.Tensor]:
    """Random weights with which images get different classes: those of a new model all get the same."""
    state = build(SPEC, seed=3).state_dict()
    return {
        name: value * (60 if name in ("visual.conv1.weight", "token_embedding.weight") else 1)
        for name, value in state.items()
    }


def test_clip_benchmarks_own_sets_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets that its exporter wrote, scored by its code on our export, and by ours on the model folder."""
    optional("clip_benchmark", "interop")
    from clip_benchmark import cli, webdataset_builder
    from clip_benchmark.metrics import zeroshot_classification

    # clip_benchmark 1.6.2 calls float() on an array of one number, which numpy 2.4 no longer allows.
    def accuracy(output: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...]) -> list[float]:
        hits = output.topk(max(topk), 1, True, True)[1].t().eq(target.view(1, -1))
        return [float(hits[:k].reshape(-1).float().sum()) / len(target) for k in topk]

    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(  # it starts eight processes
        torch.utils.data, "DataLoader", lambda data, **rest: loader(data, **(rest | {"num_workers": 0}))
    )
    to_bytes = webdataset_builder.PIL_to_bytes("webp")
    rng = np.random.default_rng(0)

    class Images(list):  # type: ignore[type-arg]
        classes = tuple(f"thing {at}" for at in range(6))
        templates = ("a photo of {c}.", "art of the {c}")

    images = [Image.open(io.BytesIO(picture(at, 40, 36))) for at in range(30)]
    single = Images((each, at % 6) for at, each in enumerate(images))
    several = Images((each, torch.tensor(rng.integers(0, 2, 6))) for each in images)
    # No two captions are alike: here a tie counts against the model, there the first caption wins.
    captioned = [(each, [f"number {at}", f"again {at}"]) for at, each in enumerate(images)]
    kinds = {"single": single, "several": several}
    for name, data in kinds.items():
        out = str(tmp_path / f"wds_{name}")
        webdataset_builder.convert_dataset(
            data, "test", out, transform=to_bytes, max_count=12, multilabel=name == "several", verbose=False
        )
    webdataset_builder.convert_retrieval_dataset(
        captioned, "test", str(tmp_path / "wds_flickr30k"), transform=to_bytes, max_count=12, verbose=False
    )
    (tmp_path / "suite.yaml").write_text(
        f"root: {tmp_path}\nhub: owner/wds_{{name}}\nsets: [{{name: single, classes: 6}}, "
        "{name: several, task: multilabel, classes: 6}, {name: flickr30k, task: retrieval}]"
    )
    model, exported = tmp_path / "tiny", tmp_path / "exported"
    write_artefact(model, spread_out(), SPEC, {}, preprocess=Preprocess(MEAN, STD))
    for words in (
        ["export", model, exported],
        ["eval", model, "--suite", tmp_path / "suite.yaml", "--out", tmp_path / "out"],
    ):
        done = CliRunner().invoke(app, [*map(str, words)])
        assert done.exit_code == 0, done.output
    ours = json.loads((tmp_path / "out" / "suite.json").read_text())["scores"]["tiny"]

    output = str(tmp_path / "{dataset}.json")
    words = ["--dataset", "wds/single", "wds/several", "wds/flickr30k", "--dataset_root", f"{tmp_path}/wds_{{dataset}}"]
    words += ["--model", f"local-dir:{exported}", "--pretrained", "", "--no_amp", "--recall_k", "1", "5"]
    words += ["--num_workers", "0", "--batch_size", "10", "--output", output]
    monkeypatch.setattr("sys.argv", ["clip_benchmark", "eval", *words])
    cli.main()
    theirs = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
        for name in ("single", "several", "flickr30k")
    }
    assert ours["single"]["top1"] / 100 == pytest.approx(theirs["single"]["acc1"], abs=1e-9)
    assert ours["single"]["top5"] / 100 == pytest.approx(theirs["single"]["acc5"], abs=1e-9)
    assert ours["single"]["mean_per_class"] / 100 == pytest.approx(theirs["single"]["mean_per_class_recall"], abs=1e-9)
    found = theirs["several"]["mean_average_precision"]
    assert ours["several"]["mean_average_precision"] / 100 == pytest.approx(found, abs=1e-6)  # theirs in fp32
    for k in (1, 5):
        for ours_by, theirs_by in (("image_to_text", "text"), ("text_to_image", "image")):
            value = ours["flickr30k"][f"{ours_by}_r{k}"] / 100
            assert value == pytest.approx(theirs["flickr30k"][f"{theirs_by}_retrieval_recall@{k}"], abs=1e-6)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("wds_cars/test/*.tar", "wds_cars"),
        ("my data/*.tar", "my-data"),
        ("donn\u00e9es/*.tar", "donn-es"),
        ("a[b]{c}/x.tar", "a-b-c"),
        ("/", "set"),
    ],
)
def test_a_set_without_a_name_has_that_of_its_folder(data: str, name: str) -> None:
    assert EvalSet(name=name_of(data), data=data).name == name
