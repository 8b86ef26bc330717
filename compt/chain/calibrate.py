"""The first-pair test of CoM-PT's third rule (section 3.1.2): how short the links may be.

The test trains the first link that grows from another model, and compares it with its baseline.
While the link is not lossless, it and all links after it become longer in proportion, and it trains again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from compt.chain.job import RunContext
from compt.chain.record import MANIFEST, read_manifest
from compt.chain.run import Say, plan_run, run_jobs, running
from compt.chain.state import read_calibration
from compt.cost.paper import LOSSLESS_POINTS
from compt.dist import collectives as dist
from compt.errors import ConfigError, RunError, nearest
from compt.evaluate.encoder import load_arrays
from compt.evaluate.sets import task_class
from compt.evaluate.stats import paired_bootstrap, verdict
from compt.files import disk_errors, write_json
from compt.plan.jobs import Job, Plan, first_student, recipe_cost, try_name
from compt.recipe.schema import EvalSet, Recipe

GROWTH = 1.25
"""Factor by which all lengths grow after a try that was not lossless."""


class NotLossless(RunError):
    """No length shorter than the baseline's was lossless."""


@dataclass(frozen=True)
class Try:
    """One length of the link that is tried, against its baseline, on the same images.

    `factor` multiplies the recipe's lengths. `speedup` is what `baseline` cost in MACs over `macs`, which include the
    teacher's forward passes. Accuracies (top-1) are in percent, `difference` (try minus baseline) and its 95 % interval
    (paired bootstrap over images) in points. `lossless` is the decision and follows from the difference alone;
    `verdict` is what the interval says. `job` is where the try's files are, once it is decided.
    """

    number: int
    job: str
    baseline: str
    dataset: str
    target: float | None
    factor: float
    epochs: float
    steps: int
    speedup: float
    macs: float
    device_hours: float
    accuracy: float
    baseline_accuracy: float
    difference: float
    low: float
    high: float
    verdict: str
    lossless: bool


@dataclass(frozen=True)
class FirstPair:
    """What the first-pair test compares on, and the acceleration of the first try; None: the recipe's own lengths."""

    dataset: str
    target: float | None
    source: str = field(default="recipe", compare=False)
    """The recipe's file, for messages."""

    @staticmethod
    def of(recipe: Recipe, target: float | None, dataset: str | None, source: str) -> FirstPair:
        """What was asked for on the command line. Raises ConfigError where this recipe has no first pair to test."""
        if target is not None and not (math.isfinite(target) and target > 1):
            raise ConfigError(f"--target {target:g}: should be greater than 1, the cost of the baseline")
        if recipe.baselines is None:
            raise ConfigError(f"{source}: baselines: is missing; --calibrate compares a link with its baseline")
        if len(recipe.chain.links) <= first_student(recipe):
            raise ConfigError(
                f"{source}: chain.links: has only '{recipe.chain.links[0].model}'; --calibrate needs a second link, "
                "which grows from the first"
            )
        return FirstPair(_dataset(recipe, dataset, source), target, source)

    def __str__(self) -> str:
        target = "" if self.target is None else f" --target {self.target:g}"
        return f"--calibrate{target} --calibrate-on {self.dataset}"

    def scales(self, folder: Path, plan: Plan) -> tuple[float, ...]:
        """The lengths that were tried in `folder`, and the accepted one or the next to try: the same on every rank.

        `plan` is that of the recipe's own lengths. Raises ConfigError and RunError for what cannot be tried.
        """
        tries = dist.from_main(lambda: self._tries(folder, plan))
        factors = [found.factor for found in tries]
        if not tries:
            return (self._first(plan),)
        if tries[-1].lossless:
            return tuple(factors)
        steps, factor = pair(plan)[0].steps, factors[-1] * GROWTH
        # With few steps, two factors can round to the same number of steps.
        while round(steps * factor) == round(steps * factors[-1]):
            factor *= GROWTH
        return (*factors, factor)

    def most_tries(self, plan: Plan) -> int:
        """How many lengths there can be before that of the baseline. `plan` is that of the recipe's own lengths."""
        link, baseline = pair(plan)
        return math.ceil(math.log(baseline.steps / (self._first(plan) * link.steps), GROWTH))

    def _tries(self, folder: Path, plan: Plan) -> list[Try]:
        record = read_calibration(folder)
        if record is not None and (record["dataset"], record["target"]) != (self.dataset, self.target):
            begun = FirstPair(record["dataset"], record["target"])
            raise RunError(
                f"{folder}: its first-pair test was begun with {begun}, not {self}; take another run folder, or those"
            )
        if record is None or record["outcome"] != "lossless":
            for job in plan.links[first_student(plan.recipe) + 1 :]:
                if read_manifest(folder / "jobs" / job.name)["state"] != "planned":
                    raise RunError(
                        f"{folder}: {job.name} was begun without a first-pair test, which may change its teacher; take "
                        f"another run folder, or remove {folder / 'jobs' / job.name} to train it again"
                    )
        return _tries_of(folder)

    def _first(self, plan: Plan) -> float:
        """The factor of the first try."""
        link, baseline = pair(plan)
        at = first_student(plan.recipe)
        factor, key = 1.0, f"{self.source}: chain.links.{at}.train = {plan.recipe.chain.links[at].train}"
        if self.target is not None:
            # Recomputed activations do not count: saving memory must not change a length.
            own, alone = (
                recipe_cost(
                    plan.recipe,
                    job.spec,
                    job.active_teacher,
                    1,
                    dist.world_size(),
                    plan.recipe.data.caption_tokens,
                    again=False,
                ).total_macs
                for job in (link, baseline)
            )
            factor, key = baseline.steps * alone / (self.target * own) / link.steps, f"--target {self.target:g}"
        steps = round(factor * link.steps)
        if steps < 1:
            raise ConfigError(f"{key}: leaves {link.name} no step at all; a smaller target leaves more")
        if steps >= baseline.steps:
            raise ConfigError(
                f"{key}: {link.name} would train for {steps} steps, no fewer than its baseline ({baseline.steps}); "
                "a first-pair test begins with an acceleration: shorten the links, or give a larger --target"
            )
        return factor


def _dataset(recipe: Recipe, name: str | None, source: str) -> str:
    """The set to compare on: `name`, else the first zero-shot one with the role `select`, else the primary one."""
    sets: dict[str, EvalSet] = {item.name: item for item in recipe.evaluation.sets}
    if name is not None:
        if name not in sets:
            known = f"; sets: {', '.join(sets)}" if sets else "; the recipe has none"
            raise ConfigError(
                f"--calibrate-on {name}: is not an evaluation set of {source}{nearest(name, sets)}{known}"
            )
        if not task_class(sets[name].task).classifies:
            raise ConfigError(
                f"--calibrate-on {name}: is a {sets[name].task} set; accuracies are compared: name a zero-shot one"
            )
        return name
    shots = [item for item in sets.values() if item.task == "zeroshot"]
    chosen = [item.name for item in shots if item.role == "select"]
    chosen += [item.name for item in shots if item.name == recipe.evaluation.primary]
    if not chosen:
        raise ConfigError(
            f"{source}: evaluation.primary: is not a zero-shot set, and none has the role `select`; --calibrate "
            "compares accuracies on such a set: add one, or name one with --calibrate-on"
        )
    return chosen[0]


def pair(plan: Plan) -> tuple[Job, Job]:
    """The tried link, and its baseline."""
    at = first_student(plan.recipe)
    return plan.links[at], plan.individual[at]


def hopeless(plan: Plan) -> bool:
    """Whether the tried link has become as long as its baseline."""
    link, baseline = pair(plan)
    return link.steps >= baseline.steps


def in_words(found: Try) -> str:
    """The result of a try, without the decision."""
    return (
        f"{found.difference:+.2f} points on {found.dataset} [95 %: {found.low:+.1f} to {found.high:+.1f}] against "
        f"{found.baseline}, at {found.epochs:.3g} epochs ({found.speedup:.2f}x fewer MACs)"
    )


def run_calibrated(context: RunContext, test: FirstPair, say: Say, **options: Any) -> None:
    """Run the first-pair test, continuing what the folder holds, then the whole chain at the accepted lengths.

    `options` are those of `compt.chain.run.plan_run`. Raises NotLossless where no length was lossless, and what
    training raises.
    """
    plain = plan_run(context, **options)
    most = test.most_tries(plain)
    with running(context.folder):
        for _ in range(most + 2):
            scales = test.scales(context.folder, plain)
            plan = plan_run(context, **options, scales=scales)
            tries = dist.from_main(lambda: _tries_of(context.folder))
            if tries and tries[-1].lossless:
                break
            if hopeless(plan):
                run_jobs(context, plan, (), say, _record(test, plan, scales, tries, "not lossless"))
                dist.fail(NotLossless(_no_length(context.folder, plan, tries)))
            link, baseline = pair(plan)
            jobs = (*plan.links[: first_student(plan.recipe)], baseline, link)
            run_jobs(context, plan, jobs, say, _record(test, plan, scales, tries, "open"))
            _judge(context.folder, test, plan, scales, say)
        else:
            first = try_name(1, pair(plain)[0].spec.name)
            text = (
                f"{context.folder}: its first-pair test does not end: no more than {most} lengths are below the "
                f"baseline's, and as many were tried; {first} should be the first of them"
            )
            dist.fail(RunError(text))
        run_jobs(context, plan, plan.jobs, say, _record(test, plan, scales, tries, "lossless"))


def _tries_of(folder: Path) -> list[Try]:
    record = read_calibration(folder)
    return [] if record is None else [Try(**item) for item in record["tries"]]


def _judge(folder: Path, test: FirstPair, plan: Plan, scales: Sequence[float], say: Say) -> None:
    """Compare the finished try with its baseline, and keep or reject it."""
    found = dist.from_main(lambda: _compare(folder, test, plan, len(scales), scales[-1]))
    what = "lossless" if found.lossless else "not lossless"
    say(f"{pair(plan)[0].name}, try {found.number}: {in_words(found)}: {what}.")
    dist.on_main(lambda: _decide(folder, pair(plan)[0], found))


def _record(test: FirstPair, plan: Plan, scales: Sequence[float], tries: Sequence[Try], outcome: str) -> dict[str, Any]:
    """The record for run.json. `factor` is accepted, or being tried; the sums of MACs are planned."""
    link, baseline = pair(plan)
    return {
        "dataset": test.dataset,
        "target": test.target,
        "link": link.name,
        "baseline": baseline.name,
        "margin": LOSSLESS_POINTS,
        "growth": GROWTH,
        "outcome": outcome,
        "factor": scales[-1],
        "chain_macs": sum(job.cost.total_macs for job in plan.links),
        "failed_macs": sum(job.cost.total_macs for job in plan.jobs if job.kind == "try"),
        "individual_macs": sum(job.cost.total_macs for job in plan.individual),
        "tries": [asdict(found) for found in tries],
    }


def _no_length(folder: Path, plan: Plan, tries: Sequence[Try]) -> str:
    link, baseline = pair(plan)
    return (
        f"{folder}: {link.spec.name} is not lossless at any acceleration: its last try gave "
        f"{in_words(tries[-1])}, and the next would be no shorter than the baseline's {baseline.epochs:.3g} epochs. "
        f"What was trained is kept ({len(tries)} tries)"
    )


def _answers(folder: Path, dataset: str) -> tuple[dict[str, Any], NDArray[np.int64], NDArray[np.bool_]]:
    """What a job's score on `dataset` depends on beside the model, the ids of its images, and which were right."""
    stored = load_arrays(folder / "scores" / f"{quote(dataset, safe=' ()')}.npz")
    pins = read_manifest(folder)["scores"][dataset].get("pins", {})
    return pins, stored["ids"], stored["correct"].astype(bool)


def _compare(folder: Path, test: FirstPair, plan: Plan, number: int, factor: float) -> Try:
    link, baseline = pair(plan)
    own, other = (folder / "jobs" / job.name for job in (link, baseline))
    (pins, ids, right), (their_pins, their_ids, theirs) = (_answers(path, test.dataset) for path in (own, other))
    if pins != their_pins or not np.array_equal(ids, their_ids):
        raise RunError(
            f"{folder}: {link.name} and {baseline.name} were not scored on the same {test.dataset}; restore the set, "
            f"or remove {own} and {other} to train them again"
        )
    if len(right) < 2:
        raise RunError(f"{folder}: {test.dataset} has {len(right)} images: too few to compare on")
    difference, low, high = paired_bootstrap(right, theirs)
    manifest, cost = read_manifest(own), read_manifest(other)["cost"]["total_macs"]
    lossless = difference > -LOSSLESS_POINTS
    return Try(
        number=number,
        job=link.name if lossless else try_name(number, link.spec.name),
        baseline=baseline.name,
        dataset=test.dataset,
        target=test.target,
        factor=factor,
        epochs=link.epochs,
        steps=link.steps,
        speedup=cost / manifest["cost"]["total_macs"],
        macs=manifest["cost"]["total_macs"],
        device_hours=manifest["trained"]["device_hours"],
        accuracy=100 * float(right.mean()),
        baseline_accuracy=100 * float(theirs.mean()),
        difference=difference,
        low=low,
        high=high,
        verdict=verdict(low, high),
        lossless=lossless,
    )


def _decide(folder: Path, link: Job, found: Try) -> None:
    """Write the decision into the try's manifest; one that failed is set aside, so that the next takes its place.

    A kill between the two leaves a finished link, which is compared and decided alike again.
    """
    own = folder / "jobs" / link.name
    kind = link.kind if found.lossless else "try"
    write_json(own / MANIFEST, {**read_manifest(own), "name": found.job, "kind": kind, "calibration": asdict(found)})
    if not found.lossless:
        aside = folder / "jobs" / found.job
        with disk_errors(aside):
            os.rename(own, aside)
