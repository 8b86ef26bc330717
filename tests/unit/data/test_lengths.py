"""What a recipe assumes of its data against what is there: padding as in training, checks and plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from compt.chain.run import prepare
from compt.cli.main import main
from compt.data.check import check
from compt.data.index import open_index
from compt.data.lengths import computed_tokens, stored_lengths, with_data
from compt.files import write_text
from compt.models.clip import padded_tokens
from compt.models.presets import PACKED
from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe, parse_recipe
from compt.recipe.schema import Recipe
from tests.helpers.recipe import recipe_values
from tests.helpers.shards import make_shards, sample, write_tar


def recipe(*changes: str) -> Recipe:
    return parse_recipe(recipe_values(*changes))


@pytest.mark.parametrize(
    ("text", "buckets"), [("text_buckets=1", 1), ("text_buckets=2", 2), ("text_buckets=5", 5), ("text=packed", PACKED)]
)
def test_padding_is_that_of_training(text: str, buckets: int) -> None:
    lengths = np.array([0, 0, 5, 9, 0, 3, 1])
    found = computed_tokens(lengths, recipe(f"engine.{text}", "engine.micro_batch=4"))
    rng = np.random.default_rng(7)
    drawn = [
        padded_tokens(torch.from_numpy(rng.choice(7, 4 * 2, p=lengths / lengths.sum())), buckets) / 8
        for _ in range(4000)
    ]
    assert found == pytest.approx(np.mean(drawn), rel=0.06)
    alone = computed_tokens(np.array([0, 0, 0, 4]), recipe())
    assert alone == 3


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = 0
    try:
        main(lambda: [*words])
    except SystemExit as end:
        code = int(end.code or 0)
    found = capsys.readouterr()
    return code, found.out + found.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that assumes 48 images, beside shards with 30, two of them with one caption."""
    make_shards(tmp_path / "train", 28, 2)
    write_tar(tmp_path / "train" / "9.tar", [*sample("x", 1, captions=1), *sample("y", 2, captions=1)])
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_values("chain.links.0.train={epochs: 4}")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_check_compares_a_recipe_with_its_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "data", "check", "--recipe", "r.yaml", "--json")
    assert code == 0
    values = json.loads(text)
    compared = values["recipe"]
    assert compared["images of an epoch"] == {"recipe": 48, "found": 30}
    assert compared["captions of an image"]["found"] == pytest.approx((28 * 3 + 2) / 30)
    lengths = check("train/*.tar", Path()).found.lengths
    tokens = computed_tokens(lengths, recipe())
    assert compared["tokens computed for a caption"] == {"recipe": None, "found": tokens}
    changes = ("chain.links.0.train={epochs: 4}",)
    plans = [
        make_plan(recipe(*changes)),
        make_plan(recipe(*changes, f"data.caption_tokens={tokens}", "data.images=30")),
    ]
    assert [compared["MACs"][name] for name in ("recipe", "found")] == [
        sum(job.cost.total_macs for job in each.jobs) for each in plans
    ]
    code, text = run(capsys, "data", "check", "train/*.tar", "--recipe", "r.yaml")
    line = next(line for line in text.splitlines() if line.startswith("images of an epoch"))
    assert line.split()[4:] == ["48", "30", "-37.5", "%"]
    assert run(capsys, "data", "check")[0] == 2


def test_check_shows_each_set_of_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets: Any = "data.train=[{shards: train/00*.tar, weight: 1.5}, {shards: train/9.tar}]"
    (folder / "r.yaml").write_text(json.dumps(recipe_values(sets)))
    values = json.loads(run(capsys, "data", "check", "--recipe", "r.yaml", "--json")[1])
    assert [(one["weight"], one["samples"], one["images"]) for one in values["sets"]] == [(1.5, 28, 42), (1, 2, 2)]
    assert values["recipe"]["images of an epoch"]["found"] == 44
    text = run(capsys, "data", "check", "--recipe", "r.yaml")[1]
    assert ["train/00*.tar", "1.5", "28", "42", "–"] in [line.split() for line in text.splitlines()]


def test_a_plan_prices_what_is_indexed_and_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*words: str) -> dict[str, Any]:
        recipe = () if words[:1] == ("auto.yaml",) else ("r.yaml",)
        found: dict[str, Any] = json.loads(run(capsys, "plan", *recipe, *words, "--json")[1])
        return found

    before = planned()
    assert (before["images"], before["caption_tokens"]) == (48, None)
    assert before["data"].startswith("The shards are not indexed here")
    assert not list(folder.rglob("*.npz"))
    assert run(capsys, "data", "index", "train/*.tar")[0] == 0
    indexed = planned()
    assert (indexed["images"], indexed["caption_tokens"]) == (30, None)
    assert indexed["data"] == (
        "The number of images is that of the indexed shards; data.images is 48. "
        "2 of 30 images have fewer captions than are drawn."
    )
    assert indexed["totals"]["chain"]["steps"] == 4 * (30 // 12) + 5
    assert run(capsys, "data", "check", "train/*.tar")[0] == 0
    checked = planned()
    assert checked["caption_tokens"] == computed_tokens(check("train/*.tar", Path()).found.lengths, recipe())
    assert checked["data"].endswith("The tokens follow from the lengths that compt data check found.")
    assert checked["totals"]["chain"]["macs"]["exact"] < indexed["totals"]["chain"]["macs"]["exact"]
    assert planned("--set", "data.caption_tokens=5.5")["caption_tokens"] == 5.5
    baselines = ("--set", "baselines={train: {epochs: 9}, warmup: {steps: 1}}")
    designed = planned(*baselines, "--auto", "--out", "auto.yaml")
    assert designed["images"] == 30
    assert checked["data"] in designed["notes"]
    assert load_recipe(folder / "auto.yaml").data.caption_tokens == checked["caption_tokens"]
    assert designed["forecast"]["totals"] == planned("auto.yaml", *baselines)["totals"]
    # Shards that changed are not what was indexed.
    write_tar(folder / "train" / "9.tar", sample("z", 3))
    assert planned()["images"] == 48


@pytest.mark.parametrize(
    "change",
    [
        "data.train=s3://bucket/{0..9}.tar",
        "data.captions_csv=x.csv",
        "data.train={shards: train/*.tar, captions_csv: x.csv}",
    ],
)
def test_a_plan_reads_no_store_and_no_table(folder: Path, change: str) -> None:
    changed = recipe(change)
    assert with_data(changed, folder)[0] is changed


def test_a_run_counts_the_tokens_that_a_plan_counts(folder: Path) -> None:
    """They decide the steps of controls. A run that was begun keeps its own."""
    check("train/*.tar", folder)
    changes = ("baselines={train: {epochs: 1}, warmup: {steps: 1}, controls: [equal_macs]}", "data.images=30")
    asked = recipe(*changes, "evaluation.sets=[]", "evaluation.validation=[]", "evaluation.primary=null")
    planned = make_plan(with_data(asked, folder)[0])
    context, plan = prepare(asked, folder / "new", base=folder, controls=None)
    assert context.recipe.data.caption_tokens == computed_tokens(check("train/*.tar", folder).found.lengths, asked)
    assert [job.hash for job in plan.jobs] == [job.hash for job in planned.jobs]
    assert plan.jobs[0].cost.total_macs != make_plan(asked).jobs[0].cost.total_macs
    (folder / "begun" / "jobs").mkdir(parents=True)
    write_text(folder / "begun" / "recipe.yaml", yaml.safe_dump(asked.model_dump(mode="json", exclude_none=True)))
    context, _ = prepare(asked, folder / "begun", base=folder, controls=None)
    assert context.recipe.data.caption_tokens is None


def test_lengths_are_those_of_the_columns_that_are_read(folder: Path) -> None:
    check("train/*.tar", folder)
    index = open_index("train/*.tar", folder)
    lengths = stored_lengths(index, None)
    assert lengths is not None
    assert int(lengths.sum()) == 28 * 3 + 2
    index.columns = ("captions",)
    assert stored_lengths(index, None) is None


def test_captions_beyond_the_context_count_as_long_as_towers_read_them() -> None:
    context = max(spec.context_length for spec in recipe().family.specs().values())
    lengths = np.zeros(2 * context + 1, dtype=np.int64)
    lengths[[4, 2 * context]] = 1
    assert computed_tokens(lengths, recipe("engine.text=packed")) == pytest.approx((4 + context) / 2, rel=0.1)
    assert computed_tokens(lengths[-1:].repeat(2 * context + 1), recipe()) <= context
