"""Find how many epochs the emoji chain's links need to match their baselines: train each link for several lengths.

`python -m benchmarks.expansion.emoji_curves` continues from `compt chain recipes/emoji.yaml --baselines`, whose links
are the teachers, and writes docs/results/curves. It takes about 20 minutes on two cores, and resumes after a stop.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from compt.cli.main import app
from compt.recipe.read import load_recipe

RECIPE, RUN, OUT = Path("recipes/emoji.yaml"), Path("runs/emoji"), Path("docs/results/curves")
LENGTHS = {"vit_micro": (5, 20, 30, 40), "vit_mini": (30, 40)}
"""Epochs to train besides the recipe's own."""


def train(model: str, epochs: int) -> Path:
    """Train the link `model` for `epochs` from the teacher in `RUN`; returns its run folder."""
    folder = Path("runs/curves") / f"{model}-{epochs}"
    links = [link.model_dump(mode="json", exclude_none=True) for link in load_recipe(RECIPE, []).chain.links]
    at = [link["model"] for link in links].index(model)
    for before, link in enumerate(links[:at]):
        job = f"jobs/{before + 1}-{link['model']}"
        if not (folder / job).exists():
            shutil.copytree(RUN / job, folder / job)
    links[at]["train"] = {"epochs": epochs}
    app(
        ["chain", str(RECIPE), "--run-folder", str(folder), "--set", f"chain.links={json.dumps(links[: at + 1])}"],
        standalone_mode=False,
    )
    return folder


def main() -> None:
    """Train what is missing, then write the curves."""
    if not (RUN / "run.json").exists():
        sys.exit(f"{RUN} is missing: run `compt chain {RECIPE} --baselines` first")
    folders = [train(model, epochs) for model, lengths in LENGTHS.items() for epochs in lengths]
    app(["curves", str(RUN), *map(str, folders), "--out", str(OUT)], standalone_mode=False)


if __name__ == "__main__":
    main()
