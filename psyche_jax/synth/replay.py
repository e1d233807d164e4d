"""A small OpenAI-compatible server that answers from what was written beforehand: for the demo, without a key."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn


def replay_app(answer: Callable[[Mapping[str, Any]], str]) -> Callable[..., Any]:
    """The ASGI application: `answer` says what the assistant replies to a request's JSON; None: 404 to that request."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = await read_body(receive)
        status, value = 404, {"error": {"message": "only chat/completions is served here"}}
        if scope["path"].endswith("/chat/completions"):
            request = json.loads(body)
            status, value = 200, completion(request, answer(request))
        content = json.dumps(value).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


async def read_body(receive: Any) -> bytes:
    """The whole body of an ASGI request."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def completion(request: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A chat completion with one choice; a character counts as a token."""
    asked = sum(len(message["content"]) for message in request["messages"])
    return {
        "id": "chatcmpl-replay",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": asked, "completion_tokens": len(text), "total_tokens": asked + len(text)},
    }


@contextmanager
def serving(app: Callable[..., Any]) -> Iterator[str]:
    """Serve an ASGI application on a free port of the loopback interface, in a thread; yields its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
