"""What every connection and request passes before an application sees it.

`listen` and `impatient`: the socket, and connections that wait only so long for a request. `Guard`: host, origin, token
and rate of a request, size and time of its body.
"""

import asyncio
import hmac
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn, TypeAlias
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from psyche_jax.errors import UserError
from psyche_jax.serve.config import LimitsSection

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MOST_CLIENTS = 10_000  # whose rates are remembered
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
}


class RefusalError(Exception):
    """A request that is answered by an error at once."""

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}

    @property
    def response(self) -> JSONResponse:
        """The answer, in OpenAI's form of an error."""
        return JSONResponse(error_body(self.status, str(self), self.code), self.status, {**HEADERS, **self.headers})


def error_body(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware. `token`: what clients must show for /v1; `local`: only names of this machine are answered."""

    def __init__(self, app: App, limits: LimitsSection, token: str | None, local: bool) -> None:
        self._app = app
        self._limits = limits
        self._token = token
        self._local = local
        self._rates: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by client: allowance left, as of when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = _Body(receive, self._limits, headers.get("content-length", "0"))
        answered = False

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            if answered:
                return
            if body.refusal is not None:  # the application has made something else of it
                answered = True
                await body.refusal.response(scope, receive, send)
                return
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._admit(scope, headers)
        except RefusalError as refusal:
            await refusal.response(scope, receive, send)
        else:
            await self._app(scope, body.receive, send_on)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._local and _split(f"//{host}").hostname not in LOOPBACK:
            raise RefusalError(403, "this server only answers requests from this machine", "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            raise RefusalError(403, "requests from other web pages are refused", "origin_not_allowed")
        if not scope["path"].startswith("/v1/"):
            return
        if self._token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.lower() != "bearer" or not known:
                asked = {"www-authenticate": "Bearer"}
                raise RefusalError(401, "a token is required: Authorization: Bearer …", "invalid_api_key", asked)
        client = scope["client"][0] if scope.get("client") else ""
        if (wait := self._wait(client)) > 0:
            raise RefusalError(
                429, "too many requests per minute", "rate_limit_exceeded", {"retry-after": str(int(wait) + 1)}
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise RefusalError(
                415, "the body must be JSON, and Content-Type application/json", "unsupported_media_type"
            )

    def _wait(self, client: str) -> float:
        """Seconds until this client may come again, 0 for now. A bucket that fills steadily."""
        now, most = time.monotonic(), float(self._limits.per_minute)
        left, since = self._rates.pop(client, (most, now))
        left = min(most, left + (now - since) * most / 60)
        allowed = left >= 1
        self._rates[client] = (left - allowed, now)
        if len(self._rates) > _MOST_CLIENTS:
            self._rates.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / most


class _Body:
    """A request's body, refused once it is too large or too slow."""

    def __init__(self, receive: Receive, limits: LimitsSection, length: str) -> None:
        self.refusal: RefusalError | None = None
        self._receive = receive
        self._most = limits.body_bytes
        self._deadline = time.monotonic() + limits.body_seconds
        self._told = int(length[:20]) if length.isdecimal() else 0
        self._seen = 0
        self._complete = False

    async def receive(self) -> MutableMapping[str, Any]:
        """The next message of the request."""
        if self._complete:
            return await self._receive()  # waits for the client to go away
        if self._told > self._most:
            self._refuse(413, f"the body is larger than {self._most} bytes", "request_too_large")
        try:
            message = await asyncio.wait_for(self._receive(), max(self._deadline - time.monotonic(), 0.001))
        except TimeoutError:
            self._refuse(408, "the body did not arrive in time", "request_timeout")
        self._seen += len(message.get("body", b""))
        if self._seen > self._most:
            self._refuse(413, f"the body is larger than {self._most} bytes", "request_too_large")
        self._complete = not message.get("more_body", False)
        return message

    def _refuse(self, status: int, message: str, code: str) -> NoReturn:
        self.refusal = RefusalError(status, message, code)
        raise self.refusal from None


def _split(url: str) -> SplitResult:
    """The parts of an address that a client gave; empty ones if it cannot be read."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any that is free.

    Raises:
      UserError: the address is invalid, or taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or f"{error}".removeprefix("bind(): ").rstrip(".")
        raise UserError(f"cannot serve on {host} port {port}: {reason}; choose another with --port") from None
    listening.listen(512)  # before the address is shown: who comes at once waits, and is not refused
    listening.setblocking(False)
    return listening


def impatient(seconds: float) -> type[H11Protocol]:
    """A protocol for uvicorn that closes a connection if the head of a request takes longer to arrive."""

    class Impatient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            if self._timer is None and self._idle:
                self._timer = self.loop.call_later(seconds, self.transport.close)
            super().data_received(data)
            if not self._idle:
                self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        @property
        def _idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _forget(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Impatient
