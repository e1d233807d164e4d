"""An OpenAI-compatible endpoint as a model that answers: chat completions, streamed, with bounded concurrency."""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from psyche_jax.config import PromptSection, config_to_dict
from psyche_jax.data.chat import render_prompt
from psyche_jax.errors import UsageError, UserError
from psyche_jax.evaluate.answers import Completion, Key
from psyche_jax.evaluate.tasks import Task

SCHEMES = ("http://", "https://")
RETRIES = 4  # of a request that the server refuses for now (429, 5xx) or that does not come through
ATTEMPTS = 3  # at an answer that comes and is not whole
UNREACHABLE_AFTER = 4  # questions in a row that did not come through
_DATED = re.compile(r"[-@:]?(?:\d{4}-?\d{2}-?\d{2}|latest|\d{3,4})")


class BadAnswerError(Exception):
    """The endpoint answered something that is no answer of the model that was asked."""


@dataclass(frozen=True)
class Reply:
    """A whole answer. `served_by`: the model's name as the endpoint gives it."""

    text: str
    finished: bool
    served_by: str


class Endpoint:
    """A model behind an address. The key is `OPENAI_API_KEY` of the environment; it is never written anywhere."""

    def __init__(
        self,
        address: str,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int = 0,
        concurrency: int = 16,
        prompt: PromptSection | None = None,
        timeout: float = 300.0,
    ) -> None:
        """Name an endpoint as `URL#MODEL`; `#MODEL` may be left out where the endpoint has one model.

        Args:
          address: the URL ends where `/chat/completions` begins, usually with `/v1`.
          max_new_tokens, temperature, top_p: as the endpoint understands them.
          seed: sample n asks with seed + n, which not every endpoint heeds.
          concurrency: requests at once.
          prompt: system prompt and instruction; an empty one sends bare turns.
          timeout: seconds without a byte after which a request has failed.

        Raises:
          UserError: the endpoint does not answer, or has several models and none is named.
        """
        self.url, _, self.model = address.partition("#")
        self.max_new_tokens, self.temperature, self._seed = max_new_tokens, temperature, seed
        self._top_p = top_p
        self._concurrency, self._prompt = concurrency, prompt or PromptSection()
        self._timeout = timeout
        if not self.model:
            self.model = asyncio.run(self._only_model())
        self.name = f"{self.url}#{self.model}"
        self.step = 0
        self.parameters: int | None = None

    @property
    def short_name(self) -> str:
        """What reports call it."""
        return self.model

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked how, for the record."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self._top_p,
            "seed": self._seed,
            "prompt": config_to_dict(self._prompt),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """All that an answer depends on, as far as it can be known."""
        return {**self.settings, "endpoint": self.url, "model": self.model}

    def answer(
        self, tasks: Mapping[Key, Task], known: Collection[Key], keep: Callable[[Key, Completion], object]
    ) -> dict[Key, str]:
        """Answer all tasks but those `known`. Returns why there is none, for each that has no answer.

        Raises:
          UserError: the endpoint refuses the key or the model, or does not answer any more.
        """
        missing = [key for key in tasks if key not in known]

        async def one(client: openai.AsyncOpenAI, key: Key) -> None:
            messages = render_prompt(tasks[key].turns, self._prompt)
            reply = await self.ask(client, messages, self._seed + key[1])
            keep(key, Completion(reply.text, 0, reply.finished))

        return self.run_all(missing, one)

    def run_all(self, keys: Sequence[Key], one: Callable[[openai.AsyncOpenAI, Key], Awaitable[None]]) -> dict[Key, str]:
        """Run `one(client, key)` for all keys, some at once. Returns the reasons of those that failed alone.

        Raises:
          UserError: the endpoint refuses the key or the model, or does not answer any more.
        """
        failed: dict[Key, str] = {}
        waiting = list(reversed(keys))
        unreachable = 0

        async def worker(client: openai.AsyncOpenAI) -> None:
            nonlocal unreachable
            while waiting:
                key = waiting.pop()
                try:
                    await one(client, key)
                    unreachable = 0
                except BadAnswerError as error:
                    failed[key] = str(error)
                except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                    raise UserError(f"{self.name}: {_said(error)}; see OPENAI_API_KEY, the URL and the model") from None
                except openai.APIStatusError as error:
                    failed[key] = _said(error)
                    unreachable += error.status_code >= 500 or error.status_code == 429
                except (openai.APIError, httpx2.HTTPError) as error:
                    failed[key] = _said(error)
                    unreachable += 1
                if unreachable >= UNREACHABLE_AFTER:
                    raise UserError(
                        f"{self.name}: does not answer any more ({failed[key]}); run the command again when it does"
                    )

        async def all_workers() -> None:
            async with self._client() as client:
                tasks = [asyncio.create_task(worker(client)) for _ in range(min(self._concurrency, len(keys)))]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(all_workers())
        return failed

    async def ask(self, client: openai.AsyncOpenAI, messages: Sequence[Mapping[str, str]], seed: int) -> Reply:
        """One answer, asked for again if it breaks off.

        Raises:
          BadAnswerError: it is never whole, or another model's.
          openai.APIError, httpx2.HTTPError: the request did not come through.
        """
        for attempt in range(ATTEMPTS):
            try:
                reply = await self._ask_once(client, messages, seed)
            except BadAnswerError as error:
                if attempt + 1 == ATTEMPTS:
                    raise BadAnswerError(f"{error}, {ATTEMPTS} times") from None
                continue
            if not same_model(self.model, reply.served_by):
                raise BadAnswerError(f"another model answered: {reply.served_by!r} for {self.model!r}")
            return reply
        raise AssertionError("unreachable")

    async def _ask_once(self, client: openai.AsyncOpenAI, messages: Sequence[Mapping[str, str]], seed: int) -> Reply:
        request = client.chat.completions.with_streaming_response.create(
            model=self.model,
            messages=list(messages),  # type: ignore[arg-type]
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self._top_p,
            seed=seed,
            stream=True,
        )
        begun = False
        try:
            async with request as response:
                begun = True
                if "event-stream" in response.headers.get("content-type", ""):
                    return await _streamed(await response.parse())
                return _whole(await response.json())  # the server does not stream
        except (openai.APIConnectionError, httpx2.TransportError):
            if not begun:
                raise
            raise BadAnswerError("the answer broke off") from None
        except ValueError:
            raise BadAnswerError("the answer is not JSON") from None

    async def _only_model(self) -> str:
        async with self._client() as client:
            try:
                names = [model.id async for model in client.models.list()]
            except (openai.APIError, httpx2.HTTPError, ValueError) as error:
                raise UserError(f"{self.url}: names no model ({_said(error)}); say which: {self.url}#MODEL") from None
        if len(names) != 1:
            shown = ", ".join(map(str, names[:5])) or "none"
            raise UsageError(f"{self.url}: has {len(names)} models ({shown}); say which: {self.url}#MODEL")
        return str(names[0])

    def _client(self) -> openai.AsyncOpenAI:
        # Servers without a key take any; the library insists on one.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        return openai.AsyncOpenAI(base_url=self.url, api_key=key, max_retries=RETRIES, timeout=self._timeout)


def same_model(asked: str, served: str) -> bool:
    """Whether a name that an endpoint gives is that of the model asked for: the same, a dated version, a path to it."""
    one, other = (name.casefold().rstrip("/").rpartition("/")[2] for name in (asked, served))
    return one == other or (other.startswith(one) and _DATED.fullmatch(other.removeprefix(one)) is not None)


async def _streamed(chunks: Any) -> Reply:
    """Put the pieces of a stream together; one without a reason to finish is half a stream."""
    reasoning, content, reason, served_by, pieces = "", "", None, "", 0
    async for chunk in chunks:
        served_by = _text(getattr(chunk, "model", "")) or served_by
        for choice in (getattr(chunk, "choices", None) or [])[:1]:
            delta = getattr(choice, "delta", None)
            reasoning += _text(getattr(delta, "reasoning_content", ""))
            content += _text(getattr(delta, "content", ""))
            pieces += 1
            reason = getattr(choice, "finish_reason", None) or reason
    if reason is None:
        raise BadAnswerError("the stream ended early" if pieces else "nothing came")
    return Reply(_joined(reasoning, content), reason != "length", served_by)


def _whole(value: Any) -> Reply:
    try:
        choice, served_by = value["choices"][0], _text(value.get("model"))
        message, reason = choice["message"], choice.get("finish_reason")
        text = _joined(_text(message.get("reasoning_content")), _text(message.get("content")))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswerError("the answer holds no message") from None
    return Reply(text, reason != "length", served_by)


def _joined(reasoning: str, content: str) -> str:
    """Some endpoints send the reasoning in a field of its own."""
    text = f"<think>{reasoning}</think>{content}" if reasoning else content
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is no text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _said(error: Exception) -> str:
    """What went wrong in one line."""
    if isinstance(error, openai.APIStatusError):
        message = " ".join(error.message.split()).removeprefix(f"Error code: {error.status_code} - ")
        return f"HTTP {error.status_code}: {message[:200]}"
    return (str(error.__cause__ or error) or type(error).__name__).splitlines()[0][:200]
