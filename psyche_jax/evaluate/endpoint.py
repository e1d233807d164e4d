"""An OpenAI-compatible endpoint as a model that answers: chat completions, streamed, with bounded concurrency."""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from psyche_jax.config import PromptSection
from psyche_jax.config_files import config_to_dict
from psyche_jax.data.chat import render_prompt
from psyche_jax.errors import UsageError, UserError
from psyche_jax.evaluate.answers import Completion, Key
from psyche_jax.evaluate.tasks import Task
from psyche_jax.llm.reply import FILTERED, NoReplyError, Reply
from psyche_jax.llm.retries import Pace, Patience, ask_patiently
from psyche_jax.llm.server import Names, Server, check_url

PATIENCE = Patience()
DRAWS = 3  # of an answer that is filtered
UNREACHABLE_AFTER = 4  # questions in a row that did not come through
UNUSABLE_AFTER = 20  # questions in a row to which what came was no answer
SILENCES = 12  # times the longest silence: how long a question may take
_DRAW = 1_000_003  # added to the seed where an answer that was filtered is drawn again
_DATED = re.compile(r"[-@:]?(?:\d{4}-?\d{2}-?\d{2}|latest|\d{3,4})")


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
        names: Mapping[str, str | None] | None = None,
        served_as: Collection[str] = (),
    ) -> None:
        """Name an endpoint as `URL#MODEL`; `#MODEL` may be left out where the endpoint has one model.

        Args:
          address: the URL ends where `/chat/completions` begins, usually with `/v1`.
          max_new_tokens, temperature, top_p: as the endpoint understands them.
          seed: sample n asks with seed + n, which not every endpoint heeds.
          concurrency: requests at once.
          prompt: system prompt and instruction; an empty one sends bare turns.
          timeout: seconds without a byte after which a request has failed.
          names: what the endpoint calls our parameters (`max_tokens`, `seed`, …); None: it gets none.
          served_as: names under which the model may answer, besides its own.

        Raises:
          UserError: the endpoint does not answer, or has several models and none is named.
          UsageError: the URL is none, or contains a key, which evaluations and messages would show.
        """
        self.url, _, self.model = address.partition("#")
        try:
            check_url(self.url)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.max_new_tokens, self.temperature, self._seed = max_new_tokens, temperature, seed
        self._top_p = top_p
        self._concurrency, self._prompt = concurrency, prompt or PromptSection()
        self._timeout = timeout
        self._configured, self._served_as = dict(names or {}), tuple(served_as)
        self._names: Names = dict(self._configured)  # with what the endpoint turns out to refuse
        self._pace = Pace(self.url)
        if not self.model:
            self.model = self._only_model()
        self.name = f"{self.url}#{self.model}"
        self.step = 0
        self.parameters: int | None = None

    @property
    def short_name(self) -> str:
        """What reports call it."""
        return self.model

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked how, for the record; `parameters`: what was left out (None) or had another name."""
        return self._settings(self._names)

    def _settings(self, names: Mapping[str, str | None]) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self._top_p,
            "seed": self._seed,
            "prompt": config_to_dict(self._prompt),
            **({"parameters": dict(names)} if names else {}),
            **({"served_as": list(self._served_as)} if self._served_as else {}),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """All that an answer depends on, as far as it can be known."""
        return {**self._settings(self._configured), "endpoint": self.url, "model": self.model}

    def answer(
        self, tasks: Mapping[Key, Task], known: Collection[Key], keep: Callable[[Key, Completion], object]
    ) -> dict[Key, str]:
        """Answer all tasks but those `known`. Returns why there is none, for each that has no answer.

        Raises:
          UserError: the endpoint refuses the key or the model, or does not answer any more.
        """
        missing = [key for key in tasks if key not in known]

        async def one(server: Server, key: Key) -> None:
            messages = render_prompt(tasks[key].turns, self._prompt)
            reply = await self.ask(server, messages, self._seed + key[1])
            keep(key, Completion(reply.whole, 0, reply.finish == "stop"))

        return self.run_all(missing, one)

    def run_all(self, keys: Sequence[Key], one: Callable[[Server, Key], Awaitable[None]]) -> dict[Key, str]:
        """Run `one(server, key)` for all keys, some at once. Returns the reasons of those that failed alone.

        Raises:
          UserError: the endpoint refuses the key or the model, does not answer any more, or says nothing of use.
        """
        failed: dict[Key, str] = {}
        waiting = list(reversed(keys))
        unreachable = unusable = 0

        async def worker(server: Server) -> None:
            nonlocal unreachable, unusable
            while waiting:
                key = waiting.pop()
                try:
                    await one(server, key)
                    unreachable = unusable = 0
                except NoReplyError as error:
                    failed[key] = str(error)
                    if error.for_all:
                        hint = "see OPENAI_API_KEY, the URL and the model"
                        raise UserError(f"{self.name}: {error}; {hint}") from None
                    away = error.passing and not error.came
                    unreachable, unusable = unreachable + away, unusable + (not away)
                if unusable >= UNUSABLE_AFTER:
                    raise UserError(f"{self.name}: no answer {unusable} times in a row: {failed[key]}")
                if unreachable >= UNREACHABLE_AFTER:
                    raise UserError(
                        f"{self.name}: no longer answers ({failed[key]}); run the command again when it does"
                    )

        async def all_workers() -> None:
            async with self._server() as server, asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(keys))):
                    group.create_task(worker(server))

        try:
            asyncio.run(all_workers())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return failed

    async def ask(self, server: Server, messages: Sequence[Mapping[str, str]], seed: int) -> Reply:
        """One answer. What is filtered is drawn again, if it is drawn.

        Raises:
          NoReplyError: after all retries there is none, or it is filtered, or another model's.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self._top_p,
            "seed": seed,
            "stream": True,
        }

        try:
            async with asyncio.timeout(SILENCES * self._timeout):
                for draw in range(1, DRAWS + 1):
                    reply = await ask_patiently(lambda: server.ask(body), PATIENCE, self._pace)
                    self._check_model(reply.served_by)
                    if reply.finish not in FILTERED:
                        return reply
                    if self.temperature == 0:
                        break
                    body["seed"] = seed + draw * _DRAW
        except TimeoutError:
            raise NoReplyError("no answer in time") from None
        raise NoReplyError(f"{reply.fault}, {draw} times" if draw > 1 else reply.fault, came=True)

    def _check_model(self, served: str) -> None:
        if not same_model(self.model, served) and served not in self._served_as:
            accept = served or "''"  # some servers name no model
            raise NoReplyError(
                f"another model answered: {served!r}, not {self.model!r}; --served-as {accept} accepts it", came=True
            )

    def _only_model(self) -> str:
        async def models() -> list[dict[str, Any]]:
            async with self._server() as server:
                return await server.models()

        try:
            names = [model["id"] for model in asyncio.run(models())]
        except NoReplyError as error:
            raise UserError(f"{self.url}: lists no model ({error}); say which: {self.url}#MODEL") from None
        if len(names) != 1:
            shown = ", ".join(names[:5]) or "none"
            raise UsageError(f"{self.url}: has {len(names)} models ({shown}); say which: {self.url}#MODEL")
        return names[0]

    def _server(self) -> Server:
        key = os.environ.get("OPENAI_API_KEY")
        return Server(self.url, key, timeout=self._timeout, connections=self._concurrency, names=self._names)


def same_model(asked: str, served: str) -> bool:
    """Whether a name that an endpoint gives is that of the model asked for: the same, a dated version, a path to it."""
    one, other = (name.casefold().rstrip("/").rpartition("/")[2] for name in (asked, served))
    return one == other or (other.startswith(one) and _DATED.fullmatch(other.removeprefix(one)) is not None)
