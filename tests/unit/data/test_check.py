from __future__ import annotations

import json
from pathlib import Path

import pytest
from open_clip.tokenizer import SimpleTokenizer

from compt.data import check as check_module
from compt.data.check import check
from compt.data.index import open_index
from compt.errors import DataError
from tests.helpers.shards import make_shards, picture, sample, texts, write_tar


def test_a_sound_set(tmp_path: Path) -> None:
    make_shards(tmp_path, n=10, shards=2, classes=3)
    seen: list[tuple[int, int]] = []
    report = check("*.tar", tmp_path, context_length=7, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert [(shard.name, shard.samples, shard.bad) for shard in report.shards] == [
        ("000000.tar", 5, 0),
        ("000001.tar", 5, 0),
    ]
    lengths = sorted(len(SimpleTokenizer().encode(text)) + 2 for i in range(10) for text in texts(i, 3))
    assert report.mean_tokens == pytest.approx(sum(lengths) / 30)
    assert (report.median_tokens, report.p95_tokens, report.max_tokens) == (lengths[14], lengths[28], lengths[-1])
    assert report.share_over_context == sum(length > 7 for length in lengths) / 30
    assert (report.samples, report.captions, report.labels) == (10, 30, 10)
    assert (report.smallest_image, report.largest_image) == ((40, 36), (40, 36))
    assert report.captions_per_image == {3: 10}
    assert report.fingerprint == open_index("*.tar", tmp_path).fingerprint
    assert seen[-1] == (10, 10)
    assert not [label for label, _ in report.rows() if label.startswith("unusable")]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_fault_is_counted_and_the_first_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(check_module, "_CHUNK", 2)
    shards = make_shards(tmp_path, n=8, shards=1)
    write_tar(
        tmp_path / "bad.tar",
        [
            *sample("whole", 1),
            ("broken.png", picture(1, 9, 9)[:60]),
            ("broken.json", b'{"captions": ["x"]}'),
            ("mute.png", picture(1, 9, 11)),
            ("mute.json", b"{}"),
            ("half.png", picture(1, 9, 9)),
            ("half.json", json.dumps({"captions": ["x", " "]}).encode()),
            ("faceless.txt", b"x"),
            *sample("whole", 2),
        ],
    )
    shards[0].write_bytes(shards[0].read_bytes()[:-12000])
    report = check("*.tar", tmp_path, workers=workers)
    assert not report.ok
    assert report.causes == {"image": 2, "caption": 2, "duplicate": 1, "tar": 1}
    assert report.first["image"].startswith("bad.tar: broken: ")
    assert report.first["caption"] == "bad.tar: mute: it has no caption"
    assert report.first["duplicate"] == "bad.tar: whole"
    assert report.first["tar"].startswith("000000.tar: 00000000")
    assert (report.smallest_image, report.largest_image) == ((9, 9), (40, 36))
    assert [(shard.name, shard.samples, shard.bad) for shard in report.shards][1] == ("bad.tar", 4, 5)
    rows = dict(report.rows())
    assert rows["unusable: duplicate"] == "1, first bad.tar: whole"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_shards(tmp_path, n=2, shards=1)
    with pytest.raises(DataError, match=r"000001\.tar"):
        check("{000000..000001}.tar", tmp_path)
