"""What is asked again of a server of LLMs, how often, and after which wait: one policy for synthesis and evaluation.

openai's own retries fall short: each request waits alone where a server asks all to wait, and they end when the first
byte has come, so that they know nothing of an answer that breaks off or is none.
"""

import asyncio
import contextlib
import email.utils
import math
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from psyche_jax.llm.reply import ANSWERED, FILTERED, NoReplyError, Reply


@dataclass(frozen=True)
class Patience:
    """How long to go on asking.

    Args:
      retries: of one request, after faults that may pass.
      answers: that may come and be none, or not whole, before the request is given up.
      first_wait, longest_wait: seconds; the wait doubles from try to try.
      longest_rest: seconds that a server may ask for with Retry-After; more is cut to it.
      longest_rest_set_by: the setting that says so, to be named where it is cut.
    """

    retries: int = 4
    answers: int = 3
    first_wait: float = 0.5
    longest_wait: float = 8.0
    longest_rest: float = 120.0
    longest_rest_set_by: str = ""


class Pace:
    """When the next request to a server may leave: evenly spread over the minute, and not while the server rests.

    `name` is what the server is called where a long rest is told of.
    """

    def __init__(
        self, name: str, requests_per_minute: float | None = None, tokens_per_minute: float | None = None
    ) -> None:
        self._name = name
        self._request_seconds = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_seconds = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next = self._next_by_tokens = self._rested = 0.0
        self._told = False

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

    def rest(self, asked: float, patience: Patience) -> None:
        """Let nothing leave for as long as the server asked, within the limit. A long rest is told of once."""
        seconds = min(asked, patience.longest_rest)
        self._rested = max(self._rested, time.monotonic() + seconds)
        if not self._told and (seconds < asked or seconds > patience.longest_wait):
            self._told = True
            setting = f", see {patience.longest_rest_set_by}" if patience.longest_rest_set_by else ""
            cut = f"; waiting {seconds:g} s{setting}" if seconds < asked else ""
            print(f"{self._name}: asks to wait {asked:,.0f} s{cut}", file=sys.stderr, flush=True)


async def ask_patiently(
    ask: Callable[[], Awaitable[Reply]],
    patience: Patience,
    pace: Pace,
    on_fault: Callable[[NoReplyError], object] = lambda error: None,
) -> Reply:
    """The reply that `ask` brings, which is called again after what may pass; `on_fault` hears of each such fault.

    Raises:
      NoReplyError: of the last try; what will not pass is tried once.
    """
    tries = answers = 0
    while True:
        await pace.turn()
        try:
            reply = await ask()
            if reply.finish in (*ANSWERED, *FILTERED):
                return reply
            raise NoReplyError(reply.fault, came=True)  # the server itself says that it broke off, say
        except NoReplyError as error:
            if not error.passing:
                raise
            on_fault(error)
            # An answer costs what it took the model to write, so fewer of them are asked for than of requests sent.
            tries, answers = tries + 1, answers + error.came
            if answers == patience.answers:
                raise NoReplyError(f"{error}, {answers} times" if answers > 1 else str(error), came=True) from None
            if tries > patience.retries:
                raise
            # What the server asked for holds back all requests to it; our own guess only this one.
            if error.wait:  # not where it names a time that has passed
                pace.rest(error.wait, patience)
            else:
                longest = min(patience.first_wait * 2 ** (tries - 1), patience.longest_wait)
                await asyncio.sleep(longest * random.uniform(0.5, 1.0))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (RFC 9110, 10.2.3); None if it says none.

    OpenAI's `retry-after-ms` goes before it.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(ValueError):
            if math.isfinite(seconds := float(headers.get(name, "")) / unit):
                return max(0.0, seconds)
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    return None
