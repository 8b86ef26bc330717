"""Atomic writes: the old content or the new, nothing left behind, one message for what the disk refuses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from compt.errors import DataError, RunError
from compt.evaluate.common import save_result
from compt.files import write_bytes, write_json, write_text


def test_bytes_and_text(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "a", b"\x00\xff")
    assert (tmp_path / "new" / "a").read_bytes() == b"\x00\xff"
    write_text(tmp_path / "new" / "a", "ä\n")
    assert (tmp_path / "new" / "a").read_bytes() == "ä\n".encode()
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_the_disk_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_bytes(tmp_path / "a.npz", b"old")
    monkeypatch.setattr(os, call, refuse)
    for write in (
        lambda: write_bytes(tmp_path / "a.npz", b"new"),
        lambda: write_json(tmp_path / "a.npz", {}),
        lambda: save_result(tmp_path, "a", {}, {"x": np.zeros(3)}),
    ):
        with pytest.raises(RunError, match=r"cannot write .*a\.npz: No space left on device"):
            write()
    assert (tmp_path / "a.npz").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_an_index_that_cannot_be_written_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compt.data.index import build_index
    from tests.helpers_shards import make_shards

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shards = make_shards(tmp_path / "data", n=4, shards=1)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DataError, match=r"the index: cannot write .*000000\.tar.*npz: No space left"):
        build_index(shards, tmp_path / "index")
    assert [path.name for path in (tmp_path / "index").iterdir()] == []
