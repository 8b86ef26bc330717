"""`compt slurm …`: a chain as dependent Slurm jobs."""

from __future__ import annotations

import shlex
import shutil
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from compt.cli.options import Overrides, RecipePath, RunFolder, option
from compt.cli.plan.command import check_here
from compt.errors import ConfigError
from compt.recipe.read import load_recipe
from compt.text import say, visible


def submit(
    recipe: RecipePath,
    set_: Overrides = None,
    run: RunFolder = None,
    nodes: Annotated[int, option("nodes of a link without `nodes`", metavar="N", min=1)] = 1,
    gpus: Annotated[int, option("GPUs per node, one process each", metavar="N", min=1)] = 8,
    baselines: Annotated[bool, option("also train the baselines, as a job array", "--baselines")] = False,
    sbatch: Annotated[
        list[str] | None,
        option("option of sbatch, as in --sbatch=--partition=gpu; repeatable", "--sbatch", metavar="OPTION"),
    ] = None,
    send: Annotated[bool, option("submit the jobs, instead of only showing them", "--submit")] = False,
) -> None:
    """Train each link of a chain in its own Slurm job.

    Shows the commands; --submit runs them. Each job starts after the one before it, and a link that fails cancels
    the rest. Skips links that the run folder already has. Submits nothing while Slurm has one of the links queued.
    """
    from compt.chain.slurm import SCRIPT, clash, make_orders
    from compt.chain.slurm import send as send_orders

    # Slurm runs a copy of the script, which looks for common.sh in the folder of sbatch.
    if not SCRIPT.is_file():
        raise ConfigError(f"{SCRIPT} is missing; write it with `compt slurm copy`, or change to a checkout")
    loaded = load_recipe(recipe, set_)
    if send:
        check_here(loaded, str(recipe))
    folder = run or Path("runs") / loaded.name
    orders = make_orders(
        loaded,
        recipe,
        folder,
        nodes=nodes,
        gpus=gpus,
        overrides=set_ or (),
        options=sbatch or (),
        baselines=baselines,
    )
    if not orders:
        say(f"{folder}: every model is done.")
    elif send:
        send_orders(orders, folder, say)
    else:
        for order in orders:
            say(shlex.join(order.command(f"ID_OF_{order.after}" if order.after else None)))
        there = clash(orders, folder)
        refused = f"would refuse: {there}" if there else "does that."
        typer.echo(visible(f"Nothing was submitted; --submit {refused}"), err=True)


def copy(
    out: Annotated[Path, typer.Argument(metavar="DEST", help="folder to write")] = Path("slurm"),
) -> None:
    """Copy the job scripts for Slurm.

    `compt slurm submit` and the scripts expect them in ./slurm. A checkout has them there already.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already")
    shutil.copytree(str(resources.files("compt") / "slurm"), out)
    say(f"Wrote {out}")


def names(
    recipe: RecipePath,
    set_: Overrides = None,
    baselines: Annotated[bool, option("list the baselines, not the links", "--baselines")] = False,
) -> None:
    """List the names that `compt chain --only` accepts."""
    from compt.chain.slurm import names as names_of

    for name in names_of(load_recipe(recipe, set_), str(recipe), baselines=baselines):
        say(name)
