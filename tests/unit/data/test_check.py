from __future__ import annotations

import errno
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from compt.cli.main import main
from compt.data import check as check_module
from compt.data.account import Account
from compt.data.check import check
from compt.data.content import SAMPLED, spread
from compt.data.index import open_index
from compt.errors import DataError, RunError
from tests.helpers.shards import make_shards, picture, sample, texts, write_tar


def test_a_sound_set(tmp_path: Path) -> None:
    make_shards(tmp_path, n=10, shards=2, classes=3)
    seen: list[tuple[int, int]] = []
    report = check("*.tar", tmp_path, context_length=7, progress=lambda done, total: seen.append((done, total)))
    assert report.usable(0)
    assert report.title(0) == "Every sample can be used"
    lengths = sorted(len(SimpleTokenizer().encode(text)) + 2 for i in range(10) for text in texts(i, 3))
    found = report.found
    assert found.mean_tokens == pytest.approx(sum(lengths) / 30)
    assert (found.tokens(0.5), found.tokens(0.95), found.tokens(1)) == (lengths[14], lengths[28], lengths[-1])
    assert found.share_over(7) == sum(length > 7 for length in lengths) / 30
    assert (found.samples, found.captions, report.account.used["label"]) == (10, 30, 10)
    assert (found.smallest, found.largest) == ((40, 36), (40, 36))
    assert found.captions_per_image == {3: 10}
    rows = dict(report.rows())
    assert rows["samples"] == "10 (5 per shard)"
    assert rows["fingerprint"] == open_index("*.tar", tmp_path).fingerprint[:16]
    assert seen[-1] == (10, 10)
    assert report.account.faults == []


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
    assert not report.usable(0.01)
    account = report.account
    assert account.unused == {"image": 1, "caption": 1, "empty": 1, "no_image": 1, "duplicate": 2, "cut": 1}
    assert account.first["image"].startswith("bad.tar: broken: ")
    assert account.first["caption"] == "bad.tar: mute: it has no caption"
    assert account.first["duplicate"] == "bad.tar: whole.png"
    assert account.first["cut"].startswith("000000.tar: 00000000")
    assert (report.found.smallest, report.found.largest) == ((9, 9), (40, 36))
    assert account.read("sample") == report.found.samples == len(report.index)
    assert report.usable(0.3)
    assert not report.usable(0.1)


def test_samples_with_several_classes(tmp_path: Path) -> None:
    def labels(at: int, count: int) -> bytes:
        blob = io.BytesIO()
        np.save(blob, np.arange(count) == at % count)
        return blob.getvalue()

    whole = labels(0, 3)
    damaged = [whole.replace(b"(3,)", text) for text in (b"(3, ", b"{{},", b"\n 3,", b"1e9,")]
    damaged += [b"PK\3\4" + bytes(40), whole[:10] + b"-" * 9999]
    contents = [whole, labels(1, 3), labels(2, 2), b"no array", *damaged]
    members = [
        (f"{at}.{kind}", data)
        for at, own in enumerate(contents)
        for kind, data in (("png", picture(at, 40, 36)), ("npy", own))
    ]
    write_tar(tmp_path / "test" / "0.tar", members)
    (tmp_path / "classnames.txt").write_text("a\nb\nc\n")
    report = check("test/*.tar", tmp_path)
    assert report.account.used["label"] == 2
    assert dict(report.account.unused) == {"label_range": 1, "label_text": 1 + len(damaged)}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_shards(tmp_path, n=2, shards=1)
    with pytest.raises(DataError, match=r"000001\.tar"):
        check("{000000..000001}.tar", tmp_path)


def test_a_process_that_is_killed_or_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, n=4, shards=2)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="one of 2 processes was killed"):
        patch.setattr("compt.data.check.to_rgb", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        check("*.tar", tmp_path, workers=2)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    with pytest.raises(RunError, match=r"cannot start 2 processes: .*No space left.*/dev/shm"):
        check("*.tar", tmp_path, workers=2)


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["compt", "data", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().out


def every_fault(folder: Path) -> None:
    """Eight good samples and nearly everything that can be wrong."""
    jpg = picture(1, 8, 8, "JPEG")
    write_tar(
        folder / "0.tar",
        [
            *(member for n in range(8) for member in sample(f"good{n}", n)),
            *(("a.1.jpg", jpg), ("a.1.txt", b"x"), ("a.2.jpg", jpg), ("a.2.txt", b"x")),
            *(("p/._b.jpg", b"\0"), ("p/b.bmp", b"BM"), ("p/b.jpg", jpg), ("p/b.txt", b"x")),
            *(("c.jpg", jpg), ("d.jpg", jpg), ("c.txt", b"x"), ("d.txt", b"x")),
            *(("e.jpg", jpg), ("e.json", b"{"), ("e.txt", b"x"), ("f.jpg", b"none"), ("f.txt", b"x")),
            *(("g.jpg", jpg), ("g.txt", b"\xe9t\xe9"), ("h.txt", b"x"), ("bare", b""), *sample("good0", 1)),
            *(("i.jpg", jpg), ("i.json", b'{"captions": ["x", "", 3]}'), ("i.cls", b"-1")),
        ],
    )
    cut = write_tar(folder / "1.tar", [*sample("k", 1), *sample("l", 2)])
    cut.write_bytes(cut.read_bytes()[:9000])
    (folder / "2.tar.gz").write_bytes(b"\x1f\x8b")


def test_the_page_of_a_set_with_every_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every_fault(tmp_path)
    code, page = said(monkeypatch, capsys, "check", tmp_path)
    assert code == 3
    assert max(map(len, page.splitlines())) <= 80
    lines = page.splitlines()
    assert lines[0] == "Cannot be used: 4 of 17 samples are unusable (23.5 %)"
    text = " ".join(page.split())
    for words in (
        "compressed shard count 1",
        "key with dots (the key ends at the first dot) count 4 (2 images)",
        "members of a sample are not together count 2 the first 0.tar: c.txt what to do pack with tar --sort=name",
        "caption that is not UTF-8 count 1 the first 0.tar: g",
        "image that cannot be decoded count 1 the first 0.tar: f",
        "second image of a key count 1 (1 image) the first 0.tar: p/b.bmp",
        ".cls without a whole number from 0 count 1 the first 0.tar: i.cls",
    ):
        assert words in text
    code, page = said(monkeypatch, capsys, "check", tmp_path, "--max-bad-share", 0.3)
    assert code == 0
    assert " ".join(page.split()).startswith(
        "Can be used, but not all of it. Not used: 1 of 3 files in folders, 14 of 46 files in the shards, 4 of 17 sam"
    )
    assert page.index("(harmless)") > page.rindex("iconv"), "what costs nothing comes last"
    code, page = said(monkeypatch, capsys, "check", tmp_path, "--json", "--hashes")
    report = json.loads(page)
    assert report["hashes_compared"] is True
    assert (code, report["usable"], report["samples"]) == (3, False, 17)
    account = Account.from_json(report["account"])
    assert account.read("sample") == 17
    assert account.unused["dots"] == 4
    code, page = said(monkeypatch, capsys, "index", tmp_path)
    assert code == 0
    assert "members of a sample are not together" in page


def test_an_evaluation_set_is_judged_by_its_labels(tmp_path: Path) -> None:
    members = [
        (f"s{n}.{e}", picture(n, 8, 8, "WEBP") if e == "webp" else str(n).encode())
        for n in range(4)
        for e in ("webp", "cls")
    ]
    write_tar(tmp_path / "test" / "0.tar", members)
    report = check("test/*.tar", tmp_path)
    assert (report.captioned, report.usable(0), report.account.faults) == (False, True, [])
    assert report.account.used["label"] == 4
    (tmp_path / "classnames.txt").write_text("a\nb\nc\n")
    report = check("test/*.tar", tmp_path)
    assert (report.usable(0.24), report.usable(0.25)) == (False, True)
    assert report.account.unused["label_range"] == 1
    write_tar(tmp_path / "test" / "0.tar", [*members[:-1], ("s3.cls", b"")])
    report = check("test/*.tar", tmp_path)
    assert (report.account.unused["label_text"], report.account.unused["cls"]) == (1, 1)
    assert report.title(0.2) == "Cannot be used: 1 of 4 class numbers are unusable (25 %)"
    (tmp_path / "classnames.txt").write_text("a\n\nc\n")
    with pytest.raises(DataError, match=r"classnames\.txt: line 2 is empty"):
        check("test/*.tar", tmp_path)


def test_hashes_notice_a_single_byte_that_samples_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path, n=40, shards=1)
    shard = next(tmp_path.glob("*.tar"))
    assert said(monkeypatch, capsys, "check", tmp_path, "--hashes")[0] == 0
    times, index = shard.stat(), open_index("*.tar", tmp_path)
    places = next(index.column("image_offset")).tolist()
    hashed = spread(len(places), SAMPLED)
    other = next(place for at, place in enumerate(places) if at not in hashed)
    with shard.open("r+b") as file:
        file.seek(other + 60)
        (byte,) = file.read(1)
        file.seek(other + 60)
        file.write(bytes([byte ^ 1]))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_index("*.tar", tmp_path).content == index.content
    monkeypatch.setattr("sys.argv", ["compt", "data", "check", str(tmp_path), "--hashes"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 3
    assert f"1 of 1 shards have changed since they were hashed first, such as {shard}" in told
    assert f"remove {tmp_path}/.compt-index/hashes.json to accept them" in told
