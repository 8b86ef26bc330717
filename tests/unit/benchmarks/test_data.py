"""The measurement of decoders and loaders: its photographs, every way that it compares, and what it reports."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.data import decoding, photos, pipelines, process, study
from compt.errors import DataError
from tests.helpers.optional import optional

EXTRAS = {"nvidia.dali": "dali-cuda13", "webdataset": "dev", "open_clip_train": "dev"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for at, size in enumerate(((600, 520), (300, 900))):
        noise = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        noise.save(folder / f"{at}.JPG", "JPEG", quality=95)
    Image.new("RGB", (64, 64)).save(folder / "icon.jpg")
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "tars"
    photos.make(source, folder, images=40, shards=2)
    return folder


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {f"{path.name}/{each.name}": tar.extractfile(each).read() for each in tar}
    return found


def test_the_photographs(tmp_path: Path, source: Path, tars: Path) -> None:
    made = members(tars)
    assert len(made) == 80
    images = [Image.open(io.BytesIO(data)) for name, data in made.items() if name.endswith(".jpg")]
    assert {min(image.size) for image in images} <= set(photos.SHORT_SIDES)
    assert len({image.size for image in images}) > 4
    captions = [data.decode().split() for name, data in made.items() if name.endswith(".txt")]
    assert all(5 <= len(words) <= 16 for words in captions)
    photos.make(source, tmp_path / "again", images=40, shards=2)
    assert members(tmp_path / "again") == made
    with pytest.raises(DataError, match="has no photographs"):
        photos.make(tmp_path / "again", tmp_path / "other", images=2, shards=1)


@pytest.mark.parametrize("way", decoding.WAYS)
def test_a_way_of_decoding(tars: Path, way: str) -> None:
    if way.endswith("dali"):
        optional("nvidia.dali", "dali-cuda13")
    images = decoding.Images(tars, 4)
    found = {side: images.of(side) for side in photos.SHORT_SIDES}
    assert sum(map(len, found.values())) > 8
    side, datas = max(found.items(), key=lambda each: len(each[1]))
    assert min(Image.open(io.BytesIO(datas[0])).size) == side
    pixels = decoding.WAYS[way](32, (0.9, 1.0))(datas)
    assert (pixels[0] if isinstance(pixels, tuple) else pixels).shape == (len(datas), 3, 32, 32)
    measured = decoding.measure(way, datas, 32, (0.08, 1.0))
    assert measured["images"] == len(datas)
    assert measured["cpu_seconds"] > 0


@pytest.mark.parametrize("way", [way for way in pipelines.WAYS if not way.endswith(pipelines.ON_GPU)])
def test_a_loader(tars: Path, tmp_path: Path, way: str) -> None:
    if lacks := pipelines.lacking(way):
        optional(lacks, EXTRAS[lacks])
    pipelines.unpack(tars, tmp_path / "files")
    values = {"tars": str(tars), "files": str(tmp_path / "files"), "batch": 4, "size": 32, "seconds": 0.01}
    found = process.run_loader(way, values, process.memory_bytes())
    assert found["images"] >= 4
    assert found["first_seconds"] > 0
    batch = next(pipelines.WAYS[way](pipelines.Given(tars, tmp_path / "files", 4, 32)))
    images, tokens = (batch.images, batch.tokens[:, 0]) if hasattr(batch, "images") else batch
    assert images.shape == (4, 3, 32, 32)
    assert len(set(map(tuple, tokens.tolist()))) == 4  # each image has its caption
    assert tokens[:, 0].tolist() == [49406] * 4


def row(way: str, repeat: int, images: int, cpu: float, **more: Any) -> dict[str, Any]:
    return {"way": way, "repeat": repeat, "images": images, "cpu_seconds": cpu, "seconds": 2 * cpu, **more}


def test_the_report_compares_within_a_repeat() -> None:
    more = {"size": 64, "first_seconds": 0.5, "memory_bytes": 5e6}
    rows = [row(pipelines.OPENCLIP, at, 100, 1.0 + at, **more) for at in range(3)]
    rows += [row("compt, torch, 1 worker", at, 300 + 30 * at, 1.0 + at, **more) for at in range(3)]
    shown = study.loader_table(rows, 64).rows
    assert shown[0] == (pipelines.OPENCLIP, "50 (33 to 100)", "1.00 (1.00 to 1.00)", "25", "0.50", "5")
    assert shown[1][2] == "3.30 (3.00 to 3.60)"
    assert study.findings(rows)[0].startswith("At 64 pixels compt, torch, 1 worker makes 3.30 times OpenCLIP's")
    alone = study.loader_table(rows[3:], 64).rows
    assert alone[0][2] == "-"
    assert study.findings(rows[3:]) == []


@pytest.mark.full
def test_the_command(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {way: pipelines.WAYS[way] for way in (pipelines.OPENCLIP, "compt, torch, 1 worker")}
    monkeypatch.setattr(pipelines, "WAYS", few)
    quick = ("--repeats", "1", "--seconds", "0.01", "--batch", "4", "--decoded", "2")
    study.main([str(tars), *quick, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "data" / "result.json").read_text())
    assert {each["way"] for each in result["loaders"]} == set(few)
    assert len(result["decoding"]) >= 5 * len(decoding.SETTINGS)
    assert result["about"][0]["images"] == 40
    assert "Whole loaders at 224 pixels" in (tmp_path / "data" / "table.md").read_text()
