"""Evaluation suites: lists of sets that `compt eval` scores together. compt/suites has those that come with compt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from compt.errors import ConfigError, nearest
from compt.recipe.read import read_yaml, recipe_text, refuse, shipped
from compt.recipe.schema import EvalSet
from compt.recipe.types import Paths, Section


class SuiteSet(EvalSet):
    """A set with what is known of it. Its paths start at the suite's root."""

    of_other_tasks: ClassVar[frozenset[str]] = frozenset({"train"})  # for `compt eval --suite … --task linear_probe`
    train: Paths | None = None
    """Labelled images for `linear_probe` and `knn`, written as `data`. `[]`: the set has no training split."""
    title: str = ""
    """Name of the set in tables. Default: its `name`."""
    metric: str | None = None
    """The score that others report for this set, where that is not the first one of its task: `mean_per_class`."""
    images: int | None = Field(default=None, gt=0)
    """Images that the set has. A table marks a score over fewer."""
    classes: int | None = Field(default=None, gt=0)
    """Classes that the set has."""
    hub: str | None = None
    """Data set of Hugging Face's hub that `compt eval fetch` downloads: OWNER/NAME."""
    classnames_sha256: str | None = None
    """First digits of the hash of the class names. A table marks a score with others."""
    templates_sha256: str | None = None
    """First digits of the hash of the templates."""
    published: list[float] = Field(default_factory=list)
    """Published scores, in the order of the suite's `published`."""

    @property
    def label_in_tables(self) -> str:
        """`title`, or else `name`."""
        return self.title or self.name

    @property
    def folder(self) -> str | None:
        """The folder below the root that `compt eval fetch` writes; None for a set that it cannot download."""
        return self.hub.rpartition("/")[2] if self.hub else None


class Suite(Section):
    """Evaluation sets that are scored together."""

    root: str = "data/eval"
    """Folder in which the sets are, unless the command line names another."""
    hub: str | None = None
    """`hub` of sets that name none, with `{name}` for the set's name."""
    published: list[str] = Field(default_factory=list)
    """Names of published models, which `compt eval --published` shows beside others."""
    sets: list[SuiteSet] = Field(min_length=1)
    """The sets, in the order of tables."""

    def with_task(self, task: str) -> Suite:
        """The classification sets with another task, and the training split beside each one's test split.

        A set without one has an empty `train`, and is shown so. Raises ConfigError if that is all sets.
        """
        sets = []
        for item in self.sets:
            train = item.train
            if train is None:
                train = [part.replace("/test/", "/train/") for part in item.data if "/test/" in part]
            if item.task == "zeroshot":
                # Another name: the scores of two tasks may go to one folder.
                changes = {"name": f"{item.name}-{task}", "title": item.label_in_tables, "task": task, "train": train}
                sets.append(item.model_copy(update={**changes, "published": []}))
        if not any(item.train for item in sets):
            raise ConfigError(f"--task {task}: no set of the suite has a training split")
        return self.model_copy(update={"sets": sets, "published": []})

    @model_validator(mode="before")
    @classmethod
    def _from_the_hub(cls, values: Any) -> Any:
        """Give sets that come from the hub their place there and their shards, in clip_benchmark's layout."""
        if not isinstance(values, dict) or not isinstance(values.get("sets"), list):
            return values
        hub, sets = values.get("hub"), []
        for item in values["sets"]:
            if isinstance(item, dict) and "data" not in item:
                place = item.get("hub") or (isinstance(hub, str) and hub.replace("{name}", str(item.get("name"))))
                if place:
                    item = {**item, "hub": place, "data": f"{str(place).rpartition('/')[2]}/test/*.tar"}
            sets.append(item)
        return {**values, "sets": sets}

    @model_validator(mode="after")
    def _whole(self) -> Suite:
        names = [item.name for item in self.sets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two sets have the name '{twice}'")
        for item in self.sets:
            if item.published and len(item.published) != len(self.published):
                raise ValueError(
                    f"set '{item.name}' has {len(item.published)} published scores, but `published` names "
                    f"{len(self.published)} models"
                )
        return self


def load_suite(name: str | Path) -> Suite:
    """Read a suite: a file, or the name of one that comes with compt. Raises ConfigError."""
    known = shipped("suites")
    path = Path(name) if Path(name).is_file() else known.get(str(name))
    if path is None:
        raise ConfigError(
            f"suite {name}: no such file, and no suite of that name{nearest(str(name), known)}; known: "
            f"{', '.join(known)}"
        )
    values = read_yaml(recipe_text(path), str(path))
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        raise refuse(str(path), error, Suite) from None


def name_of(data: str) -> str:
    """The name of a set that has none: of its folder, without those of splits. wds_cars/test/*.tar is wds_cars."""
    parts = Path(data).parts[:-1] if data.endswith(".tar") else Path(data).parts
    named = [part for part in parts if part not in ("test", "train", "val")]
    found = (named or list(parts) or [Path.cwd().name])[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", found).strip("-._") or "set"


def one_set(item: EvalSet) -> Suite:
    """The suite of one set, whose paths start at the current folder."""
    return Suite(root=str(Path.cwd()), sets=[SuiteSet(**item.model_dump())])
