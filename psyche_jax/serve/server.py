"""The OpenAI-compatible HTTP server: chat completions, plain ones, the list of models, and a web page."""

import asyncio
import codecs
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from importlib.resources import files
from itertools import accumulate
from types import FrameType
from typing import Any, TypeVar

import fastapi
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types.chat import ChatCompletion
from starlette.exceptions import HTTPException

import psyche_jax
from psyche_jax.data.records import Message
from psyche_jax.errors import UsageError, UserError
from psyche_jax.serve import protocol
from psyche_jax.serve.batcher import BusyError, ClosingError
from psyche_jax.serve.config import ServeConfig
from psyche_jax.serve.engine import likeliest
from psyche_jax.serve.guard import LOOPBACK, Guard, RefusalError, error_body, impatient, listen
from psyche_jax.serve.service import Answer, FailedError, Scored, Service, TokenLogProb, TooLongError, Wanted

T = TypeVar("T")
TOKEN_VARIABLE = "PSYCHE_SERVE_TOKEN"
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorResponse, "description": text}
    for status, text in {
        400: "The request is wrong",
        401: "A token is required",
        403: "The request comes from another host or web page",
        404: "No such model",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The body is not JSON",
        429: "Too many requests",
        500: "Decoding failed",
        503: "The server is shutting down",
        504: "The response took too long",
    }.items()
}


def serve(config: ServeConfig, ready: Callable[[str], None] = lambda address: None) -> None:
    """Load the model and serve it until told to stop. `ready` is told the address once it is answered on.

    Raises:
      UserError: the model, the address or the token is wrong.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and (len(token) < 16 or not token.isascii()):
        raise UsageError(f"{TOKEN_VARIABLE} must have at least 16 ASCII characters")
    if token is None and config.host not in LOOPBACK:
        raise UsageError(
            f"host {config.host} can be reached from other machines: set {TOKEN_VARIABLE} to a token that clients must "
            "show, or serve on 127.0.0.1"
        )
    listening = listen(config.host, config.port)
    service = Service(config)
    if config.warm:
        print("compiling for conversations of typical length (kept for the next start)", file=sys.stderr, flush=True)
        service.warm()
    settings = uvicorn.Config(
        create_app(service, config, token),
        log_level="warning",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(config.limits.shutdown_seconds),
        server_header=False,
        http=impatient(config.limits.body_seconds),
        ws="none",
        h11_max_incomplete_event_size=65536,
    )
    server = _Server(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Uvicorn takes them while it runs, and raises them again at its end, where they mean nothing more.
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    host, port = listening.getsockname()[:2]
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        server.run(sockets=[listening])
    finally:
        service.close(config.limits.shutdown_seconds)


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Says at the first signal why it does not end at once, where it answers somebody."""
        if self.server_state.tasks and not self.should_exit:
            seconds = self.config.timeout_graceful_shutdown
            print(f"stopping: what is being answered has {seconds} s to end", file=sys.stderr, flush=True)
        super().handle_exit(sig, frame)


def create_app(service: Service, config: ServeConfig, token: str | None = None) -> Guard:
    """The application behind its guard."""
    app = fastapi.FastAPI(
        title="psyche serve", version=psyche_jax.__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    card = protocol.ModelCard(id=service.name, created=int(time.time()), crisis_gate=service.gate is not None)

    # The page, and what it asks for.
    assets = files("psyche_jax.serve") / "page"

    def page(name: str, kind: str) -> Callable[[], Response]:
        return lambda: Response((assets / name).read_bytes(), media_type=kind)

    for path, (name, kind) in _PAGE.items():
        app.get(path, include_in_schema=False)(page(name, kind))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={403: _ERRORS[403]})
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/about", include_in_schema=False)
    async def about() -> dict[str, Any]:
        """What the page needs to know."""
        gate = service.gate
        notice = {"zh": gate.notice("zh"), "en": gate.notice("en")} if gate else None
        told = gate.fill("{hotline}\n{medical}\n{police}", "zh") + "\n" + gate.fill("{hotline}", "en") if gate else ""
        numbers = sorted(set(re.findall(r"\d(?:[ -]?\d)+", told)), key=len, reverse=True)  # the page links them
        return {"model": service.name, "notice": notice, "numbers": numbers, "token_required": token is not None}

    # OpenAI's protocol, as far as it goes with one model.
    @app.get("/v1/models", responses={status: _ERRORS[status] for status in (401, 403, 429)})
    async def models() -> protocol.ModelList:
        """The model that is served."""
        return protocol.ModelList(data=[card])

    @app.get("/v1/models/{model}", responses={status: _ERRORS[status] for status in (400, 401, 403, 404, 429)})
    async def model(model: str) -> protocol.ModelCard:
        """The model that is served, if that is its name."""
        if model != service.name:
            raise _no_model(service)
        return card

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={**_ERRORS, 200: {"content": {"text/event-stream": {}}, "description": "The answer"}},
    )
    async def chat(body: protocol.ChatRequest, request: fastapi.Request) -> Response:
        """Answer a conversation."""
        turns = [
            Message("system" if message.role == "developer" else message.role, message.text)
            for message in body.messages
            if message.text.strip()  # a system prompt or an answer without a word is left out
        ]
        most, alternatives = body.max_completion_tokens or body.max_tokens, body.top_logprobs or 0
        wanted = _wanted(body, turns, most, alternatives if body.logprobs else None, service, config)
        with _refusals():
            answer = await service.answer(wanted)
        about = _about("chatcmpl", service, answer)
        limit = config.limits.request_seconds
        if body.stream:
            return StreamingResponse(_events(answer, about, service, body, limit), media_type="text/event-stream")
        return JSONResponse(await _whole(answer, about, service, body, request, limit))

    # (`openai.types.Completion` has no null among its log-probs, which the first token of a prompt has.)
    @app.post("/v1/completions", responses={**_ERRORS, 200: {"description": "The completion"}})
    async def complete(body: protocol.CompletionRequest, request: fastapi.Request) -> Response:
        """Continue prompts as they stand, or score them."""
        limit = config.limits.request_seconds
        wanted = _wanted(body, body.prompts, body.max_tokens, body.logprobs, service, config)
        with _refusals():
            if body.echo:
                scored = await _all(service.score(body.prompts, body.logprobs or 0), request, limit)
                return JSONResponse({**_scored(scored, body, service), **_about("cmpl", service)})
            answer = await service.answer(wanted)
        return JSONResponse(await _whole(answer, _about("cmpl", service, answer), service, body, request, limit))

    _answer_errors(app)
    return Guard(app, config.limits, token, config.host in LOOPBACK)


def _answer_errors(app: fastapi.FastAPI) -> None:
    """Answer whatever goes wrong in OpenAI's form of an error."""

    @app.exception_handler(RequestValidationError)
    async def wrong(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        place, text = protocol.fault_of(error)
        message = f"{place}: {text}" if place else text
        return JSONResponse(error_body(400, message, "invalid_request", place or None), 400)

    @app.exception_handler(RefusalError)
    async def refused(_: fastapi.Request, error: RefusalError) -> JSONResponse:
        return error.response

    @app.exception_handler(HTTPException)
    async def failed(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        text = {404: "there is nothing at this address", 405: "this method is not allowed here"}
        message = text.get(error.status_code, "the request cannot be read")
        return JSONResponse(error_body(error.status_code, message, None), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: fastapi.Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "something went wrong; the server's log says what", "internal_error"), 500)


def _no_model(service: Service) -> RefusalError:
    return RefusalError(404, f"this server's model is {service.name!r}", "model_not_found")


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What goes wrong before anything is said, as answers that say so."""
    try:
        yield
    except TooLongError as error:
        raise RefusalError(400, str(error), "context_length_exceeded") from None
    except BusyError:
        raise RefusalError(429, "the server is busy; try again", "server_busy", {"retry-after": "1"}) from None
    except UserError as error:
        raise RefusalError(400, str(error), "invalid_request") from None
    except ClosingError:
        raise RefusalError(503, "the server is shutting down", "closing") from None


def _about(kind: str, service: Service, answer: Answer | None = None) -> dict[str, Any]:
    about = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    if answer is not None and answer.gate_reply is not None:
        about["crisis"] = {"risk": answer.gate_reply.assessment.risk.value}  # beyond OpenAI's protocol
    return about


def _wanted(
    body: protocol.ChatRequest | protocol.CompletionRequest,
    asked: Sequence[Message] | Sequence[str | list[int]],
    max_new_tokens: int | None,
    alternatives: int | None,
    service: Service,
    config: ServeConfig,
) -> Wanted:
    if body.model != service.name:
        raise _no_model(service)
    choices = body.n or 1
    if choices > config.limits.choices:
        raise RefusalError(400, f"n: at most {config.limits.choices} here", "invalid_request")
    return Wanted(
        asked,
        config.temperature if body.temperature is None else body.temperature,
        config.top_p if body.top_p is None else body.top_p,
        choices,
        max_new_tokens,
        body.stops,
        alternatives,
        body.seed,
    )


async def _whole(
    answer: Answer,
    about: dict[str, Any],
    service: Service,
    body: protocol.ChatRequest | protocol.CompletionRequest,
    request: fastapi.Request,
    limit: float,
) -> dict[str, Any]:
    """The completion in one piece; of a prompt in OpenAI's older form."""
    chat = isinstance(body, protocol.ChatRequest)
    parts = await _all(answer.parts, request, limit)
    choices, tokens = [], {}
    for index in sorted({said.choice for said in parts}):
        own = [said for said in parts if said.choice == index]
        text = "".join(said.delta.text for said in own)
        entries = [entry for said in own for entry in said.delta.log_probs]
        choices.append(
            {
                "index": index,
                **({"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}),
                "finish_reason": own[-1].delta.finish,
                "logprobs": _log_probs(entries, service, body),
            }
        )
        tokens[index] = own[-1].tokens
    usage = _usage(answer.prompt_tokens, sum(tokens.values()))
    kind = "chat.completion" if chat else "text_completion"
    return {"object": kind, "choices": choices, "usage": usage, "crisis": None, **about}


def _scored(scored: list[Scored], body: protocol.CompletionRequest, service: Service) -> dict[str, Any]:
    """Prompts with their log-probs, and the likeliest next token behind each where one is asked for."""
    choices = []
    for one in sorted(scored, key=lambda one: one.place):
        scores = one.scores
        tokens = [*one.tokens, *([int(scores.best[-1, 0])] if body.max_tokens else [])]
        log_probs = [*scores.log_probs.tolist(), float(scores.best_log_probs[-1, 0])]
        best = likeliest(scores.best, scores.best_log_probs, body.logprobs)
        entries = [TokenLogProb(*entry) for entry in zip(tokens[1:], log_probs, best, strict=False)]
        own = _plain_log_probs(tokens[:1], entries, service)
        shown = None if body.logprobs is None else own
        text = "".join(own["tokens"])
        choices.append({"index": one.place, "text": text, "finish_reason": "length", "logprobs": shown})
    usage = _usage(sum(len(one.tokens) for one in scored), len(scored) * body.max_tokens)
    return {"object": "text_completion", "choices": choices, "usage": usage}


async def _all(parts: AsyncGenerator[T, None], request: fastapi.Request, limit: float) -> list[T]:
    """All parts. What makes them stops once the client is gone or the time is up."""

    async def gather() -> list[T]:
        async with contextlib.aclosing(parts):
            return [part async for part in parts]

    async def client_gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)

    gathering, gone = asyncio.create_task(gather()), asyncio.create_task(client_gone())
    try:
        await asyncio.wait({gathering, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if gathering.done():
            return gathering.result()
        if not gone.done():
            raise RefusalError(504, "the response took too long", "timeout")
        raise FailedError
    except FailedError:
        raise RefusalError(503, "the response could not be finished", "failed") from None
    finally:
        gathering.cancel()
        gone.cancel()
        await asyncio.wait({gathering, gone})


async def _events(
    answer: Answer, about: dict[str, Any], service: Service, body: protocol.ChatRequest, limit: float
) -> AsyncIterator[str]:
    """The completion as server-sent events."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {"object": "chat.completion.chunk", "choices": choices, **about, **more}
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def part(index: int, finish: str | None = None, log_probs: Any = None, **delta: str) -> list[dict[str, Any]]:
        whole = {"role": None, "content": None, **delta}
        return [{"index": index, "delta": whole, "finish_reason": finish, "logprobs": log_probs}]

    tokens: dict[int, int] = {}
    try:
        async with contextlib.aclosing(answer.parts), asyncio.timeout(limit):
            # Clients want to be told who speaks before anything is said.
            for index in range(body.n or 1):
                yield event(part(index, role="assistant", content=""))
            async for said in answer.parts:
                tokens[said.choice] = said.tokens
                # Log-probs may come without text: of tokens that are no whole character yet, or held back.
                if said.delta.text or said.delta.log_probs:
                    log_probs = _log_probs(said.delta.log_probs, service, body)
                    yield event(part(said.choice, log_probs=log_probs, content=said.delta.text))
                if said.delta.finish is not None:
                    yield event(part(said.choice, said.delta.finish))
            if body.stream_options and body.stream_options.include_usage:
                yield event([], usage=_usage(answer.prompt_tokens, sum(tokens.values())))
        yield "data: [DONE]\n\n"
    except (TimeoutError, FailedError) as error:
        # The status was sent long ago: an error in the stream is all that can still be said.
        message = "the response took too long" if isinstance(error, TimeoutError) else "the response broke off"
        yield f"data: {json.dumps(error_body(500, message, 'failed'))}\n\n"


def _usage(asked: int, said: int) -> dict[str, int]:
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _log_probs(
    entries: list[TokenLogProb], service: Service, body: protocol.ChatRequest | protocol.CompletionRequest
) -> dict[str, Any] | None:
    """Log-probs of tokens under the model at temperature 1 before top-p; None if the request wants none."""
    if isinstance(body, protocol.CompletionRequest):
        return None if body.logprobs is None else _plain_log_probs([], entries, service)

    def known(token: int, log_prob: float) -> dict[str, Any]:
        text, own = service.token_text(token)
        return {"token": text, "bytes": own, "logprob": max(log_prob, -9999.0)}

    if not body.logprobs:
        return None
    content = [
        {**known(entry.token, entry.log_prob), "top_logprobs": [known(*best) for best in entry.best]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _plain_log_probs(unscored: list[int], entries: Sequence[TokenLogProb], service: Service) -> dict[str, list[Any]]:
    """The same in the form of plain completions. `unscored`: tokens in front, of which nothing is known."""

    def name(token: int) -> str:  # alternatives are told apart by their names, so bytes are spelled out
        text, own = service.token_text(token)
        if own is None and not text:  # an id that the tokenizer does not know
            return f"token_id:{token}"
        broken = own is not None and text.encode() != bytes(own)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own or []) if broken else text

    tokens = [*unscored, *(entry.token for entry in entries)]
    # A token may end within a character, which is then the next one's.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    for place, token in enumerate(tokens):
        text, own = service.token_text(token)
        texts.append(decoder.decode(text.encode() if own is None else bytes(own), place == len(tokens) - 1))
    offsets = [0, *accumulate(map(len, texts))]
    return {
        "tokens": texts,
        "token_logprobs": [*(None for _ in unscored), *(max(entry.log_prob, -9999.0) for entry in entries)],
        "top_logprobs": [
            *(None for _ in unscored),
            *({name(token): max(value, -9999.0) for token, value in entry.best} for entry in entries),
        ],
        "text_offset": offsets[: len(tokens)],
    }


def announce(config: ServeConfig, address: str) -> None:
    """Say on stderr where the server is, and what protects it."""
    gate = f"on, region {config.crisis.region}" if config.crisis.gate else "OFF: nothing protects people in a crisis"
    print(f"serving {config.model} on {address} (page at /, API at /v1); crisis gate {gate}", file=sys.stderr)
