"""`compt export`, the command: a job's folder, missing packages, and an upload to a stand-in of the Hub's HTTP API.

The stand-in takes the requests that huggingface_hub makes for files without LFS. It checks neither tokens nor quotas.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from compt.cli.main import app
from compt.errors import ArtefactError, ConfigError, RunError
from compt.export import formats
from compt.export.hub import push
from compt.weights.artefact import EXPORT_RECORD


class Hub(ThreadingHTTPServer):
    """Repositories of models: `made` has the bodies of requests for new ones, `files` what commits added."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._answer({"url": f"{self.server.address}/org/name"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/org/name/preupload/main":
            asked = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": one["path"], **how} for one in asked]})
        elif self.path == "/api/models/org/name/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            self._answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/org/name/commit/0"}
            )
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        path, _, name = self.path.partition("?")[0].partition("/resolve/main/")
        if path.startswith("/api/models/org/name/tree/main"):
            sizes = {name: len(data) for name, data in self.server.files.items()}
            entries = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self._answer(entries)
        elif name in self.server.files:
            self._send(self.server.files[name], {"ETag": '"1"', "X-Repo-Commit": "0" * 40})
        else:
            self._send(b"", {"X-Error-Code": "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def _answer(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *parts: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_command_writes_and_uploads_a_folder(
    models: dict[str, Path], tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "model").symlink_to(models["swin"])
    # What HF_ENDPOINT and HF_HUB_OFFLINE set; huggingface_hub reads both when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    files = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = tmp_path / "out"
    words = ["export", str(tmp_path / "job"), str(out), "--to", "timm", "--license", "mit"]
    done = CliRunner().invoke(app, [*words, "--push-to-hub", "org/name", "--private"])
    assert done.exception is None
    assert done.stdout.splitlines()[-2:] == [f"Wrote {out}", f"Pushed {hub.address}/org/name/commit/0"]
    (made,) = hub.made
    assert (made["organization"], made["name"]) == ("org", "name")
    assert made.get("private") is True or made.get("visibility") == "private"  # the API's older and newer word
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", EXPORT_RECORD} == hub.files.keys()
    assert hub.tokens == {"Bearer hf_secret"}
    hub.files["mine.txt"] = b"of the owner"
    words[2] = str(tmp_path / "other")
    assert CliRunner().invoke(app, [*words[:4], "open_clip", "--push-to-hub", "org/name"]).exception is None
    assert hub.files.keys() == {"mine.txt", *(path.name for path in (tmp_path / "other").iterdir())}
    assert "config.json" not in hub.files, "a program could take it for the new model's"
    assert 'create_model_and_transforms("hf-hub:org/name")' in hub.files["README.md"].decode()


def test_an_upload_that_fails_says_that_the_folder_is_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path} is written, but org/name could not be pushed: .*HF_HUB_OFFLINE"):
        push(tmp_path, "org/name", False)


@pytest.mark.parametrize("name", ["name", "org/name/more", "../name", "org/na me", ""])
def test_a_name_that_no_repository_has_is_refused_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    words = ["export", str(models["vit"]), str(tmp_path / "out"), "--push-to-hub", name]
    failed = CliRunner().invoke(app, words).exception
    assert isinstance(failed, ConfigError)
    assert "should be ORG/NAME" in str(failed)
    alone = CliRunner().invoke(app, [*words[:3], "--private"]).exception
    assert "--private is for the repository of --push-to-hub" in str(alone)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    failed = CliRunner().invoke(app, ["export", str(models["vit"]), str(tmp_path / "out"), "--to", "onnx"]).exception
    assert str(failed) == "--to onnx needs onnx and onnxscript: pip install onnx onnxscript"
    shown = CliRunner().invoke(app, ["export", str(models["vit"]), str(tmp_path / "out"), "--to", "onxx"])
    assert "did you mean 'onnx'?" in shown.output


def test_an_export_is_replaced_by_another_and_nothing_else_is(models: dict[str, Path], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for to in ("open_clip", "timm"):
        assert CliRunner().invoke(app, ["export", str(models["vit"]), out, "--to", to]).exception is None
    record = json.loads((tmp_path / "out" / EXPORT_RECORD).read_text())
    assert record["to"] == "timm"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {EXPORT_RECORD, *record["files"]}
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    failed = CliRunner().invoke(app, ["export", str(models["vit"]), out]).exception
    assert isinstance(failed, ArtefactError)
    assert "holds other files too" in str(failed)
