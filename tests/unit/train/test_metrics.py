from __future__ import annotations

import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compt.errors import RunError
from compt.train import metrics
from compt.train.metrics import MetricsWriter, read_metrics


def _quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def _writer(folder: Path, start: int = 0, console: Console | None = None, **more) -> MetricsWriter:
    settings = {"total_steps": 100, "batch": 64, "title": "tiny", **more}
    return MetricsWriter(folder, start_step=start, console=console or _quiet(), **settings)


def _steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tb"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_a_line_holds_everything_that_was_logged(tmp_path: Path) -> None:
    values = {"epoch": 0.5, "loss": 2.5, "task": 2.0, "r": 0.25, "lr": 1e-3, "skipped_image": 3}
    with _writer(tmp_path) as writer:
        writer.log(10, values)
        writer.log_evaluation(10, {"epoch": 0.5, "twemoji_top1": 21.5})
    train, score = read_metrics(tmp_path / "metrics.jsonl")
    assert train == {"kind": "train", "step": 10, "samples": 640, **values}
    assert score == {"kind": "eval", "step": 10, "samples": 640, "epoch": 0.5, "twemoji_top1": 21.5}
    assert read_metrics(tmp_path / "metrics.jsonl", "eval") == [score]


def test_tensorboard_has_the_same_scalars(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        for step in (10, 20):
            writer.log(step, {"loss": step / 4})
        writer.log_evaluation(20, {"top1": 12.0})
    assert _scalars(tmp_path, "train/loss") == [(10, 2.5), (20, 5.0)]
    assert _scalars(tmp_path, "train/samples") == [(10, 640.0), (20, 1280.0)]
    assert _scalars(tmp_path, "eval/top1") == [(20, 12.0)]


def test_lines_are_on_the_disk_at_once(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        writer.log(10, {"loss": 1.0})
        assert _steps(tmp_path) == [10]


def test_a_resume_cuts_off_what_is_trained_again(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.log(step, {"loss": 1.0})
    with _writer(tmp_path, start=20) as writer:
        assert _steps(tmp_path) == [10, 20]
        writer.log(30, {"loss": 2.0})
    assert _steps(tmp_path) == [10, 20, 30]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == 2.0
    assert _scalars(tmp_path, "train/loss") == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_start_from_nothing_leaves_no_old_lines(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        writer.log(10, {"loss": 1.0})
    with _writer(tmp_path):
        pass
    assert _steps(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"kind": "train", "step": 2', "[" * 5000, '{"step": "2"}'])
def test_a_torn_last_line_is_no_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 10, "loss": 1.0}\n' + torn)
    assert _steps(tmp_path) == [10]
    with _writer(tmp_path, start=20) as writer:
        writer.log(30, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 30]


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    with _writer(tmp_path) as writer:
        writer.log(10, {"loss": math.nan, "grad_norm": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.dist, "is_main", lambda: False)
    with _writer(tmp_path / "run") as writer:
        writer.log(10, {"loss": 1.0})
        writer.log_evaluation(10, {"top1": 1.0})
        writer.advance(11)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = flush

    with _writer(tmp_path) as writer:
        writer._file.close()
        writer._file = Full()
        with pytest.raises(RunError, match=r"metrics\.jsonl: No space left"):
            writer.log(10, {"loss": 1.0})


VALUES = {"loss": 3.2145, "r": 0.1013, "samples_per_s": 2213.4}


def test_a_ci_log_gets_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock)
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    with _writer(tmp_path, console=console, title="[1/4] vit_t16") as writer:
        for step in range(1, 101):
            clock += 0.5
            if step % 5 == 0:
                writer.log(step, VALUES)
            else:
                writer.advance(step)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 5  # 50 seconds, of which the last is also the last step
    assert lines[0] == "[1/4] vit_t16: step 20/100, loss 3.215, r 0.101, 2.2k/s, 0:00:02 left"
    assert lines[-1].startswith("[1/4] vit_t16: step 100/100")
    assert not any("\x1b" in line for line in lines)


def test_an_evaluation_is_shown(tmp_path: Path) -> None:
    console = _quiet()
    with _writer(tmp_path, console=console) as writer:
        writer.log_evaluation(50, {"epoch": 1.0, "twemoji_top1": 21.53})
    assert console.file.getvalue() == "tiny: step 50: twemoji_top1 21.53\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_fits_a_terminal(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with _writer(tmp_path, console=console, title="link 2 of 4, vit_s16 from vit_t16", total_steps=64_000) as writer:
        writer.log(12_000, {**VALUES, "samples_per_s": 636.0})
        writer._bar.refresh()
    shown = console.file.getvalue().replace("\r", "\n").splitlines()
    lines = [line for line in shown if "loss" in line]
    assert lines
    for line in lines:
        text = line.split("\x1b[2K")[-1].split("\x1b")[0].rstrip()
        assert len(text) <= width
        assert "link 2" in text
        for part in ("19%", "loss 3.215", "r 0.101", "636/s", "1:27:"):
            assert part in text


def test_a_full_disk_for_tensorboard_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsWriter(tmp_path, total_steps=3, batch=4) as writer:
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        for step in (1, 2, 3):
            writer.log(step, {"loss": 1.0, "lr": 0.1})
    assert [record.getMessage() for record in caplog.records] == [
        "tensorboard: OSError: [Errno 28] No space left on device; curves there have gaps, metrics.jsonl goes on",
        "tensorboard: 3 of 3 lines are missing there",
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
