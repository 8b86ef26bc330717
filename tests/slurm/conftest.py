"""One cluster for all tests of this folder, and a recipe of a tiny chain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.recipe import make_data, write_recipe
from tests.slurm.cluster import Cluster, missing

CHANGES = (
    "chain.links.0.train.steps=120",
    "chain.links.1.train.steps=60",
    "engine.checkpoint_every.steps=20",
    "evaluation.every=",
    f"data.decoder={'dali' if find_spec('nvidia.dali') else 'torch'}",
)
"""Long enough for something to happen in the middle."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    made = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@dataclass(frozen=True)
class Files:
    """Data and recipes of tiny chains, in a folder whose name has a blank and a quote."""

    folder: Path

    @property
    def data(self) -> str:
        """The training shards, for DATA: the recipes themselves name some that do not exist."""
        return str(self.folder / "train" / "*.tar")

    def recipe(self, name: str, *changes: str) -> Path:
        """A recipe with absolute paths."""
        places = (
            "data.train=/nowhere/*.tar",
            f'evaluation.validation=["{self.folder}/val/*.tar"]',
            f'evaluation.sets.0.data="{self.folder}/eval/*.tar"',
            f'evaluation.sets.1.data="{self.folder}/eval/*.tar"',
        )
        return write_recipe(self.folder / f"{name}.yaml", f"name={name}", *CHANGES, *places, *changes)

    def settings(self, recipe: Path, run: Path) -> dict[str, str]:
        """The environment variables that the scripts take."""
        own = {"DATA": self.data, "RECIPE": str(recipe), "RUN_DIR": str(run), "PYTHON": sys.executable, "GPUS": "1"}
        return {**own, "OMP_NUM_THREADS": "1", "SLURM_WAIT": "20"}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(make_data(tmp_path_factory.mktemp("a user's files")))
