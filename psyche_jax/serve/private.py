"""A page for one person, behind a token in its address: what `psyche review` and `psyche watch` are served by."""

import hmac
import ipaddress
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from psyche_jax.serve.guard import HEADERS, LOOPBACK, listen


def private_app(title: str, token: str, hosts: Sequence[str]) -> tuple[FastAPI, Any]:
    """An application, and the dependency of its routes that want the token.

    Args:
      title: its name.
      token: what a request must show as `Authorization: Bearer …`: it keeps others on this machine out.
      hosts: the names by which it may be asked; another one is a page elsewhere that points a name of its own at this
        machine. Empty: all, for an address that means every one of the machine's.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "the token is missing or wrong")

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if hosts and request.url.hostname not in hosts:
            return JSONResponse({"detail": "unknown host"}, 421)
        response = await call_next(request)
        response.headers.update({**HEADERS, **response.headers})
        return response

    return app, Depends(allowed)


def serve_private(name: str, host: str, port: int, make: Callable[[str, Sequence[str]], FastAPI]) -> None:
    """Serve until interrupted what `make(token, hosts)` makes, and print its address.

    The token follows the # of the address: browsers do not send that.

    Raises:
      UserError: the address is invalid, or taken.
    """
    token = secrets.token_urlsafe(24)
    names = LOOPBACK if _is_loopback(host) else () if host in ("0.0.0.0", "::") else (host,)
    sock = listen(host, port)
    config = uvicorn.Config(make(token, names), log_level="warning", access_log=False)
    shown = f"[{host}]" if ":" in host else host
    print(f"{name}: http://{shown}:{sock.getsockname()[1]}/#{token}  (Ctrl-C to stop)", flush=True)
    if not _is_loopback(host):
        print(f"{name}: this address can be reached from other machines, without encryption", flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[sock])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
