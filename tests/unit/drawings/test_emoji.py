"""The emoji data set: splits, labels, captions, and the same bytes twice."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compt.data.index import open_index
from compt.drawings import emoji
from compt.drawings.build import TRAIN_SHARDS, Concept, DrawingSet, lay_out, split
from compt.drawings.captions import CAPTIONS
from compt.drawings.emoji import TEST_STYLE, VALIDATION_STYLE
from compt.errors import DataError
from compt.files import read_json, sha256_file

EVALUATION = ("val_style", "test_style", "val_concepts", "test_concepts")


@pytest.fixture(scope="module")
def sample() -> DrawingSet:
    return emoji.read_sample()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emoji") / "set"
    assert emoji.build(out) == read_json(out / "manifest.json")
    return out


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


def test_the_data_are_those_of_the_committed_demo(root: Path, built: Path, tmp_path: Path) -> None:
    """Another way of reading shards would change its numbers, and no older run could be resumed."""
    index = open_index("train/*.tar", built, tmp_path)
    assert index.fingerprint == read_json(root / "docs" / "results" / "demo" / "run.json")["data_fingerprint"]
    assert index.counts == {16: len(index)}


def test_sample_holds_every_style_without_blank_drawings(sample: DrawingSet) -> None:
    assert list(sample.drawings) == list(emoji.table()["styles"])
    assert sum(len(drawings) for drawings in sample.drawings.values()) >= 5000
    for drawings in sample.drawings.values():
        for pixels in drawings.values():
            assert pixels.shape == (32, 32, 3)
            assert pixels.min() < 250


def test_captions_are_distinct_and_name_no_style(sample: DrawingSet) -> None:
    for concept in sample.concepts.values():
        assert len({caption.casefold() for caption in concept.captions}) == CAPTIONS
        assert concept.captions[0] == concept.name
        words = set(" ".join(concept.captions).casefold().split())
        assert not words & set(sample.drawings), concept
    names = Counter(concept.name.casefold() for concept in sample.concepts.values())
    assert max(names.values()) == 1


def test_splits_share_no_style_and_no_held_out_concept(sample: DrawingSet) -> None:
    folders = split(sample)
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


def test_shards_hold_what_the_manifest_says(built: Path, sample: DrawingSet) -> None:
    manifest = read_json(built / "manifest.json")
    assert manifest["sources"] == sample.sources
    for name, entry in manifest["splits"].items():
        folder, shards = built / name, entry["shards"]
        assert {path.name for path in folder.glob("*.tar")} == set(shards)
        assert all(sha256_file(folder / shard) == one["sha256"] for shard, one in shards.items())
        assert len(members(folder)) == entry["samples"] == sum(one["samples"] for one in shards.values())
    assert len(manifest["splits"]["train"]["shards"]) == TRAIN_SHARDS


def test_samples_decode_to_the_drawings(built: Path, sample: DrawingSet) -> None:
    for parts in members(built / "val_style").values():
        text = json.loads(parts["json"])
        with Image.open(io.BytesIO(parts["png"])) as image:
            assert np.array_equal(np.asarray(image), sample.drawings[text["style"]][text["concept"]])
        assert len(text["captions"]) == CAPTIONS


@pytest.mark.parametrize("name", EVALUATION)
def test_labels_lie_within_class_files(built: Path, name: str) -> None:
    folder = built / name
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


def test_building_again_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    emoji.build(tmp_path / "set")
    for first in sorted(built.rglob("*")):
        if first.is_file():
            assert first.read_bytes() == (tmp_path / "set" / first.relative_to(built)).read_bytes()


def test_the_bytes_are_those_that_published_results_were_measured_on(built: Path) -> None:
    """The manifest has the hash of every shard; beside it are the class files."""
    sha = hashlib.sha256()
    for path in sorted(built.rglob("*")):
        if path.suffix in (".txt", ".json"):
            sha.update(path.relative_to(built).as_posix().encode() + path.read_bytes())
    assert sha.hexdigest() == "367c66df0ed040563233eef3118fef9452e30f1055cbdf7af5cf6b19371f2e16"


def test_only_its_own_folder_is_replaced(tmp_path: Path, sample: DrawingSet) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="has other files in it"):
        emoji.build(other)
    assert (other / "thesis.txt").read_text() == "precious"
    few = emoji.emoji_set(32, sample.concepts, {"noto": dict(list(sample.drawings["noto"].items())[:20])})
    lay_out(few, tmp_path / "set", "sample")
    lay_out(few, tmp_path / "set", "sample")


def test_a_missing_sample_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none/concepts.json.gz: this file of the emoji sample is missing"):
        emoji.read_sample(tmp_path / "none")
