"""Proxies before the bucket of `bucket.py`: busy, broken, cut short, late, damaged; and one that refuses."""

import http.client
import json
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import SplitResult, unquote, urlsplit

FAULTS = ("429", "503", "reset", "cut", "late")
FLIPPED = "flipped"  # a bit of what is read
_ADDRESSES = ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "TENSORSTORE_GCS_HTTP_URL")


@contextmanager
def faulty(share: float, seed: int = 0, faults: Sequence[str] = FAULTS) -> Iterator[Counter[str]]:
    """Within the block, clients find the proxy in place of the bucket's server; yields how often it did what."""
    server = urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
    chance = random.Random(seed)
    done: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            with lock:
                fault = chance.choice(faults) if chance.random() < share else "none"
                done[fault] += 1
                bit = chance.getrandbits(30)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault in ("429", "503"):
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "reset":
                _reset(self)
                return
            if fault == "late":
                time.sleep(0.3)
            answer, content = _ask(server, self, body)
            if fault == FLIPPED and content:
                changed = bytearray(content)
                changed[bit // 8 % len(content)] ^= 1 << bit % 8
                content = bytes(changed)
            kept = len(content) // 2 if fault == "cut" else len(content)
            _pass_on(self, answer, content, kept)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with _in_place_of_the_bucket(Handler):
        yield done


@contextmanager
def refusing(status: int, path: str = "/") -> Iterator[Counter[str]]:
    """Within the block, what stands under `path` is refused as GCS does; yields how often it was asked for."""
    server = urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
    asked: Counter[str] = Counter()
    why = {401: "Anonymous caller does not have storage.objects.list access", 403: "Permission 'storage' denied"}[
        status
    ]
    error = {"code": status, "message": why, "errors": [{"message": why, "domain": "global", "reason": "forbidden"}]}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found, content = status, json.dumps({"error": error}).encode()
            if path in unquote(self.path):
                asked[unquote(self.path)] += 1
            else:
                answer, content = _ask(server, self, body)
                found = answer.status
            self.send_response(found)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with _in_place_of_the_bucket(Handler):
        yield asked


@contextmanager
def dying(part: str) -> Iterator[None]:
    """Within the block the bucket's server resets all connections from the first request on with `part` in its path."""
    server = urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
    is_dead = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if part in unquote(self.path):
                is_dead.set()
            if is_dead.is_set():
                _reset(self)
                return
            answer, content = _ask(server, self, body)
            _pass_on(self, answer, content)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with _in_place_of_the_bucket(Handler):
        yield


@contextmanager
def silent() -> Iterator[None]:
    """Within the block the bucket's server takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with mock.patch.dict(os.environ, dict.fromkeys(_ADDRESSES, url)):
            yield


def _reset(asked: BaseHTTPRequestHandler) -> None:
    asked.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    asked.close_connection = True
    asked.connection.close()


def _pass_on(
    asked: BaseHTTPRequestHandler, answer: http.client.HTTPResponse, content: bytes, kept: int | None = None
) -> None:
    """The answer's status and headers, and its content or the first `kept` bytes of it."""
    asked.send_response(answer.status)
    for name, value in answer.getheaders():
        if name.lower() not in ("transfer-encoding", "content-length", "connection"):
            asked.send_header(name, value)
    asked.send_header("Content-Length", str(len(content)))
    asked.end_headers()
    asked.wfile.write(content[:kept])
    if kept is not None and kept < len(content):
        asked.wfile.flush()
        asked.close_connection = True
        asked.connection.close()


def _ask(server: SplitResult, asked: BaseHTTPRequestHandler, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
    """What the bucket's server answers to a request that came here, and the content of that answer."""
    upstream = http.client.HTTPConnection(server.hostname or "", server.port, timeout=30)
    upstream.request(asked.command, asked.path, body, {**asked.headers})
    answer = upstream.getresponse()
    content = answer.read()
    upstream.close()
    return answer, content


@contextmanager
def _in_place_of_the_bucket(handler: type[BaseHTTPRequestHandler]) -> Iterator[None]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_port}"
        with mock.patch.dict(os.environ, dict.fromkeys(_ADDRESSES, url)):
            yield
        proxy.shutdown()
