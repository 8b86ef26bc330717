"""`compt.drawings.clipart`: from a package of Debian to the clip art set, with real drawings."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compt.cli.main import main
from compt.drawings import clipart
from compt.drawings.captions import clean
from compt.drawings.debian import check_package, fetch_debian, package_files
from compt.drawings.packages import Package
from compt.drawings.svg import Drawing
from compt.errors import DataError
from compt.files import read_json, sha256_file
from tests.helpers.optional import optional

PINNED = Package("openclipart-svg", "1:0.18+dfsg-19", "0" * 64)
OTHER = "1:0.19-1"


def package(path: Path, files: dict[str, bytes], version: str = OTHER, name: str = "openclipart-svg") -> Path:
    """A .deb file, as `dpkg-deb` writes it."""
    parts = {"debian-binary": b"2.0\n"}
    control = f"Package: {name}\nVersion: {version}\nDescription: clip art\n".encode()
    for part, members in (("control.tar.xz", {"./control": control}), ("data.tar.xz", files)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:xz") as archive:
            for member, content in members.items():
                item = tarfile.TarInfo(member)
                item.size = len(content)
                archive.addfile(item, io.BytesIO(content))
        parts[part] = data.getvalue()
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for part, content in parts.items():
            file.write(f"{part:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content)
            file.write(b"\n" * (len(content) % 2))
    return path


@pytest.fixture
def files(root: Path) -> dict[str, bytes]:
    """Thirteen drawings of the package, and changed ones: one for each cause of leaving a drawing out."""
    optional("resvg_py", "data")
    folder = root / "tests" / "fixtures" / "clipart"
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.svg"))}
    recycle, poland = found["signs_and_symbols/recycle_water_saint_.svg"], found[POLAND]
    found["a/gpl.svg"] = poland.replace(b"web.resource.org/cc/PublicDomain", b"creativecommons.org/licenses/GPL/2.0/")
    found["a/anonymous.svg"] = recycle.replace(b">saint<", b">anonymous<")
    found["a/none.svg"] = re.sub(b"(?s)<metadata.*</metadata>", b"", recycle)
    found["a/bad.svg"] = recycle[:-9]
    found["a/entity.svg"] = b'<!DOCTYPE svg [<!ENTITY a "a">]>' + recycle[recycle.index(b"<svg") :]
    found["a/blank.svg"] = re.sub(b"(?s)</metadata>.*", b"</metadata></svg>", recycle)
    found["a/0001.svg"] = re.sub(b"(?s)<rdf:Bag>.*</rdf:Bag>|recycle_water", b"", recycle).replace(
        b"#1F1A17", b"#0000FF"
    )
    found["a/copy.svg"] = changed(poland, "A Copier", title="A copy")
    return found


POLAND = "signs_and_symbols/flags/flag_of_poland_marcin_wi_01.svg"


def changed(data: bytes, author: str, title: str) -> bytes:
    """The flag of Poland by another author, in another red."""
    for before, after in (("Marcin Wilk", author), (">Flag of Poland<", f">{title}<"), ("#ff0000", "#ff0800")):
        assert before.encode() in data, before
        data = data.replace(before.encode(), after.encode())
    return data


def placed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"./{clipart.FOLDER}{name}": data for name, data in files.items()}


def samples(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and member.name.endswith(".json"):
                    found.append(json.load(file))
    return found


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compt", "data", "clipart", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("written", "author"),
    [
        ("Jon Phillips", "jon phillips"),
        ("phillips,  JON", "jon phillips"),
        ("A.J. Ashton", "aj ashton"),
        ("Sérgio Luiz Araújo Silva", "araujo luiz sergio silva"),
        ("S&eacute;rgio Luiz Ara&amp;uacute;jo Silva", "araujo luiz sergio silva"),
        ("Jakob [jakob@example.org]", "jakob"),
        ("zazou (zazou@example.org)", "zazou"),
        ("AbiClipart", "g gerald"),
        ("Nathan Eady and Nicu Buculei", "eady nathan"),
        ("Anonymous", ""),
        ("HASH(0x89c79d4)", ""),
        ("http://example.org", ""),
    ],
)
def test_spellings_of_an_author_are_one(written: str, author: str) -> None:
    assert clipart.author_of(written) == author


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("Flat_Cake_bw", "flat cake black and white"),
        ("Crawfish (B and W)", "crawfish black and white"),
        ("BandeMarquageSecurite", "bande marquage securite"),
        ("bee3", "bee"),
        ("14_layer_02", "layer"),
        ("9 ball form", "ball form"),
        ("2004", ""),
    ],
)
def test_names_are_words(written: str, words: str) -> None:
    assert clipart.words_of(written) == words


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("<b>A&nbsp;duck</b><br/>", "A duck"),
        ("&lt;b&gt;A duck", "A duck"),
        ("\uff1cscript\uff1eA duck", "A duck"),
        ("\x1b[31mA\x07 duck\u202e\x9b2J", "[31mA duck 2J"),
        ("A duck, see http://example.org/duck.html or mail@example.org", "A duck, see or"),
        ("duck.svg HASH(0x85fcd64)", "duck"),
        ("a_duck \u201cin\u201d flight", "a duck in flight"),
    ],
)
def test_texts_are_cleaned(written: str, text: str) -> None:
    assert clean(written) == text


def clip(path: str, author: str, title: str, *keywords: str, description: str = "") -> clipart.Clip:
    pixels = np.zeros((4, 4, 3), np.uint8)
    return clipart.Clip(path, clipart.author_of(author), Drawing(title, description, keywords, author, "", pixels))


def test_a_title_of_a_batch_gives_way_to_the_name_of_the_file() -> None:
    clips = [
        clip("food/pear1_nicu_buc_01.svg", "Nicu Buculei", "Fruits of 2004", "food", "hash(0x8a0b75c)", "nicu buculei"),
        clip("food/lemon.svg", "Nicu Buculei", "Fruits of 2004", "food", "citrus"),
        clip("food/fig.svg", "Nicu Buculei", "Clipart by Nicu Buculei - apple"),
        clip(
            "food/apple_cox.svg",
            "Nicu Buculei",
            "Apple, drawn by Nicu Buculei",
            description="A ripe apple by Nicu Buculei",
        ),
        clip("food/gufo.svg", "Francesco Rollandin", "Gufo", "bird", description="un gufo di notte"),
        clip("food/gufo2.svg", "Francesco Rollandin", "Gufo"),
    ]
    dropped: Counter[str] = Counter()
    named = clipart._name(clips, dropped)
    assert [one.name for one in named] == ["pear", "lemon", "fig", "apple", "bird"]
    assert named[3].description == "A ripe apple"
    assert named[0].keywords == ("food",)
    assert named[1].keywords == ("citrus", "food")
    assert dropped == {"no caption": 1}


def test_a_class_needs_one_answer() -> None:
    assert clipart.class_of(clip("animals/birds/a.svg", "A Bee", "a")) == "bird"
    assert clipart._name([clip("a.svg", "A Bee", "a bird", "fruit", "dog")], Counter())[0].keywords == ("dog", "fruit")
    both = clipart._name([clip("a.svg", "A Bee", "a bird", "fruit", "dog")], Counter())[0]
    assert clipart.class_of(both) == ""


def test_authors_are_split_by_hash_and_the_largest_train() -> None:
    drawings = {f"author {number}": 1 + number % 7 for number in range(200)} | {"large": 60}
    parts = clipart.split_authors(drawings)
    total = sum(drawings.values())
    shares = Counter[str]()
    for author, part in parts.items():
        shares[part] += drawings[author]
    assert parts["large"] == "train"
    assert 0.15 <= shares["test"] / total < 0.16
    assert 0.10 <= shares["val"] / total < 0.11
    assert clipart.split_authors(dict(reversed(drawings.items()))) == parts


def test_every_drawing_is_in_one_place_or_counted(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipart, "ALIKE", 1)
    held_out = {"a copier": "val", "kaplinski lauris": "val", "saint": "test", "ani ani": "test"}
    monkeypatch.setattr(
        clipart, "split_authors", lambda drawings: {one: held_out.get(one, "train") for one in drawings}
    )
    monkeypatch.setattr(clipart, "CLASS_TRAINING", 1)
    monkeypatch.setattr(clipart, "CLASS_DRAWINGS", 1)
    made = clipart.build(tmp_path / "set", 16, package(tmp_path / "a.deb", placed(files)))
    assert made == read_json(tmp_path / "set" / "manifest.json")
    assert made["dropped"] == {
        "blank": 1,
        "declares XML entities": 1,
        "has text, which needs fonts": 1,
        "more than 1 drawings with one name by one author": 1,
        "no author": 2,
        "no caption": 1,
        "no metadata": 1,
        "not in the public domain": 1,
        "not readable as XML": 1,
        "refers to another file": 1,
        "same drawing as in the training set": 1,
        "same pixels as another drawing": 1,
    }
    train, val, test = (samples(tmp_path / "set" / name) for name in ("train", "val_pairs", "test_pairs"))
    assert len(train) + len(val) + len(test) + sum(made["dropped"].values()) == len(files)
    assert made["authors"] == {"train": len({one["style"] for one in train}), "val": 1, "test": 1}
    assert sorted(one["name"] for one in val) == ["japan", "ukraine"]
    assert [one["style"] for one in test] == ["saint"]
    flags = samples(tmp_path / "set" / "val_classes")
    assert [one["name"] for one in flags] == ["flag", "flag"]
    assert (tmp_path / "set" / "val_classes" / "classnames.txt").read_text() == "flag\n"
    palestine = next(one for one in train if one["name"] == "palestine")
    assert {"palestine", "a drawing of palestine", "asia"} <= set(palestine["captions"])
    assert len({caption.casefold() for caption in palestine["captions"]}) == 16
    again = clipart.build(tmp_path / "set", 16, tmp_path / "a.deb")
    assert again["splits"] == made["splits"]


def test_held_out_drawings_of_one_name_are_counted() -> None:
    clips = [
        replace(clip(f"{place}/house_{at}.svg", f"author {at}", ""), name="house") for at, place in enumerate("abc")
    ]
    dropped: Counter[str] = Counter()
    folders = clipart._folders(clips, {one.author: "test" for one in clips}, dropped)
    assert (len(folders["test_pairs"]), len(folders["test_classes"])) == (1, 0)
    assert dropped == {"name of another held-out drawing, and in no class": 2}


def test_the_command_reads_a_file_and_shows_what_is_left_out(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b[31m[bold]:x:&#27;&lt;script&gt;"
    files = {
        name: data.replace(b">saint<", f">{hostile.replace(chr(27), '')}<".encode()) for name, data in files.items()
    }
    files[f"a/{hostile}.svg"] = files[POLAND].replace(b"Flag of Poland", b"[red]&#155;2J")
    deb = package(tmp_path / "a.deb", placed(files))
    assert command(monkeypatch, tmp_path / "set", "--deb", deb, "--size", 8) == 0
    shown = "".join(capfd.readouterr())
    assert "Clip art 1:0.19-1, not the pinned version, 8 px, from the file" in shown
    assert re.search(r"no author +\d", shown)
    assert re.search(r"has text, which needs fonts +1", shown)
    assert "\x1b" not in shown
    assert "script" not in shown
    assert not [one for one in samples(tmp_path / "set" / "train") if "\x1b" in str(one) or "<" in str(one)]
    assert command(monkeypatch, tmp_path / "set", "--deb", tmp_path / "none.deb") == 3
    assert "none.deb" in capfd.readouterr().err


def test_the_pinned_version_must_have_its_bytes_and_another_package_is_refused(tmp_path: Path) -> None:
    path = package(tmp_path / "a.deb", {}, PINNED.version)
    with pytest.raises(DataError, match="sha256 is"):
        check_package(path, PINNED)
    found = check_package(path, Package(PINNED.name, PINNED.version, sha256_file(path)))
    assert found == {"name": PINNED.name, "version": PINNED.version, "sha256": sha256_file(path)}
    assert check_package(package(path, {}), PINNED)["version"] == OTHER
    with pytest.raises(DataError, match="not the package openclipart-svg"):
        check_package(package(path, {}, name="openclipart"), PINNED)


def test_a_package_writes_no_file_and_links_are_not_followed(tmp_path: Path) -> None:
    path = package(tmp_path / "a.deb", {"./../../escaped.svg": b"a", "./usr/b.svg": b"b", "/etc/c.svg": b"c"})
    assert list(package_files(path, below="usr/")) == [("b.svg", b"b")]
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        link = tarfile.TarInfo("usr/link.svg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    path.write_bytes(b"!<arch>\n" + f"{'data.tar.xz':<48}{len(data.getvalue()):<10}`\n".encode() + data.getvalue())
    assert list(package_files(path, below="usr/")) == []
    assert [item.name for item in tmp_path.iterdir()] == ["a.deb"]


@pytest.mark.parametrize(
    "data",
    [b"", b"!<arch>\n", b"!<arch>\n" + b"x" * 60, b"!<arch>\n" + f"{'data.tar.xz':<48}{9:<10}`\n".encode() + b"no tar"],
)
def test_a_torn_package_is_one_clear_message(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.deb").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.deb: not a readable Debian package"):
        list(package_files(tmp_path / "a.deb"))


def test_a_package_of_endless_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compt.drawings.debian.PACKAGE_LIMIT", 1000)
    path = package(tmp_path / "a.deb", {"./a": bytes(600), "./b": bytes(600)})
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        list(package_files(path))


def test_the_name_of_a_file_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = package(tmp_path / "a.deb", {"./" + 200_000 * "a": b""})
    assert path.stat().st_size < 20_000, "compressed"
    monkeypatch.setattr("compt.drawings.debian.PACKAGE_LIMIT", 100_000)
    with pytest.raises(DataError, match="more than 100,000 bytes"):
        list(package_files(path))


def test_the_package_is_downloaded_with_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "apt-get"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with_version = f"download openclipart-svg={PINNED.version}"
    apt.write_text(f'#!/bin/sh\n[ "$*" = "{with_version}" ] && echo deb > openclipart-svg_1_all.deb\n')
    apt.chmod(0o755)
    (tmp_path / "to").mkdir()
    assert fetch_debian(PINNED, tmp_path / "to").read_text() == "deb\n"
    apt.write_text("#!/bin/sh\necho 'E: Version not found' >&2\nexit 100\n")
    with pytest.raises(DataError, match=r"failed \(E: Version not found\).* name the file with --deb"):
        fetch_debian(PINNED, tmp_path / "to")
    monkeypatch.setenv("PATH", str(tmp_path / "to"))
    with pytest.raises(DataError, match="apt-get is not installed"):
        fetch_debian(PINNED, tmp_path / "to")
