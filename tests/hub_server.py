"""A small stand-in for the Hugging Face hub on 127.0.0.1: HEAD and GET of /{repo}/resolve/{revision}/{file}."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Send = Callable[["Handler", bytes], None]


def send_all(handler: "Handler", body: bytes) -> None:
    """A healthy connection."""
    handler.write(body)


def send_half_and_break(handler: "Handler", body: bytes) -> None:
    """The connection breaks in the middle of the body."""
    handler.write(body[: len(body) // 2])


def send_slowly(handler: "Handler", body: bytes) -> None:
    """A thin line: twelve pieces with a pause of a tenth of a second before each."""
    step = -(-len(body) // 12)
    for start in range(0, len(body), step):
        handler.hub.released.wait(0.1)
        handler.write(body[start : start + step])


def send_half_and_stall(handler: "Handler", body: bytes) -> None:
    """The line stays open, but nothing more comes; it is let go when the server closes."""
    handler.write(body[: len(body) // 2])
    handler.hub.released.wait()


def send_damaged(handler: "Handler", body: bytes) -> None:
    """As many bytes as promised, one of them wrong."""
    handler.write(body[:-1] + bytes([body[-1] ^ 1]))


@dataclass
class Hub:
    """What is served, how, and what was asked for."""

    files: dict[str, bytes]
    """by repo/filename"""
    plan: list[Send] = field(default_factory=list)
    """how to send the next weights, one entry a request; then healthily"""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, file name, Range header)"""
    sent: int = 0
    """bytes of safetensors files sent"""
    endpoint: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def gets(self, filename: str) -> list[str | None]:
        """The Range headers of all GET requests for a file, None for the whole."""
        return [ranged for method, name, ranged in self.requests if method == "GET" and name == filename]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        match = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/([^?]+)", self.path)
        filename = match[2] if match else self.path
        self.hub.requests.append((method, filename, self.headers.get("Range")))
        body = self.hub.files.get(f"{match[1]}/{filename}") if match else None
        if body is None:
            known = match is not None and any(key.startswith(f"{match[1]}/") for key in self.hub.files)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        large = filename.endswith(".safetensors")
        digest = hashlib.sha256(body).hexdigest() if large else hashlib.sha1(body).hexdigest()
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if large:
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        if method == "GET" and large:
            send = self.hub.plan.pop(0) if self.hub.plan else send_all
            send(self, body[start:])
        elif method == "GET":
            self.wfile.write(body[start:])

    def write(self, data: bytes) -> None:
        self.hub.sent += len(data)  # before the client can have it, so that a test never reads too small a number
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the test reads `Hub.requests`."""


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve repo/filename -> bytes on a free port of the loopback until the block ends."""
    hub = Hub(files)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def folder_as_repo(repo: str, folder: Path) -> dict[str, bytes]:
    """The files of a folder as `serve` takes them."""
    return {f"{repo}/{path.name}": path.read_bytes() for path in folder.iterdir()}
