"""Every command of the README is run somewhere, or says what it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from compt.cli import app
from compt.config import parse_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKED = re.compile(r"<!-- run: (\w+) -->\n```bash\n(.*?)```", re.DOTALL)
KINDS = {"ci", "long", "gpu"}


def test_every_block_of_commands_says_where_it_is_run() -> None:
    assert len(MARKED.findall(README)) == len(re.findall(r"```(?:bash|sh|console)", README)) > 2
    assert {kind for kind, _ in MARKED.findall(README)} == KINDS


def test_ci_runs_the_blocks_that_are_marked_for_it() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ".ci/readme" in script and "make test" in script


def test_commands_recipes_and_files_exist() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {group.name for group in app.registered_groups if group.name}
    for _, block in MARKED.findall(README):
        for name in re.findall(r"^compt (\w+)", block, re.MULTILINE):
            assert name in known, name
        for path in re.findall(r"(?:recipes|launchers)/[\w.]+", block):
            assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((docs/[\w./-]+)\)", README))))
def test_linked_pages_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_the_recipe_fragment_is_valid() -> None:
    (fragment,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    rest = {"name": "mine", "data": {"train": "shards/*.tar", "images": 100_000}}
    recipe = parse_recipe({**rest, **yaml.safe_load(fragment)})
    assert recipe.chain.from_ == "models/my-vit-t16"
