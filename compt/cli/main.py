"""The command line. Every command works on files and can be run alone."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from compt import __version__
from compt.cli.bench import bench_app
from compt.cli.curves import curves
from compt.cli.doctor import doctor
from compt.cli.expand.command import HELP as EXPAND_HELP
from compt.cli.expand.command import expand
from compt.cli.launch import SIGNALS, launch, recorded
from compt.cli.macs import macs_command
from compt.cli.options import Overrides, RecipePath
from compt.cli.plan.command import plan
from compt.cli.slurm import slurm_app
from compt.cli.tools import data_app, evaluate, export
from compt.dist.environment import own_rank
from compt.errors import ComptError, ConfigError
from compt.recipe.read import load_recipe
from compt.recipe.schema import Recipe
from compt.text import terminal

if TYPE_CHECKING:
    from compt.chain.calibrate import FirstPair
    from compt.chain.run import Say

app = typer.Typer(
    help="Chain-of-Models Pre-Training: train a family of CLIP models, each from its smaller predecessor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(slurm_app, name="slurm")

RANK_0_PRINTS = 3.0
"""Seconds that other ranks wait for rank 0 to print an error on which all agreed."""

RunFolder = Annotated[Path | None, typer.Option("--run", help="the run folder; default runs/NAME of the recipe")]


def _say() -> Say:
    """Prints on rank 0 only."""
    from compt.dist import collectives as dist

    console = terminal()
    return lambda text: console.print(text, markup=False, soft_wrap=True) if dist.is_main() else None


def _load(path: Path, overrides: list[str] | None) -> Recipe:
    return load_recipe(path, overrides or [])


app.command()(plan)


@app.command()
def chain(
    recipe: RecipePath,
    set_: Overrides = None,
    run: RunFolder = None,
    baselines: Annotated[bool, typer.Option(help="also train every member individually, to measure the gain")] = False,
    controls: Annotated[bool, typer.Option(help="also train the recipe's controls of the last link")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="train just this model of the run; repeatable")
    ] = None,
    estimate: Annotated[bool, typer.Option(help="time a few steps first and say how long it will take")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="lengthen the links until the first pair is lossless, then go on")
    ] = False,
    target: Annotated[
        float | None, typer.Option(metavar="X", help="with --calibrate: try an X-fold acceleration first")
    ] = None,
    calibrate_on: Annotated[
        str | None, typer.Option(metavar="SET", help="with --calibrate: the evaluation set to compare on")
    ] = None,
) -> None:
    """Train a chain, from the start or from where the run folder stands.

    Runs in one process, or on every process that torchrun starts. SIGTERM, SIGUSR1 and Ctrl-C save and exit with code
    75; the same command goes on from there.
    """
    loaded = _load(recipe, set_)
    test = None
    if calibrate and only:
        raise ConfigError("--only: cannot be had with --calibrate, which trains models until a pair is lossless")
    if calibrate:
        from compt.chain.calibrate import FirstPair

        test = FirstPair.of(loaded, target, calibrate_on, str(recipe))
    elif target is not None or calibrate_on is not None:
        raise ConfigError(
            f"{'--target' if target is not None else '--calibrate-on'}: is a part of --calibrate; add that"
        )
    wanted = None if controls or baselines else ()
    _run(loaded, run or Path("runs") / loaded.name, str(recipe), baselines, wanted, estimate, test, only or ())


def _run(
    recipe: Recipe,
    folder: Path,
    source: str,
    baselines: bool,
    controls: tuple[str, ...] | None,
    estimate: bool,
    test: FirstPair | None = None,
    names: Sequence[str] = (),
) -> None:
    from compt.chain.calibrate import NotLossless, hopeless, run_calibrated
    from compt.chain.run import only, prepare, run_chain, run_only, waiting
    from compt.dist import collectives as dist

    say = _say()
    wanted: dict[str, Any] = {"baselines": baselines, "controls": controls, "source": source}
    try:
        scales = test.next_scales(folder) if test else None
        context, made = prepare(recipe, folder, base=Path.cwd(), scales=scales, names=names, **wanted)
        left = waiting(made, folder)
        chosen = only(made, names, folder) if names else None
        if chosen is not None:
            left = [job for job in left if job in chosen]
        if left:
            done = len([job for job in chosen or made.jobs if job.same_as is None]) - len(left)
            if done and not (test and hopeless(made)):
                say(f"{folder}: {done} of {done + len(left)} models are done; going on with {left[0].name}.")
            if estimate:
                _say_estimate(context, left, say)
            if chosen is not None:
                run_only(context, made, left, say)
            elif not test:
                run_chain(context, made, say)
        else:
            say(f"{folder}: {' and '.join(names) or 'everything in it'} is done.")
        if test:
            run_calibrated(context, test, say, **wanted)
        # The others wait for it: batch systems end a job a while after the first of its processes.
        dist.on_main(lambda: report(folder))
    except NotLossless:
        dist.on_main(lambda: report(folder))
        raise
    finally:
        dist.shutdown()


def _say_estimate(context: Any, left: list[Any], say: Say) -> None:
    from compt.bench.estimate import seconds_of
    from compt.chain.record import steps_left
    from compt.dist import collectives as dist

    steps = [(job, steps_left(job, context.job_folder(job.name))) for job in left]
    seconds = seconds_of(steps, context.recipe, context.device, dist.world_size(), context.base)
    say(
        f"About {max(1, round(seconds / 60))} min of training on this machine: {len(left)} models, "
        f"{sum(count for _, count in steps):,} steps of {context.recipe.optimizer.batch} images."
    )


@app.command()
def demo(
    fresh: Annotated[bool, typer.Option(help="forget an earlier run and start anew")] = False,
    run: Annotated[Path, typer.Option(help="the run folder")] = Path("runs/demo"),
    recipe: Annotated[Path, typer.Option(help="the recipe")] = Path("recipes/demo.yaml"),
    set_: Overrides = None,
) -> None:
    """Train a chain of small CLIP models on emoji pictures, on a CPU, and show what came of it."""
    from compt.chain.run import start_anew
    from compt.emoji import build as emoji

    say = _say()
    loaded = _load(recipe, set_)
    if fresh:
        start_anew(run)
    data = Path("data/emoji")
    if not (data / "manifest.json").exists():
        say(f"Laying out the emoji sample in {data} …")
        emoji.build(data)
    _run(loaded, run, str(recipe), False, None, True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder, finished or not", show_default=False)]) -> None:
    """Write RUN/report.html and RUN/report.md."""
    from compt.report.summary import summarise
    from compt.report.tables import summary_table
    from compt.report.write import write_report

    console = terminal()
    console.print(summary_table(summarise(run)))
    console.print(f"Report: {write_report(run)}", soft_wrap=True, markup=False)


app.command()(curves)
app.command("macs")(macs_command)
app.command("eval")(evaluate)
app.command()(doctor)
app.command(help=EXPAND_HELP)(expand)
app.command()(export)
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(launch)


def _print_error(error: ComptError, rank: str) -> None:
    if error.agreed:
        # A launcher stops all ranks when the first of them exits: rank 0 gets time to print, and all keep their exit
        # code. Without this a fast rank 1 would take the message with it.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if error.printed_by(rank):
        name = "compt" if rank == "0" else f"compt, rank {rank}"
        terminal(stderr=True).print(f"[bold red]{name}:[/] {escape(str(error))}", soft_wrap=True)
    elif error.agreed:
        time.sleep(RANK_0_PRINTS)


@recorded()
def main(words: Callable[[], list[str]] | None = None) -> None:
    """Entry point: one line for an error that the user can mend, with its own exit code.

    `words` makes the arguments, where they are not those of the command line.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(None if words is None else words())
    except ComptError as error:
        _print_error(error, own_rank(os.environ))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def run(words: Callable[[], list[str]] | None = None) -> None:
    """`main` as the whole of a process, which then ends at once where threads may be left.

    A call of torch's that waits in a thread for other processes would abort a Python that winds down under it, and so
    would gloo's own threads: they let go of tensors of Python a moment after a collective is over.
    """
    try:
        main(words)
    except BaseException as end:
        # Whoever joins a group has torch; some of DeepSpeed keeps the group, and its threads, for ever.
        if "torch" not in sys.modules and not any(thread.daemon for thread in threading.enumerate()):
            raise
        code = end.code if isinstance(end, SystemExit) else 130 if isinstance(end, KeyboardInterrupt) else 1
        if not isinstance(end, (SystemExit, KeyboardInterrupt)):
            sys.excepthook(type(end), end, end.__traceback__)
        for child in multiprocessing.active_children():
            child.terminate()  # multiprocessing would wait for those that are no daemons
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"compt {__version__}")
        raise typer.Exit
