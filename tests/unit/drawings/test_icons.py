"""`compt.drawings.icons`: from packages of npm to the icon set."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from compt.drawings import icons
from compt.drawings.build import lay_out, split
from compt.errors import DataError
from compt.files import read_json
from tests.helpers.optional import optional

TRAIN, VALIDATION, TEST = "lucide", "fontisto", "carbon"
CIRCLE, BAR = '<circle cx="{0}" cy="8" r="5"/>', '<path d="M{0} 1h3v14h-3z"/>'


def package(path: Path, files: dict[str, Any]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def icon_set(prefix: str, icons: dict[str, str], licence: str = "MIT") -> dict[str, Any]:
    info = {"name": prefix.title(), "author": {"name": f"author of {prefix}"}, "license": {"spdx": licence}}
    return {"info": info, "icons": {name: {"body": body} for name, body in icons.items()}, "width": 16, "height": 16}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three sets that draw 'arrow left', 'moon', 'zebra' and 'home-2'; the validation set copies one drawing."""
    optional("resvg_py", "data")
    monkeypatch.setitem(icons.table(), "train", [[TRAIN]])
    monkeypatch.setitem(icons.table(), "validation", [[VALIDATION]])
    monkeypatch.setitem(icons.table(), "test", [[TEST]])
    monkeypatch.setattr(icons, "AUTHORS", 2)
    drawn = {
        TRAIN: {"arrow-left": CIRCLE.format(5), "moon": BAR.format(2), "home-2": CIRCLE.format(8)},
        VALIDATION: {"left-arrow": BAR.format(1), "moon": BAR.format(2), "moon-filled": CIRCLE.format(7)},
        TEST: {
            "arrow-left": BAR.format(10),
            "arrow-left-outline": CIRCLE.format(10),
            "arrow-left-filled": CIRCLE.format(11),
            "moon": BAR.format(9),
            "zebra": "",
            "alone": BAR.format(5),
        },
    }
    files = {f"json/{prefix}.json": icon_set(prefix, own) for prefix, own in drawn.items()}
    tabler = {"arrow-left": {"category": "Arrows", "tags": ["back", "go back", 7]}, "brand-moon": {"category": "Brand"}}
    mdi = [{"name": "arrow-left", "aliases": ["arrow-west"], "tags": ["Arrow"]}]
    return {
        "@iconify/json": package(tmp_path / "json.tgz", files),
        "lucide-static": package(tmp_path / "lucide.tgz", {"tags.json": {"moon": ["night"], "zebra": [], "alone": []}}),
        "@mdi/svg": package(tmp_path / "mdi.tgz", {"meta.json": mdi}),
        "@tabler/icons": package(tmp_path / "tabler.tgz", {"icons.json": tabler}),
    }


def test_names_lose_the_words_of_styles_and_icons_with_numbers_are_left_out() -> None:
    names = icons.Names([f"{word}-{size}-line" for word in ("home", "chart") for size in (16, 24)])
    assert names.words("chart-line-16-line") == ("chart",)
    assert names.words("chart-line-up-24-filled") == ("chart", "line", "up")
    assert names.words("line") == ("line",)
    assert names.words("home-02") == ("home",)
    assert names.words("home-2") == ()
    assert icons.Names(["chart-line", *["home"] * 99]).words("chart-line") == ("chart", "line")


def test_concepts_are_what_two_authors_draw_in_any_order_of_words(packages: dict[str, Path]) -> None:
    found = icons.read_packages(packages, 16)
    assert set(found.concepts) == {"arrow-left", "moon"}
    arrow = found.concepts["arrow-left"]
    assert (arrow.name, arrow.group) == ("arrow left", "Arrows")
    assert {"left arrow", "go back", "back", "arrow west", "arrows: arrow left"} <= set(arrow.captions)
    assert len(set(arrow.captions)) == 16
    assert "night" in found.concepts["moon"].captions


def test_styles_are_held_out_by_set_and_copies_are_dropped(packages: dict[str, Path]) -> None:
    found = icons.read_packages(packages, 16)
    assert found.drawings[TRAIN]["arrow-left"].shape == (16, 16, 3)
    assert found.validation == (VALIDATION, f"{VALIDATION}-2")
    assert found.test == (TEST, f"{TEST}-2")
    assert "moon" not in found.drawings[VALIDATION]
    assert found.dropped == {"same drawing as in a training set": 1}
    assert set(icons.read_packages(packages, 16, everything=True).test) == {TEST, f"{TEST}-2", f"{TEST}-3"}
    samples = split(found)
    assert {sample.style for sample in samples["train"]} == {TRAIN}
    assert not {sample.style for sample in samples["val_style"]} & {sample.style for sample in samples["test_style"]}


def test_the_shards_are_always_the_same_bytes(packages: dict[str, Path], tmp_path: Path) -> None:
    """The renderer is pinned by constraints.txt; another version may change edge pixels."""
    hashes = []
    for place in (tmp_path / "one", tmp_path / "two"):
        lay_out(icons.read_packages(packages, 16), place, "npm")
        shards = sorted(place.rglob("*.tar"))
        hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in shards])
    assert hashes[0] == hashes[1]
    manifest = read_json(tmp_path / "one" / "manifest.json")
    assert manifest["sources"]["styles"][TEST]["license"] == "MIT"
    assert manifest["splits"]["test_style"]["samples"] == 3
    assert manifest["splits"]["test_pairs"]["samples"] == 2


def test_an_unexpected_licence_and_a_missing_set_are_named(packages: dict[str, Path], tmp_path: Path) -> None:
    files = {f"json/{prefix}.json": icon_set(prefix, {}, "Proprietary") for prefix in (TRAIN, VALIDATION, TEST)}
    with pytest.raises(DataError, match="the licence of 'lucide' is Proprietary"):
        icons.read_packages({**packages, "@iconify/json": package(tmp_path / "other.tgz", files)}, 16)
    with pytest.raises(DataError, match="it lacks the set 'lucide'"):
        icons.read_packages({**packages, "@iconify/json": package(tmp_path / "none.tgz", {})}, 16)
