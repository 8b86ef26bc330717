"""A chain as dependent Slurm jobs: one for each link, each on its own number of nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compt.errors import RunError
from compt.files import read_json
from compt.plan.jobs import Job, Plan, make_plan
from compt.recipe.deepspeed import check_engines
from compt.recipe.schema import Recipe

SCRIPT = Path("slurm/link.sbatch")
"""What each job runs, in the folder of sbatch: `slurm` of a checkout, or what `compt slurm copy` wrote."""
ARRAY = "baselines"
"""Name of the order for the job array of baselines."""

_RUN = re.compile(r" --run-folder (.+?) --(?:set|only|baselines) ")


@dataclass(frozen=True)
class Order:
    """One call of sbatch.

    `name` is the job of the plan that it trains, `after` the order whose Slurm job must succeed first. `options` go to
    sbatch, without the dependency; `words` go to the script. `models` are its jobs of the plan: several in a job array.
    """

    name: str
    nodes: int
    models: tuple[str, ...]
    after: str | None
    options: tuple[str, ...]
    words: tuple[str, ...]

    def command(self, after_id: str | None) -> list[str]:
        """Return the command; `after_id` is the Slurm id of the job to wait for."""
        waits = (f"--dependency=afterok:{after_id}", "--kill-on-invalid-dep=yes") if after_id else ()
        return ["sbatch", "--parsable", *self.options, *waits, str(SCRIPT), *self.words]


def names(recipe: Recipe, source: str, *, baselines: bool) -> list[str]:
    """Return the names for `compt chain --only` of a recipe's links, or with `baselines` of its baselines.

    A baseline that is the same job as a link has the link's name. Raises ConfigError.
    """
    plan = make_plan(recipe, baselines=baselines, controls=(), source=source)
    kind = "baseline" if baselines else "link"
    return [job.same_as or job.name for job in plan.jobs if job.kind == kind]


def is_done(job: Job, recipe: Recipe, run: Path) -> bool:
    """Whether a run folder has exactly this model, trained and scored as the recipe says."""
    try:
        manifest = read_json(run / "jobs" / job.name / "manifest.json")
    except (OSError, ValueError):
        return False
    known = {key: manifest.get(key) for key in ("state", "hash", "sets")} if isinstance(manifest, dict) else {}
    return known == {"state": "done", "hash": job.hash, "sets": recipe.evaluation.identity()}


def _plan_in(run: Path, recipe: Recipe, source: Path, *, baselines: bool) -> Plan:
    """Return the plan that `compt chain` makes in `run`, whose jobs have the hashes of what is there.

    A run that was begun has the number of images that its shards hold, and the lengths that a first-pair test found.
    """
    images: int | None = None
    scales: tuple[float, ...] = ()
    if (run / "run.json").exists():
        from compt.chain.record import read_record
        from compt.chain.state import accepted_scales  # loads torch

        scales = accepted_scales(run)
        images = read_record(run / "run.json", (), "remove it: it is written again").get("images")
    return make_plan(recipe, baselines=baselines, controls=(), images=images, scales=scales, source=str(source))


def make_orders(
    recipe: Recipe,
    source: Path,
    run: Path,
    *,
    nodes: int = 1,
    gpus: int = 8,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
    baselines: bool = False,
) -> list[Order]:
    """Return the orders for a recipe, in its order, without links that `run` already has.

    A link without its own `nodes` gets `nodes`, with `gpus` GPUs each. `overrides` are those of the recipe; `options`
    go to every sbatch. With `baselines`, a job array trains the baselines beside the chain.
    Raises ConfigError for a chain that cannot be trained, a batch that a link's processes cannot share evenly, and an
    engine that cannot run on them, and RunError for a run whose first-pair test has found no length.
    """
    plan = _plan_in(run, recipe, source, baselines=baselines)
    sets = [word for override in overrides for word in ("--set", override)]
    common = (str(source), "--run-folder", str(run), *sets)
    placed = {f"{at + 1}-{link.model}": link.nodes for at, link in enumerate(recipe.chain.links)}
    size = (f"--gpus-per-node={gpus}", f"--ntasks-per-node={gpus}")
    orders: list[Order] = []
    for job in plan.links:
        wanted = placed[job.name] or nodes
        if is_done(job, recipe, run):
            continue
        where = f"{source}: {job.name} on {wanted} x {gpus} GPUs"
        check_engines(recipe, [job.spec.name], wanted * gpus, Path(), where)
        own = (f"--job-name={recipe.name}:{job.name}", f"--nodes={wanted}", *size, *options)
        # A link that the run has is no order: the one after it then waits for the last link that still runs.
        before = orders[-1].name if orders else None
        orders.append(Order(job.name, wanted, (job.name,), before, own, (*common, "--only", job.name)))
    # The plan of a first-pair test has a baseline without being asked.
    alone = [job for job in plan.jobs if job.kind == "baseline" and job.same_as is None] if baselines else []
    waiting = [job for job in alone if not is_done(job, recipe, run)]
    if left := tuple(job.name for job in waiting):
        where = f"{source}: baselines on {nodes} x {gpus} GPUs"
        check_engines(recipe, [job.spec.name for job in waiting], nodes * gpus, Path(), where)
        own = (
            f"--job-name={recipe.name}:{ARRAY}",
            f"--array=0-{len(left) - 1}",
            "--output=%x-%A_%a.out",
            f"--nodes={nodes}",
            *size,
            *options,
        )
        orders.append(Order(ARRAY, nodes, left, None, own, (*common, "--baselines", "--each", *left)))
    return orders


def clash(orders: Sequence[Order], run: Path) -> str | None:
    """Return a message about the user's jobs in Slurm's queue that train the same models in `run`; None without any.

    None also without squeue.
    """
    if shutil.which("squeue") is None:
        return None
    # %F: the number of the job, or of its array; %Z: the folder it was submitted from; %o: its command.
    asked = subprocess.run(
        ["squeue", "--me", "--noheader", "--format=%F\t%Z\t%o"], capture_output=True, text=True, check=False
    )
    # If squeue fails, sbatch will fail too, and says why.
    lines = [line.split("\t", 2) for line in asked.stdout.splitlines()] if asked.returncode == 0 else []
    found = {
        number: order.name
        for number, sent_from, command in (line for line in lines if len(line) == 3)
        for order in orders
        if _trains(command, order)
        and (named := _RUN.search(command))
        and Path(sent_from, named[1]).resolve() == run.resolve()
    }
    if not found:
        return None
    numbers = sorted(found, key=int)
    jobs = ", ".join(f"{found[number]} (job {number})" for number in numbers)
    return f"{run}: already in Slurm's queue: {jobs}; wait for them, or run `scancel {' '.join(numbers)}` first"


def _trains(command: str, order: Order) -> bool:
    """Whether a job's command, its words joined by blanks, trains the models of the order."""
    return command.endswith(f" --only {order.name}") or (order.name == ARRAY and " --baselines --each " in command)


def send(orders: Sequence[Order], run: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Submit the orders for a run folder, one after another; return the Slurm id of each.

    Raises RunError without sbatch, if the queue already has one of them, and if sbatch refuses one; those submitted
    before are then cancelled.
    """
    if shutil.which("sbatch") is None:
        raise RunError("sbatch is not installed here; submit from a login node of a Slurm cluster")
    if text := clash(orders, run):
        raise RunError(text)
    sent: dict[str, str] = {}
    for order in orders:
        command = order.command(sent[order.after] if order.after else None)
        # The jobs run the Python that submits them: a wheel has no .venv beside slurm/.
        environment = {"PYTHON": sys.executable, **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            if sent:
                subprocess.run(["scancel", *sent.values()], capture_output=True, check=False)
            cancelled = f" Cancelled: {', '.join(sent.values())}." if sent else ""
            raise RunError(f"sbatch refused {order.name}: {' '.join(done.stderr.split())}{cancelled}")
        # With several clusters the line is ID;CLUSTER.
        sent[order.name] = done.stdout.strip().partition(";")[0]
        say(f"{order.name}: job {sent[order.name]} on {order.nodes} node{'s' * (order.nodes > 1)}")
    return sent
