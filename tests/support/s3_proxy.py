"""What stands between s3fs and the server: it counts every request, and lets chosen ones go wrong."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

_HOP = frozenset({"connection", "transfer-encoding", "keep-alive"})


class Request(NamedTuple):
    """A request as the server gets it; ``sent`` are the bytes of the answer's body."""

    kind: str
    path: str
    sent: int


@dataclass
class Fault:
    """Something that goes wrong ``times`` times (-1: always), from the request after ``skip`` such ones on."""

    kind: str
    path: str
    what: Literal["503", "drop", "slow", "cut"]
    times: int = -1
    skip: int = 0
    met: int = 0

    def meets(self, kind: str, path: str) -> bool:
        if self.kind not in ("*", kind) or self.path not in path:
            return False
        self.met += 1
        return self.met > self.skip and (self.times < 0 or self.met <= self.skip + self.times)


@dataclass
class Proxy:
    """A proxy before the server's port."""

    server: int
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        proxy = self

        class Handler(_Handler):
            behind = proxy

        serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        serving.daemon_threads = True
        self.port = serving.server_port
        threading.Thread(target=serving.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def counted(self) -> Iterator[list[Request]]:
        """Note the requests that are made meanwhile."""
        with self._lock:
            self.requests.clear()
        noted: list[Request] = []
        yield noted
        with self._lock:
            noted += self.requests

    @contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        """Let something go wrong meanwhile."""
        self.faults = list(faults)
        try:
            yield
        finally:
            self.faults = []

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def fault(self, kind: str, path: str) -> Fault | None:
        with self._lock:
            return next((fault for fault in self.faults if fault.meets(kind, path)), None)


def kinds(requests: list[Request]) -> dict[str, int]:
    """Return how many of each kind there are."""
    return dict(Counter(request.kind for request in requests))


class _Handler(BaseHTTPRequestHandler):
    behind: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def handle_expect_100(self) -> bool:
        """Say at once that the body may come; whoever waits for that would wait for ever."""
        told = super().handle_expect_100()
        self.wfile.flush()
        return told

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        kind, path = _kind(self.command, self.path, self.headers), unquote(urlsplit(self.path).path)
        body = self._body()
        fault = self.behind.fault(kind, path)
        if fault is not None and fault.what == "slow":
            time.sleep(0.3)
        if fault is not None and fault.what == "503":
            self.behind.note(Request(kind, path, 0))
            self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Please reduce</Message></Error>")
            return
        if fault is not None and fault.what == "drop":
            self.behind.note(Request(kind, path, 0))
            self.close_connection = True
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.behind.server, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        given = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        connection.close()
        self.behind.note(Request(kind, path, len(data)))
        if fault is not None and fault.what == "cut":
            given["Content-Length"] = str(len(data))
            self._answer(answer.status, given, data[: len(data) // 2])
            self.close_connection = True
            return
        if self.command != "HEAD":
            given["Content-Length"] = str(len(data))
        self._answer(answer.status, given, data)

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815


def _kind(method: str, url: str, headers: Any) -> str:
    """Return what S3 calls a request."""
    parts = urlsplit(url)
    query, inside = parse_qs(parts.query, keep_blank_values=True), parts.path.strip("/").count("/") > 0
    if method == "GET":
        return "GET" if inside else "LIST"
    if "uploads" in query:
        return "CREATE"
    if "uploadId" in query:
        return {"PUT": "PART", "POST": "COMPLETE", "DELETE": "ABORT"}[method]
    if method == "PUT" and headers.get("x-amz-copy-source"):
        return "COPY"
    return method
