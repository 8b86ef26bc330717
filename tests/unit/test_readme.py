"""Every command of the README is run somewhere, or says what it needs."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from compt.cli.launch import chain_words
from compt.cli.main import app
from compt.models.presets import NORM_EPS, PRESETS
from compt.plan.jobs import make_plan
from compt.plan.links import Start
from compt.recipe.read import load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKED = re.compile(r"<!-- run: (\w+) -->\n```bash\n(.*?)```", re.DOTALL)
KINDS = {"ci", "long", "gpu"}


def test_every_block_of_commands_says_where_it_is_run() -> None:
    assert len(MARKED.findall(README)) == len(re.findall(r"```(?:bash|sh|console)", README)) > 2
    assert {kind for kind, _ in MARKED.findall(README)} == KINDS


def test_ci_runs_the_blocks_that_are_marked_for_it() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ".ci/readme" in script
    assert "make test" in script


def test_commands_recipes_and_files_exist() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {group.name for group in app.registered_groups if group.name}
    for _, block in MARKED.findall(README):
        for name in re.findall(r"^compt (\w+)", block, re.MULTILINE):
            assert name in known, name
        for path in re.findall(r"(?:recipes|launchers|slurm|ds_configs)/[\w./]+", block):
            assert (ROOT / path).is_file(), path


TORCHRUN = [
    shlex.split(line)
    for _, block in MARKED.findall(README)
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("torchrun ")
]


@pytest.mark.parametrize("words", TORCHRUN, ids=" ".join)
def test_torchrun_hands_on_what_belongs_to_its_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    at = words.index("launchers/train.py")
    read = get_args_parser().parse_args(words[1:])
    assert (read.training_script, read.training_script_args) == (words[at], words[at + 1 :])
    given: list[str] = []
    monkeypatch.setattr("compt.cli.main.main", lambda words: given.extend(words()))
    monkeypatch.setattr("sys.argv", words[at:])
    runpy.run_path(str(ROOT / words[at]), run_name="__main__")
    assert given == ["chain", "recipes/cc3m_vit.yaml", "--run-folder", "/shared/runs/cc3m"]


@pytest.mark.parametrize("options", ["--recipe=a.yaml --run-folder=b", "a.yaml --run-folder=b"])
def test_the_launcher_s_other_spellings(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("compt.cli.main.main", lambda words: given.extend(words()))
    monkeypatch.setattr("sys.argv", ["train.py", *options.split(), "--set", "name=c"])
    runpy.run_path(str(ROOT / "launchers/train.py"), run_name="__main__")
    assert " ".join(given).replace("=b", " b") == "chain a.yaml --run-folder b --set name=c"


def test_there_is_a_command_for_torchrun() -> None:
    assert len(TORCHRUN) == 1


LAUNCHERS = [
    shlex.split(line)
    for _, block in MARKED.findall(README)
    for line in block.splitlines()
    if line.startswith(("deepspeed ", "accelerate "))
]


@pytest.mark.parametrize("words", LAUNCHERS, ids=" ".join)
def test_other_launchers_options_become_the_chain_s(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "launchers/train.py" in words
    given = chain_words(words[words.index("launchers/train.py") + 1 :], {})
    assert given[:2] == ["chain", "recipes/cc3m_vit.yaml"]
    overrides = [value for name, value in pairwise(given) if name == "--set"]
    engine = load_recipe(ROOT / given[1], overrides).engine
    assert engine.name == ("zero2" if words[0] == "deepspeed" else "ddp")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((docs/[\w./-]+)\)", README))))
def test_linked_pages_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_the_recipe_fragments_are_valid() -> None:
    """The second one changes the first into a chain that starts from a model of its first link's size."""
    engines, first, second = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
    rest = {"name": "mine", "data": {"train": "shards/*.tar", "images": 100_000}}
    shared = parse_recipe({**rest, **engines, "family": {"members": ["vit_t16"]}})
    assert (shared.engine.name, shared.engine_of("vit_t16").name, shared.engine_of("vit_t16").recompute) == (
        "fsdp2",
        "ddp",
        True,
    )
    whole = parse_recipe({**rest, **first})
    assert whole.chain.from_ is None
    begun = parse_recipe({**rest, **first, **second})
    assert begun.chain.from_ == "models/my-vit-t16"
    given = Start(PRESETS["vit_t16"], "hash")
    (only,) = make_plan(begun, start=given).links
    assert (only.spec.name, only.teacher_spec) == ("vit_wide", given.spec)
    # Both operators of the second fragment change the eps of norms.
    assert begun.chain.links[0].expand is not None
    assert replace(only.spec, norm_eps=NORM_EPS, text_norm_eps=NORM_EPS) == make_plan(whole).links[1].spec


@pytest.mark.parametrize("path", re.findall(r"^compt chain (recipes/\S+)", README, re.MULTILINE))
def test_a_recipe_of_the_readme_can_do_without_its_evaluation_sets(path: str) -> None:
    assert "--set evaluation=null" in README
    recipe = load_recipe(ROOT / path, ["evaluation=null"])
    assert (recipe.evaluation.sets, recipe.evaluation.primary) == ([], None)
    moved = load_recipe(ROOT / path, ["evaluation.sets.0.data=/data/in1k/*.tar"])
    assert moved.evaluation.sets[0].data == ["/data/in1k/*.tar"]


def test_the_recomputed_accelerations_are_those_of_the_results() -> None:
    with (ROOT / "benchmarks/results/table_2/cells.csv").open(encoding="utf-8") as file:
        cells = {(row["row"], row["quantity"]): row for row in csv.DictReader(file)}
    for name, last in (
        ("CC3M, ViT", "CC3M ViT vit_l16"),
        ("CC3M, Swin", "CC3M Swin swin_l"),
        ("Merged", "Merged-15M ViT vit_l16"),
    ):
        (line,) = [line for line in README.splitlines() if line.startswith(f"| {name}")]
        cell = cells[last, "Speed-up in MACs, accumulated"]
        values = [float(cell[key]) for key in ("published", "from_inputs", "from_counters", "exact_mode")]
        assert re.findall(r"[\d.]+x", line) == [f"{value:.2f}x" for value in values], name
