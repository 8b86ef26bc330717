"""Commands on runs: `compt chain`, `compt demo`, `compt report`, `compt compare`."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compt.cli.options import (
    RECIPE,
    RECIPE_HELP,
    AsJson,
    Baselines,
    Overrides,
    RecipePath,
    RunFolder,
    option,
    print_json,
)
from compt.errors import ConfigError
from compt.plan.jobs import asked_controls
from compt.recipe.read import load_recipe
from compt.recipe.schema import Recipe
from compt.text import say, show

if TYPE_CHECKING:
    from compt.chain.calibrate import FirstPair


def chain(
    recipe: RecipePath,
    set_: Overrides = None,
    run: RunFolder = None,
    baselines: Baselines = False,
    controls: Annotated[bool, option("also train the controls of the last link", "--controls")] = False,
    only: Annotated[
        list[str] | None, option("train only this model of the run; repeatable", "--only", metavar="NAME")
    ] = None,
    estimate: Annotated[
        bool, option("before training, time a few steps to predict the duration", "--estimate")
    ] = False,
    calibrate: Annotated[bool, option("lengthen the links until the first pair is lossless", "--calibrate")] = False,
    target: Annotated[float | None, option("acceleration to try first, with --calibrate", metavar="X")] = None,
    calibrate_on: Annotated[str | None, option("evaluation set to compare on, with --calibrate", metavar="SET")] = None,
    profile_steps: Annotated[str | None, option("trace these steps of each job that trains", metavar="A-B")] = None,
) -> None:
    """Train a chain, or continue the run in its folder.

    Runs in one process, or in every process that torchrun starts. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and
    exit with code 75. The same command continues from there.
    """
    loaded = load_recipe(recipe, set_)
    test = None
    if calibrate and only:
        raise ConfigError("--only: does not work with --calibrate, which trains models until a pair is lossless")
    if calibrate:
        from compt.chain.calibrate import FirstPair

        test = FirstPair.of(loaded, target, calibrate_on, str(recipe))
    elif target is not None or calibrate_on is not None:
        raise ConfigError(f"{'--target' if target is not None else '--calibrate-on'}: needs --calibrate")
    wanted = asked_controls(loaded, baselines, controls, str(recipe))
    folder = run or Path("runs") / loaded.name
    traced = _steps(profile_steps) if profile_steps else None
    _run_chain(loaded, folder, str(recipe), baselines, wanted, estimate, test, only or (), traced)


def _steps(text: str) -> tuple[int, int]:
    """The first and the last step of `--profile-steps`. Raises ConfigError."""
    found = re.fullmatch(r"([1-9]\d*)-(\d+)", text)
    if found is None or int(found[1]) > int(found[2]):
        raise ConfigError(f"--profile-steps {text}: should be the first and the last step, counted from 1, as in 20-22")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's tracer would print an error where there is no GPU
    return int(found[1]), int(found[2])


def demo(
    fresh: Annotated[bool, option("delete an earlier run and start again", "--fresh")] = False,
    run: Annotated[Path, option("run folder", "--run-folder", metavar="FOLDER")] = Path("runs/demo"),
    recipe: Annotated[Path, option(RECIPE_HELP, **RECIPE)] = Path("demo"),
    set_: Overrides = None,
) -> None:
    """Train a chain of small CLIP models on emoji images, on a CPU."""
    from compt.chain.run import start_fresh
    from compt.drawings import emoji

    loaded = load_recipe(recipe, set_)
    data = Path("data/emoji")
    if not (data / "manifest.json").exists():
        _say(f"Writing the emoji sample to {data} …")
        emoji.build(data)
    if fresh:  # last, as the above may fail
        start_fresh(run)
    _run_chain(loaded, run, str(recipe), baselines=False, controls=None, estimate=True)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folder, finished or not", show_default=False)],
) -> None:
    """Show the results of runs and write their reports.

    Writes RUN/report.html and RUN/report.md. Several runs that report on one set are also compared, as by `compt
    compare`.
    """
    from compt.report.compare import compare_runs
    from compt.report.summary import summarise
    from compt.report.tables import summary_tables
    from compt.report.write import write_report

    for at, run in enumerate(runs):
        if at:
            say("")
        show(*summary_tables(summarise(run)))
        say(f"\nReport: {write_report(run)}")
    if len(runs) > 1:
        say("")
        try:
            found = compare_runs(runs, option="compt compare RUN… --on")
        except ConfigError as error:
            # The reports are whole: runs that report on different sets are only not compared.
            say(f"Not compared: {error}.")
        else:
            show(*found.tables())


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folder, or saved results", show_default=False)],
    on: Annotated[str | None, option("evaluation set", metavar="SET", default="the primary set of the runs")] = None,
    out: Annotated[
        Path | None, option("also write compare.html, compare.md and compare.json here", metavar="FOLDER")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the finished models of one or more runs.

    Models that differ only in their seed count as one. Each link is compared with the other models of its size, image
    by image. Models that were scored on other images, class names or templates are named and not compared.
    """
    from compt.report.compare import compare_runs

    found = compare_runs(runs, on)
    if out is not None:
        found.write(out)
    if as_json:
        print_json(found.to_json())
        return
    show(*found.tables())
    if out is not None:
        say(f"\nWrote {out}")


def _say(text: str) -> None:
    """Print a line on rank 0."""
    from compt.dist import collectives as dist

    if dist.is_main():
        say(text)


def _run_chain(
    recipe: Recipe,
    folder: Path,
    source: str,
    baselines: bool,
    controls: tuple[str, ...] | None,
    estimate: bool,
    test: FirstPair | None = None,
    names: Sequence[str] = (),
    profile_steps: tuple[int, int] | None = None,
) -> None:
    """Train what is left of the run, then write its report. `controls`: None for all, `names` for --only."""
    from compt.chain.calibrate import NotLossless, hopeless, run_calibrated
    from compt.chain.run import only, prepare, run_chain, run_only, waiting
    from compt.dist import collectives as dist
    from compt.train.signals import StopSignal

    wanted: dict[str, Any] = {"baselines": baselines, "controls": controls, "source": source}
    with StopSignal(at_once=True):
        try:
            scales = functools.partial(test.scales, folder) if test else None
            context, made = prepare(recipe, folder, base=Path.cwd(), scales=scales, names=names, **wanted)
            context = replace(context, profile_steps=profile_steps)
            left = waiting(made, folder)
            chosen = only(made, names, folder) if names else None
            if chosen is not None:
                left = [job for job in left if job in chosen]
            done = len([job for job in chosen or made.jobs if job.same_as is None]) - len(left)
            if not left:
                _say(f"{folder}: {' and '.join(names) or 'every model'} is done.")
            elif done and not (test and hopeless(made)):
                _say(f"{folder}: {done} of {done + len(left)} models are done; continuing with {left[0].name}.")
            if left and estimate:
                _say_estimate(context, left)
            if test:
                run_calibrated(context, test, _say, **wanted)
            elif left:
                run_only(context, made, left, _say) if chosen is not None else run_chain(context, made, _say)
            # All ranks wait for the report: Slurm kills the job soon after its first process exits.
            dist.on_main(lambda: report([folder]))
        except NotLossless:
            dist.on_main(lambda: report([folder]))
            raise
        finally:
            dist.shutdown()


def _say_estimate(context: Any, left: list[Any]) -> None:
    from compt.bench.estimate import seconds_of
    from compt.chain.record import steps_left
    from compt.dist import collectives as dist

    steps = [(job, steps_left(job, context.job_folder(job.name))) for job in left]
    seconds = seconds_of(steps, context.recipe, context.device, dist.world_size(), context.base)
    _say(
        f"About {max(1, round(seconds / 60))} min of training on this machine: {len(left)} models, "
        f"{sum(count for _, count in steps):,} steps of {context.recipe.optimizer.batch} images."
    )
