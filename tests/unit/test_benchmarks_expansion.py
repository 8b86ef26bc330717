"""The study of expansion: what it trains, that it goes on after a kill, what it gathers, and what it says of that."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import expansion, expansion_report
from benchmarks.expansion_collect import collect
from benchmarks.expansion_report import BEGIN, END, README, RESULTS, judge, read_results, scatter, write_report
from benchmarks.expansion_run import STUDY, run_study
from benchmarks.expansion_settings import (
    CC3M,
    DEPTHS,
    EMOJI,
    EXACT,
    IFD_ONLY,
    IWI_ONLY,
    SCRATCH,
    SETTINGS,
    STUDENT,
    TINY,
    WIDTHS,
    Setting,
    Training,
    Variant,
    recipe_of,
    trainings,
)
from compt import trainer
from compt.errors import ConfigError, RunError
from compt.files import write_json
from compt.growth import DEPTH, WIDTH_OPERATORS
from tests.conftest import ROOT
from tests.helpers_process import KILLED, die, finish, start
from tests.helpers_shards import make_shards

SMALL = replace(
    TINY,
    pairs=(
        replace(TINY.pairs[0], variants=(Variant("insert"), SCRATCH, IFD_ONLY)),
        replace(TINY.pairs[1], variants=(Variant("duplicate"), IWI_ONLY)),
    ),
    seeds=(0,),
)


# What is trained


def test_the_study_has_every_operator() -> None:
    assert [variant.width for variant in WIDTHS if variant.compared] == list(WIDTH_OPERATORS)
    assert {variant.depth for variant in WIDTHS} == {"duplicate"}
    plain = [variant for variant in DEPTHS if variant.compared and not variant.zero_new_outputs]
    assert {variant.depth for variant in plain} == set(DEPTH)
    assert {variant.width for variant in DEPTHS} - {EXACT.width} == {"insert"}
    assert len({variant.depth for variant in DEPTHS if variant.zero_new_outputs}) >= 3


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_first_seed_comes_first_whole_and_teachers_before_students(setting: Setting) -> None:
    planned = list(trainings(setting))
    assert [training.seed for training in planned] == sorted(training.seed for training in planned)
    assert len({training.folder for training in planned}) == len(planned)
    folders = [training.folder for training in planned]
    for at, training in enumerate(planned):
        if training.variant is not None and training.pair.start is None:
            assert folders.index(Training(training.pair, training.seed).folder) < at
    first = [training for training in planned if training.seed == setting.seeds[0] and training.variant]
    assert [training.variant for training in first] == [*WIDTHS, *DEPTHS]
    assert [training.folder for training in trainings(setting, [1])] == [
        name.replace("-s0", "-s1") for name in folders if name.endswith("-s0")
    ]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_training_is_a_recipe(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for training in trainings(setting):
        recipe = recipe_of(setting, training, Path("runs/x"), ["optimizer.weight_decay=0.25"])
        variant, (link,) = training.variant, recipe.chain.links
        assert recipe.seed == training.seed
        assert recipe.optimizer.weight_decay == 0.25
        assert {item.name for item in recipe.evaluation.sets} == {setting.select, setting.report}
        assert [item.role for item in recipe.evaluation.sets if item.name == setting.select] == ["select"]
        if variant is None:
            assert recipe.chain.from_ is None
            assert recipe.optimizer.ema is not None
            continue
        assert (recipe.chain.from_ is None) == (variant == SCRATCH)
        assert (link.alpha == 0) == (variant == IWI_ONLY)
        assert (link.lr is None) == (variant in (SCRATCH, IFD_ONLY))
        assert recipe.optimizer.ema is None
        expand = recipe.chain.expand
        assert (expand.width, expand.depth, expand.zero_new_outputs) == (
            variant.width,
            variant.depth,
            variant.zero_new_outputs,
        )


def test_sizes_of_the_pairs() -> None:
    """Width grows alone in the one, both in the other; at integer ratios, where `EXACT` is exact."""
    for setting in (EMOJI, TINY, CC3M):
        for name in ("width", "depth"):
            training = Training(setting.pair(name), 0, SCRATCH)
            spec = recipe_of(replace(setting, recipe=ROOT / setting.recipe), training, Path("x")).family.specs()[
                STUDENT
            ]
            teacher = recipe_of(
                replace(setting, recipe=ROOT / setting.recipe, teacher_train={"steps": 1}, teacher_warmup={"steps": 1}),
                Training(setting.pair(name), 0),
                Path("x"),
            ).family.specs()["teacher"]
            assert spec.width > teacher.width
            assert (spec.depth > teacher.depth) == (name == "depth")
            if setting != CC3M:
                assert (spec.width / teacher.width, spec.text_width / teacher.text_width) == (2, 2)


# Training it


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a few pictures instead of the emoji, and a study of few variants."""
    make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, TINY.name, SMALL)
    return tmp_path


def make_place(folder: Path) -> None:
    (folder / "recipes").symlink_to(ROOT / "recipes")
    data = folder / "data" / "emoji"
    make_shards(data / "train", 96, 2, size=(32, 32))
    for name in (TINY.select, TINY.report):
        make_shards(data / name, 24, 1, classes=4, size=(32, 32))
        (data / name / "classnames.txt").write_text("cat\ndog\nhouse\ntree\n")


def silent(text: str) -> None:
    pass


def small_study(folder: Path, run: str, at: int, step: int) -> None:
    """Run the small study in `folder`; it is killed at a step of its `at`-th training, counted from 1."""
    begun = [0]
    rate = trainer.learning_rate

    def stepping(done: int, settings: trainer.TrainSettings) -> float:
        begun[0] += done == 0
        if (begun[0], done) == (at, step):
            die()
        return rate(done, settings)

    trainer.learning_rate = stepping
    os.chdir(folder)
    SETTINGS[TINY.name] = SMALL
    run_study(SMALL, Path(run), silent)


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(json.dumps(results))
    for item in [*values["variants"], *values["teachers"]]:
        del item["minutes"]
    return {key: values[key] for key in ("teachers", "variants", "compared", "missing", "seeds")}


def test_a_study_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = replace(TINY.pairs[0], variants=(Variant("insert"), IFD_ONLY))
    setting, run = replace(SMALL, pairs=(pair,)), Path("runs/x")
    monkeypatch.setitem(SETTINGS, TINY.name, setting)
    assert run_study(setting, run, silent) == []
    results = collect(run)
    assert results["missing"] == []
    insert, ifd_only = results["variants"]
    assert insert["step_0"] != ifd_only["step_0"]
    (item,) = [item for item in results["compared"] if item["set"] == TINY.report]
    assert item["difference"] == pytest.approx(ifd_only["end"][TINY.report] - insert["end"][TINY.report], rel=1e-4)


@pytest.mark.slow
def test_a_study_goes_on_after_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_place(tmp_path)
    torn, whole = Path("runs/torn"), Path("runs/whole")
    for at, step in ((1, 2), (2, 1)):
        assert finish(start(small_study, tmp_path, str(torn), at, step)) == KILLED
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, TINY.name, SMALL)
    assert len(collect(torn)["missing"]) == 5

    assert run_study(SMALL, whole, silent) == []
    wanted = collect(whole)
    assert wanted["missing"] == []
    assert len(wanted["variants"]) == 5
    said: list[str] = []
    assert run_study(SMALL, torn, said.append) == []
    assert without_times(collect(torn)) == without_times(wanted)

    # What is there is not trained again.
    monkeypatch.setattr(trainer, "learning_rate", lambda *_: pytest.fail("trained again"))
    said.clear()
    assert run_study(SMALL, torn, said.append) == []
    assert said == []
    check_small_study(wanted, whole)


def check_small_study(results: dict[str, Any], run: Path) -> None:
    """Starts are what they are called, and curves begin with them."""
    found = {item["variant"]: item for item in results["variants"]}
    first = {name: item["step_0"]["validation_loss"] for name, item in found.items()}
    assert first["scratch"] == first["ifd_only"] != first["insert"]
    assert first["duplicate"] == first["iwi_only"]
    for item in found.values():
        assert item["curve"]["epoch"] == pytest.approx([0, 1 / 3, 2 / 3], rel=1e-4)
        assert item["curve"]["validation_loss"][0] == item["step_0"]["validation_loss"]
        assert item["curve"]["validation_loss"][-1] == pytest.approx(item["end"]["validation_loss"], rel=1e-4)
        assert item["curve"]["validation_loss"][0] != item["curve"]["validation_loss"][-1]
    assert found["ifd_only"]["end"] != found["scratch"]["end"]
    assert not list(run.glob("*/*/jobs/1-student/*/*.safetensors"))
    assert list(run.glob("teachers/*/jobs/1-teacher/model/*.safetensors"))


def test_a_folder_of_another_study_is_refused(place: Path) -> None:
    run = Path("runs/x")
    write_json(run / STUDY, {"setting": "tiny", "changes": [], "started": "now"})
    with pytest.raises(RunError, match=r"was begun with changes \[\], not \['optimizer.lr=1'\]"):
        run_study(SMALL, run, silent, changes=["optimizer.lr=1"])
    with pytest.raises(RunError, match="setting tiny, not emoji"):
        run_study(replace(SMALL, name="emoji"), run, silent)
    with pytest.raises(RunError, match="holds no study"):
        collect(Path("runs/y"))
    write_json(run / STUDY, {"setting": "huge", "changes": []})
    with pytest.raises(RunError, match="its setting is 'huge'"):
        collect(run)


def test_what_cannot_be_trained_is_left_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link whose operator refuses does not keep the others from being trained; a teacher does."""
    trained = []

    def train(setting: Setting, training: Training, *_: Any) -> None:
        if training.variant == SCRATCH:
            raise ConfigError("this operator cannot")
        trained.append(training.folder)

    monkeypatch.setattr("benchmarks.expansion_run._train", train)
    said: list[str] = []
    assert run_study(SMALL, Path("runs/x"), said.append) == ["width/scratch-s0: this operator cannot"]
    assert len(trained) == 5
    assert any("left out: this operator cannot" in line for line in said)

    def no_teacher(*_: Any) -> None:
        raise ConfigError("no shards")

    monkeypatch.setattr("benchmarks.expansion_run._train", no_teacher)
    with pytest.raises(ConfigError, match="no shards"):
        run_study(SMALL, Path("runs/x"), silent)


# Gathering it


LEMON = Variant("lemon", width="lemon")


def write_job(run: Path, training: Training, correct: dict[str, np.ndarray], state: str = "done") -> None:
    """A job's folder as it is when it is finished, of invented numbers."""
    place = run / training.folder / "jobs" / training.job
    scores = {name: {"top1": 100 * float(right.mean()), "n": len(right)} for name, right in correct.items()}
    start_of = {
        "at": "2026-01-02T03:04:05Z",
        "processes": 1,
        "machine": {"device": "abacus", "threads": "2", "torch": "2"},
    }
    manifest = {
        "state": state,
        "hash": "x",
        "result": {},
        "starts": [start_of],
        "finished": "2026-01-02T04:00:00Z",
        "trained": {"device_hours": 0.25},
        "scores": scores,
        "validation_loss": 3.25,
        "parameters": 1000,
        "epochs": 2.0,
        "steps": 8,
        "lr": 2e-3 if training.variant == LEMON else 1e-3,
    }
    write_json(place / "manifest.json", manifest)
    first = {name: {"top1": 1.5} for name in correct}
    write_json(place / "step_0.json", {"validation_loss": 4.5, "scores": first})
    (place / "scores").mkdir()
    for name, right in correct.items():
        np.savez(place / "scores" / f"{name}.npz", ids=np.arange(len(right)), correct=right)
    rows = [
        {"kind": "eval", "step": 4 * k, "epoch": k, "validation_loss": 4.0 - k, "val_style/top1": 10.0 * k}
        for k in (1, 2)
    ]
    rows[0]["validation_loss"] = None  # what was not finite
    lines = [json.dumps(row) for row in ({"kind": "train", "step": 1, "loss": 9.0}, *rows)]
    (place / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "ev')


def invented_run(run: Path) -> dict[tuple[str, int], np.ndarray]:
    """Width insert, lemon and net2net at two seeds, the last not finished at the second; the answers by variant."""
    write_json(run / STUDY, {"setting": "emoji", "changes": ["optimizer.lr=1e-3"], "started": "2026-01-02T03:04:05Z"})
    generator, pair = np.random.default_rng(0), EMOJI.pairs[0]
    answers = {}
    for seed in (0, 1):
        write_job(run, Training(pair, seed), {name: np.ones(50, bool) for name in ("val_style", "test_style")})
        for at, name in enumerate(("insert", "lemon", "net2net")):
            # Half of the pictures are as easy or as hard for one seed as for the other.
            alike = np.random.default_rng(1 + at).random(200)
            right = np.where(np.arange(200) % 2, alike, generator.random(200)) < 0.3 + 0.2 * at
            answers[name, seed] = right
            variant = next(variant for variant in WIDTHS if variant.name == name)
            state = "training" if (name, seed) == ("net2net", 1) else "done"
            write_job(run, Training(pair, seed, variant), {"val_style": right[:40], "test_style": right}, state)
    return answers


def test_collecting(tmp_path: Path) -> None:
    answers = invented_run(tmp_path)
    results = collect(tmp_path)
    assert results["command"] == "python -m benchmarks.expansion --setting emoji --set 'optimizer.lr=1e-3'"
    assert results["finished"] == "2026-01-02T04:00:00Z"
    assert results["device_hours"] == 0.25 * 7
    assert results["seeds"] == [0, 1]
    assert [machine["device"] for machine in results["machines"]] == ["abacus"]
    names = [(item["variant"], item["seed"]) for item in results["variants"]]
    assert names == [("insert", 0), ("net2net", 0), ("lemon", 0), ("insert", 1), ("lemon", 1)]
    assert "width/net2net-s1" in results["missing"]
    assert "width/lemon-s1" not in results["missing"]
    assert len(results["missing"]) == 2 * (len(WIDTHS) + len(DEPTHS)) - 5
    record = results["variants"][0]
    assert record["curve"] == {"epoch": [0, 1, 2], "validation_loss": [4.5, None, 2.0], "val_style": [1.5, 10.0, 20.0]}
    assert record["step_0"] == {"validation_loss": 4.5, "val_style": 1.5, "test_style": 1.5}
    compared = {(item["variant"], item["set"]): item for item in results["compared"]}
    both = compared["lemon", "test_style"]
    gains = [answers["lemon", seed].mean() - answers["insert", seed].mean() for seed in (0, 1)]
    assert both["seeds"] == [0, 1]
    assert both["by_seed"] == pytest.approx([100 * gain for gain in gains], rel=1e-4)
    assert both["difference"] == pytest.approx(100 * np.mean(gains), rel=1e-4)
    by_picture = np.mean([answers["lemon", seed] * 1.0 - answers["insert", seed] for seed in (0, 1)], axis=0)
    error = 100 * by_picture.std() / math.sqrt(len(by_picture))
    assert both["high"] - both["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert compared["net2net", "test_style"]["seeds"] == [0]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_collecting_from_damaged_folders(tmp_path: Path) -> None:
    invented_run(tmp_path)
    job = tmp_path / "width/insert-s0/jobs/1-student"
    other = np.arange(200)[::-1]
    np.savez(job / "scores" / "test_style.npz", ids=other, correct=np.ones(200, bool))
    with pytest.raises(RunError, match="different 'test_style' pictures"):
        collect(tmp_path)
    (job / "step_0.json").unlink()
    with pytest.raises(RunError, match=r"step_0.json cannot be read"):
        collect(tmp_path)


# Reporting it


def compared(variant: str, by_seed: list[float], low: float, high: float) -> dict[str, Any]:
    mean = sum(by_seed) / len(by_seed)
    seeds = list(range(len(by_seed)))
    record = {"pair": "width", "variant": variant, "set": "test_style", "seeds": seeds, "by_seed": by_seed}
    return {**record, "difference": mean, "low": low, "high": high}


def test_what_is_told_apart() -> None:
    items = [
        compared("duplicate", [-3.2, -2.8], -3.9, -2.1),
        compared("net2net", [1.0, 2.0], 0.3, 2.7),
        compared("lemon", [0.6, 0.2], -0.2, 1.0),
        compared("scratch", [-20.0, -11.0], -18.0, -13.0),
    ]
    pair = {"name": "width", "reference": "insert"}
    # Variances of two values: half the square of their distance; controls do not enter.
    wanted = math.sqrt((0.4**2 + 1.0**2 + 0.4**2) / 2 / 3)
    deviation = scatter({"compared": items}, pair, "test_style")
    assert deviation == pytest.approx(wanted)
    assert [judge(item, deviation) for item in items] == ["worse", "better", "not told apart", "worse"]
    # 1.5 points are more than 2.5 x 0.47 / sqrt(2) = 0.83; neither a wider scatter nor pictures may say otherwise.
    assert judge(items[1], 0.9) == "not told apart"
    assert judge({**items[1], "low": -0.1}, deviation) == "not told apart"
    alone = [compared("lemon", [4.0], 3.0, 5.0)]
    assert scatter({"compared": alone}, pair, "test_style") is None
    assert judge(alone[0], None) == "one seed"


def test_the_page(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    answers = invented_run(run)
    write_json(out / RESULTS, collect(run))
    path = write_report(read_results(out), out)
    text = path.read_text()
    top1 = [100 * answers["lemon", seed].mean() for seed in (0, 1)]
    lines = [line for line in text.splitlines() if line.startswith("| lemon |")]
    assert len(lines) == 1
    cells = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert cells[1:5] == ["4.50 ± 0.00", "1.5 ± 0.0", "10.0 ± 0.0", "3.25 ± 0.00"]
    assert cells[6] == f"{np.mean(top1):.1f} ± {abs(top1[0] - top1[1]) / 2:.1f}"
    assert "| + IFD + IWI | 30.24 |" in text
    assert "Learning rate: 0.001; 0.002 lemon." in text
    assert "Not finished: 37 trainings, the next of them width/scratch-s0." in text
    for name in ("width_accuracy", "width_loss"):
        assert f"({name}.svg)" in text
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
    assert not (out / "depth_loss.svg").exists()

    # What a person wrote stays, and the same results give the same bytes.
    changed = text.replace("Students grow", "Our students grow") + "\nTake lemon.\n"
    path.write_text(changed.replace("3.25", "99"))
    before = {item.name: item.read_bytes() for item in out.glob("*.svg")}
    write_report(read_results(out), out)
    assert path.read_text() == changed
    assert {item.name: item.read_bytes() for item in out.glob("*.svg")} == before

    path.write_text(changed.replace(END, ""))
    with pytest.raises(RunError, match="lacks the lines"):
        write_report(read_results(out), out)
    (out / RESULTS).write_text("{}")
    with pytest.raises(RunError, match="it lacks pairs"):
        read_results(out)


def test_nothing_trained_yet(tmp_path: Path) -> None:
    write_json(tmp_path / STUDY, {"setting": "emoji", "changes": [], "started": "now"})
    write_json(tmp_path / RESULTS, collect(tmp_path))
    assert "Not finished" in write_report(read_results(tmp_path), tmp_path).read_text()
    assert not list(tmp_path.glob("*.svg"))


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    folder = ROOT / expansion.RESULTS
    if not (folder / RESULTS).exists():
        pytest.skip("the study has not been committed yet")
    text = (folder / README).read_text()
    results = read_results(folder)
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == expansion_report.page(results)
    assert {path.stem for path in folder.glob("*.svg")} == set(expansion_report.plots(results))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = expansion.options([])
    assert (given.part, given.setting, given.seeds, given.changes) == ("all", "emoji", None, [])
    assert (given.run, given.out) == (Path("runs/expansion-emoji"), Path("docs/results/expansion"))
    assert expansion.options(["--setting", "tiny"]).out == Path("runs/expansion-tiny/results")
    invented_run(tmp_path)
    expansion.main(["collect", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "written: " in capsys.readouterr().out
    assert (tmp_path / "out" / README).exists()
    monkeypatch.setattr(expansion, "run_study", lambda *_, **__: ["width/lemon-s0: it cannot"])
    with pytest.raises(SystemExit) as caught:
        expansion.main(["train", "--run", str(tmp_path), "--seeds", "0"])
    assert caught.value.code == 1
    assert "left out: width/lemon-s0: it cannot" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        expansion.main(["report", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "none")])
    assert caught.value.code == RunError.exit_code
