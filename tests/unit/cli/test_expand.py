"""`compt expand`: what it shows, what it writes, what it refuses before it does anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compt.cli.expand import command as expand_command
from compt.cli.expand.request import read_bytes, read_sizes, student_spec
from compt.cli.main import app, main
from compt.errors import ArtefactError, ComptError, ConfigError, DataError
from compt.expand.plan import ExpansionPlan, make_plan
from compt.export.write import export_model
from compt.models.clip import build
from compt.models.growth import ExpandConfig
from compt.models.preprocess import Preprocess
from compt.models.presets import PRESETS, ModelSpec, is_own_swin, resolve
from compt.weights.artefact import read_artefact, write_artefact
from tests.helpers.shards import WORDS, make_shards
from tests.helpers.states import export_state

TINY = {"width": 16, "text_width": 16, "head_width": 8, "text_head_width": 8, "context_length": 16, "embed_dim": 24}
TEACHER = replace(resolve("vit_pico", TINY), name="small")
PREPROCESS = Preprocess(std=(0.2, 0.3, 0.4), interpolation="bilinear", resize_mode="squash")
GROWN = ("--set", "width=32", "--set", "text_width=24", "--set", "embed_dim=24", "--set", "depth=4")


def write_teacher(folder: Path, spec: ModelSpec = TEACHER, **other: Any) -> Path:
    write_artefact(folder, export_state(build(spec, seed=1)), spec, {}, **other)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "model", preprocess=PREPROCESS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder, n=14, shards=2, captions=2, classes=7)
    (folder / "classnames.txt").write_text("\n".join(WORDS[:7]))
    return folder


def run(*words: object, columns: int = 120) -> str:
    """The output of a successful command."""
    result = CliRunner().invoke(app, ["expand", *map(str, words)], env={"COLUMNS": str(columns)})
    if result.exception is not None:
        raise result.exception
    return result.output


def refused(*words: object) -> ComptError:
    with pytest.raises(ComptError) as caught:
        run(*words)
    return caught.value


def plan() -> ExpansionPlan:
    """Of `small` to `vit_pico` with `GROWN`."""
    heads = {"head_width": 8, "text_head_width": 8}
    sizes = {"width": 32, "text_width": 24, "embed_dim": 24, "depth": 4}
    return make_plan(TEACHER, resolve("vit_pico", {**heads, **sizes}))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is shown


def shown_parameters(output: str) -> Iterator[tuple[str, list[str]]]:
    """The names of parameters in the tables and the words behind them."""
    prefix = layer = ""
    for line in output.splitlines():
        if re.match(r"(Image|Text) tower, .*: .*\*$", line) or line in (
            "Both towers",
            "Text tower, outside its layers",
        ):
            prefix, layer = line.partition(": ")[2].removesuffix("*"), ""
        elif re.match(r"layer \d+ ", line):
            layer = re.findall(r"\d+", line)[0] + "."
        elif re.match(r" {0,2}[a-z]\S+ +.*(%|-)$", line.rstrip()) and not line.startswith(("all ", "part ")):
            name, *words = line.replace(" %", "%").split()
            yield f"{prefix}{layer if line.startswith('  ') else ''}{name}", words


@pytest.mark.parametrize("columns", [80, 120])
def test_a_dry_run_shows_every_parameter(teacher: Path, columns: int) -> None:
    output = run(teacher, "vit_pico", "--dry-run", *GROWN, columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    shown = dict(shown_parameters(output))
    wanted = {entry.name: entry for entry in plan().entries}
    assert set(shown) == set(wanted)
    conv, out = "visual.conv1.weight", "visual.transformer.resblocks.3.mlp.c_proj.weight"
    assert shown[conv][:9] == ["16→32", "×", "3", "×", "8", "×", "8:", "insert", "res"]
    assert shown[conv][-3:] == ["50.0%", "50.0%", "-"]
    assert shown[out][:4] == ["16→32", "×", "64→128:", "insert"]
    assert shown[out][-3:] == ["25.0%", "75.0%", "-"]
    assert re.search(r"layer 3 +from 1, added;", output)
    assert re.search(r"layer 2 +from 1;", output)
    assert re.search(r"layer 1 +from 0, added;", output)
    totals = plan().totals
    total = f"{100 * totals['copied'] / totals['parameters']:.1f} %"
    assert re.search(rf"all +\S+ [kM] +{total}", output)


def test_a_dry_run_names_operators_and_promises(teacher: Path) -> None:
    output = run(teacher, "vit_pico", "--dry-run", *GROWN, "--both", "zero_new_outputs=true", "--text", "width=lemon")
    assert re.search(
        r"Image tower: width insert, depth duplicate, outputs of new layers zero; text tower: width lemon,", output
    )
    assert "The text tower keeps its function (in float64 to 1e-10)." in output
    assert re.search(r"The image tower changes its function: visual\.\S+: ", output)
    closing = [words for name, words in shown_parameters(output) if name.endswith("3.mlp.c_proj.weight")]
    assert closing == [["32", "×", "128:", "zero", "-", "-", "100%"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_promise_of_half_precision_says_so(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in export_state(build(TEACHER, seed=1)).items()}
    write_artefact(tmp_path / "model", weights, TEACHER, {})
    output = run(tmp_path / "model", "vit_pico", "--dry-run", *GROWN, "--text", "width=lemon", columns=200)
    promise = "The text tower keeps its function (in float64 to 1e-10)"
    rounding = "" if dtype.itemsize > 4 else f", up to rounding to {str(dtype)[6:]}, in which it is stored"
    assert f"{promise}{rounding}.\n" in output


def test_weights_that_are_not_finite_are_counted_and_nothing_is_written(tmp_path: Path) -> None:
    weights = export_state(build(TEACHER, seed=1))
    weights["visual.proj"][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    write_artefact(tmp_path / "model", weights, TEACHER, {})
    message = f"teacher parameter visual.proj: 3 of {weights['visual.proj'].numel():,} numbers are NaN or infinite"
    with pytest.raises(ArtefactError, match=re.escape(message)):
        run(tmp_path / "model", "vit_pico", tmp_path / "out", *GROWN)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_share_that_is_not_everything_is_not_said_to_be() -> None:
    from compt.cli.expand.tables import _share

    assert [_share(n, 10**6) for n in (0, 1, 500_000, 999_999, 10**6)] == ["-", "0.1 %", "50.0 %", "99.9 %", "100 %"]


def test_json_has_everything(teacher: Path, tmp_path: Path) -> None:
    words = (teacher, "vit_pico", "--dry-run", *GROWN, "--seed", 7, "--json", "--out-json", tmp_path / "plan.json")
    found = json.loads(run(*words))
    table = plan().table_json()
    assert {key: found[key] for key in table} == json.loads(json.dumps(table))
    assert len(found["parameters"]) == len(plan().entries)
    assert found["seed"] == 7
    assert found["parent_hash"] == read_artefact(teacher).hash
    assert found["taken_over"] == {"head_width": 8, "text_head_width": 8}
    assert found["out"] is None
    assert found["verification"] is None
    assert json.loads((tmp_path / "plan.json").read_text()) == found


def test_swin_stages_have_tables_of_their_own(tmp_path: Path) -> None:
    sizes = {"width": 16, "head_width": 8, "image_size": 32, "patch_size": 2, "window": 2, "embed_dim": 24}
    small = replace(resolve("swin_t", {**TINY, **sizes, "depths": (1, 2), "text_depth": 1}), name="small_swin")
    write_teacher(tmp_path / "swin", small)
    output = run(tmp_path / "swin", "small_swin", "--dry-run", "--set", "width=32", "--set", "depths=1-4", columns=80)
    assert max(map(len, output.splitlines())) <= 80
    assert "Image tower, stage 0: visual.trunk.layers.0.blocks.*" in output
    assert "Image tower, stage 1: visual.trunk.layers.1.blocks.*" in output
    assert re.search(r"layer 2 +from 0, added;", output)
    assert "trunk.layers.1.downsample.reduction.weight" in output
    assert "attn.relative_position_bias_table" in output


# What is written


def test_the_manifest_repeats_the_same_bytes(teacher: Path, tmp_path: Path) -> None:
    words = ("--both", "width=lemon,depth=stack,noise=0.2", "--seed", 5, "--shard-size", "300kB")
    output = run(teacher, "vit_pico", tmp_path / "first", *GROWN, *words)
    assert f"Wrote {tmp_path / 'first'}" in output
    first = read_artefact(tmp_path / "first")
    assert first.manifest["seed"] == 5
    assert first.manifest["parent_hash"] == read_artefact(teacher).hash
    assert first.preprocess == PREPROCESS
    assert len(content(tmp_path / "first")) > 4
    assert ExpansionPlan.from_json(first.manifest["expansion"]).config == ExpandConfig.both("lemon", "stack", noise=0.2)
    manifest = tmp_path / "first" / "manifest.json"
    run(teacher, tmp_path / "second", "--from-manifest", manifest)
    run(teacher, "vit_pico", tmp_path / "third", "--from-manifest", manifest.parent)
    assert content(tmp_path / "first") == content(tmp_path / "second") == content(tmp_path / "third")


def test_the_manifest_says_what_the_teacher_is(teacher: Path, tmp_path: Path) -> None:
    run(teacher, "vit_pico", tmp_path / "one", *GROWN)
    file = teacher / "open_clip_model.safetensors"
    assert "name the model with --teacher-model" in str(refused(file, "vit_pico", "--dry-run", *GROWN))
    run(file, tmp_path / "two", "--from-manifest", tmp_path / "one")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_manifest_of_a_trained_model_repeats_what_it_was(teacher: Path, tmp_path: Path) -> None:
    run(teacher, "vit_pico", tmp_path / "one", *GROWN)
    one = read_artefact(tmp_path / "one")
    kept = {key: one.manifest[key] for key in ("seed", "parent", "parent_hash", "expansion", "shard_bytes")}
    initial = {**kept, "step": 0, "samples": 0, "epochs": 0.0}
    write_artefact(tmp_path / "initial", one.state, one.spec, initial, preprocess=PREPROCESS)
    trained = {**kept, "initial_hash": one.hash, "step": 9, "samples": 90, "epochs": 1.0, "trained": {}}
    write_artefact(tmp_path / "model", export_state(build(one.spec, seed=8)), one.spec, trained, preprocess=PREPROCESS)
    run(teacher, tmp_path / "again", "--from-manifest", tmp_path / "model")
    assert content(tmp_path / "again") == content(tmp_path / "initial")


def test_other_bytes_than_the_manifest_says_are_an_error(teacher: Path, tmp_path: Path) -> None:
    run(teacher, "vit_pico", tmp_path / "one", *GROWN)
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**manifest, "seed": 1, "versions": {"torch": "1.0"}}))
    before = content(tmp_path / "one")
    for out in ("one", "two"):
        error = refused(teacher, tmp_path / out, "--from-manifest", tmp_path / "other.json")
        assert isinstance(error, ArtefactError)
        assert "its bytes would differ from those in the manifest, which was made with {'torch': '1.0'}" in str(error)
    assert content(tmp_path / "one") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other.json"]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_and_say_it_once(teacher: Path, data: Path, tmp_path: Path) -> None:
    words = [teacher, "vit_pico", tmp_path / "alone", *GROWN, "--shard-size", "200kB"]
    run(*words)
    words[2] = tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "compt", "expand", *map(str, words), "--verify", str(data / "*.tar")]
    # On a busy machine the two may come a minute apart, and take many.
    environment = {**os.environ, "COMPT_CONNECT_SECONDS": "300"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "alone") == content(tmp_path / "two")
    assert done.stdout.count("Wrote ") == done.stdout.count("At step 0") == 1


# Verification


def test_verify_without_out_writes_nothing(teacher: Path, data: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = (teacher, "vit_pico", *GROWN, "--text", "width=lemon", "--batch", 4, "--verify", data / "*.tar")
    output = run(*words, "--out-json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["verification"]
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "found.json"]
    assert "Wrote" not in output
    assert re.search(r"teacher small +\d\.\d{4} +\d+\.\d\d", output)
    assert re.search(r"expanded vit_pico +\d\.\d{4} +\d+\.\d\d", output)
    assert re.search(r"random vit_pico +\d\.\d{4} +\d+\.\d\d", output)
    assert re.search(r"image +not exact +\d\.\de-\d\d +-", output)
    assert re.search(r"text +exact: kept +\d\.\de-\d\d +\d\.\de-1\d", output)
    assert found["kept"] is True
    assert found["samples"] == 14
    assert found["features"]["text"]["float64"] < 1e-10


def test_verify_scores_what_was_written(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = export_state(build(plan().student, seed=8))
    real = expand_command._write

    def write_something_else(prepared: Any) -> None:
        real(prepared)
        write_artefact(prepared.out, other, prepared.plan.student, {})

    monkeypatch.setattr(expand_command, "_write", write_something_else)
    words = ("--both", "width=duplicate", "--verify", data / "*.tar", "--json")
    found = json.loads(run(teacher, "vit_pico", tmp_path / "out", *GROWN, *words))
    assert found["out"] == str(tmp_path / "out")
    again = json.loads(run(teacher, "vit_pico", *GROWN, *words))
    for scores in ("teacher", "random"):
        assert again["verification"]["scores"][scores] == found["verification"]["scores"][scores]
    assert again["verification"]["scores"]["student"] != found["verification"]["scores"]["student"]


def test_a_broken_promise_ends_with_an_exit_code(
    teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ExpansionPlan, "inexact", {"image": (), "text": ("ln_final.weight: for a test",)})
    words = ["expand", str(teacher), "vit_pico", *GROWN, "--verify", str(data / "*.tar")]
    monkeypatch.setattr(sys, "argv", ["compt", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 4
    shown = capsys.readouterr()
    assert "exact: BROKEN" in shown.out
    assert "does not keep its promise: image tower: its features differ by" in shown.err
    assert "text tower" not in shown.err


# The student


OPENAI = replace(
    TEACHER, name="given", quick_gelu=True, no_ln_pre=True, image_size=64, context_length=40, vocab_size=49410
)


def test_a_student_takes_over_what_has_to_agree(tmp_path: Path) -> None:
    write_teacher(tmp_path / "given", OPENAI)
    output = run(tmp_path / "given", "vit_nano", tmp_path / "student")
    taken = "quick_gelu true, no_ln_pre true, head_width 8, text_head_width 8, context_length 40, vocab_size 49410"
    note = f"Taken over from the teacher: {taken}, image_size 64."
    assert note in " ".join(output.split())
    made = read_artefact(tmp_path / "student").spec
    assert (made.quick_gelu, made.no_ln_pre, made.image_size, made.context_length) == (True, True, 64, 40)
    assert (made.width, made.heads, made.text_width, made.text_heads) == (64, 8, 64, 8)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("quick_gelu=false", "its quick_gelu is False, but 'given', which it grows from, has True"),
        ("head_width=32", "its head_width is 32"),
        ("image_size=32", "image_size / patch_size 4 is smaller than the 8 of 'given'"),
        ("context_length=20", "its context_length 20 is smaller than the 40 of 'given'"),
    ],
)
def test_what_is_set_is_not_taken_over(size: str, message: str) -> None:
    spec, taken = student_spec(OPENAI, "vit_nano", [size])
    assert size.partition("=")[0] not in taken
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_plan(OPENAI, spec)


def test_a_student_that_fits_takes_over_nothing() -> None:
    assert student_spec(PRESETS["vit_b16"], "vit_l16", []) == (PRESETS["vit_l16"], {})
    assert student_spec(PRESETS["vit_t16"], "swin_t", []) == (PRESETS["swin_t"], {})


def test_a_swin_takes_over_images_and_windows() -> None:
    spec, taken = student_spec(PRESETS["swin_b384"], "swin_l", [])
    assert taken == {"image_size": 384, "window": 12}
    assert spec == replace(PRESETS["swin_l384"], name="swin_l")
    assert make_plan(PRESETS["swin_b384"], spec).student == spec
    assert student_spec(PRESETS["swin_b384"], "swin_l", ["window=14"])[1] == {"image_size": 384}
    assert student_spec(PRESETS["swin_t"], "swin_l384", [])[1] == {}
    assert student_spec(PRESETS["swin_b384"], "vit_l16", [])[1] == {}


def test_a_student_may_be_the_teacher_changed() -> None:
    spec, taken = student_spec(OPENAI, "given", ["width=32", "mlp_ratio=5"])
    assert taken == {}
    assert spec == replace(OPENAI, width=32, heads=4, mlp_ratio=5.0)


def test_a_student_may_be_one_of_open_clips() -> None:
    spec, taken = student_spec(PRESETS["vit_b16"], "ViT-L-14", [])
    assert (spec.width, spec.patch_size, spec.embed_dim) == (1024, 14, 768)
    assert taken == {}


def test_values_of_set() -> None:
    given = ["width=512", "mlp_ratio=3.5", "no_ln_pre=true", "quick_gelu=false", "depths=2-2-8-2"]
    assert read_sizes(given) == {
        "width": 512,
        "mlp_ratio": 3.5,
        "no_ln_pre": True,
        "quick_gelu": False,
        "depths": [2, 2, 8, 2],
    }


@pytest.mark.parametrize(
    ("text", "size"), [(None, 5 * 10**9), ("500MB", 500 * 10**6), ("2 GiB", 2**31), ("1.5kb", 1500), ("17", 17)]
)
def test_shard_sizes(text: str | None, size: int) -> None:
    assert read_bytes(text) == size


# What is refused


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (
            ["OUT", "--both", "width=insrt"],
            ConfigError,
            "--both: width = 'insrt': unknown width operator (did you mean 'insert'?); known: insert, duplicate, ",
        ),
        (["OUT", "--text", "depth=stak"], ConfigError, "--text: depth = 'stak': unknown depth operator (did you mean"),
        (["OUT", "--both", "noise=2"], ConfigError, "--both: noise = 2: should be less than 1"),
        (
            ["OUT", "--both", "widht=insert"],
            ConfigError,
            "widht = 'insert': unknown key (did you mean 'width'?)",
        ),
        (["OUT", "--image", "noise=0.2"], ConfigError, "unknown key; known here: width, depth, zero_new_outputs"),
        (["OUT", "--both", "zero_new_outputs=1"], ConfigError, "zero_new_outputs = 1: should be a valid boolean"),
        (["OUT", "--both", "lemon"], ConfigError, "--both lemon: should be KEY=VALUE pairs with the keys width, depth"),
        (["OUT", "--text", "depth=stack,depth=stack"], ConfigError, "--text depth=stack,depth=stack: sets depth twice"),
        (["OUT", "--set", "widht=64"], ConfigError, "--set widht: unknown key (did you mean 'width'?)"),
        (["OUT", "--set", "width=wide"], ConfigError, "--set width = 'wide': should be a whole number"),
        (["OUT", "--set", "depth=2-2"], ConfigError, "--set depth = [2, 2]: should be a whole number"),
        (["OUT", "--set", "width=12"], ConfigError, "width 12 is not 1 x 8"),
        (["OUT", "--set", "width=8"], ConfigError, "its width 8 is smaller than the 16 of 'small'"),
        (["OUT", "--shard-size", "5 apples"], ConfigError, "--shard-size 5 apples: should be a size in bytes"),
        (["OUT", "--both", "depth=netexpand", *GROWN], ConfigError, "takes added layers from the moving average"),
        (["OUT", "--verify", "NOWHERE/*.tar"], DataError, "NOWHERE"),
        (["OUT", "--verify", "UNNAMED/*.tar"], DataError, "there is no classnames.txt"),
        (["OUT", "--verify", "DATA/*.tar", "--classnames", "none.txt"], DataError, "class names"),
        (["OUT", "--from-manifest", "none.json"], ArtefactError, "none.json: missing"),
        (
            ["OUT", "--from-manifest", "TEACHER"],
            ArtefactError,
            "not the manifest of an expanded model: it has no",
        ),
        (
            ["OUT", "--from-manifest", "none.json", "--seed", "3"],
            ConfigError,
            "--seed: --from-manifest already",
        ),
        (["OUT", "--verify", "DATA/*.tar", "--device", "tpu"], ConfigError, "device 'tpu' is not supported"),
        (["OUT", "--classnames", "none.txt"], ConfigError, "--classnames: needs --verify"),
        (["OUT", "--out-json", "."], ConfigError, "--out-json .: is a folder; name the file to write"),
        (["OUT", "--batch", "8"], ConfigError, "--batch: needs --verify"),
        ([], ConfigError, "name the folder to write, or add --dry-run, or --verify DATA"),
        (["TAKEN"], ArtefactError, "exists and is not a model folder that compt wrote"),
        (["TEACHER"], ArtefactError, "is read and would be replaced"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_mistakes_are_named_before_any_work(
    teacher: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    kind: type[ComptError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("compt.expand.execute.expand", "compt.evaluate.expansion.verify"):
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("work was begun"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("mine")
    make_shards(tmp_path / "unnamed" / "deep", n=2, shards=1, classes=2)
    places = {"TEACHER": teacher, "OUT": tmp_path / "out", "TAKEN": tmp_path / "taken"}
    places |= {"DATA": data, "UNNAMED": tmp_path / "unnamed" / "deep", "NOWHERE": tmp_path / "nowhere"}
    filled = []
    for word in words:
        head, _, rest = word.partition("/")
        filled.append(f"{places[head]}{'/' if rest else ''}{rest}" if head in places else word)
    error = refused(teacher, "vit_pico", *filled)
    assert type(error) is kind
    assert message.replace("NOWHERE", str(tmp_path / "nowhere")) in str(error)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "diary.txt").read_text() == "mine"


def test_a_manifest_of_another_teacher(teacher: Path, tmp_path: Path) -> None:
    run(teacher, "vit_pico", tmp_path / "one", *GROWN)
    other = tmp_path / "other"
    write_artefact(other, export_state(build(TEACHER, seed=2)), TEACHER, {})
    error = refused(other, tmp_path / "two", "--from-manifest", tmp_path / "one")
    assert "is not the model that" in str(error)
    error = refused(teacher, "vit_nano", tmp_path / "two", "--from-manifest", tmp_path / "one")
    assert "STUDENT vit_nano:" in str(error)
    assert "was made as vit_pico; leave STUDENT out" in str(error)
    assert not (tmp_path / "two").exists()


def test_no_student(teacher: Path) -> None:
    assert "name the student: a preset" in str(refused(teacher, "--dry-run"))
    assert "(did you mean 'vit_nano'?)" in str(refused(teacher, "vit_nanno", "--dry-run"))


# Other sources


def test_a_file_that_does_not_say_what_it_is(teacher: Path, data: Path, tmp_path: Path) -> None:
    export_model(read_artefact(teacher), tmp_path / "stock")
    file = tmp_path / "stock" / "open_clip_model.safetensors"
    assert "name the model with --teacher-model" in str(refused(file, "vit_pico", "--dry-run", *GROWN))
    exported = CliRunner().invoke(app, ["export", str(tmp_path / "stock"), str(tmp_path / "again")])
    assert exported.exception is None
    assert content(tmp_path / "again")[file.name] == content(tmp_path / "stock")[file.name]
    scored = CliRunner().invoke(app, ["eval", str(tmp_path / "stock"), "--data", str(data / "*.tar"), "--json"])
    assert scored.exception is None
    assert json.loads(scored.output)["n"] == 14


def test_eval_and_export_take_the_name_of_a_model(tmp_path: Path) -> None:
    spec = PRESETS["vit_pico"]
    write_teacher(tmp_path / "pico", spec)
    export_model(read_artefact(tmp_path / "pico"), tmp_path / "stock")
    file = tmp_path / "stock" / "open_clip_model.safetensors"
    words = ["export", str(file), str(tmp_path / "again"), "--model", "vit_pico"]
    assert CliRunner().invoke(app, words).exception is None
    assert (tmp_path / "again" / file.name).exists()
    words[-1] = "vit_nano"
    assert isinstance(CliRunner().invoke(app, words).exception, ArtefactError)


def test_export_says_what_open_clip_needs_for_a_swin_that_timm_does_not_know(teacher: Path, tmp_path: Path) -> None:
    sizes = {"width": 16, "head_width": 8, "image_size": 32, "patch_size": 2, "window": 2, "depths": (1, 1)}
    swin = write_teacher(tmp_path / "swin", resolve("swin_t", {**TINY, **sizes, "text_depth": 1}))
    shown = CliRunner().invoke(app, ["export", str(swin), str(tmp_path / "stock")]).output
    assert 'from compt.models import register_swin; register_swin("compt_swin_w16_d1-1_h8_p2_win2_32")' in shown
    shown = CliRunner().invoke(app, ["export", str(teacher), str(tmp_path / "stock")]).output
    assert "Wrote" in shown
    assert "register_swin" not in shown
    assert not is_own_swin(PRESETS["swin_l384"].timm_name)
