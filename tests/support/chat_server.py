"""A real HTTP server that speaks chat completions, and can be told to misbehave."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | dict[str, Any]
Answer = Callable[[dict[str, Any], int], Reply]


@dataclass
class ChatServer:
    """`answer(request, how often this was asked)` gives text, or a dict of what to do instead:

    `status`: refuse with it, `error` being what is said; `text`; `model`: another name; `reasoning`: in its own field;
    `message`: fields of the message, or of the first delta, besides the text; `cut`: stop the stream without an end;
    `broken`: close the connection within a chunk; `nothing`: 200 with no body; `raw`: this body; `drips`: nothing but
    comments, so many seconds apart; `reason`: of finishing.
    """

    answer: Answer
    streams: bool = True
    models: tuple[str, ...] = ("tiny",)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply_to(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            key = json.dumps(request["messages"]) + str(request.get("seed"))
            asked = sum(json.dumps(one["messages"]) + str(one.get("seed")) == key for one in self.requests)
            self.requests.append(request)
        reply = self.answer(request, asked)
        return {"text": reply} if isinstance(reply, str) else reply


@contextmanager
def chat_server(answer: Answer, **changes: Any) -> Iterator[ChatServer]:
    """A server for the length of the block."""
    server = ChatServer(answer, **changes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            self._send(json.dumps({"object": "list", "data": [{"id": name} for name in server.models]}))

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            with server._lock:
                server._now += 1
                server.most_at_once = max(server.most_at_once, server._now)
            try:
                self._answer(request, server.reply_to(request))
            finally:
                with server._lock:
                    server._now -= 1

        def _answer(self, request: dict[str, Any], reply: dict[str, Any]) -> None:
            name, reason = reply.get("model", request["model"]), reply.get("reason", "stop")
            if "status" in reply:
                return self._send(json.dumps({"error": {"message": reply.get("error", "refused")}}), reply["status"])
            if "drips" in reply:
                return self._drip(reply["drips"])
            if "raw" in reply:
                return self._send(reply["raw"])
            if reply.get("nothing"):
                return self._send("", kind="text/event-stream")
            message = {"role": "assistant", "content": reply.get("text", "")}
            if "reasoning" in reply:
                message["reasoning_content"] = reply["reasoning"]
            message |= reply.get("message", {})
            if not server.streams:
                choice = {"index": 0, "message": message, "finish_reason": reason}
                return self._send(json.dumps({"model": name, "choices": [choice]}))
            pieces = [("reasoning_content", one) for one in reply.get("reasoning", "")]
            pieces += [("content", one) for one in reply.get("text", "")]
            pieces = [{key: piece} for key, piece in pieces]
            pieces = [reply["message"], *pieces] if "message" in reply else pieces
            half = reply.get("cut") or reply.get("broken")
            if half:
                pieces = pieces[: len(pieces) // 2]
            chunks = [{"index": 0, "delta": piece, "finish_reason": None} for piece in pieces]
            if not half:
                chunks.append({"index": 0, "delta": {}, "finish_reason": reason})
            body = "".join(f"data: {json.dumps({'model': name, 'choices': [chunk]})}\n\n" for chunk in chunks)
            if reply.get("broken"):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(f"{len(body.encode()) + 99:x}\r\n".encode() + body.encode())
                self.close_connection = True
                return None
            return self._send(body + ("" if half else "data: [DONE]\n\n"), kind="text/event-stream")

        def _drip(self, seconds: float) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.close_connection = True
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b": still here\n\n")
                    time.sleep(seconds)

        def _send(self, body: str, status: int = 200, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
