"""A small store of objects, with as much of S3 as s3fs asks for over a real connection: path style, no listings."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_EMPTY = b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"


class S3Server(ThreadingHTTPServer):
    """Its objects, by /bucket/key; `access_key`: who signs with another is refused."""

    daemon_threads = True

    def __init__(self, access_key: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.access_key = access_key
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: S3Server
    protocol_version = "HTTP/1.1"  # botocore waits for 100-continue before it sends an object

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._is_ours():
            self.server.objects[urlsplit(self.path).path] = body
            self._answer(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._is_ours():
            parts = urlsplit(self.path)
            found = _EMPTY if "list-type" in parts.query else self.server.objects.get(parts.path)
            self._answer(404) if found is None else self._answer(200, found)

    def _is_ours(self) -> bool:
        ours = f"Credential={self.server.access_key}/" in self.headers.get("Authorization", "")
        if not ours:
            self._answer(403)
        return ours

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"of no use"')
        self.send_header("Last-Modified", "Mon, 09 Mar 2026 12:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests have no use for the access log."""


@contextmanager
def s3_server(access_key: str = "a-key") -> Iterator[S3Server]:
    """A server on a free loopback port, for the time of a test."""
    with S3Server(access_key) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
