"""`compt slurm`: a chain as dependent jobs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from compt.cli.options import Overrides, RecipePath
from compt.errors import ConfigError
from compt.recipe.read import load_recipe
from compt.text import terminal

slurm_app = typer.Typer(help="Submit chains to a Slurm cluster.", no_args_is_help=True)


@slurm_app.command()
def submit(
    recipe: RecipePath,
    set_: Overrides = None,
    run: Annotated[Path | None, typer.Option("--run", help="run folder; default: runs/NAME of the recipe")] = None,
    nodes: Annotated[int, typer.Option(help="nodes for links without `nodes` in the recipe", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs, and processes, per node", min=1)] = 8,
    baselines: Annotated[bool, typer.Option("--baselines", help="add the baselines, as a job array")] = False,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="pass an option to every sbatch: --sbatch=--partition=gpu"),
    ] = None,
    send: Annotated[bool, typer.Option("--submit", help="submit the jobs; without it they are only shown")] = False,
) -> None:
    """Train each link of a chain in a job of its own, after the one before it; a link that fails cancels the rest.

    Shows the commands, and runs them with --submit. Links that the run folder already has are left out. Nothing is
    submitted while one of the links is in Slurm's queue.
    """
    from compt.chain.slurm import SCRIPT, clash, make_orders
    from compt.chain.slurm import send as send_orders

    if not SCRIPT.is_file():
        raise ConfigError(f"{SCRIPT} is not here; run this in the top folder of compt's checkout")
    loaded = load_recipe(recipe, set_ or [])
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
    console = terminal()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if not orders:
        say(f"{folder}: everything is done.")
    elif send:
        send_orders(orders, folder, say)
    else:
        for order in orders:
            say(shlex.join(order.command(f"ID_OF_{order.after}" if order.after else None)))
        there = clash(orders, folder)
        typer.echo(f"Nothing was submitted; {f'--submit would fail: {there}' if there else 'add --submit.'}", err=True)


@slurm_app.command()
def names(
    recipe: RecipePath,
    set_: Overrides = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="list the baselines, not the links")] = False,
) -> None:
    """List the names that `compt chain --only` accepts, one per line."""
    from compt.chain.slurm import names as names_of

    for name in names_of(load_recipe(recipe, set_ or []), str(recipe), baselines=baselines):
        typer.echo(name)
