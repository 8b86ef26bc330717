"""The measurement of large indexes: that it measures what a set really is."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from benchmarks.data import scale
from compt.data.index import open_index
from compt.data.samples import SampleReader


def test_the_tiny_tars_are_tars(tmp_path: Path) -> None:
    scale.write_tar(tmp_path / "x.tar", 7, 3)
    with tarfile.open(tmp_path / "x.tar", "r:") as archive:
        assert archive.getnames() == [f"{number:09d}.{end}" for number in (7, 8, 9) for end in ("jpg", "txt")]
    index = open_index("x.tar", tmp_path)
    reader = SampleReader(index)
    assert [index.key(at) for at in range(3)] == ["000000007", "000000008", "000000009"]
    assert reader.image(index.entry(1)) == scale.IMAGE
    assert reader.captions(index.entry(1)).texts == [scale.CAPTION.decode()]
    assert index.account.faults == []


@pytest.mark.parametrize("how", ["scanned from tars", "merged from the indexes of shards"])
def test_a_set_is_made_and_read(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "BATCH", 8)
    scale.prepare(tmp_path, how, 3, 16)
    made = scale.make(tmp_path, how, 3, 16)
    found = scale.read(tmp_path, how, 3, 16)
    assert made["index_bytes"] == next(tmp_path.glob(".compt-index/merged-*")).stat().st_size
    assert found["read_bytes"] < 1 << 24
    row = {"samples": 48, "shards": 3, "how": how, **made, **found}
    ordered = scale.order(3, 16)
    assert scale.index_table([row]).rows[0][:3] == ("48", "3", how)
    assert scale.order_table([ordered]).rows[0][:2] == ("48", "3")
    assert "Opening 3 shards with 48 samples opens one file" in scale.findings([row], [ordered])[0]
