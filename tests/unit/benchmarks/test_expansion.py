"""The study of expansion: what it trains, and that it continues after a kill."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.expansion.collect import collect
from benchmarks.expansion.run import STUDY, run_study
from benchmarks.expansion.settings import (
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
from compt.errors import ConfigError, RunError
from compt.files import write_json
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.train import loop as trainer
from tests.conftest import ROOT
from tests.helpers.process import KILLED, die, finish, start
from tests.helpers.shards import make_shards

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
    assert {variant.depth for variant in plain} == set(DEPTH_OPERATORS)
    assert {variant.width for variant in DEPTHS} - {EXACT.width} == {"insert"}
    assert len({variant.depth for variant in DEPTHS if variant.zero_new_outputs}) >= 3


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_seeds_run_one_after_another_and_teachers_before_students(setting: Setting) -> None:
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
    """A checkout with a few images instead of the emoji, and a study of a few variants."""
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
    """Run the small study in `folder`. It is killed at a step of its `at`-th training run, counted from 1."""
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


@pytest.mark.full
def test_a_killed_study_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    # Finished runs are not trained again.
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
    with pytest.raises(RunError, match=r"the study has changes \[\], not \['optimizer.lr=1'\]"):
        run_study(SMALL, run, silent, changes=["optimizer.lr=1"])
    with pytest.raises(RunError, match="setting tiny, not emoji"):
        run_study(replace(SMALL, name="emoji"), run, silent)
    with pytest.raises(RunError, match="holds no study"):
        collect(Path("runs/y"))
    write_json(run / STUDY, {"setting": "huge", "changes": []})
    with pytest.raises(RunError, match="its setting is 'huge'"):
        collect(run)


def test_variants_that_cannot_train_are_skipped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link whose operator refuses does not keep the others from being trained; a teacher does."""
    trained = []

    def train(setting: Setting, training: Training, *_: Any) -> None:
        if training.variant == SCRATCH:
            raise ConfigError("this operator cannot")
        trained.append(training.folder)

    monkeypatch.setattr("benchmarks.expansion.run._train", train)
    said: list[str] = []
    assert run_study(SMALL, Path("runs/x"), said.append) == ["width/scratch-s0: this operator cannot"]
    assert len(trained) == 5
    assert any("left out: this operator cannot" in line for line in said)

    def no_teacher(*_: Any) -> None:
        raise ConfigError("no shards")

    monkeypatch.setattr("benchmarks.expansion.run._train", no_teacher)
    with pytest.raises(ConfigError, match="no shards"):
        run_study(SMALL, Path("runs/x"), silent)
