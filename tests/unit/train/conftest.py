"""TensorBoard's files of one second are read in the order of a number in their names, as text: 10 comes before 9."""

from __future__ import annotations

import pytest
from tensorboard.summary.writer import event_file_writer


@pytest.fixture(autouse=True)
def _first_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
