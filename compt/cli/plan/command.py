"""`compt plan`: what a recipe would train and what it costs, and which chain to train."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from compt.cli.options import (
    MODE_HELP,
    AsJson,
    Gpus,
    Kind,
    MachineOptions,
    Overrides,
    RecipePath,
    ThroughputFile,
    one_of,
    option,
    print_json,
)
from compt.cli.plan.tables import plan_tables
from compt.cost.training import Mode
from compt.errors import ConfigError, DataError
from compt.plan.forecast import Machine, make_forecast
from compt.plan.jobs import asked_controls
from compt.plan.links import Start, is_described
from compt.recipe.deepspeed import check_engines
from compt.recipe.engine import ENGINE_NAMES
from compt.recipe.read import load_recipe
from compt.recipe.schema import DECODERS, Recipe
from compt.text import show

_log = logging.getLogger(__name__)


def plan(
    recipe: RecipePath,
    set_: Overrides = None,
    kind: Kind = None,
    gpus: Gpus = None,
    throughput: ThroughputFile = None,
    baselines: Annotated[bool, option("also plan the baseline of each model, and the controls", "--baselines")] = False,
    controls: Annotated[bool, option("also plan the controls of the last link", "--controls")] = False,
    mode: Annotated[Mode | None, option(MODE_HELP, default="exact")] = None,
    memory: Annotated[str | None, one_of(ENGINE_NAMES, "show the memory of this engine, part by part")] = None,
    auto: Annotated[bool, option("find a chain instead of showing the recipe's", "--auto")] = False,
    objective: Annotated[
        Literal["cost", "acceleration", "budget"] | None, option("goal of --auto", default="cost")
    ] = None,
    members: Annotated[int | None, option("with --auto: number of models in the chain", metavar="N")] = None,
    in_: Annotated[
        Literal["macs", "hours"] | None, option("with --auto: what to count", "--in", default="macs")
    ] = None,
    budget: Annotated[float | None, option("with --auto: the most to spend", metavar="GPU_HOURS")] = None,
    runs: Annotated[
        list[Path] | None, option("with --auto: a run folder to learn from; repeatable", metavar="RUN")
    ] = None,
    runs_on: Annotated[
        str | None, option("with --runs: evaluation set to compare on; default: the runs' primary", metavar="SET")
    ] = None,
    out: Annotated[
        Path | None, option("with --auto: write the chain as a recipe to a new file", metavar="FILE")
    ] = None,
    here: Annotated[bool, option("also check that this machine has decoder and data", "--here")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the models that a recipe trains and what they cost.

    Trains nothing. GPU-hours, wall time and memory are for one kind of GPU. A recipe with engine.device cpu shows
    them only with --kind, --gpus, --throughput or --memory.
    """
    # --auto makes a chain, the rest shows one. An option of the other half would have no effect, so it is an error.
    own = {"--baselines": baselines or None, "--controls": controls or None, "--mode": mode, "--memory": memory}
    searched: dict[str, object] = {"--objective": objective, "--members": members, "--in": in_, "--budget": budget}
    searched |= {"--runs": runs, "--runs-on": runs_on, "--out": out}
    _refuse(own if auto else searched, "does not go with --auto" if auto else "is for --auto, which is missing")
    if as_json:
        _refuse({"--mode": mode}, "is for tables; --json always has both modes")
        _refuse({"--memory": memory}, "is for tables; --json always has every engine")
    loaded = load_recipe(recipe, set_)
    if here:
        check_here(loaded, str(recipe))
    asked = MachineOptions(kind, gpus, throughput)
    counted = asked.given or loaded.engine.device != "cpu"
    from compt.data.lengths import with_data

    loaded, about = with_data(loaded, Path())
    if own_nodes := [link.model for link in loaded.chain.links if link.nodes]:
        about += f" All links are planned on as many GPUs, though {', '.join(own_nodes)} have nodes of their own."
    if auto:
        from compt.cli.design.command import run_auto
        from compt.cli.design.tables import DesignRequest

        if runs_on is not None and not runs:
            raise ConfigError(f"--runs-on {runs_on}: is for --runs, which is missing")
        goal = objective or "cost"
        counted = counted or goal == "budget" or in_ == "hours"
        machine = _machine(asked, loaded, str(recipe), counted, members=True)
        request = DesignRequest(goal, in_, members, budget, tuple(runs or ()), runs_on, about)
        run_auto(loaded, recipe, request, machine, out=out, as_json=as_json)
        return
    forecast = make_forecast(
        loaded,
        _machine(asked, loaded, str(recipe), counted or memory is not None, members=baselines),
        baselines=baselines,
        controls=asked_controls(loaded, baselines, controls, str(recipe)),
        start=_start(loaded, str(recipe)),
        source=str(recipe),
    )
    if as_json:
        print_json({**forecast.to_json(), "data": about})
    else:
        show(*plan_tables(forecast, mode or "exact", memory, about))


def check_here(recipe: Recipe, source: str) -> None:
    """Raise ConfigError where the decoder is not installed. Warn of data that is not here: nodes may have other disks.

    Object storage is not asked.
    """
    from compt.data.find import expand_patterns

    DECODERS.load(recipe.data.decoder)()
    sets = [(f"evaluation set '{item.name}'", pattern) for item in recipe.evaluation.sets for pattern in item.data]
    train = [("data.train", pattern) for one in recipe.data.train for pattern in getattr(one, "shards", [one])]
    for where, pattern in [*train, *sets, *(("evaluation.validation", one) for one in recipe.evaluation.validation)]:
        # An evaluation set may be a folder of images.
        if "://" not in pattern and not Path(pattern).is_dir():
            try:
                expand_patterns(pattern, Path())
            except DataError as error:
                _log.warning("%s: %s: %s on this machine", source, where, error)


def _machine(asked: MachineOptions, recipe: Recipe, source: str, wanted: bool, *, members: bool) -> Machine | None:
    """The GPUs to plan for, if `wanted`. Raises ConfigError for engines that cannot run on so many, or at all.

    Those of the links, and with `members` of the whole family.
    """
    machine = asked.machine(recipe, source) if wanted else None
    models = [link.model for link in recipe.chain.links]
    models += [member.name for member in recipe.family.members if members]
    check_engines(recipe, models, machine.gpus if machine else None, Path(), source)
    return machine


def _refuse(options: Mapping[str, object], why: str) -> None:
    for name, value in options.items():
        if value is not None:
            shown = "" if value is True else f" {' '.join(map(str, value)) if isinstance(value, list) else value}"
            raise ConfigError(f"{name}{shown}: {why}")


def _start(recipe: Recipe, source: str) -> Start | None:
    """The model at `chain.from` where its sizes are not known without torch; None where the planner finds them."""
    chain = recipe.chain
    if chain.from_ is None or is_described(chain, Path()):
        return None
    if chain.from_model is None and ":" not in chain.from_ and not Path(chain.from_).exists():
        return None
    from compt.chain.run import read_start

    return read_start(recipe, Path(), source)
