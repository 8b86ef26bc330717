"""`compt slurm`: a chain as dependent jobs. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from compt.cli.options import Overrides, RecipePath
from compt.errors import ConfigError
from compt.recipe.read import load_recipe
from compt.text import terminal

slurm_app = typer.Typer(help="Send chains to a Slurm cluster.", no_args_is_help=True)


@slurm_app.command()
def submit(
    recipe: RecipePath,
    set_: Overrides = None,
    run: Annotated[Path | None, typer.Option("--run", help="the run folder; default runs/NAME of the recipe")] = None,
    nodes: Annotated[int, typer.Option(help="nodes of a link that names none in its `nodes`", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs, and processes, of a node", min=1)] = 8,
    baselines: Annotated[bool, typer.Option("--baselines", help="also the baselines, as a job array")] = False,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="an option of sbatch for all jobs: --sbatch=--partition=gpu"),
    ] = None,
    send: Annotated[bool, typer.Option("--submit", help="send them; without it they are only shown")] = False,
) -> None:
    """Train each link of a chain in a job of its own, each after the one before it; a link that fails ends the rest.

    Shows the commands, and runs them with --submit. Links that the run folder has already are left out; none is sent
    while Slurm has one of them in its queue.
    """
    from compt.chain.slurm import SCRIPT, clash, make_orders
    from compt.chain.slurm import send as send_orders

    if not SCRIPT.is_file():
        raise ConfigError(f"{SCRIPT} is not here; start this in the top folder of compt's checkout")
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
        say(f"{folder}: everything in it is done.")
    elif send:
        send_orders(orders, folder, say)
    else:
        for order in orders:
            say(shlex.join(order.command(f"ID_OF_{order.after}" if order.after else None)))
        there = clash(orders, folder)
        typer.echo(f"Nothing was sent; --submit {f'would refuse: {there}' if there else 'does.'}", err=True)


@slurm_app.command()
def names(
    recipe: RecipePath,
    set_: Overrides = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="the baselines, not the links")] = False,
) -> None:
    """List what `compt chain --only` takes, one a line."""
    from compt.chain.slurm import names as names_of

    for name in names_of(load_recipe(recipe, set_ or []), str(recipe), baselines=baselines):
        typer.echo(name)
