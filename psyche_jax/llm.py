"""A server of LLMs behind the OpenAI protocol: one request, and the answer to it, in pieces or whole."""

import asyncio
import contextlib
import email.utils
import json
import math
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import httpx2
import openai

from psyche_jax.llm_answers import BrokenAnswerError, Piece, complaint, joined, read_answer, read_models

SCHEMES = ("http://", "https://")
# Of a request that brought no answer; `Server.said` names it.
FAULTS = (openai.APIError, httpx2.HTTPError, TimeoutError, ValueError)
REFUSED = frozenset({401, 402, 403, 404, 405, *range(300, 400)})  # statuses: so will be all other requests
Names: TypeAlias = MutableMapping[str, str | None]
_CONNECT_SECONDS = 10.0
_MODELS_SECONDS = 5.0
_LAST_SECONDS = 0.2  # for the end of a stream behind its last event, so that the connection can be used again
_SHOWN = 200  # characters of what a server says in an error
_MOST_BYTES = 16 * 2**20  # of an answer
_EVENT_BYTES = 16  # what an event of a stream counts for besides its text
_MOST_ERROR_BYTES = 64 * 2**10
_ELSEWHERE = "x-redirected-to"  # ours, in place of a Location that is not followed
_LIMITS = re.compile(  # what is wrong is a value or the length, not that the parameter was sent
    r"too (?:large|long|many|high|big|small)|context length|maximum context|exceed|between"
    r"|(?<!not )(?:must|should) be(?! (?:absent|omitted|unset|null|none|removed|left out))"
    r"(?! 1(?:\.0)?(?![\d.,]*\d| (?:or|and|to)\b))"  # which is the default
    r"|at (?:least|most)|greater|less[ _]than|out of range|超过|过长|范围",
    re.IGNORECASE,
)
_ALLOWED = re.compile(  # what it would take, listed beside what it refuses
    r"(?<!not )\b(?:allowed|permitted|accepted|supported|valid|available|known)\b[^.;:\n]{0,40}?(?::|\bare\b)[^.;\n]*",
    re.IGNORECASE,
)
_MOST_SAID = 4000  # characters of an error that are searched
_SUCCESSORS = {"max_tokens": ("max_completion_tokens", "max_output_tokens", "max_new_tokens")}


class Server:
    """One base URL with one key. To be used within one event loop, and closed.

    Args:
      base_url: ends where `/chat/completions` begins, usually with `/v1`.
      key: of the environment; None where none is wanted. It is masked in what `said` says.
      timeout: seconds without a byte after which a request has failed.
      retries: of a request that the server refuses for now (408, 409, 429, 5xx) or that does not come through.
      connections: that are kept open between requests.
      names: what this server calls parameters that it has another name for; None: it gets none. What it turns out to
        refuse is added, and said once on stderr.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None,
        *,
        timeout: float,
        retries: int = 0,
        connections: int = 16,
        names: Names | None = None,
    ) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=connections)
        patience = httpx2.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout))
        self.base_url = base_url
        self._key = key
        self._names: Names = {} if names is None else names
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # servers without a key take any; the library insists on one
            base_url=base_url,
            max_retries=retries,
            timeout=patience,
            http_client=openai.DefaultAioHttpClient(
                limits=limits, timeout=patience, event_hooks={"response": [_bounded]}
            ),
        )

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End its connections."""
        await self._client.close()

    async def ask(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Piece:
        """The whole answer to a request of chat completions, whether it says `stream` or not.

        Raises:
          BrokenAnswerError: what came is no answer, or not whole.
          FAULTS: nothing came.
        """
        return joined([piece async for piece in self._pieces(body, headers)])

    async def pieces(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> AsyncIterator[Piece]:
        """The answer as it comes; the last piece has a `finish`. One piece where the server does not stream.

        Raises: as `ask`.
        """
        async for piece in self._pieces({**body, "stream": True}, headers):
            yield piece

    async def _pieces(self, body: Mapping[str, Any], headers: Mapping[str, str] | None) -> AsyncIterator[Piece]:
        response = await self._answered(body, headers)
        try:
            if response.headers.get("content-type", "").partition(";")[0].strip().lower() != "text/event-stream":
                yield read_answer(await _content(response))
                return
            response.encoding = "utf-8"
            came, finish, size = False, False, 0
            events = aiter(httpx2.EventSource(response, _MOST_BYTES))
            async for event in events:
                if event.data.startswith("[DONE]"):
                    with contextlib.suppress(TimeoutError, httpx2.HTTPError):
                        async with asyncio.timeout(_LAST_SECONDS):
                            await anext(events, None)
                    break
                if event.event == "error":
                    raise BrokenAnswerError(f"an error came in place of the answer: {event.data}")
                came = True
                piece = read_answer(event.data, whole=False)
                size += len(piece.text) + len(piece.reasoning) + _EVENT_BYTES
                if size > _MOST_BYTES:
                    raise BrokenAnswerError("the answer has no end")
                finish = finish or piece.finish is not None
                yield piece
            if not finish:
                raise BrokenAnswerError("the stream ended early" if came else "nothing came")
        except BrokenAnswerError as error:
            raise BrokenAnswerError(self.said(error)) from None
        except httpx2.HTTPError:
            raise BrokenAnswerError("the answer broke off") from None
        finally:
            await response.aclose()

    async def _answered(self, body: Mapping[str, Any], headers: Mapping[str, str] | None) -> httpx2.Response:
        """The response, of which nothing is read; asked for again without a parameter that the server refuses."""
        names, refusals = dict(self._names), {}
        while True:
            sent = {known: value for name, value in body.items() if (known := names.get(name, name)) is not None}
            options: Any = {"headers": dict(headers or {})}
            try:
                stream = await self._client.post(
                    "/chat/completions",
                    cast_to=object,
                    body=sent,
                    options=options,
                    stream=True,  # of bytes; the typed methods take half of a core at 300 calls a second
                    stream_cls=openai.AsyncStream[object],
                )
                break
            except openai.APIStatusError as error:
                refused = _refused_parameter(error, sent) if error.status_code in (400, 422) else None
                if refused is None:
                    raise
                ours = next(name for name in body if names.get(name, name) == refused)
                names[ours] = _successor(error, refused)
                refusals[ours] = self.said(error)
        for ours, said in refusals.items():  # only now is it known that it was these
            if ours not in self._names or self._names[ours] != names[ours]:
                self._names[ours] = names[ours]
                instead = f"calls {ours} {names[ours]} for it" if names[ours] else f"leaves {ours} out for it"
                print(f"{self.base_url}: {said}; from now on psyche {instead}", file=sys.stderr, flush=True)
        return stream.response

    async def models(self) -> list[dict[str, Any]]:
        """What `/models` lists, by `id`.

        Raises:
          BrokenAnswerError, FAULTS: the server has no such list.
        """
        client = self._client.with_options(timeout=_MODELS_SECONDS, max_retries=0)
        async with asyncio.timeout(2 * _MODELS_SECONDS):
            stream = await client.get("/models", cast_to=object, stream=True, stream_cls=openai.AsyncStream[object])
            try:
                return read_models(await _content(stream.response))
            finally:
                await stream.response.aclose()

    def said(self, error: BaseException) -> str:
        """What went wrong, or what the server said of it, in one line without the key."""
        if isinstance(error, openai.APIStatusError):
            message = " ".join(complaint(_body(error)).split())
            if elsewhere := error.response.headers.get(_ELSEWHERE):
                message = (
                    f"redirects to {elsewhere}, and what is asked is not sent there; if it may be, name that address"
                )
            return f"HTTP {error.status_code}: {self._masked(message)[:_SHOWN]}"
        if isinstance(error, TimeoutError):
            return "no answer in time"
        text = str(error.__cause__ or error) or type(error).__name__
        return self._masked(" ".join(text.split()))[:_SHOWN]

    def _masked(self, text: str) -> str:
        """Without the key, and without what would steer a terminal."""
        text = "".join(character if character.isprintable() else " " for character in text)
        return text.replace(self._key, "***") if self._key else text


async def _bounded(response: httpx2.Response) -> None:
    """Bound every response: only so much is read of an error, and prompts do not follow to another place."""
    if not response.is_success:
        response.stream = _Beginning(response.stream)
    if response.has_redirect_location:
        resent = response.request.method == "GET" or response.status_code in (307, 308)  # others make it a GET
        if not resent or not _same_place(response.url, response.headers["location"]):
            response.headers[_ELSEWHERE] = response.headers.pop("location")


def _same_place(here: httpx2.URL, location: str) -> bool:
    """Whether a redirect stays with the server: the same host and port, or its TLS."""
    try:
        there = here.join(location)
    except httpx2.InvalidURL:
        return False
    ports = [url.port or {"http": 80, "https": 443}.get(url.scheme) for url in (here, there)]
    same = here.scheme == there.scheme and ports[0] == ports[1]
    return here.host == there.host and (same or (here.scheme, there.scheme, *ports) == ("http", "https", 80, 443))


class _Beginning(httpx2.AsyncByteStream):
    """The first bytes of a stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = _MOST_ERROR_BYTES
        async for chunk in self._stream:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _content(response: httpx2.Response) -> bytes:
    """The whole body, unless it is endless."""
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > _MOST_BYTES:
            raise BrokenAnswerError("the answer has no end")
    return bytes(content)


def _body(error: openai.APIStatusError) -> Any:
    text = error.response.text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _strings(value: Any) -> Iterator[str]:
    """The texts in JSON, in their order; no names of fields."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(text):
                yield text
            case list(items):
                waiting += reversed(items)
            case dict(fields):
                waiting += reversed(fields.values())


def _refused_parameter(error: openai.APIStatusError, sent: Mapping[str, Any]) -> str | None:
    """The parameter that a server would rather not have been sent, None if it was not for one that it refused."""
    candidates = [name for name in sent if name not in ("model", "messages")]
    said = "\n".join(_strings(_body(error)))[:_MOST_SAID]
    whole = error.response.text[:_MOST_SAID]  # there the names of fields may be those of parameters
    plain = str(error.code).startswith(("unsupported", "unknown", "unrecognized"))
    if not plain and _LIMITS.search(said):
        return None
    if error.param in candidates:
        return error.param
    for text in (_ALLOWED.sub("", said), said, whole):
        places = {name: found.start() for name in candidates if (found := _spelled(name).search(text))}
        if places.keys() == {"temperature", "top_p"}:  # one of the two, it says
            return "top_p"
        if places:
            return min(places, key=lambda name: places[name])
    return None


def _spelled(name: str) -> re.Pattern[str]:
    spellings = "|".join(each.replace("_", "_?") for each in (name, *_SUCCESSORS.get(name, ())))
    return re.compile(rf"(?<![\w-])(?:{spellings})(?![\w-])", re.IGNORECASE)


def _successor(error: openai.APIStatusError, refused: str) -> str | None:
    """The name that a server has for a parameter which it refuses under another."""
    names = _SUCCESSORS.get(refused, ())
    return next((name for name in names if name in error.response.text), names[0] if names else None)


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
    """Seconds that a Retry-After header asks for, in either of its forms (RFC 9110, 10.2.3); None if it says none.

    OpenAI's `retry-after-ms` goes before it.
    """
    value = headers.get("retry-after", "").strip()
    try:
        with contextlib.suppress(ValueError):
            if math.isfinite(exact := float(headers.get("retry-after-ms", ""))):
                return max(0.0, exact / 1000)
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
