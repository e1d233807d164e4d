"""A server of LLMs behind the OpenAI protocol: one request, and the answer to it, in pieces or whole, as data."""

import asyncio
import email.utils
import json
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai

SCHEMES = ("http://", "https://")
FAULTS = (openai.APIError, httpx2.HTTPError, ValueError)  # of a request that brought no answer; `Server.said` names it
REFUSED = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)  # so will be all others
_CONNECT_SECONDS = 10.0
_MODELS_SECONDS = 5.0
_SHOWN = 200  # characters of what a server says in an error


class BrokenAnswerError(Exception):
    """An answer that came, and is none or not whole."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer, or all of it. `finish` (stop, length, …) is what ends one; counts are None if unknown.

    `reasoning` is what the server sent in a field of its own (`reasoning_content`); `served_by` is the model's name as
    the server gives it.
    """

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    served_by: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Server:
    """One base URL with one key. To be used within one event loop, and closed.

    Args:
      base_url: ends where `/chat/completions` begins, usually with `/v1`.
      key: of the environment; None where none is wanted. It is masked in what `said` says.
      timeout: seconds without a byte after which a request has failed.
      retries: of a request that the server refuses for now (408, 409, 429, 5xx) or that does not come through.
      connections: that are kept open between requests.
    """

    def __init__(
        self, base_url: str, key: str | None, *, timeout: float, retries: int = 0, connections: int = 16
    ) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=connections)
        patience = httpx2.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout))
        self.base_url = base_url
        self._key = key
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # servers without a key take any; the library insists on one
            base_url=base_url,
            max_retries=retries,
            timeout=patience,
            http_client=openai.DefaultAioHttpClient(limits=limits, timeout=patience),
        )

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End its connections."""
        await self._client.close()

    async def ask(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Piece:
        """The whole answer to a request of chat completions, which is sent as it is, also where it says `stream`.

        Raises:
          BrokenAnswerError: what came is no answer, or not whole.
          FAULTS: nothing came.
        """
        if not body.get("stream"):
            # As bare JSON: the typed method takes half of a core at 300 calls a second.
            options: Any = {"headers": dict(headers or {})}
            response = await self._client.post(
                "/chat/completions", cast_to=httpx2.Response, body=dict(body), options=options
            )
            return _whole(_json(response.content))
        return _joined([piece async for piece in self.pieces(body, headers)])

    async def pieces(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> AsyncIterator[Piece]:
        """The answer as it comes; the last piece has a `finish`. One piece where the server does not stream.

        Raises: as `ask`.
        """
        rest = {name: value for name, value in body.items() if name not in ("model", "messages", "stream")}
        request = self._client.chat.completions.with_streaming_response.create(
            model=body["model"],
            messages=list(body["messages"]),
            stream=True,
            extra_body=rest,
            extra_headers=dict(headers or {}),
        )
        begun = False
        try:
            async with request as response:
                begun = True
                if "event-stream" not in response.headers.get("content-type", ""):
                    yield _whole(await response.json())
                    return
                came, finish = False, False
                async for chunk in await response.parse():
                    piece = _piece(chunk)
                    came = came or bool(getattr(chunk, "choices", None))
                    finish = finish or piece.finish is not None
                    yield piece
        except (openai.APIConnectionError, httpx2.TransportError):
            if not begun:
                raise
            raise BrokenAnswerError("the answer broke off") from None
        except ValueError:
            raise BrokenAnswerError("the answer is not JSON") from None
        if not finish:
            raise BrokenAnswerError("the stream ended early" if came else "nothing came")

    async def models(self) -> list[dict[str, Any]]:
        """What `/models` lists, by `id`.

        Raises: FAULTS: the server has no such list.
        """
        client = self._client.with_options(timeout=_MODELS_SECONDS, max_retries=0)
        response = await client.get("/models", cast_to=httpx2.Response)
        value = _json(response.content)
        listed = value.get("data") if isinstance(value, dict) else None
        return [model for model in listed or [] if isinstance(model, dict) and isinstance(model.get("id"), str)]

    def said(self, error: BaseException) -> str:
        """What went wrong, or what the server said of it, in one line without the key."""
        if isinstance(error, openai.APIStatusError):
            message = " ".join(error.message.split()).removeprefix(f"Error code: {error.status_code} - ")
            return f"HTTP {error.status_code}: {self._masked(message)[:_SHOWN]}"
        text = str(error.__cause__ or error) or type(error).__name__
        return self._masked(" ".join(text.split()))[:_SHOWN]

    def _masked(self, text: str) -> str:
        """Without the key, and without what would steer a terminal."""
        text = "".join(character if character.isprintable() else " " for character in text)
        return text.replace(self._key, "***") if self._key else text


def gate_warnings(servers: Mapping[str, str | None]) -> list[str]:
    """A line for each of `servers` (base URL: key) whose `/models` says that it is `psyche serve` with its crisis gate.

    Only servers without TLS are asked, as `psyche serve` is one. What cannot be reached is not this function's matter.
    """

    async def one(base_url: str, key: str | None) -> bool:
        async with Server(base_url, key, timeout=_MODELS_SECONDS) as server:
            try:
                return any(model.get("crisis_gate") is True for model in await server.models())
            except (*FAULTS, BrokenAnswerError):
                return False

    async def every() -> list[bool]:
        return await asyncio.gather(*(one(url, key) for url, key in plain.items()))

    plain = {url: key for url, key in servers.items() if url.startswith("http://")}
    return [
        f"{url}: its crisis gate is on, and answers messages that speak of a crisis in place of the model; "
        "start psyche serve with --no-crisis-gate to hear the model alone"
        for url, on in zip(plain, asyncio.run(every()), strict=True)
        if on
    ]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise BrokenAnswerError("the answer is not JSON") from None


def _whole(value: Any) -> Piece:
    try:
        choice, usage = value["choices"][0], value.get("usage") or {}
        message = choice["message"]
        return Piece(
            _clean(_text(message.get("content"))),
            _clean(_text(message.get("reasoning_content"))),
            _text(choice.get("finish_reason")) or "stop",
            _text(value.get("model")),
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BrokenAnswerError("the answer holds no message") from None


def _piece(chunk: Any) -> Piece:
    choice = next(iter(getattr(chunk, "choices", None) or ()), None)
    delta, usage = getattr(choice, "delta", None), getattr(chunk, "usage", None)
    return Piece(
        _text(getattr(delta, "content", "")),
        _text(getattr(delta, "reasoning_content", "")),
        _text(getattr(choice, "finish_reason", "")) or None,
        _text(getattr(chunk, "model", "")),
        _count(getattr(usage, "prompt_tokens", None)),
        _count(getattr(usage, "completion_tokens", None)),
    )


def _joined(pieces: Sequence[Piece]) -> Piece:
    """One answer of its pieces: of what is said again in several of them, the last counts."""
    last = Piece()
    for piece in pieces:
        last = Piece(
            finish=piece.finish or last.finish,
            served_by=piece.served_by or last.served_by,
            prompt_tokens=last.prompt_tokens if piece.prompt_tokens is None else piece.prompt_tokens,
            completion_tokens=last.completion_tokens if piece.completion_tokens is None else piece.completion_tokens,
        )
    text, reasoning = ("".join(getattr(piece, name) for piece in pieces) for name in ("text", "reasoning"))
    return replace(last, text=_clean(text), reasoning=_clean(reasoning))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _clean(text: str) -> str:
    """Half of a surrogate pair is no text."""
    return text.encode("utf-8", "replace").decode("utf-8")
