"""The LLMs of a run over one store of calls: so many at once, within a budget, and nothing asked twice."""

import asyncio
import os
from collections.abc import Awaitable, Iterable, Mapping, Sequence

from psyche_jax.errors import UsageError, UserError
from psyche_jax.llm.reply import NoReplyError, Reply
from psyche_jax.llm.retries import Pace, Patience, ask_patiently
from psyche_jax.llm.server import Names, Server
from psyche_jax.synth.calls import Call, CallStore
from psyche_jax.synth.config import SAMPLING, BudgetSection, CallsSection, LlmSection


class Client:
    """All LLMs of a run. To be used within one event loop.

    `sent` counts requests that went out, `faults` those of them that failed or brought nothing of use (`last_fault`
    says why the last one did), `known` calls whose reply was stored. `names` is filled with what each LLM calls our
    parameters, as configured and as its server turns out to want them; the next client may be given it.
    """

    def __init__(
        self,
        llms: Sequence[LlmSection],
        calls: CallsSection,
        budget: BudgetSection,
        store: CallStore,
        names: dict[str, Names] | None = None,
    ) -> None:
        names = {} if names is None else names
        self._llms = {llm.name: llm for llm in llms}
        self._budget = budget
        self._store = store
        self._give_up_after = calls.give_up_after

        # Calls under way and patience are limited for all LLMs together; each has a pace and connections of its own.
        self._slots = asyncio.Semaphore(calls.concurrency)
        self._asking: dict[str, asyncio.Task[Reply]] = {}
        self._patience = Patience(
            calls.retries,
            calls.retries + 1,  # an answer that is none is one fault like another
            calls.first_wait_seconds,
            calls.longest_wait_seconds,
            calls.longest_rest_seconds,
            "calls.longest_rest_seconds",
        )
        self._paces = {llm.name: Pace(_title(llm), llm.requests_per_minute, llm.tokens_per_minute) for llm in llms}
        self._servers = {
            llm.name: Server(
                llm.base_url,
                _key(llm),
                timeout=llm.timeout_seconds,
                connections=calls.concurrency,
                names=names.setdefault(llm.name, dict(llm.parameters)),
            )
            for llm in llms
        }

        # What earlier starts of the run spent counts in its budget.
        self._stopping = False
        self.sent = self.faults = self.known = self.failed = 0
        self.last_fault = ""
        self.tokens = 0
        self.cost = 0.0
        for usage in store.usage():
            self._spend(usage.llm, usage.prompt_tokens, usage.completion_tokens)

    def request(self, llm: str, prompt: str, messages: Sequence[Mapping[str, str]], sample: int = 0) -> Call:
        """What an LLM is asked, with the parameters that its section names."""
        section = self._llms[llm]
        sent = [name for name in SAMPLING if section.parameters.get(name, "") is not None]
        parameters = tuple((name, getattr(section, name)) for name in sent)
        return Call(llm, section.model, prompt, tuple(messages), parameters, sample)

    async def reply(self, call: Call) -> Reply:
        """The stored reply to a call, or that of the same call now under way, or a new one.

        Where the server refused this request alone, `finish` is `refused` and `text` what it said.

        Raises:
          UserError: the server refuses all calls (a wrong key, say), the budget is used up, or too many calls failed.
          NoReplyError: this call got no reply, after all retries.
        """
        if known := self._store.find(call.key):
            self.known += 1
            return known
        if call.key not in self._asking:
            self._asking[call.key] = asyncio.create_task(self._ask(call))
            self._asking[call.key].add_done_callback(lambda _: self._asking.pop(call.key, None))
        return await asyncio.shield(self._asking[call.key])

    def forget(self, call: Call) -> None:
        """Ask for this reply again when it is wanted again."""
        self._store.forget(call.key)

    def fault(self, llm: str, reason: str) -> None:
        """Count a request that failed, or whose reply is of no use."""
        self.faults += 1
        self.last_fault = f"{llm}: {reason}"

    def temperature(self, llm: str) -> float:
        """How it samples."""
        return self._llms[llm].temperature

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

    async def _ask(self, call: Call) -> Reply:
        llm, pace = self._llms[call.llm], self._paces[call.llm]
        body = {"model": llm.model, "messages": call.messages, **dict(call.parameters)}
        if llm.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}

        def once() -> Awaitable[Reply]:
            self.sent += 1
            return self._servers[llm.name].ask(body, {"Idempotency-Key": call.key}, llm.timeout_seconds)

        def on_fault(error: NoReplyError) -> None:
            self.fault(llm.name, _reason(error))
            self._check_running()

        # A slot is held also while a call waits to be tried again: there are never more calls in flight than slots.
        async with self._slots:
            self._check_budget()
            self._check_running()
            await self._store.opened(call)
            try:
                reply = _counted(call, await ask_patiently(once, self._patience, pace, on_fault))
            except NoReplyError as error:
                reply = self._refused(llm, error)
            asked, said = reply.prompt_tokens or 0, reply.completion_tokens or 0
            self._spend(llm.name, asked, said)
            pace.spend(asked + said)
            await self._store.answered(call.key, reply)
        return reply

    def _refused(self, llm: LlmSection, error: NoReplyError) -> Reply:
        """Reply `refused` where the server takes only this request not; any other error ends the call or the run."""
        if error.for_all:
            hint = f"is the key in {llm.key_env} right?" if error.status in (401, 403) else "see its base_url and model"
            raise UserError(f"{_title(llm)}: {error}; {hint}") from None
        if error.passing:
            self._check_running()
            self.failed += 1
            reason = f"{llm.name} at {llm.base_url}: {_reason(error)}"
            if self.failed >= self._give_up_after:
                raise UserError(f"{reason}; {self.failed} calls failed despite retries; start again later")
            raise NoReplyError(reason)
        return Reply(str(error), finish="refused", prompt_tokens=0, completion_tokens=0)

    def _spend(self, name: str, prompt_tokens: int, completion_tokens: int) -> None:
        self.tokens += prompt_tokens + completion_tokens
        if llm := self._llms.get(name):
            self.cost += llm.cost(prompt_tokens, completion_tokens)

    def _check_running(self) -> None:
        if self._stopping:
            raise NoReplyError("the run ends")

    def _check_budget(self) -> None:
        for name, spent in (("tokens", self.tokens), ("cost", self.cost)):
            limit = getattr(self._budget, name)
            if limit is not None and spent >= limit:
                raise UserError(f"budget.{name} of {limit:g} is used up ({spent:g}); raise it and start again")


def _title(llm: LlmSection) -> str:
    return f"LLM {llm.name} at {llm.base_url}"


def _reason(error: NoReplyError) -> str:
    return f"no answer: {error}" if error.came else str(error)


def check_keys(llms: Iterable[LlmSection]) -> None:
    """Raise UsageError for a key that the environment lacks."""
    for llm in llms:
        _key(llm)


def _key(llm: LlmSection) -> str | None:
    if llm.key_env is None:
        return None
    key = os.environ.get(llm.key_env, "").strip()
    if not key:
        raise UsageError(
            f"LLM {llm.name}: the environment has no {llm.key_env}; set it, or set key_env to null if no key is needed"
        )
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"LLM {llm.name}: {llm.key_env} has characters that no key has; was it copied correctly?")
    return key


def _counted(call: Call, reply: Reply) -> Reply:
    """A count that the server lacks: a character a token, which is more than tokenizers for Chinese need."""
    asked, said = reply.prompt_tokens, reply.completion_tokens
    if asked is None:
        asked = sum(len(turn["content"]) for turn in call.messages)
    if said is None:
        said = len(reply.reasoning) + len(reply.text)
    # A thought in the text is the one that the prompt asked for; a reasoning LLM's own before it is none of ours.
    text = reply.refusal or (reply.text if "<think>" in reply.text else reply.whole)
    return Reply(text, finish=reply.finish, prompt_tokens=asked, completion_tokens=said)
