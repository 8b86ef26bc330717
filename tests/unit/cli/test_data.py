"""`compt data`: what the commands take from a recipe, and the cache of shards in object storage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from compt.cli.main import main
from compt.data import stores
from tests.helpers.optional import optional
from tests.helpers.recipe import IMAGES, write_recipe
from tests.helpers.shards import make_shards, sample, write_tar
from tests.helpers.store import Store

SHARDS = "s3://bucket/set/{000000..000003}.tar"


def data(*words: str) -> int:
    """The exit code of `compt data ...`."""
    try:
        main(lambda: ["data", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Four shards behind an S3 server; gives bytes that two of them fit into. The user's cache is in `default`."""
    optional("obstore", "remote")
    shards = make_shards(tmp_path / "store" / "bucket" / "set", IMAGES, 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPT_CACHE", str(tmp_path / "default"))
    stores.objects.cache_clear()
    with Store(tmp_path / "store") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield 2 * max(path.stat().st_size for path in shards)
    stores.objects.cache_clear()


def cached(folder: str) -> int:
    """Bytes of shards in a cache."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.tar"))


def test_check_downloads_into_the_cache_of_the_recipe(store: int) -> None:
    changes = ("evaluation=", f"data.train={SHARDS}", "data.cache_dir=named", f"data.cache_size={store}")
    words = ("check", "--recipe", str(write_recipe(Path("r.yaml"), *changes)), "--workers", "1")
    assert data(*words) == 0
    assert 0 < cached("named") <= store
    assert not Path("default").exists()
    assert data(*words, "--cache-dir", "other", "--cache-size", "1G") == 0
    assert cached("other") > store
    assert cached("named") <= store


@pytest.mark.parametrize(
    "words",
    [("check", SHARDS, "--workers", "1"), ("index", SHARDS), ("pack", SHARDS, "out")],
    ids=lambda words: words[0],
)
def test_the_cache_has_the_size_that_is_named(store: int, words: tuple[str, ...]) -> None:
    assert data(*words, "--cache-size", f"{store / 1000}k") == 0
    assert 0 < cached("default") <= store


@pytest.mark.parametrize(("size", "said"), [("5x", "whole number, or one with a suffix"), ("0", "greater than 0")])
def test_a_cache_size_that_is_none(size: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data("index", "0.tar", "--cache-size", size) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in error
    assert "Value error" not in error


def test_check_accepts_the_share_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "train", 18, 2)
    bad = [(name, b"broken" if name.endswith("png") else text) for at in "xy" for name, text in sample(at, 1)]
    write_tar(tmp_path / "train" / "9.tar", bad)
    monkeypatch.chdir(tmp_path)
    for share, more, code, judged_by in (
        ("0.2", (), 0, 0.2),
        ("0.05", (), 3, 0.05),
        ("0.05", ("train/*.tar", "--max-bad-share", "0.1"), 0, 0.1),
        ("0.2", ("--max-bad-share", "0"), 3, 0),
    ):
        recipe = write_recipe(tmp_path / "r.yaml", f"data.max_bad_share={share}")
        capsys.readouterr()
        assert data("check", *more, "--recipe", str(recipe), "--json") == code
        assert json.loads(capsys.readouterr().out)["max_bad_share"] == judged_by
    assert data("check", "train/*.tar") == 3


def test_check_takes_context_and_table_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "train", 18, 2)
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("key,caption\n000000000,a cat\n")
    changes = (
        "data.train=train/*.tar",
        "data.captions_csv=t.csv",
        "data.min_matched=0.01",
        "family.common={context_length: 5}",
    )
    recipe = str(write_recipe(tmp_path / "r.yaml", *changes))
    assert data("check", "--recipe", recipe) == 0
    assert "over 5 tokens" in capsys.readouterr().out
    assert data("check", "train/*.tar", "--recipe", recipe, "--context-length", "9") == 0
    assert "over 9 tokens" in capsys.readouterr().out
    # The default's own value is a wish, too.
    for words in ((), ("train/*.tar",)):
        capsys.readouterr()
        assert data("check", *words, "--recipe", recipe, "--min-matched", "0.5") == 3
        assert "it is 0.5" in " ".join(capsys.readouterr().err.split())
    assert data("check", "train/*.tar", "--context-length", "-5") == 2
