"""Calling LLMs: any base URL, bounded concurrency, rate limits, retries, a budget, and nothing asked twice."""

import asyncio
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import openai

from psyche_jax.errors import UsageError, UserError
from psyche_jax.llm import FAULTS, REFUSED, Names, Server, retry_after
from psyche_jax.llm_answers import ANSWERED, FILTERED, BrokenAnswerError, Piece
from psyche_jax.synth.calls import Call, CallStore, Reply
from psyche_jax.synth.config import BudgetSection, CallsSection, LlmSection


class CallFailedError(Exception):
    """A call got no reply, after all retries."""


class _PassingError(Exception):
    """Something that may be gone at the next try. `wait`: seconds that the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Client:
    """All LLMs of a run over one store of calls. To be used within one event loop.

    `sent` counts requests that went out, `faults` those of them that failed or brought nothing of use (`last_fault`
    says why the last one did), `known` calls whose reply was stored. `names`: what the LLMs, by their names, call our
    parameters; what they refuse is added.
    """

    def __init__(
        self,
        llms: Sequence[LlmSection],
        calls: CallsSection,
        budget: BudgetSection,
        store: CallStore,
        names: Mapping[str, Names] | None = None,
    ) -> None:
        self._llms = {llm.name: llm for llm in llms}
        self._calls = calls
        self._budget = budget
        self._store = store
        self._slots = asyncio.Semaphore(calls.concurrency)
        self._asking: dict[str, asyncio.Task[Reply]] = {}
        self._paces = {llm.name: _Pace(llm) for llm in llms}
        self._keys = {llm.name: _key(llm) for llm in llms}
        self._names = names or names_of(llms)
        self._servers: dict[str, Server] = {}
        self._stopping = False
        self._refusals = dict.fromkeys(self._llms, 0)  # of an LLM that took no request yet
        self._taken: set[str] = set()  # LLMs that took one
        self._told: set[str] = set()  # LLMs of whose long rests was told
        self.sent = self.faults = self.known = self.failed = 0
        self.last_fault = ""
        self.tokens = 0
        self.cost = 0.0
        for usage in store.usage():
            self._spend(usage.llm, usage.prompt_tokens, usage.completion_tokens)

    async def call(self, llm: str, prompt: str, messages: Sequence[Mapping[str, str]], sample: int = 0) -> Reply:
        """The reply to `messages`: the stored one, or that of a call now under way, or a new one.

        Raises:
          UserError: the server refuses all calls (a wrong key, say), the budget is used up, or too many calls failed.
          CallFailedError: this call got no reply, after all retries.
        """
        call = self._call(llm, prompt, messages, sample)
        key = call.key
        if known := self._store.find(key):
            self.known += 1
            return known
        if key not in self._asking:
            self._asking[key] = asyncio.create_task(self._ask(call, key))
            self._asking[key].add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(self._asking[key])

    async def forget(self, llm: str, prompt: str, messages: Sequence[Mapping[str, str]], sample: int = 0) -> None:
        """Ask for this reply again when it is wanted again."""
        await self._store.forget(self._call(llm, prompt, messages, sample).key)

    def fault(self, llm: str, reason: str) -> None:
        """Count a request that failed, or whose reply is of no use."""
        self.faults += 1
        self.last_fault = f"{llm}: {reason}"

    def temperature(self, llm: str) -> float:
        """How it samples."""
        return self._llms[llm].temperature

    def _call(self, llm: str, prompt: str, messages: Sequence[Mapping[str, str]], sample: int) -> Call:
        section = self._llms[llm]
        parameters = {
            "temperature": section.temperature,
            "top_p": section.top_p,
            "max_tokens": section.max_tokens,
        }
        sent = tuple(item for item in parameters.items() if section.parameters.get(item[0], "") is not None)
        return Call(llm, section.model, prompt, tuple(messages), sent, sample)

    def stop(self) -> None:
        """Ask for nothing more."""
        self._stopping = True

    async def finish(self) -> None:
        """Wait for the replies that are under way, and ask for nothing more."""
        self.stop()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    async def close(self) -> None:
        """End what is under way and the connections."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        for server in self._servers.values():
            await server.close()

    async def _ask(self, call: Call, key: str) -> Reply:
        llm = self._llms[call.llm]
        pace = self._paces[call.llm]
        async with self._slots:  # also while it waits to try again: never more calls without a reply than slots
            self._check_budget()
            if self._stopping:
                raise CallFailedError("the run ends")
            await self._store.opened(call)
            for attempt in range(self._calls.retries + 1):
                await pace.turn()
                self.sent += 1
                try:
                    async with asyncio.timeout(llm.timeout_seconds):
                        reply = await self._send(llm, call, key)
                    break
                except (TimeoutError, _PassingError) as error:
                    fault = error if isinstance(error, _PassingError) else _PassingError("no reply in time")
                    self.fault(llm.name, str(fault))
                if self._stopping:
                    raise CallFailedError("the run ends")
                if attempt < self._calls.retries:
                    if fault.wait:  # not where it names a time that has passed
                        pace.rest(self._rest(llm, fault.wait))
                    else:
                        longest = min(self._calls.first_wait_seconds * 2**attempt, self._calls.longest_wait_seconds)
                        await asyncio.sleep(longest * random.uniform(0.5, 1.0))
            else:
                self.failed += 1
                reason = f"{llm.name} at {llm.base_url}: {fault}"
                if self.failed >= self._calls.give_up_after:
                    raise UserError(f"{reason}; {self.failed} calls failed in spite of retries, start again later")
                raise CallFailedError(reason)
            if reply.finish == "refused" and call.llm not in self._taken:
                self._refusals[call.llm] += 1
                if self._refusals[call.llm] >= self._calls.give_up_after:
                    raise UserError(
                        f"LLM {llm.name} at {llm.base_url} refused {self._refusals[call.llm]} requests and took none: "
                        f"{reply.text}"
                    )
                return reply  # not stored: what is wrong with all requests will be mended
            if reply.finish != "refused":
                self._taken.add(call.llm)
            self._spend(call.llm, reply.prompt_tokens, reply.completion_tokens)
            pace.spend(reply.prompt_tokens + reply.completion_tokens)
            await self._store.answered(key, reply)
        return reply

    def _rest(self, llm: LlmSection, asked: float) -> float:
        """Seconds that an LLM is left alone, as its server said, within the limit. A long rest is told of once."""
        rest = min(asked, self._calls.longest_rest_seconds)
        if llm.name not in self._told and (rest < asked or rest > self._calls.longest_wait_seconds):
            self._told.add(llm.name)
            cut = f"; waits {rest:g} s, see calls.longest_rest_seconds" if rest < asked else ""
            print(f"LLM {llm.name} at {llm.base_url}: says to wait {asked:,.0f} s{cut}", file=sys.stderr, flush=True)
        return rest

    async def _send(self, llm: LlmSection, call: Call, key: str) -> Reply:
        body: dict[str, Any] = {"model": llm.model, "messages": call.messages, **dict(call.parameters)}
        if llm.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        server = self._server(llm)
        try:
            answer = await server.ask(body, {"Idempotency-Key": key})
            if answer.finish not in (*ANSWERED, *FILTERED):
                raise _PassingError(f"no answer: {answer.fault}")
            return _reply(call, answer)
        except BrokenAnswerError as error:
            raise _PassingError(str(error)) from None
        except openai.APIStatusError as error:
            return self._refused(llm, error)
        except FAULTS as error:
            raise _PassingError(server.said(error)) from None

    def _refused(self, llm: LlmSection, error: openai.APIStatusError) -> Reply:
        """What an error status means: try again, stop all, or a reply of its own to this one request."""
        status = error.status_code
        said = self._server(llm).said(error)
        if status in (408, 409, 425, 429) or status >= 500:
            raise _PassingError(said, retry_after(error.response.headers))
        if status in REFUSED:
            hint = f"is the key in {llm.key_env} right?" if status in (401, 403) else "see its base_url and model"
            raise UserError(f"LLM {llm.name} at {llm.base_url}: {said}; {hint}")
        return Reply(said, "refused", 0, 0)

    def _server(self, llm: LlmSection) -> Server:
        if llm.name not in self._servers:
            self._servers[llm.name] = Server(
                llm.base_url,
                self._keys[llm.name],
                timeout=llm.timeout_seconds,
                retries=0,  # ours are counted, and know Retry-After of any length
                connections=self._calls.concurrency,
                names=self._names[llm.name],
            )
        return self._servers[llm.name]

    def _spend(self, name: str, prompt_tokens: int, completion_tokens: int) -> None:
        self.tokens += prompt_tokens + completion_tokens
        if llm := self._llms.get(name):
            self.cost += (prompt_tokens * llm.input_price + completion_tokens * llm.output_price) / 1e6

    def _check_budget(self) -> None:
        for name, spent in (("tokens", self.tokens), ("cost", self.cost)):
            limit = getattr(self._budget, name)
            if limit is not None and spent >= limit:
                raise UserError(f"budget.{name} of {limit:g} is used up ({spent:g}); raise it and start again to go on")


class _Pace:
    """When the next request to an LLM may leave: evenly spread over the minute, and not while its server rests."""

    def __init__(self, llm: LlmSection) -> None:
        self._request_seconds = 60 / llm.requests_per_minute if llm.requests_per_minute else 0.0
        self._token_seconds = 60 / llm.tokens_per_minute if llm.tokens_per_minute else 0.0
        self._next = self._next_by_tokens = self._rested = 0.0

    async def turn(self) -> None:
        """Wait for one's turn."""
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._request_seconds
        if turn > now:
            await asyncio.sleep(turn - now)
        while (wait := max(self._rested, self._next_by_tokens) - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def spend(self, tokens: int) -> None:
        """Count the tokens of a reply."""
        self._next_by_tokens = max(time.monotonic(), self._next_by_tokens) + tokens * self._token_seconds

    def rest(self, seconds: float) -> None:
        """Nothing leaves for that long: the server said Retry-After."""
        self._rested = max(self._rested, time.monotonic() + seconds)


def names_of(llms: Sequence[LlmSection]) -> dict[str, Names]:
    """What LLMs call our parameters, as configured."""
    return {llm.name: dict(llm.parameters) for llm in llms}


def _key(llm: LlmSection) -> str | None:
    if llm.key_env is None:
        return None
    key = os.environ.get(llm.key_env, "").strip()
    if not key:
        raise UsageError(
            f"LLM {llm.name}: the environment has no {llm.key_env}; set it, or key_env to null if no key is wanted"
        )
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"LLM {llm.name}: {llm.key_env} holds characters that no key has; was it copied whole?")
    return key


def _reply(call: Call, answer: Piece) -> Reply:
    """A count that the server lacks: a character a token, which is more than tokenizers for Chinese need."""
    asked, said = answer.prompt_tokens, answer.completion_tokens
    if asked is None:
        asked = sum(len(turn["content"]) for turn in call.messages)
    if said is None:
        said = len(answer.reasoning) + len(answer.text)
    # A thought in the text is the one that the prompt asked for; a reasoning LLM's own before it is none of ours.
    text = answer.refusal or (answer.text if "<think>" in answer.text else answer.whole)
    return Reply(text, answer.finish or "stop", asked, said)
