"""Every command of the README is run somewhere, or says what it needs."""

from __future__ import annotations

import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from compt.cli.launch import chain_words
from compt.cli.main import app
from compt.models.presets import PRESETS
from compt.plan.jobs import make_plan
from compt.recipe.read import find_recipe, load_recipe, parse_recipe

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


LAUNCHED = [
    shlex.split(line)[2:]
    for _, block in MARKED.findall(README)
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("compt launch ")
]
TORCHRUN = [words for words in LAUNCHED if words[0] == "torchrun"]
LAUNCHERS = [words for words in LAUNCHED if words[0] in ("deepspeed", "accelerate")]


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
    assert given[:4] == ["chain", "recipes/cc3m_vit.yaml", "--run-folder", "/shared/runs/cc3m"]
    assert [value.partition("=")[0] for name, value in pairwise(given) if name == "--set"] == ["data.train"]


@pytest.mark.parametrize("options", ["--recipe=a.yaml --run-folder=b", "a.yaml --run-folder=b"])
def test_the_launcher_s_other_spellings(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("compt.cli.main.main", lambda words: given.extend(words()))
    monkeypatch.setattr("sys.argv", ["train.py", *options.split(), "--set", "name=c"])
    runpy.run_path(str(ROOT / "launchers/train.py"), run_name="__main__")
    assert " ".join(given).replace("=b", " b") == "chain a.yaml --run-folder b --set name=c"


def test_there_is_a_command_for_each_launcher() -> None:
    assert sorted(words[0] for words in LAUNCHED) == ["accelerate", "deepspeed", "torchrun"]


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
    own, engine = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
    made = parse_recipe({"name": "mine", **own, **engine})
    assert [job.spec.name for job in make_plan(made).links] == ["vit_t16", "vit_wide"]
    wide = made.specs()["vit_wide"]
    assert (wide.width, wide.heads, wide.depth) == (448, 7, PRESETS["vit_s16"].depth)
    assert (made.engine.name, made.engine.recompute) == ("fsdp2", True)


@pytest.mark.parametrize("name", re.findall(r"^compt chain (\S+) --set", README, re.MULTILINE))
def test_a_recipe_of_the_readme_can_do_without_its_evaluation_sets(name: str) -> None:
    assert "--set evaluation=null" in README
    recipe = load_recipe(find_recipe(name), ["evaluation=null"])
    assert (recipe.evaluation.sets, recipe.evaluation.primary) == ([], None)
    moved = load_recipe(find_recipe(name), ["evaluation.sets.0.data=/data/in1k/*.tar"])
    assert moved.evaluation.sets[0].data == ["/data/in1k/*.tar"]


def test_the_readme_says_that_nothing_was_measured_on_a_gpu() -> None:
    """Until a measurement on a GPU is committed, the first screen has to say so."""
    assert "measured on a GPU yet" in README.partition("## Two commands")[0]
