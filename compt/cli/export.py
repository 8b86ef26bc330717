"""`compt export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compt.cli.evaluate import Source, SourceModel, SourcePrefix, open_source
from compt.cli.options import one_of, option
from compt.errors import ConfigError
from compt.export.formats import FORMATS
from compt.recipe.types import OneOf
from compt.text import say

_HUB = "Hugging Face Hub"


def export(
    model: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write", show_default=False)],
    to: Annotated[str, one_of(OneOf(FORMATS), "program that loads it")] = "open_clip",
    licence: Annotated[
        str | None, option("licence for the model card, as in apache-2.0", "--license", metavar="NAME")
    ] = None,
    image_size: Annotated[
        int | None, option("resize the positions for images of this size", metavar="PIXELS", default="the model's")
    ] = None,
    repository: Annotated[
        str | None, option("also upload OUT to this repository", "--push-to-hub", metavar="ORG/NAME", panel=_HUB)
    ] = None,
    private: Annotated[bool, option("make a new repository private", "--private", panel=_HUB)] = False,
    name: SourceModel = None,
    prefix: SourcePrefix = None,
) -> None:
    """Write a model for another program, with a model card.

    The formats are described in docs/export.md. OUT/README.md shows how to load the model.
    """
    FORMATS[to].check_packages(to)
    if private and repository is None:
        raise ConfigError("--private is for the repository of --push-to-hub; name one, or leave --private out")
    if repository is not None:
        from compt.export.hub import check_repository

        check_repository(repository)
    from compt.export.write import export_model

    for note in export_model(open_source(model, name, prefix), out, to, licence, image_size, repository):
        say(note)
    say(f"Wrote {out}")
    if repository is not None:
        from compt.export.hub import push

        say(f"Pushed {push(out, repository, private)}")
