"""What img2dataset 1.47.0 really writes (tests/fixtures/img2dataset), from its folder to batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compt.data.check import check
from compt.data.index import open_index
from compt.data.loaders import train_loader
from compt.data.pack import pack
from compt.data.samples import SampleReader
from compt.data.sources import PackOptions
from compt.data.tokens import CaptionTokens

CUT = ["The first sentence {}", "The second one, 3", "5 m long", "A third"]


@pytest.fixture
def made(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "tests" / "fixtures" / "img2dataset", tmp_path / "made")


def captions_of(folder: Path) -> dict[str, list[str]]:
    index = open_index(str(folder), Path())
    reader = SampleReader(index)
    return {index.key(at): reader.captions(index.entry(at)).texts for at in range(len(index))}


def test_a_folder_with_its_parquet_files_is_read(made: Path) -> None:
    report = check(str(made / "captions"), Path())
    assert report.title(0) == "Every sample can be used"
    assert report.account.unused == {"no_shard": 2}
    # Two of the four downloads of this shard failed, so keys have gaps, and are in the order of the downloads.
    assert captions_of(made / "captions") == {
        "000011": ['a photo of number 5 , with "quotes"'],
        "000010": ['a photo of number 4 , with "quotes"'],
    }


def test_its_parquet_file_is_a_table_of_captions(made: Path) -> None:
    from pyarrow import parquet

    table = made / "captions" / "00001.parquet"
    statuses = parquet.read_table(table)["status"].to_pylist()
    assert sorted(statuses) == ["failed_to_download", "failed_to_resize", "success", "success"]
    index = open_index(str(made / "captions"), Path(), captions_csv=table)
    assert index.account.used["join"] == 2
    assert index.account.unused["row_alone"] == 2


def test_additional_columns_are_dreamlip_s(made: Path) -> None:
    report = check(str(made / "columns"), Path())
    assert report.found.columns == {"caption": 4, "shortIB_captions": 4, "longIB_captions": 12}
    pack(str(made / "columns"), made / "out", Path(), PackOptions(keep="sentences", shard_size=3))
    found = captions_of(made / "out")
    assert found == {
        f"00000{at}": [f"raw {at}", f"short {at}", *(part.format(at) for part in CUT)] for at in (0, 1, 2, 3)
    }
    loader = train_loader(
        open_index(str(made / "out"), Path()),
        seed=0,
        batch=4,
        image_size=32,
        captions=6,
        context_length=20,
        start_step=0,
        total_steps=1,
    )
    (batch,) = list(loader)
    ids = CaptionTokens(20)
    for key, tokens in zip(batch.keys, batch.tokens, strict=True):
        rows = sorted([token for token in row.tolist() if token] for row in tokens)
        assert rows == sorted(ids.ids(text).tolist() for text in found[key])


def test_the_table_is_merged_by_url(made: Path) -> None:
    options = PackOptions(made / "table.csv", keep="sentences")
    packed = pack(str(made / "captions"), made / "out", Path(), options)
    assert packed.account.used["by URL"] == 2
    assert captions_of(made / "out") == {
        f"00001{at - 4}": [f"raw {at}", f"short {at}", *(part.format(at) for part in CUT)] for at in (4, 5)
    }
    report = json.loads(json.dumps(check(str(made / "out"), Path()).to_json(0)))
    assert report["captions_by_column"] == {"raw_caption": 2, "shortIB_captions": 2, "longIB_captions": 8}
