from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compt.data.captions import parse_json, read_columns, read_json_captions, read_text, sort_out, split_sentences
from compt.data.index import Index, open_index
from compt.data.samples import SampleReader
from compt.data.table import convert_table
from compt.errors import DataError
from tests.helpers.optional import optional
from tests.helpers.shards import make_shards, picture, texts, write_tar

IMAGE = picture(0, 8, 8, "JPEG")


def columns(values: object, names: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    found, first = read_columns(json.loads(json.dumps(values)), names)
    return found.texts, first


def shard(path: Path, **samples: dict[str, object]) -> Path:
    """A tar; each sample has an image and members by extension: bytes, or values for a `.json`."""
    members = []
    for key, own in samples.items():
        members.append((f"{key}.jpg", IMAGE))
        members += [(f"{key}.{e}", d if isinstance(d, bytes) else json.dumps(d).encode()) for e, d in own.items()]
    return write_tar(path, members)


def captions_of(index: Index) -> dict[str, list[str]]:
    reader = SampleReader(index)
    entries = [index.entry(sample) for sample in range(len(index))]
    return {entry.key: reader.captions(entry).texts if entry.captions else [] for entry in entries}


RELEASED = {
    "url": "http://a/0.jpg",
    "raw_caption": "a raw one",
    "shortIB_captions": "a cat",
    "longIB_captions": "A cat sits. It looks at St. Paul's!",
    "shortSV_captions": "cat.",
    "longSV_captions": ["One. sentence", "another"],
    "shortLLA_captions": "a, cat",
    "longLLA_captions": "Line one\nline two</s>end",
}
READ = [
    "a raw one",
    "a cat",
    *("A cat sits.", "It looks at St.", "Paul's!"),
    "cat.",
    *("One. sentence", "another"),
    "a, cat",
    *("Line one", "line two", "end"),
]


def test_dreamlips_released_columns_are_all_read() -> None:
    assert columns(RELEASED) == (READ, True)
    short = {name.removesuffix("_captions"): value for name, value in RELEASED.items() if name != "raw_caption"}
    assert columns({**short, "raw": "a raw one"}) == (READ, True)
    # `--caption_col raw_caption --save_additional_columns [the others]`
    without = {name: value for name, value in RELEASED.items() if name != "raw_caption"}
    assert columns({**without, "caption": "a raw one"}) == (READ, True)
    assert columns({"captions": {"raw": "r", "shortIB": "s"}}) == (["r", "s"], True)


@pytest.mark.parametrize(
    ("values", "expected", "first"),
    [
        ({"captions": ["a", "b"]}, ["a", "b"], True),
        ({"captions": "one"}, ["one"], True),
        ({"caption": "x", "url": "u"}, ["x"], False),
        ({"caption": ["x", "y"]}, ["x", "y"], True),
        ({"text": "x"}, ["x"], False),
        ({"TEXT": "x", "similarity": 0.3}, ["x"], False),
        ({"alt_text": "x"}, ["x"], False),
        ({"sentences": [{"raw": "a b.", "tokens": ["a", "b"]}, {"raw": "c"}]}, ["a b.", "c"], True),
        ({"sentences": {"raw": "a b.", "tokens": ["a"]}}, ["a b."], True),
        ({"org_caption": "o", "re_caption": "r"}, ["o", "r"], True),
        ({"captions": [], "caption": "x"}, ["x"], False),
        ({"raw": None, "caption": "x"}, ["x"], False),
        ({"caption_length": 16, "caption_lang": "en", "captioner": "me", "text_width": 3}, [], False),
    ],
)
def test_known_names(values: dict[str, object], expected: list[str], first: bool) -> None:
    assert columns(values) == (expected, first)


def test_named_columns_replace_the_known_ones() -> None:
    assert columns({"caption": "x", "mine": "y", "other": ["z"]}, ("other", "mine")) == (["z", "y"], True)
    assert columns({"caption": "x"}, ("mine",)) == ([], True)


def test_what_is_no_caption_has_a_cause() -> None:
    found = read_json_captions(
        json.dumps({"captions": ["a", "", " ", None, 3, "\u200b\ufeff", "\ud800", "b\0", "é"]}).encode()
    )
    assert found.texts == ["a", "é"]
    assert sorted(found.lost) == ["empty", "empty", "empty", "encoding", "encoding", "not_text", "not_text"]
    for broken in (b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, '{"caption": "é"}'.encode("latin-1")):
        assert parse_json(broken) is None
        assert read_json_captions(broken).texts == []


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "utf-16", "utf-16-le"])
def test_text_that_is_not_utf8_is_counted(encoding: str) -> None:
    text = "größe" if encoding == "latin-1" else "белый кот"
    assert read_text(text.encode(encoding)) == ([], ["encoding"])


def test_text_is_split_at_its_lines_alone() -> None:
    assert read_text(b"\xef\xbb\xbfa\nb\r\n\nc\n") == (["a", "b", "c"], ["empty"])
    odd = "one\u2028two\x0bthree\x0cfour\x85five. Six"
    assert read_text(odd.encode()) == ([odd], [])
    assert split_sentences(" A dog. It runs!  Why? yes\nend</s>") == ["A dog.", "It runs!", "Why?", "yes", "end"]


def test_the_next_source_is_used_where_one_has_nothing(tmp_path: Path) -> None:
    shard(
        tmp_path / "x.tar",
        a={"json": {"captions": []}, "txt": b"good"},
        b={"json": {"raw": None}, "txt": b"good"},
        c={"json": b"{broken", "txt": b"good"},
        d={"json": {"caption": "json"}, "txt": b"\xff\xfe"},
        e={"json": {"caption": "json"}, "txt": b"text"},
        f={"json": {"captions": ["json"]}, "txt": b"text"},
        g={"json": {"caption": "one\nsentence"}, "txt": b"one\nsentence"},
        h={"json": {}, "txt": b""},
    )
    index = open_index("x.tar", tmp_path)
    good, several = ["good"], ["one\nsentence"]
    expected = [good, good, good, ["json"], ["text"], ["json"], several, []]
    assert captions_of(index) == dict(zip("abcdefgh", expected, strict=True))
    assert index.account.unused == {"json": 1, "second_text": 3, "encoding": 1}
    assert index.counts == {1: 7, 0: 1}
    named = captions_of(open_index("x.tar", tmp_path, columns=["captions"]))
    assert (named["a"], named["f"]) == (good, ["json"]), "and where the recipe names the field"


def table(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def test_dreamlips_table_is_joined_on_the_url(tmp_path: Path) -> None:
    urls = [f"http://a/b.jpg?n={n}" for n in range(4)]
    shard(tmp_path / "x.tar", **{f"{n:09d}": {"json": {"caption": "alt", "url": urls[n]}} for n in range(4)})
    head = "Image Path,raw_caption,shortIB_captions,longIB_captions,shortSV_captions"
    rows = [f'{url},raw {n},short {n},"Long, {n}. Second.",' for n, url in enumerate(urls[:3])]
    for separator, name in ((",", "c.csv"), ("\t", "c.tsv"), ("\t", "tabs.csv")):
        lines = [line if separator == "," else line.replace('"', "") for line in (head, *rows)]
        if separator == "\t":
            lines = [head.replace(",", "\t")] + [
                f"{url}\traw {n}\tshort {n}\tLong, {n}. Second.\t" for n, url in enumerate(urls[:3])
            ]
        index = open_index("x.tar", tmp_path, captions_csv=table(tmp_path / name, "\n".join([*lines, ""])))
        expected = {f"{n:09d}": [f"raw {n}", f"short {n}", f"Long, {n}.", "Second."] for n in range(3)}
        assert captions_of(index) == {**expected, "000000003": ["alt"]}
        assert (index.account.used["join"], index.account.unused["unmatched"]) == (3, 1)
        assert index.account.used["by URL"] == 3
        assert (index.account.used["row"], index.account.lost("row")) == (3, 0)


@pytest.mark.parametrize("field", ["url", "URL", "image_url", "Image Path"])
@pytest.mark.parametrize("column", ["url", "URL", "Image Path", "image_url", "imagepath"])
def test_urls_are_known_under_the_names_that_tools_give_them(field: str, column: str, tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", a={"json": {"caption": "alt", field: " http://a/0.jpg"}})
    csv = table(tmp_path / "c.csv", f"{column},caption\nhttp://a/0.jpg,one\n")
    assert captions_of(open_index("x.tar", tmp_path, captions_csv=csv)) == {"a": ["one"]}


def test_a_table_that_matches_nothing_or_little_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, n=4, shards=1)
    csv = table(tmp_path / "c.csv", "key,shortIB\n0,a\n1,b\n")
    with pytest.raises(DataError, match=r"0 of 4 samples have a row in .*c\.csv, whose 2 rows .* '0', .*'000000000'"):
        open_index("*.tar", tmp_path, captions_csv=csv, min_matched=0)
    table(csv, "key,shortIB\n000000000,a\n1,b\n")
    with pytest.raises(DataError, match=r"1 of 4 samples .*data\.min_matched \(it is 0\.5\)"):
        open_index("*.tar", tmp_path, captions_csv=csv)
    index = open_index("*.tar", tmp_path, captions_csv=csv, min_matched=0.25)
    assert captions_of(index)["000000000"] == ["a"]
    assert captions_of(index)["000000001"] == texts(1, 3), "its own"
    assert (index.account.used["row"], index.account.unused["row_alone"], index.account.unused["unmatched"]) == (
        1,
        1,
        3,
    )


def test_columns_are_known_by_name_and_never_by_a_prefix(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", a={})
    csv = table(tmp_path / "c.csv", "key,caption,caption_length,caption_lang\na,a fine dog,16,en\n")
    assert captions_of(open_index("x.tar", tmp_path, captions_csv=csv)) == {"a": ["a fine dog"]}
    named = open_index("x.tar", tmp_path, captions_csv=csv, columns=["caption_lang", "caption"])
    assert captions_of(named) == {"a": ["en", "a fine dog"]}
    with pytest.raises(DataError, match=r"it lacks nothing, which data\.caption_columns names"):
        open_index("x.tar", tmp_path, captions_csv=csv, columns=["nothing"])
    table(csv, "key,caption_lang\na,en\n")
    with pytest.raises(DataError, match=r"columns key, caption_lang; none is known .*data\.caption_columns"):
        open_index("x.tar", tmp_path, captions_csv=csv)


def test_rows_of_one_key_need_not_be_neighbours(tmp_path: Path) -> None:
    lines = ["image_id,caption", *(f"{key},{key}{n}" for n in range(4) for key in "abc")]
    made = convert_table(table(tmp_path / "c.csv", "\n".join(lines)), tmp_path / "x")
    found = made.find([b"folder/a", b"b", b"nobody", b"c"], ["", "", "", ""])
    assert found.by == {"key": 2, "file name": 1}
    lines_found = [made.lines[at] for at in found.lines if at >= 0]
    blob = made.blob.read_bytes()
    read = [made.parse(blob[line["offset"] : line["offset"] + line["size"]]) for line in lines_found]
    assert read == [[f"{key}{n}" for n in range(4)] for key in "abc"]
    assert found.lines[2] == -1
    assert made.rows_met([line["offset"] for line in lines_found]) == made.account.used["row"] == 12


def test_a_file_name_in_several_folders_leads_to_no_row(tmp_path: Path) -> None:
    csv = table(
        tmp_path / "c.csv", "id,file_name,caption\n1,v/x.jpg,one\n2,t/x.jpg,two\n3,t/y.jpg,three\n4,t/y.jpg,four\n"
    )
    shard(tmp_path / "x.tar", **{"v/x": {}, "x": {}, "t/y": {}, "y": {}})
    index = open_index("x.tar", tmp_path, captions_csv=csv)
    assert captions_of(index) == {"v/x": ["one"], "x": [], "t/y": ["three", "four"], "y": ["three", "four"]}


def test_a_whole_name_comes_before_the_last_part_of_another(tmp_path: Path) -> None:
    csv = table(tmp_path / "c.csv", "file_name,caption\nv/x.jpg,one\nx.jpg,two\n")
    shard(tmp_path / "x.tar", x={})
    assert captions_of(open_index("x.tar", tmp_path, captions_csv=csv)) == {"x": ["two"]}


def test_other_columns_need_another_index(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", a={"json": {"caption": "x", "mine": ["y", "z"]}})
    for columns, expected in [((), ["x"]), (("mine",), ["y", "z"]), ((), ["x"])]:
        index = open_index("x.tar", tmp_path, columns=columns)
        assert captions_of(index) == {"a": expected}
        assert index.account.used["caption"] == len(expected)


def test_a_broken_quote_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    rows = [*(f"k{n},fine {n}" for n in range(3)), 'k3,"broken', *(f"k{n},fine {n}" for n in range(4, 7)), 'k7,"ok"']
    csv = table(tmp_path / "c.csv", "\n".join(["key,caption", *rows, ""]))
    with pytest.raises(DataError, match=r"c\.csv, line 5: .*quotation mark"):
        convert_table(csv, tmp_path / "x")
    table(csv, "\n".join(["key,caption", *rows[:-1], ""]))
    with pytest.raises(DataError, match=r"c\.csv, line 5: .*quotation mark"):
        convert_table(csv, tmp_path / "x")


def test_quotation_marks_in_tab_separated_files(tmp_path: Path) -> None:
    plain = 'a caption "with" marks\thttp://a/1\n"Hello" he said\thttp://a/2\n"open\thttp://a/3\n'
    made = convert_table(table(tmp_path / "Train_GCC-training.tsv", plain), tmp_path / "x")
    assert made.account.used["row"] == 3
    assert json.loads(made.blob.read_text().splitlines()[1]) == ["http://a/2", ['"Hello" he said']]
    quoted = 'url\tcaption\nhttp://a/1\t"two\nlines ""x"""\nhttp://a/2\ty\n'
    made = convert_table(table(tmp_path / "pandas.tsv", quoted), tmp_path / "x")
    assert json.loads(made.blob.read_text().splitlines()[0]) == ["http://a/1", ['two\nlines "x"']]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    rows = ["a,ok", ",no key", "b,", "c,one,more", "d,\udce9t\udce9", "e,\u200b", "", 'f,"[""x"", ""y""]"']
    made = convert_table(table(tmp_path / "c.csv", "\n".join(["key,caption", *rows])), tmp_path / "x")
    assert made.account.used == {"row": 2}
    assert made.account.unused == {"row_key": 1, "row_text": 3, "row_cells": 1, "encoding": 1, "empty": 1}
    assert made.account.first["row_cells"] == "c.csv:5"
    assert json.loads(made.blob.read_text().splitlines()[1]) == ["f", ["x", "y"]]


def test_json_tables(tmp_path: Path) -> None:
    lines = tmp_path / "c.jsonl"
    lines.write_text('{"key": "a", "text": "x"}\n\n[1]\n{"key": 7, "text": "y"}\n{"key": "b"}\n')
    made = convert_table(lines, tmp_path / "x")
    assert (made.account.used["row"], made.account.unused) == (2, {"row_cells": 1, "row_text": 1})
    assert (made.find([b"7"], [""]).lines >= 0).all()
    karpathy = tmp_path / "dataset_coco.json"
    image = {"filepath": "val2014", "filename": "COCO_val2014_1.jpg", "sentences": [{"raw": "r1"}, {"raw": "r2"}]}
    karpathy.write_text(json.dumps({"dataset": "coco", "images": [image]}))
    coco = tmp_path / "captions_val2014.json"
    coco.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "COCO_val2014_1.jpg"}],
                "annotations": [{"image_id": 1, "id": n, "caption": f"r{n}"} for n in (1, 2)],
            }
        )
    )
    blip = tmp_path / "coco_karpathy_train.json"
    blip.write_text(json.dumps([{"image": "val2014/COCO_val2014_1.jpg", "caption": f"r{n}"} for n in (1, 2)]))
    shard(tmp_path / "x.tar", COCO_val2014_1={})
    for path in (karpathy, coco, blip):
        assert captions_of(open_index("x.tar", tmp_path, captions_csv=path)) == {"COCO_val2014_1": ["r1", "r2"]}


def test_parquet_needs_pyarrow_and_reads_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.parquet"
    path.write_bytes(b"PAR1")
    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match=r"needs pyarrow: pip install 'compt\[parquet\]'"),
    ):
        patch.setitem(__import__("sys").modules, "pyarrow", None)
        convert_table(path, tmp_path / "x")
    pyarrow = optional("pyarrow", "parquet")
    parquet = optional("pyarrow.parquet", "parquet")
    with pytest.raises(DataError, match=r"c\.parquet"):
        convert_table(path, tmp_path / "x")
    rows = {"URL": ["http://a/1", "http://a/2"], "TEXT": ["one", None], "longIB_captions": [["x. y", "z"], None]}
    parquet.write_table(pyarrow.table(rows), path)
    made = convert_table(path, tmp_path / "x")
    assert json.loads(made.blob.read_text()) == ["http://a/1", ["x. y", "z"]]
    assert made.account.unused == {"row_text": 1}


def test_strings_of_parquet_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    pyarrow, parquet = optional("pyarrow", "parquet"), optional("pyarrow.parquet", "parquet")
    path, texts = tmp_path / "c.parquet", [b"a cat", "größe".encode("latin-1"), b"a dog"]

    def wrong(values: object, to: object) -> object:
        return pyarrow.array(values, pyarrow.large_binary()).view(to)

    plain, offsets = wrong(texts, pyarrow.large_string()), pyarrow.array([0, 2, 2, 3], pyarrow.int32())
    columns = {
        "key": ["a", "b", "c"],
        "caption": plain,
        "longIB": pyarrow.ListArray.from_arrays(offsets, plain),
        "text": plain.dictionary_encode(),
        "json": pyarrow.StructArray.from_arrays([plain], ["x"]),
    }
    parquet.write_table(pyarrow.table(columns), path)
    made = convert_table(path, tmp_path / "x")
    lines = [json.loads(line) for line in made.blob.read_text().splitlines()]
    assert lines == [["a", ["a cat", "a cat"]], ["c", ["a dog", "a dog"]]]
    assert (made.account.unused, made.account.first["encoding"]) == ({"row_text": 1, "encoding": 3}, "c.parquet:1")
    blob = bytearray(path.read_bytes())
    blob[40:60] = bytes(20)
    path.write_bytes(blob)
    with pytest.raises(DataError, match=r"c\.parquet: .*[a-z]{4}") as error:
        convert_table(path, tmp_path / "x")
    assert "None" not in str(error.value)
    assert "\n" not in str(error.value)


def test_tables_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    for name, data, said in [
        ("c.csv", b"key,caption\n", "no rows with captions"),
        ("c.csv", b"\xff\xfek\0e\0y\0", "is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"),
        ("c.csv.gz", b"\x1f\x8b\x08\0", "is compressed: unpack it with `gunzip -k c.csv.gz`"),
        ("c.json", b"{", "is no JSON"),
        ("c.json", b"3", "is not a list of objects"),
        ("none.csv", None, r"none\.csv"),
    ]:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(DataError, match=said):
            convert_table(path, tmp_path / "x")
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", Path("/dev/zero"), tmp_path):  # reading the first two would never end
        with pytest.raises(DataError, match="it is not a plain file"):
            convert_table(path, tmp_path / "x")


@pytest.mark.parametrize("header", ["key,caption,caption", "key,Caption,caption"])
def test_two_columns_of_one_name_are_refused(header: str, tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(f"{header}\n0,a cat,a dog\n")
    with pytest.raises(DataError, match="has 2 columns 'caption', whatever their case; rename them"):
        convert_table(path, tmp_path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("cat/001.jpg,a cat", {"cat/001": ["a cat"], "dog/001": [], "owl/2": []}),
        ("001.jpg,which?\n2.jpg,an owl", {"cat/001": [], "dog/001": [], "owl/2": ["an owl"]}),
        ("/data/dog/001.jpg,a dog", {"cat/001": [], "dog/001": ["a dog"], "owl/2": []}),
    ],
)
def test_a_row_goes_to_no_sample_of_another_folder(rows: str, expected: dict[str, list[str]], tmp_path: Path) -> None:
    csv = table(tmp_path / "c.csv", f"file_name,caption\n{rows}\n")
    shard(tmp_path / "x.tar", **{key: {} for key in expected})
    assert captions_of(open_index("x.tar", tmp_path, captions_csv=csv, min_matched=0.1)) == expected


@pytest.mark.parametrize(
    ("rows", "keys", "ambiguous"),
    [
        ("key,caption\n1,a", ("1", "1"), True),
        ("file_name,caption\n1.jpg,a", ("cat/1", "dog/1"), True),
        ("file_name,caption\n/x/cat/1.jpg,a", ("cat/1", "dog/1"), False),
        ("url,caption\nhttp://x/1,a", ("1", "1"), False),
    ],
)
def test_a_row_that_two_shards_share_is_refused(
    rows: str, keys: tuple[str, str], ambiguous: bool, tmp_path: Path
) -> None:
    csv = table(tmp_path / "c.csv", f"{rows}\n")
    for n, (name, key) in enumerate(zip("ab", keys, strict=True)):
        members = [
            (f"{key}.jpg", picture(n, 8, 8, "BMP")),
            (f"{key}.json", b'{"url": "http://x/1", "captions": ["own"]}'),
        ]
        write_tar(tmp_path / f"{name}.tar", members)
    if ambiguous:
        with pytest.raises(
            DataError, match=rf"c.csv is that of two samples .* a.tar: {keys[0]} and b.tar: {keys[1]}: "
        ):
            open_index("*.tar", tmp_path, captions_csv=csv)
        # The same shard twice is no doubt.
        shutil.copyfile(tmp_path / "a.tar", tmp_path / "b.tar")
    index = open_index("*.tar", tmp_path, captions_csv=csv)
    assert index.account.used["row"] == 1
    assert index.account.used["join"] == 1 + (ambiguous or "url" in rows)


@pytest.mark.parametrize("names", [("Key", "Caption"), ("key", " CAPTION")])
def test_names_of_columns_are_known_in_any_case_in_every_format(names: tuple[str, str], tmp_path: Path) -> None:
    rows = [dict(zip(names, ("a", "one"), strict=True))]
    shard(tmp_path / "x.tar", a={})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    for name in ("c.jsonl", "c.json"):
        assert captions_of(open_index("x.tar", tmp_path, captions_csv=tmp_path / name)) == {"a": ["one"]}
    (tmp_path / "twice.jsonl").write_text('{"key": "a", "caption": "x", "Caption": "y"}\n')
    with pytest.raises(DataError, match="has 2 columns 'caption'"):
        open_index("x.tar", tmp_path, captions_csv=tmp_path / "twice.jsonl")


def test_cocos_rows_without_an_image_are_counted(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", a={})
    rows = [{"image_id": 1, "caption": "one"}, {"image_id": [1], "caption": "two"}, {"caption": "three"}]
    images = [{"id": 1, "file_name": "a.jpg"}, {"file_name": "b.jpg"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": rows}))
    index = open_index("x.tar", tmp_path, captions_csv=tmp_path / "c.json")
    assert captions_of(index) == {"a": ["one"]}
    assert index.account.unused["row_key"] + index.account.unused["row_alone"] == 2


def test_commas_in_a_caption_of_conceptual_captions_are_text(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", a={"json": {"url": "http://a/0.jpg"}})
    csv = table(tmp_path / "c.tsv", "a dog, a cat, and a bird\thttp://a/0.jpg\n")
    assert captions_of(open_index("x.tar", tmp_path, captions_csv=csv)) == {"a": ["a dog, a cat, and a bird"]}


@pytest.mark.parametrize(("pack", "ending"), [(lzma.compress, "xz"), (bz2.compress, "bz2"), (gzip.compress, "gz")])
def test_a_compressed_table_is_refused(pack: Callable[[bytes], bytes], ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.csv.{ending}"
    path.write_bytes(pack(b"key,caption\na,one\n"))
    with pytest.raises(DataError, match="is compressed: unpack it with"):
        convert_table(path, tmp_path)


@pytest.mark.parametrize(
    ("cell", "texts", "lost"),
    [
        ("['a cat' 'a dog']", ["a cat", "a dog"], []),
        ("['a cat'\n 'a \"dog\"']", ["a cat", 'a "dog"'], []),
        ("""['a cat', "a dog's"]""", ["a cat", "a dog's"], []),
        ('["a cat", null]', ["a cat"], ["not_text"]),
        ('["a", "b"]', ["a", "b"], []),
        ("['a' is no list]", ["['a' is no list]"], []),
        ("['a' 'b (c']", ["a", "b (c"], []),
        ("['a (black]", ["['a (black]"], []),
        ("[\"a\" ''' 'b]", ["[\"a\" ''' 'b]"], []),
        ("['\\x']", ["['\\x']"], []),
        ("['it\\'s', '\\xe9\\n']", ["it's", "é\n"], []),
        ("['\\d', '\\777']", ["['\\d', '\\777']"], []),
        ("[" + "'" * 5_001 + "]", ["[" + "'" * 5_001 + "]"], []),
        ("['a'" + " 'b'" * 50_000 + "]", ["a", *["b"] * 50_000], []),
    ],
)
def test_a_list_in_a_text_is_a_list_in_tables_and_shards(
    cell: str, texts: list[str], lost: list[str], tmp_path: Path
) -> None:
    assert read_columns({"all_captions": cell})[0] == (texts, lost)
    fields = {"all_captions": cell, "caption": "first"}
    shard(tmp_path / "x.tar", a={"json": fields})
    shard(tmp_path / "y.tar", a={})
    (tmp_path / "c.jsonl").write_text(json.dumps({"key": "a", **fields}))
    for index in (open_index("x.tar", tmp_path), open_index("y.tar", tmp_path, captions_csv=tmp_path / "c.jsonl")):
        assert captions_of(index) == {"a": texts}
        assert index.account.unused.total() == len(lost)


@pytest.mark.parametrize("caption", ["\x07", "\x7f", " \x1b \n", "\x07\u200b"])
def test_a_caption_of_control_characters_is_empty(caption: str) -> None:
    assert sort_out([caption, "a"]) == (["a"], ["empty"])


@pytest.mark.parametrize(("opening", "closing"), [('[{"raw":', "}]"), ('{"raw":', "}"), ("[", "]")])
def test_objects_in_objects_without_end_are_no_caption(opening: str, closing: str) -> None:
    data = '{"captions":' + opening * 400 + '"x"' + closing * 400 + ', "caption": "good"}'
    assert read_json_captions(data.encode()) == (["good"], ["not_text"])
    assert read_json_captions(b'{"captions": [{"raw": {"text": ["x"]}}]}') == (["x"], [])


def test_a_caption_that_lost_letters_elsewhere_is_used_as_it_is() -> None:
    assert sort_out(["caf\ufffd"]) == (["caf\ufffd"], [])
    assert read_text("caf\ufffd".encode()) == (["caf\ufffd"], [])


def test_a_named_column_holds_no_less_than_a_known_one() -> None:
    values = {"captions": {"raw": "r", "longIB": "One. Two."}}
    assert read_columns(values, ["captions"])[0] == read_columns(values)[0] == (["r", "One.", "Two."], [])


def test_a_raw_field_alone_is_the_last_choice() -> None:
    assert read_columns({"raw": "IMG_1.CR2", "caption": "a dog"}) == ((["a dog"], []), False)
    assert read_columns({"raw": "a dog"}) == ((["a dog"], []), False)
    assert read_columns({"raw": "a dog", "shortIB": "it runs"})[0].texts == ["a dog", "it runs"]
