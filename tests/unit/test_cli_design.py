"""`compt plan --auto` as it is typed: what it shows, the recipe that it writes, what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compt.cli import main
from compt.config import load_recipe
from compt.planner import make_plan
from compt.presets import PRESETS
from tests.helpers_curves import lengths

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.yaml"))
CC3M = "recipes/cc3m_vit.yaml"

Auto = Callable[..., tuple[int, str, str]]


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Auto:
    """Run `compt plan RECIPE --auto`; gives exit code, output, errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str, recipe: str = CC3M) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compt", "plan", recipe, "--auto", *words])
        with pytest.raises(SystemExit) as left:
            main()
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out, shown.err

    return call


def as_json(auto: Auto, *words: str, recipe: str = CC3M) -> dict[str, Any]:
    code, text, errors = auto(*words, "--json", recipe=recipe)
    assert (code, errors) == (0, "")
    values: dict[str, Any] = json.loads(text)
    return values


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("options", [(), ("--objective", "acceleration"), ("--objective", "budget", "--budget", "1e4")])
def test_the_recipe_that_is_written_trains_what_was_shown(
    auto: Auto, tmp_path: Path, recipe: str, options: tuple[str, ...]
) -> None:
    out = tmp_path / "auto.yaml"
    values = as_json(auto, *options, "--out", str(out), recipe=recipe)
    before, after = load_recipe(ROOT / recipe), load_recipe(out)
    plan = make_plan(after)
    chosen = values["chosen"]
    assert after.name == f"{before.name}_auto"
    assert [job.spec.to_dict() for job in plan.links] == chosen["specs"]
    assert [job.epochs for job in plan.links] == pytest.approx(chosen["epochs"], rel=0.02)
    needed = [one["middle"] for one in chosen["needed"]]
    assert chosen["epochs"] == [needed[0], *(min(needed[0], math.ceil(2 * value - 1e-9) / 2) for value in needed[1:])]
    assert sum(job.cost.total_macs for job in plan.links) == pytest.approx(chosen["macs"]["middle"], rel=0.01)
    assert plan.acceleration() == pytest.approx(chosen["acceleration"]["middle"], rel=0.01)
    assert plan.links[0].steps == plan.individual[0].steps
    assert plan.links[0].warmup_steps == plan.individual[0].warmup_steps
    assert all((job.epochs * 2) % 1 < 1e-6 or before.data.images < 10_000 for job in plan.links)
    assert {member.name for member in before.family.members} <= {member.name for member in after.family.members}
    for section in ("data", "baselines", "optimizer", "engine", "evaluation"):
        assert getattr(after, section) == getattr(before, section)
    assert (after.chain.expand, after.chain.distill) == (before.chain.expand, before.chain.distill)
    assert yaml.safe_load(out.read_text()) == values["recipe"]
    assert chosen["macs"]["low"] < chosen["macs"]["middle"] < chosen["macs"]["high"]


def test_links_keep_the_recipe_s_warm_up_and_learning_rate(auto: Auto) -> None:
    changed = ("--set", "chain.links.2.lr=3e-4", "--set", "chain.links.2.warmup.steps=700")
    links = {link["model"]: link for link in as_json(auto, *changed)["recipe"]["chain"]["links"]}
    assert len(links) > 4
    for name, link in links.items():
        first, own = name == "vit_192x8", name == "vit_b16"
        assert link["warmup"] == {"steps": 8000 if first else 700 if own else 1000}, name
        assert link.get("lr") == (3e-4 if own else None)


def test_a_warm_up_longer_than_its_link_is_cut(auto: Auto, tmp_path: Path) -> None:
    out = tmp_path / "auto.yaml"
    changed = ("--set", "chain.links.1.warmup.steps=70000", "--set", "chain.links.1.train.epochs=30")
    assert auto(*changed, "--out", str(out))[0] == 0
    jobs = make_plan(load_recipe(out)).links
    assert all(job.warmup_steps <= job.steps for job in jobs)


def test_lengths_of_captions_and_distillation_are_kept(auto: Auto, tmp_path: Path) -> None:
    out = tmp_path / "auto.yaml"
    words = ("--set", "data.caption_tokens={9: 0.5, 20: 0.5}", "--set", "chain.distill.alpha=0")
    values = as_json(auto, *words, "--out", str(out))
    assert load_recipe(out).data.caption_tokens == {9: 0.5, 20: 0.5}
    assert make_plan(load_recipe(out)).links[1].cost.teacher_forward_macs == 0
    assert values["extrapolated"]
    with_features = as_json(auto, *words[:2])
    assert values["chosen"]["needed"][-1]["middle"] > with_features["chosen"]["needed"][-1]["middle"]


def test_what_a_person_sees(auto: Auto, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text, errors = auto()
    assert (code, errors) == (0, "")
    values = as_json(auto)
    for spec, epochs, needed in zip(
        values["chosen"]["specs"], values["chosen"]["epochs"], values["chosen"]["needed"], strict=True
    ):
        row = next(line for line in text.splitlines() if line.strip().startswith(spec["name"]))
        assert f"{epochs:g}" in row
        assert needed["low"] == needed["high"] or f"({needed['low']:.3g}-{needed['high']:.3g})" in row
    for words in ("11 published numbers", "prior, not a fit", "Extrapolated", "A100 80 GB, projected"):
        assert words in text
    for label in (
        "6 models, chosen",
        "4 models",
        "presets only",
        "the recipe's chain",
        "its own epochs",
        "individually",
    ):
        assert label in text
    assert "vit_192x8" not in text.split("presets only")[1].splitlines()[0]
    for columns in ("60", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(map(len, auto()[1].splitlines())) <= int(columns)


def test_alternatives_are_no_better(auto: Auto) -> None:
    for objective, better in (("cost", min), ("acceleration", max)):
        values = as_json(auto, "--objective", objective)
        key = {"cost": "macs", "acceleration": "acceleration"}[objective]
        found = [one[key]["middle"] for one in values["alternatives"] if one["predicted"]]
        assert values["chosen"][key]["middle"] == pytest.approx(better(found))
        assert len({len(one["specs"]) for one in values["alternatives"]}) >= 5


def test_a_budget(auto: Auto) -> None:
    paid, members = [], []
    for budget in (150, 260, 400, 900):
        values = as_json(auto, "--objective", "budget", "--budget", str(budget))
        paid.append(values["chosen"]["gpu_hours"]["hours"]["middle"])
        members.append(len(values["chosen"]["specs"]))
        assert paid[-1] <= budget
    assert members == sorted(members)
    text = auto("--objective", "budget", "--budget", "150")[1]
    assert "Wanted but not within the budget: vit_s16, vit_b16, vit_l16." in text
    assert "kept by the middle of the range" in text


def test_the_size_of_the_family(auto: Auto) -> None:
    assert len(as_json(auto, "--members", "7")["chosen"]["specs"]) == 7
    assert len(as_json(auto, "--members", "5", "--objective", "acceleration")["chosen"]["specs"]) == 5


def test_measured_speeds_are_used(auto: Auto, tmp_path: Path) -> None:
    spec = {name: PRESETS[name].to_dict() for name in ("vit_b16", "vit_l16")}
    entry = {"student": spec["vit_l16"], "teacher": spec["vit_b16"], "captions": 4, "tokens": 77.0, "batch": 256}
    file = {"device": "an A100", "kind": "a100-80", "precision": "bf16", "seed": 0, "date": "2026-01-01"}
    file |= {"command": "x", "versions": {}, "entries": [{**entry, "repeats": 3, "seconds_per_sample": 0.5}]}
    (tmp_path / "t.json").write_text(json.dumps(file))
    values = as_json(auto, "--throughput", str(tmp_path / "t.json"))
    assert values["chosen"]["gpu_hours"]["kind"] == "measured and projected"
    last = values["forecast"]["jobs"][-1]
    assert last["hours"]["kind"] == "measured"
    assert last["hours"]["gpu_hours"] == pytest.approx(0.5 * last["samples"] / 3600)
    slow = ("--objective", "budget", "--budget", "900", "--throughput", str(tmp_path / "t.json"))
    assert values["chosen"]["gpu_hours"]["hours"]["middle"] > 5000
    found = as_json(auto, *slow)["chosen"]["specs"]
    assert [one["name"] for one in found[-2:]] != ["vit_b16", "vit_l16"], "the slow pair does not fit into the budget"


BASE = {
    "name": "small",
    "data": {"train": "x.tar", "images": 5000},
    "family": {"members": ["vit_nano", "vit_micro"]},
    "chain": {
        "links": [
            {"model": "vit_nano", "train": {"epochs": 60}, "warmup": {"steps": 2}},
            {"model": "vit_micro", "train": {"epochs": 8}, "warmup": {"steps": 2}},
        ]
    },
    "baselines": {"train": {"epochs": 60}, "warmup": {"steps": 2}},
    "optimizer": {"batch": 500},
}


@pytest.mark.parametrize(
    ("points", "epochs", "words"),
    [
        ({10: 10.0, 20: 23.0, 30: 27.0}, 25.0, "not predicted but measured"),
        ({10: 10.0, 20: 18.0}, 20.0, "more than 20 epochs"),
        ({5: 26.0, 8: 27.0}, 5.0, "at most 5 epochs"),
    ],
)
def test_own_runs(auto: Auto, tmp_path: Path, points: dict[int, float], epochs: float, words: str) -> None:
    """The baseline has 25 % after 60 epochs."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(BASE))
    runs = [word for folder in lengths(tmp_path / "lab", points) for word in ("--runs", str(folder))]
    values = as_json(auto, *runs, "--members", "2", recipe=str(recipe))
    assert values["chosen"]["epochs"] == [60.0, epochs]
    assert any(words in note for note in values["notes"])
    without = as_json(auto, "--members", "2", recipe=str(recipe))
    assert without["chosen"]["epochs"] != values["chosen"]["epochs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--members", "3"), "--members 3: family.members names 4 models"),
        (("--members", "30"), "--members 30: there is no chain of 30 models"),
        (("--objective", "budget"), "needs --budget"),
        (("--objective", "budget", "--budget", "-1"), "--budget -1: should be a number of GPU-hours above 0"),
        (("--objective", "budget", "--budget", "nan"), "--budget nan: should be"),
        (("--objective", "budget", "--budget", "10"), "even the cheapest family, 1 model, takes"),
        (("--budget", "10"), "--budget 10: is for --objective budget, not cost"),
        (("--set", "baselines=null"), "baselines: is missing"),
        (("--set", "chain.from=somewhere"), "chain.from = 'somewhere'"),
        (("--set", "family.members.0=swin_t", "--set", "chain.links.0.model=swin_t"), "ViTs and Swins"),
        (("--set", "baselines.train.epochs=0"), "baselines.train = 0 epochs: is no step at all"),
        (("--gpus", "3"), "optimizer.batch = 1024: is not shared evenly by 3 GPUs"),
        (("--runs", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_clear_error(auto: Auto, words: tuple[str, ...], message: str) -> None:
    code, text, errors = auto(*words)
    assert code > 0
    assert text == ""
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_it_takes_no_torch() -> None:
    code = (
        "import sys\nfrom compt.cli import main\n"
        f"sys.argv = ['compt', 'plan', {CC3M!r}, '--auto']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'open_clip', 'timm', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
