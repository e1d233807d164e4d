"""A stand-in for the Hugging Face hub: as much of its HTTP interface as models (down and up) and data sets take."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"
WRITER, READER = "hf_writer", "hf_reader"  # tokens
NO_TOKENS = "no tokens"  # as the address of a Xet store: the hub gives none for it


class Hub(ThreadingHTTPServer):
    """`repos`: files by repository (`datasets/NAME` those of a data set); `gated` are those that want terms accepted;
    `xet`: the address of the Xet store that is named for weights ('' for none; ours, `/cas`, knows no file);
    `asked`: every request, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.created: list[dict] = []
        self.xet = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def repository(path: str) -> tuple[str, list[str]]:
    """Its name, and what of it is asked for."""
    parts = path.removeprefix("/api").strip("/").split("/")
    kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
    return "/".join([*(["datasets"] if kind == "datasets" else []), *parts[:2]]), parts[2:]


def entries(files: dict[str, bytes]) -> list[dict]:
    oids = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
    return [{"type": "file", "path": file, "size": len(c), "oid": oids[file]} for file, c in files.items()]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None: ...

    def answer(self, status: int, body: bytes | dict | list, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        if path.startswith(("/cas", "/v1/", "/v2/")):
            return self.answer(404, {"error": "not found"})
        name, what = repository(path)
        if what[:1] == ["xet-read-token"]:
            if self.server.xet == NO_TOKENS:
                return self.refuse(404, "EntryNotFound")
            token = {"X_Xet_Access_Token": "x", "X_Xet_Token_Expiration": "9999999999"}
            return self.answer(200, {}, X_Xet_Cas_Url=self.server.xet, **token)
        if name not in self.server.repos:
            return self.refuse(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
        if name in self.server.gated:
            return self.refuse(403, "GatedRepo")
        files = self.server.repos[name]
        if what and what[1] not in ("main", "v1", SHA):
            return self.refuse(404, "RevisionNotFound")
        if what[:1] in ([], ["revision"]):
            return self.answer(200, {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]})
        if what[0] == "tree":
            return self.answer(200, entries(files)) if len(what) == 2 else self.refuse(404, "EntryNotFound")
        content = files.get("/".join(what[2:]))
        if content is None:
            return self.refuse(404, "EntryNotFound")
        named = {"X_Repo_Commit": SHA, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        if self.server.xet and what[-1].endswith(".safetensors"):
            named["X_Xet_Hash"] = hashlib.sha256(content).hexdigest()
            named["X_Xet_Refresh_Route"] = f"{self.server.url}/api/models/{name}/xet-read-token/{SHA}"
        if (wanted := self.headers.get("Range")) is None:
            return self.answer(200, content, **named)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        end = int(first) + len(part) - 1
        return self.answer(206, part, Content_Range=f"bytes {first}-{end}/{len(content)}", **named)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path = urlparse(self.path).path
        self.server.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/paths-info/" in path:
            name, _ = repository(path)
            wanted = json.loads(body)["paths"]
            return self.answer(200, [entry for entry in entries(self.server.repos[name]) if entry["path"] in wanted])
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {WRITER}":
            return self.refuse(403, "Forbidden")
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.server.created.append(wanted)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.server.repos.setdefault(name, {})
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer(200, {"files": modes})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = {"commitUrl": f"{self.server.url}/{name}/commit/{SHA}", "commitOid": SHA, "success": True}
        return self.answer(200, commit)
