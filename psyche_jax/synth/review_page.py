"""`psyche review`: a page on this machine, behind a token, on which a person goes through the queue by keyboard."""

import hmac
import ipaddress
import secrets
from importlib.resources import files
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from psyche_jax.data.records import Kind, Question, record_to_json
from psyche_jax.errors import UserError
from psyche_jax.listening import listen
from psyche_jax.synth.review import Decision, ReviewConflictError, ReviewStore, Verdict, as_json

_PAGE = {
    "": ("index.html", "text/html"),
    "review.js": ("review.js", "text/javascript"),
    "review.css": ("review.css", "text/css"),
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Edited(BaseModel):
    """The parts of a question that a reviewer can change; `kind` follows from the answer."""

    model_config = ConfigDict(extra="forbid")
    stem: str
    options: dict[str, str]
    answer: str
    rationale: str | None = None


class Decided(BaseModel):
    """What the page sends. `after`: the number of the decision that it showed, 0 for none."""

    model_config = ConfigDict(extra="forbid")
    item: str
    verdict: Verdict
    edited: Edited | None = None
    note: Annotated[str, Field(max_length=2000)] = ""
    after: int = 0


def review_app(store: ReviewStore, who: str, token: str, hosts: tuple[str, ...]) -> FastAPI:
    """The application. The page itself is public; whatever is read or written wants the token.

    `hosts`: the names by which it may be asked; another one is a page elsewhere that points a name of its own at this
    machine. None: all, for an address that stands for every one of the machine's.
    """
    app = FastAPI(title="psyche review", docs_url=None, redoc_url=None, openapi_url=None)

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "the token is missing or wrong")

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if hosts and request.url.hostname not in hosts:
            return JSONResponse({"detail": "unknown host"}, 421)
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    for path, (name, kind) in _PAGE.items():
        content = (files("psyche_jax.synth") / "page" / name).read_bytes()
        app.get(f"/{path}")(_static(content, kind))

    @app.get("/api/items", dependencies=[Depends(allowed)])
    def items() -> dict[str, Any]:
        history = store.history()
        last = {decision.item: decision.number for decision in history}
        return {
            "who": who,
            "items": [
                {
                    "question": record_to_json(item.question),
                    "decision": as_json(item.decision) if item.decision else None,
                    "after": last.get(item.question.id, 0),
                }
                for item in store.items()
            ],
        }

    @app.post("/api/decisions", dependencies=[Depends(allowed)])
    def decide(decided: Decided) -> dict[str, Any]:
        try:
            edited = _edited(store, decided)
            decision = store.decide(Decision(decided.item, decided.verdict, who, edited, decided.note), decided.after)
        except ReviewConflictError as error:
            raise HTTPException(409, str(error)) from None
        except (UserError, ValueError) as error:
            raise HTTPException(422, str(error)) from None
        return as_json(decision)

    return app


def _static(content: bytes, kind: str) -> Any:
    def page() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8")

    return page


def _edited(store: ReviewStore, decided: Decided) -> Question | None:
    """The question as it was edited: what was not, is that of the queue."""
    if decided.edited is None:
        return None
    old = next((item.question for item in store.items() if item.question.id == decided.item), None)
    if old is None:
        raise UserError(f"there is no item {decided.item}")
    new = decided.edited
    kind: Kind = "single" if len(new.answer) == 1 else "multi"
    return Question(new.stem, new.options, new.answer, kind, new.rationale or None, old.source, old.meta)


def serve_review(store: ReviewStore, who: str, host: str, port: int) -> None:
    """Serve until interrupted. The token stands behind the # of the printed address: browsers do not send that."""
    token = secrets.token_urlsafe(24)
    names = LOOPBACK if _is_loopback(host) else () if host in ("0.0.0.0", "::") else (host,)
    sock = listen(host, port)
    app = review_app(store, who, token, names)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    shown = f"[{host}]" if ":" in host else host
    print(f"review: http://{shown}:{sock.getsockname()[1]}/#{token}  (Ctrl-C ends it)", flush=True)
    if not _is_loopback(host):
        print("review: this address can be reached from other machines, without encryption", flush=True)
    uvicorn.Server(config).run(sockets=[sock])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
