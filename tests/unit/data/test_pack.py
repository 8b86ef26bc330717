"""`compt data pack` and `compt data dreamlip`, against webdataset, torchvision, tarfile and the authors' own rule."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import ExifTags, Image, ImageOps
from torchvision.datasets import ImageFolder

from compt.cli.main import main
from compt.data import pack as packing
from compt.data import stores
from compt.data.captions import by_column, read_columns, split_as_dreamlip
from compt.data.check import check
from compt.data.index import open_index
from compt.data.pack import pack
from compt.data.remote import Cache
from compt.data.samples import SampleReader
from compt.data.sources import PackOptions
from compt.errors import ConfigError, DataError
from compt.files import temporary_of
from tests.helpers.optional import optional
from tests.helpers.shards import make_shards, picture, sample, texts, write_tar
from tests.helpers.store import Store


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def photos(folder: Path, names: list[str]) -> dict[str, bytes]:
    """A JPEG of each name, different ones."""
    made = {name: picture(at, 9, 8, "JPEG") for at, name in enumerate(names)}
    fill(folder, dict(made))
    return made


def read_back(out: Path) -> list[dict[str, Any]]:
    """All samples in the shards of a folder, as webdataset reads them."""
    shards = sorted(map(str, out.glob("*.tar")))
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def captions_of(out: Path) -> dict[str, list[str]]:
    """Captions by key, as training reads them."""
    index = open_index(str(out), Path())
    reader = SampleReader(index)
    return {index.key(at): reader.captions(index.entry(at)).texts for at in range(len(index))}


def test_a_folder_of_images_with_texts_beside(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    images = photos(source, ["b/2.jpg", "a.jpg", "b/1.v2.JPEG", "c.jpg"])
    source.joinpath("c.jpg").rename(source / "c.png")  # the ending lies
    fill(
        source,
        {"a.txt": "one\ntwo\n", "b/2.json": '{"caption": "three", "width": 9}', "b/1.v2.txt": "four", "c.txt": "x"},
    )
    packed = pack(str(source), tmp_path / "out", Path(), PackOptions(shard_size=3))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.tar", "000001.tar", "pack.json"]
    found = read_back(tmp_path / "out")
    assert [item["__key__"] for item in found] == ["a", "b/1_v2", "b/2", "c"]
    assert [item["jpg"] for item in found] == [images[name] for name in ("a.jpg", "b/1.v2.JPEG", "b/2.jpg", "c.jpg")]
    assert found[0]["txt"] == b"one\ntwo\n"
    assert found[2]["json"] == b'{"caption": "three", "width": 9}'
    assert captions_of(tmp_path / "out") == {"a": ["one", "two"], "b/1_v2": ["four"], "b/2": ["three"], "c": ["x"]}
    assert (packed.shards, packed.samples, packed.account.faults) == (2, 4, [])
    assert packed.account.used == {"file": 8, "sample": 4, "caption": 5}
    assert check(str(tmp_path / "out"), Path()).title(0) == "Every sample can be used"
    with tarfile.open(tmp_path / "out" / "000000.tar") as archive:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in archive} == {(0, 0, "", 0o644)}


def test_images_without_captions_or_classes_are_one_clear_error(tmp_path: Path) -> None:
    photos(tmp_path / "photos", ["1.jpg", "2.jpg"])
    with pytest.raises(DataError, match=r"the images in .*photos have no captions: put a \.txt beside each"):
        pack(str(tmp_path / "photos"), tmp_path / "out", Path(), PackOptions())


def test_class_folders_get_the_numbers_of_torchvision(tmp_path: Path) -> None:
    source = tmp_path / "classes"
    images = photos(source, [f"{name}/{at}.jpg" for name in ("red_fox", "ant", "bee") for at in range(3)])
    theirs = ImageFolder(str(source))
    packed = pack(str(source), tmp_path / "out", Path(), PackOptions(shard_size=4, seed=3))
    labels = {f"{item['__key__']}.jpg": int(item["cls"]) for item in read_back(tmp_path / "out")}
    assert labels == {os.path.relpath(path, source): label for path, label in theirs.samples}
    assert {f"{item['__key__']}.jpg": item["jpg"] for item in read_back(tmp_path / "out")} == images
    assert (tmp_path / "out" / "classnames.txt").read_text().splitlines() == ["ant", "bee", "red fox"]
    assert packed.account.used == {"file": 9, "sample": 9, "label": 9}
    report = check(str(tmp_path / "out"), Path())
    assert (report.title(0), report.classes) == ("Every sample can be used", "3")


def test_class_names_beside_class_folders_are_kept_and_compared(tmp_path: Path) -> None:
    source = tmp_path / "classes"
    photos(source, [f"{at}/x.jpg" for at in range(11)])
    fill(source, {"classnames.txt": "".join(f"name {at}\n" for at in range(11))})
    with pytest.raises(DataError, match="--class-order"):
        pack(str(source), tmp_path / "out", Path(), PackOptions())
    pack(str(source), tmp_path / "out", Path(), PackOptions(class_order="number"))
    labels = {item["__key__"]: int(item["cls"]) for item in read_back(tmp_path / "out")}
    assert labels == {f"{at}/x": at for at in range(11)}
    assert (tmp_path / "out" / "classnames.txt").read_text() == (source / "classnames.txt").read_text()


def csv_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def jsonl_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("t.csv", csv_table), ("t.tsv", csv_table), ("metadata.jsonl", jsonl_table), ("t.parquet", parquet_table)],
)
def test_a_table_of_paths_and_captions(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    source = tmp_path / "set"
    images = photos(source, ["img/0.jpg", "img/1.jpg", "img/2.jpg", "img/unnamed.jpg"])
    rows = [("img/1.jpg", "one, more"), ("img/0.jpg", "zero"), ("img/1.jpg", "another"), ("img/gone.jpg", "nothing")]
    write(source / name, [{"file_name": path, "caption": text} for path, text in rows])
    packed = pack(str(source / name), tmp_path / "out", Path(), PackOptions())
    assert captions_of(tmp_path / "out") == {"img/0": ["zero"], "img/1": ["one, more", "another"]}
    assert [item["jpg"] for item in read_back(tmp_path / "out")] == [images["img/0.jpg"], images["img/1.jpg"]]
    account = packed.account
    assert account.used == {"file": 2, "row": 3, "join": 2, "by key": 2, "sample": 2, "caption": 3}
    assert account.unused == {"row_alone": 1, "no_row": 2}
    assert account.faults == ["row_alone"]
    assert check(str(tmp_path / "out"), Path()).title(0) == "Every sample can be used"


def test_no_path_of_a_table_leads_out_of_the_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(7, 9, 9, "JPEG"))
    source = tmp_path / "set"
    photos(source, ["0.jpg"])
    rows = [
        ("0.jpg", "zero"),
        ("../secret.jpg", "a"),
        (str(secret), "b"),
        ("x/../../secret.jpg", "c"),
        ("file:///etc/passwd", "d"),
    ]
    csv_table(source / "t.csv", [{"path": path, "caption": text} for path, text in rows])
    packed = pack(str(source / "t.csv"), tmp_path / "out", Path(), PackOptions())
    assert packed.account.unused == {"row_alone": 4}
    assert all(secret.read_bytes() not in data for data in contents(tmp_path / "out").values())


def test_the_images_of_a_table_may_be_in_another_folder(tmp_path: Path) -> None:
    photos(tmp_path / "images" / "train", ["a.jpg", "b.jpg"])
    table = fill(tmp_path, {"t.csv": "image,caption\n/data/cc/train/a.jpg,x\n/data/cc/train/b.jpg,y\n"}) / "t.csv"
    with pytest.raises(DataError, match="--images"):
        pack(str(table), tmp_path / "out", Path(), PackOptions(images=fill(tmp_path / "none", {"z.jpg": b""})))
    with pytest.raises(DataError, match="there is no image in"):
        pack(str(table), tmp_path / "out", Path(), PackOptions(images=tmp_path / "out"))
    pack(str(table), tmp_path / "out", Path(), PackOptions(images=tmp_path / "images"))
    assert captions_of(tmp_path / "out") == {"train/a": ["x"], "train/b": ["y"]}


def test_a_table_replaces_the_captions_beside_the_images_of_a_folder(tmp_path: Path) -> None:
    photos(tmp_path / "set", ["a.jpg", "b.jpg"])
    fill(tmp_path / "set", {"a.txt": "alt", "b.json": '{"caption": "alt", "id": 5}'})
    table = fill(tmp_path, {"t.csv": "key,mine,more\na,x,y\n"}) / "t.csv"
    options = PackOptions(table, ("mine", "more"))
    packed = pack(str(tmp_path / "set"), tmp_path / "out", Path(), options)
    assert captions_of(tmp_path / "out") == {"a": ["x", "y"], "b": ["alt"]}
    assert packed.account.unused == {"unmatched": 1, "second_text": 1}
    with pytest.raises(DataError, match="1 of the 2 images .* have a row"):
        pack(str(tmp_path / "set"), tmp_path / "o2", Path(), PackOptions(table, ("mine",), min_matched=0.9))


def test_everything_that_is_not_packed_is_counted_by_cause(tmp_path: Path) -> None:
    source = tmp_path / "set"
    photos(source, ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "bad.jpg"])
    fill(
        source,
        {
            "a.png": picture(1, 5, 5),
            "a.txt": "x",
            "b.json": "{",
            "b.txt": "y",
            "c.txt": " ",
            "bad.txt": "z",
            "lone.txt": "x",
            "d.caption": "x",
            "photo.heic": "x",
            "README": "x",
            ".hidden.jpg": "x",
            "a.cls": "cat",
            "__MACOSX/a.jpg": "x",
            "bad.jpg": picture(3, 9, 9, "JPEG")[:15],
        },
    )
    (source / "gone.jpg").symlink_to("nowhere")
    packed = pack(str(source), tmp_path / "out", Path(), PackOptions())
    assert captions_of(tmp_path / "out") == {"a": ["x"], "b": ["y"]}
    assert packed.account.unused == {
        "second_file": 1,
        "no_owner": 2,
        "foreign_file": 1,
        "other_file": 1,
        "hidden_file": 2,
        "not_file": 1,
        "json": 1,
        "cls": 1,
        "caption": 2,
        "image": 1,
    }
    assert packed.account.read("sample") == 5
    assert packed.account.first["image"].startswith("bad: not an image")


def test_a_seed_shuffles_and_keys_that_meet_stay_apart(tmp_path: Path) -> None:
    source = tmp_path / "set"
    names = [f"{at:02d}.jpg" for at in range(20)]
    images = photos(source, [*names, "x.1.jpg", "x_1.jpg"])
    fill(source, {f"{name.removesuffix('.jpg')}.txt": name for name in images})
    kept = {}
    for seed in (None, 1, 2):
        pack(str(source), tmp_path / f"out{seed}", Path(), PackOptions(seed=seed, shard_size=50))
        found = read_back(tmp_path / f"out{seed}")
        kept[seed] = [item["__key__"] for item in found]
        assert all(item["jpg"] == images[item["txt"].decode()] for item in found)
    assert kept[None] == sorted(kept[None]) == [*(name[:2] for name in names), "x_1", "x_1_2"]
    assert sorted(kept[1]) == sorted(kept[2]) == kept[None]
    assert len({tuple(keys) for keys in kept.values()}) == 3


def authors_split(text: str) -> list[str]:
    """DreamLIP's rule, written as a plain loop."""
    parts, part = [], ""
    for letter in text.replace("</s>", "\n") + "\n":
        if letter in ".\n":
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return [part for part in parts if part]


LONG = "A cat of 3.5 kg sits. It is red!  Is it asleep? yes</s>The end.\nA line"
HEADER = ("raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions", "longSV_captions")


def dreamlip_table(path: Path, urls: list[str]) -> None:
    rows = [
        {"Image Path": url, **{name: f"{name} {at}. {LONG}" for name in HEADER}, "longLLA_captions": "" if at else "."}
        for at, url in enumerate(urls)
    ]
    csv_table(path, rows)


@pytest.mark.parametrize("way", ["url", "key", "json"])
def test_dreamlip_is_merged_and_cut_as_the_authors_cut_it(tmp_path: Path, way: str) -> None:
    url = "https://host/{}.jpg".format
    table = tmp_path / "cc3m_3long_3short_1raw_captions_url.csv"
    members: list[tuple[str, bytes]] = []
    for at in range(4):
        values: dict[str, Any] = {"url": url(at), "caption": "alt", "width": 9}
        if way == "json" and at < 3:
            values |= {name: f"{name} {at}. {LONG}" for name in HEADER[1:]} | {"caption": f"raw_caption {at}. {LONG}"}
        files = {"jpg": picture(at, 9, 9, "JPEG"), "json": json.dumps(values).encode(), "txt": b"alt"}
        members += [(f"{at:09d}.{ending}", data) for ending, data in files.items()]
    write_tar(tmp_path / "shards" / "00000.tar", members)
    if way != "json":
        dreamlip_table(table, [f"{at:09d}" if way == "key" else url(at) for at in range(3)])
    options = PackOptions(None if way == "json" else table, keep="sentences")
    packed = pack(str(tmp_path / "shards"), tmp_path / "out", Path(), options)
    found = {item["__key__"]: item for item in read_back(tmp_path / "out")}
    assert [item["jpg"] for item in found.values()] == [data for name, data in members if name.endswith("jpg")]
    expected = {
        f"{at:09d}": [
            f"raw_caption {at}. {LONG}",
            *(part for name in HEADER[1:] for part in authors_split(f"{name} {at}. {LONG}")),
        ]
        for at in range(3)
    }
    assert captions_of(tmp_path / "out") == {**expected, "000000003": ["alt"]}
    assert "red!  Is it asleep? yes" in json.loads(found["000000000"]["json"])["longIB_captions"][3]
    assert json.loads(found["000000001"]["json"])["width"] == 9
    if way != "json":
        assert packed.account.unused["unmatched"] == 1
        assert packed.account.used[{"url": "by URL", "key": "by key"}[way]] == 3
    report = check(str(tmp_path / "out"), Path())
    assert report.usable(0)
    sentences = len(authors_split(f"x 1. {LONG}"))
    raw = "caption" if way == "json" else "raw_caption"
    assert report.found.columns == {raw: 3, ".txt": 1, **dict.fromkeys(HEADER[1:], 3 * sentences)}
    assert dict(report.rows())["captions per image"].startswith(
        f"{raw} 0.75, shortIB_captions {0.75 * sentences:.3g}, "
    )


def test_check_counts_the_columns_of_a_table(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", n=4, shards=1)
    urls = [f"0000{at:05d}" for at in range(4)]
    dreamlip_table(tmp_path / "t.csv", urls)
    report = check(str(tmp_path / "in"), Path(), captions_csv=tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {name: sum(len(read_columns({name: row[name]}, (name,))[0].texts) for row in rows) for name in HEADER}
    assert report.table == (4, {**expected, "longLLA_captions": 1})
    assert dict(report.rows())["captions per row of the table"].startswith("raw_caption 1, shortIB_captions 1, longIB")


@pytest.mark.parametrize(
    "text", [LONG, "", ".", "...", "a", "1. one\n2. two", "x</s></s>y", " \n . ", "no end", "e.g. this"]
)
def test_sentences_are_the_authors(text: str) -> None:
    values = {"raw_caption": text, "longIB_captions": text, "shortSV": text, "caption": text, "other": text}
    expected = [part.strip() for part in re.split(r"\n|</s>|[.]", text) if part.strip()]
    assert authors_split(text) == expected
    assert split_as_dreamlip(values) == {**values, "longIB_captions": expected, "shortSV": expected}


@pytest.mark.parametrize(
    "values",
    [
        {"caption": "a"},
        {"caption": "a", "text": "b"},
        {"captions": ["a", "b", ""], "caption": "c"},
        {"captions": {"raw": "a", "longIB": ["b", "c"]}},
        {"captions": {"longIB": None, "shortSV": 3}, "sentences": ["a"]},
        {"raw": "a", "caption": "x", "longIB": "B. C", "shortIB_captions": "d"},
        {"raw": "", "raw_caption": "a", "longIB": "b"},
        {"caption": "a", "shortIB": ["b", None], "longSV": ""},
        {"raw": "DSC.NEF", "caption": "a"},
        {"raw": "a"},
        {"longIB": "", "caption": "a"},
        {"sentences": [{"raw": "a"}, {"raw": "b"}]},
        {"org_caption": "a", "re_caption": "b"},
        {"caption_0": "a", "caption_3": "b"},
        {"caption": None},
        {},
    ],
)
def test_captions_by_column_are_those_of_the_reader(values: dict[str, Any]) -> None:
    found = by_column(values)
    assert [text for texts in found.values() for text in texts] == read_columns(values)[0].texts
    assert found.keys() <= {*values, *(values["captions"] if isinstance(values.get("captions"), dict) else ())}


def test_shards_are_packed_into_other_sizes_with_labels(tmp_path: Path) -> None:
    make_shards(tmp_path / "in", n=10, shards=3, classes=3, extension="webp")
    write_tar(tmp_path / "in" / "9.tar", sample("000000000", 77, label=1))  # its key is there already
    fill(tmp_path / "in", {"classnames.txt": "a\nb\nc\n", "zeroshot_classification_templates.txt": "a {c}\n"})
    packed = pack(str(tmp_path / "in"), tmp_path / "out", Path(), PackOptions(shard_size=20))
    old, new = open_index(str(tmp_path / "in"), Path()), open_index(str(tmp_path / "out"), Path())
    readers = SampleReader(old), SampleReader(new)
    for at in range(11):
        first, second = old.entry(at), new.entry(at)
        assert (first.label, readers[0].image(first)) == (second.label, readers[1].image(second))
        assert readers[0].captions(first) == readers[1].captions(second)
    assert new.key(10) == "000000000_2"
    assert packed.account.used["caption"] == new.account.used["caption"] == 33
    assert (len(old), len(new), packed.samples) == (11, 11, 11)
    assert (tmp_path / "out" / "zeroshot_classification_templates.txt").read_text() == "a {c}\n"
    assert check(str(tmp_path / "out"), Path()).title(0) == "Every sample can be used"
    (tmp_path / "in" / "classnames.txt").write_bytes("kätzchen\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"in/classnames\.txt: cannot be read: 'utf-8' codec"):
        pack(str(tmp_path / "in"), tmp_path / "other", Path(), PackOptions())


def big_folder(folder: Path, n: int = 60) -> Path:
    photos(folder, [f"{at % 7}/{at:03d}.jpg" for at in range(n)])
    csv_table(folder / "t.csv", [{"path": f"{at % 7}/{at:03d}.jpg", "caption": texts(at, 1)[0]} for at in range(n)])
    (folder / "3/003.jpg").write_bytes(b"broken")
    return folder


def photo(width: int, height: int, orientation: int = 1, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth image, brighter to the right and redder below, as a camera that is held in some way stores it."""
    right, below = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([below, right, right], axis=2).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a secret place"
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif)
    return stream.getvalue()


def test_large_images_are_made_smaller_and_upright(tmp_path: Path) -> None:
    files = {
        "large.jpg": photo(1200, 900),
        "turned.jpg": photo(900, 1200, 6),
        "clear.png": photo(300, 200, 3, "PNG", "RGBA"),
        "tall.png": photo(70, 400, kind="PNG"),
        "small.jpg": photo(90, 64),
        "little.webp": photo(64, 80, kind="WEBP"),
        "small_turned.jpg": photo(80, 64, 8),
        "cut.jpg": photo(900, 900)[:9000],
    }
    fill(tmp_path / "photos", {**files, **{f"{Path(name).stem}.txt": name for name in files}})
    packed = pack(str(tmp_path / "photos"), tmp_path / "out", Path(), PackOptions(resize=64))
    assert packed.account.unused == {"image": 1}
    assert packed.account.first["image"].startswith("cut: cannot be decoded: ")
    found = {item["__key__"]: item for item in read_back(tmp_path / "out")}
    sizes = {"large": (85, 64), "turned": (85, 64), "clear": (96, 64), "tall": (64, 366), "small_turned": (64, 80)}
    assert {*found} == {*sizes, "small", "little"}
    assert (found["small"]["jpg"], found["little"]["webp"]) == (files["small.jpg"], files["little.webp"])
    for name, size in sizes.items():
        data = found[name]["jpg"]
        small = Image.open(io.BytesIO(data))
        assert (small.format, small.size, small.mode, dict(small.getexif())) == ("JPEG", size, "RGB", {})
        assert b"secret" not in data
        stored = next(image for path, image in files.items() if path.rpartition(".")[0] == name)
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(stored))).convert("RGB").resize(size)
        assert np.abs(np.asarray(small).astype(int) - np.asarray(shown).astype(int)).mean() < 2, name
    with pytest.raises(ConfigError, match=r"was packed with resize 64, not None"):
        pack(str(tmp_path / "photos"), tmp_path / "out", Path(), PackOptions())


def test_a_name_in_a_shard_leads_out_of_no_folder(tmp_path: Path) -> None:
    """tarfile's own filter refuses an archive whose members would be unpacked outside of the folder."""
    names = ["../../up", "/absolute", "./here", "a/../../b", "b", "a/b", "../b", "____"]
    write_tar(tmp_path / "in" / "0.tar", [each for at, name in enumerate(names) for each in sample(name, at)])
    packed = pack(str(tmp_path / "in" / "*.tar"), tmp_path / "out", Path(), PackOptions())
    keys = ["up", "absolute", "here", "a/b", "b", "a/b_2", "b_2", "sample_"]
    assert packed.samples == len(captions_of(tmp_path / "out")) == len(names)
    assert [item["__key__"] for item in read_back(tmp_path / "out")] == keys
    with tarfile.open(tmp_path / "out" / "000000.tar") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("in", "out", "unpacked")]


def killed_at(wanted: str, source: str, out: Path, options: str, workers: int = 1) -> None:
    """A packing that is killed a moment after a file with this name is there."""
    slow = (
        "import sys, time; from pathlib import Path; from compt.data import pack as p, sources as s\n"
        "def late(read): return lambda self, at: (time.sleep(0.02), read(self, at))[1]\n"
        "for kind in (s._ImageFolder, s._ByClass): kind.read = late(kind.read)\n"
        f"p.pack(sys.argv[1], Path(sys.argv[2]), Path(), s.PackOptions({options}), workers={workers})"
    )
    child = subprocess.Popen([sys.executable, "-c", slow, source, str(out)])
    while not [*out.glob(wanted)] and child.poll() is None:
        time.sleep(0.005)
    time.sleep(0.03)  # within the shard
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def test_a_killed_packing_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = big_folder(tmp_path / "set")
    options = PackOptions(shard_size=4, seed=5)
    whole = pack(str(source / "t.csv"), tmp_path / "whole", Path(), options)
    out = tmp_path / "out"
    for wanted in ("000002.tar", "000007.tar"):
        killed_at(wanted, str(source / "t.csv"), out, "shard_size=4, seed=5")
    assert not (out / "000014.tar").exists()
    resumed = pack(str(source / "t.csv"), out, Path(), options)
    assert contents(out) == contents(tmp_path / "whole")
    assert resumed == whole
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert pack(str(source / "t.csv"), out, Path(), options) == whole  # a finished one writes nothing
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "workers"), [("captions", 3), ("classes", 1)])
def test_a_packing_that_is_killed_in_its_first_shard_can_be_finished(tmp_path: Path, kind: str, workers: int) -> None:
    names = [f"{at % 3}/{at:02d}" for at in range(40)]
    photos(tmp_path / "set", [f"{name}.jpg" for name in names])
    if kind == "captions":
        fill(tmp_path / "set", {f"{name}.txt": name for name in names})
    options, source = PackOptions(shard_size=30, resize=4), str(tmp_path / "set")
    whole = pack(source, tmp_path / "whole", Path(), options, workers=1)
    out = fill(tmp_path / "out", {temporary_of(tmp_path / "pack.json").name: "{"})  # it was killed even earlier before
    killed_at(".000000.tar*", source, out, "shard_size=30, resize=4", workers)
    left = {path.name for path in out.iterdir()}
    assert "000000.tar" not in left
    assert ("classnames.txt" in left) == (kind == "classes")
    assert pack(source, out, Path(), options) == whole
    assert contents(out) == contents(tmp_path / "whole")


def test_large_images_are_made_smaller_on_several_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{at:02d}" for at in range(15)]
    photos(tmp_path / "set", [f"{name}.jpg" for name in names])
    fill(tmp_path / "set", {**{f"{name}.txt": name for name in names}, "03.jpg": "broken", "07.txt": " "})
    one = pack(str(tmp_path / "set"), tmp_path / "one", Path(), PackOptions(shard_size=4, resize=4), workers=1)
    together, shrunk = threading.Barrier(2, timeout=10), packing.shrunk

    def meeting(*given: Any) -> bytes:
        together.wait()  # for another thread that is here at the same time
        return shrunk(*given)

    monkeypatch.setattr(packing, "shrunk", meeting)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert pack(str(tmp_path / "set"), tmp_path / "two", Path(), PackOptions(shard_size=4, resize=4)) == one
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert one.account.unused == {"image": 1, "caption": 1}


@pytest.mark.parametrize("seed", [None, 0])
def test_shards_of_a_store_that_are_larger_than_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """In their order, each is downloaded to be indexed, and once more. With a seed, only what is packed is fetched."""
    optional("obstore", "remote")
    folder = tmp_path / "store" / "bucket" / "set"
    make_shards(folder, n=48, shards=4)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    options = PackOptions(shard_size=10, seed=seed)
    stores.objects.cache_clear()
    with Store(tmp_path / "store") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        cache = Cache(tmp_path / "cache", 2 * max(sizes))
        pack("s3://bucket/set/{000000..000003}.tar", tmp_path / "out", Path(), options, cache=cache)
        assert sum(server.sent.values()) <= 2 * sum(sizes)
        assert seed is not None or set(server.gets.values()) <= {1, 2}
    stores.objects.cache_clear()
    pack(str(folder), tmp_path / "local", Path(), options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == {
        path.name: path.read_bytes() for path in (tmp_path / "local").glob("*.tar")
    }


def test_other_options_or_data_in_the_same_folder_are_one_clear_error(tmp_path: Path) -> None:
    source, out = big_folder(tmp_path / "set", 8), tmp_path / "out"
    pack(str(source / "t.csv"), out, Path(), PackOptions(shard_size=4))
    kept = contents(out)
    for options, words in [
        (PackOptions(shard_size=5), "shard_size 4, not 5"),
        (PackOptions(shard_size=4, seed=0), "seed None, not 0"),
        (PackOptions(shard_size=4, columns=("caption",)), "columns"),
    ]:
        with pytest.raises(ConfigError, match=words):
            pack(str(source / "t.csv"), out, Path(), options)
    photos(source, ["new.jpg"])
    pack(str(source / "t.csv"), out, Path(), PackOptions(shard_size=4))  # the table does not name it
    (source / "1/001.jpg").write_bytes(picture(1, 30, 30, "JPEG"))
    with pytest.raises(DataError, match="is not what it was when packing began"):
        pack(str(source / "t.csv"), out, Path(), PackOptions(shard_size=4))
    assert {name: data for name, data in contents(out).items() if not name.startswith(".pack/")} == kept
    with pytest.raises(ConfigError, match="holds other files"):
        pack(str(source / "t.csv"), source, Path(), PackOptions())
    (out / "pack.json").write_text("{")
    with pytest.raises(ConfigError, match=r"pack\.json is damaged"):
        pack(str(source / "t.csv"), out, Path(), PackOptions(shard_size=4))


def test_a_packed_folder_may_be_inside_its_source(tmp_path: Path) -> None:
    photos(tmp_path, ["a.jpg"])
    fill(tmp_path, {"a.txt": "x"})
    for _ in range(2):
        assert pack(str(tmp_path), tmp_path / "out", Path(), PackOptions()).account.unused == {}


def test_the_commands_exit_as_check_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    big_folder(tmp_path / "set", 40)

    def run(*words: str) -> tuple[int, str]:
        code = 0
        try:
            main(lambda: ["data", *words])
        except SystemExit as end:
            code = int(end.code or 0)
        found = capsys.readouterr()
        return code, " ".join((found.out + found.err).split())

    table, out = str(tmp_path / "set" / "t.csv"), str(tmp_path / "out")
    code, said = run("pack", table, out, "--shard-size", "15")
    assert (code, "samples │ 39" in said or "samples 39" in said) == (3, True)
    assert "image that cannot be decoded" in said
    assert run("pack", table, out, "--shard-size", "15", "--max-bad-share", "0.1")[0] == 0
    code, said = run("pack", table, out, "--json", "--max-bad-share", "0.1")
    assert (code, "shard_size 15, not 10000" in said) == (2, True)
    assert run("pack", str(tmp_path / "nowhere"), str(tmp_path / "o"))[0] == 3
    assert run("pack", str(tmp_path / "set"), str(tmp_path / "o"), "--images", out)[0] == 2
    code, said = run("dreamlip", out, str(tmp_path / "merged"), "--json")
    assert code == 3
    assert "none of the 39 samples that were looked at has a caption of DreamLIP's" in said
    assert "Name DreamLIP's table with --captions-csv" in said
    assert not list((tmp_path / "merged").glob("*.tar"))


@pytest.mark.parametrize("source", ["train-00000-of-00001.parquet", "", "train-*.parquet"])
def test_parquet_with_images_inside(tmp_path: Path, source: str) -> None:
    """The schema is that of `datasets` 5.2.0, Dataset.to_parquet: an image without a file has no path."""
    arrow, parquet = optional("pyarrow", "parquet"), optional("pyarrow.parquet", "parquet")
    images = [picture(at, 9, 8, "PNG" if at % 2 else "JPEG") for at in range(7)]
    kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    paths = ["dogs/a.jpg", None, "b.jpg", "__MACOSX/m.jpg", ".", "a\0b/x.jpg", None]
    rows = [{"bytes": image, "path": path} for image, path in zip(images, paths, strict=True)]
    rows[6] = {"bytes": None, "path": "gone.jpg"}
    columns = {
        "image": arrow.array(rows, kind),
        "caption": arrow.array([[f"{at} one", f"{at} two"] for at in range(7)], arrow.list_(arrow.string())),
        "clip_feature": arrow.array([[0.5] * 4] * 7, arrow.list_(arrow.float32())),
        "label": arrow.array([0, 1] * 3 + [0], arrow.int64()),
    }
    place = tmp_path / "data"
    place.mkdir()
    parquet.write_table(arrow.table(columns), place / "train-00000-of-00001.parquet", row_group_size=3)
    report = pack(str(place / source), tmp_path / "out", tmp_path, PackOptions(shard_size=4))
    assert (report.samples, report.shards) == (6, 2)
    assert report.account.unused == {"image": 1}
    found = read_back(tmp_path / "out")
    assert [one["__key__"] for one in found] == [
        *("dogs/a", "train-00000-of-00001_00000001", "b", "sample___MACOSX_m", "sample_"),
        "a_b/x",
    ]
    assert [one.get("jpg") or one["png"] for one in found] == images[:6]
    assert [json.loads(one["json"]) for one in found] == [{"caption": [f"{at} one", f"{at} two"]} for at in range(6)]
    whole = contents(tmp_path / "out")
    state = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert state["read"] == 7
    pack(str(place / source), tmp_path / "again", tmp_path, PackOptions(shard_size=4))
    assert contents(tmp_path / "again") == whole


def test_what_parquet_with_images_needs(tmp_path: Path) -> None:
    arrow, parquet = optional("pyarrow", "parquet"), optional("pyarrow.parquet", "parquet")
    kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    image = arrow.array([{"bytes": picture(0, 9, 8, "JPEG"), "path": None}], kind)
    parquet.write_table(arrow.table({"image": image, "what": ["a cat"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column has a name known for captions; name one with --columns, of what"):
        pack("a.parquet", tmp_path / "out", tmp_path, PackOptions())
    with pytest.raises(ConfigError, match="--seed: rows of .parquet are read in their order"):
        pack("a.parquet", tmp_path / "out", tmp_path, PackOptions(seed=0))
    assert pack("a.parquet", tmp_path / "out", tmp_path, PackOptions(columns=["what"])).samples == 1
    assert json.loads(read_back(tmp_path / "out")[0]["json"]) == {"captions": ["a cat"]}
