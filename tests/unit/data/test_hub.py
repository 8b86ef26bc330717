"""Evaluation sets from the hub: files compared with its hashes, downloads that go on, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compt.cli.main import app
from compt.data.hub import fetch_set, missing_files
from compt.errors import DataError
from compt.evaluate.task import EvalSettings, open_data
from compt.models.preprocess import Preprocess
from compt.recipe.schema import EvalSet
from tests.helpers.hub import COMMIT, Hub
from tests.helpers.shards import make_shards

NAME = "clip-benchmark/wds_things"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    shards = make_shards(tmp_path / "there", n=6, shards=2, classes=2)
    files = {f"test/{at}.tar": path.read_bytes() for at, path in enumerate(shards)}
    files |= {"test/nshards.txt": b"2\n", "classnames.txt": b"cat\ndog\n", "train/0.tar": b"not needed"}
    files |= {"README.md": b"about", "../outside.txt": b"no"}
    with Hub(NAME, files) as made:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield made


def test_a_set_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "eval" / "wds_things"
    found = fetch_set(NAME, folder)
    wanted = {"test/0.tar", "test/1.tar", "test/nshards.txt", "classnames.txt"}
    assert (found.files, found.commit, found.state) == (4, COMMIT, "4 downloaded")
    assert found.bytes == sum(len(hub.files[name]) for name in wanted)
    assert {name: (folder / name).read_bytes() for name in wanted} == {name: hub.files[name] for name in wanted}
    assert set(hub.sent) == wanted
    before = dict(hub.sent)
    assert fetch_set(NAME, folder).state == "all there"
    # A file of the right size with another content is noticed by its time, and fetched again.
    (folder / "test" / "1.tar").write_bytes(b"x" * len(hub.files["test/1.tar"]))
    assert fetch_set(NAME, folder).state == "1 downloaded"
    assert {name for name in wanted if hub.sent[name] != before[name]} == {"test/1.tar"}


def test_a_download_that_breaks_off_goes_on(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut.add("test/1.tar")
    fetch_set(NAME, tmp_path / "set")
    assert (tmp_path / "set" / "test" / "1.tar").read_bytes() == hub.files["test/1.tar"]
    assert hub.sent["test/1.tar"] == len(hub.files["test/1.tar"])  # no byte twice
    assert hub.sent["test/0.tar"] == len(hub.files["test/0.tar"])


def test_a_set_that_is_half_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.files["test/0.tar"], whole = hub.files["test/0.tar"][:-1], hub.files["test/0.tar"]
    listed, hub.listed = (
        hub.listed,
        lambda name: (
            Hub.listed(hub, name)
            | {  # type: ignore[method-assign]
                "lfs": {"sha256": "0" * 64, "size": 1, "pointerSize": 1}
            }
            if name == "test/0.tar"
            else Hub.listed(hub, name)
        ),
    )
    folder = tmp_path / "set"
    with pytest.raises(DataError, match="has the hash"):
        fetch_set(NAME, folder)
    assert "test/0.tar" in missing_files(folder)
    make_shards(folder / "test", n=2, shards=1, classes=2)
    settings = EvalSettings(Preprocess(), tmp_path)
    with pytest.raises(DataError, match="files are not downloaded yet, such as .*: run `compt eval fetch` again"):
        open_data(EvalSet(name="half", data=["set/test/*.tar"]), settings, label="cls")
    shutil.rmtree(folder / "test")
    hub.files["test/0.tar"], hub.listed = whole, listed  # type: ignore[method-assign]
    fetch_set(NAME, folder)
    assert missing_files(folder) == []
    assert missing_files(tmp_path) == []
    with pytest.raises(DataError, match=f"was downloaded at commit {COMMIT[:12]}, not at v2"):
        fetch_set(NAME, folder, "v2")


def test_another_content_than_the_hub_says_is_refused(hub: Hub, tmp_path: Path) -> None:
    right = hub.files["test/0.tar"]
    true_tag = hub.tag("test/0.tar")
    hub.files["test/0.tar"] = right[:-1] + b"x"
    hub.listed = lambda name: (
        Hub.listed(hub, name)
        | (  # type: ignore[method-assign]
            {"lfs": {"sha256": true_tag, "size": len(right), "pointerSize": 1}} if name == "test/0.tar" else {}
        )
    )
    with pytest.raises(DataError, match=rf"0.tar: has the hash .*, but the hub says {true_tag}"):
        fetch_set(NAME, tmp_path / "set")
    assert not (tmp_path / "set" / "test" / "0.tar").exists()


def test_what_cannot_be_fetched_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="^nobody/nothing: cannot be downloaded .*[^\n]$"):
        fetch_set("nobody/nothing", tmp_path / "set")
    fetch_set(NAME, tmp_path / "set")
    with pytest.raises(DataError, match="holds clip-benchmark/wds_things, not nobody/nothing"):
        fetch_set("nobody/nothing", tmp_path / "set")
    (tmp_path / "set" / "fetched.json").write_text("{")
    with pytest.raises(DataError, match="fetched.json: cannot be read"):
        fetch_set(NAME, tmp_path / "set")
    hub.files = {"README.md": b"about"}
    with pytest.raises(DataError, match="has no shards test"):
        fetch_set(NAME, tmp_path / "other")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch_set(NAME, tmp_path / "third")


def test_the_command_and_a_suite_of_what_it_fetched(hub: Hub, tmp_path: Path) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text("hub: clip-benchmark/wds_{name}\nsets: [{name: things}, {name: here, data: x/*.tar}]\n")
    done = CliRunner().invoke(app, ["eval", "fetch", str(suite), str(tmp_path / "eval")])
    assert done.exit_code == 0, done.output
    assert f"things: 4 files, 0.0 MB, commit {COMMIT[:12]}: 4 downloaded\nhere: not from the hub\n" == done.output
    suite.write_text("hub: clip-benchmark/wds_{name}\nsets: [{name: gone}, {name: things}]\n")
    done = CliRunner().invoke(app, ["eval", "fetch", str(suite), str(tmp_path / "eval")])
    assert isinstance(done.exception, DataError)
    assert "1 sets were not downloaded" in str(done.exception)
    assert "things: 4 files" in done.output
    assert json.loads((tmp_path / "eval" / "wds_things" / "fetched.json").read_text())["repository"] == NAME


def test_fetch_goes_on_after_a_failure_and_names_all(hub: Hub, tmp_path: Path) -> None:
    sets = [{"name": name, "hub": place} for name, place in (("a", "no/one"), ("b", NAME), ("c", "no/two"))]
    (tmp_path / "s.yaml").write_text(json.dumps({"sets": sets}))
    done = CliRunner().invoke(app, ["eval", "fetch", str(tmp_path / "s.yaml"), str(tmp_path / "eval")])
    assert isinstance(done.exception, DataError)
    first, *named = str(done.exception).splitlines()
    assert first == "2 sets were not downloaded; the same command goes on with them:"
    assert [line.split(" cannot")[0] for line in named] == ["  a: no/one:", "  c: no/two:"]
    assert missing_files(tmp_path / "eval" / NAME.rpartition("/")[2]) == []
