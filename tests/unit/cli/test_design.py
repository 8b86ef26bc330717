"""`compt plan --auto`: what it shows, the recipe that it writes, what it refuses."""

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

from compt.cli.main import main
from compt.models.presets import PRESETS
from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe
from tests.helpers.curves import BASELINE, NANO, lengths, write_run
from tests.helpers.curves import link as grown

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.yaml"))
CC3M = "recipes/cc3m_vit.yaml"

Auto = Callable[..., tuple[int, str, str]]


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Auto:
    """Run `compt plan RECIPE --auto`. Returns exit code, output, errors."""
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
    assert chosen["macs"]["low"] == pytest.approx(chosen["macs"]["middle"])
    assert chosen["macs"]["middle"] < chosen["macs"]["high"]


def test_links_keep_the_recipe_s_warm_up_learning_rate_and_operators(auto: Auto) -> None:
    changed = ("--set", "chain.links.2.lr=3e-4", "--set", "chain.links.2.warmup.steps=700")
    changed += ("--set", "chain.links.2.expand={text: {width: lemon}}")
    links = {link["model"]: link for link in as_json(auto, *changed)["recipe"]["chain"]["links"]}
    assert len(links) > 4
    for name, link in links.items():
        first, own = name == "vit_t16", name == "vit_b16"
        assert link["warmup"] == {"steps": 8000 if first else 700 if own else 1000}, name
        assert link.get("lr") == (3e-4 if own else None)
        assert link.get("expand") == ({"text": {"width": "lemon"}} if own else None)


def test_a_link_keeps_its_engine_and_nodes_and_alpha_is_of_one_kind(auto: Auto) -> None:
    """Without the engine, the recipe may not fit the GPU that it was designed for."""
    own = {"engine": {"name": "fsdp2", "micro_batch": 32}, "nodes": 4}
    changed = ("--set", f"chain.links.1.engine={json.dumps(own['engine'])}", "--set", "chain.links.1.nodes=4")
    links = {link["model"]: link for link in as_json(auto, *changed)["recipe"]["chain"]["links"]}
    name = load_recipe(ROOT / CC3M).chain.links[1].model
    assert {key: links[name].get(key) for key in own} == own
    assert all("nodes" not in link and "engine" not in link for model, link in links.items() if model != name)
    code, _, errors = auto("--set", "chain.links.1.alpha=0")
    assert code == 2
    assert "alpha is 0 for some links and above 0 for others" in " ".join(errors.split())


def test_a_first_link_keeps_its_engine_where_smaller_models_are_put_before_it(auto: Auto, tmp_path: Path) -> None:
    """Warm-up and rate are those of the second link: the first one trained from scratch."""
    out, own = tmp_path / "auto.yaml", {"engine": {"micro_batch": 32, "recompute": True}, "nodes": 2}
    first = {"model": "vit_b16", "train": {"epochs": 128}, "warmup": {"steps": 8000}, "lr": 1e-4, **own}
    second = {"model": "vit_l16", "train": {"epochs": 15}, "warmup": {"steps": 900}, "lr": 5e-4}
    words = ("--set", "family.members=[vit_b16, vit_l16]", "--set", f"chain.links={json.dumps([first, second])}")
    values = as_json(auto, *words, "--out", str(out))
    links = {link["model"]: link for link in values["recipe"]["chain"]["links"]}
    assert len(links) > 2
    assert {key: links["vit_b16"].get(key) for key in own} == own
    assert (links["vit_b16"]["warmup"], links["vit_b16"]["lr"]) == ({"steps": 900}, 5e-4)
    assert sum(job.cost.total_macs for job in make_plan(load_recipe(out), world_size=8).links) == pytest.approx(
        values["chosen"]["macs"]["middle"], rel=0.01
    )


def test_another_loss(auto: Auto, tmp_path: Path) -> None:
    out = tmp_path / "auto.yaml"
    assert auto("--set", "optimizer.loss=siglip", "--out", str(out))[0] == 0
    assert {spec.loss for spec in load_recipe(out).specs().values()} == {"siglip"}


def test_a_warm_up_is_at_most_a_tenth_of_its_link(auto: Auto, tmp_path: Path) -> None:
    """On few images, the recipe's 1,000 steps would be most of a link."""
    out = tmp_path / "auto.yaml"
    assert auto("--set", "data.images=100000", "--out", str(out))[0] == 0
    jobs = make_plan(load_recipe(out)).links[1:]
    assert jobs
    assert all(0 < job.warmup_steps <= job.steps / 10 for job in jobs)


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
    for words in ("9 published links", "is a stated rule", "Extrapolated", "A100 80 GB: projected", "compt bench"):
        assert words in text
    for label in ("5 models, chosen: vit_t16, vit_c16", "4 models: vit_t16", "4 models, the recipe's: "):
        assert label in text
    assert "baselines: vit_t16" in text


@pytest.mark.parametrize("objective", ["cost", "acceleration", "budget --budget 300"])
@pytest.mark.parametrize("columns", [60, 80, 100, 110])
def test_a_person_with_any_terminal(auto: Auto, monkeypatch: pytest.MonkeyPatch, objective: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = auto("--objective", *objective.split())[1].splitlines()
    assert max(map(len, lines)) <= columns
    rules = [line for line in lines if set(line.strip()) == {"─"}]
    assert len(rules) == 2 or columns == 60, "both are tables"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_line_a_row_in_80_columns(auto: Auto, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = auto("--kind", "a100-80", recipe=recipe)[1].splitlines()
    rules = [at for at, line in enumerate(lines) if set(line.strip()) == {"─"}]
    assert len(rules) == 2
    rows = [row for at in rules for row in lines[at + 1 : lines.index("", at)]]
    assert all(line[0] != " " for line in rows), "a row that starts with a blank continues the one before"


def test_alternatives_are_no_better(auto: Auto) -> None:
    for objective, better in (("cost", min), ("acceleration", max)):
        values = as_json(auto, "--objective", objective)
        key = {"cost": "macs", "acceleration": "acceleration"}[objective]
        found = [one[key]["middle"] for one in values["alternatives"] if one["predicted"]]
        assert values["best"][key]["middle"] == pytest.approx(better(found))
        assert len({len(one["specs"]) for one in values["alternatives"]}) >= 5


def test_a_simpler_chain_is_preferred_and_that_is_said(auto: Auto) -> None:
    values = as_json(auto)
    chosen, best = values["chosen"], values["best"]
    assert [spec["name"] for spec in chosen["specs"]] == ["vit_t16", "vit_c16", "vit_s16", "vit_b16", "vit_l16"]
    assert len(best["specs"]) == 6
    assert best["macs"]["middle"] < chosen["macs"]["middle"] <= 1.03 * best["macs"]["middle"]
    own = next(one for one in values["alternatives"] if not one["predicted"])
    assert chosen["gpu_hours"]["hours"]["middle"] < own["gpu_hours"]["hours"]["middle"]
    text = " ".join(auto()[1].split())
    assert "Simpler chains are preferred within 3 %: fewer models, then presets. The best one, 6 models, least" in text
    assert "6 models, least MACs: vit_192x4" in text


def test_hours_are_another_objective(auto: Auto) -> None:
    words = ("--members", "6")
    values, macs = (as_json(auto, *words, *more) for more in (("--in", "hours"), ()))
    assert (values["unit"], macs["unit"]) == ("gpu_hours", "macs")
    hours = [one["best"]["gpu_hours"]["hours"]["middle"] for one in (values, macs)]
    assert hours[0] < hours[1]
    assert values["best"]["macs"]["middle"] > macs["best"]["macs"]["middle"]
    words = ("--objective", "acceleration", "--members", "5")
    gains = [as_json(auto, *words, *more)["best"] for more in (("--in", "hours"), ())]
    assert gains[0]["gpu_hours_acceleration"]["middle"] > gains[1]["gpu_hours_acceleration"]["middle"]
    assert gains[0]["acceleration"]["middle"] < gains[1]["acceleration"]["middle"]


def test_a_budget(auto: Auto) -> None:
    paid, members = [], []
    for budget in (150, 260, 400, 900):
        values = as_json(auto, "--objective", "budget", "--budget", str(budget))
        paid.append(values["chosen"]["gpu_hours"]["hours"]["middle"])
        members.append(len(values["chosen"]["specs"]))
        assert paid[-1] <= budget
    assert members == sorted(members)
    rates = "baselines.lr={vit_t16: 1e-3, vit_l16: 5.0e-4}"
    values = as_json(auto, "--objective", "budget", "--budget", "150", "--set", rates)
    assert values["recipe"]["baselines"]["lr"] == {"vit_t16": 1e-3}, "without the models that were left out"
    text = auto("--objective", "budget", "--budget", "150")[1]
    assert text.startswith(
        "Chain for cc3m_vit: best family for 150 GPU-hours, without vit_s16, vit_b16, vit_l16, which it does not reach"
    )
    assert "kept by the planned epochs" in text


def test_gpus_mean_nothing_to_a_recipe_for_cpus(auto: Auto) -> None:
    emoji = "recipes/emoji.yaml"
    assert "GPU-hours" not in auto(recipe=emoji)[1]
    values = as_json(auto, recipe=emoji)
    assert values["chosen"]["gpu_hours"] is values["chosen"]["gpu_hours_acceleration"] is None
    assert values["individually"]["gpu_hours"] is values["forecast"]["machine"] is None
    words = (("--kind", "h100"), ("--gpus", "4"), ("--in", "hours"), ("--objective", "budget", "--budget", "1"))
    for asked in words:
        assert "GPU-hours" in auto(*asked, recipe=emoji)[1], asked


def test_a_file_that_exists_is_kept(auto: Auto, tmp_path: Path) -> None:
    mine, recipe = tmp_path / "mine.yaml", tmp_path / "recipe.yaml"
    mine.write_text("mine")
    recipe.write_text((ROOT / CC3M).read_text())
    for out, why in ((mine, "exists already"), (recipe, "is the recipe that is read"), (tmp_path, "exists already")):
        before = out.read_bytes() if out.is_file() else b""
        code, text, errors = auto("--out", str(out), recipe=str(recipe))
        assert (code, text) == (2, "")
        assert f"--out {out}: {why}; name a file that does not exist" in errors
        assert out.is_dir() or out.read_bytes() == before
    assert auto("--out", str(tmp_path / "new" / "folder" / "x.yaml"), recipe=str(recipe))[0] == 0
    assert load_recipe(tmp_path / "new" / "folder" / "x.yaml").name == "cc3m_vit_auto"


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
    told = " ".join(auto("--throughput", str(tmp_path / "t.json"))[1].split())
    assert "measured an A100, 2026-01-01 (measured at batch 256; this plan has 128 per GPU)" in told
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
    ("points", "least", "most", "words"),
    [
        ({10: 10.0, 20: 23.0, 30: 27.0}, 25.0, 25.0, "not predicted but measured"),
        ({10: 10.0, 20: 18.0}, 20.5, 60.0, "more than 20 epochs"),
        ({5: 26.0, 8: 27.0}, 0.5, 5.0, "at most 5 epochs"),
    ],
)
def test_own_runs(auto: Auto, tmp_path: Path, points: dict[int, float], least: float, most: float, words: str) -> None:
    """The baseline has 25 % after 60 epochs."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(BASE))
    runs = [word for folder in lengths(tmp_path / "lab", points) for word in ("--runs", str(folder))]
    values = as_json(auto, *runs, "--members", "2", recipe=str(recipe))
    first, second = values["chosen"]["epochs"]
    assert first == 60
    assert least <= second <= most
    assert any(words in note for note in values["notes"])
    without = as_json(auto, "--members", "2", recipe=str(recipe))
    assert without["chosen"]["epochs"] != values["chosen"]["epochs"]


def test_a_link_with_features_says_nothing_of_links_without(auto: Auto, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(BASE))
    runs = [word for run in lengths(tmp_path / "lab", {10: 10.0, 30: 27.0}) for word in ("--runs", str(run))]
    words = ("--set", "chain.distill.alpha=0", "--members", "2")
    values, without = (as_json(auto, *words, *more, recipe=str(recipe)) for more in (runs, ()))
    assert values["chosen"] == without["chosen"]
    assert "No link without distillation of" in " ".join(values["notes"])


def test_all_bounds_of_a_link_are_named(auto: Auto) -> None:
    folders = ("docs/results/emoji", "docs/results/calibrated")
    found = []
    for runs in (folders, folders[::-1]):
        values = as_json(auto, *(word for run in runs for word in ("--runs", run)), recipe="recipes/emoji.yaml")
        found.append(values["chosen"]["epochs"])
        notes = " ".join(values["notes"])
        assert "vit_micro to vit_mini: more than 14 epochs" in notes
        assert "vit_micro to vit_mini: at most 53.4151 epochs" in notes
    assert found[0] == found[1]
    assert found[0][-1] > 14


def test_links_from_random_weights_say_nothing_of_designed_ones(auto: Auto, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(BASE))
    jobs = [[NANO, BASELINE, grown(epochs, top1, initial="random")] for epochs, top1 in ((10, 10.0), (20, 30.0))]
    runs = [word for at, one in enumerate(jobs) for word in ("--runs", str(write_run(tmp_path / str(at), one)))]
    assert "crosses its baseline" in " ".join(as_json(auto, *runs, "--members", "2", recipe=str(recipe))["notes"])
    random = as_json(auto, "--set", "chain.links.1.initial=random")
    assert {link.get("initial") for link in random["recipe"]["chain"]["links"]} == {None}


def test_runs_that_report_on_two_sets(auto: Auto, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(BASE))
    folders = lengths(tmp_path / "lab", {10: 10.0, 20: 23.0, 30: 27.0})
    state = folders[-1] / "run.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "primary": "other"}))
    runs = [word for folder in folders for word in ("--runs", str(folder))]
    code, text, errors = auto(*runs, recipe=str(recipe))
    assert (code, text) == (2, "")
    assert (
        "the runs report on other and test_style: give runs that report on one, or name it (--runs-on NAME)" in errors
    )
    values = as_json(auto, *runs, "--runs-on", "test_style", "--members", "2", recipe=str(recipe))
    assert values["chosen"]["epochs"] == [60.0, 25.0]
    code, text, errors = auto(*runs, "--runs-on", "test_stile", recipe=str(recipe))
    assert "--runs-on test_stile: no job was scored on it by top-1 (did you mean 'test_style'?)" in errors


def test_seeds_of_one_link_are_averaged(auto: Auto, tmp_path: Path) -> None:
    """Seed 0 reaches the 25 % of the baseline after 15 epochs, seed 1 after 25, their mean after 20."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(BASE))
    runs: list[str] = []
    for seed, points in ((0, {10: 20.0, 20: 30.0, 30: 30.0}), (1, {10: 10.0, 20: 20.0, 30: 30.0})):
        for epochs, top1 in points.items():
            jobs = [NANO, BASELINE, grown(epochs, top1, seed=seed)]
            runs += ["--runs", str(write_run(tmp_path / f"{seed}-{epochs}", jobs))]
    values = as_json(auto, *runs, "--members", "2", recipe=str(recipe))
    assert values["chosen"]["epochs"] == [60.0, 20.0]
    assert "shifted by 1 measured link of" in " ".join(values["notes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--in", "macs", "--objective", "budget", "--budget", "1"), "--in macs: is for the objectives cost and"),
        (("--runs-on", "x"), "--runs-on x: is for --runs, which is missing"),
        (
            ("--set", "data.images=20000"),
            "recipes/cc3m_vit.yaml: baselines.warmup = 8000 steps: 8000 steps are longer than baselines.train",
        ),
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
        (("--set", "baselines.train.epochs=0"), "baselines.train = 0 epochs: is less than one step"),
        (("--gpus", "3"), "optimizer.batch 1024 cannot be shared evenly by 3 processes"),
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
        "import sys\nfrom compt.cli.main import main\n"
        f"sys.argv = ['compt', 'plan', {CC3M!r}, '--auto']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'open_clip', 'timm', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_what_is_printed(auto: Auto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = auto()[1].partition("\n\nSizes, ")[0]
    shown = "\n".join(line.rstrip() for line in table.splitlines())
    assert f"```text\n{shown}\n```" in page


def test_a_simpler_chain_keeps_the_budget(auto: Auto) -> None:
    """With 300 GPU-hours one of presets is preferred; where only the best chain is affordable, that is taken."""
    links = "chain.links=[{model: vit_l16, train: {epochs: 20}, warmup: {steps: 10}}]"
    words = ("--set", "family.members=[vit_t16, vit_l16]", "--set", links, "--objective", "budget", "--budget")
    values = as_json(auto, *words, "300")
    best, chosen = (values[key]["gpu_hours"]["hours"]["middle"] for key in ("best", "chosen"))
    assert best < chosen <= 300
    assert {spec["name"] for spec in values["chosen"]["specs"]} < PRESETS.keys()
    between = as_json(auto, *words, str((best + chosen) / 2))
    assert between["chosen"] == between["best"]
    assert between["chosen"]["specs"] == values["best"]["specs"]


def test_more_images_than_were_published(auto: Auto) -> None:
    merged = "recipes/merged15m_vit.yaml"
    words = "are beyond the 12,927,058 of the largest published data set"
    assert words in auto("--set", "data.images=13000000", recipe=merged)[1]
    assert words not in auto(recipe=merged)[1]


def test_no_chain_is_listed_twice(auto: Auto) -> None:
    for words in (("--objective", "acceleration"), ("--in", "hours"), ("--objective", "budget", "--budget", "400")):
        found = as_json(auto, *words)["alternatives"]
        chains = [tuple(spec["name"] for spec in one["specs"]) for one in found if one["predicted"]]
        assert len(set(chains)) == len(chains)
