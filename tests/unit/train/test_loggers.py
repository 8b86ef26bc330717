"""Loggers with their real packages, offline: curves, settings, scores, images, and one run after a resume."""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from compt.errors import ConfigError, Interrupted, RunError
from compt.evaluate.scorer import Scorer
from compt.recipe.engine import LOGGERS
from compt.train import loggers
from compt.train.loggers import End, Logger, Logs, OpenLoggers, check_loggers
from compt.train.metrics import MetricsWriter, read_metrics
from tests.helpers.optional import optional
from tests.helpers.recipe import chain, make_data

GAPS = "there have gaps, metrics.jsonl goes on"
SETTINGS = {"optimizer": {"lr": 0.001, "batch": 64}, "data": {"mean": [0.5, 0.5, 0.5]}}
SCORES = {"emoji": {"top1": 12.5, "samples": 10, "interval": [1, 2]}, "validation_loss": 3.0}


def trained(folder: Path, name: str, steps: list[int], start: int = 0) -> None:
    logs = Logs((name,), "family", "1-vit_nano", SETTINGS)
    with MetricsWriter(folder, total_steps=30, batch=64, start_step=start, logs=logs) as writer:
        for step in steps:
            writer.log(step, {"loss": step / 4 + start})


def finished(folder: Path, name: str) -> np.ndarray[Any, Any]:
    images = np.random.default_rng(0).integers(0, 256, (11, 3, 4, 4), np.uint8)
    np.savez(folder / "contact.npz", images=images)
    with OpenLoggers(Logs((name,), "family", "1-vit_nano", SETTINGS), folder, 30) as opened:
        opened.finish(30, SCORES, folder / "contact.npz")
    return images


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("compt")]


def whole(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> np.ndarray[Any, Any]:
    """A job that was killed after step 20 with a checkpoint of step 10, and goes on from there."""
    trained(folder, name, [10, 20])
    trained(folder, name, [20, 30], start=10)
    images = finished(folder, name)
    assert said(caplog) == []
    return images


def test_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = whole(tmp_path, "tensorboard", caplog)
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(10, 2.5), (20, 15.0), (30, 17.5)]
    assert [event.value for event in board.Scalars("final/emoji/top1")] == [12.5]
    assert [event.value for event in board.Scalars("final/validation_loss")] == [3.0]
    (picture,) = board.Images("contact_sheet")
    assert (picture.width, picture.height) == (8 * 4, 2 * 4)
    assert images.shape[0] == 11
    content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["optimizer.lr"].number_value == 0.001
    assert hparams["data.mean"].string_value == "[0.5, 0.5, 0.5]"


def test_images_keep_their_places(tmp_path: Path) -> None:
    images = finished(tmp_path, "tensorboard")
    joined = loggers._together(tmp_path / "contact.npz")
    assert np.array_equal(joined[4:8, 8:12], images[10].transpose(1, 2, 0))  # the third of the second row
    assert (joined[4:8, 12:] == 255).all()


def transaction_log(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    at, pieces = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


def test_weights_and_biases_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    optional("wandb", "wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    whole(tmp_path, "wandb", caplog)
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    name = (tmp_path / "wandb" / "id").read_text().strip()
    assert {path.name for path in files} == {f"run-{name}.wandb"}, "a resume goes on with the same run"
    losses, summary, config, projects, images = [], {}, {}, set(), []
    for path in files:
        for record in map(Record.FromString, transaction_log(path.read_bytes())):
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            if "train/loss" in row:
                losses.append((row["step"], row["train/loss"]))
            if "contact_sheet/width" in row:
                images.append((row["contact_sheet/width"], row["contact_sheet/height"]))
            summary |= {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.summary.update}
            if record.HasField("run"):
                projects.add((record.run.project, record.run.display_name, record.run.run_id))
                config |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.run.config.update}
    assert losses == [(10, 2.5), (20, 5.0), (20, 15.0), (30, 17.5)]
    assert projects == {("family", "1-vit_nano", name)}
    assert config["optimizer.lr"] == 0.001
    assert summary["final/emoji/top1"] == 12.5
    assert images == [(32, 8)]


def test_mlflow_in_files(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = optional("mlflow", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    whole(tmp_path, "mlflow", caplog)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("family")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("1-vit_nano", "FINISHED")
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.metrics["final/emoji/top1"] == 12.5
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(10, 2.5), (20, 5.0), (20, 15.0), (30, 17.5)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["contact_sheet.png"]


def test_mlflow_jobs_that_start_together_share_an_experiment(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = optional("mlflow", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    create = mlflow.MlflowClient.create_experiment

    def second(self: Any, name: str) -> str:
        create(self, name)  # by another job, since this one asked
        return str(create(self, name))

    monkeypatch.setattr(mlflow.MlflowClient, "create_experiment", second)
    trained(tmp_path, "mlflow", [10])
    assert said(caplog) == []
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("family").experiment_id])
    assert run.data.metrics["train/loss"] == 2.5


class Broken(Logger):
    package = "json"
    faults: tuple[str, ...] = ()
    written: list[int]
    held: threading.Event

    def _do(self, what: str) -> None:
        if what in self.faults:
            raise ConnectionError("no network\nand much more")

    def open(self) -> None:
        self._do("open")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if "hang" in self.faults:
            self.held.wait()
        self._do(f"log {step}")
        self.written.append(step)

    def finish(self, step: int, scores: Mapping[str, float], images: Any) -> None:
        self._do("finish")

    def close(self, end: End) -> None:
        self._do("close")


@pytest.mark.parametrize(
    ("faults", "written", "lost"),
    [
        (("open",), [], "3 of 3 lines are missing there"),
        (("log 2",), [1, 3], ""),
        (("log 1", "log 3"), [2], "2 of 3 lines are missing there"),
        (("close",), [1, 2, 3], ""),
        (("hang",), [], "has not written everything after 0.3 s; going on"),
    ],
)
def test_a_logger_that_fails_loses_lines_and_nothing_else(
    faults: tuple[str, ...],
    written: list[int],
    lost: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(LOGGERS.table, "broken", f"{__name__}:Broken")
    monkeypatch.setattr(Broken, "faults", faults)
    monkeypatch.setattr(Broken, "written", [], raising=False)
    monkeypatch.setattr(Broken, "held", threading.Event(), raising=False)
    monkeypatch.setattr(loggers, "PATIENCE", 0.3)
    trained(tmp_path, "broken", [1, 2, 3])
    first = [] if "hang" in faults else [f"broken: ConnectionError: no network; curves {GAPS}"]
    assert said(caplog) == first + ([f"broken: {lost}"] if lost else [])
    assert Broken.written == written
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    Broken.held.set()


ENDS: list[tuple[Exception, str, tuple[bool, int]]] = [
    (RunError("the loss is nan"), "FAILED", (False, 1)),
    (Interrupted("stopped by SIGUSR1"), "KILLED", (True, 75)),
]


def ended_by(folder: Path, name: str, error: Exception) -> None:
    """A job that ends in an error after step 10."""
    logs = Logs((name,), "family", "1-vit_nano", SETTINGS)
    with pytest.raises(type(error)), MetricsWriter(folder, total_steps=30, batch=64, logs=logs) as writer:
        writer.log(10, {"loss": 2.5})
        raise error


@pytest.mark.parametrize(("error", "status", "_"), ENDS)
def test_mlflow_says_how_a_job_ended(
    error: Exception,
    status: str,
    _: object,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlflow = optional("mlflow", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient()
    ended_by(tmp_path, "mlflow", error)
    name = (tmp_path / "mlflow" / "id").read_text().strip()
    assert client.get_run(name).info.status == status
    trained(tmp_path, "mlflow", [20, 30], start=10)
    assert client.get_run(name).info.status == "FINISHED", "the same run goes on"
    assert said(caplog) == []


@pytest.mark.parametrize(("error", "_", "wanted"), ENDS)
def test_weights_and_biases_says_how_a_job_ended(
    error: Exception,
    _: object,
    wanted: tuple[bool, int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optional("wandb", "wandb")
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    ended_by(tmp_path, "wandb", error)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    codes: list[int] = []
    end = time.monotonic() + 30
    while not codes and time.monotonic() < end:  # its service writes the last record a moment after it has answered
        with contextlib.suppress(DecodeError):
            records = [Record.FromString(data) for data in transaction_log(file.read_bytes())]
            codes = [record.exit.exit_code for record in records if record.HasField("exit")]
    assert (any(record.HasField("preempting") for record in records), *codes) == wanted
    assert said(caplog) == []


class Ends(Logger):
    package = "json"
    ends: ClassVar[list[End]] = []

    def open(self) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self, step: int, scores: Mapping[str, float], images: Any) -> None: ...

    def close(self, end: End) -> None:
        self.ends.append(end)


def test_a_job_whose_scoring_fails_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGERS.table, "ends", f"{__name__}:Ends")
    monkeypatch.setattr(Ends, "ends", [])
    base = make_data(tmp_path)

    def fails(*_: object) -> None:
        raise RunError("the set is gone")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="the set is gone"):
        patch.setattr(Scorer, "at_the_end", fails)
        chain(base, tmp_path / "run", "engine.loggers=[ends]")
    assert Ends.ends == ["finished", "failed"]  # of the training, and of the scoring
    chain(base, tmp_path / "run", "engine.loggers=[ends]")
    # The second job's training and scoring follow the first one's scoring.
    assert Ends.ends == ["finished", "failed", *["finished"] * 3]


def test_mlflow_gets_parameters_that_failed_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = optional("mlflow", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient()

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "log_batch", fails)
        trained(tmp_path, "mlflow", [10])
    trained(tmp_path, "mlflow", [20], start=10)
    run = client.get_run((tmp_path / "mlflow" / "id").read_text().strip())
    assert run.data.params == {"optimizer.lr": "0.001", "optimizer.batch": "64", "data.mean": "[0.5, 0.5, 0.5]"}


def test_the_wait_for_a_full_queue_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGERS.table, "broken", f"{__name__}:Broken")
    monkeypatch.setattr(Broken, "faults", ("hang",))
    monkeypatch.setattr(Broken, "held", threading.Event(), raising=False)
    monkeypatch.setattr(Broken, "written", [], raising=False)
    monkeypatch.setattr(loggers, "PATIENCE", 0.1)
    monkeypatch.setattr(loggers, "_WAITING", 1)
    waits: list[float] = []
    monkeypatch.setattr(loggers._Outlet, "join", lambda _, timeout: waits.append(timeout))
    with OpenLoggers(Logs(("broken",)), tmp_path) as opened:
        opened.log(1, {})
        while not opened._outlets[0]._calls.empty():  # until the thread hangs in it
            time.sleep(0.001)
        opened.log(2, {})
    Broken.held.set()
    assert waits == [0.0]


def test_what_is_missing_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"engine\.loggers: wandb cannot be imported .*; pip install 'compt\[wandb\]'$"
    ):
        check_loggers({"tensorboard", "wandb"})
    monkeypatch.setitem(sys.modules, "mlflow", json)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=re.escape("address of a server in MLFLOW_TRACKING_URI")):
        check_loggers({"mlflow"})
