"""A proxy before the bucket of tests/bucket.py that misbehaves: busy, broken, cut short, late."""

import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import urlsplit

FAULTS = ("429", "503", "reset", "cut", "late")


@contextmanager
def faulty(share: float, seed: int = 0) -> Iterator[Counter[str]]:
    """Within the block, clients find the proxy in place of the bucket's server; yields how often it did what."""
    server = urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
    chance = random.Random(seed)
    done: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            with lock:
                fault = chance.choice(FAULTS) if chance.random() < share else "none"
                done[fault] += 1
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault in ("429", "503"):
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            if fault == "late":
                time.sleep(0.3)
            upstream = http.client.HTTPConnection(server.hostname or "", server.port, timeout=30)
            upstream.request(self.command, self.path, body, {**self.headers})
            answer = upstream.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(content)
            upstream.close()

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_port}"
        with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": url, "CLOUD_STORAGE_EMULATOR_ENDPOINT": url}):
            yield done
        proxy.shutdown()
