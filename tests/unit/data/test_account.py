"""What a tar, folder or table holds is used, or not used for a named cause: compared with Python's plainest readers."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.data.account import CAUSES, UNIT_NAMES, Account
from compt.data.folder import read_class_folders
from compt.data.index import open_index
from compt.data.labels import NO_NUMBER
from compt.data.samples import SampleReader
from compt.data.scan import _Header
from compt.data.table import convert_table
from compt.errors import DataError
from tests.helpers.shards import make_shards, picture, sample, write_tar

IMAGE = picture(0, 4, 4, "JPEG")

NAMES = st.builds(
    lambda folder, key, extension: f"{folder}{key}{extension}",
    st.sampled_from(["", "", "", "p/", "./", "a.b/", "__MACOSX/", ".git/"]),
    st.sampled_from(["a", "b", "c", "._a", "a.1", "", "__m__"]),
    st.sampled_from([".jpg", ".jpg", ".JPG", ".png", ".txt", ".json", ".cls", ".npy", "", ".seg.png", "."]),
)
DATA = st.sampled_from(
    [
        b"",
        b"one",
        b"one\ntwo\n",
        b"\xff\xfe",
        b"\xe2\x80\x8b",
        b"7",
        b"-1",
        b'{"captions": ["x", "", 3]}',
        b'{"caption": "y"}',
        b"{",
    ]
)
KINDS = st.sampled_from([tarfile.REGTYPE] * 12 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
MEMBERS = st.lists(st.tuples(NAMES.filter(bool), DATA, KINDS), max_size=14)


def packed(path: Path, members: list[tuple[str, bytes, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(data) if info.size else None)


@settings(max_examples=300, deadline=None)
@given(MEMBERS)
def test_members_that_are_used_and_not_used_are_all_that_the_tar_has(members: list[tuple[str, bytes, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        whole = [("whole.jpg", IMAGE, tarfile.REGTYPE), ("whole.txt", b"w", tarfile.REGTYPE)]
        packed(path, [*whole, *members])
        index = open_index("x.tar", Path(folder))
        with tarfile.open(path) as archive:
            listed = archive.getmembers()
        account = index.account
        assert account.read("member") == len(listed) == len(members) + 2
        assert account.used["shard"] == account.read("shard") == 1
        # Every image of the tar is that of a sample, or counted.
        images = [m for m in listed if m.isreg() and m.name.lower().rpartition(".")[2] in ("jpg", "png")]
        hidden = [m for m in images if any(p.startswith(("._", ".git", "__MACOSX")) for p in m.name.split("/"))]
        bare = [m for m in images if m.name.rpartition("/")[2].lower() in (".jpg", ".png", ".seg.png")]
        uncounted = {id(m) for m in (*hidden, *bare)}
        assert len(index) + sum(account.images.values()) == len([m for m in images if id(m) not in uncounted])
        used = 0
        reader = SampleReader(index)
        for at in range(len(index)):
            entry = index.entry(at)
            used += entry.captions
            if entry.captions:
                assert len(reader.captions(entry).texts) == entry.captions
        assert account.used["caption"] == used == sum(n * images for n, images in index.counts.items())
        assert all(account.first[cause] for cause in account.unused)


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        lambda folder, name: folder + name,
        st.sampled_from(["", "f" * 80 + "/", "é" * 40 + "/" + "g" * 60 + "/"]),
        st.text(st.sampled_from("ab/é."), min_size=1, max_size=60),
    ),
    st.sampled_from([0, 7, 511, 8**11 - 1, 8**11]),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from([b"0", b"\0", b"5", b"2", b"7"]),
    st.one_of(st.none(), st.tuples(st.integers(0, 511), st.integers(0, 255))),
)
def test_headers_are_read_as_tarfile_reads_them(
    name: str, size: int, form: int, kind: bytes, flip: tuple[int, int] | None
) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    try:
        block = bytearray(info.tobuf(form, "utf-8", "surrogateescape")[-tarfile.BLOCKSIZE :])
    except ValueError:  # too large or too long for the format
        return
    if flip is not None:
        block[flip[0]] = flip[1]

    def read(reader: type[tarfile.TarInfo]) -> tuple[str, int, bool, bool] | None:
        try:
            found = reader.frombuf(bytes(block), "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError):
            return None
        return found.name, found.size, found.isreg(), found.isdir()

    assert read(_Header) == read(tarfile.TarInfo)


CELLS = st.text(st.sampled_from('ab", \t1é\u200b'), max_size=6)
ROWS = st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=12)


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_rows_that_are_used_and_not_used_are_all_that_the_table_has(rows: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["key", "caption", "size"], ["sure", "one", "2"], *rows])
        with path.open(newline="", encoding="utf-8") as file:
            plain = [row for row in csv.reader(file) if row][1:]
        account = convert_table(path, Path(folder)).account
        good = [r for r in plain if len(r) == 3 and r[0].strip() and r[1].strip(" \t\u200b")]
        assert account.read("row") == len(plain)
        assert account.used["row"] == len(good)


VALUES = st.one_of(
    st.none(), st.integers(), st.text("ab \u200b", max_size=3), st.lists(st.text("a ", max_size=2), max_size=3)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.fixed_dictionaries({"key": st.sampled_from("abc"), "captions": VALUES}), max_size=8))
def test_lines_of_json_give_their_captions_to_their_key(rows: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.jsonl"
        rows = [{"key": "a", "captions": ["sure"]}, *rows]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        write_tar(Path(folder) / "x.tar", [(f"{key}.jpg", IMAGE) for key in "abc"])
        expected: dict[str, list[str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            value = row["captions"]
            texts = value if isinstance(value, list) else [value.strip()] if isinstance(value, str) else []
            expected.setdefault(row["key"], []).extend(text for text in texts if text.strip(" \u200b"))
        index = open_index("x.tar", Path(folder), captions_csv=path, min_matched=0)
        reader = SampleReader(index)
        entries = [index.entry(at) for at in range(3)]
        found = {entry.key: reader.captions(entry).texts for entry in entries if entry.captions}
        assert found == {key: texts for key, texts in expected.items() if texts}
        assert index.account.read("row") == len(rows)
        assert index.account.read("join") == 3


@settings(max_examples=50, deadline=None)
@given(
    st.sets(
        st.sampled_from(["a.tar", "B.TAR", "c.tar.gz", "d.tgz", "e.json", "._a.tar", "f.tar.bak", "a.tar.md5", "g"])
    ),
    st.sets(st.sampled_from(["gone.tar", "pipe.tar", "gone.json"])),
)
def test_files_that_are_used_and_not_used_are_all_that_the_folder_has(names: set[str], others: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder) / "s.tar", sample("a", 1))
        for name in names:
            (Path(folder) / name).write_bytes((Path(folder) / "s.tar").read_bytes())
        for name in others:
            if name == "pipe.tar":
                os.mkfifo(Path(folder) / name)
            else:
                (Path(folder) / name).symlink_to("nowhere")
        there = [name for name in os.listdir(folder) if not (Path(folder) / name).is_dir()]
        account = open_index(folder, Path()).account
        assert account.read("file") == len(there) == len(names) + len(others) + 1
        assert account.used["file"] == len(names & {"a.tar", "B.TAR"}) + 1
        assert account.unused["packed"] == len(names & {"c.tar.gz", "d.tgz"})
        assert account.unused["not_file"] == len(others & {"gone.tar", "pipe.tar"})


def account_of(tmp_path: Path, *members: tuple[str, bytes]) -> tuple[list[str], Counter[str], Account]:
    write_tar(tmp_path / "x.tar", [*sample("zz", 0), *members])
    index = open_index("x.tar", tmp_path)
    return [index.key(at) for at in range(1, len(index))], index.account.unused, index.account


def test_keys_with_dots_are_named(tmp_path: Path) -> None:
    members = [(f"a.{n}.{e}", IMAGE if e == "jpg" else b"x") for n in (1, 2) for e in ("jpg", "txt")]
    keys, unused, account = account_of(tmp_path, *members)
    assert (keys, unused, account.images) == ([], {"dots": 4}, {"dots": 2})
    assert account.line() == "key with dots (the key ends at the first dot): 4 (2 images)"
    keys, unused, account = account_of(
        tmp_path, ("x.left.png", IMAGE), ("x.right.png", IMAGE), ("000.jpg", IMAGE), ("000.seg.png", IMAGE)
    )
    assert (keys, unused, account.images["dots"]) == (["000"], {"dots": 3}, 3)


def test_macos_files_are_ignored_and_counted(tmp_path: Path) -> None:
    members = [
        (f"pics/{prefix}{key}.{e}", IMAGE if e == "jpg" else b"x")
        for key in ("0000", "0001")
        for e in ("jpg", "txt")
        for prefix in ("._", "")
    ]
    keys, unused, account = account_of(
        tmp_path,
        ("._pics", b"\0"),
        *members,
        ("__MACOSX/pics/._0000.jpg", b"\0"),
        ("__MACOSX/pics/2.jpg", b""),
        ("pics/.DS_Store", b""),
    )
    assert (keys, unused) == (["pics/0000", "pics/0001"], {"hidden": 8})
    assert account.faults == []


def test_of_several_images_the_extension_decides(tmp_path: Path) -> None:
    jpg = picture(3, 9, 9, "JPEG")
    members = [("m.bmp", picture(1, 5, 5, "BMP")), ("m.png", picture(2, 7, 7)), ("m.jpg", jpg), ("m.txt", b"x")]
    write_tar(tmp_path / "x.tar", members)
    index = open_index("x.tar", tmp_path)
    assert SampleReader(index).image(index.entry(0)) == jpg
    assert (index.account.unused, index.account.images) == ({"second_image": 2}, {"second_image": 2})


@pytest.mark.parametrize("extension", ["jfif", "JPE", "TIFF", "ppm"])
def test_rare_and_upper_case_endings_of_images_are_read(extension: str, tmp_path: Path) -> None:
    keys, unused, account = account_of(tmp_path, (f"k.{extension}", IMAGE), ("k.txt", b"x"))
    assert (keys, unused, account.used["member"]) == (["k"], {}, 4)
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "dog").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name / f"k.{extension}").write_bytes(IMAGE)
    assert len(read_class_folders(tmp_path / "set")) == 2


def test_an_unsorted_tar_is_told_from_one_with_duplicates(tmp_path: Path) -> None:
    members = [*((f"{key}.jpg", IMAGE) for key in "abc"), *((f"{key}.txt", b"x") for key in "abc"), *sample("zz", 0)]
    keys, unused, account = account_of(tmp_path, *members)
    assert (keys, unused) == (["a", "b", "c"], {"apart": 3, "duplicate": 2})
    assert CAUSES["apart"].remedy == "pack with tar --sort=name"
    assert account.first["apart"] == "x.tar: a.txt"


def test_links_and_sparse_files_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, sample("a", 1))
    with tarfile.open(path, "a") as archive:
        for name, kind in (("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.GNUTYPE_SPARSE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            archive.addfile(info)
    account = open_index("x.tar", tmp_path).account
    assert account.unused == {"link": 2, "special": 1}


@pytest.mark.parametrize("blocks", [-1, -4, -(1 << 80)])
def test_a_member_of_a_negative_size_ends_the_tar(blocks: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [*sample("a", 1), ("b.jpg", IMAGE), ("b.txt", b"x")])
    with tarfile.open(path) as archive:
        at = archive.getmember("b.jpg").offset
    blob = bytearray(path.read_bytes())
    blob[at + 124 : at + 136] = (512 * blocks).to_bytes(12, "big", signed=True)  # as GNU tar writes large numbers
    header = blob[at : at + 512]
    blob[at + 148 : at + 156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    path.write_bytes(blob)
    account = open_index("x.tar", tmp_path).account
    assert (account.used["member"], account.unused["cut"]) == (2, 1)


def test_data_behind_the_end_are_noticed(tmp_path: Path) -> None:
    one, two = write_tar(tmp_path / "1.tar", sample("a", 1)), write_tar(tmp_path / "2.tar", sample("b", 2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    account = open_index("1.tar", tmp_path).account
    assert (account.used["member"], account.unused) == (2, {"joined": 1})


@pytest.mark.parametrize(
    ("label", "expected"),
    [(b"3\n", 3), (b" 0 ", 0), *((text, NO_NUMBER) for text in (b"", b"-1", b"1_0", b"cat", b"9" * 30, b"9" * 6000))],
)
def test_class_numbers(tmp_path: Path, label: bytes, expected: int) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", IMAGE), ("a.cls", label)])
    index = open_index("x.tar", tmp_path)
    assert index.entry(0).label == expected
    assert index.account.unused["cls"] == (expected < 0)


def test_a_folder_whose_name_looks_like_a_glob_is_matched(tmp_path: Path) -> None:
    for folder in ("v[1]", "v1"):
        make_shards(tmp_path / folder, n=2, shards=1)
    for pattern, base in [("v[1]/*.tar", tmp_path), ("*.tar", tmp_path / "v[1]"), (f"{tmp_path}/v[1]/0*.tar", Path())]:
        assert [shard.parent.name for shard in open_index(pattern, base).shards] == ["v[1]"]
    assert [shard.parent.name for shard in open_index("v?/*.tar", tmp_path).shards] == ["v1"]


def test_an_index_of_an_older_version_is_built_again(tmp_path: Path) -> None:
    import numpy as np

    make_shards(tmp_path, n=4, shards=1)
    first = open_index("*.tar", tmp_path)
    file = next((tmp_path / ".compt-index").glob("*.npz"))
    next((tmp_path / ".compt-index").glob("merged-*")).unlink()
    with np.load(file) as stored:
        parts = dict(stored)
    meta = json.loads(parts["meta"].tobytes())
    old = {key: meta[key] for key in ("shard", "size", "mtime_ns", "captions", "samples", "digest", "content")}
    old |= {"version": 1, "dropped": {}, "first": {}}
    np.savez_compressed(file, **{**parts, "meta": np.frombuffer(json.dumps(old).encode(), np.uint8)})
    again = open_index("*.tar", tmp_path)
    assert (again.fingerprint, again.content) == (first.fingerprint, first.content)
    assert again.account == first.account


def test_an_account_survives_json_and_names_everything() -> None:
    account = Account(Counter(sample=3), Counter(dots=2, hidden=1), Counter(dots=1), {"dots": "x", "hidden": "y"})
    assert Account.from_json(json.loads(json.dumps(account.to_json()))) == account
    newer = {**account.to_json(), "unused": {"dots": 2, "unheard": 5}, "first": {"unheard": "z"}}
    assert Account.from_json(newer).unused == {"dots": 2}
    for name, cause in CAUSES.items():
        assert cause.unit in UNIT_NAMES, name
        assert cause.harmless != bool(cause.remedy), name
    lost = Account()
    lost.lose("bare", "\udcff")
    assert lost.first["bare"] == "\\udcff"


def test_the_docs_name_every_cause_and_what_mends_it(root: Path) -> None:
    rows = (root / "docs" / "data.md").read_text(encoding="utf-8").replace("`", "").splitlines()
    for name, cause in CAUSES.items():
        found = [row for row in rows if f"| {cause.text} | {cause.remedy} |" in row]
        assert cause.harmless or len(found) == 1, name


def test_a_set_without_samples_says_what_it_has(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.txt", b"x")])
    with pytest.raises(DataError, match=r"no samples in 1 shards .*file of a key without an image: 1"):
        open_index("x.tar", tmp_path)
