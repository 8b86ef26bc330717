"""`compt recipes …`: the recipes that come with compt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from compt.cli.options import RecipePath
from compt.errors import ConfigError
from compt.files import write_text
from compt.recipe.read import load_recipe, recipe_text, shipped
from compt.text import TextTable, say, show, visible


def list_recipes() -> None:
    """List the recipes that come with compt."""
    rows = []
    for name, path in shipped("recipes").items():
        links = load_recipe(path).chain.links
        chain = f"{links[0].model} - {links[-1].model} ({len(links)} models)"
        # The first sentence of the comment at the top, without what it adds in parentheses.
        text = recipe_text(path).partition("\nname:")[0].replace("\n#", "").removeprefix("# ")
        rows.append((name, chain, re.split(r"[.:;,] | \(", text)[0].removesuffix(".")))
    show(TextTable("Recipes", ("Name", "Chain", "Description"), rows, left=3))


def show_recipe(recipe: RecipePath) -> None:
    """Print a recipe."""
    typer.echo(visible(recipe_text(recipe)), nl=False)


def copy(
    recipe: RecipePath,
    out: Annotated[
        Path, typer.Argument(metavar="DEST", help="file or folder to write", show_default="this folder")
    ] = Path(),
) -> None:
    """Copy a recipe, to change it."""
    file = out / recipe.name if out.is_dir() else out
    if file.exists():
        raise ConfigError(f"{file}: exists already")
    write_text(file, recipe_text(recipe))
    say(f"Wrote {file}")
