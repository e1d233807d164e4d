"""A server of LLMs behind the OpenAI protocol: one request, and the reply to it, in parts or whole."""

import asyncio
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import aiohttp
import httpx2
import openai

from psyche_jax.llm.reply import NoReplyError, Reply, complaint, joined, printable, read_reply
from psyche_jax.llm.retries import retry_after

SCHEMES = ("http://", "https://")
Names: TypeAlias = MutableMapping[str, str | None]
_CONNECT_SECONDS = 10.0
_MODELS_SECONDS = 5.0
_LAST_SECONDS = 0.2  # for the end of a stream behind its last event, so that the connection can be used again
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
      key: of the environment; None where none is wanted. Errors do not show it.
      timeout: seconds without a byte after which a request has failed.
      retries: openai's own, of a request that is refused for now or does not come through; see `retries.py` for more.
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
        silence = httpx2.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout))
        self.base_url = base_url
        self._key = key
        self._timeout = timeout
        self._names: Names = {} if names is None else names
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # servers without a key take any; the library insists on one
            base_url=base_url,
            max_retries=retries,
            timeout=silence,
            http_client=openai.DefaultAioHttpClient(
                limits=limits, timeout=silence, event_hooks={"response": [self._bounded]}
            ),
        )

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End its connections."""
        await self._client.close()

    async def ask(
        self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None, seconds: float | None = None
    ) -> Reply:
        """The whole reply to a request of chat completions, whether it says `stream` or not; `seconds`: at most.

        Raises:
          NoReplyError: nothing came, or what came is no answer or not whole.
        """
        try:
            async with asyncio.timeout(seconds):
                return joined([part async for part in self.parts(body, headers)])
        except TimeoutError as error:
            raise NoReplyError(self._said(error)) from None

    async def parts(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> AsyncIterator[Reply]:
        """The reply as it comes; the last part has a `finish`. One part where the server does not stream.

        Raises: as `ask`.
        """
        with self._faults():
            response = await self._sent(body, headers)
        with self._faults(came=True):
            try:
                # Some servers answer whole though a stream was asked for, and the other way round.
                if response.headers.get("content-type", "").partition(";")[0].strip().lower() != "text/event-stream":
                    yield read_reply(await _content(response))
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
                        raise NoReplyError(f"an error came instead of the answer: {event.data}")
                    # Events may be short or empty and without an end, so each counts for something.
                    came = True
                    part = read_reply(event.data, whole=False)
                    size += len(part.text) + len(part.reasoning) + _EVENT_BYTES
                    if size > _MOST_BYTES:
                        raise NoReplyError("the answer has no end")
                    finish = finish or part.finish is not None
                    yield part
                # A stream that was cut ends like any other; only its reason of finishing says that it is whole.
                if not finish:
                    raise NoReplyError("the stream ended early" if came else "nothing came")
            finally:
                await response.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """What `/models` lists, by `id`.

        Raises:
          NoReplyError: the server has no such list.
        """
        client = self._client.with_options(timeout=_MODELS_SECONDS, max_retries=0)
        with self._faults():
            async with asyncio.timeout(2 * _MODELS_SECONDS):
                stream = await client.get("/models", cast_to=object, stream=True, stream_cls=openai.AsyncStream[object])
                async with contextlib.aclosing(stream.response) as response:
                    listed = json.loads(await _content(response))
        models = listed.get("data") if isinstance(listed, dict) else None
        models = models if isinstance(models, list) else []
        return [model for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]

    async def _sent(self, body: Mapping[str, Any], headers: Mapping[str, str] | None) -> httpx2.Response:
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
                refusals[ours] = self._said(error)
        for ours, said in refusals.items():  # only now is it known that it was these
            if ours not in self._names or self._names[ours] != names[ours]:
                self._names[ours] = names[ours]
                instead = f"calls {ours} {names[ours]} for it" if names[ours] else f"leaves {ours} out for it"
                print(f"{self.base_url}: {said}; from now on psyche {instead}", file=sys.stderr, flush=True)
        return stream.response

    @contextlib.contextmanager
    def _faults(self, came: bool = False) -> Iterator[None]:
        """Raise what goes wrong as NoReplyError; `came`: within the block a reply is on its way."""
        try:
            yield
        except openai.APIStatusError as error:
            wait = retry_after(error.response.headers)
            raise NoReplyError(self._said(error), status=error.status_code, wait=wait) from None
        except aiohttp.ClientResponseError as error:  # of the client below, which openai's lets through
            raise NoReplyError(f"what came is not HTTP: {self._line(error.message)}") from None
        except (NoReplyError, openai.APIError, httpx2.HTTPError, TimeoutError, ValueError, RecursionError) as error:
            broken = came and isinstance(error, httpx2.HTTPError)
            raise NoReplyError("the answer broke off" if broken else self._said(error), came=came) from None

    async def _bounded(self, response: httpx2.Response) -> None:
        """Bound every response: only so much is read of an error, and prompts do not follow to another place."""
        stream = response.stream = _Bytes(response.stream, 1.5 * self._timeout)
        if not response.is_success:
            begun = bytearray()
            async for chunk in stream:
                begun += chunk
                if len(begun) >= _MOST_ERROR_BYTES:
                    break
            await stream.aclose()
            response.stream = httpx2.ByteStream(bytes(begun[:_MOST_ERROR_BYTES]))
        if response.has_redirect_location:
            resent = response.request.method == "GET" or response.status_code in (307, 308)  # others make it a GET
            if not resent or not _same_place(response.url, response.headers["location"]):
                response.headers[_ELSEWHERE] = response.headers.pop("location")

    def _said(self, error: BaseException) -> str:
        """What went wrong, or what the server said of it, in one line without the key."""
        if isinstance(error, TimeoutError):
            return "no answer in time"
        if not isinstance(error, openai.APIStatusError):
            return self._line(str(error.__cause__ or error) or type(error).__name__)
        said = complaint(_body(error))
        if elsewhere := error.response.headers.get(_ELSEWHERE):
            said = f"redirects to {elsewhere}; nothing is sent there; if it may be, use that address"
        return f"HTTP {error.status_code}: {self._line(said)}"

    def _line(self, text: str) -> str:
        text = " ".join(text.split())
        return printable(text.replace(self._key, "***") if self._key else text)


def check_url(url: str) -> None:
    """Check a base URL.

    Raises:
      ValueError: it is none, or contains a key; the message does not show that.
    """
    try:
        parts = httpx2.URL(url)
        whole = parts.scheme in ("http", "https") and bool(parts.host)
        whole = whole and (parts.port is None or 0 < parts.port < 2**16)
        has_key = bool(parts.userinfo or parts.query)
    except (httpx2.InvalidURL, ValueError):
        whole, has_key = False, "?" in url
    if has_key or ("@" in url and not whole):
        where = "the environment (OPENAI_API_KEY, or what key_env names)"
        raise ValueError(f"the URL must not contain a key, which would be stored and shown; it goes into {where}")
    if not whole:
        raise ValueError(f"{url!r} is not a URL such as http://localhost:8000/v1")


class _Bytes(httpx2.AsyncByteStream):
    """The bytes of a response, which fail after so many seconds without one.

    aiohttp has a time-out of its own, but waits for ever after a chunk whose length is no number.
    """

    def __init__(self, stream: Any, seconds: float) -> None:
        self._stream, self._seconds = stream, seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._stream)
        while True:
            async with asyncio.timeout(self._seconds):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield chunk

    async def aclose(self) -> None:
        """End the connection, or give it back."""
        await self._stream.aclose()


def _same_place(here: httpx2.URL, location: str) -> bool:
    """Whether a redirect stays with the server: the same host and port (None: its scheme's own), or its TLS."""
    try:
        there = here.join(location)
    except httpx2.InvalidURL:
        return False
    schemes = here.scheme, there.scheme
    same = schemes[0] == schemes[1] or (schemes == ("http", "https") and here.port is None)
    return same and (here.host, here.port) == (there.host, there.port)


async def _content(response: httpx2.Response) -> bytes:
    """The whole body, unless it is endless."""
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > _MOST_BYTES:
            raise NoReplyError("the answer has no end")
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

    Only servers without TLS are asked, as `psyche serve` is one; one that cannot be reached is left to whoever asks it.
    """

    async def is_gated(base_url: str, key: str | None) -> bool:
        async with Server(base_url, key, timeout=_MODELS_SECONDS) as server:
            with contextlib.suppress(NoReplyError):
                return any(model.get("crisis_gate") is True for model in await server.models())
        return False

    async def all_gated() -> list[bool]:
        return await asyncio.gather(*(is_gated(url, key) for url, key in plain.items()))

    plain = {url: key for url, key in servers.items() if url.startswith("http://")}
    return [
        f"{url}: its crisis gate is on and answers messages about a crisis instead of the model; "
        "start psyche serve with --no-crisis-gate to hear the model alone"
        for url, gated in zip(plain, asyncio.run(all_gated()), strict=True)
        if gated
    ]
