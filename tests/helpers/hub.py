"""A stand-in for Hugging Face's hub: what huggingface_hub asks of it to list and download a data set."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The data set `repository` with these files; those called .tar are large files, with a SHA-256.

    cut: names whose next download ends in the middle. sent: bytes sent of each file.
    """

    repository: str
    files: dict[str, bytes]
    cut: set[str] = field(default_factory=set)
    sent: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, code: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.startswith(f"/api/datasets/{hub.repository}/revision/"):
                    listed = {"id": hub.repository, "sha": COMMIT, "siblings": [*map(hub.listed, hub.files)]}
                    self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
                    return
                found = re.fullmatch(rf"/datasets/{hub.repository}/resolve/{COMMIT}/(.+)", path)
                if not found or found[1] not in hub.files:
                    self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
                    return
                name, body = found[1], hub.files[found[1]]
                headers = {"ETag": f'"{hub.tag(name)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
                first = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
                part, code = body[first:], 206 if first else 200
                if first:
                    headers["Content_Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                if self.command == "GET" and name in hub.cut:
                    hub.cut.discard(name)
                    part = part[: len(part) // 2]
                    self.close_connection = True
                    self.answer(code, part, len(body) - first, **headers)
                else:
                    self.answer(code, part, **headers)
                if self.command == "GET":
                    hub.sent[name] += len(part)

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def tag(self, name: str) -> str:
        content = self.files[name]
        if name.endswith(".tar"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def listed(self, name: str) -> dict[str, object]:
        size, tag = len(self.files[name]), self.tag(name)
        large = {"lfs": {"sha256": tag, "size": size, "pointerSize": 128}} if name.endswith(".tar") else {}
        return {"rfilename": name, "size": size, "blobId": tag[:40], **large}
