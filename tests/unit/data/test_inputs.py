"""Tars, tables and folders as other tools write them: the account adds up to what Python's own readers find."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from compt.data.check import check
from compt.data.decode import Unusable
from compt.data.index import Index, open_index
from compt.data.samples import SampleReader
from compt.errors import DataError
from tests.helpers.optional import optional
from tests.helpers.shards import picture, sample, write_tar

IMAGE = picture(0, 4, 4, "JPEG")


def captions_of(index: Index) -> dict[str, list[str]]:
    reader = SampleReader(index)
    entries = [index.entry(at) for at in range(len(index))]
    return {entry.key: reader.captions(entry).texts for entry in entries if entry.captions}


def packed(folder: Path, *options: str, **more: str) -> None:
    """A tar by the command `tar`. `more`: names to link to, or to make sparse."""
    source = folder / "files"
    for key in ("a", "n" * 120, "m/" * 60 + "k" * 130):
        path = source / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGE)
        path.with_suffix(".txt").write_text("one")
    for name, kind in more.items():
        path = source / f"{name}.jpg"
        if kind == "sparse":
            with path.open("wb") as file:
                file.write(IMAGE)
                file.seek(1 << 20)
                file.write(b"x")
        elif kind == "hard":
            os.link(source / "a.jpg", path)
        else:
            path.symlink_to("a.jpg")
        path.with_suffix(".txt").write_text("more")
    command = ["tar", "--sort=name", *options, "-cf", str(folder / "x.tar"), "-C", str(source), "."]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["rm", "-r", str(source)], check=True)


def webdataset_writes(folder: Path) -> None:
    with webdataset.ShardWriter(str(folder / "x-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            writer.write({"__key__": f"s{number}", "jpg": IMAGE, "txt": "one", "cls": number})


def img2dataset_writes(folder: Path) -> None:
    members = [("0.jpg", IMAGE), ("0.json", json.dumps({"caption": "one", "status": "success"}).encode())]
    write_tar(folder / "00000.tar", [*members, ("0.txt", b"one")])
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"PAR1")


def behind(folder: Path, data: bytes) -> None:
    path = write_tar(folder / "x.tar", sample("a", 1))
    path.write_bytes(path.read_bytes() + data)


def written(*members: tuple[str, bytes]) -> Callable[[Path], object]:
    return lambda folder: write_tar(folder / "x.tar", [("z.jpg", IMAGE), ("z.txt", b"one"), *members])


def in_folders(folder: Path) -> None:
    for name in ("x.tar", "more/y.tar", "more/deep/z.tar", ".old/w.tar"):
        write_tar(folder / name, sample("a", 1))


Made = Callable[[Path], object]
TARS: dict[str, tuple[Made, int, dict[str, int]]] = {
    **{
        f"tar --format={kind}": (lambda f, k=kind: packed(f, f"--format={k}"), 3, {"folder": 61})
        for kind in ("gnu", "posix")
    },
    "tar --listed-incremental": (
        lambda f: packed(f, f"--listed-incremental={f}/state"),
        3,
        {"folder": 61, "no_shard": 1},
    ),
    "tar --label": (lambda f: packed(f, "--label=disk"), 3, {"folder": 61, "metadata": 1}),
    "a hard link": (lambda f: packed(f, z="hard"), 3, {"folder": 61, "link": 1, "no_image": 1}),
    "a hard link, followed": (lambda f: packed(f, "--hard-dereference", z="hard"), 4, {"folder": 61}),
    "a symbolic link": (lambda f: packed(f, z="soft"), 3, {"folder": 61, "link": 1, "no_image": 1}),
    **{
        f"tar --sparse --format={kind}": (
            lambda f, k=kind: packed(f, "--sparse", f"--format={k}", z="sparse"),
            3,
            {"folder": 61, "special": 1, "no_image": 1},
        )
        for kind in ("gnu", "posix")
    },
    "webdataset": (webdataset_writes, 3, {}),
    "img2dataset": (img2dataset_writes, 1, {"no_shard": 2}),
    "zeros behind the end": (lambda f: behind(f, bytes(70_000)), 1, {}),
    "a stopped download": (lambda f: behind(f, bytes(2 << 20)), 1, {"cut": 1}),
    "a second tar behind the end": (
        lambda f: behind(f, write_tar(f / "y", sample("b", 1)).read_bytes()),
        1,
        {"joined": 1, "no_shard": 1},
    ),
    "a second tar behind large blocks": (
        lambda f: behind(f, bytes(1 << 20) + write_tar(f / "y", sample("b", 1)).read_bytes()),
        1,
        {"joined": 1, "no_shard": 1},
    ),
    "folders with dots, and equal names in them": (
        written(*((f"./v1.2/{place}/1.{kind}", IMAGE) for place in "ab" for kind in ("jpg", "npy"))),
        3,
        {"caption": 2},  # a .npy without any text may hold several classes
    ),
    "endings in capitals": (written(("A.JPG", IMAGE), ("A.TXT", b"x"), ("B.JPEG", IMAGE), ("B.Txt", b"x")), 3, {}),
    "two endings": (written(("a.jpg.jpg", IMAGE), ("a.jpg.txt", b"x")), 1, {"dots": 2}),
    "texts in a folder of their own": (
        written(("i/1.jpg", IMAGE), ("t/1.txt", b"x")),
        2,
        {"no_image": 1, "caption": 1},
    ),
    "a member of no bytes": (
        written(("a.jpg", b""), ("a.txt", b"x"), ("b.jpg", IMAGE), ("b.txt", b"")),
        3,
        {"image": 1, "caption": 1},
    ),
    "files of Windows": (written(("Thumbs.db", b"x"), ("a/desktop.ini", b"x")), 1, {"hidden": 2}),
    "values that are missing": (
        written(("a.jpg", IMAGE), ("a.txt", b"nan"), ("b.jpg", IMAGE), ("b.json", b'{"caption": "None"}')),
        3,
        {"missing": 2, "caption": 2},
    ),
    "words that are missing values elsewhere": (
        written(
            ("a.jpg", IMAGE), ("a.txt", b"zero\nnull"), ("b.jpg", IMAGE), ("b.json", b'{"captions": ["NULL", "None"]}')
        ),
        3,
        {},
    ),
    "absolute names": (
        written(("/a/b.jpg", IMAGE), ("/a/b.txt", b"x"), ("../c.jpg", IMAGE), ("../c.txt", b"y")),
        3,
        {},
    ),
    "formats that are not read": (
        written(("a.avif", b"x"), ("a.txt", b"x"), ("b.HEIC", b"x")),
        1,
        {"foreign": 2, "no_image": 1},
    ),
    "captions in .caption": (written(("a.jpg", IMAGE), ("a.caption", b"x")), 2, {"text_ending": 1, "caption": 1}),
    "captions in .txt and .text": (written(("a.jpg", IMAGE), ("a.text", b"x"), ("a.txt", b"y")), 2, {"other": 1}),
    "names in other forms of Unicode": (
        written(("\u00e9.jpg", IMAGE), ("e\u0301.txt", b"x")),
        2,
        {"no_image": 1, "caption": 1},
    ),
    "a page instead of a tar": (
        lambda f: (write_tar(f / "y.tar", sample("a", 1)), (f / "x.tar").write_text("<html>" * 200)),
        1,
        {"cut": 1},
    ),
    "an empty tar": (lambda f: (write_tar(f / "y.tar", sample("a", 1)), write_tar(f / "x.tar", [])), 1, {}),
    "tars in sub-folders": (in_folders, 1, {"sub_folder": 2}),
}


@pytest.mark.parametrize("name", TARS)
def test_tars_of_other_tools(name: str, tmp_path: Path) -> None:
    make, samples, unused = TARS[name]
    make(tmp_path)
    report = check(str(tmp_path), Path(), workers=1)
    assert (len(report.index), report.account.unused) == (samples, unused)
    members, images = 0, []
    for path in sorted(tmp_path.glob("*.tar")):
        if not path.read_bytes().startswith(b"<html>"):
            with tarfile.open(path) as archive:
                members += len(archive.getmembers())
                images += [archive.extractfile(m).read() for m in archive if m.isreg() and m.name.endswith("jpg")]
    assert report.account.read("member") == members
    reader = SampleReader(report.index)
    assert all(reader.image(report.index.entry(at)) in [*images, picture(1, 40, 36)] for at in range(samples))
    assert not {"15", "16", "17"} & {report.index.key(at)[:2] for at in range(samples)}


def test_a_folder_without_shards_is_described(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGE)
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"no shard matches .* \(it has file that is not a \.tar: 2\)"):
        check(str(tmp_path), Path())


def test_a_chain_of_extended_headers_is_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample("a", 1))
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 10
    chain = (header.tobuf() + b"10 path=x\n".ljust(512, b"\0")) * 2000
    with tarfile.open(path) as archive:
        archive.getmembers()
        members = path.read_bytes()[: archive.offset]
    path.write_bytes(members + chain + bytes(1024))
    report = check("x.tar", tmp_path)
    assert (len(report.index), report.account.unused) == (1, {"cut": 1})


def test_members_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        for name, size in [("a.jpg", 10**9), *((f"a.{kind}", 17 << 20) for kind in ("cls", "json", "txt"))]:
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf())
            file.seek(size + -size % 512, 1)  # holes, which take no room on the disk
        file.truncate(file.tell() + 1024)
    report = check("x.tar", tmp_path)
    assert report.account.unused == {"large": 3, "caption": 1}
    with pytest.raises(Unusable, match="more than 715,827,880 bytes"):
        SampleReader(report.index).image(report.index.entry(0))


BOTH = {"a": ["one"], "b": ["two"]}
TABLES: dict[str, tuple[str, bytes, dict[str, list[str]] | str]] = {
    "BOM and CRLF": ("c.csv", b"\xef\xbb\xbfkey,caption\r\na,one\r\nb,two\r\n", BOTH),
    "CR alone": ("c.csv", b"key,caption\ra,one\rb,two\r", BOTH),
    "semicolons": ("c.csv", b'key;caption\na;one, two\nb;"x;y"\n', {"a": ["one, two"], "b": ["x;y"]}),
    "blank lines": ("c.csv", b"\n \nkey,caption\n\na,one\n  \nb,two\n\n", BOTH),
    "a cell of 5 MB": (
        "c.csv",
        b"key,caption\na," + b"w" * 5_000_000 + b"\nb,two\n",
        {"a": ["w" * 5_000_000], "b": ["two"]},
    ),
    "line ends in cells": ("c.csv", b'key,caption\na,"one\ntwo"\nb,"x ""y"""\n', {"a": ["one\ntwo"], "b": ['x "y"']}),
    "NUL": ("c.csv", b"key,caption\na,o\0ne\nb,two\n", {"b": ["two"]}),
    "lists as pandas writes them": (
        "c.csv",
        b'key,caption\na,"[\'one\', ""it\'s""]"\nb,[sic] two\n',
        {"a": ["one", "it's"], "b": ["[sic] two"]},
    ),
    "an empty list": ("c.csv", b"key,caption\na,[]\nb,two\n", {"b": ["two"]}),
    "blank lines of JSON": ("c.jsonl", b'\n{"key":"a","caption":"one"}\n \n{"key":"b","caption":"two"}', BOTH),
    "JSON lines in a .json": ("c.json", b'{"key":"a","caption":"one"}\n{"key":"b","caption":"two"}\n', BOTH),
    "commas behind JSON lines": (
        "c.jsonl",
        b'{"key":"a","caption":"one"},\n{"key":"b","caption":"two"},\n',
        "no JSON object: 2",
    ),
    "paths of Windows": ("c.csv", b"path,caption\nC:\\im\\a.jpg,one\nim\\b.jpg,two\n", BOTH),
    "Flickr30k's captions": (
        "c.token",
        b'a.jpg#0\tone\na.jpg#1\t"x\nb.jpg#0\ttwo\n',
        {"a": ["one", '"x'], "b": ["two"]},
    ),
    "file names without a header": ("c.csv", b"a.jpg,one\nb.jpg,two\n", BOTH),
    "keys without a header": ("c.csv", b"a,one\nb,two\n", "columns a, one; none is known"),
    "DOCCI's captions": (
        "c.jsonlines",
        b'{"split": "b", "image_file": "a.jpg", "caption": "one"}\n{"example_id": "b", "caption": "two"}\n',
        BOTH,
    ),
    "JSON in a .txt": ("c.txt", b'[{"key": "a", "caption": "one"}, {"key": "b", "caption": "two"}]', BOTH),
    "JSON lines in a .txt": ("c.txt", b'{"key":"a","caption":"one"}\n{"key":"b","caption":"two"}\n', BOTH),
    "a list with what is no object": (
        "c.json",
        b' [{"key":"a","caption":"one"},3,\n{"key":"b","caption":"two"} ]\n',
        BOTH,
    ),
    "a list that is not UTF-8": (
        "c.json",
        b'[{"key":"a","caption":"\xff"},{"key":"b","caption":"two"}]',
        {"b": ["two"]},
    ),
    "a list that is cut": ("c.json", b'[{"key":"a","caption":"one"},{"key":"b","cap', "is no JSON, behind row 1"),
    "two lists": ("c.json", b'[{"key":"a","caption":"one"}]\n[{"key":"b","caption":"two"}]', "text follows the list"),
    "a list with a long item": (
        "c.json",
        b'[{"key":"a","x":"' + b"w" * (1 << 24) + b'","caption":"one"},{"key":"b","caption":"two"}]',
        BOTH,
    ),
    "numbers of COCO's captions": (
        "c.json",
        b'[{"image_id": "a", "id": "b", "caption": "one"}, {"image_id": "b", "id": "a", "caption": "two"}]',
        BOTH,
    ),
    "PD12M's identifiers": ("c.csv", b"id,url,caption\na,http://x/1.jpg,one\nb,http://x/2.jpg,two\n", BOTH),
    "commas behind the last column": ("c.csv", b"key,caption,,\na,one,,\nb,two,,\n", BOTH),
    "a second header": ("c.csv", b"key,caption\na,one\nkey,caption\nb,two\n", BOTH),
    "an index of pandas": ("c.csv", b"Unnamed: 0,filename,caption\n1,a.jpg,one\n0,b.jpg,two\n", BOTH),
    "RedCaps' annotations": (
        "c.json",
        b'{"annotations": [{"image_id": "a", "url": "http://x", "raw_caption": "One!", "caption": "one"}]}',
        {"a": ["one"]},
    ),
    "Karpathy's folders": (
        "c.json",
        b'{"images": [{"filepath": "b", "filename": "a.jpg", "sentences": [{"raw": "one"}]}]}',
        {"a": ["one"]},
    ),
    "DreamLIP's columns in lower case": ("c.csv", b"key,raw_caption,shortib_captions\na,one,s\n", {"a": ["one", "s"]}),
    "values that are missing": ("c.csv", b"key,caption\na,nan\nb,two\nc,NULL\n", {"b": ["two"]}),
    "an lz4 file": ("c.csv.lz4", b"\x04\x22\x4d\x18" + bytes(99), "lz4 -d"),
    "blanks alone": ("c.csv", b" \n\n", "no rows with captions"),
    "images that are no list": ("c.json", b'{"images": true, "annotations": [{}]}', "has the columns ; none is"),
    "a half of a pair": ("c.jsonl", b'{"key":"a","caption":"\\ud800"}\n{"key":"b","caption":"two"}\n', {"b": ["two"]}),
}


def joined(path: Path) -> dict[str, list[str]]:
    write_tar(path.parent / "x.tar", [(f"{key}.jpg", IMAGE) for key in "ab"])
    index = open_index("x.tar", path.parent, captions_csv=path, min_matched=0)
    account = index.account
    assert account.read("row") == account.used["row"] + account.lost("row")
    assert account.used["join"] == len(captions_of(index))
    return captions_of(index)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_other_tools(name: str, tmp_path: Path) -> None:
    file, data, expected = TABLES[name]
    (tmp_path / file).write_bytes(data)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            joined(tmp_path / file)
    else:
        assert joined(tmp_path / file) == expected


def test_a_url_decides_where_both_have_one(tmp_path: Path) -> None:
    # Keys of img2dataset are numbers: those of a published table are another download's.
    members = [(f"{key}.json", json.dumps({"url": f"http://x/{key}"}).encode()) for key in "ab"]
    write_tar(tmp_path / "x.tar", sorted([*members, *((f"{key}.jpg", IMAGE) for key in "abc")]))
    table = tmp_path / "c.csv"
    rows = "b,http://x/a,one\na,http://x/b,two\nc,http://x/c,three\nb,s3://x/b,four\n"
    table.write_text(f"key,url,caption\n{rows}")
    index = open_index("x.tar", tmp_path, captions_csv=table)
    assert captions_of(index) == {"a": ["one"], "b": ["two"], "c": ["three"]}
    table.write_text("key,url,caption\na,s3://x/b,one\nb,http://x/other,two\nc,,three\n")
    index = open_index("x.tar", tmp_path, captions_csv=table)
    assert captions_of(index) == {"a": ["one"], "c": ["three"]}


def test_columns_of_parquet(tmp_path: Path) -> None:
    pa, parquet = optional("pyarrow", "parquet"), optional("pyarrow.parquet", "parquet")
    tables = [
        (
            {"key": pa.array(["a", "b"]).dictionary_encode(), "caption": pa.array(["one", "two"]).dictionary_encode()},
            BOTH,
        ),
        ({"key": [b"a", b"b"], "caption": pa.array([b"one", b"two"], pa.large_binary()), "image": [IMAGE] * 2}, BOTH),
        ({"key": ["a", "b"], "captions": [{"raw": "one", "shortIB": "s"}, None]}, {"a": ["one", "s"]}),
        ({"image": [{"bytes": IMAGE, "path": "x/a.jpg"}], "captions": [["one", None]]}, {"a": ["one"]}),
        ({"key": ["a", "b"], "caption": pa.array([None, "two"])}, {"b": ["two"]}),
        ({"key": ["a", "b"], "caption": [b"\xff", b"two"]}, {"b": ["two"]}),
        ({"key": ["a", "b"], "captions": [[b"one"], [b"two"]]}, BOTH),
        ({"key": ["a", "b"], "caption": ["one", "two"], "features": [[0.5], [1.5]], "seen": [True, None]}, BOTH),
        ({"image": [{"bytes": IMAGE, "path": "b.jpg"}], "caption": ["two"], "image.path": ["a.jpg"]}, {"b": ["two"]}),
        # Text that is not UTF-8, and a time that Python cannot hold.
        (
            {"key": ["a", "b"], "caption": pa.StringArray.from_buffers(2, *pa.array([b"\xff", b"two"]).buffers()[1:])},
            {"b": ["two"]},
        ),
        ({"key": ["a", "b"], "caption": ["one", "two"], "time": pa.array([1, 2], pa.timestamp("ns"))}, BOTH),
    ]
    for number, (columns, expected) in enumerate(tables):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pa.table(columns), path)
        assert joined(path) == expected, number


def test_parquet_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    pa, parquet = optional("pyarrow", "parquet"), optional("pyarrow.parquet", "parquet")
    path = tmp_path / "c.parquet"
    columns = [pa.array(["a"]), pa.array(["one"]), pa.array(["two"])]
    parquet.write_table(pa.Table.from_arrays(columns, ["key", "caption", "caption"]), path)
    with pytest.raises(DataError, match="2 columns 'caption'"):
        joined(path)
    parquet.write_table(pa.table({"key": ["a"] * 99, "caption": ["one"] * 99}), path)
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"\xff" * 40 + data[48:])
    with pytest.raises(DataError, match=r"c\.parquet.*: (?!None)."):
        joined(path)
