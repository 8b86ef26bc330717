"""Trains the models of the expansion study, each in its own run folder, and resumes them after a stop."""

from __future__ import annotations

import datetime
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.expansion.settings import SETTINGS, Setting, Training, recipe_of, trainings
from compt.chain.job import JobRun
from compt.chain.record import is_finished, read_manifest
from compt.chain.run import prepare, run_jobs, running
from compt.dist import collectives as dist
from compt.errors import ArtefactError, ConfigError, RunError
from compt.files import read_json, write_json
from compt.models.clip import build, materialise
from compt.models.init import DrawnState, load_state

STUDY, STEP_0 = "study.json", "step_0.json"
KEYS = ("setting", "changes")

Say = Callable[[str], None]


class StudyRun(JobRun):
    """A job that also scores its model before the first step, and may start from scratch with a teacher."""

    expanded = True

    def _initial(self) -> Mapping[str, Tensor] | None:
        state = super()._initial() if self.expanded else None
        path = self.folder / STEP_0
        if not dist.any_true(path.exists()):
            self.say("scoring step 0")
            model = build(self.job.spec, device="meta")
            materialise(model, self.context.device)
            load_state(model, DrawnState(model, self.job.spec, self.job.seed) if state is None else state)
            scores = self.scorer.at_the_end(model, self.folder / "scores_0")
            values = {**self.scorer.held_out_loss(model), "scores": scores}
            dist.on_main(lambda: write_json(path, values))
        return state


def read_study(run: Path) -> dict[str, Any]:
    """The study's setting, changes and start date in `run`. Raises RunError if there is no study."""
    try:
        study = read_json(run / STUDY)
        if study["setting"] not in SETTINGS or not isinstance(study["changes"], list):
            raise ValueError(f"its setting is '{study['setting']}'")
    except FileNotFoundError:
        raise RunError(f"{run} holds no study of expansion; begin one with `python -m benchmarks.expansion`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run / STUDY} cannot be read: {error}; remove it, and give the same options again") from None
    return dict(study)


def _begin(run: Path, setting: Setting, changes: Sequence[str]) -> None:
    wanted = {"setting": setting.name, "changes": list(changes)}
    if (run / STUDY).exists():
        found = read_study(run)
        for key in KEYS:
            if found[key] != wanted[key]:
                raise RunError(f"{run}: the study has {key} {found[key]}, not {wanted[key]}; use another run folder")
        return
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    write_json(run / STUDY, {**wanted, "started": now})


def run_study(
    setting: Setting,
    run: Path,
    say: Say,
    *,
    changes: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """Train the missing models; returns one line for each that its operator or teacher does not allow.

    Relative paths start at the working directory. Raises the errors of training, and RunError if `run` holds a study
    with other options.
    """
    dist.on_main(lambda: _begin(run, setting, changes))
    refused = []
    todo = list(trainings(setting, seeds))
    for at, training in enumerate(todo, 1):
        title = f"[{at}/{len(todo)}] {training.folder}"
        try:
            _train(setting, training, run, changes, functools.partial(_titled, say, title))
        except (ArtefactError, ConfigError) as error:
            if training.variant is None:
                raise
            refused.append(f"{training.folder}: {error}")
            say(f"{title}: left out: {error}")
    return refused


def _titled(say: Say, title: str, text: str) -> None:
    say(f"{title}: {text}")


def _train(setting: Setting, training: Training, run: Path, changes: Sequence[str], say: Say) -> None:
    """Start or resume one training run and finish it."""
    folder = run / training.folder
    recipe = recipe_of(setting, training, run, changes)
    context, plan = prepare(recipe, folder, base=Path.cwd())
    job = plan.job(training.job)
    place = context.job_folder(job.name)
    done: bool = dist.broadcast_object(is_finished(read_manifest(place), recipe))
    if not done:
        with running(folder):
            run_jobs(context, plan, (), say)
            own = StudyRun(job, context, say)
            own.expanded = training.variant is None or training.variant.expanded
            own.run()
    if training.variant is not None:
        dist.on_main(lambda: _tidy(place))


def _tidy(place: Path) -> None:
    """Remove the weights of a finished student: the study needs only scores and curves."""
    for name in ("initial", "model", "tb"):
        shutil.rmtree(place / name, ignore_errors=True)
