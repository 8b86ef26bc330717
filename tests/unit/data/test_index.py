from __future__ import annotations

import errno
import gzip
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from compt.data import index as index_module
from compt.data.content import changed_shards
from compt.data.find import expand_patterns
from compt.data.index import build_index, index_folder, open_index
from compt.data.labels import NO_NUMBER, NONE
from compt.data.names import split_name
from compt.data.samples import SampleReader
from compt.data.scan import json_label
from compt.errors import DataError
from tests.helpers.shards import make_shards, picture, sample, texts, write_tar


def captions_of(index, number: int) -> list[str]:
    reader = SampleReader(index)
    return reader.captions(index.entry(number)).texts


def test_an_index_agrees_with_webdataset(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, n=11, shards=3, classes=4)
    index = open_index("*.tar", tmp_path)
    reader = SampleReader(index)
    labels = np.concatenate([*index.column("label")])
    theirs = [s for shard in shards for s in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)]
    assert len(index) == len(theirs) == 11
    for number, other in enumerate(theirs):
        entry = index.entry(number)
        assert entry.key == other["__key__"] == index.key(number)
        assert reader.image(entry) == other["png"]
        assert reader.json(entry) == other["json"]
        assert entry.label == int(other["cls"]) == labels[number]
        assert entry.captions == 3
    assert index.sizes.tolist() == [4, 4, 3]
    assert index.account.faults == []
    assert index.account.used["member"] == 33


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "d.d/a.jpg",
        "./x/000.seg.PNG",
        "noext",
        "d.d/noext",
        ".hidden",
        "a.tar.gz",
        "__meta__/x.json",
        "a\nb.png",
    ],
)
def test_names_are_split_as_webdataset_does(name: str) -> None:
    base, extension = webdataset.tariterators.base_plus_ext(name)
    expected = None if base is None or name.startswith("__") else (base, extension.lower())
    assert split_name(name) == expected


def test_long_names_of_both_formats(tmp_path: Path) -> None:
    long = "folder/" * 30 + "k" * 120
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as archive:
            for name, data in [*sample(f"{long}{number}", 1), *sample(f"../../etc/ключ{number}", 2)]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, __import__("io").BytesIO(data))
    index = open_index("*.tar", tmp_path)
    assert [index.key(i) for i in range(4)] == [f"{long}0", "../../etc/ключ0", f"{long}1", "../../etc/ключ1"]
    assert SampleReader(index).image(index.entry(2)) == picture(1, 40, 36)


def test_patterns(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", n=4, shards=4)

    def names(*patterns: str) -> list[str]:
        return [path.name for path in expand_patterns(list(patterns), tmp_path)]

    assert names("a/{000001..000002}.tar") == ["000001.tar", "000002.tar"]
    assert names("a/*.tar") == names("a") == [f"{i:06d}.tar" for i in range(4)]
    assert names("a/*3.tar", "a/{000000..000001}.tar") == ["000003.tar", "000000.tar", "000001.tar"]
    assert names("a/000001.tar", "a/*1.tar") == ["000001.tar"]
    for pattern, said in [
        ("a/{000002..000005}.tar", "000004.tar' (from 'a/{000002..000005}.tar')"),
        ("b/*.tar", "no shard matches"),
        ("b/x.tar", "there is no shard"),
        ("pipe:aws s3 cp s3://bucket/x.tar -", "pipes cannot be read"),
        ("a/{1..2.tar", "{1..2"),
    ]:
        with pytest.raises(DataError) as error:
            names(pattern)
        assert said in str(error.value)
    with pytest.raises(DataError, match="no shards are given"):
        names()


def test_a_compressed_tar_is_one_clear_error(tmp_path: Path) -> None:
    shard = make_shards(tmp_path, n=2, shards=1)[0]
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match=r"x\.tar\.gz is compressed.*gunzip -k x\.tar\.gz"):
        open_index("x.tar.gz", tmp_path)


def test_a_truncated_tar_keeps_what_is_whole(tmp_path: Path) -> None:
    shard = make_shards(tmp_path, n=8, shards=1)[0]
    whole = open_index("*.tar", tmp_path)
    at = whole.entry(5)
    data = shard.read_bytes()
    for cut, left in [(at.image_offset + 10, 5), (at.text_offset + 1, 5), (at.text_offset - 300, 5), (700, 0)]:
        shard.write_bytes(data[:cut])
        if not left:
            with pytest.raises(DataError, match=r"no samples in 1 shards.*cut or damaged tar.*: 1"):
                open_index("*.tar", tmp_path)
            continue
        index = open_index("*.tar", tmp_path)
        assert len(index) == left
        assert index.account.unused["cut"] == 1
        assert index.account.first["cut"] == "000000.tar: 000000005"
        assert captions_of(index, 4) == texts(4, 3)


def test_a_cut_between_two_members_is_noticed(tmp_path: Path) -> None:
    shard = make_shards(tmp_path, n=8, shards=1)[0]
    header = open_index("*.tar", tmp_path).entry(5).image_offset - 512
    shard.write_bytes(shard.read_bytes()[:header])
    index = open_index("*.tar", tmp_path)
    assert (len(index), index.account.unused["cut"]) == (5, 1)


def forged(kind: bytes, size: int, sparse: int = 0) -> bytes:
    """The header of a member of a type and a size."""
    header = bytearray(tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[124:136], header[482] = kind, tarfile.itn(size, 12, tarfile.GNU_FORMAT), sparse
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(header)[0]
    return bytes(header)


@pytest.mark.parametrize(
    "end",
    [forged(b"S", 0, sparse=1), *(forged(kind, size) for kind in (b"0", b"L", b"S") for size in (2**62, 2**70))],
)
def test_a_forged_header_is_the_end_of_a_damaged_tar(tmp_path: Path, end: bytes) -> None:
    shard = make_shards(tmp_path, n=2, shards=1)[0]
    with tarfile.open(shard) as archive:
        archive.getmembers()
        shard.write_bytes(shard.read_bytes()[: archive.offset] + end)
    index = open_index("*.tar", tmp_path)
    assert (len(index), index.account.unused["cut"]) == (2, 1)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("{}", NONE),
        ("5", NONE),
        ('{"a": 7}', 7),
        *((f'{{"a": {value}}}', NO_NUMBER) for value in (10**18, 10**400, -1, "true", "1.5")),
    ],
)
def test_class_numbers_of_a_json(text: str, label: int) -> None:
    assert json_label(text.encode(), "a") == label


def test_damage_in_the_middle_and_files_that_are_no_tars(tmp_path: Path) -> None:
    shard = make_shards(tmp_path, n=8, shards=1)[0]
    header = open_index("*.tar", tmp_path).entry(3).image_offset - 512
    data = bytearray(shard.read_bytes())
    data[header : header + 512] = b"\xff" * 512
    shard.write_bytes(data)
    (tmp_path / "1.tar").write_bytes(b"")
    (tmp_path / "2.tar").write_bytes(b"not a tar at all" * 100)
    index = open_index("*.tar", tmp_path)
    assert index.sizes.tolist() == [3, 0, 0]
    assert index.account.unused == {"cut": 3}
    assert [index.key(i) for i in range(3)] == ["000000000", "000000001", "000000002"]


def test_duplicate_keys_and_missing_members_are_counted(tmp_path: Path) -> None:
    members = [
        *sample("a", 1),
        *sample("a", 2),  # beside the first
        *sample("b", 3),
        ("c.json", b"{}"),  # no image
        *sample("a", 4),  # apart from the first
        ("d.png", picture(5, 8, 8)),  # no captions: an evaluation set may have none
        ("noextension", b""),
    ]
    write_tar(tmp_path / "x.tar", members)
    index = open_index("x.tar", tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["a", "b", "d"]
    assert index.account.unused == {"duplicate": 4, "no_image": 1, "bare": 1}
    assert captions_of(index, 0) == texts(1, 3)
    assert next(index.column("captions")).tolist() == [3, 3, 0]


def test_the_index_is_reused_while_the_shard_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path, n=6, shards=3)
    scanned: list[str] = []
    real = index_module.scan_shard
    monkeypatch.setattr(index_module, "scan_shard", lambda path, *rest: scanned.append(path.name) or real(path, *rest))
    first = open_index("*.tar", tmp_path)
    assert open_index("*.tar", tmp_path).fingerprint == first.fingerprint
    assert scanned == ["000000.tar", "000001.tar", "000002.tar"]
    os.utime(shards[1], ns=(1, 1))
    open_index("*.tar", tmp_path)
    assert scanned[3:] == ["000001.tar"]
    write_tar(shards[2], sample("other", 9))
    assert open_index("*.tar", tmp_path).fingerprint != first.fingerprint
    assert scanned[4:] == ["000002.tar"]
    torn = tmp_path / ".compt-index" / "000000.tar.npz"
    torn.write_bytes(torn.read_bytes()[:100])
    next(torn.parent.glob("merged-*")).unlink()
    open_index("*.tar", tmp_path)
    assert scanned[5:] == ["000000.tar"]


def test_the_fingerprint_is_that_of_the_data_not_of_its_folder(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", n=6, shards=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".compt-index"))
    make_shards(tmp_path / "c", n=6, shards=2, captions=4)
    prints = [open_index("*.tar", tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_an_unwritable_folder_is_indexed_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "a", n=4, shards=1)
    (tmp_path / "a" / ".compt-index").write_text("a file in the way, as a read-only folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(open_index("*.tar", tmp_path / "a")) == 4
    assert len(list((tmp_path / "cache").rglob("000000.tar.npz"))) == 1
    open_index("*.tar", tmp_path / "a", index_dir=tmp_path / "chosen")
    assert len(list((tmp_path / "chosen").glob("000000.tar-*.npz"))) == 1
    (tmp_path / "blocked").write_text("")
    with pytest.raises(DataError, match="cannot write an index in"):
        open_index("*.tar", tmp_path / "a", index_dir=tmp_path / "blocked")


def test_scanning_in_processes_gives_the_same(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, n=12, shards=4)
    seen: list[tuple[int, int]] = []
    one = build_index(shards, tmp_path / "one", progress=lambda done, total: seen.append((done, total)), workers=1)
    two = build_index(shards, tmp_path / "two", workers=2)
    assert one.fingerprint == two.fingerprint
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(map(np.array_equal, one.column("image_offset"), two.column("image_offset")))


def test_img2dataset_shards_take_the_text_file(tmp_path: Path) -> None:
    members = [("0.jpg", picture(0, 8, 8, "JPEG")), ("0.json", b'{"caption": "j"}'), ("0.txt", b"from txt")]
    write_tar(tmp_path / "x.tar", [*members, ("1.jpg", picture(1, 8, 8, "JPEG")), ("1.json", b'{"caption": "j"}')])
    index = open_index("x.tar", tmp_path)
    assert [captions_of(index, i) for i in range(2)] == [["from txt"], ["j"]]


DREAMLIP = """key,raw,shortIB,longIB,shortSV,longSV,shortLLA,longLLA
000000000,raw zero,sib,First. Second.,ssv,"Third, with comma. Fourth.",sla,Fifth.
000000002.jpg,raw two,,,,,,
unknown,never,,,,,,
"""


def test_a_captions_csv_is_laid_out_once_and_looked_up_by_key(tmp_path: Path) -> None:
    make_shards(tmp_path, n=4, shards=1)
    csv = tmp_path / "captions.csv"
    csv.write_text(DREAMLIP)
    plain = open_index("*.tar", tmp_path)
    index = open_index("*.tar", tmp_path, captions_csv=csv)
    assert captions_of(index, 0) == [
        "raw zero",
        "sib",
        "First.",
        "Second.",
        "ssv",
        "Third, with comma.",
        "Fourth.",
        "sla",
        "Fifth.",
    ]
    assert captions_of(index, 1) == texts(1, 3)  # not in the CSV: the sample's own
    assert captions_of(index, 2) == ["raw two"]
    assert next(index.column("captions")).tolist() == [9, 3, 1, 3]
    assert index.fingerprint != plain.fingerprint
    before = index.tables[0].blob.stat().st_mtime_ns
    assert open_index("*.tar", tmp_path, captions_csv=csv).tables[0].blob.stat().st_mtime_ns == before
    csv.write_text(DREAMLIP.replace("raw two", "raw 2!"))
    assert captions_of(open_index("*.tar", tmp_path, captions_csv=csv), 2) == ["raw 2!"]
    stat = csv.stat()
    csv.write_text(DREAMLIP.replace("raw two", "raw 3!"))
    os.utime(csv, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert captions_of(open_index("*.tar", tmp_path, captions_csv=csv), 2) == ["raw 3!"]


def test_stored_tables_hold_no_pickles(tmp_path: Path) -> None:
    make_shards(tmp_path, n=2, shards=1)
    open_index("*.tar", tmp_path)
    with np.load(tmp_path / ".compt-index" / "000000.tar.npz", allow_pickle=False) as stored:
        assert set(stored.files) == {"meta", "rows", "keys"}


def test_hashes_of_all_bytes_show_a_changed_shard(tmp_path: Path) -> None:
    make_shards(tmp_path, n=6, shards=3)
    shards = sorted(tmp_path.glob("*.tar"))
    assert list(changed_shards(shards, tmp_path)) == []
    blob = bytearray(shards[1].read_bytes())
    blob[len(blob) // 2] ^= 1
    shards[1].write_bytes(blob)
    for shard in shards:
        os.utime(shard)
    assert list(changed_shards(shards, tmp_path)) == [shards[1]]
    assert list(changed_shards(shards, tmp_path)) == [shards[1]], "the first hash stays"


def test_a_user_without_a_home_folder_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, n=4, shards=1)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(_: int) -> Any:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert len(open_index("*.tar", tmp_path)) == 4
    make_shards(tmp_path / "a", n=4, shards=1)
    (tmp_path / "a" / ".compt-index").write_text("a file in the way, as a read-only folder would be")
    assert len(open_index("*.tar", tmp_path / "a")) == 4
    (place,) = (tmp_path / "temporary").iterdir()
    assert (place.name, place.stat().st_mode & 0o777) == (f"compt-index-{os.getuid()}", 0o700)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="cannot write an index"):
        patch.setattr("tempfile.TemporaryFile", read_only)
        index_folder(tmp_path)


def read_only(**_: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
