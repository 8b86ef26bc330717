"""A store of objects over a socket, with faults: a folder as S3 and plain HTTP, or a proxy before an S3 server."""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter, defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "AKIATESTSTORE"
CODES = {
    "301": "PermanentRedirect",
    "400": "ExpiredToken",
    "403": "AccessDenied",
    "404": "NoSuchBucket",
    "501": "Not\x1b[31mImplemented",
    "503": "SlowDown",
}
"""What a body says for each status."""


class Store(ThreadingHTTPServer):
    """Answers for `folder/BUCKET/KEY`, or for the server at `upstream` (host, port).

    faults: for each name of an object, what happens to its next GETs: a status of `CODES`, "reset" (before the answer),
    "cut" (a reset in the middle), "short" (a clean end in the middle), "slow", "stall", "whole" (no range). An empty
    string is no fault. A list has the name of the bucket. gets: GETs of each name, answered or not. heads: other
    questions. sent: bytes of bodies of each name. authorized: headers with credentials. tags: whether answers have
    ETags.
    """

    daemon_threads = True

    def __init__(self, folder: Path | None = None, upstream: tuple[str, int] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.upstream = folder, upstream
        self.faults: dict[str, deque[str]] = defaultdict(deque)
        self.gets: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.stall, self.tags = 3.0, True
        self.authorized: set[str] = set()
        self.count = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""

    def __enter__(self) -> Store:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, key: str = KEY) -> dict[str, str]:
        """What an S3 client needs to come here."""
        secret = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": "topsecret", "AWS_REGION": "us-east-1"}
        return {**secret, "AWS_ENDPOINT_URL": self.url, "AWS_EC2_METADATA_DISABLED": "true"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).rpartition("/")[2]
        fault = ""
        self.server.authorized.add(self.headers.get("Authorization", ""))
        with self.server.count:
            if self.command == "GET":
                self.server.gets[name] += 1
                fault = self.server.faults[name].popleft() if self.server.faults[name] else ""
            else:
                self.server.heads[name] += 1
        if fault == "whole":
            del self.headers["Range"]
            fault = ""
        if fault in CODES:
            self._send(int(fault), {}, f"<Error><Code>{CODES[fault]}</Code></Error>".encode())
        elif fault == "reset":
            self._reset()
        else:
            self._send(*(self._forwarded() if self.server.upstream else self._own()), fault=fault)

    do_HEAD = do_GET

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        self.send_response(status)
        for field, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(field, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        name = urllib.parse.unquote(self.path.partition("?")[0]).rpartition("/")[2]
        half = len(body) // 2 if fault else len(body)
        self.wfile.write(body[:half])
        self.server.sent[name] += half
        if fault in ("cut", "short"):
            time.sleep(0.05)  # else the reset overtakes what was sent
            self._reset(hard=fault == "cut")
        elif fault:
            time.sleep(self.server.stall if fault == "stall" else 0.3)
            self.wfile.write(body[half:])
            self.server.sent[name] += len(body) - half

    def _reset(self, hard: bool = True) -> None:
        self.close_connection = True
        if hard:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def _forwarded(self) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=30)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        answer = upstream.getresponse()
        kept = {
            field: value
            for field, value in answer.getheaders()
            if field.lower() not in ("date", "server", "connection", "transfer-encoding")
        }
        return answer.status, kept, answer.read()

    def _own(self) -> tuple[int, dict[str, str], bytes]:
        parts = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parts.query)
        signed = self.headers.get("Authorization", "")
        if signed.startswith("AWS4") and f"Credential={KEY}/" not in signed:
            return 403, {}, b"<Error><Code>InvalidAccessKeyId</Code></Error>"
        path = self.server.folder / urllib.parse.unquote(parts.path).strip("/")
        if "list-type" in query:
            return 200, {}, self._listing(path, query.get("prefix", [""])[0])
        if not path.is_file():
            return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
        data = path.read_bytes()
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"Last-Modified": self.date_time_string(path.stat().st_mtime), "Accept-Ranges": "bytes"}
        headers |= {"ETag": tag} if self.server.tags else {}
        if self.headers.get("If-Match", tag) != tag:
            return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or len(data) - 1)
            return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]
        return 200, headers, data

    def _listing(self, bucket: Path, prefix: str) -> bytes:
        rows = "".join(
            f"<Contents><Key>{path.relative_to(bucket)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{hashlib.md5(path.read_bytes()).hexdigest()}&quot;</ETag><Size>{path.stat().st_size}</Size></Contents>"
            for path in sorted(bucket.rglob("*"))
            if path.is_file() and str(path.relative_to(bucket)).startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
