"""What every request passes before the application sees it: host, origin, token, rate, size and time of its body."""

import asyncio
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from psyche_jax.serve.config import LimitsSection

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MOST_CLIENTS = 10_000  # whose rates are remembered
_HEADERS = {
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
    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        return error_body(self.status, str(self), self.code)


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
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        body = _Body(receive, self._limits, headers.get("content-length", "0"))
        answered = False

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            if answered:
                return
            if body.refusal is not None:  # the application has made something else of it
                answered = True
                await _refuse(send, body.refusal)
                return
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_encoded(_HEADERS)]
            await send(message)

        try:
            self._admit(scope, headers)
        except RefusalError as refusal:
            await _refuse(send, refusal)
        else:
            await self._app(scope, body.receive, send_on)

    def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self._local and _name(host) not in LOOPBACK:
            raise RefusalError(403, "this server answers on this machine only", "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host:
            raise RefusalError(403, "requests from other web pages are refused", "origin_not_allowed")
        if not scope["path"].startswith("/v1/"):
            return
        if self._token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.lower() != "bearer" or not known:
                raise RefusalError(
                    401,
                    "a token is required: Authorization: Bearer …",
                    "invalid_api_key",
                    {"www-authenticate": "Bearer"},
                )
        client = scope["client"][0] if scope.get("client") else ""
        if (wait := self._wait(client)) > 0:
            raise RefusalError(
                429, "too many requests a minute", "rate_limit_exceeded", {"retry-after": str(int(wait) + 1)}
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
        try:
            if max(self._seen, self._told) > self._most:
                raise RefusalError(413, f"the body is larger than {self._most} bytes", "request_too_large")
            message = await asyncio.wait_for(self._receive(), max(self._deadline - time.monotonic(), 0.001))
            self._seen += len(message.get("body", b""))
            if self._seen > self._most:
                raise RefusalError(413, f"the body is larger than {self._most} bytes", "request_too_large")
        except TimeoutError:
            self.refusal = RefusalError(408, "the body did not arrive in time", "request_timeout")
            raise self.refusal from None
        except RefusalError as refusal:
            self.refusal = refusal
            raise
        self._complete = not message.get("more_body", False)
        return message


async def _refuse(send: Send, refusal: RefusalError) -> None:
    body = json.dumps(refusal.body).encode()
    answer = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers, **_HEADERS}
    await send({"type": "http.response.start", "status": refusal.status, "headers": _encoded(answer)})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str | None:
    """Host and port of an Origin header, None if it is no URL."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
