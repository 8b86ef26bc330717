"""Programs that show the curves of a job: TensorBoard, Weights & Biases, MLflow.

`metrics.jsonl` is the record, and loggers get a copy. Each runs in a thread of rank 0, so that a slow or dead network
does not hold up a step. What a logger cannot write is counted and lost. To add one, write a `Logger`, and put its name
and place into `compt.recipe.engine.LOGGERS`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from types import TracebackType
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from compt.dist import collectives as dist
from compt.errors import ConfigError, Interrupted
from compt.files import flatten, write_text
from compt.recipe.engine import LOGGERS

End = Literal["finished", "failed", "stopped"]
"""How a job ends: stopped is by a signal, and the same command goes on."""
TENSORBOARD = "tb"
PATIENCE = 30.0
"""Seconds at the end in which all loggers may write what is left."""
_WAITING = 1000
"""The most lines that wait for a logger."""
_ACROSS = 8
"""Images in a row of the contact sheet."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Logs:
    """The loggers of a job, and what they show of it. settings: the result fields, as plain values."""

    names: tuple[str, ...] = ("tensorboard",)
    run: str = ""
    job: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self) -> dict[str, int | float | str | bool]:
        """The settings as one level of `section.field`."""
        flat = flatten(dict(self.settings))
        return {key: value if isinstance(value, int | float | bool) else str(value) for key, value in flat.items()}


class Logger(ABC):
    """A copy of the metrics of a job in another program. It is made in the main thread, and used in one of its own.

    Every method may raise. A logger that cannot be opened is left out; any other error loses one line.
    """

    package: ClassVar[str]
    """The module that it needs."""
    extra: ClassVar[str | None] = None
    """The extra of compt that installs it."""

    def __init__(self, folder: Path, logs: Logs, start_step: int) -> None:
        self._folder, self._logs, self._start = folder, logs, start_step

    @classmethod
    def check(cls) -> None:
        """Raise ConfigError where the logger cannot work at all."""
        try:
            importlib.import_module(cls.package)
        except ImportError as error:
            install = f"; pip install 'compt[{cls.extra}]'" if cls.extra else ""
            raise ConfigError(f"engine.loggers: {cls.package} cannot be imported ({error}){install}") from None

    @abstractmethod
    def open(self) -> None:
        """Begin, or go on with the run that the job's folder names."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step, named `train/loss` and the like."""

    @abstractmethod
    def finish(self, step: int, scores: Mapping[str, float], images: NDArray[np.uint8] | None) -> None:
        """The final scores, and the images of the contact sheet, uint8 [H, W, 3]."""

    @abstractmethod
    def close(self, end: End) -> None:
        """Write what is left, and how it ended. A finished job is opened once more, for its scores."""

    def _run_id(self, name: str, make: Callable[[], str]) -> tuple[str, bool]:
        """The id of this job's run in another program, from FOLDER/NAME/id, and whether it is new."""
        path = self._folder / name / "id"
        if path.exists():
            return path.read_text(encoding="utf-8").strip(), False
        path.parent.mkdir(parents=True, exist_ok=True)
        made = make()
        write_text(path, made + "\n")
        return made, True


class TensorBoard(Logger):
    """Event files in FOLDER/tb. A resume hides the points that are trained again."""

    package = "torch.utils.tensorboard"

    def open(self) -> None:
        """Begin another event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._folder / TENSORBOARD), purge_step=self._start + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars."""
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def finish(self, step: int, scores: Mapping[str, float], images: NDArray[np.uint8] | None) -> None:
        """Hyper-parameters with the scores, for the page HPARAMS, and an image."""
        final = {f"final/{key}": value for key, value in scores.items()}
        self._board.add_hparams(self._logs.parameters(), final, run_name=".", global_step=step)
        if images is not None:
            self._board.add_image("contact_sheet", images, step, dataformats="HWC")

    def close(self, end: End) -> None:
        """Write what is left. Event files do not say how a run ended."""
        self._board.close()


class WeightsAndBiases(Logger):
    """A run of Weights & Biases. Its own variables say where: WANDB_PROJECT, WANDB_MODE=offline and others.

    Steps are a value beside the others: the service refuses steps that it has seen, which a resume trains again.
    """

    package = extra = "wandb"

    def open(self) -> None:
        """Begin the run, or go on with it."""
        import wandb

        name, _ = self._run_id("wandb", lambda: secrets.token_hex(4))
        self._run = wandb.init(
            id=name,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", self._logs.run or None),
            name=self._logs.job,
            config=self._logs.parameters(),
            dir=self._folder,
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, login_timeout=PATIENCE, init_timeout=PATIENCE, finish_timeout=PATIENCE
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the run's history."""
        self._run.log({**values, "step": step})

    def finish(self, step: int, scores: Mapping[str, float], images: NDArray[np.uint8] | None) -> None:
        """The scores in the run's summary, and an image."""
        import wandb

        self._run.summary.update({f"final/{key}": value for key, value in scores.items()})
        if images is not None:
            self._run.log({"contact_sheet": wandb.Image(images), "step": step})

    def close(self, end: End) -> None:
        """Upload what is left. The service calls a run preempted that says so and ends with a code other than 0."""
        if end == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code={"finished": 0, "failed": 1, "stopped": Interrupted.exit_code}[end])


class MlFlow(Logger):
    """A run of an MLflow server, at MLFLOW_TRACKING_URI. The experiment has the name of compt's run."""

    package = extra = "mlflow"

    @classmethod
    def check(cls) -> None:
        """Raise ConfigError where the package or the server's address is missing."""
        super().check()
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError("engine.loggers: mlflow needs the address of a server in MLFLOW_TRACKING_URI")

    def open(self) -> None:
        """Begin the run, or go on with it. Parameters that an earlier try did not get through are sent again."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        self._id, new = self._run_id("mlflow", self._begin)
        if not new:
            self._client.update_run(self._id, status="RUNNING")
        sent = {} if new else self._client.get_run(self._id).data.params
        parameters = [Param(key, str(value)) for key, value in self._logs.parameters().items() if key not in sent]
        for first in range(0, len(parameters), 100):  # the most that a server takes at once
            self._client.log_batch(self._id, params=parameters[first : first + 100])

    def _begin(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self._logs.run
        return str(self._client.create_run(self._experiment(name), run_name=self._logs.job).info.run_id)

    def _experiment(self, name: str) -> str:
        """The id of an experiment. Of jobs that start together all may find none, and only one can create it."""
        from mlflow.exceptions import MlflowException

        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                known = self._client.get_experiment_by_name(name)
                if known is None:
                    raise
        return str(known.experiment_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(key, value, now, step) for key, value in values.items()])

    def finish(self, step: int, scores: Mapping[str, float], images: NDArray[np.uint8] | None) -> None:
        """The scores as metrics of the last step, and an image."""
        if scores:
            self.log(step, {f"final/{key}": value for key, value in scores.items()})
        if images is not None:
            self._client.log_image(self._id, images, "contact_sheet.png")

    def close(self, end: End) -> None:
        """Set the run's status. A stopped one is not scheduled again by MLflow itself, so it is "killed" until then."""
        self._client.set_terminated(self._id, {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[end])


class _Outlet(Thread):
    """One logger with its thread. The loader's workers are forked meanwhile, so packages are imported before."""

    def __init__(self, name: str, logger: Logger) -> None:
        super().__init__(name=f"logger {name}", daemon=True)
        self._called, self._logger = name, logger
        self._calls: Queue[Callable[[Logger], None] | None] = Queue(_WAITING)
        self._lost = self._put = 0
        self._warned = False
        self._end: End = "finished"

    def put(self, call: Callable[[Logger], None]) -> None:
        self._put += 1
        try:
            self._calls.put_nowait(call)
        except Full:
            self._lost += 1
            self._warn(f"{_WAITING} lines wait for it")

    def end(self, end: End, seconds: float) -> None:
        """Wait until everything is written, for that long."""
        deadline = time.monotonic() + seconds
        self._end = end
        with contextlib.suppress(Full):
            self._calls.put(None, timeout=seconds)
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            self._lost += self._calls.qsize()
            _log.warning("%s: has not written everything after %g s; going on", self._called, PATIENCE)
        elif self._lost > 1:
            _log.warning("%s: %d of %d lines are missing there", self._called, self._lost, self._put)

    def run(self) -> None:
        works = self._tried(lambda logger: logger.open())
        while (call := self._calls.get()) is not None:
            self._lost += not (works and self._tried(call))
        if works:
            self._tried(lambda logger: logger.close(self._end))

    def _tried(self, call: Callable[[Logger], None]) -> bool:
        try:
            call(self._logger)
        except Exception as error:  # whatever a package raises: a logger never ends a run
            self._warn(f"{type(error).__name__}: {error}".partition("\n")[0])
            return False
        return True

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s: %s; curves there have gaps, metrics.jsonl goes on", self._called, reason)


class OpenLoggers(contextlib.AbstractContextManager["OpenLoggers"]):
    """The loggers of a job while they are open, on rank 0. Nothing here raises for what a logger does."""

    def __init__(self, logs: Logs, folder: Path, start_step: int = 0) -> None:
        self._outlets: list[_Outlet] = []
        for name in logs.names if dist.is_main() else ():
            kind: type[Logger] = LOGGERS.load(name)
            kind.check()
            self._outlets.append(_Outlet(name, kind(folder, logs, start_step)))

    def __enter__(self) -> OpenLoggers:
        for outlet in self._outlets:
            outlet.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        end: End = "finished" if error is None else "stopped" if stopped else "failed"
        deadline = time.monotonic() + PATIENCE
        for outlet in self._outlets:
            outlet.end(end, max(0.0, deadline - time.monotonic()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step, named `train/loss` and the like."""
        kept = dict(values)
        for outlet in self._outlets:
            outlet.put(lambda logger: logger.log(step, kept))

    def finish(self, step: int, scores: Mapping[str, Any], contact_sheet: Path) -> None:
        """The final scores, as a manifest has them, and the images of a contact sheet where there is one."""
        numbers = {
            key.replace(".", "/"): float(value)
            for key, value in flatten(dict(scores)).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        images = _together(contact_sheet) if contact_sheet.exists() else None
        for outlet in self._outlets:
            outlet.put(lambda logger: logger.finish(step, numbers, images))


def check_loggers(names: set[str]) -> None:
    """Raise ConfigError for a logger whose package is missing."""
    for name in sorted(names):
        LOGGERS.load(name).check()


def _together(path: Path) -> NDArray[np.uint8]:
    """The images of contact.npz in rows, uint8 [H, W, 3]."""
    with np.load(path) as stored:
        images = stored["images"].transpose(0, 2, 3, 1)
    rows = -(-len(images) // _ACROSS)
    size = images.shape[1]
    padded = np.full((rows * _ACROSS, size, size, 3), 255, np.uint8)
    padded[: len(images)] = images
    joined: NDArray[np.uint8] = (
        padded.reshape(rows, _ACROSS, size, size, 3).swapaxes(1, 2).reshape(rows * size, _ACROSS * size, 3)
    )
    return joined
